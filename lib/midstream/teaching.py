"""Exercises that can tell right from wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def check(attempt: Callable[..., Any], given: tuple[Any, ...], right: Tensor, wrong: Mapping[str, Tensor]) -> str:
    """What to tell a student about a function: right, a known mistake by name, a wrong shape, or simply different.

    `attempt` is called with `given`; `wrong` maps an explanation to the tensor that this mistake would produce.
    """
    answer = attempt(*given)
    if answer is None:
        return "Not answered yet: the function returns None."
    answer = torch.as_tensor(answer)
    if answer.shape != right.shape:
        return f"Not yet: the shape should be {tuple(right.shape)}, yours is {tuple(answer.shape)}."
    if torch.allclose(answer.float(), right.float(), rtol=1e-4, atol=1e-6):
        return "Right."
    for mistake, value in wrong.items():
        if value.shape == answer.shape and torch.allclose(answer.float(), value.float(), rtol=1e-4, atol=1e-6):
            return f"Not yet: {mistake}"
    gap = (answer.float() - right.float()).abs().max().item()
    return f"Not yet: the shape is right, the values differ by up to {gap:.3g}."
