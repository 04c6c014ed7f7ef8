"""Faults are told as what they are, and what was there before them is still there."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from house import House, Python, build

from midstream import records

ALL_AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from midstream import running

def told(fault):
    limits = {"memory": {"memory_gib": 0.7}, "sleep60": {"minutes": 0.05}}.get(fault, {})
    out = Path("runs/out") / fault
    try:
        running.run(running.plan("coin", overrides={"fault": fault}, out=out, policy="fresh", **limits))
    except Exception as error:
        return [type(error).__name__, getattr(error, "exit_code", None), str(error)]

with ThreadPoolExecutor(3) as pool:
    answer = dict(zip(faults, pool.map(told, faults)))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return build(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def python(house: House) -> Iterator[Python]:
    with house.python() as python:
        yield python


@pytest.fixture(scope="module")
def told(house: House, python: Python) -> dict[str, list[Any]]:
    """Error, exit code and sentence of the faults that are quickly had; every folder held an earlier result."""
    return run_into(["error", "asset", "kill", "memory", "sleep60"], house, python)


@pytest.fixture(scope="module")
def told_slowly(house: House, python: Python) -> dict[str, list[Any]]:
    """The same of the rest."""
    return run_into(["disk", "exit"], house, python)


def run_into(faults: list[str], house: House, python: Python) -> dict[str, list[Any]]:
    for fault in faults:
        earlier = house.root / "runs/out" / fault / "record.json"
        earlier.parent.mkdir(parents=True)
        earlier.write_text("earlier")
    return python(f"faults = {faults!r}\n{ALL_AT_ONCE}")


@pytest.mark.parametrize(
    ("fault", "kind", "code", "words"),
    [
        ("error", "Fault", 1, "coin failed in cell 4: ValueError: the coin rolled under the table; "),
        ("asset", "AssetError", 3, "The coin 'x' is not here and cannot be fetched."),
        ("kill", "Fault", 1, "The kernel of coin died in cell 4 (killed from outside, or out of memory); "),
        ("memory", "Fault", 1, "coin reached its memory limit of 0.7 GiB ("),
        (
            "sleep60",
            "Fault",
            1,
            "coin passed its time limit of 0.05 min and was stopped; --timeout MINUTES",
        ),
    ],
)
def test_a_fault_is_told_as_what_it_is(told: dict, fault: str, kind: str, code: int, words: str) -> None:
    name, exit_code, sentence = told[fault]
    assert (name, exit_code) == (kind, code)
    assert sentence.startswith(words)
    assert fault == "asset" or sentence.endswith("earlier results stand.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("disk", "The disk is full ([Errno 28] No space left on device); earlier results stand."),
        ("exit", "The notebook of coin stopped before its last cell; earlier results stand."),
    ],
)
def test_a_full_disk_and_a_notebook_that_stops_early_are_told(told_slowly: dict, fault: str, words: str) -> None:
    assert told_slowly[fault] == ["Fault", 1, words]


def test_earlier_results_stand_and_no_fragments_are_left(house: House, told: dict) -> None:
    for fault in told:
        assert (house.root / "runs/out" / fault / "record.json").read_text() == "earlier"
    assert list(house.root.glob("runs/out/*/.run-*")) == []


def test_a_failed_notebook_is_left_for_reading(house: House, told: dict) -> None:
    assert "rolled under the table" in (house.root / "runs/out/error/failed.ipynb").read_text()
    assert [path.parent.name for path in house.root.glob("runs/out/*/failed.ipynb")] == ["error"]


def test_the_process_around_the_kernel_killed_is_told_as_that(python: Python) -> None:
    code = """
import threading, time
import psutil
from midstream import running
def shoot():
    while not (found := [p for p in psutil.Process().children(recursive=True) if "midstream.executing" in p.cmdline()]):
        time.sleep(0.05)
    found[0].kill()
threading.Thread(target=shoot).start()
try:
    running.run(running.plan("coin", overrides={"seed": 5}))
except running.Fault as fault:
    answer = str(fault)
"""
    assert python(code).startswith("The process that ran coin was killed by signal 9")


def test_a_disk_that_is_full_when_results_are_moved_is_told_as_that(python: Python) -> None:
    code = """
import errno
from midstream import running
def full(*arguments): raise OSError(errno.ENOSPC, "No space left on device")
planned, execute = running.plan("coin", overrides={"seed": 6}), running._execute
running._execute = full
try:
    running.run(planned)
except running.Fault as fault:
    answer = str(fault)
finally:
    running._execute = execute
"""
    assert python(code).endswith("is full; earlier results stand.")


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [4, 12, 24, 40])
def test_a_disk_that_fills_up_at_any_moment_is_told_as_that(house: House, tmp_path: Path, kibibytes: int) -> None:
    """On a file system of a few pages, in a mount namespace of this test's own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    script = f"""
set -e
mount -t tmpfs -o size={kibibytes}k tmpfs {tmp_path}
mkdir {tmp_path}/out
echo earlier > {tmp_path}/out/record.json
set +e
{sys.executable} -m midstream.cli run coin --out {tmp_path}/out
echo $? "$(cat {tmp_path}/out/record.json)" $(ls -A {tmp_path}/out)
"""
    command = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(command, env=house.environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["1", "earlier", "record.json"]
    assert done.stderr.endswith(f"midstream: The disk that holds {tmp_path}/out is full; earlier results stand.\n")


def kernels(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if any("ipykernel" in word for word in child.cmdline())]


def wait_for(condition: Any, seconds: float = 60) -> Any:
    """What a condition gives once it is true; polled."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def test_kill_minus_9_leaves_no_process_and_the_next_run_cleans_up(house: House) -> None:
    out = house.root / "runs/killed"
    command = ("run", "coin", "--out", str(out), "-p", "seed=7")
    process = house.start(*command, "-p", "fault=sleep60")
    family = psutil.Process(process.pid)
    wait_for(lambda: kernels(family))
    started = [*family.children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert len(list(out.glob(".run-*"))) == 1
    assert house.midstream(*command).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["coin.ipynb", "record.json"]


@pytest.mark.slow
def test_two_runs_of_one_record_at_once_wait_for_each_other_and_compute_once(house: House) -> None:
    command = ("run", "coin", "-p", "seed=8", "-p", "fault=sleep3")
    first, second = house.start(*command), house.start(*command)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(out.split()[0] for out, _ in outputs) == ["Computed", "Recorded"]
    assert sum("Another run is writing to" in error for _, error in outputs) == 1
    record = next(path for path in house.root.glob("runs/coin/*/record.json"))
    assert records.load(record).parameters["seed"] == 8
