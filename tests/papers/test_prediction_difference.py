"""Facts of counting inputs by weights, against enumeration, and the checks of the chapter's claims."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data.markov import markov_source, source_batches, source_nll
from midstream.errors import AssetError, RequestError
from midstream.measure.input_space import draw, every_nll, every_sequence, index_of, read
from midstream.paper import Result
from midstream.papers.flow import prediction_difference as paper
from midstream.train.copies import block_matrices, noised, pruned, small_llama, tuned

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3")
VOCABULARY, LENGTH = 6, 4
PREFIX = torch.tensor([1])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.tiny.build(request.param, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """z of all inputs under two random models of one family."""
    models = [zoo.tiny.build("llama", seed=seed, vocab_size=VOCABULARY) for seed in (3, 4)]
    z_a, z_b = (every_nll(each, PREFIX, VOCABULARY, LENGTH).numpy() for each in models)
    return z_a, z_b


def sampled(nll: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Places of inputs drawn with their true probabilities."""
    weights = np.exp(-nll)
    return np.random.default_rng(seed).choice(len(nll), size=count, p=weights / weights.sum())


def middle(nll: np.ndarray, bins: int = 6) -> np.ndarray:
    """z bins that hold the central half of a model's inputs."""
    return np.linspace(*np.quantile(nll, [0.1, 0.6]), bins + 1)


# ------------------------------------------------------------------------------------------- the space of inputs


def test_probabilities_of_all_inputs_sum_to_one(model: Any) -> None:
    nll = every_nll(model, PREFIX, VOCABULARY, LENGTH)
    assert nll.shape == (VOCABULARY**LENGTH,)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-4)


def test_the_enumeration_reads_each_input_as_reading_it_alone_does(model: Any) -> None:
    sequences = every_sequence(VOCABULARY, LENGTH)
    assert torch.equal(index_of(sequences, VOCABULARY), torch.arange(len(sequences)))
    some = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))[:9]
    alone = torch.cat([read(model, PREFIX, sequences[place][None]) for place in some])
    nll = every_nll(model, PREFIX, VOCABULARY, LENGTH, batch_size=50)
    torch.testing.assert_close(nll[some], alone, rtol=1e-4, atol=1e-4)


def test_a_drawn_input_has_the_likelihood_that_reading_gives_it(model: Any) -> None:
    tokens, nll = draw(model, PREFIX, count=20, length=LENGTH, seed=0, batch_size=8)
    torch.testing.assert_close(nll, read(model, PREFIX, tokens, batch_size=7), rtol=1e-4, atol=1e-4)


def test_inputs_are_drawn_as_often_as_they_are_likely_and_none_is_left_out() -> None:
    model = zoo.tiny.build("llama", vocab_size=4)
    tokens, _ = draw(model, PREFIX, count=20_000, length=2, seed=0, batch_size=10_000)
    found = np.bincount(index_of(tokens, 4).numpy(), minlength=16) / len(tokens)
    true = torch.exp(-every_nll(model, PREFIX, 4, 2)).numpy()
    assert np.abs(found - true).max() < 0.02
    assert (found > 0).all()  # truncated sampling would leave the least likely of 16 out


def test_a_model_that_knows_nothing_has_one_z() -> None:
    model = zoo.tiny.build("qwen2", vocab_size=VOCABULARY)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    nll = every_nll(model, PREFIX, VOCABULARY, LENGTH).numpy()
    np.testing.assert_allclose(nll, LENGTH * np.log(VOCABULARY), rtol=1e-5)
    edges = np.array([0.0, 2 * nll[0]])
    assert paper.log_counts(nll, edges)[0] == pytest.approx(np.log(VOCABULARY**LENGTH), rel=1e-5)


def test_a_space_too_large_to_enumerate_is_refused() -> None:
    with pytest.raises(RequestError, match="smaller"):
        every_sequence(50, 6)


