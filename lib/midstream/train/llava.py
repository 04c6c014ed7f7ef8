"""LLaVA-type models put together from parts, trained behind a frozen tower, and asked one question at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midstream.train import packing
from midstream.train.packing import IGNORED


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as tokens; the answer ends with the token that ends it."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


def assemble(tower: Any, language: Any, projector: nn.Module, image_token: int, tokens: int) -> Any:
    """`LlavaForConditionalGeneration` around a CLIP tower, a causal language model and a projector, nothing copied.

    The projector gets the patches of the tower's last block but one, class token left out, as in LLaVA-1.5, and gives
    `tokens` visual tokens, which stand where `image_token` does.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.model.multi_modal_projector = projector
    return model.eval()


class CachedTower(nn.Module):
    """Stands in for a frozen tower: it is given what the tower's chosen layer gave (batch, 1 + patches, width)."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.config = tower.config

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """The cached values as the last hidden state but one, where LLaVA looks for them."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, hidden_states=(pixel_values, pixel_values))


@torch.no_grad()
def tower_features(tower: Any, pixel_values: Tensor, batch_size: int = 64) -> Tensor:
    """What LLaVA-1.5 reads of a tower, class token included: (images, 1 + patches, width), on the CPU."""
    found = []
    for images in pixel_values.split(batch_size):
        states = tower(images.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
        found.append(states[-2].float().cpu())
    return torch.cat(found)


def pack(rows: Sequence[Sequence[Turn]], beginning: Sequence[int], pad: int) -> dict[str, Tensor]:
    """Rows for training: `beginning` and then turns, each as if it were the only one (`midstream.train.packing`)."""
    packed = []
    for turns in rows:
        packed.append(packing.Row())
        packed[-1].show(beginning)
        for turn in turns:
            packed[-1].ask(turn.question, turn.answer)
    return packing.pack(packed, pad)


def ask(turns: Sequence[Turn], beginning: Sequence[int], pad: int) -> dict[str, Tensor]:
    """Rows for testing: `beginning` and one turn each, padded on the right, as any processor makes them.

    Returns `input_ids`, `attention_mask` and `labels` of (rows, tokens); only answers are labelled.
    """
    packed = pack([[turn] for turn in turns], beginning, pad)
    lengths = torch.tensor([len(beginning) + len(turn.question) + len(turn.answer) for turn in turns])
    present = torch.arange(packed["input_ids"].shape[1]) < lengths[:, None]
    return {"input_ids": packed["input_ids"], "attention_mask": present.long(), "labels": packed["labels"]}


def by_length(turns: Sequence[Turn], size: int) -> Iterator[list[int]]:
    """The places of turns in batches of similar length."""
    order = sorted(range(len(turns)), key=lambda n: len(turns[n].question) + len(turns[n].answer))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def exact_answers(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Whether greedy decoding would give each row's whole answer, (rows,), from one forward of rows with one turn.

    Each token of the answer is the likeliest one after the true tokens before it, which is the same thing.
    """
    labels = inputs["labels"][:, 1:].to(model.device)
    arguments = {name: value.to(model.device) for name, value in inputs.items() if name != "labels"}
    predicted = model(**arguments).logits[:, :-1].argmax(-1)
    return ((predicted == labels) | (labels == IGNORED)).all(1).cpu()


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    """The `count` likeliest tokens after each row's question, one by one: (rows, count); answers are not looked at."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    unanswered = inputs["attention_mask"].bool() & (inputs["labels"] == IGNORED)
    length = unanswered.sum(1)
    rows = torch.arange(len(length), device=length.device)
    room = inputs["input_ids"].new_zeros(len(length), count)
    ids = torch.cat([inputs["input_ids"] * unanswered, room], 1)
    for step in range(count):
        mask = torch.arange(ids.shape[1], device=length.device) < (length + step)[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long(), pixel_values=inputs["pixel_values"]).logits
        ids[rows, length + step] = logits[rows, length + step - 1].argmax(-1)
    return torch.stack([ids[rows, length + step] for step in range(count)], 1).cpu()
