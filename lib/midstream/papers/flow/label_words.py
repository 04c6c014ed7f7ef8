"""Label words gather what a demonstration says in early layers and hand it to the prediction in late ones.

Reference: Wang et al., "Label Words are Anchors: An Information Flow Perspective for Understanding In-Context
Learning", EMNLP 2023, arXiv 2305.14160. Sections below are the paper's.

Glossary (symbol → name here → shape → section)
    A_l         attention_weights     (batch, heads, query, key), after softmax             2.1
    L           loss                  cross-entropy of the true label among label words     2.1
    I_l         saliency              (layers, batch, query, key) = |Σ_heads A ⊙ ∂L/∂A|      2.1
    p_k         anchors               (demos,) position of the k-th label word               2.1
    q           last                  (batch,) position that predicts the label              2.1
    S_wp        gathered              (layers, batch) mean saliency text → label word        2.1
    S_pq        delivered             (layers, batch) mean saliency label word → q           2.1
    S_ww        elsewhere             (layers, batch) mean saliency of all other pairs       2.1
    AUCROC_l    attention_auc         (layers,) attention q → p_k against the prediction     2.3
    R_l         share_of_auc          (layers,) cumulative share of AUCROC_l - 0.5           2.3
    β           beta                  (layers, heads, demos), A(q, p_k) ← exp(β) A(q, p_k)    3.1
    k̂_{p_k}     projected keys        (heads, demos, components)                             3.3

Deviations
    - The paper uses GPT2-XL (48 layers) and GPT-J (28); the default here is SmolLM2-135M (30 layers, grouped
      key-value heads). "First" and "last" n layers are counted as in the paper, thirds of the depth replace its
      shallow and deep ranges.
    - A label word of several tokens is read by its first token when predicted and by its last as an anchor.
    - Demonstrations are tokenized one by one, so that their keys and values can be shared by all queries. Isolation
      and compression only change demonstrations, so their effect on a query is the same as in the whole prompt.
    - AUCROC_l is the mean of one-class-against-the-rest areas; how classes are averaged is not stated (inferred).
    - Key distances use keys and queries after the rotary embedding (whose products are the scores), all heads
      together; the paper's model has no rotary embedding, and how heads are joined is not stated (inferred).
    - Added: random tokens of the same demonstration as a control in every part, since the last layers' gradient
      reaches only row q and makes any token look important; and a per-class bias fitted to the same samples as β.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import Tensor

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control, PaperNumber
from midstream.data.prompts import (
    FORMAT,
    TEMPLATES,
    TEXT,
    Demonstrations,
    Template,
    demonstrations,
    draw,
    query,
    template,
)
from midstream.hooks import attend
from midstream.hooks.kv import copy, select
from midstream.measure import Interval, accuracy, auc, macro_auc, paired_interval, t_interval, top_jaccard
from midstream.measure.icl import Cache, batches, last_logits, pad_right, prefill, score
from midstream.paper import PaperParams, Preset, Result

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field(
        "smollm2", min_length=1, description="a causal language model: packaged, tiny:…, folder or Hub id"
    )
    tasks: tuple[str, ...] = Field(("sources",), min_length=1, description="classification tasks to run")
    n_demos: int = Field(1, ge=1, le=32, description="demonstrations per class")
    n_queries: int = Field(8, ge=4, le=5000, description="test queries per task and seed, balanced over classes")
    n_saliency: int = Field(3, ge=1, le=5000, description="queries per task and seed whose saliency is computed")
    max_chars: int = Field(80, ge=20, le=100_000, description="longest sentence used, in characters")
    isolate: tuple[int, ...] = Field((5,), min_length=1, description="how many first or last layers are isolated")
    random_sets: int = Field(2, ge=1, le=100, description="draws of random tokens behind every control")
    more_shots: int = Field(5, ge=2, le=32, description="demonstrations per class of the more-shot baseline")
    reweight_samples: int = Field(2, ge=1, le=64, description="training samples per class for β")
    reweight_epochs: int = Field(1, ge=1, le=100, description="passes over the training samples for β")
    reweight_rate: float = Field(0.01, gt=0, le=1, description="Adam's learning rate for β")
    batch_size: int = Field(20, ge=1, le=512, description="queries read at once")
    timing_repeats: int = Field(2, ge=1, le=100, description="timed queries per prompt form and seed")

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TEMPLATES:
                raise ValueError(f"unknown task '{task}'; there are {', '.join(TEMPLATES)}")
        return tasks


_FULL = Params(
    tasks=("movies", "sources"),
    n_seeds=5,
    n_queries=40,
    n_saliency=16,
    isolate=(1, 3, 5, 7),
    random_sets=8,
    reweight_samples=4,
    reweight_epochs=10,
    max_chars=90,
    timing_repeats=8,
)
_PAPER = Params(
    model="openai-community/gpt2-xl",
    tasks=("sst2", "trec", "ag_news", "emo"),
    n_seeds=5,
    n_queries=1000,
    n_saliency=1000,
    max_chars=100_000,
    isolate=(1, 3, 5, 7),
    random_sets=20,
    reweight_samples=4,
    reweight_epochs=10,
    timing_repeats=100,
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "one task, three seeds: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "two tasks, five seeds: settle the claims", minutes=45, memory_gib=12),
    "paper": Preset(
        _PAPER,
        "the paper's first model and its four tasks",
        minutes=600,
        memory_gib=24,
        needs="GPT2-XL, SST-2, TREC, AGNews and EmoC from the Hub and a GPU with 24 GiB",
        gpus=1,
    ),
    "paper-gptj": Preset(
        _PAPER.model_copy(update={"model": "EleutherAI/gpt-j-6b"}),
        "the paper's second model and its four tasks; where its main branch has no safetensors, give model=…@revision",
        minutes=1200,
        memory_gib=80,
        needs="GPT-J, SST-2, TREC, AGNews and EmoC from the Hub and a GPU with 80 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of the model and of every data set a run loads."""
    return {params.model: zoo.revision(params.model), **{task: data.revision(task) for task in params.tasks}}


