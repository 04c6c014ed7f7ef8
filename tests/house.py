"""A small house to test in: a copy of the package with one toy paper, its notebook, and results of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

CHECKOUT = Path(__file__).resolve().parents[1]

PAPER = '''
"""A toy paper: counts heads of a biased coin."""

import os
import signal
import time
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from midstream.claims import Claim, Comparison, Control, PaperNumber
from midstream.errors import AssetError
from midstream.measure import t_interval
from midstream.paper import PaperParams, Preset, Result


class Params(PaperParams):
    tosses: int = Field(50, ge=1, le=1000, description="tosses a seed")
    bias: float = Field(0.9, ge=0, le=1, description="probability of heads")
    metal: Literal["copper", "tin"] = Field("copper", description="what the coin is made of")
    name: str = Field("coin", description="what the coin is called")
    sides: tuple[int, ...] = Field((0, 1), description="values of the sides")
    fault: str = Field("none", description="what goes wrong")

    @field_validator("sides")
    @classmethod
    def two_or_more(cls, sides):
        if len(sides) < 2:
            raise ValueError("a coin has two sides or more")
        return sides

    @model_validator(mode="after")
    def tin_is_fair(self):
        if self.metal == "tin" and self.bias != 0.5:
            raise ValueError("a tin coin is fair, so bias must be 0.5")
        return self


PRESETS = {
    "quick": Preset(Params(), "a try", 0.1, 1),
    "full": Preset(Params(n_seeds=8), "settles it", 0.1, 1),
    "paper": Preset(Params(n_seeds=9), "the paper's own", 1, 8, needs="a GPU with 24 GiB", gpus=1),
}


def revisions(params):
    return {"coin": "hub:coin@main" if params.name == "hub" else f"coin@{params.name}"}


def experiment(params):
    go_wrong(params.fault)
    seeds = list(params.seeds)
    heads = [float((np.random.default_rng(s).random(params.tosses) < params.bias).mean()) for s in seeds]
    table = pd.DataFrame({"seed": seeds, "heads": heads, "seconds": [time.perf_counter()] * len(seeds)})
    return Result({"coins": table}, {"heads": float(np.mean(heads))})


def go_wrong(fault):
    if fault == "error":
        raise ValueError("the coin rolled under the table")
    if fault == "asset":
        raise AssetError("The coin 'x' is not here and cannot be fetched.")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "disk":
        with open("/dev/full", "w") as full:
            full.write("x" * 100_000)
    if fault == "memory":
        hoard = np.ones(100_000_000)  # 0.8 GB
        time.sleep(60)
    if fault == "exit":
        raise SystemExit(0)
    if fault.startswith("sleep"):
        time.sleep(float(fault[5:]))


TOLERANCES = {"coins.seconds": (float("inf"), 0.0)}

def heads_of(result):
    return t_interval(result.tables["coins"]["heads"])


CLAIMS = [
    Claim(
        "heads",
        "Heads are more common than tails.",
        (PaperNumber("heads", 0.9, "a silver coin", "Table 1", 0.01, ours=heads_of),),
        lambda r: (Comparison("heads", heads_of(r), "above", 0.5),),
        Control("fair coin", lambda r: r.with_table("coins", r.tables["coins"].assign(heads=[0.4, 0.5, 0.6]))),
    )
]
'''

PARAMETERS = """seed = 0
n_seeds = 3
tosses = 50
bias = 0.9
metal = "copper"
name = "coin"
sides = (0, 1)
fault = "none"
"""


LOOP = """
import json, sys
for line in sys.stdin:
    namespace = {"answer": None}
    exec(json.loads(line), namespace)
    print("\\n@" + json.dumps(namespace["answer"]), flush=True)
"""


@dataclass(frozen=True)
class House:
    """The folder of a small house and how to run things in it."""

    root: Path
    originals: dict[Path, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "MIDSTREAM_ROOT": str(self.root), "PYTHONPATH": str(self.root / "lib")}

    @property
    def package(self) -> Path:
        return self.root / "lib/midstream"

    @property
    def paper_file(self) -> Path:
        return self.package / "papers/toy/coin.py"

    def record(self, preset: str) -> Path:
        return self.root / "results/toy/coin" / f"{preset}.json"

    def edit(self, file: str, old: str, new: str) -> None:
        """Change one place in a file of the package."""
        path = self.package / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
        self.originals.setdefault(path, text)
        path.write_text(text.replace(old, new))

    def restore(self) -> None:
        """Undo edits; drop results and runs."""
        for path, text in self.originals.items():
            path.write_text(text)
        self.originals.clear()
        for folder in ("results", "runs"):
            shutil.rmtree(self.root / folder, ignore_errors=True)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command line in a process of its own."""
        command = [sys.executable, "-m", "midstream.cli", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True, cwd=self.root)

    def midstream(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, waited for."""
        process = self.start(*arguments)
        out, error = process.communicate(timeout=240)
        return subprocess.CompletedProcess(arguments, process.returncode, out, error)

    @contextmanager
    def python(self) -> Iterator[Python]:
        """A Python process in this house that answers questions, so that imports are paid for once."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP], env=self.environment, stdin=pipe, stdout=pipe, text=True, cwd=self.root
        )
        try:
            yield Python(process)
        finally:
            process.stdin.close()
            process.wait(timeout=60)


@dataclass(frozen=True)
class Python:
    """A Python process that executes code and gives back what the code leaves in `answer`."""

    process: subprocess.Popen[str]

    def __call__(self, code: str) -> Any:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise AssertionError("the process ended; its traceback is on standard error")


def build(root: Path) -> House:
    """Lay out a house in an empty folder."""
    package = root / "lib/midstream"
    shutil.copytree(CHECKOUT / "lib/midstream", package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.rmtree(package / "papers/flow")
    # Without the metrics that need torch, so that a kernel of the toy is up in a second.
    (package / "measure/__init__.py").write_text("from midstream.measure.intervals import t_interval\n")
    (package / "papers/toy").mkdir()
    (package / "papers/toy/__init__.py").write_text('"""Toys."""\n')
    (package / "papers/toy/coin.py").write_text(PAPER.lstrip())
    planned = {"id": "dice", "part": "toy", "title": "Dice", "arxiv": "0000.00001"}
    coin = {"id": "coin", "part": "toy", "title": "A biased coin", "arxiv": "0000.00000"}
    register = {"parts": {"toy": "Toys"}, "papers": [coin, planned]}
    (package / "papers/registry.json").write_text(json.dumps(register))
    write_notebook(root / "notebooks/toy/coin.ipynb")
    shutil.copy(CHECKOUT / "Snakefile", root)
    shutil.copytree(CHECKOUT / "profiles", root / "profiles")
    return House(root)


def write_notebook(path: Path) -> None:
    """The toy's chapter."""
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# A coin"),
        v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        v4.new_code_cell(
            'from midstream.running import open_chapter\nrun = open_chapter("coin", globals())\nrun.banner()'
        ),
        v4.new_code_cell("run.claims()"),
        v4.new_code_cell("run.cost()"),
        v4.new_code_cell("run.finish()", metadata={"tags": ["sentinel"]}),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.parent.mkdir(parents=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), path)
