"""Gradient knowledge distillation teaches a student to lean on its input as the teacher does.

Reference: Wang, Li & Sun, "Gradient Knowledge Distillation for Pre-trained Language Models", ENLSP-II workshop 2022,
arXiv 2211.01071. What the abstract leaves open is taken from the authors' released code.

Glossary (symbol → name here → shape)
    s(x)        confidence             the largest softmax probability of a sample, each model's own class
    e           embedded               (batch, tokens, width), the output of the embeddings: what the first block reads
    g = ∂s/∂e   gradient               (batch, tokens, width)
    ĝ                                  g scaled to length 1, token by token
    L_grad      gradient_loss          Σ‖ĝ_T − ĝ_S‖² / number of tokens that have a teacher gradient
    h_l[CLS]    cls_states             (batch, layers, width), the first token behind paired layers
    ∂s/∂h_l     cls_gradients          (batch, layers, width)
    KD          soft_label_loss        T² KL(teacher/T ‖ student/T)
    PKD         patience_loss          mean squared difference of h_l[CLS] scaled to length 1
    α, T        alpha, temperature     loss = α KD + (1 − α) CE + β PKD + γ (L_grad + the same at h_l[CLS])
    β, γ        patience; gradient, cls_gradient of a `Method`

Deviations
    - The default teacher is MiniLM-L6 with a new head, fine-tuned here on short movie-review sentences; the student has
      its first 3 blocks. The paper has BERT-base, 6 blocks and four GLUE tasks (preset `paper` does SST-2).
    - As in the release, the student's pooler and head are new; embeddings are copied and frozen, so that both gradients
      live in one space. There only the gradient methods do so, with dropout 0; KD and PKD train their embeddings under
      dropout 0.1. Here every method has frozen embeddings and dropout 0: only the loss differs.
    - KL is averaged over the batch. The release averages over classes too, which halves KD when there are two.
    - Layers are paired as in PKD-skip: student block k with teacher block k · (teacher depth / student depth), the last
      left out.
    - β and γ are 0 in the release and have to be set; which values the paper used was not read. Ours are chosen with
      the first seed's teacher, by accuracy on validation sentences, with equally many settings a method (`search`).
    - 16 sentences a step and larger learning rates: training here is 108 steps at most, the paper's thousands.
    - γ grows from 0 over the first half of the training (`warm_start`); the release has it from the first step. Each
      model's gradient is that of its own answer, and a new head answers half of the sentences the other way: with the
      full weight from the start one student in four did not learn the task at all.
    - The names of the three loyalties are the paper's, their formulas are inferred: label loyalty is agreement of
      predicted labels, probability loyalty 1 − √JS (in bits; in nats beside it), saliency loyalty the rank
      correlation of token saliencies within a sentence, special tokens left out. Saliency is ‖g‖ or, as a variant,
      |g · e|.
    - Added: a student of the same gradients dealt to the wrong tokens, loyalty to a teacher that it never saw and to a
      shuffled one, and what dropout does to the teacher's own gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control
from midstream.errors import RequestError
from midstream.measure import Interval, accuracy, paired_interval
from midstream.measure.loyalty import label_loyalty, probability_loyalty, rank_correlation, top_overlap
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit
from midstream.train.distill import gradient_loss, gradients, patience_loss, soft_label_loss, trace

# ---------------------------------------------------------------------------------------------- parameters


Grid = tuple[Annotated[float, Field(gt=0, le=1e5)], ...]
"""Settings that are tried in turn."""


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    teacher: str = Field(
        "minilm", min_length=1, description="an encoder to fine-tune as the teacher: packaged, tiny:…, folder or Hub id"
    )
    task: str = Field("movies", min_length=1, description="a classification data set")
    student_layers: int = Field(3, ge=2, le=48, description="blocks of the student, copied from the teacher's first")
    max_tokens: int = Field(12, ge=6, le=512, description="longest sentence used, in tokens")
    n_train: int = Field(48, ge=8, le=1_000_000, description="training sentences, for the teacher and its students")
    n_validation: int = Field(16, ge=8, le=100_000, description="sentences on which each method's setting is chosen")
    n_test: int = Field(48, ge=8, le=100_000, description="test sentences")
    teacher_epochs: int = Field(2, ge=1, le=20, description="passes over the training sentences, teacher")
    epochs: int = Field(2, ge=1, le=20, description="passes over the training sentences, students")
    batch_size: int = Field(16, ge=2, le=512, description="sentences a step")
    teacher_rate: float = Field(2e-4, gt=0, le=0.1, description="learning rate of the teacher")
    rates: Grid = Field((8e-4,), min_length=1, description="learning rates tried for fine-tuning and for KD")
    patiences: Grid = Field((10.0,), min_length=1, description="β, weights tried for PKD")
    gradients: Grid = Field((0.05,), min_length=1, description="γ, weights of L_grad tried for GKD and for GKD-CLS")
    warm_start: float = Field(
        0.5, ge=0, le=1, description="share of the training in which γ grows from 0 to its value, step by step"
    )
    temperature: float = Field(5.0, gt=0, le=100, description="T of the soft labels")
    alpha: float = Field(0.5, ge=0, le=1, description="α, the weight of soft labels against true ones")
    dropout: float = Field(0.1, gt=0, lt=1, description="the rate in the arms with dropout")


_FULL = Params(
    n_seeds=5,
    max_tokens=16,
    n_train=576,
    n_validation=320,
    n_test=320,
    epochs=3,
    rates=(2e-4, 4e-4, 8e-4),
    patiences=(10.0, 100.0, 1000.0),
    gradients=(0.01, 0.05, 0.2),
)
_PAPER = Params(
    teacher="google-bert/bert-base-uncased",
    task="sst2",
    student_layers=6,
    max_tokens=128,
    n_train=66_000,
    n_validation=1000,
    n_test=872,
    teacher_epochs=3,
    epochs=4,
    batch_size=32,
    teacher_rate=5e-5,
    rates=(5e-5,),
    patiences=(10.0, 100.0, 1000.0),
    gradients=(0.01, 0.1, 1.0),
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "few and short sentences, three seeds: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(
        _FULL, "576 sentences, five seeds, three settings a method: settle the claims", minutes=45, memory_gib=6
    ),
    "paper": Preset(
        _PAPER,
        "the paper's model on one of its four tasks",
        minutes=900,
        memory_gib=24,
        needs="BERT-base and SST-2 from the Hub and a GPU with 16 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of the model and of the data set a run loads."""
    return {params.teacher: zoo.revision(params.teacher), params.task: data.revision(params.task)}


