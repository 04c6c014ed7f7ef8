"""Several questions about one context in one row, each as if it were asked alone.

Packed the plain way, a question sees the questions and answers before it. Answers are then found in other questions,
and the image or caption is hardly read: in trials here a model never learned to look some attributes up, at any length
of training, and learned it in a few hundred steps once questions no longer saw one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORED = -100
"""The label of tokens that are not to be predicted."""
_SHARED, _NOWHERE = 0, -1


@dataclass
class Row:
    """What all questions see, and the questions with their answers, in the order in which they are added."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    """Which question a token belongs to, counted from 1; 0 for what all see."""

    def show(self, tokens: Sequence[int]) -> None:
        """Tokens that all later questions see."""
        self._add(tokens, [IGNORED] * len(tokens), _SHARED)

    def ask(self, question: Sequence[int], answer: Sequence[int]) -> None:
        """A question and its answer, which is labelled.

        With no question, the answer's first token is not labelled: the token before it is another question's.
        """
        given = len(question) or 1
        whole = [*question, *answer]
        self._add(whole, [*[IGNORED] * given, *whole[given:]], max(self.segments, default=_SHARED) + 1)

    def _add(self, tokens: Sequence[int], labels: Iterable[int], segment: int) -> None:
        first = self.segments.count(_SHARED)
        self.tokens += tokens
        self.labels += labels
        self.positions += range(first, first + len(tokens))
        self.segments += [segment] * len(tokens)


def pack(rows: Sequence[Row], pad: int, length: int | None = None) -> dict[str, Tensor]:
    """Rows padded on the right with the token `pad`, cut at `length`.

    A question sees what was shown before it and itself, and its positions follow on what was shown. Returns
    `input_ids`, `position_ids` and `labels` of (rows, tokens), and `attention_mask` of (rows, 1, tokens, tokens), float
    32: what is added to attention's scores.
    """
    longest = min(length or 2**31, max(len(row.tokens) for row in rows))

    def filled(parts: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([(part + [value] * longest)[:longest] for part in parts])

    segments = filled((row.segments for row in rows), _NOWHERE)
    before = torch.ones(longest, longest, dtype=torch.bool).tril()
    of, by = segments.unsqueeze(1), segments.unsqueeze(2)
    seen = before & ((of == _SHARED) | (of == by)) & (of != _NOWHERE) | torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {
        "input_ids": filled((row.tokens for row in rows), pad),
        "position_ids": filled((row.positions for row in rows), 0),
        "labels": filled((row.labels for row in rows), IGNORED),
        "attention_mask": mask.unsqueeze(1),
    }
