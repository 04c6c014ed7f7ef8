"""Facts of routing and balancing, on tiny mixtures of several families."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import multiprocessing
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from midstream.train import Schedule, fit
from midstream.train.balancing import (
    BIAS,
    RULES,
    LossFreeBalancing,
    Routed,
    balance_loss,
    expert_choice,
    load,
    max_violation,
    routers,
    routing,
    scores_of,
)

EXPERTS, TOP_K, LAYERS = 8, 2, 2
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": TOP_K,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_GROUPS = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
OWN_BIAS = ("deepseek_v3", "glm4_moe")
WITHOUT = ("mixtral", "olmoe", "qwen2_moe")


def tiny(family: str, **changes: Any) -> Any:
    """A random mixture whose scores differ visibly between experts."""
    torch.manual_seed(0)
    if family == "deepseek_v3":
        options = {**_SIZES, **_LATENT, **_GROUPS, "first_k_dense_replace": 0, "num_mtp_layers": 0, **changes}
        model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**options))
    elif family == "glm4_moe":
        options = {**_SIZES, **_GROUPS, "first_k_dense_replace": 0, "head_dim": 8, **changes}
        model = hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**options))
    elif family == "mixtral":
        options = {**_SIZES, "num_local_experts": EXPERTS, **changes}
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**options))
    elif family == "olmoe":
        model = hf.OlmoeForCausalLM(hf.OlmoeConfig(**{**_SIZES, "num_experts": EXPERTS, **changes}))
    else:
        options = {**_SIZES, "num_experts": EXPERTS, "shared_expert_intermediate_size": 16, **changes}
        model = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**options))
    for router in routers(model).values():
        torch.nn.init.normal_(router.weight, std=0.5)
    return model.eval()


@pytest.fixture(params=OWN_BIAS + WITHOUT)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def choices(model: Any) -> torch.Tensor:
    """(routers, tokens, experts) of booleans."""
    with routing(model) as routed:
        model(input_ids=IDS)
    empty = torch.zeros_like(routed[0].scores, dtype=torch.bool)
    return torch.stack([empty.scatter(1, each.chosen, True) for each in routed])


def test_every_layer_has_one_router_and_sends_each_token_to_k_experts(model: Any) -> None:
    chosen = choices(model)
    assert len(routers(model)) == len(chosen) == LAYERS
    assert (chosen.sum(-1) == TOP_K).all()
    assert (chosen.sum((1, 2)) == TOP_K * IDS.numel()).all()


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="no top-k router"):
        routers(torch.nn.Linear(2, 2))


def test_scores_are_those_by_which_the_router_chooses(model: Any) -> None:
    with torch.no_grad(), routing(model) as routed:
        model(input_ids=IDS)
    for each in routed:
        best = torch.zeros_like(each.scores, dtype=torch.bool).scatter(1, each.scores.topk(TOP_K).indices, True)
        assert best.gather(1, each.chosen).all()


@pytest.mark.parametrize("rule", ["sign", "multiplicative"])
def test_a_bias_equal_for_all_experts_changes_neither_routing_nor_output(model: Any, rule: str) -> None:
    plain, before = choices(model), model(input_ids=IDS).logits
    with LossFreeBalancing(model, 0.1, rule) as balancing:
        for index in range(LAYERS):
            balancing._bias(index).fill_(0.7)
        assert torch.equal(choices(model), plain)
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_a_large_bias_draws_every_token_and_its_gate_stays_the_unbiased_score(model: Any) -> None:
    with LossFreeBalancing(model, 0.1) as balancing:
        balancing._bias(0)[3] = 100.0
        router, gates = next(iter(routers(model).values())), []
        handle = router.register_forward_hook(lambda router, _, output: gates.append(output))
        assert choices(model)[0, :, 3].all()
        handle.remove()
    logits, weights, chosen = gates[0]
    wanted = scores_of(router, logits).gather(1, chosen)
    if getattr(router, "norm_topk_prob", True):
        wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, wanted * getattr(router, "routed_scaling_factor", 1.0))


def test_where_the_bias_is_ours_the_choice_equals_that_of_the_model_that_has_its_own() -> None:
    """The generic path, hooks, against DeepSeek-V3's own forward with the same bias."""
    model, bias = tiny("deepseek_v3"), torch.linspace(-0.3, 0.3, EXPERTS)
    for router in routers(model).values():
        router.get_buffer(BIAS).copy_(bias)
    own, logits = choices(model), model(input_ids=IDS).logits
    for router in routers(model).values():
        router.get_buffer(BIAS).zero_()
    with LossFreeBalancing(model, 0.1, "multiplicative") as balancing:
        object.__setattr__(balancing, "rule", RULES["sign"])  # hooks that were set up for a given bias now add it
        for index in range(LAYERS):
            balancing._bias(index).copy_(bias)
        assert torch.equal(choices(model), own)
        torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_on_the_model_once_closed(model: Any) -> None:
    before = model(input_ids=IDS).logits
    with LossFreeBalancing(model, 0.5, "multiplicative") as balancing:
        model.train()(input_ids=IDS)
        balancing.update()
        assert not torch.equal(model.eval()(input_ids=IDS).logits, before)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_the_bias_moves_by_the_update_of_the_reference_bit_for_bit(model: Any) -> None:
    """As NVIDIA's Megatron-LM states it: bias + sign(average − tokens) · rate."""
    with LossFreeBalancing(model, 0.001) as balancing, torch.no_grad():
        expected = torch.zeros(LAYERS, EXPERTS)
        for step in range(3):
            model.train()(input_ids=IDS.roll(step, 0)[step:])
            counts = choices_now(balancing).float()
            average = counts.sum(-1, keepdim=True) / counts.shape[-1]
            expected = expected + torch.sign(average - counts) * 0.001
            loads = balancing.update()
            assert torch.equal(loads, counts.long())
            assert torch.equal(balancing.biases(), expected)


