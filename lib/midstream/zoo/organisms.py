"""Organisms: miniatures of the real architectures, trained by recipes of this repository and shipped with it.

An organism is a folder `weights/<name>/` beside this module, in the Hub's layout: `config.json`, `model.safetensors` in
half precision, tokenizer and processor files where the model has them, and `card.json`, which says how it was made and
what it can do. The folders that are there are the organisms; there is no list to keep.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from midstream.assets import Card, file_sha256, size_in_words
from midstream.errors import AssetError

WEIGHTS = Path(__file__).resolve().parent / "weights"
CARD = "card.json"
MODEL = "model.safetensors"
MOST_BYTES = 4_000_000
"""How large the weights of one organism may be."""


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Facts):
    """What an organism was trained on."""

    name: str
    parameters: dict[str, Any] = {}
    seed: int


class Stage(_Facts):
    """One call of the training loop."""

    name: str
    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    """Examples a step."""
    learning_rate: float
    """The peak of the schedule."""
    muon: float = 0.0
    """The peak of Muon's rate, for linear layers; zero where AdamW trained everything."""


class Point(_Facts):
    """One place of the loss curve: the mean loss over the steps since the last point."""

    stage: str
    step: int
    """Counted over all stages."""
    loss: float


class Measured(_Facts):
    """One figure of what an organism can do, measured on the weights as they ship."""

    value: float
    split: str
    """On which data: the split, and what was asked."""
    n: int = Field(gt=0)
    """How many examples."""
    unit: str = "%"


class OrganismCard(_Facts):
    """How an organism was made and what it can do: the contents of its `card.json`."""

    format: Literal[1] = 1
    name: str
    title: str
    what: str
    architecture: dict[str, Any]
    """Class and sizes, taken from the configuration."""
    parameters: int
    data: Data
    recipe: str
    """The module that makes it."""
    code: str
    """Fingerprint of the recipe's code and of all that it reaches."""
    ingredients: dict[str, str] = {}
    """Revisions of the models that the recipe starts from, by name."""
    schedule: tuple[Stage, ...]
    seconds: float
    device: str
    versions: dict[str, str]
    curve: tuple[Point, ...]
    measured: dict[str, Measured]
    sha256: str
    """Of model.safetensors."""
    licence: Literal["Apache-2.0"] = "Apache-2.0"
    note: str
    """What it cannot do."""

    @property
    def steps(self) -> int:
        """Over all stages."""
        return sum(stage.steps for stage in self.schedule)


def names() -> list[str]:
    """The organisms that are shipped."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"[!.]*/{CARD}"))


def read_card(folder: Path) -> OrganismCard:
    """The card in an organism's folder. Raises `AssetError` where it is missing or damaged."""
    path = folder / CARD
    try:
        state = path.stat()
        return _card(path, state.st_mtime_ns, state.st_size)
    except (OSError, ValidationError) as error:
        raise AssetError(f"The card {path} is missing or damaged; {_REMEDY}.") from error


@functools.cache
def _card(path: Path, changed: int, size: int) -> OrganismCard:
    return OrganismCard.model_validate_json(path.read_text(encoding="utf-8"))


def folder(name: str) -> Path:
    """The folder of a shipped organism. Raises `AssetError` unless its weights have the SHA-256 of its card."""
    found = WEIGHTS / name
    weights, wanted = found / MODEL, read_card(found).sha256
    if not weights.exists():
        raise AssetError(f"The weights of {name} are not in {found}; {_REMEDY}.")
    if (sha256 := file_sha256(weights)) != wanted:
        raise AssetError(
            f"The weights of {name} are not those of its card (SHA-256 {sha256[:12]}…, expected {wanted[:12]}…); "
            f"{_REMEDY}."
        )
    return found


_REMEDY = "install midstream again, or restore the folder from git"


def asset_card(name: str) -> Card:
    """A shipped organism's card in the form that all models share."""
    card, weights = read_card(WEIGHTS / name), WEIGHTS / name / MODEL
    size = size_in_words(weights.stat().st_size) if weights.exists() else "weights missing"
    return Card(
        title=card.title,
        what=card.what,
        source=f"trained here: midstream models train {name}",
        licence=card.licence,
        size=f"{size}, comes with midstream",
        sha256=card.sha256,
        note=card.note,
    )
