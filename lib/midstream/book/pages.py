"""The generated pages of the book: everything that is counted, measured or recorded, and so not typed by hand."""

from __future__ import annotations

import datetime
import html
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes

from midstream import display, places, records
from midstream.book import miniatures
from midstream.book.markup import badge, facts_table, plain, prose, raw, table, unit
from midstream.papers import Paper, papers, parts
from midstream.records import ClaimVerdict, ComparisonVerdict, NumberVerdict, Record
from midstream.zoo import organisms


def shown_records() -> dict[str, Record | None]:
    """For each paper with a chapter, the strongest current record, or None."""
    return {id: records.strongest(paper) for id, paper in papers().items() if paper.has_chapter}


# ---------------------------------------------------------------- welcome


def welcome(shown: dict[str, Record | None]) -> str:
    """The state of the book in counts, and the papers by part."""
    lines = ["## The papers", "", counts(shown), ""]
    for part, title in parts().items():
        members = [paper for paper in papers().values() if paper.part == part]
        done = sum(paper.has_chapter for paper in members)
        summary = f"{len(members)} papers, {done} with a chapter" if done else f"{len(members)} papers, planned"
        lines += [f"### [{title}](parts/{part}.md)", "", f"[{summary}]{{.muted}}", ""]
        lines += [":::{div} papers", *map(paper_item, members), ":::", ""]
    return "\n".join(lines)


def counts(shown: dict[str, Record | None]) -> str:
    """Papers, chapters, and claims by verdict, as a row of figures."""
    claims = [claim for record in shown.values() if record for claim in record.claims]
    figures = [(len(papers()), "papers"), (len(shown), "with a chapter"), (len(claims), "claims measured")]
    figures += [
        (sum(claim.direction == word for claim in claims), word) for word in ("holds", "fails", "unclear") if claims
    ]
    items = "".join(f"<li><b>{number}</b> {html.escape(word)}</li>" for number, word in figures)
    return raw(f'<ul class="counts">{items}</ul>')


def paper_item(paper: Paper) -> str:
    """One paper as a list item: its title, linked to its chapter where there is one, its state, and arXiv."""
    title = plain(paper.title)
    state = "chapter" if paper.has_chapter else "planned"
    named = f"[{title}](chapters/{paper.part}/{paper.id}.ipynb)" if paper.has_chapter else title
    return f"- {named} [{state} · [arXiv](https://arxiv.org/abs/{paper.arxiv})]{{.state .{state}}}"


def chapter_link(paper: Paper, anchor: str = "") -> str:
    """A chapter's page, relative to the book's top."""
    return f"chapters/{paper.part}/{paper.id}.html{anchor}"


# ---------------------------------------------------------------- ledger


def ledger(shown: dict[str, Record | None]) -> str:
    """One table a paper, in the order of the parts."""
    sections = []
    for part, title in parts().items():
        members = [papers()[id] for id in shown if papers()[id].part == part]
        if members:
            sections += [f"## {title}", *(ledger_section(paper, shown[paper.id]) for paper in members)]
    return "\n\n".join(sections) or "No chapter yet."


def ledger_section(paper: Paper, record: Record | None) -> str:
    """A paper's claims with both verdicts, or the plain word that none is current."""
    head = f"### [{plain(paper.title)}](chapters/{paper.part}/{paper.id}.ipynb)\n\n"
    if record is None:
        return (
            head + f"No current record: `midstream run {paper.id}` makes one. A stale record counts for nothing here."
        )
    rows = [ledger_row(paper, claim) for claim in record.claims]
    columns = ("Claim", "Paper", "Ours, 95 % interval", "Direction", "Number")
    return head + run_line(record) + "\n\n" + table(columns, rows, "ledger stacked")


def verdicts(part: str, shown: dict[str, Record | None]) -> str:
    """For a part's introduction: one row a chapter, with its claims counted by verdict."""
    rows = [verdict_row(papers()[id], record) for id, record in shown.items() if papers()[id].part == part]
    return table(("Chapter", "Its claims here", "Recorded"), rows, "stacked") if rows else "No chapter yet."


