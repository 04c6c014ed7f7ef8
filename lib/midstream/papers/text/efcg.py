"""A model meets tens of requirements at once after learning to rebuild texts from all that code can say of them.

Reference: Yun, Peng & Shang, "UltraGen: Extremely Fine-grained Controllable Generation via Attribute Reconstruction and
Global Preference Optimization", 2025, arXiv 2502.12375. The abstract and the released benchmark's scoring were read;
neither the paper's numbers nor its training code.

Glossary (symbol → name here → shape)
    x           text                a raw text
    A(x)        pool, constraints   what code finds to be true of x: 45 constraints and more, in random order
    AR          reconstruction      fine-tuning on −log p(x | A(x))
    w           witness             a text stitched from sentences of two texts, whose attributes are a new combination
    GPO         preference          −log σ(β [Δ log π/π_ref (chosen) − Δ log π/π_ref (rejected)]), answers to A(w)
    β           beta                how far the policy may leave π_ref, which is the model after AR
    CSR         csr                 share of constraints that an answer meets, strict checks

Deviations
    - Hard attributes only, every one checked by code. The paper's prompts also hold soft ones, which a large model
      writes and judges; so there is nothing here of its step that finds and corrects wrong attributes.
    - The default model is a small Llama trained here from scratch on stories from a grammar, where the paper tunes
      large ones. Its backbone has learned stories behind at most 4 requirements, as most work on the question has it.
      SmolLM2-135M with adapters is the preset `smollm2`: on two CPU cores one step of 45 attributes takes it seconds.
    - AR draws how many of a text's attributes it shows, from 4 to 45. That prompts always hold about 45 is the paper's.
    - Inferred: attribute sets are composed by stitching a witness from a text and, out of a few, that text which shares
      most keywords with it (what goes together stays together), so that each set is satisfiable. The witness itself is
      never shown to the model.
    - Inferred, with the other reading run beside it (`pair_rules`): of several answers the one with the highest CSR is
      chosen and the one with the lowest rejected (`extremes`), or the two that differ most in CSR among those that are
      equally long to within a tenth (`equal length`). Equal CSR makes no pair. β is chosen on validation sets.
    - Added: the backbone trained on for as many steps with few requirements (`few`), AR on texts dealt to other texts'
      attributes, preferences with a coin instead of CSR, and fine-tuning on the best of several answers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control
from midstream.data import stories
from midstream.fingerprint import made_by
from midstream.measure import Interval, paired_interval, t_interval
from midstream.measure.constraints import Lexicon, constraints_of, prompt_of, read, satisfaction_rate, satisfied, words
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit
from midstream.train.preferences import (
    Batch,
    Rows,
    answer_log_probs,
    answer_loss,
    batches_of,
    by_pair,
    collate,
    encode,
    preference_loss,
    sample,
)

# ---------------------------------------------------------------------------------------------- parameters

PairRule = Literal["extremes", "equal length"]
Counts = tuple[int, ...]
Rates = tuple[float, ...]
STORIES = "stories"


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("stories-lm", min_length=1, description="a causal LM: packaged, tiny:…, folder or Hub id")
    corpus: str = Field(STORIES, min_length=1, description="`stories`, or a data set with English texts")
    n_texts: int = Field(800, ge=50, le=10_000_000, description="training texts")
    counts: Counts = Field((4, 16, 45), min_length=3, description="attributes in test prompts, rising")
    steps: int = Field(16, ge=2, le=1_000_000, description="updates of AR, and of its rivals")
    batch_size: int = Field(16, ge=2, le=4096, multiple_of=2, description="texts a step")
    rates: Rates = Field((3e-3,), min_length=1, description="AdamW's peak rates tried for AR and its rivals")
    muon: float = Field(2.0, ge=0, le=100, description="Muon's rate for linear layers over AdamW's; 0: AdamW alone")
    rank: int = Field(0, ge=0, le=1024, description="rank of LoRA's adapters; 0 trains all weights")
    n_composed: int = Field(24, ge=4, le=1_000_000, description="attribute sets composed for GPO")
    samples: int = Field(4, ge=2, le=64, description="answers drawn to each of them")
    gpo_steps: int = Field(6, ge=1, le=1_000_000, description="updates of GPO, and of its rivals")
    gpo_rates: Rates = Field((1e-3,), min_length=1, description="AdamW's peak rates tried for GPO and its rivals")
    betas: Rates = Field((0.1,), min_length=1, description="values of β tried")
    pair_rules: tuple[PairRule, ...] = Field(("extremes",), min_length=1, description="readings of GPO; the first is it")
    temperature: float = Field(0.7, gt=0, le=2, description="of all sampling")
    top_p: float = Field(0.95, gt=0, le=1, description="share of the probability that is sampled from")
    max_tokens: int = Field(72, ge=8, le=4096, description="tokens of the longest answer")
    n_validation: int = Field(8, ge=4, le=100_000, description="prompts on which rates and β are chosen")
    n_test: int = Field(10, ge=4, le=100_000, description="test texts, and composed test sets, for each seed")
    sample_batch: int = Field(128, ge=1, le=4096, description="answers drawn at once")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the training's forward passes")

    @field_validator("counts")
    @classmethod
    def _rising(cls, counts: Counts) -> Counts:
        if list(counts) != sorted(set(counts)) or counts[0] < 1:
            raise ValueError(f"counts of attributes rise and are at least 1, not {counts}")
        return counts


_FULL = Params(
    n_texts=6000,
    counts=(4, 8, 16, 32, 45),
    steps=120,
    rates=(1e-3, 3e-3),
    n_composed=256,
    gpo_steps=60,
    gpo_rates=(3e-4, 1e-3),
    betas=(0.1, 0.5),
    pair_rules=("extremes", "equal length"),
    n_validation=32,
    n_test=40,
)
_PAPER = _FULL.model_copy(
    update={
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "corpus": "sst2",
        "steps": 1000,
        "rates": (5e-6, 2e-5),
        "muon": 0.0,
        "n_composed": 4000,
        "gpo_steps": 400,
        "gpo_rates": (5e-7, 5e-6),
        "max_tokens": 256,
        "n_test": 200,
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "a few updates, three seeds: see every part at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "nine arms, three seeds, up to 45 attributes: settle the claims", minutes=45, memory_gib=4),
    "smollm2": Preset(
        _FULL.model_copy(
            update={"model": "smollm2", "rank": 16, "muon": 0.0, "rates": (3e-4, 1e-3), "gpo_rates": (5e-5, 2e-4)}
        ),
        "a real language model with adapters, on the same stories",
        minutes=120,
        memory_gib=24,
        needs="a GPU with 16 GiB",
        gpus=1,
    ),
    "paper": Preset(
        _PAPER,
        "a large model on real sentences, hard attributes only; which model and texts the paper tunes on was not read",
        minutes=1500,
        memory_gib=320,
        needs="Llama-3.1-8B-Instruct and SST-2 from the Hub, a judge for soft attributes, and GPUs with 320 GiB together",
        gpus=4,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The revision of the model and of the corpus a run loads."""
    texts = made_by(stories.story) if params.corpus == STORIES else data.revision(params.corpus)
    return {params.model: zoo.revision(params.model), params.corpus: texts}


