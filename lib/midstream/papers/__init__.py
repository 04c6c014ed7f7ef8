"""The 106 papers: the register, and the modules of those that have a chapter."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import ModuleType

from midstream.errors import RequestError


@dataclass(frozen=True)
class Paper:
    """One entry of the register.

    A paper with a chapter has a module `midstream.papers.<part>.<id>` that defines `Params`, `PRESETS`,
    `experiment(params) -> Result`, `CLAIMS` and `revisions(params) -> dict[str, str]` (the pinned revision of
    every model and data set that a run with these parameters loads).
    """

    id: str
    part: str
    title: str
    arxiv: str

    @property
    def module_name(self) -> str:
        """The dotted name of the paper's module, whether or not it exists."""
        return f"midstream.papers.{self.part}.{self.id}"

    @property
    def has_chapter(self) -> bool:
        """Whether the paper's module exists."""
        try:
            return importlib.util.find_spec(self.module_name) is not None
        except ModuleNotFoundError:
            return False

    def module(self) -> ModuleType:
        """The paper's module; a `RequestError` when the paper has no chapter yet."""
        if not self.has_chapter:
            raise RequestError(f"'{self.id}' is planned and has no chapter yet; see `midstream papers`.")
        return importlib.import_module(self.module_name)


@cache
def parts() -> dict[str, str]:
    """The eight parts, id → title, in the book's order."""
    return dict(_register()["parts"])


@cache
def papers() -> dict[str, Paper]:
    """All papers by id, in the register's order."""
    return {entry["id"]: Paper(**entry) for entry in _register()["papers"]}


def paper(id: str) -> Paper:
    """One paper by id; an unknown id is refused, with the nearest one named."""
    known = papers()
    if id in known:
        return known[id]
    near = difflib.get_close_matches(id, known, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else "; `midstream papers` lists all of them."
    raise RequestError(f"There is no paper '{id}'{hint}")


@cache
def _register() -> dict:
    return json.loads(files(__package__).joinpath("registry.json").read_text(encoding="utf-8"))
