"""Facts about records: what their keys cover, how they are kept, and when they count."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from house import House, Python, build

from midstream import display, records

Ask = Callable[[str], Any]

PREAMBLE = """
from midstream import records, fingerprint
from midstream.papers import paper
coin = paper("coin")
Params, PRESETS = coin.module().Params, coin.module().PRESETS
def made(preset="quick", **changes):
    from midstream.chapter import compute
    return compute(coin, PRESETS[preset].params.model_copy(update=changes))
"""


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, Python]]:
    house = build(tmp_path_factory.mktemp("house"))
    with house.python() as python:
        yield house, python


@pytest.fixture
def house(lasting: tuple[House, Python]) -> Iterator[House]:
    yield lasting[0]
    lasting[0].restore()


@pytest.fixture
def ask(lasting: tuple[House, Python]) -> Ask:
    return lambda code: lasting[1](PREAMBLE + code)


KEY = "answer = records.key(coin, Params())"


# What the key covers -------------------------------------------------------------------------------------------------


def test_one_changed_line_in_a_shared_function_makes_a_record_stale(house: House, ask: Ask) -> None:
    ask("records.save(made(), records.path(coin, 'quick'))")
    reason = "answer = records.staleness(records.find(coin, 'quick'), coin, Params())"
    assert ask(reason) == ""
    house.edit("measure/intervals.py", "half = float(stats.t.ppf", "half = 2 * float(stats.t.ppf")
    assert ask(reason) == "changed code: midstream.measure.intervals.t_interval"
    assert ask("answer = records.strongest(coin) is None")


def test_a_docstring_or_comment_or_layout_leaves_the_key_as_it_is(house: House, ask: Ask) -> None:
    before = ask(KEY)
    house.edit("measure/intervals.py", "One value has no interval: its ends", "A single value's ends")
    house.edit("papers/toy/coin.py", '    "quick": Preset(Params(), "a try", 0.1, 1),', QUICK_IN_ANOTHER_LAYOUT)
    house.edit("paper.py", '"""Plain words for a machine', '"""Words for a machine')
    assert ask(KEY) == before


QUICK_IN_ANOTHER_LAYOUT = """    # the quick one
    'quick' : Preset( Params(),
        ("a try"), 0.1, 1 ),"""


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("slots.py", "WAIT = 0.5", "WAIT = 0.25"),
        ("papers/registry.json", "A biased coin", "A coin"),
        ("__init__.py", '__version__ = "', '__version__ = "1'),
        ("papers/__init__.py", "cutoff=0.4", "cutoff=0.5"),
        ("measure/intervals.py", "z = float(stats.norm.ppf", "z = 2 * float(stats.norm.ppf"),
    ],
    ids=["an unrelated module", "the register", "the version", "the look-up of papers", "a function not referred to"],
)
def test_the_key_does_not_cover(house: House, ask: Ask, file: str, old: str, new: str) -> None:
    before = ask(KEY)
    house.edit(file, old, new)
    assert ask(KEY) == before


@pytest.mark.parametrize("change", ["tosses=51", "bias=0.8", "seed=1", "name='penny'"])
def test_the_key_covers_every_parameter_and_the_revisions(ask: Ask, change: str) -> None:
    assert ask(f"answer = records.key(coin, Params()) != records.key(coin, Params({change}))")


def test_a_hub_revision_this_machine_has_not_fetched_does_not_contradict_a_recorded_commit(ask: Ask) -> None:
    code = """
from midstream.records import key_of
def reason(name, revisions):
    record = made(name=name)
    old = {"revisions": revisions, "key": key_of(record.parameters, record.code, revisions)}
    return records.staleness(record.model_copy(update=old), coin, Params(name=name))
