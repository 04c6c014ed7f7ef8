"""The shapes world put before LLaVA-type models: questions of every type and boxes, asked, trained on, and counted.

The bench on which projectors, and methods that cut visual tokens, are compared.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from midstream import zoo
from midstream.data import shapes
from midstream.train.llava import Turn, ask, by_length, exact_answers, greedy, pack, tower_features

Precision = Literal["bfloat16", "float32"]
IMAGE = "<image>"
"""The word in whose place a visual token stands."""
SIZE = 64
"""Side of the images, in pixels, before a tower's own processor."""
# ------------------------------------------------------------------------------------------- questions and images

BOX = "box"
"""The type of question that asks for a box, beside those of the shapes world."""
CAPTION = "caption"
PLACE_FIRST = 3
"""The wording of captions: a place, then what is there."""
_ASK_BOX = "<box>"


@dataclass(frozen=True)
class Asked:
    """One question about one image."""

    image: int
    type: str
    turn: Turn
    thing: int = -1
    """The object it is about, where that is known."""


@dataclass(frozen=True)
class Pool:
    """Images with their features and all that is asked about them."""

    scenes: list[shapes.Scene]
    features: Tensor
    """(images, 1 + N, d_v), class token first."""
    asked: list[list[Asked]]
    captions: list[Asked]
    """What is said of each image without being asked: a turn with an empty question."""


def box_words(bins: int) -> list[str]:
    """The words that a tokenizer learns: one that asks for a box and one for each bin of a coordinate."""
    return [_ASK_BOX, *(f"<{number}>" for number in range(bins))]


def to_bins(box: np.ndarray, bins: int) -> list[int]:
    """The bins (4,) of a box (left, top, right, bottom in 0 … 1)."""
    return [int(number) for number in np.clip((box * bins).astype(int), 0, bins - 1)]


def from_bins(numbers: np.ndarray, bins: int) -> np.ndarray:
    """The middles of bins (…, 4), as coordinates in 0 … 1."""
    return (numbers + 0.5) / bins


