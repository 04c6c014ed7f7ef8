"""Models behind one `load(name)`: packaged, trained here, tiny, local or from the Hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream.assets import Card, by_revision
from midstream.errors import AssetError, RequestError
from midstream.zoo import hub, organisms, packaged

if TYPE_CHECKING:
    import torch

    from midstream.zoo.loaded import Loaded

__all__ = ["Card", "Loaded", "card", "cards", "fetch", "load", "revision", "tiny"]


def __getattr__(name: str) -> Any:
    """`Loaded` and `tiny` on first use: they need torch, and the command line asks for cards without it."""
    if name == "Loaded":
        from midstream.zoo.loaded import Loaded

        return Loaded
    if name == "tiny":
        import midstream.zoo.tiny as tiny_models

        return tiny_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> Loaded:
    """A model in eval mode with its tokenizer.

    `name` is a packaged model (`smollm2`, `minilm`, `gemma3-270m`), a miniature trained here (`zoo.organisms.names()`),
    `tiny:<family>` (random weights), a local folder or a Hub id, with `@revision` where a certain one is meant.
    `device` is `cpu`, `cuda`, `cuda:1` or `auto` (the GPU where there is one; a model too large for it is spread).
    `dtype` is float32 on the CPU and bfloat16 on a GPU unless told. Raises `RequestError` for a name, device,
    precision or attention that cannot be one and `AssetError` for a model that cannot be had.
    """
    from midstream.zoo.loaded import Loaded, load_folder, load_tiny

    options: dict[str, Any] = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    if name.startswith("tiny:"):
        model, tokenizer = load_tiny(name.removeprefix("tiny:"), **options)
        processor = None
    else:
        model, tokenizer, processor = load_folder(fetch(name), name=name, **options)
    return Loaded(name, model, tokenizer, revision(name), card(name), processor)


@by_revision
def fetch(name: str) -> Path:
    """Make sure that a model is on this machine, and say in which folder; raises as `load` does."""
    if name in packaged.PACKAGED:
        return packaged.folder(name)
    if name in organisms.names():
        return organisms.folder(name)
    if name.startswith("tiny:"):
        raise RequestError(f"{name} is made on the spot; there is nothing to fetch.")
    if local := _local_folder(name):
        return local
    _require_hub_id(name)
    try:
        return hub.folder(name)
    except AssetError as error:
        raise AssetError(f"{error}{_hint(name)}") from error


@by_revision
def revision(name: str) -> str:
    """What identifies the weights that `load` gives, without loading them.

    Packaged: the pinned SHA-256; `tiny:<family>@<hash of the recipe>`; trained here or a folder: SHA-256 over weights
    and configuration; the Hub: the commit in the cache, or `hub:<id>@main` before it is fetched.
    """
    if name in packaged.PACKAGED:
        return packaged.PACKAGED[name].revision
    if name.startswith("tiny:"):
        from midstream.zoo.tiny_tokenizer import recipe

        return f"{name}@{recipe(name.removeprefix('tiny:'))}"
    if local := _shipped_or_local(name):
        from midstream.zoo.loaded import folder_revision

        return folder_revision(local)
    _require_hub_id(name)
    return hub.revision(name)


def cards() -> dict[str, Card]:
    """The card of every packaged model, of the miniatures trained here and of the tiny ones."""
    found = {name: model.card for name, model in packaged.PACKAGED.items()}
    return found | {name: organisms.asset_card(name) for name in organisms.names()} | {"tiny:<family>": _TINY_CARD}


@by_revision
def card(name: str) -> Card:
    """The card of a model; of folders and Hub ids, what can be said without opening them."""
    if name in packaged.PACKAGED:
        return packaged.PACKAGED[name].card
    if name in organisms.names():
        return organisms.asset_card(name)
    if name.startswith("tiny:"):
        return _TINY_CARD
    if local := _local_folder(name):
        return Card(local.name, "A checkpoint on this machine.", str(local), "that of the checkpoint", "", "")
    page = f"https://huggingface.co/{name.partition('@')[0]}"
    return Card(name, "A model of the Hugging Face Hub.", page, f"see {page}", "", "")


_TINY_CARD = Card(
    title="Tiny random models",
    what="The real architectures with 4 blocks of width 32 and seeded random weights, for tests and dry runs.",
    source="made on the spot",
    licence="Apache-2.0",
    size="nothing to fetch",
    sha256="",
    note="They have learned nothing: what they show is that a method runs, never that a claim holds.",
)


def _shipped_or_local(name: str) -> Path | None:
    return organisms.WEIGHTS / name if name in organisms.names() else _local_folder(name)


def _local_folder(name: str) -> Path | None:
    """The folder a name stands for; one without a config.json counts only if the name is clearly a path."""
    path = Path(name or "no name").expanduser()
    if (path / "config.json").exists() or (path.is_dir() and not hub.is_id(name)):
        return path.resolve()
    return None


def _require_hub_id(name: str) -> None:
    if not hub.is_id(name):
        raise RequestError(
            f"{name!r} is no folder on this machine, no model that comes with midstream or in a package "
            f"({', '.join(_known())}), no tiny:<family> and no Hub id (owner/model).{_hint(name)}"
        )


def _known() -> list[str]:
    return [*packaged.PACKAGED, *organisms.names()]


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, _known(), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
