"""What a notebook shows of a record: banner, claim table and cost, as accessible HTML with a plain-text twin.

Colours only repeat what words say. Text keeps the page's own colour, marks use tones that stand out at 3:1 on
white and on dark pages alike, and there are no scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from midstream.records import ClaimVerdict, ComparisonVerdict, NumberVerdict, Record

MARKS = {
    "holds": ("#1a8a6a", "✓"),
    "reproduced": ("#1a8a6a", "✓"),
    "fails": ("#d0543c", "✗"),
    "differs": ("#d0543c", "✗"),
    "unclear": ("#a5761a", "?"),
    "stale": ("#a5761a", "!"),
    "not attempted": ("#7a7f87", "–"),
}
"""Verdict → (colour of its mark, sign): green, red and amber of one lightness, told apart by word and sign as well."""


@dataclass(frozen=True)
class Html:
    """A piece of a page: HTML where it can be shown, plain text where it cannot."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def banner(record: Record, origin: str, stale: str = "", notes: Sequence[str] = ()) -> Html:
    """Where the numbers come from; `origin` is `recorded` or `computed`, `stale` says why they do not count."""
    preset = f"preset “{record.preset}”" if record.preset else "parameters of your own"
    line = f"{origin.capitalize()} on {record.date[:10]}, {preset}: {cost_text(record)}."
    warnings = list(notes)
    if stale:
        warnings.insert(0, f"STALE, counts for no verdict: {stale}.")
    colour = MARKS["stale" if warnings else "holds"][0]
    body = "".join(f"<br><strong>{escape(warning)}</strong>" for warning in warnings)
    html = (
        f'<div class="midstream-banner" role="note" style="border-left:0.3em solid {colour};'
        f'padding:0.4em 0.8em;margin:0.6em 0">{escape(line)}{body}</div>'
    )
    return Html(html, "\n".join([line, *warnings]))


def claims(claims: Iterable[ClaimVerdict], *, caption: str, stale: bool = False) -> Html:
    """The claim table: claim, the paper's number and setting, ours with its interval, and both verdicts."""
    header = ("Claim", "The paper: number and setting", "Ours, with 95 % interval", "Direction", "Number")
    rows = []
    for claim in claims:
        direction = "stale" if stale else claim.direction
        rows.append(
            (
                escape(claim.statement),
                _blocks(_paper_numbers(claim.numbers)) or escape(claim.reported) or "none given",
                _blocks([*map(_comparison, claim.comparisons), *_our_numbers(claim.numbers)]),
                verdict(direction),
                "<br>".join(dict.fromkeys(verdict("stale" if stale else number.verdict) for number in claim.numbers))
                or "none given",
            )
        )
    text = "\n".join(_claim_text(claim, stale) for claim in claims)
    return Html(table(header, rows, caption=caption), text)


def cost(record: Record) -> Html:
    """The cost card: time, memory and device as measured, and the versions and commit behind the numbers."""
    rows = [(escape(name), escape(value)) for name, value in cost_rows(record).items()]
    text = "\n".join(f"{name}: {value}" for name, value in cost_rows(record).items())
    return Html(table(("What", "Measured"), rows, caption="What this experiment cost"), text)


def cost_rows(record: Record) -> dict[str, str]:
    """The cost card's lines: name → value in words."""
    memory = ", ".join(f"{gib:.3g} GiB ({name})" for name, gib in record.peak_memory_gib.items())
    dirty = " with uncommitted changes" if record.dirty else ""
    return {
        "Time of the experiment": seconds_text(record.seconds),
        "Peak memory": memory,
        "Device": record.device,
        "Date": record.date,
        "Packages": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "Models and data": ", ".join(f"{name} @ {revision[:24]}" for name, revision in record.revisions.items())
        or "none",
        "Code": f"commit {record.commit[:12]}{dirty}",
    }


def cost_text(record: Record) -> str:
    """Time, peak memory and device in one phrase."""
    memory = " and ".join(
        f"{gib:.2g} GiB of {'memory' if name == 'process' else 'GPU memory'}"
        for name, gib in record.peak_memory_gib.items()
    )
    return f"{seconds_text(record.seconds)}, at most {memory}, on {record.device}"


def seconds_text(seconds: float) -> str:
    """A duration as people say it."""
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def verdict(text: str) -> str:
    """A verdict as HTML: sign and word, with a coloured mark beside them; the book's style sheet makes it a badge."""
    kind = "not attempted" if text.startswith("not attempted") else text
    colour, sign = MARKS[kind]
    badge = "none" if kind == "not attempted" else kind
    word = f'<strong class="verdict verdict-{badge}"><span aria-hidden="true">{sign}</span> {escape(kind)}</strong>'
    return (
        f'<span class="midstream-verdict" style="border-left:0.3em solid {colour};padding-left:0.4em">'
        f"{word} {escape(text.removeprefix(kind).lstrip(': '))}</span>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str) -> str:
    """An HTML table with a caption and scoped headers; cells are HTML already, the first of a row heads it."""
    look = "text-align:left;vertical-align:top;padding:0.35em 0.6em"
    cell = f'style="{look}"'
    head = "".join(f'<th scope="col" {cell}>{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row" style="{look};font-weight:normal">{first}</th>'
        + "".join(f"<td {cell}>{value}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="midstream-table" role="region" aria-label="{escape(caption, quote=True)}" tabindex="0" '
        f'style="overflow-x:auto"><table><caption style="text-align:left">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def parameters_text(parameters: Mapping[str, object]) -> str:
    """Parameters as `name=value, …`."""
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _blocks(parts: Iterable[tuple[str, str]]) -> str:
    """Lines with something smaller under each, the same one once."""
    each = "<div>{}<br><small>{}</small></div>"
    return "".join(each.format(escape(line), escape(below)) for line, below in dict.fromkeys(parts))


def _paper_numbers(numbers: Sequence[NumberVerdict]) -> Iterator[tuple[str, str]]:
    """The paper's figures, and their setting under those that share it."""
    for (setting, where), group in groupby(numbers, key=lambda number: (number.setting, number.source)):
        yield "; ".join(f"{each.what}: {each.value:.4g}{_unit(each.unit)}" for each in group), f"{setting}; {where}"


def _our_numbers(numbers: Sequence[NumberVerdict]) -> Iterator[tuple[str, str]]:
    """What was measured beside the paper's figures."""
    for number in numbers:
        if number.ours:
            yield f"{number.what}: {number.ours}{_unit(number.unit)}", number.setting_of_ours


def _comparison(comparison: ComparisonVerdict) -> tuple[str, str]:
    expected = f"{'>' if comparison.side == 'above' else '<'} {comparison.threshold:.3g}"
    return f"{comparison.what}: {comparison.interval}{_unit(comparison.unit)}", f"claimed {expected}"


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _claim_text(claim: ClaimVerdict, stale: bool) -> str:
    ours = "; ".join(", ".join(_comparison(each)) for each in claim.comparisons)
    return f"[{'stale' if stale else claim.direction}] {claim.statement} {ours}"
