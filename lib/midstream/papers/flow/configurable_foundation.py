"""Feed-forward neurons that serve one function can be found and switched off; bricks made of LoRA are routed and grown.

Reference: Xiao et al., "Configurable Foundation Models: Building LLMs from a Modular Perspective", 2024, arXiv
2409.02877. Its section 4 measures emergent bricks; its survey names the four operations on customized bricks.

Glossary (symbol → name here → shape → where)
    a_i         activations         (batch, tokens, neurons) = σ(W_G x)_i · (W_I x)_i; σ(W_I x)_i without a gate   4.1
    ‖a_i W_O‖   magnitudes          (batch, tokens, neurons) = |a_i| · ‖W_O[:, i]‖₂, the size of what neuron i adds 4.1
    k           level               share of a token's neurons in a layer that are masked, the lowest first         4.1
    FuncScore   func_scores         (functions, layers, neurons), average precision of the mean |a_i| over a text's
                                    tokens against "this text is of function f"                                    4.2
    top 5 %     partitions          (functions, layers, neurons) of booleans                                        4.2
    ΔPPL/PPL    relative_increase   of texts of one function, the top 5 % of another function silenced              4.2
    overlap     overlap             |P_f ∩ P_g| / |P_f|, averaged over layers; 0.05 for sets drawn at random         4.3

Deviations
    - Llama-3-8B-Instruct and Mistral-7B-Instruct read 1,000 labelled Infinity-Instruct prompts for each of seven
      functions. Here SmolLM2-135M-Instruct reads plain text of five kinds that are at hand (`data.kinds_of_text`).
      "Function" therefore means a kind of text: nothing is said about knowledge, ethics or translation as a skill.
    - Texts are windows of equal length behind one start token, which is left out of every mean: the first position
      carries a few enormous activations whatever the text. Perplexity is that of the windows, not of responses.
    - The share of a layer's neurons below 0.2 takes each indicator relative to the token's largest in that layer; by
      what the paper normalises was not read (inferred).
    - Neurons that are silenced: the top 5 % of each layer by FuncScore, residents left out. Whether the paper takes
      them per layer or over all layers, and what counts as resident, was not read (inferred): `variants` has both
      scopes, and residents kept. Resident here: among a layer's 5 % largest mean magnitudes on every function.
    - Added: FuncScores of shuffled labels everywhere (labels exclude one another, which alone brings overlaps below
      5 %), the score of each layer's best neuron on texts that did not choose it, random neurons as a control, and the
      English Declaration of Human Rights as a text with the content, but not the language, of the Romance one.
    - The paper's four operations are a survey without measurements of its own. They are shown here with LoRA bricks on
      the last blocks, each beside what undoes it; thresholds are ours. Bricks share one learning rate and the single
      adapter has one of its own, both chosen on held-out training windows of each seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import Tensor

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control, PaperNumber
from midstream.data.kinds_of_text import KINDS, windows
from midstream.hooks import read, sites
from midstream.hooks.neurons import neurons, output_weights
from midstream.measure import paired_interval, t_interval
from midstream.measure.ranking import average_precision
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule
from midstream.train.bricks import Bricks, token_losses

Indicator = Literal["activation", "magnitude", "random"]
Variant = Literal["layer", "layer, residents kept", "global"]

CONTENT = "declaration"
"""Tested only: what the Romance texts say, in English."""
NOTATION = "notation"
"""What the arithmetic brick is updated to."""
ALMOST_FREE = 0.1
"""Nats a token: masking that costs less counts as almost free; a tenth more perplexity."""

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field(
        "smollm2", min_length=1, description="a causal language model: packaged, tiny:…, folder or Hub id"
    )
    functions: tuple[str, ...] = Field(
        ("python", "arithmetic", "romance"),
        min_length=3,
        description="kinds of text; the first two get bricks, the third is grown later",
    )
    tokens: int = Field(16, ge=8, le=4096, description="tokens in a window")
    n_score: int = Field(6, ge=4, le=100, description="windows per function and seed that neurons are scored on")
    n_test: int = Field(2, ge=2, le=25, description="other windows per function and seed that everything is tested on")
    n_masked: int = Field(1, ge=1, le=25, description="of these, how many the masking is tested on")
    levels: tuple[float, ...] = Field((0.7, 0.8), min_length=2, description="shares of masked neurons; 0.7 and 0.8 too")
    share: float = Field(0.05, gt=0, lt=0.5, description="share of a layer's neurons that make up a partition")
    variants: tuple[Variant, ...] = Field(("layer",), min_length=1, description="how silenced neurons are chosen")
    brick_layers: int = Field(6, ge=1, le=200, description="how many last blocks a brick sits on")
    rank: int = Field(4, ge=1, le=512, description="rank of one brick")
    brick_steps: int = Field(3, ge=1, le=100_000, description="training steps of one brick")
    brick_batch: int = Field(2, ge=1, le=1024, description="windows in a training batch")
    brick_rates: tuple[float, ...] = Field((5e-3,), min_length=1, description="AdamW's peak rates tried for adapters")
    batch_size: int = Field(16, ge=1, le=1024, description="windows read at once")

    @field_validator("functions")
    @classmethod
    def _known_functions(cls, functions: tuple[str, ...]) -> tuple[str, ...]:
        for function in functions:
            if function not in KINDS or function in (CONTENT, NOTATION):
                usable = ", ".join(kind for kind in KINDS if kind not in (CONTENT, NOTATION))
                raise ValueError(f"unknown function '{function}'; there are {usable}")
        if len(set(functions)) < len(functions) or functions[1] != "arithmetic":
            raise ValueError("functions must differ, and the second must be arithmetic, whose notation is updated")
        return functions

    @field_validator("variants")
    @classmethod
    def _claimed_variant(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if variants[0] != "layer":
            raise ValueError("the first variant must be 'layer', which the claims are about")
        return variants

    @field_validator("levels")
    @classmethod
    def _claimed_levels(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if not {0.7, 0.8} <= set(levels) or not all(0 < level < 1 for level in levels):
            raise ValueError("levels must lie between 0 and 1 and include 0.7 and 0.8, which the claims are about")
        return levels


_FULL = Params(
    n_seeds=4,
    functions=("python", "arithmetic", "romance", "reviews", "docstrings"),
    tokens=24,
    n_score=24,
    n_test=4,
    n_masked=2,
    levels=(0.5, 0.7, 0.8, 0.9),
    variants=("layer", "layer, residents kept", "global"),
    brick_steps=10,
    brick_batch=4,
    brick_rates=(2e-3, 5e-3, 1e-2),
)
_PAPER = _FULL.model_copy(
    update={
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "tokens": 64,
        "n_score": 96,
        "n_test": 20,
        "n_masked": 20,
        "brick_steps": 60,
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "three functions, three seeds: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(
        _FULL, "five functions, four seeds, three ways to choose: settle the claims", minutes=12, memory_gib=6
    ),
    "paper": Preset(
        _PAPER,
        "the paper's first model on our functions",
        minutes=60,
        memory_gib=40,
        needs=(
            "Llama-3-8B-Instruct from the Hub, a GPU with 40 GiB, and for the paper's numbers also 7,000 "
            "Infinity-Instruct prompts labelled by function"
        ),
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of the model and of every data set a run loads."""
    sources = {KINDS[kind].source for kind in (*params.functions, CONTENT)} - {""}
    return {params.model: zoo.revision(params.model), **{name: data.revision(name) for name in sorted(sources)}}


