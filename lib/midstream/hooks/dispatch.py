"""One dispatcher a module, acting in one order, whatever the order in which contexts were opened:

    cut (arguments to what pruning left) → write and read `in` → route (the block, or what stands in for it)
    → write → restore (pruned tokens) | every other hook on the module | drop (tokens) → read

Within one step the outermost context acts first. Writes come before every other hook on the module, transformers'
recorders for `output_hidden_states` included, so those show what was written; reads come after every other hook, so
they see what the next module sees. A second tool's hooks keep their own order between the two.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from midstream.errors import HookError
from midstream.hooks.sites import Site, Sites

# The steps in their order, each with what carries it out: a hook, or the module's `forward`.
STAGES = {
    "note": "before",
    "cut": "before",
    "write_in": "before",
    "read_in": "entering",
    "route": "forward",
    "write": "after",
    "restore": "after",
    "cut_out": "leaving",
    "drop": "leaving",
    "read": "leaving",
}
_STAGES_OF = {hook: [stage for stage, its in STAGES.items() if its == hook] for hook in STAGES.values()}


@dataclass(frozen=True)
class At:
    """Where and when a function is called."""

    stack: str
    layer: int
    part: str
    past: int  # tokens that the cache held before this forward; 0 in prefill and without a cache
    positions: Tensor  # (batch or 1, tokens): true positions, also after pruning and with padding

    @property
    def decoding(self) -> bool:
        """Whether earlier tokens come from the cache."""
        return self.past > 0


class Drop(NamedTuple):
    """Tokens taken away after a block."""

    whole: Tensor  # (batch, tokens, width): the stream before
    kept: Tensor  # (batch or 1, kept): the places that stay, ascending
    restore: bool


class Run:
    """What is known of the forward that a stack is in; shared by every context open on the stack."""

    def __init__(self) -> None:
        self.number = 0  # counts forwards; a forward starts where the blocks' order starts again
        self.past = 0
        self.drops: list[Drop] = []  # what pruning took away so far in this forward
        self._block = sys.maxsize
        self._cache: Callable[[], Cache | None] = lambda: None
        self._shape: tuple[int, ...] = ()
        self._position_ids: Tensor | None = None

    @property
    def cache(self) -> Cache | None:
        """The cache of this forward, if it has one."""
        return self._cache()

    def rest(self) -> None:
        """Take the next block that is entered for the start of a forward, whichever block that is."""
        self._block = sys.maxsize

    def enter(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is entered: see whether this is a new forward, and how much its cache holds."""
        if block > self._block or recomputing():
            self._block = max(block, self._block)
            return
        if torch.compiler.is_compiling():
            raise HookError("this model is being compiled while a hook is open")  # the compiler then runs it uncompiled
        self._block = block
        self.number += 1
        self.drops = []
        self.note_cache(block, args, kwargs)

    def note_cache(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the cache among a module's arguments (an empty cache is falsy, so it is looked for by its class)."""
        cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
        self._cache = (lambda: None) if cache is None else weakref.ref(cache)
        self.past = 0 if cache is None else int(cache.get_seq_length(block))

    def note_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what `at` is made of: the tokens' number and, where the block is told them, their positions."""
        self._shape = stream_in(args, kwargs).shape
        self._position_ids = kwargs.get("position_ids")

    def unfolded(self, x: Tensor) -> Tensor:
        """A sub-layer's output as (batch, tokens, width), also where the block folds tokens into the batch (OPT)."""
        return x.reshape(*self._shape[:-1], x.shape[-1]) if x.ndim == 2 else x

    def survivors(self, length: int) -> Tensor | None:
        """Which places of a sequence of `length` tokens pruning left, (batch or 1, kept); None where it took none.

        `length` is the sequence's own or that after an earlier pruning.
        """
        left: Tensor | None = None
        for drop in self.drops:
            if left is not None:
                left = left.expand(max(len(left), len(drop.kept)), -1)
                left = left.gather(1, drop.kept.expand(len(left), -1))
            elif drop.whole.shape[1] == length:
                left = drop.kept
        return left

    def at(self, site: Site, x: Tensor) -> At:
        """The place and time of a value `x`."""
        tokens = x.shape[1] if x.ndim > 1 else 1
        positions = self._position_ids
        if site.part == "embed" or positions is None or positions.shape[-1] != tokens:
            every = self.drops[0].whole.shape[1] if self.drops and site.part != "embed" else tokens
            left = self.survivors(every)
            positions = self.past + (torch.arange(tokens, device=x.device)[None] if left is None else left)
        return At(*site[:2], site.part, self.past, positions)


class Dispatcher:
    """Every action on one module, and the hooks that carry them out."""

    def __init__(self, run: Run):
        self.run = run
        self.block: int | None = None  # None for modules inside or outside the blocks
        self.actions: dict[str, list[Callable[..., Any]]] = {stage: [] for stage in STAGES}
        self._handles: dict[str, Any] = {}
        self._own_forward: Callable[..., Any] | None = None

    def add(self, module: nn.Module, stage: str, action: Callable[..., Any]) -> None:
        """Have `action` carried out at `stage` of each call of `module`."""
        self.actions[stage].append(action)
        hook, handles = STAGES[stage], self._handles
        if "before" not in handles:
            handles["before"] = module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        if hook in handles:
            return
        if hook == "entering":
            handles[hook] = module.register_forward_pre_hook(self._entering, with_kwargs=True)
        elif hook == "after":
            handles[hook] = module.register_forward_hook(self._after, prepend=True)
        elif hook == "leaving":
            handles[hook] = module.register_forward_hook(self._leaving)
        elif self._own_forward is None:
            self._replace_forward(module)

    def remove(self, module: nn.Module, stage: str, action: Callable[..., Any]) -> None:
        """Undo `add`; the last action to go takes every hook with it."""
        actions = self.actions[stage]
        actions.pop(next(number for number, other in enumerate(actions) if other is action))
        hook = STAGES[stage]
        if actions or any(map(self.actions.__getitem__, _STAGES_OF[hook])):
            return
        if hook == "forward":
            self._put_back_forward(module)
        elif hook != "before":
            self._handles.pop(hook).remove()
        if not any(self.actions.values()):
            self._handles.pop("before").remove()

    def _replace_forward(self, module: nn.Module) -> None:
        """Hooks cannot leave a module out, so while there is a route the module's `forward` is one that can."""
        self._was_set = "forward" in module.__dict__  # accelerate and nnsight set it on the instance too
        self._own_forward, self._routed = module.forward, self._route
        module.forward = self._routed

    def _put_back_forward(self, module: nn.Module) -> None:
        if module.__dict__.get("forward") is not self._routed:
            _DISPATCHERS.pop(module)  # another tool wrapped it meanwhile, and goes on through this dispatcher
            return
        if self._was_set:
            module.forward = self._own_forward  # type: ignore[assignment]
        else:
            del module.forward
        self._own_forward = None

    def _route(self, *args: Any, **kwargs: Any) -> Any:
        call = self._own_forward
        for action in reversed(self.actions["route"]):
            call = _around(action, call)
        return call(*args, **kwargs)  # type: ignore[misc]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _SUSPENDED:
            return None
        if len(module._forward_hooks) + len(module._forward_pre_hooks) > len(self._handles):
            self._stand_outermost(module)
        for action in self.actions["note"]:
            action(args, kwargs)
        if self.block is None:
            return None
        self.run.enter(self.block, args, kwargs)
        for action in self.actions["cut"]:
            args, kwargs = action(args, kwargs)
        self.run.note_arguments(args, kwargs)
        for action in self.actions["write_in"]:
            args, kwargs = _with_stream(args, kwargs, action(stream_in(args, kwargs)))
        return args, kwargs

    def _stand_outermost(self, module: nn.Module) -> None:
        """Hooks that others put in since then may stand before `after` or behind the reads; step around them."""
        for name, hooks, last in (
            ("entering", module._forward_pre_hooks, True),
            ("after", module._forward_hooks, False),
            ("leaving", module._forward_hooks, True),
        ):
            if name in self._handles and next(reversed(hooks) if last else iter(hooks)) != self._handles[name].id:
                hooks.move_to_end(self._handles[name].id, last=last)  # type: ignore[attr-defined]

    def _entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _SUSPENDED:
            for action in self.actions["read_in"]:
                action(stream_in(args, kwargs))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._through(("write", "restore"), output)

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._through(("cut_out", "drop", "read"), output)

    def _through(self, stages: tuple[str, ...], output: Any) -> Any:
        """Take a module's output through the actions of some stages; None where they left it as it was."""
        if _SUSPENDED:
            return None
        whole = stream_out(output)
        x = unfolded = whole if self.block is not None else self.run.unfolded(whole)
        for stage in stages:
            for action in self.actions[stage]:
                x = action(x)
        if x is unfolded:
            return None
        x = x if self.block is not None else x.reshape(whole.shape)
        return x if isinstance(output, Tensor) else (x, *output[1:])


_DISPATCHERS: "WeakKeyDictionary[nn.Module, Dispatcher]" = WeakKeyDictionary()
_RUNS: "WeakKeyDictionary[nn.Module, Run]" = WeakKeyDictionary()
_SUSPENDED: list[None] = []  # not empty while a forward of the library's own runs


@contextmanager
def suspended() -> Iterator[None]:
    """Let every dispatcher be still, for a forward inside a forward."""
    _SUSPENDED.append(None)
    try:
        yield
    finally:
        _SUSPENDED.pop()


def run_of(places: Sites, stack: str) -> Run:
    """The `Run` of a stack."""
    parent = places.model.get_submodule(places.stack(stack).parent)
    if parent not in _RUNS:
        _RUNS[parent] = Run()
    return _RUNS[parent]


Action = tuple[Site, str, Callable[..., Any]]  # where, at which stage, what


@contextmanager
def acting(places: Sites, run: Run, actions: Iterable[Action]) -> Iterator[None]:
    """Have actions carried out at sites of the stack that `run` is of, until the context is left."""
    added: list[tuple[Dispatcher, nn.Module, str, Callable[..., Any]]] = []
    run.rest()
    try:
        for site, stage, action in actions:
            for module, block, its_stage, its_action in _spread(places, run, site, stage, action):
                dispatcher = _dispatcher(module, run, block)
                dispatcher.add(module, its_stage, its_action)
                added.append((dispatcher, module, its_stage, its_action))
        yield
    finally:
        for dispatcher, module, its_stage, its_action in reversed(added):
            dispatcher.remove(module, its_stage, its_action)


def _spread(
    places: Sites, run: Run, site: Site, stage: str, action: Callable[..., Any]
) -> list[tuple[nn.Module, int | None, str, Callable[..., Any]]]:
    """The modules that an action at a site needs to hear of: for a site that is no block, also those around it."""
    block = places.blocks(site.stack)[site.block]
    if site.part in ("in", "out"):
        return [(block, site.block, stage, action)]
    module = places.module(site)
    if site.part == "embed":
        around: list[Any] = [(above, None, "note", _noting(run)) for above in places.above(site.stack)]
    else:
        around = [(block, site.block, "note", _nothing)]
    return [(module, None, stage, action), *around]


def _dispatcher(module: nn.Module, run: Run, block: int | None) -> Dispatcher:
    known = _DISPATCHERS.get(module)
    if known is None or known.run is not run:
        known = _DISPATCHERS[module] = Dispatcher(run)
    known.block = block
    return known


def _noting(run: Run) -> Callable[..., None]:
    return lambda args, kwargs: run.note_cache(0, args, kwargs)


def _nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keeps a block's dispatcher at work for a site inside the block."""


def _around(action: Callable[..., Any], call: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: action(call, args, kwargs)


def recomputing() -> bool:
    """Whether a backward pass is running, so that a forward now is gradient checkpointing doing it a second time."""
    return torch._C._current_graph_task_id() != -1


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments: the first, or the one named `hidden_states`."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor):
        raise HookError("this block is not given its hidden states as first argument or as `hidden_states`")
    return x


def _with_stream(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def stream_out(output: Any) -> Tensor:
    """The residual stream in a block's output: the tensor itself, or the first of a tuple (on a tensor, `[0]` would be
    a batch item)."""
    x = output[0] if isinstance(output, tuple) else output
    if not isinstance(x, Tensor):
        raise HookError(f"expected a block to return a tensor or a tuple that starts with one, not {type(x).__name__}")
    return x
