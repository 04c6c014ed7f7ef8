"""A Sphinx extension: what the book needs beyond its theme.

- The launch and download buttons of a chapter point at its source notebook, not at the executed copy.
- Formulas work offline: MathJax is copied from a pinned package.
- No scripts of thebe.
- The repository's address stands in the configuration alone; pages write `REPOSITORY` for it.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

CHAPTERS = "chapters/"
"""Folder of the executed notebooks within the book; the same names lie under `notebooks/` in the repository."""

_MATHJAX_PARTS = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions", "a11y")


def point_at_source(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Rewrite a chapter's launch, edit and download links to `notebooks/<part>/<id>.ipynb`."""
    notebook = f"notebooks/{page.removeprefix(CHAPTERS)}.ipynb" if page.startswith(CHAPTERS) else ""
    local = context["pathto"](notebook, 1) if notebook else ""
    buttons = context.get("header_buttons", [])
    for group in buttons:
        if "buttons" in group:
            group["buttons"] = [leaf for leaf in group["buttons"] if _source_button(leaf, local)]
    for button in [leaf for group in buttons for leaf in group.get("buttons", [group])]:
        if notebook and "url" in button:
            button["url"] = button["url"].replace(f"book/{CHAPTERS}", "notebooks/")


def _source_button(button: dict[str, Any], notebook: str) -> bool:
    """Whether a button stays; the one that downloads a page's source becomes the notebook's or goes."""
    if button.get("label") != "download-source-button":
        return True
    button.update(url=notebook, tooltip="Download the notebook")
    return bool(notebook)


def name_repository(app: Sphinx, *arguments: Any) -> None:
    """Put the configured address where a page writes `REPOSITORY`."""
    content: list[str] = arguments[-1]
    content[0] = content[0].replace("REPOSITORY", app.config.html_theme_options["repository_url"])


def copy_assets(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax under `_static/` and the source notebooks under `notebooks/` of the built book."""
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package sphinx-mathjax-offline is missing; install the pinned dependencies")
    mathjax = Path(spec.origin).parent / "static" / "mathjax"
    for part in _MATHJAX_PARTS:
        _copy(mathjax / part, out / "_static" / "mathjax" / part)
    for chapter in sorted(doc for doc in app.env.found_docs if doc.startswith(CHAPTERS)):
        name = f"{chapter.removeprefix(CHAPTERS)}.ipynb"
        source = Path(app.srcdir).parent / "notebooks" / name
        if source.exists():
            _copy(source, out / "notebooks" / name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def leave_out_thebe(app: Sphinx) -> None:
    """Jupyter Book loads sphinx-thebe always; nothing here uses it, and its script would be fetched from elsewhere."""
    for event in ("env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners[event]):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handlers above."""
    leave_out_thebe(app)
    app.connect("source-read", name_repository)
    app.connect("include-read", name_repository)
    app.connect("html-page-context", point_at_source, priority=900)
    app.connect("build-finished", copy_assets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
