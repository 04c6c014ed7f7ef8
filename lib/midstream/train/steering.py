"""Rates of a vision-language model's two sides, steered by how far each side's step moves what the model says.

Source: Wu et al., "CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models", EMNLP 2025, arXiv
2407.20454; `midstream.papers.bridges.balanced_mllm_tuning` says what of it is inferred.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from midstream.train.packing import IGNORED
from midstream.train.sides import gradient_norm, put_back, snapshot

Divergence = Literal["new from old", "old from new"]
Rule = Literal["last rates", "first rates"]
Reward = Literal["each side", "both together"]

ENCODER, LANGUAGE = "encoder", "language"
SIDES = (ENCODER, LANGUAGE)
Weights = dict[str, list[nn.Parameter]]
"""The parameters of each side."""


def sides_of(model: nn.Module) -> Weights:
    """What requires a gradient: S is what belongs to tower or projector, T all the rest."""
    found: Weights = {side: [] for side in SIDES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seen = "vision_tower" in name or "multi_modal_projector" in name
            found[ENCODER if seen else LANGUAGE].append(parameter)
    return found


# ---- the balance coefficient κ


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The answers' loss, and log p (answer tokens, vocabulary) where an answer's token is to be said."""
    output = model(**batch)
    answered = batch["labels"][:, 1:] != IGNORED
    return output.loss, output.logits[:, :-1][answered].double().log_softmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), mean over answer tokens: a scalar, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def balance(language: float, encoder: float) -> float:
    """κ = D_T / D_S: 0 where only the encoder moved, ∞ where only the language model did, NaN where neither."""
    if encoder == 0:
        return math.inf if language > 0 else math.nan
    return language / encoder


LOG_CAP, EPSILON = math.log(1e8), 1e-12


def log_balance(language: float, encoder: float) -> float:
    """log κ, capped at ±log 1e8, and 0 where neither side moved: what can be averaged."""
    found = math.log(max(language, 0.0) + EPSILON) - math.log(max(encoder, 0.0) + EPSILON)
    return max(-LOG_CAP, min(LOG_CAP, found))


@torch.no_grad()
def log_probabilities_with(
    model: Any, batch: dict[str, Tensor], held: Weights, values: dict[str, list[Tensor]]
) -> Tensor:
    """log p with some sides' weights as given; afterwards they are, bit for bit, what they were."""
    parameters = [each for side in values for each in held[side]]
    with put_back(parameters, [each for side in values.values() for each in side]):
        return log_probabilities(model, batch)[1]


def divergences(
    model: Any, batch: dict[str, Tensor], sides: Weights, before: dict[str, list[Tensor]], log_p: Tensor
) -> dict[str, float]:
    """How far the step of each side alone moves p(S_t, T_t), given as `log_p`, both ways.

    The model stands at S_t+1, T_t+1; `before` has the weights of S_t and T_t. One more forward for each side.
    """
    found = {}
    for side, other in ((ENCODER, LANGUAGE), (LANGUAGE, ENCODER)):
        moved = log_probabilities_with(model, batch, sides, {other: before[other]})
        found[side] = float(divergence(moved, log_p))
        found[f"{side}_back"] = float(divergence(log_p, moved))
    return found


# ---- the scheduler

Rates = dict[str, float]
"""The rate of each side."""


def rates_at(rate: float, ratio: float) -> Rates:
    """η_S and η_T with geometric mean `rate` and η_T / η_S = `ratio`."""
    return {ENCODER: rate / math.sqrt(ratio), LANGUAGE: rate * math.sqrt(ratio)}


def rebalanced(rates: Rates, smooth: float, gamma: float, limit: float) -> Rates:
    """η_S κ̄^γ and η_T κ̄^−γ, their ratio kept within limit², their product as it was.

    A language model that moves the answers more (κ̄ > 1) is slowed down, and the encoder sped up.
    """
    mean = math.sqrt(rates[ENCODER] * rates[LANGUAGE])
    ratio = rates[LANGUAGE] / rates[ENCODER] * math.exp(-2 * gamma * smooth)
    return rates_at(mean, min(max(ratio, limit**-2), limit**2))


@dataclass(frozen=True)
class Settings:
    """How often κ is measured, and how strongly the rates follow it."""

    steps: int
    """Updates in all."""
    measure_every: int = 2
    """Steps from one measurement of κ to the next."""
    adjust_every: int = 2
    """Steps from one change of the rates to the next."""
    smoothing: float = 0.5
    """Share of the moving average that a new log κ leaves as it is."""
    gamma: float = 0.125
    limit: float = 100.0
    """How far a rate may go from √(η_S η_T), as a factor."""
    divergence: Divergence = "new from old"
    rule: Rule = "last rates"
    reward: Reward = "each side"
    alone: float = 0.5
    """Share of the steps in which coordinate descent trains one side."""


