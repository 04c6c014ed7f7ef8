"""Loyalty: how much a smaller model behaves like the one it was made from, beyond being as often right.

Label and probability loyalty: Xu et al., "Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT
Compression", EMNLP 2021, arXiv 2109.03228.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def label_loyalty(student: Tensor, teacher: Tensor) -> float:
    """The share of rows for which two models' largest entries agree; both (batch, classes), logits or probabilities."""
    return float((student.argmax(-1) == teacher.argmax(-1)).float().mean())


def probability_loyalty(student: Tensor, teacher: Tensor, base: float = 2.0) -> Tensor:
    """1 − √JS of two distributions a row: (batch,) of 1 (equal) to 0 (disjoint, when `base` is 2).

    Both are probabilities (batch, classes). The unit of the divergence is a matter of convention: bits for `base` 2,
    nats for e, where disjoint distributions have 1 − √ln 2 ≈ 0.17.
    """
    mean = (student + teacher) / 2
    divergence = (_relative_entropy(student, mean) + _relative_entropy(teacher, mean)) / 2
    return 1 - (divergence / math.log(base)).clamp(min=0).sqrt()


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def rank_correlation(ours: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Spearman's ρ of each row over its entries in `mask`: (batch,); all three (batch, entries).

    Ties share the mean of their ranks. A row with fewer than three entries, or with only ties, gives NaN.
    """
    a, b = _centred_ranks(ours, mask), _centred_ranks(reference, mask)
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    correlation = (a * b).sum(-1) / norms
    return correlation.masked_fill((norms == 0) | (mask.sum(-1) < 3), math.nan)


def _centred_ranks(x: Tensor, mask: Tensor) -> Tensor:
    """Ranks among the entries in `mask`, minus their mean; 0 elsewhere."""
    both = mask[..., :, None] & mask[..., None, :]
    below = ((x[..., None, :] < x[..., :, None]) & both).sum(-1)
    tied = ((x[..., None, :] == x[..., :, None]) & both).sum(-1)
    rank = below + (tied - 1) / 2
    mean = (rank * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (rank - mean) * mask


def top_overlap(ours: Tensor, reference: Tensor, mask: Tensor, k: int) -> Tensor:
    """The share of a row's `k` largest entries in `mask` that are among the other's: (batch,), NaN for k or fewer.

    All three are (batch, entries); a row of k entries would agree whatever they are.
    """
    lowest = -math.inf
    first = ours.masked_fill(~mask, lowest).topk(k).indices
    second = reference.masked_fill(~mask, lowest).topk(k).indices
    shared = (first[:, :, None] == second[:, None, :]).sum((1, 2)) / k
    return shared.masked_fill(mask.sum(-1) <= k, math.nan)
