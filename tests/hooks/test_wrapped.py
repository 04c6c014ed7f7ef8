"""Facts about models that are wrapped, dispatched, trained with checkpointing, in bfloat16, or compiled."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from oracles import answer, assert_same_state, state
from peft import LoraConfig, get_peft_model
from torch import nn

from midstream.errors import HookError
from midstream.hooks import Site, prune, read, readout, route, sites, write
from midstream.zoo import tiny

FAMILIES = ("llama", "gpt2", "t5", "bert")
half = lambda x: torch.arange(0, x.shape[1], 2)


def adapted(family, seed=0):
    """A model with LoRA adapters that change its answers."""
    torch.manual_seed(seed)
    model = tiny.build(family)
    leaves = {name.rpartition(".")[2] for name in (_name(model, part) for part in ("attn", "mlp"))}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=sorted(leaves), init_lora_weights=False))
    return wrapped.eval()


def _name(model, part):
    module = sites(model).module(Site("decoder" if len(sites(model).stacks) > 1 else "main", 1, part))
    return next(name for name, other in model.named_modules() if other is module)


def everything(model, inputs):
    """What each primitive makes of the model's answer, and what is read."""
    results = {"plain": answer(model, inputs)}
    with read(model) as out, read(model, "attn") as attention, read(model, "mlp") as mlp, read(model, "embed") as embed:
        results["reading"] = answer(model, inputs)
    results |= {f"{name} {i}": x for name, r in (("out", out), ("attn", attention)) for i, x in enumerate(r)}
    results |= {"mlp": mlp[2], "embed": embed[0], "readout": readout(model, out[1])}
    contexts = {
        "write": write(model, {("out", 1): lambda x, at: -x, ("attn", 2): lambda x, at: 2 * x, ("in", 3): _shift}),
        "skip": route(model, skip=[1, ("attn", 2), ("mlp", 3)]),
        "stop": route(model, stop=1),
        "prune": prune(model, 1, half),
    }
    for name, context in contexts.items():
        with context:
            results[name] = answer(model, inputs)
    return results


def _shift(x, at):
    return x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_peft_model_is_seen_through_adapters_included(family):
    wrapped = adapted(family)
    inputs = tiny.inputs(wrapped)
    before = state(wrapped)
    results = everything(wrapped, inputs)
    assert_same_state(before, state(wrapped))
    with wrapped.disable_adapter():
        bare = everything(wrapped, inputs)
    assert not torch.equal(results["attn 1"], bare["attn 1"])
    merged = everything(copy.deepcopy(wrapped).merge_and_unload(), inputs)
    for name, value in merged.items():
        torch.testing.assert_close(results[name], value, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_adapters_put_in_after_a_first_look_are_seen():
    model = tiny.build("llama")
    inputs = tiny.inputs(model)
    with read(model, "attn") as before:
        answer(model, inputs)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).eval()
    with read(model, "attn") as inner, read(wrapped, "attn") as outer:
        answer(wrapped, inputs)
    assert torch.equal(inner[0], outer[0])
    assert not torch.equal(inner[0], before[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["dispatched", "offloaded"])
@torch.no_grad()
def test_a_model_dispatched_by_accelerate_answers_as_before_under_every_primitive(family, how):
    model = tiny.build(family)
    inputs = tiny.inputs(model)
    expected = everything(model, inputs)
    if how == "dispatched":
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True, main_device="cpu")
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    results = everything(model, inputs)
    assert forwards == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