# ------------------------------------------------------------------------------- 2.1 information flow: saliency


def saliency(model: Any, ids: Tensor, last: Tensor, targets: Tensor, label_ids: Tensor) -> Tensor:
    """Saliency I_l = |Σ_heads A_l ⊙ ∂L/∂A_l| of every attention weight, (layers, batch, query, key).

    `ids` (batch, tokens) are prompts padded on the right, `last` (batch,) the position that predicts, `targets`
    (batch,) the true classes, `label_ids` (classes,) the label words' tokens. Multiplying A by a mask of ones, the
    gradient with respect to the mask *is* A ⊙ ∂L/∂A, and no gradient of any weight is needed. The diagonal is zero.
    """
    masks: dict[int, Tensor] = {}

    def gate(attention_weights: Tensor, at: Any) -> Tensor:
        masks[at.layer] = torch.ones_like(attention_weights, requires_grad=True)
        return attention_weights * masks[at.layer]

    with torch.enable_grad(), attend(model, probs=gate):
        logits = last_logits(model, ids, last)[:, label_ids.to(model.device)].float()
        loss = torch.nn.functional.cross_entropy(logits, targets.to(model.device), reduction="sum")
        gradients = torch.autograd.grad(loss, [masks[layer] for layer in sorted(masks)])
    flow = torch.stack([gradient.sum(1).abs() for gradient in gradients])
    return flow * (1 - torch.eye(flow.shape[-1], device=flow.device))