# ------------------------------------------------------------------------------------------- teacher and student


def classifier_of(model: Any, classes: int, seed: int) -> Any:
    """A classifier on a pre-trained encoder: its weights, a new head drawn from `seed`, eager attention, float32.

    Fused attention has no second derivative. Raises `RequestError` for a model that is no encoder.
    """
    from transformers import AutoModelForSequenceClassification

    encoder = model.base_model
    if not isinstance(getattr(encoder, "embeddings", None), nn.Module):
        raise RequestError(f"A teacher is an encoder such as BERT; {type(model).__name__} has no module `embeddings`.")
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    torch.manual_seed(seed)
    classifier = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float()
    _copy_encoder(encoder, classifier.base_model)
    return classifier.to(model.device).eval()


def student_of(teacher: Any, layers: int, seed: int) -> Any:
    """A classifier of `layers` blocks: the teacher's embeddings, copied and frozen, and its first blocks.

    Pooler and head are new, drawn from `seed`. Raises `RequestError` when there are not fewer blocks than in the
    teacher.
    """
    if layers >= teacher.config.num_hidden_layers:
        depth = teacher.config.num_hidden_layers
        raise RequestError(f"A student has fewer blocks than its teacher's {depth}, not {layers}.")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    torch.manual_seed(seed)
    student = type(teacher)._from_config(config, attn_implementation="eager")
    _copy_encoder(teacher.base_model, student.base_model, but=("pooler",))
    student.base_model.embeddings.requires_grad_(False)
    return student.to(teacher.device).eval()


