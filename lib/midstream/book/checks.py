"""What must be true of the built book."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from sphinx_external_toc.parsing import parse_toc_yaml

INDEXES = frozenset({"genindex", "py-modindex", "search"})
"""Pages that Sphinx adds on its own."""


def named(toc: Path) -> set[str]:
    """The pages that the table of contents names, as paths without suffix."""
    return set(parse_toc_yaml(toc))


def built(html: Path) -> set[str]:
    """The pages that were built, as paths without suffix."""
    pages = {path.relative_to(html).with_suffix("").as_posix() for path in html.rglob("*.html")}
    return {page for page in pages if page not in INDEXES and not page.startswith("_static/")}


def faults(html: Path, toc: Path, book: Path) -> list[str]:
    """Every fault of a built book as a sentence: stray pages, images without alt text, undrawn tables, failed cells."""
    wanted, found = named(toc), built(html)
    sentences = [f"{page} stands in {toc.name} but was not built." for page in sorted(wanted - found)]
    sentences += [f"{page}.html was built but {toc.name} does not name it." for page in sorted(found - wanted)]
    for page in sorted(found):
        text = (html / f"{page}.html").read_text(encoding="utf-8")
        sentences += [f"{page}.html: image {image} has no alt text." for image in images_without_alt(text)]
        sentences += [f"{page}.html: a table shows as its source: {table}" for table in tables_as_source(text)]
    for notebook in sorted(book.glob("chapters/**/*.ipynb")):
        sentences += failed_cells(notebook)
    sentences += [
        f"{path.name}: the last run of this chapter failed." for path in sorted(book.glob("chapters/**/*.md"))
    ]
    return sentences


def images_without_alt(text: str) -> list[str]:
    """The sources of a page's images that have no alt text; `alt=""` counts for what is marked as decoration only."""
    scan = _Images()
    scan.feed(text)
    return scan.bare


def tables_as_source(text: str) -> list[str]:
    """The beginnings of a page's paragraphs in which the pipes of a Markdown table are to be read."""
    scan = _Paragraphs()
    scan.feed(text)
    return [paragraph[:60] for paragraph in scan.found if re.search(r"\|\s*:?(-{3,}|—)", paragraph)]


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._open = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[-1] += data


class _Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.bare: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        decoration = attributes.get("role") == "presentation" or attributes.get("aria-hidden") == "true"
        if tag == "img" and not decoration and not (attributes.get("alt") or "").strip():
            self.bare.append((attributes.get("src") or "without source")[:80])


def failed_cells(notebook: Path) -> list[str]:
    """A sentence for each error output of an executed notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    errors = [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    return [f"{notebook.name}: a cell ended in {error.ename}: {error.evalue}" for error in errors]
