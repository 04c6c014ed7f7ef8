"""Where things stand: the checkout, its notebooks, its recorded results, and the folder for runs."""

from __future__ import annotations

import os
from pathlib import Path

from midstream.errors import RequestError

PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The checkout: `MIDSTREAM_ROOT` where it is set, else the folder that holds this package's `lib/`."""
    named = os.environ.get("MIDSTREAM_ROOT")
    folder = Path(named).expanduser().resolve() if named else PACKAGE.parents[1]
    if not (folder / "notebooks").is_dir():
        raise RequestError(
            f"There is no Midstream checkout at {folder} (it has no notebooks/); "
            "install with `pip install -e .` from a checkout, or set MIDSTREAM_ROOT to one."
        )
    return folder


def notebook(part: str, id: str) -> Path:
    """The source notebook of a chapter."""
    return root() / "notebooks" / part / f"{id}.ipynb"


def results(part: str, id: str) -> Path:
    """The folder of a paper's recorded results; kept in git."""
    return root() / "results" / part / id


def runs() -> Path:
    """The folder of runs that were not kept; ignored by git."""
    return root() / "runs"
