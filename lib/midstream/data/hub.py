"""Data sets of the Hugging Face Hub, read from the Parquet files that the Hub itself makes of them; no code is run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from midstream.assets import Card
from midstream.data.dataset import Source
from midstream.errors import AssetError
from midstream.hub import fetch_snapshot

BRANCH = "refs/convert/parquet"
"""Where the Hub keeps its own conversion: `<configuration>/<split>/0000.parquet`, and so on."""


@dataclass(frozen=True)
class HubData:
    """Which columns and splits of a Hub data set make ours."""

    repository: str
    text: str = "text"
    label: str = "label"
    test: str = "test"
    """The split that has labels to test on."""


def rows(data: HubData) -> pd.DataFrame:
    """All rows of the training and the test split, in the data set's own order."""
    folder = _snapshot(data)
    splits = {"train": _files(folder, "train"), "test": _files(folder, data.test)}
    if not all(splits.values()):
        raise AssetError(f"The Hub's data set {data.repository} has no Parquet files for train and {data.test}.")
    tables = []
    for split, paths in splits.items():
        table = pd.concat([pd.read_parquet(path, columns=[data.text, data.label]) for path in paths])
        table = table.rename(columns={data.text: "text", data.label: "label"}).assign(split=split)
        tables.append(table.assign(text=table["text"].str.strip(), label=table["label"].astype(int)))
    return pd.concat(tables, ignore_index=True)


def revision(data: HubData) -> str:
    """The commit in the cache, or `hub:<id>@<branch>` where there is none."""
    cached = _cached(data)
    return cached.name if cached else f"hub:{data.repository}@{BRANCH}"


def _files(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*.parquet") if path.parent.name == split)


def _cached(data: HubData) -> Path | None:
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(data.repository, repo_type="dataset", revision=BRANCH, local_files_only=True)
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None
    folder = Path(found)
    return folder if _files(folder, "train") and _files(folder, data.test) else None


def _snapshot(data: HubData) -> Path:
    return _cached(data) or fetch_snapshot(
        data.repository,
        BRANCH,
        kind="dataset",
        wanted=["*/train/*.parquet", f"*/{data.test}/*.parquet"],
        instead="the packaged data sets `movies` or `sources`",
    )


DATA = {
    "sst2": HubData("stanfordnlp/sst2", text="sentence", test="validation"),
    "trec": HubData("CogComp/trec", label="coarse_label"),
    "ag_news": HubData("fancyzhx/ag_news"),
    "emo": HubData("SemEvalWorkshop/emo"),
}


def _source(name: str, labels: tuple[str, ...], title: str, what: str, note: str = "") -> Source:
    page = f"https://huggingface.co/datasets/{DATA[name].repository}"
    return Source(
        card=Card(title, what, page, f"not stated; see {page}", "from the Hub", "", note),
        rows=functools.partial(rows, DATA[name]),
        labels=functools.partial(tuple, labels),
        revision=functools.partial(revision, DATA[name]),
    )


HUB: dict[str, Source] = {
    "sst2": _source(
        "sst2",
        ("negative", "positive"),
        "SST-2",
        "67,349 phrases and sentences of movie reviews and 872 sentences to test on.",
        "The test split is the original's validation split: its own test split has no labels.",
    ),
    "trec": _source(
        "trec",
        ("abbreviation", "entity", "description", "human", "location", "number"),
        "TREC questions",
        "5,452 questions and 500 to test on, by what kind of thing they ask for.",
    ),
    "ag_news": _source(
        "ag_news",
        ("world", "sports", "business", "sci/tech"),
        "AG News",
        "120,000 news summaries and 7,600 to test on, by topic.",
    ),
    "emo": _source(
        "emo",
        ("others", "happy", "sad", "angry"),
        "EmoContext",
        "30,160 dialogues of three turns and 5,509 to test on, by the emotion of the last turn.",
    ),
}
