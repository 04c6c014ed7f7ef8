"""From a source notebook to an executed chapter in `book/chapters/`."""

from __future__ import annotations

import ast
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from midstream import fingerprint, places, records, running
from midstream.errors import MidstreamError
from midstream.papers import Paper
from midstream.running import Progress, Run

WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Outcome:
    """What became of one chapter: how long it took, how much of that its experiment, and why it failed where it did."""

    paper: Paper
    seconds: float
    computed: float = 0.0
    reused: bool = False
    error: str = ""


def prepare(paper: Paper, book: Path, report: Callable[[Progress], None] = lambda progress: None) -> Outcome:
    """Put the executed chapter of a paper into the book, or a page that says why there is none.

    A chapter that was executed from the same notebook, code and records is used again.
    """
    started = time.perf_counter()
    target = book / "chapters" / paper.part / f"{paper.id}.ipynb"
    notice = target.with_suffix(".md")
    stamp = stamp_of(paper)
    if stamp and _stamp_in(target) == stamp:
        return Outcome(paper, time.perf_counter() - started, reused=True)
    try:
        finished = execute(paper, report)
    except MidstreamError as error:
        target.unlink(missing_ok=True)
        records.write_text(notice, FAILURE_PAGE.format(title=paper.title, reason=error, id=paper.id))
        return Outcome(paper, time.perf_counter() - started, error=str(error))
    notice.unlink(missing_ok=True)
    notebook = nbformat.read(finished.notebook, as_version=4)
    records.write_text(target, nbformat.writes(presentable(notebook, stamp_of(paper))))
    computed = finished.record.seconds if finished.origin == "computed" else 0.0
    return Outcome(paper, time.perf_counter() - started, computed)


def presentable(notebook: NotebookNode, stamp: str) -> NotebookNode:
    """A chapter as the book shows it: defaults set once, no bookkeeping, no controls that need a running kernel."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if "sentinel" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["midstream"] = {"stamp": stamp}
    return notebook


def stamp_of(paper: Paper) -> str:
    """SHA-256 over a chapter's notebook, the code it reaches, and the records it may show."""
    source = places.notebook(paper.part, paper.id)
    if not source.is_file():
        return ""
    digest = hashlib.sha256(source.read_bytes())
    used = imports(nbformat.read(source, as_version=4))
    code = fingerprint.code(paper.module_name) | fingerprint.reached(*sorted(used))
    digest.update(repr(sorted(code.items())).encode())
    for record in sorted(places.results(paper.part, paper.id).glob("*.json")):
        digest.update(record.read_bytes())
    return digest.hexdigest()


def imports(notebook: NotebookNode) -> set[str]:
    """The Midstream modules that a notebook's code cells import."""
    found: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type != "code" or cell.source.startswith("%"):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "midstream"}


FAILURE_PAGE = """\
# {title}

The last run of this chapter failed, so there is nothing to show:

```text
{reason}
```

To see it happen: `midstream run {id}`.
"""


def execute(paper: Paper, report: Callable[[Progress], None]) -> Run:
    """Run a notebook with its default parameters in a fresh process; it shows its strongest current record."""
    if not places.notebook(paper.part, paper.id).is_file():
        raise MidstreamError(f"There is no notebook notebooks/{paper.part}/{paper.id}.ipynb.")
    out = places.root() / "_build" / "chapters" / paper.part / paper.id
    return running.run(running.plan(paper.id, out=out, policy="strongest"), report=report)


def _stamp_in(target: Path) -> str:
    if not target.is_file():
        return ""
    return str(nbformat.read(target, as_version=4).metadata.get("midstream", {}).get("stamp", ""))
