"""Facts of the way from notebooks to a built book, without building one."""

import os
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from midstream import book
from midstream.book import api, chapters, checks, extension, generated, pages
from midstream.errors import MidstreamError
from midstream.papers import papers
from midstream.records import ClaimVerdict, ComparisonVerdict, NumberVerdict, Record, Span

PAPER = papers()["label_words"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout with one notebook."""
    monkeypatch.setenv("MIDSTREAM_ROOT", str(tmp_path))
    notebook = new_notebook(cells=[new_code_cell("from midstream.measure import t_interval")])
    for folder in (f"notebooks/{PAPER.part}", f"results/{PAPER.part}/{PAPER.id}", "book", "_build"):
        (tmp_path / folder).mkdir(parents=True)
    nbformat.write(notebook, tmp_path / "notebooks" / PAPER.part / f"{PAPER.id}.ipynb")
    (tmp_path / "_toc.yml").write_text(f"format: jb-book\nroot: index\nchapters:\n  - file: chapters/flow/{PAPER.id}\n")
    return tmp_path


@pytest.fixture
def finished(tmp_path, record):
    """A run that is done."""
    nbformat.write(new_notebook(), tmp_path / "executed.ipynb")
    return SimpleNamespace(notebook=tmp_path / "executed.ipynb", record=record, origin="computed")


@pytest.fixture
def record():
    interval = Span(estimate=0.25, low=-0.5, high=1.0, n=3)
    comparison = ComparisonVerdict(
        what="label minus random", interval=interval, side="above", threshold=0, unit="points", verdict="unclear"
    )
    number = NumberVerdict(
        what="accuracy", value=51.9, setting="GPT2-XL", source="Table 2", tolerance=1, unit="%", ours=None,
        verdict="not attempted: needs a GPU",
    )  # fmt: skip
    claim = ClaimVerdict(
        id="one", statement="It <helps>.", direction="unclear", comparisons=(comparison,), numbers=(number,)
    )
    return Record(
        paper=PAPER.id, preset="quick", parameters={}, key="", date="2026-01-02T03:04:05+00:00", device="a laptop",
        seconds=12.0, peak_memory_gib={"process": 1.5}, commit="", dirty=False, versions={}, revisions={}, code={},
        claims=(claim,), scalars={}, tables={},
    )  # fmt: skip


# ---------------------------------------------------------------- checks


def test_an_image_without_alt_text_is_found_and_a_decoration_is_not():
    text = '<img src="a"><img src="b" alt=" "><img src="c" alt="a line"><img src="d" alt="" role="presentation">'
    assert checks.images_without_alt(text) == ["a", "b"]


def test_a_table_that_shows_as_its_source_is_found_and_one_in_code_or_well_drawn_is_not() -> None:
    text = (
        "<p>| a | b | |—|—| | 1 | 2 |</p><p>| c |\n|---|</p><pre>| d |---|</pre><table><td>| e</td></table><p>|x|</p>"
    )
    assert checks.tables_as_source(text) == ["| a | b | |—|—| | 1 | 2 |", "| c |\n|---|"]


def test_a_failed_cell_is_found(tmp_path):
    failed = new_code_cell("1/0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="division by zero")])
    nbformat.write(new_notebook(cells=[new_code_cell("1"), failed]), tmp_path / "x.ipynb")
    assert checks.failed_cells(tmp_path / "x.ipynb") == ["x.ipynb: a cell ended in ZeroDivisionError: division by zero"]


def test_missing_and_stray_pages_are_faults(tmp_path):
    (tmp_path / "html").mkdir()
    for name in ("index", "stray", "search", "genindex"):
        (tmp_path / "html" / f"{name}.html").write_text("<p>")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n  - file: missing\n")
    faults = checks.faults(tmp_path / "html", tmp_path / "_toc.yml", tmp_path)
    assert faults == [
        "missing stands in _toc.yml but was not built.",
        "stray.html was built but _toc.yml does not name it.",
    ]


def test_a_chapter_outside_the_register_is_refused(tmp_path):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n  - file: chapters/flow/no_paper\n")
    with pytest.raises(MidstreamError, match="no_paper"):
        book.chapters_named(tmp_path / "_toc.yml")


# ---------------------------------------------------------------- chapters


def test_a_presented_chapter_sets_its_parameters_once_and_hides_what_only_runs_need():
    widget = new_output("display_data", {chapters.WIDGET: {}, "text/plain": "IntSlider()"})
    cells = [
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        new_code_cell("seed = 0", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("explore()", outputs=[widget, new_output("stream", text="kept")]),
        new_code_cell("run.finish()", metadata={"tags": ["sentinel"]}),
    ]
    shown = chapters.presentable(new_notebook(cells=cells), "stamp").cells
    assert [cell.source for cell in shown] == ["seed = 0", "explore()", "run.finish()"]
    assert [output.output_type for output in shown[1].outputs] == ["stream"]
    assert "remove-cell" in shown[2].metadata["tags"]


def test_the_stamp_of_a_chapter_changes_with_its_notebook_and_its_records(checkout):
    first = chapters.stamp_of(PAPER)
    (checkout / "results" / PAPER.part / PAPER.id / "quick.json").write_text("{}")
    second = chapters.stamp_of(PAPER)
    nbformat.write(new_notebook(cells=[]), checkout / "notebooks" / PAPER.part / f"{PAPER.id}.ipynb")
    assert len({first, second, chapters.stamp_of(PAPER)}) == 3


def test_imports_are_read_from_code_cells_only():
    cells = [new_markdown_cell("import midstream.zoo"), new_code_cell("from midstream import figures\nimport os")]
    assert chapters.imports(new_notebook(cells=cells)) == {"midstream", "midstream.figures"}


def test_an_executed_chapter_is_used_again_until_something_changes(checkout, finished, monkeypatch):
    runs = []
    monkeypatch.setattr(chapters, "execute", lambda paper, report: runs.append(paper) or finished)
    outcomes = [chapters.prepare(PAPER, checkout / "book") for _ in range(2)]
    assert [outcome.reused for outcome in outcomes] == [False, True]
    assert [outcome.computed for outcome in outcomes] == [12.0, 0.0]
    assert len(runs) == 1


def test_a_failed_chapter_leaves_a_page_that_says_so_and_a_later_success_removes_it(checkout, finished, monkeypatch):
    def fail(paper, report):
        raise MidstreamError("the kernel died")

    monkeypatch.setattr(chapters, "execute", fail)
    assert [outcome.error for outcome in book.prepare_chapters(checkout / "book")] == ["the kernel died"]
    notice = checkout / "book" / "chapters" / PAPER.part / f"{PAPER.id}.md"
    assert "the kernel died" in notice.read_text()
    monkeypatch.setattr(chapters, "execute", lambda paper, report: finished)
    book.prepare_chapters(checkout / "book")
    assert [path.suffix for path in notice.parent.iterdir()] == [".ipynb"]


def test_chapters_at_once_share_the_cores_unless_the_user_said_how_many_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with book.threads_each(3):
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with book.threads_each(3):
        assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("cores", "gibibytes", "jobs"), [(1, 64, 1), (2, 24, 2), (2, 8, 1), (64, 256, 4)])
def test_as_many_chapters_at_once_as_cores_and_memory_allow(monkeypatch, cores, gibibytes, jobs):
    monkeypatch.setattr(book.machine, "cores", lambda: cores)
    monkeypatch.setattr(book.machine, "memory_allowed", lambda: gibibytes * 2**30)
    assert book.jobs_at_once() == jobs


# ---------------------------------------------------------------- publishing


def test_publishing_replaces_the_last_book_whole(tmp_path):
    for name, page in (("work", "new"), ("html", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{page}.html").touch()
    book.publish(tmp_path / "work", tmp_path / "html")
    assert sorted(path.name for path in (tmp_path / "html").iterdir()) == ["index.html", "new.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["html", "work"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_failed_build_keeps_the_last_good_book(checkout, monkeypatch, strict):
    good = checkout / "_build" / "html" / "index.html"
    good.parent.mkdir()
    good.write_text("the last good one")

    def fail(root, strict):
        raise MidstreamError("Jupyter Book ended with exit code 1")

    monkeypatch.setattr(book, "prepare_chapters", lambda folder: [])
    monkeypatch.setattr(generated, "write", lambda folder: None)
    monkeypatch.setattr(api, "write", lambda folder: None)
    monkeypatch.setattr(book, "render", fail)
    with pytest.raises(MidstreamError):
        book.build(strict=strict)
    assert good.read_text() == "the last good one"


def test_a_strict_build_does_not_publish_a_book_with_faults(checkout, monkeypatch):
    work = checkout / "work"
    work.mkdir()
    (work / "index.html").write_text('<img src="bare.png">')
    monkeypatch.setattr(book, "prepare_chapters", lambda folder: [])
    monkeypatch.setattr(generated, "write", lambda folder: None)
    monkeypatch.setattr(api, "write", lambda folder: None)
    monkeypatch.setattr(book, "render", lambda root, strict: work)
    with pytest.raises(MidstreamError, match=r"bare\.png has no alt text"):
        book.build(strict=True)
    assert not (checkout / "_build" / "html").exists()


# ---------------------------------------------------------------- pages


def test_the_welcome_page_names_every_paper_once():
    text = pages.welcome({})
    assert all(text.count(f"arxiv.org/abs/{paper.arxiv})") == 1 for paper in papers().values())
    assert len(papers()) == 106


def test_the_ledger_shows_both_verdicts_and_escapes_what_a_claim_says(record):
    section = pages.ledger_section(PAPER, record)
    assert "verdict-unclear" in section
    assert "not attempted" in section
    assert "needs a GPU" in section
    assert "0.25 [-0.5, 1] points" in section
    assert "It &lt;helps&gt;." in section


def test_a_paper_without_a_current_record_has_no_verdict_in_the_ledger():
    assert "verdict-" not in pages.ledger_section(PAPER, None)


def test_the_files_of_a_chapter_are_counted():
    files = {path: lines for path, _, lines in pages.chapter_files(PAPER)}
    assert int(files[f"lib/midstream/papers/{PAPER.part}/{PAPER.id}.py"]) > 100
    assert files["_toc.yml"] == "1"


# ---------------------------------------------------------------- API reference and buttons


def test_every_function_that_hooks_export_is_documented():
    from midstream import hooks

    page = api.page(hooks)
    for name in ("sites", "read", "write", "attend", "route", "prune", "readout", "kv"):
        assert f"{{py:function}} {name}(" in page
    assert page.index("{py:function} write(") < page.index("{py:class}")


def test_a_signature_gives_types_by_their_last_names():
    def f(model: "torch.nn.Module", fn: "collections.abc.Callable[[torch.Tensor], float] | None" = None) -> None: ...  # noqa: F821

    assert api.signature("f", f) == "f(model: Module, fn: Callable[[Tensor], float] | None = None) -> None"


def test_a_signature_leaves_out_defaults_that_are_objects_and_quotes_around_types():
    def f(at: int = 3, page: "str" = PAPER, name: str = "x") -> "str": ...

    assert api.signature("f", f) == "f(at: int = 3, page: str = ..., name: str = 'x') -> str"


def test_a_docstring_cannot_become_markup():
    assert api.harmless("sum_i |x|*2 in `a_b*` <b> [1](x)") == r"sum\_i \|x\|\*2 in `a_b*` \<b\> \[1\](x)"


def test_a_directive_is_fenced_longer_than_what_it_holds():
    inner = api.directive("py:method", "f()", "text")
    outer = api.directive("py:class", "C", inner)
    assert outer.startswith("::::{py:class} C\n")
    assert outer.endswith("\n::::")


def test_buttons_of_a_chapter_point_at_the_source_notebook_and_other_pages_offer_no_source():
    def buttons():
        source = {"type": "link", "label": "download-source-button", "url": "_sources/x"}
        launch = {"type": "link", "text": "Colab", "url": "https://host/blob/main/book/chapters/flow/a.ipynb"}
        return [{"type": "group", "buttons": [source]}, {"type": "group", "buttons": [launch]}]

    def shown(page):
        context = {"header_buttons": buttons(), "pathto": lambda path, resource: f"../../{path}"}
        extension.point_at_source(SimpleNamespace(), page, "page.html", context, None)
        return [[leaf["url"] for leaf in group["buttons"]] for group in context["header_buttons"]]

    assert shown("chapters/flow/a") == [
        ["../../notebooks/flow/a.ipynb"],
        ["https://host/blob/main/notebooks/flow/a.ipynb"],
    ]
    assert shown("ledger")[0] == []
