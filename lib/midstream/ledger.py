"""The ledger: every claim of every chapter, the paper's number beside ours, with both verdicts.

It stands apart from `claims`, which every paper imports: what a paper imports is part of its records' keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from midstream import records
from midstream.papers import Paper, papers
from midstream.records import ClaimVerdict, NumberVerdict, Record

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "paper", "part", "claim", "statement", "paper_number", "setting", "source", "ours", "direction", "number",
    "preset", "device", "date", "notebook",
)  # fmt: skip


def ledger() -> pd.DataFrame:
    """One row a claim, from each chapter's strongest current record; several numbers are joined by `; `.

    Columns: paper, part, claim, statement, paper_number, setting, source, ours (estimates with intervals), direction,
    number, preset, device, date, notebook. A claim without a current record has the verdicts `not recorded`.
    """
    import pandas as pd

    rows = [row for paper in papers().values() if paper.has_chapter for row in _rows(paper)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(paper: Paper) -> Iterator[dict[str, Any]]:
    record = records.strongest(paper)
    found = {claim.id: claim for claim in record.claims} if record else {}
    for claim in paper.module().CLAIMS:
        numbers = claim.numbers
        yield {
            "paper": paper.id,
            "part": paper.part,
            "claim": claim.id,
            "statement": claim.statement,
            "paper_number": _joined(f"{n.what}: {n.value:g}{f' {n.unit}' if n.unit else ''}" for n in numbers)
            or claim.reported,
            "setting": _joined(n.setting for n in numbers),
            "source": _joined(n.source for n in numbers),
            **_ours(found.get(claim.id), record),
            "notebook": f"notebooks/{paper.part}/{paper.id}.ipynb",
        }


def _ours(claim: ClaimVerdict | None, record: Record | None) -> dict[str, str]:
    if claim is None or record is None:
        verdicts = {"ours": "", "direction": "not recorded", "number": "not recorded"}
        return {**verdicts, "preset": "", "device": "", "date": ""}
    measured = [
        f"{comparison.what}: {comparison.interval} {comparison.unit}".strip() for comparison in claim.comparisons
    ]
    return {
        "ours": _joined(measured + [_attempt(number) for number in claim.numbers if number.ours]),
        "direction": claim.direction,
        "number": _joined(number.verdict for number in claim.numbers),
        "preset": record.preset,
        "device": record.device,
        "date": record.date,
    }


def _attempt(number: NumberVerdict) -> str:
    return f"{number.what}, {number.setting_of_ours}: {number.ours} {number.unit}".strip()


def _joined(texts: Any) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
