"""Facts of gradient knowledge distillation, on tiny encoders of three families, and the checks of its claims."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf

from midstream import zoo
from midstream.claims import direction
from midstream.errors import AssetError, RequestError
from midstream.paper import Result
from midstream.papers.transfer import gkd as paper
from midstream.train.distill import gradient_loss, soft_label_loss

FAMILIES = ("bert", "roberta", "distilbert")
SIZES = paper.Params(teacher="tiny:bert", student_layers=2, n_train=24, n_test=8, batch_size=8)


def encoder(family: str) -> Any:
    if family == "distilbert":
        torch.manual_seed(0)
        return hf.DistilBertModel(
            hf.DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, n_layers=4, vocab_size=128)
        ).eval()
    return zoo.load(f"tiny:{family}").model


def texts(count: int, seed: int = 0) -> paper.Sentences:
    """Random sentences of 6 to 11 tokens between a first and a last special token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    inner = [torch.randint(5, 60, (length,), generator=generator) for length in lengths]
    ids = [torch.cat([torch.tensor([1]), words, torch.tensor([2])]) for words in inner]
    return paper.Sentences(ids, torch.tensor([words[0] % 2 for words in inner]), 0, torch.tensor([0, 1, 2]))


@pytest.fixture(scope="module", params=FAMILIES)
def school(request: pytest.FixtureRequest) -> paper.School:
    """An untrained teacher of four blocks whose students have two."""
    teacher = paper.classifier_of(encoder(request.param), 2, seed=0)
    teacher.requires_grad_(False)
    layers = paper.paired_layers(4, 2)
    train = texts(24)
    said = paper.lessons(teacher, train, [theirs for _, theirs in layers], 8)
    return paper.School(teacher, train, texts(8, seed=1), said, layers, SIZES, 0)


def first_batch(school: paper.School) -> dict[str, Any]:
    rows = list(range(8))
    teacher = paper.collate([school.lessons[row] for row in rows])
    return {"inputs": school.train.inputs(rows), "labels": school.train.labels[rows], "teacher": teacher}


def loss_of(school: paper.School, model: Any, method: paper.Method) -> torch.Tensor:
    ours = [layer for layer, _ in school.layers]
    return paper.student_loss(model, first_batch(school), method, ours, 5.0)


def test_a_teacher_keeps_its_encoders_weights(school: paper.School) -> None:
    family = {"distilbert": "distilbert", "roberta": "roberta", "bert": "bert"}[school.teacher.config.model_type]
    inputs = school.train.inputs([0, 1])
    source = encoder(family).base_model
    expected = source(**inputs).last_hidden_state
    torch.testing.assert_close(school.teacher.base_model(**inputs).last_hidden_state, expected, rtol=1e-3, atol=1e-4)


