"""The order in which a worked solution is written decides how well a next-token model learns to find it.

Reference: An et al., "Next-Token Prediction Task Assumes Optimal Data Ordering for LLM Training in Proof Generation",
2024, arXiv 2411.00863. Problems, steps and proofs are made by `midstream.data.worked` and
`midstream.data.implications`.

Glossary (the paper's words → name here → shape)
    proof step                      block               a tag and a few tokens: a partial product, a state, a tactic
    intermediate supervision        parents, later      the blocks from which a token follows in one step
    order of a sample               order               the names of its blocks, a permutation; the problem stands first
    intuitively sequential          loses_supervision() false for every column: all supervision stands to the left
    next-token loss                 solution_losses()   (rows, columns), in nats, of what follows the problem
    proof success rate              solved()            share of held-out problems: exact result, or checked proof
    fitted as if unconditional      bayes_rows()        H(token | the part of its supervision to its left), in nats

Deviations
    - The paper's orders, models and tables were not read: every order below is inferred from its abstract and from
      notes on it, and all of them are a parameter. Sequential multiplication: partial products, column sums with
      carries from the least significant digit, result last. Sequential proofs: each state before its tactic.
    - A Llama of two layers, trained from scratch, replaces the paper's models; 2 × 1 digits and proofs of four tactics
      in the implicational fragment replace its problems. One token a formula.
    - Every column plays one part in all samples (states are filled up), so an order is one permutation of columns.
    - Proofs are the shortest that the prover finds, the first of several; any proof that the checker accepts counts.
    - What counts as supervision is inferred too: the blocks that a token is computed from, or those with which the
      same step can be undone, such as the copy of a digit in the result.
    - Added: `equivalent`, another order in which every step follows its supervision, as a negative control. The
      random order is one fixed permutation, drawn before any training.
    - The third claim, on theorems of a textbook, is about human proofs and is not attempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor

from midstream.claims import Claim, Comparison, Control, PaperNumber
from midstream.data import implications
from midstream.data.implications import Theorem
from midstream.data.worked import Worked, loses_supervision, multiplication
from midstream.measure import Interval, auc, t_interval
from midstream.paper import PaperParams, Preset, Result
from midstream.train import Schedule, fit

MARGIN = 0.1
"""Nats by which a loss may rise and count as unmoved: about what 90 % instead of all certainty costs."""
SOLVED = 0.2
"""A share solved that says something has been learned: one product in nine has a factor of zero."""
Order = Literal["sequential", "equivalent", "state after tactic", "answer first", "random", "reversed"]

# ---------------------------------------------------------------------------------------------- parameters


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    digits: int = Field(2, ge=1, le=3, description="digits of the first number")
    by: int = Field(1, ge=1, le=3, description="digits of the second number")
    tactics: int = Field(4, ge=2, le=12, description="tactics in every proof")
    hypotheses: int = Field(5, ge=2, le=32, description="hypotheses of every theorem")
    atoms: int = Field(5, ge=3, le=8, description="atoms in formulas")
    state_width: int = Field(5, ge=4, le=64, description="tokens of a written state; longer ones are left out")
    theorems: int = Field(1500, ge=100, le=10_000_000, description="theorems to learn from")
    multiplication_orders: tuple[Order, ...] = Field(
        ("sequential", "equivalent", "answer first", "random", "reversed"), description="orders of a multiplication"
    )
    proof_orders: tuple[Order, ...] = Field(
        ("sequential", "state after tactic", "random", "reversed"), description="orders of a proof"
    )
    permutation: int = Field(0, ge=0, le=2**31 - 1, description="seed of the one random order")
    width: int = Field(64, ge=16, le=8192, multiple_of=16, description="width of the residual stream")
    layers: int = Field(2, ge=1, le=64, description="layers of the Llama")
    steps: int = Field(32, ge=4, le=1_000_000, description="training steps of every run")
    batch_size: int = Field(32, ge=4, le=65_536, description="samples in a batch")
    rates: tuple[float, ...] = Field((0.02,), min_length=1, description="learning rates, chosen from for each order")
    n_validation: int = Field(20, ge=20, le=100_000, description="problems on which the rate is chosen")
    n_test: int = Field(60, ge=20, le=100_000, description="held-out problems of a task")

    @model_validator(mode="after")
    def _has_a_reference(self) -> Params:
        if self.by > self.digits:
            raise ValueError(f"the second number is no longer than the first; got {self.digits} and {self.by} digits")
        for orders in (self.multiplication_orders, self.proof_orders):
            if "sequential" not in orders or len(orders) < 2 or len(set(orders)) < len(orders):
                raise ValueError(f"orders are different, 'sequential' among them; got {', '.join(orders)}")
        return self


_FULL = Params(theorems=4000, steps=400, batch_size=64, rates=(0.01, 0.03), n_validation=60, n_test=200)
_PAPER = Params(
    digits=3,
    by=3,
    tactics=8,
    hypotheses=10,
    atoms=8,
    state_width=16,
    theorems=200_000,
    multiplication_orders=("sequential", "equivalent", "answer first", "random", "reversed"),
    proof_orders=("sequential", "state after tactic", "answer first", "random", "reversed"),
    width=512,
    layers=8,
    steps=20_000,
    batch_size=256,
    rates=(0.001, 0.003, 0.01),
    n_validation=500,
    n_test=2000,
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "short runs, three seeds: see the losses move", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "every order, two learning rates, three seeds: settle the claims", minutes=30, memory_gib=4),
    "paper": Preset(
        _PAPER,
        "3 × 3 digits and proofs of eight tactics with a Llama of 8 layers; the paper's own sizes were not read",
        minutes=3000,
        memory_gib=16,
        needs="a GPU with 16 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """Nothing is loaded: problems are generated, models trained here, both by code that the record's key covers."""
    return {}