@dataclass(frozen=True)
class Arm:
    """One way of tuning: what steers the rates, from which ratio on, and how much change is rewarded."""

    name: str
    start: float = 1.0
    """η_T / η_S at the beginning."""
    signal: Literal["none", "balance", "chance", "norms"] = "none"
    weight: float = 0.0
    first: str = ""
    """The side that coordinate descent trains first."""


@dataclass
class Tuning:
    """A model under tuning by an arm: its loss, its rates, and what is measured on the way."""

    model: Any
    sides: Weights
    arm: Arm
    settings: Settings
    rate: float
    seed: int = 0
    step: int = 0
    """Updates so far."""
    smooth: float | None = None
    """κ̄, or the moving average of the logarithm of gradient norms' ratio."""
    measured: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The answers' loss of each batch, before the update on it and without the reward."""
    rates: Rates = field(init=False)
    _before: dict[str, list[Tensor]] = field(default_factory=dict)
    _said: tuple[dict[str, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.rates = rates_at(self.rate, self.arm.start)
        self._random = random.Random(f"chance/{self.seed}")

    def now(self) -> Rates:
        """The rates of the next update; coordinate descent has one side rest."""
        if not self.arm.first:
            return self.rates
        begun = self.step < round(self.settings.alone * self.settings.steps)
        return {side: rate if (side == self.arm.first) == begun else 0.0 for side, rate in self.rates.items()}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The answers' loss, minus the rewarded change; keeps what the measurement after the update needs."""
        former = self._former(batch)
        value, log_p = log_probabilities(model, batch)
        self.losses.append(float(value.detach()))
        if self._measures():
            self._said = (batch, self._exact(batch, log_p))
        if self._measures() or self.arm.weight:
            self._before = {side: snapshot(parameters) for side, parameters in self.sides.items()}
        for log_q in former:
            value = value - self.arm.weight * divergence(log_p, log_q).to(value)
        return value

    def _exact(self, batch: dict[str, Tensor], log_p: Tensor) -> Tensor:
        """log p without autocast: what half precision rounds off is as large as what one step moves."""
        kind = log_p.device.type
        if not torch.is_autocast_enabled(kind):
            return log_p.detach()
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return log_probabilities(self.model, batch)[1]

    def _former(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """log p of this batch with the weights of a step ago, of each side in turn or of both."""
        if not (self.arm.weight and self._before):
            return []
        groups = [(side,) for side in SIDES] if self.settings.reward == "each side" else [SIDES]
        chosen = ({side: self._before[side] for side in group} for group in groups)
        return [log_probabilities_with(self.model, batch, self.sides, values) for values in chosen]

    def _measures(self) -> bool:
        return self.step % self.settings.measure_every == 0

    def after_step(self, step: int) -> None:
        """Measures κ, and every so many steps lets the arm's signal change the rates."""
        if self._measures():
            self._measure()
        self.step = step
        if self.smooth is not None and step % self.settings.adjust_every == 0:
            self.rates = self._adjusted(self.smooth)

    def _measure(self) -> None:
        assert self._said is not None
        found = divergences(self.model, self._said[0], self.sides, self._before, self._said[1])
        norms = {side: gradient_norm(parameters) for side, parameters in self.sides.items()}
        self.measured.append({"step": self.step + 1, **found})
        back = "_back" if self.settings.divergence == "old from new" else ""
        signal = norms if self.arm.signal == "norms" else {side: found[side + back] for side in SIDES}
        log_kappa = log_balance(signal[LANGUAGE], signal[ENCODER])
        last, share = self.smooth, self.settings.smoothing
        self.smooth = log_kappa if last is None else share * last + (1 - share) * log_kappa

    def _adjusted(self, smooth: float) -> Rates:
        """The next rates by κ̄; its sign drawn by chance; or inverse to the gradients' norms, whatever the start."""
        first, settings = rates_at(self.rate, self.arm.start), self.settings
        match self.arm.signal:
            case "balance":
                given = self.rates if settings.rule == "last rates" else first
                return rebalanced(given, smooth, settings.gamma, settings.limit)
            case "chance":
                return rebalanced(self.rates, self._random.choice([-1, 1]) * smooth, settings.gamma, settings.limit)
            case "norms":
                return rebalanced(rates_at(self.rate, 1.0), smooth, 0.5, settings.limit)
        return self.rates
