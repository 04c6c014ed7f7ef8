"""Facts of the built book, as a reader's browser sees it."""

import re
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urldefrag

import pytest
import yaml

from midstream import places
from midstream.book import checks
from midstream.papers import papers
from midstream.zoo import organisms

pytestmark = pytest.mark.browser


def test_no_page_writes_an_error_to_the_console(seen):
    assert [(sight.page, sight.console) for sight in seen if sight.console] == []


def test_no_page_asks_another_host_for_anything(seen):
    assert [(sight.page, sight.outside) for sight in seen if sight.outside] == []


def test_no_page_scrolls_sideways_on_a_desk_or_a_phone(seen):
    assert [(s.page, s.view, s.measured["excess"]) for s in seen if s.measured["excess"] > 0] == []


def test_every_visible_image_has_loaded(seen):
    assert [(sight.page, sight.measured["images"]) for sight in seen if sight.measured["images"]] == []


def test_every_formula_is_typeset(seen):
    assert any(sight.measured["formulas"] for sight in seen)
    unset = [s.page for s in seen if s.measured["formulaErrors"] or s.measured["typeset"] < s.measured["formulas"]]
    assert unset == []


def test_the_view_on_a_phone_is_dark_and_the_one_on_a_desk_is_light(seen):
    assert {(sight.view, sight.measured["mode"]) for sight in seen} == {("desk", "light"), ("phone", "dark")}


def test_axe_finds_no_serious_violation_in_light_or_dark(seen):
    assert [(sight.page, sight.view, sight.violations) for sight in seen if sight.violations] == []


def test_the_pages_are_those_that_the_table_of_contents_names(pages):
    assert set(pages) == checks.named(places.root() / "_toc.yml")


def test_every_image_has_alt_text(html, pages):
    bare = {page: checks.images_without_alt((html / f"{page}.html").read_text(encoding="utf-8")) for page in pages}
    assert {page: images for page, images in bare.items() if images} == {}


def test_every_internal_link_and_anchor_leads_somewhere(html):
    files = {
        path.relative_to(html).as_posix(): _Links(path) for path in html.rglob("*.html") if "_static" not in path.parts
    }
    broken = []
    for name, links in files.items():
        for href in links.internal():
            target, anchor = urldefrag(href)
            target = target.partition("?")[0]
            path = (html / name).parent.joinpath(unquote(target)).resolve() if target else html / name
            known = files.get(path.relative_to(html.resolve()).as_posix()) if path.is_relative_to(html) else None
            if not path.exists() or (anchor and known and unquote(anchor) not in known.ids):
                broken.append(f"{name} → {href}")
    assert broken == []


class _Links(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.hrefs = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag in ("a", "link", "script", "img"):
            self.hrefs += [attributes[name] for name in ("href", "src") if attributes.get(name)]

    def internal(self):
        return [href for href in self.hrefs if not re.match(r"[a-z]+:|//|#$", href)]


def _chapters() -> list[str]:
    named = checks.named(places.root() / "_toc.yml")
    return sorted(page.removeprefix("chapters/") for page in named if page.startswith("chapters/"))


def _search(window, words: str) -> list[str]:
    window.goto(f"/search.html?q={quote(words)}")
    window.wait_for_selector("#search-results li")
    window.wait_for_function(
        "document.querySelector('#search-results h2 + p, .search-summary').textContent.match(/found/)"
    )
    return window.eval_on_selector_all("#search-results li a", "links => links.map(link => link.pathname)")


def test_search_finds_a_planned_paper_by_its_name_on_its_part(window):
    assert f"/parts/{papers()['llmlingua2'].part}.html" in _search(window, "LLMLingua-2")


@pytest.mark.parametrize("chapter", _chapters())
def test_search_finds_a_chapter_by_the_title_of_its_paper(window, chapter):
    title = papers()[chapter.split("/")[-1]].title.replace("'s ", " ")  # Sphinx's index has no word of one letter
    assert f"/chapters/{chapter}.html" in _search(window, title)


@pytest.mark.parametrize("chapter", _chapters())
def test_launch_and_download_buttons_point_at_the_source_notebook(window, html, chapter):
    window.goto(f"/chapters/{chapter}.html")
    links = window.eval_on_selector_all(".article-header-buttons a", "links => links.map(link => link.href)")
    repository = yaml.safe_load((places.root() / "_config.yml").read_text(encoding="utf-8"))["repository"]
    name = "/".join(repository["url"].split("/")[-2:])
    source = f"notebooks/{chapter}.ipynb"
    assert f"https://colab.research.google.com/github/{name}/blob/{repository['branch']}/{source}" in links
    assert f"https://mybinder.org/v2/gh/{name}/{repository['branch']}?urlpath=lab/tree/{source}" in links
    assert not [link for link in links if "book/chapters" in link]
    download = next(link for link in links if link.endswith(f"/{source}") and link.startswith("http://127.0.0.1"))
    assert window.request.get(download).body() == (places.root() / source).read_bytes()


def test_pictures_of_the_shapes_world_are_shown_with_sharp_pixels(window):
    window.goto("/shapes-world.html")
    looks = window.eval_on_selector_all("img.pixels", "images => images.map(i => getComputedStyle(i).imageRendering)")
    assert len(looks) > 40
    assert set(looks) == {"pixelated"}
    assert window.locator("table.rates tbody tr").count() == 8


def test_the_models_page_has_a_row_and_a_loss_curve_for_each_miniature(window):
    window.goto("/models-and-data.html")
    names = window.eval_on_selector_all(
        "table.miniatures tbody tr", "rows => rows.map(row => row.querySelector('code').textContent)"
    )
    assert names == organisms.names()
    assert window.locator("table.miniatures svg.spark[aria-label]").count() == len(names)


def test_the_rows_of_an_arena_lead_to_the_chapters_they_come_from(window):
    window.goto("/arenas/projectors.html")
    links = window.eval_on_selector_all(
        "table.arena tbody td:last-child a", "links => links.map(link => link.pathname)"
    )
    entered = [paper for paper in papers().values() if paper.has_chapter and hasattr(paper.module(), "ARENA")]
    assert set(links) <= {f"/chapters/{paper.part}/{paper.id}.html" for paper in entered}
    assert links or "yet" in window.locator("article").inner_text()
