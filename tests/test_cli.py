"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from house import House, Python, build

CALL = """
import contextlib, io, sys
from midstream import cli

def call(*arguments):
    out, error, sys.argv = io.StringIO(), io.StringIO(), ["midstream", *arguments]
    cli._printed.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return [code, out.getvalue(), error.getvalue()]
answer = call(*{!r})
"""


class Midstream:
    """The command line within one process, so that its imports are paid for once."""

    def __init__(self, house: House, python: Python):
        self.house, self.python = house, python

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        return tuple(self.python(CALL.replace("{!r}", repr(list(arguments)))))

    def json(self, *arguments: str) -> Any:
        code, out, _ = self(*arguments, "--json")
        assert code == 0
        return json.loads(out)


@pytest.fixture(scope="module")
def midstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Midstream]:
    house = build(tmp_path_factory.mktemp("house"))
    with house.python() as python:
        yield Midstream(house, python)


REFUSALS = {
    "run coyn": "There is no paper 'coyn'; did you mean 'coin'?",
    "run xyz": "There is no paper 'xyz'; `midstream papers` lists all of them.",
    "run dice": "'dice' is planned and has no chapter yet; see `midstream papers`.",
    "run coin --preset ful": "coin has no preset 'ful'; did you mean 'full'?",
    "run coin --preset zzz": "coin has no preset 'zzz'; it has quick, full and paper.",
    "run coin --preset paper": "The preset 'paper' of coin needs a GPU with 24 GiB, which this machine does not have; "
    "run it where there is one, or choose another preset.",
    "run coin -p toses=3": "coin has no parameter 'toses'; did you mean 'tosses'?",
    "run coin -p zzz=3": "coin has no parameter 'zzz'; `midstream describe coin` lists them.",
    "run coin -p tosses=many": "tosses takes an integer from 1 to 1000, got 'many'.",
    "run coin -p tosses=0": "tosses takes an integer from 1 to 1000, got '0'.",
    "run coin -p tosses=2.5": "tosses takes an integer from 1 to 1000, got '2.5'.",
    "run coin -p tosses=": "tosses takes an integer from 1 to 1000, got ''.",
    "run coin -p bias=nan": "bias takes a number from 0 to 1, got 'nan'.",
    "run coin -p metal=iron": "metal takes one of copper, tin, got 'iron'.",
    "run coin -p sides=1,x": "sides takes a list (a,b,…), each an integer, got '1,x'.",
    "run coin -p sides=3": "sides takes a list (a,b,…), each an integer, got '3' (a coin has two sides or more).",
    "run coin -p metal=tin": "coin refuses these parameters: a tin coin is fair, so bias must be 0.5.",
    "run coin -p tosses": "-p takes name=value, got 'tosses'.",
    "run coin -p =3": "-p takes name=value, got '=3'.",
    "run coin -p tosses=1 -p tosses=2": "-p sets 'tosses' twice; give it once.",
    "run coin --seed 1 -p seed=2": "--seed and -p seed= both set the seed; give one of them.",
    "run coin --seed -1": "seed takes an integer from 0 to 2147483647, got -1.",
    "run coin --timeout 0": "--timeout takes a number above 0, got 0.",
    "run coin --memory -1": "--memory takes a number above 0, got -1.",
    "run coin --out /proc/nowhere": "Cannot write to the output folder /proc/nowhere: No such file or directory.",
    "run coin --out FILE": "Cannot write to the output folder FILE: it is a file.",
    "run coin -p tosses=3 --record": "--record keeps only runs with a preset's own parameters in results/; "
    "leave out -p and --seed.",
    "describe coyn": "There is no paper 'coyn'; did you mean 'coin'?",
    "sweep coin": "A sweep needs at least one -g name=value1,value2; there is nothing to sweep over.",
    "sweep coin -g tosses=": "-g tosses= lists no values; it takes name=value1,value2.",
    "sweep coin -g tosses=,": "-g tosses= lists no values; it takes name=value1,value2.",
    "sweep coin -g tosses": "-g takes name=value, got 'tosses'.",
    "sweep coin -g tosses=1,x": "tosses takes an integer from 1 to 1000, got 'x'.",
    "sweep coin -g toses=1,2": "coin has no parameter 'toses'; did you mean 'tosses'?",
    "sweep coin -g tosses=1 -p tosses=2": "'tosses' is both swept with -g and fixed with -p; give one of them.",
    "sweep coin -g tosses=1 --jobs 0": "--jobs takes an integer of at least 1, got 0.",
    "sweep coin -g tosses=1 --profile lokal": "There is no profile 'lokal'; did you mean 'local'?",
    "sweep coin -g tosses=1 --profile slurm": "The profile 'slurm' needs "
    "`pip install snakemake-executor-plugin-slurm`.",
    "sweep coin -g tosses=1 --preset paper": "The preset 'paper' of coin needs a GPU with 24 GiB, which this machine "
    "does not have; run it where there is one, or choose another preset.",
    "verify coyn": "There is no paper 'coyn'; did you mean 'coin'?",
    "verify coin --preset ful": "coin has no preset 'ful'; did you mean 'full'?",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_a_wrong_request_is_refused_with_one_sentence_before_a_kernel_starts(midstream: Midstream, line: str) -> None:
    file = str(midstream.house.root / "Snakefile")
    code, out, error = midstream(*line.replace("FILE", file).split())
    assert (code, out) == (2, "")
    assert error == f"midstream: {REFUSALS[line].replace('FILE', file)}\n"
    assert not (midstream.house.root / "runs/.locks").exists()


def test_a_folder_that_may_not_be_written_to_is_refused(midstream: Midstream, tmp_path: Path) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o500)
    try:
        (folder / "probe").touch()
    except PermissionError:
        code, _, error = midstream("run", "coin", "--out", str(folder))
        assert (code, error) == (2, f"midstream: Cannot write to the output folder {folder}: Permission denied.\n")
    else:
        pytest.skip("this user may write anywhere")


