"""Facts of worked problems, of the logic and its checker, of orders and their Bayes losses, and of the claims."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data import implications
from midstream.data.implications import INTRO, Formula, Theorem, provable, prove
from midstream.data.worked import Worked, loses_supervision, multiplication
from midstream.paper import Result
from midstream.papers.text import proof_order as paper

ORDERS: tuple[paper.Order, ...] = (
    "sequential", "equivalent", "state after tactic", "answer first", "random", "reversed",
)  # fmt: skip
SMALL = paper.Params(
    n_seeds=2, theorems=100, n_validation=20, n_test=20, width=16, layers=1, steps=4, batch_size=4, rates=(0.01, 0.03),
    proof_orders=("sequential", "reversed"), multiplication_orders=("sequential", "reversed"),
)  # fmt: skip


@pytest.fixture(scope="module")
def proofs() -> tuple[Worked, list[Theorem]]:
    return implications.proofs(200, 7, steps=4, hypotheses=6, atoms=5, width=5)


@pytest.fixture(scope="module", params=["2 × 1", "2 × 2", "proofs"])
def worked(request: pytest.FixtureRequest, proofs: tuple[Worked, list[Theorem]]) -> Worked:
    return proofs[0] if request.param == "proofs" else multiplication(2, int(request.param[-1]))


def tactics_of(worked: Worked, row: torch.Tensor) -> list[Formula]:
    return implications.read_tactics(worked.text(row[paper.answer_places(worked)]).split(), 5)


# -------------------------------------------------------------------------------------------------- worked problems


@pytest.mark.parametrize(("digits", "by"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_the_digits_after_R_are_the_product(digits: int, by: int) -> None:
    worked = multiplication(digits, by)
    assert len(worked.tokens) == 10 ** (digits + by)
    for row in worked.tokens[:: max(1, len(worked.tokens) // 97)]:
        words = worked.text(row).split()
        a, b = int("".join(words[1 : 1 + digits])), int("".join(words[2 + digits : 2 + digits + by]))
        assert int("".join(words[words.index("R") + 1 :][::-1])) == a * b


def test_numbers_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 3 digits"):
        multiplication(4, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_has_the_same_tokens_and_its_inverse_leads_back(worked: Worked, order: paper.Order) -> None:
    arrangement = worked.arrangement(paper.order_of(worked, order, permutation=0))
    rows = worked.tokens[:, arrangement]
    assert torch.equal(rows[:, : worked.problem], worked.tokens[:, : worked.problem])
    assert torch.equal(rows.sort(1).values, worked.tokens.sort(1).values)
    assert torch.equal(rows[:, arrangement.argsort()], worked.tokens)


def test_blocks_stay_whole_in_every_order(worked: Worked) -> None:
    for order in ORDERS:
        places = worked.arrangement(paper.order_of(worked, order, 0))[worked.problem :] - worked.problem
        named = [worked.columns[place].block for place in places.tolist()]
        assert list(dict.fromkeys(named)) == list(paper.order_of(worked, order, 0))
        for block in worked.blocks:
            own = [place for place in places.tolist() if worked.columns[place].block == block]
            assert own == list(range(own[0], own[0] + len(own)))


def test_an_order_that_misses_a_block_is_refused(worked: Worked) -> None:
    with pytest.raises(ValueError, match="names each of"):
        worked.arrangement(worked.blocks[1:])


def test_sequential_and_equivalent_orders_keep_all_supervision_left_and_the_others_do_not(worked: Worked) -> None:
    for name in ORDERS:
        order = paper.order_of(worked, name, 0)
        moved = [column for column in worked.columns if loses_supervision(column, order)]
        assert bool(moved) == (name not in ("sequential", "equivalent"))
        assert all(column.kind != "tag" for column in moved)
    products = multiplication(2, 1)
    assert paper.order_of(products, "equivalent", 0) != products.blocks


def test_states_can_be_had_back_from_what_followed_so_reversed_proofs_lose_their_tactics_alone(
    proofs: tuple[Worked, list[Theorem]],
) -> None:
    order = paper.order_of(proofs[0], "reversed", 0)
    assert {column.block for column in proofs[0].columns if loses_supervision(column, order)} == {"T1", "T2", "T3"}


def test_states_after_their_tactics_take_supervision_from_tactics_alone(proofs: tuple[Worked, list[Theorem]]) -> None:
    order = paper.order_of(proofs[0], "state after tactic", 0)
    assert order == ("T0", "T1", "S1", "T2", "S2", "T3", "S3")
    assert {column.block for column in proofs[0].columns if loses_supervision(column, order)} == {"T1", "T2", "T3"}


# ------------------------------------------------------------------------------------------------------ the logic


def test_the_checker_accepts_every_generated_proof(proofs: tuple[Worked, list[Theorem]]) -> None:
    worked, theorems = proofs
    for row, theorem in zip(worked.tokens, theorems, strict=True):
        tactics = tactics_of(worked, row)
        assert len(tactics) == 4
        assert implications.check(theorem, tactics)


def test_the_checker_rejects_corrupted_proofs(proofs: tuple[Worked, list[Theorem]]) -> None:
    """Cut short, prolonged, without a hypothesis that it uses, or with a tactic that does not fit the goal."""
    worked, theorems = proofs
    for row, theorem in zip(worked.tokens, theorems, strict=True):
        tactics = tactics_of(worked, row)
        assert not implications.check(theorem, tactics[:-1])
        assert not implications.check(theorem, [*tactics, tactics[-1]])
        assert not implications.check(theorem, [*tactics[:-1], "?"])
        for used in {tactic for tactic in tactics if tactic in theorem.hypotheses}:
            without = Theorem(tuple(h for h in theorem.hypotheses if h != used), theorem.target)
            if used not in implications.formulas(5)[:5]:  # an introduced atom may be the same as a hypothesis
                assert not implications.check(without, tactics)
        assert not implications.check(theorem, ["w" if i == 0 else tactic for i, tactic in enumerate(tactics)])


def g4ip(hypotheses: frozenset[Formula], target: Formula) -> bool:
    """Dyckhoff's contraction-free calculus for →, an independent decision procedure that needs no loop check."""
    if not isinstance(target, str):
        return g4ip(hypotheses | {target[0]}, target[1])
    if target in hypotheses:
        return True
    for formula in hypotheses:
        if isinstance(formula, str):
            continue
        rest, (premise, conclusion) = hypotheses - {formula}, formula
        if isinstance(premise, str):
            if premise in rest:
                return g4ip(rest | {conclusion}, target)
        elif g4ip(rest | {(premise[1], conclusion)}, premise) and g4ip(rest | {conclusion}, target):
            return True
    return False


