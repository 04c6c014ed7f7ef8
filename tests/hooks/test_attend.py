"""Facts about `attend`: it shows what the model computes, and changes what it is told to and nothing else."""

from contextlib import ExitStack

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from midstream.errors import HookError
from midstream.hooks import attend, prune
from midstream.zoo import tiny

torch.set_num_threads(1)
FAMILIES = [family for family in tiny.FAMILIES if family != "dit"]
DECODERS = ["gpt2", "opt", "llama", "qwen2", "qwen3", "gemma3"]
CAUSAL = [*DECODERS, "clip_text", "llava"]
STACKS = {"t5": ("encoder", "decoder"), "llava": ("vision", "text")}  # where there is more than one


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=DECODERS)
def decoder(request):
    return tiny.build(request.param)


def everywhere(model, **functions):
    """`attend` in every stack of a model."""
    contexts = ExitStack()
    for stack in STACKS.get(model.config.model_type, (None,)):
        contexts.enter_context(attend(model, stack=stack, **functions))
    return contexts


def run(model, **arguments):
    """The model's main output, without gradients."""
    with torch.no_grad():
        return model(**arguments)[0]


def ids(rows=2, length=12, seed=1):
    return torch.randint(4, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def recorder(store, value=lambda x: x.detach().clone()):
    def keep(x, at):
        store[at.stack, at.layer, at.cross] = value(x)

    return keep


def same(x, at):
    return x.clone()


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def kernel_calls(monkeypatch):
    """A list that grows by one with every call of torch's fused attention."""
    calls, own = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


# --- reading ---------------------------------------------------------------------------------------------------------


def test_recorded_probabilities_equal_the_eager_models_attentions(family):
    model = tiny.build(family)
    arguments, seen = tiny.inputs(model), {}
    with everywhere(model, probs=recorder(seen)):
        run(model, **arguments)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**arguments, output_attentions=True)
    expected = {
        "t5": lambda: [*outputs.encoder_attentions, *outputs.decoder_attentions, *outputs.cross_attentions],
        "llava": lambda: outputs.attentions,  # of its language model only
    }.get(family, lambda: outputs.attentions)()
    order = sorted(seen, key=lambda place: (place[2], place[0] == "decoder", place[1]))
    recorded = [seen[place] for place in order if place[0] != "vision"]
    assert len(recorded) == len(expected) >= 4
    for mine, theirs in zip(recorded, expected, strict=True):
        close(mine, theirs)


def test_reading_changes_no_output_bit(family):
    model = tiny.build(family)
    arguments = tiny.inputs(model)
    plain = run(model, **arguments)
    with everywhere(model, q=recorder({}), k=recorder({}), v=recorder({}), scores=recorder({}), probs=recorder({})):
        read = run(model, **arguments)
    assert torch.equal(read, plain)
    assert torch.equal(run(model, **arguments), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_identity_edits_equal_the_models_own_attention(family, implementation):
    model = tiny.build(family)
    model.set_attn_implementation(implementation)
    arguments = tiny.inputs(model)
    with everywhere(model, q=same, k=same, v=same, scores=same, probs=same):
        edited = run(model, **arguments)
    close(edited, run(model, **arguments))


def test_softmax_of_recorded_scores_is_the_recorded_probabilities(family):
    model, scores, probs = tiny.build(family), {}, {}
    with everywhere(model, scores=recorder(scores), probs=recorder(probs)):
        run(model, **tiny.inputs(model))
    for place in scores:
        close(scores[place].softmax(-1), probs[place])


def test_inference_mode_is_read_and_edited_like_no_grad():
    model, seen = tiny.build("llama"), {}

    def blind(x, at):
        x[..., 3] = -torch.inf

    with attend(model, scores=blind, probs=recorder(seen)):
        expected = run(model, input_ids=ids())
        with torch.inference_mode():
            close(model(ids())[0], expected)


def test_soft_capped_scores_equal_the_eager_ones():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=128, num_hidden_layers=2, head_dim=8, attn_logit_softcapping=0.5, **sizes)
    model, seen = Gemma2ForCausalLM(config).eval(), {}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids(), output_attentions=True).attentions
    with attend(model, probs=recorder(seen)):
        run(model, input_ids=ids())
    for mine, theirs in zip(seen.values(), expected, strict=True):
        close(mine, theirs)


