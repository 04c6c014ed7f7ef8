"""All token sequences of one length as a space: drawn from a causal language model, read by one, or enumerated.

A sequence x of T tokens stands after a prefix that belongs to every sequence; its negative log-likelihood is
z(x) = -Σ_t ln p(x_t | prefix, x_<t), in nats. No token of the vocabulary is left out, so that Σ_x exp(-z(x)) = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midstream.errors import RequestError

LARGEST_SPACE = 3_000_000
"""Sequences that an enumeration may have."""


@torch.no_grad()
def draw(
    model: Any, prefix: Tensor, *, count: int, length: int, seed: int, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Ancestral sampling at temperature 1, untruncated: tokens (count, length) and their z (count,) in float64.

    Top-k or top-p sampling would leave parts of the space unreachable, and no weight could bring them back. Draws are
    made on the CPU, so that a seed means the same on every device; `prefix` is (tokens,).
    """
    random = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    drawn = [_draw_batch(model, prefix, size, length, random) for size in sizes]
    tokens, nll = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(nll)


def _draw_batch(model: Any, prefix: Tensor, rows: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    fed, cache = prefix.expand(rows, -1).to(model.device), None
    tokens, nll = [], torch.zeros(rows, dtype=torch.float64)
    for _ in range(length):
        out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        log_probs = out.logits[:, -1].float().log_softmax(-1).cpu()  # (rows, vocabulary)
        token = torch.multinomial(log_probs.exp(), 1, generator=random)
        nll -= log_probs.gather(1, token)[:, 0].double()
        tokens.append(token)
        fed = token.to(model.device)
    return torch.cat(tokens, 1), nll


@torch.no_grad()
def read(model: Any, prefix: Tensor, tokens: Tensor, batch_size: int = 32) -> Tensor:
    """z (count,) of given sequences (count, length) by any model of the same vocabulary, in float64."""
    parts = []
    for batch in tokens.split(batch_size):
        log_probs = _log_probs(model, prefix, batch)[:, :-1]  # (batch, length, vocabulary)
        chosen = log_probs.gather(2, batch[..., None].to(log_probs.device))[..., 0]
        parts.append(-chosen.double().sum(1).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _log_probs(model: Any, prefix: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the token at each place of a sequence and of the one after it, (rows, length + 1, V)."""
    ids = torch.cat([prefix.expand(len(tokens), -1), tokens], 1).to(model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits.float().log_softmax(-1)


def every_sequence(vocabulary: int, length: int) -> Tensor:
    """All sequences, (vocabulary ** length, length), the last token changing fastest.

    Raises `RequestError` for a space of more than `LARGEST_SPACE` sequences.
    """
    if vocabulary**length > LARGEST_SPACE:
        raise RequestError(
            f"{vocabulary} tokens at length {length} make {vocabulary**length:,} sequences, more than can be "
            f"enumerated here ({LARGEST_SPACE:,}); take a smaller vocabulary or length."
        )
    places = [torch.arange(vocabulary)] * length
    return torch.cartesian_prod(*places).view(-1, length)


@torch.no_grad()
def every_nll(model: Any, prefix: Tensor, vocabulary: int, length: int, batch_size: int = 8192) -> Tensor:
    """z of all sequences in the order of `every_sequence`, (vocabulary ** length,), in float64.

    Sequences that differ in their last token alone share one forward pass.
    """
    parts = []
    for batch in every_sequence(vocabulary, length)[::vocabulary, :-1].split(batch_size):
        log_probs = _log_probs(model, prefix, batch).double().cpu()  # (batch, length, vocabulary)
        before = log_probs[:, :-1].gather(2, batch[..., None]).sum((1, 2))
        parts.append(-(before[:, None] + log_probs[:, -1]).flatten())
    return torch.cat(parts)


def index_of(tokens: Tensor, vocabulary: int) -> Tensor:
    """The place of sequences (count, length) in `every_sequence`, (count,)."""
    powers = vocabulary ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * powers).sum(1)
