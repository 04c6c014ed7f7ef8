"""Where a model can be read and written: its stacks, their blocks, and the parts of a block.

Nothing here knows an architecture. A model class of transformers 5 declares what may be recorded from it
(`_can_record_outputs`): the class of its blocks and of its attention. What declares nothing (diffusers, one's own
module) is read by structure: its longest list of modules of one class.

The parts of a block, each a tensor of shape (batch, tokens, width):

- `embed`: what the stack's embedding module returns (before positions; a vision tower's may be an image of patches);
- `in`, `out`: the residual stream as it enters and leaves the block;
- `attn`, `mlp`: the update that the sub-layer sends towards the stream: the output of its last projection, before
  dropout, before a norm that follows (Gemma, BERT) and before a gate (DiT).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from midstream.errors import HookError

PARTS = ("embed", "in", "out", "attn", "mlp")


class Site(NamedTuple):
    """One place of a model. `block` counts from 0 within the stack; `embed` belongs to block 0."""

    stack: str
    block: int
    part: str


@dataclass(frozen=True)
class Stack:
    """One column of blocks. Holds names only, so that it survives adapters being put in and keeps no model alive."""

    name: str
    owner: str  # the nearest module above the blocks that takes the model's arguments
    parent: str  # the module that holds the blocks
    children: tuple[str, ...]  # the blocks' names in it
    attention: tuple[OutputRecorder, ...]  # how the model declares its attention, if it does

    def __len__(self) -> int:
        return len(self.children)


class Sites:
    """The places of one model: iterate over it for every `Site`, or ask for the modules behind them.

    Names a stack `main` where there is one; else after the part of the configuration it is built from (`text`,
    `vision`), else after its module (`encoder`, `decoder`).
    """

    def __init__(self, model: nn.Module, stacks: dict[str, Stack], default: str | None):
        self.model = model
        self.stacks = stacks
        self._default = default
        self._blocks: dict[str, list[nn.Module]] = {}

    def __iter__(self) -> Iterator[Site]:
        for stack in self.stacks.values():
            yield Site(stack.name, 0, "embed")
            for block in range(len(stack)):
                for part in PARTS[1:]:
                    yield Site(stack.name, block, part)

    def stack(self, name: str | None = None) -> Stack:
        """The stack of this name; without one, the only stack or the model's decoder (LLaVA's `text`)."""
        name = self._default if name is None else name
        if name is None:
            raise HookError(f"this model has several stacks ({', '.join(self.stacks)}); say which with stack=")
        if name not in self.stacks:
            raise HookError(f"there is no stack '{name}'; this model has: {', '.join(self.stacks)}")
        return self.stacks[name]

    def site(self, key: Any, stack: str | None = None) -> Site:
        """The checked `Site` that `key` means: a `Site`, `(part, block)` or `"embed"`; block -1 is the last."""
        if isinstance(key, Site):
            stack, block, part = key
        else:
            part, block = ("embed", 0) if key == "embed" else key
        column = self.stack(stack)
        if part not in PARTS:
            raise HookError(f"there is no part '{part}'; the parts are: {', '.join(PARTS)}")
        if not -len(column) <= block < len(column):
            raise HookError(f"there is no block {block} in stack '{column.name}', which has {len(column)}")
        return Site(column.name, block % len(column), part)

    def blocks(self, stack: str | None = None) -> list[nn.Module]:
        """The blocks of a stack, in order."""
        column = self.stack(stack)
        if column.name not in self._blocks:
            parent = self.model.get_submodule(column.parent)
            self._blocks[column.name] = [parent.get_submodule(child) for child in column.children]
        return self._blocks[column.name]

    def above(self, stack: str | None = None) -> list[nn.Module]:
        """The modules a call passes through before it reaches the stack's blocks, outermost first."""
        names = self.stack(stack).owner.split(".") if self.stack(stack).owner else []
        return [self.model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]

    def module(self, site: Site) -> nn.Module:
        """The module at whose input (`in`) or output (the other parts) the site lies."""
        if site.part == "embed":
            return _embedding(self.above(site.stack)[-1])
        block = self.blocks(site.stack)[site.block]
        if site.part in ("in", "out"):
            return block
        return self.projection(site)

    def attention(self, stack: str | None, block: int) -> nn.Module:
        """The self-attention module of a block: the one the model declares, else the first that is named so."""
        column = self.stack(stack)
        module = self.blocks(column.name)[block]
        path = f"{column.parent}.{column.children[block]}"
        for name, inner in module.named_modules():
            if any(_matches(spec, inner, f"{path}.{name}") for spec in column.attention):
                return inner
        for name, inner in module.named_modules():
            if name and not column.attention and "attention" in type(inner).__name__.lower():
                return inner
        raise HookError(f"block {block} of stack '{column.name}' ({type(module).__name__}) has no attention module")

    def projection(self, site: Site) -> nn.Module:
        """The last projection of an `attn` or `mlp` sub-layer, which brings it back to the width of the stream."""
        block = self.blocks(site.stack)[site.block]
        attention = set(self.attention(site.stack, site.block).modules())
        sublayers = list(_sublayers(block))
        here = next(i for i, sublayer in enumerate(sublayers) if not attention.isdisjoint(sublayer.modules()))
        ends = _projections(sublayers[here])[-1:]
        if site.part == "mlp" and ends:
            after = [leaf for sublayer in sublayers[here + 1 :] for leaf in _projections(sublayer)]
            ends = [leaf for leaf in after if _width(leaf) == _width(ends[0])][-1:]
        if not ends:
            raise HookError(f"no projection ends the {site.part} sub-layer of {type(block).__name__}")
        return ends[0]


