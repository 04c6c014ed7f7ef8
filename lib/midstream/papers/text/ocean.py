"""Logged chains of thought are scored by inverse propensities from a knowledge graph; the score is then maximised.

Reference: Wu et al., "OCEAN: Offline Chain-of-thought Evaluation and Alignment in Large Language Models", ICLR 2025,
arXiv 2410.23703. No authors' code was found. **The formula of the estimator comes from one secondary source: it is
inferred throughout**, and so are the readings of it that are compared here.

Glossary (symbol → name here → shape)
    c_t         a step            a sentence of a chain; T_i steps in chain i, |c_t| tokens in a step
    s, e        state, token      the prompt with all earlier tokens; the token that was logged there
    π_θ         policy            the model that is scored and trained
    π_0         base              the model before training; its log-probability is the reward, log π_0(e|s) ≤ 0
    μ_φ         graph policy      a model trained on paths of the graph alone
    λ           logging           μ_φ for tokens of an entity, π_0 for all others; `log_logging`, (chains, tokens)
    w           ratio             π_θ(e|s) / λ(e|s)
    V̂(θ)        `kg_ips`          (1/N) Σ_i (1/T_i) Σ_t (1/|c_t|) Σ_e w · log π_0(e|s), a scalar
    M, n        -                 the largest |w · log π_0| of a chain; how many chains are averaged

Deviations and readings (all inferred)
    - Who wrote the logged chains is told in two ways: the model itself (`model`), or the graph, put into words
      (`graph`). Both are run; a third, tokens drawn from λ as the theory needs, is enumerated.
    - `centred`: the reward less its mean over the logged tokens of its kind (entity or other). `clipped`: the ratio is
      min(w, c), its gradient min(w, c) · ∇log π_θ, so that clipped tokens still count. `tokens`: one mean over all
      tokens in place of steps, then tokens.
    - Wikidata5M, GPT-4's wording and Llama-3-8B become a generated graph of people, templates, and a small Llama
      trained here: it read most facts right, some contradicted, some never, beside film reviews. μ_φ is another small
      Llama, trained by likelihood on paths in words, without exploration by reinforcement.
    - The alignment is repeated on a real graph, Freebase's facts about series of films of MovieLens, with invented
      names; the claims read the generated one, the chapter sets the films' verdicts beside it.
    - A fixed logged set, a few passes, AdamW, for every arm; each takes the best of the same learning rates by 2-hop
      accuracy on validation questions. No knowledge test but the graph's own; AlignScore and Self-BLEU are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control, direction
from midstream.data.films import film_graph
from midstream.data.graph_corpus import World, documents, make_world
from midstream.data.graphs import WORDINGS, Graph, Question, generate
from midstream.measure import Interval, paired_interval, t_interval
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit
from midstream.train.chains import (
    Logged,
    batches,
    likelihood_loss,
    longest_chain,
    restore,
    scored,
    small_llama,
    snapshot,
    token_log_probabilities,
    tokens_of,
    told_right,
    whole,
    write,
)
from midstream.train.language import train_tokenizer

SCRATCH = "scratch"
"""The name of a model that is made and trained here."""

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field(SCRATCH, description="π: `scratch` for a small Llama, or any causal language model")
    kg_model: str = Field(SCRATCH, description="μ_φ: the same, with π's tokenizer")
    device: str = Field("cpu", description="where models run: cpu, cuda or auto")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the arithmetic in training π_0 and μ_φ; the alignment's is float32"
    )
    lora_rank: int = Field(0, ge=0, le=1024, description="rank of the trained adapters; 0 trains all weights")
    people: int = Field(20, ge=8, le=4000, description="entities of the generated graph")
    relations: int = Field(4, ge=1, le=8, description="kinds of relations")
    facts_each: int = Field(2, ge=1, le=8, description="relations that each entity has")
    films: int = Field(60, ge=20, le=4000, description="entities of the second graph, real facts about films")
    known: float = Field(0.5, ge=0, le=1, description="share of facts that π_0 read right")
    disputed: float = Field(0.3, ge=0, le=1, description="share of facts that π_0 read both right and wrong")
    trusted: float = Field(0.4, ge=0, le=1, description="how often a disputed fact is told right")
    width: int = Field(64, ge=16, le=8192, multiple_of=16, description="of the small Llama")
    layers: int = Field(2, ge=1, le=64, description="of the small Llama")
    documents: int = Field(1000, ge=10, le=10_000_000, description="texts that π_0, and μ_φ, are trained on")
    base_steps: int = Field(200, ge=1, le=1_000_000, description="training steps of π_0, and of μ_φ")
    base_rate: float = Field(6e-3, gt=0, le=1, description="AdamW's peak in that training")
    muon: float = Field(2e-2, ge=0, le=1, description="Muon's peak in that training; 0 leaves all to AdamW")
    batch_size: int = Field(16, ge=1, le=65_536, description="texts in a batch")
    logged: int = Field(64, ge=2, le=1_000_000, description="logged chains (N)")
    steps: int = Field(10, ge=1, le=1_000_000, description="steps of every alignment")
    learning_rates: tuple[float, ...] = Field((1e-3, 5e-3), min_length=1, description="tried for every arm")
    clip: float = Field(5.0, gt=0, le=1e6, description="largest ratio where ratios are clipped")
    questions: int = Field(40, ge=4, le=100_000, description="test questions; half as many for validation")
    reviews: int = Field(40, ge=2, le=100_000, description="unrelated texts")
    draws: int = Field(100_000, ge=1000, le=10**8, description="chains drawn where they can be enumerated")


_FULL = Params(
    n_seeds=4,
    people=80,
    relations=8,
    films=160,
    documents=6000,
    base_steps=300,
    batch_size=40,
    logged=240,
    steps=20,
    learning_rates=(1e-3, 3e-3, 1e-2),
    questions=120,
    reviews=200,
    draws=300_000,
)
_PAPER = Params(
    model="meta-llama/Meta-Llama-3-8B",
    kg_model="meta-llama/Llama-3.2-1B",
    device="auto",
    precision="bfloat16",
    lora_rank=16,
    people=2000,
    relations=8,
    facts_each=3,
    films=400,
    documents=40_000,
    base_steps=2000,
    base_rate=2e-4,
    muon=0.0,
    batch_size=16,
    logged=4000,
    steps=500,
    learning_rates=(1e-6, 1e-5, 1e-4),
    questions=500,
    reviews=500,
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(
        Params(), "graphs of 20 people and 60 films, three seeds: see the method at work", minutes=1, memory_gib=4
    ),
    "full": Preset(
        _FULL, "80 people, 8 relations, and 160 films, four seeds: settle the claims", minutes=25, memory_gib=4
    ),
    "paper": Preset(
        _PAPER,
        "one of the paper's models on a generated graph, which it must first be taught; sizes are ours",
        minutes=1500,
        memory_gib=80,
        needs="Llama-3-8B and Llama-3.2-1B from the Hub and a GPU with 80 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The revisions of the unrelated texts, of the films and of models that are not made here."""
    models = {params.model, params.kg_model} - {SCRATCH}
    texts = {name: data.revision(name) for name in (REVIEWS, FILMS)}
    return texts | {name: zoo.revision(name) for name in sorted(models)}


