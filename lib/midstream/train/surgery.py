"""Gradients changed before the optimizer sees them: parts taken out, entries masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = list[Tensor]
"""One tensor a parameter, of its shape."""


def gradients(value: Tensor, parameters: Sequence[Tensor], *, keep_graph: bool = False) -> Gradients:
    """∂value/∂parameter for each parameter; zeros where the value does not depend on it."""
    found = torch.autograd.grad(value, list(parameters), retain_graph=keep_graph, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(parameter) if each is None else each for each, parameter in pairs]


def dot(ours: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product over all entries of all tensors, a scalar of double precision."""
    products = [(a.double() * b.double()).sum() for a, b in zip(ours, other, strict=True)]
    return torch.stack(products).sum()


def cosine(ours: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The cosine over all entries; 0 where one of the two is zero."""
    scale = (dot(ours, ours) * dot(other, other)).sqrt()
    return float(dot(ours, other) / scale) if scale > 0 else 0.0


def without(ours: Sequence[Tensor], direction: Sequence[Tensor]) -> Gradients:
    """g − (⟨g, h⟩ / ‖h‖²) h over all entries: what is left of g when its part along h is taken out.

    g itself where h is zero.
    """
    length = dot(direction, direction)
    share = dot(ours, direction) / length if length > 0 else torch.zeros_like(length)
    return [g - share.to(g) * h for g, h in zip(ours, direction, strict=True)]


def with_gradients(value: Tensor, parameters: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """A scalar of the same value whose gradient at the parameters is `wanted`.

    Any training loop can then be given gradients of one's own: it calls `backward` on this.
    """
    carrier = torch.stack([(p * g.detach()).sum() for p, g in zip(parameters, wanted, strict=True)]).sum()
    return value.detach() + carrier - carrier.detach()
