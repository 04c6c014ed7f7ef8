"""Facts about sweeps: the grid, the cells, the table and figure, and that one can be killed and resumed."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import snakemake.cli
from house import House, Python, build

from midstream.sweeping import split

PREAMBLE = """
import json
from midstream import records, sweeping
from midstream.chapter import compute
from midstream.papers import paper
coin = paper("coin")

def finish(planned, cells=None):
    for cell in cells or planned.cells:
        records.save(compute(coin, planned.cells[cell]), planned.out / "cells" / cell / "record.json")
"""


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
def ask(house: House, lasting: tuple[House, Python]):
    return lambda code: lasting[1](PREAMBLE + code)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,4", ["1", "2", "4"]),
        (" a , b ,", ["a", "b"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("1,1,2", ["1", "2"]),
        (",", []),
    ],
)
def test_values_are_split_at_commas_outside_brackets(text: str, values: list[str]) -> None:
    assert split(text) == values


def test_a_grid_has_a_cell_for_every_combination_with_all_its_parameters(ask) -> None:
    code = """
planned = sweeping.plan("coin", ["tosses=10,20", "sides=[0,1],[0,2]"], fixed=["bias=0.7"])
answer = {cell: params.model_dump(mode="json") for cell, params in planned.cells.items()}
"""
    cells = ask(code)
    assert [(cell["tosses"], cell["sides"]) for cell in cells.values()] == [
        (10, [0, 1]), (10, [0, 2]), (20, [0, 1]), (20, [0, 2]),
    ]  # fmt: skip
    assert {cell["bias"] for cell in cells.values()} == {0.7}


def test_a_cell_s_folder_says_its_values_where_a_path_can(ask) -> None:
    names = "answer = list(sweeping.plan('coin', [{!r}]).cells)"
    assert ask(names.format("tosses=10,20")) == ["tosses=10", "tosses=20"]
    assert all(name.startswith("cell-") for name in ask(names.format("name=a/b,{x}")))


def test_the_command_of_a_cell_gives_back_its_parameters(ask) -> None:
    code = """
from midstream.request import assignments, parameters
planned = sweeping.plan("coin", ["name=12,a b", "sides=[3,4],[4,5,6]"], fixed=["bias=1e-4"], preset="full")
planned.out.mkdir(parents=True, exist_ok=True)
sweeping._write_plan(planned)
commands = json.loads((planned.out / "plan.json").read_text())["cells"]
answer = []
for cell, command in commands.items():
    pairs = [argument[2:] for argument in command if argument.startswith("-p")]
    answer.append([command[0], command[-2:], parameters(coin, "full", assignments(pairs, "-p")) == planned.cells[cell]])
"""
    assert ask(code) == [["coin", ["--preset", "full"], True]] * 4


def test_finished_cells_end_in_a_tidy_table_and_a_figure_with_alt_text(ask) -> None:
    code = """
planned = sweeping.plan("coin", ["tosses=10,20", "seed=0,1"])
finish(planned)
answer = sweeping.sweep(planned).to_dict()
"""
    swept = ask(code)
    assert (swept["cells"], swept["failed"]) == (4, {})
    with open(swept["table"]) as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tosses", "seed", "heads", "claim heads", "heads: heads", "seconds", "cell"]
    assert [(row["tosses"], row["seed"]) for row in rows] == [("10", "0"), ("10", "1"), ("20", "0"), ("20", "1")]
    figure = Path(swept["figure"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in figure.with_suffix(".svg").read_text()
    alt = figure.with_suffix(".alt.txt").read_text()
    assert alt.startswith("2 panels over tosses, one dot a run, lines through the means. heads: 0.9 at 10, ")


def test_a_cell_whose_code_has_changed_is_not_finished_any_more(house: House, ask) -> None:
    plan = "planned = sweeping.plan('coin', ['tosses=10,20'])\n"
    code = "sweeping._drop_stale(planned)\nanswer = [f.is_file() for f in sweeping._record_files(planned).values()]"
    assert ask(f"{plan}finish(planned)\n{code}") == [True, True]
    house.edit("papers/toy/coin.py", "a tin coin is fair", "a tin coin is even")
    assert ask(plan + code) == [False, False]


def test_a_record_of_other_parameters_does_not_finish_a_cell(ask) -> None:
    code = """
planned = sweeping.plan("coin", ["tosses=10,20"])
finish(planned)
first, second = sweeping._record_files(planned).values()
first.write_bytes(second.read_bytes())
sweeping._drop_stale(planned)
answer = [first.is_file(), second.is_file()]
"""
    assert ask(code) == [False, True]


def test_a_path_given_relative_to_the_caller_is_made_absolute(house: House, ask) -> None:
    code = "answer = [p.name for p in sweeping.plan('coin', ['name=./a,../b,c/d']).cells.values()]"
    assert ask(code) == [str(house.root / "a"), str(house.root.parent / "b"), "c/d"]


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_is_resumed_without_redoing_finished_cells(house: House) -> None:
    out = house.root / "runs/swept"
    command = ("sweep", "coin", "-g", "tosses=10,20", "-g", "seed=0,1", "--jobs", "1", "--out", str(out), "--json")
    process = house.start(*command)
    end = time.monotonic() + 120
    while not (finished := list(out.glob("cells/*/record.json"))) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(3)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/record.json")}
    assert 1 <= len(finished) < 4
    done = house.midstream(*command)
    assert done.returncode == 0
    assert json.loads(done.stdout)["failed"] == {}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len((out / "table.csv").read_text().splitlines()) == 5


@pytest.mark.slow
def test_cells_that_fail_are_told_and_the_others_kept(house: House) -> None:
    done = house.midstream("sweep", "coin", "-g", "fault=none,error", "--jobs", "2", "--json")
    assert done.returncode == 1
    swept = json.loads(done.stdout)
    assert list(swept["failed"]) == ["fault=error"]
    assert "the coin rolled under the table" in swept["failed"]["fault=error"]
    assert "1 of 2 cells failed, first fault=error: coin failed in cell" in done.stderr
    assert len(Path(swept["table"]).read_text().splitlines()) == 2


def test_the_profiles_and_the_plan_are_what_snakemake_reads(house: House, ask) -> None:
    ask("planned = sweeping.plan('coin', ['tosses=10']); sweeping._write_plan(planned)")
    [plan] = house.root.glob("runs/sweeps/coin/*/plan.json")
    for profile in ("local", "gpu"):
        arguments = ["--snakefile", str(house.root / "Snakefile"), "--directory", str(plan.parent), "--dry-run"]
        arguments += ["--profile", str(house.root / "profiles" / profile), "--cores", "1", "--config", f"plan={plan}"]
        with pytest.raises(SystemExit) as end:
            snakemake.cli.main(arguments)
        assert end.value.code == 0
