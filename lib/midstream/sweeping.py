"""A grid of parameters through Snakemake: each cell one run, all of them one table and one figure.

A finished cell is a folder with a current record, so a sweep that was killed is resumed by the same command, and cells
whose code has changed since are computed again.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream import guard, machine, places, records, request
from midstream.chapter import machine_lacks, no_machine
from midstream.errors import MidstreamError, RequestError
from midstream.papers import Paper
from midstream.papers import paper as find_paper
from midstream.records import ComparisonVerdict, Record
from midstream.running import lock, short_hash

if TYPE_CHECKING:
    import pandas as pd

    from midstream.paper import PaperParams

POLL = 0.5


@dataclass(frozen=True)
class SweepPlan:
    """A checked grid: every cell's parameters are valid before the first starts."""

    paper: Paper
    preset: str
    names: tuple[str, ...]
    """The parameters that are swept."""
    cells: Mapping[str, PaperParams]
    """Each cell's folder name and parameters."""
    jobs: int
    profile: str
    out: Path


@dataclass(frozen=True)
class Sweep:
    """What a sweep left: a table, a figure where there are numbers to draw, and the cells that failed and why."""

    table: Path
    figure: Path | None
    cells: int
    failed: Mapping[str, str]

    @property
    def failure(self) -> str:
        """One sentence on the cells that failed."""
        first, why = next(iter(self.failed.items()))
        return (
            f"{len(self.failed)} of {self.cells} cells failed, first {first}: {why} "
            f"The table holds the others; the same command tries the failed ones again."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        figure = str(self.figure) if self.figure else None
        return {"table": str(self.table), "figure": figure, "cells": self.cells, "failed": dict(self.failed)}


def plan(
    paper_id: str,
    grid: Sequence[str],
    *,
    preset: str = "quick",
    fixed: Sequence[str] = (),
    jobs: int | None = None,
    profile: str = "local",
    out: Path | None = None,
) -> SweepPlan:
    """Check a sweep wholly, before anything starts; a `RequestError` says what is wrong with it."""
    places.need_checkout()
    paper = find_paper(paper_id)
    chosen = request.preset(paper, preset)
    values = {name: split(text) for name, text in request.assignments(grid, "-g").items()}
    base = request.assignments(fixed, "-p")
    _check_grid(values, base)
    cells = _cells(paper, preset, values, base)
    _check_profile(profile)
    if jobs is not None and jobs < 1:
        raise RequestError(f"--jobs takes an integer of at least 1, got {jobs}.")
    lacking = machine_lacks(paper, preset)
    if lacking and profile != "slurm":
        raise RequestError(no_machine(paper, preset, lacking))
    name = short_hash([preset, base, values])
    return SweepPlan(
        paper=paper,
        preset=preset,
        names=tuple(values),
        cells=cells,
        jobs=jobs or max(1, min(machine.cores(), int(machine.memory_allowed() / machine.GIB // chosen.memory_gib))),
        profile=profile,
        out=request.writable(out or places.runs() / "sweeps" / paper.id / name),
    )


def split(text: str) -> list[str]:
    """Values separated by commas; commas inside brackets belong to a value."""
    values, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            values.append(current)
            current = ""
        else:
            current += character
    return list(dict.fromkeys(value.strip() for value in [*values, current] if value.strip()))


def sweep(
    planned: SweepPlan,
    *,
    report: Callable[[int], None] = lambda done: None,
    waiting: Callable[[str], None] = lambda sentence: None,
) -> Sweep:
    """Run the cells that are not finished, then write table and figure; `report` hears how many cells are done."""
    with lock(planned.out, waiting):
        _drop_stale(planned)
        _write_plan(planned)
        if any(not file.is_file() for file in _record_files(planned).values()):
            _snakemake(planned, report)
        failed = {cell: _why(planned, cell) for cell, file in _record_files(planned).items() if not file.is_file()}
        if len(failed) == len(planned.cells):
            raise MidstreamError(
                f"All {len(failed)} cells failed, first {next(iter(failed))}: {failed[next(iter(failed))]}"
            )
        table = tidy(planned)
        records.write_text(planned.out / "table.csv", table.to_csv(index=False))
        from midstream.sweepfigure import draw

        figure = draw(table, planned.names, thresholds(planned), planned.paper.id, planned.out / "figure")
    return Sweep(planned.out / "table.csv", figure, len(planned.cells), failed)


def threads(planned: SweepPlan) -> int:
    """Processor threads of one cell, so that all cells run at once share the machine's cores."""
    return max(1, machine.cores() // planned.jobs)


def tidy(planned: SweepPlan) -> pd.DataFrame:
    """One row a finished cell: swept parameters, scalars, each claim's verdict and estimates, seconds."""
    import pandas as pd

    rows = []
    for cell, record in _finished(planned).items():
        swept = {name: _plain(record.parameters[name]) for name in planned.names}
        verdicts = {f"claim {claim.id}": claim.direction for claim in record.claims}
        estimates = {name: comparison.interval.estimate for name, comparison in _comparisons(record)}
        rows.append({**swept, **record.scalars, **verdicts, **estimates, "seconds": record.seconds, "cell": cell})
    return pd.DataFrame(rows)


def thresholds(planned: SweepPlan) -> dict[str, float]:
    """The threshold of each estimate in the table, by its column."""
    found = _finished(planned).values()
    return {name: comparison.threshold for record in found for name, comparison in _comparisons(record)}


def _finished(planned: SweepPlan) -> dict[str, Record]:
    found = {cell: records.read(file) for cell, file in _record_files(planned).items()}
    return {cell: record for cell, record in found.items() if record is not None}


def _comparisons(record: Record) -> list[tuple[str, ComparisonVerdict]]:
    """The comparisons of a record's claims, each with its name in the table."""
    return [
        (f"{claim.id}: {comparison.what}", comparison) for claim in record.claims for comparison in claim.comparisons
    ]


def _check_grid(values: Mapping[str, list[str]], base: Mapping[str, str]) -> None:
    if not values:
        raise RequestError("A sweep needs at least one -g name=value1,value2; there is nothing to sweep over.")
    for name, options in values.items():
        if not options:
            raise RequestError(f"-g {name}= lists no values; it takes name=value1,value2.")
        if name in base:
            raise RequestError(f"'{name}' is both swept with -g and fixed with -p; give one of them.")


def _cells(
    paper: Paper, preset: str, values: Mapping[str, list[str]], base: Mapping[str, str]
) -> dict[str, PaperParams]:
    found = {}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        params = request.parameters(paper, preset, {**base, **chosen})
        found[_folder_name(chosen)] = params
    return found


def _folder_name(chosen: Mapping[str, str]) -> str:
    """A cell's folder: its values in words where a path can hold them, else a hash of them."""
    name = ",".join(f"{key}={value}" for key, value in chosen.items())
    return name if re.fullmatch(r"[\w.,=+-]{1,100}", name) else f"cell-{short_hash(dict(chosen))}"


def _check_profile(name: str) -> None:
    folder = places.root() / "profiles"
    known = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    if name not in known:
        raise RequestError(
            f"There is no profile '{name}'{request.hint(name, known, f'there are {request.listed(known)}')}"
        )
    if name == "slurm" and importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        raise RequestError("The profile 'slurm' needs `pip install snakemake-executor-plugin-slurm`.")


def _record_files(planned: SweepPlan) -> dict[str, Path]:
    return {cell: planned.out / "cells" / cell / "record.json" for cell in planned.cells}


def _drop_stale(planned: SweepPlan) -> None:
    """Remove records of finished cells that no longer count, so that they are computed again."""
    for cell, file in _record_files(planned).items():
        record = records.read(file)
        if record is None or records.staleness(record, planned.paper, planned.cells[cell]):
            file.unlink(missing_ok=True)


def _write_plan(planned: SweepPlan) -> None:
    preset = planned.paper.module().PRESETS[planned.preset]
    cells = {
        cell: [
            planned.paper.id,
            *(f"-p{name}={_argument(value)}" for name, value in _differences(planned, params).items()),
        ]
        for cell, params in planned.cells.items()
    }
    facts = {
        "python": sys.executable,
        "threads": threads(planned),
        "gpus": max(preset.gpus, int(planned.profile == "gpu")),
        "memory_mb": math.ceil(1024 * preset.memory_gib),
        "minutes": math.ceil(max(60, 4 * preset.minutes)),
        "cells": {cell: [*arguments, "--preset", planned.preset] for cell, arguments in cells.items()},
    }
    records.write_text(planned.out / "plan.json", json.dumps(facts, indent=1))


def _differences(planned: SweepPlan, params: PaperParams) -> dict[str, Any]:
    base = planned.paper.module().PRESETS[planned.preset].params.model_dump(mode="json")
    return {name: value for name, value in params.model_dump(mode="json").items() if value != base[name]}


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _snakemake(planned: SweepPlan, report: Callable[[int], None]) -> None:
    """Run Snakemake to its end. Our lock on the folder stands in for Snakemake's, which would outlive a kill -9."""
    arguments = ["--snakefile", str(places.root() / "Snakefile"), "--directory", str(planned.out)]
    arguments += ["--profile", str(places.root() / "profiles" / planned.profile)]
    arguments += ["--cores", str(planned.jobs * threads(planned))] if planned.profile != "slurm" else []
    arguments += ["--config", f"plan={planned.out / 'plan.json'}", "--nolock", "--ignore-incomplete", "--keep-going"]
    arguments += ["--rerun-triggers", "mtime", "--nocolor"]
    with open(planned.out / "snakemake.log", "w", encoding="utf-8") as log:
        environment = machine.environment()
        process = guard.start(
            "snakemake", arguments, environment=environment, stdout=log, stderr=subprocess.STDOUT, cwd=str(planned.out)
        )
        try:
            while process.poll() is None:
                report(sum(file.is_file() for file in _record_files(planned).values()))
                time.sleep(POLL)
        finally:
            guard.kill_tree(process.pid)
            process.wait()


def _why(planned: SweepPlan, cell: str) -> str:
    """Why a cell has no record: its own last words, else Snakemake's."""
    for log in (planned.out / "logs" / f"{cell}.txt", planned.out / "snakemake.log"):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        if lines:
            return lines[-1].removeprefix("midstream: ")
    return "Snakemake never started it."
