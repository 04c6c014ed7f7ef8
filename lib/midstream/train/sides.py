"""Sides of one model trained at rates of their own, which may change at any step, and put back where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from midstream.train.loop import Schedule, _exactly, _finite

Sides = Mapping[str, Sequence[nn.Parameter]]
"""The parameters of each side, by its name."""


def fit_sides(
    model: nn.Module,
    sides: Sides,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    schedule: Schedule,
    rates: Callable[[], Mapping[str, float]],
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
    cpu: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Train every side by AdamW at its own rate, in place and with dropout off; no other weight moves.

    Like `midstream.train.fit`, but that `rates()`, asked before each update, gives the peak rate of each side, which
    the schedule's warm-up and cosine then scale (its own `learning_rate`, `muon` and `weight_decay` are not used). A
    side at rate 0 stays bit for bit as it is; `after_step` is called outside of `bfloat16`'s autocast. Returns one row
    a step: `step`, `loss`, and `rate_SIDE` and `norm_SIDE` for each side, the norm being the gradient's before
    clipping. Raises `ValueError` when the batches run out and `FloatingPointError` when the loss is no longer finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    accelerator = Accelerator(cpu=cpu)
    optimizer = torch.optim.AdamW(
        [{"params": list(side), "lr": 0.0} for side in sides.values()], betas=schedule.betas, weight_decay=0.0
    )
    wrapped, optimizer = accelerator.prepare(model.eval(), optimizer)
    autocast = partial(  # without a cache, for a loss may exchange weights between two forward passes
        torch.autocast, accelerator.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )
    rows: list[dict[str, float]] = []
    for step, batch in enumerate(_exactly(batches, schedule.steps), start=1):
        now = {name: rate * schedule.share(step - 1) for name, rate in rates().items()}
        for group, name in zip(optimizer.param_groups, sides, strict=True):
            group["lr"] = now[name]
        with autocast():
            value = loss(wrapped, send_to_device(batch, accelerator.device))
        row = {"step": step, "loss": _finite(value, step)} | {f"rate_{name}": rate for name, rate in now.items()}
        model.zero_grad()
        accelerator.backward(value)
        rows.append(row | {f"norm_{name}": gradient_norm(side) for name, side in sides.items()})
        accelerator.clip_grad_norm_([each for side in sides.values() for each in side], schedule.clip)
        optimizer.step()
        if after_step:
            after_step(step)
    model.zero_grad()
    return pd.DataFrame(rows)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of the gradient over all entries of all parameters; 0 where there is none."""
    squares = [each.grad.double().square().sum() for each in parameters if each.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the values of parameters, in their order."""
    return [each.detach().clone() for each in parameters]


@contextmanager
def put_back(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the parameters have these values; after it, bit for bit the ones they had.

    Gradients and an optimizer's state are not touched.
    """
    now = snapshot(parameters)
    _assign(parameters, values)
    try:
        yield
    finally:
        _assign(parameters, now)


@torch.no_grad()
def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
