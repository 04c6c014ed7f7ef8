"""From a folder with a checkpoint to a model ready to use."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from midstream.assets import Card, by_revision, file_sha256
from midstream.errors import AssetError, RequestError
from midstream.zoo.bars import bars_only_on_a_terminal
from midstream.zoo.organisms import CARD

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "merges.txt")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with what belongs to it."""

    name: str
    model: Any
    tokenizer: Any
    """None where the model takes no text."""
    revision: str
    card: Card
    processor: Any = None
    """What turns images (and text) into inputs; None where the model takes text alone."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Sentence vectors of an encoder: the mean of the last hidden states over real tokens, scaled to length 1.

        Texts longer than the model's window are cut. Returns (texts, width) in float32 on the CPU.
        """
        window = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        vectors = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            inputs = self.tokenizer(batch, padding=True, truncation=True, max_length=window, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            hidden = self.model(**inputs).last_hidden_state.float()  # (batch, tokens, width)
            mask = inputs["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors.append(nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(vectors) if vectors else torch.empty(0, self.model.config.hidden_size)


def load_folder(
    folder: Path, *, name: str, device: str, dtype: torch.dtype | str | None, attn_implementation: str | None
) -> tuple[Any, Any, Any]:
    """Model, tokenizer and processor of a folder in the Hub's layout; safetensors only, never code from the folder.

    Raises `AssetError` for a checkpoint that cannot be read this way.
    """
    config = _checked_config(folder, name)
    _check_attention(attn_implementation)
    options = _placement(device, dtype, folder)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    with bars_only_on_a_terminal():
        model = _read_weights(_model_class(config, name), folder, name, options)
        return model.eval(), load_tokenizer(folder), _load_processor(folder)


def _read_weights(model_class: Any, folder: Path, name: str, options: dict[str, Any]) -> Any:
    """The model with all of its weights; one that the files lack is an error, transformers would draw it at random."""
    try:
        model, report = model_class.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise AssetError(
            f"The checkpoint of {name} in {folder} cannot be read ({_first_line(error).rstrip('.')}); if it is "
            "damaged, remove that folder and load it again."
        ) from error
    # encoders are often saved without the pooler, which only next-sentence prediction uses
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise AssetError(f"The checkpoint of {name} in {folder} lacks {len(missing)} weights, first {missing[0]}.")
    return model


def _check_attention(name: str | None) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if name is not None and name not in known:
        raise RequestError(f"There is no attention implementation {name!r}; ask for 'eager' or 'sdpa'.")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none."""
    from transformers import AutoTokenizer

    if not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    if not any((folder / file).exists() for file in ("preprocessor_config.json", "processor_config.json")):
        return None
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _checked_config(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise AssetError(f"{name} has no config.json in {folder}, so it is not a model of the transformers library.")
    if not any(folder.glob("*.safetensors")):
        raise AssetError(
            f"{name} has no safetensors file at its top level, and weights in other formats are not read, because a "
            "pickle can run any code; name a revision that has them (ID@refs/pr/N, where the Hub's converter made one)."
        )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _model_class(config: dict[str, Any], name: str) -> Any:
    """The class the checkpoint names, or the one its configuration stands for."""
    import transformers

    declared = (config.get("architectures") or [""])[0]
    if found := getattr(transformers, declared, None):
        return found
    if config.get("auto_map"):
        raise AssetError(f"{name} needs code of its own ({declared or 'auto_map'}), which is never run here.")
    if declared:
        raise AssetError(f"{name} is of class {declared}, which transformers {transformers.__version__} does not have.")
    return transformers.AutoModel


def _placement(device: str, dtype: torch.dtype | str | None, folder: Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that settle device and precision."""
    chosen = choose_device(device)
    precision = as_dtype(dtype) or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)
    if chosen.type == "cpu":
        return {"dtype": precision}
    if device == "auto" and parameter_count(folder) * precision.itemsize * 1.2 > torch.cuda.mem_get_info()[0]:
        return {"dtype": precision, "device_map": "auto"}  # accelerate spreads it over all GPUs and the CPU
    return {"dtype": precision, "device_map": {"": chosen}}


def choose_device(device: str) -> torch.device:
    """The device of this name; `auto` is the GPU where there is one. Raises `RequestError` where there is none such."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"There is no device {device!r}; ask for 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"Device {device!r} was asked for, but PyTorch sees {torch.cuda.device_count()} GPUs here.")
    return chosen


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name. Raises `RequestError` for a name that is not one of a floating-point type."""
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RequestError(f"There is no precision {dtype!r}; ask for 'float32', 'bfloat16' or 'float16'.")
    return found


def parameter_count(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold, read from their headers alone."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
        count += sum(functools.reduce(int.__mul__, shape, 1) for shape in shapes)
    return count


def folder_revision(folder: Path) -> str:
    """SHA-256 over a folder's safetensors and JSON files, names included; a card only describes, so it is left out."""
    paths = sorted(path for kind in ("safetensors", "json") for path in folder.glob(f"*.{kind}") if path.name != CARD)
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.name} {_known_sha256(path, facts.st_size, facts.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _known_sha256(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@by_revision
def load_tiny(
    family: str, *, device: str, dtype: torch.dtype | str | None, attn_implementation: str | None
) -> tuple[Any, Any]:
    """A tiny random model of a family, and the tiny tokenizer where the family reads text."""
    from midstream.zoo import tiny, tiny_tokenizer

    tokenizer = tiny_tokenizer.build(family)
    model: Any = tiny.build(family, vocab_size=len(tokenizer)) if tokenizer else tiny.build(family)
    _check_attention(attn_implementation)
    if attn_implementation and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attn_implementation)
    return model.to(choose_device(device), as_dtype(dtype) or torch.float32), tokenizer
