"""Confidence intervals: over seeds, over paired differences, over proportions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `n` counts the independent units behind it (usually seeds)."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, shape (n,).

    One value has no interval: its ends are infinite, so that no claim can be decided on a single seed. The same
    goes for values that are not finite, such as the logarithm of an empty flow, and for no value at all.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1:
        raise ValueError(f"t_interval takes a vector of values, got shape {x.shape}")
    mean = float(x.mean()) if x.size else np.nan
    if x.size < 2 or not np.isfinite(x).all():
        return Interval(mean, -np.inf, np.inf, int(x.size))
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, int(x.size))


def paired_interval(ours: ArrayLike, other: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of `ours - other`, two vectors paired by unit (shape (n,))."""
    a, b = np.asarray(ours, dtype=float), np.asarray(other, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired_interval takes two vectors of one length, got {a.shape} and {b.shape}")
    return t_interval(a - b, level)


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a proportion of independent trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"wilson_interval takes 0 <= successes <= trials > 0, got {successes} of {trials}")
    z = float(stats.norm.ppf(0.5 + level / 2))
    p = successes / trials
    centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * np.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    return Interval(p, float(centre - half), float(centre + half), trials)
