"""Slow, obvious versions of what the hooks do, and the models they are compared on."""

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from midstream.hooks import sites
from midstream.zoo import tiny

STACKS = {"t5": ("encoder", "decoder"), "llava": ("vision", "text")}
EVERY = [(family, stack) for family in tiny.FAMILIES for stack in STACKS.get(family, ("main",))]
DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3")
CAUSAL = {(family, "main") for family in (*DECODERS, "clip_text")} | {("t5", "decoder"), ("llava", "text")}
NEEDS_INPUTS = ("vit", "clip_vision", "clip_text", "dit")  # readout cannot do without the inputs


def answer(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The model's logits, or the first value that it returns."""
    output = model(**arguments)
    return output["logits"] if "logits" in output else output[0]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a context could leave behind: weights, hooks, attributes of every module, configurations."""
    modules = dict(model.named_modules())
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": {
            (name, kind): list(getattr(module, kind).items())
            for name, module in modules.items()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
        },
        "attributes": {name: set(module.__dict__) for name, module in modules.items()},
        "forward": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "config": copy.deepcopy(getattr(model, "config", None)),
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before["weights"].items():
        assert torch.equal(value, after["weights"][name])
    for key in ("hooks", "attributes", "forward", "flags"):
        assert before[key] == after[key]
    assert str(before["config"]) == str(after["config"])


@contextmanager
def replaced(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Each block runs, and its stream is thrown away for the one it was given."""
    blocks = list(blocks)
    for block in blocks:
        own = type(block).forward

        def forward(x, *args, _own=own, _block=block, **kwargs):
            output = _own(_block, x, *args, **kwargs)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def knocked_out(model: nn.Module, stack: str, at: int, kept: Tensor, causal: bool) -> Iterator[None]:
    """In the blocks after `at`, no token attends to one that is not in `kept` (batch, kept)."""
    handles = []
    for block in sites(model).blocks(stack)[at + 1 :]:
        names = list(inspect.signature(type(block).forward).parameters)[1:]

        def hide(module, args, kwargs, names=names):
            given = dict(zip(names, args, strict=False)) | kwargs
            given["attention_mask"] = _hiding(given.get("attention_mask"), given["hidden_states"], kept, causal)
            if "timestep" in names:  # diffusers adds its mask to the scores and gives it heads itself
                mask = given["attention_mask"][:, 0, :1]
                given["attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
            return (given.pop("hidden_states"),), given

        handles.append(block.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hiding(mask: Tensor | None, x: Tensor, kept: Tensor, causal: bool) -> Tensor:
    batch, tokens = x.shape[:2]
    if mask is None:
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    assert mask.dtype == torch.bool
    seen = torch.zeros(batch, tokens, dtype=torch.bool).scatter(1, kept.expand(batch, -1), True)
    return mask & seen[:, None, None]
