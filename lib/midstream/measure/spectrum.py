"""How many directions representations use, and how alike two sets of them are."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(states: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares, of (…, tokens, width): (…,), from 1 to min(tokens, width).

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", 2007. States are taken as they are,
    without their mean removed; all-zero states have rank 1.
    """
    values = torch.linalg.svdvals(states.double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum(-1).exp()


def linear_cka(ours: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two readings of the same n things, (n, width) and (n, other width): 0 … 1.

    Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv 1905.00414.
    """
    a, b = (states.double() - states.double().mean(0) for states in (ours, other))
    shared = (a.mT @ b).square().sum()
    return float(shared / ((a.mT @ a).norm() * (b.mT @ b).norm()).clamp(min=torch.finfo(torch.float64).tiny))
