"""Updates that leave visual states alone let a vision-language model learn a new task and keep what it saw.

Reference: Wu et al., "Mitigating Visual Knowledge Forgetting in MLLM Instruction-tuning via Modality-decoupled Gradient
Descent", Findings of EMNLP 2025, arXiv 2502.11740. The abstract was read; of the update only secondary sources.

Glossary (symbol → name here → shape)
    Z        visual             (blocks, images, visual tokens, width), what blocks write at visual tokens
    erank    effective_rank     exp of the entropy of Z's singular values' shares, for each image
    g        task               ∇ of the answers' cross-entropy
    h        drift              ∇ of the distance between Z and that of the model before tuning
    g̃        without(g, h)      g − (⟨g, h⟩ / ‖h‖²) h
    mask     chosen             entries that MDGD-GM updates, the same share of every tensor

Deviations
    - A miniature LLaVA of the shapes world stands for LLaVA-1.5 and MiniCPM. The new task asks whether a thing is
      striped, large, and so on, a form of question that it has not seen, to be answered by yes or no.
    - Inferred, with variants that are run beside the default: the distance is ‖Z − Z₀‖² / ‖Z₀‖², mean over all blocks
      (`drift_at`: all blocks, or the last alone); one projection over all parameters (`scope`: all, or each tensor);
      it is taken out at every step, or only where the step would increase the distance (`when`).
    - Inferred: MDGD-GM updates the entries for which the task's gradient is large against the drift's, |g| / (|h| + ε)
      with both scaled to mean 1 in a tensor, added up over a few batches on a model that took the first steps of
      direct tuning. It has a random mask of the same size as its control.
    - At the first step the tuned model is the frozen one and h = 0: nothing is taken out.
    - Added as baselines: direct tuning with the distance as a penalty, and learning rates of projector and language
      model that CoMMIT balances. Model Tailor is left out.
    - Every arm is tuned at every rate on every seed. An arm's own rate is the smallest that comes within `tolerance` of
      the best at the new task on validation images (where several teach it as well, the choice among them would be a
      matter of chance, and a smaller rate alone forgets less); arms are also compared at equal rates.
    - AdamW rescales g̃, so that the update is no longer orthogonal to h; how far is measured and shown.
    - The tower is frozen and its features are computed once; projector and language model are tuned, or adapters
      (LoRA) in both.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from midstream import zoo
from midstream.claims import Claim, Comparison, Control
from midstream.data import shapes
from midstream.data.shapes.scenes import Split
from midstream.measure import Interval, paired_interval
from midstream.measure.spectrum import effective_rank, linear_cka
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit, steering
from midstream.train.llava import CachedTower, Turn, ask, by_length, exact_answers, pack, tower_features
from midstream.train.sides import fit_sides
from midstream.train.surgery import Gradients, cosine, gradients, with_gradients, without

# ---------------------------------------------------------------------------------------------- parameters

Where = Literal["all blocks", "last block"]
Scope = Literal["all parameters", "each tensor"]
When = Literal["always", "against"]
Rates = tuple[float, ...]


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("shapes-vlm", min_length=1, description="a LLaVA-type model: packaged, tiny:llava or Hub id")
    prompt: str = Field("{}", min_length=2, description="what is put around a question, which stands at {}")
    train_images: int = Field(64, ge=4, le=10_000_000, description="images of the new task")
    val_images: int = Field(16, ge=4, le=100_000, description="images on which rates are chosen")
    test_images: int = Field(24, ge=4, le=100_000, description="test images, for the new task and the old ones")
    steps: int = Field(6, ge=2, le=1_000_000, description="updates of every arm")
    batch_size: int = Field(8, ge=1, le=4096, description="images a step")
    rates: Rates = Field((1e-3,), min_length=1, description="AdamW's peak rates tried for each arm but LoRA")
    lora_rates: Rates = Field((3e-3,), min_length=1, description="those tried for LoRA")
    tolerance: float = Field(
        0.02, ge=0, lt=1, description="how far from the best rate's accuracy a smaller rate counts"
    )
    rank: int = Field(8, ge=1, le=1024, description="rank of LoRA's adapters")
    penalty: float = Field(1.0, gt=0, le=1e6, description="weight of the distance in the arm with a penalty")
    keep: float = Field(0.1, gt=0, lt=1, description="share of each tensor's entries that masked arms update")
    mask_steps: int = Field(2, ge=1, le=10_000, description="steps of direct tuning before the mask is chosen")
    drift_at: Where = Field("all blocks", description="blocks whose visual states MDGD protects")
    scope: Scope = Field("all parameters", description="over what the projection is taken")
    when: When = Field("always", description="at every step, or only where a step would increase the distance")
    variants: bool = Field(False, description="also run the other readings of the method")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the training's forward passes")


_FULL = Params(
    seed=10,
    train_images=960,
    val_images=80,
    test_images=160,
    steps=60,
    batch_size=16,
    rates=(5e-5, 2e-4, 1e-3, 5e-3),
    lora_rates=(2e-4, 1e-3, 3e-3, 1e-2),
    mask_steps=10,
    variants=True,
)
_PAPER = _FULL.model_copy(
    update={
        "model": "llava-hf/llava-1.5-7b-hf",
        "prompt": "\nUSER: {} ASSISTANT:",
        "train_images": 10_000,
        "test_images": 1000,
        "steps": 600,
        "batch_size": 32,
        "rates": (2e-6, 1e-5, 2e-5),
        "lora_rates": (5e-5, 1e-4, 2e-4),
        "rank": 64,
        "mask_steps": 20,
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "three seeds, a few updates: see every part at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "three seeds, four rates an arm: settle the claims", minutes=60, memory_gib=6),
    "paper": Preset(
        _PAPER,
        "the paper's smaller model, on the shapes world",
        minutes=1500,
        memory_gib=320,
        needs="LLaVA-1.5-7B from the Hub and GPUs with 320 GiB together",
        gpus=4,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of the model; images are made by code."""
    return {params.model: zoo.revision(params.model)}


