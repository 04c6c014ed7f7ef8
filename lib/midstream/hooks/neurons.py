"""See and change the neurons of feed-forward layers: what goes into the last projection of each `mlp` sub-layer.

A neuron is one hidden unit: one row of the gate and input matrices and one column of the output matrix. The layer's
output is the sum over neurons of activation times output weights, plus the output bias where there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from midstream.errors import HookError
from midstream.hooks.dispatch import Run, acting, run_of
from midstream.hooks.sites import Site, Sites, sites

Seen = Callable[[Tensor, int], Tensor | None]


@contextmanager
def neurons(
    model: nn.Module, fn: Seen, layers: Sequence[int] | None = None, stack: str | None = None
) -> Iterator[None]:
    """Call `fn(activations, layer)` with activations (batch, tokens, neurons), the gate's factor included.

    What `fn` returns takes their place; None leaves them as they are. Raises `HookError` for a mixture of experts,
    whose neurons no single projection holds, and for a result of another shape.
    """
    places = sites(model)
    column = places.stack(stack)
    chosen = range(len(column)) if layers is None else layers
    wanted = [_site(places, layer, column.name) for layer in chosen]
    run = run_of(places, column.name)
    with acting(places, run, [(site, "route", partial(_through, fn, run, site.block)) for site in wanted]):
        yield


def output_weights(model: nn.Module, layer: int, stack: str | None = None) -> Tensor:
    """W_O of one layer, (neurons, width): row i is what neuron i adds to the stream for each unit of activation."""
    places = sites(model)
    projection = places.projection(_site(places, layer, places.stack(stack).name))
    weight: Tensor = projection.weight.detach()  # type: ignore[assignment, operator]
    return weight if hasattr(projection, "nf") else weight.T  # transformers' Conv1D is stored the other way round


def _site(places: Sites, layer: int, stack: str) -> Site:
    site = places.site(("mlp", layer), stack)
    if any(parameter.ndim > 2 for parameter in places.blocks(stack)[site.block].parameters()):
        raise HookError(f"block {site.block} holds a mixture of experts, whose neurons no single projection holds")
    return site


def _through(
    fn: Seen, run: Run, layer: int, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Carried out in the place of the last projection's `forward`."""
    given: Tensor = args[0]
    changed = fn(run.unfolded(given), layer)
    if changed is None:
        return proceed(*args, **kwargs)
    if changed.numel() != given.numel():
        raise HookError(f"activations of shape {tuple(given.shape)} came back as {tuple(changed.shape)}")
    return proceed(changed.reshape(given.shape).to(given), *args[1:], **kwargs)
