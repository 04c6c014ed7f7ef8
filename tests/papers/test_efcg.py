"""Facts of the requirements, of the stories, of preference learning and of the UltraGen chapter's claims."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data import stories
from midstream.measure.constraints import (
    CHECKS,
    PHRASES,
    Constraint,
    Lexicon,
    constraints_of,
    prompt_of,
    read,
    satisfaction_rate,
    satisfied,
    words,
)
from midstream.paper import Result
from midstream.papers.text import efcg as paper
from midstream.train.preferences import (
    answer_log_probs,
    by_pair,
    collate,
    encode,
    preference_logit,
    preference_loss,
    sample,
)
from midstream.train.recipes import stories_lm

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "gemma3")
TEXTS = stories.stories(300, seed=7)
LEXICON = Lexicon.of(TEXTS)
POOLS = [constraints_of(text, LEXICON, random.Random(number)) for number, text in enumerate(TEXTS)]
WITH, WITHOUT = 'Once, Tom saw 2 dogs. "Where is my hat?" asked Mia.', "no"

# ---------------------------------------------------------------------------------------------------- requirements


def test_every_constraint_is_true_of_the_text_it_was_read_off() -> None:
    assert all(satisfaction_rate(pool, text) == 1 for pool, text in zip(POOLS, TEXTS, strict=True))
    assert min(map(len, POOLS)) >= 45
    assert {each.kind for pool in POOLS for each in pool} == set(CHECKS) == set(PHRASES)


@pytest.mark.parametrize(
    ("kind", "values", "phrase"),
    [
        ("keyword", ("Tom",), "mention Tom"),
        ("absent", ("Ben",), "avoid Ben"),
        ("order", ("Tom", "hat"), "put Tom before hat"),
        ("inside", ("hat", 2), "say hat in sentence 2"),
        ("times", ("is", 1), "use is 1 time"),
        ("words", (10, 14), "write 10 to 14 words"),
        ("sentences", (2,), "write 2 sentences"),
        ("commas", (1,), "use 1 comma"),
        ("capitals", (4,), "capitalise 4 words"),
        ("longest", (5,), "longest word has 5 letters"),
        ("first", ("Once",), "begin with Once"),
        ("last", ("Mia",), "end with Mia"),
        ("opening", (2, "Where"), "begin sentence 2 with Where"),
        ("length", (1, 5), "sentence 1 has 5 words"),
        ("question", (1,), "ask 1 question"),
        ("speech", (2,), "use 2 quotation marks"),
        ("digits", (1,), "use 1 number"),
        ("ending", (".",), "end with the mark ."),
        ("letter", ("z",), "avoid the letter z"),
    ],
)
def test_each_check_tells_a_text_that_meets_it_from_one_that_does_not(
    kind: str, values: tuple[object, ...], phrase: str
) -> None:
    constraint = Constraint(kind, values)
    assert constraint.phrase == phrase
    assert constraint.check(WITH)
    against = {"absent": "Ben", "letter": "zoo"}.get(kind, WITHOUT)
    assert not constraint.check(against)


def test_an_empty_text_meets_only_what_asks_for_nothing() -> None:
    met = [each for pool in POOLS[:50] for each in pool if each.check("")]
    assert {each.kind for each in met} <= {"absent", "question", "speech", "digits", "commas"}


def test_order_of_constraints_does_not_change_the_score_of_a_text() -> None:
    for pool, text in zip(POOLS[:20], TEXTS[20:40], strict=True):
        shuffled = random.Random(1).sample(pool, len(pool))
        assert satisfaction_rate(pool, text) == satisfaction_rate(shuffled, text)
        assert dict(zip(pool, satisfied(pool, text), strict=True)) == dict(
            zip(shuffled, satisfied(shuffled, text), strict=True)
        )


def test_no_phrase_holds_two_neighbouring_words_of_its_text() -> None:
    for pool, text in zip(POOLS, TEXTS, strict=True):
        lower = read(text).lower
        first = {word: lower.index(word) for word in lower}
        for each in pool:
            if each.kind == "order":
                one, other = (first[str(value).lower()] for value in each.values)
                assert other - one > 1
            else:
                assert sum(isinstance(value, str) for value in each.values) <= 1


def test_a_lexicon_too_small_for_a_short_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="45 constraints were asked for"):
        constraints_of("Tom ran.", Lexicon({"tom": "Tom"}, ()), random.Random(0))


def test_a_lexicon_is_the_same_in_every_process() -> None:
    code = (
        "from midstream.data.stories import stories; from midstream.measure.constraints import Lexicon; "
        "print(Lexicon.of(stories(100)))"
    )
    said = [
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]


def test_of_each_split_there_are_as_many_texts_as_were_asked_for() -> None:
    params = paper.Params(n_texts=50, n_test=9, n_validation=5, counts=(2, 4, 8))
    texts = paper.corpus(params, 0)
    assert (len(texts.train), len(texts.validation), len(texts.test)) == (50, 9, 9)
    assert not any(stories.holds_out(each.text) for each in (*texts.train, *texts.validation, *texts.test))


# --------------------------------------------------------------------------------------------------------- stories


def test_a_story_depends_on_its_number_and_seed_alone() -> None:
    assert stories.stories(5, seed=3, start=10) == [stories.story(number, seed=3) for number in range(10, 15)]
    assert len(set(TEXTS)) > 290


def test_training_stories_hold_no_held_out_pair_and_some_test_stories_do() -> None:
    assert not any(map(stories.holds_out, TEXTS))
    assert any(map(stories.holds_out, stories.stories(50, split="test")))
    pairs = stories.held_out_pairs()
    assert len(pairs) * 4 == len(stories.WORDS["animal"]) * len(stories.WORDS["place"])


def test_stories_have_three_to_six_sentences() -> None:
    assert {len(read(text).sentences) for text in TEXTS} == {3, 4, 5, 6}


def test_the_miniature_is_asked_for_a_story_that_stands_last_behind_others() -> None:
    tokenizer = zoo.load("tiny:qwen2").tokenizer
    documents = list(zip(TEXTS[:20], POOLS[:20], strict=True))
    made = stories_lm.rows(documents, tokenizer, lambda pool: pool[:2], 3, random.Random(0))
    many = set()
    for _ in range(20):
        prompt, answer = next(made)
        told = tokenizer.decode(answer, skip_special_tokens=True).strip()
        asked = tokenizer.decode(prompt).split("Requirements: ")
        pool = dict(documents)[told]
        assert asked[-1] == prompt_of(pool[:2]).removeprefix("Requirements: ")
        many.add(len(asked) - 2)
    assert many == {0, 1, 2, 3}


# --------------------------------------------------------------------------------------------- composed sets of GPO


def examples(split: stories.Split) -> list[paper.Example]:
    texts = [text for text in stories.stories(60, seed=5, split=split) if not stories.holds_out(text)]
    return [paper.Example(text, constraints_of(text, LEXICON, random.Random(0))) for text in texts]


CORPUS = paper.Corpus(LEXICON, examples("train"), examples("test"), examples("test"), stories.holds_out)


@pytest.mark.parametrize("unseen", [False, True])
def test_a_composed_set_is_met_by_its_witness_whose_sentences_are_those_of_two_texts(unseen: bool) -> None:
    made = paper.compose(CORPUS.train, CORPUS, 12, random.Random(0), unseen=unseen)
    parts = {part for each in CORPUS.train for part in read(each.text).parts}
    texts = {each.text for each in CORPUS.train}
    assert all(satisfaction_rate(each.pool, each.text) == 1 for each in made)
    assert all(set(read(each.text).parts) <= parts for each in made)
    assert sum(each.text not in texts for each in made) > 6
    assert all(stories.holds_out(each.text) == unseen for each in made)


# ------------------------------------------------------------------------------------------------------------- DPO


def test_preference_loss_is_log_two_at_the_reference_and_its_logit_mirrors_when_swapped() -> None:
    policy, reference = torch.randn(7, 2), torch.randn(7, 2)
    assert float(preference_loss(reference, reference, 0.3)) == pytest.approx(math.log(2))
    logit = preference_logit(policy, reference, 0.3)
    torch.testing.assert_close(preference_logit(policy.flip(1), reference.flip(1), 0.3), -logit)
    by_hand = 0.3 * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
    torch.testing.assert_close(logit, by_hand)
    torch.testing.assert_close(preference_loss(policy, reference, 0.3), torch.log1p(torch.exp(-logit)).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_of_answers_are_those_of_single_rows_summed_over_tokens(family: str) -> None:
    loaded = zoo.load(f"tiny:{family}")
    asked = [("Requirements: none. Text:", " " + TEXTS[0]), ("Requirements: mention dog. Text:", " A dog.")]
    rows = [encode(loaded.tokenizer, *each) for each in asked]
    with torch.no_grad():
        together = answer_log_probs(loaded.model, collate(rows))
        for (prompt, answer), value in zip(rows, together, strict=True):
            logits = loaded.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            tokens = enumerate(answer, start=len(prompt) - 1)
            torch.testing.assert_close(
                value, sum(logits[place, token] for place, token in tokens), rtol=1e-3, atol=1e-2
            )


def test_a_batch_of_pairs_comes_apart_into_chosen_and_rejected() -> None:
    assert by_pair(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1.0, 3.0], [2.0, 4.0]]


@pytest.fixture(scope="module")
def bench() -> paper.Bench:
    loaded = zoo.load("tiny:llama")
    params = paper.Params(model="tiny:llama", steps=2, gpo_steps=2, batch_size=4, precision="float32", max_tokens=12)
    return paper.Bench(loaded.model.requires_grad_(False), loaded.tokenizer, CORPUS, params, 0)


def attempt(rates: list[float], answers: list[str]) -> paper.Attempt:
    return paper.Attempt("Requirements: none. Text:", answers, rates)


def test_a_pair_prefers_the_higher_rate_and_equal_rates_make_none() -> None:
    answers = ["one two", "one two three", "one two three four five", "one"]
    pair = paper.pair_of(attempt([0.2, 0.9, 0.5, 0.1], answers), "extremes")
    assert pair == paper.Pair("Requirements: none. Text:", ("one two three", "one"), (0.9, 0.1))
    assert paper.pair_of(attempt([0.5] * 4, answers), "extremes") is None
    assert paper.pair_of(attempt([0.2, 0.9, 0.5, 0.1], answers), "equal length") is None
    equal = paper.pair_of(attempt([0.2, 0.9, 0.5, 0.1], ["a b", "a b c", "d e", "f g"]), "equal length")
    assert equal is not None
    assert equal.answers == ("d e", "f g")
    with pytest.raises(ValueError, match="equal CSR"):
        paper.pairs_of([attempt([0.5, 0.5], ["a", "b"])], "extremes")


def test_the_coin_swaps_about_half_of_the_pairs_and_changes_none_otherwise() -> None:
    pairs = [paper.Pair(str(number), ("a", "b"), (1.0, 0.0)) for number in range(400)]
    tossed = paper.coin(pairs, seed=0)
    assert 150 < sum(each.rates[0] == 0 for each in tossed) < 250
    assert all(one in (other, other.swapped()) for one, other in zip(tossed, pairs, strict=True))


def test_training_starts_at_log_two_and_raises_the_chosen_answer_over_the_rejected(bench: paper.Bench) -> None:
    pairs = [paper.Pair("Requirements: none. Text:", ("A happy dog ran.", "He slept."), (1.0, 0.0))] * 2
    batch = next(paper.pair_batches(bench, bench.backbone, pairs))
    before = by_pair(answer_log_probs(bench.backbone, batch))
    assert float(preference_loss(before, batch["reference"], 0.1)) == pytest.approx(math.log(2), abs=1e-5)
    model = paper.preference(bench, bench.backbone, pairs, 1e-3, 0.1)
    after = by_pair(answer_log_probs(model, batch))
    assert (preference_logit(after, batch["reference"], 0.1) > 0).all()
    again = by_pair(answer_log_probs(bench.backbone, batch))
    torch.testing.assert_close(again, before)  # the reference is left alone


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_sampling_is_fixed_by_its_seed_and_answers_stand_at_their_prompts(family: str) -> None:
    loaded = zoo.load(f"tiny:{family}")
    prompts = ["Requirements: none. Text:", "Requirements: mention the small dog; use 2 commas. Text:", "Go"]

    def drawn(seed: int, batch: int) -> list[str]:
        return sample(
            loaded.model, loaded.tokenizer, prompts, most=6, seed=seed, temperature=1e-4, top_p=1.0, batch=batch
        )

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) == drawn(1, 1)  # at no temperature neither the seed nor padding matters


def test_adapters_are_merged_and_the_backbone_is_left_alone(bench: paper.Bench) -> None:
    before = {name: weight.clone() for name, weight in bench.backbone.state_dict().items()}
    lora = paper.Bench(bench.backbone, bench.tokenizer, CORPUS, bench.params.model_copy(update={"rank": 2}), 0)
    model = paper.reconstruction(lora, 1e-2, most=8)
    assert list(model.state_dict()) == list(before)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, before[name]) for name, weight in bench.backbone.state_dict().items())


# ------------------------------------------------------------------------------------------------- what is measured


def test_positions_are_even_where_hits_depend_on_the_kind_of_constraint_alone() -> None:
    rng = random.Random(0)
    kinds = {"easy": 1.0, "hard": 0.0}
    hits = [{"position": place, "constraint": rng.choice(list(kinds))} for _ in range(80) for place in range(45)]
    rows = paper.position_rows(pd.DataFrame([{**hit, "met": kinds[str(hit["constraint"])]} for hit in hits]))
    values = [row["csr"] for row in rows]
    assert len(values) == paper.BINS
    assert max(values) - min(values) < 1e-9


def test_a_position_that_is_ignored_shows_as_spread_beyond_chance() -> None:
    rng = random.Random(0)
    hits = [
        {"position": place, "constraint": "keyword", "met": float(rng.random() < (0.2 if place < 9 else 0.7))}
        for _ in range(80)
        for place in range(45)
    ]
    rows = paper.position_rows(pd.DataFrame(hits))
    values = [row["csr"] for row in rows]
    assert max(values) - min(values) > 0.4 > rows[0]["by_chance"] * 4


@pytest.mark.slow
def test_the_whole_experiment_runs_on_a_tiny_model_of_another_family() -> None:
    params = paper.Params(
        model="tiny:qwen2", n_texts=60, counts=(2, 4, 8), few=3, steps=2, batch_size=4, n_composed=12, gpo_steps=1
    )
    small = params.model_copy(update={"n_test": 4, "n_validation": 4, "max_tokens": 12, "n_seeds": 1})
    result = paper.experiment(small)
    assert set(result.tables["csr"]["arm"]) == set(ARMS)
    assert result.tables["csr"]["csr"].between(0, 1).all()


# ---------------------------------------------------------------------------------------------------------- claims

ARMS = (paper.BACKBONE, paper.FEW, paper.DEALT, paper.AR, paper.GPO, "GPO, equal length", paper.COIN, paper.BEST)
LEVEL = dict(zip(ARMS, (0.40, 0.45, 0.30, 0.60, 0.70, 0.68, 0.60, 0.62), strict=True))
FALL = dict(zip(ARMS, (0.05, 0.05, 0.0, 0.02, 0.01, 0.01, 0.02, 0.02), strict=True))


@pytest.fixture
def result() -> Result:
    """What an experiment would find in which every claim holds."""
    noise = random.Random(0)

    def wobble() -> float:
        return noise.uniform(-0.004, 0.004)

    def rows() -> Iterator[dict[str, object]]:
        for arm in ARMS:
            for seed in range(3):
                for kind in paper.KINDS:
                    for count in (4, 16, 45):
                        csr = LEVEL[arm] + FALL[arm] * (45 - count) / 10 + wobble()
                        yield {"arm": arm, "seed": seed, "kind": kind, "count": count, "csr": csr, "nll": 1 + wobble()}

    positions = [
        {"arm": arm, "seed": seed, "stretch": stretch, "csr": LEVEL[arm] + stretch * FALL[arm] / 2, "by_chance": 0.02}
        for arm in ARMS
        for seed in range(3)
        for stretch in range(5)
    ]
    frame = pd.DataFrame(positions)
    frame["csr"] += [wobble() for _ in range(len(frame))]
    return Result({"csr": pd.DataFrame(rows()), "positions": frame}, {"most": 45, "few": 12})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_holds_where_its_effect_is_and_turns_red_on_its_control(claim: paper.Claim, result: Result) -> None:
    assert direction(claim.check(result)) == "holds"
    assert direction(claim.check(claim.control.apply(result))) != "holds"


def test_counts_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="rise"):
        paper.Params(counts=(4, 4, 45))


def test_words_are_runs_of_letters_digits_and_apostrophes() -> None:
    assert words("Tom's 2 dogs, one—two.") == ["Tom's", "2", "dogs", "one", "two"]