def verdict_row(paper: Paper, record: Record | None) -> list[str]:
    """A chapter, its claims counted by verdict, and what they rest on."""
    link = f'<a href="../{chapter_link(paper, claims_anchor(paper))}">{html.escape(paper.title)}</a>'
    if record is None:
        return [link, badge("none", "no current record"), ""]
    found = Counter[str](claim.direction for claim in record.claims)
    words = ((f"{found[word]} {word if found[word] == 1 else plural}", word) for word, plural in VERDICTS.items())
    badges = " ".join(badge(word, text) for text, word in words if found[word])
    return [link, badges, f"preset <code>{html.escape(record.preset or 'own')}</code>, {day(record)}"]


VERDICTS = {"holds": "hold", "unclear": "unclear", "fails": "fail"}
"""The words of a direction verdict, and each as it follows a number above one."""


def claims_anchor(paper: Paper) -> str:
    """The anchor of a chapter's section on its claims: its first second-level heading that speaks of them."""
    cells = nbformat.read(places.notebook(paper.part, paper.id), as_version=4).cells
    headings = re.findall(r"^## (.*claim.*)$", "\n".join(cell.source for cell in cells), re.IGNORECASE | re.MULTILINE)
    return f"#{nodes.make_id(headings[0])}" if headings else ""


def run_line(record: Record) -> str:
    """When a record was made, and what it took, as a sentence."""
    return f"Recorded on {day(record)}, preset `{record.preset or 'own'}`: {plain(display.cost_text(record))}."


def ledger_row(paper: Paper, claim: ClaimVerdict) -> list[str]:
    """Claim, the paper's numbers, ours, and the two verdicts, as HTML cells."""
    statement = f'{prose(claim.statement)} <a href="{chapter_link(paper, claims_anchor(paper))}">In the chapter</a>'
    numbers = "<br>".join(map(paper_number, claim.numbers)) or prose(claim.reported) or "none reported"
    verdicts = "<br>".join(dict.fromkeys(map(number_verdict, claim.numbers))) or "none"
    return [
        statement,
        numbers,
        "<br>".join(map(our_number, claim.comparisons)),
        display.verdict(claim.direction),
        verdicts,
    ]


def paper_number(number: NumberVerdict) -> str:
    """The paper's figure with its setting and where it stands."""
    setting = f"{number.setting}; {number.source}"
    return f"{prose(number.what)}: <b>{number.value:g}{unit(number.unit)}</b> <small>{prose(setting)}</small>"


def our_number(comparison: ComparisonVerdict) -> str:
    """Our estimate with its interval, and what was claimed of it."""
    estimate = f"{comparison.interval}{unit(comparison.unit)}"
    claimed = f"claimed {comparison.side} {comparison.threshold:g}"
    return f"{prose(comparison.what)}: <b>{html.escape(estimate)}</b> <small>{claimed}</small>"


def number_verdict(number: NumberVerdict) -> str:
    """The number verdict, and our number in the paper's setting where it was attempted."""
    if number.ours is None:
        return display.verdict(number.verdict)
    found = f"{number.ours}{unit(number.unit)}, tolerance {number.tolerance:g}"
    return f"{display.verdict(number.verdict)} <small>{html.escape(found)}</small>"


# ---------------------------------------------------------------- status


def status() -> str:
    """One row for each preset of each chapter: what is recorded, and what it cost."""
    rows = [row for paper in papers().values() if paper.has_chapter for row in status_rows(paper)]
    columns = ("Chapter", "Preset", "Record", "Time", "Memory", "Device", "Date")
    return table(columns, rows, "stacked") if rows else "No chapter yet."


