"""Models of the Hugging Face Hub, by id, from its local cache or the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

from midstream.hub import fetch_snapshot
from midstream.zoo.bars import bars_only_on_a_terminal

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
"""Subfolders hold other formats; `consolidated` files repeat the weights."""


def is_id(name: str) -> bool:
    """Whether a name can be a Hub id: `owner/model` or `model`, with `@revision` where one is meant."""
    part = r"[A-Za-z0-9_][\w.-]*"
    return re.fullmatch(rf"{part}(/{part})?(@{part}(/{part})*)?", name) is not None


def folder(name: str) -> Path:
    """The snapshot of a Hub id: the complete one in the cache, else fetched. Raises `AssetError`."""
    cached = _cached(name)
    return cached if cached and _is_complete(cached) else _fetch(name)


def revision(name: str) -> str:
    """The commit in the cache, or `hub:<id>@<revision>` where there is none."""
    cached = _cached(name)
    repository, wanted = _parts(name)
    return cached.name if cached else f"hub:{repository}@{wanted or 'main'}"


def _parts(name: str) -> tuple[str, str | None]:
    repository, _, wanted = name.partition("@")
    return repository, wanted or None


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, wanted = _parts(name)
    config = try_to_load_from_cache(repository, "config.json", revision=wanted)
    return Path(config).parent if isinstance(config, str) else None


def _is_complete(snapshot: Path) -> bool:
    """Whether all weights are there: a fetch that was cut off leaves some files out."""
    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        return all((snapshot / shard).exists() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return any(snapshot.glob("*.safetensors"))


def _fetch(name: str) -> Path:
    repository, wanted = _parts(name)
    with bars_only_on_a_terminal():
        return fetch_snapshot(
            repository,
            wanted,
            kind="model",
            wanted=_WANTED,
            unwanted=_UNWANTED,
            instead="a packaged model (smollm2, minilm, gemma3-270m), a tiny one (tiny:llama) or a local folder",
        )
