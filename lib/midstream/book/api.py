"""The API reference: signatures and docstrings of the public modules as Markdown pages."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from midstream import records

MODULES = (
    *("hooks", "zoo", "data", "data.shapes", "train", "train.recipes", "measure"),
    *("claims", "paper", "arena", "records", "running"),
)
"""What a chapter or a reader's own code may call."""


def write(book: Path) -> None:
    """Write one page a module and an index into `book/api/`."""
    modules = {name: importlib.import_module(f"midstream.{name}") for name in MODULES}
    for name, module in modules.items():
        records.write_text(book / "api" / f"{page_name(name)}.md", page(module))
    records.write_text(book / "api" / "index.md", index(modules))


def page_name(module: str) -> str:
    """The name of a module's page."""
    return module.replace(".", "-")


def index(modules: dict[str, ModuleType]) -> str:
    """A table of the modules, with the first line of each."""
    rows = [
        f"| [`midstream.{name}`]({page_name(name)}.md) | {first_line(module)} |" for name, module in modules.items()
    ]
    text = "Made from the docstrings of the library. Chapters are composed of these parts; your own code may be, too."
    return "\n".join(["# API reference", "", text, "", "| module | what it is for |", "|---|---|", *rows, ""])


def page(module: ModuleType) -> str:
    """A module's docstring, then its public functions, then its classes."""
    lines = [f"# {module.__name__}", "", f"```{{py:module}} {module.__name__}\n```", "", docstring(module), ""]
    for name, member in public(module):
        lines += [entry(module, name, member), ""]
    return "\n".join(lines)


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """Public functions and then classes, each in the order of the module's `__all__` or else of its source."""
    listed = getattr(module, "__all__", None)
    names = listed or [name for name in vars(module) if not name.startswith("_")]
    found = [(name, getattr(module, name)) for name in names]
    own = [(name, member) for name, member in found if listed or getattr(member, "__module__", "") == module.__name__]
    functions = [(name, member) for name, member in own if inspect.isfunction(member)]
    return functions + [(name, member) for name, member in own if inspect.isclass(member)]


def entry(module: ModuleType, name: str, member: Any) -> str:
    """A function or class as a directive of Sphinx's Python domain."""
    if inspect.isfunction(member):
        return directive("py:function", signature(name, member), docstring(member))
    body = [docstring(member), *attributes(member)]
    for method, function in vars(member).items():
        kind = unwrapped(function)
        if not method.startswith("_") and kind and function.__doc__:
            body.append(directive(*kind(method, function)))
    return directive("py:class", name, "\n\n".join(body))


def unwrapped(function: Any) -> Any:
    """How a class member is written down, or None where it is no method or property."""
    if isinstance(function, property):
        return lambda name, f: ("py:property", name, docstring(f))
    if isinstance(function, classmethod | staticmethod):
        return lambda name, f: ("py:method", signature(name, f.__func__), docstring(f.__func__))
    if inspect.isfunction(function):
        return lambda name, f: ("py:method", signature(name, f), docstring(f))
    return None


def attributes(member: type) -> list[str]:
    """The fields of a dataclass or pydantic model as a list."""
    if is_dataclass(member):
        found = [(field.name, field.type) for field in fields(member) if not field.name.startswith("_")]
    elif issubclass(member, BaseModel):
        found = [(name, inspect.get_annotations(member).get(name, "")) for name in member.model_fields]
    else:
        return []
    items = [f"- `{name}`: `{annotation(kind)}`" for name, kind in found]
    return ["Fields:\n\n" + "\n".join(items)] if items else []


def signature(name: str, function: Any) -> str:
    """A signature on one line, with types by their last names and defaults that are objects left out."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return f"{name}(...)"
    shown = [
        each.replace(
            annotation=_bare(each.annotation), default=_Bare("...") if _is_object(each.default) else each.default
        )
        for each in found.parameters.values()
    ]
    text = str(found.replace(parameters=shown, return_annotation=_bare(found.return_annotation)))
    return name + re.sub(r"<[^<>]*>", "...", re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text))


class _Bare(str):
    """Text that a signature shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _is_object(default: Any) -> bool:
    plain = (str, int, float, bool, tuple, type, type(None))
    return not isinstance(default, plain) and not inspect.isroutine(default)


def annotation(kind: Any) -> str:
    """A field's type as readable text."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def docstring(member: Any) -> str:
    """A docstring as Markdown that cannot be mistaken for more: no roles, no headings, no formulas, no raw HTML."""
    lines = (inspect.getdoc(member) or "").splitlines()
    return "\n".join(line if line.startswith("    ") else harmless(line) for line in lines)


def harmless(line: str) -> str:
    """Escape what Markdown would act on, outside of code spans."""
    pieces = re.split(r"(`+[^`]*`+)", line)
    escaped = [piece if piece.startswith("`") else re.sub(r"([\\*_{}\[\]<>$|#])", r"\\\1", piece) for piece in pieces]
    return "".join(escaped)


def first_line(module: ModuleType) -> str:
    """The summary of a module's docstring."""
    return harmless((inspect.getdoc(module) or "").partition("\n")[0])


def directive(kind: str, argument: str, body: str) -> str:
    """A directive with a fence that is longer than any within it."""
    longest = max((len(fence) for fence in re.findall(r":{3,}", body)), default=2)
    fence = ":" * (longest + 1)
    return f"{fence}{{{kind}}} {argument}\n\n{body}\n{fence}"
