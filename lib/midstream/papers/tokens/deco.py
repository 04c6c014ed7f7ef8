"""A projector that only averages neighbouring patches leaves the choice of what matters to the language model.

Reference: Yao et al., "DeCo: Decoupling Token Compression from Semantic Abstraction in Multimodal Large Language
Models", 2024, arXiv 2405.20985.

Glossary (symbol → name here → shape → where it is from)
    N        patches               576 = 24² for CLIP-L/14 at 336 pixels; 64 = 8² here          projector
    M        tokens                visual tokens that the language model reads an image as      projector
    d_v      vision_width          width of the vision tower                                    projector
    d_llm    text_width            width of the language model                                  projector
    X        patches               (batch, N, d_v), row by row, class token left out            projector
    P        pooling_matrix        (M, N), row m averages the patches of window m               projector
    A        attention_weights     (batch, heads, query, key), after softmax                    R-GAE
    Ā        head_mean             (batch, query, key) = mean_heads max(A ⊙ ∂y/∂A, 0)            R-GAE
    R        accumulate            (batch, tokens, tokens): R = I, then R ← R + Ā R              R-GAE
    R_TQ     text_to_query         (batch, M)                                                   R-GAE
    R_QP     query_to_patch        (batch, M, N)                                                R-GAE
    R_PP     patch_to_patch        (batch, N, N)                                                R-GAE

Deviations
    - The paper trains LLaVA-1.5 in two stages, the projector alone and then projector and language model, on 558,000
      and 665,000 conversations. Here both are trained together, in one stage, on questions about generated images,
      behind a frozen tower whose features are computed once. Weights of linear layers are trained by Muon and all else
      by AdamW, at one peak rate, for every projector alike: so short a training learns more that way.
    - Several questions follow one image in a training row; each is asked alone when answers are counted.
    - The language model starts from one that answers questions about captions, and says a box as four new words.
    - The rivals are written here from the papers they come from, in the paper's comparison but not in its code: the
      Q-Former (BLIP-2) normalises before each sub-layer, the resampler (Flamingo) gets learned positions, the
      C-Abstractor (Honeybee) has plain bottleneck blocks. The D-Abstractor is left out.
    - How R-GAE joins a projector's own layers is not read from code (inferred): self- and cross-attention are one
      attention over [patches; queries]. A convolution has no attention, so the C-Abstractor has no such map.
    - Added: the share of relevance that falls on the object asked about, beside maps as the paper shows them; images
      whose patches are shuffled, and questions put to another image, as controls.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from midstream import zoo
from midstream.claims import Claim, Comparison, Control, PaperNumber
from midstream.data import shapes
from midstream.measure import Interval, paired_interval, t_interval
from midstream.measure.relevance import Chain, trace
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit
from midstream.train.llava import CachedTower, assemble, by_length
from midstream.train.projectors import CAbstractor, QFormer, Resampler, Uncompressed, mlp, side
from midstream.train.visual_bench import (
    BOX,
    SIZE,
    Asked,
    Bench,
    Pool,
    Precision,
    answers,
    attribute_questions,
    from_bins,
    iou,
    pixels,
    pool,
    prepare,
    shuffled_patches,
    to_bins,
)

# ------------------------------------------------------------------------------------- the projector, and its rivals


def window(cell: int, cells: int, length: int) -> tuple[int, int]:
    """The places [⌊i·n/m⌋, ⌈(i+1)·n/m⌉) that cell i of m averages along a side of n; windows overlap unless m | n."""
    return cell * length // cells, -(-(cell + 1) * length // cells)


def pooling_matrix(tokens: int, patches: int) -> Tensor:
    """P (tokens, patches): row m spreads 1 evenly over the patches of window m, both counted row by row."""
    cells, length = side(tokens), side(patches)
    along = torch.zeros(cells, length)
    for cell in range(cells):
        first, end = window(cell, cells, length)
        along[cell, first:end] = 1 / (end - first)
    return torch.kron(along, along)


class AdaptivePool(nn.Module):
    """DeCo: (batch, N, d_v) → (batch, M, d_llm). Patches are averaged first; only the MLP after that has parameters."""

    def __init__(self, vision_width: int, text_width: int, *, tokens: int, layers: int = 2):
        super().__init__()
        self.tokens = tokens
        self.mlp = mlp(vision_width, text_width, layers)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual tokens (batch, M, d_llm) of patches (batch, N, d_v)."""
        grid = rearrange(patches, "batch (row column) width -> batch width row column", row=side(patches.shape[1]))
        pooled = nn.functional.adaptive_avg_pool2d(grid, side(self.tokens))
        return self.mlp(rearrange(pooled, "batch width row column -> batch (row column) width"))

    def query_to_patch(self, maps: Sequence[Tensor], patches: int) -> Tensor:
        """R_QP = P, whatever the image."""
        return pooling_matrix(self.tokens, patches)[None]


