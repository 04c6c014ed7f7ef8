"""Learning rates steered by how far each side's step moves what a vision-language model says: CoMMIT.

Reference: Wu et al., "CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models", EMNLP 2025, arXiv
2407.20454. The abstract was read, and what secondary sources say of the method; its formulas were not.

Glossary (symbol → name here → shape)
    S, T       ENCODER, LANGUAGE  the two sides: vision tower with projector, and language model
    η_S, η_T   rates              their learning rates
    r          start              η_T / η_S at the beginning, at a given √(η_S η_T)
    p(S, T)    log_probabilities  what is said at the answers' tokens (answer tokens, vocabulary)
    D_T        language           KL(p(S_t, T_t+1) ‖ p(S_t, T_t)), mean over these tokens: T's step alone
    D_S        encoder            KL(p(S_t+1, T_t) ‖ p(S_t, T_t)): S's step alone
    κ          kappa              D_T / D_S, the balance coefficient
    κ̄          smooth             moving average of log κ
    γ          gamma              strength of the scheduler
    λ          weight             weight of the auxiliary reward

Deviations
    - A miniature LLaVA of the shapes world stands for LLaVA-1.5, BLIP-2 and InternVL2. The matrices of both
      its sides are disturbed by noise, so that both have something to learn within a few dozen steps.
    - Inferred: the projector is on the encoder's side; `encoder_side` makes it the whole of it, the tower frozen. All
      weights are tuned, where the paper uses LoRA (`rank`).
    - Inferred: which divergence is the numerator (a side that learns faster must have the larger one, else the
      scheduler works backwards), and KL(new ‖ old); `divergence` takes the other direction, and every table has both.
    - Inferred: the scheduler, η_S ← η_S κ̄^γ and η_T ← η_T κ̄^−γ, which leaves their product as it is. `rule` says
      whether it starts from the last rates or always from the first ones.
    - Inferred: the auxiliary loss, −λ Σ KL(p(S_t, T_t) ‖ p with one side as it was a step ago), `reward` for each side
      or for both together.
    - Inferred: Feature CD and Language CD train one side alone for a share of the steps, then the other (`alone`; 1 is
      one side only).
    - Added: rates by gradient norms, and a scheduler that takes each step up or down by chance, as its control.
    - Dropout is off; audio and the paper's data sets are left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from midstream import zoo
from midstream.claims import Claim, Comparison, Control
from midstream.data import shapes
from midstream.data.shapes.scenes import Split
from midstream.measure import Interval, paired_interval, t_interval
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, visual_bench
from midstream.train.copies import noised
from midstream.train.llava import CachedTower, Turn, pack, tower_features
from midstream.train.packing import IGNORED
from midstream.train.sides import fit_sides
from midstream.train.steering import (
    ENCODER,
    LANGUAGE,
    SIDES,
    Arm,
    Divergence,
    Reward,
    Rule,
    Settings,
    Tuning,
    Weights,
    log_balance,
    log_probabilities,
    sides_of,
)

# ---------------------------------------------------------------------------------------------- parameters

EncoderSide = Literal["tower and projector", "projector"]


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("shapes-vlm", min_length=1, description="a LLaVA-type model: packaged or Hub id")
    prompt: str = Field("{}", min_length=2, description="what is put around a question, which stands at {}")
    encoder_side: EncoderSide = Field("tower and projector", description="what counts as the encoder's side")
    noise: float = Field(0.5, ge=0, le=10, description="noise on both sides' matrices, in their standard deviations")
    rank: int = Field(0, ge=0, le=1024, description="rank of LoRA's adapters on both sides; 0 tunes all weights")
    test_images: int = Field(8, ge=4, le=100_000, description="images of each exam, validation and test")
    steps: int = Field(6, ge=4, le=1_000_000, description="updates of every arm")
    batch_size: int = Field(2, ge=1, le=4096, description="images a step; none is seen twice")
    rates: tuple[float, ...] = Field((1e-4,), min_length=1, description="√(η_S η_T) tried for every arm")
    ratios: tuple[float, ...] = Field((0.01, 1.0, 100.0), min_length=2, description="η_T / η_S of the constant arms")
    measure_every: int = Field(2, ge=1, le=10_000, description="steps from one measurement of κ to the next")
    adjust_every: int = Field(2, ge=1, le=10_000, description="steps from one change of the rates to the next")
    smoothing: float = Field(
        0.5, ge=0, lt=1, description="share of the moving average that a new log κ leaves as it is"
    )
    gamma: float = Field(0.125, ge=0, le=1, description="strength γ of the scheduler")
    limit: float = Field(100.0, ge=1, le=1e6, description="how far a rate may go from √(η_S η_T), as a factor")
    divergence: Divergence = Field("new from old", description="KL(new ‖ old), or KL(old ‖ new)")
    rule: Rule = Field("last rates", description="which rates the scheduler multiplies")
    weights: tuple[float, ...] = Field((1.0,), min_length=1, description="weights λ of the auxiliary reward tried")
    reward: Reward = Field("each side", description="whose change the auxiliary loss rewards")
    alone: float = Field(0.5, gt=0, le=1, description="share of the steps in which coordinate descent trains one side")
    variants: bool = Field(False, description="also run the other readings of the method")


_FULL = Params(
    test_images=64,
    steps=24,
    batch_size=4,
    rates=(3e-5, 1e-4, 3e-4),
    ratios=(0.01, 0.1, 1.0, 10.0, 100.0),
    weights=(0.3, 3.0),
    variants=True,
)
_PAPER = _FULL.model_copy(
    update={
        "model": "llava-hf/llava-1.5-7b-hf",
        "prompt": "\nUSER: {} ASSISTANT:",
        "noise": 0.0,
        "rank": 16,
        "test_images": 1000,
        "steps": 600,
        "rates": (2e-5, 1e-4, 5e-4),
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "three seeds, a few updates: see every part at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "three seeds, three rates an arm, five ratios: settle the claims", minutes=45, memory_gib=4),
    "paper": Preset(
        _PAPER,
        "one of the paper's models with LoRA, on the shapes world",
        minutes=1500,
        memory_gib=130,
        needs="LLaVA-1.5-7B from the Hub and a GPU with 141 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of the model; images are made by code."""
    return {params.model: zoo.revision(params.model)}


