"""Edit what a model remembers: the keys and values in its cache, while it runs or afterwards.

An edited cache keeps the rotary or learned positions its keys were computed with, but transformers counts new positions
from the number of *stored* entries. Once entries are gone, a call must therefore be given the true ones:

    kept = select(cache, anchors)                                       # 100 tokens seen, 12 kept
    position_ids = positions(torch.ones(1, new_tokens), start=100)      # not 12
    model(ids, past_key_values=kept, position_ids=position_ids)

`generate()` counts positions itself and is right as it stands. Attention masks, where given, go by place in the cache:
(batch, stored + new). Layers that attend within a sliding window count their window by place in the cache as well, so
nothing may be dropped from them: `select`, `concat` and `kv` refuse.
"""

import copy as copying
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midstream.errors import HookError
from midstream.hooks.attend import allowed, attention_modules, is_cross, named_arguments


@dataclass(frozen=True)
class CacheAt:
    """Whose cache is edited, and when."""

    stack: str
    layer: int
    past: int  # tokens this layer's cache held before the call; 0 in prefill
    new: int  # tokens the call added

    @property
    def decoding(self) -> bool:
        """Whether the call added to an earlier one."""
        return self.past > 0


CacheEdit = Callable[[Tensor, Tensor, CacheAt], tuple[Tensor, Tensor] | None]


@contextmanager
def kv(
    model: nn.Module,
    fn: CacheEdit,
    *,
    layers: Iterable[int] | None = None,
    stack: str | None = None,
    decoding: bool = False,
) -> Iterator[None]:
    """Replace what a layer stored in the cache: `fn(keys, values, at) -> (keys, values)`, or None for no change.

    It runs after the layer's own attention, so the call that fills the cache is not affected, only later ones. Keys and
    values are (batch, key-value heads, stored, head_dim); fewer entries may come back than went in. By default only the
    prefill is edited (an empty cache filled); `decoding=True` has `fn` called after each later call as well. Nested
    contexts act outermost first. Calls without a cache are left alone, and so is cross-attention.

    Raises `HookError` where a shortened cache would be misread later: a layer with a sliding window, a padded batch, or
    a next call without `position_ids`.
    """
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(_refuse_counted_positions, with_kwargs=True).remove)
        for module, of_stack, layer in attention_modules(model, layers, stack):
            undo.callback(_Editor(module, fn, of_stack, layer, decoding).remove)
        yield


class _Editor:
    """Applies one function to the cache of one attention module."""

    def __init__(self, module: nn.Module, fn: CacheEdit, stack: str, layer: int, decoding: bool) -> None:
        self.fn, self.stack, self.layer, self.decoding = fn, stack, layer, decoding
        self.past = 0
        self.handles = (
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = named_arguments(module, args, kwargs).get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_query_offset(module.layer_idx))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = named_arguments(module, args, kwargs)
        cache = given.get("past_key_values")
        if cache is None or is_cross(given) or (self.past > 0 and not self.decoding):
            return
        stored = getattr(cache, "self_attention_cache", cache).layers[module.layer_idx]
        at = CacheAt(self.stack, self.layer, self.past, new=given["hidden_states"].shape[1])
        result = self.fn(stored.keys, stored.values, at)
        if result is None:
            return
        keys, values = result
        if keys.shape[2] != stored.keys.shape[2]:
            self.refuse_misreading(module, stored, given.get("attention_mask", given.get("mask")))
            cache.midstream_shortened = True
        stored.keys, stored.values = keys, values

    def refuse_misreading(self, module: nn.Module, stored: Any, mask: Tensor | None) -> None:
        """Raise where transformers would misread a cache with fewer entries than tokens seen."""
        where = f"kv cannot shorten the cache of layer {self.layer}"
        _refuse_sliding(stored.is_sliding or getattr(module, "sliding_window", None), where)
        if mask is not None and not allowed(mask)[..., -1, :].all():
            raise HookError(
                f"{where} in a padded batch, since padding is looked up by place in the cache: run its rows singly."
            )


def _refuse_sliding(is_sliding: Any, where: str) -> None:
    if is_sliding:
        raise HookError(f"{where}: it attends within a sliding window, which is counted by place in the cache.")


