"""Models of the Hugging Face Hub, by id, from its local cache or the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

from midstream.errors import AssetError
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
    from huggingface_hub import errors, snapshot_download

    repository, wanted = _parts(name)
    try:
        with bars_only_on_a_terminal():
            return Path(
                snapshot_download(repository, revision=wanted, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
            )
    except errors.GatedRepoError as error:
        raise AssetError(
            f"{repository} is gated: accept its licence at https://huggingface.co/{repository} and log in with "
            "`hf auth login`, then try again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AssetError(f"The Hub has no model {repository}, or shows it only to those logged in.") from error
    except errors.RevisionNotFoundError as error:
        raise AssetError(f"The Hub's model {repository} has no revision {wanted}.") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise AssetError(
            f"{name} is not in the Hugging Face cache and the Hub cannot be reached; connect to the network, or use a "
            "packaged model (smollm2, minilm, gemma3-270m), a tiny one (tiny:llama) or a local folder."
        ) from error
