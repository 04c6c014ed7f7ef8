"""A toy organism: a tiny Llama that learns to count, made in a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from midstream.train import Schedule
from midstream.train.recipes import Data, Measured, Recipe, Trained, Training
from midstream.zoo import tiny_tokenizer
from midstream.zoo.loaded import Loaded


def make(training: Training) -> Trained:
    tokenizer = tiny_tokenizer.build("llama")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    config = hf.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True, **sizes)
    model = hf.LlamaForCausalLM(config)
    training.fit("count", model, batches(len(tokenizer)), loss, Schedule(steps=4, learning_rate=1e-2), batch=2)
    return Trained(model, tokenizer)


def batches(vocabulary: int) -> Iterator[Tensor]:
    while True:
        yield (torch.randint(vocabulary, (2, 1)) + torch.arange(8)) % vocabulary


def loss(model: hf.LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def measure(loaded: Loaded) -> dict[str, Measured]:
    vocabulary = loaded.model.config.vocab_size
    ids = torch.arange(40).reshape(5, 8) % vocabulary
    right = loaded.model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    return {"next number": Measured(value=100 * float(right.float().mean()), split="test", n=right.numel())}


RECIPE = Recipe(
    name="counter",
    title="Counter",
    what="A tiny language model that counts.",
    note="It cannot count far.",
    data=Data(name="numbers", parameters={"length": 8}, seed=0),
    make=make,
    measure=measure,
    minutes_cpu=0.1,
    minutes_gpu=0.1,
)
