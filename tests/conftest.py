"""What all tests share: one thread, no network for the Hub, and a browser only where there is something to open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)  # tiny models lose more to waiting threads than they gain

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the browser tests, saying why, where there is no browser or no book to open."""
    if browser() is None:
        reason = "no Chromium on the PATH: install Debian's package chromium"
    elif not (ROOT / "_build" / "html" / "index.html").is_file():
        reason = "no built book: `make book` builds it"
    else:
        return
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))
