"""Facts about places, nesting, other tools' hooks, and the traps of raw hooks."""

import gc
import weakref

import pytest
import torch
from oracles import answer, assert_same_state, state
from torch import nn

from midstream.errors import HookError
from midstream.hooks import Site, attend, prune, read, readout, route, sites, write
from midstream.zoo import tiny


class Own(nn.Module):
    """Somebody's own module: an embedding, a list of blocks, a head; and longer lists inside the blocks."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])

        def forward(self, x, scale=1.0):
            for expert in self.experts:
                x = x + scale * expert(x).tanh()
            return x

    def __init__(self):
        super().__init__()
        self.head = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
        self.body = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, x):
        for block in self.body:
            x = block(x, scale=0.5)
        return self.head[0](x)


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.fixture
def inputs(model):
    return tiny.inputs(model)


def add(amount):
    return lambda x, at: x + amount


def test_sites_are_named_by_stack_block_and_part():
    places = sites(tiny.build("llava"))
    assert list(places.stacks) == ["vision", "text"]
    assert places.stack().name == "text"
    assert places.site(("out", -1)) == Site("text", 3, "out")
    assert places.site("embed", "vision") == Site("vision", 0, "embed")
    assert len(list(places)) == 2 * (1 + 4 * 4)
    assert list(sites(tiny.build("t5")).stacks) == ["encoder", "decoder"]
    assert list(sites(tiny.build("gpt2")).stacks) == ["main"]


def test_sites_of_a_module_that_declares_nothing_are_its_longest_outer_list_of_one_class():
    own = Own()
    assert sites(own).blocks() == list(own.body)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = own.head[0](own.body[0](x, scale=0.5))
        with route(own, skip=[1], stop=1), read(own) as out:
            assert torch.equal(own(x), expected)
        assert torch.equal(readout(own, out[0], x=x), expected)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda m: sites(nn.Linear(2, 2)), "no blocks can be found"),
        (lambda m: sites(Own()).module(Site("main", 0, "embed")), "use the part 'in' of block 0"),
        (lambda m: sites(Own()).module(Site("main", 0, "attn")), "has no attention module"),
        (lambda m: sites(m).site(("out", 4)), "no block 4 in stack 'main', which has 4"),
        (lambda m: sites(m).site(("resid", 1)), "the parts are: embed, in, out, attn, mlp"),
        (lambda m: sites(m).stack("decoder"), "there is no stack 'decoder'; this model has: main"),
        (lambda m: read(m, layers=[9]).__enter__(), "no block 9"),
        (lambda m: route(m, skip=[("in", 1)]).__enter__(), "a part to skip is attn or mlp, not in"),
        (lambda m: readout(tiny.build("vit"), torch.zeros(1, 17, 32)), "needs its inputs"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_sentence(model, ask, sentence):
    with pytest.raises(HookError, match=sentence):
        ask(model)


def test_two_stacks_without_a_decoder_must_be_told_apart():
    own = Own()
    own.tail = nn.ModuleList([Own.Block() for _ in range(3)])
    assert list(sites(own).stacks) == ["body", "tail"]
    with pytest.raises(HookError, match="several stacks"):
        sites(own).stack()


def test_places_follow_the_model_when_blocks_are_taken_out(model, inputs):
    assert len(sites(model).blocks()) == 4
    del model.model.layers[3]
    model.config.num_hidden_layers = 3
    assert len(sites(model).blocks()) == 3
    with read(model) as out:
        answer(model, inputs)
    assert len(list(out)) == 3


@torch.no_grad()
def test_a_model_that_was_hooked_is_freed():
    model = tiny.build("llama")
    first = lambda x: torch.tensor([0])
    with read(model), route(model, skip=[1]), write(model, {("attn", 2): add(1)}), prune(model, 0, first):
        answer(model, tiny.inputs(model))
    gone = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_order_is_write_then_drop_then_read_whichever_was_opened_first(model, inputs):
    contexts = {
        "write": lambda: write(model, {("out", 1): add(1.0), ("in", 2): add(2.0)}),
        "prune": lambda: prune(model, 1, lambda x: torch.arange(5)),
        "read": lambda: read(model),
        "read in": lambda: read(model, "in"),
        "route": lambda: route(model, skip=[2]),
    }
    with read(model) as plain:
        answer(model, inputs)
    results = []
    for order in (list(contexts), list(reversed(contexts)), ["read in", "prune", "route", "read", "write"]):
        opened = {name: contexts[name]() for name in order}
        entered = {name: context.__enter__() for name, context in opened.items()}
        logits = answer(model, inputs)
        for name in order:  # and left in the order in which they were opened
            opened[name].__exit__(None, None, None)
        out, into = entered["read"], entered["read in"]
        assert torch.equal(out[1], plain[1][:, :5] + 1.0)
        assert torch.equal(into[2], out[1] + 2.0)
        assert torch.equal(out[2], into[2])  # skipped
        results.append(logits)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.no_grad()
def test_of_two_writes_at_one_site_the_outer_acts_first(model, inputs):
    with write(model, {("out", 1): add(1.0)}), write(model, {("out", 1): lambda x, at: 2 * x}), read(model) as out:
        answer(model, inputs)
    with read(model) as plain:
        answer(model, inputs)
    assert torch.equal(out[1], 2 * (plain[1] + 1.0))


@torch.no_grad()
def test_recorded_hidden_states_show_what_was_written_though_the_recorders_came_first(model, inputs):
    layer = model.model.layers[1]
    plain = model(**inputs, output_hidden_states=True).hidden_states  # puts the recorders in, for good
    naive = layer.register_forward_hook(lambda module, args, output: output + 1.0)
    assert torch.equal(model(**inputs, output_hidden_states=True).hidden_states[2], plain[2])  # the trap
    naive.remove()
    with write(model, {("out", 1): add(1.0)}):
        shown = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(shown[2], plain[2] + 1.0)
    with read(model) as out:
        shown = model(**inputs, output_hidden_states=True).hidden_states
    assert not torch.equal(shown[-1], out[-1])  # the last one shown is past the final norm
    torch.testing.assert_close(model.model.norm(out[-1]), shown[-1])


@torch.no_grad()
def test_a_read_sees_what_a_second_tool_changes_even_one_that_came_later(model, inputs):
    layer = model.model.layers[1]
    with read(model) as plain:
        answer(model, inputs)
    with read(model) as out, read(model, "in") as into:
        tool = layer.register_forward_hook(lambda module, args, output: output + 1.0)
        answer(model, inputs)
    assert torch.equal(out[1], plain[1] + 1.0)
    assert torch.equal(into[2], out[1])
    with write(model, {("out", 1): lambda x, at: torch.zeros_like(x)}), read(model) as out:
        first = layer.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)
        answer(model, inputs)
    assert torch.equal(out[1], torch.ones_like(out[1]))  # writes come first, then the tool adds 1
    tool.remove()
    first.remove()


@torch.no_grad()
def test_a_second_tools_hooks_and_forward_survive(model, inputs):
    calls = []
    layer = model.model.layers[1]
    handles = [
        layer.register_forward_hook(lambda *given: calls.append("after")),
        layer.register_forward_pre_hook(lambda *given: calls.append("before")),
    ]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append("forward"), own(*args, **kwargs))[1]
    before = state(model)
    with read(model), route(model, skip=[1]), write(model, {("out", 1): add(1), ("in", 1): add(1)}):
        answer(model, inputs)
    assert calls == ["before", "after"]  # a block left out does not run its forward
    calls.clear()
    assert_same_state(before, state(model))
    answer(model, inputs)
    assert calls == ["before", "forward", "after"]
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_a_tool_that_wraps_forward_meanwhile_is_left_in_place(model, inputs):
    layer = model.model.layers[1]
    calls = []
    with route(model, skip=[1]):
        ours = layer.forward
        layer.forward = lambda *args, **kwargs: (calls.append("tool"), ours(*args, **kwargs))[1]
        skipped = answer(model, inputs)
    whole = answer(model, inputs)
    assert calls == ["tool", "tool"]
    with route(model, skip=[1]):
        assert torch.equal(answer(model, inputs), skipped)
    del layer.forward
    assert torch.equal(answer(model, inputs), whole)


@torch.no_grad()
def test_contexts_of_several_models_do_not_mix():
    a, b = tiny.build("llama", seed=0), tiny.build("llama", seed=1)
    inputs = tiny.inputs(a)
    plain = answer(b, inputs)
    with write(a, {("out", 1): add(1.0)}), read(a) as out:
        assert torch.equal(answer(b, inputs), plain)
    assert not out.forwards


@torch.no_grad()
def test_the_first_of_a_tuple_is_the_stream_and_the_first_of_a_tensor_a_batch_item():
    """Blocks return tensors, T5's a tuple: `output[0]` in a raw hook is right in one case only."""
    for family in ("llama", "t5"):
        model = tiny.build(family)
        inputs = tiny.inputs(model)
        raw = []
        handle = sites(model).blocks()[1].register_forward_hook(lambda m, a, output, raw=raw: raw.append(output[0]))
        with read(model) as out:
            answer(model, inputs)
        handle.remove()
        assert (raw[0].shape == out[1].shape) == (family == "t5")
        assert out[1].shape == (2, 7 if family == "t5" else 12, 32)


