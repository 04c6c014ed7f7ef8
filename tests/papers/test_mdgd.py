"""Facts of gradients without a direction, of effective ranks, of the arms, and the checks of MDGD's claims."""

import copy
import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import llava_models
import numpy as np
import pandas as pd
import pytest
import torch

from midstream.arena import TUNING, standings
from midstream.claims import direction
from midstream.data import shapes
from midstream.measure.spectrum import effective_rank, linear_cka
from midstream.paper import Result
from midstream.papers.bridges import mdgd as paper
from midstream.train.surgery import cosine, dot, gradients, with_gradients, without

SMALL = paper.Params(
    train_images=8, val_images=4, test_images=4, steps=3, batch_size=4, mask_steps=1, precision="float32", n_seeds=2
)


def some(seed: int, *shapes_: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes_]


# ------------------------------------------------------------------------------------------------------- surgery


def test_what_is_left_is_orthogonal_over_all_entries() -> None:
    g, h = some(0, (3, 4), (5,)), some(1, (3, 4), (5,))
    left = without(g, h)
    assert float(dot(left, h)) == pytest.approx(0, abs=1e-5)
    assert float(dot(left, left)) == pytest.approx(float(dot(g, g) - dot(g, h) ** 2 / dot(h, h)), rel=1e-5)


def test_a_gradient_along_the_direction_vanishes_and_one_across_it_stays() -> None:
    h = some(1, (3, 4), (5,))
    assert all(torch.allclose(each, torch.zeros(()), atol=1e-6) for each in without([3 * x for x in h], h))
    across = without(some(0, (3, 4), (5,)), h)
    for kept, given in zip(without(across, h), across, strict=True):
        torch.testing.assert_close(kept, given)


def test_nothing_is_taken_out_along_zero() -> None:
    g = some(0, (3, 4))
    assert without(g, [torch.zeros(3, 4)])[0].equal(g[0])
    assert cosine(g, [torch.zeros(3, 4)]) == 0.0