REVIEWS = "movies"
"""Film reviews: text that has nothing to do with the graph."""
FILMS = "films"
"""Facts about films, of which the second graph is made."""
REVIEW = 100
"""Characters at which a review is cut, so that it is no longer than a chain."""

# ------------------------------------------------------------------------------------------- the estimator


def log_logging(log_base: Tensor, log_graph: Tensor, entity: Tensor) -> Tensor:
    """log λ: μ_φ's where a token is part of an entity, π_0's elsewhere; all (chains, tokens)."""
    return torch.where(entity, log_graph, log_base)


def steps_then_tokens(counted: Tensor, step: Tensor) -> Tensor:
    """1/N · 1/T_i · 1/|c_t| for each counted token, 0 elsewhere; both (chains, tokens), the sum is 1."""
    sizes = torch.zeros(len(step), int(step.max()) + 1, device=step.device)
    sizes = sizes.scatter_add(1, step, counted.float())  # (chains, steps)
    steps = (sizes > 0).sum(1, keepdim=True).clamp(min=1)
    return counted / sizes.gather(1, step).clamp(min=1) / steps / len(step)


def one_token_mean(counted: Tensor, step: Tensor) -> Tensor:
    """One over the number of counted tokens for each of them, 0 elsewhere."""
    return counted / counted.sum().clamp(min=1)


AVERAGES = {"steps": steps_then_tokens, "tokens": one_token_mean}


def ratio(log_policy: Tensor, log_logging: Tensor, clip: float = float("inf")) -> Tensor:
    """w = π_θ/λ, at most `clip`; the gradient is min(w, clip) · ∇log π_θ, λ has none."""
    size = (log_policy.detach() - log_logging.detach()).exp().clamp(max=clip)
    return size * (1 + log_policy - log_policy.detach())


def kg_ips(
    log_policy: Tensor, log_logging: Tensor, reward: Tensor, share: Tensor, clip: float = float("inf")
) -> Tensor:
    """V̂ = Σ share · w · reward over logged tokens; all (chains, tokens). Only `log_policy` carries a gradient."""
    weighted = ratio(log_policy, log_logging, clip) * reward.detach()
    return (share * weighted).sum()


def centred(reward: Tensor, logged: Logged) -> Tensor:
    """The reward less its mean over the logged tokens of its kind: of an entity, or not."""
    for kind in (logged.counted & logged.entity, logged.counted & ~logged.entity):
        reward = torch.where(kind, reward - reward[kind].mean(), reward)
    return reward


def plain(reward: Tensor, logged: Logged) -> Tensor:
    """The reward as it is, never above zero."""
    return reward


REWARDS = {"plain": plain, "centred": centred}


@dataclass(frozen=True)
class Reading:
    """One way to read the method: who wrote the logged chains, which reward, which largest ratio, which mean."""

    logging: str
    reward: str = "plain"
    clip: float = float("inf")
    average: str = "steps"

    @property
    def name(self) -> str:
        """Such as `model/plain/clipped/steps`."""
        return f"{self.logging}/{self.reward}/{'raw' if np.isinf(self.clip) else 'clipped'}/{self.average}"


