"""Theorems of intuitionistic implicational logic with proofs: a checker, a complete prover, and a generator.

A formula is an atom (a string) or an implication (a pair). A proof is a list of tactics, as in Lean: `intro` moves
the premise of the goal among the hypotheses; naming a hypothesis A₁ → … → Aₖ → B applies it to the goal B and leaves
A₁ … Aₖ to be shown (for k = 0 it is *exact*). The rules are those of natural deduction for →, so a checked proof is
one; that every theorem has such a proof is the existence of long normal forms (Prawitz, 1965).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeAlias

import torch

from midstream.data.worked import Column, Worked

Formula: TypeAlias = "str | tuple[Formula, Formula]"
INTRO = "intro"
Tactic: TypeAlias = Formula
"""`INTRO`, or the hypothesis to apply."""


@dataclass(frozen=True)
class Goal:
    """What is to be shown, and what may be used beyond the theorem's own hypotheses."""

    target: Formula
    introduced: tuple[Formula, ...] = ()


@dataclass(frozen=True)
class Theorem:
    """Hypotheses and what follows from them."""

    hypotheses: tuple[Formula, ...]
    target: Formula


State = tuple[Goal, ...]
"""The open goals; the current one is last."""


class ProofError(ValueError):
    """A tactic that does not fit the current goal."""


def start(theorem: Theorem) -> State:
    """The state before the first tactic."""
    return (Goal(theorem.target),)


def step(theorem: Theorem, state: State, tactic: Tactic) -> State:
    """The state after a tactic is applied to the current goal; raises `ProofError` where it does not fit."""
    if not state:
        raise ProofError("There is no goal left.")
    *others, goal = state
    if tactic == INTRO:
        if isinstance(goal.target, str):
            raise ProofError(f"{show(goal.target)} is no implication.")
        premise, conclusion = goal.target
        return (*others, Goal(conclusion, (*goal.introduced, premise)))
    if tactic not in theorem.hypotheses and tactic not in goal.introduced:
        raise ProofError(f"{show(tactic)} is no hypothesis.")
    premises = premises_for(tactic, goal.target)
    return (*others, *(Goal(premise, goal.introduced) for premise in reversed(premises)))


def premises_for(formula: Formula, target: Formula) -> tuple[Formula, ...]:
    """The premises A₁ … Aₖ of a formula A₁ → … → Aₖ → target; raises `ProofError` where it does not end so."""
    premises: list[Formula] = []
    while formula != target:
        if isinstance(formula, str):
            raise ProofError(f"It does not end in {show(target)}.")
        premise, formula = formula
        premises.append(premise)
    return tuple(premises)


def check(theorem: Theorem, tactics: Sequence[Tactic]) -> bool:
    """Whether the tactics prove the theorem: each fits, and no goal is left."""
    state = start(theorem)
    try:
        for tactic in tactics:
            state = step(theorem, state, tactic)
    except ProofError:
        return False
    return not state


def applicable(theorem: Theorem, goal: Goal) -> list[Tactic]:
    """Tactics of long normal forms: `intro` for an implication, for an atom every hypothesis that ends in it."""
    if not isinstance(goal.target, str):
        return [INTRO]
    known = dict.fromkeys((*theorem.hypotheses, *goal.introduced))
    return [formula for formula in known if head(formula) == goal.target]


def head(formula: Formula) -> str:
    """The atom in which a formula ends."""
    while not isinstance(formula, str):
        formula = formula[1]
    return formula


def prove(theorem: Theorem, limit: int) -> list[Tactic] | None:
    """A shortest proof of at most `limit` tactics, or none; of several, the one that uses earlier hypotheses."""
    for length in range(1, limit + 1):
        if (found := _search(theorem, start(theorem), length)) is not None:
            return found
    return None


def _search(theorem: Theorem, state: State, length: int) -> list[Tactic] | None:
    if not state:
        return [] if length == 0 else None
    if len(state) > length:  # every open goal takes a tactic at the least
        return None
    for tactic in applicable(theorem, state[-1]):
        rest = _search(theorem, step(theorem, state, tactic), length - 1)
        if rest is not None:
            return [tactic, *rest]
    return None


