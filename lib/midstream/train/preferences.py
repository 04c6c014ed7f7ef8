"""Learning from prompts with answers and from pairs of answers, one of which is preferred; sampling answers.

Direct preference optimisation: Rafailov et al., 2023, arXiv 2305.18290.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.utils.rnn import pad_sequence

from midstream.train.packing import IGNORED

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each (rows, tokens)."""
Rows = Iterator[tuple[list[int], list[int]]]
"""Prompts and answers as tokens."""


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, with what the tokenizer puts before a text, and of an answer with the end token."""
    ended = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return _start(tokenizer, prompt), ended


def _start(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens; an end token that the tokenizer adds is taken off."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Prompts with answers, padded on the right; only answers are labelled."""
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in rows]
    labels = [torch.tensor([*[IGNORED] * len(prompt), *answer]) for prompt, answer in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def batches_of(rows: Rows, size: int, rng: random.Random) -> Iterator[Batch]:
    """Batches of `size` rows that are about equally long, to save padding."""
    while True:
        pool = sorted((next(rows) for _ in range(8 * size)), key=lambda row: len(row[0]) + len(row[1]))
        made = [pool[start : start + size] for start in range(0, len(pool), size)]
        yield from map(collate, rng.sample(made, len(made)))


def answer_log_probs(model: Any, batch: Batch) -> Tensor:
    """log p(answer | prompt) of every row: (rows,), sums over tokens, in nats."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none")
    return -losses.sum(1)


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """−log p(answer | prompt) per labelled token of the batch, in nats."""
    return -answer_log_probs(model, batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum()


def by_pair(log_probs: Tensor) -> Tensor:
    """Log-probabilities of a batch that holds all chosen answers and then all rejected ones, as (pairs, 2)."""
    return rearrange(log_probs, "(side pairs) -> pairs side", side=2)


def preference_logit(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """β [log π/π_ref (chosen) − log π/π_ref (rejected)] of log-probabilities (…, 2): first the chosen answer's."""
    ratios = policy - reference
    return beta * (ratios[..., 0] - ratios[..., 1])


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The mean of −log σ of `preference_logit`: log 2 where the policy is the reference."""
    return -logsigmoid(preference_logit(policy, reference, beta)).mean()


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    most: int,
    seed: int,
    temperature: float,
    top_p: float,
    batch: int,
) -> list[str]:
    """One answer to each prompt, of at most `most` tokens, without what the tokenizer marks as special.

    Prompts of similar length are read together; the seed fixes all answers.
    """
    starts = [torch.tensor(_start(tokenizer, prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(starts[row]))
    answers = [""] * len(prompts)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            inputs = pad_sequence([starts[row] for row in rows], batch_first=True, padding_side="left")
            real = pad_sequence([torch.ones_like(starts[row]) for row in rows], batch_first=True, padding_side="left")
            made = model.generate(
                input_ids=inputs.to(model.device),
                attention_mask=real.to(model.device),
                max_new_tokens=most,
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[:, inputs.shape[1] :]
            for row, text in zip(rows, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                answers[row] = text.strip()
    return answers
