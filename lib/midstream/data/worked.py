"""Worked problems of fixed length: a problem, then the steps of its solution in blocks that can be put in any order.

Every column of a corpus plays the same part in all rows, so an order of the blocks is one permutation of columns: the
same tokens, the same length, and an inverse. Each column says which blocks it follows from in one step, its
*supervision*: those it is computed from, or, where the step can be undone, those that were computed from it. The
problem itself, which always stands first, is not listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """One token's place in every solution."""

    block: str
    kind: str
    """What the token is: `tag` for the name of its block, otherwise a word of the task's own."""
    parents: tuple[str, ...] = ()
    """Blocks from which the token is computed in one step; its own block's earlier tokens may help."""
    later: tuple[str, ...] = ()
    """Blocks computed from it, with which the same step is undone; empty where it cannot be."""


@dataclass(frozen=True)
class Worked:
    """Solved problems, their columns in the order in which every step follows from earlier ones."""

    tokens: Tensor
    """(rows, problem + columns)."""
    problem: int
    """Columns of the problem."""
    columns: tuple[Column, ...]
    vocabulary: tuple[str, ...]
    answers: tuple[str, ...]
    """Blocks that hold the answer; the others are supervision."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, each step after those it follows from."""
        return tuple(dict.fromkeys(column.block for column in self.columns))

    def arrangement(self, order: Sequence[str]) -> Tensor:
        """The permutation of all columns, (problem + columns,), that puts the blocks in `order`, the problem first.

        `rows[:, arrangement]` are rows in that order; `arrangement.argsort()` leads back.
        """
        if sorted(order) != sorted(self.blocks):
            raise ValueError(f"An order names each of {', '.join(self.blocks)} once; got {', '.join(order)}.")
        places = [
            self.problem + place
            for block in order
            for place, column in enumerate(self.columns)
            if column.block == block
        ]
        return torch.tensor([*range(self.problem), *places])

    def text(self, row: Tensor) -> str:
        """A row, or a part of one, as words."""
        return " ".join(self.vocabulary[token] for token in row.tolist())


def loses_supervision(column: Column, order: Sequence[str]) -> bool:
    """Whether, in an order, a column stands left of a block that it is computed from, and cannot be undone either."""
    own = order.index(column.block)
    computed = all(order.index(block) < own for block in column.parents)
    undone = bool(column.later) and all(order.index(block) < own for block in column.later)
    return not computed and not undone


# ------------------------------------------------------------------------------------------------- multiplication

RESULT = "R"


def multiplication(digits: int, by: int) -> Worked:
    """Every product of a `digits`-digit and a `by`-digit number, leading zeros included, worked column by column.

    A row: `start`, the first number, `×`, the second, most significant digits first; a block `Pij` for each product
    a_i·b_j (tens, units); a block `Ck` for each column sum from k = 1 on (carry, digit; the last has no carry); the
    block `R`, the result's digits. Steps go from the least significant digit up, and so does the result. Raises
    `ValueError` for more than 3 digits: there would be too many products to list.
    """
    if not 1 <= by <= digits <= 3:
        raise ValueError(f"Numbers have 1 to 3 digits, the second no more than the first; got {digits} and {by}.")
    pairs = [(i, j) for j in range(by) for i in range(digits)]
    width = digits + by
    tags = [*(f"P{i}{j}" for i, j in pairs), *(f"C{k}" for k in range(1, width)), RESULT]
    vocabulary = (*map(str, range(10)), "start", "×", *tags)
    number = {word: token for token, word in enumerate(vocabulary)}
    a, b = _digits(digits, by)  # (digits, rows), (by, rows), least significant first
    rows = a.shape[1]

    def constant(word: str) -> Tensor:
        return torch.full((rows,), number[word])

    problem = [constant("start"), *a.flip(0), constant("×"), *b.flip(0)]
    values = _steps(a, b, pairs, width)
    columns: list[Column] = []
    tokens: list[Tensor] = []
    for tag in tags:
        columns.append(Column(tag, "tag"))
        tokens.append(constant(tag))
        for kind, value in values[tag]:
            columns.append(Column(tag, kind, *_supervision(tag, kind, pairs)))
            tokens.append(value)
    return Worked(torch.stack([*problem, *tokens], 1), len(problem), tuple(columns), vocabulary, (RESULT,))


def _digits(digits: int, by: int) -> tuple[Tensor, Tensor]:
    grid = torch.tensor(list(product(range(10), repeat=digits + by))).T  # (digits + by, rows)
    return grid[:digits], grid[digits:]


def _steps(a: Tensor, b: Tensor, pairs: Sequence[tuple[int, int]], width: int) -> dict[str, list[tuple[str, Tensor]]]:
    """The digits of every block: (kind, values (rows,)) in the order in which they are written."""
    products = {(i, j): a[i] * b[j] for i, j in pairs}
    values = {f"P{i}{j}": [("tens", p // 10), ("units", p % 10)] for (i, j), p in products.items()}
    result, carry = [products[0, 0] % 10], torch.zeros_like(a[0])
    for k in range(1, width):
        units = [p % 10 for (i, j), p in products.items() if i + j == k]
        tens = [p // 10 for (i, j), p in products.items() if i + j == k - 1]
        total = sum([*units, *tens], carry)
        carry = total // 10
        digit = ("digit", total % 10)
        values[f"C{k}"] = [("carry", carry), digit] if k < width - 1 else [digit]
        result.append(total % 10)
    values[RESULT] = [(f"result {k}", digit) for k, digit in enumerate(result)]
    return values


def _supervision(tag: str, kind: str, pairs: Sequence[tuple[int, int]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a digit is computed from, and what it can be had back from.

    Products come from the problem, a column's sum from products and the carry before it, results from sums. A digit
    of a sum stands again in the result; a carry is what the next column's sum has beyond its products.
    """
    if tag.startswith("P"):
        return (), ()
    if tag == RESULT:
        place = int(kind.removeprefix("result "))
        return ((f"C{place}",) if place else ("P00",)), ()
    place = int(tag.removeprefix("C"))
    parents = _summed(place, pairs) if place == 1 else (*_summed(place, pairs), f"C{place - 1}")
    return parents, (RESULT,) if kind == "digit" else (*_summed(place + 1, pairs), f"C{place + 1}")


def _summed(place: int, pairs: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Products of which a digit goes into a column: units of their own place, tens of the one before."""
    return tuple(f"P{i}{j}" for i, j in pairs if i + j in (place, place - 1))