# ---------------------------------------------------------------------------------------------------- the orders


def order_of(worked: Worked, order: Order, permutation: int) -> tuple[str, ...]:
    """The blocks of worked problems in one of the orders; `permutation` seeds the random one."""
    blocks = worked.blocks
    if order == "sequential":
        return blocks
    if order == "equivalent":
        return last_ready_first(worked)
    if order == "state after tactic":
        return supervision_after(worked)
    if order == "answer first":
        return (*worked.answers, *(block for block in blocks if block not in worked.answers))
    if order == "reversed":
        return blocks[::-1]
    return tuple(np.random.default_rng(permutation).permutation(blocks).tolist())


def last_ready_first(worked: Worked) -> tuple[str, ...]:
    """Another order in which every block follows all its parents: of those that could come next, always the last."""
    parents = {block: {p for c in worked.columns if c.block == block for p in c.parents} for block in worked.blocks}
    done: list[str] = []
    while len(done) < len(parents):
        done.append([block for block in parents if block not in done and parents[block] <= set(done)][-1])
    return tuple(done)


def supervision_after(worked: Worked) -> tuple[str, ...]:
    """Every block of supervision that stands right before an answer stands right after it."""
    blocks = list(worked.blocks)
    for i, (block, following) in enumerate(pairwise(worked.blocks)):
        if block not in worked.answers and following in worked.answers:
            blocks[i : i + 2] = following, block
    return tuple(blocks)


# ------------------------------------------------------------------------------------------ what a reader could know


def conditional_entropy(values: Tensor, given: Tensor) -> float:
    """H(value | given) in nats over equally likely rows: values (rows,), given (rows, columns), possibly none."""
    joint = torch.cat([given, values[:, None]], 1)
    return _entropy(joint) - _entropy(given)