def readings(clip: float) -> list[Reading]:
    """The formula as it stands, and one or two changes to it, for both sources of chains.

    Ratios are clipped on the model's chains alone: what the graph says has μ_φ near 1, so that no ratio is large.
    """
    raw = float("inf")
    changes = [("plain", raw, "steps"), ("centred", raw, "steps"), ("plain", raw, "tokens")]
    on_model = [*changes, ("plain", clip, "steps"), ("centred", clip, "steps")]
    return [Reading("model", *change) for change in on_model] + [Reading("graph", *change) for change in changes]


# ------------------------------------------------------------------------------- where all can be enumerated

LENGTH = 5
STEP = (0, 0, 0, 1, 1)
ENTITY = (False, False, True, False, True)
"""A chain of five tokens in two steps; the last token of each step is an entity."""

Tables = tuple[Tensor, ...]
"""A policy as the log-probabilities after every prefix: entry t is (vocabulary^t, vocabulary)."""


def random_tables(vocabulary: int, spread: float, seed: int, around: Tables | None = None) -> Tables:
    """Normal logits of standard deviation `spread`, added to those of another policy where one is given."""
    rng = torch.Generator().manual_seed(seed)
    centre = around or tuple(torch.zeros(vocabulary**t, vocabulary) for t in range(LENGTH))
    return tuple(
        (table + spread * torch.randn(table.shape, generator=rng)).double().log_softmax(-1) for table in centre
    )


@torch.no_grad()
def model_tables(model: Any, prompt: Tensor) -> Tables:
    """A language model's, after a prompt (tokens,), over all chains of its whole vocabulary: small ones only."""
    vocabulary = model.config.vocab_size
    prefixes = torch.cartesian_prod(*[torch.arange(vocabulary)] * (LENGTH - 1))
    ids = torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)
    logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 :].double()
    return tuple(logits[:: vocabulary ** (LENGTH - 1 - t), t].log_softmax(-1) for t in range(LENGTH))


@dataclass(frozen=True)
class Enumerated:
    """Every chain of a small vocabulary, with what three policies say of each of its tokens."""

    policy: Tables
    base: Tables
    graph: Tables
    ends: bool = False
    """Whether a chain ends at its fourth token where that token is the vocabulary's first: then |c_2| is 1, not 2."""

    @property
    def mixture(self) -> Tables:
        """λ: μ_φ at entities, π_0 elsewhere."""
        return tuple(g if is_entity else b for g, b, is_entity in zip(self.graph, self.base, ENTITY, strict=True))

    @property
    def best_path(self) -> Tables:
        """Text of the graph: at entities always the likeliest of μ_φ, elsewhere π_0."""
        return tuple(
            torch.full_like(g, -torch.inf).scatter(1, g.argmax(1, keepdim=True), 0.0) if is_entity else b
            for g, b, is_entity in zip(self.graph, self.base, ENTITY, strict=True)
        )

    def along(self, tables: Tables) -> Tensor:
        """log-probabilities of the tokens of every chain, (chains, tokens)."""
        vocabulary = tables[0].shape[1]
        columns = (table.flatten().repeat_interleave(vocabulary ** (LENGTH - 1 - t)) for t, table in enumerate(tables))
        return torch.stack(list(columns), 1)

    def share(self, average: str) -> Tensor:
        """What a token of a chain counts, (chains, tokens), each chain's sum 1."""
        vocabulary = self.base[0].shape[1]
        chains = vocabulary**LENGTH
        counted = torch.ones(chains, LENGTH, dtype=torch.bool)
        if self.ends:
            fourth = torch.arange(chains) // vocabulary % vocabulary
            counted[:, -1] = fourth != 0
        step = torch.tensor(STEP).expand(chains, -1)
        if average == "steps":
            return (steps_then_tokens(counted, step) * chains).double()
        return counted.double() / counted.sum(1, keepdim=True)

    def estimates(self, average: str = "steps") -> Tensor:
        """V̂ of each chain alone, (chains,)."""
        weighted = ratio(self.along(self.policy), self.along(self.mixture)) * self.along(self.base)
        return (self.share(average) * weighted).sum(1)

    def one_step(self) -> Tensor:
        """Σ_e π_θ(e|s) log π_0(e|s) at the state before each token of every chain, (chains, tokens)."""
        inner = ((p.exp() * b).sum(1, keepdim=True).expand_as(p) for p, b in zip(self.policy, self.base, strict=True))
        return self.along(tuple(inner))

    def truth(self, average: str = "steps") -> float:
        """V(θ): states as λ visits them, tokens as π_θ chooses them."""
        visited = self.along(self.mixture).sum(1).exp()
        return float((visited[:, None] * self.share(average) * self.one_step()).sum())

    def on_policy(self, average: str = "steps") -> float:
        """The same where π_θ also chooses the states: a chain of ratios would be needed for this one."""
        visited = self.along(self.policy).sum(1).exp()
        return float((visited[:, None] * self.share(average) * self.one_step()).sum())

    def expectation(self, drawn_from: Tables, average: str = "steps") -> float:
        """The exact mean of V̂ over chains drawn from a policy."""
        return float((self.along(drawn_from).sum(1).exp() * self.estimates(average)).sum())

    def sample(self, drawn_from: Tables, draws: int, seed: int, average: str = "steps") -> np.ndarray:
        """V̂ of single chains drawn from a policy, (draws,)."""
        chances = self.along(drawn_from).sum(1).exp().numpy()
        rng = np.random.default_rng(seed)
        return self.estimates(average).numpy()[rng.choice(len(chances), draws, p=chances / chances.sum())]


