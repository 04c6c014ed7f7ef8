"""Drop tokens mid-network: the blocks after it see only the survivors, at their true positions.

A model builds masks, rotary tables and position biases once, before its first block, so they are cut for each later
block, by the names of its arguments. An argument that runs along the tokens and has an unknown name is refused.

Merging (ToMe, Bolya et al. 2023) is a `write` at the same block, which puts the merged values into the survivors'
places, with `prune` keeping those places: writes come before drops, whatever the order of the contexts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from midstream.errors import HookError
from midstream.hooks.attend import named_arguments
from midstream.hooks.dispatch import Action, Drop, acting, recomputing, run_of, stream_in
from midstream.hooks.sites import Site, sites

# Where the tokens lie in a block's arguments: the axes of queries and of keys. Others must not follow the tokens.
QUERY_AXIS = {
    "attention_mask": -2,
    "mask": -2,
    "position_bias": -2,
    "encoder_attention_mask": -2,
    "encoder_decoder_position_bias": -2,
    "position_ids": -1,
    "position_embeddings": -2,
}
KEY_AXIS = ("attention_mask", "mask", "position_bias")
WITHOUT_TOKENS = ("hidden_states", "encoder_hidden_states", "past_key_values", "timestep", "class_labels")


@contextmanager
def prune(
    model: nn.Module, at: int, select: Callable[[Tensor], Tensor], restore: bool = True, stack: str | None = None
) -> Iterator[None]:
    """After block `at`, keep only the tokens that `select` names, in their order.

    `select(x)`, x (batch, tokens, width) as written, gives places: (kept,) for the whole batch, (batch, kept) for each
    item. Tokens are dropped in prefill (or without a cache); later tokens are all kept, and attend to the survivors at
    their true distance, so a decoding loop must stay inside the context. Later blocks' caches hold survivors only.

    `restore`: whatever else hooks a later block, and what follows the last one, sees the whole sequence, the dropped
    tokens as they were at the drop. So GPT-2's reshape, CLIP's pooling at the end of the text, a DiT's image, LLaVA's
    choice of a vision layer and `output_hidden_states` stay right. `read` gives the survivors, as the next block does.

    Raises `HookError` for places out of range or named twice, an unknown argument that follows the tokens, attention
    other than sdpa and eager, and a cache that cannot be matched with what was dropped (static, cropped into the
    prefill, or masked for padding by a pruned layer's length).
    """
    places = sites(model)
    column = places.stack(stack)
    at = places.site(("out", at), column.name).block
    if at == len(column) - 1:
        raise HookError(f"no block follows block {at}, so pruning after it would change nothing")
    run = run_of(places, column.name)
    implementation = getattr(getattr(places.above(column.name)[-1], "config", None), "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager"):
        raise HookError(f"prune needs attn_implementation 'sdpa' or 'eager', not '{implementation}'")
    blocks = places.blocks(column.name)
    actions: list[Action] = [
        (Site(column.name, 0, "out"), "note", lambda args, kwargs: None),  # so that forwards are counted from block 0
        (Site(column.name, at, "out"), "drop", _Dropping(run, select, restore)),
    ]
    for block in range(at + 1, len(column)):
        site = Site(column.name, block, "out")
        actions += [(site, "cut", partial(_cut, run, blocks[block], block)), (site, "restore", partial(_restored, run))]
        if block < len(column) - 1:
            actions.append((site, "cut_out", partial(_cut_stream, run)))
    try:
        with acting(places, run, actions):
            yield
    finally:
        run.drops.clear()


class _Dropping:
    """Takes tokens away after a block; gradient checkpointing's second forward takes the same ones."""

    def __init__(self, run: Any, select: Callable[[Tensor], Tensor], restore: bool):
        self.run, self.select, self.restore = run, select, restore
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not recomputing():
            self.kept = None if self.run.past else _checked(self.select(x), x)
            if self.kept is not None:
                self.run.drops.append(Drop(x, self.kept, self.restore))
        return x if self.kept is None else _take(x, self.kept, 1)


def _checked(places: Any, x: Tensor) -> Tensor | None:
    """`places` as (batch or 1, kept), ascending; None where all are kept."""
    if not isinstance(places, Tensor) or places.dtype not in (torch.int64, torch.int32) or places.ndim not in (1, 2):
        raise HookError("select must return integer places of shape (kept,) or (batch, kept)")
    places = places.to(x.device, torch.int64).reshape(-1, places.shape[-1]).sort(dim=1).values
    batch, tokens = x.shape[:2]
    is_twice = (places[:, 1:] == places[:, :-1]).any()
    if len(places) not in (1, batch) or not places.numel() or is_twice or places.min() < 0 or places.max() >= tokens:
        raise HookError(f"select must name each place once, from 0 to {tokens - 1}, for 1 or {batch} sequences")
    return None if places.shape[1] == tokens else places


def _restored(run: Any, x: Tensor) -> Tensor:
    """Survivors put back among the dropped, the latest pruning first; one that is not restored ends it."""
    for drop in reversed(run.drops):
        if not drop.restore or x.shape[1] != drop.kept.shape[1]:
            return x
        places = drop.kept[..., None].expand(*x.shape)
        x = drop.whole.scatter(1, places, x)
    return x


def _cut_stream(run: Any, x: Tensor) -> Tensor:
    left = run.survivors(x.shape[1])
    return x if left is None else _take(x, left, 1)


def _cut(
    run: Any, module: nn.Module, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments, cut to the survivors."""
    tokens = stream_in(args, kwargs).shape[1]
    cutter = _prefill(run, block) if run.drops else _decoding(run, block, tokens)
    if cutter is None:
        return args, kwargs
    positional = named_arguments(module, args, {})
    cut = {name: cutter(name, value) for name, value in (positional | kwargs).items()}
    return tuple(cut[name] for name in positional), {name: cut[name] for name in kwargs}


def _prefill(run: Any, block: int) -> Callable[[str, Any], Any]:
    """What cuts arguments in the forward that drops tokens; it also notes what this block's cache will hold."""
    whole = run.drops[0].whole.shape[1]
    if run.cache is not None:
        if getattr(run.cache, "is_compileable", False):
            raise HookError("prune needs a cache that grows, such as DynamicCache")
        _KEPT.setdefault(run.cache, {})[block] = (run.survivors(whole), whole)

    def cut(name: str, value: Any) -> Any:
        if name not in QUERY_AXIS:
            _refuse_tokens(name, value, whole)
            return value
        return _mapped(value, partial(_cut_axes, run, name))

    return cut


def _cut_axes(run: Any, name: str, x: Tensor) -> Tensor:
    axes = {QUERY_AXIS[name]} | ({-1} if name in KEY_AXIS else set())
    for axis in axes:
        left = run.survivors(x.shape[axis]) if x.ndim >= -axis else None
        x = x if left is None else _take(x, left, axis)
    return x


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, fn) for item in value)
    if value is not None and not isinstance(value, Tensor):
        raise HookError(f"prune can cut tensors along the tokens, not a {type(value).__name__}")
    return value if value is None else fn(value)


