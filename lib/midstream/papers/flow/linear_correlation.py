"""A linear map turns the next-token logits of one prompt into those of a related one, whatever stands for X in both.

Reference: Peng et al., "Linear Correlation in LM's Compositional Generalization and Hallucination", 2025, arXiv
2502.04520. What is known here of the fit and the reading of W comes from the published code; the experiments with
updates, and the last part, are known from the abstract alone.

Glossary (symbol → name here → shape)
    X           strings             random words of the vocabulary, the same in both prompts
    Y1          source              (strings, source tokens) logits after the first prompt, at one domain's tokens
    Y2          target              (strings, target tokens) the same after the second prompt
    W, b        LinearMap           Y2 ≈ Y1 W + b, least squares on every other string
    r           correlation         Pearson, for each target token over the other strings; mean over tokens
    Hit@k       hit                 share of source names whose true partner is among the k largest of its row of W

Deviations
    - Llama-3-8B and 1,000 X there, 10,000 in the paper's text; SmolLM2-135M-Instruct and Gemma 3 270M here, with fewer
      X but at most 24 names a domain, so that fitted rows outnumber regressors many times (500 against 242 there).
    - A name counts only if all of it is one token; the published code also takes a whole first word ("New").
    - The text speaks of log-probabilities, the code takes raw logits. Here raw logits, log-probabilities and logits
      centred over the domain all run; a common offset of all tokens, which raw logits share, is gone in the last.
    - Added: ridge with a penalty chosen by leaving out fitted rows one at a time; as many regressors from an unrelated
      prompt, and from random tokens of the same prompt; shuffled X; Hit@k of facts exchanged among names; W in
      units of standard deviations, the cosine of output embeddings and the model's own answer beside W's reading.
    - Resilience: no base and instruct pair is packaged, so a copy is tuned briefly by LoRA on film reviews.
    - Updates (inferred): random strings are taught cities by LoRA, all of a seed at once. A country rises by its
      centred logit's change, less that of the same country for strings that were taught other cities.
    - Left out: the feed-forward network on vocabulary representations, whose training is not known to us.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control, PaperNumber
from midstream.errors import RequestError
from midstream.measure import Interval, paired_interval, t_interval
from midstream.measure.icl import batches, last_logits, pad_right
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule
from midstream.train.adapted import adapted
from midstream.train.language import next_token_loss, random_windows, stream

Form = Literal["raw", "log-probability", "centred"]
Pair = tuple[str, str]
Array = np.ndarray

PROMPTS = {
    "city": "{} lives in the city of",
    "country": "{} lives in the country of",
    "language": "{} speaks",
    "plus1": "{}+1=",
    "plus2": "{}+2=",
    "pet": "{} has a pet",
}
"""What X is put into; the first two are the paper's example, the others ours."""
FIRST: Pair = ("city", "country")
PAIRS: tuple[Pair, ...] = (
    FIRST,
    ("country", "city"),
    ("city", "language"),
    ("country", "language"),
    ("plus1", "plus2"),
)
UNRELATED = "pet"
ASKED = "{} is a city in the country of"
"""Asks the model itself for a city's country."""
FORMS: tuple[Form, ...] = ("raw", "log-probability", "centred")
PENALTIES = 10.0 ** np.arange(-2, 6)
"""Ridge penalties, in squared logits summed over rows."""
PETS = (
    "dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse rat elephant monkey snake frog fish bird "
    "eagle owl duck goose chicken turkey whale shark dolphin deer camel donkey zebra giraffe turtle bee ant spider "
    "butterfly"
)

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("smollm2", min_length=1, description="a causal model on which everything is run")
    other_models: tuple[str, ...] = Field((), description="more models, for the map from city to country alone")
    n_strings: int = Field(56, ge=20, le=1_000_000, description="strings X per seed; every other one is fitted")
    max_names: int = Field(10, ge=4, le=10_000, description="most names in a domain, all of them single tokens")
    n_facts: int = Field(6, ge=4, le=1000, description="strings per seed that are taught a city, half where W is right")
    update_steps: int = Field(5, ge=1, le=10_000, description="training steps that teach them")
    update_rate: float = Field(2e-3, gt=0, le=1, description="their peak learning rate")
    tune_steps: int = Field(6, ge=1, le=1_000_000, description="training steps on film reviews before the map is tried")
    tune_rate: float = Field(1e-3, gt=0, le=1, description="their peak learning rate")
    tune_batch: int = Field(2, ge=1, le=4096, description="windows of 32 tokens in their batch")
    rank: int = Field(8, ge=1, le=512, description="rank of the adapters that all tuning trains")
    batch_size: int = Field(28, ge=1, le=4096, description="prompts read at once")


