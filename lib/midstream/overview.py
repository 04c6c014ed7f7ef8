"""What there is: every paper with its state, and one paper with its parameters, presets and claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from midstream import places, records, request
from midstream.papers import Paper, papers


@dataclass(frozen=True)
class PaperState:
    """A paper and where it stands.

    `state` is `planned` (no chapter), `unrecorded`, `recorded`, `stale` (the code has changed since) or `corrupted`;
    `preset`, `seconds`, `device` and `date` are those of the record it speaks of.
    """

    id: str
    part: str
    title: str
    arxiv: str
    state: str
    preset: str = ""
    seconds: float | None = None
    device: str = ""
    date: str = ""


def states() -> list[PaperState]:
    """All papers in the register's order. Looks at files only: no paper's module is imported."""
    return [_state(paper) for paper in papers().values()]


def _state(paper: Paper) -> PaperState:
    facts = asdict(paper)
    if not paper.has_chapter:
        return PaperState(**facts, state="planned")
    found = [records.read(file) for file in places.results(paper.part, paper.id).glob("*.json")]
    intact = sorted((record for record in found if record), key=lambda record: records.weakness(record.preset))
    current = [record for record in intact if not records.code_changes(record, paper)]
    if not intact:
        return PaperState(**facts, state="corrupted" if found else "unrecorded")
    shown = (current or intact)[0]
    return PaperState(
        **facts,
        state="recorded" if current else "stale",
        preset=shown.preset,
        seconds=shown.seconds,
        device=shown.device,
        date=shown.date,
    )


def describe(paper: Paper) -> dict[str, Any]:
    """One paper as plain JSON: parameters as JSON Schema, presets, claims; only the register's facts if planned."""
    facts = asdict(paper)
    if not paper.has_chapter:
        return {**facts, "state": "planned"}
    module = paper.module()
    return {
        **facts,
        "state": _state(paper).state,
        "parameters": module.Params.model_json_schema(),
        "presets": {name: _preset(preset) for name, preset in module.PRESETS.items()},
        "claims": [_claim(claim) for claim in module.CLAIMS],
    }


def parameter_rows(schema: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, what it takes, default and meaning of each parameter of a JSON Schema."""
    rows = []
    for name in schema["properties"]:
        field = request.field_schema(schema, name)
        rows.append((name, request.takes(field), _default(field), field.get("description", "")))
    return rows


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default", "")
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _preset(preset: Any) -> dict[str, Any]:
    return {
        "purpose": preset.purpose,
        "minutes": preset.minutes,
        "memory_gib": preset.memory_gib,
        "gpus": preset.gpus,
        "needs": preset.needs,
        "parameters": preset.params.model_dump(mode="json"),
    }


def _claim(claim: Any) -> dict[str, Any]:
    fields = ("what", "value", "unit", "setting", "source", "tolerance")
    numbers = [{field: getattr(number, field) for field in fields} for number in claim.numbers]
    return {"id": claim.id, "statement": claim.statement, "control": claim.control.name, "numbers": numbers}
