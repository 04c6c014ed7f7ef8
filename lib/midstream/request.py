"""Requests checked before any work starts: parameters, presets and folders, each refusal one clear sentence."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from midstream.errors import RequestError
from midstream.papers import Paper

if TYPE_CHECKING:
    from midstream.paper import PaperParams, Preset


def checked(paper: Paper, values: Mapping[str, Any]) -> PaperParams:
    """Values as a paper's parameters; a `RequestError` names the field, what it takes and what it got."""
    try:
        return paper.module().Params.model_validate(dict(values))
    except ValidationError as error:
        raise RequestError(_sentence(paper, values, error)) from error


def preset(paper: Paper, name: str) -> Preset:
    """A paper's preset by name."""
    known = paper.module().PRESETS
    if name not in known:
        raise RequestError(f"{paper.id} has no preset '{name}'{hint(name, known, f'it has {listed(known)}')}")
    return known[name]


def parameters(paper: Paper, preset_name: str, overrides: Mapping[str, Any]) -> PaperParams:
    """A preset's parameters with some of them changed; texts are read as the field's type takes them."""
    base = preset(paper, preset_name).params.model_dump(mode="json")
    read = {name: typed(paper, base, name, value) for name, value in overrides.items()}
    return checked(paper, {**base, **read})


def typed(paper: Paper, base: Mapping[str, Any], name: str, value: Any) -> Any:
    """One parameter's value; a text is taken as it is if the field takes it, else as JSON, else as a list `a,b`."""
    known = paper.module().Params.model_fields
    if name not in known:
        raise RequestError(_unknown(paper, name))
    if not isinstance(value, str):
        return value
    if value.startswith(("./", "../", "~/")):  # a path of the caller's; kernels and cells run in other folders
        value = str(Path(value).expanduser().resolve())
    readings = [value, *_as_json(value), [item.strip() for item in value.split(",")]]
    return min(readings, key=lambda reading: _misfit(paper, {**base, name: reading}, name))


def assignments(pairs: Iterable[str], option: str) -> dict[str, str]:
    """`name=value` texts as a dictionary."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise RequestError(f"{option} takes name=value, got '{pair}'.")
        if name.strip() in found:
            raise RequestError(f"{option} sets '{name.strip()}' twice; give it once.")
        found[name.strip()] = value.strip()
    return found


def writable(folder: Path) -> Path:
    """An output folder that exists and can be written to, made where it is missing."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"Cannot write to the output folder {folder}: it is a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:
        raise RequestError(f"Cannot write to the output folder {folder}: {error.strerror or error}.") from error
    return folder.resolve()


def takes(schema: Mapping[str, Any]) -> str:
    """What a field takes, in words, from its JSON Schema."""
    if "anyOf" in schema:
        return " or ".join(takes(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a text"}
    words |= {"array": "a list", "object": "a dictionary", "null": "nothing (null)"}
    return words.get(schema.get("type", ""), "a value") + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    limits = {"minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}"}
    limits |= {"exclusiveMaximum": "below {}", "minLength": "of {} or more characters", "pattern": "of the form {}"}
    limits |= {"minItems": "of {} or more", "maxItems": "of at most {}"}
    said = [words.format(schema[name]) for name, words in limits.items() if name in schema]
    inner = f" (a,b,…), each {takes(schema['items'])}" if isinstance(schema.get("items"), dict) else ""
    return (" " + " and ".join(said) if said else "") + inner


def _sentence(paper: Paper, values: Mapping[str, Any], error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence."""
    first = error.errors()[0]
    if not first["loc"]:
        return f"{paper.id} refuses these parameters: {first['msg'].removeprefix('Value error, ')}."
    name = str(first["loc"][0])
    params = paper.module().Params
    if name not in params.model_fields:
        return _unknown(paper, name)
    schema = field_schema(params.model_json_schema(), name)
    got = values.get(name)
    reason = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else ""
    return f"{name} takes {takes(schema)}, got {_shown(got)}{f' ({reason})' if reason else ''}."


def field_schema(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field's part of a JSON Schema, its reference followed."""
    field = dict(schema["properties"][name])
    reference = field.pop("$ref", None)
    return {**schema["$defs"][reference.rpartition("/")[2]], **field} if reference else field


def _misfit(paper: Paper, values: Mapping[str, Any], name: str) -> int:
    """0 where the named field accepts its value, whatever the others say; 1 where only the paper's own check refuses
    it; 2 where it is of the wrong kind."""
    try:
        paper.module().Params.model_validate(dict(values))
    except ValidationError as error:
        kinds = {problem["type"] for problem in error.errors() if problem["loc"] and problem["loc"][0] == name}
        return 2 if kinds - {"value_error"} else len(kinds)
    return 0


def _as_json(text: str) -> list[Any]:
    if text.lower() in ("none", "null"):
        return [None]
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return []


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return f"'{value}'" if isinstance(value, str) else repr(value)


def _unknown(paper: Paper, name: str) -> str:
    known = paper.module().Params.model_fields
    return f"{paper.id} has no parameter '{name}'{hint(name, known, f'`midstream describe {paper.id}` lists them')}"


def hint(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a refusal: the nearest known name, else what to do."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; {otherwise}."


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
