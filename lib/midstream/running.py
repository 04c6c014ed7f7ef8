"""Parameters in, executed notebook and record out.

A run has a process of its own, is watched from outside, and is kept whole or not at all: everything is written
into a hidden folder beside its destination and moved there when the end-of-notebook sentinel has been seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from midstream import guard, machine, places, records, request
from midstream.chapter import (
    EARLIER,
    POLICY,
    RUN_FOLDER,
    SENTINEL,
    Chapter,
    machine_lacks,
    no_machine,
    open_chapter,
)
from midstream.errors import AssetError, MidstreamError, RequestError
from midstream.papers import Paper
from midstream.papers import paper as find_paper
from midstream.records import Record

__all__ = ["Chapter", "Fault", "Plan", "Run", "keep", "open_chapter", "plan", "run"]

Policy = Literal["strongest", "exact", "fresh"]
"""Which records a run may show instead of computing: the chapter's strongest, only of its very parameters, or none."""

STAGING = ".run-"
POLL = 0.2
LEAST_FREE = 2**20
"""Bytes; a run that broke with less than this left on its disk broke for that."""
UNTOUCHED = "earlier results stand"


class Fault(MidstreamError):
    """A run that was stopped or broke; what was there before it is still there."""


@dataclass(frozen=True)
class Plan:
    """A checked request for a run: nothing about it can be wrong any more except the run itself."""

    paper: Paper
    preset: str
    """The preset that these parameters are; empty for parameters of one's own."""
    parameters: dict[str, Any]
    out: Path
    minutes: float
    memory_gib: float
    policy: Policy


@dataclass(frozen=True)
class Run:
    """A finished run: its files, its record, and whether that was computed or recorded earlier."""

    notebook: Path
    record_file: Path
    record: Record
    origin: str
    stale: str

    def to_dict(self) -> dict[str, Any]:
        """What the run found and where it lies, as plain JSON."""
        claims = [
            {"id": claim.id, "direction": claim.direction, "numbers": [number.verdict for number in claim.numbers]}
            for claim in self.record.claims
        ]
        return {
            "paper": self.record.paper,
            "preset": self.record.preset,
            "parameters": self.record.parameters,
            "origin": self.origin,
            "stale": self.stale,
            "date": self.record.date,
            "device": self.record.device,
            "seconds": self.record.seconds,
            "scalars": self.record.scalars,
            "claims": claims,
            "notebook": str(self.notebook),
            "record": str(self.record_file),
        }


@dataclass(frozen=True)
class Progress:
    """Where a run is: seconds since its start, cell of cells, bytes of memory in use."""

    seconds: float
    cell: int
    cells: int
    memory: int


def plan(
    paper_id: str,
    *,
    preset: str = "quick",
    overrides: Mapping[str, Any] | None = None,
    out: Path | None = None,
    minutes: float | None = None,
    memory_gib: float | None = None,
    policy: Policy = "exact",
) -> Plan:
    """Check a request wholly, before anything starts; a `RequestError` says what is wrong with it."""
    places.need_checkout()
    paper = find_paper(paper_id)
    chosen = request.preset(paper, preset)
    params = request.parameters(paper, preset, overrides or {})
    name = records.preset_of(paper, params)
    lacking = machine_lacks(paper, name)
    if lacking and (policy == "fresh" or records.find(paper, name) is None):
        raise RequestError(no_machine(paper, name, lacking))
    for option, value in (("--timeout", minutes), ("--memory", memory_gib)):
        if value is not None and value <= 0:
            raise RequestError(f"{option} takes a number above 0, got {value:g}.")
    if not places.notebook(paper.part, paper.id).is_file():
        raise RequestError(f"{paper.id} has no notebook at {places.notebook(paper.part, paper.id)}.")
    paper.module().revisions(params)  # refuses names that can be no model or data set
    values = params.model_dump(mode="json")
    return Plan(
        paper=paper,
        preset=name,
        parameters=values,
        out=request.writable(out or places.runs() / paper.id / (name or short_hash(values))),
        minutes=minutes or max(60.0, 4 * chosen.minutes),
        memory_gib=memory_gib or 0.9 * machine.memory_allowed() / machine.GIB,
        policy=policy,
    )


def run(
    planned: Plan,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
    waiting: Callable[[str], None] = lambda sentence: None,
) -> Run:
    """Execute a planned run's notebook in a fresh process and keep what it wrote.

    `report` hears of its progress; `waiting` is told when another run writes to the same place and this one waits
    for it. A `Fault` says what went wrong, an `AssetError` what could not be had; either way nothing was replaced.
    """
    with _disk_faults(planned), lock(planned.out, waiting), _staging(planned.out) as staging:
        _execute(planned, staging, report)
        finished = _finished(planned, staging)
        notebook, record_file = planned.out / f"{planned.paper.id}.ipynb", planned.out / "record.json"
        _tidy_notebook(staging / "executed.ipynb")
        os.replace(staging / "executed.ipynb", notebook)
        os.replace(staging / "record.json", record_file)
        (planned.out / "failed.ipynb").unlink(missing_ok=True)
    return Run(notebook, record_file, records.load(record_file), finished["origin"], finished["stale"])


def keep(finished: Run) -> Path:
    """Copy a run's record into `results/`, which is kept in git; only for a preset's own parameters."""
    record = finished.record
    if finished.stale or not record.preset:
        raise RequestError(
            f"Only a current record of a preset's own parameters is kept in results/; this one is "
            f"{'stale' if finished.stale else 'of parameters of your own'}."
        )
    paper = find_paper(record.paper)
    file = records.path(paper, record.preset)
    with lock(file):
        records.save(record, file)
    return file


