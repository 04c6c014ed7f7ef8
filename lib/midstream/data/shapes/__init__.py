"""The shapes world: scenes of a few things, drawn, described, asked about and filmed, all from one seed.

    from midstream.data import shapes

    scenes = shapes.scenes(100, seed=0)
    images = shapes.render(scenes, size=64)
    rng = random.Random(0)
    texts = [shapes.caption(scene, rng) for scene in scenes]
    questions = [shapes.questions(scene, rng) for scene in scenes]

Nothing is stored: scene number n of a seed and split is the same everywhere, whatever else was drawn.
"""

from midstream.data.shapes.language import OPPOSITES, TYPES, WORDINGS, WORDS, Question, caption, describe, questions
from midstream.data.shapes.render import boxes, depth, masks, render
from midstream.data.shapes.scenes import (
    ANYTHING,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Spec,
    Thing,
    held_out_pairs,
    overlapping,
    scene,
    scenes,
)
from midstream.data.shapes.videos import KINDS, VIDEO_WORDS, Event, Video, alternatives, video_question, videos

VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys((*WORDS, *VIDEO_WORDS)))
"""Every word and mark of every text of this world."""

__all__ = [
    "ANYTHING",
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "OPPOSITES",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "TYPES",
    "VOCABULARY",
    "WORDINGS",
    "Event",
    "Question",
    "Scene",
    "Spec",
    "Thing",
    "Video",
    "alternatives",
    "boxes",
    "caption",
    "depth",
    "describe",
    "held_out_pairs",
    "masks",
    "overlapping",
    "questions",
    "render",
    "scene",
    "scenes",
    "video_question",
    "videos",
]
