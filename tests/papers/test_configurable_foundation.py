"""Facts of emergent bricks (neurons) and of customized ones (LoRA), on tiny models of several families; the checks."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from sklearn.metrics import average_precision_score
from torch import Tensor

from midstream import zoo
from midstream.claims import direction
from midstream.data.kinds_of_text import KINDS, code_alone, docstrings_alone, windows
from midstream.errors import HookError, RequestError
from midstream.hooks import read, route
from midstream.hooks.neurons import neurons, output_weights
from midstream.measure.ranking import average_precision
from midstream.paper import Result
from midstream.papers.flow import configurable_foundation as paper
from midstream.train import Schedule
from midstream.train.bricks import Bricks, from_block, token_losses

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3", "gpt_neox")


def build(family: str) -> Any:
    """A tiny model; GPT-NeoX, whose sub-layers run side by side, is not among the zoo's."""
    if family != "gpt_neox":
        return zoo.tiny.build(family)
    config = hf.GPTNeoXConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    return hf.GPTNeoXForCausalLM(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny frozen model of each family."""
    return build(request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Five texts of 13 tokens."""
    return torch.randint(4, 120, (5, 13), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


# --- neurons ---


def test_the_layers_output_is_the_sum_over_neurons(model: Any, ids: Tensor) -> None:
    seen: dict[int, Tensor] = {}
    with neurons(model, lambda a, layer: seen.update({layer: a})), read(model, "mlp") as outputs:
        logits(model, ids)
    zeros = {}
    with neurons(model, lambda a, layer: torch.zeros_like(a)), read(model, "mlp") as biases:
        logits(model, ids)
    for layer, output in enumerate(outputs):
        zeros[layer] = biases[layer][0, 0]
        torch.testing.assert_close(seen[layer] @ output_weights(model, layer) + zeros[layer], output)


def test_an_identity_written_into_the_neurons_changes_no_logit(model: Any, ids: Tensor) -> None:
    plain = logits(model, ids)
    with neurons(model, lambda a, layer: a.clone()):
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("by", ["activation", "magnitude", "random"])
def test_masking_no_neuron_is_the_identity_and_masking_all_removes_the_layer(model: Any, ids: Tensor, by: Any) -> None:
    with paper.masking(model, by, 0.0):
        nothing = logits(model, ids)
    assert torch.equal(nothing, logits(model, ids))
    with paper.masking(model, by, 1.0), read(model, "mlp") as left:
        logits(model, ids)
    for output in left:  # the output bias, where there is one
        torch.testing.assert_close(output, output[:1, :1].expand_as(output))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_without_output_biases_masking_all_neurons_equals_leaving_the_layers_out(family: str, ids: Tensor) -> None:
    model = build(family)
    with paper.masking(model, "activation", 1.0):
        masked = logits(model, ids)
    with route(model, skip=[("mlp", layer) for layer in range(4)]):
        torch.testing.assert_close(masked, logits(model, ids))


def test_magnitude_is_the_norm_of_what_a_neuron_adds(model: Any, ids: Tensor) -> None:
    seen: dict[int, Tensor] = {}
    with neurons(model, lambda a, layer: seen.update({layer: a}), layers=[2]):
        logits(model, ids)
    weights = output_weights(model, 2)
    added = seen[2][..., None] * weights  # (batch, tokens, neurons, width)
    torch.testing.assert_close(paper.magnitudes(seen[2], paper.output_norms(model)[2]), added.norm(dim=-1))


def test_masking_takes_exactly_the_lowest_share_of_each_token() -> None:
    activations = torch.randn(2, 3, 20)
    masked = paper.mask_lowest(activations, activations.abs(), 0.7)
    assert ((masked == 0).sum(-1) == 14).all()
    kept = activations.abs().masked_fill(masked == 0, np.inf).amin(-1)
    assert (kept >= activations.abs().masked_fill(masked != 0, 0).amax(-1)).all()


def test_silencing_reaches_the_chosen_neurons_alone(model: Any, ids: Tensor) -> None:
    before: dict[int, Tensor] = {}
    with neurons(model, lambda a, layer: before.update({layer: a}), layers=[0]):
        logits(model, ids)
    chosen = torch.zeros(4, before[0].shape[-1], dtype=torch.bool)
    chosen[0, [1, 5]] = True
    with paper.silence(model, chosen), read(model, "mlp", [0]) as written:
        logits(model, ids)
    with read(model, "mlp", [0]) as plain:
        logits(model, ids)
    gone = before[0][..., [1, 5]] @ output_weights(model, 0)[[1, 5]]
    torch.testing.assert_close(plain[0] - written[0], gone, rtol=1e-3, atol=1e-5)


def test_a_mixture_of_experts_is_refused() -> None:
    config = hf.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with (
        pytest.raises(HookError, match="mixture of experts"),
        neurons(hf.MixtralForCausalLM(config), lambda a, n: None),
    ):
        pass


# --- scores and partitions ---


def test_average_precision_equals_scikit_learns_also_with_ties() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40, 3, 7), generator=random).float()
    positive = torch.rand(40, generator=random) < 0.3
    ours = average_precision(scores, positive)
    for place in np.ndindex(3, 7):
        slow = average_precision_score(positive.numpy(), scores[(slice(None), *place)].numpy())
        assert ours[place].item() == pytest.approx(slow, rel=1e-5)


