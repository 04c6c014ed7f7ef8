"""The built book in headless Chromium: every page is opened twice, and the tests ask what was seen."""

import functools
import http.server
import shutil
import threading
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import pytest

from midstream import places
from midstream.book import checks

VIEWS = {"desk": (1400, 900, "light"), "phone": (390, 844, "dark")}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]
MEASURE = """() => ({
    excess: document.documentElement.scrollWidth - window.innerWidth,
    images: [...document.images].filter((image) => {
        const hidden = !image.checkVisibility();
        return !hidden && !(image.complete && image.naturalWidth > 0);
    }).map((image) => image.src.slice(0, 120)),
    formulas: document.querySelectorAll('.math').length,
    typeset: document.querySelectorAll('mjx-container').length,
    formulaErrors: document.querySelectorAll('mjx-merror').length,
    mode: document.documentElement.dataset.theme,
})"""
AXE = """async () => {
    const found = await axe.run(document, { resultTypes: ['violations'], preload: false });
    return found.violations.filter((v) => ['serious', 'critical'].includes(v.impact)).map(
        (v) => `${v.id}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160)).join(' | ')}`);
}"""


@dataclass
class Seen:
    """What one page showed in one view."""

    page: str
    view: str
    measured: dict = field(default_factory=dict)
    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def html() -> Path:
    return places.root() / "_build" / "html"


@pytest.fixture(scope="session")
def pages(html) -> list[str]:
    return sorted(checks.built(html))


@pytest.fixture(scope="session")
def address(html):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def seen(chromium, address, pages) -> list[Seen]:
    """Every page in both views: messages, requests to elsewhere, sizes, images, and what axe has against it."""
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    return [sight for view in VIEWS for sight in _visit_all(chromium, address, pages, view, axe)]


def _visit_all(chromium, address, pages, view, axe) -> list[Seen]:
    width, height, mode = VIEWS[view]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=mode)
    window, sights = context.new_page(), []
    window.on("console", lambda message: message.type == "error" and sights[-1].console.append(message.text))
    window.on("response", lambda answer: answer.status >= 400 and sights[-1].console.append(f"missing: {answer.url}"))
    window.on("pageerror", lambda error: sights[-1].console.append(str(error)))

    def only_here(route):
        if route.request.url.startswith((address, "data:")):
            return route.continue_()
        sights[-1].outside.append(route.request.url)
        return route.abort()

    context.route("**/*", only_here)
    for page in pages:
        sights.append(Seen(page, view))
        window.goto(f"{address}/{page}.html", wait_until="load")
        window.wait_for_function("!document.querySelector('.math') || document.querySelector('mjx-container')")
        sights[-1].measured = window.evaluate(MEASURE)
        if view == "desk" or not page.startswith("api/") or page == "api/hooks":  # the others have the same form
            window.evaluate(axe)
            sights[-1].violations = window.evaluate(AXE)
    context.close()
    return sights


@pytest.fixture
def window(chromium, address):
    """A fresh page on a desk."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900}, base_url=address)
    yield context.new_page()
    context.close()
