"""Records computed again and compared with what is kept.

Numbers are never promised bit-equal across machines. Texts, booleans and integers must be equal, and so must each
claim's direction; a float may differ by `RELATIVE` of itself plus `ABSOLUTE` of its column's largest magnitude. A
paper whose columns need more says so in `TOLERANCES`, a mapping of `table.column` (or a scalar's name) to such a
pair; an infinite one leaves the column out, as is right for measured times.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from midstream import places, records, running
from midstream.chapter import machine_lacks
from midstream.errors import MidstreamError
from midstream.papers import Paper, papers
from midstream.papers import paper as find_paper
from midstream.records import Record
from midstream.request import preset as check_preset

RELATIVE, ABSOLUTE = 1e-3, 1e-3


Outcome = Literal["agrees", "differs", "corrupted", "failed", "skipped"]


@dataclass(frozen=True)
class Target:
    """A kept record that is to be computed again; without a record when what is kept is corrupted, as `told`."""

    paper: Paper
    preset: str
    record: Record | None
    told: str = ""


@dataclass(frozen=True)
class Report:
    """How a record compares with what was computed now."""

    paper: str
    preset: str
    outcome: Outcome
    details: tuple[str, ...] = ()
    was_stale: bool = False

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        record = f"{self.paper} {self.preset}{' (stale)' if self.was_stale else ''}"
        if self.outcome == "agrees":
            return f"{record}: agrees within its tolerances."
        if self.outcome == "differs":
            return f"{record}: differs in {'; '.join(self.details)}."
        return f"{record}: {self.outcome}: {' '.join(self.details)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        tolerance = {"relative": RELATIVE, "absolute_of_largest": ABSOLUTE}
        return {**asdict(self), "details": list(self.details), "tolerance": tolerance}


def targets(ids: Sequence[str], preset: str | None, stale: bool) -> list[Target]:
    """The kept records of these papers (all with a chapter if none is named), of one preset, or only the stale ones."""
    chosen = [find_paper(id) for id in ids] or [paper for paper in papers().values() if paper.has_chapter]
    if preset is not None:
        for paper in chosen if ids else []:
            check_preset(paper, preset)
    found = [
        _target(paper, name)
        for paper in chosen
        for name in records.presets_by_strength(paper)
        if preset in (None, name) and records.path(paper, name).is_file()
    ]
    return [target for target in found if not stale or target.record is None or _is_stale(target)]


def verify(target: Target, execute: Callable[[running.Plan], running.Run]) -> Report:
    """Compute one record anew, in a folder that is gone afterwards, and compare. A failure is reported, not raised."""
    identity = (target.paper.id, target.preset)
    if target.record is None:
        return Report(*identity, "corrupted", (target.told,))
    lacking = machine_lacks(target.paper, target.preset)
    if lacking:
        return Report(*identity, "skipped", (f"it needs {lacking}, which this machine does not have.",))
    places.runs().mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=places.runs()) as folder:
        try:
            planned = running.plan(target.paper.id, preset=target.preset, out=Path(folder), policy="fresh")
            now = execute(planned).record
        except MidstreamError as error:
            return Report(*identity, "failed", (str(error),))
    differences = compare(target.paper, target.record, now)
    return Report(*identity, "differs" if differences else "agrees", tuple(differences), _is_stale(target))


def compare(paper: Paper, kept: Record, now: Record) -> list[str]:
    """What differs between a kept record and the same computed now, beyond the tolerances."""
    tolerances: Mapping[str, tuple[float, float]] = getattr(paper.module(), "TOLERANCES", {})
    return [*_verdicts(kept, now), *_scalars(kept, now, tolerances), *_tables(kept, now, tolerances)]


def _target(paper: Paper, preset: str) -> Target:
    try:
        return Target(paper, preset, records.load(records.path(paper, preset)))
    except records.CorruptRecord as error:
        return Target(paper, preset, None, str(error))


def _is_stale(target: Target) -> bool:
    params = target.paper.module().PRESETS[target.preset].params
    return target.record is not None and records.staleness(target.record, target.paper, params) != ""


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
