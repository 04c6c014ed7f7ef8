"""Two language models are compared on all inputs that one of them finds likely: how many differ, and by how much.

Reference: Liu et al., "Model-diff: A Tool for Comparative Study of Language Models in the Input Space", 2024,
arXiv 2412.12177. The formulas below come from its short summary and its public reviews: the paper's own equation
numbers, its sampler's details and its figures' values were not read.

Glossary (symbol → name here → shape)
    x               tokens           (inputs, length), a sequence after a prefix that all share
    z_A(x)          nll, own, z_a    (inputs,), -ln p_A(x) in nats
    X_A             space            {x : z⁻ ≤ z_A(x) < z⁺}; `log_size` is ln |X_A|
    D(x)            difference       z_A(x) − z_B(x): negative where A is the surer; A is always the original
    ρ_A(z)          log_counts       (bins,), ln of how many inputs have that z
    r(D | z)        representatives  a few inputs of each z bin, the only ones that B reads
    ρ_{A→B}(D)      log_weights      (representatives,), ln of how many inputs of X_A each of them stands for
    ρ_{B→A}(D)      the same, over X_B and with inputs drawn from B
    ESS             effective_sample_size    (Σ w)² / Σ w²

Deviations
    - Inputs are drawn by ancestral sampling at temperature 1, untruncated, and weighted by 1 / p_A(x) = exp(z_A(x)):
      importance sampling. The paper adds parallel tempering with histogram reweighting, which reaches rarer z; at this
      size it is not needed. Counts then have no unknown constant, so that the size of the common set X_A ∩ X_B, by
      which the paper joins its two views, becomes a check: both views must count the same.
    - Whether all inputs of a z bin share one weight (`bin`) or each has its own (`input`, unbiased), and whether both
      models share z⁻ and z⁺ (`shared`) or each has bounds that hold the same share of its own samples (`own`), is not
      known to us (inferred). All four are computed; `rule` and `bounds` say which one the claims read.
    - The paper compares GPT-2 and Llama models; here SmolLM2-135M stands against copies of itself. Copies are made
      once a run, so that seeds are draws of inputs, not of noise. Both samplers of a seed use the same random numbers.
    - Which copies an unrelated model is compared with: those whose loss on held-out texts is no farther from the
      original's than the unrelated model's, so that quality alone does not tell the two kinds apart (ours).
    - Human annotation is replaced by the source of a tiny world, which knows the true probability of every input.
    - An unrelated model with another tokenizer reads the text of an input, decoded; D is then between likelihoods of
      a token sequence and of its text, which differ by what the text's other tokenizations weigh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control
from midstream.data.markov import markov_source, source_batches, source_nll
from midstream.errors import RequestError
from midstream.measure import Interval, paired_interval, t_interval
from midstream.measure.input_space import draw, every_nll, every_sequence, index_of, read
from midstream.measure.likelihood import other_nll
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit
from midstream.train.copies import noised, pruned, small_llama, tuned
from midstream.train.language import next_token_loss

COPIES = ("noise", "prune", "tune")
"""Ways to derive a copy; each is written with its strength, as in `noise:0.1`."""
SCRATCH = "scratch"
"""A model trained here from random weights with the original's tokenizer, written with its steps: `scratch:60`."""
TINY_BATCH = 64
ANNOTATED_BINS = 6

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    vocabulary: int = Field(8, ge=3, le=16, description="tokens of the tiny world, whose inputs can be enumerated")
    tiny_length: int = Field(5, ge=3, le=8, description="tokens of an input of the tiny world")
    tiny_steps: tuple[int, int] = Field((90, 10), description="training steps of the tiny models A and B")
    tiny_space: tuple[float, float] = Field((1.0, 1.9), description="z⁻ and z⁺ in the tiny world, nats per token")
    sample_sizes: tuple[int, ...] = Field((256, 1024, 4096), min_length=2, description="inputs drawn, rising")
    repeats: int = Field(8, ge=1, le=1000, description="draws of every size, per seed")
    model: str = Field("smollm2", min_length=1, description="A: a causal language model, packaged or from the Hub")
    prefix: str = Field("<|endoftext|>", min_length=1, description="text that stands before every input")
    length: int = Field(8, ge=2, le=1024, description="tokens of an input")
    space: tuple[float, float] = Field((3.0, 4.0), description="z⁻ and z⁺, nats per token")
    n_samples: int = Field(48, ge=8, le=1_000_000, description="inputs drawn per seed and model")
    z_bins: int = Field(8, ge=1, le=1000, description="bins between z⁻ and z⁺")
    per_bin: int = Field(4, ge=1, le=1_000_000, description="representatives of a z bin, which the other models read")
    copies: tuple[str, ...] = Field(("noise:0.05", "noise:0.2"), min_length=1, description="B: copies derived from A")
    unrelated: tuple[str, ...] = Field(("scratch:20",), min_length=1, description="B: scratch:steps, or a model's name")
    views: tuple[str, ...] = Field(("noise:0.05",), min_length=1, description="copies that inputs are drawn from, too")
    corpus: str = Field("movies", description="texts for tuning, and held-out ones to judge every model by")
    tune_rate: float = Field(3e-5, gt=0, le=1, description="AdamW's peak rate for tuned copies")
    n_texts: int = Field(8, ge=1, le=100_000, description="held-out texts")
    batch_size: int = Field(64, ge=1, le=65_536, description="inputs drawn at once")
    rule: Literal["input", "bin", "none"] = Field("input", description="weights: each input's, its bin's, or none")
    bounds: Literal["shared", "own"] = Field("shared", description="z⁻ and z⁺: the same for A and B, or B's own")

    @field_validator("copies")
    @classmethod
    def _known_copies(cls, copies: tuple[str, ...]) -> tuple[str, ...]:
        for copy in copies:
            kind, _, strength = copy.partition(":")
            if kind not in COPIES or not strength.replace(".", "", 1).isdigit():
                raise ValueError(f"a copy is {', '.join(f'{kind}:STRENGTH' for kind in COPIES)}, not '{copy}'")
        return copies

    @model_validator(mode="after")
    def _views_are_copies(self) -> Params:
        if missing := set(self.views) - set(self.copies):
            raise ValueError(f"views are drawn from copies, and {', '.join(sorted(missing))} is not among them")
        if self.space[0] >= self.space[1] or self.tiny_space[0] >= self.tiny_space[1]:
            raise ValueError("z⁻ must lie below z⁺, in space and in tiny_space")
        return self


