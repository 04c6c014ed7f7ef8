"""The program that executes one notebook with papermill and says how it ended.

Called with a job file (JSON: notebook, output, parameters, outcome). Progress goes to standard output, one JSON line
a cell; the end goes to the outcome file. Papermill's own account of which cells completed is not trusted: after
a kernel's death it calls all of them completed.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

ATTEMPTS = 3
"""How often a kernel that never came up is started: kernels started at once race for ports."""


class Reporting(NBClientEngine):
    """Papermill's engine, telling which cell it is in."""

    started = 0

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        """Execute, with a line of progress before each cell."""
        start, total = nb_man.cell_start, len(nb_man.nb.cells)

        def report(cell: Any, cell_index: int = 0, **more: Any) -> None:
            cls.started = cell_index + 1
            print(json.dumps({"cell": cell_index + 1, "of": total}), flush=True)
            start(cell, cell_index, **more)

        nb_man.cell_start = report
        super().execute_managed_notebook(nb_man, kernel_name, **options)


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Execute a job's notebook; how it ended, as plain data with a `kind`."""
    papermill_engines.register("midstream", Reporting)
    for attempt in range(1, ATTEMPTS + 1):
        Reporting.started = 0
        try:
            _papermill(job)
        except PapermillExecutionError as error:
            return {"kind": "cell", "cell": error.cell_index + 1, "error": error.ename, "message": error.evalue}
        except (DeadKernelError, RuntimeError) as error:
            if Reporting.started or attempt == ATTEMPTS:
                return {"kind": "kernel", "cell": Reporting.started, "message": str(error)}
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return {"kind": "disk", "message": str(error)}
            raise
        else:
            return {"kind": "done"}
    raise AssertionError("unreachable")


def _papermill(job: dict[str, Any]) -> None:
    papermill.execute_notebook(
        _literal(job["notebook"]),
        _literal(job["output"]),
        parameters=job["parameters"],
        engine_name="midstream",
        progress_bar=False,
    )


def _literal(path: str) -> str:
    """A path that papermill's `str.format` gives back as it is."""
    return path.replace("{", "{{").replace("}", "}}")


def main() -> None:
    """Execute the job named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    outcome = execute(job)
    Path(job["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")
    sys.exit(0 if outcome["kind"] == "done" else 1)


if __name__ == "__main__":
    main()
