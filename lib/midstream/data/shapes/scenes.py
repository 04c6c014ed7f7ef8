"""Scenes: what things there are, where they stand, and how they are drawn at random from one seed.

Lengths are shares of the image's side; x grows to the right, y downwards, depth away from the viewer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from midstream.errors import RequestError

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.14, 0.66, 0.24),
    "blue": (0.20, 0.32, 0.90),
    "yellow": (0.96, 0.84, 0.16),
    "purple": (0.56, 0.22, 0.74),
    "orange": (0.98, 0.52, 0.10),
    "cyan": (0.16, 0.80, 0.86),
    "pink": (0.98, 0.50, 0.76),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.08, "large": 0.14}
"""Radius of the circle around which each shape is drawn."""
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = {"black": 0.06, "gray": 0.5, "white": 0.94}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
CELL_CENTRES = (1 / 6, 1 / 2, 5 / 6)
JITTER = 0.04
"""How far from its cell's centre a thing may stand, in each direction."""

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    depth: float
    """0 is nearest; a nearer thing covers those behind it."""
    scale: float = 1.0
    """Factor on the radius that its size stands for; videos change it as things grow or shrink."""

    @property
    def radius(self) -> float:
        """Of the circle around which the shape is drawn."""
        return SIZES[self.size] * self.scale

    @property
    def position(self) -> str:
        """The name of the cell it stands in: `top left`, …, `center`, …, `bottom right`."""
        row, column = (min(2, max(0, int(coordinate * 3))) for coordinate in (self.y, self.x))
        return f"{ROWS[row]} {COLUMNS[column]}".strip() or "center"

    @property
    def stands_clearly(self) -> bool:
        """Whether it is far enough from its cell's edges for the cell's name to be beyond doubt."""
        return all(abs(coordinate * 3 % 1 - 0.5) < 0.3 for coordinate in (self.x, self.y))


@dataclass(frozen=True)
class Scene:
    """Things before a background of one gray."""

    things: tuple[Thing, ...]
    background: str = "black"


@dataclass(frozen=True)
class Spec:
    """What scenes may contain."""

    things: tuple[int, int] = (1, 4)
    """Fewest and most things; at most 9, one a cell, and one more where two overlap."""
    overlap: float = 0.25
    """Share of the scenes of two or more things in which one stands before another."""
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    sizes: tuple[str, ...] = tuple(SIZES)
    textures: tuple[str, ...] = TEXTURES
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    held_out: bool = False
    """Whether some pairs of colour and shape are kept for the test split: none of them in train, one at least in
    every test scene."""

    def __post_init__(self) -> None:
        if not 1 <= self.things[0] <= self.things[1] <= len(CELL_CENTRES) ** 2:
            raise RequestError(f"Scenes hold 1 to 9 things, fewest first, not {self.things}.")
        if self.held_out and (len(self.colours) < 2 or len(self.shapes) < 2):
            raise RequestError("Holding out pairs of colour and shape takes at least two colours and two shapes.")


ANYTHING = Spec()
"""The default: all attributes, one to four things, nothing held out."""


def held_out_pairs(spec: Spec = ANYTHING) -> tuple[tuple[str, str], ...]:
    """The pairs of colour and shape kept for the test split: every colour and every shape occurs in other pairs."""
    return tuple(
        (colour, shape)
        for row, colour in enumerate(spec.colours)
        for column, shape in enumerate(spec.shapes)
        if (row + column) % max(len(spec.colours), len(spec.shapes)) == 0
    )


def scenes(count: int, *, seed: int = 0, split: Split = "train", spec: Spec = ANYTHING, start: int = 0) -> list[Scene]:
    """Scenes number `start` to `start + count - 1` of a split; each depends on its own number and the seed alone."""
    return [scene(number, seed=seed, split=split, spec=spec) for number in range(start, start + count)]


def scene(number: int, *, seed: int = 0, split: Split = "train", spec: Spec = ANYTHING) -> Scene:
    """One scene of a split. Raises `RequestError` for an unknown split."""
    if split not in ("train", "test"):
        raise RequestError(f"A split is 'train' or 'test', not {split!r}.")
    rng = random.Random(f"scene/{seed}/{split}/{number}")
    things = tuple(_things(rng, spec))
    if spec.held_out:
        things = _with_held_out(things, rng, spec) if split == "test" else _without_held_out(things, rng, spec)
    return Scene(things, rng.choice(spec.backgrounds))


def _things(rng: random.Random, spec: Spec) -> Iterator[Thing]:
    """Things in cells of their own, at depths of their own; sometimes the last one overlaps the one before it."""
    count = rng.randint(*spec.things)
    cells = rng.sample([(x, y) for x in CELL_CENTRES for y in CELL_CENTRES], count)
    depths = rng.sample(range(count), count)
    overlaps = count > 1 and rng.random() < spec.overlap
    previous: Thing | None = None
    for number, ((x, y), depth) in enumerate(zip(cells, depths, strict=True)):
        x, y = x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER)
        thing = _thing(rng, spec, x, y, depth / 9)
        if overlaps and previous and number == count - 1:
            thing = _beside(thing, previous, rng)
        yield thing
        previous = thing


def _thing(rng: random.Random, spec: Spec, x: float, y: float, depth: float) -> Thing:
    shape, colour, size, texture = map(rng.choice, (spec.shapes, spec.colours, spec.sizes, spec.textures))
    return Thing(shape, colour, size, texture, x, y, depth)


def _beside(thing: Thing, other: Thing, rng: random.Random) -> Thing:
    """The thing moved so that it covers part of the other or is covered by it, towards the image's middle."""
    reach = 0.65 * (thing.radius + other.radius)  # near enough to hide a part, too far to hide all
    across = reach if other.x < 0.5 else -reach
    down = rng.uniform(-0.5, 0.5) * reach
    return replace(thing, x=other.x + across, y=min(0.9, max(0.1, other.y + down)))


def overlapping(one: Thing, other: Thing) -> bool:
    """Whether one thing hides part of the other."""
    distance = ((one.x - other.x) ** 2 + (one.y - other.y) ** 2) ** 0.5
    return distance < 0.85 * (one.radius + other.radius)


def _without_held_out(things: Sequence[Thing], rng: random.Random, spec: Spec) -> tuple[Thing, ...]:
    """Things of a held-out pair get another colour."""
    pairs = set(held_out_pairs(spec))

    def allowed(thing: Thing) -> Thing:
        if (thing.colour, thing.shape) not in pairs:
            return thing
        return replace(thing, colour=rng.choice([c for c in spec.colours if (c, thing.shape) not in pairs]))

    return tuple(allowed(thing) for thing in things)


def _with_held_out(things: Sequence[Thing], rng: random.Random, spec: Spec) -> tuple[Thing, ...]:
    """One thing at least is of a held-out pair."""
    colour, shape = rng.choice(held_out_pairs(spec))
    chosen = rng.randrange(len(things))
    return tuple(
        replace(thing, colour=colour, shape=shape) if number == chosen else thing for number, thing in enumerate(things)
    )
