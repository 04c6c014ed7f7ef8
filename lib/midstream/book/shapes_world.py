"""What the book shows of the shapes world, drawn when the book is built."""

from __future__ import annotations

import html
import random
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from midstream import machine
from midstream.book.markup import bare_table, picture, raw, table
from midstream.data import shapes
from midstream.data.shapes import Scene, Spec, Thing, Video

SEED = 0
SIDES = (32, 64, 128)
INKS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (142, 69, 133))
"""Colours of marks over a picture: those of the book's figures."""


def gallery() -> str:
    """A few scenes at three resolutions, each with a caption."""
    rng = random.Random(SEED)
    cards = []
    for number, scene in enumerate(shapes.scenes(6, seed=SEED)):
        text = shapes.caption(scene, rng, wording=number % 4)
        images = "".join(picture(shapes.render([scene], size)[0], f"{size} pixels: {text}", 100) for size in SIDES)
        cards.append(f'<figure class="scene"><div class="pictures">{images}</div>{_below(text)}</figure>')
    return raw(f'<div class="scenes">{"".join(cards)}</div>')


def captions() -> str:
    """One scene in every wording."""
    scene, rng = _several(3), random.Random(SEED)
    texts = [shapes.caption(scene, rng, wording=number) for number in range(len(shapes.WORDINGS))]
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return raw(f'<div class="beside">{_picture(scene, texts[0])}<ol>{items}</ol></div>')


def questions() -> str:
    """Questions of every type about two scenes, with their answers."""
    rng, parts = random.Random(SEED), []
    for scene in (_several(2), _several(4)):
        rows = [[html.escape(part) for part in (q.type, q.text, q.answer)] for q in shapes.questions(scene, rng)]
        shown = _picture(scene, shapes.caption(scene, rng, wording=0))
        answers = bare_table(("Type", "Question", "Answer"), rows, "questions")
        parts.append(f'<div class="beside">{shown}{answers}</div>')
    return raw("".join(parts))


def truth() -> str:
    """Boxes, masks and depth of two scenes in which one thing hides a part of another."""
    found = [scene for scene in shapes.scenes(200, seed=SEED) if len(scene.things) == 3 and _hides(scene)][:2]
    cards = []
    for scene in found:
        names = ", ".join(f"{thing.colour} {thing.shape}" for thing in scene.things)
        views = (("picture", _enlarged(scene)), ("boxes", _boxed(scene)), ("masks", _masked(scene)))
        for label, pixels in (*views, ("depth", _depth(scene))):
            cards.append(f'<figure class="view">{picture(pixels, f"{label}: {names}", 150)}{_below(label)}</figure>')
    return raw(f'<div class="views">{"".join(cards)}</div>')


def videos() -> str:
    """One video of each kind as a film strip, with its timeline and a question."""
    rng = random.Random(SEED)
    strips = []
    for video in shapes.videos(len(shapes.KINDS), frames=8, seed=SEED):
        question = shapes.video_question(video, rng)
        events = [
            (f"{e.first + 1}–{e.last + 1}" if e.last > e.first else f"{e.first + 1}", e.text) for e in video.timeline
        ]
        lines = "".join(f"<li><b>{frames}</b> {html.escape(text)}</li>" for frames, text in events)
        alt = f"eight frames of a video of kind {video.kind}: " + "; ".join(text for _, text in events)
        asked = f"<p>{html.escape(question.text)} <b>{html.escape(question.answer)}</b></p>"
        body = f'<ol class="timeline">{lines}</ol>{asked}'
        head = f"<figcaption><b>{video.kind}</b></figcaption>"
        strips.append(f'<figure class="strip">{head}{picture(_strip(video), alt, 634)}{body}</figure>')
    return raw("".join(strips))


def splits() -> str:
    """All pairs of colour and shape with those that are held out framed, and scenes of both splits."""
    held = shapes.held_out_pairs()
    words = ", ".join(f"{colour} {shape}" for colour, shape in held)
    grid = picture(_pairs(set(held)), f"Every colour in every shape; framed in orange: {words}", 416)
    below = _below(f"Held out, framed: {words}.")
    rows = [f'<figure class="scene">{grid}{below}</figure>']
    for split, what in (("train", "Train: no scene has a framed pair."), ("test", "Test: every scene has one.")):
        found = shapes.scenes(5, seed=SEED, split=split, spec=Spec(held_out=True))  # type: ignore[arg-type]
        images = "".join(picture(shapes.render([scene], 64)[0], _names(scene), 100) for scene in found)
        rows.append(f'<figure class="scene"><div class="pictures wrapped">{images}</div>{_below(what)}</figure>')
    return raw("".join(rows))


