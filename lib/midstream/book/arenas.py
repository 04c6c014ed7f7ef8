"""The arena pages: rows that papers give, from their strongest records, as one table and one figure a setting."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from midstream import places, records
from midstream.arena import Arena, Column, Standing, standings
from midstream.book.markup import badge, plain, plot, table
from midstream.book.pages import chapter_link, run_line
from midstream.errors import MidstreamError
from midstream.measure.intervals import Interval
from midstream.papers import Paper, papers
from midstream.records import Record

MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Entry:
    """What one paper brings to an arena: rows of a record, or the reason why there are none."""

    paper: Paper
    record: Record | None = None
    stale: str = ""
    """Why the record does not count; empty where it does."""
    standings: tuple[Standing, ...] = ()
    missing: str = ""
    """Why there are no rows."""


@dataclass(frozen=True)
class Row:
    """A method as the table shows it."""

    entry: Entry
    standing: Standing


def page(arena: Arena) -> str:
    """The generated part of an arena's page."""
    entries = [entry for paper in papers().values() if paper.has_chapter for entry in enter(arena, paper)]
    rows = [Row(entry, standing) for entry in entries for standing in entry.standings]
    rows.sort(key=lambda row: row.standing.setting)
    sections = [
        section(arena, setting, list(members))
        for setting, members in groupby(rows, key=lambda row: row.standing.setting)
    ]
    absent = [f"- [{plain(entry.paper.title)}]({_top(entry)}): {entry.missing}" for entry in entries if entry.missing]
    if absent:
        sections.append("## Not shown\n\n" + "\n".join(absent))
    return "\n\n".join(sections) or "No chapter has entered this arena yet."


def enter(arena: Arena, paper: Paper) -> Iterator[Entry]:
    """The entry of a paper whose module names the arena; of others none."""
    make = getattr(paper.module(), "ARENA", {}).get(arena.name)
    if make is None:
        return
    record, stale = strongest(paper)
    if record is None:
        yield Entry(paper, missing=f"no record yet; `midstream run {paper.id} --record` makes one.")
        return
    try:
        yield Entry(paper, record, stale, tuple(standings(arena, make(record.result))))
    except (KeyError, ValueError) as error:
        if not stale:
            raise MidstreamError(f"The rows of {paper.id} for the arena {arena.name} are wrong: {error}") from error
        yield Entry(paper, record, stale, missing="its record is older than its rows here; it has to be run again.")


def strongest(paper: Paper) -> tuple[Record | None, str]:
    """The strongest current record, else the strongest one that is stale, with the reason why it is."""
    if current := records.strongest(paper):
        return current, ""
    for preset in records.presets_by_strength(paper):
        if record := records.find(paper, preset):
            return record, records.staleness(record, paper, paper.module().PRESETS[preset].params)
    return None, ""


def section(arena: Arena, setting: str, rows: Sequence[Row]) -> str:
    """Figure, table and sources of the rows that can be compared with one another."""
    size, best = arena.size.name, arena.quality[0].name
    ordered = sorted(rows, key=lambda row: (_estimate(row, size), -_estimate(row, best)))
    shown = [column for column in arena.columns if any(column.name in row.standing.values for row in rows)]
    heads = ("Method", *(f"{column.label}{f' ({column.unit})' if column.unit else ''}" for column in shown), "Chapter")
    cells = [
        [_method(row), *(cell(row.standing.value(column), column) for column in shown), _chapter(row)]
        for row in ordered
    ]
    parts = [f"## {plain(setting)}", draw(arena, ordered), table(heads, cells, "stacked arena"), *sources(rows)]
    return "\n\n".join(parts)


def cell(interval: Interval | None, column: Column) -> str:
    """An estimate with its interval, where it has one and is no constant."""
    if interval is None:
        return '<span class="muted">not measured</span>'
    form, ends = (".1f", ".1f") if column.unit == "%" else (".3g", ".2g")
    if not math.isfinite(interval.low) or math.isclose(interval.low, interval.high):
        return f"<b>{interval.estimate:{form}}</b>"
    return f"<b>{interval.estimate:{form}}</b> <small>{interval.low:{ends}} to {interval.high:{ends}}</small>"


def _method(row: Row) -> str:
    return html.escape(row.standing.method) + (f" {badge('stale')}" if row.entry.stale else "")


def _chapter(row: Row) -> str:
    return f'<a href="../{chapter_link(row.entry.paper)}">{html.escape(row.entry.paper.id)}</a>'


def _top(entry: Entry) -> str:
    return f"../chapters/{entry.paper.part}/{entry.paper.id}.ipynb"


def sources(rows: Iterable[Row]) -> Iterator[str]:
    """For each paper the record that its rows come from, and whether it still counts."""
    entries = {row.entry.paper.id: row.entry for row in rows}
    for entry in entries.values():
        assert entry.record is not None
        name = (
            places.results(entry.paper.part, entry.paper.id).relative_to(places.root()) / f"{entry.record.preset}.json"
        )
        text = f"Rows of [{plain(entry.paper.title)}]({_top(entry)}): `{name}`. {run_line(entry.record)}"
        yield f"{text} **Stale**: {plain(entry.stale)}." if entry.stale else text