def flow_scores(flow: Tensor, anchors: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S_wp, S_pq and S_ww, each (layers, batch), of a saliency (layers, batch, query, key).

    S_wp: mean over the pairs text → anchor (rows p_k, columns before it). S_pq: mean over anchor → q. S_ww: mean
    over all other pairs below the diagonal, padding left out.
    """
    tokens = flow.shape[-1]
    row, column = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    is_anchor = torch.zeros(tokens, dtype=torch.bool)
    is_anchor[anchors] = True
    real = (column < row) & (row <= last[:, None, None].cpu())  # (batch, query, key)
    gathered = real & is_anchor[row]
    delivered = real & (row == last[:, None, None].cpu()) & is_anchor[column]
    groups = (gathered, delivered, real & ~gathered & ~delivered)
    weights = [group.to(flow) / group.sum((1, 2), keepdim=True).to(flow) for group in groups]
    s_wp, s_pq, s_ww = (torch.einsum("lbqk,bqk->lb", flow, weight) for weight in weights)
    return s_wp, s_pq, s_ww


# ---------------------------------------------------------------------------------- 2.2 shallow layers: isolation


def isolate(model: Any, positions: Tensor, layers: Sequence[int]) -> AbstractContextManager[Any]:
    """Lets the tokens at `positions` (n,) see no earlier token in `layers`: their scores become −1e4.

    The diagonal stays, so an isolated token attends only to itself.
    """

    def cut(scores: Tensor, at: Any) -> Tensor:
        rows, columns = at.query_positions, at.key_positions
        isolated = torch.isin(rows, positions.to(rows))[..., :, None] & (columns[..., None, :] < rows[..., :, None])
        return scores.masked_fill(isolated, -1e4)

    return attend(model, scores=cut, layers=layers)


def loyalty(logits: Tensor, reference: Tensor, label_ids: Tensor, top: int = 5) -> tuple[float, float]:
    """Label loyalty (share of unchanged predicted labels) and word loyalty (Jaccard overlap of the top words).

    Both logits are (queries, vocabulary). The paper's isolation notebook uses the ten top words, its compression
    code five; here it is five everywhere.
    """
    same_label = accuracy(logits[:, label_ids].argmax(1), reference[:, label_ids].argmax(1))
    return same_label, float(top_jaccard(logits, reference, top).mean())


# -------------------------------------------------------------------------------- 2.3 deep layers: attention AUC


def attention_to(
    model: Any, anchors: Tensor, last: Tensor, seen: dict[int, list[Tensor]]
) -> AbstractContextManager[Any]:
    """Appends to `seen[layer]` the attention (batch, demos) that each query's last token pays to the anchors."""

    def look(attention_weights: Tensor, at: Any) -> None:
        rows = attention_weights[torch.arange(len(last)), :, last.to(attention_weights.device)]  # (batch, heads, key)
        is_anchor = _at_anchors(anchors, at).to(rows)
        seen.setdefault(at.layer, []).append((rows.sum(1) @ is_anchor.T).float().cpu())

    return attend(model, probs=look)


def _at_anchors(anchors: Tensor, at: Any) -> Tensor:
    """Which keys of this call are which anchor (demos, key); one beyond a sliding window is none of them."""
    return anchors.to(at.key_positions)[:, None] == at.key_positions


def by_class(per_demo: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Sums the columns of (n, demos) that belong to one class: (n, classes)."""
    return per_demo @ torch.nn.functional.one_hot(classes, n_classes).to(per_demo)


def share_of_auc(aucs: Sequence[float]) -> np.ndarray:
    """R_l (layers,): the cumulative share of Σ (AUCROC_l − 0.5); layers without an AUC count as 0.5."""
    excess = np.nan_to_num(np.asarray(aucs, dtype=float) - 0.5)
    return np.cumsum(excess) / excess.sum()


# --------------------------------------------------------------------------------------- 3.1 anchor re-weighting


def reweight(model: Any, beta: Tensor, anchors: Tensor, last: Tensor) -> AbstractContextManager[Any]:
    """A(q, p_k) ← exp(β) A(q, p_k) at each query's last row, without renormalising.

    `beta` (layers, heads, demos), `anchors` (demos,) positions, `last` (batch,) row indices within this call.
    """

    def scale(attention_weights: Tensor, at: Any) -> Tensor:
        is_last = torch.nn.functional.one_hot(last.to(beta.device), attention_weights.shape[-2]).to(beta)
        growth = beta[at.layer].expm1() @ _at_anchors(anchors, at).to(beta)  # (heads, key)
        factor = 1 + is_last[:, None, :, None] * growth[None, :, None, :]
        return attention_weights * factor.to(attention_weights)

    return attend(model, probs=scale)


@dataclass(frozen=True)
class Training:
    """Queries with their true classes (n,) and how long to learn from them."""

    queries: Sequence[Tensor]
    targets: Tensor
    epochs: int
    rate: float
    seed: int


def learn_beta(model: Any, cache: Cache, prefix: int, anchors: Tensor, label_ids: Tensor, train: Training) -> Tensor:
    """Learns β (layers, heads, demos) by Adam with batches of one, the model frozen.

    β acts on the last token only, so all tokens before it are read once and only the last is run again.
    """
    config = model.config.get_text_config()
    shape = (config.num_hidden_layers, config.num_attention_heads, len(anchors))
    beta = torch.zeros(shape, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([beta], lr=train.rate)
    contexts = [_extend(model, cache, tokens[:-1], prefix) for tokens in train.queries]
    generator = torch.Generator().manual_seed(train.seed)
    for _ in range(train.epochs):
        for i in torch.randperm(len(contexts), generator=generator).tolist():
            position = prefix + len(train.queries[i]) - 1
            zero = torch.zeros(1, dtype=torch.long)
            with torch.enable_grad(), reweight(model, beta, anchors, zero):
                logits = last_logits(model, train.queries[i][-1:][None], zero, copy(contexts[i]), position)
                loss = torch.nn.functional.cross_entropy(
                    logits[:, label_ids.to(model.device)].float(), train.targets[i : i + 1].to(model.device)
                )
            (beta.grad,) = torch.autograd.grad(loss, [beta])
            optimizer.step()
    return beta.detach()


def learn_bias(logits: Tensor, targets: Tensor, steps: int = 300, rate: float = 0.05) -> Tensor:
    """A bias (classes,) on label logits (n, classes), fitted by cross-entropy: the plain alternative to β."""
    bias = torch.zeros(logits.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([bias], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits + bias, targets).backward()
            optimizer.step()
    return bias.detach()


@torch.no_grad()
def _extend(model: Any, cache: Cache, tokens: Tensor, prefix: int) -> Cache:
    longer = copy(cache)
    if len(tokens):
        last = torch.tensor([len(tokens) - 1])
        last_logits(model, tokens[None], last, longer, prefix)
    return longer


# ------------------------------------------------------------------------------------ 3.2 anchor-only compression


def kept_positions(demos: Demonstrations, chosen: Tensor) -> Tensor:
    """Positions kept of a prefix: the template's own tokens and the `chosen` ones, in order."""
    keep = demos.roles == FORMAT
    keep[chosen] = True
    return keep.nonzero().flatten()


def compress(cache: Cache, demos: Demonstrations, chosen: Tensor, until: int | None = None) -> Cache:
    """Hidden_anchor (`chosen` = anchors) or Hidden_random: the prefix's keys and values at the kept positions only.

    Keys carry the position they were computed at; queries keep theirs, so nothing has to be shifted. A model with
    sliding windows needs `until`, the last true position any query reaches, and a window as long.
    """
    return select(cache, kept_positions(demos, chosen), until=until)


def random_tokens(demos: Demonstrations, generator: torch.Generator) -> Tensor:
    """One random token of each demonstration's own sentence (demos,): the control for its label word."""
    picks = []
    for demo in range(len(demos.anchors)):
        inside = ((demos.owner == demo) & (demos.roles == TEXT)).nonzero().flatten()
        picks.append(inside[torch.randint(len(inside), (1,), generator=generator)])
    return torch.cat(picks)


# ------------------------------------------------------------------------------------------- 3.3 error diagnosis


def key_distances(queries: Tensor, keys: Tensor, components: int = 10) -> Tensor:
    """How far apart the classes' anchor keys are where queries vary: (classes, classes), largest entry 1.

    `queries` (n, heads, width) at q, `keys` (key heads, classes, width) at the anchors, each key head serving
    heads / key heads query heads. Keys are projected on the queries' first principal components, head by head.
    """
    groups = queries.shape[1] // keys.shape[0]
    centred = (queries - queries.mean(0)).transpose(0, 1)  # (heads, n, width)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:, :components]  # (heads, components, width)
    projected = torch.einsum("hmd,hcd->hcm", directions, keys.repeat_interleave(groups, 0))
    distance = torch.cdist(projected, projected).square().sum(0).sqrt()
    return distance / distance.max()


def pair_aucs(label_logits: Tensor, gold: Tensor) -> dict[tuple[int, int], float]:
    """How well the model tells each pair of classes apart: AUC of log p_i − log p_j; 1 means never confused."""
    aucs = {}
    for i, j in combinations(range(label_logits.shape[1]), 2):
        of_pair = (gold == i) | (gold == j)
        margin = (label_logits[:, i] - label_logits[:, j])[of_pair]
        aucs[i, j] = auc(margin.numpy(), (gold[of_pair] == i).numpy())
    return aucs


# -------------------------------------------------------------------------------------------------- the experiment


@dataclass
class Bench:
    """One task with one seed's demonstrations: everything the parts of the experiment share."""

    model: Any
    tokenizer: Any
    form: Template
    demos: Demonstrations
    cache: Cache
    queries: list[Tensor]
    gold: Tensor
    train: pd.DataFrame
    params: Params
    seed: int

    @property
    def prefix(self) -> int:
        """Length of the whole prefix: the true position of a query's first token."""
        return len(self.demos)

    @property
    def end(self) -> int:
        """Length of the longest prompt."""
        return self.prefix + max(len(tokens) for tokens in self.queries)

    def compressed(self, chosen: Tensor) -> Cache:
        """The prefix's keys and values at the template's tokens and the chosen ones."""
        return compress(self.cache, self.demos, chosen, self.end)

    def score(self, cache: Cache, position: int, around: Callable | None = None) -> Tensor:
        """Next-token logits (queries, vocabulary) of the test queries behind a cache."""
        size = self.params.batch_size
        return score(self.model, self.queries, cache=cache, position=position, batch_size=size, around=around)

    def labels(self, logits: Tensor) -> Tensor:
        """Predicted classes (queries,)."""
        return logits[:, self.demos.label_ids].argmax(1)

    def randomness(self, purpose: int) -> torch.Generator:
        """A generator of this seed for one purpose, independent of the others."""
        return torch.Generator().manual_seed(1000 * self.seed + purpose)


def prepare(loaded: Any, task: str, params: Params, seed: int) -> Bench:
    """Draws demonstrations from the training split and queries from the test split, and reads the prefix once."""
    form, tokenizer = template(task), loaded.tokenizer
    pool = data.load(task, split="train").table
    shots = max(params.more_shots, params.n_demos)
    train = draw(pool, max(shots, params.n_demos + params.reweight_samples), seed, params.max_chars)
    per_class = -(-params.n_queries // len(form.labels))
    test = draw(data.load(task, split="test").table, per_class, seed, params.max_chars).head(params.n_queries)
    first = train.groupby("label").cumcount() < params.n_demos
    demos = demonstrations(tokenizer, form, train["text"][first].tolist(), train["label"][first].tolist())
    queries = [query(tokenizer, form, text) for text in test["text"]]
    gold = torch.tensor(test["label"].tolist())
    return Bench(
        loaded.model, tokenizer, form, demos, prefill(loaded.model, demos.ids), queries, gold, train, params, seed
    )


def run_saliency(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of S_wp, S_pq, S_ww per layer for the label words and for random tokens in their place."""
    chosen = bench.queries[: bench.params.n_saliency]
    controls = [random_tokens(bench.demos, bench.randomness(1)) for _ in range(bench.params.random_sets)]
    sums: dict[str, Tensor] = {}
    for indices, group in batches(chosen, size=4):
        ids, last = pad_right([torch.cat([bench.demos.ids, tokens]) for tokens in group], pad=0)
        flow = saliency(bench.model, ids, last, bench.gold[indices], bench.demos.label_ids)
        for anchor, sets in {"label": [bench.demos.anchors], "random": controls}.items():
            scores = torch.stack([torch.stack(flow_scores(flow, s, last)) for s in sets]).mean(0).sum(-1)
            sums[anchor] = sums.get(anchor, torch.zeros_like(scores)) + scores
    for anchor, total in sums.items():
        for layer, values in enumerate((total / len(chosen)).T.tolist()):
            yield {"anchor": anchor, "layer": layer, **dict(zip(("s_wp", "s_pq", "s_ww"), values, strict=True))}


def run_isolation(bench: Bench, reference: Tensor) -> Iterator[dict[str, Any]]:
    """Rows of loyalty when label words, or random tokens, see nothing before them in the first or last layers."""
    depth = bench.model.config.get_text_config().num_hidden_layers
    generator = bench.randomness(2)
    draws = max(1, bench.params.random_sets // 10)
    targets = {"label": [bench.demos.anchors], "random": [random_tokens(bench.demos, generator) for _ in range(draws)]}
    for n in bench.params.isolate:
        places = {"first": range(min(n, depth)), "last": range(max(0, depth - n), depth)}
        for (place, layers), (target, sets) in [(p, t) for p in places.items() for t in targets.items()]:
            values = []
            for positions in sets:
                with isolate(bench.model, positions, layers):
                    cache = prefill(bench.model, bench.demos.ids)
                values.append(loyalty(bench.score(cache, bench.prefix), reference, bench.demos.label_ids))
            label, word = np.mean(values, axis=0).tolist()
            yield {"place": place, "n": n, "target": target, "label_loyalty": label, "word_loyalty": word}


@dataclass
class Plain:
    """What the ordinary in-context run shows: logits, attention q → p_k per layer, queries of one layer."""

    logits: Tensor
    attention: dict[str, dict[int, Tensor]]
    query_vectors: Tensor
    layer: int


def run_plain(bench: Bench) -> Plain:
    """One pass over the queries, looking at attention to the label words and to random tokens, and at queries."""
    layer = round(bench.model.config.get_text_config().num_hidden_layers * 2 / 3)
    targets = {"label": bench.demos.anchors, "random": random_tokens(bench.demos, bench.randomness(3))}
    seen: dict[str, dict[int, list[Tensor]]] = {name: {} for name in targets}
    vectors: list[Tensor] = []
    order: list[int] = []

    def around(last: Tensor, indices: list[int]) -> ExitStack:
        order.extend(indices)
        stack = ExitStack()
        for name, positions in targets.items():
            stack.enter_context(attention_to(bench.model, positions, last, seen[name]))

        def keep(q: Tensor, at: Any) -> None:
            vectors.append(q[torch.arange(len(last)), :, last.to(q.device)].float().cpu())

        stack.enter_context(attend(bench.model, q=keep, layers=[layer]))
        return stack

    logits = bench.score(bench.cache, bench.prefix, around)
    back = torch.tensor(order).argsort()
    attention = {name: {at: torch.cat(rows)[back] for at, rows in layers.items()} for name, layers in seen.items()}
    return Plain(logits, attention, torch.cat(vectors)[back], layer)


def run_attention(bench: Bench, plain: Plain) -> Iterator[dict[str, Any]]:
    """Rows of AUCROC_l per layer for attention to label words and to random tokens of the same demonstrations."""
    predicted, classes = bench.labels(plain.logits), len(bench.form.labels)
    for target, layers in plain.attention.items():
        for layer, per_demo in layers.items():
            scores = by_class(per_demo, bench.demos.classes, classes)
            yield {"target": target, "layer": layer, "auc": macro_auc(scores.numpy(), predicted.numpy())}


def run_reweighting(bench: Bench, plain: Plain) -> Iterator[dict[str, Any]]:
    """Rows of accuracy: vanilla, more shots, β on anchors or on random tokens, and a bias from the same samples."""
    form, params, label_ids = bench.form, bench.params, bench.demos.label_ids
    rank = bench.train.groupby("label").cumcount()
    samples = bench.train[(rank >= params.n_demos) & (rank < params.n_demos + params.reweight_samples)]
    tokens = [query(bench.tokenizer, form, text) for text in samples["text"]]
    targets = torch.tensor(samples["label"].tolist())
    training = Training(tokens, targets, params.reweight_epochs, params.reweight_rate, bench.seed)

    def accuracy_of(logits: Tensor) -> float:
        return accuracy(logits[:, label_ids].argmax(1), bench.gold)

    yield {"method": "vanilla", "accuracy": accuracy_of(plain.logits)}
    more = bench.train[rank < params.more_shots]
    longer = demonstrations(bench.tokenizer, form, more["text"].tolist(), more["label"].tolist())
    yield {"method": "more shots", "accuracy": accuracy_of(bench.score(prefill(bench.model, longer.ids), len(longer)))}
    for method, positions in {
        "anchors": bench.demos.anchors,
        "random tokens": random_tokens(bench.demos, bench.randomness(4)),
    }.items():
        beta = learn_beta(bench.model, bench.cache, bench.prefix, positions, label_ids, training)
        scaled = bench.score(
            bench.cache, bench.prefix, lambda last, _, b=beta, p=positions: reweight(bench.model, b, p, last)
        )
        yield {"method": method, "accuracy": accuracy_of(scaled)}
    seen = score(bench.model, tokens, cache=bench.cache, position=bench.prefix, batch_size=params.batch_size)
    bias = learn_bias(seen[:, label_ids], targets)
    predicted = (plain.logits[:, label_ids] + bias).argmax(1)
    yield {"method": "bias", "accuracy": accuracy(predicted, bench.gold)}


def run_compression(bench: Bench, plain: Plain) -> Iterator[dict[str, Any]]:
    """Rows of loyalty and accuracy when queries see only some of the demonstrations' keys and values."""

    def row(method: str, logits: Tensor, tokens: int) -> dict[str, Any]:
        label, word = loyalty(logits, plain.logits, bench.demos.label_ids)
        right = accuracy(bench.labels(logits), bench.gold)
        return {"method": method, "label_loyalty": label, "word_loyalty": word, "accuracy": right, "tokens": tokens}

    kept = kept_positions(bench.demos, bench.demos.anchors)
    yield row("all", plain.logits, bench.prefix)
    yield row("anchors", bench.score(bench.compressed(bench.demos.anchors), bench.prefix), len(kept))
    text = prefill(bench.model, bench.demos.ids[kept])
    yield row("text", bench.score(text, len(kept)), len(kept))
    generator, rows = bench.randomness(5), []
    for _ in range(bench.params.random_sets):
        cache = bench.compressed(random_tokens(bench.demos, generator))
        rows.append(row("random", bench.score(cache, bench.prefix), len(kept)))
    means = pd.DataFrame(rows).mean(numeric_only=True)
    yield {"method": "random", **{str(name): float(value) for name, value in means.items()}}
    yield {**max(rows, key=lambda entry: entry["label_loyalty"]), "method": "best random"}


def run_speed(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows of seconds for one query read with the whole prompt, with its cached prefix, and with anchors only."""
    small = bench.compressed(bench.demos.anchors)
    nothing = torch.tensor([], dtype=torch.long)
    forms: dict[str, Callable[[], tuple[Cache, Tensor, int]]] = {
        "whole prompt": lambda: (None, bench.demos.ids, 0),
        "cached prefix": lambda: (copy(bench.cache), nothing, bench.prefix),
        "anchors": lambda: (copy(small), nothing, bench.prefix),
    }
    for repeat in range(bench.params.timing_repeats):
        tokens = bench.queries[repeat % len(bench.queries)]
        for method, make in forms.items():
            cache, front, position = make()
            yield {"method": method, "repeat": repeat, "seconds": _seconds(bench.model, front, tokens, cache, position)}


@torch.no_grad()
def _seconds(model: Any, front: Tensor, tokens: Tensor, cache: Cache, position: int) -> float:
    ids = torch.cat([front, tokens])[None]
    last = torch.tensor([ids.shape[1] - 1])
    start = time.perf_counter()
    last_logits(model, ids, last, cache, position)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def anchor_keys(bench: Bench, layer: int) -> Tensor:
    """Keys (key heads, classes, width) at the label words in one layer, averaged over a class's demonstrations."""
    kept: list[Tensor] = []
    with attend(bench.model, k=lambda keys, at: kept.append(keys[0][:, bench.demos.anchors]), layers=[layer]):
        bench.model(bench.demos.ids.to(bench.model.device)[None], logits_to_keep=1)
    weights = torch.nn.functional.one_hot(bench.demos.classes, len(bench.form.labels)).float()
    return torch.einsum("hpd,pc->hcd", kept[0].float().cpu(), weights / weights.sum(0))


def run_diagnosis(bench: Bench, plain: Plain) -> Iterator[dict[str, Any]]:
    """Rows of predicted closeness (anchor keys) and actual separability (AUC) for every pair of classes."""
    distances = key_distances(plain.query_vectors, anchor_keys(bench, plain.layer))
    for (i, j), separable in pair_aucs(plain.logits[:, bench.demos.label_ids], bench.gold).items():
        yield {
            "class_i": bench.form.labels[i],
            "class_j": bench.form.labels[j],
            "predicted": float(distances[i, j]),
            "actual": separable,
        }


def experiment(params: Params) -> Result:
    """Runs every part of the paper on every task and seed; tables have one row a task, seed and arm."""
    loaded = zoo.load(params.model, device="auto")
    loaded.model.requires_grad_(False)
    rows: dict[str, list[dict[str, Any]]] = {}
    for task in params.tasks:
        for seed in params.seeds:
            bench = prepare(loaded, task, params, seed)
            plain = run_plain(bench)
            parts = {
                "flow": run_saliency(bench),
                "isolation": run_isolation(bench, plain.logits),
                "attention": run_attention(bench, plain),
                "reweighting": run_reweighting(bench, plain),
                "compression": run_compression(bench, plain),
                "speed": run_speed(bench),
                "diagnosis": run_diagnosis(bench, plain),
            }
            for name, part in parts.items():
                rows.setdefault(name, []).extend({"task": task, "seed": seed, **row} for row in part)
    tables = {name: pd.DataFrame(entries) for name, entries in rows.items()}
    depth = loaded.model.config.get_text_config().num_hidden_layers
    return Result(tables, {"layers": depth})


# ----------------------------------------------------------------------------------------------------- the claims


def per_seed(table: pd.DataFrame, value: str, **where: Any) -> pd.Series:
    """Mean of a column for each seed, over tasks and whatever else is left after `column=value` filters."""
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    return table.groupby("seed")[value].mean()


def difference(table: pd.DataFrame, value: str, ours: dict[str, Any], other: dict[str, Any]) -> Interval:
    """Interval over seeds of `ours − other`, paired by seed."""
    return paired_interval(per_seed(table, value, **ours), per_seed(table, value, **other))


def third(table: pd.DataFrame, which: str, layers: float) -> pd.DataFrame:
    """Rows of the first or last third of the layers."""
    inside = table["layer"] < layers / 3 if which == "first" else table["layer"] >= layers * 2 / 3
    return table[inside]


def log_ratio(flow: pd.DataFrame, over: str, under: str) -> Interval:
    """Interval over seeds of ln(Σ over / Σ under), the sums running over the table's layers and tasks."""
    sums = flow.groupby("seed")[[over, under]].sum()
    return t_interval(np.log(sums[over] / sums[under]))


def _against_random(flow: pd.DataFrame, value: str) -> Interval:
    wide = flow.pivot_table(index="seed", columns="anchor", values=value, aggfunc="sum")
    return t_interval(np.log(wide["label"] / wide["random"]))


def check_gather(result: Result) -> tuple[Comparison, ...]:
    """First third of the layers: text flows into label words, more than elsewhere and than into random tokens."""
    flow = third(result.tables["flow"], "first", result.scalars["layers"])
    label = flow[flow["anchor"] == "label"]
    return (
        Comparison("ln(S_wp / S_ww), first third", log_ratio(label, "s_wp", "s_ww")),
        Comparison("ln(S_wp of label words / of random tokens), first third", _against_random(flow, "s_wp")),
    )


def check_deliver(result: Result) -> tuple[Comparison, ...]:
    """Last third: label words → q is the largest flow, and larger than from random tokens."""
    flow = third(result.tables["flow"], "last", result.scalars["layers"])
    label = flow[flow["anchor"] == "label"]
    return (
        Comparison("ln(S_pq / S_wp), last third", log_ratio(label, "s_pq", "s_wp")),
        Comparison("ln(S_pq / S_ww), last third", log_ratio(label, "s_pq", "s_ww")),
        Comparison("ln(S_pq of label words / of random tokens), last third", _against_random(flow, "s_pq")),
    )


def _five(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["n"] == (5 if 5 in set(table["n"]) else table["n"].max())]


def check_isolation(result: Result) -> tuple[Comparison, ...]:
    """Isolating label words in the first 5 layers changes more predictions than in the last 5, or random tokens."""
    table = _five(result.tables["isolation"])
    first = {"place": "first", "target": "label"}
    return (
        Comparison(
            "label loyalty lost, first against last layers",
            difference(table, "label_loyalty", {"place": "last", "target": "label"}, first),
        ),
        Comparison(
            "label loyalty lost, label words against random tokens",
            difference(table, "label_loyalty", {"place": "first", "target": "random"}, first),
        ),
    )


def check_attention(result: Result) -> tuple[Comparison, ...]:
    """Late attention to label words tells the prediction: above chance, above random tokens, above early layers."""
    table, layers = result.tables["attention"].dropna(), result.scalars["layers"]
    late, early = third(table, "last", layers), third(table, "first", layers)
    label = per_seed(late, "auc", target="label")
    return (
        Comparison("AUCROC, last third", t_interval(label), threshold=0.5),
        Comparison("AUCROC, last third, label words − random tokens", _auc_gap(late)),
        Comparison("AUCROC, last − first third", paired_interval(label, per_seed(early, "auc", target="label"))),
    )


def _auc_gap(late: pd.DataFrame) -> Interval:
    return difference(late, "auc", {"target": "label"}, {"target": "random"})


def check_reweighting(result: Result) -> tuple[Comparison, ...]:
    """β on label words raises accuracy over vanilla, over more demonstrations, and over β on random tokens."""
    table = result.tables["reweighting"]
    return tuple(
        Comparison(
            f"accuracy, anchors − {other}", difference(table, "accuracy", {"method": "anchors"}, {"method": other})
        )
        for other in ("vanilla", "more shots", "random tokens")
    )


def check_compression(result: Result) -> tuple[Comparison, ...]:
    """Anchors' keys and values keep more predictions than the same tokens as text, or random tokens' states."""
    table = result.tables["compression"]
    return tuple(
        Comparison(
            f"label loyalty, anchors − {other}",
            difference(table, "label_loyalty", {"method": "anchors"}, {"method": other}),
        )
        for other in ("text", "random")
    )


def speed_up(result: Result, over: str = "whole prompt") -> Interval:
    """Interval over seeds of the factor by which anchors are faster than another prompt form (medians over repeats)."""
    medians = result.tables["speed"].groupby(["task", "seed", "method"])["seconds"].median().unstack()
    return t_interval((medians[over] / medians["anchors"]).groupby("seed").mean())


def check_speed(result: Result) -> tuple[Comparison, ...]:
    """A query behind compressed demonstrations is at least 1.1 times faster, the paper's smallest factor."""
    return (Comparison("times faster than the whole prompt", speed_up(result), threshold=1.1, unit="×"),)


def confusion_correlation(result: Result) -> Interval:
    """Interval over seeds of Pearson's r between anchor-key distance and separability over pairs of classes."""
    correlations: dict[Any, list[float]] = {}
    for (_, seed), pairs in result.tables["diagnosis"].dropna().groupby(["task", "seed"]):
        if len(pairs) >= 3 and pairs["actual"].nunique() > 1:  # otherwise there is nothing to correlate
            correlations.setdefault(seed, []).append(pairs["predicted"].corr(pairs["actual"]))
    return t_interval([float(np.mean(values)) for values in correlations.values()])


def check_diagnosis(result: Result) -> tuple[Comparison, ...]:
    """Classes whose anchor keys lie close are the ones the model confuses."""
    return (Comparison("Pearson's r over pairs of classes", confusion_correlation(result)),)


def _swap(table: str, column: str, one: str, other: str) -> Callable[[Result], Result]:
    def apply(result: Result) -> Result:
        frame = result.tables[table].copy()
        frame[column] = frame[column].replace({one: other, other: one})
        return result.with_table(table, frame)

    return apply


def _copy_arm(table: str, column: str, source: str, target: str) -> Callable[[Result], Result]:
    def apply(result: Result) -> Result:
        frame = result.tables[table]
        stand_in = frame[frame[column] == source].assign(**{column: target})
        return result.with_table(table, pd.concat([frame[frame[column] != target], stand_in], ignore_index=True))

    return apply


def _shuffle_pairs(result: Result) -> Result:
    frame = result.tables["diagnosis"].copy()
    rng = np.random.default_rng(0)
    frame["predicted"] = frame.groupby(["task", "seed"])["predicted"].transform(lambda d: rng.permutation(d.to_numpy()))
    return result.with_table("diagnosis", frame)


def _number(what: str, value: float, table: str, column: str, method: str, preset: str = "paper") -> PaperNumber:
    """A percentage of one of the paper's tables; ours is the mean over seeds and tasks of one arm."""
    model = {"paper": "GPT2-XL", "paper-gptj": "GPT-J"}[preset]
    setting = f"{model}, 1 demonstration per class, mean of SST-2, TREC, AGNews, EmoC"
    ours = _mean_of(table, column, method=method)
    return PaperNumber(what, value, setting, f"{table} table", 2.0, "%", ours, preset)


def _mean_of(table: str, value: str, scale: float = 100.0, **where: Any) -> Callable[[Result], Interval]:
    return lambda result: t_interval(scale * per_seed(result.tables[table], value, **where))


TOLERANCES = {"speed.seconds": (math.inf, math.inf)}
"""Measured times are no two machines' the same."""

CLAIMS: list[Claim] = [
    Claim(
        "gather",
        "In early layers, information flows from a demonstration's text into its label word.",
        (),
        check_gather,
        Control(
            "random tokens stand in for the label words, and they for them", _swap("flow", "anchor", "label", "random")
        ),
        reported="figure: S_wp is high and S_pq low in shallow layers of GPT2-XL and GPT-J",
    ),
    Claim(
        "deliver",
        "In late layers, the flow from label words to the predicting position dominates.",
        (),
        check_deliver,
        Control(
            "random tokens stand in for the label words, and they for them", _swap("flow", "anchor", "label", "random")
        ),
        reported="figure: S_pq is the largest of the three flows in deep layers of GPT2-XL and GPT-J",
    ),
    Claim(
        "isolation",
        "Cutting label words off from their text changes predictions when done in the first layers, "
        "less in the last ones, and less than cutting off random tokens does.",
        (),
        check_isolation,
        Control(
            "random tokens stand in for the label words, and they for them",
            _swap("isolation", "target", "label", "random"),
        ),
        reported="figure: loyalty falls clearly only for label words isolated in the first 5 layers",
    ),
    Claim(
        "attention",
        "How much the last position attends to each label word in late layers tells which label is predicted.",
        (),
        check_attention,
        Control(
            "attention to random tokens stands in for attention to label words",
            _swap("attention", "target", "label", "random"),
        ),
        reported="figure: AUCROC near 0.8 in deep layers, and R_l grows in middle and deep layers",
    ),
    Claim(
        "reweighting",
        "Learning how strongly the prediction attends to each label word raises accuracy over one-shot and over "
        "more-shot in-context learning.",
        (
            _number("re-weighted accuracy", 68.64, "reweighting", "accuracy", "anchors"),
            _number("1-shot accuracy", 51.90, "reweighting", "accuracy", "vanilla"),
            _number("5-shot accuracy", 46.87, "reweighting", "accuracy", "more shots"),
        ),
        check_reweighting,
        Control(
            "β on random tokens stands in for β on label words",
            _swap("reweighting", "method", "anchors", "random tokens"),
        ),
        reported="51.90 % → 68.64 %, against 46.87 % with five demonstrations per class",
    ),
    Claim(
        "compression",
        "Keys and values of label words and template alone preserve most predictions, more than their text or the "
        "states of random tokens.",
        (
            _number("label loyalty, anchors", 79.47, "compression", "label_loyalty", "anchors"),
            _number("label loyalty, text", 51.05, "compression", "label_loyalty", "text"),
            _number("label loyalty, random", 48.96, "compression", "label_loyalty", "random"),
            _number("accuracy, anchors", 45.04, "compression", "accuracy", "anchors"),
            _number("label loyalty, anchors", 89.06, "compression", "label_loyalty", "anchors", "paper-gptj"),
            _number("accuracy, anchors", 55.59, "compression", "accuracy", "anchors", "paper-gptj"),
        ),
        check_compression,
        Control("random tokens' states stand in for the anchors'", _swap("compression", "method", "anchors", "random")),
        reported="label loyalty 79.47 % against 51.05 % (text) and 48.96 % (random)",
    ),
    Claim(
        "speed",
        "Compressed demonstrations make a query faster than reading the whole prompt.",
        (
            PaperNumber(
                "smallest speed-up", 1.1, "GPT2-XL and GPT-J on four tasks", "speed-up table", 0.2, "×", speed_up
            ),
        ),
        check_speed,
        Control(
            "the whole prompt stands in for the compressed one", _copy_arm("speed", "method", "whole prompt", "anchors")
        ),
        reported="1.1× to 2.9×",
    ),
    Claim(
        "diagnosis",
        "Classes whose label words have similar keys, seen along the directions in which queries vary, are the ones "
        "the model confuses.",
        (),
        check_diagnosis,
        Control("distances shuffled over pairs of classes", _shuffle_pairs),
        reported="figure: predicted and actual confusion heat maps of TREC look alike",
    ),
]
