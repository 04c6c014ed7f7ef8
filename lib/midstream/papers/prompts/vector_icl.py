"""A frozen language model learns in context from vectors: a small projector makes one soft token of each.

Reference: Zhuang et al., "Vector-ICL: In-context Learning with Continuous Vector Representations", ICLR 2025, arXiv
2410.05629. The abstract was read; of method and released code a summary; the paper's numbers were not.

Glossary (symbol → name here → shape)
    E        encoder            text → vector e (width of the encoder,); black box, each text encoded once
    P        projector          e → soft token (width of the language model,); all that is trained
    P(e)     soft               stands in a prompt where a word would, through `inputs_embeds`
    x<, x≥   prefix, rest       a text cut in two: P(E(x<)) is given, the rest and an end are predicted
    k        shots              demonstrations per class, or lines with an answer before a number's question

Deviations
    - MiniLM (384) and SmolLM2-135M (576) stand for encoders and Llama of billions of parameters; projectors see
      hundreds of texts, not WikiText-103. Most of our texts are one sentence, so most cuts are at a random token.
    - Prompts begin with one beginning token in pretraining too. The released training joins the samples of a batch in
      one sequence without separation of attention. Here no row sees another; in task finetuning a row has `join` lines,
      as the prompts have in which the projector is used. With `join` 1 it is the described form, which was too slow to
      learn from the few hundred examples that fit (seen in a trial on other seeds).
    - A projector starts with soft tokens as long, on average, as the model's own embeddings (inferred).
    - Numbers: F = aA + bB with a, b ≥ 0 and a + b ≤ 1, written in as many digits as A and B have (the paper's range of
      a and b is inferred). All arms answer digit by digit, so every answer is a number.
    - A time series is a handwritten digit, its 64 grey values in reading order, with a projector of its own.
    - A label is chosen from plain or centred scores, and text has several templates; validation examples decide.
    - Added as baselines: logistic regression on the same vectors and labels; least squares on the same lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control
from midstream.data.number_lines import Line, least_squares, number_lines, one_hot_places
from midstream.data.prompts import TEMPLATES, Template, draw, label_ids
from midstream.measure import Interval, accuracy, auc, paired_interval, t_interval
from midstream.measure.soft_tokens import (
    Prompt,
    answer_loss,
    beginning,
    collate,
    held_out_loss,
    next_logits,
    prompt,
    write,
)
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit
from midstream.train.soft_projectors import KINDS, LINEAR, NONLINEAR, Kind, Zero, untrained

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("smollm2", min_length=1, description="the frozen language model: packaged, tiny:… or Hub id")
    encoder: str = Field("minilm", min_length=1, description="the frozen encoder: packaged, folder or Hub id")
    task: str = Field("movies", min_length=1, description="the text classification task")
    corpus: str = Field("sources", min_length=1, description="texts on which projectors are pretrained")
    max_chars: int = Field(60, ge=20, le=100_000, description="longest text used, in characters")
    continuation: int = Field(12, ge=1, le=4096, description="longest predicted rest of a text, in tokens")
    pretrain: int = Field(8, ge=2, le=10_000_000, description="texts a projector is pretrained on")
    finetune: int = Field(16, ge=2, le=10_000_000, description="labelled texts a projector is tuned on")
    series: int = Field(16, ge=10, le=1_400, description="labelled series a projector is tuned on")
    numbers: int = Field(2, ge=2, le=10_000_000, description="sequences of number lines a projector is tuned on")
    shots: tuple[int, ...] = Field((0, 2), min_length=1, description="demonstrations per class; claims read the last")
    lines: int = Field(2, ge=2, le=64, description="answered lines before each number question")
    digits: tuple[int, ...] = Field((1, 3), min_length=1, description="digits of A and B; a claim reads the last")
    n_val: int = Field(4, ge=2, le=10_000, description="validation examples of each task")
    n_numbers: int = Field(2, ge=2, le=100_000, description="number questions of each size and seed")
    n_queries: int = Field(8, ge=4, le=100_000, description="test queries of each task and seed")
    rates: tuple[float, ...] = Field((3e-2,), min_length=1, description="AdamW's peak rates tried in each training")
    join: int = Field(
        8, ge=1, le=256, description="examples in one sequence of task finetuning; 1 is the described form"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="examples a step")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the frozen language model")


_FULL = Params(
    n_seeds=5,
    max_chars=90,
    pretrain=1024,
    finetune=1024,
    series=640,
    numbers=80,
    shots=(0, 4),
    lines=4,
    digits=(2, 8),
    n_val=32,
    n_numbers=12,
    n_queries=120,
    rates=(1e-2, 3e-2, 1e-1),
    batch_size=16,
)
_PAPER = _FULL.model_copy(
    update={
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "encoder": "sentence-transformers/all-mpnet-base-v2",
        "task": "sst2",
        "corpus": "ag_news",
        "max_chars": 100_000,
        "continuation": 512,
        "pretrain": 100_000,
        "finetune": 50_000,
        "numbers": 50_000,
        "digits": (2, 5, 10),
        "n_numbers": 500,
        "n_queries": 800,
        "join": 1,
        "batch_size": 128,
        "rates": (1e-3, 3e-3, 1e-2),
    }
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "three seeds, a few updates: see every part at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "a thousand texts, three rates, five seeds: settle the claims", minutes=60, memory_gib=4),
    "paper": Preset(
        _PAPER,
        "the paper's language model on SST-2; another encoder, pretrained on news",
        minutes=1500,
        memory_gib=80,
        needs="Llama-3.1-8B-Instruct, all-mpnet-base-v2, SST-2 and AG News from the Hub and a GPU with 80 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revisions of both models and of the data."""
    models = {name: zoo.revision(name) for name in (params.model, params.encoder)}
    return models | {name: data.revision(name) for name in (params.task, params.corpus, "digits")}