# ---------------------------------------------------------------- figure


def draw(arena: Arena, rows: Sequence[Row]) -> str:
    """Quality against size, and below it each cost that was measured, methods by colour and mark."""
    import matplotlib.pyplot as plt

    from midstream.figures import use_style

    use_style()
    costs = _costs(arena, rows)
    layout: list[Any] = [
        [arena.quality[0].name] * max(1, len(costs)),
        *([[cost.name for cost in costs]] if costs else []),
    ]
    figure, axes = plt.subplot_mosaic(layout, figsize=(7.2, 6.4 if costs else 5.2), height_ratios=[5, 4][: len(layout)])
    for column in (arena.quality[0], *costs):
        _panel(axes[column.name], arena, column, rows)
    handles, labels = axes[arena.quality[0].name].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    return plot(figure, alt_text(arena, rows))


def _costs(arena: Arena, rows: Sequence[Row]) -> list[Column]:
    """The costs that were measured for some row."""
    return [column for column in arena.costs if any(column.name in row.standing.values for row in rows)]


def _panel(axis: Any, arena: Arena, column: Column, rows: Sequence[Row]) -> None:
    """One quantity against size; methods of one size stand a little apart."""
    from midstream.figures import PALETTE

    methods, colors = list(dict.fromkeys(row.standing.method for row in rows)), [*PALETTE, "#56B4E9", "#B8860B"]
    for number, method in enumerate(methods):
        look = {"color": colors[number % len(colors)], "marker": MARKERS[number % len(MARKERS)]}
        shift = 1.0 if arena.across else 2 ** (0.5 * (number - (len(methods) - 1) / 2) / max(1, len(methods) - 1))
        _series(axis, arena, column, [row for row in rows if row.standing.method == method], shift, look)
    _dress(axis, arena, column, rows)


def _series(axis: Any, arena: Arena, column: Column, rows: Sequence[Row], shift: float, look: dict[str, Any]) -> None:
    """One method in one panel: a mark with its interval at each size, joined; hollow where the record is stale."""
    measured = [(row, interval) for row in rows if (interval := row.standing.value(column))]
    if not measured:
        return
    where = [_estimate(row, _across(arena).name) * shift for row, _ in measured]
    heights = [interval.estimate for _, interval in measured]
    reach = [_reach(interval) for _, interval in measured]
    stale = any(row.entry.stale for row, _ in measured)
    label = rows[0].standing.method + (" (stale)" if stale else "")
    filled = {"markerfacecolor": "white"} if stale else {}
    axis.errorbar(where, heights, yerr=reach, ms=7, lw=1.3, capsize=3, alpha=0.9, label=label, **look, **filled)


def _reach(interval: Interval) -> float:
    """How far an interval reaches to either side; 0 where it has no end."""
    return max(0.0, interval.high - interval.estimate) if math.isfinite(interval.high) else 0.0


def _across(arena: Arena) -> Column:
    """The horizontal axis."""
    return next((column for column in arena.quality if column.name == arena.across), arena.size)


def _dress(axis: Any, arena: Arena, column: Column, rows: Sequence[Row]) -> None:
    axis.set_title(column.label)
    if arena.across:
        axis.set(xlabel=f"{_across(arena).label.lower()} (%)", ylabel=f"{column.label.lower()} ({column.unit})")
        return
    sizes = sorted({round(_estimate(row, arena.size.name), 1) for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.minorticks_off()
    axis.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axis.set(xlabel=arena.size.label.lower(), ylabel=f"{column.label.lower()} ({column.unit})")
    if column in arena.costs:
        axis.set_ylim(bottom=0)


def alt_text(arena: Arena, rows: Sequence[Row]) -> str:
    """What the figure shows, in words: the methods from best to worst at each size."""
    best, by_size = arena.quality[0], sorted(rows, key=lambda row: _estimate(row, arena.size.name))
    sentences = []
    for size, members in groupby(by_size, key=lambda row: _estimate(row, arena.size.name)):
        ranked = sorted(members, key=lambda row: -_estimate(row, best.name))
        words = ", ".join(f"{row.standing.method} {_estimate(row, best.name):.3g}{best.unit}" for row in ranked)
        sentences.append(f"At {size:g} {arena.size.label.lower()}: {words}.")
    costs = [f"{column.label.lower()} ({column.unit})" for column in _costs(arena, rows)]
    below = f" Below it {' and '.join(costs)} against the same axis." if costs else ""
    return f"{best.label} ({best.unit}) against {_across(arena).label.lower()}. {' '.join(sentences)}{below}"


def _estimate(row: Row, name: str) -> float:
    return row.standing.values[name].estimate