def test_a_refusal_with_json_is_one_document_too(midstream: Midstream) -> None:
    code, out, error = midstream("run", "coyn", "--json")
    assert code == 2
    assert json.loads(out) == {"error": "There is no paper 'coyn'; did you mean 'coin'?", "exit_code": 2}
    assert error.startswith("midstream: ")


@pytest.mark.parametrize("line", ["run", "run coin --nonsense", "nonsense", "run coin --seed x"])
def test_a_line_that_makes_no_sense_has_exit_code_2_and_no_traceback(midstream: Midstream, line: str) -> None:
    code, _, error = midstream(*line.split())
    assert code == 2
    assert "Traceback" not in error


def test_papers_are_listed_with_their_state_without_importing_torch_or_pandas(midstream: Midstream) -> None:
    code = CALL.replace("{!r}", "['papers', '--json']") + "answer += ['torch' in sys.modules, 'pandas' in sys.modules]"
    with midstream.house.python() as fresh:
        _, out, _, torch, pandas = fresh(code)
    assert {paper["id"]: paper["state"] for paper in json.loads(out)["papers"]} == {
        "coin": "unrecorded",
        "dice": "planned",
    }
    assert not torch
    assert not pandas
    assert "A biased coin" in midstream("papers")[1]


def test_a_paper_is_described_by_its_schema_presets_and_claims(midstream: Midstream) -> None:
    found = midstream.json("describe", "coin")
    assert found["parameters"]["properties"]["tosses"]["maximum"] == 1000
    assert found["presets"]["paper"]["gpus"] == 1
    assert found["claims"][0]["numbers"][0]["value"] == 0.9
    assert midstream.json("describe", "dice")["state"] == "planned"
    text = midstream("describe", "coin")[1]
    assert "an integer from 1 to" in text
    assert "Heads are more common than tails." in text


def test_models_and_data_are_listed_with_licences(midstream: Midstream) -> None:
    found = midstream.json("models")
    assert found["models"]["smollm2"]["licence"].startswith("Apache")
    assert "movies" in found["data"]


def test_a_run_that_is_recorded_changes_state_and_ledger(midstream: Midstream) -> None:
    unrecorded = midstream.json("ledger")
    assert [row["direction"] for row in unrecorded] == ["not recorded"]
    code, out, error = midstream("run", "coin", "--record", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["kept"] == str(midstream.house.record("quick"))
    assert error == "coin: starting\n"
    assert midstream.json("papers")["papers"][0]["state"] == "recorded"
    [row] = midstream.json("ledger")
    assert (row["direction"], row["number"]) == ("holds", "not attempted: needs a GPU with 24 GiB")
    assert row["ours"] == "heads: 0.913 [0.81, 1.02]; heads, at our scale: 0.913 [0.81, 1.02]"


def test_verify_ends_with_1_where_numbers_differ(midstream: Midstream) -> None:
    damaged = """
from midstream import records
from midstream.chapter import compute
from midstream.papers import paper
coin = paper("coin")
record = compute(coin, coin.module().PRESETS["full"].params)
records.save(record.model_copy(update={"scalars": {"heads": 0.1}}), records.path(coin, "full"))
"""
    midstream.python(damaged)
    code, out, error = midstream("verify", "coin", "--preset", "full")
    assert code == 1
    assert out.startswith("coin full: differs in heads: kept 0.1, now 0.9")
    assert error.endswith("midstream: 1 of 1 records do not agree with what was computed now.\n")
