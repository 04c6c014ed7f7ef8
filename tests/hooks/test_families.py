"""Facts about reading, writing, routing and pruning that hold for every family and stack."""

import copy
from contextlib import ExitStack

import pytest
import torch
from oracles import (
    CAUSAL,
    EVERY,
    NEEDS_INPUTS,
    answer,
    assert_same_state,
    knocked_out,
    replaced,
    state,
)

from midstream.errors import HookError
from midstream.hooks import PARTS, Site, prune, read, readout, route, sites, write
from midstream.zoo import tiny

ADDS_UP = [pair for pair in EVERY if pair[0] not in ("gemma3", "bert", "roberta", "xlm_roberta", "dit")]
ADDS_UP.remove(("t5", "decoder"))  # which also adds cross-attention


@pytest.fixture(params=EVERY, ids="-".join)
def case(request):
    family, stack = request.param
    model = tiny.build(family)
    return family, stack, model, tiny.inputs(model)


def own_states(family, stack, model, inputs):
    """The hidden states that transformers records by itself."""
    if (family, stack) == ("llava", "vision"):
        return model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    output = model(**inputs, output_hidden_states=True)
    return output[f"{stack}_hidden_states" if family == "t5" else "hidden_states"]


@torch.no_grad()
def test_reading_changes_no_bit_and_equals_what_the_model_records_itself(case):
    family, stack, model, inputs = case
    plain = answer(model, inputs)
    with read(model, stack=stack) as out, read(model, "in", stack=stack) as into:
        assert torch.equal(answer(model, inputs), plain)
    for block in range(1, 4):
        assert torch.equal(into[block], out[block - 1])
    if family != "dit":
        recorded = own_states(*case)
        assert torch.equal(into[0], recorded[0])
        for block in range(3):  # the last one that a language model records is past its final norm
            assert torch.equal(out[block], recorded[block + 1])


@torch.no_grad()
def test_writing_what_is_there_changes_no_bit(case):
    family, stack, model, inputs = case
    plain = answer(model, inputs)
    places = [site for site in sites(model) if site.stack == stack and (family, site.part) != ("dit", "embed")]
    with write(model, {site: lambda x, at: x.clone() for site in places}):
        assert torch.equal(answer(model, inputs), plain)


@torch.no_grad()
def test_a_write_is_what_is_read_and_recorded_and_moves_the_answer(case):
    family, stack, model, inputs = case
    plain = answer(model, inputs)
    seen = []
    direction = torch.linspace(-3, 3, 32)  # a constant would be taken out by LayerNorm

    def steer(x, at):
        seen.append(at)
        return x + direction

    with read(model, stack=stack) as before:
        answer(model, inputs)
    with read(model, stack=stack) as out, write(model, {Site(stack, 1, "out"): steer}):
        steered = answer(model, inputs)
        if family not in ("dit", "llava"):
            assert torch.equal(own_states(*case)[2], out[1])
    assert torch.equal(out[1], before[1] + direction)
    assert not torch.allclose(steered, plain, atol=1e-3)
    tokens = out[1].shape[1]
    assert (seen[0].layer, seen[0].part, seen[0].decoding) == (1, "out", False)
    assert torch.equal(seen[0].positions, torch.arange(tokens).expand_as(seen[0].positions))


@pytest.mark.parametrize(("family", "stack"), ADDS_UP, ids="-".join)
@torch.no_grad()
def test_the_stream_grows_by_the_updates_of_attention_and_mlp(family, stack):
    model = tiny.build(family)
    inputs = tiny.inputs(model)
    with ExitStack() as contexts:
        into, out, attn, mlp = (
            contexts.enter_context(read(model, part, stack=stack)) for part in ("in", "out", "attn", "mlp")
        )
        answer(model, inputs)
    for block in range(4):
        torch.testing.assert_close(out[block], into[block] + attn[block] + mlp[block], atol=2e-6, rtol=0)


@torch.no_grad()
def test_skipping_and_pruning_nothing_changes_no_bit(case):
    _, stack, model, inputs = case
    plain = answer(model, inputs)
    with route(model, stack=stack), prune(model, 1, lambda x: torch.arange(x.shape[1]), stack=stack):
        assert torch.equal(answer(model, inputs), plain)


@pytest.mark.parametrize("skipped", [(0,), (1, 2), (0, 1, 2, 3), (3,)])
@torch.no_grad()
def test_skipping_equals_running_a_block_and_throwing_its_work_away(case, skipped):
    _, stack, model, inputs = case
    blocks = sites(model).blocks(stack)
    with replaced(blocks[block] for block in skipped):
        expected = answer(model, inputs)
    with route(model, skip=skipped, stack=stack):
        assert torch.equal(answer(model, inputs), expected)
        assert torch.equal(answer(model, inputs), expected)