def enumerable(policies: str, seed: int) -> tuple[Tables, Tables, Tables]:
    """π_θ, π_0 and μ_φ that can be enumerated: random tables, or three tiny Llamas of six tokens."""
    if policies == "tables":
        base = random_tables(6, 1.0, 3 * seed)
        return random_tables(6, 0.5, 3 * seed + 1, base), base, random_tables(6, 0.5, 3 * seed + 2, base)
    made = [model_tables(zoo.tiny.build("llama", 3 * seed + i, vocab_size=6), torch.tensor([1, 2])) for i in range(3)]
    return made[0], made[1], made[2]


SIZES = (10, 30, 100, 300, 1000)
"""How many chains are averaged where the variance is measured."""


def bias_rows(params: Params, seed: int) -> Iterator[dict[str, Any]]:
    """V̂ by drawing and by enumeration, beside the truth, for chains from several sources."""
    for policies in ("tables", "llama"):
        tables = enumerable(policies, seed)
        for ends, average in ((False, "steps"), (False, "tokens"), (True, "steps"), (True, "tokens")):
            world = Enumerated(*tables, ends)
            truth = world.truth(average)
            sources = {"mixture": world.mixture, "base": world.base, "best path": world.best_path}
            for source, drawn_from in sources.items():
                yield {
                    "policies": policies,
                    "lengths": "dependent" if ends else "fixed",
                    "average": average,
                    "drawn_from": source,
                    "seed": seed,
                    "truth": truth,
                    "on_policy": world.on_policy(average),
                    "expected": world.expectation(drawn_from, average),
                    "mean": float(world.sample(drawn_from, params.draws, seed, average).mean()),
                }