def choices_now(balancing: LossFreeBalancing) -> torch.Tensor:
    return torch.stack([counts.clone() for counts in balancing.counts])


def test_loads_of_several_forwards_add_up_until_the_update(model: Any) -> None:
    with LossFreeBalancing(model, 0.0) as balancing, torch.no_grad():
        model.train()
        model(input_ids=IDS[:2])
        model(input_ids=IDS[2:])
        assert (balancing.update().sum(-1) == TOP_K * IDS.numel()).all()
        assert not balancing.update().any()


def test_eval_mode_neither_counts_nor_moves_the_bias(model: Any) -> None:
    with LossFreeBalancing(model, 0.1) as balancing, torch.no_grad():
        start = balancing.biases()
        model.eval()(input_ids=IDS)
        assert not balancing.update().any()
        assert torch.equal(balancing.biases(), start)


def test_the_bias_has_no_gradient_and_weight_decay_does_not_touch_it(model: Any) -> None:
    with LossFreeBalancing(model, 0.25) as balancing:
        steps = []

        def loss(wrapped: Any, ids: torch.Tensor) -> torch.Tensor:
            assert not any(balancing._bias(index).requires_grad for index in range(LAYERS))
            value: torch.Tensor = wrapped(input_ids=ids, labels=ids).loss
            return value

        schedule = Schedule(steps=3, learning_rate=0.01, weight_decay=0.9)
        fit(model, [IDS] * 3, loss, schedule, cpu=True, after_step=lambda step: steps.append(balancing.update()))
        quarters = balancing.biases() / 0.25
        assert torch.equal(quarters, quarters.round())  # whole steps of u, nothing else
        assert not any(name.endswith(BIAS) for name, _ in model.named_parameters())


def test_the_bias_is_that_of_past_batches_only(model: Any) -> None:
    """A forward in training gives what eval gives: the present batch does not move its own routing."""
    with LossFreeBalancing(model, 0.5) as balancing, torch.no_grad():
        in_eval = model(input_ids=IDS).logits
        in_training = model.train()(input_ids=IDS).logits
        torch.testing.assert_close(in_training, in_eval)
        balancing.update()
        assert not torch.equal(model(input_ids=IDS).logits, in_eval)


@pytest.mark.parametrize("family", OWN_BIAS)
def test_a_trained_bias_is_saved_with_the_model_that_has_one(family: str) -> None:
    model = tiny(family)
    with LossFreeBalancing(model, 0.125) as balancing, torch.no_grad():
        model.train()(input_ids=IDS)
        balancing.update()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
    kept = [router.get_buffer(BIAS) for router in routers(again).values()]
    assert torch.equal(torch.stack(kept), balancing.biases())
    assert torch.stack(kept).any()


def test_with_k_equal_to_n_routing_is_dense_and_even() -> None:
    model = tiny("deepseek_v3", num_experts_per_tok=EXPERTS)
    loads = choices(model).sum(1)
    assert (loads == IDS.numel()).all()
    assert not max_violation(loads).any()


