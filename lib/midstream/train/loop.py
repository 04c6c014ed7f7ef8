"""One training loop for every chapter, on accelerate: the CPU, one GPU, or several under `accelerate launch`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW or Muon, linear warm-up, then a cosine down to a share of the peak."""

    steps: int
    learning_rate: float = 1e-3
    muon: float = 0.0
    """The rate at which Muon trains the weights of linear layers, in AdamW's measure; zero leaves them to AdamW.

    Muon: Jordan et al., 2024; the measure (steps of the same root mean square): Liu et al., 2025, arXiv:2502.16982."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    floor: float = 0.0
    """Share of the peak at which the cosine ends; 1 keeps the rate constant after the warm-up."""
    weight_decay: float = 0.01
    """On matrices only; vectors (biases, norms) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    """The norm to which gradients are clipped; infinity for no clipping."""

    def share(self, step: int) -> float:
        """The rate of a step (from 0), as a share of the peak."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, self.steps - warm))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    schedule: Schedule,
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
    cpu: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Train what requires a gradient, in place; the model comes back in eval mode, on the device it was trained on.

    `batches` gives at least `schedule.steps` batches (any nesting of tensors); `loss(model, batch)` is a scalar. It
    runs on the GPU where there is one, unless `cpu`; `bfloat16` is autocast around the loss, weights stay as they
    are. With several processes gradients are averaged over them, so each should draw batches of its own.
    `after_step(step)` is called after each update, steps counted from 1. Returns one row a step: `step`, `loss`,
    `learning_rate`, `gradient_norm`, `seconds` since the start. Raises `ValueError` when the batches run out and
    `FloatingPointError` when the loss is no longer finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    accelerator = Accelerator(cpu=cpu)
    wrapped, *optimizers = accelerator.prepare(model.train(), *_optimizers(model, schedule))
    rows: list[dict[str, float]] = []
    started = time.perf_counter()
    for step, batch in enumerate(_exactly(batches, schedule.steps), start=1):
        share = schedule.share(step - 1)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(wrapped, send_to_device(batch, accelerator.device))
        number = _finite(value, step)
        model.zero_grad()  # also of what the model carried before the first step
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(model.parameters(), schedule.clip)
        for optimizer in optimizers:
            optimizer.step()
        if after_step:
            after_step(step)
        row = {"step": step, "loss": number, "learning_rate": schedule.learning_rate * share}
        rows.append(row | {"gradient_norm": float(norm or 0.0), "seconds": time.perf_counter() - started})
    model.zero_grad()
    model.eval()
    return pd.DataFrame(rows)


def _finite(loss: Tensor, step: int) -> float:
    """The loss as a number, looked at before it changes any weight."""
    number = float(loss.detach())
    if not math.isfinite(number):
        raise FloatingPointError(f"The loss of step {step} is {number}; a lower learning rate may help.")
    return number


def _exactly(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """The first `steps` batches; too few are an error, for training would quietly end early."""
    iterator = iter(batches)
    for given in range(steps):
        try:
            yield next(iterator)
        except StopIteration:
            raise ValueError(f"{steps} steps were asked for, but the data gave {given} batches.") from None


def _optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW: matrices with weight decay, vectors without. Muon, if asked for, takes the weights of linear layers."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("No parameter of the model requires a gradient: there is nothing to train.")
    linear = _of_linear_layers(model) if schedule.muon else set()
    matrices = [each for each in trained if each.ndim >= 2 and each not in linear]
    vectors = [each for each in trained if each.ndim < 2]
    groups = [
        {"params": members, "weight_decay": decay, "peak": schedule.learning_rate}
        for members, decay in ((matrices, schedule.weight_decay), (vectors, 0.0))
        if members
    ]
    made: list[torch.optim.Optimizer] = []
    if groups:
        made.append(torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=schedule.betas))
    if moved := [each for each in trained if each in linear]:
        group = {"params": moved, "peak": schedule.muon}
        decay = schedule.weight_decay
        made.append(torch.optim.Muon([group], lr=schedule.muon, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return made


def _of_linear_layers(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers that are not also an embedding's: those are tables, not maps."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {module.weight for module in model.modules() if isinstance(module, nn.Linear)} - tables  # type: ignore[return-value]
