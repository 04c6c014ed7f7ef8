"""Short videos: a scene a frame, in which one thing happens, and questions that only the order of frames settles.

Kinds: things come one after another (`order`), a thing grows or shrinks (`growth`), moves (`movement`), changes its
colour (`colour`), or the background brightens or darkens (`brightness`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from midstream.data.shapes.language import Question, a
from midstream.data.shapes.scenes import ANYTHING, BACKGROUNDS, CELL_CENTRES, JITTER, Scene, Spec, Split, Thing
from midstream.errors import RequestError

KINDS = ("order", "growth", "movement", "colour", "brightness")
GROWTH = (0.6, 1.4)
"""Factors on a thing's radius between which it grows or shrinks."""


@dataclass(frozen=True)
class Event:
    """What can be said of some consecutive frames."""

    first: int
    last: int
    text: str


@dataclass(frozen=True)
class Video:
    """Frames in order, each with one thing; what happens is read from them, so it is true of any frames."""

    kind: str
    frames: tuple[Scene, ...]

    @property
    def timeline(self) -> tuple[Event, ...]:
        """Runs of frames of which the same can be said, in order; they cover all frames."""
        texts = [_say(frame, self.kind) for frame in self.frames]
        starts = [number for number, text in enumerate(texts) if number == 0 or text != texts[number - 1]]
        ends = [*(start - 1 for start in starts[1:]), len(texts) - 1]
        return tuple(Event(start, end, texts[start]) for start, end in zip(starts, ends, strict=True))

    def reversed(self) -> Video:
        """The same frames, last one first."""
        return replace(self, frames=self.frames[::-1])


def videos(
    count: int,
    *,
    frames: int = 8,
    seed: int = 0,
    split: Split = "train",
    kinds: Sequence[str] = KINDS,
    spec: Spec = ANYTHING,
    start: int = 0,
) -> list[Video]:
    """Videos number `start` to `start + count - 1` of a split, kinds taking turns; the same ones for the same seed.

    Raises `RequestError` for fewer than 4 frames or an unknown kind.
    """
    if frames < 4:
        raise RequestError(f"A video has at least 4 frames, not {frames}.")
    if unknown := set(kinds) - set(KINDS):
        raise RequestError(f"There is no kind of video {sorted(unknown)[0]!r}; known are {', '.join(KINDS)}.")
    made = []
    for number in range(start, start + count):
        rng = random.Random(f"video/{seed}/{split}/{number}")
        kind = kinds[number % len(kinds)]
        made.append(Video(kind, _MAKERS[kind](rng, spec, frames)))
    return made


def video_question(video: Video, rng: random.Random) -> Question:
    """A question about what happens, with its answer; the alternatives it names come in either order."""
    return _QUESTIONS[video.kind](video, rng)


def alternatives(question: Question) -> tuple[str, str]:
    """The two answers that a question about a video names, as it names them."""
    first, _, second = question.text.rstrip("?").rpartition(" or ")
    return first.split()[-1], second


def _thing(rng: random.Random, spec: Spec, avoid: Sequence[Thing] = ()) -> Thing:
    """A thing somewhere, of a colour and shape that the others do not have."""
    x, y = (rng.choice(CELL_CENTRES) + rng.uniform(-JITTER, JITTER) for _ in range(2))
    colours = [colour for colour in spec.colours if colour not in {thing.colour for thing in avoid}]
    shapes = [shape for shape in spec.shapes if shape not in {thing.shape for thing in avoid}]
    return Thing(rng.choice(shapes), rng.choice(colours), rng.choice(spec.sizes), rng.choice(spec.textures), x, y, 0.0)


def _order(rng: random.Random, spec: Spec, frames: int) -> tuple[Scene, ...]:
    """Two or three things, each shown alone for a while; two where the frames, colours or shapes are few."""
    things: list[Thing] = []
    most = min(3 if frames >= 6 else 2, len(spec.colours), len(spec.shapes))
    for _ in range(rng.choice((2, 3)) if most == 3 else most):
        things.append(_thing(rng, spec, things))
    background = rng.choice(spec.backgrounds)
    cuts = sorted(rng.sample(range(2, frames - 1, 2 if frames >= 8 else 1), len(things) - 1))
    shown = [sum(frame >= cut for cut in cuts) for frame in range(frames)]
    return tuple(Scene((things[index],), background) for index in shown)


def _growth(rng: random.Random, spec: Spec, frames: int) -> tuple[Scene, ...]:
    thing, background = _thing(rng, spec), rng.choice(spec.backgrounds)
    low, high = GROWTH
    scales = [low + (high - low) * frame / (frames - 1) for frame in range(frames)]
    if rng.random() < 0.5:
        scales.reverse()
    return tuple(Scene((replace(thing, scale=scale),), background) for scale in scales)


