"""Visual projectors that papers compare with: from patches (batch, N, d_v) to visual tokens (batch, M, d_llm).

A projector with attention has it in `AttentionPlace`s, and its `query_to_patch(maps, patches)` makes of their Ā
(see `midstream.measure.relevance`) the map from its tokens to the patches, (batch, M, N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from midstream.measure.relevance import AttentionPlace, accumulate


def side(count: int) -> int:
    """The side of a square grid of `count` cells. Raises `ValueError` for a count that is no square."""
    root = math.isqrt(count)
    if root * root != count:
        raise ValueError(f"A square grid was expected, and {count} is no square; is the class token still among them?")
    return root


def mlp(vision_width: int, text_width: int, layers: int = 2) -> nn.Sequential:
    """LLaVA-1.5's projector of one token: Linear, then GELU and Linear for each further layer."""
    maps: list[nn.Module] = [nn.Linear(vision_width, text_width)]
    for _ in range(layers - 1):
        maps += [nn.GELU(), nn.Linear(text_width, text_width)]
    return nn.Sequential(*maps)


class Uncompressed(nn.Module):
    """LLaVA-1.5: the MLP on every patch, M = N."""

    def __init__(self, vision_width: int, text_width: int, *, layers: int = 2):
        super().__init__()
        self.mlp = mlp(vision_width, text_width, layers)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual tokens (batch, N, d_llm) of patches (batch, N, d_v)."""
        return self.mlp(patches)


class Attention(nn.Module):
    """Multi-head attention whose weights pass through a place where they can be seen."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.place = AttentionPlace()

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(batch, queries, width) of what each query finds in `context` (batch, keys, width)."""
        states = self.query(queries), self.key(context), self.value(context)
        q, k, v = (rearrange(x, "batch n (heads width) -> batch heads n width", heads=self.heads) for x in states)
        attention_weights = self.place((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return self.out(rearrange(attention_weights @ v, "batch heads n width -> batch n (heads width)"))


def feed_forward(width: int) -> nn.Sequential:
    """A normalised feed-forward sub-layer, four times as wide inside."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class QFormerLayer(nn.Module):
    """Queries attend to one another, then to the patches, then each is transformed."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.among, self.across = Attention(width, heads), Attention(width, heads)
        self.norm_among, self.norm_across = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = feed_forward(width)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """(batch, queries, width) of the same."""
        normed = self.norm_among(queries)
        queries = queries + self.among(normed, normed)
        queries = queries + self.across(self.norm_across(queries), patches)
        return queries + self.feed_forward(queries)


class QFormer(nn.Module):
    """BLIP-2's Q-Former: M learned queries read the patches in `depth` layers of self- and cross-attention."""

    def __init__(self, vision_width: int, text_width: int, *, tokens: int, heads: int, depth: int = 2):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, vision_width))
        self.norm_patches, self.norm_out = nn.LayerNorm(vision_width), nn.LayerNorm(vision_width)
        self.layers = nn.ModuleList(QFormerLayer(vision_width, heads) for _ in range(depth))
        self.out = nn.Linear(vision_width, text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual tokens (batch, M, d_llm) of patches (batch, N, d_v)."""
        normed = self.norm_patches(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            queries = layer(queries, normed)
        return self.out(self.norm_out(queries))

    def query_to_patch(self, maps: Sequence[Tensor], patches: int) -> Tensor:
        """R_QP of the Ā of self- and cross-attention in turn, each an attention over [patches; queries]."""
        queries, joint = maps[0].shape[1], []
        for number, layer in enumerate(maps):
            before = patches if number % 2 == 0 else 0  # self-attention looks at queries, cross-attention at patches
            joint.append(nn.functional.pad(layer, (before, queries + patches - before - layer.shape[2], patches, 0)))
        return accumulate(joint)[:, patches:, :patches]


class ResamplerLayer(nn.Module):
    """Latents attend to [patches; latents], then each is transformed."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.norm = Attention(width, heads), nn.LayerNorm(width)
        self.feed_forward = feed_forward(width)

    def forward(self, latents: Tensor, patches: Tensor) -> Tensor:
        """(batch, latents, width) of the same."""
        normed = self.norm(latents)
        latents = latents + self.attention(normed, torch.cat([patches, normed], 1))
        return latents + self.feed_forward(latents)


class Resampler(nn.Module):
    """Flamingo's Perceiver resampler: M learned latents, and a learned position for each patch."""

    def __init__(self, vision_width: int, text_width: int, *, tokens: int, heads: int, patches: int, depth: int = 2):
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(tokens, vision_width))
        self.positions = nn.Parameter(0.02 * torch.randn(patches, vision_width))
        self.norm_patches, self.norm_out = nn.LayerNorm(vision_width), nn.LayerNorm(vision_width)
        self.layers = nn.ModuleList(ResamplerLayer(vision_width, heads) for _ in range(depth))
        self.out = nn.Linear(vision_width, text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual tokens (batch, M, d_llm) of patches (batch, N, d_v)."""
        placed = self.norm_patches(patches) + self.positions
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, placed)
        return self.out(self.norm_out(latents))

    def query_to_patch(self, maps: Sequence[Tensor], patches: int) -> Tensor:
        """R_QP: each Ā is already an attention over [patches; latents]; patches attend to nothing here."""
        joint = [nn.functional.pad(layer, (0, 0, patches, 0)) for layer in maps]
        return accumulate(joint)[:, patches:, :patches]


class Bottleneck(nn.Module):
    """ResNet's block: 1×1, 3×3 and 1×1 convolutions around which the input is added."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 2
        self.body = nn.Sequential(
            *(nn.Conv2d(width, inner, 1), nn.GroupNorm(1, inner), nn.SiLU()),
            *(nn.Conv2d(inner, inner, 3, padding=1), nn.GroupNorm(1, inner), nn.SiLU()),
            *(nn.Conv2d(inner, width, 1), nn.GroupNorm(1, width)),
        )

    def forward(self, grid: Tensor) -> Tensor:
        """(batch, width, rows, columns) of the same."""
        return nn.functional.silu(grid + self.body(grid))


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: convolutions, adaptive pooling, convolutions, then an MLP; learned positions."""

    query_to_patch = None  # a convolution has no attention, so R-GAE has no map of it

    def __init__(self, vision_width: int, text_width: int, *, tokens: int, patches: int, depth: int = 2):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(patches, vision_width))
        self.before = nn.Sequential(*(Bottleneck(vision_width) for _ in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(side(tokens))
        self.after = nn.Sequential(*(Bottleneck(vision_width) for _ in range(depth)))
        self.mlp = mlp(vision_width, text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual tokens (batch, M, d_llm) of patches (batch, N, d_v)."""
        placed = patches + self.positions
        grid = rearrange(placed, "batch (row column) width -> batch width row column", row=side(patches.shape[1]))
        pooled = self.after(self.pool(self.before(grid)))
        return self.mlp(rearrange(pooled, "batch width row column -> batch (row column) width"))
