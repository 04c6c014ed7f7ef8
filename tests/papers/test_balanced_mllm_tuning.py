"""Facts of the balance coefficient, of its scheduler, of sides trained apart, and the checks of CoMMIT's claims."""

import copy
import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import llava_models
import numpy as np
import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data import shapes
from midstream.paper import Result
from midstream.papers.bridges import balanced_mllm_tuning as paper
from midstream.train import Schedule, fit, steering
from midstream.train.llava import ask, exact_answers
from midstream.train.packing import IGNORED
from midstream.train.sides import fit_sides, gradient_norm, put_back, snapshot

SMALL = paper.Params(test_images=4, steps=4, batch_size=4, measure_every=1, adjust_every=2, n_seeds=2)


@pytest.fixture(scope="module", params=llava_models.FAMILIES)
def loaded(request: pytest.FixtureRequest) -> Any:
    return llava_models.load(request.param)


def bench_of(loaded: Any, params: paper.Params = SMALL) -> paper.Bench:
    return paper.open_bench(SimpleNamespace(**{**vars(loaded), "model": copy.deepcopy(loaded.model)}), params)


@pytest.fixture(scope="module")
def bench(loaded: Any) -> paper.Bench:
    return bench_of(loaded)


@pytest.fixture(scope="module")
def lesson(bench: paper.Bench) -> paper.Lesson:
    return paper.lesson_of(bench, 0)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def tuning_of(bench: paper.Bench, arm: steering.Arm, rates: steering.Rates | None = None) -> steering.Tuning:
    model, sides = paper.student(bench, 0)
    tuning = steering.Tuning(model, sides, arm, paper.settings_of(bench.params), 1e-3)
    tuning.rates = rates or tuning.rates
    return tuning


def plain_step(bench: paper.Bench, lesson: paper.Lesson, rates: steering.Rates) -> dict[str, float]:
    """What is measured across one step of plain gradient descent with these rates, in double precision."""
    tuning = tuning_of(bench, steering.Arm(paper.CONSTANT))
    tuning.model.double()
    batch = {name: part.double() if part.is_floating_point() else part for name, part in lesson.batches[0].items()}
    tuning.model.zero_grad()
    tuning.loss(tuning.model, batch).backward()
    with torch.no_grad():
        for side, parameters in tuning.sides.items():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= rates[side] * parameter.grad
    tuning.after_step(1)
    return tuning.measured[0]


# ----------------------------------------------------------------------------------------------- exact checks of κ


def test_a_language_model_at_rate_zero_has_kappa_zero(bench: paper.Bench, lesson: paper.Lesson) -> None:
    found = plain_step(bench, lesson, {steering.ENCODER: 0.1, steering.LANGUAGE: 0.0})
    assert found[steering.LANGUAGE] == 0 < found[steering.ENCODER]
    assert steering.balance(found[steering.LANGUAGE], found[steering.ENCODER]) == 0


def test_an_encoder_at_rate_zero_has_kappa_infinity_and_its_log_is_capped(
    bench: paper.Bench, lesson: paper.Lesson
) -> None:
    found = plain_step(bench, lesson, {steering.ENCODER: 0.0, steering.LANGUAGE: 0.1})
    assert steering.balance(found[steering.LANGUAGE], found[steering.ENCODER]) == math.inf
    assert steering.log_balance(1.0, 0.0) == steering.LOG_CAP
    assert steering.log_balance(0.0, 1.0) == -steering.LOG_CAP


def test_where_neither_side_moves_kappa_says_nothing() -> None:
    assert math.isnan(steering.balance(0.0, 0.0))
    assert steering.log_balance(0.0, 0.0) == 0


def test_for_small_steps_kappa_does_not_depend_on_their_size_and_divergences_are_quadratic(
    bench: paper.Bench, lesson: paper.Lesson
) -> None:
    rates = {steering.ENCODER: 1e-4, steering.LANGUAGE: 1e-4}
    one = plain_step(bench, lesson, rates)
    half = plain_step(bench, lesson, {side: rate / 2 for side, rate in rates.items()})
    for side in steering.SIDES:
        assert one[side] / half[side] == pytest.approx(4, rel=0.02)
        assert one[side] == pytest.approx(one[f"{side}_back"], rel=0.02)  # to second order KL has no direction
    assert steering.balance(one[steering.LANGUAGE], one[steering.ENCODER]) == pytest.approx(
        steering.balance(half[steering.LANGUAGE], half[steering.ENCODER]), rel=0.02
    )