@torch.no_grad()
def test_what_is_kept_owns_its_memory(model, inputs):
    views = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, output: views.append(output[:, -1]))
    kept = {
        "row": lambda x: x[:, -1],
        "converted": lambda x: x.double()[:, -1],
        "several": lambda x: (x[:, 0], {"mean": x.mean(1), "all": x}),
    }
    for name, keep in kept.items():
        with read(model, keep=keep) as out:
            answer(model, inputs)
        values = [out[1]] if name != "several" else [out[1][0], *out[1][1].values()]
        for value in values:
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
            assert value.untyped_storage().data_ptr() != views[-1].untyped_storage().data_ptr()
    handle.remove()
    assert views[0].untyped_storage().nbytes() == 12 * views[0].numel() * 4  # the naive view holds all 12 rows
    with read(model) as whole:
        answer(model, inputs)
    with read(model, keep=kept["row"]) as out:
        answer(model, inputs)
    assert torch.equal(out[2], whole[2][:, -1])


@torch.no_grad()
def test_cutting_only_the_stream_fails_where_prune_does_not(model, inputs):
    naive = model.model.layers[1].register_forward_hook(lambda m, a, output: output[:, ::2])
    with pytest.raises(RuntimeError):
        answer(model, inputs)
    naive.remove()
    with prune(model, 1, lambda x: torch.arange(0, 12, 2)), read(model) as out:
        assert answer(model, inputs).shape[1] == 12
    assert [x.shape[1] for x in out] == [12, 6, 6, 12]
    with prune(model, 1, lambda x: torch.arange(0, 12, 2), restore=False):
        assert answer(model, inputs).shape[1] == 6


