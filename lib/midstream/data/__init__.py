"""Data sets behind one `load(name)`: packaged ones that work offline once fetched, and some from the Hub."""

from __future__ import annotations

import csv
import difflib
import hashlib
import inspect
from pathlib import Path
from typing import Literal

import pandas as pd

from midstream.assets import Card, build, home
from midstream.data import dataset, rated_sentences
from midstream.data.dataset import Dataset, Source
from midstream.errors import RequestError

__all__ = ["NAMES", "Card", "Dataset", "cards", "load", "revision"]

_SOURCES: dict[str, Source] = {
    "movies": rated_sentences.MOVIES,
    "sources": rated_sentences.SOURCES,
}
NAMES = tuple(_SOURCES)


def load(name: str, split: Literal["train", "test"] = "train") -> Dataset:
    """One split of a data set, the same rows in the same order on every machine.

    Raises `RequestError` for an unknown name or split and `AssetError` where the data cannot be had.
    """
    source = _source(name)
    if split not in ("train", "test"):
        raise RequestError(f"A split is 'train' or 'test', not {split!r}.")
    rows = _cached_rows(name, source)
    table = rows[rows["split"] == split].drop(columns="split").reset_index(drop=True)
    return Dataset(name, table, source.labels(), source.card, source.revision())


def revision(name: str) -> str:
    """What identifies the data that `load` gives, without loading it."""
    return _source(name).revision()


def cards() -> dict[str, Card]:
    """The card of every data set that has a name here."""
    return {name: source.card for name, source in _SOURCES.items()}


def _source(name: str) -> Source:
    if name in _SOURCES:
        return _SOURCES[name]
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]!r}" if near else f"known are {', '.join(NAMES)}"
    raise RequestError(f"There is no data set {name!r}; {hint}.")


def _cached_rows(name: str, source: Source) -> pd.DataFrame:
    """The source's rows, kept as a CSV file that is made anew when the data or the code that makes it changes."""
    code = inspect.getsource(dataset) + inspect.getsource(inspect.getmodule(source.rows) or dataset)
    recipe = hashlib.sha256(f"{source.revision()}\n{code}".encode()).hexdigest()[:12]

    def write(path: Path) -> None:
        source.rows().to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)

    path = build(home() / "data" / f"{name}-{recipe}.csv", write)
    return pd.read_csv(path, keep_default_na=False, na_filter=False)