def test_a_copy_of_the_label_scores_one_and_a_constant_scores_the_prevalence() -> None:
    positive = torch.tensor([True, False, False, True, False, False, False])
    assert average_precision(positive.float(), positive) == 1
    assert average_precision(torch.ones(7), positive).item() == pytest.approx(2 / 7)


def test_a_label_that_never_occurs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        average_precision(torch.ones(3), torch.zeros(3, dtype=torch.bool))


def test_func_score_finds_a_planted_neuron_and_does_not_depend_on_the_neurons_scale() -> None:
    kinds = np.repeat(["a", "b", "c"], 10)
    activations = torch.rand(30, 2, 6)
    activations[:, 1, 4] = torch.tensor(kinds == "b").float()
    scores = paper.func_scores(activations, kinds, ("a", "b", "c"))
    assert scores[1, 1, 4] == 1
    torch.testing.assert_close(paper.func_scores(7 * activations, kinds, ("a", "b", "c")), scores)


def test_random_partitions_overlap_by_their_share() -> None:
    sets = paper.partitions(torch.rand(4, 10, 2000), torch.ones(10, 2000, dtype=torch.bool), 0.05)
    matrix = paper.overlap(sets)
    off_diagonal = matrix[~torch.eye(4, dtype=torch.bool)]
    assert torch.allclose(matrix.diagonal(), torch.ones(4))
    assert off_diagonal.mean().item() == pytest.approx(0.05, abs=0.01)


def test_exclusive_labels_alone_bring_overlap_below_the_share() -> None:
    random = np.random.default_rng(0)
    kinds = random.permutation(np.repeat(["a", "b", "c"], 10))
    scores = paper.func_scores(torch.tensor(random.random((30, 1, 2000))), kinds, ("a", "b", "c"))
    matrix = paper.overlap(paper.partitions(scores, torch.ones(1, 2000, dtype=torch.bool), 0.05))
    assert matrix[~torch.eye(3, dtype=torch.bool)].max() < 0.03


def test_partitions_have_one_size_in_every_scope_and_leave_out_who_may_not_be_chosen() -> None:
    scores, eligible = torch.rand(3, 4, 100), torch.ones(4, 100, dtype=torch.bool)
    eligible[:, :30] = False
    by_layer, over_all = (paper.partitions(scores, eligible, 0.05, scope) for scope in ("layer", "global"))
    assert (by_layer.sum(-1) == 5).all()
    assert (over_all.flatten(1).sum(-1) == 20).all()
    assert not by_layer[..., :30].any()
    assert not over_all[..., :30].any()


