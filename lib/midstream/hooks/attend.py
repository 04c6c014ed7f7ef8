"""See and change attention inside chosen layers; every other layer keeps its own kernel, bit for bit.

How it works: while `attend` is open, each chosen attention module reads a private copy of its configuration that names
the implementation ``midstream`` (registered with transformers' `AttentionInterface`, together with a mask builder, so
that causality is never lost). The model's own configuration is untouched, so masks are built as always and layers that
were not chosen do not notice. On leaving, also by an exception, each module gets its configuration object back. The two
registrations stay and do nothing by themselves.

Nested contexts: at every stage the function of the outermost context acts first, and the next one sees its result.
The stages keep their order q, k, v, scores, probs whatever the nesting.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from midstream.errors import HookError
from midstream.hooks.sites import refuse_compiled, sites

NAME = "midstream"
# What the eager attention of a module may be made of for `_edited_attention` to be the same formula. Attention sinks,
# gates and rewritten rotary positions use names outside this list, and are refused.
_KNOWN_FORMULA = """torch nn functional F matmul transpose contiguous softmax dropout training dtype to type float32
    size repeat_kv num_key_value_groups head_dim tanh"""


@dataclass(frozen=True)
class AttentionAt:
    """Where and when an attention function is called.

    `query_positions` and `key_positions` count the tokens that this layer's cache and call have seen, padding included
    (after pruning or cache editing: of those that are left). `position_ids` are the true ones, where the model tells
    its attention (encoders do not).
    """

    stack: str
    layer: int
    cross: bool  # keys come from another sequence (encoder-decoder models)
    past: int  # tokens this layer's cache held before this call; 0 in prefill and without a cache
    query_positions: Tensor  # (query,)
    key_positions: Tensor  # (key,), not starting at 0 once a sliding-window cache has dropped tokens
    allowed: Tensor | None  # bool, broadcasts to (batch, heads, query, key): may look; None means all may
    position_ids: Tensor | None  # (batch or 1, query)

    @property
    def decoding(self) -> bool:
        """Whether earlier tokens come from the cache."""
        return self.past > 0


Edit = Callable[[Tensor, AttentionAt], Tensor | None]


@contextmanager
def attend(
    model: nn.Module,
    *,
    q: Edit | None = None,
    k: Edit | None = None,
    v: Edit | None = None,
    scores: Edit | None = None,
    probs: Edit | None = None,
    layers: Iterable[int] | None = None,
    stack: str | None = None,
) -> Iterator[None]:
    """Call `fn(x, at)` on attention's inner values in the chosen layers; a returned tensor of its shape replaces `x`.

    - `q` (batch, heads, query, head_dim), `k` and `v` (batch, key-value heads, key, head_dim): after rotary positions
      and after the cache; an edited key is not written back to the cache (see `kv` for that)
    - `scores` (batch, heads, query, key): scaled, bias and mask added, -inf where masked; rows left with nothing but
      -inf give zero attention
    - `probs` (batch, heads, query, key): after softmax, before dropout, not renormalised after an edit

    All of them are part of the graph, so `probs.retain_grad()` works where gradients are on (gradient checkpointing
    runs the functions again in the backward pass). A function that returns None and changed nothing in place leaves
    the layer's own kernel in charge: without gradients no output bit changes. With q, k or v alone the kernel stays.

    Raises `HookError` for a compiled model, for attention that does not go through transformers' interface or computes
    something else than softmax(QK + bias)V, and for implementations other than sdpa and eager.
    """
    given = {"q": q, "k": k, "v": v, "scores": scores, "probs": probs}
    edits = {stage: fn for stage, fn in given.items() if fn is not None}
    if not edits:
        raise HookError("attend needs a function for at least one of q, k, v, scores and probs")
    with ExitStack() as undo:
        for module, of_stack, layer in attention_modules(model, layers, stack):
            undo.callback(_leave, module, _enter(module, of_stack, layer, edits), edits)
        yield


class _Switch:
    """What one attention module needs to know while `attend` is open; sits on its private configuration."""

    def __init__(self, module: nn.Module, stack: str, layer: int) -> None:
        forward = _forward(module)
        implementation = cast(Any, module.config)._attn_implementation
        eager = forward.__globals__.get("eager_attention_forward")
        _refuse_other_formulas(module, implementation, eager)
        self.own = forward.__globals__["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)
        self.is_eager = implementation == "eager"
        self.stack, self.layer = stack, layer
        self.edits: list[Mapping[str, Edit]] = []
        self.call = threading.local()
        self.config = module.config
        self.hook = module.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the module runs: note what its cache holds, which the attention function itself is not told."""
        given = named_arguments(module, args, kwargs)
        cache = given.get("past_key_values")
        index = getattr(module, "layer_idx", None) or 0
        self.call.cross = cross = is_cross(given)
        self.call.past = 0 if cache is None else int(cache.get_query_offset(index))
        if cross and self.call.past:
            self.call.past -= given["hidden_states"].shape[1]  # self-attention has stored this call's tokens already
        self.call.first_key = 0 if cache is None or cross else int(cache.get_mask_sizes(1, index)[1])
        self.call.position_ids = given.get("position_ids")

    def at(self, query: Tensor, key: Tensor, mask: Tensor | None) -> AttentionAt:
        """The place and time of the present call."""
        call, device = self.call, query.device
        return AttentionAt(
            stack=self.stack,
            layer=self.layer,
            cross=call.cross,
            past=call.past,
            query_positions=torch.arange(call.past, call.past + query.shape[2], device=device),
            key_positions=torch.arange(call.first_key, call.first_key + key.shape[2], device=device),
            allowed=None if mask is None else allowed(mask),
            position_ids=call.position_ids,
        )

    def has(self, *stages: str) -> bool:
        """Whether any open context edits one of these stages."""
        return any(stage in edits for edits in self.edits for stage in stages)

    def apply(self, stage: str, x: Tensor, at: AttentionAt) -> tuple[Tensor, bool]:
        """Run the functions of one stage, outermost context first; also tell whether they changed anything."""
        changed = False
        for fn in [edits[stage] for edits in self.edits if stage in edits]:
            version = None if x.is_inference() else x._version
            result = fn(x, at)
            changed |= result is not None or version is None or x._version != version
            if result is not None:
                x = _checked(result, x, stage, at)
        return x, changed