@cache
def small_formulas(arrows: int) -> list[Formula]:
    if arrows == 0:
        return ["p", "q"]
    return [
        (left, right)
        for used in range(arrows)
        for left, right in product(small_formulas(used), small_formulas(arrows - 1 - used))
    ]


def test_the_prover_decides_as_dyckhoffs_calculus_does() -> None:
    every = [formula for arrows in range(5) for formula in small_formulas(arrows)]
    assert len(every) > 500
    truths = [provable(Theorem((), formula)) for formula in every]
    assert truths == [g4ip(frozenset(), formula) for formula in every]
    assert 0 < sum(truths) < len(truths)


def test_what_is_provable_has_a_checked_proof_and_what_is_not_has_none() -> None:
    for formula in (formula for arrows in range(4) for formula in small_formulas(arrows)):
        theorem = Theorem((), formula)
        proof = prove(theorem, 9)
        assert (proof is not None) == provable(theorem)
        assert proof is None or implications.check(theorem, proof)


def test_peirces_law_is_classical_only() -> None:
    assert not provable(Theorem((), ((("p", "q"), "p"), "p")))
    assert provable(Theorem((), ((((("p", "q"), "p"), "p"), "q"), "q")))


def test_proofs_are_the_shortest() -> None:
    theorem = Theorem(("p", ("p", "q"), ("q", "r"), ("p", "r")), "r")
    assert prove(theorem, 5) == [("p", "r"), "p"]
    assert prove(Theorem((), ("p", "p")), 5) == [INTRO, "p"]


def test_no_theorem_comes_twice_under_other_names_or_in_another_order(proofs: tuple[Worked, list[Theorem]]) -> None:
    seen = {implications.up_to_names(theorem, "pqrst") for theorem in proofs[1]}
    assert len(seen) == len(proofs[1])
    one = Theorem(("p", ("p", "q"), (("q", "r"), "s"), ("t", "q")), "q")
    same = Theorem((("r", "s"), ("p", "s"), "r", (("s", "t"), "q")), "s")
    other = Theorem((("r", "s"), ("r", "s"), "r", (("s", "t"), "q")), "s")
    assert implications.up_to_names(one, "pqrst") == implications.up_to_names(same, "pqrst")
    assert implications.up_to_names(one, "pqrst") != implications.up_to_names(other, "pqrst")


def test_states_written_and_tactics_tell_the_next_state(proofs: tuple[Worked, list[Theorem]]) -> None:
    worked, theorems = proofs
    for row, theorem in zip(worked.tokens[:40], theorems, strict=False):
        words = worked.text(row).split()
        state = implications.start(theorem)
        for i, tactic in enumerate(tactics_of(worked, row)[:-1], start=1):
            state = implications.step(theorem, state, tactic)
            place = words.index(f"S{i}")
            assert [w for w in words[place + 1 : place + 6] if w != "·"] == implications.written(state)


