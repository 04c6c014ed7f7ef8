"""Recipe of `shapes-clip`: image and text towers trained together, from scratch, to find each other's partner."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from midstream.data import shapes
from midstream.train.loop import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.train.recipes import _shapes as world
from midstream.zoo.loaded import Loaded

BATCH = 128
SCHEDULE = Schedule(steps=1400, learning_rate=1e-3, warmup=0.06, weight_decay=0.05)
LONGEST_CAPTION = 64
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
    """Contrast 128 images with their captions a step."""
    from transformers import CLIPProcessor

    model, tokenizer = build(), world.tokenizer("<s> $A </s>")
    model.set_attn_implementation("eager")  # at these sizes twice as fast on a CPU as the fused kernel's backward
    training.fit(
        "contrast", model, _batches(training.recipe.seed, tokenizer), _loss, SCHEDULE, batch=BATCH, precision="bfloat16"
    )
    return Trained(model, processor=CLIPProcessor(world.image_processor(), tokenizer))


def _batches(seed: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Scenes never seen before, each with a caption of some wording that names everything."""
    rng, start = random.Random(seed), 0
    while True:
        scenes = shapes.scenes(BATCH, seed=seed, start=start)
        start += BATCH
        texts = [shapes.caption(scene, rng, rng.randrange(world.FULL_WORDINGS)) for scene in scenes]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        yield {
            "pixel_values": world.pixels(shapes.render(scenes, world.SIZE)),
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
        }


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, return_loss=True).loss
    return loss


@torch.no_grad()
def measure(loaded: Loaded) -> dict[str, Measured]:
    """Retrieval among 100 candidates on test scenes, and among captions in which one word was changed."""
    scenes = shapes.scenes(CANDIDATES * GROUPS, split="test")
    rng = random.Random(0)
    texts = [shapes.caption(scene, rng, rng.randrange(world.FULL_WORDINGS)) for scene in scenes]
    right = {"caption of an image": 0, "image of a caption": 0}
    for start in range(0, len(scenes), CANDIDATES):
        chosen = slice(start, start + CANDIDATES)
        similarity = _similarity(loaded, scenes[chosen], texts[chosen])
        truth = torch.arange(CANDIDATES)
        right["caption of an image"] += int((similarity.argmax(1) == truth).sum())
        right["image of a caption"] += int((similarity.argmax(0) == truth).sum())
    split = f"test scenes, {CANDIDATES} candidates, wordings that name everything"
    return {
        name: Measured(value=round(100 * number / len(scenes), 1), split=split, n=len(scenes))
        for name, number in right.items()
    }


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
    data=Data(name="shapes", parameters={"scenes": BATCH * SCHEDULE.steps, "size": world.SIZE}, seed=0),
    make=make,
    measure=measure,
    minutes_cpu=20,
    minutes_gpu=2,
)