# ------------------------------------------------------------------------------------------ 4.1 sparse activation


def magnitudes(activations: Tensor, norms: Tensor) -> Tensor:
    """‖a_i W_O[:, i]‖₂ = |a_i| ‖W_O[:, i]‖₂ of activations (…, neurons), from the norms (neurons,)."""
    return activations.abs() * norms.to(activations)


def output_norms(model: Any) -> Tensor:
    """‖W_O[:, i]‖₂, (layers, neurons), on the CPU."""
    layers = range(len(sites(model).stack()))
    return torch.stack([output_weights(model, layer).float().norm(dim=1).cpu() for layer in layers])


def mask_lowest(activations: Tensor, indicator: Tensor, level: float) -> Tensor:
    """Activations with the `level` share of each token's lowest-indicator neurons set to zero; both (…, neurons)."""
    masked = round(level * activations.shape[-1])
    if not masked:
        return activations
    limit = indicator.kthvalue(masked, dim=-1, keepdim=True).values
    return activations.masked_fill(indicator <= limit, 0)


def masking(model: Any, by: Indicator, level: float, seed: int = 0) -> AbstractContextManager[None]:
    """Masks every token's lowest neurons in every layer, by |a|, by output magnitude, or, as a control, at random."""
    random = torch.Generator().manual_seed(seed)
    norms = output_norms(model)

    def indicator(activations: Tensor, layer: int) -> Tensor:
        if by == "random":
            return torch.rand(activations.shape, generator=random).to(activations.device)
        return magnitudes(activations, norms[layer]) if by == "magnitude" else activations.abs()

    return neurons(model, lambda a, layer: mask_lowest(a, indicator(a, layer), level))


def share_below(indicator: Tensor, limit: float = 0.2) -> Tensor:
    """The share of neurons whose indicator is under `limit` times their token's largest; (…, neurons) → (…)."""
    return (indicator < limit * indicator.amax(-1, keepdim=True)).float().mean(-1)


# --------------------------------------------------------------------------------- 4.2 functional specialisation


@dataclass(frozen=True)
class Seen:
    """What one reading of texts keeps of every window."""

    ids: Tensor
    """(windows, 1 + tokens), the start token first."""
    kinds: np.ndarray
    """(windows,) names of kinds."""
    mean_activations: Tensor
    """(windows, layers, neurons), mean |a| over a window's tokens."""
    first_half: Tensor
    """(windows, neurons), the same over the first half of the tokens in the last block without bricks."""
    stream: Tensor
    """(windows, 1 + tokens, width), what enters the first block with bricks."""
    losses: Tensor
    """(windows, tokens), nats of every token but the start."""
    below: dict[str, float]
    """Share of neurons under 0.2 of their token's largest, by indicator."""

    def of(self, kind: str) -> np.ndarray:
        """The indices of one kind's windows."""
        return np.flatnonzero(self.kinds == kind)