def test_unreadable_proofs_are_refused_not_raised(proofs: tuple[Worked, list[Theorem]]) -> None:
    _, theorems = proofs
    for words in ([], ["S1"], ["·", "⊢", "start", "intro"], ["intro"] * 4):
        assert not implications.check(theorems[0], implications.read_tactics(words, 5))


# --------------------------------------------------------------------------------------------------- Bayes losses


def bayes(worked: Worked, name: paper.Order) -> pd.DataFrame:
    return pd.DataFrame(paper.bayes_rows(worked, paper.order_of(worked, name, 0)))


@pytest.mark.parametrize("name", ["sequential", "equivalent"])
def test_every_digit_follows_from_supervision_that_stands_left(name: paper.Order) -> None:
    assert bayes(multiplication(2, 1), name)["one_step"].abs().max() < 1e-9


def test_digits_that_lost_supervision_cannot_follow_from_what_is_left_and_the_others_do() -> None:
    worked = multiplication(2, 1)
    for name in ("answer first", "random", "reversed"):
        order = paper.order_of(worked, name, 0)
        moved = {(c.block, c.kind): loses_supervision(c, order) for c in worked.columns}
        for row in bayes(worked, name).to_dict("records"):
            assert (row["one_step"] > 0.1) == moved[row["block"], row["kind"]]


def test_a_digit_whose_copy_stands_left_is_supervised_by_it() -> None:
    worked = multiplication(2, 1)
    order = paper.order_of(worked, "reversed", 0)
    moved = {f"{c.block} {c.kind}" for c in worked.columns if loses_supervision(c, order)}
    assert moved == {"R result 0", "R result 1", "R result 2", "C1 carry"}


def test_the_problem_determines_every_digit_in_every_order() -> None:
    for name in ORDERS:
        assert bayes(multiplication(2, 1), name)["everything"].abs().max() < 1e-9


def test_an_order_moves_uncertainty_between_steps_and_their_sum_stays() -> None:
    """The chain rule: without the problem, Bayes losses of all steps add up to their joint entropy in every order."""
    worked = multiplication(2, 1)
    steps = worked.tokens[:, worked.problem :]
    counts = torch.unique(steps, dim=0, return_counts=True)[1].double()
    joint = float(-(counts / 1000 * (counts / 1000).log()).sum())
    tables = [bayes(worked, name) for name in ORDERS]
    for table in tables:
        assert table["steps_alone"].sum() == pytest.approx(joint)
    first, backwards = (bayes(worked, name).set_index(["block", "kind"]) for name in ("sequential", "reversed"))
    assert (first["steps_alone"] - backwards["steps_alone"].reindex(first.index)).abs().max() > 1


def test_entropies_are_those_of_counting() -> None:
    values, given = torch.tensor([0, 1, 0, 0]), torch.tensor([[0], [0], [1], [1]])
    assert paper.conditional_entropy(values, given) == pytest.approx(0.5 * np.log(2))
    assert paper.conditional_entropy(values, given[:, :0]) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


# -------------------------------------------------------------------------------------------------- the experiment


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_losses_by_column_are_those_of_the_sequence_read_token_by_token(family: str) -> None:
    worked, model = multiplication(2, 1), zoo.load(f"tiny:{family}").model
    rows = worked.tokens[[3, 500]][:, worked.arrangement(worked.blocks[::-1])]
    with torch.no_grad():
        losses = paper.solution_losses(model, rows, worked.problem)
        for at in (worked.problem, rows.shape[1] - 1):
            logits = model(input_ids=rows[:, :at]).logits[:, -1]
            expected = -logits.log_softmax(-1)[[0, 1], rows[:, at]]
            torch.testing.assert_close(losses[:, at - worked.problem], expected, rtol=1e-3, atol=1e-4)


def test_losses_are_listed_sequentially_whatever_the_order() -> None:
    (bench, _), model = paper.benches(SMALL), zoo.load("tiny:llama").model
    order = bench.orders["reversed"]
    listed = paper.column_losses(model, bench, order, bench.test)
    arrangement = bench.worked.arrangement(order)
    losses = paper.solution_losses(model, bench.worked.tokens[bench.test][:, arrangement], bench.worked.problem)
    for place, loss in zip(arrangement[bench.worked.problem :].tolist(), losses.mean(0).tolist(), strict=True):
        assert listed[place - bench.worked.problem].item() == pytest.approx(loss, rel=1e-4)


def test_judges_accept_the_true_solutions_in_every_order_and_no_shuffled_ones() -> None:
    for bench in paper.benches(SMALL):
        rows = bench.worked.tokens[bench.test]
        assert all(bench.judge(bench.test, rows))
        assert np.mean(bench.judge(bench.test, rows.roll(1, 0))) < 0.5


