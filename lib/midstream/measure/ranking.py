"""How well a ranking puts the positive items first, for many rankings at once."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """Average precision of many score vectors against one label: scores (items, …), positive (items,) → (…).

    The mean, over positive items, of the share of positives among the items scored at least as high; equal scores
    count as one threshold. A ranking that knows nothing has the prevalence, not 0.5. Raises `ValueError` for a label
    that never occurs.
    """
    if not positive.any():
        raise ValueError("average precision needs at least one positive item")
    ranked, order = scores.sort(0, descending=True)
    hits = positive.to(scores.device)[order].float()  # (items, …)
    ranks = torch.arange(1, len(scores) + 1, device=scores.device).reshape(-1, *[1] * (scores.ndim - 1))
    precision = hits.cumsum(0) / ranks
    return (precision.gather(0, _ends_of_ties(ranked)) * hits).sum(0) / hits.sum(0)


def _ends_of_ties(ranked: Tensor) -> Tensor:
    """For each place of sorted scores (items, …), the last place that has the same score."""
    places = torch.arange(len(ranked), device=ranked.device).reshape(-1, *[1] * (ranked.ndim - 1)).expand_as(ranked)
    is_end = torch.ones_like(ranked, dtype=torch.bool)
    is_end[:-1] = ranked[:-1] != ranked[1:]
    return places.masked_fill(~is_end, len(ranked)).flip(0).cummin(0).values.flip(0)