def test_eager_models_still_return_their_attentions():
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad(), attend(model, layers=[1], probs=lambda x, at: x * 0.5):
        attentions = model(ids(), output_attentions=True).attentions
    close(attentions[1].sum(-1), torch.full((2, 4, 12), 0.5))
    close(attentions[2].sum(-1), torch.ones(2, 4, 12))


def test_keys_and_values_are_the_cached_ones_unrepeated(decoder):
    keys, values, cache = {}, {}, DynamicCache()
    with attend(decoder, k=recorder(keys), v=recorder(values)):
        run(decoder, input_ids=ids(), past_key_values=cache)
    for (_, layer, _), key in keys.items():
        assert torch.equal(key, cache.layers[layer].keys)
    for (_, layer, _), value in values.items():
        assert torch.equal(value, cache.layers[layer].values)


# --- chosen layers only ----------------------------------------------------------------------------------------------


def test_other_layers_stay_on_their_kernel_bit_for_bit(family, monkeypatch):
    model, plain, before = tiny.build(family), {}, {}
    arguments, calls = tiny.inputs(model), kernel_calls(monkeypatch)
    with attend(model, q=recorder(plain)):
        run(model, **arguments)
    total = len(calls)
    with attend(model, q=recorder(before)), attend(model, scores=same, layers=[2]):
        run(model, **arguments)
    assert len(calls) == 2 * total - (2 if family == "t5" else 1)  # T5's decoder has cross-attention, too
    for (stack, layer, cross), query in plain.items():
        if layer < 2 or (layer == 2 and not cross):
            assert torch.equal(before[stack, layer, cross], query)


def test_queries_alone_stay_on_the_kernel(monkeypatch):
    model, calls = tiny.build("llama"), kernel_calls(monkeypatch)
    with attend(model, q=lambda x, at: x * 2):
        run(model, input_ids=ids())
    assert len(calls) == 4


def test_another_model_of_the_same_class_is_not_touched():
    one, two = tiny.build("llama"), tiny.build("llama")
    plain = run(two, input_ids=ids())
    with attend(one, probs=lambda x, at: x * 0):
        assert torch.equal(run(two, input_ids=ids()), plain)


# --- editing ---------------------------------------------------------------------------------------------------------


def test_doubled_queries_double_the_scores():
    model, plain, doubled = tiny.build("gpt2"), {}, {}
    with attend(model, layers=[0], scores=recorder(plain)):
        run(model, input_ids=ids())
    with attend(model, layers=[0], q=lambda x, at: 2 * x, scores=recorder(doubled)):
        run(model, input_ids=ids())
    for place in plain:
        close(doubled[place], 2 * plain[place])


def test_zero_values_and_zero_probabilities_both_silence_attention(decoder):
    with attend(decoder, v=lambda x, at: torch.zeros_like(x)):
        without_values = run(decoder, input_ids=ids())
    with attend(decoder, probs=lambda x, at: torch.zeros_like(x)):
        without_attention = run(decoder, input_ids=ids())
    close(without_values, without_attention)


def test_probabilities_are_not_renormalised_after_an_edit():
    model = tiny.build("llama")
    with attend(model, layers=[3], v=lambda x, at: x * 0.5):
        halved_values = run(model, input_ids=ids())
    with attend(model, layers=[3], probs=lambda x, at: x * 0.5):
        close(run(model, input_ids=ids()), halved_values)


def test_an_edit_in_place_counts_even_without_a_return_value():
    def cut(x, at):
        x[..., 3] = -torch.inf

    model = tiny.build("llama")
    with attend(model, scores=cut):
        in_place = run(model, input_ids=ids())
    with attend(model, scores=lambda x, at: x.index_fill(-1, torch.tensor(3), -torch.inf)):
        close(in_place, run(model, input_ids=ids()), 0)