_FULL = Params(
    n_seeds=5,
    other_models=("gemma3-270m",),
    n_strings=256,
    max_names=24,
    n_facts=16,
    update_steps=10,
    tune_steps=24,
    tune_batch=4,
    batch_size=40,
)
_PAPER = Params(
    model="meta-llama/Meta-Llama-3-8B",
    n_strings=1000,
    max_names=300,
    n_facts=40,
    update_steps=30,
    update_rate=2e-4,
    tune_steps=1000,
    tune_rate=2e-4,
    tune_batch=32,
    rank=16,
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(
        Params(), "one small model, ten names a domain, 56 strings: see the method at work", minutes=1, memory_gib=4
    ),
    "full": Preset(_FULL, "two small models, five seeds: settle the claims", minutes=15, memory_gib=6),
    "paper": Preset(
        _PAPER,
        "the paper's model with the 1,000 strings of its published run",
        minutes=60,
        memory_gib=40,
        needs="Llama-3-8B from the Hub (its licence accepted there) and a GPU with 40 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The revisions of the models, of the facts and of the film reviews."""
    models = {name: zoo.revision(name) for name in (params.model, *params.other_models)}
    return {**models, **{name: data.revision(name) for name in ("cities", "movies")}}


# ----------------------------------------------------------------------------------- names, facts and strings


@dataclass(frozen=True)
class Domain:
    """Names that are one token each, and these tokens."""

    names: list[str]
    ids: list[int]


def domain(tokenizer: Any, names: Sequence[str], limit: int, lead: str = " ") -> Domain:
    """The first `limit` names that are a single token after `lead`; each token once.

    Raises `RequestError` where fewer than four are left, which is too few for a map.
    """
    found: dict[int, str] = {}
    for name in names:
        ids = tokenizer(lead + name, add_special_tokens=False).input_ids
        if len(ids) == 1:
            found.setdefault(ids[0], name)
    kept = dict(list(found.items())[:limit])
    if len(kept) < 4:
        raise RequestError(
            f"Only {len(kept)} of the {len(names)} names from {names[0]!r} on are one token of this model, "
            "at least 4 are needed; take a model with a larger vocabulary."
        )
    return Domain(list(kept.values()), list(kept))


@dataclass(frozen=True)
class World:
    """The domain read after every prompt, and the true partner of each name for some pairs of prompts."""

    domains: dict[str, Domain]
    facts: dict[Pair, dict[str, str]]


def world(tokenizer: Any, limit: int) -> World:
    """Cities (capitals of populous countries first), their countries and languages, pets and digits."""
    table = pd.concat([data.load("cities", "train").table, data.load("cities", "test").table])
    table = table.sort_values(["capital", "country_population", "population"], ascending=False)
    countries = domain(tokenizer, table["country"].drop_duplicates().tolist(), len(table))
    usable = table[table["country"].isin(countries.names) & (table["text"] != table["country"])]
    cities = domain(tokenizer, usable["text"].tolist(), limit)
    country_of = usable.set_index("text")["country"].to_dict()
    needed = [country_of[city] for city in cities.names]
    countries = domain(tokenizer, [*dict.fromkeys(needed), *countries.names], max(limit, len(set(needed))))
    main = table.drop_duplicates("country").set_index("country")["language"]
    languages = domain(tokenizer, [main[name] for name in countries.names if main[name]], limit)
    digits = domain(tokenizer, list("0123456789"), limit, lead="")
    domains = {"city": cities, "country": countries, "language": languages, "plus1": digits, "plus2": digits}
    facts = {
        FIRST: {city: country_of[city] for city in cities.names},
        ("country", "language"): {name: main[name] for name in countries.names if main[name] in languages.names},
        ("plus1", "plus2"): {a: str(int(a) + 1) for a in digits.names if str(int(a) + 1) in digits.names},
    }
    return World({**domains, UNRELATED: domain(tokenizer, PETS.split(), limit)}, facts)


def string_pool(tokenizer: Any, excluded: Collection[str]) -> list[str]:
    """Every word of the vocabulary that is one token at the beginning of a text: three letters or more, no name."""
    words = sorted({token.lstrip("Ġ▁") for token in tokenizer.get_vocab()})
    words = [word for word in words if len(word) >= 3 and word.isascii() and word.isalpha() and word not in excluded]
    encoded = tokenizer(words, add_special_tokens=False).input_ids
    return [word for word, ids in zip(words, encoded, strict=True) if len(ids) == 1]


# --------------------------------------------------------------------------------------------- logits and maps


@dataclass(frozen=True)
class Reading:
    """Logits (strings, tokens) after one prompt at chosen tokens, and the logarithm of the sum over all (strings,)."""

    logits: Array
    normalizer: Array
    ids: list[int]

    def at(self, ids: Sequence[int], form: Form) -> Array:
        """The logits of some of the tokens, (strings, tokens): raw, as log-probabilities, or centred over them."""
        chosen = self.logits[:, [self.ids.index(i) for i in ids]]
        if form == "log-probability":
            return chosen - self.normalizer[:, None]
        return chosen - chosen.mean(1, keepdims=True) if form == "centred" else chosen


def prompts(tokenizer: Any, template: str, strings: Sequence[str]) -> list[Tensor]:
    """The tokens of a template with each string in its place, with what the tokenizer puts before a text."""
    return [torch.tensor(ids) for ids in tokenizer([template.format(string) for string in strings]).input_ids]


@torch.no_grad()
def read_logits(loaded: Any, template: str, strings: Sequence[str], ids: Sequence[int], batch_size: int) -> Reading:
    """Next-token logits at the tokens `ids` after a template with each string in it; the last position alone."""
    queries = prompts(loaded.tokenizer, template, strings)
    logits, normalizer = np.empty((len(queries), len(ids))), np.empty(len(queries))
    for chosen, group in batches(queries, batch_size):
        rows = last_logits(loaded.model, *pad_right(group, pad=0)).float()
        logits[chosen] = rows[:, list(ids)].double().cpu()
        normalizer[chosen] = rows.logsumexp(-1).double().cpu()
    return Reading(logits, normalizer, list(ids))


@dataclass(frozen=True)
class LinearMap:
    """Y2 ≈ Y1 W + b: `weights` (source, target) and `bias` (target,)."""

    weights: Array
    bias: Array

    def __call__(self, source: Array) -> Array:
        """Predicted target logits (strings, target) of source logits (strings, source)."""
        return source @ self.weights + self.bias


def least_squares(source: Array, target: Array) -> LinearMap:
    """W and b by ordinary least squares with an intercept; of several solutions the smallest W."""
    weights = np.linalg.lstsq(source - source.mean(0), target - target.mean(0), rcond=1e-10)[0]
    return LinearMap(weights, target.mean(0) - source.mean(0) @ weights)


def ridge(source: Array, target: Array) -> LinearMap:
    """The same with a penalty on |W|², the one of `PENALTIES` that predicts rows best that its fit has left out.

    With H the matrix that turns targets into fitted values, a row left out is missed by its residual / (1 − H_ii).
    """
    y1, y2 = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(y1, full_matrices=False)
    projected = u.T @ y2

    def missed(penalty: float) -> float:
        shrunk = s**2 / (s**2 + penalty)
        leverage = 1 / len(y1) + (u**2) @ shrunk
        residual = y2 - u @ (shrunk[:, None] * projected)
        return float(np.square(residual / (1 - leverage)[:, None]).mean())

    best = min(PENALTIES, key=missed)
    weights = vt.T @ ((s / (s**2 + best))[:, None] * projected)
    return LinearMap(weights, target.mean(0) - source.mean(0) @ weights)


FITS = {"ols": least_squares, "ridge": ridge}


def correlations(predicted: Array, true: Array) -> Array:
    """Pearson's r of every column, (tokens,); a column without variance has none and counts as 0."""
    a, b = predicted - predicted.mean(0), true - true.mean(0)
    scale = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    return np.divide((a * b).sum(0), scale, out=np.zeros(a.shape[1]), where=scale > 1e-12)


def held_out(source: Array, target: Array, fit: str = "ols", rows: int | None = None) -> Array:
    """r (tokens,) on the odd rows of a map fitted on the even ones, or on the first `rows` of these."""
    learned = FITS[fit](source[::2][:rows], target[::2][:rows])
    return correlations(learned(source[1::2]), target[1::2])


# ----------------------------------------------------------------------------------------------- reading W


def standardized(weights: Array, source: Array, target: Array) -> Array:
    """W in units of standard deviations: how far target j goes when source i goes one of its own."""
    return weights * source.std(0)[:, None] / target.std(0)


def cosines(model: Any, source: Domain, target: Domain) -> Array:
    """Cosine of the output embeddings of two domains' tokens, (source, target): no prompt is read."""
    table = model.get_output_embeddings().weight.detach()
    rows = [torch.nn.functional.normalize(table[each.ids].float(), dim=-1) for each in (source, target)]
    return (rows[0] @ rows[1].T).double().cpu().numpy()


def rank_of(scores: Array) -> Array:
    """The rank of every column within its row, 1 for the largest: (source, target)."""
    return (-scores).argsort(1).argsort(1) + 1


def hits(scores: Array, source: Domain, target: Domain, facts: dict[str, str]) -> dict[str, float]:
    """Hit@1 and Hit@5 of true partners, and of the partners that the other names have instead: chance.

    The latter is what a row's favourites would score if they were everyone's favourites.
    """
    known = [name for name in source.names if name in facts]
    truths = np.array([target.names.index(facts[name]) for name in known])
    ranks = rank_of(scores)[[source.names.index(name) for name in known]][:, truths]  # (known, facts)
    own, other = np.diag(ranks), ranks[truths[:, None] != truths]
    return {f"{of}{k}": float((r <= k).mean()) for of, r in (("hit", own), ("chance", other)) for k in (1, 5)}


# -------------------------------------------------------------------------------------------------- the experiment


@dataclass
class Bench:
    """One model and one seed: strings, what was read of them, and more strings to be taught."""

    loaded: Any
    world: World
    params: Params
    seed: int
    strings: list[str]
    fresh: list[str]
    random_ids: list[int]
    readings: dict[str, Reading]

    def read(self, prompt: str, strings: Sequence[str]) -> Reading:
        """Logits after one of the prompts at its domain and the random tokens."""
        ids = list(dict.fromkeys([*self.world.domains[prompt].ids, *self.random_ids]))
        return read_logits(self.loaded, PROMPTS[prompt], strings, ids, self.params.batch_size)

    def logits(self, prompt: str, form: Form) -> Array:
        """Logits (strings, names) of a prompt's own domain."""
        return self.readings[prompt].at(self.world.domains[prompt].ids, form)

    def map(self, form: Form = "raw", fit: str = "ols") -> LinearMap:
        """W and b from city to country, fitted on every other string."""
        return FITS[fit](self.logits("city", form)[::2], self.logits("country", form)[::2])


def prepare(loaded: Any, around: World, pool: Sequence[str], pairs: Sequence[Pair], params: Params, seed: int) -> Bench:
    """Draws a seed's strings and reads them after every prompt that the pairs need."""
    random = np.random.default_rng(seed)
    wanted = params.n_strings + params.n_facts
    if len(pool) < wanted:
        raise RequestError(f"{wanted} strings were asked for, this model's vocabulary has {len(pool)}; ask for fewer.")
    drawn = random.permutation(np.array(pool))[:wanted].tolist()
    widest = max(len(each.ids) for each in around.domains.values())
    named = {i for each in around.domains.values() for i in each.ids}
    others = [i for i in random.permutation(len(loaded.tokenizer))[: 4 * widest].tolist() if i not in named]
    strings, fresh = drawn[: params.n_strings], drawn[params.n_strings :]
    bench = Bench(loaded, around, params, seed, strings, fresh, others[:widest], {})
    for prompt in dict.fromkeys([*(name for pair in pairs for name in pair), UNRELATED]):
        bench.readings[prompt] = bench.read(prompt, strings)
    return bench


def sources(bench: Bench, pair: Pair, form: Form) -> dict[str, Array]:
    """Regressors for a pair's target, as many in every arm: the related ones and three that should do worse."""
    related = bench.logits(pair[0], form)
    count, extra = related.shape[1], bench.random_ids
    unrelated = [*bench.world.domains[UNRELATED].ids, *extra][:count]
    return {
        "related": related,
        "random tokens": bench.readings[pair[0]].at(extra[:count], form),
        "unrelated": bench.readings[UNRELATED].at(unrelated, form),
        "shuffled": np.random.default_rng(bench.seed).permutation(related),
    }


def run_correlation(bench: Bench, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Rows of r on held-out strings: mean and standard deviation over target tokens."""
    for pair in pairs:
        for form in FORMS:
            target = bench.logits(pair[1], form)
            for arm, source in sources(bench, pair, form).items():
                for fit in FITS:
                    r = held_out(source, target, fit)
                    named = {"source": pair[0], "target": pair[1], "arm": arm, "form": form, "fit": fit}
                    yield {**named, "r": float(r.mean()), "sd": float(r.std())}


def run_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of r from city to country against the number of fitted rows, in multiples of the regressors."""
    target, regressors = bench.logits("country", "centred"), len(bench.world.domains["city"].ids)
    for arm, source in sources(bench, FIRST, "centred").items():
        for multiple in (1.25, 2, 3, 5):
            rows = round(multiple * regressors)
            for fit in FITS if rows <= len(target) // 2 else ():
                r = held_out(source, target, fit, rows)
                yield {"arm": arm, "multiple": multiple, "fit": fit, "r": float(r.mean())}


def run_weights(bench: Bench, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Rows of Hit@k and its chance for every way of reading a map."""
    for pair in pairs:
        if pair not in bench.world.facts:
            continue
        named = {"source": pair[0], "target": pair[1]}
        about = (bench.world.domains[pair[0]], bench.world.domains[pair[1]], bench.world.facts[pair])
        for form in FORMS:
            source, target = (bench.logits(prompt, form)[::2] for prompt in pair)
            for fit, learn in FITS.items():
                weights = learn(source, target).weights
                for reading, scores in (("W", weights), ("standardized W", standardized(weights, source, target))):
                    yield {**named, "form": form, "fit": fit, "reading": reading, **hits(scores, *about)}
        elsewhere = {"cosine": cosines(bench.loaded.model, *about[:2])}
        if pair == FIRST:
            elsewhere["asked"] = ask(bench)
        for reading, scores in elsewhere.items():
            yield {**named, "form": "", "fit": "", "reading": reading, **hits(scores, *about)}


def ask(bench: Bench) -> Array:
    """Country logits (cities, countries) when the model is asked for each city's country by name."""
    cities, countries = bench.world.domains["city"], bench.world.domains["country"]
    return read_logits(bench.loaded, ASKED, cities.names, countries.ids, bench.params.batch_size).logits


def run_facts(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of cities: the country that W points to, the true one, and its rank and weight in the city's row."""
    cities, countries = bench.world.domains["city"], bench.world.domains["country"]
    weights = bench.map().weights
    ranks = rank_of(weights)
    for row, city in enumerate(cities.names):
        truth = bench.world.facts[FIRST][city]
        column = countries.names.index(truth)
        pointed = countries.names[int(weights[row].argmax())]
        named = {"city": city, "truth": truth, "pointed": pointed}
        yield {**named, "rank": int(ranks[row, column]), "weight": float(weights[row, column])}


# ----------------------------------------------------------------------------------------------- resilience


def run_resilience(benches: Sequence[Bench]) -> Iterator[dict[str, Any]]:
    """Rows of r from city to country on the tuned model: with the old map, with a new one, and without any map.

    `unmapped` compares the old model's country logits with the new one's, for how far tuning has moved them;
    `shuffled` is a map fitted on the old model with each string's city logits in another's place.
    """
    params, loaded = benches[0].params, benches[0].loaded
    tokens = stream(loaded.tokenizer, data.load("movies").table["text"].tolist())
    windows = random_windows(tokens, params.tune_batch, 32, params.seed)
    schedule = Schedule(params.tune_steps, params.tune_rate, warmup=0.1)
    with adapted(loaded.model, windows, next_token_loss, schedule, rank=params.rank, seed=params.seed):
        tuned = [{prompt: bench.read(prompt, bench.strings) for prompt in FIRST} for bench in benches]
    for bench, readings in zip(benches, tuned, strict=True):
        after = Bench(loaded, bench.world, params, bench.seed, bench.strings, [], bench.random_ids, readings)
        for form in FORMS:
            yield from ({"seed": bench.seed, "form": form, **row} for row in _carried_over(bench, after, form))


def _carried_over(before: Bench, after: Bench, form: Form) -> Iterator[dict[str, Any]]:
    old, new = ((bench.logits("city", form), bench.logits("country", form)) for bench in (before, after))
    yield {"map": "old on old", "r": float(held_out(*old).mean())}
    yield {"map": "new on new", "r": float(held_out(*new).mean())}
    carried = before.map(form)(new[0][1::2])
    yield {"map": "old on new", "r": float(correlations(carried, new[1][1::2]).mean())}
    shuffled = np.random.default_rng(before.seed).permutation(old[0][::2])
    broken = least_squares(shuffled, old[1][::2])(new[0][1::2])
    yield {"map": "shuffled", "r": float(correlations(broken, new[1][1::2]).mean())}
    yield {"map": "unmapped", "r": float(correlations(old[1][1::2], new[1][1::2]).mean())}


# --------------------------------------------------------------------------------------------------- updates


def choose_facts(bench: Bench) -> list[str]:
    """Cities to teach: half of them such that W points to their country, half such that it points elsewhere."""
    random, half = np.random.default_rng(bench.seed), bench.params.n_facts // 2
    table = pd.DataFrame(run_facts(bench))
    right = table["pointed"] == table["truth"]
    picked = [random.permutation(table["city"][where].to_numpy(dtype=object))[:half] for where in (right, ~right)]
    return [city for group in picked for city in group]


def teach_loss(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the tokens (batch,) that shall follow prompts (batch, tokens), each ending at `last`."""
    ids, last, answers = batch
    return torch.nn.functional.cross_entropy(last_logits(model, ids, last).float(), answers.to(model.device))


def rises(change: Array, column: Sequence[int], own: Array) -> Array:
    """How far each fact's column rises (facts,): its change, less the mean over the facts that it is not `own` of.

    `change` (facts, countries); `own[i, j]` says that country j is linked to fact i, truly or by W.
    """
    values = change[np.arange(len(column)), column]
    foreign = ~own[:, column]  # (facts, columns): facts to which that country means nothing
    others = np.where(foreign, change[:, column], 0).sum(0) / np.maximum(foreign.sum(0), 1)
    return values - others


def run_updates(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of taught strings: how far the true country and the one that W points to rise, and what W predicts."""
    params, domains = bench.params, bench.world.domains
    taught = choose_facts(bench)
    strings = bench.fresh[: len(taught)]
    rows = [domains["city"].names.index(city) for city in taught]
    ids, last = pad_right(prompts(bench.loaded.tokenizer, PROMPTS["city"], strings), pad=0)
    batch = (ids, last, torch.tensor([domains["city"].ids[row] for row in rows]))
    before = {prompt: bench.read(prompt, strings) for prompt in FIRST}
    schedule = Schedule(params.update_steps, params.update_rate, warmup=0.1)
    model = bench.loaded.model
    with adapted(model, repeat(batch), teach_loss, schedule, rank=params.rank, seed=bench.seed):
        after = {prompt: bench.read(prompt, strings) for prompt in FIRST}
    changes = [
        after[prompt].at(domains[prompt].ids, "centred") - before[prompt].at(domains[prompt].ids, "centred")
        for prompt in FIRST
    ]
    learned = after["city"].at(domains["city"].ids, "raw").argmax(1) == np.array(rows)
    yield from _linked(bench, rows, changes[0], changes[1], learned)


def _linked(bench: Bench, rows: list[int], moved: Array, linked: Array, learned: Array) -> Iterator[dict[str, Any]]:
    """One row a fact from the changes of its city logits (facts, cities) and country logits (facts, countries)."""
    cities, countries = bench.world.domains["city"], bench.world.domains["country"]
    truth = [countries.names.index(bench.world.facts[FIRST][cities.names[row]]) for row in rows]
    learned_map = bench.map()
    pointed = learned_map.weights[rows].argmax(1).tolist()
    own = np.zeros(linked.shape, dtype=bool)
    own[np.arange(len(rows)), truth] = own[np.arange(len(rows)), pointed] = True
    of_truth, of_pointed = rises(linked, truth, own), rises(linked, pointed, own)
    agreement = np.corrcoef(moved @ learned_map.weights, linked)[: len(rows), len(rows) :]  # (predicted, true)
    for fact, row in enumerate(rows):
        yield {
            "city": cities.names[row],
            "truth": countries.names[truth[fact]],
            "pointed": countries.names[pointed[fact]],
            "right": truth[fact] == pointed[fact],
            "learned": bool(learned[fact]),
            "truth_rise": float(of_truth[fact]),
            "pointed_rise": float(of_pointed[fact]),
            "agreement": float(agreement[fact, fact]),
            "agreement_others": float(np.delete(agreement[:, fact], fact).mean()),
        }


def experiment(params: Params) -> Result:
    """Every part on the first model, the map from city to country on the others; one row a model, seed and arm."""
    rows: dict[str, list[dict[str, Any]]] = {}

    def add(table: str, found: Iterator[dict[str, Any]], **named: Any) -> None:
        rows.setdefault(table, []).extend({**named, **row} for row in found)

    for name in (params.model, *params.other_models):
        loaded = zoo.load(name, device="auto")
        loaded.model.requires_grad_(False)
        around, is_first = world(loaded.tokenizer, params.max_names), name == params.model
        pool = string_pool(loaded.tokenizer, {each for domain in around.domains.values() for each in domain.names})
        pairs, benches = PAIRS if is_first else (FIRST,), []
        for seed in params.seeds:
            bench = prepare(loaded, around, pool, pairs, params, seed)
            add("correlation", run_correlation(bench, pairs), model=name, seed=seed)
            add("weights", run_weights(bench, pairs), model=name, seed=seed)
            add("facts", run_facts(bench), model=name, seed=seed)
            benches.append(bench)
        if is_first:
            for bench in benches:
                add("rows", run_rows(bench), seed=bench.seed)
                add("updates", run_updates(bench), seed=bench.seed)
            add("resilience", run_resilience(benches))
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()})


# ----------------------------------------------------------------------------------------------------- the claims


def models(result: Result) -> list[str]:
    """The models of a result, the first one first."""
    return result.tables["correlation"]["model"].drop_duplicates().tolist()


def select(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows in which every named column has its value."""
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    return table


def r_of(result: Result, arm: str, form: Form, pair: Pair = FIRST, model: str = "", fit: str = "ols") -> pd.Series:
    """r of one arm by seed; the first model where none is named."""
    where = {"model": model or models(result)[0], "source": pair[0], "target": pair[1], "arm": arm}
    return select(result.tables["correlation"], **where, form=form, fit=fit).set_index("seed")["r"].sort_index()


def ahead(result: Result, arm: str, form: Form, pair: Pair = FIRST, model: str = "", fit: str = "ols") -> Interval:
    """Interval over seeds of r of the related prompt less that of another arm."""
    ours, other = (r_of(result, each, form, pair, model, fit) for each in ("related", arm))
    return paired_interval(ours, other)


def check_linear(result: Result) -> tuple[Comparison, ...]:
    """City → country: r is high, and centred logits beat an unrelated prompt and shuffled strings by far."""
    found = []
    for model in models(result):
        high = t_interval(r_of(result, "related", "raw", model=model))
        found += [Comparison(f"r of raw logits, city → country, {model}", high, threshold=0.5)]
        for arm, name in (("unrelated", "unrelated prompt"), ("shuffled", "shuffled strings")):
            what = f"r of centred logits, related − {name}, {model}"
            found += [Comparison(what, ahead(result, arm, "centred", model=model), threshold=0.1)]
    return tuple(found)


def check_pairs(result: Result) -> tuple[Comparison, ...]:
    """Every other related pair: centred logits beat as many of an unrelated prompt."""
    return tuple(
        Comparison(
            f"r of centred logits, {a} → {b}, related − unrelated", ahead(result, "unrelated", "centred", (a, b))
        )
        for a, b in PAIRS[1:]
    )


def reading(
    result: Result, model: str = "", form: str = "raw", fit: str = "ols", reading: str = "W", pair: Pair = FIRST
) -> pd.DataFrame:
    """Hit@k and chance by seed of one way of reading a map; the published code's unless told otherwise."""
    where = {"model": model or models(result)[0], "source": pair[0], "target": pair[1], "reading": reading}
    table = select(result.tables["weights"], **where, form=form, fit=fit)
    return table.set_index("seed")[["hit1", "hit5", "chance1", "chance5"]].sort_index()


def check_precise(result: Result) -> tuple[Comparison, ...]:
    """Hit@1 is more than three times chance, Hit@5 above chance."""
    found = []
    for model in models(result):
        hit = reading(result, model)
        found += [
            Comparison(f"Hit@1 − 3 × chance, {model}", paired_interval(hit["hit1"], 3 * hit["chance1"])),
            Comparison(f"Hit@5 − chance, {model}", paired_interval(hit["hit5"], hit["chance5"])),
        ]
    return tuple(found)


def carried(result: Result, which: str, form: Form = "raw") -> pd.Series:
    """r of one row of the resilience table by seed."""
    return select(result.tables["resilience"], map=which, form=form).set_index("seed")["r"].sort_index()


def check_resilient(result: Result) -> tuple[Comparison, ...]:
    """The old map on the tuned model loses less than 0.1 against a new one, though tuning moved the logits."""
    lost = paired_interval(carried(result, "old on new"), carried(result, "new on new"))
    moved = t_interval(1 - carried(result, "unmapped", "centred"))
    return (
        Comparison("r on the tuned model, old map − new map", lost, threshold=-0.1),
        Comparison("1 − r of its centred country logits with the old model's", moved, threshold=0.05),
    )


def risen(result: Result, value: str, right: bool) -> pd.Series:
    """Mean of a column of the updates by seed: learned facts for which W is right, or wrong."""
    table = select(result.tables["updates"], learned=True, right=right)
    return table.groupby("seed")[value].mean().reindex(result.tables["updates"]["seed"].unique())


def check_transfer(result: Result) -> tuple[Comparison, ...]:
    """Where W is right the true country rises, and further than where W is wrong."""
    right, wrong = (risen(result, "truth_rise", each) for each in (True, False))
    return (
        Comparison("rise of the true country where W is right", t_interval(right), unit=" nats"),
        Comparison("the same, less its rise where W is wrong", paired_interval(right, wrong), unit=" nats"),
    )


def check_hallucination(result: Result) -> tuple[Comparison, ...]:
    """Where W is wrong the country it points to rises, and further than the true one."""
    pointed, truth = (risen(result, value, False) for value in ("pointed_rise", "truth_rise"))
    return (
        Comparison("rise of the wrong country that W points to", t_interval(pointed), unit=" nats"),
        Comparison("the same, less the true country's rise", paired_interval(pointed, truth), unit=" nats"),
    )


def check_foretold(result: Result) -> tuple[Comparison, ...]:
    """The change that W makes of a fact's city logits is that of its country logits more than of other facts'."""
    table = select(result.tables["updates"], learned=True).groupby("seed")[["agreement", "agreement_others"]].mean()
    own = paired_interval(table["agreement"], table["agreement_others"])
    return (Comparison("r of foretold and true change, own fact − other facts", own),)


# ---------------------------------------------------------------------------------- controls, numbers, the list


def _stands_in(arm: str) -> Any:
    def apply(result: Result) -> Result:
        table = result.tables["correlation"]
        other = table[table["arm"] == arm].assign(arm="related")
        return result.with_table("correlation", pd.concat([table[table["arm"] != "related"], other]))

    return apply


def _facts_exchanged(result: Result) -> Result:
    table = result.tables["weights"]
    return result.with_table("weights", table.assign(hit1=table["chance1"], hit5=table["chance5"]))


def _shuffled_map(result: Result) -> Result:
    table = result.tables["resilience"]
    other = table[table["map"] == "shuffled"].assign(map="old on new")
    return result.with_table("resilience", pd.concat([table[table["map"] != "old on new"], other]))


def _right_and_wrong_exchanged(result: Result) -> Result:
    table = result.tables["updates"]
    return result.with_table("updates", table.assign(right=~table["right"].astype(bool)))


def _columns_exchanged(one: str, other: str) -> Any:
    def apply(result: Result) -> Result:
        table = result.tables["updates"]
        return result.with_table("updates", table.assign(**{one: table[other], other: table[one]}))

    return apply


def _tokyo(result: Result) -> Interval:
    table = select(result.tables["facts"], model=models(result)[0], city="Tokyo")
    return t_interval((table["pointed"] == "Japan").astype(float))


_RISES = ("truth_rise", "pointed_rise", "agreement", "agreement_others")
TOLERANCES = {"resilience.r": (0.02, 0.02), **{f"updates.{column}": (0.05, 0.05) for column in _RISES}}
"""Training carries the last digits of one machine's arithmetic further than reading does."""
_SETTING = "Llama-3-8B, 1,000 strings X, raw logits, least squares"
_SOURCE = "printed in the published notebook"

CLAIMS: list[Claim] = [
    Claim(
        "linear",
        "The logits of cities predict, by one linear map, those of countries for strings it has not seen: far better "
        "than an unrelated prompt does, or shuffled strings, also where logits are centred.",
        (
            PaperNumber(
                "mean r over country tokens",
                0.78,
                _SETTING,
                _SOURCE,
                0.04,
                "",
                lambda result: t_interval(r_of(result, "related", "raw")),
            ),
        ),
        check_linear,
        Control("shuffled strings stand in for the related prompt", _stands_in("shuffled")),
        reported="r = 0.78 ± 0.04 (over tokens) with Llama-3-8B",
    ),
    Claim(
        "pairs",
        "So do other related pairs of prompts: from country to city, from both to language, from X + 1 to X + 2.",
        (),
        check_pairs,
        Control("the unrelated prompt stands in for the related one", _stands_in("unrelated")),
        reported="for certain related pairs; which, and how strongly, is not known to us",
    ),
    Claim(
        "precise",
        "The map has learned facts: the largest weights of a city's row are its country's, far above chance.",
        (PaperNumber("Tokyo's largest weight is Japan's (1 = yes)", 1.0, _SETTING, _SOURCE, 0.0, "", _tokyo),),
        check_precise,
        Control("each city is asked for the other cities' countries", _facts_exchanged),
        reported="Tokyo's largest weight is Japan's; precision over all cities is not known to us",
    ),
    Claim(
        "resilient",
        "The map of the model before tuning still fits the tuned model, nearly as well as a new one.",
        (),
        check_resilient,
        Control("a map of shuffled strings stands in for the old one", _shuffled_map),
        reported="resilient to large-scale fine-tuning (abstract)",
    ),
    Claim(
        "transfer",
        "Teach a string a new city, and its country follows where W is right about that city.",
        (),
        check_transfer,
        Control("facts for which W is right and wrong change places", _right_and_wrong_exchanged),
        reported="updates generalise where the map agrees with the world (abstract)",
    ),
    Claim(
        "hallucination",
        "Where W is wrong, the country it wrongly points to rises instead.",
        (),
        check_hallucination,
        Control(
            "the true country and the one that W points to change places",
            _columns_exchanged("truth_rise", "pointed_rise"),
        ),
        reported="it causes hallucinations where the map deviates from the world (abstract)",
    ),
    Claim(
        "foretold",
        "The map foretells which way a taught fact moves the logits of the linked prompt.",
        (),
        check_foretold,
        Control(
            "the facts' own changes and those of other facts change places",
            _columns_exchanged("agreement", "agreement_others"),
        ),
        reported="linear correlation can tell how a model generalises (abstract)",
    ),
]
