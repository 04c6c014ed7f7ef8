"""Data sets behind one `load(name)`: packaged ones that work offline once fetched, and some from the Hub."""

from __future__ import annotations

import difflib
from typing import Literal

import numpy as np

from midstream.assets import Card, by_revision
from midstream.data import corpora, countries, films, hub, rated_sentences
from midstream.data.dataset import Dataset, Source
from midstream.errors import RequestError
from midstream.fingerprint import with_code

__all__ = ["NAMES", "Card", "Dataset", "cards", "load", "revision"]

_SOURCES: dict[str, Source] = {
    "movies": rated_sentences.MOVIES,
    "sources": rated_sentences.SOURCES,
    "digits": corpora.DIGITS,
    "udhr": corpora.UDHR,
    "stdlib": corpora.STDLIB,
    "cities": countries.CITIES,
    "films": films.FILMS,
    **hub.HUB,
}
NAMES = tuple(_SOURCES)


def load(name: str, split: Literal["train", "test"] = "train") -> Dataset:
    """One split of a data set, the same rows in the same order on every machine.

    Raises `RequestError` for an unknown name or split and `AssetError` where the data cannot be had.
    """
    source = _source(name)
    if split not in ("train", "test"):
        raise RequestError(f"A split is 'train' or 'test', not {split!r}.")
    rows = source.rows()
    table = rows[rows["split"] == split].drop(columns="split").reset_index(drop=True)
    images = np.stack(table.pop("image").to_list()) if "image" in table else None
    return Dataset(name, table, source.labels(), source.card, revision(name), images)


@by_revision
def revision(name: str) -> str:
    """What identifies the data that `load` gives, without loading it: its origin and the code that makes it."""
    source = _source(name)
    return with_code(source.revision(), source.rows, source.labels)


def cards() -> dict[str, Card]:
    """The card of every data set that has a name here."""
    return {name: source.card for name, source in _SOURCES.items()}


@by_revision
def _source(name: str) -> Source:
    if name in _SOURCES:
        return _SOURCES[name]
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]!r}" if near else f"known are {', '.join(NAMES)}"
    raise RequestError(f"There is no data set {name!r}; {hint}.")