def test_a_student_computes_what_the_teachers_first_blocks_do(school: paper.School) -> None:
    student = paper.student_of(school.teacher, 2, seed=0)
    inputs = school.train.inputs([0, 1, 2])
    theirs = school.teacher(**inputs, output_hidden_states=True).hidden_states
    ours = student(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == 3
    for state, reference in zip(ours, theirs[:3], strict=True):
        torch.testing.assert_close(state, reference)


def test_a_student_has_frozen_embeddings_and_a_head_of_its_own(school: paper.School) -> None:
    student = paper.student_of(school.teacher, 2, seed=5)
    frozen = {name for name, weight in student.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all("embeddings" in name for name in frozen)
    assert all("embeddings" not in name for name, weight in student.named_parameters() if weight.requires_grad)
    heads = [dict(model.named_parameters()) for model in (student, school.teacher)]
    (name,) = (name for name in heads[0] if name in ("classifier.weight", "classifier.out_proj.weight"))
    assert not torch.equal(heads[0][name], heads[1][name])


def test_a_student_as_deep_as_its_teacher_is_refused(school: paper.School) -> None:
    with pytest.raises(RequestError, match="fewer blocks"):
        paper.student_of(school.teacher, 4, seed=0)


def test_a_decoder_is_refused_as_a_teacher() -> None:
    with pytest.raises(RequestError, match="encoder"):
        paper.classifier_of(zoo.load("tiny:llama").model, 2, seed=0)


def test_attention_is_eager_since_fused_kernels_have_no_second_derivative(school: paper.School) -> None:
    student = paper.student_of(school.teacher, 2, seed=0)
    assert school.teacher.config._attn_implementation == student.config._attn_implementation == "eager"


def test_a_model_is_its_own_perfect_student(school: paper.School) -> None:
    said = paper.answer(school.teacher, first_batch(school)["inputs"], [theirs for _, theirs in school.layers])
    taught = first_batch(school)["teacher"]
    assert gradient_loss(said.gradient, taught["gradient"]).item() == pytest.approx(0, abs=1e-5)
    assert soft_label_loss(said.logits, taught["logits"], 5.0).item() == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(said.cls_gradients, taught["cls_gradients"], rtol=1e-3, atol=1e-6)


def test_lessons_computed_in_batches_are_each_sentences_own(school: paper.School) -> None:
    theirs = [layer for _, layer in school.layers]
    for row in (0, 7, 23):
        said = paper.answer(school.teacher, school.train.inputs([row]), theirs)
        torch.testing.assert_close(said.gradient[0], school.lessons[row]["gradient"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(said.cls_states[0], school.lessons[row]["cls_states"], rtol=1e-3, atol=1e-4)


def test_padding_has_no_teacher_gradient(school: paper.School) -> None:
    batch = first_batch(school)
    assert (batch["teacher"]["gradient"][batch["inputs"]["attention_mask"] == 0] == 0).all()
    assert batch["teacher"]["gradient"].shape[:2] == batch["inputs"]["input_ids"].shape


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_warm_start_scales_the_gradient_losses_only(school: paper.School, share: float) -> None:
    student, batch = paper.student_of(school.teacher, 2, seed=0), first_batch(school)
    ours, whole = [layer for layer, _ in school.layers], paper.Method("GKD-CLS", 1e-3, 0.5, 10.0, 0.2, 0.2)
    scaled = paper.Method("", 1e-3, 0.5, 10.0, 0.2 * share, 0.2 * share)
    expected = paper.student_loss(student, batch, scaled, ours, 5.0)
    torch.testing.assert_close(paper.student_loss(student, batch | {"warmth": share}, whole, ours, 5.0), expected)


def test_warmth_grows_evenly_and_stays() -> None:
    assert [paper.warmth(step, 4) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert paper.warmth(0, 0) == 1


def test_without_weights_on_the_teacher_the_loss_is_cross_entropy(school: paper.School) -> None:
    student, batch = paper.student_of(school.teacher, 2, seed=0), first_batch(school)
    plain = torch.nn.functional.cross_entropy(student(**batch["inputs"]).logits, batch["labels"])
    torch.testing.assert_close(loss_of(school, student, paper.Method("fine-tuning", 1e-3)), plain)


def test_the_parts_of_the_loss_add_up_with_their_weights(school: paper.School) -> None:
    student = paper.student_of(school.teacher, 2, seed=0)
    bare = paper.Method("", 1e-3, alpha=1.0)
    base = loss_of(school, student, bare)
    parts = {"patience": 3.0, "gradient": 0.5, "cls_gradient": 0.25}
    grown = [loss_of(school, student, replace(bare, **{name: weight})) - base for name, weight in parts.items()]
    torch.testing.assert_close(loss_of(school, student, replace(bare, **parts)), base + sum(grown))
    doubled = loss_of(school, student, replace(bare, gradient=1.0)) - base
    torch.testing.assert_close(doubled, 2 * grown[1])


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def test_the_loss_of_gkd_cls_equals_a_slow_version_without_hooks(school: paper.School) -> None:
    student, batch = paper.student_of(school.teacher, 2, seed=0), first_batch(school)
    method = paper.Method("", 1e-3, alpha=0.3, patience=3.0, gradient=0.5, cls_gradient=0.25)
    found = loss_of(school, student, method)
    student.base_model.embeddings.requires_grad_(True)  # or the embedding output would be no part of the graph
    out = student(**batch["inputs"], output_hidden_states=True)
    wanted = [out.hidden_states[0], *(out.hidden_states[ours + 1] for ours, _ in school.layers)]
    slopes = torch.autograd.grad(out.logits.softmax(-1).max(-1).values.sum(), wanted)
    taught, rows, said = batch["teacher"], range(len(batch["labels"])), out.logits.detach()
    cross = -sum(said[row].log_softmax(0)[batch["labels"][row]] for row in rows) / len(rows)
    divergence, cls_distance, state_distance = 0.0, 0.0, 0.0
    distances = []
    for row in rows:
        p, q = (logits[row].div(5).softmax(0) for logits in (taught["logits"], said))
        divergence += float((p * (p / q).log()).sum()) / len(rows)
        for token in range(int(batch["inputs"]["attention_mask"][row].sum())):
            gap = unit(slopes[0][row, token]) - unit(taught["gradient"][row, token])
            distances.append(float(gap.square().sum()))
        for at in range(len(school.layers)):
            gap = unit(slopes[1 + at][row, 0]) - unit(taught["cls_gradients"][row, at])
            cls_distance += float(gap.square().sum()) / len(rows)
            gap = unit(wanted[1 + at][row, 0].detach()) - unit(taught["cls_states"][row, at])
            state_distance += float(gap.square().mean()) / (len(rows) * len(school.layers))
    slow = 0.7 * float(cross) + 0.3 * 25 * divergence + 3 * state_distance
    slow += 0.5 * sum(distances) / len(distances) + 0.25 * cls_distance
    assert found.item() == pytest.approx(slow, rel=1e-3)


def test_matching_gradients_moves_the_students_weights(school: paper.School) -> None:
    student = paper.student_of(school.teacher, 2, seed=0)
    only = paper.Method("", 1e-3, alpha=1.0, gradient=1.0)
    without, with_it = (loss_of(school, student, method) for method in (replace(only, gradient=0.0), only))
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    gap = [
        torch.zeros(()) if a is None or b is None else (a - b).abs().max()
        for a, b in zip(
            torch.autograd.grad(without, weights, allow_unused=True),
            torch.autograd.grad(with_it, weights, allow_unused=True),
            strict=True,
        )
    ]
    assert max(gap) > 1e-6


def test_layers_are_paired_at_equal_shares_of_the_depth() -> None:
    assert paper.paired_layers(12, 6) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]
    assert paper.paired_layers(6, 3) == [(0, 1), (1, 3)]


def test_dropout_never_acts_on_the_embeddings(school: paper.School) -> None:
    student = paper.student_of(school.teacher, 2, seed=0)
    paper.set_dropout(student, 0.3)
    inside = {m.p for m in student.base_model.embeddings.modules() if isinstance(m, torch.nn.Dropout)}
    assert inside <= {0.0}
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.3}


def test_answers_under_dropout_differ_between_draws_and_leave_the_teacher_as_it_was(school: paper.School) -> None:
    inputs, theirs = first_batch(school)["inputs"], [layer for _, layer in school.layers]
    one, two = (paper.drawn_answers(school.teacher, inputs, theirs, 0.3) for _ in range(2))
    assert not torch.equal(one["gradient"], two["gradient"])
    after = paper.answer(school.teacher, inputs, theirs)
    torch.testing.assert_close(after.logits, first_batch(school)["teacher"]["logits"], rtol=1e-3, atol=1e-4)


def test_shuffled_lessons_keep_every_gradient_and_move_most(school: paper.School) -> None:
    dealt = paper.deal_to_other_tokens(school.lessons, seed=0)
    before, after = (torch.cat([lesson["gradient"] for lesson in part]) for part in (school.lessons, dealt))
    assert [len(lesson["gradient"]) for lesson in dealt] == [len(ids) for ids in school.train.ids]
    assert sorted(before.norm(dim=1).tolist()) == sorted(after.norm(dim=1).tolist())
    assert (before != after).any(1).float().mean() > 0.9
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(school.lessons, dealt, strict=True))


def test_every_epoch_has_every_row_once() -> None:
    feed = paper.epochs([5, 9, 7, 3, 4, 8, 6], 3, seed=0)
    for _ in range(2):
        rows = [row for _ in range(3) for row in next(feed)]
        assert sorted(rows) == list(range(7))


def test_a_distilled_student_comes_closer_to_its_teachers_gradients(school: paper.School) -> None:
    quick = replace(school, params=SIZES.model_copy(update={"epochs": 6, "warm_start": 0.0}))
    method = paper.Method("GKD", 3e-3, alpha=0.5, gradient=2.0)
    ours = [layer for layer, _ in school.layers]

    def distance(model: Any) -> float:
        said = paper.answer(model, first_batch(school)["inputs"], ours)
        return gradient_loss(said.gradient, first_batch(school)["teacher"]["gradient"]).item()

    before = distance(paper.student_of(school.teacher, 2, school.seed))
    student, seconds = paper.distil(quick, method)
    assert distance(student) < before
    assert seconds > 0


def test_methods_of_one_seed_start_from_the_same_student_and_see_the_same_batches(school: paper.School) -> None:
    method = paper.Method("KD", 1e-3, alpha=0.5)
    (one, _), (two, _) = (paper.distil(school, method) for _ in range(2))
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_reading_is_fully_loyal_to_itself_and_a_shuffled_one_is_not(school: paper.School) -> None:
    test = texts(40, seed=3)
    reading = paper.read_test(school.teacher, test, 8)
    order = [row for rows in paper.by_length(test, 8) for row in rows]
    words, real = test.words(order), test.inputs(order)["attention_mask"].bool()
    assert words.sum() == real.sum() - 2 * len(test)
    itself = paper.loyalties(reading, reading, words, real)
    assert all(value == pytest.approx(1, abs=1e-3) for value in itself.values())
    shuffled = paper.loyalties(reading, paper.shuffled_reading(reading, words, seed=0), words, real)
    assert abs(shuffled["saliency_loyalty"]) < 0.3
    assert shuffled["top_3_overlap"] < 0.8


def test_with_two_classes_saliency_does_not_depend_on_which_one_is_read(school: paper.School) -> None:
    """p₁ = 1 − p₀, so the gradients are opposite and equally long."""
    inputs = school.test.inputs([0, 1])
    traced = paper.trace(school.teacher, inputs)
    both = [
        torch.autograd.grad(traced.logits.softmax(-1)[:, c].sum(), traced.embedded, retain_graph=True) for c in (0, 1)
    ]
    torch.testing.assert_close(both[0][0], -both[1][0], rtol=1e-3, atol=1e-6)


def test_a_student_that_answers_against_its_teacher_has_opposite_gradients_and_full_saliency_loyalty() -> None:
    gradient = torch.randn(2, 6, 4)
    mask = torch.ones(2, 6, dtype=torch.bool)
    norm, product = gradient.norm(dim=-1), gradient.sum(-1).abs()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    teacher = paper.Reading(logits, gradient, norm, product)
    student = paper.Reading(-logits, -gradient, norm, product)
    found = paper.loyalties(student, teacher, mask, mask)
    assert found["label_loyalty"] == 0
    assert found["alignment"] == pytest.approx(-1)
    assert found["saliency_loyalty"] == pytest.approx(1)


# --------------------------------------------------------------------------------------------------- the claims

LOYALTIES = ("label_loyalty", "probability_loyalty", "saliency_loyalty", "saliency_loyalty_input", "alignment")


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    means = {"fine-tuning": 0.5, "KD": 0.6, "PKD": 0.6, "GKD": 0.8, "GKD-CLS": 0.8}
    means |= {paper.SHUFFLED: 0.6, paper.STUDENT_DROPOUT: 0.7, paper.TEACHER_DROPOUT: 0.7}
    students, loyalty = [], []
    for seed in range(4):
        for method, mean in means.items():

            def near(value: float) -> float:
                return value + 0.01 * rng.standard_normal()

            students.append({"seed": seed, "method": method, "accuracy": near(mean), "seconds_per_step": 0.1})
            for teacher, level in (("own", mean), ("another", 0.5), ("shuffled", 0.4)):
                values = {name: near(level) for name in LOYALTIES}
                loyalty.append({"seed": seed, "method": method, "teacher": teacher, **values})
    return Result({"students": pd.DataFrame(students), "loyalty": pd.DataFrame(loyalty)}, {})


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


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    params = paper.Params(teacher="tiny:bert", n_seeds=2, n_train=32, n_test=24, student_layers=2, epochs=1)
    try:
        result = paper.experiment(params)
    except AssetError as error:  # the archive is fetched once; a fresh machine without network has none
        pytest.skip(str(error))
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert set(result.tables) == {"students", "loyalty", "teachers", "examples", "tuning"}
    assert len(result.tables["students"]) == 2 * 8
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()


GRIDS = {"rates": (1e-3, 2e-3), "patiences": (1.0, 10.0), "gradients": (0.1, 1.0)}


def test_every_method_is_tuned_with_as_many_settings_and_a_weight_changes_nothing_else() -> None:
    for preset in ("quick", "full"):
        params = paper.PRESETS[preset].params
        assert len(params.rates) == len(params.patiences) == len(params.gradients)
    params = SIZES.model_copy(update=GRIDS)
    best: dict[str, paper.Method] = {}
    for name in (*paper.BASELINES, *paper.GRADIENT_METHODS):
        tried = paper.settings(name, params, best)
        assert len(set(tried)) == 2
        best[name] = tried[1]
    assert best["GKD"] == replace(best["KD"], name="GKD", gradient=1.0)
    assert best["GKD-CLS"] == replace(best["PKD"], name="GKD-CLS", gradient=1.0, cls_gradient=1.0)


def test_the_setting_most_often_right_on_validation_sentences_is_chosen(school: paper.School) -> None:
    searched = replace(school, params=SIZES.model_copy(update={**GRIDS, "epochs": 1}))
    found = paper.search(searched, texts(16, seed=4))
    tries = pd.DataFrame(found.tries)
    for name, tried in tries.groupby("method"):
        first_best = tried.loc[tried["accuracy"].idxmax()]
        chosen = found.best[str(name)]
        assert (chosen.rate, chosen.patience, chosen.gradient) == tuple(first_best[["rate", "patience", "gradient"]])
        student, _ = found.students[chosen]
        assert paper.share_right(student, texts(16, seed=4), 8) == first_best["accuracy"]


def test_arms_differ_from_gkd_in_one_thing_each() -> None:
    gkd = paper.Method("GKD", 1e-3, alpha=0.5, gradient=0.1)
    added = paper.arms({"GKD": gkd}, SIZES)[1:]
    assert [replace(arm, name="GKD") for arm in added] == [
        replace(gkd, shuffled=True),
        replace(gkd, student_dropout=0.1),
        replace(gkd, teacher_dropout=0.1),
    ]