def _entropy(rows: Tensor) -> float:
    if rows.shape[1] == 0:
        return 0.0
    counts = torch.unique(rows, dim=0, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


def bayes_rows(worked: Worked, order: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The least loss of each column by enumeration, in nats, for three readers.

    `one_step` sees the token's supervision as far as it stands to its left, and the start of its own block (of the
    problem nothing, except where the token is computed from it); `steps_alone` sees all steps to the left but not the
    problem; who sees the problem too has nothing left to guess where it determines the solution: `everything`.
    """
    arrangement = worked.arrangement(order)
    rows, problem = worked.tokens[:, arrangement], worked.problem
    columns = [worked.columns[place - problem] for place in arrangement[problem:].tolist()]
    for place, column in enumerate(columns, start=problem):
        left = [at for at, other in enumerate(columns, start=problem) if at < place]
        known = {column.block, *column.parents, *column.later}
        direct = [at for at in left if columns[at - problem].block in known]
        direct += [] if column.parents else list(range(problem))
        yield {
            "block": column.block,
            "kind": column.kind,
            "one_step": conditional_entropy(rows[:, place], rows[:, direct]),
            "steps_alone": conditional_entropy(rows[:, place], rows[:, left]),
            "everything": conditional_entropy(rows[:, place], rows[:, :place]),
        }


# -------------------------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Bench:
    """One task: its worked problems, how solutions are judged, and which rows serve for what."""

    task: str
    worked: Worked
    judge: Callable[[Tensor, Tensor], list[bool]]
    """(row numbers, rows as the model wrote them, in the sequential order) → whether each is solved."""
    orders: dict[str, tuple[str, ...]]
    train: Tensor
    validation: Tensor
    test: Tensor


def benches(params: Params) -> list[Bench]:
    """Both tasks; which problems are held out is the same for every order and seed."""
    worked = multiplication(params.digits, params.by)
    return [
        _bench("multiplication", worked, exact_results(worked), params.multiplication_orders, params),
        _proof_bench(params),
    ]


def _proof_bench(params: Params) -> Bench:
    count = params.theorems + params.n_validation + params.n_test
    worked, theorems = implications.proofs(
        count,
        params.seed,
        steps=params.tactics,
        hypotheses=params.hypotheses,
        atoms=params.atoms,
        width=params.state_width,
    )
    return _bench("proofs", worked, checked_proofs(worked, theorems, params.atoms), params.proof_orders, params)


def _bench(task: str, worked: Worked, judge: Any, orders: Sequence[Order], params: Params) -> Bench:
    shuffled = torch.randperm(len(worked.tokens), generator=torch.Generator().manual_seed(params.seed))
    parts = [params.n_validation, params.n_test, len(shuffled) - params.n_validation - params.n_test]
    validation, test, train = shuffled.split(parts)
    named: dict[str, tuple[str, ...]] = {order: order_of(worked, order, params.permutation) for order in orders}
    return Bench(task, worked, judge, named, train, validation, test)


def exact_results(worked: Worked) -> Callable[[Tensor, Tensor], list[bool]]:
    """A judge: every token of the answer is the true one."""
    places = answer_places(worked)

    def judge(numbers: Tensor, written: Tensor) -> list[bool]:
        right: list[bool] = (written[:, places] == worked.tokens[numbers][:, places]).all(1).tolist()
        return right

    return judge


def checked_proofs(worked: Worked, theorems: Sequence[Theorem], atoms: int) -> Callable[[Tensor, Tensor], list[bool]]:
    """A judge: the checker accepts the tactics as a proof of the theorem, whichever proof it is."""
    places = answer_places(worked)

    def judge(numbers: Tensor, written: Tensor) -> list[bool]:
        proofs = [implications.read_tactics(worked.text(row).split(), atoms) for row in written[:, places]]
        return [implications.check(theorems[n], proof) for n, proof in zip(numbers.tolist(), proofs, strict=True)]

    return judge


def answer_places(worked: Worked) -> list[int]:
    """Where the answer's tokens stand in a row in the sequential order, tags left out."""
    return [
        worked.problem + place
        for place, column in enumerate(worked.columns)
        if column.block in worked.answers and column.kind != "tag"
    ]


def untrained(vocabulary: int, params: Params, seed: int) -> Any:
    """A Llama of the sizes asked for; the seed fixes its weights, whatever the order it will read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=params.width,
        intermediate_size=2 * params.width,
        num_hidden_layers=params.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=params.width**-0.5,  # smaller weights take far longer to learn to look something up
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # at these sizes faster on a CPU than the fused kernel's backward
    return model


def solution_losses(model: Any, rows: Tensor, problem: int) -> Tensor:
    """Cross-entropy of every token behind the problem, (rows, columns), in nats; the problem itself is given."""
    logits = model(input_ids=rows, use_cache=False).logits[:, problem - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, problem:], reduction="none")


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (size, tokens), every row once before any comes again; the seed fixes which, for all orders."""
    random = torch.Generator().manual_seed(seed)
    waiting = torch.zeros(0, dtype=torch.long)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(len(rows), generator=random)])
        chosen, waiting = waiting[:size], waiting[size:]
        yield rows[chosen]


