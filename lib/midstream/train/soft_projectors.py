"""Projectors that make one soft token of a vector: linear, non-linear, and the zero that says nothing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "non-linear"]
LINEAR: Kind = "linear"
NONLINEAR: Kind = "non-linear"
KINDS: tuple[Kind, ...] = (LINEAR, NONLINEAR)


class Zero(nn.Module):
    """P = 0: the same soft token for every input, of the width `out`."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out

    def forward(self, vectors: Tensor) -> Tensor:
        """Zeros (n, out) for vectors (n, width)."""
        return vectors.new_zeros(len(vectors), self.out)


class NonLinear(nn.Module):
    """RMSNorm → Linear → SwiGLU block of the same width with a residual, no biases."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.into = nn.Linear(width, out, bias=False)
        self.gate, self.up, self.down = (nn.Linear(out, out, bias=False) for _ in range(3))

    def forward(self, vectors: Tensor) -> Tensor:
        """Soft tokens (n, out) of vectors (n, width)."""
        h = self.into(self.norm(vectors))
        return h + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def untrained(kind: Kind, vectors: Tensor, out: int, length: float, seed: int) -> nn.Module:
    """An untrained projector of a kind, whose soft tokens of `vectors` (n, width) have about the mean norm `length`."""
    torch.manual_seed(seed)
    width = vectors.shape[1]
    made: Any = nn.Linear(width, out, bias=False) if kind == LINEAR else NonLinear(width, out)
    first = made.weight if kind == LINEAR else made.into.weight
    with torch.no_grad():
        for _ in range(3):  # a linear projector needs one; the block shrinks faster than what it is added to
            first.mul_(length / made(vectors).norm(dim=1).mean())
    return made