def variance_rows(params: Params, seed: int) -> Iterator[dict[str, Any]]:
    """The variance of V̂ over repetitions, for several n, beside M²/(4n)."""
    for policies in ("tables", "llama"):
        world = Enumerated(*enumerable(policies, seed))
        largest = float(world.estimates().abs().max())
        for n in SIZES:
            values = world.sample(world.mixture, params.draws // n * n, seed).reshape(-1, n).mean(1)
            found = {"variance": float(values.var(ddof=1)), "bound": largest**2 / (4 * n)}
            yield {"policies": policies, "seed": seed, "n": n, **found}


# ------------------------------------------------------------------------------------------ text and models


def obtain(name: str, tokenizer: Any, params: Params, seed: int) -> tuple[Any, Any]:
    """A model to train and its tokenizer: made here, or loaded, with adapters where a rank asks for them."""
    if name == SCRATCH:
        return small_llama(len(tokenizer), params.width, params.layers, seed), tokenizer
    loaded = zoo.load(name, device=params.device)
    if not params.lora_rank:
        return loaded.model.float(), loaded.tokenizer
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=params.lora_rank, lora_alpha=2 * params.lora_rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(loaded.model, config), loaded.tokenizer


def ordinary_tokens(tokenizer: Any) -> dict[str, int]:
    """A vocabulary without added tokens, which models of one family name differently."""
    added = tokenizer.get_added_vocab()
    return {token: place for token, place in tokenizer.get_vocab().items() if token not in added}


def teach(model: Any, texts: Logged, params: Params, seed: int) -> None:
    """Train a model on whole texts, prompts included, by likelihood."""
    schedule = Schedule(params.base_steps, params.base_rate, muon=params.muon, weight_decay=0.05)
    rows = batches(params.batch_size, seed, ids=texts.ids, counted=texts.counted)
    fit(model, rows, likelihood_loss, schedule, precision=params.precision, cpu=params.device == "cpu")


# ------------------------------------------------------------------------------------------- the alignment


@dataclass(frozen=True)
class Chains:
    """Logged chains with what the estimator needs of them, (chains, tokens) each, fixed before any alignment."""

    texts: Logged
    log_base: Tensor
    log_logging: Tensor


@dataclass(frozen=True)
class Bench:
    """One seed's world with its trained π_0, its logged chains and what is measured on."""

    world: World
    model: Any
    tokenizer: Any
    base: dict[str, Tensor]
    """What of π_0 is trained."""
    logged: dict[str, Chains]
    """By who wrote them: `model`, `graph`."""
    held_out: dict[str, Chains]
    """The same for test questions: V̂ is reported on these."""
    reviews: Logged
    untouched: Logged
    """Known facts that no logged chain tells."""
    validation: Logged
    """The graph's chains for the questions on which learning rates are chosen."""


def graphs(params: Params, seed: int) -> dict[str, Graph]:
    """The generated graph, which the claims read, and the real one."""
    people = generate(params.people, params.relations, params.facts_each, seed)
    return {"people": people, FILMS: film_graph(params.films, seed)}


def set_up(graph: Graph, params: Params, seed: int) -> Bench:
    """A world, π_0 and μ_φ trained in it, and chains by the model and by the graph."""
    rng = random.Random(seed)
    world = make_world(graph, params.known, params.disputed, params.questions, params.logged, seed)
    corpus, paths, unrelated = texts_of(world, params, rng)
    model, tokenizer = obtain(params.model, train_tokenizer(corpus + paths, VOCABULARY), params, seed)
    teach(model, whole(tokenizer, graph, corpus), params, seed)
    logged = chains_of(model, tokenizer, graph, world.logged, seed)
    held_out = chains_of(model, tokenizer, graph, world.test, seed)
    graph_model, graph_tokenizer = obtain(params.kg_model, tokenizer, params, seed + 1)
    if ordinary_tokens(graph_tokenizer) != ordinary_tokens(tokenizer):
        raise ValueError(f"{params.kg_model} has other tokens than {params.model}; μ_φ must score π_θ's own tokens.")
    teach(graph_model, whole(tokenizer, graph, paths), params, seed + 1)
    asked_and_told = [(graph.ask(question), graph.chain(question, rng)) for question in world.validation]
    return Bench(
        world=world,
        model=model,
        tokenizer=tokenizer,
        base=snapshot(model),
        logged={who: judged(model, graph_model, texts, params) for who, texts in logged.items()},
        held_out={who: judged(model, graph_model, texts, params) for who, texts in held_out.items()},
        reviews=whole(tokenizer, graph, unrelated),
        untouched=_untouched(tokenizer, world),
        validation=tokens_of(tokenizer, graph, asked_and_told),
    )


VOCABULARY = 512
"""Tokens of the vocabulary of what is trained here."""


def texts_of(world: World, params: Params, rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """What π_0 reads, a quarter of it film reviews; what μ_φ reads; and other reviews."""
    held_out = {*world.test, *world.validation}
    reviews = {split: data.load(REVIEWS, split).table["text"].str[:REVIEW].tolist() for split in ("train", "test")}
    corpus = documents(lambda: world.told(params.trusted, rng), held_out, params.documents * 3 // 4, rng)
    paths = documents(lambda: world.graph, held_out, params.documents, rng)
    return corpus + reviews["train"][: params.documents // 4], paths, reviews["test"][: params.reviews]


def judged(base: Any, graph_model: Any, texts: Logged, params: Params) -> Chains:
    """Chains with log π_0 and log λ of their tokens."""
    log_base, log_graph = (scored(model, texts, params.batch_size) for model in (base, graph_model))
    return Chains(texts, log_base, log_logging(log_base, log_graph, texts.entity))


def chains_of(model: Any, tokenizer: Any, graph: Graph, questions: Sequence[Question], seed: int) -> dict[str, Logged]:
    """Chains for questions: `graph` puts the right facts into words, `model` are drawn from a model."""
    rng = random.Random(seed)
    prompts = [graph.ask(question) for question in questions]
    right = [graph.chain(question, rng) for question in questions]
    of_graph = tokens_of(tokenizer, graph, list(zip(prompts, right, strict=True)))
    drawn = write(model, tokenizer, prompts, longest_chain(of_graph), seed)
    return {"model": tokens_of(tokenizer, graph, list(zip(prompts, drawn, strict=True))), "graph": of_graph}


def _untouched(tokenizer: Any, world: World) -> Logged:
    """Facts that no logged chain tells, in every wording."""
    facts = world.graph.facts
    told = [world.graph.say(key, facts[key], wording) for key in world.untouched for wording in range(WORDINGS)]
    return whole(tokenizer, world.graph, told)


def align(bench: Bench, reading: Reading | None, rate: float, params: Params, seed: int) -> None:
    """Train π_θ from π_0: by V̂ in one reading, or without one by likelihood on the graph's chains (SFT)."""
    restore(bench.model, bench.base)
    chains = bench.logged[reading.logging if reading else "graph"]
    columns = {"ids": chains.texts.ids, "counted": chains.texts.counted}
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = likelihood_loss
    if reading:
        reward = REWARDS[reading.reward](chains.log_base, chains.texts)
        columns |= {"step": chains.texts.step, "reward": reward, "log_logging": chains.log_logging}
        loss = value_loss(reading)
    rows = batches(params.batch_size, seed, **columns)
    schedule = Schedule(params.steps, rate)
    fit(bench.model, rows, loss, schedule, cpu=params.device == "cpu")


def value_loss(reading: Reading) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """−V̂ of a batch, so that descent on it is ascent on V̂."""

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        log_policy = token_log_probabilities(model, batch["ids"])
        share = AVERAGES[reading.average](batch["counted"], batch["step"])
        return -kg_ips(log_policy, batch["log_logging"], batch["reward"], share, reading.clip)

    return loss


# ---------------------------------------------------------------------------------------------- measurements


def right_answers(bench: Bench, questions: Sequence[Question], tokens: int) -> np.ndarray:
    """Which questions a greedy chain answers: the last name it tells is the answer's, (questions,)."""
    graph = bench.world.graph
    chains = write(bench.model, bench.tokenizer, [graph.ask(question) for question in questions], tokens)
    answers = [[chain[a:b] for a, b in graph.mentions(chain)] for chain in chains]
    gold = [graph.names[graph.walk(question)[-1]] for question in questions]
    return np.array([bool(told) and told[-1] == right for told, right in zip(answers, gold, strict=True)])


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words as a share of all n-grams (Li et al., 2016)."""
    words = [text.replace(".", " .").split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def measured(bench: Bench, params: Params, seed: int) -> dict[str, float]:
    """What a policy is judged by, on test questions, unrelated reviews and untouched facts."""
    world, tokens = bench.world, longest_chain(bench.held_out["graph"].texts)
    right = right_answers(bench, world.test, tokens)
    kinds = np.array([world.kind(question) for question in world.test])
    drawn = write(bench.model, bench.tokenizer, [world.graph.ask(q) for q in world.test], tokens, seed)
    found = {"accuracy": float(right.mean()), "distinct": distinct(drawn), "nll": unrelated_nll(bench, params)}
    found |= {f"accuracy_{k}": float(right[kinds == k].mean()) if (kinds == k).any() else np.nan for k in KINDS}
    found["recall"] = float(told_right(bench.model, bench.untouched, params.batch_size).float().mean())
    for who in ("model", "graph"):
        held_out = bench.held_out[who]
        log_policy = scored(bench.model, held_out.texts, params.batch_size)
        share = steps_then_tokens(held_out.texts.counted, held_out.texts.step)
        for name, clip in (("raw", float("inf")), ("clipped", params.clip)):
            value = kg_ips(log_policy, held_out.log_logging, held_out.log_base, share, clip)
            found[f"value_{who}_{name}"] = float(value)
        found[f"log_entity_{who}"] = log_entity(bench, who, params)
    return found


def log_entity(bench: Bench, who: str, params: Params) -> float:
    """Mean log π_θ of the logged chains' entity tokens, in nats: what alignment does to what it was shown."""
    texts = bench.logged[who].texts
    return float(scored(bench.model, texts, params.batch_size)[texts.entity].mean())


KINDS = ("known", "disputed", "unknown")


def unrelated_nll(bench: Bench, params: Params) -> float:
    """Nats per token of film reviews."""
    return -float(scored(bench.model, bench.reviews, params.batch_size)[bench.reviews.counted].mean())


def tuned(bench: Bench, reading: Reading | None, params: Params, seed: int) -> Iterator[dict[str, float]]:
    """One row a learning rate, by validation; the model is left at the best, the smaller one where two are as good."""
    best, kept = -1.0, bench.base
    for rate in sorted(params.learning_rates):
        align(bench, reading, rate, params, seed)
        accuracy = float(told_right(bench.model, bench.validation, params.batch_size).float().mean())
        row = {"learning_rate": rate, "accuracy": accuracy, "nll": unrelated_nll(bench, params)}
        yield row | {"log_entity": log_entity(bench, reading.logging if reading else "graph", params)}
        if accuracy > best:
            best, kept = accuracy, snapshot(bench.model)
    restore(bench.model, kept)


def experiment(params: Params) -> Result:
    """Enumeration, then the alignment of every reading in both graphs, on every seed.

    Of the films, `runs` and `tuning` are kept under names of their own; `on_films` puts them in place.
    """
    rows: dict[str, list[dict[str, Any]]] = {"bias": [], "variance": []}
    rows |= {f"{prefix}{table}": [] for prefix in ("", FILMS_PREFIX) for table in ALIGNED}
    for seed in params.seeds:
        rows["bias"].extend(bias_rows(params, seed))
        rows["variance"].extend(variance_rows(params, seed))
        for prefix, graph in zip(("", FILMS_PREFIX), graphs(params, seed).values(), strict=True):
            align_all(set_up(graph, params, seed), params, seed, rows[f"{prefix}runs"], rows[f"{prefix}tuning"])
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()}, {"clip": params.clip})


ALIGNED = ("runs", "tuning")
FILMS_PREFIX = f"{FILMS}_"


def align_all(
    bench: Bench, params: Params, seed: int, runs: list[dict[str, Any]], tuning: list[dict[str, Any]]
) -> None:
    """Adds the base model's row to `runs`, then SFT's and every reading's; to `tuning` those of every rate."""
    runs.append({"arm": "base", "seed": seed, **measured(bench, params, seed)})
    for reading in (None, *readings(params.clip)):
        name = reading.name if reading else "sft"
        tuning.extend({"arm": name, "seed": seed, **row} for row in tuned(bench, reading, params, seed))
        runs.append({"arm": name, "seed": seed, **measured(bench, params, seed)})


def on_films(result: Result) -> Result:
    """The result with the films' alignment in place of the generated graph's: every check can be asked of it."""
    for table in ALIGNED:
        result = result.with_table(table, result.tables[f"{FILMS_PREFIX}{table}"])
    return result


# ----------------------------------------------------------------------------------------------------- the claims

MAIN = "model/plain/raw/steps"
"""The formula as it stands, on the model's own chains: the abstract speaks of chains that the language model wrote."""
BIAS_MARGIN = 0.03
"""Share of |V| within which a mean counts as the truth; the error of drawing is a fifth of it."""
ACCURACY_MARGIN = 0.02
"""Share of questions within which accuracies count as equal."""
NLL_MARGIN = 0.05
"""Nats per token of unrelated text within which a model counts as unchanged: 5 % of perplexity."""
DISTINCT_MARGIN = 0.05
"""Relative loss of distinct bigrams within which diversity counts as kept."""


def per_seed(result: Result, value: str, arm: str) -> pd.Series:
    """A column of the runs of one arm, by seed."""
    runs = result.tables["runs"]
    return runs[runs["arm"] == arm].set_index("seed")[value].sort_index()


def change(result: Result, value: str, arm: str, other: str = "base") -> Interval:
    """Interval over seeds of a column's difference between two arms."""
    return paired_interval(per_seed(result, value, arm), per_seed(result, value, other))


def log_change(result: Result, value: str, arm: str, other: str) -> Interval:
    """Interval over seeds of ln |ours / other's|."""
    ours, theirs = (per_seed(result, value, name).abs() for name in (arm, other))
    return paired_interval(np.log(ours), np.log(theirs))


def relative_bias(result: Result, policies: str, drawn_from: str = "mixture", lengths: str = "fixed") -> Interval:
    """Interval over seeds of |mean of V̂ − V| / |V|, steps then tokens."""
    rows = result.tables["bias"]
    rows = rows[(rows["policies"] == policies) & (rows["drawn_from"] == drawn_from)]
    rows = rows[(rows["lengths"] == lengths) & (rows["average"] == "steps")]
    return t_interval(((rows["mean"] - rows["truth"]) / rows["truth"]).abs())


def check_unbiased(result: Result) -> tuple[Comparison, ...]:
    """Chains drawn from λ: the mean of V̂ is the enumerated V, up to the error of drawing."""
    return tuple(
        Comparison(f"|mean − truth| / |truth|, {name}", relative_bias(result, policies), "below", BIAS_MARGIN)
        for policies, name in (("tables", "random tables"), ("llama", "tiny Llamas"))
    )


def variance_slope(result: Result, policies: str) -> Interval:
    """Interval over seeds of the slope of ln variance over ln n."""
    rows = result.tables["variance"]
    groups = rows[rows["policies"] == policies].groupby("seed")
    return t_interval([np.polyfit(np.log(g["n"]), np.log(g["variance"]), 1)[0] for _, g in groups])


def check_variance(result: Result) -> tuple[Comparison, ...]:
    """The slope is −1 within a tenth."""
    slopes = {name: variance_slope(result, name) for name in ("tables", "llama")}
    return tuple(
        Comparison(f"slope of ln variance over ln n, {name}", slope, side, threshold)
        for name, slope in slopes.items()
        for side, threshold in _AROUND_MINUS_ONE
    )


_AROUND_MINUS_ONE: tuple[tuple[Literal["above", "below"], float], ...] = (("above", -1.1), ("below", -0.9))


def check_value(result: Result, arm: str = MAIN) -> tuple[Comparison, ...]:
    """|V̂| on held-out chains of the arm's own kind shrinks, for V̂ < 0: against base, and against SFT."""
    value = f"value_{arm.split('/')[0]}_raw"
    return tuple(
        Comparison(f"ln |V̂|, OCEAN / {other}", log_change(result, value, arm, other), "below")
        for other in ("base", "sft")
    )


def check_accuracy(result: Result, arm: str = MAIN) -> tuple[Comparison, ...]:
    """Two-hop accuracy is less than `ACCURACY_MARGIN` below the base's."""
    gap = change(result, "accuracy", arm)
    return (Comparison("2-hop accuracy, OCEAN − base", gap, "above", -ACCURACY_MARGIN),)


def check_retention(result: Result, arm: str = MAIN) -> tuple[Comparison, ...]:
    """NLL of reviews rises less than under SFT, and by less than `NLL_MARGIN`."""
    return (
        Comparison("unrelated NLL, OCEAN − SFT", change(result, "nll", arm, "sft"), "below", 0.0, " nats"),
        Comparison("unrelated NLL, OCEAN − base", change(result, "nll", arm), "below", NLL_MARGIN, " nats"),
    )


def check_diversity(result: Result, arm: str = MAIN) -> tuple[Comparison, ...]:
    """Distinct-2 of drawn chains falls by less than `DISTINCT_MARGIN`."""
    gap = log_change(result, "distinct", arm, "base")
    return (Comparison("ln Distinct-2, OCEAN / base", gap, "above", float(np.log(1 - DISTINCT_MARGIN))),)


ALIGNMENT = {
    "value": check_value,
    "accuracy": check_accuracy,
    "retention": check_retention,
    "diversity": check_diversity,
}
"""The paper's claims about the alignment; each can be asked of any reading."""


def by_reading(result: Result) -> pd.DataFrame:
    """The verdict on each of the paper's claims about the alignment, for every reading that was run."""
    arms = [arm for arm in result.tables["runs"]["arm"].unique() if "/" in arm]
    verdicts = {arm: {name: direction(check(result, arm)) for name, check in ALIGNMENT.items()} for arm in arms}
    return pd.DataFrame.from_dict(verdicts, orient="index").rename_axis("reading").reset_index()


def rank_correlation(result: Result, value: str) -> Interval:
    """Interval over seeds of Spearman's correlation, over arms, of V̂ on held-out chains with 2-hop accuracy."""
    groups = result.tables["runs"].groupby("seed")
    return t_interval([g[value].rank().corr(g["accuracy"].rank()) for _, g in groups])


def check_ranking(result: Result) -> tuple[Comparison, ...]:
    """V̂ ranks policies as their accuracy does, whoever wrote the chains."""
    return tuple(
        Comparison(
            f"rank correlation of V̂ and accuracy, chains by the {who}", rank_correlation(result, f"value_{who}_raw")
        )
        for who in ("model", "graph")
    )


def logged_change(result: Result, reward: str, other: str | None = None) -> Interval:
    """Interval over seeds of the change in log π_θ of the graph's logged entities, mean over learning rates."""
    rows = result.tables["tuning"]

    def of(name: str) -> pd.Series:
        return rows[rows["arm"] == f"graph/{name}/raw/steps"].groupby("seed")["log_entity"].mean()

    return paired_interval(of(reward), of(other) if other else per_seed(result, "log_entity_graph", "base"))


def check_sign(result: Result) -> tuple[Comparison, ...]:
    """Plain ascent lowers the logged entities of the graph's own text; a centred reward lowers them less."""
    return (
        Comparison("log π_θ(logged entity), plain − base", logged_change(result, "plain"), "below", 0.0, " nats"),
        Comparison("the same, centred − plain", logged_change(result, "centred", "plain"), "above", 0.0, " nats"),
    )


# ------------------------------------------------------------------------------------------ controls, the list


def _drawn_from_the_model(result: Result) -> Result:
    frame = result.tables["bias"]
    return result.with_table("bias", frame[frame["drawn_from"] == "base"].assign(drawn_from="mixture"))


def _one_variance_for_all(result: Result) -> Result:
    frame = result.tables["variance"].copy()
    frame["variance"] = frame.groupby(["policies", "seed"])["variance"].transform("first")
    return result.with_table("variance", frame)


def _stand_in(other: str) -> Callable[[Result], Result]:
    """Another arm's runs take the place of the main reading's."""

    def apply(result: Result) -> Result:
        frame = result.tables["runs"]
        copied = frame[frame["arm"] == other].assign(arm=MAIN)
        return result.with_table("runs", pd.concat([frame[frame["arm"] != MAIN], copied], ignore_index=True))

    return apply


def _worse(value: str, by: Callable[[pd.Series], pd.Series]) -> Callable[[Result], Result]:
    """The main reading's column becomes a function of the base's."""

    def apply(result: Result) -> Result:
        frame = result.tables["runs"].copy()
        mine = frame["arm"] == MAIN
        frame.loc[mine, value] = by(frame.loc[mine, "seed"].map(per_seed(result, value, "base")))
        return result.with_table("runs", frame)

    return apply


def _accuracies_reversed(result: Result) -> Result:
    frame = result.tables["runs"]
    return result.with_table("runs", frame.assign(accuracy=1 - frame["accuracy"]))


def _rewards_exchanged(result: Result) -> Result:
    frame = result.tables["tuning"].copy()
    swap = {"graph/plain/raw/steps": "graph/centred/raw/steps"}
    frame["arm"] = frame["arm"].replace(swap | {new: old for old, new in swap.items()})
    return result.with_table("tuning", frame)


CLAIMS: list[Claim] = [
    Claim(
        "unbiased",
        "The estimator is unbiased: over chains whose entities are drawn from the graph policy and whose other tokens "
        "come from the base model, its mean is the value found by enumeration.",
        (),
        check_unbiased,
        Control("chains drawn from the base model alone stand in", _drawn_from_the_model),
        reported="a theorem",
    ),
    Claim(
        "variance",
        "Its variance falls as one over the number of chains.",
        (),
        check_variance,
        Control("the variance of the smallest n stands in for all", _one_variance_for_all),
        reported="a bound of order 1/n",
    ),
    Claim(
        "value",
        "After the alignment the estimated value is higher than the base model's and than that of supervised "
        "fine-tuning.",
        (),
        check_value,
        Control("the base model stands in for the aligned one", _stand_in("base")),
        reported="a table; its numbers were not read",
    ),
    Claim(
        "accuracy",
        "The aligned model answers multi-hop questions as well as the base model or better.",
        (),
        check_accuracy,
        Control(
            "an accuracy below the base's by twice the margin",
            _worse("accuracy", lambda base: base - 2 * ACCURACY_MARGIN),
        ),
        reported="accuracy at or above base for most of four models; numbers not read",
    ),
    Claim(
        "retention",
        "What is unrelated to the graph stays as it was, where supervised fine-tuning loses it.",
        (),
        check_retention,
        Control("supervised fine-tuning stands in for the alignment", _stand_in("sft")),
        reported="knowledge tests at base level, lower after fine-tuning; numbers not read",
    ),
    Claim(
        "diversity",
        "Generated chains stay as diverse as before.",
        (),
        check_diversity,
        Control("a tenth of the base's distinct bigrams is lost", _worse("distinct", lambda base: 0.9 * base)),
        reported="Self-BLEU, Distinct-2 and AlignScore kept; numbers not read",
    ),
    Claim(
        "ranking",
        "The estimated value tells which policy answers better.",
        (),
        check_ranking,
        Control("every policy's accuracy becomes its share of wrong answers", _accuracies_reversed),
        reported="what offline evaluation is for; no figure read",
    ),
    Claim(
        "sign",
        "Plain ascent on text of the graph makes the model less likely to say what that text says; subtracting a "
        "baseline from the reward undoes a part of it.",
        (),
        check_sign,
        Control("the plain and the centred reward change places", _rewards_exchanged),
        reported="not in the paper: ours, because log π_0 ≤ 0",
    ),
]
