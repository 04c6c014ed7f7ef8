"""Facts of maps between logits, on several families of tiny models, and the checks of the chapter's claims."""

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import data, zoo
from midstream.claims import direction
from midstream.errors import AssetError, RequestError
from midstream.paper import Result
from midstream.papers.flow import linear_correlation as paper
from midstream.train import Schedule
from midstream.train.adapted import adapted

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3")
STRINGS = ["time", "people", "water", "house", "world", "school"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ------------------------------------------------------------------------------------------------ the linear map


@pytest.mark.parametrize("fit", list(paper.FITS.values()))
def test_identical_prompts_give_the_identity_and_r_of_one(fit) -> None:
    source = normal(200, 8)
    learned = fit(source, source)
    np.testing.assert_allclose(learned.weights, np.eye(8), atol=1e-3)
    np.testing.assert_allclose(paper.correlations(learned(source), source), 1, atol=1e-6)


def test_a_target_made_by_a_map_gives_that_map_back() -> None:
    source, weights, bias = normal(100, 6), normal(6, 4, seed=1), normal(4, seed=2)
    learned = paper.least_squares(source, source @ weights + bias)
    np.testing.assert_allclose(learned.weights, weights, atol=1e-9)
    np.testing.assert_allclose(learned.bias, bias, atol=1e-9)


def test_fitting_each_target_token_alone_equals_fitting_all_at_once() -> None:
    source, target = normal(60, 7), normal(60, 5, seed=1)
    together = paper.least_squares(source, target)
    for token in range(5):
        alone = paper.least_squares(source, target[:, [token]])
        np.testing.assert_allclose(alone.weights[:, 0], together.weights[:, token], atol=1e-10)
        with_ones = np.hstack([source, np.ones((60, 1))])
        np.testing.assert_allclose(np.linalg.lstsq(with_ones, target[:, token])[0][:-1], alone.weights[:, 0])


def test_ridge_scores_penalties_by_really_leaving_each_row_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = normal(30, 12)
    target = source @ normal(12, 3, seed=1) + 4 * normal(30, 3, seed=2)

    def missed(penalty: float) -> float:
        monkeypatch.setattr(paper, "PENALTIES", [penalty])
        errors = []
        for row in range(30):
            others = np.arange(30) != row
            # the penalty acts on centred columns of all rows, so the row left out stays at their mean
            y1, y2 = source - source.mean(0), target - target.mean(0)
            design = np.hstack([y1[others], np.ones((29, 1))])
            penalties = np.diag([*[penalty] * 12, 0])
            solved = np.linalg.solve(design.T @ design + penalties, design.T @ y2[others])
            errors.append(y2[row] - np.append(y1[row], 1) @ solved)
        return float(np.square(errors).mean())

    grid = [0.1, 1.0, 10.0, 100.0]
    best = min(grid, key=missed)
    monkeypatch.setattr(paper, "PENALTIES", [best])
    expected = paper.ridge(source, target).weights
    monkeypatch.setattr(paper, "PENALTIES", grid)
    np.testing.assert_allclose(paper.ridge(source, target).weights, expected)


def test_ridge_never_sees_the_odd_rows() -> None:
    source, target = normal(80, 10), normal(80, 3, seed=1)
    even = paper.ridge(source[::2], target[::2]).weights
    changed = target.copy()
    changed[1::2] = 99
    np.testing.assert_array_equal(paper.ridge(source[::2], changed[::2]).weights, even)


def test_shuffled_strings_send_r_to_zero() -> None:
    source = normal(4000, 5)
    target = source @ normal(5, 8, seed=1) + 0.3 * normal(4000, 8, seed=2)
    assert paper.held_out(source, target).mean() > 0.9
    assert abs(paper.held_out(np.random.default_rng(3).permutation(source), target).mean()) < 0.05


def test_as_many_regressors_as_rows_interpolate_noise_and_predict_nothing() -> None:
    source, target = normal(80, 39), normal(80, 4, seed=1)
    fitted = paper.least_squares(source[::2], target[::2])
    assert paper.correlations(fitted(source[::2]), target[::2]).mean() > 0.95
    assert abs(paper.held_out(source, target).mean()) < 0.3


def test_a_common_offset_makes_raw_logits_correlate_and_leaves_centred_ones_as_they_were() -> None:
    def read(offset: np.ndarray, seed: int) -> paper.Reading:
        return paper.Reading(normal(2000, 6, seed=seed) + offset[:, None], offset, list(range(6)))

    ids, offset = list(range(6)), 3 * normal(2000, seed=9)
    plain = [read(np.zeros(2000), seed).at(ids, "centred") for seed in (1, 2)]
    shifted = [read(offset, seed) for seed in (1, 2)]
    centred = [each.at(ids, "centred") for each in shifted]
    for a, b in zip(plain, centred, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert paper.held_out(*(each.at(ids, "raw") for each in shifted)).mean() > 0.8
    assert abs(paper.held_out(*centred).mean()) < 0.1


def test_log_probabilities_are_logits_less_the_logarithm_of_the_sum() -> None:
    logits = torch.randn(5, 9, dtype=torch.float64)
    reading = paper.Reading(logits.numpy(), logits.logsumexp(1).numpy(), list(range(9)))
    np.testing.assert_allclose(reading.at([2, 7], "log-probability"), logits.log_softmax(1)[:, [2, 7]].numpy())


def test_a_column_without_variance_counts_as_uncorrelated() -> None:
    assert paper.correlations(np.ones((5, 1)), normal(5, 1)).tolist() == [0]


# ------------------------------------------------------------------------------------------------- reading W


def test_the_hits_of_a_perfect_map_are_all_and_those_of_exchanged_facts_none() -> None:
    cities, countries = paper.Domain(list("abc"), [1, 2, 3]), paper.Domain(list("xyz"), [4, 5, 6])
    facts = {"a": "x", "b": "y", "c": "z"}
    found = paper.hits(np.eye(3), cities, countries, facts)
    assert (found["hit1"], found["chance1"]) == (1, 0)
    assert found["hit5"] == found["chance5"] == 1  # only three countries


def test_a_favourite_of_every_row_raises_chance_as_much_as_hits() -> None:
    cities, countries = paper.Domain(list("abcd"), [1, 2, 3, 4]), paper.Domain(list("wxyz"), [5, 6, 7, 8])
    scores = np.tile([9.0, 1, 2, 3], (4, 1))
    found = paper.hits(scores, cities, countries, dict(zip("abcd", "wxyz", strict=True)))
    assert found["hit1"] == found["chance1"] == 0.25


def test_two_cities_of_one_country_are_no_chance_hit_of_each_other() -> None:
    cities, countries = paper.Domain(list("abc"), [1, 2, 3]), paper.Domain(list("xy"), [5, 6])
    found = paper.hits(np.array([[1.0, 0], [1, 0], [0, 1]]), cities, countries, {"a": "x", "b": "x", "c": "y"})
    assert (found["hit1"], found["chance1"]) == (1, 0)


def test_standardized_weights_do_not_depend_on_the_units_of_the_logits() -> None:
    source, target = normal(100, 3), normal(100, 2, seed=1)
    plain = paper.standardized(paper.least_squares(source, target).weights, source, target)
    scaled = paper.standardized(paper.least_squares(5 * source, 2 * target).weights, 5 * source, 2 * target)
    np.testing.assert_allclose(plain, scaled)


def test_a_rise_is_the_change_less_that_of_facts_to_which_the_country_means_nothing() -> None:
    change = np.array([[3.0, 1.0, 0.0], [1.0, 5.0, 0.0], [1.0, 3.0, 0.0]])
    own = np.array([[True, False, False], [False, True, False], [True, False, False]])
    assert paper.rises(change, [0, 1, 0], own).tolist() == [3 - 1, 5 - 2, 1 - 1]


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_logits_are_those_of_each_prompt_alone(family: str) -> None:
    loaded = zoo.load(f"tiny:{family}")
    strings = [*STRINGS, "timewater", "a"]  # of different lengths
    ids = [11, 5, 60]
    reading = paper.read_logits(loaded, paper.PROMPTS["city"], strings, ids, batch_size=3)
    for row, string in enumerate(strings):
        tokens = torch.tensor(loaded.tokenizer(f"{string} lives in the city of").input_ids)[None]
        with torch.no_grad():
            alone = loaded.model(tokens).logits[0, -1]
        np.testing.assert_allclose(reading.logits[row], alone[ids].numpy(), rtol=1e-3, atol=1e-4)
        assert reading.normalizer[row] == pytest.approx(alone.logsumexp(0).item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_tuning_changes_a_model_and_taking_the_adapters_off_brings_it_back_bit_for_bit(family: str) -> None:
    loaded = zoo.load(f"tiny:{family}")
    loaded.model.requires_grad_(False)
    ids = torch.tensor(loaded.tokenizer("time lives in the city of").input_ids)[None]
    batch = (ids, torch.tensor([ids.shape[1] - 1]), torch.tensor([42]))
    before = loaded.model(ids).logits
    with adapted(loaded.model, [batch] * 8, paper.teach_loss, Schedule(8, 3e-2), rank=4, seed=0) as curve:
        assert curve["loss"].iloc[-1] < curve["loss"].iloc[0]
        assert not torch.equal(loaded.model(ids).logits, before)
    assert torch.equal(loaded.model(ids).logits, before)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())


def test_adapters_are_taken_off_when_training_breaks() -> None:
    loaded = zoo.load("tiny:llama")

    def broken(model, batch):
        raise RuntimeError("broken")

    with (
        pytest.raises(RuntimeError, match="broken"),
        adapted(loaded.model, [0], broken, Schedule(1), rank=2, seed=0),
    ):
        pass
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_strings_are_one_token_each_at_the_beginning_of_a_prompt(family: str) -> None:
    tokenizer = zoo.load(f"tiny:{family}").tokenizer
    pool = paper.string_pool(tokenizer, excluded={"water"})
    assert len(pool) > 100
    assert "water" not in pool
    lengths = {len(tokens) for tokens in paper.prompts(tokenizer, paper.PROMPTS["city"], pool[:50])}
    assert len(lengths) == 1


def test_only_names_of_a_single_token_make_a_domain_and_each_token_counts_once() -> None:
    tokenizer = zoo.load("tiny:llama").tokenizer
    names = ["water", "waterhouse", "house", "water", "time", "school", "world"]
    found = paper.domain(tokenizer, names, limit=4)
    assert found.names == ["water", "house", "time", "school"]
    assert [tokenizer.decode([i]).strip() for i in found.ids] == found.names
    with pytest.raises(RequestError, match="at least 4"):
        paper.domain(tokenizer, ["waterhouse", "water"], limit=9)


# ------------------------------------------------------------------------------------------------- the experiment


def small_world(tokenizer, limit: int) -> paper.World:
    """Words in the place of names: tiny models know no city."""
    words = paper.string_pool(tokenizer, excluded=STRINGS)[: 4 * limit]
    parts = [paper.domain(tokenizer, words[i::4], limit) for i in range(4)]
    domains = dict(zip(("city", "country", "language", paper.UNRELATED), parts, strict=True))
    facts = {
        pair: dict(zip(domains[pair[0]].names, domains[pair[1]].names, strict=True))
        for pair in (paper.FIRST, ("country", "language"))
    }
    return paper.World({**domains, "plus1": parts[0], "plus2": parts[1]}, facts)


@pytest.fixture(scope="module")
def tiny_result() -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "world", small_world)
        reviews = data.Dataset("movies", pd.DataFrame({"text": ["time and water " * 40] * 3}), (), None, "")
        patch.setattr(paper.data, "load", lambda name, split="train": reviews)
        params = paper.Params(
            model="tiny:llama", other_models=("tiny:gpt2",), n_seeds=2, n_strings=40, max_names=6, n_facts=4,
            update_steps=3, tune_steps=2,
        )  # fmt: skip
        return paper.experiment(params)


def test_the_experiment_fills_every_table_and_every_check_reads_it(tiny_result: Result) -> None:
    assert set(tiny_result.tables) == {"correlation", "weights", "facts", "rows", "updates", "resilience"}
    for claim in paper.CLAIMS:
        assert claim.check(tiny_result)
    assert Result.from_dict(tiny_result.to_dict()).to_dict() == tiny_result.to_dict()


def test_every_arm_has_as_many_regressors(tiny_result: Result) -> None:
    loaded = zoo.load("tiny:llama")
    around = small_world(loaded.tokenizer, 6)
    params = paper.Params(n_strings=20, max_names=6, n_facts=4)
    pool = paper.string_pool(loaded.tokenizer, [])
    bench = paper.prepare(loaded, around, pool, paper.PAIRS, params, seed=0)
    for pair in paper.PAIRS:
        assert {each.shape for each in paper.sources(bench, pair, "centred").values()} == {(20, 6)}
    assert not set(bench.strings) & set(bench.fresh)


def test_another_model_takes_part_in_the_first_pair_alone(tiny_result: Result) -> None:
    other = paper.select(tiny_result.tables["correlation"], model="tiny:gpt2")
    assert set(zip(other["source"], other["target"], strict=True)) == {paper.FIRST}
    assert paper.models(tiny_result) == ["tiny:llama", "tiny:gpt2"]


@pytest.mark.slow
def test_a_domain_that_the_packages_ship_has_one_token_names_and_true_facts() -> None:
    try:
        found = paper.world(zoo.load("smollm2").tokenizer, 40)
    except AssetError as error:
        pytest.skip(str(error))
    facts = found.facts[paper.FIRST]
    assert (facts["Tokyo"], facts["Paris"], facts["Cairo"]) == ("Japan", "France", "Egypt")
    assert "London" not in facts  # "United Kingdom" is no single token, and London in Canada is not meant
    assert not set(facts) & set(found.domains["country"].names)
    assert found.facts["country", "language"]["Brazil"] == "Portuguese"


# ----------------------------------------------------------------------------------------------------- the claims


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {name: [] for name in ("correlation", "weights", "facts", "updates", "resilience")}
    for seed in range(5):

        def near(value: float) -> float:
            return value + 0.01 * rng.standard_normal()

        for source, target in paper.PAIRS:
            named = {"model": "a", "seed": seed, "source": source, "target": target}
            for form in paper.FORMS:
                for arm, r in (("related", 0.8), ("random tokens", 0.5), ("unrelated", 0.3), ("shuffled", 0.0)):
                    rows["correlation"].append({**named, "arm": arm, "form": form, "fit": "ols", "r": near(r)})
        found = {"hit1": near(0.5), "hit5": near(0.8), "chance1": near(0.05), "chance5": near(0.2)}
        named = {"model": "a", "seed": seed, "source": "city", "target": "country"}
        rows["weights"].append({**named, "form": "raw", "fit": "ols", "reading": "W", **found})
        rows["facts"].append({"model": "a", "seed": seed, "city": "Tokyo", "pointed": "Japan"})
        for which, r in (("old on new", 0.7), ("new on new", 0.72), ("unmapped", 0.8), ("shuffled", 0.0)):
            for form in paper.FORMS:
                rows["resilience"].append({"seed": seed, "form": form, "map": which, "r": near(r)})
        for right, truth, pointed in ((True, 2.0, 2.0), (False, 0.2, 1.0)):
            for _ in range(3):
                rises = {"truth_rise": near(truth), "pointed_rise": near(pointed)}
                agreement = {"agreement": near(0.6), "agreement_others": near(0.1)}
                rows["updates"].append({"seed": seed, "right": right, "learned": True, **rises, **agreement})
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()})
    assert direction(claim.check(single)) == "unclear"


def test_the_paper_numbers_are_read_from_the_published_settings() -> None:
    numbers = {number.what: number for claim in paper.CLAIMS for number in claim.numbers}
    assert numbers["mean r over country tokens"].ours(ideal()).estimate == pytest.approx(0.8, abs=0.02)
    assert numbers["Tokyo's largest weight is Japan's (1 = yes)"].ours(ideal()).estimate == 1
