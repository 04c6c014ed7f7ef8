"""Arenas: methods of several papers side by side on the same columns.

A paper enters an arena by a line of its module that names the arena and gives a function from its `Result`:

    def arena_rows(result: Result) -> pd.DataFrame: ...

    ARENA = {"projectors": arena_rows}

The function returns **one row for each method, number of tokens and seed**, with the columns of the arena:

- `method`: the method as readers know it, such as `adaptive pooling`; a baseline is a row as any other.
- `setting`: in a few words, what has to be equal for two rows to be compared: model, data, steps. Rows of one setting
  form one panel of the table; the figure tells settings apart.
- `seed`: the unit over which the interval goes.
- the columns of the arena itself, listed in `ARENAS`; those that are not required may be missing or NaN, for a method
  that needs no training has no training time.

Means and 95 % intervals are formed here, and the book takes the rows from the paper's strongest current record: a
paper writes no table of its own for the arena. `rows(arena, frame)` checks a table; a paper's test calls it on the
result of a small run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from midstream.measure.intervals import Interval, t_interval

KEYS = ("method", "setting", "seed")


@dataclass(frozen=True)
class Column:
    """One quantity of an arena."""

    name: str
    label: str
    """As a table's head says it."""
    unit: str
    meaning: str
    required: bool = False


@dataclass(frozen=True)
class Arena:
    """What is compared with what."""

    name: str
    title: str
    size: Column
    """What a method spends: the horizontal axis, and one row of the table for each."""
    quality: tuple[Column, ...]
    """The first is the vertical axis; more is better."""
    costs: tuple[Column, ...]
    """Less is better."""
    across: str = ""
    """A quality to be the horizontal axis of the figure, in place of the size."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """All quantities in the order of the table."""
        return (self.size, *self.quality, *self.costs)


PROJECTORS = Arena(
    name="projectors",
    title="Visual projectors and token reduction",
    size=Column("tokens", "Visual tokens", "", "visual tokens that the language model reads an image as", True),
    quality=(
        Column(
            "accuracy", "Questions right", "%", "share of questions about an image answered right, in percent", True
        ),
        Column(
            "box_accuracy", "Boxes found", "%", "share of objects whose box is found (IoU of at least 0.5), in percent"
        ),
    ),
    costs=(
        Column(
            "train_seconds", "Training", "s/step", "seconds for one training step, batch and device as in `setting`"
        ),
        Column("inference_ms", "Inference", "ms/image", "milliseconds from an image and a question to the answer"),
    ),
)
TUNING = Arena(
    name="tuning",
    title="Tuning a model that sees",
    size=Column("rate", "Peak rate", "", "largest learning rate; 0 before tuning", True),
    quality=(
        Column("old", "Old tasks", "%", "share of questions of the old tasks answered right, in percent", True),
        Column("new", "New task", "%", "share of questions of the new task answered right, in percent", True),
    ),
    costs=(),
    across="new",
)
ARENAS = {arena.name: arena for arena in (PROJECTORS, TUNING)}


@dataclass(frozen=True)
class Standing:
    """A method at one number of tokens: each quantity with its interval over seeds."""

    method: str
    setting: str
    values: dict[str, Interval]
    """By column; what was not measured is left out."""

    def value(self, column: Column) -> Interval | None:
        """What stands in a column, None where it was not measured."""
        return self.values.get(column.name)


def rows(arena: Arena, table: pd.DataFrame) -> pd.DataFrame:
    """The table with the arena's columns alone, checked.

    Raises `ValueError` for a required column that is missing or not a number, and for two rows of one method, setting,
    size and seed.
    """
    required = [*KEYS, *(column.name for column in arena.columns if column.required)]
    if missing := [name for name in required if name not in table]:
        raise ValueError(f"The arena {arena.name} needs the column {missing[0]}; it got {', '.join(table.columns)}.")
    present = [column for column in arena.columns if column.name in table]
    kept = table[[*KEYS, *(column.name for column in present)]].copy()
    for column in present:
        kept[column.name] = pd.to_numeric(kept[column.name], errors="raise").astype(float)
        if column.required and not np.isfinite(kept[column.name]).all():
            raise ValueError(f"The arena {arena.name} needs a number for {column.name} in every row.")
    unit = [*KEYS, arena.size.name]
    if kept.duplicated(unit).any():
        method, setting, seed, size = kept.loc[kept.duplicated(unit), unit].iloc[0]
        raise ValueError(
            f"The arena {arena.name} takes one row a seed, and {method!r} at {size:g} {arena.size.name} has two of "
            f"seed {seed} in {setting!r}."
        )
    return kept


def standings(arena: Arena, table: pd.DataFrame) -> list[Standing]:
    """Means over seeds with 95 % t intervals, by setting, in the order of size and then of quality."""
    checked = rows(arena, table)
    found = [
        Standing(str(method), str(setting), _intervals(arena, group))
        for (setting, method, _), group in checked.groupby(["setting", "method", arena.size.name], sort=False)
    ]
    best = arena.quality[0].name

    def place(standing: Standing) -> tuple[str, float, float]:
        return standing.setting, standing.values[arena.size.name].estimate, -standing.values[best].estimate

    return sorted(found, key=place)


def _intervals(arena: Arena, group: pd.DataFrame) -> dict[str, Interval]:
    measured = [column.name for column in arena.columns if column.name in group and group[column.name].notna().any()]
    return {name: t_interval(group[name].dropna()) for name in measured}
