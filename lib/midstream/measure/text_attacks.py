"""Attacks on text that hides something: words exchanged by an encoder or a masked language model, and pasted text.

`tokenizer` is that of the model that wrote the text, `tokens` (text,) its ids; what exchanges words reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Replacer = Callable[[Tensor, Sequence[int]], dict[int, int]]
"""Proposes, for positions of a text's tokens (text,), a substitute token each, where it has an acceptable one."""
_PHRASE = 6


@dataclass(frozen=True)
class Thesaurus:
    """Words that are one token for the generator and one for an encoder, with the encoder's embedding of them."""

    tokens: Tensor
    """(words,) the generator's tokens, each with its leading space"""
    vectors: Tensor
    """(words, width), of length 1"""

    def neighbours(self, token: int, count: int) -> list[int]:
        """The generator's tokens of the `count` nearest other words; none for a token that is no such word."""
        place = (self.tokens == token).nonzero().flatten()
        if not len(place):
            return []
        nearest = (self.vectors @ self.vectors[place[0]]).topk(min(count + 1, len(self.tokens))).indices
        return [found for found in self.tokens[nearest].tolist() if found != token][:count]


def thesaurus(encoder: Any, tokenizer: Any) -> Thesaurus:
    """The shared words of a sentence encoder and a generator's tokenizer."""
    ids = sorted(tokenizer.get_vocab().values())
    words = dict(zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True))
    words = {i: word for i, word in words.items() if word[:1] == " " and word[1:].isalpha() and word[1:].islower()}
    pieces = encoder.tokenizer(list(words.values()), add_special_tokens=False).input_ids
    shared = {i: piece[0] for i, piece in zip(words, pieces, strict=True) if len(piece) == 1}
    table = encoder.model.get_input_embeddings().weight.detach().float().cpu()
    vectors = torch.nn.functional.normalize(table[list(shared.values())], dim=-1)
    return Thesaurus(torch.tensor(list(shared)), vectors)


def neighbour_words(
    encoder: Any, tokenizer: Any, words: Thesaurus, least: float, tokens: Tensor, positions: Sequence[int]
) -> dict[int, int]:
    """Substitutes that leave the phrase around a word at least as similar as `least`, the nearest neighbour first."""
    tries: list[tuple[int, int, str]] = []
    for position in positions:
        low, high = max(0, position - _PHRASE), position + _PHRASE + 1
        for other in (int(tokens[position]), *words.neighbours(int(tokens[position]), 3)):
            phrase = torch.cat([tokens[low:position], torch.tensor([other]), tokens[position + 1 : high]])
            tries.append((position, other, tokenizer.decode(phrase)))
    vectors = encoder.encode([phrase for *_, phrase in tries])
    found: dict[int, int] = {}
    for i, (position, other, _) in enumerate(tries):
        if other == int(tokens[position]):
            original = vectors[i]
        elif position not in found and float(vectors[i] @ original) >= least:
            found[position] = other
    return found


@torch.no_grad()
def masked_words(
    filler: Any, tokenizer: Any, margin: float, tokens: Tensor, positions: Sequence[int]
) -> dict[int, int]:
    """A masked language model's best other word at each position, if its logit is within `margin` of the original's.

    The original keeps its logit. Only words that are one token on both sides, with a leading space, are exchanged.
    """
    found: dict[int, int] = {}
    for position in positions:
        word = tokenizer.decode(tokens[position : position + 1])
        piece = filler.tokenizer(word, add_special_tokens=False).input_ids
        if len(piece) != 1 or not (word[:1] == " " and word[1:].isalpha()):
            continue
        before, after = tokenizer.decode(tokens[:position]), tokenizer.decode(tokens[position + 1 :])
        mask = filler.tokenizer.mask_token
        ids = filler.tokenizer(f"{before} {mask}{after}", return_tensors="pt", truncation=True).to(filler.model.device)
        place = (ids.input_ids[0] == filler.tokenizer.mask_token_id).nonzero().flatten()
        if len(place):
            logits = filler.model(**ids).logits[0, place[0]].float().cpu()
            other = best_substitute(logits, piece[0], margin, partial(_as_token, tokenizer, filler.tokenizer))
            if other is not None:
                found[position] = other
    return found


def best_substitute(logits: Tensor, original: int, margin: float, translate: Callable[[int], int | None]) -> int | None:
    """The likeliest other token (vocabulary,) with a translation, unless it is more than `margin` less likely."""
    for candidate in logits.topk(min(20, len(logits))).indices.tolist():
        if candidate != original and logits[candidate] >= logits[original] - margin:
            translation = translate(candidate)
            if translation is not None:
                return translation
    return None


def _as_token(tokenizer: Any, other: Any, piece: int) -> int | None:
    """The generator's token of another tokenizer's whole word, with its leading space."""
    word = other.decode([piece]).strip()
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids if word.isalpha() else []
    return ids[0] if len(ids) == 1 else None


def replacer(attacker: Any, tokenizer: Any, *, margin: float, similarity: float) -> Replacer:
    """The substitution attack of a masked language model, or of a sentence encoder where it is none."""
    if type(attacker.model).__name__.endswith("MaskedLM"):
        return partial(masked_words, attacker, tokenizer, margin)
    return partial(neighbour_words, attacker, tokenizer, thesaurus(attacker, tokenizer), similarity)


def substitute(
    tokens: Tensor, replace: Replacer, rates: Sequence[float], generator: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """The text with a share of its tokens exchanged, for ascending `rates`, with the share that really was.

    Positions come in a random order and higher rates exchange what lower ones do and more. Of twice as many positions
    as the highest rate needs, some have no acceptable substitute; where too few have, the share stays lower.
    """
    order = torch.randperm(len(tokens), generator=generator)[: round(2 * max(rates) * len(tokens))].tolist()
    found = replace(tokens, order)
    usable = [position for position in order if position in found]
    for rate in rates:
        changed = tokens.clone()
        chosen = usable[: round(rate * len(tokens))]
        for position in chosen:
            changed[position] = found[position]
        yield len(chosen) / len(tokens), changed


def paste(tokenizer: Any, text: str, human: Tensor, share: float, length: int) -> str:
    """The text in the middle of human text (tokens,), which makes up `share` of the whole; `length` is the text's."""
    count = round(length * share / (1 - share))
    before, after = human[: count // 2], human[count // 2 : count]
    return f"{tokenizer.decode(before)}{text} {tokenizer.decode(after)}"