def learn(model: Any, bench: Bench, order: Sequence[str], rate: float, params: Params, seed: int) -> pd.DataFrame:
    """Trains a model on solutions in one order, in place; the curve of `fit`."""
    rows = bench.worked.tokens[bench.train][:, bench.worked.arrangement(order)]
    schedule = Schedule(steps=params.steps, learning_rate=rate / 2, muon=rate)

    def loss(wrapped: Any, batch: Tensor) -> Tensor:
        return solution_losses(wrapped, batch, bench.worked.problem).mean()

    return fit(model, batches(rows, params.batch_size, seed), loss, schedule, precision="bfloat16")


@torch.no_grad()
def write(model: Any, problems: Tensor, length: int) -> Tensor:
    """Greedy continuation of problems (rows, tokens) by `length` tokens: (rows, tokens + length)."""
    problems = problems.to(model.device)
    said: Tensor = model.generate(
        problems,
        attention_mask=torch.ones_like(problems),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )
    return said.cpu()


def solved(model: Any, bench: Bench, order: Sequence[str], numbers: Tensor) -> list[bool]:
    """Whether the model, writing on its own in its order, solves each of the problems with these row numbers."""
    worked = bench.worked
    written = write(model, worked.tokens[numbers][:, : worked.problem], len(worked.columns))
    return bench.judge(numbers, written[:, worked.arrangement(order).argsort()])


@torch.no_grad()
def column_losses(model: Any, bench: Bench, order: Sequence[str], numbers: Tensor) -> Tensor:
    """Mean loss of each column over held-out rows, teacher-forced in its order: (columns,), sequentially listed."""
    worked, arrangement = bench.worked, bench.worked.arrangement(order)
    rows = worked.tokens[numbers][:, arrangement].to(model.device)
    losses = solution_losses(model, rows, worked.problem).mean(0).cpu()
    return losses[arrangement.argsort()[worked.problem :] - worked.problem]


def run(bench: Bench, name: str, rate: float, params: Params, seed: int) -> tuple[dict[str, Any], Tensor]:
    """Trains and tests one model: its row, and its test loss by column (columns,)."""
    order = bench.orders[name]
    model = untrained(len(bench.worked.vocabulary), params, seed)
    curve = learn(model, bench, order, rate, params, seed)
    held_out = torch.cat([bench.validation, bench.test])
    right = np.array(solved(model, bench, order, held_out))
    losses = column_losses(model, bench, order, bench.test)
    row = {
        "task": bench.task,
        "order": name,
        "rate": rate,
        "seed": seed,
        "validation": float(right[: len(bench.validation)].mean()),
        "validation_loss": float(column_losses(model, bench, order, bench.validation).mean()),
        "success": float(right[len(bench.validation) :].mean()),
        "loss": float(losses.mean()),
        "training_loss": float(curve["loss"].tail(20).mean()),
        "seconds": float(curve["seconds"].iloc[-1]),
    }
    return row, losses


def choose_rates(runs: pd.DataFrame) -> pd.Series:
    """Whether a run's rate is its order's: the one with most validation problems solved, mean over seeds, then loss."""
    means = runs.groupby(["task", "order", "rate"])[["validation", "validation_loss"]].mean().reset_index()
    ranked = means.sort_values(["validation", "validation_loss"], ascending=[False, True])
    best = ranked.groupby(["task", "order"])["rate"].first()
    return runs["rate"] == [best[task, order] for task, order in zip(runs["task"], runs["order"], strict=True)]


def loss_rows(bench: Bench, name: str, losses: Tensor) -> Iterator[dict[str, Any]]:
    """Losses by column, each with whether its supervision stands to its right in this order."""
    for place, (column, loss) in enumerate(zip(bench.worked.columns, losses.tolist(), strict=True)):
        yield {
            "column": place,
            "block": column.block,
            "kind": column.kind,
            "moved": loses_supervision(column, bench.orders[name]),
            "loss": loss,
        }