@torch.no_grad()
def look(model: Any, ids: Tensor, kinds: Sequence[str], first: int, batch: int) -> Seen:
    """Read texts once and keep what all parts of the experiment need; `first` is the first block with bricks."""
    norms = output_norms(model)
    means: list[list[Tensor]] = [[] for _ in norms]
    halves: list[Tensor] = []
    shares: dict[str, list[float]] = {"activation": [], "magnitude": []}
    half = 1 + (ids.shape[1] - 1) // 2

    def keep(activations: Tensor, layer: int) -> None:
        size = activations[:, 1:].abs().float()  # the start token tells nothing of the text
        means[layer].append(size.mean(1).cpu())
        if layer == max(0, first - 1):
            halves.append(size[:, : half - 1].mean(1).cpu())
        shares["activation"].append(float(share_below(size).mean()))
        shares["magnitude"].append(float(share_below(magnitudes(size, norms[layer])).mean()))

    streams, losses = [], []
    with neurons(model, keep), read(model, "in", [first]) as reading:
        for some in ids.split(batch):
            losses.append(token_losses(model, some).cpu())
            streams.append(reading[first].clone())
            reading.clear()
    activations = torch.stack([torch.cat(layer) for layer in means], 1)
    below = {name: float(np.mean(values)) for name, values in shares.items()}
    return Seen(ids, np.array(kinds), activations, torch.cat(halves), torch.cat(streams), torch.cat(losses), below)


def together(one: Seen, other: Seen) -> Seen:
    """Two readings as one."""
    names = ("ids", "mean_activations", "first_half", "stream", "losses")
    joined = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in names}
    return Seen(kinds=np.concatenate([one.kinds, other.kinds]), below=one.below, **joined)


def func_scores(mean_activations: Tensor, kinds: np.ndarray, functions: Sequence[str]) -> Tensor:
    """FuncScore (functions, layers, neurons) of mean activations (windows, layers, neurons); chance: prevalence."""
    labels = [torch.tensor(kinds == function) for function in functions]
    by_layer = [
        torch.stack([average_precision(mean_activations[:, layer], label) for label in labels])
        for layer in range(mean_activations.shape[1])
    ]
    return torch.stack(by_layer, 1)


def residents(seen: Seen, norms: Tensor, functions: Sequence[str], share: float) -> Tensor:
    """Neurons (layers, neurons) among a layer's largest mean magnitudes on every function; `norms` has that shape."""
    size = torch.stack([magnitudes(seen.mean_activations[seen.of(function)].mean(0), norms) for function in functions])
    limit = size.topk(_count(size.shape[-1], share), dim=-1).values[..., -1:]
    return (size >= limit).all(0)


def partitions(scores: Tensor, eligible: Tensor, share: float, scope: str = "layer") -> Tensor:
    """The top `share` of neurons of each function, booleans (functions, layers, neurons).

    `eligible` (layers, neurons) may be chosen. With scope `layer` every layer gives its own share, with `global` the
    same number is taken wherever scores (functions, layers, neurons) are highest.
    """
    candidates = scores.masked_fill(~eligible, -math.inf)
    rows = candidates if scope == "layer" else candidates.flatten(1)
    best = rows.topk(_count(rows.shape[-1], share), dim=-1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, best, True).reshape(scores.shape)


def _count(neurons: int, share: float) -> int:
    return max(1, math.ceil(share * neurons))


def silence(model: Any, chosen: Tensor) -> AbstractContextManager[None]:
    """Sets the activations of chosen neurons (layers, neurons) to zero."""
    return neurons(model, lambda activations, layer: activations.masked_fill(chosen[layer].to(activations.device), 0))


def relative_increase(nats: float | np.ndarray) -> Any:
    """(PPL_pruned − PPL) / PPL from the difference of mean losses, in nats."""
    return np.expm1(nats)


# ------------------------------------------------------------------------------------ 4.3 functional partitions


def overlap(sets: Tensor) -> Tensor:
    """|P_f ∩ P_g| / |P_f| averaged over layers, (functions, functions), of partitions (functions, layers, neurons)."""
    members = sets.float()
    shared = torch.einsum("fln,gln->fgl", members, members)
    return (shared / members.sum(-1)[:, None, :]).mean(-1)


# ----------------------------------------------------------------------------------------- routing between bricks


@dataclass(frozen=True)
class Router:
    """Nearest class mean by cosine, on activations of emergent neurons: a classifier that needs no training."""

    centre: Tensor
    means: Tensor
    kinds: tuple[str, ...]

    @classmethod
    def fit(cls, features: Tensor, kinds: np.ndarray) -> Router:
        """From features (windows, neurons) and their kinds."""
        names = tuple(dict.fromkeys(kinds.tolist()))
        means = torch.stack([features[torch.tensor(kinds == name)].mean(0) for name in names])
        return cls(means.mean(0), means - means.mean(0), names)

    def __call__(self, features: Tensor) -> np.ndarray:
        """The kind of each row of features (windows, neurons)."""
        centred = torch.nn.functional.normalize(features - self.centre, dim=-1)
        nearest = (centred @ torch.nn.functional.normalize(self.means, dim=-1).T).argmax(-1)
        return np.array(self.kinds)[nearest.numpy()]


# -------------------------------------------------------------------------------------------------- the experiment