@contextmanager
def lock(target: Path, waiting: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Hold the one lock on a file or folder; a second holder says so and waits. The lock dies with its process."""
    folder = places.runs() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(folder / f"{short_hash(str(target))}.lock")
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        waiting(f"Another run is writing to {target}; waiting for it to end.")
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside the results; those of killed runs are removed, as no other run holds the lock."""
    for left in out.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=out))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _disk_faults(planned: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Fault(f"The disk that holds {planned.out} is full; {UNTOUCHED}.") from error


def _execute(planned: Plan, staging: Path, report: Callable[[Progress], None]) -> None:
    """Start the executing program, watch it to its end, and raise what went wrong."""
    notebook = places.notebook(planned.paper.part, planned.paper.id)
    job = {
        "notebook": str(notebook),
        "output": str(staging / "executed.ipynb"),
        "outcome": str(staging / "outcome.json"),
        "parameters": planned.parameters,
    }
    (staging / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with open(staging / "log.txt", "w", encoding="utf-8") as log:
        process = guard.start(
            "midstream.executing",
            [str(staging / "job.json")],
            environment=_environment(planned, staging),
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=str(notebook.parent),
        )
        try:
            _watch(process, planned, report)
        finally:
            guard.kill_tree(process.pid)
            process.wait()
    _judge(planned, staging, process.returncode)


def _environment(planned: Plan, staging: Path) -> dict[str, str]:
    settings = {
        RUN_FOLDER: str(staging),
        POLICY: planned.policy,
        EARLIER: str(planned.out / "record.json"),
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not another `python3` of the user's
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    return {**machine.environment(), **settings}


def _watch(process: subprocess.Popen, planned: Plan, report: Callable[[Progress], None]) -> None:
    """Wait for the end; a `Fault` when a limit is passed first."""
    started, position = time.monotonic(), {"cell": 0, "of": 0}
    threading.Thread(target=_follow, args=(process, position), daemon=True).start()
    while process.poll() is None:
        seconds, used = time.monotonic() - started, guard.memory(process.pid)
        report(Progress(seconds, position["cell"], position["of"], used))
        if seconds > 60 * planned.minutes:
            raise Fault(
                f"{planned.paper.id} passed its time limit of {planned.minutes:g} min and was stopped; "
                f"--timeout MINUTES sets another; {UNTOUCHED}."
            )
        if used > planned.memory_gib * machine.GIB:
            raise Fault(
                f"{planned.paper.id} reached its memory limit of {planned.memory_gib:.3g} GiB "
                f"({used / machine.GIB:.3g} GiB in use) and was stopped; --memory GIB sets another; {UNTOUCHED}."
            )
        time.sleep(POLL)


def _follow(process: subprocess.Popen, position: dict[str, int]) -> None:
    """Keep the position up to date from the executing program's lines."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            position.update(json.loads(line))
        except ValueError:
            continue


def _judge(planned: Plan, staging: Path, code: int) -> None:
    """Raise what the executing program's end means, unless it was done."""
    name, outcome = planned.paper.id, _outcome(staging / "outcome.json")
    kind = outcome["kind"]
    if kind == "done" and code == 0:
        return
    if kind == "cell":
        _judge_cell(planned, staging, outcome)
    if kind == "kernel":
        where = f"in cell {outcome['cell']}" if outcome["cell"] else "before its first cell"
        raise Fault(f"The kernel of {name} died {where} (killed from outside, or out of memory); {UNTOUCHED}.")
    if kind == "disk" or shutil.disk_usage(planned.out).free < LEAST_FREE:
        raise Fault(f"The disk that holds {planned.out} is full; {UNTOUCHED}.")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    last = (staging / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise Fault(f"The process that ran {name} {how}{f' ({last[0]})' if last else ''}; {UNTOUCHED}.")


def _outcome(file: Path) -> dict[str, Any]:
    """What the executing program wrote at its end; `killed` where it could not write it whole."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"kind": "killed"}


def _judge_cell(planned: Plan, staging: Path, outcome: Mapping[str, Any]) -> None:
    """Raise what a failed cell means; the notebook up to there is left for reading."""
    error, message = outcome["error"], outcome["message"]
    if error == "AssetError":
        raise AssetError(message)
    if error == "RequestError":
        raise RequestError(message)
    if error == "OSError" and f"[Errno {errno.ENOSPC}]" in message:
        raise Fault(f"The disk is full ({message}); {UNTOUCHED}.")
    failed = planned.out / "failed.ipynb"
    os.replace(staging / "executed.ipynb", failed)
    raise Fault(
        f"{planned.paper.id} failed in cell {outcome['cell']}: {error}: {message}; "
        f"the notebook up to there is {failed}; {UNTOUCHED}."
    )


def _finished(planned: Plan, staging: Path) -> dict[str, str]:
    """The sentinel's contents; a `Fault` when the notebook never reached its last cell."""
    sentinel = staging / SENTINEL
    if not sentinel.is_file() or not (staging / "record.json").is_file():
        raise Fault(f"The notebook of {planned.paper.id} stopped before its last cell; {UNTOUCHED}.")
    records.load(staging / "record.json")
    return json.loads(sentinel.read_text(encoding="utf-8"))


def _tidy_notebook(file: Path) -> None:
    """Take this machine's paths out of an executed notebook."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    for name in ("input_path", "output_path"):
        notebook["metadata"].get("papermill", {}).pop(name, None)
    records.write_text(file, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def short_hash(value: Any) -> str:
    """A name for a set of values: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