def experiment(params: Params) -> Result:
    """Trains every order at every rate on every seed; losses by column are those of each order's own rate."""
    runs: list[dict[str, Any]] = []
    kept: list[tuple[Bench, Tensor]] = []
    tasks = benches(params)
    for bench in tasks:
        for seed in params.seeds:
            for name in bench.orders:
                for rate in params.rates:
                    row, losses = run(bench, name, rate, params, seed)
                    runs.append(row)
                    kept.append((bench, losses))
    table = pd.DataFrame(runs)
    table["chosen"] = choose_rates(table)
    columns = [
        {"task": row["task"], "order": row["order"], "seed": row["seed"], **entry}
        for row, chosen, (bench, losses) in zip(runs, table["chosen"], kept, strict=True)
        if chosen
        for entry in loss_rows(bench, row["order"], losses)
    ]
    return Result({"runs": table, "losses": pd.DataFrame(columns), **_exact_tables(tasks)}, _sizes(tasks, params))


def _exact_tables(tasks: Sequence[Bench]) -> dict[str, pd.DataFrame]:
    """What needs no model: the orders themselves, and Bayes losses where all problems can be listed."""
    orders = [
        {"task": bench.task, "order": name, "position": i, "block": block}
        for bench in tasks
        for name, blocks in bench.orders.items()
        for i, block in enumerate(blocks)
    ]
    worked, named = tasks[0].worked, tasks[0].orders
    bayes = [{"order": name, **row} for name, blocks in named.items() for row in bayes_rows(worked, blocks)]
    return {"orders": pd.DataFrame(orders), "bayes": pd.DataFrame(bayes)}


def _sizes(tasks: Sequence[Bench], params: Params) -> dict[str, float]:
    """How much every order of a task is trained on: the same for all of them."""
    return {
        f"{bench.task}: {what}": value
        for bench in tasks
        for what, value in (
            ("training problems", len(bench.train)),
            ("tokens a sample", bench.worked.tokens.shape[1]),
            ("tokens read in training", bench.worked.tokens.shape[1] * params.steps * params.batch_size),
        )
    }


# ----------------------------------------------------------------------------------------------------- the claims


def per_seed(result: Result, task: str, order: str, value: str = "success") -> pd.Series:
    """A column of the runs of one order at its own rate, by seed."""
    runs = result.tables["runs"]
    rows = runs[(runs["task"] == task) & (runs["order"] == order) & runs["chosen"]]
    return rows.set_index("seed")[value].sort_index()


def orders_of(result: Result, task: str) -> list[str]:
    """The orders in which a task was learned, in the order of the parameter."""
    runs = result.tables["runs"]
    return runs[runs["task"] == task]["order"].drop_duplicates().tolist()


def disordered(result: Result, task: str) -> list[str]:
    """The orders that put some supervision to the right of what it supports."""
    losses = result.tables["losses"]
    moved = losses[(losses["task"] == task) & losses["moved"]]["order"].unique()
    return [order for order in orders_of(result, task) if order in moved]


def cells(result: Result, task: str) -> pd.DataFrame:
    """Loss of each kind of token that is no tag, by order and seed: mean over its columns in one block."""
    losses = result.tables["losses"]
    content = losses[(losses["task"] == task) & (losses["kind"] != "tag")]
    keys = ["order", "seed", "block", "kind"]
    return content.groupby(keys).agg(loss=("loss", "mean"), moved=("moved", "any")).reset_index()


def rises(result: Result, task: str) -> pd.DataFrame:
    """How far the loss of each kind of token lies above that in the sequential order, same seed, in nats."""
    table = cells(result, task)
    keys = ["seed", "block", "kind"]
    reference = table[table["order"] == "sequential"].set_index(keys)["loss"]
    others = table[table["order"] != "sequential"].set_index(keys)
    return others.assign(rise=others["loss"] - reference.reindex(others.index)).reset_index()


def difference(ours: pd.Series, other: pd.Series) -> Interval:
    """Interval over the seeds that both have; none of them, as for an order that was not run, decides nothing."""
    return t_interval((ours - other).dropna())