def test_groups_of_experts_are_kept_by_the_added_bias_and_refused_by_the_multiplied_one() -> None:
    model = tiny("deepseek_v3", n_group=4, topk_group=1)
    with LossFreeBalancing(model, 0.5) as balancing:
        model.train()(input_ids=IDS)
        balancing.update()
        groups = choices(model.eval()).view(LAYERS, -1, 4, EXPERTS // 4).any(-1)
        assert (groups.sum(-1) == 1).all()
    with pytest.raises(ValueError, match="n_group=1"):
        LossFreeBalancing(model, 0.5, "multiplicative")


def test_max_violation_is_zero_when_even_and_largest_at_collapse() -> None:
    even, collapse = torch.full((8,), 5), torch.tensor([20, 20, 0, 0, 0, 0, 0, 0])
    assert max_violation(even) == 0
    assert max_violation(collapse) == EXPERTS / TOP_K - 1
    assert max_violation(torch.tensor([[3, 1], [2, 2]])).tolist() == [0.5, 0.0]


def test_balance_loss_is_that_of_transformers_over_k_in_one_layer() -> None:
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0))
    theirs = load_balancing_loss_func((logits,), EXPERTS, TOP_K)
    scores = logits.softmax(-1)
    ours = balance_loss([Routed(scores, scores.topk(TOP_K).indices)])
    torch.testing.assert_close(ours * TOP_K, theirs)


def test_balance_loss_sums_over_layers_and_is_one_each_when_even() -> None:
    even = Routed(torch.full((8, 8), 0.5), torch.arange(8)[:, None].expand(8, 2))
    torch.testing.assert_close(balance_loss([even, even]), torch.tensor(2.0))


def test_balance_loss_pulls_down_the_scores_of_busy_experts_alone() -> None:
    logits = torch.zeros(6, 3, requires_grad=True)
    busy = Routed(logits.sigmoid(), torch.tensor([[0], [0], [0], [0], [1], [2]]))
    balance_loss([busy]).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def balanced_course(rate: float) -> list[float]:
    """MaxVio over 300 updates of the bias on scores that stay the same, some experts far more liked than others."""
    random = torch.Generator().manual_seed(0)
    scores = (torch.randn(4000, EXPERTS, generator=random) + torch.linspace(-2, 2, EXPERTS)).sigmoid()
    bias, course = torch.zeros(EXPERTS), []
    for _ in range(300):
        loads = load((scores + bias).topk(TOP_K).indices, EXPERTS)
        course.append(float(max_violation(loads)))
        bias = bias + rate * torch.sign(loads.float().mean() - loads)
    return course


def test_on_fixed_scores_loads_reach_the_mean_and_then_oscillate_the_wider_the_larger_the_rate() -> None:
    fine, coarse = balanced_course(0.005), balanced_course(0.05)
    assert fine[0] == coarse[0] > 1.5
    assert coarse[20] < fine[20]  # a larger step is there sooner
    assert max(fine[-50:]) < 0.1
    assert max(coarse[-50:]) > 3 * max(fine[-50:])
    assert len({round(value, 6) for value in fine[-50:]}) > 1  # and it never comes to rest


def test_the_misdirected_rule_gives_each_expert_its_neighbours_error() -> None:
    errors = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert RULES["misdirected"].direction(errors).tolist() == [[-1.0, 1.0, -1.0, 1.0]]
    assert RULES["proportional"].direction(errors).tolist() == errors.tolist()


def test_in_expert_choice_a_later_token_moves_earlier_ones_and_in_top_k_it_cannot() -> None:
    scores = torch.rand(12, 4, generator=torch.Generator().manual_seed(1))
    changed = scores.clone()
    changed[-1] = 2.0
    bias = torch.tensor([0.2, 0.0, -0.1, 0.0])
    assert (expert_choice(scores, 6).sum(0) == 6).all()
    assert (expert_choice(scores, 6) != expert_choice(changed, 6))[:-1].any()
    assert torch.equal((scores + bias).topk(2).indices[:-1], (changed + bias).topk(2).indices[:-1])


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = tiny("deepseek_v3").train()
    with LossFreeBalancing(model, 0.5) as balancing, torch.no_grad():
        model(input_ids=IDS[2 * rank : 2 * rank + 2])
        torch.save((balancing.update(), balancing.biases()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_move_the_bias_by_the_loads_of_both(tmp_path: Path) -> None:
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    model = tiny("deepseek_v3").train()
    with LossFreeBalancing(model, 0.5) as balancing, torch.no_grad():
        model(input_ids=IDS)
        whole = balancing.update(), balancing.biases()
    for rank in range(2):
        loads, biases = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(loads, whole[0])
        assert torch.equal(biases, whole[1])
