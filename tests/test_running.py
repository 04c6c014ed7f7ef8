"""Facts about runs: what they write, when they compute, and which record a chapter shows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from house import PARAMETERS, House, Python, build

from midstream import places
from midstream.papers import Paper, papers

PREAMBLE = f"""
import os
from pathlib import Path
from midstream import records, running
from midstream.papers import paper
from midstream.running import open_chapter
coin = paper("coin")
PRESETS = coin.module().PRESETS
defaults = {{}}
exec({PARAMETERS!r}, defaults)

def keep(preset):
    from midstream.chapter import compute
    record = compute(coin, PRESETS[preset].params)
    records.save(record, records.path(coin, preset))
    return record

def refused(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
"""


class Asking:
    def __init__(self, python: Python):
        self.python = python

    def __call__(self, code: str):
        return self.python(PREAMBLE + code)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, Python]]:
    house = build(tmp_path_factory.mktemp("house"))
    with house.python() as python:
        yield house, python


@pytest.fixture
def house(lasting: tuple[House, Python]) -> Iterator[House]:
    yield lasting[0]
    lasting[0].restore()


@pytest.fixture
def ask(house: House, lasting: tuple[House, Python]) -> Asking:
    return Asking(lasting[1])


# What a run writes ---------------------------------------------------------------------------------------------------


def test_a_run_writes_executed_notebook_and_record_and_the_next_one_shows_them(house: House, ask: Asking) -> None:
    """In a folder whose name papermill would take for a format string."""
    code = """
out = Path("runs") / "br{a}ces {}"
first = running.run(running.plan("coin", overrides={"bias": "1e-1", "sides": "1,2,3"}, out=out))
again = running.run(running.plan("coin", overrides={"bias": 0.1, "sides": (1, 2, 3)}, out=out))
answer = [first.to_dict(), again.to_dict()]
"""
    first, again = ask(code)
    assert (first["origin"], again["origin"]) == ("computed", "recorded")
    assert first["parameters"] == {**first["parameters"], "bias": 0.1, "sides": [1, 2, 3], "tosses": 50}
    assert first["claims"][0]["direction"] == "fails"
    assert first["date"] == again["date"]
    out = house.root / "runs" / "br{a}ces {}"
    assert sorted(path.name for path in out.iterdir()) == ["coin.ipynb", "record.json"]
    text = (out / "coin.ipynb").read_text()
    assert str(house.root) not in text
    notebook = nbformat.reads(text, as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "Recorded on" in text
    assert not house.record("quick").exists()


def test_only_a_preset_s_own_record_is_kept_in_results(house: House, ask: Asking) -> None:
    code = """
from dataclasses import replace
record = keep("quick")
records.path(coin, "quick").unlink()
finished = running.Run(Path("x"), Path("y"), record, "computed", "")
own = replace(finished, record=record.model_copy(update={"preset": ""}))
old = replace(finished, stale="old")
answer = [str(running.keep(finished)), refused(lambda: running.keep(own)), refused(lambda: running.keep(old))]
"""
    kept, own, stale = ask(code)
    assert kept == str(house.record("quick"))
    assert own[0] == stale[0] == "RequestError"
    assert own[1].endswith("this one is of parameters of your own.")
    assert stale[1].endswith("this one is stale.")


# Which record a chapter shows ----------------------------------------------------------------------------------------


def test_default_parameters_show_the_strongest_current_record(ask: Asking) -> None:
    code = """
for preset in ("quick", "full"): keep(preset)
run = open_chapter("coin", defaults)
answer = [run.origin, run.record.preset, run.params.n_seeds, len(run.result.tables["coins"]), run.stale]
"""
    assert ask(code) == ["recorded", "full", 8, 8, False]


def test_other_parameters_show_their_own_record_or_compute(ask: Asking) -> None:
    code = """
for preset in ("quick", "full"): keep(preset)
full = open_chapter("coin", {**defaults, "n_seeds": 8})
other = open_chapter("coin", {**defaults, "tosses": 7})
answer = [full.origin, full.record.preset, other.origin, other.record.preset, other.record.parameters["tosses"]]
"""
    assert ask(code) == ["recorded", "full", "computed", "", 7]


def test_a_run_asked_for_these_very_parameters_never_shows_a_stronger_preset(ask: Asking) -> None:
    code = """
keep("full")
os.environ["MIDSTREAM_RECORDS"] = "exact"
try:
    run = open_chapter("coin", defaults)
finally:
    del os.environ["MIDSTREAM_RECORDS"]
answer = [run.origin, run.record.preset]
"""
    assert ask(code) == ["computed", "quick"]


def test_a_stale_record_is_computed_again_where_that_can_be_done(house: House, ask: Asking) -> None:
    ask("keep('quick')")
    house.edit("measure/intervals.py", "half = float(stats.t.ppf", "half = 1 * float(stats.t.ppf")
    assert ask("run = open_chapter('coin', defaults); answer = [run.origin, run.stale]") == ["computed", False]


def test_a_stale_record_is_shown_as_stale_where_its_machine_is_not_there(house: House, ask: Asking) -> None:
    ask("keep('paper')")
    code = "run = open_chapter('coin', {**defaults, 'n_seeds': 9})\n"
    code += "answer = [run.stale, str(run.banner()), str(run.claims())]"
    assert ask(code)[0] is False
    house.edit("measure/intervals.py", "half = float(stats.t.ppf", "half = 1 * float(stats.t.ppf")
    stale, banner, claims = ask(code)
    assert stale is True
    assert "STALE, counts for no verdict: changed code: midstream.measure.intervals." in banner
    assert claims.startswith("[stale]")
    assert ask("answer = open_chapter('coin', defaults).record.preset") == "quick"


def test_without_its_machine_or_a_record_a_preset_is_refused(ask: Asking) -> None:
    kind, sentence = ask("answer = refused(lambda: open_chapter('coin', {**defaults, 'n_seeds': 9}))")
    assert kind == "RequestError"
    assert sentence == (
        "The preset 'paper' of coin needs a GPU with 24 GiB, which this machine does not have; "
        "run it where there is one, or choose another preset."
    )


def test_a_corrupted_record_is_told_in_the_banner_and_computed_again(house: House, ask: Asking) -> None:
    house.record("quick").parent.mkdir(parents=True)
    house.record("quick").write_text('{"format": 1')
    origin, banner = ask("run = open_chapter('coin', defaults); answer = [run.origin, str(run.banner())]")
    assert origin == "computed"
    assert "The record results/toy/coin/quick.json is corrupted and does not count" in banner


def test_without_a_checkout_a_notebook_computes_and_a_run_is_refused(ask: Asking, tmp_path: Path) -> None:
    code = f"""
checkout = os.environ["MIDSTREAM_ROOT"]
os.environ["MIDSTREAM_ROOT"] = {str(tmp_path)!r}
try:
    run = open_chapter("coin", defaults)
    answer = [run.origin, run.record.commit, *refused(lambda: running.plan("coin"))]
finally:
    os.environ["MIDSTREAM_ROOT"] = checkout
"""
    origin, commit, kind, sentence = ask(code)
    assert (origin, commit, kind) == ("computed", "unknown", "RequestError")
    assert sentence.startswith(f"There is no Midstream checkout at {tmp_path} (it has no notebooks/); ")


def test_a_parameters_cell_that_lacks_a_field_is_refused(ask: Asking) -> None:
    code = "del defaults['bias']; answer = refused(lambda: open_chapter('coin', defaults))"
    assert ask(code) == ["RequestError", "The parameters cell of coin does not set bias."]


def test_finish_writes_the_sentinel_only_under_a_run(ask: Asking, tmp_path: Path) -> None:
    code = f"""
run = open_chapter("coin", defaults)
run.finish()
os.environ["MIDSTREAM_RUN_DIR"] = {str(tmp_path)!r}
try:
    run.finish()
finally:
    del os.environ["MIDSTREAM_RUN_DIR"]
"""
    ask(code)
    assert [path.name for path in tmp_path.iterdir()] == ["finished.json"]
    assert json.loads((tmp_path / "finished.json").read_text())["origin"] == "computed"


# The notebooks of the book -------------------------------------------------------------------------------------------

CHAPTERS = [paper for paper in papers().values() if paper.has_chapter]


@pytest.mark.parametrize("paper", CHAPTERS, ids=lambda paper: paper.id)
def test_a_chapter_s_notebook_keeps_the_protocol(paper: Paper) -> None:
    notebook = nbformat.read(places.notebook(paper.part, paper.id), as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    [at] = [index for index, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    values: dict[str, Any] = {}
    exec(cells[at].source, values)
    values.pop("__builtins__")
    assert paper.module().Params.model_validate(values) == paper.module().PRESETS["quick"].params
    assert set(values) == set(paper.module().Params.model_fields)
    assert f'run = open_chapter("{paper.id}", globals())' in cells[at + 1].source
    assert cells[-1].source.strip() == "run.finish()"
    assert "sentinel" in cells[-1].metadata.get("tags", [])


# Verification --------------------------------------------------------------------------------------------------------

COMPARED = """
from midstream import verifying
record = keep("quick")
def with_heads(change):
    columns = record.tables["coins"]
    tables = {"coins": {**columns, "heads": [change(value) for value in columns["heads"]]}}
    return verifying.compare(coin, record, record.model_copy(update={"tables": tables}))
"""


def test_a_record_agrees_with_itself_and_within_its_tolerances(ask: Asking) -> None:
    assert ask(COMPARED + "answer = with_heads(lambda v: v)") == []
    assert ask(COMPARED + "answer = with_heads(lambda v: v * 1.001)") == []
    assert ask(COMPARED + "answer = with_heads(lambda v: v * 1.01)") == [
        "coins.heads: 3 of 3 rows, first row 0: kept 0.9, now 0.909"
    ]


def test_zero_is_not_within_the_tolerance_of_a_small_number(ask: Asking) -> None:
    assert len(ask(COMPARED + "answer = with_heads(lambda v: 0.0)")) == 1


def test_a_changed_verdict_text_or_row_count_differs(ask: Asking) -> None:
    code = """
claim = record.claims[0].model_copy(update={"direction": "fails"})
verdict = verifying.compare(coin, record, record.model_copy(update={"claims": (claim,)}))
shorter = {"coins": {name: column[:2] for name, column in record.tables["coins"].items()}}
rows = verifying.compare(coin, record, record.model_copy(update={"tables": shorter}))
answer = [verdict, rows]
"""
    verdict, rows = ask(COMPARED + code)
    assert verdict == ["claim heads: kept holds, now fails"]
    assert rows == ["coins.seed: kept 3 rows, now 2", "coins.heads: kept 3 rows, now 2"]


def test_measured_times_are_left_out_where_the_paper_says_so(ask: Asking) -> None:
    later = "[value + 1000 for value in record.tables['coins']['seconds']]"
    code = f"tables = {{'coins': {{**record.tables['coins'], 'seconds': {later}}}}}\n"
    compare = "verifying.compare(coin, record, record.model_copy(update={'tables': tables}))"
    assert ask(f"{COMPARED}{code}answer = {compare}") == []


def test_stale_picks_out_the_records_that_no_longer_count(house: House, ask: Asking) -> None:
    ask("keep('quick'); keep('full')")
    stale = "from midstream import verifying\nanswer = [t.preset for t in verifying.targets([], None, True)]"
    assert ask(stale) == []
    house.edit("papers/toy/coin.py", '"settles it"', '"settles it all"')
    assert ask(stale) == ["full", "quick"]


def test_records_that_cannot_be_computed_here_are_skipped_and_failures_reported(house: House, ask: Asking) -> None:
    code = """
from midstream import verifying
keep("paper"); keep("full"); records.path(coin, "quick").write_text("{")
def broken(planned):
    raise running.Fault("The kernel died.")
answer = [verifying.verify(target, broken).sentence for target in verifying.targets([], None, False)]
"""
    paper, full, quick = ask(code)
    assert paper == "coin paper: skipped: it needs a GPU with 24 GiB, which this machine does not have."
    assert full == "coin full: failed: The kernel died."
    assert quick.startswith("coin quick: corrupted: The record results/toy/coin/quick.json is corrupted")


# GPU slots -----------------------------------------------------------------------------------------------------------


def test_two_slots_hold_two_gpus_and_a_third_waits_for_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("TMPDIR", str(house.root))
    held = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
    command = [sys.executable, "-m", "midstream.slots", "1", sys.executable, "-c", held]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=house.environment, stdin=pipe, stdout=pipe, text=True)

    first, second = start(), start()
    assert {first.stdout.readline().strip(), second.stdout.readline().strip()} == {"0", "1"}
    third = start()
    first.communicate("")
    assert third.stdout.readline().strip() in {"0", "1"}
    for process in (second, third):
        process.communicate("")


def test_more_gpus_than_there_are_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "midstream.slots", "1", "true"]
    done = subprocess.run(command, env=house.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "midstream: This run takes 1 GPU and none can be seen.\n"