class Parallel(nn.Module):
    """The shape of DistributedDataParallel: the model lies in `.module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@torch.no_grad()
def test_a_wrapper_around_the_model_is_seen_through():
    model = tiny.build("llama")
    inputs = tiny.inputs(model)
    expected = everything(model, inputs)
    for name, value in everything(Parallel(model), inputs).items():
        assert torch.equal(expected[name], value), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "dit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_once_and_writes_twice(family, reentrant):
    """Hooks inside a block run again in the backward pass: a read must not, a write must."""
    if family == "dit" and reentrant:
        pytest.skip("diffusers checkpoints without re-entrance")
    model = tiny.build(family)
    inputs = tiny.inputs(model)
    direction = torch.linspace(-1, 1, 32)
    steer = {("attn", 1): lambda x, at: x + direction, ("mlp", 2): lambda x, at: 2 * x, ("out", 1): _shift}

    def gradients():
        model.zero_grad()
        calls = []
        handle = sites(model).attention(None, 1).register_forward_hook(lambda *given: calls.append(1))
        changed = (write(model, steer), route(model, skip=[("mlp", 3)]), prune(model, 0, half))
        with read(model, "attn") as attention, read(model) as out, changed[0], changed[1], changed[2]:
            answer(model, inputs).square().sum().backward()
        handle.remove()
        assert len(attention.forwards) == len(out.forwards) == 1
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(calls)

    expected, once = gradients()
    _checkpoint(model, reentrant)
    found, twice = gradients()
    assert (once, twice) == (1, 2)  # the naive hook is called again
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def _checkpoint(model, reentrant):
    """Training mode with checkpointing, and without dropout, so that its two forwards and the plain one agree."""
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "p"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers
        model.enable_gradient_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and model.main_input_name == "input_ids":
            model.enable_input_require_grads()
    model.train()


def test_gradients_arrive_under_gradient_checkpointing():
    model = tiny.build("llama")
    inputs = tiny.inputs(model)
    found = []
    for _ in range(2):
        with read(model, grad=True) as out, read(model, "attn", grad=True) as attention:
            answer(model, inputs).square().sum().backward()
        found.append([x.grad for reading in (out, attention) for x in reading])
        _checkpoint(model, reentrant=False)
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_refuses_gradients_inside_a_block():
    model = tiny.build("llama")
    _checkpoint(model, reentrant=True)
    with pytest.raises(HookError, match="use_reentrant=False"), read(model, "attn", grad=True):
        answer(model, tiny.inputs(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5", "vit"])
@torch.no_grad()
def test_bfloat16_holds_and_takes_float32_directions(family):
    model = tiny.build(family).to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tiny.inputs(model).items()}
    direction = torch.ones(32)  # float32
    with (
        read(model) as out,
        write(model, {("out", 1): lambda x, at: x + direction, ("mlp", 2): lambda x, at: x.float()}),
    ):
        answer(model, inputs)
    assert all(x.dtype == torch.bfloat16 for x in out)
    plain = answer(model, inputs)
    with route(model), prune(model, 1, lambda x: torch.arange(x.shape[1])), read(model):
        assert torch.equal(answer(model, inputs), plain)
    with route(model, skip=[0, ("attn", 2), ("mlp", 3)]), prune(model, 1, half):
        assert answer(model, inputs).dtype == torch.bfloat16
    if family in ("llama", "gpt2", "gemma3"):
        with route(model, skip=[0]):
            model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_compiled_models_are_refused_where_raw_hooks_are_ignored():
    """The trap: a hook put in after the first compiled call is not called."""
    model = tiny.build("llama")
    compiled = torch.compile(model, backend="eager")
    in_place = tiny.build("llama")
    in_place.compile(backend="eager")
    by_forward = tiny.build("llama")
    by_forward.forward = torch.compile(by_forward.forward, backend="eager")
    for wrong in (compiled, in_place, by_forward):
        with pytest.raises(HookError, match="compiled"):
            sites(wrong)
    inputs = tiny.inputs(model)
    with torch.no_grad():
        compiled(**inputs)
        with read(model) as out:  # the model itself was asked, but the compiled one is run
            compiled(**inputs)
        assert not out.forwards
        with pytest.raises(HookError, match="nothing was read"):
            out[0]
    torch.compiler.reset()


@torch.no_grad()
def test_a_model_compiled_inside_a_context_runs_uncompiled_there():
    model = tiny.build("llama")
    inputs = tiny.inputs(model)
    with read(model) as plain:
        expected = answer(model, inputs)
    compiled = torch.compile(model, backend="eager")
    with read(model) as out, write(model, {("out", 1): lambda x, at: -x}):
        answer(compiled, inputs)
    assert torch.equal(out[1], -plain[1])
    assert torch.equal(answer(compiled, inputs), expected)
    torch.compiler.reset()
