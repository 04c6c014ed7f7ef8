"""The figure of a sweep: one panel a measured number, the swept values along the axis, one dot a cell."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from midstream import records
from midstream.figures import GREY, PALETTE, use_style

MOST_PANELS = 18
MOST_SERIES = len(PALETTE)
MOST_TICKS = 12


def draw(
    table: pd.DataFrame, names: Sequence[str], thresholds: Mapping[str, float], title: str, stem: Path
) -> Path | None:
    """Write `stem`.png, .svg and .alt.txt from a sweep's table; None where no number changes over the sweep.

    The first swept parameter that is no seed lies along the axis, the second tells the lines apart; everything
    else, seeds among it, is averaged, with one dot a cell. A dotted line is the threshold a claim has for a number.
    """
    numbers = _changing(table, names)[:MOST_PANELS]
    if not numbers:
        return None
    ordered = sorted(names, key=lambda name: name == "seed")
    axis, series = ordered[0], ordered[1] if len(ordered) > 1 and ordered[1] != "seed" else None
    use_style()
    columns = min(3, len(numbers))
    rows = math.ceil(len(numbers) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.0 * columns, 3.0 * rows), squeeze=False)
    for panel, number in zip(panels.flat, numbers, strict=False):
        _panel(panel, table, number, axis, series)
        if number in thresholds:
            panel.axhline(thresholds[number], color=GREY, ls=":", lw=1.5)
    for empty in list(panels.flat)[len(numbers) :]:
        empty.set_axis_off()
    figure.suptitle(f"{title}: {len(table)} runs over {', '.join(names)}")
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
    records.write_text(stem.with_suffix(".alt.txt"), alt_text(table, numbers, axis, series) + "\n")
    return stem.with_suffix(".png")


def alt_text(table: pd.DataFrame, numbers: Sequence[str], axis: str, series: str | None) -> str:
    """What the figure shows, in words with the numbers that were drawn."""
    lines = f", one line for each {series}" if series else ""
    panels = f"{len(numbers)} panel{'s' * (len(numbers) > 1)}"
    said = [f"{panels} over {axis}{lines}, one dot a run, lines through the means."]
    for number in numbers:
        means = table.groupby(axis, sort=False)[number].mean()
        said.append(f"{number}: " + ", ".join(f"{mean:.3g} at {value}" for value, mean in means.items()) + ".")
    return " ".join(said)


def _changing(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """The measured numbers that are not the same in every run."""
    left_out = {*names, "seconds", "cell"}
    numeric = table.select_dtypes("number").columns
    return [name for name in numeric if name not in left_out and table[name].nunique() > 1]


def _panel(panel: Axes, table: pd.DataFrame, number: str, axis: str, series: str | None) -> None:
    positions, ticks = _positions(table[axis])
    groups: list[tuple[Any, pd.DataFrame]] = list(table.groupby(series, sort=False)) if series else [("", table)]
    for (value, group), color in zip(groups[:MOST_SERIES], PALETTE, strict=False):
        where = positions[group.index]
        means = group[number].groupby(where).mean()
        panel.plot(where, group[number], "o", color=color, ms=4, alpha=0.5)
        panel.plot(means.index, means, color=color, label=f"{series} = {value}" if series else None)
    if len(ticks) <= MOST_TICKS:
        panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set(xlabel=axis, title="\n".join(textwrap.wrap(number, 32)))
    if series:
        panel.legend(fontsize=8, frameon=False)


def _positions(values: pd.Series) -> tuple[pd.Series, dict[float, str]]:
    """Where values lie on the axis, at themselves when they are numbers, else side by side; and position → label."""
    names = list(dict.fromkeys(map(str, values)))
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values, {float(name): name for name in names}
    return values.map(lambda value: names.index(str(value))), dict(enumerate(names))
