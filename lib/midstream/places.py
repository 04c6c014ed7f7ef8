"""Where things stand: the checkout, its notebooks, its recorded results, and the folder for runs."""

from __future__ import annotations

import os
from pathlib import Path

from midstream.errors import RequestError

PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The checkout: `MIDSTREAM_ROOT` where it is set, else the folder that holds this package's `lib/`.

    Where the package was installed without a checkout, as in a hosted notebook, the folder holds none of what is
    asked for below: experiments compute, and nothing is found recorded.
    """
    named = os.environ.get("MIDSTREAM_ROOT")
    return Path(named).expanduser().resolve() if named else PACKAGE.parents[1]


def is_checkout() -> bool:
    """Whether there is a checkout with its notebooks."""
    return (root() / "notebooks").is_dir()


def need_checkout() -> None:
    """Refuse what only a checkout can do."""
    if not is_checkout():
        raise RequestError(
            f"There is no Midstream checkout at {root()} (it has no notebooks/); "
            "install with `pip install -e .` from a checkout, or set MIDSTREAM_ROOT to one."
        )


def notebook(part: str, id: str) -> Path:
    """The source notebook of a chapter."""
    return root() / "notebooks" / part / f"{id}.ipynb"


def results(part: str, id: str) -> Path:
    """The folder of a paper's recorded results; kept in git."""
    return root() / "results" / part / id


def runs() -> Path:
    """The folder of runs that were not kept; ignored by git."""
    return root() / "runs"