@dataclass
class Bench:
    """One seed's texts as the unchanged model reads them."""

    loaded: Any
    params: Params
    seed: int
    first: int
    norms: Tensor
    scoring: Seen
    test: Seen

    @property
    def model(self) -> Any:
        """The model."""
        return self.loaded.model

    def randomness(self, purpose: int) -> np.random.Generator:
        """A generator of this seed for one purpose, independent of the others."""
        return np.random.default_rng((self.seed, purpose))

    def shuffled(self) -> np.ndarray:
        """The scoring windows' kinds, dealt out anew."""
        return self.randomness(1).permutation(self.scoring.kinds)

    def losses(self, ids: Tensor) -> Tensor:
        """Losses (windows, tokens) of whole forwards, whatever hooks are open."""
        with torch.no_grad():
            return torch.cat([token_losses(self.model, some).cpu() for some in ids.split(self.params.batch_size)])


def see(
    loaded: Any,
    kinds: Sequence[str],
    split: Literal["train", "test"],
    count: int,
    first: int,
    params: Params,
    seed: int,
) -> Seen:
    """Draws windows of several kinds and reads them."""
    tokenizer = loaded.tokenizer
    start = next(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if t is not None)
    texts = torch.cat([windows(kind, split, count, params.tokens, tokenizer, seed) for kind in kinds])
    ids = torch.nn.functional.pad(texts, (1, 0), value=start)
    return look(loaded.model, ids, np.repeat(kinds, count).tolist(), first, params.batch_size)


def prepare(loaded: Any, params: Params, seed: int) -> Bench:
    """Draws a seed's texts, scoring ones from training files and testing ones from test files, and reads them."""
    first = max(0, len(sites(loaded.model).stack()) - params.brick_layers)
    scoring = see(loaded, params.functions, "train", params.n_score, first, params, seed)
    test = see(loaded, (*params.functions, CONTENT), "test", params.n_test, first, params, seed)
    return Bench(loaded, params, seed, first, output_norms(loaded.model), scoring, test)