def test_the_sources_batches_follow_its_probabilities() -> None:
    source = markov_source(3, seed=0)
    batch = torch.cat([next(source_batches(source, 4000, 2, seed=seed)) for seed in range(2)])
    assert (batch[:, 0] == 0).all()
    found = np.bincount(index_of(batch[:, 1:], 3).numpy(), minlength=9) / len(batch)
    true = torch.exp(-source_nll(source, every_sequence(3, 2))).numpy()
    assert true.sum() == pytest.approx(1)
    assert np.abs(found - true).max() < 0.02


# --------------------------------------------------------------------------------------------- counting by weights


def slow_weights(nll: np.ndarray, chosen: np.ndarray, edges: np.ndarray, rule: str) -> np.ndarray:
    """The definition spelled out, without logarithms."""
    weights = []
    for z in chosen:
        low = max((edge for edge in edges[:-1] if edge <= z), default=None)
        high = min((edge for edge in edges[1:] if edge > z), default=None)
        if low is None or high is None:
            weights.append(0.0)
            continue
        members, peers = ([v for v in values if low <= v < high] for values in (nll, chosen))
        count = sum(1.0 if rule == "none" else np.exp(v) for v in members) / len(nll)
        share = np.exp(z) / sum(np.exp(v) for v in peers) if rule == "input" else 1 / len(peers)
        weights.append(count * share)
    return np.array(weights)


@pytest.mark.parametrize("rule", paper.RULES)
def test_weights_are_those_that_loops_over_bins_give(rule: str) -> None:
    random = np.random.default_rng(0)
    nll, edges = random.normal(6, 2, 80), np.linspace(3, 8, 6)
    chosen = nll[paper.representatives(nll, edges, 4, seed=0)]
    assert len(chosen) <= 20
    ours = np.exp(paper.log_weights(nll, np.append(chosen, [1.0, 9.0]), edges, rule))
    np.testing.assert_allclose(ours, slow_weights(nll, np.append(chosen, [1.0, 9.0]), edges, rule))


@pytest.mark.parametrize("rule", paper.RULES)
def test_counts_over_all_differences_sum_to_the_size_of_the_space(pair, rule: str) -> None:
    z_a, z_b = pair
    places, edges = sampled(z_a, 300), middle(z_a)
    chosen = places[paper.representatives(z_a[places], edges, 5, seed=0)]
    weights = paper.log_weights(z_a[places], z_a[chosen], edges, rule)
    difference = (z_a - z_b)[chosen]
    histogram = paper.log_histogram(difference, weights, paper.even_edges(difference))
    assert paper.log_sum(histogram) == pytest.approx(paper.log_sum(weights))
    if rule != "none":
        assert paper.log_sum(weights) == pytest.approx(paper.log_sum(paper.log_counts(z_a[places], edges)))


def test_where_every_sample_is_read_the_weight_is_one_over_its_probability(pair) -> None:
    z_a, _ = pair
    places, edges = sampled(z_a, 300), middle(z_a)
    own = z_a[places][paper.inside(z_a[places], edges)]
    weights = paper.log_weights(z_a[places], own, edges, "input")
    np.testing.assert_allclose(weights, own - np.log(300))


def test_the_size_of_the_space_is_estimated_without_bias(pair) -> None:
    z_a, _ = pair
    edges = middle(z_a)
    sizes = [np.exp(paper.log_sum(paper.log_counts(z_a[sampled(z_a, 400, seed)], edges))) for seed in range(200)]
    assert np.mean(sizes) == pytest.approx(
        paper.inside(z_a, edges).sum(), rel=4 * np.std(sizes) / 200**0.5 / np.mean(sizes)
    )


