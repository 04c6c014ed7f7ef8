"""Change the residual stream, or what is added to it, while the model runs.

Steering, patching, ablation and projection are each one function; soft prompts need none of this where the model takes
`inputs_embeds`, and are a write at `embed` where it does not:

    with write(model, {("out", 5): lambda x, at: x + direction}): ...              # steer
    with write(model, {("out", 5): lambda x, at: x if at.decoding else clean}): ...  # patch the prefill only
    with write(model, {("attn", 3): lambda x, at: torch.zeros_like(x)}): ...       # ablate a sub-layer
    with write(model, {"embed": put_prompt_over_first_tokens}): ...                # soft prompt
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from midstream.errors import HookError
from midstream.hooks.dispatch import At, Run, acting, run_of
from midstream.hooks.sites import Site, sites

Edit = Callable[[Tensor, At], Tensor]


@contextmanager
def write(
    model: nn.Module, edits: Mapping[Site | tuple[str, int] | str, Edit], stack: str | None = None
) -> Iterator[None]:
    """Put `fn(x, at)` in the place of `x` at each site, before anything reads it, transformers' own recorders included.

    A site is a `Site`, `(part, block)` in `stack`, or `"embed"`. `x` is (batch, tokens, width); the result must have
    its shape and is brought to its dtype and device, so that a float32 direction steers a bfloat16 model. Of two
    contexts at one site the outer one acts first. Under gradient checkpointing `fn` at `attn` or `mlp` is called again
    in the backward pass and must give the same result.

    Raises `HookError` when `fn` returns something else than a tensor of the shape it was given.
    """
    places = sites(model)
    with ExitStack() as contexts:
        for key, fn in edits.items():
            site = places.site(key, stack)
            run = run_of(places, site.stack)
            action = (site, "write_in" if site.part == "in" else "write", partial(_written, fn, site, run))
            contexts.enter_context(acting(places, run, [action]))
        yield


def _written(fn: Edit, site: Site, run: Run, x: Tensor) -> Tensor:
    result: Any = fn(x, run.at(site, x))
    if not isinstance(result, Tensor) or result.shape != x.shape:
        came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise HookError(
            f"the function written at {site.part} of block {site.block} must return a tensor of shape "
            f"{tuple(x.shape)}, not {came}"
        )
    return result.to(device=x.device, dtype=x.dtype)