def test_for_small_steps_kappa_is_quadratic_in_the_ratio_of_rates(bench: paper.Bench, lesson: paper.Lesson) -> None:
    even, steep = (plain_step(bench, lesson, steering.rates_at(1e-4, ratio)) for ratio in (1.0, 4.0))
    kappas = [steering.balance(found[steering.LANGUAGE], found[steering.ENCODER]) for found in (even, steep)]
    assert kappas[1] / kappas[0] == pytest.approx(16, rel=0.05)


def test_divergence_is_that_of_torch_and_zero_only_between_equals() -> None:
    log_p, log_q = torch.randn(2, 5, 7, dtype=torch.float64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert float(steering.divergence(log_p, log_q)) == pytest.approx(float(expected))
    assert float(steering.divergence(log_p, log_p)) == 0 < float(steering.divergence(log_p, log_q))


def test_measuring_leaves_weights_gradients_and_rates_bit_for_bit(bench: paper.Bench, lesson: paper.Lesson) -> None:
    tuning = tuning_of(bench, steering.Arm(paper.CONSTANT))
    tuning.loss(tuning.model, lesson.batches[0]).backward()
    with torch.no_grad():
        for parameters in tuning.sides.values():
            for parameter in parameters:
                parameter.mul_(1.01)
    before, norms = state(tuning.model), [gradient_norm(side) for side in tuning.sides.values()]
    tuning.after_step(1)
    assert min(tuning.measured[0].values()) > 0
    assert all(value.equal(before[name]) for name, value in tuning.model.state_dict().items())
    assert [gradient_norm(side) for side in tuning.sides.values()] == norms


def test_a_scheduler_without_strength_or_reward_is_the_baseline_bit_for_bit(
    bench: paper.Bench, lesson: paper.Lesson
) -> None:
    off = replace(bench, params=SMALL.model_copy(update={"gamma": 0.0}))
    unmeasured = replace(bench, params=SMALL.model_copy(update={"measure_every": 100, "adjust_every": 100}))
    arms = [(off, steering.Arm("a", signal="balance")), (bench, steering.Arm("b")), (unmeasured, steering.Arm("c"))]
    one, two, three = (state(paper.tune(where, arm, lesson, 1e-3)[0].model) for where, arm in arms)
    assert all(value.equal(two[name]) and value.equal(three[name]) for name, value in one.items())
    steered = state(paper.tune(bench, steering.Arm("d", signal="balance"), lesson, 1e-3)[0].model)
    assert any(not value.equal(two[name]) for name, value in steered.items())


# -------------------------------------------------------------------------------------------------- the scheduler


def test_the_faster_side_is_slowed_down_and_the_product_of_rates_stays() -> None:
    rates = steering.rates_at(1e-3, 1.0)
    faster_language = steering.rebalanced(rates, smooth=2.0, gamma=0.25, limit=100)
    assert faster_language[steering.LANGUAGE] == pytest.approx(1e-3 * math.exp(-0.5))
    assert faster_language[steering.ENCODER] == pytest.approx(1e-3 * math.exp(0.5))
    assert math.prod(faster_language.values()) == pytest.approx(1e-6)


def test_at_balance_the_rates_stay_and_they_stay_within_the_limit() -> None:
    rates = steering.rates_at(1e-3, 10.0)
    assert steering.rebalanced(rates, 0.0, 0.25, 100) == pytest.approx(rates)
    assert steering.rebalanced(rates, -50.0, 1.0, 30) == pytest.approx(steering.rates_at(1e-3, 900.0))


@pytest.mark.parametrize(("rule", "left"), [("last rates", 0.0), ("first rates", 1 / 1.5)])
def test_from_the_last_rates_imbalance_goes_to_zero_and_from_the_first_to_a_share(rule: str, left: float) -> None:
    params = SMALL.model_copy(update={"rule": rule, "gamma": 0.125})
    settings = paper.settings_of(params)
    tuning = steering.Tuning(None, {}, steering.Arm("x", start=100.0, signal="balance"), settings, 1e-3)
    first = 2 * math.log(100.0)
    for _ in range(60):  # κ quadratic in the ratio of rates, as for small steps
        tuning.rates = tuning._adjusted(2 * math.log(tuning.rates[steering.LANGUAGE] / tuning.rates[steering.ENCODER]))
    kappa = 2 * math.log(tuning.rates[steering.LANGUAGE] / tuning.rates[steering.ENCODER])
    assert kappa / first == pytest.approx(left, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_where_nothing_moves_nothing_is_measured_whatever_the_precision_of_training(
    bench: paper.Bench, lesson: paper.Lesson, precision: Any
) -> None:
    tuning = tuning_of(bench, steering.Arm("x"), dict.fromkeys(steering.SIDES, 0.0))
    steps = Schedule(2)
    fit_sides(
        tuning.model, tuning.sides, lesson.batches, tuning.loss, steps, tuning.now,
        precision=precision, after_step=tuning.after_step,
    )  # fmt: skip
    assert tuning.measured
    for row in tuning.measured:
        assert row[steering.ENCODER] == row[steering.LANGUAGE] == 0.0


def test_half_precision_measures_the_move_that_full_precision_measures(
    bench: paper.Bench, lesson: paper.Lesson
) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        tuning = tuning_of(bench, steering.Arm("x"))
        fit_sides(
            tuning.model, tuning.sides, lesson.batches, tuning.loss, Schedule(1), tuning.now,
            precision=precision, after_step=tuning.after_step,
        )  # fmt: skip
        found[precision] = tuning.measured[0]
    for side in steering.SIDES:
        assert found["bfloat16"][side] == pytest.approx(found["float32"][side], rel=0.3)


def test_gradient_norms_set_rates_inverse_to_them_whatever_the_start() -> None:
    arms = [steering.Arm("x", start=start, signal="norms") for start in (0.01, 100.0)]
    settings = paper.settings_of(SMALL)
    one, two = (steering.Tuning(None, {}, arm, settings, 1e-3)._adjusted(math.log(9.0)) for arm in arms)
    assert one == pytest.approx(two)
    assert one[steering.ENCODER] / one[steering.LANGUAGE] == pytest.approx(9)


def test_coordinate_descent_moves_one_side_first_and_then_the_other(bench: paper.Bench, lesson: paper.Lesson) -> None:
    for first, other in ((steering.ENCODER, steering.LANGUAGE), (steering.LANGUAGE, steering.ENCODER)):
        _, curve = paper.tune(bench, steering.Arm("x", first=first), lesson, 1e-3)
        assert (curve[f"rate_{first}"] > 0).tolist() == [True, True, False, False]
        assert (curve[f"rate_{other}"] > 0).tolist() == [False, False, True, True]
    alone = replace(bench, params=SMALL.model_copy(update={"alone": 1.0}))
    tuning, _ = paper.tune(alone, steering.Arm("x", first=steering.ENCODER), lesson, 1e-3)
    _, start = paper.student(bench, 0)
    pairs = zip(tuning.sides[steering.LANGUAGE], start[steering.LANGUAGE], strict=True)
    assert all(now.equal(before) for now, before in pairs)


# --------------------------------------------------------------------------------------------- the auxiliary loss


@pytest.mark.parametrize(("reward", "terms"), [("each side", 2), ("both together", 1)])
def test_the_reward_is_the_change_since_a_step_ago_and_needs_no_label(
    bench: paper.Bench, lesson: paper.Lesson, reward: str, terms: int
) -> None:
    rewarded = replace(bench, params=SMALL.model_copy(update={"reward": reward}))
    tuning = tuning_of(rewarded, steering.Arm("x", weight=0.5))
    plain = float(tuning.loss(tuning.model, lesson.batches[0]).detach())  # the first step has nothing to compare with
    assert plain == tuning.losses[0]
    with torch.no_grad():
        for parameters in tuning.sides.values():
            for parameter in parameters:
                parameter.mul_(1.05)
    value = float(tuning.loss(tuning.model, lesson.batches[1]).detach())
    assert value < tuning.losses[1]
    former = snapshot([each for side in tuning.sides.values() for each in side])
    assert len(tuning._former(lesson.batches[1])) == terms
    assert all(a.equal(b) for a, b in zip(former, (e for s in tuning.sides.values() for e in s), strict=True))


# -------------------------------------------------------------------------------------------------- sides, loop


def test_every_weight_is_on_one_side(bench: paper.Bench) -> None:
    model, sides = paper.student(bench, 0)
    ours = [id(each) for side in steering.SIDES for each in sides[side]]
    assert sorted(ours) == sorted(id(each) for each in model.parameters())
    assert min(len(side) for side in sides.values()) > 0


def test_with_adapters_they_alone_are_trained_on_both_sides(loaded: Any) -> None:
    params = SMALL.model_copy(update={"rank": 2, "noise": 0.0})
    bench = bench_of(loaded, params)
    tuning, _ = paper.tune(bench, steering.Arm("x", signal="balance"), paper.lesson_of(bench, 0), 1e-3)
    trained = {name for name, value in tuning.model.named_parameters() if value.requires_grad}
    assert all("lora" in name for name in trained)
    assert min(len(side) for side in tuning.sides.values()) > 0
    assert min(tuning.measured[1][side] for side in steering.SIDES) > 0


def test_a_projector_alone_reads_cached_features_as_it_would_images(loaded: Any) -> None:
    whole, cached = (bench_of(loaded, SMALL.model_copy(update={"encoder_side": side, "noise": 0.0}))
                     for side in ("tower and projector", "projector"))  # fmt: skip
    one, two = (paper.examine(bench.model, paper.lesson_of(bench, 0).exam) for bench in (whole, cached))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    _, sides = paper.student(cached, 0)
    assert len(sides[steering.ENCODER]) == 4


def test_equal_rates_are_the_shared_training_loop(bench: paper.Bench, lesson: paper.Lesson) -> None:
    schedule = Schedule(4, 1e-3, warmup=0.1, floor=1.0, weight_decay=0.0)
    (one, sides), (two, _) = (paper.student(bench, 0) for _ in range(2))
    fit_sides(one, sides, lesson.batches, lambda m, b: m(**b).loss, schedule, lambda: steering.rates_at(1e-3, 1.0))
    fit(two, lesson.batches, lambda m, b: m(**b).loss, schedule)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_side_at_rate_zero_stays_bit_for_bit(bench: paper.Bench, lesson: paper.Lesson) -> None:
    model, sides = paper.student(bench, 0)
    before = {name: snapshot(side) for name, side in sides.items()}
    rates = {steering.ENCODER: 0.0, steering.LANGUAGE: 1e-3}
    fit_sides(model, sides, lesson.batches, lambda m, b: m(**b).loss, Schedule(3), lambda: rates)
    still = {name: all(a.equal(b) for a, b in zip(sides[name], before[name], strict=True)) for name in sides}
    assert still == {steering.ENCODER: True, steering.LANGUAGE: False}


def test_weights_are_put_back_even_when_something_goes_wrong() -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    before = weight.detach().clone()

    def fail() -> None:
        with put_back([weight], [torch.zeros(3)]):
            assert weight.equal(torch.zeros(3))
            raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        fail()
    assert weight.equal(before)


def test_tuning_leaves_the_given_model_as_it_is(bench: paper.Bench, lesson: paper.Lesson) -> None:
    before = state(bench.model)
    paper.tune(bench, steering.Arm("x", signal="balance", weight=0.1), lesson, 1e-3)
    assert all(value.equal(before[name]) for name, value in bench.model.state_dict().items())


def test_right_answers_are_those_of_questions_asked_alone(bench: paper.Bench) -> None:
    batch = next(bench.batches(1, 4, 0, "test"))
    log_p = steering.log_probabilities(bench.model, batch)[1]
    answered = batch["labels"][:, 1:] != IGNORED
    found = paper.right_answers(log_p.argmax(-1) == batch["labels"][:, 1:][answered], answered)
    rng = random.Random("0/test")
    scenes = shapes.scenes(4, seed=0, split="test", start=0)
    asked = [(n, bench.turn(each)) for n, scene in enumerate(scenes) for each in shapes.questions(scene, rng)]
    alone = ask([turn for _, turn in asked], bench.beginning, bench.words.pad)
    alone["pixel_values"] = batch["pixel_values"][[n for n, _ in asked]]
    assert found.bool().tolist() == exact_answers(bench.model, alone).tolist()


# ------------------------------------------------------------------------------------------------- the experiment


def test_constant_rates_are_chosen_over_ratios_and_others_over_their_own_rates() -> None:
    rows = [
        {"arm": arm.name, "start": arm.start, "weight": arm.weight, "rate": rate, "loss": 1.0 + 0.1 * n + loss}
        for n, arm in enumerate([steering.Arm(paper.CONSTANT, start=0.1), *paper.racers(SMALL)])
        for rate, loss in ((1e-4, 0.03), (1e-3, 0.0), (1e-2, 0.02))
    ]
    rows.append({"arm": paper.NORMS, "start": 1.0, "weight": 0.0, "rate": 0.1, "loss": 0.0})
    choice = paper.choose(pd.DataFrame(rows))
    assert (choice.best, choice.rate) == (0.1, 1e-3)
    assert choice.race[paper.NORMS] == (0.1, 0.0)
    assert choice.race[paper.AUXILIARY] == (1e-3, SMALL.weights[0])


def test_every_other_reading_changes_one_choice() -> None:
    choice = paper.Choice(1.0, 1e-3, {arm.name: (1e-3, arm.weight) for arm in paper.racers(SMALL)})
    for case in paper.readings(SMALL, choice):
        changed = [name for name, value in dict(case.params).items() if value != getattr(SMALL, name)]
        assert len(changed) == 1


def test_the_experiment_fills_every_table_and_every_check_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", lambda *_, **__: llava_models.random_llava())
    params = paper.Params(
        test_images=4, steps=4, batch_size=2, ratios=(0.1, 1.0, 10.0), variants=True, n_seeds=1, adjust_every=2
    )
    result = paper.experiment(params)
    assert len(result.tables["tuning"]) == 2 + len(paper.racers(params))
    assert set(result.tables["runs"]["case"]) == {"sweep", "race", "reading"}
    assert not result.tables["runs"].isna().to_numpy().any()
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()


# ---------------------------------------------------------------------------------------------------------- claims

LOSSES = {0.01: 1.5, 0.1: 1.1, 1.0: 1.0, 10.0: 1.2, 100.0: 1.6}
RACE = {
    paper.CONSTANT: 1.0,
    paper.SCHEDULER: 0.9,
    paper.AUXILIARY: 0.8,
    paper.FEATURE_CD: 1.4,
    paper.LANGUAGE_CD: 1.3,
    paper.NORMS: 1.1,
}


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng, rows = np.random.default_rng(0), []

    def row(case: str, arm: str, start: float, seed: int, loss: float) -> None:
        noisy = loss + 0.003 * rng.standard_normal()
        kappa = 1.5 * math.log10(start) + 0.05 * rng.standard_normal()
        known = {"case": case, "arm": arm, "start": start, "seed": seed, "loss": noisy, "train": noisy + 0.3}
        rows.append(known | {"kappa": kappa, "kappa_back": kappa, "norm": 2.0 - loss})

    for seed in range(4):
        for start, loss in LOSSES.items():
            row("sweep", paper.CONSTANT, start, seed, loss)
        for start in (0.01, 1.0, 100.0):
            row("sweep", paper.SCHEDULER, start, seed, 1.0)
        for start in (0.01, 100.0):
            row("sweep", paper.CHANCE, start, seed, 1.5)
        for arm, loss in RACE.items():
            row("race", arm, 1.0, seed, loss)
    return Result({"runs": pd.DataFrame(rows)}, {"best ratio": 1.0})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()}, result.scalars)
    assert direction(claim.check(single)) == "unclear"