def _refuse_tokens(name: str, value: Any, tokens: int) -> None:
    """Raise where an argument of unknown meaning has an axis as long as the tokens."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    for item in inner:
        _refuse_tokens(name, item, tokens)
    if name not in WITHOUT_TOKENS and isinstance(value, Tensor) and tokens in value.shape[max(value.ndim > 1, 0) :]:
        raise HookError(f"prune does not know how the argument '{name}' {tuple(value.shape)} follows the tokens")


# For each cache, by block: the places that its prefill left, and how many tokens the prefill had.
_KEPT: "WeakKeyDictionary[Cache, dict[int, tuple[Tensor, int]]]" = WeakKeyDictionary()


def _decoding(run: Any, block: int, tokens: int) -> Callable[[str, Any], Any] | None:
    """What cuts masks and biases to the keys that a pruned block's cache holds, in a forward after the prefill."""
    kept = _KEPT.get(run.cache, {}).get(block) if run.cache is not None else None
    if kept is None or not run.past:
        return None
    survivors, whole = kept
    layers = getattr(run.cache, "self_attention_cache", run.cache).layers
    layer = layers[block]
    held, stored = layer.keys.shape[-2], survivors.shape[1] + run.past - whole
    if run.past < whole or (held != stored and not layer.is_sliding):
        raise HookError(f"the cache of block {block} is not as pruning left it: it was cropped or edited since")
    total = run.past + tokens
    later = torch.arange(whole, total, device=survivors.device).expand(len(survivors), -1)
    positions = torch.cat([survivors, later], dim=1)[:, -held - tokens :]
    # transformers makes one mask for all sliding layers and one for all others, each by the length of its first layer
    measured = next(number for number, other in enumerate(layers) if other.is_sliding == layer.is_sliding)

    def cut(name: str, x: Any) -> Any:
        if name not in KEY_AXIS or (name == "position_bias" and (x is None or x.shape[-1] == positions.shape[1])):
            return x
        if name != "position_bias" and measured in _KEPT[run.cache]:
            return _remade_mask(x, positions, tokens, getattr(layer, "sliding_window", None))
        if x is not None and x.shape[-1] != total and (name == "position_bias" or not layer.is_sliding):
            raise HookError(f"prune cannot match the {x.shape[-1]} columns of '{name}' with the {total} tokens so far")
        return x if x is None else _cut_keys(x, positions, total)

    return cut