def _movement(rng: random.Random, spec: Spec, frames: int) -> tuple[Scene, ...]:
    """From one side to the opposite one, along a row or a column."""
    thing, background = _thing(rng, spec), rng.choice(spec.backgrounds)
    axis, forwards = rng.choice("xy"), rng.random() < 0.5
    begin, end = (0.15, 0.85) if forwards else (0.85, 0.15)
    places = [begin + (end - begin) * frame / (frames - 1) for frame in range(frames)]
    return tuple(
        Scene((replace(thing, x=place) if axis == "x" else replace(thing, y=place),), background) for place in places
    )


def _colour(rng: random.Random, spec: Spec, frames: int) -> tuple[Scene, ...]:
    thing, background = _thing(rng, spec), rng.choice(spec.backgrounds)
    other = rng.choice([colour for colour in spec.colours if colour != thing.colour])
    cut = rng.randint(2, frames - 2)
    return tuple(
        Scene((thing if frame < cut else replace(thing, colour=other),), background) for frame in range(frames)
    )


def _brightness(rng: random.Random, spec: Spec, frames: int) -> tuple[Scene, ...]:
    thing, grays = _thing(rng, spec), list(BACKGROUNDS)
    if rng.random() < 0.5:
        grays.reverse()
    return tuple(Scene((thing,), grays[min(2, 3 * frame // frames)]) for frame in range(frames))


_MAKERS: dict[str, Callable[[random.Random, Spec, int], tuple[Scene, ...]]] = {
    "order": _order,
    "growth": _growth,
    "movement": _movement,
    "colour": _colour,
    "brightness": _brightness,
}


def _say(frame: Scene, kind: str) -> str:
    """What matters of a frame in a video of this kind."""
    thing = frame.things[0]
    name = f"{thing.colour} {thing.shape}"
    if kind == "movement":
        return f"{a(name)} at the {thing.position}"
    if kind == "brightness":
        return f"{a(name)} before {frame.background}"
    if kind == "growth":
        return f"{a('small' if thing.scale < 0.9 else 'middle' if thing.scale < 1.1 else 'large')} {name}"
    return a(name)


def _either(first: str, second: str, rng: random.Random) -> str:
    """`first or second`, or the other way round."""
    return " or ".join((first, second) if rng.random() < 0.5 else (second, first))


def _ask_order(video: Video, rng: random.Random) -> Question:
    """Which of two things, named by colour or by shape, comes first or last."""
    shown = list(dict.fromkeys(frame.things[0] for frame in video.frames))
    early, late = sorted(rng.sample(range(len(shown)), 2))
    field = rng.choice(("colour", "shape"))
    names = getattr(shown[early], field), getattr(shown[late], field)
    word = rng.choice(("first", "last"))
    return Question(
        "order", f"what {field} comes {word}, {_either(*names, rng)}?", names[0] if word == "first" else names[1]
    )


def _ask_growth(video: Video, rng: random.Random) -> Question:
    grows = video.frames[-1].things[0].radius > video.frames[0].things[0].radius
    shape = video.frames[0].things[0].shape
    return Question("growth", f"does the {shape} {_either('grow', 'shrink', rng)}?", "grow" if grows else "shrink")


def _ask_movement(video: Video, rng: random.Random) -> Question:
    first, last = video.frames[0].things[0], video.frames[-1].things[0]
    across, down = last.x - first.x, last.y - first.y
    words = ("left", "right") if abs(across) > abs(down) else ("up", "down")
    answer = words[(across if abs(across) > abs(down) else down) > 0]
    return Question("movement", f"does the {first.shape} move {_either(*words, rng)}?", answer)


def _ask_colour(video: Video, rng: random.Random) -> Question:
    """What the colour is at one end; the other end's colour is named as the alternative."""
    colours = video.frames[0].things[0].colour, video.frames[-1].things[0].colour
    where = rng.choice(("beginning", "end"))
    shape = video.frames[0].things[0].shape
    text = f"what colour is the {shape} at the {where}, {_either(*colours, rng)}?"
    return Question("colour", text, colours[0] if where == "beginning" else colours[1])


def _ask_brightness(video: Video, rng: random.Random) -> Question:
    grays = [BACKGROUNDS[video.frames[index].background] for index in (0, -1)]
    answer = "brighter" if grays[1] > grays[0] else "darker"
    return Question("brightness", f"does the picture get {_either('brighter', 'darker', rng)}?", answer)


_QUESTIONS: dict[str, Callable[[Video, random.Random], Question]] = {
    "order": _ask_order,
    "growth": _ask_growth,
    "movement": _ask_movement,
    "colour": _ask_colour,
    "brightness": _ask_brightness,
}

_WORDS = """
before after then first last comes or does grow shrink move up down beginning end picture get brighter darker middle
frame black gray white turns from to by
"""
VIDEO_WORDS: tuple[str, ...] = tuple(_WORDS.split())
"""The words of timelines and of questions about videos that captions and questions about scenes do not have."""