def test_greedy_writing_follows_the_most_likely_token() -> None:
    worked, model = multiplication(2, 1), zoo.load("tiny:llama").model
    problems = worked.tokens[:3, : worked.problem]
    written = paper.write(model, problems, 4)
    with torch.no_grad():
        said = model(input_ids=written).logits[:, worked.problem - 1 : -1].argmax(-1)
    assert torch.equal(written[:, : worked.problem], problems)
    assert torch.equal(written[:, worked.problem :], said)


def test_held_out_problems_are_never_trained_on_and_the_same_for_every_seed() -> None:
    for bench in paper.benches(SMALL):
        parts = [set(part.tolist()) for part in (bench.train, bench.validation, bench.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(bench.worked.tokens)
        assert len(torch.unique(bench.worked.tokens[:, : bench.worked.problem], dim=0)) == len(bench.worked.tokens)


def test_every_order_starts_from_the_same_weights_and_reads_the_same_problems() -> None:
    one, again = (paper.untrained(40, SMALL, 5).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    rows = torch.arange(10)[:, None]
    drawn = torch.cat([batch for batch, _ in zip(paper.batches(rows, 4, 1), range(5), strict=False)])
    assert sorted(drawn[:10, 0].tolist()) == sorted(drawn[10:, 0].tolist()) == list(range(10))
    again_drawn = torch.cat([batch for batch, _ in zip(paper.batches(rows, 4, 1), range(5), strict=False)])
    assert torch.equal(drawn, again_drawn)


def test_the_rate_is_chosen_for_each_order_by_validation_alone() -> None:
    runs = pd.DataFrame(
        [
            {"task": "t", "order": order, "rate": rate, "seed": seed, "validation": v, "validation_loss": loss}
            for seed in (0, 1)
            for order, rate, v, loss in (
                ("a", 1.0, 0.5, 0.9), ("a", 2.0, 0.6, 1.0), ("b", 1.0, 0.0, 0.9), ("b", 2.0, 0.0, 0.8),
            )
        ]
    )  # fmt: skip
    chosen = runs[paper.choose_rates(runs)]
    assert set(zip(chosen["order"], chosen["rate"], strict=True)) == {("a", 2.0), ("b", 2.0)}


@pytest.mark.parametrize("orders", [("reversed", "random"), ("sequential",), ("sequential", "sequential")])
def test_orders_without_a_reference_or_a_rival_are_refused(orders: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="'sequential' among them"):
        paper.Params(proof_orders=orders)


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    result = paper.experiment(SMALL)
    runs, losses = result.tables["runs"], result.tables["losses"]
    assert len(runs) == 2 * 2 * 2 * 2
    assert runs.groupby(["task", "order"])["chosen"].sum().eq(2).all()
    assert losses.groupby(["task", "order", "seed"])["column"].nunique().groupby("task").nunique().eq(1).all()
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()


def test_orders_that_were_not_run_decide_nothing() -> None:
    runs = IDEAL.tables["runs"]
    without = IDEAL.with_table("runs", runs[runs["order"] != "random"])
    assert direction(paper.check_reversed("proofs")(without)) == "unclear"


# ------------------------------------------------------------------------------------------------------- the claims


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    rates = {"sequential": 0.95, "equivalent": 0.95, "state after tactic": 0.7, "random": 0.5, "reversed": 0.4}
    runs, losses = [], []
    params = paper.Params()
    tasks = paper.benches(params.model_copy(update={"theorems": 100}))
    for bench in tasks:
        for seed in range(4):
            for order in bench.orders:
                near = 0.01 * rng.standard_normal()
                named = {"task": bench.task, "order": order, "seed": seed}
                runs.append({**named, "rate": 0.01, "chosen": True, "success": rates.get(order, 0.3) + near})
                flat = torch.zeros(len(bench.worked.columns))
                for row in paper.loss_rows(bench, order, flat):
                    loss = 1.8 if row["moved"] else 0.02
                    losses.append({**named, **row, "loss": loss * (1 + 0.05 * rng.standard_normal())})
    exact = paper._exact_tables(tasks)
    return Result({"runs": pd.DataFrame(runs), "losses": pd.DataFrame(losses), **exact})


IDEAL = ideal()


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    assert claim.direction(IDEAL) == "holds"
    assert claim.direction(claim.control.apply(IDEAL)) == "fails"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_where_no_order_solves_anything_nothing_holds_about_what_is_solved(claim) -> None:
    nothing = IDEAL.with_table("runs", IDEAL.tables["runs"].assign(success=0.0))
    about_losses = claim.id.startswith("moved") or claim.id == "unconditional"
    assert about_losses == (claim.direction(nothing) == "holds")


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    tables = {name: table[table["seed"] == 0] if "seed" in table else table for name, table in IDEAL.tables.items()}
    assert direction(claim.check(Result(tables))) == "unclear"