def provable(theorem: Theorem) -> bool:
    """Decides the theorem: no limit is needed, for a goal that recurs on its own branch need not be tried again."""
    return _decide(theorem, Goal(theorem.target), frozenset())


def _decide(theorem: Theorem, goal: Goal, above: frozenset[tuple[Formula, frozenset[Formula]]]) -> bool:
    sequent = (goal.target, frozenset(goal.introduced) - frozenset(theorem.hypotheses))
    if sequent in above:
        return False
    return any(
        all(_decide(theorem, after, above | {sequent}) for after in step(theorem, (goal,), tactic))
        for tactic in applicable(theorem, goal)
    )


# ------------------------------------------------------------------------------------------- theorems with proofs


def show(formula: Formula) -> str:
    """A formula as text: `p>q>r` is p → (q → r)."""
    if isinstance(formula, str):
        return formula
    premise, conclusion = formula
    left = show(premise) if isinstance(premise, str) else f"({show(premise)})"
    return f"{left}>{show(conclusion)}"


def formulas(atoms: int) -> list[Formula]:
    """All formulas of at most two arrows in which no atom stands twice."""
    letters = "pqrstuvw"[:atoms]
    pairs: list[Formula] = list(permutations(letters, 2))
    triples = list(permutations(letters, 3))
    return [*letters, *pairs, *((a, (b, c)) for a, b, c in triples), *(((a, b), c) for a, b, c in triples)]


def theorems(seed: int, steps: int, hypotheses: int, atoms: int) -> Iterator[tuple[Theorem, list[Tactic]]]:
    """Endless theorems with their shortest proofs, of exactly `steps` tactics each; no two differ in names alone.

    A proof is drawn backwards from the target, hypotheses that it needs are put in, others are added at random, and
    all are shuffled; what the prover shows in fewer tactics is left out.
    """
    rng = random.Random(seed)
    every = formulas(atoms)
    seen = set[tuple[str, ...]]()
    while True:
        target, needed = _draw(rng, steps, "pqrstuvw"[:atoms])
        if len(needed) > hypotheses:
            continue
        others = [formula for formula in every if formula not in needed and formula != target]
        known = [*needed, *rng.sample(others, hypotheses - len(needed))]
        rng.shuffle(known)
        theorem = Theorem(tuple(known), target)
        proof = prove(theorem, steps)
        same = up_to_names(theorem, "pqrstuvw"[:atoms])
        if proof is not None and len(proof) == steps and same not in seen:
            seen.add(same)
            yield theorem, proof


def up_to_names(theorem: Theorem, letters: str) -> tuple[str, ...]:
    """The hypotheses of a theorem about one atom, the same however atoms are named and hypotheses are ordered.

    Of all ways to rename its atoms so that the target is the first letter, the one that comes first when sorted.
    """
    texts = [show(formula) for formula in theorem.hypotheses]
    target = show(theorem.target)
    others = [letter for letter in letters if letter != target]
    renamings = (str.maketrans(dict(zip((target, *names), letters, strict=True))) for names in permutations(others))
    return min(tuple(sorted(text.translate(renaming) for text in texts)) for renaming in renamings)


def _draw(rng: random.Random, steps: int, letters: str) -> tuple[Formula, list[Formula]]:
    """A target, and hypotheses from which some proof of `steps` tactics shows it."""
    target = rng.choice(letters)
    goals, needed = [Goal(target)], list[Formula]()
    for left in range(steps, 0, -1):
        goal = goals.pop()
        if not isinstance(goal.target, str):
            goals.append(Goal(goal.target[1], (*goal.introduced, goal.target[0])))
            continue
        spare = left - 1 - len(goals)  # tactics that new goals may take, one each at the least
        rule: Formula = goal.target if spare == 0 else _rule(rng, goal, spare, letters)
        if rule not in goal.introduced and rule not in needed:
            needed.append(rule)
        goals += [Goal(premise, goal.introduced) for premise in reversed(premises_for(rule, goal.target))]
    return target, needed


