"""Checkpoints in folders and in the Hub's cache: loaded as saved, safetensors only, never code from the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from midstream import zoo
from midstream.errors import AssetError, RequestError
from midstream.zoo import loaded, tiny, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = tiny_tokenizer.build("llama")
    tiny.build("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, owner_name: str, folder: Path, reference: str = "main") -> Path:
    """The layout of the Hub's client: refs name a commit, snapshots hold its files."""
    repository = cache / f"models--{owner_name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (repository / "refs" / reference).parent.mkdir(parents=True)
    (repository / "refs" / reference).write_text(COMMIT)
    return snapshot


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(300, 320)[None]).logits


def test_a_folder_gives_the_saved_model_bit_for_bit_and_its_tokenizer(saved: Path) -> None:
    found = zoo.load(str(saved))
    assert not found.model.training
    assert torch.equal(logits(found.model), logits(tiny.build("llama", vocab_size=len(found.tokenizer))))
    text = "A good movie.\n"
    assert found.tokenizer(text).input_ids == tiny_tokenizer.build("llama")(text).input_ids
    assert found.processor is None
    assert found.card.source == str(saved)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "dit"])
def test_every_family_comes_back_with_all_its_weights(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    state = zoo.load(str(tmp_path)).model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_sharded_folder_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    found = zoo.load(str(saved))
    found.model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = zoo.load(str(tmp_path / "shards"))
    assert torch.equal(logits(shards.model), logits(found.model))
    assert shards.tokenizer is None
    assert loaded.parameter_count(tmp_path / "shards") == loaded.parameter_count(saved)


def test_parameters_are_counted_from_the_headers_alone(saved: Path) -> None:
    model = zoo.load(str(saved)).model
    assert loaded.parameter_count(saved) == sum(parameter.numel() for parameter in model.parameters())


def test_precision_is_float32_on_the_cpu_unless_told(saved: Path) -> None:
    assert zoo.load(str(saved)).model.dtype == torch.float32
    assert zoo.load(str(saved), dtype="float16").model.dtype == torch.float16
    assert zoo.load(str(saved), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_auto_is_the_cpu_where_there_is_no_gpu(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert zoo.load(str(saved), device="auto").model.device.type == "cpu"


def test_a_revision_is_that_of_the_content_wherever_the_folder_is(saved: Path, copy: Path) -> None:
    assert zoo.revision(str(copy)) == zoo.revision(str(saved)) == zoo.load(str(copy)).revision
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert zoo.revision(str(copy)) != zoo.revision(str(saved))


def test_a_checkpoint_of_pickles_is_refused_in_one_sentence(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(AssetError, match=r"has no safetensors file .* pickle can run any code") as caught:
        zoo.load(str(copy))
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_refused_and_never_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass OwnModel: ...\n")
    config = json.loads((copy / "config.json").read_text())
    own = {"architectures": ["OwnModel"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (copy / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(AssetError, match=r"needs code of its own \(OwnModel\), which is never run"):
        zoo.load(str(copy))
    assert not marker.exists()


def test_code_beside_a_known_architecture_is_not_run_either(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass OwnModel: ...\n")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.OwnModel"}}))
    assert type(zoo.load(str(copy)).model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_a_class_that_transformers_lacks_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(AssetError, match="class NoSuchModel, which transformers"):
        zoo.load(str(copy))


def test_damaged_weights_are_told_with_their_folder(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(AssetError, match=rf"checkpoint .* in {copy} cannot be read \("):
        zoo.load(str(copy))


def test_weights_that_are_missing_from_the_file_are_told_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"lacks .*up_proj"):
        zoo.load(str(copy))


def test_a_vision_model_comes_with_its_processor(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    tiny.build("vit").save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    found = zoo.load(str(tmp_path))
    assert found.tokenizer is None
    pixels = found.processor(torch.zeros(3, 20, 20, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert found.model(pixel_values=pixels).logits.shape == (1, 10)


def test_an_encoder_gives_unit_vectors_that_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer.build("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = zoo.load(str(tmp_path))
    texts = ["A cat.", "The stock market fell today, and many people lost a lot of money.", "word " * 2000]
    together = encoder.encode(texts)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    assert encoder.encode([]).shape == (0, 32)


def test_a_hub_model_in_the_cache_loads_offline_and_its_revision_is_the_commit(saved: Path, hub_cache: Path) -> None:
    put_in_cache(hub_cache, "someone/llama", saved)
    found = zoo.load("someone/llama")
    assert torch.equal(logits(found.model), logits(zoo.load(str(saved)).model))
    assert found.tokenizer is not None
    assert found.revision == zoo.revision("someone/llama") == COMMIT
    assert found.card.source == "https://huggingface.co/someone/llama"


def test_a_certain_revision_is_named_after_an_at_sign(saved: Path, hub_cache: Path) -> None:
    put_in_cache(hub_cache, "someone/llama", saved, reference="refs/pr/1")
    assert zoo.revision("someone/llama@refs/pr/1") == COMMIT
    assert zoo.load("someone/llama@refs/pr/1").revision == COMMIT
    assert zoo.revision("someone/llama") == "hub:someone/llama@main"


def test_offline_without_the_model_one_sentence_says_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(AssetError, match=r"not in the Hugging Face cache .* use a packaged model") as caught:
        zoo.load("someone/llama")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert zoo.revision("someone/llama") == "hub:someone/llama@main"


def test_a_snapshot_that_lacks_a_shard_is_not_taken_for_whole(saved: Path, hub_cache: Path, tmp_path: Path) -> None:
    zoo.load(str(saved)).model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    snapshot = put_in_cache(hub_cache, "someone/llama", tmp_path / "shards")
    next(snapshot.glob("*00002*.safetensors")).unlink()
    with pytest.raises(AssetError):
        zoo.load("someone/llama")


def test_a_hub_model_of_pickles_is_refused(saved: Path, hub_cache: Path) -> None:
    snapshot = put_in_cache(hub_cache, "someone/llama", saved)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(AssetError, match="no safetensors file"):
        zoo.load("someone/llama")


def test_a_slip_in_a_packaged_name_gets_the_nearest_one(hub_cache: Path) -> None:
    with pytest.raises(AssetError, match="Did you mean 'smollm2'"):
        zoo.load("smolm2")


@pytest.mark.parametrize("name", ["", "no such thing", "a/b/c", "./nowhere", "/nowhere", "http://x.y/z"])
@pytest.mark.parametrize("ask", [zoo.load, zoo.revision, zoo.fetch])
def test_a_name_that_cannot_be_one_is_a_wrong_request(ask: object, name: str) -> None:
    with pytest.raises(RequestError, match="no Hub id"):
        ask(name)  # type: ignore[operator]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "12x"])
def test_a_device_that_is_not_there_is_a_wrong_request(saved: Path, device: str) -> None:
    with pytest.raises(RequestError, match=r"device|Device"):
        zoo.load(str(saved), device=device)


@pytest.mark.parametrize("dtype", ["int8", "half precision", "Tensor", "float31"])
def test_a_precision_that_is_none_is_a_wrong_request(saved: Path, dtype: str) -> None:
    with pytest.raises(RequestError, match="ask for 'float32'"):
        zoo.load(str(saved), dtype=dtype)


def test_an_attention_that_is_none_is_a_wrong_request(saved: Path) -> None:
    with pytest.raises(RequestError, match="attention"):
        zoo.load(str(saved), attn_implementation="magic")
    with pytest.raises(RequestError, match="attention"):
        zoo.load("tiny:llama", attn_implementation="magic")