@torch.no_grad()
def test_without_being_put_back_survivors_break_gpt2_and_mislead_clip():
    half = lambda x: torch.arange(0, x.shape[1], 2)
    gpt2 = tiny.build("gpt2")
    with prune(gpt2, 1, half, restore=False):
        assert answer(gpt2, tiny.inputs(gpt2)).shape == (1, 12, 128)  # two halved texts taken for one, without an error
    with prune(gpt2, 1, half):
        assert answer(gpt2, tiny.inputs(gpt2)).shape == (2, 12, 128)
    clip = tiny.build("clip_text")
    inputs = tiny.inputs(clip, length=11)  # the end of the text, at 10, survives
    with prune(clip, 1, half), read(clip) as out:
        pooled = clip(**inputs)
    hidden = clip.text_model.final_layer_norm(out[3])
    assert torch.equal(pooled.text_embeds, clip.text_projection(hidden[:, 10]))
    with pytest.raises(IndexError), prune(clip, 1, half, restore=False):
        clip(**inputs)


@torch.no_grad()
def test_recorded_hidden_states_stay_whole_under_pruning(model, inputs):
    with prune(model, 1, lambda x: torch.arange(0, 12, 2)), read(model) as out:
        shown = model(**inputs, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in shown] == [12] * 5
    assert torch.equal(shown[3][:, ::2], out[2])
    assert torch.equal(shown[3][:, 1::2], shown[2][:, 1::2])


@torch.no_grad()
def test_merging_is_a_write_and_a_prune(model, inputs):
    """ToMe's step with fixed pairs: each even token becomes the mean of itself and the next."""
    merge = lambda x, at: x.unflatten(1, (6, 2)).mean(2).repeat_interleave(2, dim=1)
    with prune(model, 1, lambda x: torch.arange(0, 12, 2)), write(model, {("out", 1): merge}), read(model) as out:
        answer(model, inputs)
    with read(model) as plain:
        answer(model, inputs)
    torch.testing.assert_close(out[1], plain[1].unflatten(1, (6, 2)).mean(2))


@torch.no_grad()
def test_pruning_goes_by_attention_seen_in_the_same_forward(model, inputs):
    """FastV's composition: the last row of block 1's attention chooses what block 2 on will see."""
    seen = {}

    def look(x, at):
        seen["received"] = x[:, :, -1].mean(1)  # (batch, keys)

    select = lambda x: seen["received"].topk(4).indices
    with attend(model, probs=look, layers=[1]), prune(model, 1, select), read(model) as out:
        answer(model, inputs)
    assert out[2].shape == (2, 4, 32)


def test_writes_refuse_what_is_not_the_stream(model, inputs):
    for wrong in (lambda x, at: None, lambda x, at: x[:, :3], lambda x, at: x.sum()):
        with pytest.raises(HookError, match="must return a tensor of shape"), write(model, {("attn", 1): wrong}):
            answer(model, inputs)


def test_reading_gradients_needs_gradients(model, inputs):
    with pytest.raises(HookError, match="needs gradients"), torch.no_grad(), read(model, grad=True):
        answer(model, inputs)


def test_values_are_detached_unless_gradients_are_asked_for(model, inputs):
    with read(model) as out:
        answer(model, inputs)
    assert not out[1].requires_grad


def test_what_was_not_read_is_said(model, inputs):
    with read(model, layers=[1, -1]) as out:
        with pytest.raises(HookError, match="nothing was read at block 1"):
            out[1]
        answer(model, inputs)
    assert out.layers == (1, 3)
    assert torch.equal(out[-1], out[3])
    with pytest.raises(HookError, match="not among those"):
        out[2]
