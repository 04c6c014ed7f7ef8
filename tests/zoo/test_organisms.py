"""Organisms: how they are made, what a folder holds, how they load, and what guards those that ship."""

from __future__ import annotations

import json
import logging
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toys

from midstream import training, zoo
from midstream.assets import file_sha256
from midstream.errors import AssetError, MidstreamError, RequestError
from midstream.train import recipes
from midstream.train.recipes import Trained
from midstream.zoo import organisms, tiny, tiny_tokenizer

SHIPPED = organisms.names()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "recipes", lambda: {"counter": toys.RECIPE})
    monkeypatch.setattr(training, "code", lambda module: "today")


@pytest.fixture
def house(tmp_path: Path, registry: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder of weights of its own."""
    monkeypatch.setattr(organisms, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def made(name: str = "counter", out: Path | None = None, steps: int | None = None, ship: bool = False) -> Any:
    return training.train(training.plan(name, out, steps, ship), lambda stage, step, steps: None)


# ---------------------------------------------------------------- making


def test_a_trained_organism_loads_from_its_folder_with_its_tokenizer(house: Path, tmp_path: Path) -> None:
    card = made(out=tmp_path)
    loaded = zoo.load(str(tmp_path / "counter"))
    assert loaded.tokenizer("one two")["input_ids"]
    assert sum(weight.numel() for weight in loaded.model.parameters()) == card.parameters
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert toys.measure(loaded) == card.measured, "the figures are those of the weights as they ship"


def test_a_card_says_how_the_weights_came_to_be(house: Path, tmp_path: Path) -> None:
    card = made(out=tmp_path)
    assert organisms.read_card(tmp_path / "counter") == card
    assert card.sha256 == file_sha256(tmp_path / "counter" / organisms.MODEL)
    assert (card.recipe, card.code, card.licence) == ("toys", "today", "Apache-2.0")
    assert [(stage.name, stage.steps, stage.batch) for stage in card.schedule] == [("count", 4, 2)]
    assert [point.step for point in card.curve] == [1, 2, 3, 4]
    assert card.architecture["class"] == "LlamaForCausalLM"
    assert card.architecture["hidden_size"] == 16
    assert 0 <= card.seconds < 60


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(house: Path, tmp_path: Path) -> None:
    first, again = (made(out=tmp_path / place).sha256 for place in ("a", "b"))
    assert first == again
    other = replace(toys.RECIPE, seed=1)
    facts = {"code": "", "machine": lambda: ("here", {})}
    assert recipes.build(other, tmp_path / "c", **facts).sha256 != first  # type: ignore[arg-type]


def test_steps_cut_every_stage_short_and_progress_is_told(house: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    planned = training.plan("counter", tmp_path, 2, False)
    card = training.train(planned, lambda *progress: told.append(progress))
    assert card.steps == 2
    assert told == [("count", 0, 2), ("count", 1, 2), ("count", 2, 2)]


def test_a_training_that_is_killed_leaves_the_shipped_weights(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(ship=True).sha256

    def interrupted(loaded: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "recipes", lambda: {"counter": replace(toys.RECIPE, seed=1, measure=interrupted)})
    with pytest.raises(KeyboardInterrupt):
        made(ship=True)
    assert file_sha256(organisms.folder("counter") / organisms.MODEL) == before
    assert [path.name for path in house.iterdir()] == ["counter"]


def test_weights_too_large_to_ship_are_refused(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "MOST_BYTES", 1000)
    with pytest.raises(MidstreamError, match="make the model smaller"):
        made(out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = tiny.build("llama", vocab_size=100)
    next(model.parameters()).data.fill_(1e6)
    with pytest.raises(MidstreamError, match="not finite in half precision"):
        recipes.write_weights(tmp_path / "x", Trained(model))


def test_a_recipe_that_trains_outside_the_shared_loop_is_refused(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = replace(toys.RECIPE, make=lambda training: Trained(None))
    monkeypatch.setattr(recipes, "recipes", lambda: {"counter": idle})
    with pytest.raises(MidstreamError, match=r"nothing through `training\.fit`"):
        made(out=tmp_path)


# ---------------------------------------------------------------- requests


def test_an_unknown_recipe_gets_the_nearest_name(registry: None) -> None:
    with pytest.raises(RequestError, match="Did you mean 'counter'"):
        training.plan("conter", None, None, False)


def test_the_shipped_folder_is_replaced_only_when_asked(house: Path) -> None:
    made(ship=True)
    with pytest.raises(RequestError, match="say --ship"):
        training.plan("counter", house, None, False)
    with pytest.raises(RequestError, match="no --out and no --steps"):
        training.plan("counter", None, 3, True)


def test_a_folder_that_is_no_earlier_training_is_left_alone(registry: None, tmp_path: Path) -> None:
    (tmp_path / "counter").mkdir()
    (tmp_path / "counter" / "letters.txt").write_text("dear")
    with pytest.raises(RequestError, match="no earlier training"):
        training.plan("counter", tmp_path, None, False)


def test_the_command_trains_and_shows_the_shipped_figures_beside(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from midstream.cli import train_command

    made(ship=True)
    train_command("counter", out=tmp_path, steps=1, ship=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(tmp_path / "counter")
    assert found["measured"][0]["what"] == "next number"
    assert found["measured"][0]["shipped"] is not None
    train_command("counter", out=tmp_path, steps=1, ship=False, as_json=False)
    assert "next number" in capsys.readouterr().out


# ---------------------------------------------------------------- shipped


def test_a_shipped_organism_is_a_model_like_any_other(house: Path) -> None:
    card = made(ship=True)
    assert organisms.names() == ["counter"]
    assert zoo.load("counter").card == zoo.cards()["counter"]
    assert zoo.card("counter").source == "trained here: midstream models train counter"
    assert zoo.card("counter").sha256 == card.sha256
    with pytest.raises(AssetError, match="Did you mean 'counter'"):
        zoo.fetch("countre")


def test_the_revision_is_that_of_weights_and_configuration_not_of_the_card(house: Path) -> None:
    made(ship=True)
    before = zoo.revision("counter")
    path = house / "counter" / organisms.CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "Other words."}))
    assert zoo.revision("counter") == before
    assert zoo.card("counter").note == "Other words."
    config = house / "counter" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert zoo.revision("counter") != before


def test_weights_that_are_not_those_of_the_card_are_not_read(house: Path) -> None:
    made(ship=True)
    weights = house / "counter" / organisms.MODEL
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AssetError, match=r"not those of its card .* restore the folder from git") as caught:
        zoo.load("counter")
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(AssetError, match="are not in"):
        zoo.load("counter")


def test_a_damaged_card_is_told_in_one_sentence(house: Path) -> None:
    made(ship=True)
    (house / "counter" / organisms.CARD).write_text("{")
    with pytest.raises(AssetError, match="missing or damaged"):
        zoo.load("counter")


def test_weights_of_a_recipe_that_has_changed_are_told(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(ship=True)
    assert training.states() == {"counter": "current"}
    monkeypatch.setattr(training, "code", lambda module: "tomorrow")
    assert training.states() == {"counter": "weights from an older recipe"}


def test_every_shipped_organism_is_at_most_4_mb_and_all_are_at_most_30() -> None:
    sizes = [(organisms.WEIGHTS / name / organisms.MODEL).stat().st_size for name in SHIPPED]
    assert all(size <= organisms.MOST_BYTES for size in sizes)
    assert sum(path.stat().st_size for path in organisms.WEIGHTS.rglob("*") if path.is_file()) <= 30_000_000


def test_no_shipped_configuration_says_where_it_was_made() -> None:
    for path in organisms.WEIGHTS.glob("*/*.json"):
        assert '"_name_or_path": "/' not in path.read_text("utf-8"), path


def test_every_file_of_an_organism_is_in_the_package() -> None:
    package = Path(organisms.__file__).parents[1]
    settings = tomllib.loads((package.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in settings["package-data"]["midstream"] for path in package.glob(pattern)}
    assert {path for path in organisms.WEIGHTS.rglob("*") if path.is_file()} <= packed


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_organism_loads_and_is_what_its_card_says(name: str) -> None:
    card, loaded = organisms.read_card(organisms.WEIGHTS / name), zoo.load(name)
    assert card.name == name
    assert recipes.architecture(loaded.model) == card.architecture
    assert recipes.recipe(name).module == card.recipe
    assert card.sha256 in zoo.card(name).sha256


AT_LEAST = {"shapes-clip": {"caption of an image": 80, "image of a caption": 80}, "shapes-vlm": {"all questions": 85}}
"""In per cent: below this a model is of no use to the chapters that read it."""


@pytest.mark.parametrize("name", [name for name in SHIPPED if name in AT_LEAST])
def test_a_shipped_organism_that_sees_is_good_enough_to_be_studied(name: str) -> None:
    measured = organisms.read_card(organisms.WEIGHTS / name).measured
    assert not [what for what, bar in AT_LEAST[name].items() if measured[what].value < bar]
    if name == "shapes-vlm":
        assert measured["with another image"].value < measured["text-only prior"].value + 5, "it must read the image"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_organism_still_does_what_its_card_says(name: str) -> None:
    card = organisms.read_card(organisms.WEIGHTS / name)
    found = recipes.recipe(name).measure(zoo.load(name))
    assert {what: each.value for what, each in found.items()} == pytest.approx(
        {what: each.value for what, each in card.measured.items()}, rel=0.02, abs=0.5
    )


def test_every_module_of_the_recipes_is_one_recipe_with_a_name_of_its_own() -> None:
    modules = list(Path(recipes.__file__).parent.glob("[!_]*.py"))
    assert len(recipes.recipes()) == len(modules)
    assert all(each.module.startswith("midstream.train.recipes.") for each in recipes.recipes().values())


# ---------------------------------------------------------------- what sees images


@pytest.mark.parametrize("kind", ["llava", "clip"])
def test_a_model_that_sees_loads_with_a_pil_processor_and_says_nothing(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPImageProcessorPil, CLIPProcessor, LlavaProcessor
    from transformers.utils import logging as transformers_logging

    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = tiny_tokenizer.build("llava" if kind == "llava" else "clip_text")
    if kind == "llava":
        strategy = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor: Any = LlavaProcessor(image_processor=images, tokenizer=tokenizer, **strategy)
        model: Any = tiny.build("llava", vocab_size=len(tokenizer))
    else:
        processor, model = CLIPProcessor(images, tokenizer), _clip(len(tokenizer))
    recipes.write_weights(tmp_path / kind, Trained(model, tokenizer, processor))
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        loaded = zoo.load(str(tmp_path / kind))
    transformers_logging.disable_propagation()
    assert caplog.records == []
    assert "".join(capfd.readouterr()) == ""
    assert isinstance(loaded.processor.image_processor, CLIPImageProcessorPil)
    picture = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    text = "<image> between" if kind == "llava" else "between"
    inputs = loaded.processor(images=[picture], text=[text], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    with torch.no_grad():
        assert loaded.model(**inputs)[0].isfinite().all()


def _clip(vocabulary: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
