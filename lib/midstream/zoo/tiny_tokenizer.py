"""The tokenizer of the tiny models."""

from __future__ import annotations

from typing import Any


def build(family: str) -> Any:
    """The tokenizer of a tiny model of this family; None where it reads no text."""
    return None


def recipe(family: str) -> str:
    """A hash of all that a tiny model of this family is made of."""
    return "0"
