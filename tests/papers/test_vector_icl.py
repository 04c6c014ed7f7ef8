"""Facts of soft tokens and of Vector-ICL, on several families of tiny models, and the checks of its claims."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import data, zoo
from midstream.claims import direction
from midstream.data.number_lines import least_squares, number_lines, one_hot_places
from midstream.measure import soft_tokens as soft
from midstream.paper import Result
from midstream.papers.prompts import vector_icl as paper
from midstream.train.soft_projectors import KINDS, LINEAR, Zero, untrained

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3")
SMALL = paper.Params(
    pretrain=6,
    finetune=8,
    series=10,
    numbers=2,
    shots=(0, 2),
    lines=2,
    digits=(2, 3),
    n_val=4,
    n_numbers=2,
    n_queries=4,
    rates=(1e-2, 3e-2),
    batch_size=4,
    precision="float32",
    n_seeds=1,
)


def fake_encoder(width: int = 12) -> Any:
    """A vector for each text that depends on nothing but the text."""

    def encode(texts: list[str]) -> torch.Tensor:
        seeds = [sum(map(ord, text)) for text in texts]
        rows = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows) if rows else torch.empty(0, width)

    return SimpleNamespace(encode=encode)


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> paper.Bench:
    loaded = zoo.load(f"tiny:{request.param}")
    model: Any = loaded.model
    model.requires_grad_(False)
    if request.param == "gemma3":
        model.config.sliding_window = 512  # as long as the prompts, as in the released Gemma 3 270M
    return paper.Bench(model, loaded.tokenizer, fake_encoder(), SMALL)


def task_of(bench: paper.Bench, count: int = 16, shots: int = 2) -> paper.Task:
    """A made-up task of two classes in which the first coordinate tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    vectors = 0.3 * torch.randn(count, 12, generator=generator)
    vectors[:, 0] += 2.0 * labels - 1
    examples = paper.Examples(vectors, [f"it is {i}" for i in range(count)], labels)
    form, quarter = paper.vector_form("movies"), count // 4
    parts = [examples[range(at, at + quarter)] for at in range(0, count, quarter)]
    return paper.Task("movies", form, paper.text_forms("movies"), *parts, shots=(0, shots), seed=0)


# ------------------------------------------------------------------------------------------------------ soft tokens


def test_true_token_embeddings_as_vectors_give_the_logits_of_the_tokens(bench: paper.Bench) -> None:
    ids = bench.tokens("the movie was good and the story was long")
    table = bench.model.get_input_embeddings()(torch.tensor(ids))  # as the model reads them: Gemma scales
    mixed = soft.prompt(
        [bench.start, *(row if i % 2 else [token] for i, (token, row) in enumerate(zip(ids, table, strict=True)))]
    )
    assert int((mixed.ids == soft.SLOT).sum()) == len(ids) // 2
    with torch.no_grad():
        found = bench.model(inputs_embeds=soft.embed(bench.model, torch.nn.Identity(), soft.collate([mixed]))).logits
        expected = bench.model(torch.tensor([bench.start + ids])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_the_projector_has_a_gradient(bench: paper.Bench) -> None:
    task = task_of(bench)
    made = bench.new(LINEAR, task.train.vectors, 0)
    batch = soft.collate(paper.labelled(bench, task, task.train))
    soft.answer_loss(bench.model, made, batch).backward()
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in made.parameters())


def test_training_leaves_the_language_model_and_the_start_as_they_are(bench: paper.Bench) -> None:
    task = task_of(bench)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    start = bench.new(LINEAR, task.train.vectors, 0)
    kept = start.weight.detach().clone()
    made, _ = paper.train(bench, start, paper.finetuning(bench, task, task.train), 1e-2)
    assert all(value.equal(before[name]) for name, value in bench.model.state_dict().items())
    assert start.weight.equal(kept)
    assert not made.weight.equal(kept)


