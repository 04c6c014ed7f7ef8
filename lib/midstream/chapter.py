"""The run object of a notebook: the record it shows, or the experiment it computes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream import display, fingerprint, machine, records
from midstream.display import Html
from midstream.errors import RequestError
from midstream.papers import Paper
from midstream.papers import paper as find_paper
from midstream.records import Record
from midstream.request import checked

if TYPE_CHECKING:
    from midstream.paper import PaperParams, Result

RUN_FOLDER = "MIDSTREAM_RUN_DIR"
"""Set by `midstream run`: the folder where the record and the end-of-notebook sentinel are written."""
POLICY = "MIDSTREAM_RECORDS"
"""Set by `midstream run`: `exact` (a record of these very parameters may be shown), or `fresh` (always compute)."""
EARLIER = "MIDSTREAM_EARLIER_RECORD"
"""Set by `midstream run`: a record left by an earlier run into the same folder; shown when its key is current."""
SENTINEL = "finished.json"


class Chapter:
    """One chapter's experiment as its notebook sees it."""

    def __init__(self, paper: Paper, record: Record, *, origin: str, stale: str = "", notes: tuple[str, ...] = ()):
        self.paper = paper
        self.record = record
        self.origin = origin
        self.why_stale = stale
        self.notes = notes

    @property
    def stale(self) -> bool:
        """Whether the record shown no longer counts."""
        return bool(self.why_stale)

    @cached_property
    def result(self) -> Result:
        """The experiment's tables and scalars."""
        return self.record.result

    @cached_property
    def params(self) -> Any:  # the Params of whichever paper this is
        """The parameters of the record that is shown, which may be a stronger preset's than the notebook's."""
        return self.paper.module().Params.model_validate(self.record.parameters)

    def banner(self) -> Html:
        """Recorded or computed, when, on what, at what cost; and whether it is stale."""
        return display.banner(self.record, self.origin, self.why_stale, self.notes)

    def claims(self) -> Html:
        """The claim table: paper beside ours, with both verdicts."""
        return display.claims(self.record.claims, caption=f"Claims of {self.paper.title}", stale=self.stale)

    def cost(self) -> Html:
        """The cost card."""
        return display.cost(self.record)

    def finish(self) -> None:
        """Says that the notebook ran to its end; stands in the last cell, tagged `sentinel`."""
        folder = os.environ.get(RUN_FOLDER)
        if folder:
            shown = {"key": self.record.key, "origin": self.origin, "stale": self.why_stale}
            records.write_text(Path(folder) / SENTINEL, json.dumps(shown))


def open_chapter(id: str, namespace: Mapping[str, Any]) -> Chapter:
    """The run object of a chapter for the parameters in a notebook's namespace.

    With the default parameters it holds the strongest current record; with others, a current record of just
    those; where there is none it computes the experiment. A stale record is only shown where the parameters
    need a machine that is not there, and then says so.
    """
    paper = find_paper(id)
    fields = paper.module().Params.model_fields
    missing = [name for name in fields if name not in namespace]
    if missing:
        raise RequestError(f"The parameters cell of {id} does not set {', '.join(missing)}.")
    chapter = _open(paper, checked(paper, {name: namespace[name] for name in fields}))
    folder = os.environ.get(RUN_FOLDER)
    if folder:
        records.save(chapter.record, Path(folder) / "record.json")
    return chapter


def compute(paper: Paper, params: PaperParams) -> Record:
    """Run a paper's experiment here and now, and make its record."""
    module, code = paper.module(), fingerprint.code(paper.module_name)  # an edit during a long run changes neither
    started = time.perf_counter()
    result = module.experiment(params)
    return records.make(paper, params, result, time.perf_counter() - started, code)


def machine_lacks(paper: Paper, preset: str) -> str:
    """What a preset needs and this machine lacks, in words; empty when it can run here."""
    chosen = paper.module().PRESETS.get(preset)
    if chosen is None or chosen.gpus <= 0:
        return ""
    present = machine.gpus()
    if present >= chosen.gpus:
        return ""
    return chosen.needs or f"{chosen.gpus} GPU{'s' if chosen.gpus > 1 else ''}"


def _open(paper: Paper, params: PaperParams) -> Chapter:
    notes = tuple(records.corrupted(paper))
    policy = os.environ.get(POLICY, "strongest")
    record = None if policy == "fresh" else _recorded(paper, params, policy)
    if record is not None:
        return Chapter(paper, record, origin="recorded", notes=notes)
    preset = records.preset_of(paper, params)
    lacking = machine_lacks(paper, preset)
    if not lacking:
        _announce(paper, preset)
        return Chapter(paper, compute(paper, params), origin="computed", notes=notes)
    old = None if policy == "fresh" else records.find(paper, preset)
    if old is None:
        raise RequestError(no_machine(paper, preset, lacking))
    return Chapter(paper, old, origin="recorded", stale=records.staleness(old, paper, params), notes=notes)


def _announce(paper: Paper, preset: str) -> None:
    """Tell who opened the notebook by hand that it takes a while; `midstream run` has its own progress."""
    if RUN_FOLDER not in os.environ:
        chosen = paper.module().PRESETS.get(preset)
        time_needed = f", at most {chosen.minutes:g} min on 2 cores or a GPU" if chosen else ""
        print(f"There is no current record of these parameters: computing it{time_needed}.", file=sys.stderr)


def no_machine(paper: Paper, preset: str, lacking: str) -> str:
    """The refusal of a preset that this machine cannot run and that no record stands in for."""
    return (
        f"The preset '{preset}' of {paper.id} needs {lacking}, which this machine does not have; "
        "run it where there is one, or choose another preset."
    )


def _recorded(paper: Paper, params: PaperParams, policy: str) -> Record | None:
    """A current record to show for these parameters, if there is one."""
    if policy == "strongest" and params == paper.module().Params():
        return records.strongest(paper)
    kept = [records.path(paper, name) for name, preset in paper.module().PRESETS.items() if preset.params == params]
    earlier = os.environ.get(EARLIER)
    for file in [*kept, *([Path(earlier)] if earlier else [])]:
        record = records.read(file)
        if record is not None and not records.staleness(record, paper, params):
            return record
    return None
