"""What a data set is here, and how its rows are split: the same way on every machine, no sentence on both sides."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from midstream.assets import Card, build, home
from midstream.fingerprint import with_code

TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set: a table whose `label` column holds indices into `labels`."""

    name: str
    table: pd.DataFrame
    """One example a row: `text` (but of images) and `label`, and what else the source knows of it."""
    labels: tuple[str, ...]
    card: Card
    revision: str
    images: np.ndarray | None = None
    """(examples, height, width) in 0 … 1, in the order of the table; None of texts."""

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True)
class Source:
    """How a named data set is made: its card, its labels, and its rows with a `split` column."""

    card: Card
    rows: Callable[[], pd.DataFrame]
    """All rows, with the columns of `Dataset.table`, `split` ("train" or "test") and, of images, `image`."""
    labels: Callable[[], tuple[str, ...]]
    revision: Callable[[], str]
    """What identifies the origin alone; `data.revision` adds the code of `rows` and `labels`."""


def fingerprint(text: str) -> str:
    """A hash that two texts share when they differ only in case, spacing or punctuation."""
    bare = re.sub(r"[\W_]+", " ", text.casefold()).strip()
    return hashlib.sha256(bare.encode()).hexdigest()


def split_by_text(table: pd.DataFrame) -> pd.DataFrame:
    """Drop repeated texts, order rows by the hash of their text, and name each row's split.

    The order is as good as random but the same everywhere, so the first n rows are a fair sample. About one
    row in five is a test row; which ones depends on their own text alone.
    """
    return split_by(table, table["text"].map(fingerprint))


def split_by(table: pd.DataFrame, prints: pd.Series[str]) -> pd.DataFrame:
    """The same by any hexadecimal digest of each row."""
    table = table.assign(_print=prints).drop_duplicates("_print").sort_values("_print", ignore_index=True)
    position = table["_print"].map(lambda digest: int(digest[-8:], 16) / 16**8)
    is_test = position < TEST_SHARE
    return table.drop(columns="_print").assign(split=is_test.map({True: "test", False: "train"}))


def balanced(table: pd.DataFrame) -> pd.DataFrame:
    """Keep as many rows of every label as the rarest label has, within each split, the first ones in order."""
    rank = table.groupby(["split", "label"]).cumcount()
    rarest = table.groupby(["split", "label"]).size().groupby("split").min()
    return table[rank < table["split"].map(rarest)].reset_index(drop=True)


def kept(name: str, make: Callable[[], pd.DataFrame], revision: str) -> pd.DataFrame:
    """What `make` gives, from a CSV file in the cache that is made anew when the data or the code behind it changes."""
    recipe = hashlib.sha256(with_code(revision, make).encode()).hexdigest()[:12]

    def write(path: Path) -> None:
        make().to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)

    path = build(home() / "data" / f"{name}-{recipe}.csv", write)
    return pd.read_csv(path, keep_default_na=False, na_filter=False)