def test_a_zero_projector_says_the_same_of_every_input(bench: paper.Bench) -> None:
    task = task_of(bench)
    given = paper.context(bench, task, task.form, 2, as_text=False)
    zero, made = Zero(bench.width), torch.nn.Linear(12, bench.width, bias=False)
    torch.nn.init.zeros_(made.weight)
    scores = paper.label_scores(bench, zero, task.form, given, (task.test,))
    torch.testing.assert_close(scores, scores[:1].expand_as(scores))
    torch.testing.assert_close(paper.label_scores(bench, made, task.form, given, (task.test,)), scores)


def test_the_loss_reads_each_labelled_token_from_the_one_before_it(bench: paper.Bench) -> None:
    vector, rest = torch.randn(12), bench.tokens("was good")
    made = bench.new(LINEAR, vector[None], 0)
    row = soft.prompt([bench.start, vector, rest], [2])
    with torch.no_grad():
        embedded = soft.embed(bench.model, made, soft.collate([row]))
        logits = bench.model(inputs_embeds=embedded).logits[0].log_softmax(-1)
    expected = -np.mean([float(logits[1 + i, token]) for i, token in enumerate(rest)])
    with torch.no_grad():
        assert float(soft.answer_loss(bench.model, made, soft.collate([row]))) == pytest.approx(expected, rel=1e-4)


def test_no_row_sees_another(bench: paper.Bench) -> None:
    task = task_of(bench)
    made = bench.new(LINEAR, task.train.vectors, 0)
    rows = [
        soft.prompt([bench.start, v, bench.tokens("it was good"[:n])], [2])
        for v, n in zip(task.train.vectors, (2, 6, 11, 6), strict=True)
    ]
    alone = [bench.loss(made, [row]) for row in rows]
    counts = [int((row.labels != soft.IGNORED).sum()) for row in rows]
    together = soft.held_out_loss(bench.model, made, rows, 4)
    assert together == pytest.approx(np.average(alone, weights=counts), rel=1e-4)


def test_questions_behind_a_shared_prefix_score_as_in_the_whole_prompt(bench: paper.Bench) -> None:
    task = task_of(bench)
    made = bench.new(LINEAR, task.train.vectors, 0)
    given = paper.context(bench, task, task.form, 2, as_text=False)
    questions = [soft.prompt(paper.line(bench, task.form, vector)) for vector in task.test.vectors]
    behind = soft.next_logits(bench.model, made, given, questions, 3)
    for row, question in zip(behind, questions, strict=True):
        whole = soft.Prompt(
            *(torch.cat([getattr(given, n), getattr(question, n)]) for n in ("ids", "vectors", "labels"))
        )
        with torch.no_grad():
            alone = bench.model(inputs_embeds=soft.embed(bench.model, made, soft.collate([whole]))).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-4)


def test_greedy_digits_are_those_of_a_loop_over_whole_prompts(bench: paper.Bench) -> None:
    lines = number_lines(3, 3, np.random.default_rng(0))
    ids = paper.digit_ids(bench)
    found = paper.answers(bench, None, [lines])
    parts = paper.number_prompt(bench, lines, as_vectors=False)[:-2]
    tokens = soft.prompt(parts).ids.tolist()
    for _ in range(3):
        with torch.no_grad():
            logits = bench.model(torch.tensor([tokens])).logits[0, -1, ids]
        tokens.append(ids[int(logits.argmax())])
    assert int(found[0]) == int("".join(str(ids.index(token)) for token in tokens[-3:]))


def test_the_beginning_stands_once_and_a_prefix_is_never_empty(bench: paper.Bench) -> None:
    task = task_of(bench)
    for as_text in (False, True):
        for shots in task.shots:
            ids = paper.context(bench, task, task.form, shots, as_text=as_text).ids.tolist()
            assert ids[:1] == bench.start
            assert ids.count(bench.start[0]) == 1
    rows = paper.labelled(bench, task, task.train)
    assert all(row.ids.tolist().count(bench.start[0]) == 1 for row in rows)


def test_a_prompt_with_too_few_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match="2 slots"):
        soft.Prompt(torch.tensor([5, soft.SLOT, soft.SLOT]), torch.zeros(1, 4), torch.tensor([5, 0, 0]))


# ------------------------------------------------------------------------------------------------------- projectors


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_soft_tokens_are_as_long_as_embeddings(kind) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(50, 24), dim=1)
    made = untrained(kind, vectors, 32, 3.2, 0)
    assert float(made(vectors).detach().norm(dim=1).mean()) == pytest.approx(3.2, rel=0.1)
    assert not any("bias" in name for name, _ in made.named_parameters())


