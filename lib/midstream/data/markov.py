"""A Markov source: the smallest language whose true probabilities are known."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def markov_source(vocabulary: int, seed: int) -> Tensor:
    """Log-probabilities of the next token, (token, next token); token 0 also begins every sequence."""
    rows = np.random.default_rng(seed).dirichlet(np.full(vocabulary, 0.5), size=vocabulary)
    return torch.tensor(rows).clamp(min=1e-6).log().log_softmax(-1)


def source_batches(source: Tensor, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of sequences of the source behind token 0, (rows, length + 1)."""
    random = torch.Generator().manual_seed(seed)
    while True:
        tokens = [torch.zeros(rows, 1, dtype=torch.long)]
        for _ in range(length):
            tokens.append(torch.multinomial(source[tokens[-1][:, 0]].exp(), 1, generator=random))
        yield torch.cat(tokens, 1)


def source_nll(source: Tensor, tokens: Tensor) -> Tensor:
    """The true -ln p (rows,) of sequences (rows, length) that stand behind token 0."""
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    return -source[before, tokens].sum(1)