def test_residents_are_large_on_every_function() -> None:
    activations = torch.rand(6, 1, 100)
    activations[:, 0, 7] = 10  # large on all
    activations[:3, 0, 8] = 10  # large on one function
    seen = paper.Seen(torch.empty(0), np.repeat(["a", "b"], 3), activations, *[torch.empty(0)] * 3, {})
    lasting = paper.residents(seen, torch.ones(1, 100), ("a", "b"), 0.02)
    assert lasting[0, 7]
    assert not lasting[0, 8]


def test_gaussian_activations_are_not_sparse_and_one_spike_is() -> None:
    assert paper.share_below(torch.randn(200, 1536).abs()).mean() < 0.6
    assert paper.share_below(torch.eye(50)).mean().item() == pytest.approx(0.98)


def test_relative_increase_is_that_of_the_perplexity() -> None:
    assert paper.relative_increase(np.log(2.12)) == pytest.approx(1.12)


def test_a_router_sends_each_kind_to_its_own_mean() -> None:
    features = torch.eye(3).repeat_interleave(4, 0) + 0.01 * torch.randn(12, 3)
    kinds = np.repeat(["x", "y", "z"], 4)
    assert (paper.Router.fit(features, kinds)(features) == kinds).all()


# --- bricks ---


@pytest.fixture
def bricks(model: Any, ids: Tensor) -> Iterator[tuple[Bricks, Tensor]]:
    """Bricks on the last two blocks, and the stream that enters them."""
    with torch.no_grad(), read(model, "in", [2]) as reading:
        logits(model, ids)
    made = Bricks(model, 2, rank=2)
    yield made, reading[2].clone()
    made.unload()


def test_starting_at_a_block_gives_the_whole_forwards_logits(model: Any, ids: Tensor, bricks: Any) -> None:
    plain = logits(model, ids)
    with from_block(model, 2, bricks[1]):
        torch.testing.assert_close(logits(model, ids), plain)


def test_a_new_brick_changes_nothing_and_a_trained_one_lowers_the_loss(model: Any, ids: Tensor, bricks: Any) -> None:
    made, stream = bricks
    before = token_losses(model, ids)
    made.add("one", seed=0)
    torch.testing.assert_close(made.losses("one", ids, stream, 2), before)
    made.train("one", ids, stream, Schedule(8, 2e-2), batch=5, seed=0)
    assert made.losses("one", ids, stream, 5).mean() < before.mean()
    torch.testing.assert_close(made.losses(None, ids, stream, 5), before)
    made.unload()
    torch.testing.assert_close(token_losses(model, ids), before)


def shop_of(model: Any, ids: Tensor, bricks: Any, rates: tuple[float, ...]) -> paper.Workshop:
    made, stream = bricks
    params = paper.Params(brick_rates=rates, brick_batch=5)
    train = dict.fromkeys(params.functions[:2], (ids, stream))
    bench: Any = SimpleNamespace(params=params, seed=0)
    return paper.Workshop(bench, made, train, None, None, {})  # type: ignore[arg-type]