# ----------------------------------------------------------------------------------------- questions, old and new

NEW = "new"
"""The type of the new task's questions."""
ATTRIBUTES = {"texture": shapes.TEXTURES, "size": shapes.SIZES}


def new_questions(scene: shapes.Scene, rng: random.Random) -> list[shapes.Question]:
    """`is the red circle striped?` for things that colour and shape name: yes or no with equal chance."""
    pairs = [(thing.colour, thing.shape) for thing in scene.things]
    asked = []
    for thing, pair in zip(scene.things, pairs, strict=True):
        if pairs.count(pair) > 1:
            continue
        for name, values in ATTRIBUTES.items():
            true, yes = getattr(thing, name), rng.random() < 0.5
            value = true if yes else rng.choice([other for other in values if other != true])
            text = f"is the {thing.colour} {thing.shape} {value}?"
            asked.append(shapes.Question(NEW, text, "yes" if yes else "no"))
    return asked


@dataclass(frozen=True)
class Images:
    """Features of images, what is asked about each, and the types of these questions."""

    features: Tensor
    """(images, 1 + patches, tower's width)"""
    turns: list[list[Turn]]
    types: list[list[str]]


@dataclass
class Bench:
    """The model before tuning, its tower set aside, and how questions become rows."""

    model: Any
    tower: Any
    loaded: Any
    params: Params

    @property
    def image_token(self) -> int:
        """The token in whose place a visual token stands."""
        return int(self.model.config.image_token_id)

    @property
    def beginning(self) -> list[int]:
        """What stands before a question: the tokenizer's beginning, and the visual tokens."""
        start = self.loaded.tokenizer.bos_token_id
        return [*([] if start is None else [start]), *[self.image_token] * self.visual_tokens]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image: one a patch."""
        config = self.model.config.vision_config
        return int((config.image_size // config.patch_size) ** 2)

    @property
    def pad(self) -> int:
        """The token that fills rows up."""
        pad = self.loaded.tokenizer.pad_token_id
        return int(self.loaded.tokenizer.eos_token_id if pad is None else pad)

    def turn(self, question: shapes.Question) -> Turn:
        """A question and its answer as tokens."""
        tokens = partial(self.loaded.tokenizer, add_special_tokens=False)
        asked, answer = tokens(self.params.prompt.format(question.text)), tokens(question.answer)
        return Turn(tuple(asked["input_ids"]), (*answer["input_ids"], self.loaded.tokenizer.eos_token_id))

    def images(self, count: int, seed: int, split: Split, questions: Callable[..., list[shapes.Question]]) -> Images:
        """Scenes of a split that something can be asked about, with their questions."""
        rng = random.Random(f"{seed}/{split}/{questions.__name__}")
        scenes = shapes.scenes(count, seed=seed, split=split)
        pairs = [(scene, asked) for scene in scenes if (asked := questions(scene, rng))]
        pictures = list(shapes.render([scene for scene, _ in pairs], 64))
        processor = getattr(self.loaded.processor, "image_processor", self.loaded.processor)
        found = [
            tower_features(self.tower, processor(pictures[at : at + 64], return_tensors="pt")["pixel_values"])
            for at in range(0, len(pictures), 64)
        ]
        turns = [[self.turn(each) for each in asked] for _, asked in pairs]
        return Images(torch.cat(found), turns, [[each.type for each in asked] for _, asked in pairs])


def open_bench(loaded: Any, params: Params) -> Bench:
    """Put a loaded model's tower aside: it is frozen, and images come as its features."""
    model = loaded.model
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # for short rows faster there than the fused kernel's backward
    tower = model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower = CachedTower(tower)
    return Bench(model, tower, loaded, params)


