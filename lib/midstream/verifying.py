"""Records computed again and compared with what is kept.

Numbers are never promised bit-equal across machines. Texts, booleans and integers must be equal, and so must each
claim's direction; a float may differ by `RELATIVE` of itself plus `ABSOLUTE` of its column's largest magnitude. A
paper whose columns need more says so in `TOLERANCES`, a mapping of `table.column` (or a scalar's name) to such a
pair; an infinite one leaves the column out, as is right for measured times.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream import places, records, running
from midstream.papers import Paper, papers
from midstream.papers import paper as find_paper
from midstream.records import Record
from midstream.request import preset as check_preset

RELATIVE, ABSOLUTE = 1e-3, 1e-3


@dataclass(frozen=True)
class Target:
    """A kept record that is to be computed again."""

    paper: Paper
    preset: str
    record: Record


@dataclass(frozen=True)
class Report:
    """How a record compares with what was computed now."""

    paper: str
    preset: str
    was_stale: bool
    differences: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The comparison in one sentence."""
        state = " (stale)" if self.was_stale else ""
        if not self.differences:
            return f"{self.paper} {self.preset}{state}: agrees within its tolerances."
        return f"{self.paper} {self.preset}{state}: differs in {'; '.join(self.differences)}."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "paper": self.paper,
            "preset": self.preset,
            "was_stale": self.was_stale,
            "agrees": not self.differences,
            "differences": list(self.differences),
            "tolerance": {"relative": RELATIVE, "absolute_of_largest": ABSOLUTE},
        }


def targets(ids: Sequence[str], preset: str | None, stale: bool) -> list[Target]:
    """The kept records of these papers (all with a chapter if none is named), of one preset, or only the stale ones."""
    chosen = [find_paper(id) for id in ids] or [paper for paper in papers().values() if paper.has_chapter]
    found = []
    for paper in chosen:
        if preset is not None and ids:
            check_preset(paper, preset)
        for name in records.presets_by_strength(paper):
            if preset not in (None, name) or not records.path(paper, name).is_file():
                continue
            record = records.load(records.path(paper, name))
            if not stale or records.staleness(record, paper, paper.module().PRESETS[name].params):
                found.append(Target(paper, name, record))
    return found


@contextmanager
def plan(target: Target) -> Iterator[running.Plan]:
    """A run that computes a record anew into a folder that is gone afterwards."""
    places.runs().mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=places.runs()) as folder:
        yield running.plan(target.paper.id, preset=target.preset, out=Path(folder), policy="fresh")


def compare(target: Target, now: Record) -> Report:
    """What differs between a kept record and the same computed now, beyond the tolerances."""
    module, kept = target.paper.module(), target.record
    tolerances: Mapping[str, tuple[float, float]] = getattr(module, "TOLERANCES", {})
    stale = records.staleness(kept, target.paper, module.PRESETS[target.preset].params)
    found = [*_verdicts(kept, now), *_scalars(kept, now, tolerances), *_tables(kept, now, tolerances)]
    return Report(target.paper.id, target.preset, bool(stale), tuple(found))


def _verdicts(kept: Record, now: Record) -> Iterator[str]:
    before = {claim.id: claim.direction for claim in kept.claims}
    after = {claim.id: claim.direction for claim in now.claims}
    for id in {**before, **after}:
        if before.get(id) != after.get(id):
            yield f"claim {id}: kept {before.get(id, 'absent')}, now {after.get(id, 'absent')}"


def _scalars(kept: Record, now: Record, tolerances: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    for name in {**kept.scalars, **now.scalars}:
        before, after = kept.scalars.get(name), now.scalars.get(name)
        if not _close(before, after, _scale([before]), tolerances.get(name, (RELATIVE, ABSOLUTE))):
            yield f"{name}: kept {before}, now {after}"


def _tables(kept: Record, now: Record, tolerances: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    for table in {**kept.tables, **now.tables}:
        before, after = kept.tables.get(table, {}), now.tables.get(table, {})
        for column in {**before, **after}:
            name = f"{table}.{column}"
            difference = _column(before.get(column), after.get(column), tolerances.get(name, (RELATIVE, ABSOLUTE)))
            if difference:
                yield f"{name}: {difference}"


def _column(before: list[Any] | None, after: list[Any] | None, tolerance: tuple[float, float]) -> str:
    """How two columns differ, in words; empty when they agree."""
    if math.isinf(tolerance[0]):
        return ""
    if before is None or after is None:
        return "kept and now do not both have it"
    if len(before) != len(after):
        return f"kept {len(before)} rows, now {len(after)}"
    scale = _scale(before)
    apart = [row for row, pair in enumerate(zip(before, after, strict=True)) if not _close(*pair, scale, tolerance)]
    if not apart:
        return ""
    return f"{len(apart)} of {len(before)} rows, first row {apart[0]}: kept {before[apart[0]]}, now {after[apart[0]]}"


def _close(before: Any, after: Any, scale: float, tolerance: tuple[float, float]) -> bool:
    if not (isinstance(before, float) and isinstance(after, float | int)) or isinstance(after, bool):
        return before == after
    relative, absolute = tolerance
    return abs(before - after) <= relative * abs(before) + absolute * scale


def _scale(values: Sequence[Any]) -> float:
    """The largest magnitude among a column's floats."""
    return max((abs(value) for value in values if isinstance(value, float)), default=0.0)
