"""Which inputs an output rests on, by attention and its gradient, through towers that are joined together.

R-GAE: every attention layer gives Ā = mean over heads of max(A ⊙ ∂y/∂A, 0), and a stack's relevance map starts as the
identity and grows by R ← R + Ā R (Chefer, Gur and Wolf, "Generic Attention-model Explainability", ICCV 2021). For a
vision-language model the maps of its parts are multiplied: text → query → patch → patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midstream.hooks import attend, read


class AttentionPlace(nn.Identity):
    """Where a module of one's own lets its attention weights (batch, heads, query, key) be seen and changed."""


class Gates(dict[int, Tensor]):
    """Masks of ones by which attention weights are multiplied: a gradient with respect to one is A ⊙ ∂y/∂A."""

    def gate(self, number: int, attention_weights: Tensor) -> Tensor:
        """The weights times a new mask, remembered under `number`."""
        self[number] = torch.ones_like(attention_weights, requires_grad=True)
        return attention_weights * self[number]

    def at_layer(self, attention_weights: Tensor, at: Any) -> Tensor:
        """As `attend` calls it."""
        return self.gate(at.layer, attention_weights)


def head_mean(flow: Tensor) -> Tensor:
    """Ā (batch, query, key) of A ⊙ ∂y/∂A (batch, heads, query, key): what argues for y, averaged over heads."""
    return flow.clamp(min=0).mean(1).float()


def accumulate(maps: Sequence[Tensor]) -> Tensor:
    """R (batch, tokens, tokens) of a stack from its layers' Ā, the first layer first: R = I, then R ← R + Ā R."""
    batch, tokens, _ = maps[0].shape
    relevance = torch.eye(tokens, device=maps[0].device).expand(batch, -1, -1)
    for layer in maps:
        relevance = relevance + layer @ relevance
    return relevance


@contextmanager
def gated_places(module: nn.Module, gates: Gates) -> Iterator[None]:
    """Gates on every `AttentionPlace` of a module, numbered in the order of its modules."""
    places = [inner for inner in module.modules() if isinstance(inner, AttentionPlace)]
    with ExitStack() as undo:
        for number, place in enumerate(places):

            def hook(_: nn.Module, args: Any, weights: Tensor, number: int = number) -> Tensor:
                return gates.gate(number, weights)

            undo.callback(place.register_forward_hook(hook).remove)
        yield


@dataclass(frozen=True)
class Chain:
    """The relevance of an image for one predicted word, part by part, and beside it a measure without attention."""

    text_to_query: Tensor
    """(batch, queries): the row of the predicting position, at the visual tokens."""
    query_to_patch: Tensor
    """(batch, queries, patches): the projector."""
    patch_to_patch: Tensor
    """(batch, patches, patches): the vision tower, its class token left out."""
    gradient_times_input: Tensor
    """(batch, patches): |Σ_d x ∂y/∂x| of the features that the projector is given."""

    @property
    def text_to_patch(self) -> Tensor:
        """(batch, patches): the product of the three."""
        return torch.einsum("bq,bqp,bpn->bn", self.text_to_query, self.query_to_patch, self.patch_to_patch)


def trace(model: Any, inputs: dict[str, Tensor], last: Tensor, targets: Tensor) -> Chain:
    """The chain of relevance maps of a LLaVA-type model, for the logit of `targets` (batch,) at positions `last`.

    `inputs` are the forward's own: `pixel_values`, `input_ids` and, where rows are padded, `attention_mask`. A
    projector with attention of its own has it in `AttentionPlace`s and maps their Ā to (batch, queries, patches) by
    `query_to_patch(maps, patches)`; one without that method works token by token, and its map is the identity. Where
    the method is None, the projector mixes patches in ways that R-GAE does not follow: its map is NaN.
    """
    vision, text, own = Gates(), Gates(), Gates()
    projector, layer = model.model.multi_modal_projector, model.config.vision_feature_layer
    block = layer if layer < 0 else layer - 1  # hidden state 0 is what enters the first block
    with (
        torch.enable_grad(),
        attend(model, probs=vision.at_layer, stack="vision"),
        attend(model, probs=text.at_layer, stack="text"),
        gated_places(projector, own),
        read(model, "out", layers=[block], stack="vision", grad=True) as features,
    ):
        logits = model(**inputs).logits
        chosen = logits[torch.arange(len(last)), last, targets.to(logits.device)].sum()
        patches = features[block]
        wanted = [*_in_order(vision), *_in_order(text), *_in_order(own), patches]
        found = torch.autograd.grad(chosen, wanted, allow_unused=True)
    # the tower's blocks above the layer that is read have no gradient: they add nothing
    flows = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    maps = [head_mean(flow) for flow in flows[:-1]]
    in_vision, in_text = maps[: len(vision)], maps[len(vision) : len(vision) + len(text)]
    is_query = inputs["input_ids"].to(last.device) == model.config.image_token_id
    row = accumulate(in_text)[torch.arange(len(last)), last]
    first = patches.shape[1] - _patches(model)  # 1 where there is a class token
    text_to_query = row[is_query.to(row.device)].view(len(last), -1)
    of_projector = maps[len(vision) + len(text) :]
    return Chain(
        text_to_query=text_to_query,
        query_to_patch=_query_to_patch(projector, of_projector, text_to_query.shape[1], patches[:, first:]),
        patch_to_patch=accumulate(in_vision)[:, first:, first:],
        gradient_times_input=(patches * flows[-1]).sum(-1).abs()[:, first:].float().detach(),
    )


def _in_order(gates: Gates) -> list[Tensor]:
    return [gates[number] for number in sorted(gates)]


def _patches(model: Any) -> int:
    vision = model.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def _query_to_patch(projector: nn.Module, maps: list[Tensor], queries: int, patches: Tensor) -> Tensor:
    batch, count, _ = patches.shape
    own: Any = getattr(projector, "query_to_patch", lambda maps, patches: torch.eye(patches)[None])
    found: Tensor = torch.full((1, queries, count), torch.nan) if own is None else own(maps, count)
    return found.to(patches.device).expand(batch, -1, -1)