_FULL = Params(
    n_seeds=5,
    tiny_length=6,
    tiny_steps=(120, 12),
    sample_sizes=(256, 1024, 4096, 8192),
    repeats=4,
    length=16,
    space=(3.25, 3.75),
    n_samples=144,
    per_bin=8,
    copies=("noise:0.05", "noise:0.1", "noise:0.2", "prune:0.2", "prune:0.4", "tune:4"),
    unrelated=("scratch:60", "gemma3-270m"),
    views=("noise:0.05", "tune:4"),
    batch_size=144,
    n_texts=24,
)
_PAPER = _FULL.model_copy(
    update={
        "model": "openai-community/gpt2",
        "unrelated": ("openai-community/gpt2-medium", "distilbert/distilgpt2"),
        "length": 25,
        "n_samples": 100_000,
        "per_bin": 1000,
        "n_texts": 1000,
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "a tiny world and a few inputs: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "six copies, two unrelated models, five seeds: settle the claims", minutes=20, memory_gib=8),
    "paper": Preset(
        _PAPER,
        "one of the paper's families, GPT-2; lengths and sizes are inferred",
        minutes=600,
        memory_gib=24,
        needs="GPT-2, GPT-2-medium and DistilGPT2 from the Hub and a GPU with 24 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The revisions of A, of the texts, and of the unrelated models that are not trained here."""
    loaded = {name: zoo.revision(name) for name in (params.model, *params.unrelated) if not name.startswith(SCRATCH)}
    return loaded | {params.corpus: data.revision(params.corpus)}


# ------------------------------------------------------------------------------------------- counting by weights

RULES: dict[str, tuple[bool, bool]] = {"input": (True, True), "bin": (True, False), "none": (False, False)}
"""Whether z bins are de-weighted by exp(z), and whether inputs are within their bin; `none` is the control."""


def log_sum(logs: np.ndarray) -> float:
    """ln Σ exp(logs), without overflow; minus infinity of nothing."""
    top = logs.max(initial=-np.inf)
    return float(top + np.log(np.exp(logs - top).sum())) if np.isfinite(top) else -np.inf


def bin_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each value, or −1 outside; a bin holds its lower edge."""
    found = np.searchsorted(edges, values, side="right") - 1
    return np.where(found >= len(edges) - 1, -1, found)


def log_counts(nll: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """ln ρ_A(z): how many inputs each z bin holds, from samples of A: Σ exp(z) / n."""
    bins = bin_of(nll, edges)
    return np.array([log_sum(nll[bins == each]) for each in range(len(edges) - 1)]) - np.log(len(nll))


def representatives(nll: np.ndarray, edges: np.ndarray, per_bin: int, seed: int) -> np.ndarray:
    """Indices of at most `per_bin` samples of each z bin, drawn at random: the inputs that B reads."""
    bins, random = bin_of(nll, edges), np.random.default_rng(seed)
    members = (np.flatnonzero(bins == each) for each in range(len(edges) - 1))
    return np.concatenate([random.permutation(found)[:per_bin] for found in members])


def log_weights(nll: np.ndarray, chosen: np.ndarray, edges: np.ndarray, rule: str = "input") -> np.ndarray:
    """ln of the number of inputs for which each representative stands, ρ_A(z) · r(D | z).

    `nll` (samples,) are z of all samples of A, `chosen` (representatives,) those of the inputs that B read. A z bin's
    count is shared by its representatives: in proportion to exp(z) (`input`) or evenly (`bin`). Under `none` samples
    count once each, which gives probabilities under A in the place of counts. Outside the space: minus infinity.
    """
    whole, within = RULES[rule]
    bins, chosen_bins = bin_of(nll, edges), bin_of(chosen, edges)
    worth, chosen_worth = nll * whole, chosen * within
    weights = np.full(len(chosen), -np.inf)
    for each in np.unique(chosen_bins[chosen_bins >= 0]):
        here = chosen_bins == each
        share = chosen_worth[here] - log_sum(chosen_worth[here])
        weights[here] = log_sum(worth[bins == each]) - np.log(len(nll)) + share
    return weights


def log_histogram(difference: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """ln ρ_{A→B}(D): the weights (in logs) of the representatives in each bin of D."""
    bins = bin_of(difference, edges)
    return np.array([log_sum(weights[bins == each]) for each in range(len(edges) - 1)])


def effective_sample_size(weights: np.ndarray) -> float:
    """ESS = (Σ w)² / Σ w², of weights in logs: how many equal weights would scatter as much."""
    return float(np.exp(2 * log_sum(weights) - log_sum(2 * weights)))


def shares(weights: np.ndarray) -> np.ndarray:
    """Weights in logs as shares of one."""
    return np.exp(weights - log_sum(weights))


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    """Half the sum of absolute differences of two distributions over the same bins."""
    return float(0.5 * np.abs(one - other).sum())


def grid(low: float, high: float, width: float) -> np.ndarray:
    """Edges of z bins from z⁻ to z⁺."""
    return np.linspace(low, high, round((high - low) / width) + 1)


def even_edges(difference: np.ndarray, bins: int = 21) -> np.ndarray:
    """Edges of an odd number of bins of D, symmetric about zero, that hold every finite value."""
    reach = max(float(np.abs(difference[np.isfinite(difference)]).max(initial=0.0)) * 1.001, 1e-3)
    return np.linspace(-reach, reach, bins + 1)


# --------------------------------------------------------------------------------------- a world to be enumerated


@dataclass(frozen=True)
class World:
    """Two tiny models of one Markov source, and what each of the three thinks of every input."""

    a: Any
    b: Any
    prefix: Tensor
    z_a: np.ndarray
    z_b: np.ndarray
    z_source: np.ndarray
    edges: np.ndarray
    """Edges of the z bins, from z⁻ to z⁺."""

    @cached_property
    def difference(self) -> np.ndarray:
        """D of every input."""
        return self.z_a - self.z_b

    @cached_property
    def difference_edges(self) -> np.ndarray:
        """Edges of the bins of D, which hold both spaces."""
        return even_edges(self.difference[inside(self.z_a, self.edges) | inside(self.z_b, self.edges)])


def inside(nll: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Which inputs lie in the space between the first and the last edge."""
    return (nll >= edges[0]) & (nll < edges[-1])


def world(params: Params, seed: int) -> World:
    """Trains A and B on one source, each from weights of its own, and enumerates all inputs."""
    size, length = params.vocabulary, params.tiny_length
    source, prefix = markov_source(size, seed), torch.zeros(1, dtype=torch.long)
    models, nlls = [], []
    for number, steps in enumerate(params.tiny_steps):
        model = zoo.tiny.build("llama", seed=2 * seed + number, vocab_size=size)
        batches = source_batches(source, TINY_BATCH, length, seed=2 * seed + number)
        fit(model, batches, next_token_loss, Schedule(steps=steps, learning_rate=3e-3), cpu=True)
        models.append(model)
        nlls.append(every_nll(model, prefix, size, length).numpy())
    true = source_nll(source, every_sequence(size, length)).numpy()
    low, high = (length * bound for bound in params.tiny_space)
    return World(models[0], models[1], prefix, nlls[0], nlls[1], true, np.linspace(low, high, params.z_bins + 1))


def truth(world: World, edges: np.ndarray) -> np.ndarray:
    """ρ_{A→B}(D) by enumeration, as shares of |X_A|."""
    counts = np.bincount(bin_of(world.difference[inside(world.z_a, world.edges)], edges), minlength=len(edges) - 1)
    return counts / counts.sum()


def drawn_from(model: Any, own: np.ndarray, params: Params, seed: int, count: int) -> np.ndarray:
    """Places in the enumeration of inputs drawn from a tiny model; its sampler's z must be the enumeration's."""
    prefix = torch.zeros(1, dtype=torch.long)
    tokens, nll = draw(model, prefix, count=count, length=params.tiny_length, seed=seed, batch_size=8192)
    places = index_of(tokens, params.vocabulary).numpy()
    if not np.allclose(own[places], nll.numpy(), atol=1e-3):
        raise FloatingPointError("The sampler and the enumeration give one input two likelihoods.")
    return places


def convergence_rows(world: World, params: Params, seed: int) -> Iterator[dict[str, Any]]:
    """Estimates from n inputs against the enumeration: TV of ρ_{A→B}, errors of |X_A| and |X_A ∩ X_B|, ESS."""
    edges = world.difference_edges
    exact, real = truth(world, edges), inside(world.z_a, world.edges)
    common = real & inside(world.z_b, world.edges)
    largest = params.sample_sizes[-1]
    places = drawn_from(world.a, world.z_a, params, seed, largest * params.repeats).reshape(params.repeats, -1)
    for repeat, row in enumerate(places):
        for n in params.sample_sizes:
            own = world.z_a[row[:n]]
            chosen = row[:n][representatives(own, world.edges, n // params.z_bins // 4, seed)]
            for rule in RULES:
                weights = log_weights(own, world.z_a[chosen], world.edges, rule)
                histogram = shares(log_histogram(world.difference[chosen], weights, edges))
                yield {
                    "seed": seed,
                    "repeat": repeat,
                    "n": n,
                    "rule": rule,
                    "variation": total_variation(histogram, exact),
                    "size_error": np.exp(log_sum(weights)) / real.sum() - 1,
                    "common_error": np.exp(log_sum(weights[common[chosen]])) / common.sum() - 1,
                    "ess": effective_sample_size(weights),
                }


def curve_rows(world: World, params: Params, seed: int) -> Iterator[dict[str, Any]]:
    """Both views, true and estimated from the largest n: ln ρ(D) in bins of D, under every rule."""
    edges = world.difference_edges
    middle = (edges[1:] + edges[:-1]) / 2
    for view, model, own in (("A→B", world.a, world.z_a), ("B→A", world.b, world.z_b)):
        places = drawn_from(model, own, params, seed + 1000, params.sample_sizes[-1])
        everything = {"truth": (np.where(inside(own, world.edges), 0.0, -np.inf), world.difference)}
        for rule in RULES:
            everything[rule] = (log_weights(own[places], own[places], world.edges, rule), world.difference[places])
        for rule, (weights, difference) in everything.items():
            logs = log_histogram(difference, weights, edges)
            for at, value in zip(middle, logs, strict=True):
                yield {"seed": seed, "view": view, "rule": rule, "difference": at, "log_count": _finite(value)}


def _finite(value: float) -> float:
    """A number for a record: JSON has no infinity, so an empty bin is not a number."""
    return float(value) if np.isfinite(value) else float("nan")


def annotation_rows(world: World, params: Params, seed: int) -> Iterator[dict[str, Any]]:
    """What the source thinks of the common inputs in each bin of D, with weights under every rule."""
    places = drawn_from(world.a, world.z_a, params, seed + 2000, params.sample_sizes[-1])
    common = inside(world.z_a, world.edges) & inside(world.z_b, world.edges)
    difference = world.difference[places]
    reach = np.quantile(np.abs(difference[common[places]]), 0.99) if common[places].any() else 1.0
    edges = np.linspace(-reach, reach, ANNOTATED_BINS + 1)
    for rule in RULES:
        weights = log_weights(world.z_a[places], world.z_a[places], world.edges, rule)
        for number, (low, high) in enumerate(pairwise(edges)):
            here = common[places] & (difference >= low) & (difference < high)
            if here.any():
                quality = float(shares(weights[here]) @ world.z_source[places][here])
                row = {"seed": seed, "rule": rule, "bin": number, "difference": (low + high) / 2}
                yield row | {"log_count": log_sum(weights[here]), "source": quality / params.tiny_length}


# ----------------------------------------------------------------------------------------------- models compared

Reader = Callable[[Tensor], Tensor]
"""From tokens (inputs, length) to z (inputs,)."""


@dataclass(frozen=True)
class Bench:
    """The original model, what stands before every input, and documents that begin there."""

    original: Any
    prefix: Tensor
    train: Tensor
    """(documents, length), to tune on."""
    held_out: Tensor
    """(documents, length), to judge by."""
    params: Params

    def draw(self, model: Any, seed: int) -> tuple[Tensor, np.ndarray]:
        """Inputs drawn from a model, and their z under it."""
        options = {"count": self.params.n_samples, "length": self.params.length, "batch_size": self.params.batch_size}
        tokens, nll = draw(model, self.prefix, seed=seed, **options)
        return tokens, nll.numpy()

    def reader(self, model: Any) -> Reader:
        """How a model with the original's tokenizer reads inputs."""
        return lambda tokens: read(model, self.prefix, tokens, min(32, self.params.batch_size))


def documents(tokenizer: Any, corpus: str, split: Literal["train", "test"], length: int, count: int) -> Tensor:
    """The first `length` tokens of the first `count` texts that have so many, (documents, length)."""
    texts = data.load(corpus, split).table["text"].tolist()
    encoded = tokenizer(texts[: 4 * count], add_special_tokens=False)["input_ids"]
    return torch.tensor([tokens[:length] for tokens in encoded if len(tokens) >= length][:count])


def bench(params: Params) -> Bench:
    """Loads the original and the texts."""
    loaded = zoo.load(params.model, device="auto")
    prefix = torch.tensor(loaded.tokenizer(params.prefix, add_special_tokens=False)["input_ids"])
    train = documents(loaded.tokenizer, params.corpus, "train", params.length, 1024)
    held_out = documents(loaded.tokenizer, params.corpus, "test", params.length, params.n_texts)
    return Bench(loaded, prefix, train, held_out, params)


def with_prefix(bench: Bench) -> Tensor:
    """Training documents behind the prefix, (documents, tokens)."""
    return torch.cat([bench.prefix.expand(len(bench.train), -1), bench.train], 1)


def derived(bench: Bench, name: str) -> Any:
    """A copy of the original by its name, such as `noise:0.1`."""
    kind, _, strength = name.partition(":")
    model, params = bench.original.model, bench.params
    if kind == "tune":
        return tuned(model, with_prefix(bench), int(strength), params.tune_rate, batch_size=8, seed=params.seed)
    return noised(model, float(strength), params.seed) if kind == "noise" else pruned(model, float(strength))


def from_scratch(bench: Bench, steps: int) -> Any:
    """A small Llama with the original's vocabulary, trained on the same texts as the tuned copies."""
    config = bench.original.model.config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.params.seed)
        model = small_llama(config.vocab_size, bench.params.length + len(bench.prefix))
    return tuned(model.to(bench.original.model.device), with_prefix(bench), steps, 3e-3, batch_size=16, seed=1)


def stranger(bench: Bench, name: str) -> Reader:
    """How an unrelated model reads inputs: by their tokens where it has the original's, by their text elsewhere."""
    if name.startswith(SCRATCH):
        return bench.reader(from_scratch(bench, int(name.partition(":")[2])))
    other, own = zoo.load(name, device="auto"), bench.original.tokenizer
    if other.tokenizer.get_vocab() == own.get_vocab():
        return bench.reader(other.model)
    begin = "" if other.tokenizer("").input_ids else other.tokenizer.bos_token or other.tokenizer.eos_token
    return lambda tokens: torch.tensor([other_nll(other, begin, text, 1) for text in own.batch_decode(tokens)])


# ------------------------------------------------------------------------------------------------- the experiment

ORIGINAL = "original"


@dataclass(frozen=True)
class Drawn:
    """What one model says when sampled: of all inputs z, of the representatives also the tokens."""

    nll: list[np.ndarray]
    """One array a seed."""
    chosen: list[np.ndarray]
    tokens: list[Tensor]


def sample(bench: Bench, model: Any, edges: Callable[[np.ndarray], np.ndarray]) -> Drawn:
    """Draws inputs from a model on every seed and picks representatives in z bins; `edges` come from all z."""
    drawn = [bench.draw(model, seed) for seed in bench.params.seeds]
    bins = edges(np.concatenate([nll for _, nll in drawn]))
    picks = [
        representatives(nll, bins, bench.params.per_bin, seed)
        for seed, (_, nll) in zip(bench.params.seeds, drawn, strict=True)
    ]
    if not any(len(pick) for pick in picks):
        low, high = np.quantile(np.concatenate([nll for _, nll in drawn]), [0, 1]) / bench.params.length
        raise RequestError(
            f"No input that was drawn lies in the space {bench.params.space}; theirs is {low:.2f} to {high:.2f} nats "
            "per token, so choose a space within, or draw more inputs."
        )
    chosen = [nll[pick] for pick, (_, nll) in zip(picks, drawn, strict=True)]
    return Drawn([nll for _, nll in drawn], chosen, [t[pick] for pick, (t, _) in zip(picks, drawn, strict=True)])


def limits(params: Params) -> tuple[float, float, float]:
    """z⁻, z⁺ and the width of a z bin, in nats of a whole input."""
    low, high = (params.length * bound for bound in params.space)
    return low, high, (high - low) / params.z_bins


def own_limits(ours: np.ndarray, theirs: np.ndarray, low: float, high: float, width: float) -> tuple[float, float]:
    """Bounds between which a model has the share of its samples that A has between z⁻ and z⁺, on the same grid."""
    at = np.quantile(theirs, [(ours < low).mean(), (ours < high).mean()])
    steps = np.round((at - low) / width)
    return float(low + width * steps[0]), float(low + width * max(steps[1], steps[0] + 1))


def experiment(params: Params) -> Result:
    """The tiny world against its enumeration, then A against its copies and unrelated models; all z are kept."""
    rows = _worlds(params)
    real = bench(params)
    low, high, width = limits(params)
    ours = sample(real, real.original.model, lambda _: grid(low, high, width))
    columns, losses, returns, samples = {}, {}, [], _sample_rows(params, ORIGINAL, ours.nll)
    for name, reader, model in _rivals(real):
        columns[name] = reader(torch.cat(ours.tokens)).numpy()
        losses[name] = float(reader(real.held_out).mean()) / params.length
        if name in params.views:
            theirs = sample(real, model, lambda nll: _span(np.concatenate(ours.nll), nll, low, high, width))
            samples += _sample_rows(params, name, theirs.nll)
            returns.append(_return_rows(real, name, theirs))
    rows["samples"] = pd.DataFrame(samples)
    rows["inputs"] = _input_table(params, ours, columns)
    rows["returns"] = pd.concat(returns, ignore_index=True)
    rows["models"] = _model_table(real, losses)
    rows["examples"] = _examples(real, rows["inputs"], torch.cat(ours.tokens))
    rows["choice"] = pd.DataFrame([{"rule": params.rule, "bounds": params.bounds}])
    return Result(rows, {"low": low, "high": high, "width": width, "length": params.length})


def _worlds(params: Params) -> dict[str, pd.DataFrame]:
    rows: dict[str, list[dict[str, Any]]] = {"convergence": [], "curves": [], "annotation": []}
    for seed in params.seeds:
        made = world(params, seed)
        rows["convergence"].extend(convergence_rows(made, params, seed))
        rows["curves"].extend(curve_rows(made, params, seed))
        rows["annotation"].extend(annotation_rows(made, params, seed))
    return {name: pd.DataFrame(entries) for name, entries in rows.items()}


def _rivals(bench: Bench) -> Iterator[tuple[str, Reader, Any]]:
    """Every B, made when it is its turn: name, reader, and the model where inputs can be drawn from it."""
    for name in bench.params.copies:
        model = derived(bench, name)
        yield name, bench.reader(model), model
    for name in bench.params.unrelated:
        yield name, stranger(bench, name), None


def _span(ours: np.ndarray, theirs: np.ndarray, low: float, high: float, width: float) -> np.ndarray:
    """z bins that hold the shared space and the model's own."""
    own_low, own_high = own_limits(ours, theirs, low, high, width)
    return grid(min(low, own_low), max(high, own_high), width)


def _sample_rows(params: Params, model: str, nll: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"model": model, "seed": seed, "nll": value}
        for seed, values in zip(params.seeds, nll, strict=True)
        for value in values.tolist()
    ]


def _seeds_of(params: Params, drawn: Drawn) -> np.ndarray:
    return np.repeat(list(params.seeds), [len(chosen) for chosen in drawn.chosen])


def _input_table(params: Params, ours: Drawn, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row a representative of X_A: its seed, z_A (`own`) and z under every other model, one column each."""
    return pd.DataFrame({"seed": _seeds_of(params, ours), "own": np.concatenate(ours.chosen), **columns})


def _return_rows(bench: Bench, name: str, theirs: Drawn) -> pd.DataFrame:
    """One row a representative of X_B: `own` is z under the copy it was drawn from, `original` is z_A."""
    original = bench.reader(bench.original.model)(torch.cat(theirs.tokens)).numpy()
    columns = {"seed": _seeds_of(bench.params, theirs), "own": np.concatenate(theirs.chosen), ORIGINAL: original}
    return pd.DataFrame({"model": name, **columns})


def _model_table(bench: Bench, losses: dict[str, float]) -> pd.DataFrame:
    """Every model with its kind and its loss on held-out texts, nats per token of the original's tokenizer."""
    own = float(bench.reader(bench.original.model)(bench.held_out).mean()) / bench.params.length
    kinds = dict.fromkeys(bench.params.copies, "derived") | dict.fromkeys(bench.params.unrelated, "unrelated")
    entries = [{"model": name, "kind": kinds[name], "loss": loss} for name, loss in losses.items()]
    return pd.DataFrame([{"model": ORIGINAL, "kind": ORIGINAL, "loss": own}, *entries])


def _examples(bench: Bench, inputs: pd.DataFrame, tokens: Tensor, count: int = 3) -> pd.DataFrame:
    """Texts of the inputs at both ends of D, for every view."""
    entries = []
    for name in bench.params.views:
        difference = (inputs["own"] - inputs[name]).to_numpy()
        order = np.argsort(difference)
        for place in [*order[:count], *order[-count:]]:
            text = bench.original.tokenizer.decode(tokens[place])
            entries.append({"model": name, "difference": difference[place], "own": inputs["own"][place], "text": text})
    return pd.DataFrame(entries)


# ----------------------------------------------------------------------------------------------------- the claims

SIZE_MARGIN = float(np.log(2))
"""By how much the two views may count the common set differently: a factor of two."""


def choice(result: Result) -> tuple[str, str]:
    """The rule and the bounds that the claims read."""
    row = result.tables["choice"].iloc[0]
    return str(row["rule"]), str(row["bounds"])


def under(result: Result, rule: str, bounds: str) -> Result:
    """The same measurements, read with another rule and other bounds."""
    return result.with_table("choice", pd.DataFrame([{"rule": rule, "bounds": bounds}]))


def edges_of(result: Result, model: str, bounds: str) -> np.ndarray:
    """z bins of a model's space: the shared ones, or the model's own."""
    low, high, width = (result.scalars[name] for name in ("low", "high", "width"))
    samples = result.tables["samples"]
    if bounds == "own" and model != ORIGINAL:
        ours, theirs = (samples.loc[samples["model"] == name, "nll"].to_numpy() for name in (ORIGINAL, model))
        low, high = own_limits(ours, theirs, low, high, width)
    return grid(low, high, width)


@dataclass(frozen=True)
class View:
    """Representatives of one model's space, seen together with another model."""

    weights: np.ndarray
    """(representatives,), in logs."""
    difference: np.ndarray
    """D, always the original's z minus the other's."""
    common: np.ndarray
    """Which of them are in the other's space, too; meaningful where the other one has a space."""

    @property
    def mean(self) -> float:
        """Mean D over the space."""
        return float(shares(self.weights) @ self.difference)

    @property
    def root_mean_square(self) -> float:
        """√ mean D²: how far from zero."""
        return float(np.sqrt(shares(self.weights) @ self.difference**2))

    @property
    def deviation(self) -> float:
        """Standard deviation of D: how far from a constant."""
        return float(np.sqrt(shares(self.weights) @ (self.difference - self.mean) ** 2))

    @property
    def shared(self) -> View:
        """The same, of the common set alone."""
        return View(self.weights[self.common], self.difference[self.common], self.common[self.common])


def forth(result: Result, other: str, seed: int) -> View:
    """ρ_{A→B}: inputs drawn from the original, read by another model."""
    rule, bounds = choice(result)
    samples, inputs = result.tables["samples"], result.tables["inputs"]
    nll = samples[(samples["model"] == ORIGINAL) & (samples["seed"] == seed)]["nll"].to_numpy()
    rows = inputs[inputs["seed"] == seed]
    own, read_by_other = rows["own"].to_numpy(), rows[other].to_numpy()
    weights = log_weights(nll, own, edges_of(result, ORIGINAL, bounds), rule)
    has_space = other in set(samples["model"])
    common = inside(read_by_other, edges_of(result, other if has_space else ORIGINAL, bounds))
    return View(weights, own - read_by_other, common & np.isfinite(weights))


def back(result: Result, other: str, seed: int) -> View:
    """ρ_{B→A}: inputs drawn from a copy, read by the original; D has the same sign as in `forth`."""
    rule, bounds = choice(result)
    samples, returns = result.tables["samples"], result.tables["returns"]
    nll = samples[(samples["model"] == other) & (samples["seed"] == seed)]["nll"].to_numpy()
    rows = returns[(returns["model"] == other) & (returns["seed"] == seed)]
    own, original = rows["own"].to_numpy(), rows[ORIGINAL].to_numpy()
    weights = log_weights(nll, own, edges_of(result, other, bounds), rule)
    common = inside(original, edges_of(result, ORIGINAL, bounds)) & np.isfinite(weights)
    return View(weights, original - own, common)


def seeds(result: Result) -> list[int]:
    """The seeds of the result."""
    return sorted(result.tables["samples"]["seed"].unique().tolist())


def viewed(result: Result) -> list[str]:
    """The copies that inputs were drawn from."""
    return list(dict.fromkeys(result.tables["returns"]["model"]))


def models_of(result: Result, kind: str) -> list[str]:
    """Names of the derived or of the unrelated models."""
    models = result.tables["models"]
    return models[models["kind"] == kind]["model"].tolist()


def over_seeds(result: Result, other: str, what: Callable[[View], float]) -> np.ndarray:
    """A number of ρ_{A→B}, one a seed."""
    return np.array([what(forth(result, other, seed)) for seed in seeds(result)])


def slopes(result: Result, rule: str) -> np.ndarray:
    """By seed, the slope of ln TV (mean over repeats) against ln n."""
    table = result.tables["convergence"]
    errors = table[table["rule"] == rule].groupby(["seed", "n"])["variation"].mean().unstack()  # (seeds, sizes)
    sizes = np.log(errors.columns.to_numpy(dtype=float))
    return np.array([np.polyfit(sizes, np.log(row), 1)[0] for row in errors.to_numpy()])


def at_largest(result: Result, rule: str, column: str) -> pd.Series:
    """By seed, a column of the convergence table at the largest n, mean over repeats."""
    table = result.tables["convergence"]
    return table[(table["rule"] == rule) & (table["n"] == table["n"].max())].groupby("seed")[column].mean()


def check_enumeration(result: Result) -> tuple[Comparison, ...]:
    """TV falls like 1/√n, ends below half of that without weights, and both sizes are met within 5 %."""
    rule, _ = choice(result)
    slope = t_interval(slopes(result, rule))
    gain = paired_interval(
        np.log(at_largest(result, rule, "variation")), np.log(at_largest(result, "none", "variation"))
    )
    sizes = {"|X_A|": "size_error", "|X_A ∩ X_B|": "common_error"}
    errors = {name: t_interval(at_largest(result, rule, column)) for name, column in sizes.items()}
    return (
        Comparison("slope of ln TV over ln n, upper bound", slope, "below", -0.4),
        Comparison("slope of ln TV over ln n, lower bound", slope, "above", -0.6),
        Comparison("ln TV, weighted / not, largest n", gain, "below", float(np.log(0.5))),
        *(Comparison(f"relative error of {name}, above", error, "below", 0.05) for name, error in errors.items()),
        *(Comparison(f"relative error of {name}, below", error, "above", -0.05) for name, error in errors.items()),
    )


def common_gaps(result: Result, other: str) -> tuple[np.ndarray, np.ndarray]:
    """Over the common set, A's view minus B's, by seed: of ln of its size, and of its mean D."""
    gaps = []
    for seed in seeds(result):
        ours, theirs = forth(result, other, seed).shared, back(result, other, seed).shared
        is_empty = not len(ours.weights) or not len(theirs.weights)
        size = log_sum(ours.weights) - log_sum(theirs.weights)
        gaps.append((np.nan, np.nan) if is_empty else (size, ours.mean - theirs.mean))
    return np.array(gaps)[:, 0], np.array(gaps)[:, 1]


def check_common(result: Result) -> tuple[Comparison, ...]:
    """Both views count the common set within a factor of two; their means of D differ by less than half of what
    they differ by without weights."""
    comparisons: list[Comparison] = []
    for other in viewed(result):
        sizes, means = common_gaps(result, other)
        _, unweighted = common_gaps(under(result, "none", choice(result)[1]), other)
        slack = 0.5 * np.abs(unweighted)
        what = f"mean D of the common set without weights, half of what views differ by, {{}} weighted ({other})"
        size = t_interval(sizes)
        comparisons += [
            Comparison(f"ln |common set|, A→B − B→A, upper bound ({other})", size, "below", SIZE_MARGIN),
            Comparison(f"ln |common set|, A→B − B→A, lower bound ({other})", size, "above", -SIZE_MARGIN),
            Comparison(what.format("minus"), t_interval(slack - means), unit=" nats"),
            Comparison(what.format("plus"), t_interval(slack + means), unit=" nats"),
        ]
    return tuple(comparisons)


def noise_levels(result: Result) -> list[str]:
    """The noised copies, by rising noise."""
    noisy = [name for name in models_of(result, "derived") if name.startswith("noise:")]
    return sorted(noisy, key=lambda name: float(name.partition(":")[2]))


def check_noise(result: Result) -> tuple[Comparison, ...]:
    """The standard deviation of D over X_A grows from each level of noise to the next."""
    spread = {name: np.log(over_seeds(result, name, lambda view: view.deviation)) for name in noise_levels(result)}
    return tuple(
        Comparison(f"ln std of D, {more} / {less}", paired_interval(spread[more], spread[less]))
        for less, more in pairwise(spread)
    )


def as_good(result: Result, rival: str) -> list[str]:
    """The derived copies whose loss on held-out texts is no farther from the original's than an unrelated model's."""
    losses = result.tables["models"].set_index("model")["loss"]
    change = (losses - losses[ORIGINAL]).abs()
    return [name for name in models_of(result, "derived") if change[name] <= change[rival]]


def closeness(result: Result, rival: str, what: Callable[[View], float]) -> Interval:
    """ln of a spread of D, unrelated model over the farthest of the derived copies that are `as_good`."""
    rivals = [over_seeds(result, name, what) for name in as_good(result, rival)]
    if not rivals:
        return t_interval([])
    return paired_interval(np.log(over_seeds(result, rival, what)), np.log(np.max(rivals, axis=0)))


def check_plagiarism(result: Result) -> tuple[Comparison, ...]:
    """Each unrelated model is farther from D = 0 than every derived copy as good as it."""
    return tuple(
        Comparison(f"ln √ mean D², {rival} / derived", closeness(result, rival, lambda view: view.root_mean_square))
        for rival in models_of(result, "unrelated")
    )


def check_scatter(result: Result) -> tuple[Comparison, ...]:
    """With each model's mean of D taken away, the same."""
    return tuple(
        Comparison(f"ln std of D, {rival} / derived", closeness(result, rival, lambda view: view.deviation))
        for rival in models_of(result, "unrelated")
    )


def check_asymmetry(result: Result) -> tuple[Comparison, ...]:
    """On its own likely inputs each model is the surer: mean D below zero on X_A, above zero on X_B."""
    comparisons = []
    for other in viewed(result):
        ours = t_interval(over_seeds(result, other, lambda view: view.mean))
        theirs = t_interval([back(result, other, seed).mean for seed in seeds(result)])
        comparisons.append(Comparison(f"mean D over X_A ({other})", ours, "below", 0.0, " nats"))
        comparisons.append(Comparison(f"mean D over X_B ({other})", theirs, "above", 0.0, " nats"))
    return tuple(comparisons)


def effective_share(result: Result) -> np.ndarray:
    """By seed, ESS over the number of A's samples that lie in X_A."""
    rule, bounds = choice(result)
    samples, edges = result.tables["samples"], edges_of(result, ORIGINAL, bounds)
    found = []
    for seed in seeds(result):
        nll = samples[(samples["model"] == ORIGINAL) & (samples["seed"] == seed)]["nll"].to_numpy()
        nll = nll[inside(nll, edges)]
        found.append(effective_sample_size(log_weights(nll, nll, edges, rule)) / max(1, len(nll)))
    return np.array(found)


def check_variance(result: Result) -> tuple[Comparison, ...]:
    """The samples in X_A are worth less than half as many that weigh the same."""
    return (Comparison("ESS / samples in X_A", t_interval(effective_share(result)), "below", 0.5),)


def check_annotation(result: Result) -> tuple[Comparison, ...]:
    """Among inputs that both like, the source finds those likelier of which the better trained A is the surer."""
    rule, _ = choice(result)
    table = result.tables["annotation"]
    table = table[table["rule"] == rule]
    sides = []
    for _, rows in table.groupby("seed"):
        ours, theirs = rows[rows["difference"] < 0], rows[rows["difference"] > 0]
        means = [shares(side["log_count"].to_numpy()) @ side["source"].to_numpy() for side in (ours, theirs)]
        sides.append(float(means[0] - means[1]))
    what = "source's z per token where A is the surer − where B is"
    return (Comparison(what, t_interval(sides), "below", 0.0, " nats"),)


# ------------------------------------------------------------------------------------------- controls and claims


def _without_weights(result: Result) -> Result:
    return under(result, "none", choice(result)[1])


def _exchanged(one: Callable[[Result], str], other: Callable[[Result], str]) -> Callable[[Result], Result]:
    """Two models change places in everything that was read by them."""

    def apply(result: Result) -> Result:
        first, second = one(result), other(result)
        inputs = result.tables["inputs"]
        return result.with_table("inputs", inputs.assign(**{first: inputs[second], second: inputs[first]}))

    return apply


def _copies_are_the_original(result: Result) -> Result:
    inputs, returns = result.tables["inputs"], result.tables["returns"]
    same = inputs.assign(**dict.fromkeys(viewed(result), inputs["own"]))
    return result.with_table("inputs", same).with_table("returns", returns.assign(**{ORIGINAL: returns["own"]}))


def _annotated_the_other_way(result: Result) -> Result:
    table = result.tables["annotation"]
    return result.with_table("annotation", table.assign(difference=-table["difference"]))


_STRANGER_FOR_COPY = Control(
    "the least noised copy and the first unrelated model change places",
    _exchanged(lambda result: noise_levels(result)[0], lambda result: models_of(result, "unrelated")[0]),
)
_NO_WEIGHTS = "samples are counted once each, without exp(z)"

CLAIMS: list[Claim] = [
    Claim(
        "enumeration",
        "In a world that can be enumerated, weighted samples give the true distribution of D and the true number of "
        "inputs, with an error that falls as 1/√n.",
        (),
        check_enumeration,
        Control(_NO_WEIGHTS, _without_weights),
        reported="on a toy model, estimates match enumeration (numbers not read)",
    ),
    Claim(
        "common",
        "The two views meet: A's samples and B's samples say the same of the inputs that both models find likely.",
        (),
        check_common,
        Control(_NO_WEIGHTS, _without_weights),
        reported="the common set joins the two views (its use is known, numbers not read)",
    ),
    Claim(
        "noise",
        "The more noise a copy's weights carry, the wider D scatters over the original's inputs.",
        (),
        check_noise,
        Control(
            "the least and the most noised copy change places",
            _exchanged(lambda result: noise_levels(result)[0], lambda result: noise_levels(result)[-1]),
        ),
        reported="noised weights show as mass near D = 0 (numbers not read)",
    ),
    Claim(
        "plagiarism",
        "A copy derived from A stays closer to D = 0 than an unrelated model does, also when only copies as good as "
        "that model on held-out text are asked.",
        (),
        check_plagiarism,
        _STRANGER_FOR_COPY,
        reported="derived models show as mass near D = 0 (numbers not read)",
    ),
    Claim(
        "scatter",
        "This is not a matter of the mean alone: around its own mean, too, D scatters less for such a copy than for an "
        "unrelated model.",
        (),
        check_scatter,
        _STRANGER_FOR_COPY,
        reported="not read; our question",
    ),
    Claim(
        "asymmetry",
        "The two views differ: on the inputs that a model itself finds likely it is the surer of the two.",
        (),
        check_asymmetry,
        Control("the copy is the original", _copies_are_the_original),
        reported="disagreement is asymmetric between A→B and B→A for GPT-2 and Llama pairs (numbers not read)",
    ),
    Claim(
        "variance",
        "Weights have their price: a few samples with the highest z carry most of the count, so that those in X_A are "
        "worth less than half of their number.",
        (),
        check_variance,
        Control(_NO_WEIGHTS, _without_weights),
        reported="not read; follows from the weight exp(z)",
    ),
    Claim(
        "annotation",
        "Where two models disagree on likely inputs, an annotator who knows the truth sides with the better one.",
        (),
        check_annotation,
        Control("A and B change places", _annotated_the_other_way),
        reported="annotations by bin of D tell which model to trust (numbers not read)",
    ),
]
