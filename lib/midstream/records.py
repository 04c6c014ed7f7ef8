"""Recorded experiments: one JSON each, with a key that says when it still counts.

The key is the SHA-256 of the parameters, of the fingerprints of every definition the paper's module reaches (see
`midstream.fingerprint`), and of the revisions of the models and data it loads. A revision says where an asset is from
(a SHA-256, a commit) and, after a `+`, fingerprints the code that makes it. Package versions and the device are
recorded, not part of the key.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from midstream import fingerprint, machine, places
from midstream.errors import MidstreamError
from midstream.papers import Paper

if TYPE_CHECKING:
    from midstream.claims import Claim, Comparison, PaperNumber
    from midstream.measure.intervals import Interval
    from midstream.paper import PaperParams, Result

STRENGTH = ("paper", "full", "quick")
"""Presets from the strongest evidence to the weakest; a name such as `paper-gptj` ranks just behind `paper`."""


class CorruptRecord(MidstreamError):
    """A record that cannot be trusted: not JSON, not of a record's form, or changed by hand."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Span(_Part):
    """An estimate with its interval; what is not finite is stored as null."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, interval: Interval) -> Span:
        """From a measured interval."""
        values = (interval.estimate, interval.low, interval.high)
        estimate, low, high = (float(f"{value:.6g}") if math.isfinite(value) else None for value in values)
        return cls(estimate=estimate, low=low, high=high, n=interval.n)

    def __str__(self) -> str:
        if self.estimate is None:
            return "not a number"
        low = "−∞" if self.low is None else f"{self.low:.3g}"
        high = "∞" if self.high is None else f"{self.high:.3g}"
        return f"{self.estimate:.3g} [{low}, {high}]"


class ComparisonVerdict(_Part):
    """One comparison of a claim, as measured."""

    what: str
    interval: Span
    side: Literal["above", "below"]
    threshold: float
    unit: str
    verdict: Literal["holds", "fails", "unclear"]

    @classmethod
    def of(cls, comparison: Comparison) -> ComparisonVerdict:
        """From a comparison made on a result."""
        return cls(
            what=comparison.what,
            interval=Span.of(comparison.interval),
            side=comparison.side,
            threshold=comparison.threshold,
            unit=comparison.unit,
            verdict=comparison.verdict,
        )


class NumberVerdict(_Part):
    """One figure of the paper, ours beside it, and whether it was attempted in the paper's own setting."""

    what: str
    value: float
    setting: str
    source: str
    tolerance: float
    unit: str
    ours: Span | None
    verdict: str

    @property
    def setting_of_ours(self) -> str:
        """In which setting our figure was measured."""
        return "at our scale" if self.verdict.startswith("not attempted") else "in the paper's setting"

    @classmethod
    def of(cls, number: PaperNumber, result: Result, preset: str, needs: str) -> NumberVerdict:
        """From the paper's figure and a result."""
        return cls(
            what=number.what,
            value=number.value,
            setting=number.setting,
            source=number.source,
            tolerance=number.tolerance,
            unit=number.unit,
            ours=Span.of(number.ours(result)) if number.ours else None,
            verdict=number.verdict(result, preset, needs),
        )


class ClaimVerdict(_Part):
    """A claim with both verdicts."""

    id: str
    statement: str
    reported: str = ""
    direction: Literal["holds", "fails", "unclear"]
    comparisons: tuple[ComparisonVerdict, ...]
    numbers: tuple[NumberVerdict, ...]

    @classmethod
    def of(cls, claim: Claim, result: Result, preset: str, needs: str) -> ClaimVerdict:
        """A claim checked on a result."""
        return cls(
            id=claim.id,
            statement=claim.statement,
            reported=claim.reported,
            direction=claim.direction(result),
            comparisons=tuple(ComparisonVerdict.of(comparison) for comparison in claim.check(result)),
            numbers=tuple(NumberVerdict.of(number, result, preset, needs) for number in claim.numbers),
        )


class Record(_Part):
    """What one run of a paper's experiment found, and everything needed to judge whether it still counts."""

    format: Literal[1] = 1
    paper: str
    preset: str
    """The preset whose parameters these are; empty for parameters of one's own."""
    parameters: dict[str, Any]
    key: str
    date: str
    device: str
    seconds: float
    peak_memory_gib: dict[str, float]
    commit: str
    dirty: bool
    versions: dict[str, str]
    revisions: dict[str, str]
    code: dict[str, str]
    claims: tuple[ClaimVerdict, ...]
    scalars: dict[str, float | None]
    tables: dict[str, dict[str, list[Any]]]

    @property
    def result(self) -> Result:
        """The tables and scalars as the experiment gave them, to six significant digits."""
        from midstream.paper import Result

        scalars = {name: math.nan if value is None else value for name, value in self.scalars.items()}
        return Result.from_dict({"tables": self.tables, "scalars": scalars})


def make(
    paper: Paper, params: PaperParams, result: Result, seconds: float, code: Mapping[str, str] | None = None
) -> Record:
    """The record of a result just computed by this process; `code` is what the code was when it started."""
    from midstream.paper import Result

    module = paper.module()
    stored = result.to_dict()
    rounded = Result.from_dict(stored)
    preset = preset_of(paper, params)
    needs = module.PRESETS["paper"].needs if "paper" in module.PRESETS else ""
    needs = needs or "a run with the paper's own model and data (`--preset paper`)"
    reached, revisions = dict(code or fingerprint.code(paper.module_name)), dict(module.revisions(params))
    head, dirty = machine.commit()
    return Record(
        paper=paper.id,
        preset=preset,
        parameters=params.model_dump(mode="json"),
        key=key_of(params.model_dump(mode="json"), reached, revisions),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=machine.device(),
        seconds=round(seconds, 2),
        peak_memory_gib=machine.peak_memory(),
        commit=head,
        dirty=dirty,
        versions=machine.versions(),
        revisions=revisions,
        code=reached,
        claims=tuple(ClaimVerdict.of(claim, rounded, preset, needs) for claim in module.CLAIMS),
        **stored,
    )


