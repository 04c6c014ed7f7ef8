"""Facts of the comparison of balancing methods, and the checks of its claims; test_balancing has the method's own."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from midstream.claims import direction
from midstream.paper import Result
from midstream.papers.text import loss_free_balancing as paper
from midstream.train.balancing import max_violation
from midstream.train.language import (
    even_windows,
    held_out_loss,
    next_token_loss,
    random_windows,
    stream,
    train_tokenizer,
)

SMALL = paper.Params(
    n_seeds=2, max_chars=200, vocabulary=300, width=32, experts=8, expert_width=8, steps=20, batch_size=2, window=16,
    test_windows=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> paper.Corpus:
    return paper.corpus(SMALL)


def test_arms_differ_in_balancing_alone(texts: paper.Corpus) -> None:
    """Up to the first update nothing differs: same weights, same batches, and the auxiliary loss is not counted."""
    outcomes = [paper.run_arm(arm, texts, SMALL, 0) for arm in paper.arms(SMALL)[:3]]
    assert len({outcome.losses[0] for outcome in outcomes}) == 1
    assert all(torch.equal(outcome.loads[0], outcomes[0].loads[0]) for outcome in outcomes)
    assert outcomes[0].test_loss != outcomes[2].test_loss


def test_seeds_differ_in_weights_and_data(texts: paper.Corpus) -> None:
    first, other = (paper.run_arm(paper.Arm("none"), texts, SMALL, seed) for seed in (0, 1))
    assert first.losses[0] != other.losses[0]


def test_the_same_arm_and_seed_give_the_same_outcome(texts: paper.Corpus) -> None:
    one, again = (paper.run_arm(paper.Arm("sign", 0.01), texts, SMALL, 0) for _ in range(2))
    assert np.array_equal(one.losses, again.losses)
    assert torch.equal(one.loads, again.loads)


def test_every_token_of_every_batch_is_in_the_loads(texts: paper.Corpus) -> None:
    outcome = paper.run_arm(paper.Arm("multiplicative", 0.01), texts, SMALL, 0)
    assert outcome.loads.shape == (SMALL.steps, SMALL.layers, SMALL.experts)
    assert (outcome.loads.sum(-1) == SMALL.top_k * SMALL.batch_size * SMALL.window).all()
    assert (outcome.test_loads.sum(-1) == SMALL.top_k * texts.test.numel()).all()


def test_a_bias_moves_at_most_u_a_step_and_without_balancing_not_at_all(texts: paper.Corpus) -> None:
    moved = paper.run_arm(paper.Arm("sign", 0.01), texts, SMALL, 0)
    assert 0 < moved.bias_range <= 2 * 0.01 * SMALL.steps
    assert paper.run_arm(paper.Arm("none"), texts, SMALL, 0).bias_range == 0
    assert paper.run_arm(paper.Arm("aux", 0.1), texts, SMALL, 0).bias_range == 0


def test_the_film_averages_to_even_loads_and_its_stretches_cover_the_training(texts: paper.Corpus) -> None:
    outcome = paper.run_arm(paper.Arm("none"), texts, SMALL, 0)
    film = pd.DataFrame(paper.film_rows(outcome))
    experts = [column for column in film if column.startswith("e")]
    np.testing.assert_allclose(film[experts].mean(1), 1, atol=0.01)
    assert film["step"].max() == SMALL.steps
    assert len(film) == SMALL.layers * paper.WINDOWS
    curve = pd.DataFrame(paper.curve_rows(outcome))
    assert curve["batch_violation"].mean() == pytest.approx(float(max_violation(outcome.loads).mean()), abs=1e-3)


def test_a_changed_last_token_moves_earlier_ones_under_expert_choice_alone(texts: paper.Corpus) -> None:
    outcome = paper.run_arm(paper.Arm("sign", 0.01), texts, SMALL, 0)
    by = {row["routing"]: row for row in paper.leaks(outcome.model, texts.test)}
    assert by["bias"]["rerouted"] == by["bias"]["windows"] == 0
    assert by["expert choice"]["rerouted"] > 0
    _, chosen = paper.first_choices(outcome.model, texts.test)
    assert (chosen.sum(1) == SMALL.window * SMALL.top_k // SMALL.experts).all()


def test_tokens_give_the_text_back() -> None:
    documents = ["def f(x):\n    return x\n", "ünï → ∑"]
    tokenizer = train_tokenizer(documents, 300)
    tokens = stream(tokenizer, documents)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "".join(documents)
    assert (tokens == tokenizer.eos_token_id).sum() == 2


def test_windows_are_pieces_of_the_stream_and_even_ones_do_not_overlap() -> None:
    tokens = torch.arange(1000)
    batch = next(random_windows(tokens, 4, 10, seed=0))
    assert (batch.diff(dim=1) == 1).all()
    assert torch.equal(batch, next(random_windows(tokens, 4, 10, seed=0)))
    assert even_windows(tokens, 100, 10).flatten().tolist() == list(range(1000))
    with pytest.raises(ValueError, match="need 1010"):
        even_windows(tokens, 101, 10)


def test_the_loss_is_that_of_transformers_and_an_untrained_model_knows_nothing(texts: paper.Corpus) -> None:
    model = paper._untrained(SMALL, 0).eval()
    windows = texts.test[:4]
    with torch.no_grad():
        theirs = model(input_ids=windows, labels=windows).loss
    torch.testing.assert_close(next_token_loss(model, windows), theirs)
    assert held_out_loss(model, windows, batch=3) == pytest.approx(float(theirs), rel=1e-5)
    assert float(theirs) == pytest.approx(np.log(SMALL.vocabulary), rel=0.05)


# ------------------------------------------------------------------------------------------------- claims


def ideal() -> Result:
    """What the experiment would find if every claim held clearly."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"runs": [], "curves": [], "leaks": []}
    course = {"none": (3.0, 3.0), "aux": (1.0, 0.6), "misdirected": (3.0, 3.0)}
    final = {
        ("none", 0.0): (3.00, 3.0), ("aux", 0.001): (3.00, 0.8), ("aux", 0.01): (3.03, 0.4), ("aux", 0.1): (3.10, 0.2),
        ("sign", 0.0001): (3.00, 1.5), ("sign", 0.001): (2.99, 0.1), ("sign", 0.01): (3.01, 0.3),
        ("proportional", 0.01): (3.00, 0.1), ("multiplicative", 0.01): (3.00, 0.1), ("misdirected", 0.001): (3.0, 3.2),
    }  # fmt: skip
    for seed in range(4):
        for (method, strength), (loss, violation) in final.items():
            named = {"method": method, "strength": strength, "seed": seed}
            noise = 1 + 0.001 * rng.standard_normal()
            rows["runs"].append({**named, "loss": loss * noise, "max_violation": violation * noise})
            early, late = course.get(method, {0.0001: (2.0, 1.0), 0.001: (0.8, 0.1)}.get(strength, (0.5, 0.4)))
            for step in range(20, 401, 20):
                value = (early if step <= 100 else late) * noise
                rows["curves"].append({**named, "step": step, "batch_violation": value})
        rows["leaks"] += [
            {"seed": seed, "routing": "bias", "rerouted": 0.0},
            {"seed": seed, "routing": "expert choice", "rerouted": 0.05 + 0.001 * seed},
        ]
    tables = {name: pd.DataFrame(entries) for name, entries in rows.items()}
    return Result(tables, {"rate": 0.001, "steps": 400})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim: Any) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim: Any) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()}, result.scalars)
    assert direction(claim.check(single)) == "unclear"


def test_the_rival_in_balance_is_the_most_even_of_those_as_good_in_loss() -> None:
    result = ideal()
    assert paper.best(result, "aux") == 0.001
    assert paper.matched(result) == 0.001  # 0.01 is more even, but costs 0.04 nats
    runs = result.tables["runs"].copy()
    runs.loc[runs["strength"] == 0.01, "loss"] = 3.0
    assert paper.matched(result.with_table("runs", runs)) == 0.01


def test_where_no_rival_is_as_good_in_loss_the_best_one_is_taken() -> None:
    result = ideal()
    runs = result.tables["runs"].copy()
    runs.loc[runs["method"] == "aux", "loss"] += 1
    assert paper.matched(result.with_table("runs", runs)) == 0.001


@pytest.mark.slow
def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    result = paper.experiment(SMALL)
    assert set(result.tables) == {"runs", "curves", "film", "leaks"}
    for claim in paper.CLAIMS:
        assert claim.check(result)
        assert claim.check(claim.control.apply(result))
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
