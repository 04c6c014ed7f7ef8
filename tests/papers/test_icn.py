"""Facts of in-context navigation, on several families of tiny models, and the checks of its claims."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data.closed_sets import closed_sets
from midstream.errors import AssetError
from midstream.measure import branching
from midstream.measure.branching import Answer, branch, explorer, greedy, nucleus
from midstream.paper import Result
from midstream.papers.flow import icn as paper

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3")
PROMPT = "the name of a good thing\nAnswer:\n"
LIMITS = paper.Decoding(max_tokens=5, batch_size=3)
FORM = branching.Form("{number}. the ", "a\n", stop="a")


@pytest.fixture(params=FAMILIES)
def start(request: pytest.FixtureRequest) -> branching.Explorer:
    """One prompt in front of a tiny model."""
    loaded = zoo.load(f"tiny:{request.param}")
    loaded.model.requires_grad_(False)
    if request.param == "gemma3":
        loaded.model.config.sliding_window = 512  # as long as the prompts, as in the released Gemma 3 270M
    return explorer(loaded, PROMPT, FORM)


def test_the_last_state_after_the_last_norm_times_the_keys_are_the_logits(start: branching.Explorer) -> None:
    query, keys = paper.query_and_keys(start.model, torch.tensor(start.ids))
    torch.testing.assert_close((keys @ query).float(), start.logits, rtol=1e-4, atol=1e-4)


def test_navigation_with_an_empty_list_is_the_ranking(start: branching.Explorer) -> None:
    assert paper.navigate([start], 6, per_round=6, limits=LIMITS) == paper.rank([start], 6, LIMITS)


def test_explored_tokens_never_repeat(start: branching.Explorer) -> None:
    (found,) = paper.navigate([start], 12, per_round=2, limits=LIMITS)
    assert len({answer.token for answer in found}) == len(found) == 12


def test_special_tokens_are_no_candidates(start: branching.Explorer) -> None:
    everything = paper.Listing(start).best(len(start.logits) - len(set(start.tokenizer.all_special_ids)))
    assert not set(everything) & set(start.tokenizer.all_special_ids)


def test_a_growing_list_scores_as_the_whole_prompt_read_anew(start: branching.Explorer) -> None:
    listing = paper.Listing(start)
    for number in range(3):
        listing.add([Answer(number, f"house {number}", True, 0.0, 2)])
    assert listing.text == start.text + "".join(f"house {i}a\n{i + 2}. the " for i in range(3))
    with torch.no_grad():
        anew = start.model(torch.tensor([listing.ids])).logits[0, -1]
    torch.testing.assert_close(listing.logits, anew.float(), rtol=1e-3, atol=1e-4)
    assert (listing.logits - start.logits).abs().max() > 1e-3


def test_listing_leaves_the_initial_prompt_as_it_was(start: branching.Explorer) -> None:
    before = [layer.keys.clone() for layer in start.cache.layers]
    paper.Listing(start).add([Answer(3, "house", True, 0.0, 1)])
    paper.decode([start], [[5, 6]], LIMITS)
    for layer, keys in zip(start.cache.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, keys)


def test_repeated_open_and_empty_answers_are_explored_but_not_listed(start: branching.Explorer) -> None:
    listing = paper.Listing(start)
    answers = [("one", True), ("one", True), ("two", False), ("", True), ("three", True)]
    listing.add(Answer(token, text, closed, 0.0, 1) for token, (text, closed) in enumerate(answers))
    assert list(listing.listed) == ["one", "three"]
    assert listing.explored == set(range(5))
    assert listing.text.endswith("1. the onea\n2. the threea\n3. the ")


def slow_answer(start: branching.Explorer, token: int, limit: int) -> list[int]:
    """Greedy decoding of the initial prompt without a cache, one token after another."""
    tokens = [token]
    while len(tokens) < limit and not branching._ended(start, tokens):
        with torch.no_grad():
            tokens.append(int(start.model(torch.tensor([start.ids + tokens])).logits[0, -1].argmax()))
    return tokens


def test_branches_are_greedy_continuations_of_the_initial_prompt(start: branching.Explorer) -> None:
    firsts = paper.Listing(start).best(7)
    for answer in paper.decode([start], [firsts], LIMITS)[0]:
        tokens = slow_answer(start, answer.token, LIMITS.max_tokens)
        assert answer == branching._answer(start, tokens, [answer.log_probability] * len(tokens)) or (
            answer.tokens == len(tokens) and answer.text == branching._answer(start, tokens, [0.0] * len(tokens)).text
        )


def test_prompts_of_different_length_branch_as_they_do_alone() -> None:
    loaded = zoo.load("tiny:llama")
    prompts = (PROMPT, "one\n", "two three four five\n")
    together = branch(
        [(explorer(loaded, prompt, FORM), token) for token in (9, 10) for prompt in prompts], greedy, 6, 4
    )
    alone = [
        branch([(explorer(loaded, prompt, FORM), token)], greedy, 6, 1)[0] for token in (9, 10) for prompt in prompts
    ]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [a.log_probability for a in together] == pytest.approx([a.log_probability for a in alone], rel=1e-3)


def test_sampling_from_a_nucleus_of_nothing_is_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    choose = nucleus(1.0, 1e-9, torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits), greedy(logits))


def test_a_nucleus_leaves_out_the_tail_and_only_the_tail() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    drawn = nucleus(1.0, 0.8, torch.Generator().manual_seed(0))(logits).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)


def test_clusters_partition_the_vocabulary() -> None:
    keys = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    for clusters in paper.clusterings(keys, n_clusters=7, seed=0).values():
        assert clusters.shape == (300,)
        assert set(clusters.tolist()) <= set(range(7))


def test_shuffled_clusters_have_the_sizes_of_the_raw_ones() -> None:
    found = paper.clusterings(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), n_clusters=5, seed=0)
    assert sorted(found["raw"].bincount().tolist()) == sorted(found["shuffled"].bincount().tolist())


def test_normalised_clusters_do_not_see_the_length_of_a_key() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(120, 6, generator=generator)
    longer = keys * (1 + 9 * torch.rand(120, 1, generator=generator))
    assert torch.equal(paper.clusterings(keys, 6, 0)["normalised"], paper.clusterings(longer, 6, 0)["normalised"])
    assert not torch.equal(paper.clusterings(keys, 6, 0)["raw"], paper.clusterings(longer, 6, 0)["raw"])


def test_the_top_tokens_lie_in_the_main_clusters() -> None:
    clusters = torch.tensor([0, 0, 1, 2, 1, 3])
    ranked = torch.tensor([2, 0, 5, 1, 4, 3])
    assert paper.in_main_clusters(ranked, clusters, main_top=2).tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize(
    ("name", "answer", "meant"),
    [
        ("countries", "the United States of America", "united states"),
        ("countries", "USA.", "united states"),
        ("countries", "Côte d'Ivoire", "ivory coast"),
        ("countries", "Europe", None),
        ("elements", "Aluminum", "aluminium"),
        ("keywords", "`lambda`", "lambda"),
        ("keywords", "print", None),
        ("months", " MAY ", "may"),
        ("bible", "", None),
    ],
)
def test_the_judge_knows_every_spelling_and_nothing_else(name: str, answer: str, meant: str | None) -> None:
    assert closed_sets()[name].judge(answer) == meant


def test_sets_have_as_many_members_as_the_world() -> None:
    sizes = {name: len(members) for name, members in closed_sets().items()}
    exact = {"elements": 118, "states": 50, "months": 12, "bible": 66, "zodiac": 12, "greek": 24, "weekdays": 7}
    assert {name: sizes[name] for name in exact} == exact
    assert sizes["countries"] >= 195


def test_repeated_and_open_answers_are_not_counted_as_new() -> None:
    texts = [("USA", True), ("United States", True), ("Atlantis", True), ("France", False), ("France", True)]
    answers = [Answer(i, text, closed, 0.0, 1) for i, (text, closed) in enumerate(texts)]
    counts = paper.new_correct(answers, closed_sets()["countries"])
    assert counts.tolist() == [1, 1, 1, 1, 2]
    assert paper.mean_precision(counts) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5)


def test_equal_vectors_have_no_distance_and_opposite_ones_two() -> None:
    assert paper.mean_distance(torch.ones(4, 3)) == pytest.approx(0, abs=1e-6)
    assert paper.mean_distance(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(2)


def test_distinct_pairs_counts_each_pair_once() -> None:
    assert paper.distinct_pairs(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert paper.distinct_pairs(["."]) == 0


def test_a_vote_takes_the_majority_of_last_numbers_and_the_earliest_at_a_tie() -> None:
    assert paper.vote(["3 + 4 = 8", "it is 7.", "3 + 4 = 7"]) == 7
    assert paper.vote(["no idea", "8", "7"]) == 8
    assert paper.vote(["no idea"]) is None


def test_problems_state_their_answer_correctly() -> None:
    for problem in paper.problems(20, 30, np.random.default_rng(0)):
        has, finds = (int(word) for word in problem.prompt.rsplit("Question:", 1)[1].split() if word.isdigit())
        assert has + finds == problem.answer


def test_matched_rank_removes_a_difference_that_is_only_one_of_rank() -> None:
    """Inside tokens rank higher and high ranks are right more often; at equal rank nothing differs."""
    generator = np.random.default_rng(0)
    rows = []
    for seed in range(400):
        for rank in range(11, 51):
            inside, right = generator.random(2) < (0.8 if rank <= 30 else 0.2)
            rows.append({"seed": seed, "category": "a", "rank": rank, "right": int(right), "in_raw": int(inside)})
    table = pd.DataFrame(rows)
    means = table.groupby("in_raw")["right"].mean()
    assert means[1] - means[0] > 0.2
    assert abs(paper.matched_gap("in_raw", main_top=10)(table)) < 0.03


def test_matched_gap_is_the_weighted_mean_over_bins_that_a_loop_gives() -> None:
    generator = np.random.default_rng(1)
    table = pd.DataFrame({"seed": 0, "category": "a", "rank": range(1, 61)})
    table["right"], table["in_raw"] = generator.integers(0, 2, 60), generator.integers(0, 2, 60)
    gaps, weights = [], []
    for first in range(11, 61, 10):
        rows = table[table["rank"].between(first, first + 9)]
        inside, outside = (rows["right"][rows["in_raw"] == flag] for flag in (1, 0))
        gaps.append(outside.mean() - inside.mean())
        weights.append(len(inside) * len(outside) / len(rows))
    assert paper.matched_gap("in_raw", 10)(table) == pytest.approx(np.average(gaps, weights=weights))


def test_groups_that_never_share_a_bin_are_not_compared() -> None:
    table = pd.DataFrame({"seed": 0, "category": "a", "rank": range(1, 31), "right": 1, "in_raw": 1})
    assert np.isnan(paper.matched_gap("in_raw", 10)(table))


def _rows(base: dict, column: str, values: dict[str, float], value: str, near: Callable[[float], float]) -> list[dict]:
    return [{**base, column: name, value: near(mean)} for name, mean in values.items()]


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    generator = np.random.default_rng(0)
    tables: dict[str, list[dict]] = {name: [] for name in ("probe", "finding", "push", "diversity", "votes")}

    def near(value: float) -> float:
        return value * (1 + 0.02 * generator.standard_normal())

    for seed in range(5):
        for category in ("a", "b", "c", "d", "e"):
            base = {"seed": seed, "category": category}
            for rank in range(1, 101):
                inside, shuffled = generator.random(2) < 0.5
                chance = 0.9 if rank <= 10 else 0.2 if inside else 0.6
                flags = {"in_raw": int(inside), "in_normalised": int(inside), "in_shuffled": int(shuffled)}
                tables["probe"].append({**base, "rank": rank, "right": int(generator.random() < chance), **flags})
            found = {"icn": 0.7, "ranking": 0.5, "sampling": 0.4}
            tables["finding"] += _rows(base, "method", found, "mean_precision", near)
            changes = {"listed": -4.0, "unlisted": -1.0, "neighbours": -2.0, "others": -0.5}
            tables["push"] += _rows({**base, "list": "own"}, "group", changes, "change", near)
            still = dict.fromkeys(changes, 0.0)
            tables["push"] += _rows({**base, "list": "foreign"}, "group", still, "change", near)
        for topic in ("x", "y", "z"):
            far = {"icn": 0.7, "ranking": 0.5, "sampling": 0.4}
            tables["diversity"] += _rows({"seed": seed, "topic": topic}, "method", far, "distance", near)
        votes = {"icn": 0.8, "ranking": 0.6, "greedy": 0.5, "sampling": 0.6}
        tables["votes"] += _rows({"seed": seed}, "method", votes, "accuracy", near)
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    return Result(frames, {"normalised": 0.0, "main_top": 10})


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


@pytest.mark.parametrize("claim", ["top", "middle", "push", "finding"])
def test_no_check_decides_on_a_single_set(claim: str) -> None:
    result = ideal()
    tables = {n: t[t["category"] == "a"] if "category" in t else t for n, t in result.tables.items()}
    (check,) = (known.check for known in paper.CLAIMS if known.id == claim)
    assert direction(check(Result(tables, result.scalars))) == "unclear"


def test_listed_and_unlisted_halves_have_the_same_mean_rank() -> None:
    places = torch.arange(20)
    listed = paper.alternating(places)
    assert places[listed].float().mean() == places[~listed].float().mean() == 9.5


def test_validation_sets_cannot_be_tested() -> None:
    with pytest.raises(ValueError, match="validation set"):
        paper.Params(categories=("presidents",))


def test_tuning_takes_the_best_score_of_each_purpose() -> None:
    bench = make_bench()
    tuning = paper.tune(bench)
    for purpose, scores in tuning.groupby("purpose"):
        temperature, top_p = bench.settings[str(purpose)]
        chosen = scores[(scores["temperature"] == temperature) & (scores["top_p"] == top_p)]
        assert chosen["score"].item() == scores["score"].max()


class LetterCounts:
    """A stand-in for a sentence encoder: counts of letters."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0 + text.count(letter) for letter in "aeiournt"] for text in texts])