# ------------------------------------------------------------------------------------------- the model's two sides


@dataclass(frozen=True)
class Bench:
    """A model to be tuned, and how images and questions become its batches."""

    model: Any
    tower: Any
    words: visual_bench.Bench
    params: Params

    @property
    def beginning(self) -> list[int]:
        """What stands before a question: the tokenizer's beginning, and the visual tokens."""
        return [*self.words.beginning, *[self.words.image_token] * self.words.patches]

    def turn(self, question: shapes.Question) -> Turn:
        """A question and its answer as tokens."""
        return self.words.turn(self.params.prompt.format(question.text), self.words.tokens(question.answer))

    def batches(self, count: int, size: int, seed: int, split: Split) -> Iterator[dict[str, Tensor]]:
        """`count` batches of `size` images, each with one question of every type, none of which sees another."""
        rng = random.Random(f"{seed}/{split}")
        for start in range(0, count * size, size):
            scenes = shapes.scenes(size, seed=seed, split=split, start=start)
            rows = [[self.turn(each) for each in shapes.questions(scene, rng)] for scene in scenes]
            pixels = visual_bench.pixels(self.words, scenes)
            if self.params.encoder_side == "projector":
                pixels = tower_features(self.tower, pixels)
            yield {**pack(rows, self.beginning, self.words.pad), "pixel_values": pixels}


def open_bench(loaded: Any, params: Params) -> Bench:
    """A loaded model made ready; where its tower is not tuned, images come as the tower's features."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # for short rows faster there than the fused kernel's backward
    tower = model.model.vision_tower
    if params.encoder_side == "projector":
        model.model.vision_tower = CachedTower(tower)
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    words = visual_bench.Bench(
        tower, model.model.language_model, tokenizer, model.config.image_token_id, processor, 0, "float32"
    )
    return Bench(model, tower, words, params)


def student(bench: Bench, seed: int) -> tuple[Any, Weights]:
    """A disturbed copy of the model, as tuning begins, and both sides' parameters; all else is frozen."""
    model = noised(bench.model, bench.params.noise, seed)
    if bench.params.rank:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = with_adapters(model, bench.params.rank)
    else:
        model.requires_grad_(True)
    return model, sides_of(model)


