"""Facts of the label-words method, on several families of tiny models, and the checks of its claims."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from midstream import zoo
from midstream.claims import direction
from midstream.data.prompts import FORMAT, LABEL, TEXT, demonstrations, query, template
from midstream.errors import HookError, RequestError
from midstream.hooks import attend
from midstream.hooks.kv import copy
from midstream.measure.icl import last_logits, pad_right, prefill
from midstream.paper import Result
from midstream.papers.flow import label_words as paper

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3")
TEXTS = ["the movie was good and the story was long", "the news is about the new house", "it works", "she ran home"]


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> paper.Bench:
    """Four demonstrations and three queries in front of a tiny model."""
    loaded = zoo.load(f"tiny:{request.param}")
    loaded.model.requires_grad_(False)
    if request.param == "gemma3":
        loaded.model.config.sliding_window = 512  # as long as the prompts, as in the released Gemma 3 270M
    form = template("sources")
    demos = demonstrations(loaded.tokenizer, form, TEXTS, [0, 1, 2, 3])
    queries = [query(loaded.tokenizer, form, text) for text in ("a good day", "one two three four", "read it")]
    table = pd.DataFrame({"text": TEXTS * 3, "label": [0, 1, 2, 3] * 3})
    params = paper.Params(model=f"tiny:{request.param}", n_queries=4)
    cache, gold = prefill(loaded.model, demos.ids), torch.tensor([0, 1, 2])
    return paper.Bench(loaded.model, loaded.tokenizer, form, demos, cache, queries, gold, table, params, 0)


def whole(bench: paper.Bench) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_right([torch.cat([bench.demos.ids, tokens]) for tokens in bench.queries], pad=0)


def slow_saliency(bench: paper.Bench) -> torch.Tensor:
    """The definition spelled out: eager attentions, their gradients, one prompt at a time."""
    bench.model.set_attn_implementation("eager")
    flows = []
    for tokens, gold in zip(bench.queries, bench.gold, strict=True):
        embedded = bench.model.get_input_embeddings()(torch.cat([bench.demos.ids, tokens])[None]).requires_grad_()
        out = bench.model(inputs_embeds=embedded, output_attentions=True)
        for attention in out.attentions:
            attention.retain_grad()
        logits = out.logits[:, -1, bench.demos.label_ids]
        torch.nn.functional.cross_entropy(logits, gold[None]).backward()
        flow = torch.stack([(a * a.grad).sum(1)[0].abs().fill_diagonal_(0) for a in out.attentions])
        flows.append(flow.detach())
    bench.model.set_attn_implementation("sdpa")
    return flows


def test_saliency_is_attention_times_its_gradient_summed_over_heads(bench: paper.Bench) -> None:
    ids, last = whole(bench)
    flow = paper.saliency(bench.model, ids, last, bench.gold, bench.demos.label_ids)
    for item, slow in enumerate(slow_saliency(bench)):
        tokens = slow.shape[-1]
        torch.testing.assert_close(flow[:, item, :tokens, :tokens], slow, rtol=2e-3, atol=1e-6)


def test_flows_are_the_means_that_loops_over_pairs_give(bench: paper.Bench) -> None:
    ids, last = whole(bench)
    flow = torch.rand(2, *ids.shape, ids.shape[1])
    s_wp, s_pq, s_ww = paper.flow_scores(flow, bench.demos.anchors, last)
    anchors = set(bench.demos.anchors.tolist())
    for item, q in enumerate(last.tolist()):
        groups: dict[str, list[float]] = {"wp": [], "pq": [], "ww": []}
        for i in range(q + 1):
            for j in range(i):
                kind = "wp" if i in anchors else "pq" if i == q and j in anchors else "ww"
                groups[kind].append(flow[1, item, i, j].item())
        for ours, kind in ((s_wp, "wp"), (s_pq, "pq"), (s_ww, "ww")):
            assert ours[1, item].item() == pytest.approx(np.mean(groups[kind]), rel=1e-4)


def test_queries_behind_a_shared_prefix_score_as_in_the_whole_prompt(bench: paper.Bench) -> None:
    behind = bench.score(bench.cache, bench.prefix)
    for row, tokens in zip(behind, bench.queries, strict=True):
        alone = bench.model(torch.cat([bench.demos.ids, tokens])[None]).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-4)


def test_isolating_a_shared_prefix_equals_isolating_the_whole_prompt(bench: paper.Bench) -> None:
    layers = range(2)
    with paper.isolate(bench.model, bench.demos.anchors, layers):
        cache = prefill(bench.model, bench.demos.ids)
    behind = bench.score(cache, bench.prefix)
    ids, last = whole(bench)
    with torch.no_grad(), paper.isolate(bench.model, bench.demos.anchors, layers):
        together = last_logits(bench.model, ids, last)
    torch.testing.assert_close(behind, together.float(), rtol=1e-3, atol=1e-4)
    plain = bench.score(bench.cache, bench.prefix)
    assert (behind - plain).abs().max() > 1e-3


def test_an_isolated_token_attends_only_to_itself(bench: paper.Bench) -> None:
    rows = []
    with (
        torch.no_grad(),
        paper.isolate(bench.model, bench.demos.anchors, [1]),
        attend(bench.model, probs=lambda a, at: rows.append(a[0][:, bench.demos.anchors]), layers=[1]),
    ):
        bench.model(bench.demos.ids[None])
    expected = torch.nn.functional.one_hot(bench.demos.anchors, bench.prefix).float()
    torch.testing.assert_close(rows[0], expected.expand_as(rows[0]))


def test_beta_of_zero_changes_nothing(bench: paper.Bench) -> None:
    config = bench.model.config.get_text_config()
    beta = torch.zeros(config.num_hidden_layers, config.num_attention_heads, len(bench.demos.anchors))
    anchors = bench.demos.anchors
    scaled = bench.score(bench.cache, bench.prefix, lambda last, _: paper.reweight(bench.model, beta, anchors, last))
    torch.testing.assert_close(scaled, bench.score(bench.cache, bench.prefix), rtol=1e-4, atol=1e-5)


def test_beta_scales_only_the_last_row_at_the_anchors(bench: paper.Bench) -> None:
    config = bench.model.config.get_text_config()
    beta = torch.randn(config.num_hidden_layers, config.num_attention_heads, len(bench.demos.anchors))
    ids, last = whole(bench)
    before, after = [], []
    with torch.no_grad():
        with attend(bench.model, probs=lambda a, at: before.append(a), layers=[0]):
            last_logits(bench.model, ids, last)
        with (
            paper.reweight(bench.model, beta, bench.demos.anchors, last),
            attend(bench.model, probs=lambda a, at: after.append(a), layers=[0]),
        ):
            last_logits(bench.model, ids, last)
    expected = before[0].clone()
    for item, row in enumerate(last.tolist()):
        expected[item, :, row, bench.demos.anchors] *= beta[0].exp()
    torch.testing.assert_close(after[0], expected)


def test_learning_beta_lowers_the_loss_on_its_samples(bench: paper.Bench) -> None:
    training = paper.Training(bench.queries, bench.gold, epochs=6, rate=0.05, seed=0)
    label_ids, anchors = bench.demos.label_ids, bench.demos.anchors
    beta = paper.learn_beta(bench.model, bench.cache, bench.prefix, anchors, label_ids, training)

    def loss(around) -> float:
        logits = bench.score(bench.cache, bench.prefix, around)[:, label_ids]
        return torch.nn.functional.cross_entropy(logits, bench.gold).item()

    assert loss(lambda last, _: paper.reweight(bench.model, beta, anchors, last)) < loss(lambda *_: nullcontext())


def test_keeping_every_token_reproduces_the_whole_prompt(bench: paper.Bench) -> None:
    everything = torch.arange(bench.prefix)
    kept = paper.compress(bench.cache, bench.demos, everything, bench.end)
    torch.testing.assert_close(bench.score(kept, bench.prefix), bench.score(bench.cache, bench.prefix))


def test_a_window_shorter_than_the_prompt_is_refused_by_compression() -> None:
    loaded = zoo.load("tiny:gemma3")
    demos = demonstrations(loaded.tokenizer, template("sources"), TEXTS, [0, 1, 2, 3])
    with pytest.raises(HookError, match="sliding window"):
        paper.compress(prefill(loaded.model, demos.ids), demos, demos.anchors, until=len(demos) + 9)


def test_compression_equals_hiding_the_dropped_tokens_from_the_query(bench: paper.Bench) -> None:
    kept = paper.kept_positions(bench.demos, bench.demos.anchors)
    dropped = torch.ones(bench.prefix, dtype=torch.bool)
    dropped[kept] = False

    def hide(scores, at):
        hidden = torch.zeros(scores.shape[-1], dtype=torch.bool)
        hidden[: bench.prefix] = dropped
        return scores.masked_fill(hidden, float("-inf"))

    compressed = bench.score(bench.compressed(bench.demos.anchors), bench.prefix)
    for row, tokens in zip(compressed, bench.queries, strict=True):
        with torch.no_grad(), attend(bench.model, scores=hide):
            last = torch.tensor([len(tokens) - 1])
            hidden = last_logits(bench.model, tokens[None], last, copy(bench.cache), bench.prefix)[0]
        torch.testing.assert_close(row, hidden, rtol=1e-3, atol=1e-4)


def test_roles_cover_the_template_the_sentence_and_the_label_word(bench: paper.Bench) -> None:
    demos, decode = bench.demos, bench.tokenizer.decode
    first = demos.owner == 0
    assert decode(demos.ids[first & (demos.roles == TEXT)]).strip() == TEXTS[0]
    assert decode(demos.ids[first & (demos.roles == LABEL)]).strip() == bench.form.labels[0]
    assert "Source" in decode(demos.ids[first & (demos.roles == FORMAT)])
    assert all(demos.roles[position] == LABEL for position in demos.anchors)


def test_random_tokens_come_from_each_demonstrations_own_sentence(bench: paper.Bench) -> None:
    chosen = paper.random_tokens(bench.demos, torch.Generator().manual_seed(0))
    assert bench.demos.owner[chosen].tolist() == [0, 1, 2, 3]
    assert (bench.demos.roles[chosen] == TEXT).all()


def test_identical_keys_have_no_distance_and_every_query_head_uses_its_own_key_head() -> None:
    queries, keys = torch.randn(20, 6, 8), torch.randn(2, 3, 8)
    keys[:, 1] = keys[:, 0]
    distances = paper.key_distances(queries, keys, components=4)
    assert distances[0, 1] == 0
    assert distances.max() == 1
    repeated = paper.key_distances(queries, keys.repeat_interleave(3, 0), components=4)
    torch.testing.assert_close(distances, repeated)


def test_pairs_the_model_always_tells_apart_have_an_auc_of_one() -> None:
    logits = torch.tensor([[2.0, 0, 0], [3, 0, 1], [0, 2, 9], [0, 3, 9], [1, 1, 0]])
    aucs = paper.pair_aucs(logits, torch.tensor([0, 0, 1, 1, 2]))
    assert aucs[0, 1] == 1
    assert aucs[0, 2] < 1 or aucs[1, 2] < 1


def test_shares_of_auc_end_at_one() -> None:
    assert paper.share_of_auc([0.5, 0.6, float("nan"), 0.7])[-1] == pytest.approx(1)


def test_label_words_that_begin_alike_are_refused() -> None:
    from dataclasses import replace

    tokenizer = zoo.load("tiny:llama").tokenizer
    with pytest.raises(RequestError, match="same token"):
        demonstrations(tokenizer, replace(template("movies"), labels=("Movie", "Movie")), ["a", "b"], [0, 1])


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {
        name: [] for name in ("flow", "isolation", "attention", "reweighting", "compression", "speed", "diagnosis")
    }
    for seed in range(5):

        def near(value: float) -> float:
            return value * (1 + 0.02 * rng.standard_normal())

        base = {"task": "sources", "seed": seed}
        for layer in range(6):
            for anchor, factor in (("label", 1.0), ("random", 0.1)):
                flows = {"s_wp": near(factor * (6 - layer)), "s_pq": near(factor * 10 * (layer + 1)), "s_ww": near(0.3)}
                rows["flow"].append({**base, "anchor": anchor, "layer": layer, **flows})
            for target, late in (("label", 0.8), ("random", 0.55)):
                rows["attention"].append(
                    {**base, "target": target, "layer": layer, "auc": near(late if layer > 3 else 0.5)}
                )
        for place, target, kept in (
            ("first", "label", 0.3),
            ("last", "label", 0.9),
            ("first", "random", 0.95),
            ("last", "random", 0.97),
        ):
            rows["isolation"].append(
                {
                    **base,
                    "place": place,
                    "n": 5,
                    "target": target,
                    "label_loyalty": near(kept),
                    "word_loyalty": near(kept),
                }
            )
        for method, right in (
            ("vanilla", 0.5),
            ("more shots", 0.55),
            ("anchors", 0.7),
            ("random tokens", 0.52),
            ("bias", 0.6),
        ):
            rows["reweighting"].append({**base, "method": method, "accuracy": near(right)})
        for method, kept in (("all", 1.0), ("anchors", 0.8), ("text", 0.5), ("random", 0.4), ("best random", 0.55)):
            rows["compression"].append(
                {
                    **base,
                    "method": method,
                    "label_loyalty": near(kept),
                    "word_loyalty": near(kept),
                    "accuracy": near(kept),
                    "tokens": 10,
                }
            )
        for method, seconds in (("whole prompt", 0.3), ("cached prefix", 0.12), ("anchors", 0.1)):
            rows["speed"] += [{**base, "method": method, "repeat": r, "seconds": near(seconds)} for r in range(3)]
        for pair, (i, j) in enumerate([("A", "B"), ("A", "C"), ("A", "D"), ("B", "C"), ("B", "D"), ("C", "D")]):
            rows["diagnosis"].append(
                {
                    **base,
                    "class_i": i,
                    "class_j": j,
                    "predicted": near(0.3 + 0.1 * pair),
                    "actual": near(0.6 + 0.06 * pair),
                }
            )
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()}, {"layers": 6})


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


def test_one_pair_of_classes_decides_nothing_about_confusion() -> None:
    result = ideal()
    pair = result.tables["diagnosis"].query("class_i == 'A' and class_j == 'B'")
    assert direction(paper.check_diagnosis(result.with_table("diagnosis", pair))) == "unclear"


def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    params = paper.Params(model="tiny:llama", tasks=("sources",), n_seeds=2, n_queries=8, n_saliency=2)
    pytest.importorskip("midstream.data")
    try:
        result = paper.experiment(params)
    except Exception as error:  # the archive is fetched once; a fresh machine without network has none
        if type(error).__name__ == "AssetError":
            pytest.skip(str(error))
        raise
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert set(result.tables) == {"flow", "isolation", "attention", "reweighting", "compression", "speed", "diagnosis"}
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