def test_tensor_by_tensor_is_another_projection_than_over_all() -> None:
    g, h = some(0, (3, 4), (5,)), some(1, (3, 4), (5,))
    each = paper.decoupled(g, h, paper.Arm("x", projected=True, scope="each tensor"))
    assert all(float(dot([a], [b])) == pytest.approx(0, abs=1e-5) for a, b in zip(each, h, strict=True))
    every = paper.decoupled(g, h, paper.Arm("x", projected=True))
    assert not torch.allclose(every[0], each[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_against_changes_only_what_would_increase_the_distance(sign: float) -> None:
    h = some(1, (6,))
    g = [sign * h[0] + without(some(0, (6,)), h)[0]]
    found = paper.decoupled(g, h, paper.Arm("x", projected=True, when="against"))[0]
    assert torch.allclose(found, g[0]) == (sign > 0)
    moved = [-0.01 * found]
    assert float(dot(moved, h)) <= 1e-6  # to first order the distance does not grow


def test_a_carrier_has_the_value_given_and_the_gradients_wanted() -> None:
    weights = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    wanted = some(2, (3,), (2, 2))
    value = weights[0].square().sum()
    carried = with_gradients(value, weights, wanted)
    assert float(carried.detach()) == pytest.approx(float(value))
    for found, expected in zip(torch.autograd.grad(carried, weights), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_parameter_that_a_value_does_not_depend_on_has_gradient_zero() -> None:
    one, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    assert gradients(one.sum(), [one, other])[1].equal(torch.zeros(2))


# --------------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_equal_singular_values_count_as_many(rank: int) -> None:
    q, _ = torch.linalg.qr(torch.randn(9, rank, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(7, rank, dtype=torch.float64))
    assert float(effective_rank(3 * q @ p.mT)) == pytest.approx(rank, rel=1e-6)


def test_scale_leaves_the_effective_rank_and_uneven_values_lower_it() -> None:
    states = torch.randn(4, 10, 6)
    torch.testing.assert_close(effective_rank(100 * states), effective_rank(states))
    assert effective_rank(states).shape == (4,)
    uneven = torch.diag(torch.tensor([8.0, 1.0, 1.0]))
    values = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    assert float(effective_rank(uneven)) == pytest.approx(float((-values * values.log()).sum().exp()))


def test_cka_is_one_up_to_rotation_and_scale_and_small_between_strangers() -> None:
    states = torch.randn(200, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert linear_cka(states, 5 * states @ rotation + 1) == pytest.approx(1, abs=1e-5)
    assert linear_cka(states, torch.randn(200, 6)) < 0.2


# ------------------------------------------------------------------------------------------------------ questions


def test_the_new_task_is_even_and_its_answers_are_the_scenes() -> None:
    answers: Counter[str] = Counter()
    for scene in shapes.scenes(300, seed=5):
        for question in paper.new_questions(scene, random.Random(scene.things[0].x)):
            colour, shape, value = question.text.removeprefix("is the ").rstrip("?").split()
            (thing,) = (thing for thing in scene.things if (thing.colour, thing.shape) == (colour, shape))
            assert (value in (thing.texture, thing.size)) == (question.answer == "yes")
            answers[question.answer] += 1
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def test_no_question_of_the_new_task_is_an_old_one() -> None:
    asked = {
        questions: {each.text for scene in shapes.scenes(300) for each in questions(scene, random.Random(0))}
        for questions in (paper.old_questions, paper.new_questions)
    }
    assert not asked[paper.old_questions] & asked[paper.new_questions]


# ---------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module", params=llava_models.FAMILIES)
def loaded(request: pytest.FixtureRequest) -> Any:
    return llava_models.load(request.param)


@pytest.fixture(scope="module")
def bench(loaded: Any) -> paper.Bench:
    return paper.open_bench(SimpleNamespace(**{**vars(loaded), "model": copy.deepcopy(loaded.model)}), SMALL)


@pytest.fixture(scope="module")
def lesson(bench: paper.Bench) -> paper.Lesson:
    return paper.lesson_of(bench, 0)


def batch_of(bench: paper.Bench, lesson: paper.Lesson) -> dict[str, torch.Tensor]:
    return next(paper.feed(bench, lesson.images, lesson.kept, 0, 4))


def test_visual_states_do_not_depend_on_the_questions(bench: paper.Bench, lesson: paper.Lesson) -> None:
    batch = batch_of(bench, lesson)
    kept = batch.pop("kept")
    with torch.no_grad():
        _, states = paper.visual(bench.model, batch, bench.image_token)
    torch.testing.assert_close(states, kept, rtol=1e-3, atol=1e-4)
    assert float(paper.distance(states, kept, "all blocks")) < 1e-8


def test_cached_features_are_read_as_images_are(bench: paper.Bench, loaded: Any) -> None:
    scenes = shapes.scenes(3)
    pixels = loaded.processor.image_processor(list(shapes.render(scenes, 64)), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[*bench.beginning, 60]] * 3)
    features = paper.tower_features(bench.tower, pixels)
    with torch.no_grad():
        expected = loaded.model(input_ids=ids, pixel_values=pixels).logits
        found = bench.model(input_ids=ids, pixel_values=features).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_before_any_step_the_drift_is_zero_and_mdgd_is_direct_tuning(bench: paper.Bench, lesson: paper.Lesson) -> None:
    found = {}
    for arm in paper.arms(SMALL):
        if arm.name in (paper.FULL, paper.MDGD):
            parameters = paper.trainable(bench.model)
            value = paper.Tuning(bench, arm, parameters).loss(bench.model, batch_of(bench, lesson))
            found[arm.name] = gradients(value, parameters)
    for ours, theirs in zip(found[paper.MDGD], found[paper.FULL], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_after_a_step_mdgds_gradient_is_orthogonal_to_the_drifts(bench: paper.Bench, lesson: paper.Lesson) -> None:
    model, _ = paper.tune(bench, paper.Arm(paper.FULL), lesson, 1e-3)
    arm = next(arm for arm in paper.arms(SMALL) if arm.name == paper.MDGD)
    tuning = paper.Tuning(bench, arm, paper.trainable(model))
    kept = gradients(tuning.loss(model, batch_of(bench, lesson)), tuning.parameters)
    assert tuning.drift is not None
    assert float(dot(tuning.drift, tuning.drift)) > 0
    assert abs(cosine(kept, tuning.drift)) < 1e-5


@pytest.mark.parametrize("name", [paper.MASKED, paper.RANDOM])
def test_masked_arms_move_their_share_of_entries_and_no_other(
    bench: paper.Bench, lesson: paper.Lesson, name: str
) -> None:
    arm = next(arm for arm in paper.arms(SMALL) if arm.name == name)
    model, tuning = paper.tune(bench, arm, lesson, 1e-3)
    assert tuning.mask is not None
    pairs = zip(paper.trainable(model), paper.trainable(bench.model), tuning.mask, strict=True)
    for now, before, mask in pairs:
        assert (now == before)[mask == 0].all()
        assert mask.mean() == pytest.approx(SMALL.keep, abs=0.5 / mask.numel() + 1e-6) or mask.sum() == 1


def test_tuning_leaves_tower_and_given_model_as_they_are(bench: paper.Bench, lesson: paper.Lesson) -> None:
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    for arm in paper.arms(SMALL):
        model, _ = paper.tune(bench, arm, lesson, 1e-3)
        assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(value.equal(before[name]) for name, value in bench.model.state_dict().items())


def test_one_seed_gives_the_same_model_twice(bench: paper.Bench, lesson: paper.Lesson) -> None:
    one, two = (paper.tune(bench, paper.Arm(paper.FULL), lesson, 1e-3)[0] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_mask_keeps_the_largest_scores() -> None:
    (mask,) = paper.share_mask([torch.tensor([0.1, 5.0, 0.2, 4.0, 0.3])], 0.4)
    assert mask.tolist() == [0, 1, 0, 1, 0]


def test_every_other_reading_changes_one_choice() -> None:
    chosen = next(arm for arm in paper.arms(SMALL) if arm.name == paper.MDGD)
    for other in paper.other_readings(SMALL):
        changed = [name for name in ("where", "scope", "when") if getattr(other, name) != getattr(chosen, name)]
        assert len(changed) == 1
        assert getattr(other, changed[0]) in other.name


def test_the_rate_is_the_smallest_near_the_best_at_the_new_task_and_old_tasks_do_not_count() -> None:
    rows = [
        {"arm": arm.name, "rate": rate, "seed": seed, "new": new + 0.1 * seed, "old": old}
        for arm in paper.arms(SMALL)
        for seed in range(2)
        for rate, new, old in ((1e-4, 0.6, 0.9), (1e-3, 0.79, 0.1), (1e-2, 0.8, 0.95))
    ]
    assert set(paper.best_rates(pd.DataFrame(rows), 0.02).values()) == {1e-3}
    assert set(paper.best_rates(pd.DataFrame(rows), 0.0).values()) == {1e-2}


def test_balanced_rates_move_projector_and_language_model_at_rates_of_their_own(
    bench: paper.Bench, lesson: paper.Lesson
) -> None:
    arm = next(arm for arm in paper.arms(SMALL) if arm.balanced)
    model, _ = paper.tune(bench, arm, lesson, 1e-3)
    moved = {
        part: max(
            float((now - before).abs().max())
            for (name, now), before in zip(model.named_parameters(), bench.model.parameters(), strict=True)
            if part in name
        )
        for part in ("multi_modal_projector", "language_model")
    }
    assert all(moved.values())


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    params = SMALL.model_copy(update={"rates": (1e-3, 2e-3), "variants": True, "steps": 2, "n_seeds": 1})
    result = paper.experiment(params)
    every, readings = [arm.name for arm in paper.arms(params)], [arm.name for arm in paper.other_readings(params)]
    assert set(result.tables["answers"]["arm"]) == {"none", *every, *readings} == set(result.tables["chosen"]["arm"])
    assert set(result.tables["cost"]["arm"]) == {*every, *readings}
    assert len(result.tables["tuning"]) == 6 * 2 + 1 + 3
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
    assert len(standings(TUNING, paper.arena_rows(result))) == 1 + 6 * 2 + 1


# ---------------------------------------------------------------------------------------------------------- claims


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    means = {
        "none": (0.5, 0.9, 20.0),
        paper.FULL: (0.9, 0.5, 15.0),
        paper.LORA: (0.88, 0.7, 17.0),
        paper.PENALTY: (0.88, 0.7, 18.0),
        paper.BALANCED: (0.9, 0.6, 15.0),
        paper.MDGD: (0.9, 0.85, 19.5),
        paper.MASKED: (0.9, 0.84, 19.0),
        paper.RANDOM: (0.85, 0.75, 18.0),
    }
    answers, states = [], []
    for seed in range(4):
        for arm, (new, old, rank) in means.items():
            known = {"arm": arm, "rate": 1e-3, "seed": seed}
            for type, value in ((paper.NEW, new), ("colour", old), ("shape", old)):
                answers.append(known | {"type": type, "n": 100, "accuracy": value + 0.003 * rng.standard_normal()})
            for block in range(2):
                erank = rank + 0.05 * rng.standard_normal()
                states.append(known | {"block": block, "erank": erank, "cka": 0.9, "distance": 0.1})
    chosen = pd.DataFrame({"arm": list(means), "rate": 1e-3})
    return Result({"answers": pd.DataFrame(answers), "states": pd.DataFrame(states), "chosen": chosen})


def test_at_equal_rates_only_rates_that_both_had_are_compared() -> None:
    result = ideal()
    answers = result.tables["answers"]
    apart = answers.assign(rate=answers["arm"].map({paper.MDGD: 3e-4}).fillna(1e-3))
    both = result.with_table("answers", pd.concat([answers, apart[apart["arm"] == paper.MDGD].assign(accuracy=1.0)]))
    expected = paper.kept_at_equal_rates(result, paper.MDGD, paper.FULL)
    assert paper.kept_at_equal_rates(both, paper.MDGD, paper.FULL) == expected


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    result = ideal()
    tables = {name: table[table["seed"] == 0] for name, table in result.tables.items() if "seed" in table}
    single = Result({**result.tables, **tables}, result.scalars)
    assert direction(claim.check(single)) == "unclear"


def test_accuracy_counts_questions_not_types() -> None:
    marks = pd.DataFrame({"n": [10, 30], "accuracy": [1.0, 0.0]})
    assert paper.share(marks) == 0.25
    assert math.isnan(paper.share(marks[:0]))