def test_two_equal_models_give_a_spike_at_zero(pair) -> None:
    z_a, _ = pair
    places, edges = sampled(z_a, 200), middle(z_a)
    weights = paper.log_weights(z_a[places], z_a[places], edges)
    bins = paper.even_edges(np.zeros(1))
    shares = paper.shares(paper.log_histogram(z_a[places] - z_a[places], weights, bins))
    assert shares[len(shares) // 2] == pytest.approx(1)
    assert np.delete(shares, len(shares) // 2).sum() == 0


def test_without_weights_the_mean_difference_is_minus_the_kullback_leibler_divergence(pair) -> None:
    z_a, z_b = pair
    divergence = float(np.exp(-z_a) @ (z_b - z_a))
    assert divergence > 0
    places = sampled(z_a, 40_000)
    everything = np.array([0.0, z_a.max() + 1])
    unweighted = paper.log_weights(z_a[places], z_a[places], everything, "none")
    difference = (z_a - z_b)[places]
    mean, error = float(paper.shares(unweighted) @ difference), difference.std() / 200
    assert mean == pytest.approx(-divergence, abs=4 * error)
    weighted = paper.log_weights(z_a[places], z_a[places], everything)
    assert abs(float(paper.shares(weighted) @ difference) - mean) > 10 * error


def test_both_views_agree_on_the_common_set_and_only_with_weights(pair) -> None:
    z_a, z_b = pair
    edges = middle(z_a)
    common = paper.inside(z_a, edges) & paper.inside(z_b, edges)
    true = float((z_a - z_b)[common].mean())

    def seen(own: np.ndarray, rule: str) -> tuple[float, float]:
        places = sampled(own, 60_000)
        weights = paper.log_weights(own[places], own[places], edges, rule)[common[places]]
        return np.exp(paper.log_sum(weights)), float(paper.shares(weights) @ (z_a - z_b)[places][common[places]])

    for own in (z_a, z_b):
        size, mean = seen(own, "input")
        assert size == pytest.approx(common.sum(), rel=0.05)
        assert mean == pytest.approx(true, abs=0.05)
    assert seen(z_b, "none")[1] - seen(z_a, "none")[1] > 0.2


def test_equal_weights_within_narrow_bins_do_as_well_as_each_inputs_own(pair) -> None:
    z_a, _ = pair
    places = sampled(z_a, 500)
    for bins in (400, 2):
        edges = middle(z_a, bins)
        own = z_a[places][paper.inside(z_a[places], edges)]
        one, other = (paper.shares(paper.log_weights(z_a[places], own, edges, rule)) for rule in ("input", "bin"))
        assert (paper.total_variation(one, other) < 0.02) == (bins == 400)


def test_weights_of_long_inputs_do_not_overflow() -> None:
    nll = np.random.default_rng(0).normal(5000, 30, 100)
    weights = paper.log_weights(nll, nll, np.linspace(4900, 5100, 9))
    assert np.isfinite(weights[paper.inside(nll, np.array([4900, 5100]))]).all()
    assert 1 <= paper.effective_sample_size(weights) <= 100


def test_equal_weights_have_an_effective_sample_size_of_their_number() -> None:
    assert paper.effective_sample_size(np.full(7, 300.0)) == pytest.approx(7)
    assert paper.effective_sample_size(np.array([300.0, -np.inf, 0.0])) == pytest.approx(1)


def test_own_bounds_of_the_same_samples_are_the_shared_ones() -> None:
    nll = np.random.default_rng(0).normal(50, 10, 5000)
    assert paper.own_limits(nll, nll, 40.0, 56.0, 2.0) == (40.0, 56.0)
    assert paper.own_limits(nll, nll + 6, 40.0, 56.0, 2.0) == (46.0, 62.0)


def test_in_a_trained_world_the_error_falls_with_the_number_of_inputs() -> None:
    params = paper.Params(vocabulary=5, tiny_length=4, tiny_steps=(40, 10), sample_sizes=(64, 4096), repeats=3)
    made = paper.world(params, seed=0)
    assert np.exp(-made.z_source).sum() == pytest.approx(1)
    assert np.exp(-made.z_a) @ made.z_source < np.exp(-made.z_b) @ made.z_source  # A has learned more
    table = pd.DataFrame(paper.convergence_rows(made, params, 0))
    errors = table[table["rule"] == "input"].groupby("n")["variation"].mean()
    assert errors[4096] < 0.4 * errors[64]


# ------------------------------------------------------------------------------------------------ derived models


def test_copies_leave_the_original_and_its_embeddings_alone(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for twin in (noised(model, 0.5, seed=0), pruned(model, 0.5)):
        assert torch.equal(twin.get_input_embeddings().weight, before[_embedding_name(model)])
        assert any(not torch.equal(weight, before[name]) for name, weight in twin.state_dict().items())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def _embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings().weight
    return next(name for name, weight in model.named_parameters() if weight is embedding)


def test_noise_has_the_asked_share_of_each_matrix_and_pruning_takes_the_smallest_entries(model: Any) -> None:
    for old, loud, thin in zip(
        *map(block_matrices, (model, noised(model, 0.3, seed=1), pruned(model, 0.25))), strict=True
    ):
        assert float(((loud - old).std() / old.std()).detach()) == pytest.approx(0.3, rel=0.1)
        gone = thin == 0
        assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.01)
        assert old[gone].abs().max() <= old[~gone].abs().min()


def test_no_noise_no_pruning_and_no_step_give_the_model_itself(model: Any) -> None:
    tokens, nll = draw(model, PREFIX, count=5, length=LENGTH, seed=0)
    for twin in (noised(model, 0.0, seed=0), pruned(model, 0.0)):
        torch.testing.assert_close(read(twin, PREFIX, tokens), nll, rtol=1e-4, atol=1e-4)


def test_a_tuned_copy_reads_what_it_was_tuned_on_better() -> None:
    model = small_llama(40, 16)
    windows = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(0))
    twin = tuned(model, windows, steps=20, rate=1e-2, batch_size=4, seed=0)
    prefix = windows[0, :1]
    assert float(read(twin, prefix, windows[:1, 1:])) < float(read(model.eval(), prefix, windows[:1, 1:]))


@pytest.mark.parametrize("copies", [("blur:1",), ("noise",), ("noise:much",)])
def test_an_unknown_copy_is_refused(copies: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a copy is"):
        paper.Params(copies=copies, views=copies)


def test_a_space_that_no_sample_meets_is_refused_with_what_was_found() -> None:
    loaded = zoo.load("tiny:llama")
    params = paper.Params(length=4, n_samples=8, n_seeds=2, space=(0.001, 0.002))
    bench = paper.Bench(loaded, PREFIX, PREFIX[None], PREFIX[None], params)
    with pytest.raises(RequestError, match="per token"):
        paper.sample(bench, loaded.model, lambda _: paper.grid(0.004, 0.008, 0.001))


def test_a_view_that_is_no_copy_is_refused() -> None:
    with pytest.raises(ValueError, match="among them"):
        paper.Params(views=("prune:0.5",))


# ------------------------------------------------------------------------------------------------------ the claims


def ideal(n_seeds: int = 5) -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here.

    The number of inputs is exp(u) N(u; 56, 6) N(D; 0, s) with u = (z_A + z_B) / 2. A then draws D from N(-s²/2, s) and
    B from N(s²/2, s), so that both views count the common set alike.
    """
    random = np.random.default_rng(0)
    samples, inputs, returns = [], [], []
    s, count, edges = 2.0, 1500, paper.grid(48.0, 60.0, 1.0)
    for seed in range(n_seeds):
        for name, sign in ((paper.ORIGINAL, -1), ("noise:0.1", 1)):
            u, difference = random.normal(56, 6, count), random.normal(sign * s**2 / 2, s, count)
            own, other = u - sign * difference / 2, u + sign * difference / 2
            samples.append(pd.DataFrame({"model": name, "seed": seed, "nll": own}))
            pick = paper.representatives(own, edges, 10_000, seed)
            rows = pd.DataFrame({"seed": seed, "own": own[pick]})
            if name == paper.ORIGINAL:
                shifts = {"noise:0.01": (-0.1, 0.5), "noise:0.5": (-20, 9.0), "scratch:9": (-30, 20.0)}
                columns = {other: rows["own"] - random.normal(*at, len(rows)) for other, at in shifts.items()}
                inputs.append(rows.assign(**{"noise:0.1": other[pick]}, **columns))
            else:
                returns.append(rows.assign(model=name, original=other[pick]))
    names = {paper.ORIGINAL: 3.0, "noise:0.01": 3.01, "noise:0.1": 3.1, "noise:0.5": 9.0, "scratch:9": 4.0}
    kinds = [paper.ORIGINAL, "derived", "derived", "derived", "unrelated"]
    tables = {
        "samples": pd.concat(samples, ignore_index=True),
        "inputs": pd.concat(inputs, ignore_index=True),
        "returns": pd.concat(returns, ignore_index=True),
        "models": pd.DataFrame({"model": list(names), "kind": kinds, "loss": list(names.values())}),
        "choice": pd.DataFrame([{"rule": "input", "bounds": "shared"}]),
        "convergence": _convergence(random, n_seeds),
        "annotation": _annotation(random, n_seeds),
    }
    return Result(tables, {"low": 48.0, "high": 60.0, "width": 1.0, "length": 16})


def _convergence(random: np.random.Generator, n_seeds: int) -> pd.DataFrame:
    rows = []
    for seed in range(n_seeds):
        for n in (100, 1000, 10_000):
            for rule, error in (("input", n**-0.5), ("bin", n**-0.5), ("none", 0.4)):
                noise = 0.01 * random.standard_normal(3)
                off = 5.0 if rule == "none" else 0.0
                rows.append(
                    {
                        "seed": seed,
                        "repeat": 0,
                        "n": n,
                        "rule": rule,
                        "variation": error * np.exp(noise[0]),
                        "size_error": off + noise[1],
                        "common_error": off + noise[2],
                        "ess": n / 4,
                    }
                )
    return pd.DataFrame(rows)


def _annotation(random: np.random.Generator, n_seeds: int) -> pd.DataFrame:
    rows = []
    for seed in range(n_seeds):
        for rule in paper.RULES:
            for difference in (-1.5, -0.5, 0.5, 1.5):
                quality = 1.5 + 0.1 * difference + 0.01 * random.standard_normal()
                rows.append(
                    {
                        "seed": seed,
                        "rule": rule,
                        "bin": 0,
                        "difference": difference,
                        "log_count": 5.0,
                        "source": quality,
                    }
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds", claim.check(result)
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    assert direction(claim.check(ideal(n_seeds=1))) == "unclear"


@pytest.mark.parametrize("rule", ["input", "bin"])
@pytest.mark.parametrize("bounds", ["shared", "own"])
def test_every_reading_of_the_formulas_can_be_applied_to_one_measurement(rule: str, bounds: str) -> None:
    result = paper.under(ideal(3), rule, bounds)
    assert paper.choice(result) == (rule, bounds)
    for claim in paper.CLAIMS:
        assert claim.check(result)


def test_a_common_set_that_no_representative_meets_decides_nothing() -> None:
    result = ideal(3)
    far = result.tables["returns"].assign(original=1000.0)
    assert direction(paper.check_common(result.with_table("returns", far))) == "unclear"


def test_copies_worse_than_the_unrelated_model_are_not_asked() -> None:
    assert paper.as_good(ideal(2), "scratch:9") == ["noise:0.01", "noise:0.1"]


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    params = paper.Params(
        model="tiny:llama", n_seeds=2, tiny_length=4, vocabulary=5, tiny_steps=(12, 4), sample_sizes=(64, 256),
        repeats=2, length=6, space=(3.5, 8.0), n_samples=24, copies=("noise:0.1", "noise:0.4", "prune:0.3", "tune:2"),
        views=("noise:0.1", "tune:2"), unrelated=("scratch:2", "tiny:gpt2"), n_texts=4,
    )  # fmt: skip
    try:
        result = paper.experiment(params)
    except AssetError as error:  # the texts are fetched once; a fresh machine without network has none
        pytest.skip(str(error))
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert set(result.tables) == {
        "convergence", "curves", "annotation", "samples", "inputs", "returns", "models", "examples", "choice"
    }  # fmt: skip
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
