"""Recipe of `shapes-clip`: image and text towers trained together to find each other's partner.

Scenes can be told apart by colours and places alone, and then a thing's patches do not tell its shape. Two remedies:
the image tower first learns to name the attributes of the thing at a patch; then half of a batch are twins of the
other half, in which one attribute of one thing is another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from midstream.data import shapes
from midstream.train.loop import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.train.recipes import _shapes as world
from midstream.zoo.loaded import Loaded

BATCH = 128
NAMED = 64
"""Scenes a step of the first stage."""
NAME = Schedule(steps=900, learning_rate=2e-3, muon=5e-3, warmup=0.05, floor=0.1, weight_decay=0.05)
CONTRAST = Schedule(steps=1000, learning_rate=1e-3, muon=2e-3, warmup=0.06, weight_decay=0.05)
NAMED_LAYER = -2
"""The hidden state that names things: the one that LLaVA reads."""
LONGEST_CAPTION = 64
CHANGED = ("shape", "shape", "texture", "texture", "size", "colour")
"""What twins differ in; what is hard to see is drawn more often."""
CANDIDATES = 100
"""Captions among which the right one is to be found."""
GROUPS = 20


def build() -> Any:
    """The untrained model: CLIP's own class, 64 patches of 8 pixels, width 128, 4 and 3 blocks."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"image_size": world.SIZE, "patch_size": world.PATCH, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {
        "vocab_size": world.vocabulary_size(),
        "max_position_embeddings": LONGEST_CAPTION,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": world.PAD,
        "bos_token_id": world.BEGIN,
        "eos_token_id": world.END,
    }
    widths = {"hidden_size": world.WIDTH, "intermediate_size": 4 * world.WIDTH, "projection_dim": world.WIDTH}
    return CLIPModel(CLIPConfig(vision_config=vision | widths, text_config=text | widths, projection_dim=world.WIDTH))


def make(training: Training) -> Trained:
    """Name what is at a patch; then contrast 64 scenes and their 64 twins with their captions a step."""
    from transformers import CLIPProcessor

    model, tokenizer, seed = build(), world.tokenizer("<s> $A </s>"), training.recipe.seed
    model.set_attn_implementation("eager")  # at these sizes twice as fast on a CPU as the fused kernel's backward
    namer = Namer(model.vision_model)
    training.fit("name things", namer, _named(seed), _names, NAME, batch=NAMED, precision="bfloat16")
    training.fit("contrast", model, _batches(seed, tokenizer), _loss, CONTRAST, batch=BATCH, precision="bfloat16")
    return Trained(model, processor=CLIPProcessor(world.image_processor(), tokenizer))


# ------------------------------------------------------------------------------------------------------ naming


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": shapes.SHAPES,
    "texture": shapes.TEXTURES,
    "size": tuple(shapes.SIZES),
    "colour": tuple(shapes.COLOURS),
}


class Namer(nn.Module):
    """The image tower and one linear map an attribute, read where a thing's centre is."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleList([nn.Linear(world.WIDTH, len(values)) for values in ATTRIBUTES.values()])

    def forward(self, pixel_values: Tensor, image: Tensor, patch: Tensor) -> list[Tensor]:
        """Logits of each attribute, (things, values), for the things at `image` and `patch`, both (things,)."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states[NAMED_LAYER]
        things = states[image, patch + 1]  # after the class token
        return [head(things) for head in self.heads]


def _named(seed: int) -> Iterator[dict[str, Tensor]]:
    """Scenes in which nothing is covered, with the patch and the attributes of each thing."""
    start, spec = 0, shapes.Spec(overlap=0.0)
    while True:
        scenes = shapes.scenes(NAMED, seed=seed, start=start, spec=spec)
        start += len(scenes)
        things = [(number, thing) for number, scene in enumerate(scenes) for thing in scene.things]
        yield {
            "pixel_values": world.pixels(shapes.render(scenes, world.SIZE)),
            "image": torch.tensor([number for number, _ in things]),
            "patch": torch.tensor([patch_of(thing) for _, thing in things]),
            "names": torch.tensor(
                [[values.index(getattr(thing, field)) for field, values in ATTRIBUTES.items()] for _, thing in things]
            ),
        }


