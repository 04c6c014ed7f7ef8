"""Balance-Marking hides a message of k bits in generated text by avoiding, at each step, one half of the vocabulary.

The halves are drawn by a key, the message and the last token, and are balanced: they weigh the same under a small
proxy model, so that whichever half a message asks for, a likely word is left.

Reference: Wang et al., "Towards Codable Watermarking for Injecting Multi-bits Information to LLMs", ICLR 2024,
arXiv 2307.15992. Symbols and constants are those of the paper and of its released code.

Glossary (symbol → name here → shape)
    m         message            (rows,) an integer below 2^k
    k         bits               length of the message
    T         tokens that carry  k · ratio; 1 / ratio is the coding rate in bits per token
    s         context_seed       (rows,) hash of the last token, 32 bits
    a(s, m)   message_partition  (rows,) or (rows, 2^k): which of A = 100 orders of the vocabulary m uses after s
    π(s, a)   order_key          (…,) the order itself: tokens sorted by a hash of (s, a, token)
    p̂         weights            (rows, top) proxy's next-token probabilities as integers, summing to about 2^40
    V_m       available          (rows, candidates) tokens of the heavier-ended half: Σ p̂ up to and with it ≥ 1/2
    δ         delta              (rows,) what unavailable logits lose (Vanilla-Marking: what available ones gain)
    n         context            how many last generated tokens the proxy sees

Deviations
    - The hash is splitmix64's finalizer, documented at `mix`, in place of the released code's own; orders come from
      sorting hashed keys, not from a seeded generator's permutation, so that one token's place costs no full sort.
    - Cumulative proxy mass is summed in integers: encoder and decoder then agree to the last bit, in any order.
    - Off the `paper` preset the proxy's distribution is cut to its `proxy_top` tokens and scaled to sum to one; the
      rest weighs nothing but keeps its place in the order.
    - Offline the proxy is the generator itself (SmolLM2-135M) reading n tokens only; the paper's is ten times smaller
      than its generator. Its prompts are 300 tokens of C4 news and its search has 4 beams; here prompts are the first
      tokens of review sentences, written on greedily, and `paper` takes AG News and 4 beams.
    - The subtractive repetition penalty counts generated tokens only and comes before the mark (both inferred).
    - The released decoder drops the last token; here every token behind the skipped ones votes.
    - The released substitution attack sets the original token's logit to −∞ before comparing candidates with it, so
      that its threshold never binds; here the original keeps its logit. Offline, where no masked language model is at
      hand, words are exchanged for their nearest neighbours in a sentence encoder's embedding, and an exchange counts
      only if the encoder finds the phrase around it still similar.
    - Texts are decoded from text, tokenized anew, unless "from token ids" is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from midstream import data, zoo
from midstream.claims import Claim, Comparison, Control
from midstream.errors import RequestError
from midstream.hooks import route
from midstream.measure import Interval, paired_interval, t_interval
from midstream.measure.likelihood import other_nll, token_nll
from midstream.measure.text_attacks import Replacer, paste, replacer, substitute
from midstream.paper import PaperParams, Preset, Result

# ---------------------------------------------------------------------------------------------- parameters

PARTITIONS = 100
"""A: orders of the vocabulary per context; 2^k messages share them, so decoding tests 100 sets, not 2^k."""
KEY = 42
"""The secret key of the released code's defaults."""


class Params(PaperParams):
    """Knobs of the experiment; the defaults are the `quick` preset."""

    model: str = Field("smollm2", min_length=1, description="the generator: a causal language model")
    proxy: str = Field("smollm2", min_length=1, description="the proxy: a causal language model of the same tokens")
    oracles: tuple[str, ...] = Field((), description="models that judge quality beside the unmarked generator")
    judged_texts: int = Field(4, ge=1, le=1000, description="texts per seed and δ that these further models read")
    attacker: str = Field("minilm", min_length=1, description="substitutes words: sentence encoder or masked LM")
    data: str = Field("movies", min_length=1, description="where prompts and human text come from")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of generator, proxy and oracles")
    bits: int = Field(4, ge=1, le=20, description="k, bits per message; a text carries one message")
    ratio: int = Field(5, ge=2, le=50, description="tokens per bit; the coding rate is its inverse")
    deltas: tuple[float, ...] = Field((2.0, 5.0), min_length=2, description="δ of Balance-Marking")
    vanilla_deltas: tuple[float, ...] = Field((1.0, 3.0), min_length=2, description="δ of Vanilla-Marking")
    attack_deltas: tuple[float, float] = Field((5.0, 3.0), description="δ attacked: Balance-, Vanilla-Marking")
    n_texts: int = Field(3, ge=1, le=1000, description="prompts and messages per seed and δ")
    prompt_tokens: int = Field(10, ge=1, le=1000, description="tokens of a prompt")
    context: int = Field(2, ge=1, le=100, description="n, generated tokens that the proxy sees")
    skip: int = Field(3, ge=1, le=100, description="first generated tokens that carry nothing; at least n")
    edited: int = Field(1000, ge=2, le=300_000, description="how many of the highest logits are edited")
    proxy_top: int = Field(1000, ge=2, le=300_000, description="tokens kept of the proxy's distribution")
    proxy_depths: tuple[int, ...] = Field((0,), description="smaller proxies: first layers read; 0 = word counts")
    rates: tuple[float, ...] = Field((0.3,), min_length=1, description="shares of tokens that are substituted")
    human: tuple[float, ...] = Field((0.5,), min_length=1, description="shares of human text around a marked text")
    cuts: tuple[float, ...] = Field((0.25,), min_length=1, description="shares of a text cut off at its beginning")
    similarity: float = Field(0.8, ge=-1, le=1, description="least similarity of a phrase with a word exchanged")
    margin: float = Field(1.0, ge=0, le=100, description="logits a masked LM's substitute may lie below the original")
    batch_texts: int = Field(64, ge=1, le=1000, description="prompts that are continued at once, in all arms")
    repetition: float = Field(1.5, ge=0, le=100, description="what logits of tokens already written lose")
    beams: int = Field(1, ge=1, le=16, description="beams of the search")
    timed_texts: int = Field(1, ge=1, le=100, description="texts per seed that are timed")
    timed_tokens: int = Field(6, ge=1, le=1000, description="tokens that carry, of each timed text")

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.skip < self.context:
            raise ValueError(
                f"skip ({self.skip}) must be at least context ({self.context}): the proxy needs its tokens"
            )
        for name, deltas, attacked in zip(
            ("deltas", "vanilla_deltas"), (self.deltas, self.vanilla_deltas), self.attack_deltas, strict=True
        ):
            if attacked not in deltas:
                raise ValueError(f"attack_deltas names {attacked:g}, which is not one of {name}")
        return self

    @property
    def length(self) -> int:
        """Generated tokens of a text: those skipped and k · ratio that carry."""
        return self.skip + self.bits * self.ratio