def around(own: Any, tokens: int) -> AdaptivePool:
    """DeCo with the MLP of a trained `LlavaMultiModalProjector`, shared: pooling can be put before it untrained."""
    made = AdaptivePool(own.linear_1.in_features, own.linear_2.out_features, tokens=tokens)
    made.mlp = nn.Sequential(own.linear_1, own.act, own.linear_2)
    return made.to(own.linear_1.weight.device)


ARMS = {
    "deco": "adaptive pooling (DeCo)",
    "qformer": "Q-Former",
    "resampler": "resampler",
    "c_abstractor": "C-Abstractor",
    "mlp": "no compression",
}
"""The projectors that are compared, as readers know them."""
RIVALS = ("qformer", "resampler", "c_abstractor")
"""Those that compress and abstract at once."""


def projector(arm: str, vision_config: Any, text_width: int, tokens: int, depth: int) -> nn.Module:
    """A new projector of an arm for a tower of this configuration; `depth` is that of the rivals."""
    width, heads = vision_config.hidden_size, vision_config.num_attention_heads
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    makers: dict[str, Callable[..., nn.Module]] = {
        "deco": partial(AdaptivePool, tokens=tokens),
        "qformer": partial(QFormer, tokens=tokens, heads=heads, depth=depth),
        "resampler": partial(Resampler, tokens=tokens, heads=heads, patches=patches, depth=depth),
        "c_abstractor": partial(CAbstractor, tokens=tokens, patches=patches, depth=depth),
        "mlp": Uncompressed,
    }
    return makers[arm](width, text_width)


# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    vision: str = Field("shapes-clip", min_length=1, description="a CLIP model: its vision tower stays frozen")
    language: str = Field("shapes-lm", min_length=1, description="a causal language model, trained with the projector")
    most_things: int = Field(2, ge=1, le=9, description="most objects in a scene; with few, little training is enough")
    arms: tuple[str, ...] = Field(("deco", "qformer", "c_abstractor"), min_length=1, description="projectors compared")
    tokens: int = Field(16, ge=1, le=4096, description="visual tokens of the compressing projectors: a square number")
    fewer_tokens: int = Field(4, ge=1, le=4096, description="the second, smaller number of visual tokens")
    fewer_arms: tuple[str, ...] = Field((), description="projectors that are trained with that number as well")
    depth: int = Field(2, ge=1, le=24, description="layers of the Q-Former and resampler, blocks of the C-Abstractor")
    steps: int = Field(12, ge=4, le=1_000_000, description="training steps of every run")
    batch_size: int = Field(8, ge=1, le=4096, description="images in a training step")
    train_images: int = Field(96, ge=4, le=10_000_000, description="training images of a seed, seen in random order")
    learning_rates: tuple[float, ...] = Field((4e-3,), min_length=1, description="peak rates tried for each projector")
    tune_steps: int = Field(8, ge=4, le=1_000_000, description="training steps of each try")
    val_images: int = Field(16, ge=4, le=100_000, description="images on which rates are chosen")
    test_images: int = Field(24, ge=4, le=100_000, description="test images; each gives all its questions and a box")
    relevance_images: int = Field(6, ge=2, le=100_000, description="test images whose relevance is traced")
    bins: int = Field(16, ge=8, le=1000, description="words for a coordinate of a box")
    precision: Precision = Field("bfloat16", description="of the training's forward passes")
    timing_repeats: int = Field(3, ge=1, le=100, description="timed answers per projector and seed")

    @property
    def spec(self) -> shapes.Spec:
        """What scenes may contain."""
        return shapes.Spec(things=(1, self.most_things))

    @field_validator("arms", "fewer_arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            if arm not in ARMS:
                raise ValueError(f"unknown projector '{arm}'; there are {', '.join(ARMS)}")
        return arms

    @field_validator("arms")
    @classmethod
    def _something_to_compare(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if "deco" not in arms or not set(RIVALS) & set(arms):
            raise ValueError(f"'deco' and at least one of {', '.join(RIVALS)} are needed for a comparison")
        return arms

    @field_validator("fewer_arms")
    @classmethod
    def _with_a_rate(cls, fewer: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if left_out := set(fewer) - set(info.data.get("arms", fewer)):
            raise ValueError(f"{', '.join(sorted(left_out))} must be among `arms` too, where its rate is chosen")
        return fewer

    @field_validator("tokens", "fewer_tokens")
    @classmethod
    def _square(cls, tokens: int) -> int:
        side(tokens)
        return tokens


_FULL = Params(
    arms=tuple(ARMS),
    steps=400,
    batch_size=16,
    train_images=400 * 16,
    learning_rates=(2e-3, 4e-3, 8e-3),
    tune_steps=60,
    val_images=64,
    test_images=128,
    relevance_images=40,
    timing_repeats=20,
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "three projectors, a few steps: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "five projectors, three seeds: settle the claims", minutes=45, memory_gib=6),
    "paper": Preset(
        _FULL.model_copy(
            update={
                "vision": "openai/clip-vit-large-patch14-336",
                "language": "lmsys/vicuna-7b-v1.5",
                "tokens": 144,
                "fewer_tokens": 64,
                "fewer_arms": ("deco", "qformer"),
                "steps": 5000,
                "batch_size": 128,
                "train_images": 16_000,
                "learning_rates": (2e-5, 1e-4, 1e-3),
                "tune_steps": 500,
                "test_images": 2000,
            }
        ),
        "the paper's towers and token numbers, on the shapes world; where a main branch has no safetensors, give "
        "language=…@revision",
        minutes=6000,
        memory_gib=640,
        needs="CLIP-L/14-336 and Vicuna-7B from the Hub and 8 GPUs with 80 GiB",
        gpus=8,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of both towers; the images are made from the seed."""
    return {name: zoo.revision(name) for name in (params.vision, params.language)}


_SEEDS = {"tune": 900, "val": 901, "train": 1000}
"""Added to a run's seed, these give scenes that neither organism was trained on."""


# ----------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """One projector at one number of tokens with one seed."""

    arm: str
    tokens: int
    seed: int

    def row(self, **values: Any) -> dict[str, Any]:
        """A table's row of this run."""
        return {"arm": self.arm, "tokens": self.tokens, "seed": self.seed, **values}


@dataclass(frozen=True)
class Study:
    """What all runs of an experiment share."""

    params: Params
    bench: Bench
    test: Pool


def new_model(bench: Bench, arm: str, tokens: int, depth: int, seed: int) -> Any:
    """LLaVA with a new projector and a fresh copy of the language model, behind cached features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = projector(arm, bench.tower.config, bench.language.config.hidden_size, tokens, depth)
    language = copy.deepcopy(bench.language)
    return assemble(CachedTower(bench.tower), language, made.to(language.device), bench.image_token, tokens)


def visual_tokens(bench: Bench, arm: str, tokens: int) -> int:
    """How many tokens an arm makes of an image when `tokens` are asked for."""
    config = bench.tower.config
    return (config.image_size // config.patch_size) ** 2 if arm == "mlp" else tokens


def batches(bench: Bench, images: Pool, tokens: int, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Images in random order, each with all its questions in random order and then its caption, over and over."""
    rng, size = random.Random(f"order/{seed}"), min(size, len(images.scenes))
    while True:
        order = rng.sample(range(len(images.scenes)), len(images.scenes))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            rows = [(images.asked[image], images.captions[image]) for image in chosen]
            asked = [[*rng.sample(questions, len(questions)), caption] for questions, caption in rows]
            yield {**bench.rows(asked, tokens), "pixel_values": images.features[chosen]}


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of answers, and of the caption that follows them."""
    loss: Tensor = model(**batch).loss
    return loss


def schedule(steps: int, rate: float) -> Schedule:
    """Muon for linear layers and AdamW for the rest, both at the peak `rate`."""
    return Schedule(steps, learning_rate=rate, muon=rate)


def train(
    study: Study, run: Run, images: Pool, course: Schedule, after_step: Callable[[Any, int], None] | None = None
) -> tuple[Any, pd.DataFrame]:
    """A trained model of a run and its loss curve; all arms of a seed see the same rows in the same order."""
    bench, params = study.bench, study.params
    places = visual_tokens(bench, run.arm, run.tokens)
    model = new_model(bench, run.arm, places, params.depth, run.seed)
    rows = batches(bench, images, places, run.seed, params.batch_size)

    def tell(step: int) -> None:
        if after_step:
            after_step(model.eval(), step)
            model.train()

    return model, fit(model, rows, answer_loss, course, precision=params.precision, after_step=tell)


@torch.no_grad()
def held_out_loss(bench: Bench, model: Any, images: Pool, tokens: int, size: int) -> float:
    """The mean loss of answers over a pool, every image with all its questions."""
    losses = []
    for start in range(0, len(images.scenes), size):
        chosen = slice(start, start + size)
        batch = {**bench.rows(images.asked[chosen], tokens), "pixel_values": images.features[chosen]}
        with bench.autocast():
            losses.append(float(answer_loss(model, {name: x.to(model.device) for name, x in batch.items()})))
    return statistics.fmean(losses)


def tune(study: Study) -> Iterator[dict[str, Any]]:
    """Rows of the held-out loss that each rate reaches, for each arm, after equally many steps on the same images."""
    bench, params = study.bench, study.params
    if len(params.learning_rates) == 1:
        return
    count = min(params.train_images, params.tune_steps * params.batch_size)
    images = pool(bench, count, params.seed + _SEEDS["tune"], spec=params.spec)
    held_out = pool(bench, params.val_images, params.seed + _SEEDS["val"], spec=params.spec)
    for arm in params.arms:
        for rate in params.learning_rates:
            run = Run(arm, params.tokens, params.seed)
            model, _ = train(study, run, images, schedule(params.tune_steps, rate))
            places = visual_tokens(bench, arm, params.tokens)
            loss = held_out_loss(bench, model, held_out, places, params.batch_size)
            yield {"arm": arm, "rate": rate, "loss": loss}


def best_rates(params: Params, tuning: pd.DataFrame) -> dict[str, float]:
    """The rate of the lowest held-out loss of each arm; the only one where there is one."""
    if tuning.empty:
        return dict.fromkeys(params.arms, params.learning_rates[0])
    lowest = tuning.loc[tuning.groupby("arm")["loss"].idxmin()]
    return dict(zip(lowest["arm"], lowest["rate"], strict=True))


# ---------------------------------------------------------------------------------------------------- relevance


def coverage(scene: shapes.Scene, patches: int) -> Tensor:
    """How much of each patch each thing covers, where nothing hides it: (things, N), row by row."""
    cells = side(patches)
    seen = torch.from_numpy(shapes.masks(scene, SIZE)).float()[:, None]
    return nn.functional.adaptive_avg_pool2d(seen, cells).flatten(1)


def lift(relevance: Tensor, covered: Tensor) -> Tensor:
    """How many times its even share an object gets of relevance (n, N), for its coverage of the patches (n, N)."""
    share = (relevance * covered).sum(1) / relevance.sum(1).clamp(min=1e-20)
    return share / covered.mean(1).clamp(min=1e-20)


def best_share(query_to_patch: Tensor, covered: Tensor) -> Tensor:
    """The largest share (n,) of any one query's map (n, M, N) that lies on an object (n, N)."""
    maps = query_to_patch / query_to_patch.sum(-1, keepdim=True).clamp(min=1e-20)
    return torch.einsum("nqp,np->nq", maps, covered).amax(1)


def overlap_of_queries(query_to_patch: Tensor) -> Tensor:
    """The mean cosine (n,) between the maps (n, M, N) of two different queries of one image."""
    maps = nn.functional.normalize(query_to_patch, dim=-1)
    queries = maps.shape[1]
    return ((maps @ maps.mT).sum((1, 2)) - queries) / max(1, queries * (queries - 1))


def relevance_rows(bench: Bench, model: Any, images: Pool, asked: Sequence[Asked], tokens: int) -> pd.DataFrame:
    """One row a question: how much of the relevance falls on the object asked about, and on the scene's others.

    `model` has its real tower. Columns: `lift` and `others` (text → patch by R-GAE), `gradient` (by gradient × input),
    and of the projector's own map `room` (best share, ln against even pooling at as many tokens) and `overlap`. A
    projector without attention has no map of its own, nor a chain.
    """
    tables = []
    for chosen in by_length([each.turn for each in asked], 32):
        batch = [asked[place] for place in chosen]
        tables.append(_traced(bench, model, images, batch, tokens))
    return pd.concat(tables, ignore_index=True)


def chain_of(bench: Bench, model: Any, images: Pool, batch: Sequence[Asked], tokens: int) -> Chain:
    """The relevance maps of the first words of answers, for `model` with its real tower."""
    rows = bench.single(batch, tokens)
    inputs = {name: rows[name].to(model.device) for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = pixels(bench, [images.scenes[each.image] for each in batch]).to(model.device)
    last = torch.tensor([len(bench.beginning) + tokens + len(each.turn.question) - 1 for each in batch])
    return trace(model, inputs, last.to(model.device), torch.tensor([each.turn.answer[0] for each in batch]))


def _traced(bench: Bench, model: Any, images: Pool, batch: Sequence[Asked], tokens: int) -> pd.DataFrame:
    chain = chain_of(bench, model, images, batch, tokens)
    patches = chain.patch_to_patch.shape[1]
    covers = [coverage(images.scenes[each.image], patches) for each in batch]
    own = torch.stack([cover[each.thing] for cover, each in zip(covers, batch, strict=True)])
    rest = torch.stack([cover.sum(0) - cover[each.thing] for cover, each in zip(covers, batch, strict=True)])
    alone = rest.sum(1) == 0
    found = {
        "lift": lift(chain.text_to_patch.cpu(), own),
        "others": lift(chain.text_to_patch.cpu(), rest).masked_fill(alone, math.nan),
        "gradient": lift(chain.gradient_times_input.cpu(), own),
        "room": (best_share(chain.query_to_patch.cpu(), own) / even_share(tokens, own)).log(),
        "overlap": overlap_of_queries(chain.query_to_patch.cpu()),
    }
    return pd.DataFrame({name: values.detach().numpy() for name, values in found.items()})


def map_rows(chain: Chain) -> Iterator[dict[str, Any]]:
    """Rows of the maps of a chain's first question, each as shares of 1, with the query that matters most to it.

    Nothing for a projector that R-GAE does not follow.
    """
    best = int(chain.text_to_query[0].argmax())
    parts = {
        "text to query": chain.text_to_query[0],
        "query to patch": chain.query_to_patch[0, best],
        "text to patch": chain.text_to_patch[0],
    }
    if bool(chain.text_to_patch[0].isnan().any()):
        return
    for part, values in parts.items():
        shares = (values / values.sum().clamp(min=1e-20)).tolist()
        yield from ({"part": part, "place": place, "share": share} for place, share in enumerate(shares))


def example(images: Pool, asked: Sequence[Asked]) -> Asked:
    """The question whose maps are kept: the first about a scene of several things, whatever is answered."""
    return next((each for each in asked if len(images.scenes[each.image].things) > 1), asked[0])


def even_share(tokens: int, covered: Tensor) -> Tensor:
    """The best share (n,) that even pooling to `tokens` leaves objects covering (n, N)."""
    return best_share(pooling_matrix(tokens, covered.shape[1]).expand(len(covered), -1, -1), covered)


# -------------------------------------------------------------------------------------------------- the experiment


WINDOWS = 50
"""Points of a recorded loss curve; each is the mean of the steps since the last."""
EARLY = 0.5
"""Share of the steps after which answers are counted a first time."""


def run_training(study: Study, run: Run, rate: float, images: Pool) -> tuple[Any, dict[str, list[Any]]]:
    """Train and question one model: the model and its rows of `curve`, `answers` and `cost`."""
    params, bench, test = study.params, study.bench, study.test
    found: list[dict[str, Any]] = []
    early = max(1, round(EARLY * params.steps))

    def count(model: Any, step: int) -> None:
        if step in (early, params.steps):
            found.extend(run.row(step=step, images="own", **row) for row in answers(bench, model, test, own, places))

    own, places = test.features, visual_tokens(bench, run.arm, run.tokens)
    model, log = train(study, run, images, schedule(params.steps, rate), count)
    curve = log.groupby((log["step"] - 1) // max(1, params.steps // WINDOWS)).agg({"step": "last", "loss": "mean"})
    cost = {
        "projector": sum(weight.numel() for weight in model.model.multi_modal_projector.parameters()),
        "rate": rate,
        "train_seconds": float(log["seconds"].diff().median()),
    }
    rows = {
        "curve": [
            run.row(step=int(step), loss=float(loss)) for step, loss in zip(curve["step"], curve["loss"], strict=True)
        ],
        "answers": found,
        "cost": [run.row(visual_tokens=places, **cost)],
    }
    return model, rows


def run_controls(study: Study, run: Run, model: Any) -> list[dict[str, Any]]:
    """Answers to the same questions with each image's patches shuffled, and with another scene's image."""
    bench, test = study.bench, study.test
    places, rows = visual_tokens(bench, run.arm, run.tokens), []
    inputs = {"shuffled": shuffled_patches(test.features, run.seed), "other": test.features.roll(1, 0)}
    for name, features in inputs.items():
        rows += [
            run.row(step=study.params.steps, images=name, **row)
            for row in answers(bench, model, test, features, places)
        ]
    return rows


def time_answer(study: Study, model: Any, tokens: int) -> float:
    """Milliseconds (median) from one image and one question to the first word of the answer, tower included."""
    bench, test = study.bench, study.test
    images = pixels(bench, test.scenes[:1]).to(model.device)
    rows = bench.single(test.asked[0][:1], tokens)
    inputs = {name: rows[name].to(model.device) for name in ("input_ids", "attention_mask")}
    seconds = []
    for _ in range(study.params.timing_repeats + 1):  # the first one warms up
        started = time.perf_counter()
        with torch.no_grad(), bench.autocast():
            float(model(pixel_values=images, **inputs, logits_to_keep=1).logits.sum())
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])


def run_one(study: Study, run: Run, rate: float, images: Pool) -> dict[str, list[dict[str, Any]]]:
    """Every row of one run; controls and relevance at the main number of tokens only."""
    params, bench, test = study.params, study.bench, study.test
    model, rows = run_training(study, run, rate, images)
    if run.tokens == params.tokens:
        rows["answers"] += run_controls(study, run, model)
    model.model.vision_tower = bench.tower.to(model.device)
    places = visual_tokens(bench, run.arm, run.tokens)
    rows["cost"][0]["inference_ms"] = time_answer(study, model, places)
    if run.tokens == params.tokens:
        asked = traced_questions(study)
        means = relevance_rows(bench, model, test, asked, places).mean()
        rows["relevance"] = [run.row(n=len(asked), **{str(name): float(value) for name, value in means.items()})]
        if run.seed == params.seed:
            chain = chain_of(bench, model, test, [example(test, asked)], places)
            rows["maps"] = [run.row(**row) for row in map_rows(chain)]
    return rows


def traced_questions(study: Study) -> list[Asked]:
    """Questions about one object's colour or shape in the first test images."""
    scenes = study.test.scenes[: study.params.relevance_images]
    return [each for image, scene in enumerate(scenes) for each in attribute_questions(study.bench, scene, image)]


def example_table(study: Study) -> pd.DataFrame:
    """One row that says which question's maps were kept: its image, object, words and answer."""
    one = example(study.test, traced_questions(study))
    words = study.bench.tokenizer.decode(list(one.turn.question))
    answer = study.bench.tokenizer.decode(list(one.turn.answer[:-1]))
    return pd.DataFrame([{"image": one.image, "thing": one.thing, "question": words, "answer": answer}])


def runs(params: Params) -> Iterator[Run]:
    """Every run, seed by seed."""
    for seed in params.seeds:
        yield from (Run(arm, params.tokens, seed) for arm in params.arms)
        yield from (Run(arm, params.fewer_tokens, seed) for arm in params.fewer_arms)


def experiment(params: Params) -> Result:
    """Choose each arm's rate, then train and question every run; tables have one row a run and what it is of."""
    bench = prepare(params.vision, params.language, bins=params.bins, precision=params.precision, seed=params.seed)
    test = pool(bench, params.test_images, params.seed, spec=params.spec, split="test", boxes=1)
    study = Study(params, bench, test)
    tuning = pd.DataFrame(tune(study), columns=["arm", "rate", "loss"])
    rates = best_rates(params, tuning)
    rows: dict[str, list[dict[str, Any]]] = {}
    images: dict[int, Pool] = {}
    for run in runs(params):
        if run.seed not in images:
            images = {run.seed: pool(bench, params.train_images, run.seed + _SEEDS["train"], spec=params.spec)}
        for name, found in run_one(study, run, rates[run.arm], images[run.seed]).items():
            rows.setdefault(name, []).extend(found)
    tables = {name: pd.DataFrame(found) for name, found in rows.items()} | {"example": example_table(study)}
    truth = np.concatenate([shapes.boxes(scene) for scene in test.scenes])
    rounded = np.array([from_bins(np.array(to_bins(box, params.bins)), params.bins) for box in truth])
    scalars = {
        "tokens": params.tokens,
        "patches": test.features.shape[1] - 1,
        "language_parameters": sum(weight.numel() for weight in bench.language.parameters()),
        "box_ceiling": float((iou(rounded, truth) >= 0.5).mean()),
    }
    return Result({"tuning": tuning, **tables}, scalars)


# ----------------------------------------------------------------------------------------------------- the claims


def accuracy_table(result: Result, kinds: Literal["questions", "boxes"], images: str = "own") -> pd.DataFrame:
    """Percent of right answers of each arm, number of tokens, step and seed: to questions in words, or to boxes."""
    table = result.tables["answers"]
    chosen = table[(table["images"] == images) & ((table["type"] == BOX) == (kinds == "boxes"))]
    sums = chosen.groupby(["arm", "tokens", "step", "seed"])[["right", "n"]].sum()
    return (100 * sums["right"] / sums["n"]).rename("accuracy").reset_index()


def final(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last step."""
    return table[table["step"] == table["step"].max()]


def _at(result: Result, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the main number of tokens."""
    return table[table["tokens"] == result.scalars["tokens"]]


def by_seed(result: Result, table: pd.DataFrame, value: str, arm: str) -> pd.Series:
    """One arm's value for each seed, at the main number of tokens."""
    table = _at(result, table)
    return table[table["arm"] == arm].groupby("seed")[value].mean()


def rivals(result: Result) -> list[str]:
    """The compressive projectors that were run."""
    return [arm for arm in RIVALS if arm in set(result.tables["cost"]["arm"])]


def gap(result: Result, table: pd.DataFrame, value: str, rival: str) -> Interval:
    """Interval over seeds of DeCo's value minus a rival's."""
    return paired_interval(by_seed(result, table, value, "deco"), by_seed(result, table, value, rival))


def mean_gap(result: Result, table: pd.DataFrame, value: str) -> pd.Series:
    """DeCo's value minus the mean of the rivals', by seed."""
    others = sum(by_seed(result, table, value, rival) for rival in rivals(result)) / len(rivals(result))
    return by_seed(result, table, value, "deco") - others


def check_questions(result: Result) -> tuple[Comparison, ...]:
    """At equal tokens and steps, DeCo answers more questions right than each compressive projector."""
    table = final(accuracy_table(result, "questions"))
    return tuple(
        Comparison(f"questions right, DeCo − {ARMS[rival]}", gap(result, table, "accuracy", rival), unit="%")
        for rival in rivals(result)
    )


def check_boxes(result: Result) -> tuple[Comparison, ...]:
    """The same of boxes; and shuffling the patches loses what DeCo knew of places."""
    table = final(accuracy_table(result, "boxes"))
    shuffled = accuracy_table(result, "boxes", "shuffled")
    own = by_seed(result, table, "accuracy", "deco")
    return (
        *(
            Comparison(f"boxes found, DeCo − {ARMS[rival]}", gap(result, table, "accuracy", rival), unit="%")
            for rival in rivals(result)
        ),
        Comparison(
            "boxes found, DeCo − DeCo with shuffled patches",
            paired_interval(own, by_seed(result, shuffled, "accuracy", "deco")),
            unit="%",
        ),
    )


def check_where(result: Result) -> tuple[Comparison, ...]:
    """DeCo's lead over the rivals' mean is larger on boxes than on questions, and larger early than at the end."""
    questions, boxes = accuracy_table(result, "questions"), accuracy_table(result, "boxes")
    lead = {name: mean_gap(result, final(table), "accuracy") for name, table in (("q", questions), ("b", boxes))}
    curve = result.tables["curve"]
    half, tenth = (curve["step"] <= share * curve["step"].max() for share in (EARLY, 0.9))
    early, late = (-mean_gap(result, part, "loss") for part in (curve[half], curve[~tenth]))
    return (
        Comparison("lead on boxes − lead on questions", paired_interval(lead["b"], lead["q"]), unit="%"),
        Comparison("lead in loss, first half − last tenth of the steps", paired_interval(early, late)),
    )


def check_parameters(result: Result) -> tuple[Comparison, ...]:
    """DeCo trains fewer of the projector's parameters than each rival."""
    cost = result.tables["cost"].assign(size=np.log(result.tables["cost"]["projector"]))
    return tuple(
        Comparison(f"ln(parameters of DeCo / of {ARMS[rival]})", gap(result, cost, "size", rival), side="below")
        for rival in rivals(result)
    )


def steps_to(result: Result) -> pd.DataFrame:
    """Steps until each arm's loss is as low as the slowest of a seed's compressing arms has it at the end.

    Losses are means over a tenth of the curve's points; an arm that never gets there counts all steps.
    """
    curve = _at(result, result.tables["curve"])
    curve = curve[curve["arm"].isin(["deco", *RIVALS])].sort_values("step")
    width = max(1, curve["step"].nunique() // 10)
    smooth = curve.assign(
        loss=curve.groupby(["arm", "seed"])["loss"].transform(lambda x: x.rolling(width, min_periods=width).mean())
    )
    level = final(smooth).groupby("seed")["loss"].max()
    reached = smooth[smooth["loss"] <= smooth["seed"].map(level)]
    steps = reached.groupby(["arm", "tokens", "seed"])["step"].min()
    every = smooth.groupby(["arm", "tokens", "seed"])["step"].max()
    return steps.reindex(every.index).fillna(every).rename("steps").reset_index()


def check_convergence(result: Result) -> tuple[Comparison, ...]:
    """Each rival needs more steps than DeCo to reach one and the same loss."""
    table = steps_to(result)
    table["steps"] = np.log(table["steps"])
    return tuple(
        Comparison(
            f"ln(steps of DeCo / of {ARMS[rival]}) to one loss", gap(result, table, "steps", rival), side="below"
        )
        for rival in rivals(result)
    )


def check_abstraction(result: Result) -> tuple[Comparison, ...]:
    """Projectors that attend give the object asked about less room in their maps, and less of the final relevance."""
    table = result.tables["relevance"]
    attending = [arm for arm in rivals(result) if arm != "c_abstractor"]
    room = [
        Comparison(
            f"ln(object's share of its best query, {ARMS[arm]} / even pooling)",
            t_interval(by_seed(result, table, "room", arm)),
            side="below",
        )
        for arm in attending
    ]
    lifts = [
        Comparison(
            f"relevance on the object asked about, DeCo − {ARMS[arm]}", gap(result, table, "lift", arm), unit="×"
        )
        for arm in attending
    ]
    return (*room, *lifts)


def _shift_arms(*tables: str) -> Callable[[Result], Result]:
    """Arm labels shuffled: DeCo's rows get each rival's name in turn, and a rival's rows get DeCo's."""

    def apply(result: Result) -> Result:
        ring = ["deco", *rivals(result)]
        names = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
        for name in tables:
            frame = result.tables[name].copy()
            frame["arm"] = frame["arm"].replace(names)
            result = result.with_table(name, frame)
        return result

    return apply


def _shuffled_images(result: Result) -> Result:
    """DeCo's answers about shuffled patches stand in for its own."""
    frame = result.tables["answers"]
    deco, own = frame["arm"] == "deco", frame["images"] == "own"
    last = frame["step"] == frame["step"].max()
    stand_in = frame[deco & (frame["images"] == "shuffled")].assign(images="own")
    return result.with_table("answers", pd.concat([frame[~(deco & own & last)], stand_in], ignore_index=True))


def _even_maps(result: Result) -> Result:
    """Every projector's map is DeCo's own, the even one."""
    frame = result.tables["relevance"].copy()
    even = frame[frame["arm"] == "deco"].set_index(["tokens", "seed"])
    place = pd.MultiIndex.from_frame(frame[["tokens", "seed"]])
    for column in ("room", "lift"):
        frame[column] = even[column].reindex(place).to_numpy()
    return result.with_table("relevance", frame)


_SETTING = "CLIP-L/14-336 and Vicuna-7B trained on LLaVA-1.5's 1.2 M conversations, against compressive projectors"
TOLERANCES = {
    **dict.fromkeys(("cost.train_seconds", "cost.inference_ms", "cost.rate"), (math.inf, math.inf)),
    **dict.fromkeys(("answers.right", "answers.iou", "curve.loss", "tuning.loss"), (0.1, 0.1)),
    **{f"relevance.{name}": (0.2, 0.2) for name in ("lift", "others", "gradient", "room", "overlap")},
    "maps.share": (math.inf, math.inf),
}
"""Measured times are no two machines' the same. Training takes another way where sums are formed in another order; a
rate chosen between two equally good ones, and the maps of one question, may then come out quite differently."""

CLAIMS: list[Claim] = [
    Claim(
        "questions",
        "At an equal number of visual tokens and equal training, pooling patches answers more questions right than "
        "projectors that compress by attention or convolution.",
        (PaperNumber("lead, open-ended VQA", 2.9, _SETTING, "abstract", 1.0, "%"),),
        check_questions,
        Control("arm labels shuffled", _shift_arms("answers")),
        reported="+2.9 % on open-ended VQA, +0.9 % on multimodal benchmarks",
    ),
    Claim(
        "boxes",
        "It finds more boxes too, and what it knows of places sits in the order of its tokens.",
        (PaperNumber("lead, visual localization", 7.1, _SETTING, "abstract", 2.0, "%"),),
        check_boxes,
        Control("patches permuted within the image", _shuffled_images),
        reported="+7.1 % on visual localization",
    ),
    Claim(
        "where",
        "Its lead is largest where places matter, and early in training.",
        (),
        check_where,
        Control("arm labels shuffled", _shift_arms("answers", "curve")),
        reported="7.1 % on localization against 2.9 % and 0.9 %; figure: training curves",
    ),
    Claim(
        "parameters",
        "It has fewer parameters to train.",
        (),
        check_parameters,
        Control("arm labels shuffled", _shift_arms("cost")),
        reported="compression itself has none",
    ),
    Claim(
        "convergence",
        "It needs fewer steps to the same loss.",
        (),
        check_convergence,
        Control("arm labels shuffled", _shift_arms("curve")),
        reported="figure: faster convergence than the Q-Former's",
    ),
    Claim(
        "double_abstraction",
        "Projectors that attend leave little room for the object that will be asked about, so that less of the "
        "answer's relevance reaches it.",
        (),
        check_abstraction,
        Control("every projector's map is the even one", _even_maps),
        reported="figure: attributes missing from the Q-Former's query → patch map are missing from text → patch",
    ),
]


def arena_rows(result: Result) -> pd.DataFrame:
    """One row a projector, number of tokens and seed, for the arena of projectors."""
    keys = ["arm", "tokens", "seed"]
    cost = result.tables["cost"].set_index(keys)
    table = cost.assign(
        accuracy=final(accuracy_table(result, "questions")).set_index(keys)["accuracy"],
        box_accuracy=final(accuracy_table(result, "boxes")).set_index(keys)["accuracy"],
    ).reset_index()
    table["tokens"] = table["visual_tokens"]
    steps = int(result.tables["curve"]["step"].max())
    setting = f"frozen CLIP of {result.scalars['patches']:.0f} patches, language model of "
    setting += f"{result.scalars['language_parameters'] / 1e6:.1f} M parameters, {steps} steps, shapes world"
    return table.assign(method=table["arm"].map(ARMS), setting=setting)


ARENA = {"projectors": arena_rows}