@pytest.mark.parametrize("part", ["attn", "mlp"])
@torch.no_grad()
def test_skipping_a_sublayer_equals_a_last_projection_of_zeros(case, part):
    _, stack, model, inputs = case
    zeroed = copy.deepcopy(model)
    for parameter in sites(zeroed).module(Site(stack, 2, part)).parameters():
        parameter.zero_()
    with route(model, skip=[Site(stack, 2, part)], stack=stack):
        torch.testing.assert_close(answer(model, inputs), answer(zeroed, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("last", [0, 2, 3])
@torch.no_grad()
def test_a_stopped_run_equals_the_read_layer_through_readout(case, last):
    family, stack, model, inputs = case
    if (family, stack) in (("t5", "encoder"), ("llava", "vision")):
        pytest.skip("the head reads the other stack")
    given = inputs if family in NEEDS_INPUTS else {}
    with read(model, stack=stack) as out:
        plain = answer(model, inputs)
    with route(model, stop=last, stack=stack):
        stopped = answer(model, inputs)
    assert torch.equal(stopped, readout(model, out[last], stack=stack, **given))
    with route(model, stop=lambda block, x: block >= last, stack=stack):
        assert torch.equal(answer(model, inputs), stopped)
    assert torch.equal(stopped, plain) == (last == 3)


@pytest.mark.parametrize("by_item", [False, True], ids=["shared", "each item its own"])
@torch.no_grad()
def test_survivors_equal_those_of_a_run_where_nothing_attends_to_the_dropped(case, by_item):
    family, stack, model, inputs = case
    with read(model, stack=stack) as out:
        answer(model, inputs)
    tokens = out[0].shape[1]
    kept = torch.tensor([[0, 2, 3, tokens - 1], [0, 1, 4, tokens - 1]])
    kept = kept if by_item else kept[:1]
    with knocked_out(model, stack, 1, kept, (family, stack) in CAUSAL), read(model, stack=stack) as expected:
        answer(model, inputs)
    with (
        prune(model, 1, lambda x: kept if by_item else kept[0].flip(0), stack=stack),
        read(model, stack=stack) as pruned,
    ):
        answer(model, inputs)
    index = kept[..., None].expand(2, 4, out[0].shape[2])
    assert torch.equal(pruned[1], out[1].gather(1, index))
    torch.testing.assert_close(pruned[2], expected[2].gather(1, index), atol=1e-5, rtol=0)
    torch.testing.assert_close(pruned[3].gather(1, index), expected[3].gather(1, index), atol=1e-5, rtol=0)
    dropped = torch.ones(2, tokens, dtype=torch.bool).scatter(1, kept.expand(2, -1), False)
    assert torch.equal(pruned[3][dropped], out[1][dropped])  # put back as they were at the drop


def test_gradients_arrive_and_equal_those_of_raw_hooks(case):
    _, stack, model, inputs = case
    block = sites(model).blocks(stack)[1]
    raw = []

    def retain(module, args, output):
        raw.append(output[0] if isinstance(output, tuple) else output)
        raw[-1].retain_grad()

    handle = block.register_forward_hook(retain)
    answer(model, inputs).square().sum().backward()
    handle.remove()
    with (
        read(model, grad=True, stack=stack) as out,
        read(model, keep=lambda x: x[:, -1], grad=True, stack=stack) as last,
    ):
        answer(model, inputs).square().sum().backward()
    assert torch.equal(out[1].grad, raw[0].grad)
    assert torch.equal(last[1].grad, raw[0].grad[:, -1])
    assert raw[0].grad.abs().sum() > 0


def test_gradients_arrive_where_every_parameter_is_frozen(case):
    _, stack, model, inputs = case
    model.requires_grad_(False)
    with read(model, grad=True, stack=stack) as out:
        answer(model, inputs).square().sum().backward()
    assert out[0].grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_the_model_is_as_before_after_all_of_it_and_after_an_error(case):
    family, stack, model, inputs = case
    if family != "dit":
        own_states(*case)  # transformers' recorders stay once they were asked for
    before = state(model)
    for is_wrong in (False, True):
        with ExitStack() as contexts:
            for context in everything(family, stack, model):
                contexts.enter_context(context)
            if is_wrong:
                contexts.enter_context(pytest.raises(HookError, match="must return a tensor of shape"))
                contexts.enter_context(write(model, {Site(stack, 1, "out"): lambda x, at: x[0]}))
            answer(model, inputs)
        assert_same_state(before, state(model))


def everything(family, stack, model):
    """Every primitive at once."""
    parts = PARTS[1:] if family == "dit" else PARTS
    edits = {Site(stack, 0 if part == "embed" else 1, part): lambda x, at: x + 1 for part in parts}
    yield write(model, edits)
    yield read(model, stack=stack)
    yield read(model, "in", stack=stack)
    yield route(model, skip=[2, Site(stack, 1, "mlp")], stop=lambda block, x: block == 2, stack=stack)
    yield prune(model, 0, lambda x: torch.arange(3), stack=stack)
