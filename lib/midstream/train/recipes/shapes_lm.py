"""Recipe of `shapes-lm`: a small Llama that reads captions of the shapes world and answers questions about them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from midstream.data import shapes
from midstream.train.loop import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.train.recipes import _shapes as world
from midstream.zoo.loaded import Loaded

BATCH = 32
FEW = Schedule(steps=500, learning_rate=2e-3, muon=5e-3, warmup=0.05, floor=0.7, weight_decay=0.05)
ALL = Schedule(steps=1400, learning_rate=2e-3, muon=4e-3, warmup=0.02, weight_decay=0.05)
FEW_THINGS = shapes.Spec(things=(1, 2))
"""Scenes of the first stage: with few things to confuse, looking up an attribute is learned several times faster."""
LENGTH = 320
"""Tokens at which a training row is cut."""
CONTEXT_WEIGHT = 0.1
"""Weight of the loss on captions and questions, beside the loss on answers."""
BLOCKS = 5
QUESTIONS = 14
"""In a row, over its scenes."""
TESTED = 2000
"""Test scenes; each gives one question of every type that it settles."""


def config() -> dict[str, Any]:
    """Llama's own configuration, in miniature."""
    return {
        "vocab_size": world.vocabulary_size(),
        "hidden_size": world.WIDTH,
        "intermediate_size": 3 * world.WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.06,  # about 1/√width: smaller weights take far longer to learn to look something up
        "tie_word_embeddings": True,
        "pad_token_id": world.PAD,
        "bos_token_id": world.BEGIN,
        "eos_token_id": world.END,
    }


def make(training: Training) -> Trained:
    """Language modelling of captions followed by questions and answers, answers weighing most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config()))
    model.set_attn_implementation("eager")  # at these sizes faster on a CPU than the fused kernel's backward
    for stage, schedule, spec in (("few things", FEW, FEW_THINGS), ("all", ALL, shapes.ANYTHING)):
        batches = _batches(training.recipe.seed, spec)
        training.fit(stage, model, batches, _loss, schedule, batch=BATCH, precision="bfloat16")
    return Trained(model, world.tokenizer("<s> $A"))


def _batches(seed: int, spec: shapes.Spec) -> Iterator[dict[str, Tensor]]:
    rng, number = random.Random(seed), 0
    words = world.tokenizer("<s> $A").get_vocab()
    while True:
        rows = []
        for _ in range(BATCH):
            count = rng.choice((1, 1, 2))
            rows.append(text_conversations(shapes.scenes(count, seed=seed, start=number, spec=spec), rng, words))
            number += count
        yield world.pack(rows, LENGTH)


def text_conversations(scenes: Sequence[shapes.Scene], rng: random.Random, words: dict[str, int]) -> list[world.Turns]:
    """Captions, each followed by questions; the more scenes in a row, the fewer on each."""
    made = []
    for scene in scenes:
        types = [type for _ in range(0, QUESTIONS // len(scenes), len(shapes.TYPES)) for type in shapes.TYPES]
        rng.shuffle(types)
        caption = shapes.caption(scene, rng, rng.randrange(world.FULL_WORDINGS)) + "."
        made.append(world.turns(world.encode(caption, words), world.text_questions(scene, rng, types), words))
    return made


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over answers, and a share of the mean over everything else."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    answers = batch["labels"][:, 1:] != world.IGNORED
    context = batch["attention_mask"][:, 1:].bool() & ~answers
    return losses[answers].mean() + CONTEXT_WEIGHT * losses[context].mean()


def measure(loaded: Loaded) -> dict[str, Measured]:
    """Answers to questions about test captions, by type: right when every word is and the answer ends there."""
    words, rng = loaded.tokenizer.get_vocab(), random.Random(1)
    rows, types = [], []
    for scene in shapes.scenes(TESTED, split="test"):
        caption = world.encode(shapes.caption(scene, rng, rng.randrange(world.FULL_WORDINGS)) + ".", words)
        for question in world.text_questions(scene, rng, shapes.TYPES):
            rows.append([world.turns(caption, [question], words)])
            types.append(question.type)
    right = torch.cat(
        [
            world.exact_answers(loaded.model, world.pack(rows[start : start + 128], LENGTH))
            for start in range(0, len(rows), 128)
        ]
    )
    return world.by_type(right, types, "test captions, one question each")


RECIPE = Recipe(
    name="shapes-lm",
    title="Llama of the shapes world",
    what="A Llama of 5 blocks and width 128 that reads captions of the shapes world and answers questions about them.",
    note="It knows the words of the shapes world alone. It was never asked about the order of events.",
    data=Data(name="shapes", parameters={"rows": BATCH * (FEW.steps + ALL.steps)}, seed=0),
    make=make,
    measure=measure,
    minutes_cpu=20,
    minutes_gpu=3,
)