def patch_of(thing: shapes.Thing) -> int:
    """The patch in which the thing's centre lies, row by row from the top left."""
    side = world.SIZE // world.PATCH
    column, row = (min(side - 1, int(place * side)) for place in (thing.x, thing.y))
    return row * side + column


def _names(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["pixel_values"], batch["image"], batch["patch"])
    losses = [functional.cross_entropy(each.float(), batch["names"][:, number]) for number, each in enumerate(logits)]
    return torch.stack(losses).sum()


# -------------------------------------------------------------------------------------------------- contrasting


def _batches(seed: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Scenes never seen before and their twins, each with a caption of some wording that names everything."""
    rng, start = random.Random(seed), 0
    while True:
        scenes = shapes.scenes(BATCH // 2, seed=seed, start=start)
        start += len(scenes)
        scenes += [twin(scene, rng) for scene in scenes]
        inputs = tokenizer(_texts(scenes, rng), padding=True, return_tensors="pt")
        yield {
            "pixel_values": world.pixels(shapes.render(scenes, world.SIZE)),
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
        }


def twin(scene: shapes.Scene, rng: random.Random) -> shapes.Scene:
    """The scene with another value for one attribute of one thing."""
    chosen, field = rng.randrange(len(scene.things)), rng.choice(CHANGED)
    thing = scene.things[chosen]
    changed: Any = {field: rng.choice([value for value in ATTRIBUTES[field] if value != getattr(thing, field)])}
    things = (*scene.things[:chosen], replace(thing, **changed), *scene.things[chosen + 1 :])
    return replace(scene, things=things)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, return_loss=True).loss
    return loss


@torch.no_grad()
def measure(loaded: Loaded) -> dict[str, Measured]:
    """Retrieval among 100 captions of test scenes, and the choice between a caption and its twin's."""
    scenes, rng = shapes.scenes(CANDIDATES * GROUPS, split="test"), random.Random(0)
    texts, twins = _texts(scenes, rng), _texts([twin(scene, rng) for scene in scenes], rng)
    captions = images = against_twin = 0
    for start in range(0, len(scenes), CANDIDATES):
        chosen = slice(start, start + CANDIDATES)
        similarity = _similarity(loaded, scenes[chosen], texts[chosen] + twins[chosen]).cpu()
        among, truth = similarity[:, :CANDIDATES], torch.arange(CANDIDATES)
        captions += int((among.argmax(1) == truth).sum())
        images += int((among.argmax(0) == truth).sum())
        against_twin += int((among.diag() > similarity[:, CANDIDATES:].diag()).sum())
    split = f"test scenes, {CANDIDATES} candidates, wordings that name everything"
    return {
        "caption of an image": _percent(captions, split),
        "image of a caption": _percent(images, split),
        "caption against its twin": _percent(against_twin, "test scenes, two captions that differ in one attribute"),
    }


def _texts(scenes: list[shapes.Scene], rng: random.Random) -> list[str]:
    return [shapes.caption(scene, rng, rng.randrange(world.FULL_WORDINGS)) for scene in scenes]


def _percent(right: int, split: str) -> Measured:
    count = CANDIDATES * GROUPS
    return Measured(value=round(100 * right / count, 1), split=split, n=count)


def _similarity(loaded: Loaded, scenes: list[shapes.Scene], texts: list[str]) -> Tensor:
    """(images, texts)."""
    inputs = loaded.processor.tokenizer(texts, padding=True, return_tensors="pt").to(loaded.model.device)
    images = world.pixels(shapes.render(scenes, world.SIZE)).to(loaded.model.device)
    output: Tensor = loaded.model(pixel_values=images, **inputs).logits_per_image
    return output


RECIPE = Recipe(
    name="shapes-clip",
    title="CLIP of the shapes world",
    what="An image tower (64 patches of 8 pixels) and a text tower, each of width 128, that find each other's partner.",
    note="It knows the words of the shapes world alone, and images of 64 pixels.",
    data=Data(
        name="shapes",
        parameters={
            "scenes named": NAMED * NAME.steps,
            "scenes": BATCH // 2 * CONTRAST.steps,
            "twins": BATCH // 2 * CONTRAST.steps,
            "size": world.SIZE,
        },
        seed=0,
    ),
    make=make,
    measure=measure,
    minutes_cpu=20,
    minutes_gpu=2,
)
