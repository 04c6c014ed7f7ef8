"""The figure of a sweep: one panel a scalar, the swept values along the axis, one dot a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from midstream import records
from midstream.figures import PALETTE, use_style

MOST_PANELS = 12
MOST_SERIES = len(PALETTE)
MOST_TICKS = 12


def draw(table: pd.DataFrame, names: Sequence[str], title: str, stem: Path) -> Path | None:
    """Write `stem`.png, .svg and .alt.txt from a sweep's table; None where it has no scalars to draw.

    The first swept parameter that is no seed lies along the axis, the second tells the lines apart; everything
    else, seeds among it, is averaged, with one dot a cell.
    """
    scalars = _scalars(table, names)[:MOST_PANELS]
    if not scalars:
        return None
    ordered = sorted(names, key=lambda name: name == "seed")
    axis, series = ordered[0], ordered[1] if len(ordered) > 1 and ordered[1] != "seed" else None
    use_style()
    columns = min(3, len(scalars))
    rows = math.ceil(len(scalars) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.8 * columns, 3.0 * rows), squeeze=False)
    for panel, scalar in zip(panels.flat, scalars, strict=False):
        _panel(panel, table, scalar, axis, series)
    for empty in list(panels.flat)[len(scalars) :]:
        empty.set_axis_off()
    figure.suptitle(f"{title}: {len(table)} runs over {', '.join(names)}")
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
    records.write_text(stem.with_suffix(".alt.txt"), alt_text(table, scalars, axis, series) + "\n")
    return stem.with_suffix(".png")


def alt_text(table: pd.DataFrame, scalars: Sequence[str], axis: str, series: str | None) -> str:
    """What the figure shows, in words with the numbers that were drawn."""
    lines = f", one line for each {series}" if series else ""
    panels = f"{len(scalars)} panel{'s' * (len(scalars) > 1)}"
    said = [f"{panels} over {axis}{lines}, one dot a run, lines through the means."]
    for scalar in scalars:
        means = table.groupby(axis, sort=False)[scalar].mean()
        said.append(f"{scalar}: " + ", ".join(f"{mean:.3g} at {value}" for value, mean in means.items()) + ".")
    return " ".join(said)


def _scalars(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    left_out = {*names, "seconds", "cell"}
    numeric = table.select_dtypes("number").columns
    return [name for name in numeric if name not in left_out and table[name].notna().any()]


def _panel(panel: Axes, table: pd.DataFrame, scalar: str, axis: str, series: str | None) -> None:
    positions, ticks = _positions(table[axis])
    groups: list[tuple[Any, pd.DataFrame]] = list(table.groupby(series, sort=False)) if series else [("", table)]
    for (value, group), color in zip(groups[:MOST_SERIES], PALETTE, strict=False):
        where = positions[group.index]
        means = group[scalar].groupby(where).mean()
        panel.plot(where, group[scalar], "o", color=color, ms=4, alpha=0.5)
        panel.plot(means.index, means, color=color, label=f"{series} = {value}" if series else None)
    if len(ticks) <= MOST_TICKS:
        panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set(xlabel=axis, title=scalar)
    if series:
        panel.legend(fontsize=8, frameon=False)


def _positions(values: pd.Series) -> tuple[pd.Series, dict[float, str]]:
    """Where values lie on the axis, at themselves when they are numbers, else side by side; and position → label."""
    names = list(dict.fromkeys(map(str, values)))
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values, {float(name): name for name in names}
    return values.map(lambda value: names.index(str(value))), dict(enumerate(names))
