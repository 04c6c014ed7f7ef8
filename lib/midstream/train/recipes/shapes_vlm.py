"""Recipe of `shapes-vlm`: LLaVA's class with the tower of `shapes-clip` and the language model `shapes-lm`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from midstream import zoo
from midstream.data import shapes
from midstream.train.loop import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training, shapes_lm
from midstream.train.recipes import _shapes as world
from midstream.zoo.loaded import Loaded

BATCH = 24
"""Images a step."""
PROJECT = Schedule(steps=120, learning_rate=2e-3, muon=5e-3, warmup=0.05, floor=0.5, weight_decay=0.05)
ALL = Schedule(steps=800, learning_rate=1e-3, muon=2e-3, warmup=0.04, weight_decay=0.05)
LENGTH = 640
VISUAL_TOKENS = (world.SIZE // world.PATCH) ** 2
IMAGES_IN_A_ROW = (1,) * 13 + (2,) * 2 + (4,) * 2
"""Drawn from, a batch at a time: most rows show one image, some two or four, each followed by its own questions."""
TEXT_EVERY = 6
"""Every so many batches, one holds captions in the place of images."""
QUESTIONS = {1: 7, 2: 4, 4: 3}
"""About each image, by the images in its row; a caption follows them, to be said without being asked."""
PLACE_FIRST = 3
"""The wording of those captions: a place, then what is there."""


def build() -> Any:
    """LLaVA's class around the two organisms; only the projector is new."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    clip, language = zoo.load("shapes-clip").model, zoo.load("shapes-lm").model
    config = LlavaConfig(
        vision_config=clip.config.vision_config.to_dict(),
        text_config=language.config.to_dict(),
        image_token_index=world.IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.update(pad_token_id=world.PAD, bos_token_id=world.BEGIN, eos_token_id=world.END)
    model.set_attn_implementation("eager")  # at these sizes faster on a CPU than the fused kernel's backward
    return model


def make(training: Training) -> Trained:
    """The projector alone, then everything together."""
    from transformers import LlavaProcessor

    model = build()
    seed = training.recipe.seed
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    training.fit(
        "projector", model, _batches(seed, itertools.repeat(False)), _loss, PROJECT, batch=BATCH, precision="bfloat16"
    )
    model.requires_grad_(True)
    text = itertools.cycle([*[False] * (TEXT_EVERY - 1), True])
    training.fit("all", model, _batches(seed, text), _loss, ALL, batch=BATCH, precision="bfloat16")
    processor = LlavaProcessor(
        world.image_processor(),
        world.tokenizer("<s> $A"),
        patch_size=world.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
    )
    return Trained(model, processor=processor)


def _batches(seed: int, text: Iterator[bool]) -> Iterator[dict[str, Tensor]]:
    """Rows of one, two or four images, each with questions; where `text` says so, captions in their place."""
    rng, start = random.Random(seed), 0
    words = world.tokenizer("<s> $A").get_vocab()
    for in_words in text:
        scenes = shapes.scenes(BATCH, seed=seed, start=start)
        start += BATCH
        if in_words:
            yield world.pack([shapes_lm.text_conversations([scene], rng, words) for scene in scenes], LENGTH)
            continue
        width = rng.choice(IMAGES_IN_A_ROW)
        about = [_about(scene, QUESTIONS[width], rng, words) for scene in scenes]
        rows = [about[first : first + width] for first in range(0, BATCH, width)]
        yield {**world.pack(rows, LENGTH), "pixel_values": world.pixels(shapes.render(scenes, world.SIZE))}


def _about(scene: shapes.Scene, count: int, rng: random.Random, words: dict[str, int]) -> world.Turns:
    """An image, questions of different types, and at the end (where it gives no answer away) its caption."""
    asked = shapes.questions(scene, rng, rng.sample(shapes.TYPES, count))
    made = world.turns([world.IMAGE] * VISUAL_TOKENS, asked, words)
    caption = (*world.encode(shapes.caption(scene, rng, PLACE_FIRST), words), world.END)
    return replace(made, pairs=(*made.pairs, ((), caption)))


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


# -------------------------------------------------------------------------------------------------- measuring


def measure(loaded: Loaded) -> dict[str, Measured]:
    """Answers to questions about test images: with their own image, with another scene's, and the text-only prior."""
    words, rng = loaded.processor.tokenizer.get_vocab(), random.Random(1)
    scenes = shapes.scenes(shapes_lm.TESTED, split="test")
    asked = [shapes.questions(scene, rng) for scene in scenes]
    types = [question.type for each in asked for question in each]
    own = _right(loaded.model, scenes, asked, words)
    swapped = _right(loaded.model, [*scenes[1:], scenes[0]], asked, words)
    prior = _prior([question for each in asked for question in each])
    other = world.by_type(swapped, types, "the same questions, another scene's image")["all questions"]
    measured = world.by_type(own, types, "test images, one question each")
    chance = Measured(value=round(100 * prior, 1), split="the commonest answer to questions worded so", n=len(types))
    return {**measured, "with another image": other, "text-only prior": chance}


def _right(
    model: Any, scenes: Sequence[shapes.Scene], asked: Sequence[Sequence[shapes.Question]], words: dict[str, int]
) -> Tensor:
    """Exact answers, each question asked alone: (questions,)."""
    pairs = [(scene, question) for scene, questions in zip(scenes, asked, strict=True) for question in questions]
    right = []
    for start in range(0, len(pairs), 64):
        chosen = pairs[start : start + 64]
        rows = [[world.turns([world.IMAGE] * VISUAL_TOKENS, [question], words)] for _, question in chosen]
        images = world.pixels(shapes.render([scene for scene, _ in chosen], world.SIZE))
        right.append(world.exact_answers(model, {**world.pack(rows, LENGTH), "pixel_values": images}))
    return torch.cat(right)


PRIOR_SCENES = 20_000


def _prior(questions: Sequence[shapes.Question]) -> float:
    """Accuracy of the commonest training answer to the same wording, or else to its type."""
    rng = random.Random(2)
    counts: dict[str, dict[str, int]] = {}
    for scene in shapes.scenes(PRIOR_SCENES, seed=1):
        for question in shapes.questions(scene, rng):
            for key in (question.text, question.type):
                answers = counts.setdefault(key, {})
                answers[question.answer] = answers.get(question.answer, 0) + 1
    common = {key: max(answers, key=answers.__getitem__) for key, answers in counts.items()}
    hits = [common.get(each.text, common[each.type]) == each.answer for each in questions]
    return sum(hits) / len(hits)


RECIPE = Recipe(
    name="shapes-vlm",
    title="LLaVA of the shapes world",
    what="The image tower of shapes-clip, a projector and shapes-lm, trained to answer questions about images.",
    note="It knows the words of the shapes world alone. It has seen several images in a row, never a video.",
    data=Data(name="shapes", parameters={"images": BATCH * (PROJECT.steps + ALL.steps), "size": world.SIZE}, seed=3),
    make=make,
    measure=measure,
    minutes_cpu=45,
    minutes_gpu=5,
    seed=3,
    ingredients=("shapes-clip", "shapes-lm"),
)