def _rule(rng: random.Random, goal: Goal, spare: int, letters: str) -> Formula:
    """A hypothesis that ends in the goal; its premises can be shown in `spare` tactics."""
    a, b = rng.sample([letter for letter in letters if letter != goal.target], 2)
    known = [each for each in goal.introduced if isinstance(each, str) and each not in (goal.target, b)]
    if known and rng.random() < 0.5:
        a = rng.choice(known)
    target = goal.target
    shapes: list[Formula] = [(a, target)] if spare == 1 else [(a, target), (a, (b, target)), ((a, b), target)]
    return rng.choice(shapes)


# ---------------------------------------------------------------------------------------------- as worked problems

START, TURNSTILE, FILL = "start", "⊢", "·"


def vocabulary(steps: int, atoms: int) -> tuple[str, ...]:
    """One token a formula, `intro`, `⊢`, a filler, and the tags of states."""
    return (START, FILL, TURNSTILE, INTRO, *(f"S{i}" for i in range(1, steps)), *map(show, formulas(atoms)))


def written(state: State) -> list[str]:
    """A state as words: for each goal what was introduced, `⊢`, the target; the current goal last."""
    words: list[str] = []
    for goal in state:
        words += [*map(show, goal.introduced), TURNSTILE, show(goal.target)]
    return words


def proofs(
    count: int, seed: int, *, steps: int, hypotheses: int, atoms: int, width: int
) -> tuple[Worked, list[Theorem]]:
    """`count` theorems with proofs, as worked problems and as formulas.

    A row: `start`, the hypotheses, `⊢`, the target; then the first tactic (block `T0`); the tag `S1` and the state it
    leads to, filled up on the left to `width` words; the next tactic (`T1`), and so on. A tactic has no tag, so that
    the goal it is for can stand right before it. Theorems with a longer state are left out, never cut.
    """
    words = {word: token for token, word in enumerate(vocabulary(steps, atoms))}
    rows: list[list[int]] = []
    kept: list[Theorem] = []
    source = theorems(seed, steps, hypotheses, atoms)
    while len(rows) < count:
        theorem, tactics = next(source)
        states = [start(theorem)]
        for tactic in tactics:
            states.append(step(theorem, states[-1], tactic))
        if max(len(written(state)) for state in states) > width:
            continue
        rows.append([words[word] for word in _row(theorem, tactics, states, width)])
        kept.append(theorem)
    columns = _columns(steps, width)
    answers = tuple(f"T{i}" for i in range(steps))
    tokens = torch.tensor(rows)
    return Worked(tokens, tokens.shape[1] - len(columns), columns, tuple(words), answers), kept


def _row(theorem: Theorem, tactics: Sequence[Tactic], states: Sequence[State], width: int) -> list[str]:
    row = [START, *map(show, theorem.hypotheses), TURNSTILE, show(theorem.target)]
    for i, tactic in enumerate(tactics):
        if i:
            told = written(states[i])
            row += [f"S{i}", *[FILL] * (width - len(told)), *told]
        row.append(show(tactic))
    return row


def _columns(steps: int, width: int) -> tuple[Column, ...]:
    """A tactic follows from the state it is applied to, a state from the one before and the tactic between.

    A state can also be had back from its tactic and the state after it, up to what a goal just closed had introduced.
    """
    columns: list[Column] = []
    for i in range(steps):
        if i:
            before = (f"T{i - 1}",) if i == 1 else (f"S{i - 1}", f"T{i - 1}")
            after = (f"T{i}", f"S{i + 1}") if i + 1 < steps else (f"T{i}",)
            columns += [Column(f"S{i}", "tag"), *[Column(f"S{i}", "state", before, after)] * width]
        columns.append(Column(f"T{i}", "tactic", (f"S{i}",) if i else ()))
    return tuple(columns)


def read_tactics(words: Sequence[str], atoms: int) -> list[Tactic]:
    """Tactics from their words; a word that is none becomes an atom that no theorem knows, so the checker refuses."""
    known = {show(formula): formula for formula in formulas(atoms)} | {INTRO: INTRO}
    return [known.get(word, "?") for word in words]
