"""Facts of arenas: what a paper's rows must be, and what is made of them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from midstream.arena import ARENAS, PROJECTORS, rows, standings
from midstream.measure import t_interval


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    cells = [
        {"method": method, "setting": "shapes", "seed": seed, "tokens": tokens, "accuracy": 50 + tokens + rng.normal()}
        for method in ("pooling", "resampler")
        for tokens in (4, 16)
        for seed in range(3)
    ]
    return pd.DataFrame(cells)


def test_a_standing_is_the_mean_over_seeds_with_its_t_interval() -> None:
    found = standings(PROJECTORS, table().assign(inference_ms=7.0))
    assert len(found) == 4
    first = found[0]
    chosen = table().query("method == @first.method and tokens == 4")["accuracy"]
    assert first.values["accuracy"] == t_interval(chosen)
    assert first.values["inference_ms"].estimate == 7
    assert first.value(PROJECTORS.columns[0]).estimate == 4  # type: ignore[union-attr]


def test_standings_go_from_few_tokens_to_many_and_from_good_to_bad() -> None:
    found = standings(PROJECTORS, table().sample(frac=1, random_state=0))
    order = [(each.values["tokens"].estimate, -each.values["accuracy"].estimate) for each in found]
    assert order == sorted(order)


def test_what_was_not_measured_is_left_out() -> None:
    seconds = [0.5 if method == "pooling" else math.nan for method in table()["method"]]
    found = standings(PROJECTORS, table().assign(train_seconds=seconds))
    assert {each.method: "train_seconds" in each.values for each in found} == {"pooling": True, "resampler": False}


def test_columns_that_the_arena_does_not_know_are_dropped() -> None:
    assert "colour" not in rows(PROJECTORS, table().assign(colour="red"))


@pytest.mark.parametrize(
    ("spoilt", "sentence"),
    [
        (table().drop(columns="tokens"), "needs the column tokens"),
        (table().drop(columns="seed"), "needs the column seed"),
        (table().assign(accuracy=math.nan), "needs a number for accuracy"),
        (pd.concat([table(), table()]), "takes one row a seed"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(spoilt: pd.DataFrame, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        rows(PROJECTORS, spoilt)


def test_every_arena_is_listed_under_its_name_and_says_what_its_columns_mean() -> None:
    assert {name: arena.name for name, arena in ARENAS.items()} == {name: name for name in ARENAS}
    assert all(column.meaning and column.label for arena in ARENAS.values() for column in arena.columns)
    assert all(arena.size.required and arena.quality[0].required for arena in ARENAS.values())
