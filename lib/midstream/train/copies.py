"""Models to hold against a model: noised, pruned and tuned copies of it, and a small one of the same vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from midstream.train.language import next_token_loss
from midstream.train.loop import Schedule, fit


def block_matrices(model: Any) -> Iterator[nn.Parameter]:
    """The weight matrices between embedding and head: what noise and pruning touch."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        outside.add(id(head.weight))
    return (each for each in model.parameters() if each.ndim == 2 and id(each) not in outside)


@torch.no_grad()
def noised(model: Any, share: float, seed: int) -> Any:
    """A copy whose matrices have Gaussian noise of `share` times their own standard deviation added."""
    twin, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in block_matrices(twin):
        noise = torch.randn(weight.shape, generator=random).to(weight)
        weight.add_(noise, alpha=share * float(weight.std()))
    return twin


@torch.no_grad()
def pruned(model: Any, share: float) -> Any:
    """A copy in which the smallest `share` of every matrix's entries, by magnitude, is zero."""
    twin = copy.deepcopy(model)
    for weight in block_matrices(twin):
        magnitudes = weight.abs().flatten()
        if smallest := int(share * magnitudes.numel()):
            limit = magnitudes.float().kthvalue(smallest).values
            weight.masked_fill_(weight.abs() <= limit, 0.0)
    return twin


def tuned(model: Any, windows: Tensor, steps: int, rate: float, batch_size: int, seed: int) -> Any:
    """A copy trained for `steps` batches drawn from windows (count, tokens), all of its weights."""
    twin = copy.deepcopy(model).requires_grad_(True)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    batches = (
        windows[order[torch.arange(start, start + batch_size) % len(order)]]
        for start in range(0, steps * batch_size, batch_size)
    )
    fit(twin, batches, next_token_loss, Schedule(steps=steps, learning_rate=rate), cpu=model.device.type == "cpu")
    return twin.requires_grad_(False)


def small_llama(vocabulary: int, window: int) -> Any:
    """An untrained Llama of 2 layers of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # type: dict[str, Any]
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=window, tie_word_embeddings=True, **sizes)
    )