def check_best(task: str) -> Callable[[Result], tuple[Comparison, ...]]:
    """More held-out problems are solved in the sequential order than in each order that moves supervision."""

    def check(result: Result) -> tuple[Comparison, ...]:
        first = per_seed(result, task, "sequential")
        return tuple(
            Comparison(f"solved, sequential − {order}", difference(first, per_seed(result, task, order)))
            for order in disordered(result, task)
        )

    return check


def gap(result: Result, task: str = "proofs") -> Interval:
    """Interval over seeds of the share solved, best minus worst order by their means, in points."""
    means = {order: per_seed(result, task, order).mean() for order in orders_of(result, task)}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return difference(100 * per_seed(result, task, best), 100 * per_seed(result, task, worst))


def check_gap(result: Result) -> tuple[Comparison, ...]:
    """Between the best and the worst order lie more than 5 points of checked proofs."""
    return (Comparison("checked proofs, best − worst order", gap(result), threshold=5, unit=" points"),)


def check_moved(task: str) -> Callable[[Result], tuple[Comparison, ...]]:
    """Loss rises on tokens that lost supervision, on the others it does not, and the rise tells which is which."""

    def check(result: Result) -> tuple[Comparison, ...]:
        table = rises(result, task)
        lost, kept = (rows.groupby("seed")["rise"].mean() for rows in (table[table["moved"]], table[~table["moved"]]))
        told = table.groupby("seed")[["rise", "moved"]].apply(lambda rows: auc(rows["rise"], rows["moved"]))
        return (
            Comparison("rise of tokens that lost supervision", t_interval(lost), "above", MARGIN, " nats"),
            Comparison("rise of tokens that kept it", t_interval(kept), "below", MARGIN, " nats"),
            Comparison("which token lost supervision, told from its rise (AUC)", t_interval(told), "above", 0.9),
        )

    return check


def check_reachable(result: Result) -> tuple[Comparison, ...]:
    """Sequentially, digits come near their Bayes loss of zero; moved ones pay more than half of what is missing.

    What is missing: the least loss of a reader who sees only as much of the token's supervision as stands left.
    """
    table = cells(result, "multiplication")
    bayes = result.tables["bayes"].set_index(["order", "block", "kind"])["one_step"]
    keys = pd.MultiIndex.from_frame(table[["order", "block", "kind"]])
    table["one_step"] = bayes.reindex(keys).to_numpy()
    first = table[table["order"] == "sequential"].groupby("seed")["loss"].mean()
    moved = table[table["moved"]].groupby("seed")[["loss", "one_step"]].sum()
    paid = t_interval(moved["loss"] / moved["one_step"])
    return (
        Comparison("loss of digits, sequential", t_interval(first), "below", MARGIN, " nats"),
        Comparison("loss of moved digits / one-step Bayes loss", paid, "above", 0.5),
    )


def check_equivalent(result: Result) -> tuple[Comparison, ...]:
    """An order that moves blocks but no supervision solves at most 10 points fewer, and losses do not rise.

    Sequentially more than `SOLVED` are right: otherwise there would be nothing to lose.
    """
    task = "multiplication"
    solved_less = difference(per_seed(result, task, "equivalent"), per_seed(result, task, "sequential"))
    table = rises(result, task)
    rise = table[table["order"] == "equivalent"].groupby("seed")["rise"].mean()
    return (
        Comparison("solved, equivalent − sequential", solved_less, "above", -0.1),
        Comparison("rise of all digits, equivalent", t_interval(rise), "below", MARGIN, " nats"),
        Comparison("solved, sequential", t_interval(per_seed(result, task, "sequential")), "above", SOLVED),
    )


def check_reversed(task: str) -> Callable[[Result], tuple[Comparison, ...]]:
    """A random order is no worse than the reversed one, at most 5 points; sequentially, something is solved.

    The second part is what could be lost: where no order solves anything, none is worse than another.
    """

    def check(result: Result) -> tuple[Comparison, ...]:
        random, backwards = (per_seed(result, task, order) for order in ("random", "reversed"))
        return (
            Comparison("solved, random − reversed", difference(random, backwards), "above", -0.05),
            Comparison("solved, sequential", t_interval(per_seed(result, task, "sequential")), "above", SOLVED),
        )

    return check


# ---------------------------------------------------------------------------------- controls, numbers, the list