def preset_of(paper: Paper, params: PaperParams) -> str:
    """The name of the preset with exactly these parameters, or an empty string."""
    return next((name for name, preset in paper.module().PRESETS.items() if preset.params == params), "")


def key(paper: Paper, params: PaperParams) -> str:
    """The key that a record of these parameters must have to count, today, in this checkout."""
    revisions = paper.module().revisions(params)
    return key_of(params.model_dump(mode="json"), fingerprint.code(paper.module_name), revisions)


def key_of(parameters: Mapping[str, Any], code: Mapping[str, str], revisions: Mapping[str, str]) -> str:
    """SHA-256 over the canonical JSON of what a result depends on."""
    subject = {"parameters": dict(parameters), "code": dict(code), "revisions": dict(revisions)}
    return _digest(subject)


def staleness(record: Record, paper: Paper, params: PaperParams) -> str:
    """Why a record does not count for these parameters, in words; empty when it does."""
    parameters = params.model_dump(mode="json")
    code = fingerprint.code(paper.module_name)
    try:
        here = paper.module().revisions(params)
    except MidstreamError as error:
        return f"its models and data cannot be identified here: {error}"
    revisions = {name: _resolved(here[name], record.revisions.get(name)) for name in here}
    if record.key == key_of(parameters, code, revisions):
        return ""
    reasons = [
        _differences("parameters", record.parameters, parameters),
        _differences("code", record.code, code),
        _differences("revisions", record.revisions, revisions),
    ]
    return "; ".join(reason for reason in reasons if reason) or "its key was made another way"


def code_changes(record: Record, paper: Paper) -> str:
    """Which code has changed since a record was made, in words; looks at files only and imports nothing."""
    return _differences("code", record.code, fingerprint.code(paper.module_name))


def _resolved(here: str, recorded: str | None) -> str:
    """A Hub model or data set this machine has not fetched does not contradict the commit recorded elsewhere."""
    if not recorded or not here.startswith("hub:"):
        return here
    commit, (_, plus, code) = recorded.partition("+")[0], here.partition("+")
    return commit + plus + code


def _differences(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    return f"changed {what}: {shown}" if changed else ""


# ---------------------------------------------------------------- files


def path(paper: Paper, preset: str) -> Path:
    """Where a preset's record is kept."""
    return places.results(paper.part, paper.id) / f"{preset}.json"


def load(file: Path) -> Record:
    """Read and check a record; `CorruptRecord` says what is wrong with it."""
    broken = f"The record {_shown(file)} is corrupted and does not count"
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
        checksum = data.pop("checksum", None) if isinstance(data, dict) else None
        record = Record.model_validate(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptRecord(f"{broken}: it is no JSON ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CorruptRecord(f"{broken}: {where}: {first['msg']}.") from error
    if checksum != _digest(data):
        raise CorruptRecord(f"{broken}: its contents do not match its checksum.")
    return record


def save(record: Record, file: Path) -> None:
    """Write a record whole or not at all."""
    data = record.model_dump(mode="json")
    write_text(file, _readable({**data, "checksum": _digest(data)}))


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all: into a neighbour first, then renamed over."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def strongest(paper: Paper) -> Record | None:
    """The strongest current record of a paper: `paper`, else `full`, else `quick`, else any other preset's."""
    for preset in presets_by_strength(paper):
        record = find(paper, preset)
        if record is not None and not staleness(record, paper, paper.module().PRESETS[preset].params):
            return record
    return None


def find(paper: Paper, preset: str) -> Record | None:
    """A preset's record, current or not; None where there is none or only a corrupted one."""
    return read(path(paper, preset))


def read(file: Path) -> Record | None:
    """A record that may be missing or corrupted; None then."""
    try:
        return load(file)
    except (FileNotFoundError, CorruptRecord):
        return None


def corrupted(paper: Paper) -> list[str]:
    """A sentence for each record of a paper that is there but cannot be trusted."""
    sentences = []
    for file in sorted(places.results(paper.part, paper.id).glob("*.json")):
        try:
            load(file)
        except CorruptRecord as error:
            sentences.append(str(error))
    return sentences


def presets_by_strength(paper: Paper) -> list[str]:
    """The names of a paper's presets, the strongest evidence first."""
    return sorted(paper.module().PRESETS, key=weakness)


def weakness(preset: str) -> tuple[int, str]:
    """A preset's place in the order of evidence; the smallest is the strongest."""
    family = preset.partition("-")[0]
    return (STRENGTH.index(family) if family in STRENGTH else len(STRENGTH), preset)


def _shown(file: Path) -> str:
    """A path as seen from the checkout."""
    home = places.root()
    return str(file.relative_to(home)) if file.is_relative_to(home) else str(file)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _readable(data: Any) -> str:
    """JSON with one line a field and one line a column, so that a change of a record can be reviewed."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    # A JSON string never holds a raw newline, so these newlines are all layout.
    flat = re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda match: "[" + re.sub(r",\n\s*", ", ", match[1]) + "]", text)
    return flat + "\n"