def _checked(result: Any, x: Tensor, stage: str, at: AttentionAt) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != x.shape:
        came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise HookError(
            f"the {stage} function at layer {at.layer} must return None or a tensor of shape {tuple(x.shape)}, "
            f"not {came}"
        )
    return result.to(device=x.device, dtype=x.dtype)


def _enter(module: nn.Module, stack: str, layer: int, edits: Mapping[str, Edit]) -> _Switch:
    """Put one module under `edits`, joining contexts that are already open on it."""
    config: Any = module.config
    switch = config.__dict__.get("_midstream")
    if switch is None:
        switch = _Switch(module, stack, layer)
        private = copy.copy(config)
        private.__dict__.update(_attn_implementation_internal=NAME, _midstream=switch)
        module.config = private
    switch.edits.append(edits)
    return switch


def _leave(module: nn.Module, switch: _Switch, edits: Mapping[str, Edit]) -> None:
    """Take `edits` off again; the last context to leave restores the module."""
    switch.edits = [other for other in switch.edits if other is not edits]
    if not switch.edits:
        switch.hook.remove()
        module.config = switch.config


def _edited_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention with the open edits applied; called by the model in place of its own kernel."""
    switch = getattr(module.config, "_midstream", None)
    if switch is None or torch.compiler.is_compiling():
        raise HookError("The attention implementation 'midstream' works inside an attend(...) context, uncompiled")
    mask = attention_mask if switch.is_eager else _true_mask(module, query, key, attention_mask, kwargs)
    at = switch.at(query, key, mask)
    query, key, value = (switch.apply(stage, x, at)[0] for stage, x in (("q", query), ("k", key), ("v", value)))
    if not switch.has("scores", "probs"):
        return switch.own(module, query, key, value, attention_mask, **kwargs)
    values, scores_changed = switch.apply("scores", _scores(query, key, mask, kwargs), at)
    attention, probs_changed = switch.apply("probs", _softmax(values).to(query.dtype), at)
    if not (scores_changed or probs_changed or attention.requires_grad):
        return switch.own(module, query, key, value, attention_mask, **kwargs)
    dropped = nn.functional.dropout(attention, p=kwargs.get("dropout", 0.0), training=module.training)
    grouped = dropped.reshape(*value.shape[:2], -1, value.shape[2])  # (batch, key-value heads, group * query, key)
    output = (grouped @ value).reshape(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous()
    return output, attention if switch.is_eager else None


def _true_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The mask sdpa would act on: where transformers leaves it out, a module that is causal means a causal one."""
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None or not is_causal or query.shape[2] == 1:
        return mask
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor:
    """QK scaled, soft-capped, biased and masked, (batch, heads, query, key); grouped heads share keys uncopied."""
    scaling = kwargs.get("scaling")
    # (batch, key-value heads, group * query, head_dim)
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    scores = (grouped @ key.transpose(2, 3)).reshape(*query.shape[:3], key.shape[2])
    scores = scores * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over keys in at least float32; a row without any key gives zeros (and zero gradients), as in sdpa."""
    precision = torch.promote_types(scores.dtype, torch.float32)
    empty = scores.detach().amax(-1, keepdim=True) == -torch.inf
    if not empty.any():
        return torch.softmax(scores, -1, dtype=precision)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1, dtype=precision).masked_fill(empty, 0.0)


def _full_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask builder that goes with 'midstream': a boolean mask, always written out."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def allowed(mask: Tensor) -> Tensor:
    """A boolean or additive attention mask as booleans: True where a query may look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module call by the names in its `forward`."""
    return dict(zip(_parameters(_forward(module)), args, strict=False)) | kwargs


def is_cross(given: Mapping[str, Any]) -> bool:
    """Whether a call with these named arguments attends to another sequence."""
    return given.get("key_value_states") is not None or given.get("encoder_hidden_states") is not None


@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def attention_modules(
    model: nn.Module, layers: Iterable[int] | None, stack: str | None
) -> Iterator[tuple[nn.Module, str, int]]:
    """The attention modules in the chosen blocks of a stack, each with the stack's name and the block's number."""
    places = sites(model)
    name, blocks = places.stack(stack).name, places.blocks(stack)
    chosen = range(len(blocks)) if layers is None else [places.site(("attn", layer), name).block for layer in layers]
    for number in dict.fromkeys(chosen):
        refuse_compiled(blocks[number])
        found = [module for module in blocks[number].modules() if _uses_interface(module)]
        if not found:
            kind = type(blocks[number]).__name__
            raise HookError(f"the attention of {kind} does not go through transformers' AttentionInterface")
        yield from ((module, name, number) for module in found)


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _refuse_other_formulas(module: nn.Module, implementation: str | None, eager: Any) -> None:
    """Raise unless the module computes softmax(QK + bias)V, by a kernel whose masks are known."""
    kind = type(module).__name__
    if implementation not in ("sdpa", "eager"):
        raise HookError(
            f"attend needs attn_implementation 'sdpa' or 'eager', but {kind} runs on '{implementation}': "
            "call model.set_attn_implementation('sdpa') first"
        )
    unknown = ["no eager version"] if eager is None else set(eager.__code__.co_names) - set(_KNOWN_FORMULA.split())
    if unknown:
        raise HookError(f"attend does not know how {kind} computes attention (it uses: {', '.join(sorted(unknown))}).")


AttentionInterface.register(NAME, _edited_attention)
AttentionMaskInterface.register(NAME, _full_mask)
