"""Facts of the generated pages: arenas, the shapes world, the miniatures."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from midstream import places, records, training
from midstream.arena import PROJECTORS
from midstream.book import arenas, checks, miniatures, pages, shapes_world
from midstream.data import shapes
from midstream.errors import MidstreamError
from midstream.papers import papers
from midstream.zoo.organisms import Data, Measured, OrganismCard, Point, Stage

PAPER = papers()["label_words"]


# ---------------------------------------------------------------- parts


def test_a_part_counts_the_verdicts_of_its_chapters():
    claims = [SimpleNamespace(direction=word) for word in ("holds", "fails", "holds")]
    record = SimpleNamespace(claims=claims, preset="full", date="2026-11-21T10:00:00+00:00")
    text = pages.verdicts(PAPER.part, {PAPER.id: record})
    assert ">2 hold<" in text
    assert ">1 fails<" in text
    assert "unclear" not in text
    assert f'href="../chapters/{PAPER.part}/{PAPER.id}.html#' in text


def test_a_part_without_chapters_and_a_chapter_without_a_record_say_so():
    assert pages.verdicts("signals", {PAPER.id: None}) == "No chapter yet."
    assert "no current record" in pages.verdicts(PAPER.part, {PAPER.id: None})


# ---------------------------------------------------------------- arenas


def rows(result):
    rng = np.random.default_rng(0)
    cells = [
        {"method": method, "setting": "one world", "seed": seed, "tokens": tokens, "accuracy": 50 + rng.normal()}
        for method, tokens in (("pool <4>", 4), ("pool <4>", 16), ("resampler", 16))
        for seed in range(3)
    ]
    return pd.DataFrame(cells).assign(inference_ms=[5.0] * 6 + [float("nan")] * 3)


@pytest.fixture
def recorded(monkeypatch):
    """A paper that has entered the arena, with a current record."""
    module = SimpleNamespace(ARENA={"projectors": rows}, PRESETS={"full": SimpleNamespace(params=None)})
    monkeypatch.setattr(type(PAPER), "module", lambda self: module)
    record = records.find(PAPER, "full") or SimpleNamespace(preset="full", result=None)
    monkeypatch.setattr(records, "strongest", lambda paper: record)
    monkeypatch.setattr(records, "find", lambda paper, preset: record)
    monkeypatch.setattr(arenas, "papers", lambda: {"label_words": PAPER})
    return SimpleNamespace(module=module, record=record)


def test_an_arena_without_entries_says_so(monkeypatch):
    monkeypatch.setattr(arenas, "papers", dict)
    assert arenas.page(PROJECTORS) == "No chapter has entered this arena yet."


def test_a_row_of_the_table_is_a_method_at_one_size_with_intervals(recorded):
    text = arenas.page(PROJECTORS)
    assert text.count("<tr>") == 1 + 3
    assert text.count("pool &lt;4&gt;") >= 2
    assert re.search(r"<b>\d\d\.\d</b> <small>\d\d\.\d to \d\d\.\d</small>", text)
    assert "not measured" in text
    assert "Training (s/step)" not in text, "a column that nobody measured is left out"


def test_a_page_says_which_record_its_rows_come_from(recorded):
    assert "`results/flow/label_words/full.json`" in arenas.page(PROJECTORS)
    assert "stale" not in arenas.page(PROJECTORS).lower()


def test_a_stale_record_is_shown_as_stale(recorded, monkeypatch):
    monkeypatch.setattr(records, "strongest", lambda paper: None)
    monkeypatch.setattr(records, "staleness", lambda *arguments: "changed code: x")
    text = arenas.page(PROJECTORS)
    assert text.count("verdict-stale") == 3
    assert "**Stale**: changed code: x" in text


def test_a_record_without_what_the_rows_need_is_told_if_stale_and_stops_the_book_if_current(recorded, monkeypatch):
    recorded.module.ARENA = {"projectors": lambda result: pd.DataFrame({"method": ["a"]})}
    with pytest.raises(MidstreamError, match="needs the column setting"):
        arenas.page(PROJECTORS)
    monkeypatch.setattr(records, "strongest", lambda paper: None)
    monkeypatch.setattr(records, "staleness", lambda *arguments: "changed code: x")
    assert "has to be run again" in arenas.page(PROJECTORS)


def test_a_paper_without_a_record_is_named(recorded, monkeypatch):
    monkeypatch.setattr(records, "strongest", lambda paper: None)
    monkeypatch.setattr(records, "find", lambda paper, preset: None)
    assert "no record yet" in arenas.page(PROJECTORS)


def test_the_figure_has_alt_text_that_ranks_the_methods(recorded):
    text = arenas.page(PROJECTORS)
    assert checks.images_without_alt(text) == []
    assert re.search(r'alt="Questions right \(%\) against visual tokens. At 4 visual tokens: pool', text)


# ---------------------------------------------------------------- the shapes world


@pytest.mark.parametrize("name", [name for name in shapes_world.FRAGMENTS if name != "speed"])
def test_a_piece_of_the_shapes_page_is_the_same_each_time_and_its_pictures_have_alt_text(name):
    text = shapes_world.FRAGMENTS[name]()
    assert text == shapes_world.FRAGMENTS[name]()
    assert text.count("<img") > 0
    assert checks.images_without_alt(text) == []


def test_the_page_includes_every_piece_and_its_code_runs(capsys):
    text = (places.root() / "book" / "shapes-world.md").read_text(encoding="utf-8")
    assert set(re.findall(r"_generated/shapes-(\w+)\.md", text)) == set(shapes_world.FRAGMENTS)
    namespace: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, namespace)
    assert "count: " in capsys.readouterr().out


def test_every_wording_type_kind_and_held_out_pair_is_shown():
    assert shapes_world.captions().count("<li>") == len(shapes.WORDINGS)
    assert all(f"<td>{kind}</td>" in shapes_world.questions() for kind in shapes.TYPES)
    assert all(f"<b>{kind}</b>" in shapes_world.videos() for kind in shapes.KINDS)
    assert all(f"{colour} {shape}" in shapes_world.splits() for colour, shape in shapes.held_out_pairs())


def test_rates_are_measured():
    rates = re.findall(r"<td>([\d,]+)</td>", shapes_world.speed())
    assert len(rates) == 8
    assert all(int(rate.replace(",", "")) > 10 for rate in rates)


# ---------------------------------------------------------------- miniatures


@pytest.fixture
def card():
    return OrganismCard(
        name="counter", title="Counter", what="It counts.", architecture={"class": "Llama", "num_hidden_layers": 1},
        parameters=1_200_000, data=Data(name="numbers", seed=0), recipe="toys", code="today",
        schedule=(Stage(name="count", steps=40, batch=2, learning_rate=0.01),), seconds=61.0, device="a laptop",
        versions={}, curve=tuple(Point(stage="count", step=step, loss=8 / step) for step in (10, 20, 40)),
        measured={"next number": Measured(value=87.3, split="test", n=1200)}, sha256="0" * 64, note="Not <far>.",
    )  # fmt: skip


def test_the_overview_of_a_miniature_has_its_figures_and_its_curve(card, tmp_path, monkeypatch):
    monkeypatch.setattr(miniatures.organisms, "WEIGHTS", tmp_path)
    (tmp_path / "counter").mkdir()
    (tmp_path / "counter" / "model.safetensors").write_bytes(b"0" * 2_400_000)
    row = "".join(miniatures.overview_row("counter", card))
    assert "1.2 million weights, 2.4 MB" in row
    assert "next number <b>87.3%</b> <small>test, n = 1,200</small>" in row
    assert 'aria-label="Loss of counter over 40 steps, from 0.8 to 0.2"' in row
    assert "40 steps in 61 s" in row


def test_the_card_of_a_miniature_says_whether_its_recipe_has_changed(card, monkeypatch):
    monkeypatch.setattr(training, "code", lambda module: "today")
    facts = dict(miniatures.facts("counter", card))
    assert "current" in facts["Train again"]
    assert facts["Architecture"] == "Llama; 1 block"
    assert facts["Note"] == "Not &lt;far&gt;."
    old = card.model_copy(update={"code": "yesterday"})
    assert "weights from an older recipe" in dict(miniatures.facts("counter", old))["Train again"]


def test_a_loss_curve_falls_from_left_to_right_and_marks_where_a_stage_begins(card):
    heights = [y for _, y in miniatures._places(card.curve)]
    assert heights == sorted(heights)
    second = card.curve[-1].model_copy(update={"stage": "later"})
    assert 'class="cut"' not in miniatures.sparkline("counter", card.curve)
    assert miniatures.sparkline("counter", (*card.curve[:-1], second)).count('class="cut"') == 1
