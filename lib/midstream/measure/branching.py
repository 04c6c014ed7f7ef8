"""Many answers to one prompt: its cache is read once, and each answer branches off with a first token of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midstream.hooks.kv import copy
from midstream.measure.icl import Cache


@dataclass(frozen=True)
class Form:
    """How answers stand in a numbered list: `opener`, with the item's number, then the answer, then `closer`."""

    opener: str
    closer: str
    stop: str

    def open(self, number: int) -> str:
        """What stands before answer `number`."""
        return self.opener.format(number=number)


@dataclass(frozen=True)
class Answer:
    """One decoded answer: its first token, text, whether it was closed, mean log-probability and token count."""

    token: int
    text: str
    closed: bool
    log_probability: float
    tokens: int


@dataclass
class Explorer:
    """One prompt in front of a model: the initial query's logits and cache, and greedy answers by first token."""

    model: Any
    tokenizer: Any
    form: Form
    text: str
    ids: list[int]
    cache: Cache
    logits: Tensor
    known: dict[int, Answer] = field(default_factory=dict)


@torch.no_grad()
def explorer(loaded: Any, prompt: str, form: Form) -> Explorer:
    """Reads a prompt and the list's first opener."""
    text = prompt + form.open(1)
    ids = loaded.tokenizer(text).input_ids
    output = loaded.model(torch.tensor([ids], device=loaded.model.device), use_cache=True, logits_to_keep=1)
    logits = output.logits[0, -1].float().cpu()
    return Explorer(loaded.model, loaded.tokenizer, form, text, ids, output.past_key_values, logits)


Choose = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The best token of each row (rows, vocabulary)."""
    return logits.argmax(-1)


def nucleus(temperature: float, top_p: float, generator: torch.Generator) -> Choose:
    """Draws one token a row from the smallest set of tokens that holds the mass `top_p` at a temperature."""

    def choose(logits: Tensor) -> Tensor:
        chances, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
        before = chances.cumsum(-1) - chances
        drawn = torch.multinomial(chances.masked_fill(before >= top_p, 0), 1, generator=generator)
        return order.gather(-1, drawn)[:, 0]

    return choose


def branch(rows: Sequence[tuple[Explorer, int]], choose: Choose, max_tokens: int, batch_size: int) -> list[Answer]:
    """Continues each explorer's *initial* prompt from a first token; rows of equally long prompts run together."""
    answers: dict[int, Answer] = {}
    for length in dict.fromkeys(len(start.ids) for start, _ in rows):
        same = [i for i, (start, _) in enumerate(rows) if len(start.ids) == length]
        for at in range(0, len(same), batch_size):
            chosen = same[at : at + batch_size]
            answers.update(zip(chosen, _branch([rows[i] for i in chosen], choose, max_tokens), strict=True))
    return [answers[i] for i in range(len(rows))]


@torch.no_grad()
def _branch(rows: Sequence[tuple[Explorer, int]], choose: Choose, max_tokens: int) -> list[Answer]:
    start, position = rows[0][0], len(rows[0][0].ids)
    tokens = [[token] for _, token in rows]
    scores = [[float(own.logits.log_softmax(-1)[token])] for own, token in rows]
    going = [i for i in range(len(rows)) if not _ended(start, tokens[i])]
    cache = _side_by_side([rows[i][0].cache for i in going])
    for step in range(max_tokens - 1):
        if not going:
            break
        last = torch.tensor([tokens[i][-1:] for i in going], device=start.model.device)
        positions = torch.full_like(last, position + step)
        output = start.model(last, past_key_values=cache, position_ids=positions, use_cache=True)
        logits = output.logits[:, -1].float().cpu()
        chosen = choose(logits)
        gained = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        for i, token, score in zip(going, chosen.tolist(), gained.tolist(), strict=True):
            tokens[i].append(token)
            scores[i].append(score)
        still = [k for k, i in enumerate(going) if not _ended(start, tokens[i])]
        if 0 < len(still) < len(going):
            cache.batch_select_indices(torch.tensor(still, device=last.device))
        going = [going[k] for k in still]
    return [_answer(start, own, score) for own, score in zip(tokens, scores, strict=True)]


def _side_by_side(caches: Sequence[Cache]) -> Cache:
    """One cache whose rows are the given single rows."""
    if not caches:
        return None
    joined = copy(caches[0])
    for number, layer in enumerate(joined.layers):
        layer.keys = torch.cat([cache.layers[number].keys for cache in caches])
        layer.values = torch.cat([cache.layers[number].values for cache in caches])
    return joined


def _ended(start: Explorer, tokens: list[int]) -> bool:
    return tokens[-1] in start.tokenizer.all_special_ids or start.form.stop in start.tokenizer.decode(tokens)


def _answer(start: Explorer, tokens: list[int], scores: list[float]) -> Answer:
    whole = start.tokenizer.decode(tokens, skip_special_tokens=True)
    text, stop, _ = whole.partition(start.form.stop)
    return Answer(tokens[0], text.strip(), bool(stop), float(np.mean(scores)), len(tokens))