def status_rows(paper: Paper) -> Iterable[list[str]]:
    """A paper's presets, the strongest first."""
    link = f'<a href="{chapter_link(paper)}">{html.escape(paper.id)}</a>'
    for name in records.presets_by_strength(paper):
        preset, record = paper.module().PRESETS[name], records.find(paper, name)
        if record is None:
            needs = f" <small>needs {prose(preset.needs)}</small>" if preset.needs else ""
            yield [link, name, badge("none", "not recorded") + needs, "", "", "", ""]
            continue
        reason = records.staleness(record, paper, preset.params)
        state = f"{badge('stale')} <small>{prose(reason)}</small>" if reason else badge("holds", "current")
        time = display.seconds_text(record.seconds)
        yield [link, name, state, time, memory(record), html.escape(record.device), day(record)]


# ---------------------------------------------------------------- models and data


def cards() -> str:
    """The cards of the packaged models, of the miniatures trained here, and of the data sets."""
    from midstream import data, zoo

    trained = organisms.names()
    models = {name: card for name, card in zoo.cards().items() if name not in trained}
    sections = ["## Models", *(card_section(name, card) for name, card in models.items())]
    sections += [miniatures.section(trained)] if trained else []
    sections += ["## Data", *(card_section(name, card) for name, card in data.cards().items())]
    return "\n\n".join(sections)


def card_section(name: str, card: Any) -> str:
    """One card as a small table; a long checksum may break anywhere."""
    facts = [("Load with", f"<code>load({name!r})</code>")]
    for label, field in (
        ("Source", "source"),
        ("Licence", "licence"),
        ("Size", "size"),
        ("SHA-256", "sha256"),
        ("Note", "note"),
    ):
        value = getattr(card, field, None)
        if value:
            text = f"<code>{html.escape(str(value))}</code>" if field == "sha256" else prose(str(value))
            facts.append((label, text))
    return f"### {plain(card.title)}\n\n" + facts_table(facts)


# ---------------------------------------------------------------- adding a paper


def adding(example: str = "label_words") -> str:
    """The files that a chapter consists of, with their lines, counted on one that exists."""
    paper = papers()[example]
    rows = [[f"<code>{html.escape(path)}</code>", what, lines] for path, what, lines in chapter_files(paper)]
    return table(("File", "What", "Lines in label_words"), rows, "stacked")


def chapter_files(paper: Paper) -> list[tuple[str, str, str]]:
    """Path, purpose and line count of each file that a chapter adds or touches."""
    root = places.root()
    module = Path("lib/midstream/papers") / paper.part / f"{paper.id}.py"
    notebook = places.notebook(paper.part, paper.id).relative_to(root)
    test = next(iter(sorted(path.relative_to(root) for path in root.glob(f"tests/**/test_{paper.id}.py"))), None)
    files = [(module, "method, experiment, claims"), (notebook, "the chapter (lines of its cells)")]
    files += [(test or Path(f"tests/papers/test_{paper.id}.py"), "facts of the method; controls turn checks red")]
    files += [
        (path.relative_to(root), "record, written by the run")
        for path in sorted(places.results(paper.part, paper.id).glob("*.json"))
    ]
    counted = [(str(path), what, _lines(root / path)) for path, what in files]
    return [*counted, ("_toc.yml", "its place in the reading order", "1")]


def _lines(path: Path) -> str:
    if not path.is_file():
        return "none yet"
    if path.suffix != ".ipynb":
        return str(len(path.read_text(encoding="utf-8").splitlines()))
    cells = nbformat.read(path, as_version=4).cells
    return str(sum(len(cell.source.splitlines()) for cell in cells))


# ---------------------------------------------------------------- words


def memory(record: Record) -> str:
    """Peak memory of the process, and of the GPU where there was one."""
    names = {"process": "", "gpu": " on the GPU"}
    return ", ".join(f"{gib:.1f} GiB{names.get(name, ' ' + name)}" for name, gib in record.peak_memory_gib.items())


def day(record: Record) -> str:
    """The date of a record."""
    return datetime.datetime.fromisoformat(record.date).date().isoformat()