# ------------------------------------------------------------------------------------------------ visual states


def visual(model: Any, batch: dict[str, Tensor], image_token: int) -> tuple[Tensor, Tensor]:
    """The answers' loss, and Z (blocks, images, visual tokens, width): what blocks write at visual tokens."""
    output = model(**batch, output_hidden_states=True)
    here = (batch["input_ids"] == image_token)[..., None]
    width = output.hidden_states[0].shape[-1]
    states = [layer.masked_select(here).view(len(here), -1, width) for layer in output.hidden_states[1:]]
    return output.loss, torch.stack(states)


@torch.no_grad()
def states_of(bench: Bench, model: Any, features: Tensor, batch_size: int = 32) -> Tensor:
    """Z (blocks, images, visual tokens, width) of images alone, without a question, on the CPU."""
    found = []
    for some in features.split(batch_size):
        ids = torch.tensor([bench.beginning]).expand(len(some), -1).to(model.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        found.append(visual(model, {**batch, "pixel_values": some.to(model.device)}, bench.image_token)[1].cpu())
    return torch.cat(found, 1)


def distance(states: Tensor, kept: Tensor, where: Where) -> Tensor:
    """‖Z − Z₀‖² / ‖Z₀‖² over images and tokens, mean over blocks, or of the last one: a scalar."""
    if where == "last block":
        states, kept = states[-1:], kept[-1:]
    return ((states - kept).square().sum((1, 2, 3)) / kept.square().sum((1, 2, 3))).mean()


# ----------------------------------------------------------------------------------------------------- the arms


@dataclass(frozen=True)
class Arm:
    """One way of tuning."""

    name: str
    projected: bool = False
    mask: Literal["none", "gradients", "random"] = "none"
    penalty: float = 0.0
    adapters: bool = False
    balanced: bool = False
    where: Where = "all blocks"
    scope: Scope = "all parameters"
    when: When = "always"


FULL, LORA, PENALTY, MDGD, MASKED, RANDOM = "full", "LoRA", "penalty", "MDGD", "MDGD-GM", "random mask"
BALANCED = "balanced"
NAMES = {
    "none": "before tuning",
    FULL: "direct tuning",
    LORA: "LoRA",
    PENALTY: "direct, with a penalty",
    BALANCED: "balanced rates (CoMMIT)",
    MDGD: "MDGD",
    MASKED: "MDGD-GM",
    RANDOM: "random mask",
}
"""The arms, as readers know them."""


def arms(params: Params) -> list[Arm]:
    """The baselines, both methods, and the control of the masked one."""
    chosen = Arm(MDGD, projected=True, where=params.drift_at, scope=params.scope, when=params.when)
    return [
        Arm(FULL),
        Arm(LORA, adapters=True),
        Arm(PENALTY, penalty=params.penalty, where=params.drift_at),
        Arm(BALANCED, balanced=True),
        chosen,
        replace(chosen, name=MASKED, mask="gradients"),
        replace(chosen, name=RANDOM, mask="random"),
    ]


def other_readings(params: Params) -> list[Arm]:
    """MDGD with one of its inferred choices changed, for each of them."""
    chosen = next(arm for arm in arms(params) if arm.name == MDGD)
    where: Where = "last block" if chosen.where == "all blocks" else "all blocks"
    scope: Scope = "each tensor" if chosen.scope == "all parameters" else "all parameters"
    when: When = "against" if chosen.when == "always" else "always"
    return [
        replace(chosen, name=f"MDGD, {where}", where=where),
        replace(chosen, name=f"MDGD, {scope}", scope=scope),
        replace(chosen, name=f"MDGD, {when}", when=when),
    ]


def decoupled(task: Gradients, drift: Gradients, arm: Arm) -> Gradients:
    """g without its part along h, over all parameters or tensor by tensor; where `against`, only if g opposes h.

    A step along −g increases the distance where ⟨g, h⟩ is negative.
    """
    groups = [[n] for n in range(len(task))] if arm.scope == "each tensor" else [list(range(len(task)))]
    found = list(task)
    for group in groups:
        ours, other = [task[n] for n in group], [drift[n] for n in group]
        if arm.when == "always" or cosine(ours, other) < 0:
            for n, changed in zip(group, without(ours, other), strict=True):
                found[n] = changed
    return found


def share_mask(scores: Sequence[Tensor], keep: float) -> Gradients:
    """1 at the share `keep` of each tensor's entries with the largest scores, at least one, and 0 elsewhere."""
    found = []
    for score in scores:
        mask = torch.zeros(score.numel(), device=score.device)
        mask[score.flatten().topk(max(1, round(keep * score.numel()))).indices] = 1.0
        found.append(mask.view_as(score))
    return found


@dataclass
class Tuning:
    """A model under tuning by an arm: its loss, and what is measured on the way."""

    bench: Bench
    arm: Arm
    parameters: list[nn.Parameter]
    mask: Gradients | None = None
    drift: Gradients | None = None
    angles: list[float] = field(default_factory=list)
    """Cosine of each update with the drift's gradient before it."""

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The answers' loss, whose gradient is the one that the arm lets through."""
        kept = batch["kept"]
        value, states = visual(model, {k: v for k, v in batch.items() if k != "kept"}, self.bench.image_token)
        if not (self.arm.projected or self.arm.penalty or self.mask):
            return value
        moved = distance(states.float(), kept, self.arm.where)
        if not self.arm.projected:
            return value + self.arm.penalty * moved
        task = gradients(value, self.parameters, keep_graph=True)
        self.drift = gradients(moved, self.parameters)
        wanted = decoupled(task, self.drift, self.arm)
        if self.mask:
            wanted = [gradient * mask for gradient, mask in zip(wanted, self.mask, strict=True)]
        return with_gradients(value, self.parameters, wanted)

    def watch(self) -> Callable[[int], None]:
        """To be called after each update: notes how far it went along the drift's gradient."""
        before = [parameter.detach().clone() for parameter in self.parameters]

        def note(step: int) -> None:
            if self.drift is not None:
                moved = [now.detach() - then for now, then in zip(self.parameters, before, strict=True)]
                self.angles.append(cosine(moved, self.drift))
            for now, then in zip(self.parameters, before, strict=True):
                then.copy_(now.detach())

        return note


def feed(bench: Bench, images: Images, kept: Tensor, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Images in random order, over and over, each with all of its questions, none of which sees another."""
    rng, count = random.Random(f"feed/{seed}"), len(images.turns)
    while True:
        order = rng.sample(range(count), count)
        for start in range(0, count - min(size, count) + 1, size):
            chosen = order[start : start + size]
            rows = pack([images.turns[image] for image in chosen], bench.beginning, bench.pad)
            yield {**rows, "pixel_values": images.features[chosen], "kept": kept[:, chosen]}


def trainable(model: Any) -> list[nn.Parameter]:
    """Projector, language model and head: what is tuned, and nothing else requires a gradient."""
    model.requires_grad_(False)
    for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
        part.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_adapters(model: Any, rank: int) -> tuple[Any, list[nn.Parameter]]:
    """The model with LoRA in the linear layers of projector and language model, and the adapters' parameters."""
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


def choose_mask(bench: Bench, arm: Arm, lesson: Lesson, rate: float) -> Gradients:
    """The entries that a masked arm updates, from both gradients over a few batches, or drawn at random."""
    params, generator = bench.params, torch.Generator().manual_seed(lesson.seed)
    if arm.mask == "random":
        return [
            mask.to(bench.model.device)
            for mask in share_mask(
                [torch.rand(p.shape, generator=generator) for p in trainable(bench.model)], params.keep
            )
        ]
    start = Arm(FULL)
    model, tuning = tune(bench, start, replace(lesson, steps=params.mask_steps), rate)
    batches = feed(bench, lesson.images, lesson.kept, lesson.seed + 1, params.batch_size)
    scores = [torch.zeros_like(parameter) for parameter in tuning.parameters]
    for _ in range(params.mask_steps):
        batch = {name: part.to(model.device) for name, part in next(batches).items()}
        kept = batch.pop("kept")
        value, states = visual(model, batch, bench.image_token)
        task = gradients(value, tuning.parameters, keep_graph=True)
        drift = gradients(distance(states, kept, arm.where), tuning.parameters)
        for score, g, h in zip(scores, task, drift, strict=True):
            score += _scaled(g) / (_scaled(h) + 0.1)
    return share_mask(scores, params.keep)


def _scaled(gradient: Tensor) -> Tensor:
    """Absolute values with mean 1; zeros stay zeros."""
    size = gradient.abs()
    return size / size.mean().clamp(min=torch.finfo(size.dtype).tiny)


@dataclass(frozen=True)
class Lesson:
    """What one seed's arms learn from."""

    images: Images
    kept: Tensor
    """Z₀ of these images."""
    seed: int
    steps: int


def tune(bench: Bench, arm: Arm, lesson: Lesson, rate: float) -> tuple[Any, Tuning]:
    """A copy of the model tuned by an arm; the bench's own stays as it is."""
    if arm.balanced:
        return tune_balanced(bench, arm, lesson, rate)
    params = bench.params
    mask = choose_mask(bench, arm, lesson, rate) if arm.mask != "none" else None
    torch.manual_seed(lesson.seed)
    model = copy.deepcopy(bench.model)
    model, parameters = with_adapters(model, params.rank) if arm.adapters else (model, trainable(model))
    tuning = Tuning(bench, arm, parameters, mask)
    batches = feed(bench, lesson.images, lesson.kept, lesson.seed, params.batch_size)
    schedule = Schedule(lesson.steps, rate, warmup=0.1, weight_decay=0.0)
    fit(model, batches, tuning.loss, schedule, precision=params.precision, after_step=tuning.watch())
    return (model.merge_and_unload() if arm.adapters else model), tuning


def tune_balanced(bench: Bench, arm: Arm, lesson: Lesson, rate: float) -> tuple[Any, Tuning]:
    """The same by CoMMIT: κ steers the rates of projector and language model."""
    model = copy.deepcopy(bench.model)
    tuning = Tuning(bench, arm, trainable(model))
    sides, settings = steering.sides_of(model), steering.Settings(lesson.steps)
    steered = steering.Tuning(model, sides, steering.Arm(BALANCED, signal="balance"), settings, rate, lesson.seed)
    rows = feed(bench, lesson.images, lesson.kept, lesson.seed, bench.params.batch_size)
    batches = ({name: part for name, part in batch.items() if name != "kept"} for batch in rows)
    schedule, precision = Schedule(lesson.steps, warmup=0.1), bench.params.precision
    fit_sides(
        model, sides, batches, steered.loss, schedule, steered.now, precision=precision, after_step=steered.after_step
    )
    return model, tuning


# ------------------------------------------------------------------------------------------------- the experiment


def right(bench: Bench, model: Any, images: Images) -> pd.DataFrame:
    """One row a question: its `type` and whether the model's whole answer is `right`, each asked alone."""
    asked = [
        (image, turn, type)
        for image, (turns, types) in enumerate(zip(images.turns, images.types, strict=True))
        for turn, type in zip(turns, types, strict=True)
    ]
    rows: list[dict[str, Any]] = []
    for chosen in by_length([turn for _, turn, _ in asked], 64):
        some = [asked[place] for place in chosen]
        inputs = ask([turn for _, turn, _ in some], bench.beginning, bench.pad)
        inputs["pixel_values"] = images.features[[image for image, _, _ in some]]
        hits = exact_answers(model, inputs).tolist()
        rows += [{"type": type, "right": bool(hit)} for (_, _, type), hit in zip(some, hits, strict=True)]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Exam:
    """Questions of the new task and of the old ones, about images that nothing is learned from."""

    new: Images
    old: Images
    states: Tensor
    """Z₀ of the images of the old tasks."""


def examine(bench: Bench, model: Any, exam: Exam) -> Iterator[dict[str, Any]]:
    """Rows of `type`, questions `n` and `accuracy`: the new task, and each old one."""
    for images in (exam.new, exam.old):
        for type, rows in right(bench, model, images).groupby("type", sort=False):
            yield {"type": type, "n": len(rows), "accuracy": float(rows["right"].mean())}


def look_inside(bench: Bench, model: Any, exam: Exam) -> Iterator[dict[str, Any]]:
    """Rows of each block: mean effective rank of images' visual states, their CKA with and distance from before."""
    states = states_of(bench, model, exam.old.features)
    for block, (now, before) in enumerate(zip(states, exam.states, strict=True)):
        yield {
            "block": block,
            "erank": float(effective_rank(now).mean()),
            "cka": linear_cka(now.flatten(0, 1), before.flatten(0, 1)),
            "distance": float(distance(now[None], before[None], "all blocks")),
        }


def old_questions(scene: shapes.Scene, rng: random.Random) -> list[shapes.Question]:
    """One question of each type that the model was trained on."""
    return shapes.questions(scene, rng)


def exam_of(bench: Bench, count: int, seed: int, split: Split) -> Exam:
    """New and old questions about `count` images each."""
    new, old = (bench.images(count, seed, split, asked) for asked in (new_questions, old_questions))
    return Exam(new, old, states_of(bench, bench.model, old.features))


def lesson_of(bench: Bench, seed: int) -> Lesson:
    """The new task's training images of a seed."""
    images = bench.images(bench.params.train_images, seed + _SEEDS["train"], "train", new_questions)
    return Lesson(images, states_of(bench, bench.model, images.features), seed, bench.params.steps)


_SEEDS = {"train": 2000, "val": 2900}
"""Added to a run's seed, these give scenes that the model was not trained on."""


def share(marks: pd.DataFrame) -> float:
    """Accuracy over the questions of all rows."""
    return float((marks["accuracy"] * marks["n"]).sum() / marks["n"].sum()) if len(marks) else math.nan


def rates_of(params: Params, arm: Arm) -> Rates:
    """The rates tried for an arm."""
    return params.lora_rates if arm.adapters else params.rates


def best_rates(tried: pd.DataFrame, tolerance: float) -> dict[str, float]:
    """For each arm the smallest rate within `tolerance` of its best at the new task, mean over seeds, on validation.

    What becomes of the old tasks is not looked at: nobody who tunes has them.
    """
    means = tried.groupby(["arm", "rate"])["new"].mean().reset_index()
    best = means.groupby("arm")["new"].transform("max")
    near = means[means["new"] >= best - tolerance].groupby("arm")["rate"].min()
    return {str(arm): float(rate) for arm, rate in near.items()}


@dataclass
class Trial:
    """All that one seed's arms learn from and are examined on, and what was found."""

    bench: Bench
    seed: int
    rows: dict[str, list[dict[str, Any]]]

    def __post_init__(self) -> None:
        params, seed = self.bench.params, self.seed
        self.lesson = lesson_of(self.bench, seed)
        self.exam = exam_of(self.bench, params.test_images, seed, "test")
        self.validation = self.bench.images(params.val_images, seed + _SEEDS["val"], "train", new_questions)

    def before(self) -> None:
        """Examines the model before tuning."""
        self._examine(self.bench.model, {"arm": "none", "rate": 0.0, "seed": self.seed})

    def run(self, arm: Arm, rate: float) -> None:
        """Tunes by an arm at a rate, and examines what comes of it."""
        model, tuning = tune(self.bench, arm, self.lesson, rate)
        known = {"arm": arm.name, "rate": rate, "seed": self.seed}
        new = float(right(self.bench, model, self.validation)["right"].mean())
        self.rows["tuning"].append(known | {"new": new})
        self.rows["cost"].append(known | _cost(tuning))
        self._examine(model, known)

    def _examine(self, model: Any, known: dict[str, Any]) -> None:
        self.rows["answers"] += [known | row for row in examine(self.bench, model, self.exam)]
        self.rows["states"] += [known | row for row in look_inside(self.bench, model, self.exam)]


def experiment(params: Params) -> Result:
    """Tunes and examines every arm at every rate on every seed, then the other readings at the rate of MDGD."""
    bench = open_bench(zoo.load(params.model, device="auto", dtype="float32"), params)
    rows: dict[str, list[dict[str, Any]]] = {"answers": [], "states": [], "cost": [], "tuning": []}
    trials = [Trial(bench, seed, rows) for seed in params.seeds]
    for trial in trials:
        trial.before()
        for arm in arms(params):
            for rate in rates_of(params, arm):
                trial.run(arm, rate)
    chosen = best_rates(pd.DataFrame(rows["tuning"]), params.tolerance)
    for reading in other_readings(params) if params.variants else []:
        chosen[reading.name] = chosen[MDGD]
        for trial in trials:
            trial.run(reading, chosen[MDGD])
    tables = {name: pd.DataFrame(found) for name, found in rows.items()}
    tables["chosen"] = pd.DataFrame([{"arm": arm, "rate": rate} for arm, rate in {"none": 0.0, **chosen}.items()])
    return Result(tables, {"steps": params.steps, "batch_size": params.batch_size})


def _cost(tuning: Tuning) -> dict[str, float]:
    """Entries that were updated, and the mean cosine of updates with the drift's gradient, the first step left out."""
    updated = sum(float(mask.sum()) for mask in tuning.mask) if tuning.mask else None
    entries = sum(parameter.numel() for parameter in tuning.parameters)
    angles = tuning.angles[1:]
    along = sum(map(abs, angles)) / len(angles) if angles else math.nan
    return {"updated": entries if updated is None else updated, "along_drift": along}


# ----------------------------------------------------------------------------------------------------- the claims


def rate_of(result: Result, arm: str) -> float:
    """The rate chosen for an arm."""
    chosen = result.tables["chosen"]
    return float(chosen.loc[chosen["arm"] == arm, "rate"].iloc[0])


def accuracy_of(result: Result, arm: str, *, new: bool, rate: float | None = None) -> pd.Series:
    """Accuracy (seeds,) on the new task, or over all questions of the old ones, at a rate or at the arm's own."""
    table = result.tables["answers"]
    wanted = (table["arm"] == arm) & (table["rate"] == (rate_of(result, arm) if rate is None else rate))
    return table[wanted & ((table["type"] == NEW) == new)].groupby("seed")[["accuracy", "n"]].apply(share)


def inside(result: Result, arm: str, value: str) -> pd.Series:
    """A measure of an arm's visual states (seeds,) at its own rate, mean over blocks."""
    table = result.tables["states"]
    wanted = (table["arm"] == arm) & (table["rate"] == rate_of(result, arm))
    return table[wanted].groupby("seed")[value].mean()


def lead(result: Result, arm: str, other: str, *, new: bool = False) -> Interval:
    """Interval over seeds of one arm's accuracy minus another's, each at its own rate."""
    return paired_interval(accuracy_of(result, arm, new=new), accuracy_of(result, other, new=new))


def kept_at_equal_rates(result: Result, arm: str, other: str) -> Comparison:
    """One arm's accuracy on the old tasks minus another's at the same rate, mean over the rates that both had."""
    answers = result.tables["answers"]
    rates = sorted(set.intersection(*(set(answers.loc[answers["arm"] == name, "rate"]) for name in (arm, other))))
    ours, theirs = (
        pd.concat([accuracy_of(result, name, new=False, rate=rate) for rate in rates], axis=1).mean(axis=1)
        for name in (arm, other)
    )
    return Comparison(f"old tasks, {NAMES[arm]} − {NAMES[other]}, rates equal", paired_interval(ours, theirs))


def rank_lead(result: Result, arm: str, other: str) -> Interval:
    """The same of the effective rank."""
    return paired_interval(inside(result, arm, "erank"), inside(result, other, "erank"))


def check_forgetting(result: Result) -> tuple[Comparison, ...]:
    """Direct tuning learns the new task, loses old ones, and lowers the effective rank."""
    return (
        Comparison("new task, direct tuning − before", lead(result, FULL, "none", new=True), threshold=0.1),
        Comparison("old tasks, direct tuning − before", lead(result, FULL, "none"), side="below", threshold=-0.05),
        Comparison("effective rank, direct tuning − before", rank_lead(result, FULL, "none"), side="below"),
    )


def check_rank(result: Result) -> tuple[Comparison, ...]:
    """MDGD keeps the effective rank, where direct tuning does not."""
    return (Comparison("effective rank, MDGD − direct tuning", rank_lead(result, MDGD, FULL)),)


def check_retention(result: Result) -> tuple[Comparison, ...]:
    """MDGD keeps more of the old tasks than each baseline, and is within 3 points of direct tuning on the new one."""
    return (
        *(Comparison(f"old tasks, MDGD − {NAMES[other]}", lead(result, MDGD, other)) for other in (FULL, LORA)),
        kept_at_equal_rates(result, MDGD, FULL),
        Comparison("new task, MDGD − direct tuning", lead(result, MDGD, FULL, new=True), threshold=-0.03),
    )


def check_masked(result: Result) -> tuple[Comparison, ...]:
    """MDGD-GM keeps more than direct tuning and than a random mask as large, and learns nearly as much."""
    return (
        Comparison("old tasks, MDGD-GM − direct tuning", lead(result, MASKED, FULL)),
        kept_at_equal_rates(result, MASKED, FULL),
        Comparison("old tasks, MDGD-GM − random mask", lead(result, MASKED, RANDOM)),
        Comparison("new task, MDGD-GM − direct tuning", lead(result, MASKED, FULL, new=True), threshold=-0.03),
    )


def check_penalty(result: Result) -> tuple[Comparison, ...]:
    """A penalty on the distance, which needs no projection, keeps less of the old tasks than MDGD."""
    return (
        Comparison("old tasks, MDGD − direct tuning with a penalty", lead(result, MDGD, PENALTY)),
        kept_at_equal_rates(result, MDGD, PENALTY),
    )


def _swap(one: str, other: str) -> Callable[[Result], Result]:
    def apply(result: Result) -> Result:
        for name in ("answers", "states", "chosen"):
            table = result.tables[name]
            result = result.with_table(name, table.assign(arm=table["arm"].replace({one: other, other: one})))
        return result

    return apply


CLAIMS: list[Claim] = [
    Claim(
        "forgetting",
        "Tuning directly on a text-driven task teaches it, loses visual skills that the model had, and lowers the "
        "effective rank of its visual states.",
        (),
        check_forgetting,
        Control("the model before tuning stands in for the tuned one, and it for that", _swap("none", FULL)),
        reported="the abstract says so; its figures were not read",
    ),
    Claim(
        "rank",
        "With gradients freed of their part along the visual drift, the effective rank is kept.",
        (),
        check_rank,
        Control("direct tuning stands in for MDGD, and it for that", _swap(MDGD, FULL)),
        reported="the abstract says so; its figures were not read",
    ),
    Claim(
        "retention",
        "They keep more of the old tasks than direct tuning and LoRA, and learn the new one as well.",
        (),
        check_retention,
        Control("direct tuning stands in for MDGD, and it for that", _swap(MDGD, FULL)),
        reported="above direct tuning, LoRA and Model Tailor on average over pre-trained tasks; numbers not read",
    ),
    Claim(
        "masked",
        "With a mask from both gradients a tenth of the entries is enough.",
        (),
        check_masked,
        Control("direct tuning stands in for MDGD-GM, and it for that", _swap(MASKED, FULL)),
        reported="most of the gain with fewer updated parameters; numbers not read",
    ),
    Claim(
        "penalty",
        "Taking the drift out of the gradient keeps more than a penalty on it does.",
        (),
        check_penalty,
        Control("direct tuning with a penalty stands in for MDGD, and it for that", _swap(MDGD, PENALTY)),
        reported="no such baseline is known to us",
    ),
]


# ------------------------------------------------------------------------------------------------------ the arena


def arena_rows(result: Result) -> pd.DataFrame:
    """One row an arm, rate and seed: both accuracies in percent."""
    keys, answers = ["arm", "rate", "seed"], result.tables["answers"]
    new, old = (
        answers[(answers["type"] == NEW) == is_new].groupby(keys)[["accuracy", "n"]].apply(share).mul(100)
        for is_new in (True, False)
    )
    table = pd.DataFrame({"new": new, "old": old}).reset_index()
    table = table[table["arm"].isin(NAMES)]
    steps, images = result.scalars["steps"], result.scalars["batch_size"]
    setting = f"Questions about textures and sizes, {steps:g} updates of {images:g} images"
    return table.assign(method=table["arm"].map(NAMES), setting=setting)


ARENA = {"tuning": arena_rows}