def _remade_mask(x: Tensor | None, positions: Tensor, tokens: int, window: int | None) -> Tensor | None:
    """In the place of a mask that took survivors for neighbours, one by their true positions; padding is refused."""
    places = torch.arange(positions.shape[1], device=positions.device)[None]
    if x is not None and not torch.equal(*torch.broadcast_tensors(_visible(x), _causal(places, tokens, window))):
        raise HookError("this model masks padding by the length of a pruned block's cache; prune after a later block")
    mask = _causal(positions, tokens, window)
    if x is None or x.dtype == torch.bool:
        return None if x is None and bool(mask.all()) else mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)


def _causal(positions: Tensor, tokens: int, window: int | None) -> Tensor:
    """Which keys at `positions` (batch or 1, keys) the last `tokens` of them see, (batch or 1, 1, tokens, keys)."""
    distance = positions[:, -tokens:, None] - positions[:, None]
    return ((distance >= 0) & (distance < (window or torch.inf)))[:, None]


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _cut_keys(x: Tensor, positions: Tensor, total: int) -> Tensor:
    """A mask or bias over the last keys of `total`, cut to those at `positions`; where it has none, it is masked."""
    columns = positions - (total - x.shape[-1])
    cut = _take(x, columns.clamp(min=0), -1)
    beyond = (columns < 0).view(len(columns), *(1 for _ in range(x.ndim - 2)), -1)
    return cut.masked_fill(beyond, False if x.dtype == torch.bool else torch.finfo(x.dtype).min)


def _take(x: Tensor, places: Tensor, axis: int) -> Tensor:
    """The entries of `x` at `places` (batch or 1, kept) along an axis."""
    if len(places) == 1:
        return x.index_select(axis, places[0])
    axis = axis % x.ndim
    if axis == 0:
        raise HookError("items of a batch keep different tokens, but an argument that follows them has no batch axis")
    index = places.view(len(places), *(places.shape[1] if a == axis else 1 for a in range(1, x.ndim)))
    shape = (len(places), *(places.shape[1] if a == axis else size for a, size in enumerate(x.shape) if a))
    return x.expand(len(places), *x.shape[1:]).gather(axis, index.expand(shape))
