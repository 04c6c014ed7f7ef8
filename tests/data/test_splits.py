"""How rows are split: by their own text alone, no sentence on both sides, balanced where it says so."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from midstream import data
from midstream.data import dataset
from midstream.errors import RequestError

TABLE = pd.DataFrame({"text": [f"sentence number {i}" for i in range(500)], "label": [i % 3 for i in range(500)]})


def test_no_text_is_on_both_sides_and_about_a_fifth_is_for_testing() -> None:
    split = dataset.split_by_text(TABLE)
    sides = split.groupby("split")["text"].agg(set)
    assert sides["train"].isdisjoint(sides["test"])
    assert len(split) == 500
    assert 0.15 < len(sides["test"]) / 500 < 0.25


def test_the_order_of_the_input_does_not_matter() -> None:
    shuffled = TABLE.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(dataset.split_by_text(shuffled), dataset.split_by_text(TABLE))


def test_a_row_keeps_its_side_when_other_rows_come_or_go() -> None:
    part = dataset.split_by_text(TABLE[:100]).set_index("text")["split"]
    whole = dataset.split_by_text(TABLE).set_index("text")["split"]
    assert (whole[part.index] == part).all()


def test_texts_that_differ_in_case_spacing_or_punctuation_count_as_one() -> None:
    table = pd.DataFrame({"text": ["A fine film.", "a  fine film", "A fine, film!", "Another film."], "label": 0})
    assert len(dataset.split_by_text(table)) == 2


def test_every_label_is_as_frequent_as_the_rarest_within_each_split() -> None:
    table = TABLE.assign(label=(TABLE.index % 10 == 0).astype(int))
    even = dataset.balanced(dataset.split_by_text(table))
    counts = even.groupby(["split", "label"]).size().unstack()
    assert (counts[0] == counts[1]).all()
    assert counts.loc["train", 0] == (dataset.split_by_text(table).query("split == 'train'")["label"] == 1).sum()


def test_the_first_rows_are_a_fair_sample_of_the_labels() -> None:
    first = dataset.balanced(dataset.split_by_text(TABLE)).query("split == 'train'").head(90)
    assert first["label"].value_counts().between(15, 45).all()


def test_a_kept_table_comes_back_as_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path))
    table = pd.DataFrame(
        {
            "text": ["plain", 'a "quoted" one, with comma', "two\nlines", "NA", "null", "", "naïve 你好"],
            "label": range(7),
            "rating": [0.5, -1.25, 3.0, 0.0, 1.0, 2.0, -4.0],
        }
    )
    make = Mock(return_value=table)
    for _ in range(2):
        found = dataset.kept("toy", make, "revision 1")
        pd.testing.assert_frame_equal(found, table)
    assert make.call_count == 1
    dataset.kept("toy", make, "revision 2")
    assert make.call_count == 2


def test_a_kept_table_is_made_anew_when_the_code_that_makes_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path))
    dataset.kept("toy", lambda: TABLE, "revision 1")
    monkeypatch.setattr(dataset, "with_code", lambda revision, make: f"{revision}+changed")
    dataset.kept("toy", lambda: TABLE[:3], "revision 1")
    assert len(list(tmp_path.glob("data/toy-*.csv"))) == 2


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="did you mean 'movies'"):
        data.load("movie")
    with pytest.raises(RequestError, match="known are movies, sources"):
        data.revision("xyzzy")


def test_an_unknown_split_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match="'train' or 'test', not 'dev'"):
        data.load("digits", "dev")  # type: ignore[arg-type]


def test_every_card_says_all_that_a_reader_needs() -> None:
    assert set(data.cards()) == set(data.NAMES)
    for name, card in data.cards().items():
        for value in (card.title, card.what, card.source, card.licence, card.size):
            assert value.strip(), name
