"""What the book shows of the miniatures trained here: sizes, loss curves, what was measured, and how they were made."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from midstream import display, training
from midstream.assets import size_in_words
from midstream.book.markup import badge, facts_table, plain, prose, table, unit
from midstream.zoo import organisms
from midstream.zoo.organisms import Measured, OrganismCard, Point, Stage

WIDTH, HEIGHT = 150, 44
"""Of a loss curve, in CSS pixels."""

INTRODUCTION = """\
Real architectures with tiny configurations, trained from scratch by recipes of this repository on generated data, and
small enough to come with it in half precision: what a chapter shows on them, anyone can repeat in minutes. All figures
are measured on the weights as they ship. `midstream models train NAME` trains one again and shows its figures beside
these.
"""


def section(names: Sequence[str]) -> str:
    """A table of all miniatures side by side, then a card each."""
    found = {name: organisms.read_card(organisms.WEIGHTS / name) for name in names}
    columns = ("Model", "Measured", "Loss", "Training")
    rows = [overview_row(name, card) for name, card in found.items()]
    cards = [f"### {plain(card.title)}\n\n" + facts_table(facts(name, card)) for name, card in found.items()]
    return "\n\n".join(["## Trained here", INTRODUCTION, table(columns, rows, "stacked miniatures"), *cards])


def overview_row(name: str, card: OrganismCard) -> list[str]:
    """Name and size, what was measured, the loss curve, what the training took."""
    size = size_in_words((organisms.WEIGHTS / name / organisms.MODEL).stat().st_size)
    what = f"<code>{html.escape(name)}</code><br><small>{card.parameters / 1e6:.2g} million weights, {size}</small>"
    took = f"{card.steps:,} steps in {display.seconds_text(card.seconds)}<br><small>{html.escape(card.device)}</small>"
    return [what, "".join(figure(*item) for item in card.measured.items()), sparkline(name, card.curve), took]


def figure(name: str, measured: Measured) -> str:
    """One measured figure in a line, with what it was measured on."""
    value = f"<b>{measured.value:.3g}{unit(measured.unit)}</b>"
    asked = f"<small>{prose(measured.split)}, n = {measured.n:,}</small>"
    return f'<span class="figure">{prose(name)} {value} {asked}</span>'


def sparkline(name: str, curve: Sequence[Point]) -> str:
    """The loss over the steps, on a logarithmic scale, as a small picture with its ends in words."""
    first, last = curve[0].loss, curve[-1].loss
    ends = f"{first:.3g} → {last:.3g}"
    label = f"Loss of {name} over {curve[-1].step:,} steps, from {first:.3g} to {last:.3g}"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in _places(curve))
    starts = [now.step for before, now in pairwise(curve) if now.stage != before.stage]
    cuts = "".join(f'<path d="M{_across(step, curve):.1f} 0V{HEIGHT}" class="cut"/>' for step in starts)
    return (
        f'<svg class="spark" role="img" aria-label="{html.escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">{cuts}<polyline points="{points}"/></svg><br><small>{ends}</small>'
    )


def _places(curve: Sequence[Point]) -> Iterable[tuple[float, float]]:
    heights = [math.log(max(point.loss, 1e-6)) for point in curve]
    low, high = min(heights), max(heights)
    for point, value in zip(curve, heights, strict=True):
        yield _across(point.step, curve), 3 + (HEIGHT - 6) * (high - value) / ((high - low) or 1)


def _across(step: int, curve: Sequence[Point]) -> float:
    return 2 + (WIDTH - 4) * step / curve[-1].step


def facts(name: str, card: OrganismCard) -> list[tuple[str, str]]:
    """The rows of one card."""
    state = training.state(card)
    mark = badge("holds" if state == "current" else "stale", state)
    made = f"<code>midstream models train {html.escape(name)}</code> {mark}"
    parameters = ", ".join(f"{key} {value}" for key, value in card.data.parameters.items())
    rows = [
        ("What", prose(card.what)),
        ("Load with", f"<code>load({name!r})</code>"),
        ("Architecture", html.escape(architecture(card.architecture))),
        ("Data", html.escape(f"{card.data.name}, seed {card.data.seed}" + (f": {parameters}" if parameters else ""))),
        ("Starts from", ", ".join(f"<code>{html.escape(other)}</code>" for other in card.ingredients)),
        ("Schedule", "<br>".join(map(stage, card.schedule))),
        ("Recipe", f"<code>{html.escape(card.recipe)}</code>"),
        ("Train again", made),
        ("Licence", card.licence),
        ("SHA-256", f"<code>{card.sha256}</code>"),
        ("Note", prose(card.note)),
    ]
    return [(label, text) for label, text in rows if text]


def stage(found: Stage) -> str:
    """One stage of the schedule in words."""
    words = f"{found.name}: {found.steps:,} steps of {found.batch}, learning rate up to {found.learning_rate:g}"
    return html.escape(words + (f" (Muon, linear layers: {found.muon:g})" if found.muon else ""))


def architecture(sizes: Mapping[str, Any]) -> str:
    """Class and sizes in words: `CLIPModel; vision: 4 blocks, width 128, 4 heads; …`."""
    towers = {key.removesuffix("_config"): value for key, value in sizes.items() if isinstance(value, dict)}
    own = {key: value for key, value in sizes.items() if not isinstance(value, dict) and key != "class"}
    parts = [f"{key}: {_in_words(value)}" for key, value in towers.items()]
    return "; ".join([str(sizes["class"]), *parts, *([_in_words(own)] if own else [])])


_WORDS = {
    "num_hidden_layers": "{} blocks",
    "hidden_size": "width {}",
    "intermediate_size": "inner width {}",
    "num_attention_heads": "{} heads",
    "num_key_value_heads": "{} key-value heads",
    "vocab_size": "vocabulary {}",
    "image_size": "images of {} pixels",
    "patch_size": "patches of {}",
    "projection_dim": "joint width {}",
    "num_experts": "{} experts",
    "num_local_experts": "{} experts",
    "n_routed_experts": "{} experts",
    "num_experts_per_tok": "{} of them a token",
    "moe_intermediate_size": "expert width {}",
}


def _in_words(sizes: Mapping[str, int]) -> str:
    words = (_WORDS[key].format(value) for key, value in sizes.items())
    return ", ".join(phrase.removesuffix("s") if phrase.startswith("1 ") else phrase for phrase in words)
