"""Read the residual stream and what is added to it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from midstream.errors import HookError
from midstream.hooks.dispatch import Run, acting, recomputing, run_of
from midstream.hooks.sites import Site, sites


class Forward(dict[int, Any]):
    """What one forward gave, by block."""

    def __init__(self, number: int, past: int):
        super().__init__()
        self.number = number
        self.past = past  # tokens that the cache held before it

    @property
    def decoding(self) -> bool:
        """Whether this forward continued a cache (False: a prefill, or no cache)."""
        return self.past > 0


class Reading:
    """The values that `read` collects: `reading[block]` is the latest forward's, `reading.forwards` has them all.

    Iterating gives the latest forward's values in the order of the blocks. `generate()` gives one `Forward` for the
    prefill and one for each decoded token; `clear()` forgets them.
    """

    def __init__(self, layers: tuple[int, ...], depth: int):
        self.layers = layers
        self.forwards: list[Forward] = []
        self._depth = depth

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in self.layers)

    def __getitem__(self, layer: int) -> Any:
        block = layer + self._depth if layer < 0 else layer
        if block not in self.layers:
            raise HookError(f"block {layer} is not among those that are read: {', '.join(map(str, self.layers))}")
        if not self.forwards or block not in self.forwards[-1]:
            raise HookError(f"nothing was read at block {layer}: it has not run since this reading was opened")
        return self.forwards[-1][block]

    def clear(self) -> None:
        """Forget every forward so far."""
        self.forwards.clear()


@contextmanager
def read(
    model: nn.Module,
    part: str = "out",
    layers: Iterable[int] | None = None,
    keep: Callable[[Tensor], Any] | None = None,
    grad: bool = False,
    stack: str | None = None,
) -> Iterator[Reading]:
    """Collect `part` of each block (or of `layers`) in every forward, as the next module sees it.

    - the values are (batch, tokens, width); `attn` and `mlp` as in `midstream.hooks.sites`
    - `keep(x)` runs inside the hook, and what it returns owns its memory: `keep=lambda x: x[:, -1]` keeps one row a
      sequence and not the whole activation behind it. It may return a tuple, list or dict of tensors.
    - `grad=True` leaves the values in the graph: after `backward()` they have `.grad`. With `keep`, the gradient is
      reduced by `keep` as well. It also works where all parameters are frozen.

    Values are detached unless `grad`. Without `keep` they are the very tensors that the model goes on with.
    Gradient checkpointing's second forward is not recorded. Raises `HookError` for `grad` without gradients enabled.
    """
    places = sites(model)
    column = places.stack(stack)
    chosen = (0,) if part == "embed" else range(len(column)) if layers is None else tuple(layers)
    wanted = [places.site((part, layer), column.name) for layer in chosen]
    reading = Reading(tuple(site.block for site in wanted), len(column))
    run = run_of(places, column.name)
    stage = "read_in" if part == "in" else "read"
    with acting(places, run, [(site, stage, partial(_record, reading, run, site, keep, grad)) for site in wanted]):
        yield reading


def _record(
    reading: Reading, run: Run, site: Site, keep: Callable[[Tensor], Any] | None, grad: bool, x: Tensor
) -> Tensor:
    if recomputing():
        return x
    number = 0 if site.part == "embed" else run.number
    last = reading.forwards[-1] if reading.forwards else None
    if last is None or last.number != number or site.block in last:
        last = Forward(number, run.past)
        reading.forwards.append(last)
    last[site.block] = _with_gradient(x, keep) if grad else _kept(x.detach() if x.requires_grad else x, keep)
    return x


def _kept(x: Tensor, keep: Callable[[Tensor], Any] | None) -> Any:
    return x if keep is None else _owned(keep(x), x)


def _owned(value: Any, source: Tensor) -> Any:
    """`value` with every tensor in it in memory of its own, and no more memory than it needs."""
    if isinstance(value, tuple | list):
        return type(value)(_owned(item, source) for item in value)
    if isinstance(value, dict):
        return {key: _owned(item, source) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    is_shared = storage.data_ptr() == source.untyped_storage().data_ptr()
    return value.clone() if is_shared or storage.nbytes() > value.numel() * value.element_size() else value


def _with_gradient(x: Tensor, keep: Callable[[Tensor], Any] | None) -> Any:
    """`x` set up so that its gradient arrives in `.grad`, or in that of what is kept of it."""
    if not torch.is_grad_enabled():
        raise HookError("grad=True needs gradients: leave torch.no_grad(), or use_reentrant=False in checkpointing")
    if not x.requires_grad:
        x.requires_grad_()  # nothing below is trained, so the value is a leaf
    if keep is None:
        x.retain_grad()
        return x
    kept = _kept(x.detach(), keep)
    if not isinstance(kept, Tensor):
        raise HookError("with grad=True, keep must return one tensor, so that its gradient has a place")
    x.register_hook(lambda gradient: setattr(kept, "grad", _kept(gradient.detach(), keep)))
    return kept