def sites(model: nn.Module) -> Sites:
    """The places of `model`, which may be wrapped (peft, DDP, accelerate). Cached until the model's structure changes.

    Raises `HookError` for a compiled model and for one in which no stack of blocks can be found.
    """
    refuse_compiled(model)
    known = _CACHE.get(model)
    if known is None or not _still_true(model, known[0]):
        stacks = _find(model)
        known = _CACHE[model] = (stacks, _default(model, stacks))
    return Sites(model, *known)


_CACHE: "WeakKeyDictionary[nn.Module, tuple[dict[str, Stack], str | None]]" = WeakKeyDictionary()


def refuse_compiled(model: nn.Module) -> None:
    """Raise `HookError` where hooks would be ignored: a compiled or scripted model."""
    forward = model.__dict__.get("forward")
    compiled = type(model).__name__ == "OptimizedModule" or model._compiled_call_impl is not None
    if compiled or isinstance(model, torch.jit.ScriptModule) or hasattr(forward, "_torchdynamo_orig_callable"):
        raise HookError("this model is compiled and would ignore hooks; use the model as it was before compiling")


def _still_true(model: nn.Module, stacks: dict[str, Stack]) -> bool:
    try:
        return all(tuple(model.get_submodule(s.parent)._modules) == s.children for s in stacks.values())
    except AttributeError:
        return False


def _find(model: nn.Module) -> dict[str, Stack]:
    """Every stack of the model by name, in the order of its modules."""
    columns = _declared_columns(model) or _structural_columns(model)
    if not columns:
        raise HookError(
            f"{type(model).__name__} declares no recordable hidden states and holds no list of modules of one class, "
            "so no blocks can be found in it"
        )
    names = ["main"] if len(columns) == 1 else [_name(model, column) for column in columns]
    return {name: Stack(name, *column) for name, column in zip(names, columns, strict=True)}


Column = tuple[str, str, tuple[str, ...], tuple[OutputRecorder, ...]]  # the fields of a Stack after its name


def _declared_columns(model: nn.Module) -> list[Column]:
    """Blocks that a transformers class inside `model` declares as the source of its hidden states, by their holder."""
    found: dict[tuple[str, str], list[str]] = {}
    owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for path, module in model.named_modules():
        owner = _nearest(path, owners)
        recorders = [] if owner is None else _recorders(owners[owner], "hidden_states")
        if owner is not None and any(_matches(spec, module, path) for spec in recorders):
            parent, _, child = path.rpartition(".")
            found.setdefault((owner, parent), []).append(child)
    return [
        (owner, parent, tuple(children), tuple(_recorders(owners[owner], "attentions")))
        for (owner, parent), children in found.items()
    ]


