"""Sentences that people rated for sentiment: movie reviews, product reviews, editorials and tweets.

Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014: each
sentence has the mean of about 20 ratings on a scale from -4 (extremely negative) to 4 (extremely positive).
"""

from __future__ import annotations

import html
import io
import re
import tarfile
from functools import partial

import pandas as pd

from midstream.assets import Card, Package, fetch, size_in_words
from midstream.data.dataset import Source, balanced, kept, split_by_text

ARCHIVE = Package(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
)
FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "editorial": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}
MARGIN = 1.0
"""A movie sentence counts as negative or positive when its mean rating is at least this far from 0."""
MIN_WORDS = 3
"""Shorter texts ("!", "wow.") say too little of where they are from."""

_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def clean(text: str) -> str:
    """One line of plain text: entities resolved, quotes and spacing made ordinary."""
    text = html.unescape(html.unescape(text))  # some were escaped twice
    text = text.replace("''", '"').replace("``", '"').replace("`", "'").replace("’", "'")
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([,.!?]+)(?= |$)", r"\1", text)  # "enjoy !"
    if text.count('"') == 1:  # the other half of a quotation is in the next sentence
        text = text.removeprefix('"').removesuffix('"').strip()
    return text


def read(kind: str) -> pd.DataFrame:
    """All sentences of one kind, cleaned: columns `id`, `rating` (-4 to 4) and `text`."""
    with tarfile.open(fetch(ARCHIVE)) as outer, tarfile.open(fileobj=outer.extractfile(_INNER)) as inner:
        member = inner.extractfile(f"hutto_ICWSM_2014/{FILES[kind]}")
        assert member is not None  # the archive's hash is pinned
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    table = pd.DataFrame([line.split("\t") for line in lines if line], columns=["id", "rating", "text"])
    table = table.assign(rating=table["rating"].astype(float).round(4), text=table["text"].map(clean))
    words = table["text"].str.count(r"\S+")
    return table[words >= MIN_WORDS]


def movies() -> pd.DataFrame:
    """Movie-review sentences with a clear sentiment, 0 negative and 1 positive, balanced in each split."""
    table = split_by_text(read("movie"))
    clear = table[table["rating"].abs() >= MARGIN]
    return balanced(clear.assign(label=(clear["rating"] > 0).astype(int)))


def sources() -> pd.DataFrame:
    """Sentences of four sources, labelled by the source they are from, balanced in each split."""
    kinds = [read(kind).assign(label=label) for label, kind in enumerate(FILES)]
    return balanced(split_by_text(pd.concat(kinds, ignore_index=True)))


_ORIGIN = (
    "additional_resources/hutto_ICWSM_2014.tar.gz in the source archive of the PyPI package vaderSentiment 3.3.2 "
    "(Hutto & Gilbert, ICWSM 2014)"
)
_LICENCE = "MIT (the archive); the sentences are short quotations of their authors"
_SIZE = f"{size_in_words(ARCHIVE.size)} to fetch"

MOVIES = Source(
    card=Card(
        title="Movie-review sentences with a sentiment",
        what=(
            "9,046 English sentences (7,240 train, 1,806 test), half of them negative and half positive by the mean of "
            "about 20 human ratings from -4 to 4; the 1,425 sentences with a mean within 1 of 0 are left out."
        ),
        source=_ORIGIN + "; the sentences are Rotten Tomatoes snippets, the source SST was cut from",
        licence=_LICENCE,
        size=_SIZE,
        sha256=ARCHIVE.sha256,
        note="Raters saw a sentence alone, so its rating is not the verdict of the review it comes from.",
    ),
    rows=partial(kept, "movies", movies, ARCHIVE.sha256),
    labels=partial(tuple, ("negative", "positive")),
    revision=lambda: ARCHIVE.sha256,
)
SOURCES = Source(
    card=Card(
        title="Which source is a sentence from?",
        what=(
            "14,336 English sentences (11,560 train, 2,776 test), a quarter each from movie reviews, product reviews, "
            "New York Times editorials and tweets."
        ),
        source=_ORIGIN,
        licence=_LICENCE,
        size=_SIZE,
        sha256=ARCHIVE.sha256,
        note=(
            "Style gives much away: product reviews are in lower case, tweets have `@anonymous` for every user name. "
            "It asks where a sentence is from, not only what it is about."
        ),
    ),
    rows=partial(kept, "sources", sources, ARCHIVE.sha256),
    labels=partial(tuple, FILES),
    revision=lambda: ARCHIVE.sha256,
)