"""
    assert ask(code + "answer = reason('hub', {'coin': '3f2a'})") == ""
    assert ask(code + "answer = reason('penny', {'coin': '3f2a'})") == "changed revisions: coin"


def test_of_an_unfetched_asset_the_code_that_makes_it_is_still_compared() -> None:
    assert records._resolved("hub:coin@main+c0de", "3f2a+c0de") == "3f2a+c0de"
    assert records._resolved("hub:coin@main+new", "3f2a+c0de") == "3f2a+new"


# How records are kept ------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(house: House, ask: Ask) -> Path:
    ask("records.save(made(), records.path(coin, 'quick'))")
    return house.record("quick")


def test_a_record_comes_back_as_it_was_saved(ask: Ask, kept: Path) -> None:
    assert ask("r = made(); records.save(r, records.path(coin, 'quick')); answer = records.find(coin, 'quick') == r")


def test_a_record_is_json_with_one_line_a_column(kept: Path) -> None:
    lines = [line.strip() for line in kept.read_text().splitlines()]
    assert '"seed": [0, 1, 2],' in lines
    assert json.loads(kept.read_text())["tables"]["coins"]["heads"] == [0.9, 0.88, 0.96]


def test_a_record_holds_what_is_needed_to_judge_it(kept: Path) -> None:
    record = records.load(kept)
    assert record.preset == "quick"
    assert record.device
    assert record.peak_memory_gib["process"] > 0.02
    assert record.versions["python"]
    assert record.revisions == {"coin": "coin@coin"}
    assert "midstream.measure.intervals.t_interval" in record.code
    claim = record.claims[0]
    assert claim.direction == "holds"
    assert claim.comparisons[0].interval.n == 3
    assert claim.numbers[0].verdict == "not attempted: needs a GPU with 24 GiB"


def test_an_interval_without_ends_is_kept_as_such(ask: Ask) -> None:
    span = ask("answer = made(n_seeds=1).model_dump(mode='json')['claims'][0]['comparisons'][0]['interval']")
    assert (span["low"], span["high"], span["n"]) == (None, None, 1)
    assert str(records.Span(**span)).endswith("[−∞, ∞]")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "it is no JSON"),
        (lambda text: text.replace("0.88", "0.98"), "do not match its checksum"),
        (lambda text: text.replace('"device"', '"gadget"'), "device: Field required"),
        (lambda text: "[]", "valid dictionary"),
        (lambda text: "\x00\xff", "it is no JSON"),
    ],
    ids=["cut off", "a number changed", "a field missing", "another shape", "noise"],
)
def test_a_corrupted_record_is_told_as_that_and_never_counts(ask: Ask, kept: Path, damage, told: str) -> None:
    kept.write_text(damage(kept.read_text()), encoding="latin-1")
    with pytest.raises(records.CorruptRecord, match="is corrupted and does not count") as caught:
        records.load(kept)
    assert told in str(caught.value)
    assert ask("answer = records.strongest(coin) is None and records.find(coin, 'quick') is None")
    [sentence] = ask("answer = records.corrupted(coin)")
    assert sentence.startswith("The record results/toy/coin/quick.json is corrupted")


def test_a_full_disk_leaves_the_earlier_file_and_no_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    records.write_text(file, "before")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.write_text(file, "after")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_the_strongest_current_record_is_found(house: House, ask: Ask) -> None:
    ask("for name in PRESETS: records.save(made(name), records.path(coin, name))")
    strongest = "answer = records.strongest(coin).preset"
    assert ask(strongest) == "paper"
    house.record("paper").unlink()
    assert ask(strongest) == "full"
    house.record("full").write_text("{")
    assert ask(strongest) == "quick"


def test_presets_are_ordered_by_the_weight_of_their_evidence() -> None:
    names = ["quick", "paper-gptj", "smoke", "full", "paper"]
    assert sorted(names, key=records.weakness) == ["paper", "paper-gptj", "full", "quick", "smoke"]


# How records are shown -----------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#121212", "#14181e"])
def test_marks_stand_out_on_light_and_dark_pages(page: str) -> None:
    assert {
        kind: contrast(color, page) for kind, (color, _) in display.MARKS.items() if contrast(color, page) < 3
    } == {}


def test_tables_have_a_caption_and_scoped_headers_and_no_script(kept: Path) -> None:
    record = records.load(kept)
    for shown in (display.claims(record.claims, caption="Claims"), display.cost(record)):
        assert shown.html.count("<caption") == 1
        assert shown.html.count("<th ") == shown.html.count('<th scope="')
        assert "script" not in shown.html
        assert " color:" not in shown.html
    assert "holds</strong>" in display.claims(record.claims, caption="Claims").html


def test_a_stale_record_shows_no_verdict(kept: Path) -> None:
    record = records.load(kept)
    shown = display.claims(record.claims, caption="Claims", stale=True)
    assert "holds" not in shown.html
    assert "not attempted" not in shown.html
    assert "STALE" in display.banner(record, "recorded", "changed code: x").html


def test_what_is_shown_is_escaped() -> None:
    assert "<b>" not in display.table(["x"], [], caption="a <b> c")
    assert display.verdict("not attempted: needs a GPU <24 GiB>").endswith("needs a GPU &lt;24 GiB&gt;</span>")
