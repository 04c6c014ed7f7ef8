"""Writes every generated fragment of the book."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from midstream import records
from midstream.arena import ARENAS
from midstream.book import arenas, pages, shapes_world
from midstream.papers import parts

FOLDER = "_generated"
"""Within the book; hand-written pages include what lies in it."""


def write(book: Path) -> None:
    """Write the fragments into `book/_generated/`."""
    shown = pages.shown_records()
    fragments: dict[str, Callable[[], str]] = {
        "welcome": lambda: pages.welcome(shown),
        "ledger": lambda: pages.ledger(shown),
        "status": pages.status,
        "cards": pages.cards,
        "adding": pages.adding,
        **{f"part-{part}": partial(pages.verdicts, part, shown) for part in parts()},
        **{f"shapes-{name}": make for name, make in shapes_world.FRAGMENTS.items()},
    }
    for name, make in fragments.items():
        records.write_text(book / FOLDER / f"{name}.md", make())
    for arena in ARENAS.values():
        records.write_text(book / FOLDER / f"arena-{arena.name}.md", arenas.page(arena))