_FULL = Params(
    n_seeds=5,
    oracles=("gemma3-270m",),
    precision="bfloat16",
    bits=8,
    ratio=10,
    deltas=(0.5, 1.0, 1.5, 2.0),
    vanilla_deltas=(0.5, 1.0, 1.5, 2.0),
    attack_deltas=(2.0, 2.0),
    n_texts=8,
    prompt_tokens=12,
    context=5,
    skip=10,
    proxy_depths=(0, 10, 20),
    rates=(0.1, 0.2, 0.3),
    human=(0.5, 0.75),
    cuts=(0.25, 0.5),
    timed_tokens=24,
)
_PAPER = Params(
    model="facebook/opt-1.3b",
    proxy="openai-community/gpt2",
    oracles=("facebook/opt-2.7b",),
    judged_texts=100,
    attacker="FacebookAI/roberta-base",
    data="ag_news",
    precision="bfloat16",
    n_seeds=5,
    bits=20,
    ratio=10,
    deltas=(0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    vanilla_deltas=(0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    attack_deltas=(1.5, 1.5),
    n_texts=100,
    prompt_tokens=300,
    context=10,
    skip=10,
    proxy_top=60_000,
    proxy_depths=(0, 6),
    rates=(0.05, 0.1, 0.2, 0.3),
    human=(0.5, 0.75),
    cuts=(0.25, 0.5),
    batch_texts=4,
    beams=4,
    timed_texts=10,
    timed_tokens=200,
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(Params(), "4 bits in 20 tokens, three seeds: see the method at work", minutes=1, memory_gib=4),
    "full": Preset(_FULL, "8 bits in 80 tokens, five seeds: settle the claims", minutes=45, memory_gib=12),
    "paper": Preset(
        _PAPER,
        "20 bits in 200 tokens of OPT-1.3B with GPT-2 as proxy",
        minutes=1200,
        memory_gib=80,
        needs="OPT-1.3B, OPT-2.7B, GPT-2, RoBERTa and AG News from the Hub and a GPU with 80 GiB",
        gpus=1,
    ),
}


def revisions(params: Params) -> dict[str, str]:
    """The pinned revision of every model and of the data set a run loads."""
    models = dict.fromkeys((params.model, params.proxy, params.attacker, *params.oracles))
    return {**{name: zoo.revision(name) for name in models}, params.data: data.revision(params.data)}


# --------------------------------------------------------------------------------------------------- the hash

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_POSITIVE = 2**63 - 1


def mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers, any shape.

    x ← (x ⊕ x≫30) · BF58476D1CE4E5B9; x ← (x ⊕ x≫27) · 94D049BB133111EB; x ← x ⊕ x≫31, all modulo 2^64 with
    logical shifts. Tensors hold it as signed int64; products wrap, so that every device gives the same bits.
    """
    for shift, factor in _ROUNDS:
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def hashed(*parts: Tensor | int) -> Tensor:
    """A non-negative 63-bit hash of integers that broadcast against each other: h ← mix(h + golden + part)."""
    state: Tensor | int = 0
    for part in parts:
        state = mix(torch.as_tensor(state + part + _GOLDEN))
    return torch.as_tensor(state) & _POSITIVE


def context_seed(last: Tensor, key: int = KEY) -> Tensor:
    """s, 32 bits, of the last token (…,)."""
    return hashed(last, key) & 0xFFFFFFFF


def message_partition(seed: Tensor, message: Tensor, bits: int) -> Tensor:
    """a(s, m) = H((s mod 2^(32−k)) · 2^k + m) mod 100; `seed` and `message` broadcast."""
    return hashed((seed & (2 ** (32 - bits) - 1)) * 2**bits + message) % PARTITIONS


def order_key(seed: Tensor, partition: Tensor, token: Tensor) -> Tensor:
    """Tokens sorted by this are the order π(s, a): mix(H(100 s + a) ⊕ golden · token); all broadcast."""
    return mix(hashed(PARTITIONS * seed + partition) ^ (token * _GOLDEN))


# -------------------------------------------------------------------------------------------------- the proxy

Weights = tuple[Tensor, Tensor]
"""A distribution as its likeliest tokens (rows, top) and their integer weights (rows, top)."""
_UNIT = 2**40
_REMEMBERED = 10**8
"""Token weights that a proxy keeps at most (1.6 GB); beyond, it forgets and starts anew."""


@dataclass
class Proxy:
    """p̂ of the next token from the last n generated tokens, nothing else: encoder and decoder see the same.

    `logits` maps windows (rows, n) to (rows, vocabulary). Windows already seen are remembered.
    """

    logits: Callable[[Tensor], Tensor]
    top: int = 1000
    batch_size: int = 64
    memo: dict[bytes, Weights] = field(default_factory=dict)

    def __call__(self, windows: Tensor) -> Weights:
        """Tokens and integer weights, (rows, top) each, after windows (rows, n)."""
        if len(self.memo) * self.top > _REMEMBERED:
            self.memo.clear()
        names = [row.tobytes() for row in windows.cpu().numpy()]
        new = {name: row for row, name in enumerate(names) if name not in self.memo}
        rows = list(new.values())
        for batch in (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)):
            tokens, weights = (part.cpu() for part in integer_weights(self.logits(windows[batch]), self.top))
            self.memo.update({names[i]: (t, w) for i, t, w in zip(batch, tokens, weights, strict=True)})
        found = [self.memo[name] for name in names]
        return (
            torch.stack([tokens for tokens, _ in found]).to(windows.device),
            torch.stack([weights for _, weights in found]).to(windows.device),
        )


def integer_weights(logits: Tensor, top: int) -> Weights:
    """The `top` likeliest tokens of each row and their probabilities among themselves, as shares of 2^40."""
    best = logits.float().topk(min(top, logits.shape[-1]), dim=-1)
    return best.indices, (best.values.double().softmax(-1) * _UNIT).round().long()


@torch.no_grad()
def model_logits(model: Any, windows: Tensor) -> Tensor:
    """Next-token logits (rows, vocabulary) after windows (rows, n) that stand alone."""
    return model(windows.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]


def early_logits(model: Any, layers: int, windows: Tensor) -> Tensor:
    """The same behind the first `layers` blocks, through the model's own norm and head."""
    with route(model, stop=layers - 1):
        return model_logits(model, windows)


def count_logits(counts: Tensor, windows: Tensor) -> Tensor:
    """The same distribution, log counts (vocabulary,), after every window: a proxy that reads nothing."""
    return counts.log().expand(len(windows), -1).to(windows.device)


def token_map(generator: Any, proxy: Any) -> Tensor | None:
    """For each token of the generator the proxy's id of the same string, or None where all ids agree.

    Raises `RequestError` for a proxy that lacks more than 1 % of the generator's tokens: it reads other ones.
    """
    ours, theirs = generator.get_vocab(), proxy.get_vocab()
    if all(theirs.get(token) == i for token, i in ours.items()):
        return None
    found = torch.full((max(ours.values()) + 1,), -1)
    for token, i in ours.items():
        found[i] = theirs.get(token, -1)
    missing = float((found < 0).float().mean())
    if missing > 0.01:
        raise RequestError(
            f"The proxy lacks {missing:.0%} of the generator's tokens; take one with the same tokenizer."
        )
    return found


def translated(logits: Callable[[Tensor], Tensor], ids: Tensor, windows: Tensor) -> Tensor:
    """A proxy's logits for the generator's windows and vocabulary, through a `token_map`; tokens it lacks get −∞."""
    ids = ids.to(windows.device)
    rows = logits(ids[windows].clamp(min=0))
    return torch.where(ids < 0, -torch.inf, rows[:, ids.clamp(min=0)])


# ---------------------------------------------------------------------------------------- marking: two schemes


class Scheme(Protocol):
    """Which tokens a message leaves available after a window, asked when writing and when reading."""

    bits: int
    context: int

    def available(self, windows: Tensor, messages: Tensor, candidates: Tensor) -> Tensor:
        """Which candidates (rows, candidates) are in V_m after windows (rows, n), for messages (rows,)."""

    def votes(self, windows: Tensor, tokens: Tensor) -> Tensor:
        """For which messages (positions, 2^k) each of the tokens (positions,) was available."""

    def tilt(self, available: Tensor) -> Tensor:
        """What δ is multiplied by."""


@dataclass
class Vanilla:
    """Vanilla-Marking: H(s, m, token) mod 2 decides, whatever the tokens' probabilities; available ones gain δ."""

    bits: int
    context: int = 1

    def available(self, windows: Tensor, messages: Tensor, candidates: Tensor) -> Tensor:
        """Which candidates hash to 1."""
        seed = context_seed(windows[:, -1])
        return hashed(seed[:, None], messages[:, None], candidates) % 2 == 1

    def votes(self, windows: Tensor, tokens: Tensor) -> Tensor:
        """The same hash for every message."""
        messages = torch.arange(2**self.bits, device=tokens.device)
        return hashed(context_seed(windows[:, -1])[:, None], messages, tokens[:, None]) % 2 == 1

    def tilt(self, available: Tensor) -> Tensor:
        """+δ where available."""
        return available.float()


@dataclass
class Balance:
    """Balance-Marking: in the order π(s, a(s, m)), tokens before half of the proxy's mass are unavailable: −δ."""

    bits: int
    proxy: Proxy
    context: int = 10
    memo: dict[bytes, Tensor] = field(default_factory=dict)

    def available(self, windows: Tensor, messages: Tensor, candidates: Tensor) -> Tensor:
        """Which candidates lie, in their message's order, where the inclusive cumulative mass is at least half."""
        top, weights = self.proxy(windows)
        seed = context_seed(windows[:, -1])[:, None]
        partition = message_partition(seed, messages[:, None], self.bits)
        keys, order = order_key(seed, partition, top).sort(-1)
        cumulative = torch.nn.functional.pad(weights.gather(1, order).cumsum(-1), (1, 0))
        before = torch.searchsorted(keys, order_key(seed, partition, candidates), right=True)
        return 2 * cumulative.gather(1, before) >= weights.sum(-1, keepdim=True)

    def votes(self, windows: Tensor, tokens: Tensor) -> Tensor:
        """One set test for each of the 100 orders of a position, then a gather over the messages."""
        seed = context_seed(windows[:, -1])[:, None]
        messages = torch.arange(2**self.bits, device=tokens.device)
        return self.open_orders(windows, tokens).gather(1, message_partition(seed, messages, self.bits))

    def open_orders(self, windows: Tensor, tokens: Tensor) -> Tensor:
        """In which of a position's 100 orders its token is available, (positions, 100); known positions are kept."""
        places = torch.cat([windows, tokens[:, None]], 1).cpu().numpy()
        names = [row.tobytes() for row in places]
        new = [i for i, name in enumerate(names) if name not in self.memo]
        if new:
            for i, (top, weights) in zip(new, zip(*self.proxy(windows[new]), strict=True), strict=True):
                self.memo[names[i]] = self._test(top, weights, context_seed(windows[i, -1]), tokens[i])
        return torch.stack([self.memo[name] for name in names])

    @staticmethod
    def _test(top: Tensor, weights: Tensor, seed: Tensor, token: Tensor) -> Tensor:
        orders = torch.arange(PARTITIONS, device=top.device)[:, None]
        up_to = order_key(seed, orders, top) <= order_key(seed, orders, token)  # (100, top)
        return 2 * (up_to * weights).sum(-1) >= weights.sum()

    def tilt(self, available: Tensor) -> Tensor:
        """−δ where unavailable."""
        return available.float() - 1


# ----------------------------------------------------------------------------------------------------- writing


class Marking(LogitsProcessor):
    """Marks what `generate` writes; for any causal language model, greedy, sampled or with beams.

    `messages` and `deltas` (rows,) are those of the prompts. Only the `edited` highest logits change, and none before
    `skip` tokens are generated. `start` is the length of the (padded) prompts, which the scheme never sees.
    """

    def __init__(
        self, scheme: Scheme, messages: Tensor, deltas: Tensor, *, start: int, skip: int = 10, edited: int = 1000
    ) -> None:
        self.scheme, self.messages, self.deltas = scheme, messages, deltas
        self.start, self.skip, self.edited = start, skip, edited
        self.available_mass: list[Tensor] = []
        """Per step the generator's probability (rows,) of what is available, before any logit is changed."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (rows, vocabulary) after the mark; beams of one prompt are neighbouring rows."""
        if input_ids.shape[1] - self.start < self.skip:
            return scores
        beams = len(input_ids) // len(self.messages)
        messages = self.messages.to(scores.device).repeat_interleave(beams)
        deltas = self.deltas.to(scores).repeat_interleave(beams)
        candidates = scores.topk(min(self.edited, scores.shape[1])).indices
        available = self.scheme.available(input_ids[:, -self.scheme.context :], messages, candidates)
        mass = scores.float().softmax(-1).gather(1, candidates)
        self.available_mass.append((mass * available).sum(-1).cpu())
        return scores.scatter_add(1, candidates, deltas[:, None] * self.scheme.tilt(available).to(scores))


class Repetition(LogitsProcessor):
    """Takes `penalty` off the logit of every token that was generated after the prompt."""

    def __init__(self, penalty: float, start: int) -> None:
        self.penalty, self.start = penalty, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (rows, vocabulary), each repeated token lowered once."""
        written = torch.zeros_like(scores).scatter_(1, input_ids[:, self.start :], 1.0)
        return scores - self.penalty * written


class Blocks(LogitsProcessor):
    """Several processors side by side in one batch: each has its own block of prompts."""

    def __init__(self, parts: Sequence[tuple[LogitsProcessor | None, int]]) -> None:
        self.parts = parts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (rows, vocabulary), every block by its own processor; None leaves its block alone."""
        beams = len(scores) // sum(rows for _, rows in self.parts)
        sizes = [rows * beams for _, rows in self.parts]
        blocks = zip(self.parts, input_ids.split(sizes), scores.split(sizes), strict=True)
        return torch.cat([block if part is None else part(ids, block) for (part, _), ids, block in blocks])  # type: ignore[arg-type]


@torch.no_grad()
def write(
    loaded: Any, prompts: Tensor, mark: LogitsProcessor, length: int, *, repetition: float = 0.0, beams: int = 1
) -> Tensor:
    """Continues prompts (rows, tokens) by exactly `length` tokens (rows, length); no special token is written."""
    model = loaded.model
    special = [i for i, token in loaded.tokenizer.added_tokens_decoder.items() if token.special]
    processors = LogitsProcessorList([Repetition(repetition, prompts.shape[1]), mark])
    ids = model.generate(
        prompts.to(model.device),
        attention_mask=torch.ones_like(prompts).to(model.device),
        logits_processor=processors,
        suppress_tokens=special or None,
        min_new_tokens=length,
        max_new_tokens=length,
        do_sample=False,
        num_beams=beams,
        pad_token_id=0,
    )
    return ids[:, prompts.shape[1] :].cpu()


# ----------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reading:
    """What a decoder says of one text: the likeliest message, and the softmax of the vote counts at it."""

    message: int
    confidence: float


def count_votes(scheme: Scheme, tokens: Tensor, ends: Sequence[int], skip: int = 10) -> Tensor:
    """Votes (ends, 2^k) for every message from tokens[skip : end], for each of the ascending `ends`.

    A token votes for all messages for which it was available. Tokens (text,) are the generated ones alone.
    """
    counts = [torch.zeros(2**scheme.bits, dtype=torch.long)]
    for start, end in pairwise([skip, *(max(skip, min(end, len(tokens))) for end in ends)]):
        total = counts[-1].clone()
        for positions in torch.arange(start, end).split(64):
            windows = torch.stack([tokens[i - scheme.context : i] for i in positions.tolist()])
            total += scheme.votes(windows, tokens[positions]).sum(0).cpu()
        counts.append(total)
    return torch.stack(counts[1:])


def read(counts: Tensor) -> Reading:
    """argmax over all messages of their votes (2^k,); among equals the smallest message."""
    chances = counts.double().softmax(0)
    best = int(counts.argmax())
    return Reading(best, float(chances[best]))


def decode(scheme: Scheme, tokens: Tensor, skip: int = 10) -> Reading:
    """The message in a text's tokens (text,)."""
    return read(count_votes(scheme, tokens, [len(tokens)], skip)[0])


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """A text's tokens (text,) without any special ones."""
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


# -------------------------------------------------------------------------------------------------- the experiment


@dataclass
class Bench:
    """Models and texts that all seeds share."""

    generator: Any
    oracles: dict[str, Any]
    replace: Replacer
    proxy_logits: dict[str, Callable[[Tensor], Tensor]]
    stream: Tensor
    """(tokens,) the data's test texts one after another"""
    starts: Tensor
    """(texts,) where each text begins in the stream, in an order that is the same everywhere"""
    params: Params

    def tokens(self, text: str) -> Tensor:
        """A text's tokens (text,) anew, where the generator is."""
        return tokenize(self.generator.tokenizer, text).to(self.generator.model.device)

    def schemes(self, name: str) -> Scheme:
        """A fresh scheme, with nothing remembered."""
        p = self.params
        if name == "vanilla":
            return Vanilla(p.bits)
        return Balance(p.bits, Proxy(self.proxy_logits[name], p.proxy_top), p.context)

    def marking(self, scheme: Scheme, messages: Tensor, deltas: Tensor) -> Marking:
        """The mark of a scheme for messages and δ (rows,) each, with this experiment's settings."""
        p = self.params
        return Marking(scheme, messages, deltas, start=p.prompt_tokens, skip=p.skip, edited=p.edited)


def prepare(params: Params) -> Bench:
    """Loads every model once and lays out the texts."""
    load = partial(zoo.load, device="auto", dtype=params.precision)
    models = {name: load(name) for name in dict.fromkeys((params.model, params.proxy, *params.oracles))}
    generator = models[params.model]
    attacker = zoo.load(params.attacker, device="auto")
    tokenizer = generator.tokenizer
    rows = [
        tokenize(tokenizer, f" {text}" if i else text)
        for i, text in enumerate(data.load(params.data, "test").table["text"])
    ]
    starts = torch.tensor([0, *(len(row) for row in rows[:-1])]).cumsum(0)
    return Bench(
        generator,
        {name: models[name] for name in params.oracles},
        replacer(attacker, tokenizer, margin=params.margin, similarity=params.similarity),
        proxies(generator, models[params.proxy], params),
        torch.cat(rows),
        starts,
        params,
    )


def proxies(generator: Any, proxy: Any, params: Params) -> dict[str, Callable[[Tensor], Tensor]]:
    """Logits of the whole proxy (`balance`) and of its smaller ones (`depth 0` counts words of the training split)."""
    made: dict[str, Callable[[Tensor], Tensor]] = {"balance": partial(model_logits, proxy.model)}
    for depth in params.proxy_depths:
        if depth:
            made[f"depth {depth}"] = partial(early_logits, proxy.model, depth)
    ids = token_map(generator.tokenizer, proxy.tokenizer)
    if ids is not None:
        made = {name: partial(translated, logits, ids) for name, logits in made.items()}
    if 0 in params.proxy_depths:
        texts = data.load(params.data, "train").table["text"].tolist()
        words = torch.tensor([i for row in generator.tokenizer(texts, add_special_tokens=False).input_ids for i in row])
        width = generator.model.get_output_embeddings().weight.shape[0]
        made["depth 0"] = partial(count_logits, torch.bincount(words, minlength=width).float())
    return made


@dataclass
class Batch:
    """What one seed writes: prompts (texts, prompt), messages (texts,), and tokens (texts, length) of every arm."""

    seed: int
    prompts: Tensor
    messages: Tensor
    human: Tensor
    """(pieces, tokens) human text that no prompt begins"""
    tokens: dict[tuple[str, float], Tensor] = field(default_factory=dict)
    """By (method, δ); ("none", 0) is unmarked."""
    mass: dict[str, list[Tensor]] = field(default_factory=dict)
    """By method: the generator's probability of what was available, step by step, (rows,) each"""
    schemes: dict[str, Scheme] = field(default_factory=dict)


_PIECES = 4
"""Human texts per seed that marked texts are pasted into, in turn."""


def draw(bench: Bench, seed: int) -> Batch:
    """This seed's own prompts (disjoint from all other seeds') and random messages."""
    p = bench.params
    longest = math.ceil(p.length * max(p.human) / (1 - max(p.human))) + 1
    fitting = bench.starts[bench.starts + max(longest, p.prompt_tokens) <= len(bench.stream)]
    per_seed = p.n_texts + _PIECES
    if (seed + 1) * per_seed > len(fitting):
        raise RequestError(
            f"{p.data} has {len(fitting)} texts to start from; seed {seed} needs {(seed + 1) * per_seed}."
        )
    own = fitting[torch.randperm(len(fitting), generator=torch.Generator().manual_seed(0))][seed * per_seed :]
    prompts = torch.stack([bench.stream[start : start + p.prompt_tokens] for start in own[: p.n_texts]])
    human = torch.stack([bench.stream[start : start + longest] for start in own[p.n_texts : per_seed]])
    messages = torch.randint(2**p.bits, (p.n_texts,), generator=torch.Generator().manual_seed(1000 + seed))
    return Batch(seed, prompts, messages, human)


def arms(params: Params) -> list[tuple[str, float]]:
    """All (method, δ): unmarked, both methods at each δ, and the smaller proxies at the δ that is attacked."""
    smaller = [(f"depth {depth}", params.attack_deltas[0]) for depth in params.proxy_depths]
    ours = [("balance", delta) for delta in params.deltas]
    return [("none", 0.0), *ours, *(("vanilla", delta) for delta in params.vanilla_deltas), *smaller]


def run_writing(bench: Bench, batch: Batch) -> None:
    """Writes the texts of all arms, `batch_texts` prompts of every arm at once, each arm by its own processor."""
    deltas: dict[str, list[float]] = {}
    for method, delta in arms(bench.params):
        deltas.setdefault(method, []).append(delta)
    batch.schemes = {method: bench.schemes(method) for method in deltas if method != "none"}
    texts = torch.arange(len(batch.prompts)).split(bench.params.batch_texts)
    written = torch.cat([_write_arms(bench, batch, deltas, some) for some in texts], 1)
    batch.tokens = dict(zip(arms(bench.params), written, strict=True))


def _write_arms(bench: Bench, batch: Batch, deltas: dict[str, list[float]], texts: Tensor) -> Tensor:
    """Tokens (arms, texts, length) of some of the prompts, in the order of `arms`."""
    p, marks = bench.params, dict[str, Marking]()
    for method, scheme in batch.schemes.items():
        per_row = torch.tensor(deltas[method]).repeat_interleave(len(texts))
        marks[method] = bench.marking(scheme, batch.messages[texts].repeat(len(deltas[method])), per_row)
    blocks = Blocks([(marks.get(method), len(texts) * len(each)) for method, each in deltas.items()])
    prompts = batch.prompts[texts].repeat(len(arms(p)), 1)
    written = write(bench.generator, prompts, blocks, p.length, repetition=p.repetition, beams=p.beams)
    for method, mark in marks.items():
        batch.mass.setdefault(method, []).extend(mark.available_mass)
    return written.unflatten(0, (-1, len(texts)))


def run_quality(bench: Bench, batch: Batch) -> Iterator[dict[str, Any]]:
    """Rows of mean NLL per arm, oracle and tokens per bit; a text of fewer tokens per bit is the beginning of one.

    The generator reads every text; the further oracles some texts of both methods, whole.
    """
    p = bench.params
    for (method, delta), tokens in batch.tokens.items():
        row = {"method": method, "delta": delta}
        pairs = zip(batch.prompts.split(8), tokens.split(8), strict=True)
        nll = torch.cat([token_nll(bench.generator, *pair) for pair in pairs])
        for ratio in ratios(p):
            carrying = nll[:, p.skip : p.skip + p.bits * ratio]
            yield {**row, "oracle": p.model, "ratio": ratio, "nll": float(carrying.mean())}
        if not method.startswith("depth"):
            for name, oracle in bench.oracles.items():
                yield {**row, "oracle": name, "ratio": p.ratio, "nll": _judged(bench, batch, oracle, tokens)}


def _judged(bench: Bench, batch: Batch, oracle: Any, tokens: Tensor) -> float:
    """Mean NLL in nats per generated token of the first texts of an arm, by another model."""
    count, in_words = bench.params.judged_texts, bench.generator.tokenizer.batch_decode
    pairs = zip(in_words(batch.prompts[:count]), in_words(tokens[:count]), strict=True)
    return float(np.mean([other_nll(oracle, prompt, text, tokens.shape[1]) for prompt, text in pairs]))


def ratios(params: Params) -> list[int]:
    """Tokens per bit at which texts are read: half of `ratio` and more, up to all of it."""
    return sorted({max(1, round(params.ratio * share)) for share in (0.25, 0.5, 0.75, 1.0)})


def run_decoding(bench: Bench, batch: Batch) -> Iterator[dict[str, Any]]:
    """Rows per arm and tokens per bit: exact messages, right bits, confidence, from token ids; unmarked text too."""
    p = bench.params
    ends = [p.skip + p.bits * ratio for ratio in ratios(p)]
    for (method, delta), written in batch.tokens.items():
        tokens = written.to(bench.generator.model.device)
        for reader in ("balance", "vanilla") if method == "none" else (method,):
            texts = [[read(votes) for votes in count_votes(batch.schemes[reader], row, ends, p.skip)] for row in tokens]
            for ratio, readings in zip(ratios(p), zip(*texts, strict=True), strict=True):
                row = {"method": method, "delta": delta, "reader": reader, "ratio": ratio}
                yield {**row, **_right(readings, batch.messages, p.bits)}


def _right(readings: Sequence[Reading], messages: Tensor, bits: int) -> dict[str, float]:
    """Shares of exact messages and of right bits, and the mean confidence."""
    pairs = [(reading.message, message) for reading, message in zip(readings, messages.tolist(), strict=True)]
    return {
        "success": float(np.mean([read == sent for read, sent in pairs])),
        "bits_right": float(np.mean([1 - (read ^ sent).bit_count() / bits for read, sent in pairs])),
        "confidence": float(np.mean([reading.confidence for reading in readings])),
    }


def run_attacks(bench: Bench, batch: Batch) -> Iterator[dict[str, Any]]:
    """Rows per method, attack and strength, all read from text: exact messages and how much was really changed."""
    p = bench.params
    for method, delta in zip(("balance", "vanilla"), p.attack_deltas, strict=True):
        outcomes: dict[tuple[str, float], list[tuple[float, str]]] = {}
        for i, tokens in enumerate(batch.tokens[method, delta]):
            for attack, strength, changed, text in attacked(bench, batch, tokens, i):
                outcomes.setdefault((attack, strength), []).append((changed, text))
        for (attack, strength), texts in outcomes.items():
            ids = [bench.tokens(text) for _, text in texts]
            readings = [decode(batch.schemes[method], row, p.skip) for row in ids]
            changed = float(np.mean([share for share, _ in texts]))
            row = {"method": method, "delta": delta, "attack": attack, "strength": strength, "changed": changed}
            yield {**row, **_right(readings, batch.messages, p.bits)}


def attacked(bench: Bench, batch: Batch, tokens: Tensor, i: int) -> Iterator[tuple[str, float, float, str]]:
    """(attack, strength, share really changed, text) for one text under every attack; strength 0 changes nothing."""
    p, tokenizer = bench.params, bench.generator.tokenizer
    text = tokenizer.decode(tokens)
    yield "none", 0.0, 0.0, text
    generator = torch.Generator().manual_seed(10_000 * batch.seed + i)
    for rate, (share, changed) in zip(p.rates, substitute(tokens, bench.replace, p.rates, generator), strict=True):
        yield "substitution", rate, share, tokenizer.decode(changed)
    for share in p.human:
        human = batch.human[i % len(batch.human)]
        yield "copy-paste", share, share, paste(tokenizer, text, human, share, len(tokens))
    for cut in p.cuts:
        yield "truncation", cut, cut, tokenizer.decode(tokens[round(cut * len(tokens)) :])


def run_drift(bench: Bench, batch: Batch) -> Iterator[dict[str, Any]]:
    """Rows per arm: how many texts tokenize anew into other tokens than were written."""
    tokenizer = bench.generator.tokenizer
    for (method, delta), tokens in batch.tokens.items():
        again = [tokenize(tokenizer, tokenizer.decode(row)) for row in tokens]
        other = [not torch.equal(row, ids) for row, ids in zip(tokens, again, strict=True)]
        yield {"method": method, "delta": delta, "drifted": float(np.mean(other))}


def run_mass(batch: Batch, bins: int = 20) -> Iterator[dict[str, Any]]:
    """Rows per method and bin: the share of steps at which what was available had that probability."""
    for method, steps in batch.mass.items():
        mass = torch.cat(steps)
        shares, edges = np.histogram(mass.numpy().clip(0, 1), bins=bins, range=(0, 1))
        for share, low in zip(shares / len(mass), edges[:-1], strict=True):
            yield {"method": method, "low": float(low), "share": float(share)}


def run_timing(bench: Bench, batch: Batch) -> Iterator[dict[str, Any]]:
    """Rows of seconds per token and text for writing and reading, with nothing remembered from before."""
    p, prompts = bench.params, batch.prompts[: bench.params.timed_texts]
    rows = len(prompts)
    for method in ("none", "vanilla", "balance"):
        mark = None
        if method != "none":
            mark = bench.marking(bench.schemes(method), batch.messages[:rows], torch.ones(rows))
        started = time.perf_counter()
        tokens = write(bench.generator, prompts, Blocks([(mark, rows)]), p.skip + p.timed_tokens, beams=p.beams)
        yield {"method": method, "stage": "write", "seconds": (time.perf_counter() - started) / tokens.numel()}
        if method != "none":
            scheme, started = bench.schemes(method), time.perf_counter()
            for row in tokens.to(bench.generator.model.device):
                decode(scheme, row, p.skip)
            yield {"method": method, "stage": "read", "seconds": (time.perf_counter() - started) / tokens.numel()}


def experiment(params: Params) -> Result:
    """Writes, reads, judges, attacks and times on every seed; tables have one row a seed and arm."""
    bench = prepare(params)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in params.seeds:
        batch = draw(bench, seed)
        run_writing(bench, batch)
        parts = {
            "decoding": run_decoding(bench, batch),
            "quality": run_quality(bench, batch),
            "attacks": run_attacks(bench, batch),
            "drift": run_drift(bench, batch),
            "mass": run_mass(batch),
            "timing": run_timing(bench, batch),
        }
        for name, part in parts.items():
            rows.setdefault(name, []).extend({"seed": seed, **row} for row in part)
    tables = {name: pd.DataFrame(entries) for name, entries in rows.items()}
    return Result(tables, {"bits": params.bits, "ratio": params.ratio, "chance": 2.0**-params.bits})


# ----------------------------------------------------------------------------------------------------- the claims

LEVELS = (0.5, 0.75)
"""Shares of exact messages at which qualities are compared; fixed before the full run."""


def frontier(result: Result, method: str, oracle: str, ratio: int, seed: int) -> pd.DataFrame:
    """Success and NLL of one method and seed by rising δ, from unmarked text (δ = 0, success of a guess) on.

    `fitted` is the success made monotone in δ (isotonic regression): the method's curve.
    """
    decoding, quality = result.tables["decoding"], result.tables["quality"]
    keys = ["seed", "method", "delta", "ratio"]
    both = decoding[decoding["reader"] == method].merge(quality[quality["oracle"] == oracle], on=keys)
    chosen = (both["seed"] == seed) & (both["ratio"] == ratio) & both["method"].isin(("none", method))
    curve = both[chosen].sort_values("delta", ignore_index=True)
    guess = curve["success"].where(curve["method"] != "none", result.scalars["chance"])
    fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(curve["delta"], guess)
    return curve.assign(success=guess, fitted=fitted)


def nll_at(curve: pd.DataFrame, level: float) -> float:
    """NLL at the smallest δ whose fitted success reaches `level`, linear between neighbouring δ; NaN if none does."""
    success, nll = curve["fitted"].to_numpy(), curve["nll"].to_numpy()
    reached = np.flatnonzero(success >= level)
    if not len(reached):
        return math.nan
    i = int(reached[0])
    if i == 0:
        return float(nll[0])
    share = (level - success[i - 1]) / (success[i] - success[i - 1])
    return float(nll[i - 1] + share * (nll[i] - nll[i - 1]))


def matched(result: Result, oracle: str, ratio: int, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """NLL of both methods at equal success, mean over `levels`: one row a seed, one column a method."""
    rows = {
        seed: {
            method: float(np.mean([nll_at(frontier(result, method, oracle, ratio, seed), level) for level in levels]))
            for method in ("balance", "vanilla")
        }
        for seed in sorted(result.tables["decoding"]["seed"].unique())
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def settings(result: Result) -> list[tuple[str, int]]:
    """(oracle, tokens per bit) at which quality is compared: all of a text for every oracle, half for the first."""
    quality = result.tables["quality"]
    whole, first = int(result.scalars["ratio"]), quality["oracle"].iloc[0]
    half = min(quality["ratio"].unique(), key=lambda ratio: abs(ratio - whole / 2))
    return [*((oracle, whole) for oracle in quality["oracle"].unique()), (first, int(half))]


def check_quality(result: Result) -> tuple[Comparison, ...]:
    """At equal success and coding rate, Vanilla-Marking's texts are less likely under the unmarked model."""
    made = []
    for oracle, ratio in settings(result):
        nll = matched(result, oracle, ratio)
        what = f"NLL by {oracle} at equal success, Vanilla − Balance, {1 / ratio:.2g} bit per token"
        made.append(Comparison(what, paired_interval(nll["vanilla"], nll["balance"]), unit="nats"))
    return tuple(made)


def _success(result: Result, method: str, ratio: int) -> pd.Series:
    """Messages that Balance-Marking's reader finds exactly in texts of a method, by seed, mean over all its δ.

    All δ, for a strong mark alone is read from half a text as well as from all of it.
    """
    table = result.tables["decoding"]
    chosen = (table["method"] == method) & (table["reader"] == "balance") & (table["ratio"] == ratio)
    return table[chosen].groupby("seed")["success"].mean()


def check_reading(result: Result) -> tuple[Comparison, ...]:
    """A message is read back exactly: more often than from unmarked text, and from the whole text than from half."""
    whole, half = int(result.scalars["ratio"]), settings(result)[-1][1]
    marked = _success(result, "balance", whole)
    return (
        Comparison("exact messages, marked − unmarked", paired_interval(marked, _success(result, "none", whole))),
        Comparison(
            "exact messages, all tokens − half of them", paired_interval(marked, _success(result, "balance", half))
        ),
    )


def lost(result: Result, attack: str) -> pd.DataFrame:
    """Exact messages that an attack costs, mean over its strengths: one row a seed, one column a method."""
    table = result.tables["attacks"]
    before = table[table["attack"] == "none"].set_index(["seed", "method"])["success"]
    after = table[table["attack"] == attack].groupby(["seed", "method"])["success"].mean()
    return (before - after).unstack("method")


def check_robustness(result: Result) -> tuple[Comparison, ...]:
    """Copy-paste and substitution cost Balance-Marking fewer messages than Vanilla-Marking of equal success."""
    return tuple(
        Comparison(f"messages lost to {attack}, Vanilla − Balance", paired_interval(costs["vanilla"], costs["balance"]))
        for attack in ("copy-paste", "substitution")
        for costs in (lost(result, attack),)
    )


def by_proxy(result: Result) -> pd.DataFrame:
    """NLL by the first oracle of the proxies from none (word counts) to whole, same δ: one row a seed."""
    quality, attacks = result.tables["quality"], result.tables["attacks"]
    delta = attacks[attacks["method"] == "balance"]["delta"].iloc[0]
    chosen = (quality["oracle"] == quality["oracle"].iloc[0]) & (quality["ratio"] == result.scalars["ratio"])
    sizes = quality[chosen & (quality["delta"] == delta)]
    sizes = sizes[sizes["method"].str.startswith(("balance", "depth"))]
    wide = sizes.pivot_table(index="seed", columns="method", values="nll")
    return wide[sorted(wide.columns, key=lambda name: math.inf if name == "balance" else int(name.split()[1]))]


def check_proxy(result: Result) -> tuple[Comparison, ...]:
    """At the same δ, texts marked with the whole proxy are likelier than with each smaller one."""
    wide = by_proxy(result)
    return tuple(
        Comparison(f"NLL, proxy of {name} − whole", paired_interval(wide[name], wide["balance"]), unit="nats")
        for name in wide.columns[:-1]
    )


def read_ratio(result: Result) -> Interval:
    """Interval over seeds of ln(seconds to read, Balance / Vanilla)."""
    table = result.tables["timing"]
    seconds = table[table["stage"] == "read"].pivot_table(index="seed", columns="method", values="seconds")
    return t_interval(np.log(seconds["balance"] / seconds["vanilla"]))


def check_time(result: Result) -> tuple[Comparison, ...]:
    """Reading takes Balance-Marking longer than Vanilla-Marking."""
    return (Comparison("ln(seconds to read, Balance / Vanilla)", read_ratio(result)),)


def substitution_slopes(result: Result, method: str) -> Interval:
    """Interval over seeds of the change of exact messages per unit of substituted share, unattacked texts included."""
    table = result.tables["attacks"]
    chosen = table[(table["method"] == method) & table["attack"].isin(("none", "substitution"))]
    slopes = [np.polyfit(rows["changed"], rows["success"], 1)[0] for _, rows in chosen.groupby("seed")]
    return t_interval(np.round(slopes, 9))  # a flat line has slope 0, not what rounding left of it


def check_substitution(result: Result) -> tuple[Comparison, ...]:
    """The more tokens are substituted, the fewer messages survive."""
    return tuple(
        Comparison(f"exact messages per share substituted, {method}", substitution_slopes(result, method), side="below")
        for method in ("balance", "vanilla")
    )


def _swap_methods(result: Result) -> Result:
    """Balance- and Vanilla-Marking exchange their labels in every table."""
    other = {"balance": "vanilla", "vanilla": "balance"}
    for name, table in result.tables.items():
        columns = [column for column in ("method", "reader") if column in table]
        result = result.with_table(name, table.assign(**{column: table[column].replace(other) for column in columns}))
    return result


def _unmarked(result: Result) -> Result:
    """Every marked text is read as successfully as an unmarked one."""
    table = result.tables["decoding"]
    plain = table[table["method"] == "none"].set_index(["seed", "reader", "ratio"])["success"]
    places = pd.MultiIndex.from_frame(table[["seed", "reader", "ratio"]])
    return result.with_table("decoding", table.assign(success=plain.reindex(places).fillna(0.0).to_numpy()))


def _reverse_proxies(result: Result) -> Result:
    """The whole proxy and the smallest exchange their labels."""
    names = by_proxy(result).columns
    exchange = {"balance": names[0], names[0]: "balance"}
    table, attacks = result.tables["quality"], result.tables["attacks"]
    delta = attacks[attacks["method"] == "balance"]["delta"].iloc[0]
    method = table["method"].where(table["delta"] != delta, table["method"].replace(exchange))
    return result.with_table("quality", table.assign(method=method))


def _reverse_rates(result: Result) -> Result:
    """Substituted shares in reverse: what no substitution left is said of the highest rate."""
    table = result.tables["attacks"].copy()
    chosen = table["attack"].isin(("none", "substitution"))
    turned = table[chosen].groupby(["seed", "method"])["changed"].transform(lambda shares: shares.to_numpy()[::-1])
    table.loc[chosen, "changed"] = turned
    return result.with_table("attacks", table)


TOLERANCES = {"timing.seconds": (math.inf, math.inf)}
"""Measured times are no two machines' the same."""

_UNREAD = "the paper's tables were not read, so no figure stands here"
_SWAPPED = Control("Balance- and Vanilla-Marking exchange their labels", _swap_methods)

CLAIMS: list[Claim] = [
    Claim(
        "reading",
        "A message of many bits can be read back exactly from text alone, more often the more tokens carry each bit.",
        (),
        check_reading,
        Control("unmarked texts stand in for marked ones", _unmarked),
        reported=f"20 bits in 200 tokens of OPT-1.3B, δ = 1.5, and in 100; {_UNREAD}",
    ),
    Claim(
        "quality",
        "At equal coding rate and success, Balance-Marking leaves text more likely under the unmarked model than "
        "Vanilla-Marking does.",
        (),
        check_quality,
        _SWAPPED,
        reported=f"lower perplexity by OPT-2.7B at 0.1 and 0.2 bit per token; {_UNREAD}",
    ),
    Claim(
        "robustness",
        "Balance-Marking loses fewer messages to copy-paste and to substitution of words than Vanilla-Marking.",
        (),
        check_robustness,
        _SWAPPED,
        reported=f"more robust to copy-paste and to RoBERTa's substitutions; {_UNREAD}",
    ),
    Claim(
        "proxy",
        "A larger proxy model gives better text.",
        (),
        check_proxy,
        Control("the whole proxy and the smallest exchange their labels", _reverse_proxies),
        reported=f"quality improves with the proxy's size; {_UNREAD}",
    ),
    Claim(
        "time",
        "Reading is slower with Balance-Marking than with Vanilla-Marking.",
        (),
        check_time,
        _SWAPPED,
        reported=f"decoding takes longer: the proxy must read the text too; {_UNREAD}",
    ),
    Claim(
        "substitution",
        "The more words are substituted, the fewer messages survive, with either method.",
        (),
        check_substitution,
        Control("substituted shares in reverse", _reverse_rates),
        reported=f"success falls with the share of substituted words; {_UNREAD}",
    ),
]