# ------------------------------------------------------------------------------------- texts and what is true of them

@dataclass(frozen=True)
class Example:
    """A text, and constraints that are all true of it, in random order."""

    text: str
    pool: list[Constraint]


@dataclass(frozen=True)
class Corpus:
    """Texts of the three splits with their constraints, and how to tell a combination that training must not hold."""

    lexicon: Lexicon
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    held_out: Callable[[str], bool] | None = None


def corpus(params: Params, seed: int) -> Corpus:
    """Texts drawn for a seed; of stories, those of validation and test hold no held-out pair of words either."""
    few = max(params.n_validation, params.n_test)
    if params.corpus == STORIES:
        train = stories.stories(params.n_texts, seed=seed)
        rest = [text for text in stories.stories(4 * few, seed=seed, split="test") if not stories.holds_out(text)]
        held_out = stories.holds_out
    else:
        rng = random.Random(seed)
        train, rest = (data.load(params.corpus, split).table["text"].tolist() for split in ("train", "test"))
        train, rest = _drawn(train, params.n_texts, rng), _drawn(rest, 2 * few, rng)
        held_out = None
    lexicon = Lexicon.of(train[:2000])
    examples = partial(_examples, lexicon=lexicon, rng=random.Random(seed), least=params.counts[-1])
    return Corpus(lexicon, examples(train), examples(rest[:few]), examples(rest[few : 2 * few]), held_out)


def _drawn(texts: list[str], count: int, rng: random.Random) -> list[str]:
    return rng.sample(texts, min(count, len(texts)))


def _examples(texts: Sequence[str], lexicon: Lexicon, rng: random.Random, least: int) -> list[Example]:
    return [Example(text, constraints_of(text, lexicon, rng, least)) for text in texts]


def stitch(one: str, other: str, rng: random.Random) -> str:
    """A witness: at each place the sentence that stands there in one of two texts, drawn anew for every place."""
    parts = read(one).parts, read(other).parts
    length = rng.choice([len(part) for part in parts])
    return " ".join(rng.choice([part for part in parts if place < len(part)])[place] for place in range(length))


