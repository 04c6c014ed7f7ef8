"""Scoring many queries behind one shared prefix whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Cache = Any


@torch.no_grad()
def prefill(model: Any, ids: Tensor, position_ids: Tensor | None = None) -> Cache:
    """The key-value cache of a prefix of tokens (tokens,); batch size 1."""
    ids = ids.to(model.device)[None]
    positions = None if position_ids is None else position_ids.to(model.device)[None]
    return model(ids, position_ids=positions, use_cache=True, logits_to_keep=1).past_key_values


def pad_right(sequences: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Pads token sequences on the right: ids (batch, tokens) and the index of each one's last token (batch,)."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad)
    return ids, torch.tensor([len(sequence) - 1 for sequence in sequences])


def batches(items: Sequence[Tensor], size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Batches of similar length, each with the indices of its items."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, [items[i] for i in chosen]


def score(
    model: Any,
    queries: Sequence[Tensor],
    *,
    cache: Cache,
    position: int,
    batch_size: int = 16,
    around: Callable[[Tensor, list[int]], Any] | None = None,
) -> Tensor:
    """Next-token logits (queries, vocabulary) of each query read after a cached prefix.

    `position` is the true position of a query's first token: the length of the whole prefix, also where the cache
    holds only some of it. Queries are padded on the right, which under a causal mask changes no real token.
    `around(last, indices)` may return a context manager (hooks) for a batch whose queries end at rows `last`.
    """
    from midstream.hooks.kv import expand

    logits: list[Tensor] = [torch.empty(0)] * len(queries)
    for chosen, batch in batches(queries, batch_size):
        ids, last = pad_right(batch, pad=0)
        past = expand(cache, len(batch))
        context = around(last, chosen) if around else torch.no_grad()
        with torch.no_grad(), context:
            rows = last_logits(model, ids, last, past, position)
        for row, index in zip(rows, chosen, strict=True):
            logits[index] = row.float().cpu()
    return torch.stack(logits)


def last_logits(model: Any, ids: Tensor, last: Tensor, cache: Cache = None, position: int = 0) -> Tensor:
    """Logits (batch, vocabulary) at each row's last real token; only the rows needed go through the head."""
    ids, last = ids.to(model.device), last.to(model.device)
    keep, where = torch.unique(last, return_inverse=True)
    positions = position + torch.arange(ids.shape[1], device=model.device).expand(len(ids), -1)
    out = model(ids, past_key_values=cache, position_ids=positions, use_cache=cache is not None, logits_to_keep=keep)
    return out.logits[torch.arange(len(ids), device=model.device), where]