def _exchange(one: str, other: str, *tables: str) -> Callable[[Result], Result]:
    """What the models of one order did counts as the other's, and the reverse."""

    def apply(result: Result) -> Result:
        for name in tables:
            frame = result.tables[name]
            named = frame["order"].replace({one: other, other: one})
            result = result.with_table(name, frame.assign(order=named))
        return result

    return apply


def _kept_for_moved(result: Result) -> Result:
    """Tokens that kept their supervision count as those that lost it, and the reverse."""
    frame = result.tables["losses"]
    return result.with_table("losses", frame.assign(moved=~frame["moved"] & (frame["kind"] != "tag")))


def _order_without_effect(result: Result) -> Result:
    """Every order solves what the sequential one solves."""
    frame = result.tables["runs"].copy()
    for task in frame["task"].unique():
        own = frame["task"] == task
        frame.loc[own, "success"] = frame.loc[own, "seed"].map(per_seed(result, task, "sequential"))
    return result.with_table("runs", frame)


_PAPER_GAP = PaperNumber(
    "checked proofs, best − worst order",
    11.0,
    "the paper's model and theorems (sizes not read)",
    "abstract",
    3.0,
    " points",
    gap,
)
_SEQUENTIAL_FOR_REVERSED = "the reversed order's models stand in for the sequential ones, and they for them"

CLAIMS: list[Claim] = [
    Claim(
        "best_multiplication",
        "More products are right when every step stands to the right of what it follows from than in any order "
        "that breaks this.",
        (),
        check_best("multiplication"),
        Control(_SEQUENTIAL_FOR_REVERSED, _exchange("sequential", "reversed", "runs")),
        reported="training is most effective in the intuitively sequential order",
    ),
    Claim(
        "best_proofs",
        "More theorems are proved when each tactic stands to the right of the state it is applied to than in any "
        "order that breaks this.",
        (),
        check_best("proofs"),
        Control(_SEQUENTIAL_FOR_REVERSED, _exchange("sequential", "reversed", "runs")),
        reported="training is most effective in the intuitively sequential order",
    ),
    Claim(
        "gap",
        "Between the best and the worst order of the same proofs lies a large difference in theorems proved.",
        (_PAPER_GAP,),
        check_gap,
        Control("every order solves what the sequential one solves", _order_without_effect),
        reported="11 points of proof success",
    ),
    Claim(
        "moved_multiplication",
        "In a multiplication, loss rises on exactly those digits that were put to the left of their supervision.",
        (),
        check_moved("multiplication"),
        Control("digits that kept their supervision and those that lost it change places", _kept_for_moved),
        reported="explanation: a step left of its supervision is fitted as if it were unconditional",
    ),
    Claim(
        "moved_proofs",
        "In a proof, loss rises on exactly those states and tactics that were put to the left of their supervision.",
        (),
        check_moved("proofs"),
        Control("tokens that kept their supervision and those that lost it change places", _kept_for_moved),
        reported="explanation: a step left of its supervision is fitted as if it were unconditional",
    ),
    Claim(
        "unconditional",
        "A digit right of its supervision is learned to nearly zero loss; one left of it is fitted mostly as if what "
        "is missing could not be known, although the problem determines it.",
        (),
        check_reachable,
        Control(_SEQUENTIAL_FOR_REVERSED, _exchange("sequential", "reversed", "losses")),
        reported="explanation, without a number that we know of",
    ),
    Claim(
        "equivalent",
        "Moving blocks alone costs nothing: another order in which all supervision stands left is as good.",
        (),
        check_equivalent,
        Control(
            "the reversed order's models stand in for the equivalent one's, and they for them",
            _exchange("equivalent", "reversed", "runs", "losses"),
        ),
        reported="follows from the explanation; our control",
    ),
    *(
        Claim(
            f"random_{task}",
            f"A random order is no worse than the reversed one ({task}).",
            (),
            check_reversed(task),
            Control(_SEQUENTIAL_FOR_REVERSED, _exchange("sequential", "reversed", "runs")),
            reported="expected (inferred): sequential > random ≥ reversed",
        )
        for task in ("multiplication", "proofs")
    ),
]

TOLERANCES = {"runs.seconds": (float("inf"), float("inf"))}
"""Measured times are no two machines' the same."""
