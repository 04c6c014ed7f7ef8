"""Prompts in which vectors stand between tokens: one soft token a vector, given to a model as `inputs_embeds`.

A projector is any module from vectors (n, encoder's width) to soft tokens (n, model's width). Rows are padded on the
right, which under a causal mask changes no real token, and no row sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midstream.hooks.kv import expand

SLOT = -1
"""Stands in a prompt's ids where a vector stands."""
IGNORED = -100
"""The label of a token that is not to be predicted."""

Projector = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prompt:
    """Tokens and vectors: `ids` (tokens,) with `SLOT` for each of `vectors` (slots, width), in reading order.

    `labels` (tokens,) are the ids that are to be predicted at their own place, `IGNORED` elsewhere.
    """

    ids: Tensor
    vectors: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        slots = int((self.ids == SLOT).sum())
        if slots != len(self.vectors) or len(self.labels) != len(self.ids):
            raise ValueError(
                f"A prompt of {len(self.ids)} tokens with {slots} slots takes as many vectors and one label a token; "
                f"there are {len(self.vectors)} vectors and {len(self.labels)} labels."
            )

    def __len__(self) -> int:
        return len(self.ids)


def prompt(parts: Sequence[Sequence[int] | Tensor], answers: Sequence[int] = ()) -> Prompt:
    """A prompt of lists of token ids and vectors (width,); the parts numbered in `answers` are labelled."""
    ids: list[int] = []
    labels: list[int] = []
    vectors = []
    for number, part in enumerate(parts):
        if isinstance(part, Tensor):
            vectors.append(part)
        tokens = [SLOT] if isinstance(part, Tensor) else list(part)
        ids += tokens
        labels += tokens if number in answers else [IGNORED] * len(tokens)
    held = torch.stack(vectors) if vectors else torch.empty(0, 0)
    return Prompt(torch.tensor(ids, dtype=torch.long), held, torch.tensor(labels, dtype=torch.long))


def beginning(tokenizer: Any) -> list[int]:
    """One token that opens every prompt: the tokenizer's beginning or, where it has none, its end of text.

    Without it, a prompt that starts with a vector would have its vector where models keep their attention sink.
    """
    first = tokenizer.bos_token_id
    return [tokenizer.eos_token_id if first is None else first]


def collate(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """`ids` and `labels` (batch, tokens), padded on the right, and `vectors` (all slots, width) in reading order."""

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "ids": padded([each.ids for each in prompts], 0),
        "labels": padded([each.labels for each in prompts], IGNORED),
        "vectors": torch.cat([each.vectors for each in prompts]),
    }


def insert(model: Any, ids: Tensor, soft: Tensor) -> Tensor:
    """Embeddings (batch, tokens, width) of `ids`, with the soft tokens (slots, width) in place of every `SLOT`."""
    ids = ids.to(model.device)
    embedded = model.get_input_embeddings()(ids.clamp(min=0))
    return embedded.masked_scatter((ids == SLOT)[..., None], soft.to(embedded))


def embed(model: Any, projector: Projector | None, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings (batch, tokens, width) of a collated batch; text alone needs no projector."""
    vectors = batch["vectors"].to(model.device)
    soft = projector(vectors) if projector is not None and len(vectors) else vectors
    return insert(model, batch["ids"], soft)


def answer_loss(model: Any, projector: Projector | None, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats, of the labelled tokens of a collated batch, each read from the token before it."""
    targets = batch["labels"][:, 1:].to(model.device)
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    logits = model(inputs_embeds=embed(model, projector, batch), use_cache=False, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets[:, keep].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def held_out_loss(model: Any, projector: Projector | None, prompts: Sequence[Prompt], batch_size: int) -> float:
    """`answer_loss` over many prompts, each labelled token counting the same."""
    total, count = 0.0, 0
    for start in range(0, len(prompts), batch_size):
        batch = collate(prompts[start : start + batch_size])
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += labelled * float(answer_loss(model, projector, batch))
        count += labelled
    return total / count


def _after(model: Any, cache: Any, embedded: Tensor, start: int, keep: Tensor) -> Any:
    positions = start + torch.arange(embedded.shape[1], device=model.device).expand(len(embedded), -1)
    return model(
        inputs_embeds=embedded, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=keep
    )


@torch.no_grad()
def next_logits(
    model: Any, projector: Projector | None, prefix: Prompt, queries: Sequence[Prompt], batch_size: int
) -> Tensor:
    """Next-token logits (queries, vocabulary) of each query read after a shared prefix, which is read once."""
    first = model(inputs_embeds=embed(model, projector, collate([prefix])), use_cache=True, logits_to_keep=1)
    found: list[Tensor] = [torch.empty(0)] * len(queries)
    for chosen in _by_length(queries, batch_size):
        batch = collate([queries[i] for i in chosen])
        last = torch.tensor([len(queries[i]) - 1 for i in chosen], device=model.device)
        keep, where = torch.unique(last, return_inverse=True)
        past = expand(first.past_key_values, len(chosen))
        logits = _after(model, past, embed(model, projector, batch), len(prefix), keep).logits
        for row, i in enumerate(chosen):
            found[i] = logits[row, where[row]].float().cpu()
    return torch.stack(found)


def _by_length(queries: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def write(
    model: Any, projector: Projector | None, prompts: Sequence[Prompt], allowed: Sequence[int], count: int
) -> Tensor:
    """Greedy continuations of prompts of one length by `count` of the `allowed` tokens: indices (prompts, count)."""
    choices = torch.tensor(list(allowed), device=model.device)
    last = torch.tensor([len(prompts[0]) - 1], device=model.device)
    embedded, start, cache = embed(model, projector, collate(prompts)), 0, None
    written = []
    for _ in range(count):
        out = _after(model, cache, embedded, start, last)
        written.append(out.logits[:, -1, choices].argmax(-1))
        start, cache, last = start + embedded.shape[1], out.past_key_values, torch.zeros_like(last)
        embedded = model.get_input_embeddings()(choices[written[-1]][:, None])
    return torch.stack(written, 1).cpu()