def iou(ours: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union (n,) of boxes (n, 4); 0 for a box without area."""
    low, high = np.maximum(ours[:, :2], truth[:, :2]), np.minimum(ours[:, 2:], truth[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(1) for boxes in (ours, truth)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-12)


def unique(scene: shapes.Scene, field: str) -> list[int]:
    """The things of a scene that no other one shares `field` with."""
    values = [getattr(thing, field) for thing in scene.things]
    return [number for number, value in enumerate(values) if values.count(value) == 1]


@dataclass(frozen=True)
class Bench:
    """A frozen vision tower, a language model to start from, and the words between them."""

    tower: Any
    language: Any
    tokenizer: Any
    image_token: int
    image_processor: Any
    bins: int
    """Words for a coordinate of a box."""
    precision: Precision

    @property
    def patches(self) -> int:
        """How many patches the tower makes of an image, its class token left out."""
        return int((self.tower.config.image_size // self.tower.config.patch_size) ** 2)

    @property
    def beginning(self) -> list[int]:
        """What stands before the visual tokens."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @property
    def pad(self) -> int:
        """The token that fills rows up."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def tokens(self, text: str) -> tuple[int, ...]:
        """A text's tokens, without a beginning."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def turn(self, question: str, answer: tuple[int, ...]) -> Turn:
        """A question with its answer and the token that ends it."""
        return Turn(self.tokens(question), (*answer, self.tokenizer.eos_token_id))

    def bin_tokens(self) -> list[int]:
        """The tokens of the bins, in order."""
        return list(self.tokenizer.convert_tokens_to_ids(box_words(self.bins)[1:]))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self.tower.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def rows(self, asked: Sequence[Sequence[Asked]], tokens: int) -> dict[str, Tensor]:
        """Training rows: the visual tokens' places, then each row's turns, none of which sees another."""
        return pack([[each.turn for each in row] for row in asked], self._before(tokens), self.pad)

    def single(self, asked: Sequence[Asked], tokens: int) -> dict[str, Tensor]:
        """Test rows: the visual tokens' places, then one turn."""
        return ask([each.turn for each in asked], self._before(tokens), self.pad)

    def _before(self, tokens: int) -> list[int]:
        return [*self.beginning, *[self.image_token] * tokens]


def prepare(vision: str, language: str, *, bins: int, precision: Precision, seed: int) -> Bench:
    """Load both towers, freeze the vision tower, and teach the language model the words for boxes."""
    eyes = zoo.load(vision, device="auto", dtype="float32")
    reader = zoo.load(language, device="auto", dtype="float32")
    if reader.model.device.type == "cpu":
        reader.model.set_attn_implementation("eager")  # for short rows faster there than the fused kernel's backward
    tower = getattr(eyes.model, "vision_model", eyes.model).requires_grad_(False)
    tokenizer = reader.tokenizer
    new = [word for word in (IMAGE, *box_words(bins)) if word not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_words(reader.model, len(tokenizer), len(new))
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    processor = getattr(eyes.processor, "image_processor", eyes.processor)
    return Bench(tower, reader.model, tokenizer, image_token, processor, bins, precision)


@torch.no_grad()
def add_words(language: Any, size: int, new: int) -> None:
    """Make room for a vocabulary of `size`; its last `new` words are drawn as the others are spread."""
    language.resize_token_embeddings(size, mean_resizing=False)
    for table in {language.get_input_embeddings().weight, language.get_output_embeddings().weight}:
        old = table[: size - new]
        table[size - new : size] = old.mean(0) + old.std(0) * torch.randn_like(table[size - new : size])


def questions_about(bench: Bench, scene: shapes.Scene, image: int, rng: random.Random, boxes: int) -> list[Asked]:
    """One question of every type, and one for the box of each of up to `boxes` things named by colour and shape."""
    asked = [
        Asked(image, each.type, bench.turn(each.text, bench.tokens(each.answer)))
        for each in shapes.questions(scene, rng)
    ]
    pairs = [(thing.colour, thing.shape) for thing in scene.things]
    named = [number for number, pair in enumerate(pairs) if pairs.count(pair) == 1]
    words, extents = bench.bin_tokens(), shapes.boxes(scene)
    for number in rng.sample(named, min(boxes, len(named))):
        answer = tuple(words[each] for each in to_bins(extents[number], bench.bins))
        question = f"{_ASK_BOX} the {pairs[number][0]} {pairs[number][1]}?"
        asked.append(Asked(image, BOX, bench.turn(question, answer), number))
    return asked


def attribute_questions(bench: Bench, scene: shapes.Scene, image: int) -> list[Asked]:
    """For things that shape or colour alone names: what is their colour, or their shape."""
    asked = []
    for field, known, phrase in (("colour", "shape", "the {}"), ("shape", "colour", "the {} thing")):
        for number in unique(scene, known):
            thing = scene.things[number]
            question = f"what {field} is {phrase.format(getattr(thing, known))}?"
            turn = bench.turn(question, bench.tokens(getattr(thing, field)))
            asked.append(Asked(image, field, turn, number))
    return asked


def pixels(bench: Bench, scenes: Sequence[shapes.Scene]) -> Tensor:
    """Images (scenes, 3, size, size) as the tower takes them."""
    images = shapes.render(scenes, SIZE)
    return bench.image_processor(list(images), return_tensors="pt")["pixel_values"]


def pool(
    bench: Bench,
    count: int,
    seed: int,
    *,
    spec: shapes.Spec = shapes.ANYTHING,
    split: Literal["train", "test"] = "train",
    boxes: int = 2,
) -> Pool:
    """Scenes of a seed and split with their features and questions, each with up to `boxes` questions for a box."""
    scenes = shapes.scenes(count, seed=seed, split=split, spec=spec)
    rng = random.Random(f"questions/{seed}/{split}")
    asked = [questions_about(bench, scene, image, rng, boxes) for image, scene in enumerate(scenes)]
    captions = [
        Asked(image, CAPTION, bench.turn("", bench.tokens(shapes.caption(scene, rng, PLACE_FIRST))))
        for image, scene in enumerate(scenes)
    ]
    features = [
        tower_features(bench.tower, pixels(bench, scenes[start : start + 256])) for start in range(0, count, 256)
    ]
    return Pool(scenes, torch.cat(features), asked, captions)


def shuffled_patches(features: Tensor, seed: int) -> Tensor:
    """The same features with the patches of each image in another order; the class token stays first."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(features.shape[1] - 1, generator=generator) for _ in features]) + 1
    return torch.cat([features[:, :1], features.gather(1, orders[..., None].expand(-1, -1, features.shape[2]))], 1)


def answers(bench: Bench, model: Any, images: Pool, features: Tensor, tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of type, questions and right answers, each question asked alone; a box is right at an IoU of 0.5."""
    asked = [each for row in images.asked for each in row]
    right: dict[str, list[float]] = {}
    overlaps: list[float] = []
    for chosen in by_length([each.turn for each in asked], 128):
        batch = [asked[place] for place in chosen]
        inputs = {**bench.single(batch, tokens), "pixel_values": features[[b.image for b in batch]]}
        with bench.autocast():
            hits = exact_answers(model, inputs).tolist()
        for each, hit in zip(batch, hits, strict=True):
            if each.type != BOX:
                right.setdefault(each.type, []).append(float(hit))
    for chosen in by_length([each.turn for each in asked if each.type == BOX], 128):
        boxes = [[each for each in asked if each.type == BOX][place] for place in chosen]
        overlaps += box_overlaps(bench, model, images, boxes, features, tokens)
    for kind, hits in right.items():
        yield {"type": kind, "n": len(hits), "right": sum(hits), "iou": math.nan}
    found = [float(overlap >= 0.5) for overlap in overlaps]
    yield {"type": BOX, "n": len(found), "right": sum(found), "iou": statistics.fmean(overlaps)}


def box_overlaps(
    bench: Bench, model: Any, images: Pool, asked: Sequence[Asked], features: Tensor, tokens: int
) -> list[float]:
    """The IoU of each box the model says, word by word, with the object's own; 0 where it says no box."""
    inputs = {**bench.single(asked, tokens), "pixel_values": features[[a.image for a in asked]]}
    with bench.autocast():
        said = greedy(model, inputs, 4).numpy()
    numbers = {token: number for number, token in enumerate(bench.bin_tokens())}
    bins = np.array([[numbers.get(int(token), -1) for token in row] for row in said])
    truth = np.stack([shapes.boxes(images.scenes[each.image])[each.thing] for each in asked])
    overlaps = iou(from_bins(bins, bench.bins), truth)
    return [float(x) for x in np.where((bins >= 0).all(1), overlaps, 0.0)]
