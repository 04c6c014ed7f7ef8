"""Recipes of the organisms: the miniatures that come with midstream, each made by one module of this folder.

A recipe's module defines `RECIPE`. Its `make` builds a model of the real transformers classes and trains it through
the `Training` it is given; its `measure` asks the finished model, read back from its half-precision weights, what it
can do. `midstream models train NAME` does both and writes weights and card together.

    def make(training: Training) -> Trained:
        model, tokenizer = ...                                # the seed is already set
        training.fit("contrast", model, batches(), loss, Schedule(steps=2000), batch=64)
        return Trained(model, tokenizer)

    def measure(loaded: Loaded) -> dict[str, Measured]: ...

    RECIPE = Recipe(name="shapes-clip", title=..., what=..., note=..., data=Data(...), make=make, measure=measure, ...)

Modules whose name begins with an underscore hold what several recipes share.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import pkgutil
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from midstream import zoo
from midstream.assets import file_sha256, size_in_words
from midstream.errors import MidstreamError, RequestError
from midstream.train.loop import Schedule, fit
from midstream.zoo.bars import bars_only_on_a_terminal
from midstream.zoo.loaded import Loaded, parameter_count
from midstream.zoo.organisms import CARD, MODEL, MOST_BYTES, Data, Measured, OrganismCard, Point, Stage

__all__ = ["Data", "Measured", "Recipe", "Trained", "Training", "build", "recipe", "recipes"]

POINTS = 50
"""Places of the loss curve that a card keeps, over all stages."""

Report = Callable[[str, int, int], None]
"""Told the stage, the steps done in it, and its steps."""


@dataclass(frozen=True)
class Trained:
    """What a recipe's `make` gives back."""

    model: Any
    tokenizer: Any = None
    processor: Any = None
    """Holds the tokenizer too where the model takes images and text."""


@dataclass(frozen=True)
class Recipe:
    """How one organism is made."""

    name: str
    title: str
    what: str
    """One or two sentences: what it is and does."""
    note: str
    """What it cannot do."""
    data: Data
    make: Callable[[Training], Trained]
    measure: Callable[[Loaded], dict[str, Measured]]
    minutes_cpu: float
    """How long making it takes on two processor cores."""
    minutes_gpu: float
    """How long on one GPU."""
    seed: int = 0
    ingredients: tuple[str, ...] = ()
    """Names of the models that `make` starts from."""

    @property
    def module(self) -> str:
        """The module that defines it."""
        return self.make.__module__