def compose(texts: Sequence[Example], among: Corpus, count: int, rng: random.Random, *, unseen: bool) -> list[Example]:
    """Sets of constraints that are new combinations, each satisfiable since all are true of its witness.

    The second text is that of `PARTNERS` which shares most keywords with the first. Where the corpus holds pairs of
    words out, every witness has such a pair if `unseen`, and none otherwise.
    """
    least = min(len(each.pool) for each in texts)
    made: list[Example] = []
    for _ in range(1000 * count):
        one, *others = rng.sample(range(len(texts)), min(len(texts), 1 + PARTNERS))
        keywords = _keywords(texts[one], among.lexicon)
        nearest = max(others, key=lambda other: len(keywords & _keywords(texts[other], among.lexicon)))
        witness = stitch(texts[one].text, texts[nearest].text, rng)
        if among.held_out is None or among.held_out(witness) == unseen:
            made.append(Example(witness, constraints_of(witness, among.lexicon, rng, least)))
        if len(made) == count:
            return made
    raise ValueError(f"Only {len(made)} of {count} sets could be composed from {len(texts)} texts; give more texts.")


PARTNERS = 8


def _keywords(example: Example, lexicon: Lexicon) -> set[str]:
    return lexicon.keywords.keys() & set(read(example.text).lower)


# --------------------------------------------------------------------------------------------------- the learners


@dataclass(frozen=True)
class Bench:
    """What all arms of a seed share."""

    backbone: Any
    tokenizer: Any
    texts: Corpus
    params: Params
    seed: int


def reconstruction_rows(bench: Bench, most: int, rng: random.Random, *, shuffled: bool = False) -> Rows:
    """Endless texts behind some of their constraints, as tokens: from the fewest that are tested to `most`.

    `shuffled` deals each text the constraints of another one.
    """
    train = bench.texts.train
    while True:
        example = rng.choice(train)
        source = rng.choice(train) if shuffled else example
        shown = rng.sample(source.pool, rng.randint(min(most, bench.params.counts[0]), most))
        yield encode(bench.tokenizer, prompt_of(shown), " " + example.text)


def answer_rows(bench: Bench, answers: Sequence[tuple[str, str]], rng: random.Random) -> Rows:
    """Endless prompts with the answers given to them, in random order."""
    while True:
        for prompt, answer in rng.sample(list(answers), len(answers)):
            yield encode(bench.tokenizer, prompt, " " + answer)


def tuned(model: Any, batches: Iterable[Any], loss: Any, steps: int, rate: float, params: Params) -> Any:
    """A copy of a model after training: all weights, or adapters that are merged into them at the end."""
    twin = copy.deepcopy(model).requires_grad_(True)
    if params.rank:
        from peft import LoraConfig, get_peft_model

        twin = get_peft_model(twin, LoraConfig(r=params.rank, lora_alpha=2 * params.rank, target_modules="all-linear"))
    schedule = Schedule(steps, rate, muon=params.muon * rate, warmup=0.1, floor=0.1)
    fit(twin, batches, loss, schedule, precision=params.precision, cpu=model.device.type == "cpu")
    return (twin.merge_and_unload() if params.rank else twin).requires_grad_(False)


def reconstruction(bench: Bench, rate: float, *, most: int, shuffled: bool = False) -> Any:
    """AR: the backbone after learning −log p(x | A(x)) with up to `most` constraints."""
    rng = random.Random(bench.seed)
    rows = reconstruction_rows(bench, most, rng, shuffled=shuffled)
    batches = batches_of(rows, bench.params.batch_size, rng)
    return tuned(bench.backbone, batches, answer_loss, bench.params.steps, rate, bench.params)


def draw(model: Any, bench: Bench, prompts: Sequence[str], seed: int) -> list[str]:
    """One sampled answer to each prompt."""
    params = bench.params
    shape = {"most": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}
    return sample(model, bench.tokenizer, prompts, seed=seed, batch=params.sample_batch, **shape)


# ------------------------------------------------------------------------------------ global preference optimisation


@dataclass(frozen=True)
class Attempt:
    """A prompt, several answers to it, and the CSR of each."""

    prompt: str
    answers: list[str]
    rates: list[float]


