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
    """How long and how fast: AdamW, linear warm-up, then a cosine down to a share of the peak."""

    steps: int
    learning_rate: float = 1e-3
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
    optimizer = torch.optim.AdamW(_groups(model, schedule), lr=schedule.learning_rate, betas=schedule.betas)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    rows: list[dict[str, float]] = []
    started = time.perf_counter()
    for step, batch in enumerate(_exactly(batches, schedule.steps), start=1):
        rate = schedule.learning_rate * schedule.share(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(wrapped, send_to_device(batch, accelerator.device))
        number = _finite(value, step)
        optimizer.zero_grad()  # also of what the model carried before the first step
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        if after_step:
            after_step(step)
        row = {"step": step, "loss": number, "learning_rate": rate, "gradient_norm": float(norm or 0.0)}
        rows.append(row | {"seconds": time.perf_counter() - started})
    optimizer.zero_grad()
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


def _groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("No parameter of the model requires a gradient: there is nothing to train.")
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [(matrices, schedule.weight_decay), (vectors, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]
