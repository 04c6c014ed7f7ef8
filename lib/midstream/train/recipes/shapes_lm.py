"""Recipe of `shapes-lm`: a small Llama that reads captions of the shapes world and answers questions about them.

To look something up in a caption takes two steps, to gather what is said of each thing and to find the thing that is
asked for, and neither pays without the other. So the second is learned first, on things that come gathered: one vector
a thing, the sum of the embeddings of its words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from midstream.data import shapes
from midstream.train.loop import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.train.recipes import _shapes as world
from midstream.zoo.loaded import Loaded

THINGS_BATCH = 64
"""Rows a step of the first stage."""
BATCH = 32
THINGS = Schedule(steps=1000, learning_rate=2e-3, muon=4e-3, warmup=0.02, floor=0.2, weight_decay=0.05)
TEXT = Schedule(steps=700, learning_rate=1.5e-3, muon=3e-3, warmup=0.02, weight_decay=0.05)
THINGS_EVERY = 5
"""Every so many batches of the second stage, one is of the first."""
LENGTH = 320
"""Tokens at which a training row is cut."""
CONTEXT_WEIGHT = 0.1
"""Weight of the loss on captions and questions, beside the loss on answers."""
BLOCKS = 5
AGAIN = (0, 0, 1, 2)
"""How often a caption is said again in another wording, drawn for each row."""
ASKED = (*shapes.TYPES, "colour", "position", "relation", "comparison")
"""Types of the questions about gathered things, in each row."""
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
    seed, words = training.recipe.seed, world.tokenizer("<s> $A").get_vocab()
    things = _thing_batches(seed, words)
    training.fit("things", model, things, _loss, THINGS, batch=THINGS_BATCH, precision="bfloat16")
    training.fit("text", model, _batches(seed, words, things), _loss, TEXT, batch=BATCH, precision="bfloat16")
    return Trained(model, world.tokenizer("<s> $A"))


def _thing_batches(seed: int, words: dict[str, int]) -> Iterator[dict[str, Tensor]]:
    """Things, one vector each, with questions about them and what they are, in some wording."""
    rng, number = random.Random(seed), 0
    while True:
        scenes = shapes.scenes(THINGS_BATCH, seed=seed, start=number)
        number += len(scenes)
        rows, gathered = [], []
        for scene in scenes:
            things = rng.sample(scene.things, len(scene.things))
            gathered += [torch.tensor(world.encode(shapes.describe(thing), words)) for thing in things]
            asked = world.text_questions(scene, rng, rng.sample(ASKED, len(ASKED)))
            made = world.turns([world.IMAGE] * len(things), asked, words)
            rows.append(
                [replace(made, pairs=(*made.pairs, _told(scene, rng, rng.randrange(world.FULL_WORDINGS), words)))]
            )
        things_words = pad_sequence(gathered, batch_first=True, padding_value=world.PAD)
        yield {**world.pack(rows, LENGTH), "things": things_words}


def _batches(seed: int, words: dict[str, int], things: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    rng, number = random.Random(seed), 0
    for step in itertools.count(1):
        if step % THINGS_EVERY == 0:
            yield next(things)
            continue
        scenes = shapes.scenes(BATCH, seed=seed, start=number)
        number += BATCH
        yield world.pack([text_conversations([scene], rng, words) for scene in scenes], LENGTH)


def text_conversations(scenes: Sequence[shapes.Scene], rng: random.Random, words: dict[str, int]) -> list[world.Turns]:
    """Captions, each followed by questions and the caption again in other wordings, in any order."""
    made = []
    for scene in scenes:
        first, *others = rng.sample(range(world.FULL_WORDINGS), 1 + rng.choice(AGAIN))
        asked = world.text_questions(scene, rng, rng.sample(shapes.TYPES, len(shapes.TYPES)))
        told = world.turns(world.encode(shapes.caption(scene, rng, first) + ".", words), asked, words)
        pairs = [*told.pairs, *(_told(scene, rng, wording, words) for wording in others)]
        rng.shuffle(pairs)
        made.append(replace(told, pairs=tuple(pairs)))
    return made


def _told(scene: shapes.Scene, rng: random.Random, wording: int, words: dict[str, int]) -> tuple[Any, Any]:
    """A caption that is to be said without being asked."""
    return (), (*world.encode(shapes.caption(scene, rng, wording), words), world.END)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over answers, and a share of the mean over everything else."""
    inputs = {"input_ids": batch["input_ids"]}
    if "things" in batch:
        inputs = {"inputs_embeds": _with_things(model.get_input_embeddings(), batch)}
    where = {name: batch[name] for name in ("attention_mask", "position_ids")}
    logits = model(**inputs, **where).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    answers = batch["labels"][:, 1:] != world.IGNORED
    context = ~answers & (batch["input_ids"][:, 1:] != world.IMAGE) & (batch["input_ids"][:, 1:] != world.PAD)
    return losses[answers].mean() + CONTEXT_WEIGHT * losses[context].mean()


def _with_things(embedding: Any, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of the tokens, (rows, tokens, width), a thing's place holding the sum over its words."""
    words = batch["things"]
    gathered = (embedding(words) * (words != world.PAD).unsqueeze(-1)).sum(1)
    embedded = embedding(batch["input_ids"])
    places = (batch["input_ids"] == world.IMAGE).unsqueeze(-1)
    filled: Tensor = embedded.masked_scatter(places, gathered.to(embedded.dtype))
    return filled


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
    data=Data(
        name="shapes",
        parameters={"rows": THINGS_BATCH * THINGS.steps + BATCH * TEXT.steps},
        seed=0,
    ),
    make=make,
    measure=measure,
    minutes_cpu=20,
    minutes_gpu=3,
)