def attempts(model: Any, bench: Bench) -> list[Attempt]:
    """Several answers of the model after AR to each composed set, cut to a number of constraints drawn for it."""
    params, rng = bench.params, random.Random(f"compose/{bench.seed}")
    sets = compose(bench.texts.train, bench.texts, params.n_composed, rng, unseen=False)
    shown = [each.pool[: rng.randint(params.counts[0], params.counts[-1])] for each in sets]
    prompts = [prompt_of(constraints) for constraints in shown]
    answers = draw(model, bench, [prompt for prompt in prompts for _ in range(params.samples)], bench.seed)
    made = []
    for row, (prompt, constraints) in enumerate(zip(prompts, shown, strict=True)):
        mine = answers[row * params.samples : (row + 1) * params.samples]
        made.append(Attempt(prompt, mine, [satisfaction_rate(constraints, answer) for answer in mine]))
    return made


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt and their CSR, the chosen one first."""

    prompt: str
    answers: tuple[str, str]
    rates: tuple[float, float]

    def swapped(self) -> Pair:
        """The same answers, the rejected one chosen."""
        return Pair(self.prompt, self.answers[::-1], self.rates[::-1])


def pair_of(attempt: Attempt, rule: PairRule) -> Pair | None:
    """The pair that a rule makes of an attempt; none where the CSR is equal, or no two answers equally long."""
    options = [
        Pair(attempt.prompt, (attempt.answers[i], attempt.answers[j]), (attempt.rates[i], attempt.rates[j]))
        for i, j in permutations(range(len(attempt.answers)), 2)
        if attempt.rates[i] > attempt.rates[j]
        and (rule == "extremes" or equally_long(attempt.answers[i], attempt.answers[j]))
    ]
    return max(options, key=lambda pair: pair.rates[0] - pair.rates[1], default=None)


def equally_long(one: str, other: str) -> bool:
    """Whether the longer text has at most a tenth more words."""
    short, long = sorted((len(words(one)), len(words(other))))
    return long <= 1.1 * short


def pairs_of(made: Sequence[Attempt], rule: PairRule) -> list[Pair]:
    """One pair of each attempt that has one. Raises `ValueError` where none has."""
    pairs = [pair for attempt in made if (pair := pair_of(attempt, rule))]
    if not pairs:
        raise ValueError("All answers to each prompt have equal CSR: draw more of them, or train AR for longer.")
    return pairs


def coin(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The control: which answer is chosen is drawn at random."""
    rng = random.Random(f"coin/{seed}")
    return [pair.swapped() if rng.random() < 0.5 else pair for pair in pairs]


def pair_batches(bench: Bench, reference: Any, pairs: Sequence[Pair]) -> Iterator[Batch]:
    """Endless batches of pairs: rows of all chosen answers, then of all rejected ones, and π_ref's log-probabilities.

    `reference` is (pairs, 2).
    """
    rng = random.Random(f"pairs/{bench.seed}")
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row].prompt))
    size = max(1, min(bench.params.batch_size // 2, len(pairs)))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    made: dict[int, Batch] = {}
    while True:
        for number in rng.sample(range(len(groups)), len(groups)):
            if number not in made:
                made[number] = _referred(bench, reference, [pairs[row] for row in groups[number]])
            yield made[number]


def _referred(bench: Bench, reference: Any, pairs: Sequence[Pair]) -> Batch:
    """One batch of pairs with the reference's log-probabilities (pairs, 2), in the precision of the training."""
    rows = [
        encode(bench.tokenizer, pair.prompt, " " + pair.answers[side]) for side in (0, 1) for pair in pairs
    ]
    batch = collate(rows)
    device = reference.device
    there = {name: value.to(device) for name, value in batch.items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bench.params.precision == "bfloat16"):
        log_probs = by_pair(answer_log_probs(reference, there))
    return {**batch, "reference": log_probs.cpu()}


def preference(bench: Bench, reference: Any, pairs: Sequence[Pair], rate: float, beta: float) -> Any:
    """GPO: the model after AR, trained by DPO on pairs of its own answers, itself the reference."""

    def loss(model: Any, batch: Batch) -> Tensor:
        return preference_loss(by_pair(answer_log_probs(model, batch)), batch["reference"], beta)

    batches = pair_batches(bench, reference, pairs)
    return tuned(reference, batches, loss, bench.params.gpo_steps, rate, bench.params)


def best_of_n(bench: Bench, reference: Any, made: Sequence[Attempt], rate: float) -> Any:
    """The rival: as many updates on the best answer to each prompt, by cross-entropy, without pairs."""
    rng = random.Random(f"best/{bench.seed}")
    best = [(each.prompt, each.answers[int(np.argmax(each.rates))]) for each in made]
    batches = batches_of(answer_rows(bench, best, rng), bench.params.batch_size, rng)
    return tuned(reference, batches, answer_loss, bench.params.gpo_steps, rate, bench.params)
