"""Distillation losses: soft labels, matched hidden states, matched gradients.

Sources: soft labels, Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; states at matched
depths, Sun et al., "Patient Knowledge Distillation for BERT Model Compression", EMNLP 2019, arXiv 1908.09355;
gradients, Wang et al., "Gradient Knowledge Distillation for Pre-trained Language Models", 2022, arXiv 2211.01071.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss, normalize

from midstream.hooks import write
from midstream.hooks.write import Edit


@dataclass(frozen=True)
class Traced:
    """One forward of a classifier, with the states its logits were computed from still in the graph."""

    logits: Tensor
    """(batch, classes)"""
    embedded: Tensor
    """(batch, tokens, width): the embedding output, read by the first block; a leaf, so nothing below is trained."""
    states: tuple[Tensor, ...]
    """(batch, tokens, width) behind each of the blocks that were asked for."""


def trace(model: nn.Module, inputs: Mapping[str, Tensor], layers: Sequence[int] = ()) -> Traced:
    """Run a classifier so that its logits can be differentiated by its embedding output and by `layers`' outputs.

    Blocks are counted from 0. Call it with gradients enabled; a gradient that is itself to be differentiated needs
    eager attention, since fused kernels have no second derivative.
    """
    seen: dict[int, Tensor] = {}
    leaf = -1

    def enter(x: Tensor, at: Any) -> Tensor:
        seen[leaf] = x.detach().requires_grad_()
        return seen[leaf]

    def note(layer: int) -> Edit:
        return lambda x, at: seen.setdefault(layer, x)

    edits: dict[Any, Edit] = {("in", 0): enter, **{("out", layer): note(layer) for layer in layers}}
    with write(model, edits):
        logits = model(**inputs).logits
    return Traced(logits, seen[leaf], tuple(seen[layer] for layer in layers))


def confidence(logits: Tensor) -> Tensor:
    """s(x): the largest softmax probability of each row of (batch, classes), summed over the batch to a scalar.

    Rows do not meet each other, so the sum's gradient holds every sample's own gradient.
    """
    return logits.softmax(-1).amax(-1).sum()


def gradients(traced: Traced, create_graph: bool = False) -> tuple[Tensor, ...]:
    """∂s/∂(embedding output) and ∂s/∂(each traced state), each (batch, tokens, width).

    `create_graph` is what lets a loss on them train the model; without it they are constants.
    """
    wanted = [traced.embedded, *traced.states]
    return torch.autograd.grad(confidence(traced.logits), wanted, create_graph=create_graph, retain_graph=True)


def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher/T ‖ student/T), a scalar: summed over classes, averaged over the batch of (batch, classes)."""
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).softmax(-1)
    return temperature**2 * kl_div(student, teacher, reduction="batchmean")


def patience_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Mean squared difference of states scaled to length 1 over their last axis; both (…, width), a scalar."""
    return mse_loss(normalize(student_states, dim=-1), normalize(teacher_states, dim=-1))


def gradient_loss(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """L_grad: squared distance of gradient directions, averaged over the tokens that have a teacher gradient.

    Both (batch, tokens, width). Each token's gradient is scaled to length 1, so 0 means the same direction, 2 a right
    angle and 4 the opposite one; lengths play no part. Padding has a teacher gradient of zero and does not count.
    """
    student, teacher = normalize(student_gradient, dim=-1), normalize(teacher_gradient, dim=-1)
    counted = (teacher != 0).any(-1)  # (batch, tokens)
    distance = (student - teacher).square().sum(-1) * counted
    return distance.sum() / counted.sum().clamp(min=1)
