"""Bricks on the upper blocks of a frozen language model: LoRA adapters that are trained, swapped and merged by name.

The blocks below are the same for every brick, so their output is computed once for each text and kept; from there on
only the upper blocks run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from midstream.hooks import route, sites, write
from midstream.train.loop import Schedule, fit


@contextmanager
def from_block(model: nn.Module, block: int, stream: Tensor) -> Iterator[None]:
    """Start every forward at `block`, with `stream` (batch, tokens, width) as what the blocks below would hand on."""
    with route(model, skip=range(block)), write(model, {("in", block): lambda x, at: stream}):
        yield


def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihoods (rows, tokens − 1), in nats, of each token of `ids` (rows, tokens) after the first."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()
    targets = ids[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


class Bricks:
    """LoRA adapters on every linear map of the blocks from `first` on; at most one is active, none at the start.

    The model is changed in place and restored by `unload`. `rank` is that of a brick where none other is asked for.
    """

    def __init__(self, model: Any, first: int, rank: int):
        self.model, self.first, self.rank = model, first, rank
        self._peft: Any = None
        self._targets = _linear_maps(model, first)

    def add(self, name: str, seed: int, rank: int | None = None) -> None:
        """A new brick that changes nothing yet: its second factor is zero."""
        from peft import LoraConfig, get_peft_model

        size = rank or self.rank
        stored_transposed = any(isinstance(self.model.get_submodule(t), Conv1D) for t in self._targets)
        config = LoraConfig(r=size, lora_alpha=size, target_modules=self._targets, fan_in_fan_out=stored_transposed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._peft is None:
                self._peft = get_peft_model(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)

    def copy(self, source: str, name: str) -> None:
        """A brick with the weights of another, to be trained further without changing that one."""
        self.merge([source], [1.0], name)

    def merge(self, names: Sequence[str], weights: Sequence[float], name: str) -> None:
        """A brick whose update is exactly Σ weight · update: factors are put side by side, ranks add up."""
        self._peft.base_model.add_weighted_adapter(list(names), list(weights), name, combination_type="cat")

    def scramble(self, name: str, seed: int) -> None:
        """Permute the outputs of a brick's updates: the same size and rank, the direction lost."""
        random = torch.Generator().manual_seed(seed)
        for factor in self._factors(name, "lora_B"):
            factor.data = factor.data[torch.randperm(len(factor), generator=random).to(factor.device)]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """One brick active, or none."""
        with ExitStack() as stack:
            if name is None and self._peft is not None:
                stack.enter_context(self._peft.disable_adapter())
            elif name is not None:
                self._peft.set_adapter(name)
            yield

    def train(self, name: str, ids: Tensor, stream: Tensor, schedule: Schedule, batch: int, seed: int) -> float:
        """Train one brick on texts `ids` (texts, tokens) whose `stream` (texts, tokens, width) enters block `first`.

        Returns the mean loss of the last quarter of the steps, in nats per token.
        """
        self._peft.set_adapter(name)

        def loss(model: Any, rows: Tensor) -> Tensor:
            with from_block(self.model, self.first, stream[rows.cpu()]):
                return token_losses(self.model, ids[rows.cpu()]).mean()

        with torch.enable_grad():
            log = fit(self.model, _epochs(len(ids), batch, seed), loss, schedule)
        return float(log["loss"].tail(max(1, schedule.steps // 4)).mean())

    def losses(self, name: str | None, ids: Tensor, stream: Tensor, batch: int) -> Tensor:
        """Losses (texts, tokens − 1) of texts under one brick, or under none."""
        parts = []
        with torch.no_grad(), self.using(name):
            for some, below in zip(ids.split(batch), stream.split(batch), strict=True):
                with from_block(self.model, self.first, below):
                    parts.append(token_losses(self.model, some).cpu())
        return torch.cat(parts)

    def unload(self) -> None:
        """Take every brick out again."""
        if self._peft is not None:
            self._peft.unload()
            self._peft = None

    def _factors(self, name: str, which: str) -> list[Any]:
        suffix = f"{which}.{name}.weight"
        return [parameter for key, parameter in self.model.named_parameters() if key.endswith(suffix)]


def _linear_maps(model: nn.Module, first: int) -> list[str]:
    """Full names of the linear maps in the blocks from `first` on."""
    stack = sites(model).stack()
    return [
        f"{stack.parent}.{child}.{name}"
        for child in stack.children[first:]
        for name, module in model.get_submodule(f"{stack.parent}.{child}").named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def _epochs(items: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices; every item once before any comes again."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(items, generator=random).split(batch)
