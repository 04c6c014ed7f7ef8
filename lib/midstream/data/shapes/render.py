"""From scenes to pixels: anti-aliased images, and the masks, boxes and depths that go with them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from midstream.data.shapes.scenes import BACKGROUNDS, COLOURS, Scene, Thing
from midstream.errors import RequestError

SIDES = (32, 128)
"""Smallest and largest side of an image, in pixels."""
FAR = 1.0
"""The depth of the background."""


def render(scenes: Sequence[Scene], size: int = 64) -> np.ndarray:
    """Images of scenes: (scenes, size, size, 3), bytes. Raises `RequestError` for a side outside 32 … 128."""
    _check(size)
    images = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = _draw(scene, size)
    return images


def masks(scene: Scene, size: int = 64) -> np.ndarray:
    """What is seen of each thing: (things, size, size), true where it covers most of a pixel that nothing hides."""
    _check(size)
    seen = np.zeros((len(scene.things), size, size), dtype=bool)
    hidden = np.zeros((size, size), dtype=bool)
    for number in sorted(range(len(scene.things)), key=lambda index: scene.things[index].depth):
        whole = np.zeros((size, size), dtype=bool)
        rows, columns, coverage, _ = _pixels(scene.things[number], size)
        whole[rows, columns] = coverage > 0.5
        seen[number] = whole & ~hidden
        hidden |= whole
    return seen


def boxes(scene: Scene) -> np.ndarray:
    """The whole extent of each thing, hidden parts included: (things, 4) as left, top, right, bottom in 0 … 1."""
    extents = np.array([_extent(thing.shape) for thing in scene.things]).reshape(-1, 4)
    radii = np.array([thing.radius for thing in scene.things]).reshape(-1, 1)
    centres = np.array([(thing.x, thing.y, thing.x, thing.y) for thing in scene.things]).reshape(-1, 4)
    return np.clip(centres + radii * extents, 0, 1)


def depth(scene: Scene, size: int = 64) -> np.ndarray:
    """The depth of what each pixel shows: (size, size); 1 is the background."""
    depths = np.full((size, size), FAR)
    for thing, mask in zip(scene.things, masks(scene, size), strict=True):
        depths[mask] = thing.depth
    return depths


def _check(size: int) -> None:
    if not SIDES[0] <= size <= SIDES[1]:
        raise RequestError(f"Images are {SIDES[0]} to {SIDES[1]} pixels wide, not {size}.")


def _draw(scene: Scene, size: int) -> np.ndarray:
    """One image, the farthest thing first: (size, size, 3), bytes."""
    canvas = np.full((size, size, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    for thing in sorted(scene.things, key=lambda thing: -thing.depth):
        rows, columns, coverage, pattern = _pixels(thing, size)
        ink = pattern[..., None] * np.asarray(COLOURS[thing.colour], dtype=np.float32)
        window = canvas[rows, columns]
        window += coverage[..., None] * (ink - window)
    return np.rint(canvas * 255).astype(np.uint8)


def _pixels(thing: Thing, size: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The window of the image a thing may touch, how much of each of its pixels it covers, and its brightness there."""
    reach = 1.1 * thing.radius
    rows, columns = (
        slice(max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 2))
        for centre in (thing.y, thing.x)
    )
    x = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / size - thing.x) / thing.radius
    y = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / size - thing.y) / thing.radius
    distance = _DISTANCES[thing.shape](x[None, :], y[:, None])  # in radii, negative inside
    coverage = np.clip(0.5 - distance * thing.radius * size, 0, 1)
    return rows, columns, coverage, _pattern(thing.texture, x[None, :], y[:, None])


def _pattern(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of a texture, 1 where it is plain: stripes and dots are two fifths as bright."""
    if texture == "striped":
        dark = np.sin(2 * np.pi * (x + y)) + 0 * x
    elif texture == "dotted":
        dark = np.cos(1.5 * np.pi * x) * np.cos(1.5 * np.pi * y) - 0.25
    else:
        return np.ones(np.broadcast_shapes(x.shape, y.shape), dtype=np.float32)
    return (1 - 0.6 * np.clip(0.5 + 3 * dark, 0, 1)).astype(np.float32)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x**2 + y**2) - 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Point up; the bottom edge and two slanted ones."""
    slanted = (2 * np.abs(x) - y - 1) / np.sqrt(5)
    return np.maximum(slanted, y - 0.8)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: the distance to the edges between tips and notches, by symmetry in one tenth of the turn."""
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # 0 at a tip, π/5 at a notch
    radius = np.sqrt(x**2 + y**2)
    notch = 0.45
    along = np.array([notch * np.cos(np.pi / 5) - 1, notch * np.sin(np.pi / 5)])  # from tip to notch
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return (radius * np.cos(folded) - 1) * normal[0] + radius * np.sin(folded) * normal[1]


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across, down = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(across - 1, down - 0.33), np.maximum(across - 0.33, down - 1))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x**2 + y**2) - 0.72) - 0.28


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
"""Per shape, the signed distance to its edge in radii (of the star and the triangle: to its edges' lines)."""


@functools.cache
def _extent(shape: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape of radius 1 around the origin."""
    steps = np.linspace(-1.1, 1.1, 881)
    inside = _DISTANCES[shape](steps[None, :], steps[:, None]) <= 0
    rows, columns = steps[inside.any(1)], steps[inside.any(0)]
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])