def test_one_seed_gives_one_projector() -> None:
    vectors = torch.randn(5, 8)
    assert untrained(LINEAR, vectors, 4, 1.0, 3).weight.equal(untrained(LINEAR, vectors, 4, 1.0, 3).weight)
    assert not untrained(LINEAR, vectors, 4, 1.0, 3).weight.equal(untrained(LINEAR, vectors, 4, 1.0, 4).weight)


# ---------------------------------------------------------------------------------------------------- text, cut in two


def test_neither_side_of_a_cut_is_empty() -> None:
    rng = np.random.default_rng(0)
    assert {paper.cut([1, 2], [0], rng) for _ in range(20)} == {1}
    assert {paper.cut([1, 2, 3, 4], [], rng) for _ in range(200)} == {1, 2, 3}
    with pytest.raises(ValueError, match="two tokens"):
        paper.cut([1], [], rng)


def test_two_sentences_are_cut_between_them(bench: paper.Bench) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        prefix, rest = paper.halves(bench.tokenizer, "it was good. the story was long.", 99, rng)
        assert prefix == "it was good."
        assert rest[-1] == bench.tokenizer.eos_token_id
        assert bench.tokenizer.decode(rest[:-1]).strip() == "the story was long."


def test_a_rest_that_is_cut_short_has_no_end(bench: paper.Bench) -> None:
    _, rest = paper.halves(bench.tokenizer, "the movie was good. the story was long", 2, np.random.default_rng(0))
    assert len(rest) == 2
    assert bench.tokenizer.eos_token_id not in rest


# ------------------------------------------------------------------------------------------------- demonstrations


def test_dealing_labels_out_keeps_their_counts_and_makes_them_say_nothing() -> None:
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    dealt = paper.mispaired(labels, 2)
    assert Counter(dealt.tolist()) == Counter(labels.tolist())
    assert float((dealt == labels).float().mean()) == 0.5
    three = paper.mispaired(torch.tensor([0, 1, 2] * 3), 3)
    assert Counter(zip([0, 1, 2] * 3, three.tolist(), strict=True)) == {(a, b): 1 for a in range(3) for b in range(3)}


def test_another_order_of_demonstrations_has_the_same_labels(bench: paper.Bench) -> None:
    task = task_of(bench)
    words = Counter(paper.label_ids(bench.tokenizer, task.form).tolist())
    for dealt in (False, True):
        orders = [
            paper.context(bench, replace(task, seed=seed), task.form, 2, as_text=False, dealt=dealt)
            for seed in range(4)
        ]
        counts = [Counter(t for t in order.ids.tolist() if t in words) for order in orders]
        assert all(count == counts[0] and set(count.values()) == {2} for count in counts)


def test_centring_undoes_a_bias_and_is_taken_only_where_it_validates_better() -> None:
    scores = torch.tensor([[0.0, -0.5], [0.0, -1.5], [0.0, -0.4], [0.0, -1.6]])
    labels = torch.tensor([1, 0, 1, 0])
    assert paper.decide(scores, scores, labels).equal(labels)
    assert paper.decide(scores, scores, torch.zeros(4, dtype=torch.long)).equal(torch.zeros(4, dtype=torch.long))


def test_no_example_is_dealt_twice() -> None:
    pool = paper.Examples(torch.arange(20.0)[:, None], [str(i) for i in range(20)], torch.arange(20) % 2)
    parts = paper._dealt(pool, 3, 2, 4)
    assert [len(part) for part in parts] == [6, 4, 10]
    assert len({text for part in parts for text in part.texts}) == 20
    assert Counter(parts[0].labels.tolist()) == {0: 3, 1: 3}