def _nearest(path: str, owners: dict[str, PreTrainedModel]) -> str | None:
    """The path of the transformers model right above the module at `path`."""
    while path:
        path = path.rpartition(".")[0]
        if path in owners:
            return path
    return None


def _recorders(model: PreTrainedModel, key: str) -> list[OutputRecorder]:
    """What `model`'s class declares as the source of `key`, each as an `OutputRecorder`."""
    declared = (getattr(model, "_can_record_outputs", None) or {}).get(key, [])
    recorders = []
    for spec in declared if isinstance(declared, list) else [declared]:
        if isinstance(spec, str):
            spec = OutputRecorder(target_class=cast(Any, None), class_name=spec)
        recorders.append(spec if isinstance(spec, OutputRecorder) else OutputRecorder(target_class=spec))
    return recorders


def _matches(spec: OutputRecorder, module: nn.Module, path: str) -> bool:
    """Whether transformers would record `module`, which lies at `path`, for this declaration."""
    of_class = spec.target_class is not None and isinstance(module, spec.target_class)
    of_name = spec.class_name is not None and path.endswith(spec.class_name)
    in_layer = spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f".{path}."
    return (of_class or of_name) and in_layer


def _structural_columns(model: nn.Module) -> list[Column]:
    """The longest lists of modules of one class that lie in no other such list; each is a stack."""
    lists: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        of_one_class = len({type(child) for child in module.children()}) == 1
        is_list = isinstance(module, nn.ModuleList | nn.Sequential) and of_one_class
        if is_list and not any(path.startswith(outer + ".") for outer in lists):
            lists[path] = module
    longest = max((len(module._modules) for module in lists.values()), default=0)
    return [
        (path.rpartition(".")[0], path, tuple(module._modules), ())
        for path, module in lists.items()
        if len(module._modules) == longest
    ]


def _name(model: nn.Module, column: Column) -> str:
    """A stack's name among several: the sub-configuration it is built from, else its owner's own name."""
    owner = column[0]
    config = getattr(model.get_submodule(owner), "config", None)
    for module in model.modules():
        whole = getattr(module, "config", None)
        for key in getattr(whole, "sub_configs", {}):
            if config is not None and getattr(whole, key, None) is config:
                return key.removesuffix("_config")
    return owner.rpartition(".")[2] or column[1]


def _default(model: nn.Module, stacks: dict[str, Stack]) -> str | None:
    """The only stack, or the one transformers calls the decoder; None where there is no such choice."""
    if len(stacks) == 1:
        return next(iter(stacks))
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    decoder = whole.get_decoder() if whole is not None else None
    return next((name for name, s in stacks.items() if model.get_submodule(s.owner) is decoder), None)


def _embedding(owner: nn.Module) -> nn.Module:
    """The embedding module of a transformers model."""
    try:
        return owner.get_input_embeddings()  # type: ignore[operator, return-value]
    except (AttributeError, NotImplementedError):
        raise HookError(f"{type(owner).__name__} names no embedding; use the part 'in' of block 0") from None


def _sublayers(block: nn.Module) -> Iterator[nn.Module]:
    """The children of a block; lists of modules are looked through."""
    for child in block.children():
        if isinstance(child, nn.ModuleList):
            yield from _sublayers(child)
        else:
            yield child


def _projections(module: nn.Module) -> list[nn.Module]:
    """The linear maps inside `module`, in order; an adapter around one counts as that one."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and (weight.ndim == 2 or isinstance(module, nn.Linear)):
        return [] if isinstance(module, nn.Embedding) else [module]
    return [leaf for child in module.children() for leaf in _projections(child)]


def _width(projection: nn.Module) -> int:
    """The number of features that a linear map puts out (`nf` is what transformers' Conv1D calls it)."""
    return getattr(projection, "out_features", None) or projection.nf  # type: ignore[return-value]