def with_adapters(model: Any, rank: int) -> Any:
    """The model with LoRA in the linear layers of both sides, and nothing else to be trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


# ----------------------------------------------------------------------------------------------------- the arms

CONSTANT, SCHEDULER, AUXILIARY = "constant", "scheduler", "scheduler, auxiliary loss"
FEATURE_CD, LANGUAGE_CD, NORMS, CHANCE = "Feature CD", "Language CD", "gradient norms", "chance"


@dataclass(frozen=True)
class Lesson:
    """What one seed's arms learn from, and the exam afterwards."""

    batches: list[dict[str, Tensor]]
    exam: list[dict[str, Tensor]]
    seed: int


def settings_of(params: Params) -> Settings:
    """How rates are steered."""
    return Settings(**{each.name: getattr(params, each.name) for each in fields(Settings)})


def tune(bench: Bench, arm: Arm, lesson: Lesson, rate: float) -> tuple[Tuning, pd.DataFrame]:
    """A student taught by an arm at √(η_S η_T) = `rate`, and one row a step; the bench's model stays as it is."""
    model, sides = student(bench, lesson.seed)
    tuning = Tuning(model, sides, arm, settings_of(bench.params), rate, lesson.seed)
    schedule = Schedule(bench.params.steps, warmup=0.1, floor=1.0)
    after = tuning.after_step
    curve = fit_sides(model, sides, lesson.batches, tuning.loss, schedule, tuning.now, after_step=after)
    return tuning, curve.assign(loss=tuning.losses)


# ------------------------------------------------------------------------------------------------- the experiment


def right_answers(hits: Tensor, answered: Tensor) -> Tensor:
    """Whether all tokens of an answer were hit (answers,), from hits (answer tokens,) and their places (rows, tokens).

    Each run of places in a row is one answer. A token counts as hit if it is the likeliest after the true ones before
    it, so that this is what greedy decoding gives.
    """
    begins = answered & ~nn.functional.pad(answered, (1, 0))[:, :-1]
    number = begins.flatten().cumsum(0)[answered.flatten()] - 1
    return torch.ones(int(begins.sum()), device=hits.device).scatter_reduce(0, number, hits.float(), "amin")