def run_sparsity(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of nats lost by masking each share of neurons by each indicator."""
    chosen = np.concatenate([bench.test.of(function)[: bench.params.n_masked] for function in bench.params.functions])
    ids, plain = bench.test.ids[chosen], float(bench.test.losses[chosen].mean())
    indicators: tuple[Indicator, ...] = ("activation", "magnitude", "random")
    for indicator in indicators:
        for level in bench.params.levels:
            with masking(bench.model, indicator, level, bench.seed):
                yield {"indicator": indicator, "level": level, "nats": float(bench.losses(ids).mean()) - plain}


def run_indicators(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of the share of neurons under 0.2 of their token's largest; also for normal numbers, as a comparison."""
    normal = torch.tensor(bench.randomness(2).standard_normal((64, bench.norms.shape[1]))).abs()
    for indicator, share in {**bench.test.below, "gaussian": float(share_below(normal).mean())}.items():
        yield {"indicator": indicator, "below": share}


def run_scores(bench: Bench, scores: Tensor, labels: str) -> Iterator[dict[str, Any]]:
    """Rows of each layer's best FuncScore, and of the same neuron's score on test windows, which did not choose it."""
    functions = bench.params.functions
    inside = np.isin(bench.test.kinds, functions)
    kinds = bench.test.kinds[inside] if labels == "true" else bench.randomness(3).permutation(bench.test.kinds[inside])
    again = func_scores(bench.test.mean_activations[inside], kinds, functions)
    for f, function in enumerate(functions):
        best, winner = scores[f].max(-1)
        held_out = again[f].gather(-1, winner[:, None])[:, 0]
        for layer, (value, other) in enumerate(zip(best.tolist(), held_out.tolist(), strict=True)):
            yield {"labels": labels, "function": function, "layer": layer, "best": value, "held_out": other}


def run_overlap(bench: Bench, scores: Tensor, labels: str) -> Iterator[dict[str, Any]]:
    """Rows of the overlap of every ordered pair of partitions, residents included as in the definition."""
    everyone = torch.ones(scores.shape[1:], dtype=torch.bool)
    matrix = overlap(partitions(scores, everyone, bench.params.share))
    functions = bench.params.functions
    for f, g in np.argwhere(~np.eye(len(functions), dtype=bool)):
        yield {"labels": labels, "a": functions[f], "b": functions[g], "overlap": float(matrix[f, g])}


def run_pruning(bench: Bench, scores: Tensor) -> Iterator[dict[str, Any]]:
    """Rows of nats lost on every kind of test text when one function's neurons, or random ones, are silenced."""
    lasting = residents(bench.scoring, bench.norms, bench.params.functions, bench.params.share)
    everyone = torch.ones_like(lasting)
    random = torch.tensor(bench.randomness(4).random((1, *lasting.shape)))
    for variant in bench.params.variants:
        eligible = everyone if variant == "layer, residents kept" else ~lasting
        scope = "global" if variant == "global" else "layer"
        sets = dict(zip(bench.params.functions, partitions(scores, eligible, bench.params.share, scope), strict=True))
        if variant == bench.params.variants[0]:
            sets["random"] = partitions(random, eligible, bench.params.share, scope)[0]
        for pruned, chosen in sets.items():
            with silence(bench.model, chosen):
                lost = (bench.losses(bench.test.ids) - bench.test.losses).mean(1).numpy()
            for kind in dict.fromkeys(bench.test.kinds.tolist()):
                yield {
                    "variant": variant,
                    "pruned": pruned,
                    "text": kind,
                    "nats": float(lost[bench.test.of(kind)].mean()),
                }


# ----------------------------------------------------------------------------- the four operations, with LoRA bricks


BRICK, SINGLE, TRIAL = "brick", "single", "trial"
HELD_OUT = 4
"""One training window in so many is held out where rates are chosen."""


@dataclass
class Workshop:
    """What the operations share: bricks, training texts, test texts, and the loss of each test text in each arm."""

    bench: Bench
    bricks: Bricks
    train: dict[str, tuple[Tensor, Tensor]]
    """Ids and stream of each kind."""
    test: Seen
    router: Router
    losses: dict[str | None, Tensor]
    """(windows,) nats a token over the second half of each test window, by brick; None is the bare model."""
    rates: dict[str, float] = field(default_factory=dict)
    """The rate of bricks and of the single adapter."""

    def try_rate(self, kinds: Sequence[str], rate: float) -> float:
        """Nats a token of held-out training windows under an adapter for some kinds; takes out every adapter."""
        params, seed = self.bench.params, self.bench.seed
        ids, stream = (torch.cat(halves) for halves in zip(*map(self.train.__getitem__, kinds), strict=True))
        held = torch.arange(len(ids)) % HELD_OUT == 0
        self.bricks.add(TRIAL, seed, rank=len(kinds) * self.bricks.rank)
        schedule = Schedule(len(kinds) * params.brick_steps, rate, weight_decay=0.0)
        self.bricks.train(TRIAL, ids[~held], stream[~held], schedule, params.brick_batch, seed)
        losses = self.bricks.losses(TRIAL, ids[held], stream[held], params.batch_size)
        self.bricks.unload()
        return float(losses[:, losses.shape[1] // 2 :].mean())

    def choose_rates(self) -> None:
        """For bricks, and for the single adapter, the rate after which held-out training windows lose least."""
        rates = self.bench.params.brick_rates
        self.rates = dict.fromkeys((BRICK, SINGLE), rates[0])
        if len(rates) == 1:
            return
        one, two = self.bench.params.functions[:2]
        for arm, jobs in ((BRICK, [(one,), (two,)]), (SINGLE, [(one, two)])):
            lost = {rate: sum(self.try_rate(job, rate) for job in jobs) for rate in rates}
            self.rates[arm] = min(rates, key=lost.__getitem__)

    def learn(self, name: str, *pools: str, steps: int = 1, replay: Sequence[str] = ()) -> None:
        """Trains on kinds of text for `steps` times a brick's steps; replayed kinds together count as one."""
        params = self.bench.params
        parts = [self.train[kind] for kind in pools]
        parts += [(ids[:: len(replay)], stream[:: len(replay)]) for ids, stream in map(self.train.__getitem__, replay)]
        ids, stream = (torch.cat(halves) for halves in zip(*parts, strict=True))
        rate = self.rates[SINGLE if name.startswith(SINGLE) else BRICK]
        schedule = Schedule(steps * params.brick_steps, rate, weight_decay=0.0)
        self.bricks.train(name, ids, stream, schedule, params.brick_batch, self.bench.seed)
        self.measure(name)

    def measure(self, name: str | None) -> None:
        """Notes the losses of all test windows under one brick."""
        losses = self.bricks.losses(name, self.test.ids, self.test.stream, self.bench.params.batch_size)
        self.losses[name] = losses[:, losses.shape[1] // 2 :].mean(1)

    def routed(self, routes: Sequence[str | None]) -> Tensor:
        """The loss of each test window (windows,) under the brick it is sent to."""
        return torch.stack([self.losses[brick][i] for i, brick in enumerate(routes)])


def workshop(bench: Bench) -> Workshop:
    """Reads the new notation too, and fits the router on the first halves of the training windows."""
    params, loaded = bench.params, bench.loaded
    new = see(loaded, [NOTATION], "train", params.n_score, bench.first, params, bench.seed)
    test = together(bench.test, see(loaded, [NOTATION], "test", params.n_test, bench.first, params, bench.seed))
    train = {
        k: (seen.ids[seen.of(k)], seen.stream[seen.of(k)]) for seen in (bench.scoring, new) for k in set(seen.kinds)
    }
    features = torch.cat([bench.scoring.first_half, new.first_half])
    router = Router.fit(features, np.concatenate([bench.scoring.kinds, new.kinds]))
    return Workshop(bench, Bricks(loaded.model, bench.first, params.rank), train, test, router, {})


def train_all(shop: Workshop) -> None:
    """Two bricks and, with as many parameters and steps together, one adapter; then each updated and grown."""
    one, two, grown = shop.bench.params.functions[:3]
    bricks, seed = shop.bricks, shop.bench.seed
    shop.measure(None)
    shop.choose_rates()
    for kind in (one, two, grown):
        bricks.add(kind, seed)
        shop.learn(kind, kind)
    bricks.add(SINGLE, seed, rank=2 * bricks.rank)
    shop.learn(SINGLE, one, two, steps=2)
    bricks.copy(two, "updated")
    shop.learn("updated", NOTATION)
    for after, kind in (("updated", NOTATION), ("grown", grown)):
        for name, replay in ((f"{SINGLE}_{after}", ()), (f"{SINGLE}_{after}_replay", (one, two))):
            bricks.copy(SINGLE, name)
            shop.learn(name, kind, replay=replay)
    for name, weight in (("merged", 0.5), ("merged_sum", 1.0), ("scrambled", 0.5)):
        bricks.merge([one, two], [weight, weight], name)
        if name == "scrambled":
            bricks.scramble(name, seed)
        shop.measure(name)


def arms_of(shop: Workshop) -> dict[str, Tensor]:
    """The loss of every test window in every arm: each brick for all texts, and texts sent to bricks by the router."""
    one, two, grown = shop.bench.params.functions[:3]
    said = shop.router(shop.test.first_half)
    first = {one: one, two: two, NOTATION: two}
    tables = {
        "routed": first,
        "routed_updated": {**first, two: "updated", NOTATION: "updated"},
        "routed_grown": {**first, grown: grown},
    }
    arms = {"base" if name is None else name: losses for name, losses in shop.losses.items()}
    arms |= {arm: shop.routed([table.get(kind) for kind in said]) for arm, table in tables.items()}
    dealt = shop.bench.randomness(5).permutation(said)
    arms["misrouted"] = shop.routed([first.get(kind) for kind in dealt])
    arms["oracle"] = shop.routed([first.get(kind) for kind in shop.test.kinds.tolist()])
    return arms


def run_operations(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Rows of nats a token by arm and kind of text, of the router's accuracy by kind, and of the rates chosen."""
    shop = workshop(bench)
    try:
        train_all(shop)
    finally:
        shop.bricks.unload()
    said = shop.router(shop.test.first_half)
    kinds = tuple(dict.fromkeys(shop.test.kinds.tolist()))
    operations = [
        {"arm": arm, "text": kind, "nats": float(losses[shop.test.of(kind)].mean())}
        for arm, losses in arms_of(shop).items()
        for kind in kinds
    ]
    routes = [{"text": kind, "right": float((said[shop.test.of(kind)] == kind).mean())} for kind in shop.router.kinds]
    rates = [{"arm": arm, "rate": rate} for arm, rate in shop.rates.items()]
    return {"operations": operations, "routes": routes, "rates": rates}


def experiment(params: Params) -> Result:
    """Runs every part on every seed; tables have one row a seed and arm."""
    loaded = zoo.load(params.model, device="auto")
    loaded.model.requires_grad_(False)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in params.seeds:
        bench = prepare(loaded, params, seed)
        scoring = bench.scoring
        scores = {
            "true": func_scores(scoring.mean_activations, scoring.kinds, params.functions),
            "shuffled": func_scores(scoring.mean_activations, bench.shuffled(), params.functions),
        }
        parts: dict[str, Any] = {
            "sparsity": run_sparsity(bench),
            "indicators": run_indicators(bench),
            "scores": (row for labels, of in scores.items() for row in run_scores(bench, of, labels)),
            "overlap": (row for labels, of in scores.items() for row in run_overlap(bench, of, labels)),
            "pruning": run_pruning(bench, scores["true"]),
        }
        lasting = residents(scoring, bench.norms, params.functions, params.share)
        parts["residents"] = [{"share": float(lasting.float().mean())}]
        for name, part in (parts | run_operations(bench)).items():
            rows.setdefault(name, []).extend({"seed": seed, **row} for row in part)
        layers, count = bench.norms.shape
    tables = {name: pd.DataFrame(entries) for name, entries in rows.items()}
    return Result(tables, {"layers": layers, "neurons": count, "share": params.share})


# ----------------------------------------------------------------------------------------------------- the claims

SPECIAL = ("python", "arithmetic", "romance")
"""What stands for the paper's coding, mathematics and translation."""


def per_seed(table: pd.DataFrame, value: str, **where: Any) -> pd.Series:
    """Mean of a column for each seed, over whatever is left after `column=value` filters."""
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    return table.groupby("seed")[value].mean()


def check_sparse(result: Result) -> tuple[Comparison, ...]:
    """Most neurons are small beside their token's largest, and masking most of them costs almost nothing."""
    masked, shares = result.tables["sparsity"], result.tables["indicators"]
    return (
        Comparison(
            "share of neurons with |a| under 0.2 of the largest",
            t_interval(per_seed(shares, "below", indicator="activation")),
            threshold=0.8,
        ),
        *(
            Comparison(
                f"nats a token lost by masking {level:.0%} by {indicator}",
                t_interval(per_seed(masked, "nats", indicator=indicator, level=level)),
                side="below",
                threshold=ALMOST_FREE,
            )
            for indicator, level in (("activation", 0.7), ("magnitude", 0.8))
        ),
    )


def check_magnitude(result: Result) -> tuple[Comparison, ...]:
    """At equal levels, masking by output magnitude costs less than masking by activation; mean over levels."""
    table = result.tables["sparsity"]
    saved = paired_interval(
        per_seed(table, "nats", indicator="activation"), per_seed(table, "nats", indicator="magnitude")
    )
    return (Comparison("nats a token, activation − magnitude, mean over levels", saved),)


def layers_above(scores: pd.DataFrame, limit: float = 0.8) -> pd.Series:
    """For each seed, the share of layers whose best neuron scores above a limit, of the weakest special function."""
    above = scores[scores["function"].isin(SPECIAL)].assign(above=lambda table: table["best"] > limit)
    return above.groupby(["seed", "function"])["above"].mean().groupby("seed").min()


def check_specialised(result: Result) -> tuple[Comparison, ...]:
    """In most layers some neuron tells each function, far better than shuffled labels allow, also on other texts."""
    table = result.tables["scores"]
    special = table[table["function"].isin(SPECIAL)]
    true, shuffled = (special[special["labels"] == labels] for labels in ("true", "shuffled"))
    return (
        Comparison(
            "share of layers with a best FuncScore above 0.8, weakest function",
            t_interval(layers_above(true)),
            threshold=0.5,
        ),
        *(
            Comparison(f"{what}, true − shuffled labels", paired_interval(per_seed(true, of), per_seed(shuffled, of)))
            for what, of in (("best FuncScore", "best"), ("the same neurons on test texts", "held_out"))
        ),
    )


def diagonal(pruning: pd.DataFrame, variant: str) -> pd.DataFrame:
    """By seed and function: nats lost on its texts by silencing its own neurons, others' (mean), and random ones."""
    table = pruning[pruning["variant"] == variant]
    functions = sorted(set(table["pruned"]) - {"random"})
    rows = []
    for (seed, text), part in table[table["text"].isin(functions)].groupby(["seed", "text"]):
        lost = dict(zip(part["pruned"], part["nats"], strict=True))
        others = [nats for pruned, nats in lost.items() if pruned not in (text, "random")]
        means = {"own": lost[text], "others": float(np.mean(others)), "random": lost.get("random")}
        rows.append({"seed": seed, "text": text, **means})
    return pd.DataFrame(rows)


def check_pruning(result: Result) -> tuple[Comparison, ...]:
    """Silencing a function's neurons costs that function more than silencing other functions' or random ones does."""
    by_seed = diagonal(result.tables["pruning"], "layer").groupby("seed")[["own", "others", "random"]].mean()
    return tuple(
        Comparison(f"nats a token lost, own neurons − {what}", paired_interval(by_seed["own"], by_seed[other]))
        for what, other in (("other functions'", "others"), ("random ones", "random"))
    )


def check_partition(result: Result) -> tuple[Comparison, ...]:
    """Partitions share fewer neurons than chance, and fewer than labels that merely exclude one another bring about."""
    table = result.tables["overlap"]
    true, shuffled = (per_seed(table, "overlap", labels=labels) for labels in ("true", "shuffled"))
    return (
        Comparison("mean overlap of two partitions", t_interval(true), "below", result.scalars["share"]),
        Comparison("mean overlap, true − shuffled labels", paired_interval(true, shuffled), "below"),
    )


def nats(result: Result, arm: str, texts: Sequence[str]) -> pd.Series:
    """Mean loss of an arm over kinds of text, for each seed."""
    table = result.tables["operations"]
    return per_seed(table[table["text"].isin(texts)], "nats", arm=arm)


def _roles(result: Result) -> tuple[str, str, str, list[str]]:
    """The two functions with bricks, the grown one, and all that the router knew before the update."""
    functions = [kind for kind in result.tables["routes"]["text"].drop_duplicates() if kind != NOTATION]
    return functions[0], functions[1], functions[2], functions


def check_routing(result: Result) -> tuple[Comparison, ...]:
    """Sending texts to the brick their neurons call for beats no brick, one brick for all, and dealt-out routes."""
    one, two, _, every = _roles(result)
    routed = nats(result, "routed", every)
    best_single = pd.concat([nats(result, arm, every) for arm in (one, two)], axis=1).min(axis=1)
    return tuple(
        Comparison(f"nats a token gained over {what}", paired_interval(other, routed))
        for what, other in (
            ("no brick", nats(result, "base", every)),
            ("the better brick for all texts", best_single),
            ("the same routes dealt out at random", nats(result, "misrouted", every)),
        )
    )


def check_merging(result: Result) -> tuple[Comparison, ...]:
    """The mean of two bricks' updates serves both functions, the worse served too; not because of its size alone."""
    one, two, *_ = _roles(result)
    first, second = (nats(result, "base", [kind]) - nats(result, "merged", [kind]) for kind in (one, two))
    both = [one, two]
    return (
        Comparison("nats a token gained over no brick, worse served function", t_interval(np.minimum(first, second))),
        Comparison(
            "nats a token gained over the scrambled brick",
            paired_interval(nats(result, "scrambled", both), nats(result, "merged", both)),
        ),
    )


def change(result: Result, after: str, before: str, new: Sequence[str], old: Sequence[str]) -> pd.DataFrame:
    """By seed: nats gained on new texts and lost on old ones between two arms."""
    gained = nats(result, before, new) - nats(result, after, new)
    lost = nats(result, after, old) - nats(result, before, old)
    return pd.DataFrame({"gained": gained, "lost": lost})


def _check_change(result: Result, after: str, new: Sequence[str], old: Sequence[str]) -> tuple[Comparison, ...]:
    bricks = change(result, f"routed_{after}", "routed", new, old)
    single = change(result, f"single_{after}", "single", new, old)
    replay = change(result, f"single_{after}_replay", "single", new, old)
    return (
        Comparison("nats a token gained on the new texts", t_interval(bricks["gained"])),
        Comparison("nats lost on the old texts, one adapter − bricks", paired_interval(single["lost"], bricks["lost"])),
        Comparison(
            "gained − lost, bricks − one adapter that replays old texts",
            paired_interval(bricks["gained"] - bricks["lost"], replay["gained"] - replay["lost"]),
        ),
    )


def check_updating(result: Result) -> tuple[Comparison, ...]:
    """Updating one brick serves the new notation and leaves the other function alone, unlike one adapter for all."""
    one, *_ = _roles(result)
    return _check_change(result, "updated", [NOTATION], [one])


def check_growing(result: Result) -> tuple[Comparison, ...]:
    """A new brick serves a new function and leaves the earlier ones alone, unlike one adapter for all."""
    one, two, grown, _ = _roles(result)
    return _check_change(result, "grown", [grown], [one, two])


def _swap(table: str, column: str, **pairs: str) -> Callable[[Result], Result]:
    """A control in which arms trade places."""

    def apply(result: Result) -> Result:
        frame = result.tables[table].copy()
        frame[column] = frame[column].replace(pairs | {other: one for one, other in pairs.items()})
        return result.with_table(table, frame)

    return apply


def _random_masks(result: Result) -> Result:
    frame = result.tables["sparsity"]
    random = frame[frame["indicator"] == "random"]
    return result.with_table(
        "sparsity", pd.concat([random.assign(indicator=name) for name in ("activation", "magnitude", "random")])
    )


def _turned_rows(result: Result) -> Result:
    """Each function's neurons under the next one's name."""
    frame = result.tables["pruning"].copy()
    functions = sorted(set(frame["pruned"]) - {"random"})
    following = dict(zip(functions, functions[1:] + functions[:1], strict=True))
    frame["pruned"] = frame["pruned"].replace(following)
    return result.with_table("pruning", frame)


def _paper(what: str, value: float) -> PaperNumber:
    """A cell of the paper's pruning matrix; our texts are not its prompts, so no run here can attempt it."""
    setting = "Llama-3-8B-Instruct, 1,000 Infinity-Instruct prompts a function, top 5 % of neurons silenced"
    return PaperNumber(what, value, setting, "pruning matrix of section 4", 10.0, "%")


CLAIMS: list[Claim] = [
    Claim(
        "sparse",
        "Most neurons of a feed-forward layer matter little for a given token: 70 % can be masked by activation, or "
        "80 % by output magnitude, almost for free.",
        (),
        check_sparse,
        Control("as many neurons masked at random", _random_masks),
        reported="80 % of neurons below 0.2; masking about 70 % (activation) or 80 % (magnitude) costs almost nothing",
    ),
    Claim(
        "magnitude",
        "The size of what a neuron adds tells better than its activation which neurons can be masked.",
        (),
        check_magnitude,
        Control("the two indicators trade places", _swap("sparsity", "indicator", activation="magnitude")),
        reported="figure: loss rises later when masking by output magnitude",
    ),
    Claim(
        "specialised",
        "In most layers there are neurons whose mean activation tells code, arithmetic and another language.",
        (),
        check_specialised,
        Control("shuffled labels stand in for the true ones", _swap("scores", "labels", true="shuffled")),
        reported="best scores of coding, mathematics and translation above 0.8 in most layers",
    ),
    Claim(
        "pruning",
        "Silencing the neurons of one function harms that function most.",
        (
            _paper("perplexity increase on coding, its own neurons silenced", 112.0),
            _paper("perplexity increase on mathematics, its own neurons silenced", 147.0),
            _paper("perplexity increase on translation, its own neurons silenced", 444.0),
            _paper("perplexity increase on writing, its own neurons silenced", 32.0),
        ),
        check_pruning,
        Control("each function's neurons under the next one's name", _turned_rows),
        reported="diagonal +112 % coding, +147 % mathematics, +444 % translation; off it mostly +3 to +25 %",
    ),
    Claim(
        "partition",
        "The partitions of different functions overlap less than chance, and less than exclusive labels alone explain.",
        (),
        check_partition,
        Control("shuffled labels stand in for the true ones", _swap("overlap", "labels", true="shuffled")),
        reported="overlaps mostly at most 0.04 where chance is 0.05",
    ),
    Claim(
        "routing",
        "A prompt's own neurons tell which brick it needs.",
        (),
        check_routing,
        Control("the routes dealt out at random", _swap("operations", "arm", routed="misrouted")),
        reported="survey; no number",
    ),
    Claim(
        "merging",
        "Two bricks merged into one serve both functions.",
        (),
        check_merging,
        Control("the scrambled brick stands in for the merged one", _swap("operations", "arm", merged="scrambled")),
        reported="survey; no number",
    ),
    Claim(
        "updating",
        "Updating one brick teaches it something new and leaves other functions alone.",
        (),
        check_updating,
        Control(
            "one adapter for everything stands in for the bricks",
            _swap("operations", "arm", routed="single", routed_updated="single_updated"),
        ),
        reported="survey; no number",
    ),
    Claim(
        "growing",
        "A new brick adds a function and leaves the earlier ones alone.",
        (),
        check_growing,
        Control(
            "one adapter for everything stands in for the bricks",
            _swap("operations", "arm", routed="single", routed_grown="single_grown"),
        ),
        reported="survey; no number",
    ),
]