def speed() -> str:
    """Scenes, images and texts a second on one thread, as measured while the book is built."""
    rng = random.Random(SEED)
    scenes = shapes.scenes(300, seed=SEED)
    measured: list[tuple[str, float]] = [("scenes", _rate(lambda: shapes.scenes(300, seed=1), 300))]
    for size in SIDES:
        measured.append((f"images of {size} pixels", _rate(lambda size=size: shapes.render(scenes[:100], size), 100)))  # type: ignore[misc]
    measured.append(("captions", _rate(lambda: [shapes.caption(scene, rng) for scene in scenes], 300)))
    asked = sum(len(shapes.questions(scene, rng)) for scene in scenes)
    measured.append(("questions", _rate(lambda: [shapes.questions(scene, rng) for scene in scenes], asked)))
    measured.append(("masks of one scene, 64 pixels", _rate(lambda: [shapes.masks(s, 64) for s in scenes[:100]], 100)))
    videos = shapes.videos(40, seed=SEED)
    frames = sum(len(video.frames) for video in videos)
    drawn = _rate(lambda: [shapes.render(video.frames, 64) for video in videos], frames)
    measured.append(("video frames of 64 pixels", drawn))
    rows = [[html.escape(what), f"{float(f'{rate:.2g}'):,.0f}"] for what, rate in measured]
    head = table(("What", "A second"), rows, "rates")
    return f"{head}\n\nOne thread of {machine.device()}, the best of three tries, when this book was built."


FRAGMENTS: dict[str, Callable[[], str]] = {
    "gallery": gallery,
    "captions": captions,
    "questions": questions,
    "truth": truth,
    "videos": videos,
    "splits": splits,
    "speed": speed,
}
"""The pieces of the page by the name under which it includes them."""


# ---------------------------------------------------------------- scenes


def _several(count: int) -> Scene:
    """The first scene of so many things."""
    return next(scene for scene in shapes.scenes(200, seed=SEED) if len(scene.things) == count)


def _hides(scene: Scene) -> bool:
    things = scene.things
    return any(shapes.overlapping(a, b) for number, a in enumerate(things) for b in things[:number])


def _names(scene: Scene) -> str:
    return ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in scene.things)


def _below(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>"


def _picture(scene: Scene, alt: str) -> str:
    return picture(shapes.render([scene], 128)[0], alt, 192)


# ---------------------------------------------------------------- overlays


def _enlarged(scene: Scene) -> np.ndarray:
    """At 128 pixels, each doubled, so that lines drawn over it are thin."""
    return shapes.render([scene], 128)[0].repeat(2, 0).repeat(2, 1)


def _boxed(scene: Scene) -> np.ndarray:
    canvas = Image.fromarray(_enlarged(scene))
    draw = ImageDraw.Draw(canvas)
    for number, box in enumerate(shapes.boxes(scene) * 255):
        draw.rectangle(list(box), outline=(255, 255, 255), width=5)
        draw.rectangle(list(box), outline=INKS[number], width=3)
    return np.asarray(canvas)


def _masked(scene: Scene) -> np.ndarray:
    """The picture in gray, with what is seen of each thing in a colour of its own."""
    gray = _enlarged(scene).mean(-1, keepdims=True).repeat(3, -1) * 0.35
    for number, mask in enumerate(shapes.masks(scene, 128)):
        gray[mask.repeat(2, 0).repeat(2, 1)] = INKS[number]
    return gray.astype(np.uint8)


def _depth(scene: Scene) -> np.ndarray:
    """Near is bright; the background is black."""
    depths = shapes.depth(scene, 128)
    nearness = np.where(depths < 1, 255 - 170 * depths / max(thing.depth + 1e-9 for thing in scene.things), 0)
    return np.repeat(nearness.astype(np.uint8)[..., None], 3, -1).repeat(2, 0).repeat(2, 1)


# ---------------------------------------------------------------- composites


def _strip(video: Video) -> np.ndarray:
    """The frames of a video side by side."""
    return _joined(shapes.render(video.frames, 64), len(video.frames))


def _pairs(held: set[tuple[str, str]]) -> np.ndarray:
    """A row a shape, a column a colour; the pairs that are held out have an orange frame."""
    side, cells = 48, []
    for shape in shapes.SHAPES:
        for colour in shapes.COLOURS:
            thing = Thing(shape, colour, "large", "plain", 0.5, 0.5, 0.0, scale=2.6)
            cell = shapes.render([Scene((thing,), "black")], side)[0].copy()
            if (colour, shape) in held:
                for edge in (np.s_[:3], np.s_[-3:], np.s_[:, :3], np.s_[:, -3:]):
                    cell[edge] = INKS[1]
            cells.append(cell)
    return _joined(cells, len(shapes.COLOURS))


def _joined(images: Sequence[np.ndarray] | np.ndarray, columns: int, gap: int = 4) -> np.ndarray:
    """Images of one size in rows of `columns`, with transparent gaps."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = np.dstack([image, np.full((height, width), 255)])
    return canvas


def _rate(work: Callable[[], Iterable[object]], count: int) -> float:
    """How many a second of this thread's processor time, the best of three tries."""
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return count / min(seconds)