# ----------------------------------------------------------------------------------------- what projectors learn from


def cut(tokens: Sequence[int], sentence_starts: Sequence[int], rng: np.random.Generator) -> int:
    """Where a text of `tokens` is cut: at a random later sentence if there is one, else at a random token.

    Neither side is ever empty. Raises `ValueError` for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"A text to be cut needs two tokens; it has {len(tokens)}.")
    inside = [start for start in sentence_starts if 0 < start < len(tokens)]
    return int(rng.choice(inside)) if inside else int(rng.integers(1, len(tokens)))


def sentence_starts(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens at which a new sentence begins, from each token's place (start, end) in the text."""
    ends = [match.end(1) for match in re.finditer(r"([.!?]+)\s", text)]
    return [next((i for i, (start, _) in enumerate(offsets) if start >= end), 0) for end in ends]


def halves(tokenizer: Any, text: str, longest: int, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A text's prefix, as text for the encoder, and at most `longest` tokens of the rest, as the model reads them."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    at = cut(ids, sentence_starts(text, offsets), rng)
    rest = ids[at : at + longest]
    end = [tokenizer.eos_token_id] if at + longest >= len(ids) else []
    return text[: offsets[at - 1][1]], [*rest, *end]


# ------------------------------------------------------------------------------------------------- the frozen parts


@dataclass
class Bench:
    """The frozen language model with its tokenizer, and the frozen encoder, which reads each text once."""

    model: Any
    tokenizer: Any
    encoder: Any
    params: Params
    known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The width of the model's embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def length(self) -> float:
        """Mean norm of the model's token embeddings, as it reads them."""
        ids = torch.arange(len(self.tokenizer), device=self.model.device)
        with torch.no_grad():
            return float(self.model.get_input_embeddings()(ids).float().norm(dim=1).mean())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors (texts, width of the encoder)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= dict(zip(new, self.encoder.encode(new), strict=True))
        return torch.stack([self.known[text] for text in texts])

    def tokens(self, text: str) -> list[int]:
        """The token ids of a piece of a prompt."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def start(self) -> list[int]:
        """What every prompt begins with, once."""
        return beginning(self.tokenizer)

    def new(self, kind: Kind, vectors: Tensor, seed: int) -> nn.Module:
        """An untrained projector for such vectors."""
        return untrained(kind, vectors, self.width, self.length(), seed).to(self.model.device)

    def loss(self, projector: nn.Module | None, prompts: Sequence[Prompt]) -> float:
        """Held-out loss of prompts."""
        return held_out_loss(self.model, projector, prompts, 2 * self.params.batch_size)


def open_bench(params: Params) -> Bench:
    """Loads and freezes both models."""
    loaded = zoo.load(params.model, device="auto", dtype=params.precision)
    model: Any = loaded.model.requires_grad_(False)
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # for short rows faster there than the fused kernel's backward
    return Bench(model, loaded.tokenizer, zoo.load(params.encoder, device="auto"), params)


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Lesson:
    """One training of a projector: one pass over `rows`, and the rows on which its rate is chosen."""

    rows: Sequence[Prompt]
    validation: Sequence[Prompt]
    warmup: float
    decay: float
    in_a_row: int = 1
    """Examples in each row; a step takes `batch_size` examples."""


def train(bench: Bench, start: nn.Module, lesson: Lesson, rate: float) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of a projector after one pass over a lesson, and its log; nothing else has a gradient."""
    import copy

    size = max(1, bench.params.batch_size // lesson.in_a_row)
    chunks = [lesson.rows[at : at + size] for at in range(0, len(lesson.rows), size)]
    schedule = Schedule(len(chunks), rate, warmup=lesson.warmup, weight_decay=lesson.decay)
    made = copy.deepcopy(start)
    log = fit(made, map(collate, chunks), lambda module, batch: answer_loss(bench.model, module, batch), schedule)
    return made, log


def best_rate(bench: Bench, start: nn.Module, lesson: Lesson) -> Iterator[dict[str, float]]:
    """Rows of each rate and its loss on the lesson's validation rows."""
    for rate in bench.params.rates:
        made, _ = train(bench, start, lesson, rate)
        yield {"rate": rate, "loss": bench.loss(made, lesson.validation)}


# --------------------------------------------------------------------------------------------------- classification


@dataclass(frozen=True)
class Examples:
    """Inputs with their classes (n,): the encoder's vectors (n, width), and what a model of text reads instead."""

    vectors: Tensor
    texts: list[str]
    labels: Tensor

    def __getitem__(self, chosen: Sequence[int]) -> Examples:
        return Examples(self.vectors[list(chosen)], [self.texts[i] for i in chosen], self.labels[list(chosen)])

    def __len__(self) -> int:
        return len(self.labels)

    def items(self, as_text: bool) -> Sequence[str | Tensor]:
        """What stands in a prompt for each example: its text or its vector."""
        return self.texts if as_text else list(self.vectors)


@dataclass(frozen=True)
class Task:
    """A classification task of one seed; `form` is the vectors' prompt, `text_forms` are those tried for text."""

    name: str
    form: Template
    text_forms: tuple[Template, ...]
    train: Examples
    demos: Examples
    val: Examples
    test: Examples
    shots: tuple[int, ...]
    seed: int


NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SERIES = Template("(", ")'s digit is", NUMERALS, "\n")


def vector_form(task: str) -> Template:
    """The paper's line, `(vector)'s sentiment is positive`, with the name and the labels of a task's template."""
    known = TEMPLATES[task]
    name = known.cue.strip().rstrip(":").lower()
    return Template("(", f")'s {name} is", tuple(label.lower() for label in known.labels), "\n")


def text_forms(task: str) -> tuple[Template, ...]:
    """Three ways of writing demonstrations as text."""
    form = vector_form(task)
    question = f"\nIs this {' or '.join(form.labels)}? It is"
    return TEMPLATES[task], form, Template("", question, form.labels, "\n\n")


def line(bench: Bench, form: Template, item: str | Tensor, label: int | None = None) -> list[list[int] | Tensor]:
    """The parts of one example in a prompt, ending in its label's line or, without one, in the question."""
    after = form.cue if label is None else f"{form.cue} {form.labels[label]}{form.end}"
    if isinstance(item, str):
        return [bench.tokens(f"{form.head}{item}{after}")]
    head = bench.tokens(form.head)
    return [*([head] if head else []), item, bench.tokens(after)]


def mispaired(labels: Tensor, n_classes: int) -> Tensor:
    """Labels (demos,) dealt out again: the i-th demonstration of class c, from 0, gets class (c + i) mod C.

    Each label is given as often as before where classes have as many demonstrations; with a multiple of C of them,
    every class has every label equally often, and the pairing says nothing.
    """
    dealt = labels.clone()
    for each in range(n_classes):
        places = (labels == each).nonzero().squeeze(1)
        dealt[places] = (each + torch.arange(len(places))) % n_classes
    return dealt


def context(bench: Bench, task: Task, form: Template, shots: int, *, as_text: bool, dealt: bool = False) -> Prompt:
    """The beginning and `shots` demonstrations a class in an order that is the seed's, the same for every arm."""
    count = len(form.labels)
    chosen = [i for label in range(count) for i in (task.demos.labels == label).nonzero().squeeze(1)[:shots].tolist()]
    order = np.random.default_rng(task.seed).permutation(chosen).tolist() if chosen else []
    demos = task.demos[order]
    labels = mispaired(demos.labels, count) if dealt else demos.labels
    parts: list[list[int] | Tensor] = [bench.start]
    for item, label in zip(demos.items(as_text), labels.tolist(), strict=True):
        parts += line(bench, form, item, label)
    return prompt(parts)


def label_scores(
    bench: Bench, projector: nn.Module | None, form: Template, given: Prompt, examples: Sequence[Examples]
) -> Tensor:
    """Log-probabilities (all examples, classes) of the label words' first tokens; without a projector, of texts."""
    items = [item for some in examples for item in some.items(projector is None)]
    questions = [prompt(line(bench, form, item)) for item in items]
    logits = next_logits(bench.model, projector, given, questions, 4 * bench.params.batch_size)
    return logits.log_softmax(1)[:, label_ids(bench.tokenizer, form)]


def decide(scores: Tensor, val_scores: Tensor, val_labels: Tensor) -> Tensor:
    """Predicted classes (n,) from scores (n, classes), plain or centred, whichever validates better.

    Centred: less each class's mean score over the validation examples, whose labels are not needed for that.
    """
    middle = val_scores.mean(0)
    plain, centred = (accuracy((val_scores - shift).argmax(1), val_labels) for shift in (0 * middle, middle))
    return (scores - middle if centred > plain else scores).argmax(1)


def examine(
    bench: Bench,
    task: Task,
    projector: nn.Module | None,
    form: Template,
    shots: int,
    *,
    dealt: bool = False,
) -> dict[str, Any]:
    """One row: how an arm classifies the test examples, and how many tokens its demonstrations take."""
    given = context(bench, task, form, shots, as_text=projector is None, dealt=dealt)
    both = label_scores(bench, projector, form, given, (task.val, task.test))
    val_scores, scores = both.split([len(task.val), len(task.test)])
    predicted = decide(scores, val_scores, task.val.labels)
    binary = auc(scores[:, 1] - scores[:, 0], task.test.labels == 1) if scores.shape[1] == 2 else float("nan")
    return {
        "task": task.name,
        "seed": task.seed,
        "shots": shots,
        "pairing": "dealt out" if dealt else "true",
        "accuracy": accuracy(predicted, task.test.labels),
        "auc": binary,
        "tokens": len(given),
    }


def best_text_form(bench: Bench, task: Task) -> Template:
    """The text template that validates best with the most demonstrations."""

    def right(form: Template) -> float:
        given = context(bench, task, form, task.shots[-1], as_text=True)
        scores = label_scores(bench, None, form, given, (task.val,))
        return accuracy(decide(scores, scores, task.val.labels), task.val.labels)

    return max(task.text_forms, key=right) if len(task.text_forms) > 1 else task.text_forms[0]


def probe(task: Task) -> dict[str, Any]:
    """One row: logistic regression on the same vectors and labels that projectors are tuned on."""
    from sklearn.linear_model import LogisticRegression

    fitted = [
        LogisticRegression(C=strength, max_iter=2000).fit(task.train.vectors, task.train.labels)
        for strength in (0.1, 1, 10, 100)
    ]
    best = max(fitted, key=lambda each: each.score(task.val.vectors, task.val.labels))
    found = best.score(task.test.vectors, task.test.labels)
    return {"task": task.name, "seed": task.seed, "shots": 0, "pairing": "true", "accuracy": float(found)}


def labelled(bench: Bench, task: Task, examples: Examples) -> list[Prompt]:
    """Rows of task finetuning: `join` lines each, every label word's first token to be predicted."""
    words, join, end = label_ids(bench.tokenizer, task.form).tolist(), bench.params.join, bench.tokens(task.form.end)
    pairs = list(zip(examples.items(False), examples.labels.tolist(), strict=True))
    rows = []
    for at in range(0, len(pairs), join):
        parts: list[list[int] | Tensor] = [bench.start]
        answers = []
        for item, label in pairs[at : at + join]:
            parts += line(bench, task.form, item)
            answers.append(len(parts))
            parts += [[words[label]], end]
        rows.append(prompt(parts[:-1], answers))
    return rows


def finetuning(bench: Bench, task: Task, train: Examples) -> Lesson:
    """Task finetuning: one epoch, decay 0.01, 10 % warm-up, and rates by the loss on validation examples."""
    rows, validation = labelled(bench, task, train), labelled(bench, task, task.val)
    return Lesson(rows, validation, warmup=0.1, decay=0.01, in_a_row=bench.params.join)


# ------------------------------------------------------------------------------------------- the tasks of one seed


def _examples(bench: Bench, table: pd.DataFrame) -> Examples:
    texts = table["text"].tolist()
    return Examples(bench.encode(texts), texts, torch.tensor(table["label"].tolist()))


def _dealt(pool: Examples, shots: int, n_classes: int, n_val: int) -> tuple[Examples, Examples, Examples]:
    """Demonstrations (`shots` a class), validation examples, and the rest to train on: no example in two of them."""
    demos = [i for label in range(n_classes) for i in (pool.labels == label).nonzero().squeeze(1)[:shots].tolist()]
    rest = [i for i in range(len(pool)) if i not in set(demos)]
    return pool[demos], pool[rest[:n_val]], pool[rest[n_val:]]


def text_task(bench: Bench, seed: int) -> Task:
    """Sentences of the classification task: training, demonstrations and validation from its training split."""
    params, form = bench.params, vector_form(bench.params.task)
    count, shots = len(form.labels), params.shots[-1]
    tables = {split: data.load(params.task, split).table for split in ("train", "test")}
    per_class = shots + -(-(params.finetune + params.n_val) // count)
    pool = _examples(bench, draw(tables["train"], per_class, seed, params.max_chars))
    demos, val, train_ = _dealt(pool, shots, count, params.n_val)
    test = _examples(bench, draw(tables["test"], params.n_queries // count, seed, params.max_chars))
    return Task(params.task, form, text_forms(params.task), train_, demos, val, test, params.shots, seed)


def series_task(bench: Bench, seed: int) -> Task:
    """Handwritten digits as series of 64 grey values; as text, each value is written as one digit from 0 to 9."""
    params, rng = bench.params, np.random.default_rng(seed)
    parts = {split: _series(data.load("digits", split), rng) for split in ("train", "test")}
    wanted = 20 + params.n_val + params.series
    demos, val, train_ = _dealt(parts["train"][range(wanted)], 1, len(NUMERALS), params.n_val)
    test = parts["test"][range(params.n_queries)]
    return Task("series", SERIES, (SERIES,), train_[range(params.series)], demos, val, test, (0, 1), seed)


def _series(found: data.Dataset, rng: np.random.Generator) -> Examples:
    assert found.images is not None
    order = rng.permutation(len(found))
    values = torch.from_numpy(found.images[order]).flatten(1).float()
    texts = ["".join(str(round(9 * value)) for value in row) for row in values.tolist()]
    return Examples(values, texts, torch.tensor(found.table["label"].to_numpy()[order]))


@dataclass(frozen=True)
class Reading:
    """Pretraining of one seed: the lesson, and its validation rows without their vectors."""

    lesson: Lesson
    bare: Sequence[Prompt]


def pretraining(bench: Bench, seed: int) -> Reading:
    """Unlabelled texts, cut: P(E(prefix)), then the rest and an end, which are predicted; decay 1e-4, 5 % warm-up."""
    params, rng = bench.params, np.random.default_rng(seed)
    table = data.load(params.corpus).table
    texts = table["text"][table["text"].str.len() <= params.max_chars].tolist()
    chosen = [texts[i] for i in rng.permutation(len(texts))[: params.pretrain + params.n_val]]
    cuts = [halves(bench.tokenizer, text, params.continuation, rng) for text in chosen]
    vectors = bench.encode([prefix for prefix, _ in cuts])
    rows = [prompt([bench.start, vector, rest], [2]) for vector, (_, rest) in zip(vectors, cuts, strict=True)]
    bare = [prompt([bench.start, rest], [1]) for _, rest in cuts[: params.n_val]]
    return Reading(Lesson(rows[params.n_val :], rows[: params.n_val], warmup=0.05, decay=1e-4), bare)


def reading_rows(bench: Bench, made: nn.Module, reading: Reading) -> Iterator[dict[str, Any]]:
    """Rows of held-out loss with a text's own vector, another text's, a zero one, and none."""
    own = list(reading.lesson.validation)
    other = [replace(row, vectors=next_.vectors) for row, next_ in zip(own, own[1:] + own[:1], strict=True)]
    yield {"vector": "own", "loss": bench.loss(made, own)}
    yield {"vector": "another text's", "loss": bench.loss(made, other)}
    yield {"vector": "zero", "loss": bench.loss(Zero(bench.width), own)}
    yield {"vector": "none", "loss": bench.loss(None, reading.bare)}


# ---------------------------------------------------------------------------------------------------------- numbers

SEPARATORS = ((",", "="), (" and ", " gives "))
"""What stands between A and B and before F; vectors have the first, digit tokens whichever validates better."""


def digit_ids(bench: Bench) -> list[int]:
    """The tokens of the digits 0 to 9."""
    return [bench.tokens(str(digit))[-1] for digit in range(10)]


def number_prompt(
    bench: Bench, lines: Sequence[Line], *, as_vectors: bool, separators: tuple[str, str] = SEPARATORS[0]
) -> list[list[int] | Tensor]:
    """Parts of lines `A,B=F`: A and B as vectors or digit by digit, F digit by digit, as wide as A and B."""
    ids, (between, before) = digit_ids(bench), separators
    parts: list[list[int] | Tensor] = [bench.start]
    for each in lines:
        written = [[ids[int(digit)] for digit in f"{value:0{each.digits}d}"] for value in (each.A, each.B, each.F)]
        A, B = one_hot_places([each.A, each.B]) if as_vectors else written[:2]
        parts += [A, bench.tokens(between), B, bench.tokens(before), written[2], bench.tokens("\n")]
    return parts


def number_lesson(bench: Bench, seed: int) -> Lesson:
    """Sequences of lines of one function each, every F predicted; one in twenty copies. Batches have one size."""
    params, rng = bench.params, np.random.default_rng(seed)

    def row(digits: int) -> Prompt:
        parts = number_prompt(bench, number_lines(digits, params.lines + 1, rng, copying=0.05), as_vectors=True)
        return prompt(parts, range(5, len(parts), 6))

    in_a_row = params.lines + 1
    together = max(1, params.batch_size // in_a_row)
    sizes = [params.digits[i // together % len(params.digits)] for i in range(params.numbers)]
    rows = [row(digits) for digits in sizes]
    held = [row(digits) for digits in params.digits for _ in range(params.n_val)]
    return Lesson(rows, held, warmup=0.1, decay=0.01, in_a_row=in_a_row)


def answers(
    bench: Bench,
    projector: nn.Module | None,
    asked: Sequence[Sequence[Line]],
    separators: tuple[str, str] = SEPARATORS[0],
) -> np.ndarray:
    """F (sequences,) as the model writes it for the last line of each sequence; without a projector, from digits."""
    digits = asked[0][0].digits
    questions = []
    for lines in asked:
        parts = number_prompt(bench, lines, as_vectors=projector is not None, separators=separators)
        questions.append(prompt(parts[:-2]))
    size = 2 * bench.params.batch_size
    chunks = [questions[at : at + size] for at in range(0, len(questions), size)]
    written = torch.cat([write(bench.model, projector, chunk, digit_ids(bench), digits) for chunk in chunks])
    return (written.double() @ 10.0 ** torch.arange(digits - 1, -1, -1, dtype=torch.float64)).numpy()


def number_rows(bench: Bench, arms: Mapping[str, nn.Module], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of each arm and size: mean |F̂ − F| as a share of the range 10^digits."""
    params, rng = bench.params, np.random.default_rng([seed, 1])
    for digits in params.digits:
        asked = [number_lines(digits, params.lines + 1, rng) for _ in range(params.n_numbers)]
        tried = [number_lines(digits, params.lines + 1, rng) for _ in range(-(-params.n_numbers // 2))]
        best = min(SEPARATORS, key=lambda separators: _error(answers(bench, None, tried, separators), tried))
        found = {name: answers(bench, made, asked) for name, made in arms.items()}
        found["digit tokens"] = answers(bench, None, asked, best)
        found["mean of the lines"] = np.array([np.mean([each.F for each in lines[:-1]]) for lines in asked])
        found["least squares"] = np.array([least_squares(lines[:-1], lines[-1]) for lines in asked])
        for name, values in found.items():
            yield {"digits": digits, "arm": name, "error": _error(values, asked)}


def _error(found: np.ndarray, asked: Sequence[Sequence[Line]]) -> float:
    true = np.array([lines[-1].F for lines in asked], float)
    return float(np.abs(found - true).mean() / 10 ** asked[0][0].digits)


# ------------------------------------------------------------------------------------------------- the experiment

RANDOM, PRETRAINED, FINETUNED, ZERO = "random", "pretrained", "finetuned", "zero"
SHUFFLED, TEXT, PROBE = "shuffled labels", "text", "probe"
NAMES = {
    TEXT: "text, in context",
    PROBE: "logistic regression on vectors",
    FINETUNED: "finetuned projector",
    PRETRAINED: "pretrained projector",
    RANDOM: "random projector",
    SHUFFLED: "finetuned on shuffled labels",
    ZERO: "zero vector",
}
"""The arms, as readers know them."""
TOKENS, MEAN, SOLVED = "digit tokens", "mean of the lines", "least squares"
TUNING_SEED = 10_000
"""Added to the first seed, this gives the data on which rates are chosen."""

Rates = Mapping[tuple[str, str], float]
Rows = dict[str, list[dict[str, Any]]]


def choose_rates(bench: Bench) -> tuple[Rates, pd.DataFrame]:
    """The rate of each training and kind with the smallest validation loss, and all that was tried.

    Half as many rows as in the seeds' own trainings, all arms alike: what is saved goes into the seeds.
    """
    params, seed = bench.params, bench.params.seed + TUNING_SEED
    lessons: list[tuple[str, Kind]] = [("pretraining", kind) for kind in KINDS] + [
        ("finetuning", kind) for kind in KINDS
    ]
    lessons += [("series", LINEAR), ("numbers", LINEAR)]
    tried: list[dict[str, Any]] = []
    best: dict[tuple[str, str], float] = dict.fromkeys(lessons, params.rates[0])
    if len(params.rates) == 1:
        return best, pd.DataFrame(tried, columns=["training", "kind", "rate", "loss"])
    found: dict[tuple[str, str], nn.Module] = {}
    for training, kind in lessons:
        start, whole = _tuning_lesson(bench, training, kind, seed, found)
        lesson = replace(whole, rows=whole.rows[: -(-len(whole.rows) // 2)])
        made = {rate: train(bench, start, lesson, rate)[0] for rate in params.rates}
        losses = {rate: bench.loss(each, lesson.validation) for rate, each in made.items()}
        tried += [{"training": training, "kind": kind, "rate": rate, "loss": loss} for rate, loss in losses.items()]
        best[training, kind] = min(losses, key=lambda rate: losses[rate])
        found[training, kind] = made[best[training, kind]]
    return best, pd.DataFrame(tried)


def _tuning_lesson(
    bench: Bench, training: str, kind: Kind, seed: int, found: Mapping[tuple[str, str], nn.Module]
) -> tuple[nn.Module, Lesson]:
    """Where a training starts from on the tuning seed, and its lesson."""
    if training == "pretraining":
        lesson = pretraining(bench, seed).lesson
    elif training == "finetuning":
        task = text_task(bench, seed)
        return found["pretraining", kind], finetuning(bench, task, task.train)
    elif training == "series":
        task = series_task(bench, seed)
        lesson = finetuning(bench, task, task.train)
    else:
        lesson = number_lesson(bench, seed)
    return bench.new(kind, _vectors(lesson), seed), lesson


def _vectors(lesson: Lesson) -> Tensor:
    return torch.cat([row.vectors for row in lesson.rows])


def run_texts(bench: Bench, rates: Rates, seed: int, rows: Rows) -> None:
    """Pretrains and tunes projectors of both kinds, then has every arm read the test sentences."""
    reading, task = pretraining(bench, seed), text_task(bench, seed)
    linear, other = (_learn_texts(bench, kind, reading, task, rates, rows) for kind in KINDS)
    for arm, made in linear.items():
        _examine_vectors(bench, task, {"kind": LINEAR, "arm": arm}, made, rows)
    mixed = replace(task.train, labels=task.train.labels[_shuffle(len(task.train), seed)])
    lesson = finetuning(bench, task, mixed)
    misled, _ = train(bench, linear[PRETRAINED], lesson, rates["finetuning", LINEAR])
    last = [(LINEAR, SHUFFLED, misled), (LINEAR, ZERO, Zero(bench.width))]
    last += [(NONLINEAR, arm, other[arm]) for arm in (PRETRAINED, FINETUNED)]
    for kind, arm, made in last:
        row = examine(bench, task, made, task.form, task.shots[-1])
        rows["classes"].append({"kind": kind, "arm": arm, **row})
    rows["classes"].append({"kind": "none", "arm": PROBE, **probe(task)})
    _examine_text(bench, task, rows)


def _learn_texts(
    bench: Bench, kind: Kind, reading: Reading, task: Task, rates: Rates, rows: Rows
) -> dict[str, nn.Module]:
    """A projector before and after pretraining, and after task finetuning; notes losses on the way."""
    start = bench.new(kind, _vectors(reading.lesson), task.seed)
    made, log = train(bench, start, reading.lesson, rates["pretraining", kind])
    tuned, _ = train(bench, made, finetuning(bench, task, task.train), rates["finetuning", kind])
    known = {"seed": task.seed, "kind": kind}
    rows["training"] += [known | {"step": step, "loss": loss} for step, loss in zip(log.step, log.loss, strict=True)]
    rows["reading"] += [known | row for row in reading_rows(bench, made, reading)]
    return {RANDOM: start, PRETRAINED: made, FINETUNED: tuned}


def _shuffle(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _examine_vectors(bench: Bench, task: Task, known: dict[str, Any], made: nn.Module, rows: Rows) -> None:
    """One projector with every number of demonstrations, and with labels dealt out so that they say nothing."""
    rows["classes"] += [known | examine(bench, task, made, task.form, shots) for shots in task.shots]
    if task.shots[-1]:
        rows["classes"].append(known | examine(bench, task, made, task.form, task.shots[-1], dealt=True))


def _examine_text(bench: Bench, task: Task, rows: Rows) -> None:
    """The same demonstrations and questions as text, in the template that validates best."""
    known, form = {"kind": "none", "arm": TEXT}, best_text_form(bench, task)
    rows["classes"] += [known | examine(bench, task, None, form, shots) for shots in task.shots]


def run_series(bench: Bench, rates: Rates, seed: int, rows: Rows) -> None:
    """The same for series of numbers, which have no text to be pretrained on."""
    task = series_task(bench, seed)
    lesson = finetuning(bench, task, task.train)
    start = bench.new(LINEAR, _vectors(lesson), seed)
    tuned, _ = train(bench, start, lesson, rates["series", LINEAR])
    for arm, made in {RANDOM: start, FINETUNED: tuned, ZERO: Zero(bench.width)}.items():
        known = {"kind": LINEAR, "arm": arm}
        rows["classes"] += [known | examine(bench, task, made, task.form, shots) for shots in task.shots]
    rows["classes"].append({"kind": "none", "arm": PROBE, **probe(task)})
    few = replace(task, shots=task.shots[-1:], test=task.test[range(len(task.test) // 2)])  # 64 tokens each
    _examine_text(bench, few, rows)


def run_numbers(bench: Bench, rates: Rates, seed: int, rows: Rows) -> None:
    """A projector of one-hot decimal places learns F = aA + bB; every arm answers the same questions."""
    lesson = number_lesson(bench, seed)
    start = bench.new(LINEAR, _vectors(lesson), seed)
    tuned, _ = train(bench, start, lesson, rates["numbers", LINEAR])
    arms = {RANDOM: start, FINETUNED: tuned, ZERO: Zero(bench.width)}
    rows["numbers"] += [{"seed": seed, **row} for row in number_rows(bench, arms, seed)]


def experiment(params: Params) -> Result:
    """Chooses rates, then runs texts, series and numbers on every seed; tables have a row an arm, seed and setting."""
    bench = open_bench(params)
    rates, tried = choose_rates(bench)
    rows: Rows = {"classes": [], "reading": [], "training": [], "numbers": []}
    for seed in params.seeds:
        run_texts(bench, rates, seed, rows)
        run_series(bench, rates, seed, rows)
        run_numbers(bench, rates, seed, rows)
    chosen = [{"training": training, "kind": kind, "rate": rate} for (training, kind), rate in rates.items()]
    tables = {**{name: pd.DataFrame(found) for name, found in rows.items()}, "rates": pd.DataFrame(chosen)}
    return Result({**tables, "tuning": tried}, {"classes": len(vector_form(params.task).labels)})


# ----------------------------------------------------------------------------------------------------- the claims


def right(
    result: Result, arm: str, *, series: bool = False, kind: str = LINEAR, shots: int | None = None, dealt: bool = False
) -> pd.Series:
    """Accuracy (seeds,) of an arm on the texts or on the series, with the most demonstrations it had unless told."""
    table = result.tables["classes"]
    table = table[((table["task"] == "series") == series) & (table["arm"] == arm)]
    table = table[table["kind"].isin([kind, "none"]) & (table["pairing"] == ("dealt out" if dealt else "true"))]
    wanted = table["shots"].max() if shots is None else shots
    return table[table["shots"] == wanted].groupby("seed")["accuracy"].mean()


def lead(result: Result, arm: str, other: str, *, series: bool = False) -> Interval:
    """Interval over seeds of one arm's accuracy minus another's, both with linear projectors."""
    return paired_interval(right(result, arm, series=series), right(result, other, series=series))


def loss_of(result: Result, vector: str, kind: str = LINEAR) -> pd.Series:
    """Held-out pretraining loss (seeds,) with a text's own vector, another text's, a zero one, or none."""
    table = result.tables["reading"]
    return table[(table["vector"] == vector) & (table["kind"] == kind)].groupby("seed")["loss"].mean()


def error_of(result: Result, arm: str, digits: int | None = None) -> pd.Series:
    """Error (seeds,) of an arm as a share of the range, for the largest numbers unless told."""
    table = result.tables["numbers"]
    wanted = table["digits"].max() if digits is None else digits
    return table[(table["arm"] == arm) & (table["digits"] == wanted)].groupby("seed")["error"].mean()


def check_reads(result: Result) -> tuple[Comparison, ...]:
    """A pretrained vector lowers the loss of the rest of its text, against no vector and against another text's."""
    own = loss_of(result, "own")
    return tuple(
        Comparison(f"loss, {other} − own vector", paired_interval(loss_of(result, other), own), unit="nats")
        for other in ("none", "another text's")
    )


def check_icl(result: Result) -> tuple[Comparison, ...]:
    """Pretrained only: above chance, above a random projector, and above the same demonstrations with labels dealt."""
    found = right(result, PRETRAINED)
    return (
        Comparison("accuracy, pretrained", t_interval(found), threshold=1 / result.scalars["classes"]),
        Comparison("accuracy, pretrained − random", lead(result, PRETRAINED, RANDOM)),
        Comparison("accuracy, true labels − dealt out", paired_interval(found, right(result, PRETRAINED, dealt=True))),
    )


def check_finetuning(result: Result) -> tuple[Comparison, ...]:
    """Finetuned: above pretrained only, and above in-context learning from the same demonstrations as text."""
    return tuple(
        Comparison(f"accuracy, finetuned − {other}", lead(result, FINETUNED, arm))
        for other, arm in (("pretrained", PRETRAINED), ("text", TEXT))
    )


def check_numbers(result: Result) -> tuple[Comparison, ...]:
    """Largest numbers: vectors err less than digit tokens, and less than the mean of the answered lines."""
    ours = error_of(result, FINETUNED)
    return tuple(
        Comparison(f"error, {other} − vectors", paired_interval(error_of(result, other), ours), unit="of the range")
        for other in (TOKENS, MEAN)
    )


def check_series(result: Result) -> tuple[Comparison, ...]:
    """Series: a finetuned projector is above an untrained one, and above the series written as text."""
    return tuple(
        Comparison(f"accuracy, finetuned − {other}", lead(result, FINETUNED, other, series=True))
        for other in (RANDOM, TEXT)
    )


def check_linear(result: Result) -> tuple[Comparison, ...]:
    """The linear projector is at most 5 points of accuracy, and 0.05 nats, behind the non-linear one."""
    gap = paired_interval(right(result, FINETUNED), right(result, FINETUNED, kind=NONLINEAR))
    behind = paired_interval(loss_of(result, "own", NONLINEAR), loss_of(result, "own"))
    return (
        Comparison("accuracy when finetuned, linear − non-linear", gap, threshold=-0.05),
        Comparison("pretraining loss, non-linear − linear", behind, threshold=-0.05, unit="nats"),
    )


def check_probe(result: Result) -> tuple[Comparison, ...]:
    """Read by the language model, vectors classify better than by a logistic regression of the same examples."""
    return (Comparison("accuracy, finetuned − logistic regression", lead(result, FINETUNED, PROBE)),)


def _swap(table: str, column: str, one: str, other: str) -> Callable[[Result], Result]:
    def apply(result: Result) -> Result:
        frame = result.tables[table]
        return result.with_table(table, frame.assign(**{column: frame[column].replace({one: other, other: one})}))

    return apply


def _zero_for_linear(result: Result) -> Result:
    """The finetuned linear projector's rows are the zero vector's, the non-linear one's stay."""
    frame = result.tables["classes"]
    linear = frame["kind"] == LINEAR
    swapped = frame["arm"].where(~linear, frame["arm"].replace({FINETUNED: ZERO, ZERO: FINETUNED}))
    return result.with_table("classes", frame.assign(arm=swapped))


CLAIMS: list[Claim] = [
    Claim(
        "reads",
        "After pretraining on plain text, the vector of a text's beginning tells the frozen model about the rest.",
        (),
        check_reads,
        Control(
            "another text's vector stands in for a text's own", _swap("reading", "vector", "own", "another text's")
        ),
        reported="implied: pretraining is said to align vectors with the model; numbers not read",
    ),
    Claim(
        "icl",
        "Pretraining on plain text is enough for the frozen model to learn a classification in context from vectors.",
        (),
        check_icl,
        Control("a random projector stands in for the pretrained one", _swap("classes", "arm", PRETRAINED, RANDOM)),
        reported="above chance after pretraining alone; numbers not read",
    ),
    Claim(
        "finetuning",
        "Finetuning the projector on the task raises accuracy further, above few-shot learning from the texts.",
        (),
        check_finetuning,
        Control("a projector finetuned on shuffled labels stands in", _swap("classes", "arm", FINETUNED, SHUFFLED)),
        reported="often above few-shot in-context learning from text; numbers not read",
    ),
    Claim(
        "numbers",
        "With large numbers as vectors, a function's value is predicted with less error than from their digits.",
        (),
        check_numbers,
        Control("a random projector stands in for the finetuned one", _swap("numbers", "arm", FINETUNED, RANDOM)),
        reported="better than digit tokens on large numbers, from secondary sources; numbers not read",
    ),
    Claim(
        "series",
        "Series of numbers become readable, too: a small trained projector beats writing them out as text.",
        (),
        check_series,
        Control("a random projector stands in for the finetuned one", _swap("classes", "arm", FINETUNED, RANDOM)),
        reported="often above few-shot learning and domain models; numbers not read",
    ),
    Claim(
        "linear",
        "A linear projector suffices.",
        (),
        check_linear,
        Control("a zero vector stands in for the finetuned linear projector", _zero_for_linear),
        reported="linear projectors mostly suffice; numbers not read",
    ),
    Claim(
        "probe",
        "The language model reads more from the vectors than a logistic regression with the same examples.",
        (),
        check_probe,
        Control("a zero vector stands in for the finetuned linear projector", _zero_for_linear),
        reported="no such baseline is known to us",
    ),
]