def test_finetuning_teaches_a_projector_what_the_vectors_say() -> None:
    loaded = zoo.load("tiny:llama")
    loaded.model.requires_grad_(False)
    bench = paper.Bench(loaded.model, loaded.tokenizer, fake_encoder(), SMALL.model_copy(update={"join": 2}))
    task = task_of(bench, 160)
    start = bench.new(LINEAR, task.train.vectors, 0)
    made, log = paper.train(bench, start, paper.finetuning(bench, task, task.train), 1e-1)
    assert log["loss"].iloc[-3:].mean() < log["loss"].iloc[:3].mean()
    assert paper.examine(bench, task, made, task.form, 0)["accuracy"] > 0.9


# ----------------------------------------------------------------------------------------------------------- numbers


def test_places_can_be_read_back_and_values_stay_in_range() -> None:
    vectors = one_hot_places([0, 1234567890, 42])
    digits = vectors.view(3, 10, 10).argmax(-1)
    assert ["".join(map(str, row)) for row in digits.tolist()] == ["0000000000", "1234567890", "0000000042"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert all(0 <= line.F < 10**4 for line in number_lines(4, 3, rng))
    assert all(line.F == line.A for line in number_lines(4, 3, rng, copying=1.0))


def test_least_squares_solves_the_function_from_two_lines() -> None:
    lines = number_lines(8, 4, np.random.default_rng(1))
    assert least_squares(lines[:-1], lines[-1]) == pytest.approx(lines[-1].F, rel=1e-5)


def test_every_value_of_a_number_sequence_is_predicted(bench: paper.Bench) -> None:
    for row in paper.number_lesson(bench, 0).rows:
        digits = set(paper.digit_ids(bench))
        assert set(row.labels[row.labels != soft.IGNORED].tolist()) <= digits
        assert len(row.vectors) == 2 * (SMALL.lines + 1)


# ----------------------------------------------------------------------------------------------- the whole experiment


def test_the_experiment_fills_every_table_and_every_check_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = zoo.load("tiny:llama")
    loaded.model.requires_grad_(False)
    bench = paper.Bench(loaded.model, loaded.tokenizer, fake_encoder(), SMALL)
    table = pd.DataFrame({"text": [f"the story of {i} was long" for i in range(40)], "label": [0, 1] * 20})
    real = data.load

    def load(name: str, split: Any = "train") -> Any:
        return real(name, split) if name == "digits" else SimpleNamespace(table=table)

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(paper, "open_bench", lambda params: bench)
    result = paper.experiment(SMALL)
    assert set(result.tables["classes"]["arm"]) == set(paper.NAMES)
    assert len(result.tables["tuning"]) == 6 * 2
    for claim in paper.CLAIMS:
        assert direction(claim.check(result)) == "unclear"  # one seed decides nothing
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"classes": [], "reading": [], "numbers": []}
    accuracies = {
        paper.TEXT: 0.7,
        paper.PROBE: 0.75,
        paper.FINETUNED: 0.9,
        paper.PRETRAINED: 0.65,
        paper.RANDOM: 0.5,
        paper.SHUFFLED: 0.5,
        paper.ZERO: 0.5,
    }
    losses = {"own": 4.0, "another text's": 4.5, "zero": 4.6, "none": 4.4}
    errors = {paper.FINETUNED: 0.1, paper.RANDOM: 0.3, paper.TOKENS: 0.2, paper.MEAN: 0.25}
    for seed in range(4):

        def near(value: float) -> float:
            return value + 0.004 * rng.standard_normal()

        for task in ("movies", "series"):
            for arm, value in accuracies.items():
                for kind in KINDS if arm not in (paper.TEXT, paper.PROBE) else ("none",):
                    for pairing in ("true", "dealt out"):
                        known = {"task": task, "seed": seed, "shots": 0 if arm == paper.PROBE else 4, "arm": arm}
                        found = near(value if pairing == "true" else 0.5)
                        rows["classes"].append({**known, "kind": kind, "pairing": pairing, "accuracy": found})
        rows["reading"] += [
            {"seed": seed, "kind": kind, "vector": vector, "loss": near(value)}
            for kind in KINDS
            for vector, value in losses.items()
        ]
        rows["numbers"] += [
            {"seed": seed, "digits": digits, "arm": arm, "error": near(value)}
            for digits in (2, 8)
            for arm, value in errors.items()
        ]
    return Result({name: pd.DataFrame(found) for name, found in rows.items()}, {"classes": 2})


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
