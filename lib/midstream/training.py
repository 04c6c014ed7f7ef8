"""Making an organism from the command line: a request that is checked first, then the recipe, then weights and card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream import fingerprint, machine, places
from midstream.errors import MidstreamError, RequestError
from midstream.zoo import organisms
from midstream.zoo.organisms import OrganismCard

if TYPE_CHECKING:
    from midstream.train.recipes import Recipe, Report


@dataclass(frozen=True)
class Plan:
    """A request that can be met."""

    recipe: Recipe
    target: Path
    """The folder that will hold the organism."""
    steps: int | None
    shipped: OrganismCard | None
    """The card that comes with midstream, as it was when the request came."""


def plan(name: str, out: Path | None, steps: int | None, ship: bool) -> Plan:
    """Check a request: which recipe, into which folder.

    The folder is `trained/<name>` here, `out/<name>`, or with `ship` the package's own. Raises `RequestError` for an
    unknown name and for what would replace something that is not an earlier training of the same organism.
    """
    from midstream.train import recipes

    chosen = recipes.recipe(name)
    shipped = organisms.read_card(organisms.WEIGHTS / name) if name in organisms.names() else None
    if ship:
        _check_shipping(out, steps)
        return Plan(chosen, organisms.WEIGHTS / name, None, shipped)
    target = ((out or Path("trained")).expanduser() / name).resolve()
    if target.is_relative_to(organisms.WEIGHTS):
        raise RequestError(f"{target} holds the weights that come with midstream; to replace them, say --ship.")
    if target.exists() and not (target / organisms.CARD).is_file():
        raise RequestError(f"{target} is there and is no earlier training of {name}; name another folder with --out.")
    return Plan(chosen, target, steps, shipped)


def _check_shipping(out: Path | None, steps: int | None) -> None:
    places.need_checkout()
    if out is not None or steps is not None:
        raise RequestError("--ship replaces the weights that come with midstream, so it takes no --out and no --steps.")


def train(planned: Plan, report: Report) -> OrganismCard:
    """Train, measure and write; gives the card."""
    from midstream.train import recipes

    planned.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        return recipes.build(
            planned.recipe,
            planned.target,
            code=code(planned.recipe.module),
            machine=lambda: (machine.device(), machine.versions()),
            steps=planned.steps,
            report=report,
        )
    except FloatingPointError as error:
        raise MidstreamError(f"The training of {planned.recipe.name} came apart: {error}") from error


def code(module: str) -> str:
    """One fingerprint for a recipe's module and all of midstream that it reaches."""
    reached = json.dumps(fingerprint.code(module), sort_keys=True)
    return hashlib.sha256(reached.encode()).hexdigest()[: fingerprint.DIGITS]


def states() -> dict[str, str]:
    """For each shipped organism, whether its weights are those of today's recipe."""
    return {name: state(organisms.read_card(organisms.WEIGHTS / name)) for name in organisms.names()}


def state(card: OrganismCard) -> str:
    """`current`, or `weights from an older recipe`."""
    return "current" if card.code == code(card.recipe) else "weights from an older recipe"


def compared(shipped: OrganismCard | None, made: OrganismCard) -> list[dict[str, Any]]:
    """What was measured now, beside what the shipped card says: one row a figure."""
    before = shipped.measured if shipped else {}
    return [
        {
            "what": name,
            "value": found.value,
            "shipped": before[name].value if name in before else None,
            "unit": found.unit,
            "on": f"{found.split}, n = {found.n:,}",
        }
        for name, found in made.measured.items()
    ]