def _copy_encoder(source: nn.Module, target: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Every weight of `target` from `source`; blocks that it lacks are dropped, a pooler may be missing."""
    weights = {name: weight for name, weight in source.state_dict().items() if not name.startswith(but or "\0")}
    missing = [name for name in target.load_state_dict(weights, strict=False).missing_keys if "pooler" not in name]
    if missing:
        raise RequestError(f"The encoder has no weights for {', '.join(missing[:3])}.")


def set_dropout(model: Any, rate: float) -> None:
    """The rate of every dropout behind the embeddings, whose own becomes 0: both models must read the same input."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    for module in model.base_model.embeddings.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def paired_layers(teacher_depth: int, student_depth: int) -> list[tuple[int, int]]:
    """Blocks (student's, teacher's), counted from 0, whose [CLS] states are matched: PKD-skip, the last left out."""
    every = teacher_depth // student_depth
    return [(block - 1, block * every - 1) for block in range(1, student_depth)]


# --------------------------------------------------------------------------------------------------- the losses


@dataclass(frozen=True)
class Answers:
    """What a classifier says about a batch, and what that depends on."""

    logits: Tensor
    """(batch, classes)"""
    embedded: Tensor
    """e: (batch, tokens, width)"""
    gradient: Tensor
    """g: (batch, tokens, width), zero at padding"""
    cls_states: Tensor
    """h_l[CLS]: (batch, layers, width)"""
    cls_gradients: Tensor
    """∂s/∂h_l[CLS]: (batch, layers, width)"""


def answer(model: Any, inputs: Mapping[str, Tensor], layers: Sequence[int], create_graph: bool = False) -> Answers:
    """One forward and one backward. With `create_graph` losses on the gradients reach the model's weights."""
    with torch.enable_grad():
        traced = trace(model, inputs, layers)
        gradient, *deeper = gradients(traced, create_graph)
    first = [state[:, 0] for state in traced.states]
    behind = [state[:, 0] for state in deeper]
    return Answers(traced.logits, traced.embedded, gradient, torch.stack(first, 1), torch.stack(behind, 1))


@dataclass(frozen=True)
class Method:
    """Weights of the parts of a student's loss, and what else sets an arm apart."""

    name: str
    rate: float
    """Learning rate."""
    alpha: float = 0.0
    """α of soft labels; true labels have 1 − α."""
    patience: float = 0.0
    gradient: float = 0.0
    cls_gradient: float = 0.0
    student_dropout: float = 0.0
    teacher_dropout: float = 0.0
    """The teacher's answers are then drawn anew at every step, with this rate."""
    shuffled: bool = False
    """The control: the teacher's gradients are dealt to other tokens of other sentences."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the student's own gradient is part of its loss."""
        return self.gradient > 0 or self.cls_gradient > 0


def student_loss(
    model: Any, batch: Mapping[str, Any], method: Method, layers: Sequence[int], temperature: float
) -> Tensor:
    """α KD + (1 − α) CE + β PKD + γ L_grad + γ Σ_l L_grad at h_l[CLS], a scalar; parts of weight 0 are left out.

    γ is multiplied by `batch["warmth"]`, 1 where there is none.
    """
    teacher: Mapping[str, Tensor] = batch["teacher"]
    share: float = batch.get("warmth", 1.0)
    if method.needs_gradients:
        student = answer(model, batch["inputs"], layers, create_graph=True)
        logits, states = student.logits, student.cls_states
    else:
        traced = trace(model, batch["inputs"], layers)
        logits, states = traced.logits, torch.stack([state[:, 0] for state in traced.states], 1)
    loss = (1 - method.alpha) * cross_entropy(logits, batch["labels"])
    if method.alpha:
        loss = loss + method.alpha * soft_label_loss(logits, teacher["logits"], temperature)
    if method.patience:
        loss = loss + method.patience * patience_loss(states, teacher["cls_states"])
    if method.gradient:
        loss = loss + share * method.gradient * gradient_loss(student.gradient, teacher["gradient"])
    if method.cls_gradient:
        pairs = zip(student.cls_gradients.unbind(1), teacher["cls_gradients"].unbind(1), strict=True)
        deeper = sum(gradient_loss(ours[:, None], theirs[:, None]) for ours, theirs in pairs)
        loss = loss + share * method.cls_gradient * deeper
    return loss


# ---------------------------------------------------------------------------------------- sentences and lessons


@dataclass(frozen=True)
class Sentences:
    """Tokenized sentences of one split with their labels (n,)."""

    ids: list[Tensor]
    labels: Tensor
    pad: int
    special: Tensor
    """Ids of tokens that are no part of a text."""

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs (rows, tokens), padded on the right."""
        chosen = [self.ids[row] for row in rows]
        mask = pad_sequence([torch.ones_like(ids) for ids in chosen], batch_first=True)
        return {"input_ids": pad_sequence(chosen, batch_first=True, padding_value=self.pad), "attention_mask": mask}

    def words(self, rows: Sequence[int]) -> Tensor:
        """Which tokens of `inputs(rows)` belong to the text, boolean (rows, tokens)."""
        inputs = self.inputs(rows)
        return inputs["attention_mask"].bool() & ~torch.isin(inputs["input_ids"], self.special)


def sentences(tokenizer: Any, task: str, split: Any, count: int, *, max_tokens: int, skip: int = 0) -> Sentences:
    """The first `count` sentences of a split, after `skip`, that have at most `max_tokens` tokens."""
    table = data.load(task, split).table
    ids = [torch.tensor(tokens) for tokens in tokenizer(table["text"].tolist())["input_ids"]]
    rows = [row for row, tokens in enumerate(ids) if len(tokens) <= max_tokens][skip : skip + count]
    labels = torch.tensor(table["label"].to_numpy()[rows])
    special = torch.tensor(tokenizer.all_special_ids)
    return Sentences([ids[row] for row in rows], labels, tokenizer.pad_token_id, special)


def epochs(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches of rows without end: shuffled every epoch, rows of similar length together to save padding."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size], key=lambda row: lengths[row])
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


Lesson = dict[str, Tensor]
"""What a teacher says about one sentence: `logits`, `gradient` (tokens, width), `cls_states`, `cls_gradients`."""


def lessons(teacher: Any, texts: Sentences, layers: Sequence[int], size: int) -> list[Lesson]:
    """A teacher's answers, sentence by sentence, on the CPU; without dropout they are constants, computed once."""
    found: dict[int, Lesson] = {}
    for rows in by_length(texts, size):
        batch = _on(texts.inputs(rows), teacher.device)
        said = answer(teacher, batch, layers)
        for item, row in enumerate(rows):
            found[row] = {
                "logits": said.logits[item].detach().cpu(),
                "gradient": said.gradient[item, : len(texts.ids[row])].cpu().clone(),
                "cls_states": said.cls_states[item].detach().cpu(),
                "cls_gradients": said.cls_gradients[item].cpu(),
            }
    return [found[row] for row in range(len(texts))]


def by_length(texts: Sentences, size: int) -> list[list[int]]:
    """Rows in batches, shortest sentences first."""
    order = sorted(range(len(texts)), key=lambda row: len(texts.ids[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(chosen: Sequence[Lesson]) -> dict[str, Tensor]:
    """Lessons as one batch; gradients are padded with zeros."""
    stacked = {name: torch.stack([lesson[name] for lesson in chosen]) for name in chosen[0] if name != "gradient"}
    return stacked | {"gradient": pad_sequence([lesson["gradient"] for lesson in chosen], batch_first=True)}


def deal_to_other_tokens(chosen: Sequence[Lesson], seed: int) -> list[Lesson]:
    """The same lessons with the gradients of all tokens of all sentences dealt out again in random order."""
    lengths = [len(lesson["gradient"]) for lesson in chosen]
    every = torch.cat([lesson["gradient"] for lesson in chosen])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    dealt = every[order].split(lengths)
    return [lesson | {"gradient": gradient} for lesson, gradient in zip(chosen, dealt, strict=True)]


def _on(tensors: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class School:
    """One seed's teacher, what it says about the training sentences, and the sentences its students are tested on."""

    teacher: Any
    train: Sentences
    test: Sentences
    lessons: list[Lesson]
    layers: list[tuple[int, int]]
    params: Params
    seed: int


def open_school(loaded: Any, params: Params, seed: int, train: Sentences, test: Sentences) -> School:
    """Fine-tune a teacher and have it answer every training sentence."""
    teacher = classifier_of(loaded.model, len(data.load(params.task).labels), seed)
    set_dropout(teacher, params.dropout)
    steps = params.teacher_epochs * -(-len(train) // params.batch_size)
    feed = ({"inputs": train.inputs(rows), "labels": train.labels[rows]} for rows in _rows(train, params, seed))

    def cross(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model(**batch["inputs"]).logits, batch["labels"])

    fit(teacher, feed, cross, Schedule(steps, params.teacher_rate), cpu=teacher.device.type == "cpu")
    teacher.requires_grad_(False)
    layers = paired_layers(teacher.config.num_hidden_layers, params.student_layers)
    said = lessons(teacher, train, [theirs for _, theirs in layers], params.batch_size)
    return School(teacher, train, test, said, layers, params, seed)


def _rows(texts: Sentences, params: Params, seed: int) -> Iterator[list[int]]:
    return epochs([len(ids) for ids in texts.ids], params.batch_size, seed)


def distil(school: School, method: Method) -> tuple[Any, float]:
    """Train one student; gives it with the seconds a step took (median)."""
    params, train = school.params, school.train
    student = student_of(school.teacher, params.student_layers, school.seed)
    set_dropout(student, method.student_dropout)
    ours, theirs = [list(layers) for layers in zip(*school.layers, strict=True)]
    said = deal_to_other_tokens(school.lessons, school.seed) if method.shuffled else school.lessons
    steps = params.epochs * -(-len(train) // params.batch_size)
    feed = (
        {
            "inputs": train.inputs(rows),
            "labels": train.labels[rows],
            "teacher": collate([said[row] for row in rows]),
            "warmth": warmth(step, params.warm_start * steps),
        }
        for step, rows in enumerate(_rows(train, params, school.seed))
    )

    def loss(model: Any, batch: Any) -> Tensor:
        if method.teacher_dropout:
            batch = batch | {"teacher": drawn_answers(school.teacher, batch["inputs"], theirs, method.teacher_dropout)}
        return student_loss(model, batch, method, ours, params.temperature)

    log = fit(student, feed, loss, Schedule(steps, method.rate), cpu=student.device.type == "cpu")
    return student, float(log["seconds"].diff().median())


def warmth(step: int, steps: float) -> float:
    """What γ is multiplied by at a step, counted from 0: it grows evenly to 1 over `steps`, and stays there."""
    return 1.0 if step >= steps else step / steps


def drawn_answers(teacher: Any, inputs: Mapping[str, Tensor], layers: Sequence[int], rate: float) -> dict[str, Tensor]:
    """A teacher's answers under one draw of dropout, which is on for this call only."""
    set_dropout(teacher, rate)
    teacher.train()
    said = answer(teacher, inputs, layers)
    teacher.eval()
    kept = {"logits": said.logits, "gradient": said.gradient}
    kept |= {"cls_states": said.cls_states, "cls_gradients": said.cls_gradients}
    return {name: tensor.detach() for name, tensor in kept.items()}


# ----------------------------------------------------------------------------------------------------- the exam


@dataclass(frozen=True)
class Reading:
    """What a model says about test sentences, and how it leans on their tokens; rows in the order of `by_length`."""

    logits: Tensor
    """(n, classes)"""
    gradient: Tensor
    """(n, tokens, width), zero at padding"""
    norm: Tensor
    """‖g‖: (n, tokens)"""
    product: Tensor
    """|g · e|: (n, tokens)"""

    def where(self, rows: Tensor, tokens: Tensor) -> Reading:
        """The logits of other sentences and the gradients of other tokens: rows (n,), tokens (n, tokens)."""
        gather = tokens[..., None].expand_as(self.gradient)
        moved = self.norm.gather(1, tokens), self.product.gather(1, tokens)
        return Reading(self.logits[rows], self.gradient.gather(1, gather), *moved)


def read_test(model: Any, texts: Sentences, size: int) -> Reading:
    """A model's answers and gradients on test sentences, on the CPU."""
    logits, gradient, norm, product = [], [], [], []
    for rows in by_length(texts, size):
        with torch.enable_grad():
            traced = trace(model, _on(texts.inputs(rows), model.device))
            (slope,) = gradients(traced)
        logits.append(traced.logits.detach().cpu())
        gradient += list(slope.cpu())
        norm += list(slope.norm(dim=-1).cpu())
        product += list((slope * traced.embedded.detach()).sum(-1).abs().cpu())
    padded = [pad_sequence(part, batch_first=True) for part in (gradient, norm, product)]
    return Reading(torch.cat(logits), *padded)


def loyalties(student: Reading, teacher: Reading, words: Tensor, real: Tensor) -> dict[str, float]:
    """How a student's answers agree with a teacher's: means over test sentences.

    `words` (n, tokens) are the tokens of the text, which saliencies are ranked over; `real` has special tokens too,
    over which gradients are compared as in L_grad. `alignment` is their mean cosine, 1 − L_grad / 2.
    """
    mine, theirs = student.logits.softmax(-1), teacher.logits.softmax(-1)
    cosines = cosine_similarity(student.gradient, teacher.gradient, dim=-1)  # (n, tokens)
    return {
        "label_loyalty": label_loyalty(mine, theirs),
        "probability_loyalty": float(probability_loyalty(mine, theirs).mean()),
        "probability_loyalty_nats": float(probability_loyalty(mine, theirs, base=np.e).mean()),
        "saliency_loyalty": float(rank_correlation(student.norm, teacher.norm, words).nanmean()),
        "saliency_loyalty_input": float(rank_correlation(student.product, teacher.product, words).nanmean()),
        "top_3_overlap": float(top_overlap(student.norm, teacher.norm, words, 3).nanmean()),
        "alignment": float(cosines[real].mean()),
    }


def shuffled_reading(reading: Reading, words: Tensor, seed: int) -> Reading:
    """A reading whose answers belong to other sentences and whose gradients to other words of the sentence."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(words.shape, generator=generator)
    positions = torch.arange(words.shape[1]).expand_as(words)
    tokens = positions.clone()
    for row, is_word in enumerate(words):
        mine = positions[row][is_word]
        tokens[row, is_word] = mine[noise[row, is_word].argsort()]
    return reading.where(torch.randperm(len(words), generator=generator), tokens)


# ----------------------------------------------------------------------------------------------- the experiment

BASELINES = ("fine-tuning", "KD", "PKD")
GRADIENT_METHODS = ("GKD", "GKD-CLS")
SHUFFLED = "GKD, shuffled gradients"
STUDENT_DROPOUT = "GKD, dropout in the student"
TEACHER_DROPOUT = "GKD, dropout in the teacher"


def settings(name: str, params: Params, best: Mapping[str, Method]) -> list[Method]:
    """What is tried for a method, given the best settings of those before it.

    Rates are tried for fine-tuning and KD. PKD and GKD add one part to the loss of the best KD, GKD-CLS two to that of
    the best PKD: each has as many settings as there are weights.
    """
    if name in ("fine-tuning", "KD"):
        alpha = params.alpha if name == "KD" else 0.0
        return [Method(name, rate, alpha=alpha) for rate in params.rates]
    if name == "PKD":
        return [replace(best["KD"], name=name, patience=weight) for weight in params.patiences]
    if name == "GKD":
        return [replace(best["KD"], name=name, gradient=weight) for weight in params.gradients]
    return [replace(best["PKD"], name=name, gradient=weight, cls_gradient=weight) for weight in params.gradients]


@dataclass(frozen=True)
class Search:
    """Each method with its best setting, the student it gave in the seed of the search, and a row for every try."""

    best: dict[str, Method]
    students: dict[Method, tuple[Any, float]]
    tries: list[dict[str, Any]]


def search(school: School, validation: Sentences) -> Search:
    """Train one seed's students with every setting; the one most often right on validation sentences is chosen.

    The first of equals is taken. No student is trained on these sentences and no other result shows them.
    """
    found = Search({}, {}, [])
    for name in (*BASELINES, *GRADIENT_METHODS):
        highest = -1.0
        for method in settings(name, school.params, found.best):
            student = distil(school, method)
            right = share_right(student[0], validation, school.params.batch_size)
            weights = {"patience": method.patience, "gradient": method.gradient}
            found.tries.append({"method": name, "rate": method.rate, **weights, "accuracy": right})
            if right > highest:
                highest, found.best[name], kept = right, method, student
        found.students[found.best[name]] = kept
    return found


def share_right(model: Any, texts: Sentences, size: int) -> float:
    """The share of sentences with the right label."""
    right = 0.0
    with torch.no_grad():
        for rows in by_length(texts, size):
            logits = model(**_on(texts.inputs(rows), model.device)).logits
            right += float((logits.argmax(-1).cpu() == texts.labels[rows]).sum())
    return right / len(texts)


def arms(best: Mapping[str, Method], params: Params) -> list[Method]:
    """The five methods, and GKD with shuffled gradients, with dropout in the student and in the teacher."""
    gkd = best["GKD"]
    return [
        *best.values(),
        replace(gkd, name=SHUFFLED, shuffled=True),
        replace(gkd, name=STUDENT_DROPOUT, student_dropout=params.dropout),
        replace(gkd, name=TEACHER_DROPOUT, teacher_dropout=params.dropout),
    ]


@dataclass(frozen=True)
class Exam:
    """The test sentences of one seed and the teachers that students are compared with."""

    test: Sentences
    order: list[int]
    """Rows as `by_length` gives them, the order of every reading."""
    teachers: Mapping[str, Reading]

    @property
    def words(self) -> Tensor:
        """Tokens of the texts, boolean (n, tokens)."""
        return self.test.words(self.order)

    def accuracy(self, reading: Reading) -> float:
        """The share of test sentences with the right label."""
        return accuracy(reading.logits.argmax(-1), self.test.labels[self.order])

    def compare(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """A row for each teacher: how loyal a reading is to it."""
        real = self.test.inputs(self.order)["attention_mask"].bool()
        for name, theirs in self.teachers.items():
            yield {"teacher": name, **loyalties(reading, theirs, self.words, real)}


def exams(schools: Sequence[School], size: int) -> list[Exam]:
    """For each seed its own teacher, the next seed's (a teacher never seen), and its own with shuffled answers."""
    readings = [read_test(school.teacher, school.test, size) for school in schools]
    found = []
    for at, school in enumerate(schools):
        order = [row for rows in by_length(school.test, size) for row in rows]
        shuffled = shuffled_reading(readings[at], school.test.words(order), school.seed)
        teachers = {"own": readings[at], "another": readings[(at + 1) % len(readings)], "shuffled": shuffled}
        found.append(Exam(school.test, order, teachers))
    return found


def teacher_rows(school: School, exam: Exam) -> Iterator[dict[str, Any]]:
    """A teacher's accuracy, and what one draw of dropout does to its own gradients."""
    noisy = copy.deepcopy(school.teacher)
    set_dropout(noisy, school.params.dropout)
    torch.manual_seed(school.seed)
    drawn = read_test(noisy.train(), school.test, school.params.batch_size)
    row = next(row for row in exam.compare(drawn) if row["teacher"] == "own")
    yield {"accuracy": exam.accuracy(exam.teachers["own"]), "with_dropout": exam.accuracy(drawn), **row}


def example_rows(tokenizer: Any, exam: Exam, name: str, reading: Reading, count: int = 6) -> Iterator[dict[str, Any]]:
    """The share of saliency that each word piece of the first test sentences of 8 words or more has."""
    words, shown = exam.words, 0
    for row in sorted(range(len(exam.order)), key=lambda row: exam.order[row]):
        if words[row].sum() < 8 or shown == count:
            continue
        shown += 1
        share = reading.norm[row] / reading.norm[row][words[row]].sum()
        pieces = tokenizer.convert_ids_to_tokens(exam.test.ids[exam.order[row]].tolist())
        for position in words[row].nonzero().flatten().tolist():
            known = {"sentence": shown, "position": position, "token": pieces[position], "model": name}
            yield known | {"share": float(share[position]), "answer": int(reading.logits[row].argmax())}


def experiment(params: Params) -> Result:
    """Fine-tunes a teacher a seed, then one student a method; tables have one row a seed, method and teacher."""
    loaded = zoo.load(params.teacher, device="auto", dtype="float32")
    read = partial(sentences, loaded.tokenizer, params.task, max_tokens=params.max_tokens)
    train, test = read("train", params.n_train), read("test", params.n_test)
    schools = [open_school(loaded, params, seed, train, test) for seed in params.seeds]
    found = search(schools[0], read("train", params.n_validation, skip=len(train)))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("students", "loyalty", "teachers", "examples")}
    for school, exam in zip(schools, exams(schools, params.batch_size), strict=True):
        seed, first = {"seed": school.seed}, school.seed == params.seed
        rows["teachers"] += [seed | row for row in teacher_rows(school, exam)]
        if first:
            rows["examples"] += example_rows(loaded.tokenizer, exam, "teacher", exam.teachers["own"])
        for method in arms(found.best, params):
            student, seconds = (found.students.get(method) if first else None) or distil(school, method)
            reading = read_test(student, test, params.batch_size)
            known = seed | {"method": method.name}
            rows["students"].append(known | {"accuracy": exam.accuracy(reading), "seconds_per_step": seconds})
            rows["loyalty"] += [known | row for row in exam.compare(reading)]
            if first and method.name in found.best:
                rows["examples"] += example_rows(loaded.tokenizer, exam, method.name, reading)
    facts = {"train": len(train), "test": len(test), "teacher_layers": schools[0].teacher.config.num_hidden_layers}
    tables = {name: pd.DataFrame(entries) for name, entries in rows.items()}
    return Result(tables | {"tuning": pd.DataFrame(found.tries)}, facts)


# ----------------------------------------------------------------------------------------------------- the claims


def difference(table: pd.DataFrame, value: str, ours: str, other: str) -> Interval:
    """Interval over seeds of one method's value minus another's, paired by seed."""
    wide = table.pivot_table(index="seed", columns="method", values=value)
    return paired_interval(wide[ours], wide[other])


def own(result: Result) -> pd.DataFrame:
    """Students' loyalty to the teacher that they learned from."""
    table = result.tables["loyalty"]
    return table[table["teacher"] == "own"]


def _against(
    table: pd.DataFrame, value: str, what: str, others: Sequence[str], ours: Sequence[str]
) -> Iterator[Comparison]:
    for method in ours:
        for other in others:
            yield Comparison(f"{what}, {method} − {other}", difference(table, value, method, other))


def check_accuracy(result: Result) -> tuple[Comparison, ...]:
    """Both gradient methods are more often right than KD and than PKD."""
    return tuple(_against(result.tables["students"], "accuracy", "accuracy", ("KD", "PKD"), GRADIENT_METHODS))


def check_saliency(result: Result) -> tuple[Comparison, ...]:
    """Both gradient methods rank tokens more like the teacher than KD, PKD and, for GKD, shuffled gradients do."""
    table = own(result)
    return (
        *_against(table, "saliency_loyalty", "rank correlation of ‖g‖", ("KD", "PKD"), GRADIENT_METHODS),
        *_against(table, "saliency_loyalty_input", "rank correlation of |g · e|", ("KD", "PKD"), ("GKD",)),
        *_against(table, "saliency_loyalty", "rank correlation of ‖g‖", (SHUFFLED,), ("GKD",)),
    )


def check_outputs(result: Result) -> tuple[Comparison, ...]:
    """Both gradient methods agree with the teacher in labels and probabilities more than KD and PKD do."""
    table, rivals = own(result), ("KD", "PKD")
    return (
        *_against(table, "label_loyalty", "label loyalty", rivals, GRADIENT_METHODS),
        *_against(table, "probability_loyalty", "probability loyalty", rivals, GRADIENT_METHODS),
    )


def check_dropout(result: Result) -> tuple[Comparison, ...]:
    """GKD's gradients lie closer to the teacher's without dropout than with it, in the student or in the teacher."""
    return tuple(
        _against(own(result), "alignment", "cosine of gradients", (STUDENT_DROPOUT, TEACHER_DROPOUT), ("GKD",))
    )


def _swap_methods(table: str, *pairs: tuple[str, str]) -> Callable[[Result], Result]:
    names = {one: other for pair in pairs for one, other in (pair, pair[::-1])}

    def apply(result: Result) -> Result:
        frame = result.tables[table]
        return result.with_table(table, frame.assign(method=frame["method"].replace(names)))

    return apply


def _loyalty_to_a_shuffled_teacher(result: Result) -> Result:
    frame = result.tables["loyalty"]
    shuffled = frame[frame["teacher"] == "shuffled"].assign(teacher="own")
    return result.with_table("loyalty", shuffled)


TOLERANCES = {"students.seconds_per_step": (math.inf, math.inf)}
"""Measured times are no two machines' the same."""

_NOT_READ = "the abstract says so; its tables were not read"

CLAIMS: list[Claim] = [
    Claim(
        "accuracy",
        "Students that match the teacher's gradients (GKD, GKD-CLS) are more often right than students of KD and PKD.",
        (),
        check_accuracy,
        Control(
            "students of KD and PKD stand in for those of GKD and GKD-CLS, and they for them",
            _swap_methods("students", ("GKD", "KD"), ("GKD-CLS", "PKD")),
        ),
        reported=_NOT_READ,
    ),
    Claim(
        "saliency",
        "They lean on the same tokens as the teacher: saliency loyalty is higher than with KD and PKD.",
        (),
        check_saliency,
        Control(
            "a teacher with its answers shuffled over sentences and tokens stands in", _loyalty_to_a_shuffled_teacher
        ),
        reported=_NOT_READ,
    ),
    Claim(
        "outputs",
        "They also agree more with the teacher's labels and probabilities than students of KD and PKD.",
        (),
        check_outputs,
        Control(
            "a teacher with its answers shuffled over sentences and tokens stands in", _loyalty_to_a_shuffled_teacher
        ),
        reported="the paper compares these loyalties; its tables were not read",
    ),
    Claim(
        "dropout",
        "Dropout, in the student or in the teacher, keeps their gradients from being aligned.",
        (),
        check_dropout,
        Control(
            "students trained with dropout stand in for those without, and they for them",
            _swap_methods("loyalty", ("GKD", STUDENT_DROPOUT)),
        ),
        reported="the paper trains without dropout for this reason; its ablation was not read",
    ),
]
