"""The bibliography holds every paper of the book once, and every part page cites its own papers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pybtex import errors
from pybtex.database import BibliographyData, BibliographyDataError, Entry, parse_file, parse_string
from pybtex.plugin import find_plugin
from pybtex.richtext import Text

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = ROOT / "book" / "references.bib"
REGISTRY = json.loads((ROOT / "lib" / "midstream" / "papers" / "registry.json").read_text(encoding="utf-8"))
PAPERS = {paper["id"]: paper for paper in REGISTRY["papers"]}
CITATION = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")
DOCUMENT_LINK = re.compile(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`")


@pytest.fixture(scope="module")
def bibliography() -> BibliographyData:
    return parse_file(REFERENCES, encoding="utf-8")


def title_of(entry: Entry) -> str:
    return Text.from_latex(entry.fields["title"]).render_as("text")


def part_page(part: str) -> str:
    return (ROOT / "book" / "parts" / f"{part}.md").read_text(encoding="utf-8")


def cited(page: str) -> set[str]:
    return {key.strip() for group in CITATION.findall(page) for key in group.split(",")}


def test_every_paper_has_an_entry(bibliography: BibliographyData) -> None:
    assert set(PAPERS) <= set(bibliography.entries)


def test_a_repeated_key_does_not_parse() -> None:
    first_entry = "@misc" + REFERENCES.read_text(encoding="utf-8").split("@misc", 1)[1].split("\n@", 1)[0]
    with pytest.raises(BibliographyDataError, match="repeated"):
        parse_string(first_entry + first_entry, "bibtex")


@pytest.mark.parametrize("paper_id", sorted(PAPERS))
def test_entry_agrees_with_the_registry(paper_id: str, bibliography: BibliographyData) -> None:
    entry, paper = bibliography.entries[paper_id], PAPERS[paper_id]
    assert entry.fields["eprint"] == paper["arxiv"]
    assert entry.fields["archivePrefix"] == "arXiv"
    assert entry.fields["url"] == f"https://arxiv.org/abs/{paper['arxiv']}"
    assert title_of(entry) == paper["title"]


@pytest.mark.parametrize("paper_id", sorted(PAPERS))
def test_entry_names_its_authors_and_a_year_not_before_the_preprint(
    paper_id: str, bibliography: BibliographyData
) -> None:
    entry = bibliography.entries[paper_id]
    assert entry.persons.get("author") or entry.fields["key"]
    assert 2000 + int(entry.fields["eprint"][:2]) <= int(entry.fields["year"]) <= 2026


def test_the_style_of_the_book_formats_every_entry_without_a_warning(bibliography: BibliographyData) -> None:
    style = find_plugin("pybtex.style.formatting", "unsrt")()
    with errors.capture() as warnings:
        formatted = {entry.key: entry.text.render_as("text") for entry in style.format_bibliography(bibliography)}
    assert warnings == []
    assert all(PAPERS[paper_id]["title"] in formatted[paper_id] for paper_id in PAPERS)
    assert not [key for key, text in formatted.items() if "\\" in text or "{" in text]


@pytest.mark.parametrize("part", sorted(REGISTRY["parts"]))
def test_part_page_is_titled_as_registered_and_cites_each_of_its_papers(part: str) -> None:
    page = part_page(part)
    assert f"# {REGISTRY['parts'][part]}\n" in page
    assert {paper_id for paper_id, paper in PAPERS.items() if paper["part"] == part} <= cited(page)


@pytest.mark.parametrize("part", sorted(REGISTRY["parts"]))
def test_part_page_cites_only_known_works(part: str, bibliography: BibliographyData) -> None:
    assert cited(part_page(part)) <= set(bibliography.entries)


@pytest.mark.parametrize("part", sorted(REGISTRY["parts"]))
def test_part_page_links_only_to_pages_that_have_a_source(part: str) -> None:
    for target in DOCUMENT_LINK.findall(part_page(part)):
        if target.startswith("../chapters/"):
            source = ROOT / "lib" / "midstream" / "papers" / f"{target.removeprefix('../chapters/')}.py"
        else:
            source = ROOT / "book" / "parts" / f"{target}.md"
        assert source.is_file(), f"{part}.md links to {target}, which has no source"