def _refuse_counted_positions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = named_arguments(model, args, kwargs)
    if getattr(given.get("past_key_values"), "midstream_shortened", False) and given.get("position_ids") is None:
        raise HookError(
            "This cache was shortened, so the call needs the true position_ids: see midstream.hooks.kv.positions."
        )


def positions(mask: Tensor, start: int | Tensor = 0) -> Tensor:
    """True position ids (batch, new) of new tokens after `start` seen ones (an int, or (batch,) for each row its own).

    `mask` (batch, new) is 1 for tokens and 0 for padding on either side; padding does not count.
    """
    offset = start[:, None] if isinstance(start, Tensor) else start
    return (mask.long().cumsum(-1) - 1).clamp(min=0) + offset


def select(
    cache: Any, indices: Tensor | Sequence[int] | Mapping[int, Tensor | Sequence[int]], *, until: int | None = None
) -> Any:
    """A new cache with only the entries at `indices`, in that order.

    `indices` are places in the cache: (kept,) for all rows and heads, (batch, kept) or (batch, key-value heads, kept);
    a mapping gives each layer its own and leaves the layers it does not name whole. Layers with a sliding window are
    refused, unless `until` promises that no later call goes beyond that true position and the window reaches so far.
    """
    by_layer = indices if isinstance(indices, Mapping) else dict.fromkeys(range(len(cache)), indices)

    def edit(layer: Any, number: int) -> Any:
        if number not in by_layer or layer.keys is None:
            return layer
        whole = layer.is_sliding and layer.cumulative_length == layer.keys.shape[2]  # nothing has left the window yet
        reaches = whole and until is not None and until <= layer.sliding_window
        _refuse_sliding(layer.is_sliding and not reaches, f"select cannot drop entries of layer {number}")
        places = _places(by_layer[number], layer.keys)
        layer.keys, layer.values = (torch.take_along_dim(x, places, dim=2) for x in (layer.keys, layer.values))
        if layer.is_sliding:
            layer.cumulative_length = layer.keys.shape[2]
        return layer

    return _rebuilt(cache, edit)


def _places(indices: Tensor | Sequence[int], keys: Tensor) -> Tensor:
    """`indices` as (batch or 1, heads or 1, kept, 1), checked against the stored keys."""
    places = torch.as_tensor(indices, device=keys.device)
    if places.dtype == torch.bool or places.ndim not in (1, 2, 3):
        raise HookError("Cache indices are whole numbers of shape (kept,), (batch, kept) or (batch, heads, kept).")
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < keys.shape[2]:
        raise HookError(f"Cache indices must lie between 0 and {keys.shape[2] - 1}, the last stored entry.")
    shape = {1: (1, 1, -1, 1), 2: (places.shape[0], 1, -1, 1), 3: (*places.shape[:2], -1, 1)}[places.ndim]
    return places.long().reshape(shape)


def concat(caches: Sequence[Any]) -> Any:
    """A new cache holding the entries of all `caches` in order (same model, same batch size)."""

    def edit(layer: Any, number: int) -> Any:
        _refuse_sliding(layer.is_sliding, f"concat cannot join entries of layer {number}")
        layer.keys = torch.cat([cache.layers[number].keys for cache in caches], dim=2)
        layer.values = torch.cat([cache.layers[number].values for cache in caches], dim=2)
        return layer

    return _rebuilt(caches[0], edit)


def expand(cache: Any, batch: int) -> Any:
    """A new cache for `batch` rows from one of a single row; memory is shared until a call adds to it."""

    def edit(layer: Any, number: int) -> Any:
        if layer.keys is not None:
            layer.keys, layer.values = (x.expand(batch, -1, -1, -1) for x in (layer.keys, layer.values))
        return layer

    return _rebuilt(cache, edit)


def copy(cache: Any) -> Any:
    """A new cache with its own memory: calls that add to one leave the other as it is."""

    def edit(layer: Any, number: int) -> Any:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return layer

    return _rebuilt(cache, edit)


def _rebuilt(cache: Any, edit: Callable[[Any, int], Any]) -> Any:
    """A new cache whose layers are `edit(copy of the layer, its number)`; only growing caches can be rebuilt."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(cache, DynamicCache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise HookError(f"Only a DynamicCache of keys and values can be edited, not a {type(cache).__name__}.")
    rebuilt = copying.copy(cache)
    rebuilt.layers = [edit(copying.copy(layer), number) for number, layer in enumerate(cache.layers)]
    return rebuilt
