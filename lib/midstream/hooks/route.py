"""Leave blocks or sub-layers out, or stop early, with caches of equal length and positions that stay true.

Positions in a cached loop come from the length of the first layer's cache, so a block that is left out must still count
there. It does, by placeholder keys that are not numbers: a block that later attended to them by mistake would show it.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from midstream.errors import HookError
from midstream.hooks.dispatch import Action, acting, recomputing, run_of, stream_in
from midstream.hooks.sites import Site, Sites, sites

Stop = Callable[[int, Tensor], Any]


@contextmanager
def route(
    model: nn.Module,
    skip: Collection[int | tuple[str, int] | Site] = (),
    stop: int | Stop | None = None,
    propagate: bool = False,
    stack: str | None = None,
) -> Iterator[None]:
    """Leave out the blocks and sub-layers in `skip`, and every block after `stop`.

    - `skip`: block numbers, and sub-layers as `("attn", block)`, `("mlp", block)` or a `Site`. A block left out hands
      on what it was given; a sub-layer left out adds nothing (its projection gives zeros; what follows it, such as a
      post-norm, still runs).
    - `stop`: the last block to run, or `stop(block, x)` called with each block's output (batch, tokens, width) until it
      returns something true. The model's own norm and head then read the exit; `readout(model, x)` is the same.
    - `propagate=True` runs the blocks that are left out for the keys and values they put into the cache, at full cost
      (the state propagation of CALM, Schuster et al. 2022): needed where exits differ from token to token.

    Reads and writes at a block left out still act, on what it hands on. Where blocks return more than the stream, the
    first one left out may run once to learn that. Without `propagate`, a block that runs on a cache filled while it was
    left out raises `HookError`.
    """
    places = sites(model)
    column = places.stack(stack)
    whole = {_block(places, key, column.name) for key in skip if not isinstance(key, tuple)}
    path = _Path(places, column.name, whole, stop, propagate)
    actions: list[Action] = []
    for block in range(len(column)):
        site = Site(column.name, block, "out")
        actions.append((site, "route", partial(path.go, block)))
        if callable(stop):
            actions.append((site, "read", partial(path.ask, block)))
    parts = [_sublayer(places, key, column.name) for key in skip if isinstance(key, tuple)]
    actions += [(part, "route", _nothing_added) for part in parts]
    with acting(places, path.run, actions):
        yield


def _block(places: Sites, number: int, stack: str) -> int:
    return places.site(("out", number), stack).block


def _sublayer(places: Sites, key: Any, stack: str) -> Site:
    site = places.site(key, stack)
    if site.part not in ("attn", "mlp"):
        raise HookError(f"a part to skip is attn or mlp, not {site.part}; skip a whole block by its number")
    return site


def _nothing_added(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What stands in for a sub-layer's last projection; run on no batch items, that tells its width and dtype."""
    x = args[0]
    end = proceed(x[:0])
    return end.new_zeros(*x.shape[:-1], end.shape[-1])


class _Path:
    """Which blocks run in the present forward, and what stands in for the others."""

    def __init__(self, places: Sites, stack: str, skip: set[int], stop: int | Stop | None, propagate: bool):
        self.run = run_of(places, stack)
        self.blocks = places.blocks(stack)
        self.config = getattr(places.above(stack)[-1], "config", None)
        self.skip = skip
        self.last = len(self.blocks) if stop is None or callable(stop) else _block(places, stop, stack)
        self.decide = stop if callable(stop) else None
        self.propagate = propagate
        self.exit = (-1, 0)  # (forward, block) of the latest early exit
        self.beside: tuple[int, tuple[Any, ...]] = (-1, ())  # (forward, what its last block returned beside the stream)

    def ask(self, block: int, x: Tensor) -> Tensor:
        """After a block: let `stop` decide."""
        if self.decide is None or recomputing() or self.leaves_out(block):
            return x
        answer = self.decide(block, x)
        if isinstance(answer, Tensor) and answer.numel() != 1:
            raise HookError("stop must give one answer for the whole batch; reduce it, for instance with .all()")
        if answer:
            self.exit = (self.run.number, block)
        return x

    def leaves_out(self, block: int) -> bool:
        """Whether this block has no part in this forward."""
        exited = self.exit[0] == self.run.number and block > self.exit[1]
        return block in self.skip or block > self.last or exited

    def go(self, block: int, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the place of a block's `forward`."""
        if self.leaves_out(block):
            return self.pass_by(block, proceed, args, kwargs)
        self.refuse_placeholders(block)
        return self.ran(block, proceed(*args, **kwargs))

    def ran(self, block: int, output: Any) -> Any:
        """Note what a block returns."""
        extras = output[1:] if isinstance(output, tuple) else ()
        self.beside = (self.run.number, extras)
        BESIDE[type(self.blocks[block])] = len(extras)
        return output

    def pass_by(self, block: int, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stream as it came, with the cache one entry a token longer and whatever else the block would return."""
        x = stream_in(args, kwargs)
        expected = BESIDE.get(type(self.blocks[block]))
        forward, extras = self.beside
        given = {id(value) for value in (*args, *kwargs.values())}
        handed_on = forward == self.run.number and all(id(extra) in given for extra in extras if extra is not None)
        cache = self.run.cache
        if (self.propagate and cache is not None) or not (expected == 0 or (expected and handed_on)):
            output = self.ran(block, proceed(*args, **kwargs))  # T5's first block makes the position bias of all
            return (x, *output[1:]) if isinstance(output, tuple) else x
        if cache is not None:
            _hold_places(cache, block, x, self.config)
        return (x, *extras) if expected else x

    def refuse_placeholders(self, block: int) -> None:
        """Raise where a block is about to attend to tokens that it did not see."""
        cache = getattr(self.run.cache, "self_attention_cache", self.run.cache)
        if cache is None or block not in _HELD.get(cache, ()):
            return
        keys = getattr(cache.layers[block], "keys", None)
        if keys is not None and keys.numel() and bool(keys[0, 0, :, 0].isnan().any()):
            raise HookError(
                f"block {block} would attend to tokens of a forward in which it was left out: leave out the same "
                "blocks throughout, crop the cache first, or open route with propagate=True"
            )


BESIDE: "WeakKeyDictionary[type, int]" = WeakKeyDictionary()  # how many values a block class returns beside the stream
_HELD: "WeakKeyDictionary[Cache, set[int]]" = WeakKeyDictionary()  # blocks with placeholder keys in a cache


def _hold_places(cache: Cache, block: int, x: Tensor, config: Any) -> None:
    """Lengthen a block's cache by placeholders (NaN) for the tokens of `x` (batch, tokens, width)."""
    cache = getattr(cache, "self_attention_cache", cache)
    known = getattr(cache.layers[block], "keys", None) if block < len(cache.layers) else None
    if known is not None and known.ndim == 4:
        heads, width = known.shape[1], known.shape[3]
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    places = x.new_full((x.shape[0], heads, x.shape[1], width), torch.nan)
    cache.update(places, places, block)
    _HELD.setdefault(cache, set()).add(block)