def test_a_row_without_any_key_attends_to_nothing_and_has_finite_gradients():
    model, seen = tiny.build("llama"), {}
    with attend(model, scores=lambda x, at: torch.full_like(x, -torch.inf), probs=recorder(seen)):
        model(ids())[0].sum().backward()
    assert all(not probs.any() for probs in seen.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_a_token_that_no_query_sees_might_as_well_not_be_there(name):
    model, gone = tiny.build(name), 4
    rest = [place for place in range(12) if place != gone]

    def blind(x, at):
        return x.masked_fill(at.key_positions == gone, -torch.inf)

    everything = {"input_ids": ids(), "attention_mask": torch.ones(2, 12)}
    with attend(model, scores=blind):
        knocked_out = run(model, **everything)[:, rest]
    dropped = {name: value[:, rest] for name, value in everything.items()}
    places = torch.tensor([rest]).expand(2, -1)
    if name == "gemma3":  # its window counts places in the sequence, so give both masks by true position
        dropped["attention_mask"] = windows(places[0], 6)
    close(run(model, **dropped, position_ids=places), knocked_out)


def windows(places, window):
    """Gemma 3's two masks for tokens at `places`."""
    distance = places[:, None] - places[None]
    full, near = distance >= 0, (distance >= 0) & (distance < window)
    return {"full_attention": full[None, None], "sliding_attention": near[None, None]}


# --- masks, positions, caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_later_tokens(name):
    model = tiny.build(name)
    arguments = tiny.inputs(model)
    longer, changed = arguments, dict(arguments)
    changed["input_ids"] = arguments["input_ids"].clone()
    changed["input_ids"][:, -3:-1] = 7
    with everywhere(model, q=same, scores=same, probs=same), torch.no_grad():
        states = [model(**given, output_hidden_states=True).hidden_states[-1] for given in (longer, changed)]
    close(states[0][:, :-3], states[1][:, :-3], 0)
    assert not torch.equal(states[0][:, -3:], states[1][:, -3:])


def test_t5s_decoder_stays_causal():
    model = tiny.build("t5")
    arguments = tiny.inputs(model)
    changed = {**arguments, "decoder_input_ids": arguments["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, -1] = 7
    with attend(model, scores=same):
        close(run(model, **arguments)[:, :-1], run(model, **changed)[:, :-1], 0)


def test_an_attention_function_registered_without_a_mask_loses_causality_silently():
    """The trap that `attend` avoids: transformers builds no mask for a name it has no mask builder for."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def naive(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **kwargs)

    model = tiny.build("llama")
    plain = run(model, input_ids=ids())
    AttentionInterface.register("naive", naive)
    try:
        model.set_attn_implementation("naive")
        assert (run(model, input_ids=ids()) - plain).abs().max() > 0.1
        AttentionMaskInterface.register("naive", AttentionMaskInterface()["eager"])
        close(run(model, input_ids=ids()), plain)
    finally:
        AttentionInterface._global_mapping.pop("naive")
        AttentionMaskInterface._global_mapping.pop("naive", None)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in DECODERS for side in ("left", "right")]
    + [(name, "right") for name in ("bert", "roberta", "xlm_roberta", "clip_text")],
)
def test_padded_batches_equal_single_runs(name, side):
    model, pad = tiny.build(name), 5
    short, long = ids(1, 7, seed=2), ids(1, 7 + pad, seed=3)
    filler = torch.full((1, pad), model.config.pad_token_id or 0)
    padded = torch.cat([filler, short] if side == "left" else [short, filler], 1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :pad] = 0 if side == "left" else 1
    mask[0, -pad:] = 1 if side == "left" else 0
    arguments = {"input_ids": torch.cat([padded, long]), "attention_mask": mask}
    if name in DECODERS:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    halve = {"probs": lambda x, at: x * 0.5, "layers": [1, 2]}
    with attend(model, **halve), torch.no_grad():
        batch = model(**arguments, output_hidden_states=True).hidden_states[-1]
        alone = model(input_ids=short, output_hidden_states=True).hidden_states[-1]
    kept = slice(pad, None) if side == "left" else slice(None, 7)
    close(batch[0, kept], alone[0])


def test_validity_says_what_each_query_may_see():
    model, seen = tiny.build("llama"), {}
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with attend(model, layers=[0], probs=lambda x, at: seen.update(at=at, probs=x)):
        run(model, input_ids=ids(2, 5), attention_mask=mask)
    expected = (torch.ones(5, 5).tril() * mask[:, None]).bool()
    assert torch.equal(seen["at"].allowed[:, 0], expected)
    assert torch.equal((seen["probs"] > 0).any(1), expected)


def cached_logits(model, tokens, chunks, **arguments):
    """Logits of a run in chunks through one cache."""
    cache, outputs = DynamicCache(config=model.config), []
    for part in tokens.split(chunks, dim=1):
        outputs.append(run(model, input_ids=part, past_key_values=cache, **arguments))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("chunks", [[8, 1, 1, 1, 1], [5, 4, 3]])
def test_cached_decoding_equals_an_uncached_run(decoder, chunks):
    def edit(x, at):
        later = at.query_positions[:, None] > 5
        return torch.where(later & (at.key_positions == 3), -1e4, x)

    with attend(decoder, scores=edit, probs=lambda x, at: x * 0.9, layers=[1, 3]):
        close(cached_logits(decoder, ids(), chunks), run(decoder, input_ids=ids(), use_cache=False))


def test_positions_are_true_when_a_sliding_window_has_dropped_keys():
    model, seen = tiny.build("gemma3"), []
    with attend(model, layers=[0, 1], probs=lambda x, at: seen.append(at)):
        cached_logits(model, ids(1), [10, 1, 1])
    window, full = seen[-2], seen[-1]
    assert (window.past, window.decoding, window.query_positions.tolist()) == (11, True, [11])
    assert window.key_positions.tolist() == [6, 7, 8, 9, 10, 11]
    assert full.key_positions.tolist() == list(range(12))
    assert window.position_ids.tolist() == [[11]]
    assert not seen[0].decoding


def test_cross_attention_tells_the_decoders_place_and_the_encoders_keys():
    model, seen = tiny.build("t5"), []
    arguments = {**tiny.inputs(model), "decoder_input_ids": ids(2, 3)}
    settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    with attend(model, layers=[1], probs=lambda x, at: seen.append(at)):
        model.generate(**arguments, **settings)
    own, other = [at for at in seen if not at.cross], [at for at in seen if at.cross]
    for ats in (own, other):
        assert [at.query_positions.tolist() for at in ats] == [[0, 1, 2, 3], [4]]  # a start token comes first
        assert [at.decoding for at in ats] == [False, True]
    assert [len(at.key_positions) for at in own] == [4, 5]
    assert [len(at.key_positions) for at in other] == [12, 12]


def test_static_caches_are_read_truly():
    from transformers import StaticCache

    model, cache = tiny.build("llama"), StaticCache(config=tiny.build("llama").config, max_cache_len=16)
    seen = []
    with attend(model, layers=[2], scores=same, probs=lambda x, at: seen.append((x, at))):
        first = run(model, input_ids=ids()[:, :8], past_key_values=cache)
        second = run(model, input_ids=ids()[:, 8:9], past_key_values=cache)
    close(torch.cat([first, second], 1), run(model, input_ids=ids()[:, :9]))
    probs, at = seen[-1]
    assert at.past == 8
    assert not probs[..., at.key_positions > 8].any()


def test_greedy_generation_is_unchanged_by_identity_edits(decoder):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = decoder.generate(ids(), **settings)
    with attend(decoder, scores=same, probs=same):
        assert torch.equal(decoder.generate(ids(), **settings), plain)


def test_attention_chooses_what_is_pruned_and_pruned_layers_can_be_attended():
    """FastV's shape: the attention of one layer decides what the later ones see."""
    model, paid, seen = tiny.build("llama"), {}, {}
    tokens = ids(1)

    def most_attended(x):
        return paid["row"].mean(1)[0].topk(6).indices.sort().values

    with (
        attend(model, layers=[1], probs=lambda x, at: paid.update(row=x[:, :, -1])),
        prune(model, at=1, select=most_attended),
        attend(model, layers=[1, 2, 3], probs=recorder(seen)),
    ):
        run(model, input_ids=tokens)
    assert [probs.shape[-1] for probs in seen.values()] == [12, 6, 6]
    kept = most_attended(None)
    later = [2, 3]

    def blind(x, at):
        return x.masked_fill(~torch.isin(at.key_positions, kept), -torch.inf)

    full = {}
    with attend(model, layers=later, scores=blind, probs=recorder(full)):
        run(model, input_ids=tokens)
    for layer in later:
        close(seen["main", layer, False], full["main", layer, False][:, :, kept][..., kept])


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert", "vit", "t5"])
def test_attention_times_its_gradient_is_the_gradient_of_an_all_ones_mask(name):
    model, kept, masks = tiny.build(name), {}, {}
    arguments = tiny.inputs(model)

    def retain(x, at):
        x.retain_grad()
        kept[at.stack, at.layer, at.cross] = x

    def multiply(x, at):
        masks[at.stack, at.layer, at.cross] = ones = torch.ones_like(x, requires_grad=True)
        return x * ones

    with everywhere(model, probs=retain):
        model(**arguments)[0].square().mean().backward()
    with everywhere(model, probs=multiply):
        model(**arguments)[0].square().mean().backward()
    assert len(kept) == len(masks) >= 4
    for place, attention in kept.items():
        close(attention * attention.grad, masks[place].grad, 1e-6)
    assert any(mask.grad.abs().max() > 1e-4 for mask in masks.values())


def test_gradients_reach_edits_of_a_frozen_model():
    model = tiny.build("llama").requires_grad_(False)
    weight = torch.zeros(4, 1, 1, requires_grad=True)
    with attend(model, layers=[1], probs=lambda x, at: x * weight.exp()):
        model(ids())[0].sum().backward()
    assert weight.grad.abs().min() > 0


def test_gradients_equal_the_plain_ones_also_with_gradient_checkpointing():
    model = tiny.build("llama").train()
    model(ids())[0].square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with attend(model, scores=same, probs=same):
            model(ids(), use_cache=False)[0].square().mean().backward()
        for name, p in model.named_parameters():
            close(p.grad, plain[name], 1e-5)


def test_probabilities_are_those_before_dropout():
    model, seen = tiny.build("gpt2").train(), {}
    assert model.config.attn_pdrop > 0
    with attend(model, probs=recorder(seen)):
        model(ids())
    for probs in seen.values():
        close(probs.sum(-1), torch.ones(2, 4, 12))


# --- settings --------------------------------------------------------------------------------------------------------


def test_half_precision_stays_in_its_type(family):
    model, types = tiny.build(family).to(torch.bfloat16), set()
    arguments = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in tiny.inputs(model).items()
    }
    plain = run(model, **arguments)
    with everywhere(
        model, scores=lambda x, at: types.add(x.dtype), probs=lambda x, at: types.add(x.dtype) or x.clone()
    ):
        edited = run(model, **arguments)
    assert types == {torch.bfloat16}
    assert edited.dtype == torch.bfloat16
    assert (edited - plain).abs().max() < 0.1 * plain.abs().max()


def test_float32_factors_may_meet_half_precision():
    model = tiny.build("llama").to(torch.bfloat16)
    with attend(model, probs=lambda x, at: x * torch.ones(())[None]):
        assert run(model, input_ids=ids()).dtype == torch.bfloat16


def test_models_wrapped_by_peft_are_attended():
    from peft import LoraConfig, get_peft_model

    model, seen = tiny.build("llama"), {}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    plain = run(wrapped, input_ids=ids())
    with attend(wrapped, probs=recorder(seen)):
        assert torch.equal(run(wrapped, input_ids=ids()), plain)
    assert [layer for _, layer, _ in seen] == [0, 1, 2, 3]
    with attend(wrapped, scores=same):
        close(run(wrapped, input_ids=ids()), plain)


def test_models_dispatched_by_accelerate_are_attended():
    from accelerate import dispatch_model

    model = tiny.build("llama")
    plain = run(model, input_ids=ids())
    dispatched = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with attend(dispatched, scores=same):
        close(run(dispatched, input_ids=ids()), plain)


# --- undoing and nesting ---------------------------------------------------------------------------------------------


def snapshot(model):
    """Everything of a model and of transformers' registries that `attend` could have left changed."""
    modules = [
        (name, id(getattr(module, "config", None)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    own_forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    registries = [dict(registry._global_mapping) for registry in (AttentionInterface, AttentionMaskInterface)]
    return modules, own_forwards, registries, model.config.to_dict(), model.config._attn_implementation


def test_model_and_registries_are_as_before_also_after_an_exception(family):
    model = tiny.build(family)
    plain = run(model, **tiny.inputs(model))  # a first call lets transformers put in its own standing hooks
    before = snapshot(model)

    def fail(x, at):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attend(model, probs=fail):
        run(model, **tiny.inputs(model))
    assert snapshot(model) == before
    assert torch.equal(run(model, **tiny.inputs(model)), plain)


def test_the_outer_function_acts_first_and_the_inner_sees_its_result():
    model, seen = tiny.build("llama"), []
    double = {"probs": lambda x, at: seen.append(("double", x.sum(-1).mean().item())) or 2 * x, "layers": [1]}
    add = {"probs": lambda x, at: seen.append(("add", x.sum(-1).mean().item())) or x + 1, "layers": [1]}
    with attend(model, **double), attend(model, **add):
        run(model, input_ids=ids())
    assert [name for name, _ in seen] == ["double", "add"]
    assert [round(total, 4) for _, total in seen] == [1, 2]


def test_contexts_may_end_in_any_order():
    model = tiny.build("llama")
    before = snapshot(model)
    plain = run(model, input_ids=ids())
    first, second = ExitStack(), ExitStack()
    first.enter_context(attend(model, probs=lambda x, at: x * 0))
    second.enter_context(attend(model, probs=lambda x, at: x + 0.5))
    first.close()
    with attend(model, probs=lambda x, at: x - 0.5):
        close(run(model, input_ids=ids()), plain)
    second.close()
    assert snapshot(model) == before


def test_other_hooks_survive():
    model, calls = tiny.build("llama"), []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    with attend(model, probs=same):
        run(model, input_ids=ids())
    run(model, input_ids=ids())
    assert len(calls) == 2


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(match, model, **arguments):
    with pytest.raises(HookError, match=match), attend(model, **arguments):
        pass


def test_attention_outside_the_interface_is_refused():
    refused("AttentionInterface", tiny.build("dit"), probs=same)


def test_attention_by_another_formula_is_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GptOssForCausalLM(
        GptOssConfig(**sizes, vocab_size=64, head_dim=8, num_key_value_heads=2, num_local_experts=2)
    )
    model.set_attn_implementation("eager")
    refused("sinks", model, probs=same)


def test_kernels_with_masks_of_their_own_are_refused():
    model = tiny.build("llama")
    model.set_attn_implementation("flex_attention")
    refused("flex_attention", model, probs=same)


def test_compiled_models_are_refused():
    refused("compiled", torch.compile(tiny.build("llama")), probs=same)
    model = tiny.build("llama")
    model.compile()
    refused("compiled", model, probs=same)


def test_results_of_another_shape_are_refused():
    model = tiny.build("llama")
    for wrong in (lambda x, at: x[..., :3], lambda x, at: 0.0):
        with pytest.raises(HookError, match="probs function at layer 0"), attend(model, probs=wrong):
            run(model, input_ids=ids())


def test_no_function_and_no_such_layer_are_refused():
    model = tiny.build("llama")
    refused("at least one", model)
    refused("no block 4 in stack 'main', which has 4", model, probs=same, layers=[4])
    refused("no stack 'decoder'", model, probs=same, stack="decoder")


def test_the_last_layer_is_also_layer_minus_one_and_none_is_taken_twice():
    model, calls = tiny.build("llama"), []
    with attend(model, probs=lambda x, at: calls.append(at.layer), layers=[-1, 3]):
        run(model, input_ids=ids())
    assert calls == [3]


def test_without_a_stack_the_decoder_is_meant():
    for family, expected in (("t5", "decoder"), ("llava", "text")):
        model, seen = tiny.build(family), {}
        with attend(model, probs=recorder(seen)):
            run(model, **tiny.inputs(model))
        assert {stack for stack, _, _ in seen} == {expected}