@dataclass
class Training:
    """The training of one organism: the shared loop, told to whoever waits and noted for the card."""

    recipe: Recipe
    steps: int | None = None
    """At most so many steps in each stage, for a try; the schedule's own where None."""
    report: Report = lambda stage, step, steps: None
    stages: list[Stage] = field(default_factory=list)
    curves: list[pd.DataFrame] = field(default_factory=list)

    def fit(
        self,
        stage: str,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor],
        schedule: Schedule,
        *,
        batch: int,
        precision: Literal["float32", "bfloat16"] = "float32",
        after_step: Callable[[int], None] | None = None,
    ) -> pd.DataFrame:
        """`midstream.train.fit` as one stage of the recipe; `batch` is the number of examples in a batch."""
        if self.steps is not None:
            schedule = replace(schedule, steps=min(self.steps, schedule.steps))

        def tell(step: int) -> None:
            self.report(stage, step, schedule.steps)
            if after_step:
                after_step(step)

        self.report(stage, 0, schedule.steps)
        curve = fit(model, batches, loss, schedule, precision=precision, after_step=tell)
        rates = {"learning_rate": schedule.learning_rate, "muon": schedule.muon}
        self.stages.append(Stage(name=stage, steps=schedule.steps, batch=batch, **rates))
        self.curves.append(curve.assign(stage=stage))
        return curve

    def points(self) -> tuple[Point, ...]:
        """About `POINTS` places of the loss curve over all stages, each the mean over the steps since the last."""
        steps = sum(stage.steps for stage in self.stages)
        width, before, points = max(1, round(steps / POINTS)), 0, []
        for curve in self.curves:
            means = curve.groupby((curve["step"] - 1) // width).agg({"stage": "last", "step": "last", "loss": "mean"})
            for row in means.to_dict("records"):
                points.append(
                    Point(stage=row["stage"], step=before + int(row["step"]), loss=float(f"{row['loss']:.4g}"))
                )
            before += len(curve)
        return tuple(points)


# ---------------------------------------------------------------- registry


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Every recipe of this folder by the name of its organism."""
    modules = (each.name for each in pkgutil.iter_modules(__path__) if not each.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{module}").RECIPE for module in sorted(modules)]
    return {each.name: each for each in found}


def recipe(name: str) -> Recipe:
    """The recipe of an organism. Raises `RequestError` with the nearest name where there is none."""
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(known)}." if known else ""
    raise RequestError(f"There is no recipe to train {name!r}.{hint}")


# ---------------------------------------------------------------- making


def build(
    chosen: Recipe,
    target: Path,
    *,
    code: str,
    machine: Callable[[], tuple[str, dict[str, str]]],
    steps: int | None = None,
    report: Report = lambda stage, step, steps: None,
) -> OrganismCard:
    """Train, measure and write an organism to the folder `target`, whole or not at all; what stood there is replaced.

    `code` is the fingerprint of the recipe's code; `machine` is asked after the training for the device and the
    versions of packages. `steps` cuts each stage short. The same seed on the same machine gives the same weights.
    Raises `MidstreamError` for weights that are not finite in half precision or too large to ship.
    """
    from accelerate.utils import set_seed

    training = Training(chosen, steps, report)
    started = time.perf_counter()
    ingredients = {name: zoo.revision(name) for name in chosen.ingredients}
    set_seed(chosen.seed)
    trained = chosen.make(training)
    if not training.stages:
        raise MidstreamError(f"The recipe of {chosen.name} has trained nothing through `training.fit`.")
    seconds = time.perf_counter() - started
    device, versions = machine()
    facts = {
        **{name: getattr(chosen, name) for name in ("name", "title", "what", "note", "data")},
        **{"recipe": chosen.module, "code": code, "ingredients": ingredients, "seconds": round(seconds, 1)},
        **{"device": device, "versions": versions, "schedule": training.stages, "curve": training.points()},
        "architecture": architecture(trained.model),
    }
    return save(target, trained, facts, chosen.measure)


def save(
    target: Path, trained: Trained, facts: dict[str, Any], measure: Callable[[Loaded], dict[str, Measured]]
) -> OrganismCard:
    """Write a folder in the Hub's layout: weights in half precision, then, measured on them, the card.

    It is written beside `target` and moved into place, so that a run that is killed leaves what stood there.
    """
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    for remains in (partial, old):
        shutil.rmtree(remains, ignore_errors=True)
    try:
        write_weights(partial, trained)
        # read back as a user will read it: what is measured is what ships
        measured = measure(replace(zoo.load(str(partial)), name=facts["name"]))
        sizes = {"sha256": file_sha256(partial / MODEL), "parameters": parameter_count(partial)}
        card = OrganismCard(**facts, **sizes, measured=measured)
        (partial / CARD).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return card


def write_weights(folder: Path, trained: Trained) -> None:
    """The model in half precision with its tokenizer and processor, as `save_pretrained` lays them out."""
    half = copy.deepcopy(trained.model).to("cpu", torch.float16).eval()
    lost = [name for name, weight in half.named_parameters() if not weight.isfinite().all()]
    if lost:
        raise MidstreamError(f"{len(lost)} weights are not finite in half precision, first {lost[0]}.")
    for config in (half.config, *(getattr(half.config, name) for name in getattr(half.config, "sub_configs", ()))):
        config._name_or_path = ""  # where an ingredient lay on the machine of the training is nobody's business
    folder.mkdir(parents=True)
    with bars_only_on_a_terminal():
        half.save_pretrained(folder)
        for part in (trained.tokenizer, trained.processor):
            if part is not None:
                part.save_pretrained(folder)
    if (size := (folder / MODEL).stat().st_size) > MOST_BYTES:
        raise MidstreamError(
            f"The weights take {size_in_words(size)} in half precision, and an organism may take "
            f"{size_in_words(MOST_BYTES)}; make the model smaller."
        )


_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "image_size", "patch_size", "projection_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


def architecture(model: Any) -> dict[str, Any]:
    """Class and sizes of a model, with those of its towers under their own names."""
    return {"class": type(model).__name__, **_sizes(model.config)}


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {name: value for name in _SIZES if isinstance(value := getattr(config, name, None), int)}
    towers = {name: _sizes(getattr(config, name)) for name in getattr(config, "sub_configs", ())}
    return {**towers, **sizes}
