"""A model tuned for a while: low-rank adapters trained inside it, and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from midstream.train.loop import Schedule, fit


@contextmanager
def adapted(
    model: Any,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    schedule: Schedule,
    *,
    rank: int,
    seed: int,
) -> Iterator[pd.DataFrame]:
    """Within the block `model` is tuned by LoRA on all its linear layers; after it, its weights are the old ones.

    Yields the training curve of `fit`, whose `batches`, `loss` and `schedule` these are. The seed draws the adapters'
    first weights. LoRA: Hu et al., 2021, arXiv 2106.09685; the scale is 2.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        wrapped: Any = get_peft_model(model, settings)
    try:
        curve = fit(wrapped, batches, loss, schedule, cpu=model.device.type == "cpu")
        yield curve
    finally:
        wrapped.unload()
