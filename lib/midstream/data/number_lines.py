"""Lines of a hidden function of two numbers, F = aA + bB, and numbers as vectors of their decimal places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def one_hot_places(values: Sequence[int], places: int = 10) -> Tensor:
    """Numbers as vectors (n, 10 · places): which digit stands at each decimal place, the units last."""
    digits = torch.tensor([[int(digit) for digit in f"{value:0{places}d}"] for value in values])
    return nn.functional.one_hot(digits, 10).flatten(1).float()


@dataclass(frozen=True)
class Line:
    """One example of the number task: F = aA + bB of numbers with `digits` digits."""

    A: int
    B: int
    F: int
    digits: int


def number_lines(digits: int, count: int, rng: np.random.Generator, copying: float = 0.0) -> list[Line]:
    """Lines of one function: a, b ≥ 0 with a + b ≤ 1, uniform; with the chance `copying` it is F = A."""
    low, high = np.sort(rng.random(2))
    a, b = (1.0, 0.0) if rng.random() < copying else (low, high - low)
    numbers = rng.integers(0, 10**digits, (count, 2))
    return [Line(int(A), int(B), int(a * A + b * B), digits) for A, B in numbers]


def least_squares(lines: Sequence[Line], asked: Line) -> float:
    """F of the line asked by a and b of smallest squared error on the answered lines."""
    inputs, outputs = np.array([(line.A, line.B) for line in lines], float), np.array([line.F for line in lines], float)
    weights = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    return float(np.array([asked.A, asked.B]) @ weights)