def test_a_rate_is_tried_on_windows_not_trained_on_and_leaves_the_model_as_it_was(
    model: Any, ids: Tensor, bricks: Any
) -> None:
    before = token_losses(model, ids)
    made, stream = bricks
    shop = shop_of(model, ids, bricks, (1e-12,))
    held = torch.arange(len(ids)) % paper.HELD_OUT == 0
    found = shop.try_rate(("python",), 1e-12)  # a rate at which nothing is learned: the bare model's loss
    bare = made.losses(None, ids[held], stream[held], 5)
    assert found == pytest.approx(float(bare[:, bare.shape[1] // 2 :].mean()), rel=1e-4)
    torch.testing.assert_close(token_losses(model, ids), before)


def test_bricks_and_the_single_adapter_have_each_the_rate_that_loses_least(
    model: Any, ids: Tensor, bricks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = shop_of(model, ids, bricks, (1e-3, 1e-2))
    best = {1: 1e-2, 2: 1e-3}  # by how many kinds an adapter learns
    monkeypatch.setattr(shop, "try_rate", lambda kinds, rate: abs(rate - best[len(kinds)]))
    shop.choose_rates()
    assert shop.rates == {paper.BRICK: 1e-2, paper.SINGLE: 1e-3}


def updates(model: Any, name: str) -> dict[str, Tensor]:
    """B A of every adapted map."""
    found = {}
    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            found[path] = module.scaling[name] * (b @ a).detach()
    return found


def test_a_merged_brick_is_the_weighted_sum_and_a_scrambled_one_has_its_size(
    model: Any, ids: Tensor, bricks: Any
) -> None:
    made, stream = bricks
    for seed, name in enumerate(("one", "two")):
        made.add(name, seed)
        made.train(name, ids, stream, Schedule(3, 2e-2), batch=5, seed=seed)
    made.merge(["one", "two"], [0.5, 0.25], "merged")
    one, two, merged = (updates(model, name) for name in ("one", "two", "merged"))
    assert merged
    for path, update in merged.items():
        torch.testing.assert_close(update, 0.5 * one[path] + 0.25 * two[path], rtol=1e-3, atol=1e-6)
    made.scramble("merged", seed=0)
    for path, update in updates(model, "merged").items():
        assert update.norm().item() == pytest.approx(merged[path].norm().item(), rel=1e-4)
    made.copy("one", "copied")
    for path, update in updates(model, "copied").items():
        torch.testing.assert_close(update, one[path], rtol=1e-3, atol=1e-6)


def test_training_a_copy_leaves_the_first_brick_as_it_was(model: Any, ids: Tensor, bricks: Any) -> None:
    made, stream = bricks
    made.add("one", 0)
    made.train("one", ids, stream, Schedule(2, 2e-2), batch=5, seed=0)
    before = made.losses("one", ids, stream, 5)
    made.copy("one", "copied")
    made.train("copied", ids.flip(0), stream.flip(0), Schedule(3, 2e-2), batch=5, seed=0)
    assert torch.equal(made.losses("one", ids, stream, 5), before)
    assert not torch.equal(made.losses("copied", ids, stream, 5), before)


# --- texts ---


def test_code_has_no_docstring_and_docstrings_no_code() -> None:
    source = (
        'def f(x):\n    """'
        + "Say much about x, and then say more, until the line is long. "
        + '"""\n    # why\n    return x\n'
    )
    assert code_alone(source).split() == ["def", "f(x):", "return", "x"]
    assert docstrings_alone(source).startswith("Say much")
    assert "return" not in docstrings_alone(source)


@pytest.mark.parametrize("kind", ["arithmetic", "notation"])
def test_sums_are_right_and_no_pair_is_in_both_splits(kind: str) -> None:
    pairs: dict[str, set[tuple[int, ...]]] = {}
    for split in ("train", "test"):
        lines = "\n".join(KINDS[kind].documents(split)).splitlines()
        numbers = [tuple(int(n) for n in re.findall(r"\d+", line)) for line in lines[:500]]
        assert all(a + b == c for a, b, c in numbers)
        pairs[split] = {n[:2] for n in numbers}
    assert not pairs["train"] & pairs["test"]


def test_windows_have_one_length_and_differ_between_seeds_and_splits() -> None:
    tokenizer = zoo.load("tiny:llama").tokenizer
    drawn = [
        windows("arithmetic", split, 6, 20, tokenizer, seed)
        for split, seed in (("train", 0), ("train", 1), ("test", 0))
    ]
    assert all(rows.shape == (6, 20) for rows in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], windows("arithmetic", "train", 6, 20, tokenizer, 0))


def test_more_windows_than_documents_are_refused() -> None:
    with pytest.raises(RequestError, match="too few"):
        windows("arithmetic", "test", 10_000, 20, zoo.load("tiny:llama").tokenizer, 0)


@pytest.mark.parametrize(
    "wrong", [{"functions": ("python", "romance", "arithmetic")}, {"functions": ("python", "arithmetic", "chess")}]
)
def test_functions_without_text_or_without_arithmetic_second_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="arithmetic"):
        paper.Params(**wrong)


@pytest.mark.parametrize("wrong", [{"levels": (0.5, 0.9)}, {"variants": ("global",)}])
def test_parameters_that_leave_a_claim_without_its_arm_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="claims are about"):
        paper.Params(**wrong)


# --- the claims ---


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    random = np.random.default_rng(0)
    functions = ("python", "arithmetic", "romance")
    rows: dict[str, list[dict[str, Any]]] = {}
    losses = {
        "base": (3.0, 3.0, 3.0, 3.0),
        "python": (2.0, 3.3, 3.3, 3.3),
        "arithmetic": (3.3, 2.0, 3.3, 2.9),
        "merged": (2.4, 2.4, 3.1, 2.9),
        "scrambled": (3.4, 3.4, 3.4, 3.4),
        "single": (2.1, 2.1, 3.2, 2.8),
        "routed": (2.0, 2.0, 3.0, 2.9),
        "misrouted": (2.9, 2.9, 3.2, 3.1),
        "routed_updated": (2.0, 2.5, 3.0, 1.8),
        "single_updated": (3.0, 2.6, 3.2, 1.8),
        "single_updated_replay": (2.3, 2.4, 3.2, 2.2),
        "routed_grown": (2.0, 2.0, 2.0, 2.9),
        "single_grown": (2.9, 2.9, 2.0, 2.9),
        "single_grown_replay": (2.2, 2.3, 2.6, 2.9),
    }
    for seed in range(5):

        def add(table: str, seed: int = seed, **row: Any) -> None:
            noisy = {
                k: v * (1 + 0.01 * random.standard_normal()) if isinstance(v, float) else v for k, v in row.items()
            }
            rows.setdefault(table, []).append({"seed": seed, **noisy})

        for name, (low, high) in {"activation": (0.05, 0.3), "magnitude": (0.02, 0.07), "random": (2.0, 3.0)}.items():
            rows.setdefault("sparsity", []).extend(
                {"seed": seed, "indicator": name, "level": level, "nats": cost + 0.001 * random.standard_normal()}
                for level, cost in ((0.7, low), (0.8, high))
            )
        for name, share in (("activation", 0.9), ("magnitude", 0.93), ("gaussian", 0.49)):
            add("indicators", indicator=name, below=share)
        for labels, best in (("true", 0.95), ("shuffled", 0.5)):
            for function in functions:
                for layer in range(3):
                    add("scores", labels=labels, function=function, layer=layer, best=best, held_out=best - 0.1)
                for other in set(functions) - {function}:
                    add("overlap", labels=labels, a=function, b=other, overlap=0.01 if labels == "true" else 0.06)
        for pruned in (*functions, "random"):
            for text in (*functions, "declaration"):
                add("pruning", variant="layer", pruned=pruned, text=text, nats=1.0 if pruned == text else 0.2)
        for arm, values in losses.items():
            for text, value in zip((*functions, "notation"), values, strict=True):
                add("operations", arm=arm, text=text, nats=value)
        for text in (*functions, "notation"):
            add("routes", text=text, right=1.0)
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()}, {"layers": 3, "share": 0.05})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim: Any) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) == "fails"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim: Any) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()}, result.scalars)
    assert direction(claim.check(single)) == "unclear"


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_experiment_fills_every_table_and_every_check_reads_it(family: str) -> None:
    params = paper.Params(
        model=f"tiny:{family}", n_seeds=2, brick_layers=2, variants=("layer", "layer, residents kept", "global")
    )
    try:
        result = paper.experiment(params)
    except Exception as error:  # texts are fetched once; a fresh machine without network has none
        if type(error).__name__ == "AssetError":
            pytest.skip(str(error))
        raise
    for claim in paper.CLAIMS:
        assert claim.check(result)
        assert claim.check(claim.control.apply(result))
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
