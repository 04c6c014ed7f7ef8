"""Chains of reasoning in tokens: what is prompt, step and name; their likelihood; writing and learning them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from midstream.data.graphs import Graph


@dataclass(frozen=True)
class Logged:
    """Logged chains in tokens, padded on the right; all tensors are (chains, tokens)."""

    ids: Tensor
    counted: Tensor
    """Tokens of the chain: neither prompt nor padding."""
    entity: Tensor
    """Tokens of the chain that are part of an entity's name, which may span several."""
    thing: Tensor
    """Those of the last name of each step: what the step says."""
    step: Tensor
    """Which step a token belongs to, from 0."""

    def __getitem__(self, rows: Any) -> Logged:
        return Logged(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Logged:
        """The same chains on a device."""
        return Logged(*(getattr(self, field.name).to(device) for field in fields(self)))


def tokens_of(tokenizer: Any, graph: Graph, texts: Sequence[tuple[str, str]], longest: int = 96) -> Logged:
    """Prompts and chains in tokens, an end token after each; names and steps are found in the chain's own text.

    A token is part of an entity where its characters overlap a name's; a step ends with its full stop.
    """
    rows = [_marked(tokenizer, graph, prompt, chain, longest) for prompt, chain in texts]
    columns = (torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True))
    ids, counted, entity, thing, step = columns
    return Logged(ids, counted.bool(), entity.bool(), thing.bool(), step)


def _marked(tokenizer: Any, graph: Graph, prompt: str, chain: str, longest: int) -> tuple[Tensor, ...]:
    text = prompt + chain
    encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=longest)
    spans = encoded["offset_mapping"]
    ids = torch.tensor([*encoded["input_ids"], tokenizer.eos_token_id])
    names = [(a, b) for a, b in graph.mentions(text) if a >= len(prompt)]
    last = {text.count(".", len(prompt), a): (a, b) for a, b in names}  # by step
    counted = [b > len(prompt) and place > 0 for place, (_, b) in enumerate(spans)]  # nothing stands before the first
    entity, thing = (
        [any(a < end and start < b for start, end in found) for a, b in spans] for found in (names, last.values())
    )
    step = [text.count(".", len(prompt), max(a, len(prompt))) for a, _ in spans]
    final = max((s for s, (a, b) in zip(step, spans, strict=True) if text[a:b].strip()), default=0)
    columns = ([*counted, True], [*entity, False], [*thing, False], [*step, final])
    return ids, *(torch.tensor(column) for column in columns)


def token_log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """log π(e|s) of each token after those before it, (texts, tokens), in float32; 0 for the first token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    found = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return torch.nn.functional.pad(found.view(len(ids), -1), (1, 0))


@torch.no_grad()
def scored(model: Any, texts: Logged, batch_size: int) -> Tensor:
    """The same for many texts, in eval mode, on the CPU."""
    parts = (texts.ids[i : i + batch_size].to(model.device) for i in range(0, len(texts), batch_size))
    return torch.cat([token_log_probabilities(model, part).cpu() for part in parts])


@torch.no_grad()
def told_right(model: Any, texts: Logged, batch_size: int) -> Tensor:
    """Whether all tokens of what the steps say are the model's first choice, given what stands before, (texts,)."""
    right = []
    for start in range(0, len(texts), batch_size):
        part = texts[slice(start, start + batch_size)].to(model.device)
        chosen = model(input_ids=part.ids, use_cache=False).logits[:, :-1].argmax(-1)
        right.append(((chosen == part.ids[:, 1:]) | ~part.thing[:, 1:]).all(1).cpu())
    return torch.cat(right)


def likelihood_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the counted tokens; SFT's loss, and that of all training from scratch."""
    return -token_log_probabilities(model, batch["ids"])[batch["counted"]].mean()


def batches(size: int, seed: int, **columns: Tensor) -> Iterator[dict[str, Tensor]]:
    """Endless batches of rows drawn without replacement, pass after pass; padding that no row needs is cut."""
    rng = torch.Generator().manual_seed(seed)
    count = len(columns["ids"])
    size = min(size, count)
    while True:
        for rows in torch.randperm(count, generator=rng)[: count // size * size].view(-1, size):
            batch = {name: column[rows] for name, column in columns.items()}
            longest = int(batch["counted"].any(0).nonzero().max()) + 1
            yield {name: column[:, :longest] for name, column in batch.items()}


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, seed: int | None = None) -> list[str]:
    """Continuations: greedy, or drawn at temperature 1 with a seed; cut at the end token or after `tokens`."""
    left = copy.deepcopy(tokenizer)
    left.padding_side, left.pad_token = "left", left.pad_token or left.eos_token
    how: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    how |= {"max_new_tokens": tokens, "pad_token_id": left.pad_token_id, "eos_token_id": left.eos_token_id}
    written: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        for start in range(0, len(prompts), WRITTEN_AT_ONCE):
            some = list(prompts[start : start + WRITTEN_AT_ONCE])
            inputs = left(some, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
            out = model.generate(**inputs, **how)
            written += left.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return written


WRITTEN_AT_ONCE = 128
"""Chains that are written at once."""


def small_llama(vocabulary: int, width: int, layers: int, seed: int) -> Any:
    """An untrained Llama in miniature, on a CPU's fast path."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=width**-0.5,  # smaller weights take far longer to learn a fact
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    return model


def snapshot(model: Any) -> dict[str, Tensor]:
    """A copy of all that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: Any, kept: dict[str, Tensor]) -> None:
    """Put a snapshot's values back."""
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.copy_(kept[name])


def whole(tokenizer: Any, graph: Graph, texts: Sequence[str]) -> Logged:
    """Texts without a prompt."""
    return tokens_of(tokenizer, graph, [("", text) for text in texts])


def longest_chain(texts: Logged) -> int:
    """Tokens of the longest chain, and a few to spare."""
    return int(texts.counted.sum(1).max()) + 4
