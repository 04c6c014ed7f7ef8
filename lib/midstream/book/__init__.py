"""The book: notebooks → executed chapters → HTML.

`build` executes the chapters, writes the generated pages and the API reference, and runs Jupyter Book over
`book/` with execution switched off. The result is built aside and swapped in, so that a failure leaves the
last good book where it was.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.status import Status

from midstream import machine, places, records
from midstream.book import api, chapters, checks, generated
from midstream.book.chapters import Outcome
from midstream.errors import MidstreamError
from midstream.papers import Paper, papers
from midstream.running import Progress

console = Console(stderr=True, soft_wrap=True)


def build(strict: bool = False) -> Path:
    """Build the book and return its first page.

    With `strict`, warnings are errors, and a page that is missing, an image without alt text or a failed chapter
    keeps the new book from being put in place. Without it, chapters that failed are replaced by a page that
    says so. Raises `MidstreamError` in either case when something failed.
    """
    root = places.root()
    started = time.perf_counter()
    outcomes = prepare_chapters(root / "book")
    generated.write(root / "book")
    api.write(root / "book")
    html = render(root, strict)
    faults = checks.faults(html, root / "_toc.yml", root / "book")
    if strict and faults:
        raise MidstreamError("The book has faults; the last good one was kept:\n- " + "\n- ".join(faults))
    first = publish(html, root / "_build" / "html") / "index.html"
    report(first, outcomes, time.perf_counter() - started)
    if faults:
        raise MidstreamError("The book was built, with faults:\n- " + "\n- ".join(faults))
    return first


def prepare_chapters(book: Path) -> list[Outcome]:
    """Execute every chapter that the table of contents names, some at once, going on past those that fail."""
    named, jobs = chapters_named(book.parent / "_toc.yml"), jobs_at_once()

    def prepare(paper: Paper) -> Outcome:
        outcome = chapters.prepare(paper, book, partial(show_progress, status, paper))
        state = "failed" if outcome.error else "unchanged" if outcome.reused else "executed"
        console.print(f"chapter {paper.id}: {state}, {outcome.seconds:.1f} s")
        return outcome

    share = max(1, machine.cores() // jobs)
    with console.status("chapters") as status, threads_each(share), ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(prepare, named))


def jobs_at_once() -> int:
    """How many chapters are executed side by side: as many as cores and memory allow, and no more than four."""
    return max(1, min(4, machine.cores(), machine.memory_allowed() // (6 * machine.GIB)))


@contextmanager
def threads_each(count: int) -> Iterator[None]:
    """Within the block processes that are started compute with `count` threads, unless the user said how many."""
    theirs = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = theirs or str(count)
    try:
        yield
    finally:
        if theirs is None:
            del os.environ["OMP_NUM_THREADS"]


def show_progress(status: Status, paper: Paper, progress: Progress) -> None:
    """Tell in which cell a running chapter is."""
    status.update(f"chapter {paper.id}: cell {progress.cell} of {progress.cells}")


def chapters_named(toc: Path) -> list[Paper]:
    """The papers whose chapters the table of contents names; each must be of the register."""
    named = sorted(page for page in checks.named(toc) if page.startswith("chapters/"))
    known = {f"chapters/{paper.part}/{paper.id}": paper for paper in papers().values()}
    strangers = [page for page in named if page not in known]
    if strangers:
        raise MidstreamError(f"{toc.name} names {strangers[0]}, which is no paper of the register.")
    return [known[page] for page in named]


def render(root: Path, strict: bool) -> Path:
    """Run Jupyter Book into `_build/work` and return the folder of its HTML.

    Unchanged pages are kept from the last time, except in a strict build, since warnings come from pages that are read,
    and except where pages came, went or changed their kind, since links to them were resolved for what was there.
    """
    work, listing = root / "_build" / "work", root / "_build" / "work" / "pages.txt"
    pages_now = "\n".join(sorted(str(path) for kind in ("md", "ipynb") for path in (root / "book").rglob(f"*.{kind}")))
    if strict or not listing.is_file() or listing.read_text(encoding="utf-8") != pages_now:
        shutil.rmtree(work, ignore_errors=True)
    records.write_text(listing, pages_now)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(root / "book")]
    command += ["--config", str(root / "_config.yml"), "--toc", str(root / "_toc.yml"), "--path-output", str(work)]
    command += ["-q", "-W", "-n", "--keep-going"] if strict else ["-q"]
    log = root / "_build" / "sphinx.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with console.status("pages"), log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=root)
    if done.returncode:
        raise MidstreamError(f"Jupyter Book failed; the last good book was kept.\n{complaints(log)}")
    return work / "_build" / "html"


def complaints(log: Path) -> str:
    """The warnings and errors of a build, or the end of its log where it has none that say so."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8")).splitlines()
    marked = [line for line in lines if "WARNING" in line or "ERROR" in line]
    return "\n".join(marked or lines[-40:])


def publish(html: Path, target: Path) -> Path:
    """Put a built book in place of the last one: copied beside it first, then swapped by renaming."""
    fresh, old = target.with_name("html.new"), target.with_name("html.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(html, fresh)
    (fresh / "index.html").touch()  # when the book was built, also where its first page did not change
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def report(first: Path, outcomes: list[Outcome], seconds: float) -> None:
    """Say where the book is, how to open it, and what its two times are."""
    console.print(f"\nThe book: {first} ({len(checks.built(first.parent))} pages)", highlight=False)
    console.print("Open that file in a browser, or serve it:", highlight=False)
    console.print(f"  python -m http.server 8000 -d {first.parent}    then http://localhost:8000", highlight=False)
    quick = [record.seconds for outcome in outcomes if (record := records.find(outcome.paper, "quick"))]
    computed = sum(outcome.computed for outcome in outcomes)
    console.print(
        f"All quick experiments, as recorded: {sum(quick):.0f} s for {len(quick)} of {len(outcomes)} chapters."
    )
    console.print(f"This book: {seconds - computed:.0f} s, and {computed:.0f} s for experiments computed anew.")