@torch.no_grad()
def examine(model: Any, exam: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The loss over all answer tokens of an exam, in nats, and the share of whole answers that are right."""
    losses, right = [], []
    for given in exam:
        batch = {name: part.to(model.device) for name, part in given.items()}
        log_p = log_probabilities(model, batch)[1]
        answered = batch["labels"][:, 1:] != IGNORED
        truth = batch["labels"][:, 1:][answered]
        losses.append(-log_p.gather(1, truth[:, None])[:, 0])
        right.append(right_answers(log_p.argmax(-1) == truth, answered))
    return {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).mean())}


_SEEDS = {"train": 2000, "val": 2900, "tune": 2901}
"""Added to a run's seed, these give scenes that the model was not trained on."""


def lesson_of(bench: Bench, seed: int, *, choosing: bool = False) -> Lesson:
    """A seed's batches and exam: of test images, or of others where rates are chosen."""
    params = bench.params
    batches, exams = math.ceil(params.test_images / params.batch_size), seed + (_SEEDS["val"] if choosing else 0)
    train = seed + _SEEDS["tune" if choosing else "train"]
    return Lesson(
        list(bench.batches(params.steps, params.batch_size, train, "train")),
        list(bench.batches(batches, params.batch_size, exams, "train" if choosing else "test")),
        seed + 100 if choosing else seed,
    )


@dataclass(frozen=True)
class Choice:
    """What validation images decided."""

    best: float
    """The ratio of the best constant rates."""
    rate: float
    """Their geometric mean: that of every arm of the sweep."""
    race: dict[str, tuple[float, float]]
    """For each arm of the race its own best rate and, for the auxiliary loss, weight."""


def racers(params: Params) -> list[Arm]:
    """What starts from equal rates: steered, and the baselines; one entry for each weight tried."""
    return [
        Arm(CONSTANT),
        Arm(SCHEDULER, signal="balance"),
        *(Arm(AUXILIARY, signal="balance", weight=weight) for weight in params.weights),
        Arm(FEATURE_CD, first=ENCODER),
        Arm(LANGUAGE_CD, first=LANGUAGE),
        Arm(NORMS, signal="norms"),
    ]


def try_rates(bench: Bench) -> pd.DataFrame:
    """A row for each arm, start, weight and rate: its loss on validation images, of a student of its own."""
    params, rows = bench.params, []
    lesson = lesson_of(bench, params.seed, choosing=True)
    others = [Arm(CONSTANT, start=ratio) for ratio in params.ratios if ratio != 1]
    for arm in (*others, *racers(params)):
        for rate in params.rates:
            tuning, _ = tune(bench, arm, lesson, rate)
            known = {"arm": arm.name, "start": arm.start, "weight": arm.weight, "rate": rate}
            rows.append(known | examine(tuning.model, lesson.exam))
    return pd.DataFrame(rows)


def choose(tried: pd.DataFrame) -> Choice:
    """The ratio and rate of the lowest loss for constant rates; for arms of the race their own rate and weight."""
    ordered = tried.sort_values("loss")
    best = ordered[ordered["arm"] == CONSTANT].iloc[0]
    own = ordered[ordered["start"] == 1].drop_duplicates("arm")
    race = {row.arm: (float(row.rate), float(row.weight)) for row in own.itertuples()}  # type: ignore[arg-type]
    return Choice(float(best["start"]), float(best["rate"]), race)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """One run of every seed: an arm at a rate, in the sweep over starts, in the race, or under another reading."""

    case: Literal["sweep", "race", "reading"]
    arm: Arm
    rate: float
    params: Params


def cases(params: Params, choice: Choice) -> list[Case]:
    """All runs of a seed."""
    low, high = min(params.ratios), max(params.ratios)
    sweep = [Arm(CONSTANT, start=ratio) for ratio in sorted({*params.ratios, choice.best})]
    sweep += [Arm(SCHEDULER, start=start, signal="balance") for start in sorted({low, choice.best, high})]
    sweep += [Arm(CHANCE, start=start, signal="chance") for start in (low, high)]
    race = {arm.name: replace(arm, weight=choice.race[arm.name][1]) for arm in racers(params)}
    return [
        *(Case("sweep", arm, choice.rate, params) for arm in sweep),
        *(Case("race", arm, choice.race[name][0], params) for name, arm in race.items()),
        *(readings(params, choice) if params.variants else ()),
    ]


def readings(params: Params, choice: Choice) -> Iterator[Case]:
    """The scheduler from both ends with one inferred choice changed, and other readings of arms of the race."""

    def other(**change: Any) -> Params:
        return params.model_copy(update=change)

    divergence: Divergence = "old from new" if params.divergence == "new from old" else "new from old"
    rule: Rule = "first rates" if params.rule == "last rates" else "last rates"
    reward: Reward = "both together" if params.reward == "each side" else "each side"
    steered = {
        f"KL {divergence}": other(divergence=divergence),
        rule: other(rule=rule),
        f"γ {2 * params.gamma:g}": other(gamma=2 * params.gamma),
    }
    for name, changed in steered.items():
        for start in (min(params.ratios), max(params.ratios)):
            yield Case("reading", Arm(f"{SCHEDULER}, {name}", start=start, signal="balance"), choice.rate, changed)
    rate, weight = choice.race[AUXILIARY]
    rewarded = Arm(f"{AUXILIARY}, {reward}", signal="balance", weight=weight)
    yield Case("reading", rewarded, rate, other(reward=reward))
    for name, first in ((FEATURE_CD, ENCODER), (LANGUAGE_CD, LANGUAGE)):
        yield Case("reading", Arm(f"{name}, one side only", first=first), choice.race[name][0], other(alone=1.0))


def experiment(params: Params) -> Result:
    """Chooses rates, then runs every case on every seed; tables have a row a run, and a row a run and stretch."""
    bench = open_bench(zoo.load(params.model, device="auto", dtype="float32"), params)
    tried = try_rates(bench)
    choice = choose(tried)
    runs, curves = [], []
    for seed in params.seeds:
        lesson = lesson_of(bench, seed)
        for case in cases(params, choice):
            tuning, curve = tune(replace(bench, params=case.params), case.arm, lesson, case.rate)
            known = {"case": case.case, "arm": case.arm.name, "start": case.arm.start, "seed": seed}
            spent = {"rate": case.rate, "weight": case.arm.weight}
            runs.append(known | spent | examine(tuning.model, lesson.exam) | summary(tuning, curve))
            curves.append(stretches(tuning, curve).assign(**known))  # type: ignore[arg-type]
    scalars = {"best ratio": choice.best, "rate": choice.rate}
    return Result({"runs": pd.DataFrame(runs), "curves": pd.concat(curves), "tuning": tried}, scalars)


def log_kappas(tuning: Tuning, back: str = "") -> pd.Series:
    """log10 κ at each step where it was measured; `back` is "_back" for KL(old ‖ new)."""
    found = {row["step"]: log_balance(row[LANGUAGE + back], row[ENCODER + back]) for row in tuning.measured}
    return pd.Series(found, name="kappa") / math.log(10)


def summary(tuning: Tuning, curve: pd.DataFrame) -> dict[str, float]:
    """Mean training loss, means of log10 κ both ways, geometric means of the late gradients' norms, the last ratio."""
    late = curve[curve["step"] > len(curve) // 2]
    both = np.hypot(late[f"norm_{ENCODER}"], late[f"norm_{LANGUAGE}"])
    norms = {"norm": both, **{f"norm_{side}": late[f"norm_{side}"] for side in SIDES}}
    return {
        "train": float(curve["loss"].mean()),
        "kappa": float(log_kappas(tuning).mean()),
        "kappa_back": float(log_kappas(tuning, "_back").mean()),
        "last_ratio": tuning.rates[LANGUAGE] / tuning.rates[ENCODER],
        **{name: float(np.exp(np.log(values.clip(lower=1e-12)).mean())) for name, values in norms.items()},  # type: ignore[call-overload]
    }


def stretches(tuning: Tuning, curve: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """Means over stretches of steps: training loss, log10 κ and log10 of the ratio of rates."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(curve[f"rate_{LANGUAGE}"] / curve[f"rate_{ENCODER}"]).replace([np.inf, -np.inf], np.nan)  # type: ignore[attr-defined]
    found = curve.assign(ratio=ratio, kappa=curve["step"].map(log_kappas(tuning)))
    length = math.ceil(len(curve) / count)
    found["step"] = ((found["step"] - 1) // length + 1) * length
    return found.groupby("step", as_index=False)[["loss", "kappa", "ratio"]].mean()


# ----------------------------------------------------------------------------------------------------- the claims


def values(result: Result, case: str, arm: str, value: str, start: float = 1.0) -> pd.Series:
    """A column of the runs of one arm and start, (seeds,)."""
    runs = result.tables["runs"]
    chosen = runs[(runs["case"] == case) & (runs["arm"] == arm) & np.isclose(runs["start"], start)]
    return chosen.set_index("seed")[value].sort_index()


def ends(result: Result) -> tuple[float, float]:
    """The smallest and the largest ratio of the sweep."""
    runs = result.tables["runs"]
    starts = runs.loc[runs["case"] == "sweep", "start"]
    return float(starts.min()), float(starts.max())


def best_ratio(result: Result) -> float:
    """The ratio that validation images chose for constant rates."""
    return float(result.scalars["best ratio"])


def slopes(result: Result, value: str = "kappa") -> pd.DataFrame:
    """For each seed the rank correlation of log κ with the ratio, and decades of κ for a decade of the ratio."""
    runs = result.tables["runs"]
    constant = runs[(runs["case"] == "sweep") & (runs["arm"] == CONSTANT)]
    rows = []
    for seed, group in constant.groupby("seed"):
        ratio = np.log10(group["start"])
        correlation = float(ratio.rank().corr(group[value].rank()))
        rows.append({"seed": seed, "correlation": correlation, "slope": float(np.polyfit(ratio, group[value], 1)[0])})
    return pd.DataFrame(rows).set_index("seed")


def recovered(result: Result, start: float, case: str = "sweep", arm: str = SCHEDULER) -> Interval:
    """Interval over seeds of the share of the gap in test loss, from a bad ratio to the best, that an arm closes."""
    bad = values(result, "sweep", CONSTANT, "loss", start)
    best = values(result, "sweep", CONSTANT, "loss", best_ratio(result))
    return t_interval((bad - values(result, case, arm, "loss", start)) / (bad - best))


def check_balance(result: Result) -> tuple[Comparison, ...]:
    """κ rises with η_T / η_S, whichever way the divergence is taken."""
    return (
        Comparison("rank correlation of κ with η_T/η_S", t_interval(slopes(result)["correlation"]), threshold=0.8),
        Comparison("decades of κ for a decade of η_T/η_S", t_interval(slopes(result)["slope"]), threshold=0.5),
        Comparison("the same with KL(old ‖ new)", t_interval(slopes(result, "kappa_back")["slope"]), threshold=0.5),
    )


def check_recovery(result: Result) -> tuple[Comparison, ...]:
    """From either end of the sweep the scheduler closes more than half of the gap to the best constant ratio."""
    return tuple(
        Comparison(f"share of the gap closed from η_T/η_S = {start:g}", recovered(result, start), threshold=0.5)
        for start in ends(result)
    )


def check_signal(result: Result) -> tuple[Comparison, ...]:
    """From either end it ends lower than a scheduler whose steps go up or down by chance."""
    return tuple(
        Comparison(
            f"test loss from η_T/η_S = {start:g}, scheduler − chance",
            paired_interval(*(values(result, "sweep", arm, "loss", start) for arm in (SCHEDULER, CHANCE))),  # type: ignore[arg-type]
            side="below",
            unit="nats",
        )
        for start in ends(result)
    )


HARMLESS = 0.02
"""How much higher a test loss may be, in nats, and still count as no harm."""


def check_harmless(result: Result) -> tuple[Comparison, ...]:
    """From the best ratio the scheduler ends no more than 0.02 nats above the constant rates."""
    pair = (values(result, "sweep", arm, "loss", best_ratio(result)) for arm in (SCHEDULER, CONSTANT))
    what = "test loss from the best ratio, scheduler − constant"
    return (Comparison(what, paired_interval(*pair), side="below", threshold=HARMLESS, unit="nats"),)  # type: ignore[arg-type]


def check_norms(result: Result) -> tuple[Comparison, ...]:
    """At either end of the sweep late gradients are smaller than at the best ratio."""
    best = np.log(values(result, "sweep", CONSTANT, "norm", best_ratio(result)))
    return tuple(
        Comparison(
            f"log of late gradients' norm, η_T/η_S = {start:g} − best",
            paired_interval(np.log(values(result, "sweep", CONSTANT, "norm", start)), best),
            side="below",
        )
        for start in ends(result)
    )


def ahead(result: Result, arm: str, others: Sequence[str], value: str) -> tuple[Comparison, ...]:
    """An arm of the race is lower than each of the others in a loss."""
    what = {"train": "mean training loss", "loss": "test loss"}[value]
    return tuple(
        Comparison(
            f"{what}, {arm} − {other}",
            paired_interval(*(values(result, "race", each, value) for each in (arm, other))),  # type: ignore[arg-type]
            side="below",
            unit="nats",
        )
        for other in others
    )


def check_sooner(result: Result) -> tuple[Comparison, ...]:
    """From equal rates the scheduler's training loss, over all steps, is below that of the paper's baselines."""
    return ahead(result, SCHEDULER, (CONSTANT, FEATURE_CD, LANGUAGE_CD), "train")


def check_auxiliary(result: Result) -> tuple[Comparison, ...]:
    """The auxiliary loss makes training and test loss lower than the scheduler alone."""
    return (*ahead(result, AUXILIARY, (SCHEDULER,), "train"), *ahead(result, AUXILIARY, (SCHEDULER,), "loss"))


def check_tuned(result: Result) -> tuple[Comparison, ...]:
    """The scheduler ends below the best constant rates, and below rates that follow gradient norms."""
    best = values(result, "sweep", CONSTANT, "loss", best_ratio(result))
    lead = paired_interval(values(result, "race", SCHEDULER, "loss"), best)
    tuned = Comparison("test loss, scheduler − best constant ratio and rate", lead, side="below", unit="nats")
    return (tuned, *ahead(result, SCHEDULER, (NORMS,), "loss"))


def _swap(one: str, other: str) -> Any:
    def apply(result: Result) -> Result:
        runs = result.tables["runs"]
        return result.with_table("runs", runs.assign(arm=runs["arm"].replace({one: other, other: one})))

    return apply


def _shuffle_starts(result: Result) -> Result:
    """Each seed's ratios handed to other runs, turned around by half of the list."""
    runs = result.tables["runs"].copy()
    constant = (runs["case"] == "sweep") & (runs["arm"] == CONSTANT)
    for _, group in runs[constant].groupby("seed"):
        runs.loc[group.index, "start"] = np.roll(group["start"].to_numpy(), len(group) // 2)
    return result.with_table("runs", runs)


def _bad_for_scheduler(result: Result) -> Result:
    """The scheduler from the best ratio is given the test loss of constant rates at the end that ends worst."""
    runs = result.tables["runs"].copy()
    bad = max((values(result, "sweep", CONSTANT, "loss", end) for end in ends(result)), key=lambda found: found.mean())
    steered = (runs["case"] == "sweep") & (runs["arm"] == SCHEDULER)
    steered &= np.isclose(runs["start"], best_ratio(result))
    runs.loc[steered, "loss"] = runs.loc[steered, "seed"].map(bad)
    return result.with_table("runs", runs)


def _exchange_ends(result: Result) -> Result:
    """The best ratio's constant rates stand in for those of both ends, and one end's for them."""
    runs = result.tables["runs"].copy()
    constant = (runs["case"] == "sweep") & (runs["arm"] == CONSTANT)
    low, high = ends(result)
    best = best_ratio(result)
    at = {start: runs[constant & np.isclose(runs["start"], start)].sort_values("seed") for start in (low, high, best)}
    for column in ("loss", "norm"):
        for start in (low, high):
            runs.loc[at[start].index, column] = at[best][column].to_numpy()
        runs.loc[at[best].index, column] = at[high][column].to_numpy()
    return result.with_table("runs", runs)


CLAIMS: list[Claim] = [
    Claim(
        "balance",
        "The balance coefficient tells which side is learning too fast: it rises with the ratio of the rates.",
        (),
        check_balance,
        Control("ratios shuffled among the runs", _shuffle_starts),
        reported="a larger rate of the encoder pushes it towards 0; numbers not read",
    ),
    Claim(
        "recovery",
        "From badly unbalanced rates the scheduler closes most of the gap to the best constant ratio.",
        (),
        check_recovery,
        Control("constant rates stand in for the scheduler, and it for them", _swap(SCHEDULER, CONSTANT)),
        reported="better than constant rates; starts from bad ratios are ours",
    ),
    Claim(
        "signal",
        "It is κ that does it: with steps up or down by chance the same scheduler does worse.",
        (),
        check_signal,
        Control("chance stands in for κ, and κ for chance", _swap(SCHEDULER, CHANCE)),
        reported="no such control is known to us",
    ),
    Claim(
        "harmless",
        "From the best constant ratio the scheduler does no harm.",
        (),
        check_harmless,
        Control("the constant rates of a bad ratio stand in for the scheduler", _bad_for_scheduler),
        reported="no such comparison is known to us",
    ),
    Claim(
        "norms",
        "Unbalanced rates make gradients vanish: late in training they are smaller than at the best ratio.",
        (),
        check_norms,
        Control("the best ratio's runs stand in for the ends', and an end's for them", _exchange_ends),
        reported="the abstract says so; its figures were not read",
    ),
    Claim(
        "sooner",
        "From equal rates the scheduler learns sooner than constant rates and than coordinate descent.",
        (),
        check_sooner,
        Control("constant rates stand in for the scheduler, and it for them", _swap(SCHEDULER, CONSTANT)),
        reported="lower training loss sooner than constant rates, Feature CD and Language CD; numbers not read",
    ),
    Claim(
        "auxiliary",
        "Rewarding change of what the model says makes training faster and better still.",
        (),
        check_auxiliary,
        Control("the scheduler alone stands in for both, and both for it", _swap(AUXILIARY, SCHEDULER)),
        reported="better than the scheduler alone; numbers not read",
    ),
    Claim(
        "tuned",
        "The scheduler is better than a tuned constant ratio, and than balancing by gradient norms.",
        (),
        check_tuned,
        Control("gradient norms stand in for κ, and κ for them", _swap(SCHEDULER, NORMS)),
        reported="no such baselines are known to us",
    ),
]
