"""What all tests share: one thread, no network for the Hub, and a browser only where there is something to open."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)  # tiny models lose more to waiting threads than they gain

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "_build" / "html" / "index.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _book_sources() -> list[Path]:
    """What the book is made of, as far as git knows it; generated pages are not among it."""
    command = ["git", "ls-files", "book", "_config.yml", "_toc.yml", "notebooks", "results", "lib/midstream/book"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    return [path for name in names if (path := ROOT / name).is_file()]


def _why_no_browser_tests() -> str:
    if not any(map(shutil.which, BROWSERS)):
        return "there is no Chromium on this machine; Debian's package is called chromium"
    if not BOOK.is_file():
        return "there is no built book; `make book` builds it"
    built = BOOK.stat().st_mtime
    if any(path.stat().st_mtime > built for path in _book_sources()):
        return "the built book is older than its sources; `make book` builds it anew"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the browser tests, saying why, where there is no browser or no up-to-date book to open."""
    reason = _why_no_browser_tests()
    for item in items:
        if reason and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))
