"""What a model would say of a state, by its own last norm and head."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from midstream.errors import HookError
from midstream.hooks.dispatch import suspended
from midstream.hooks.route import BESIDE
from midstream.hooks.sites import Sites, sites


def readout(model: nn.Module, h: Tensor, *, stack: str | None = None, **inputs: Any) -> Tensor:
    """What `model` puts out when its last block leaves the stream as `h`: logits, or the first value it returns.

    The model itself runs, with every block standing aside, so that whatever it does after them is done (norm, scale,
    head, soft cap, pooling). `h` is (batch, tokens, width), or (..., width) where no inputs are needed; gradients flow.

    `inputs` are the forward's own. Models that take `inputs_embeds` need none (language models, BERT, T5's decoder);
    those that read more than the stream at the end do: CLIP's text tower (where the text ends), vision towers, DiT.
    Raises `HookError` when they are missing, or when they do not make the model run the stack.
    """
    places = sites(model)
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    states = h if inputs or h.ndim == 3 else h.reshape(-1, 1, h.shape[-1])
    arguments = _arguments(whole, states, inputs)
    called: list[nn.Module] = []
    with suspended(), _standing_aside(places, stack, states, called):
        output = whole(**arguments)
    if not called:
        named = f"the stack {stack}" if stack else "its stack"
        raise HookError(f"{type(whole).__name__} ran no block of {named} on these inputs.")
    if not isinstance(output, Tensor):
        output = output["logits"] if isinstance(output, dict) and "logits" in output else output[0]
    return output if states is h else output.reshape(*h.shape[:-1], output.shape[-1])


def _arguments(whole: nn.Module, h: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments under which `whole` runs on states of the shape of `h`, without a cache."""
    taken = inspect.signature(whole.forward).parameters
    arguments = {name: value for name, value in inputs.items() if name != "past_key_values"}
    if not inputs:
        name = "decoder_inputs_embeds" if "decoder_inputs_embeds" in taken else "inputs_embeds"
        if name not in taken:
            raise HookError(f"readout of {type(whole).__name__} needs its inputs: readout(model, h, **inputs)")
        embedding = whole.get_input_embeddings().weight  # type: ignore[operator]
        arguments[name] = torch.zeros(*h.shape[:-1], embedding.shape[-1], dtype=h.dtype, device=h.device)
        if "encoder_outputs" in taken:
            arguments["encoder_outputs"] = (h,)
    if "use_cache" in taken:
        arguments["use_cache"] = False
    return arguments


@contextmanager
def _standing_aside(places: Sites, stack: str | None, h: Tensor, called: list[nn.Module]) -> Iterator[None]:
    """Let every block of the stack return `h`, and no hook on a block act; blocks that ran are added to `called`."""
    with ExitStack() as undo:
        for block in places.blocks(stack):
            undo.callback(_set, block, {name: block.__dict__.get(name) for name in _REPLACED})
            _set(block, {name: OrderedDict() for name in _REPLACED[1:]} | {"forward": _returning(block, h, called)})
        yield


_REPLACED = ("forward", "_forward_hooks", "_forward_pre_hooks")


def _set(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if value is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value


def _returning(block: nn.Module, h: Tensor, called: list[nn.Module]) -> Any:
    """A `forward` that returns `h` in the form in which the block returns its stream."""
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(block)
        if type(block) not in BESIDE:
            output = own(*args, **kwargs)
            BESIDE[type(block)] = len(output) - 1 if isinstance(output, tuple) else 0
        extras = BESIDE[type(block)]
        return (h, *(None for _ in range(extras))) if extras else h

    return forward