def make_bench() -> paper.Bench:
    params = paper.Params(
        model="tiny:llama", n_clusters=6, n_seeds=2, probe_top=24, n_candidates=6, n_validation=3, n_problems=3,
        text_tokens=5, way_tokens=8, max_tokens=4,
    )  # fmt: skip
    loaded = zoo.load(params.model)
    loaded.model.requires_grad_(False)
    clusters = paper.clusterings(loaded.model.get_output_embeddings().weight, params.n_clusters, 0)
    return paper.Bench(loaded, LetterCounts(), clusters, params)


def test_every_way_of_finding_decodes_equally_many_candidates() -> None:
    bench = make_bench()
    bench.settings["finding"] = (1.0, 1.0)
    rows = pd.DataFrame(paper.run_finding(bench, paper.questions(bench, ["countries"], 0), 0))
    assert set(rows.groupby("method")["candidates"].max()) == {bench.params.n_candidates}
    assert set(rows["method"]) == {"icn", "ranking", "sampling"}


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    try:
        zoo.fetch("minilm")
    except AssetError as error:  # the encoder is fetched once; a fresh machine without network has none
        pytest.skip(str(error))
    result = paper.experiment(make_bench().params)
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert set(result.tables) == {"probe", "finding", "push", "diversity", "votes", "tuning"}
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
