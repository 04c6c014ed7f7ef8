"""Facts about editing caches: what is kept acts as in the full run, what is dropped acts as if it were never seen."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from midstream.errors import HookError
from midstream.hooks import attend, kv
from midstream.hooks.kv import concat, copy, expand, positions, select
from midstream.zoo import tiny

torch.set_num_threads(1)
DECODERS = ["gpt2", "opt", "llama", "qwen2", "qwen3"]  # full attention in every layer
KEPT = [0, 2, 3, 7, 9]
SEEN, NEW = 10, 3


@pytest.fixture(params=DECODERS)
def model(request):
    return tiny.build(request.param)


def ids(rows=2, length=SEEN + NEW, seed=1):
    return torch.randint(4, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, **arguments):
    with torch.no_grad():
        return model(input_ids=tokens, **arguments).logits


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def context(model, rows=2, tokens=None):
    """A cache that has seen the first ten tokens."""
    cache = DynamicCache(config=model.config)
    run(model, ids(rows)[:, :SEEN] if tokens is None else tokens, past_key_values=cache)
    return cache


def continued(model, cache, rows=2, **arguments):
    """Logits of the tokens after the context, at their true positions."""
    places = positions(torch.ones(rows, NEW), start=SEEN)
    return run(model, ids(rows)[:, SEEN:], past_key_values=cache, position_ids=places, **arguments)


def without(model, hidden, rows=2, layers=None):
    """The oracle: a full run whose new tokens may not look at the context where `hidden` (…, context) is True."""

    def knock_out(x, at):
        new = at.query_positions[:, None] >= SEEN
        gone = torch.nn.functional.pad(hidden, (0, x.shape[-1] - SEEN))[..., None, :]
        return x.masked_fill(new & gone, -torch.inf)

    with attend(model, scores=knock_out, layers=layers):
        return run(model, ids(rows), use_cache=False)[:, SEEN:]


def dropped(kept):
    """(context,) True where a token is not kept."""
    return ~torch.isin(torch.arange(SEEN), torch.as_tensor(kept))


# --- on cache objects ------------------------------------------------------------------------------------------------


def test_keeping_every_key_and_value_reproduces_the_full_run(model):
    cache = context(model)
    close(continued(model, select(cache, range(SEEN))), run(model, ids())[:, SEEN:])


def test_selected_entries_equal_a_knock_out_of_the_others(model):
    close(continued(model, select(context(model), KEPT)), without(model, dropped(KEPT)))


def test_positions_counted_by_transformers_are_wrong_after_a_selection(model):
    tokens, cache = ids()[:, SEEN:], context(model)
    counted = run(model, tokens, past_key_values=select(cache, KEPT))
    assert (counted - without(model, dropped(KEPT))).abs().max() > 0.1


def test_each_row_and_each_key_value_head_may_keep_its_own_entries():
    model = tiny.build("llama")
    by_row = torch.tensor([[0, 2, 4], [5, 7, 9]])
    hidden = torch.stack([dropped(row) for row in by_row])[:, None]  # (batch, 1, context)
    close(continued(model, select(context(model), by_row)), without(model, hidden))
    by_head = torch.tensor([[[0, 2, 4], [1, 2, 3]], [[5, 7, 9], [0, 8, 9]]])  # (batch, key-value heads, kept)
    hidden = torch.stack([torch.stack([dropped(head) for head in row]) for row in by_head])
    close(continued(model, select(context(model), by_head)), without(model, hidden.repeat_interleave(2, dim=1)))


def test_each_layer_may_keep_its_own_entries_and_unnamed_layers_keep_all():
    model = tiny.build("llama")
    cache = select(context(model), {1: KEPT, 2: torch.tensor(KEPT)})
    assert [layer.keys.shape[2] for layer in cache.layers] == [SEEN, 5, 5, SEEN]
    first = ids()[:, SEEN : SEEN + 1]
    logits = run(model, first, past_key_values=cache, position_ids=positions(torch.ones(2, 1), SEEN))
    close(logits, without(model, dropped(KEPT), layers=[1, 2])[:, :1])


def test_selections_of_halves_concatenate_to_the_whole_selection(model):
    cache = context(model)
    parts = concat([select(cache, [0, 2, 3]), select(cache, [7, 9])])
    for layer, whole in zip(parts.layers, select(cache, KEPT).layers, strict=True):
        assert torch.equal(layer.keys, whole.keys)
        assert torch.equal(layer.values, whole.values)


def test_a_shared_context_expanded_to_many_rows_equals_running_it_in_each(model):
    tokens = ids(3)
    tokens[:, :SEEN] = tokens[:1, :SEEN]
    shared = expand(context(model, tokens=tokens[:1, :SEEN]), 3)
    places = positions(torch.ones(3, NEW), start=SEEN)
    logits = run(model, tokens[:, SEEN:], past_key_values=shared, position_ids=places)
    close(logits, run(model, tokens)[:, SEEN:])


def test_edits_leave_the_original_cache_as_it_was(model):
    cache = context(model, rows=1)
    before = [layer.keys.clone() for layer in cache.layers]
    for edited in (copy(cache), select(cache, KEPT), concat([cache, cache]), expand(cache, 1)):
        continued(model, edited, rows=1)
    assert cache.get_seq_length() == SEEN
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    copied = copy(cache)
    copied.layers[0].keys.zero_()
    assert torch.equal(cache.layers[0].keys, before[0])


def test_copies_of_sliding_window_caches_continue_like_the_original():
    model = tiny.build("gemma3")
    cache = context(model)
    close(continued(model, copy(cache)), run(model, ids())[:, SEEN:])
    close(continued(model, cache), run(model, ids())[:, SEEN:])


def test_full_layers_of_a_sliding_window_model_can_be_selected_alone():
    model = tiny.build("gemma3")
    close(continued(model, select(context(model), {1: KEPT, 3: KEPT})), without(model, dropped(KEPT), layers=[1, 3]))


def test_within_the_window_its_layers_can_be_selected_on_a_promise_to_stay_there():
    model = tiny.build("gemma3")
    tokens = ids(2, 6)
    cache = context(model, tokens=tokens[:, :4])
    kept = select(cache, [0, 3], until=6)
    places = positions(torch.ones(2, 2), start=4)

    def knock_out(x, at):
        gone = (at.key_positions == 1) | (at.key_positions == 2)
        return x.masked_fill((at.query_positions[:, None] > 3) & gone, -torch.inf)

    compressed = run(model, tokens[:, 4:], past_key_values=kept, position_ids=places)
    with attend(model, scores=knock_out):
        close(compressed, run(model, tokens)[:, 4:])
    with pytest.raises(HookError, match="sliding window"):
        select(cache, [0, 3], until=7)
    with pytest.raises(HookError, match="sliding window"):
        select(context(model), KEPT, until=6)


def test_positions_do_not_count_padding_on_either_side():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert positions(mask, start=10).tolist() == [[10, 10, 10, 11], [10, 11, 11, 11], [10, 11, 12, 13]]
    assert positions(mask, torch.tensor([0, 5, 7])).tolist() == [[0, 0, 0, 1], [5, 6, 6, 6], [7, 8, 9, 10]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_queries_after_a_selection_equal_single_queries(model, side):
    pad, cache = 2, select(context(model, rows=1), KEPT)
    query = ids(1)[:, SEEN:]
    filler = torch.zeros(1, pad, dtype=torch.long)
    padded = torch.cat([filler, query] if side == "left" else [query, filler], 1)
    mask = (padded != 0).long()
    logits = run(
        model,
        padded,
        past_key_values=copy(cache),
        position_ids=positions(mask, SEEN),
        attention_mask=torch.cat([torch.ones(1, len(KEPT), dtype=torch.long), mask], 1),
    )
    expected = continued(model, cache, rows=1)
    close(logits[:, pad:] if side == "left" else logits[:, :NEW], expected)


def test_only_negative_counts_crop_and_an_empty_cache_is_falsy():
    """Two traps of transformers' caches that callers meet."""
    cache = context(tiny.build("llama"))
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    cache.crop(-4)
    assert cache.get_seq_length() == SEEN - 4
    assert not DynamicCache()


# --- while a model runs ----------------------------------------------------------------------------------------------


def keep(places):
    return lambda keys, values, at: (keys[:, :, places], values[:, :, places])


def test_pruning_at_prefill_equals_selecting_afterwards(model):
    with kv(model, keep(KEPT)):
        cache = context(model)
    for layer, expected in zip(cache.layers, select(context(model), KEPT).layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)


def test_the_prefill_itself_is_not_affected(model):
    plain = run(model, ids())
    with kv(model, lambda keys, values, at: (keys * 0, values * 0)):
        assert torch.equal(run(model, ids(), past_key_values=DynamicCache()), plain)


def test_generation_after_pruning_equals_the_knock_out_oracle(model):
    prompt = ids(1)[:, :SEEN]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with kv(model, keep(KEPT)):
        pruned = model.generate(prompt, **settings)

    def knock_out(x, at):
        later = at.query_positions[:, None] >= SEEN
        return x.masked_fill(later & torch.isin(at.key_positions, torch.tensor([1, 4, 5, 6, 8])), -torch.inf)

    with attend(model, scores=knock_out):
        assert torch.equal(pruned, model.generate(prompt, **settings))


def test_functions_are_told_where_and_when_and_decoding_only_on_request():
    model, calls = tiny.build("llama"), []
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with kv(model, lambda keys, values, at: calls.append((at.layer, at.past, at.new, at.decoding)), layers=[2]):
        model.generate(ids(), **settings)
    assert calls == [(2, 0, 13, False)]
    calls.clear()
    with kv(model, lambda keys, values, at: calls.append((at.layer, at.past, at.new)), layers=[-1], decoding=True):
        model.generate(ids(), **settings)
    assert calls == [(3, 0, 13), (3, 13, 1), (3, 14, 1)]


def test_a_window_kept_while_decoding_stays_that_long():
    model = tiny.build("llama")

    def sink_and_recent(keys, values, at):
        kept = [0, *range(keys.shape[2] - 4, keys.shape[2])]
        return keys[:, :, kept], values[:, :, kept]

    cache = DynamicCache()
    with kv(model, sink_and_recent, decoding=True):
        model.generate(ids(), past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [layer.keys.shape[2] for layer in cache.layers] == [5] * 4


def test_nested_edits_act_outermost_first():
    model = tiny.build("llama")
    with kv(model, keep([0, 2, 4, 6])), kv(model, keep([1, 3])):
        cache = context(model)
    for layer, expected in zip(cache.layers, select(context(model), [2, 6]).layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)


def test_attention_read_in_the_same_layer_can_choose_what_is_kept():
    model, paid = tiny.build("llama"), {}

    def most_attended(keys, values, at):
        places = paid[at.layer].sum(1).topk(3).indices.sort().values[:, None, :, None]
        return torch.take_along_dim(keys, places, 2), torch.take_along_dim(values, places, 2)

    with attend(model, probs=lambda x, at: paid.update({at.layer: x[:, :, -1]})), kv(model, most_attended):
        assert context(model).get_seq_length() == 3


def test_calls_without_a_cache_and_cross_attention_are_left_alone():
    model, calls = tiny.build("t5"), []
    arguments = tiny.inputs(model)
    with kv(model, lambda keys, values, at: calls.append(at.layer)), torch.no_grad():
        model(**arguments, use_cache=False)
        assert calls == []
        model(**arguments, use_cache=True)
    assert calls == [0, 1, 2, 3]


def test_hooks_are_gone_afterwards_also_after_an_exception(model):
    def hooks():
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    def fail(keys, values, at):
        raise ZeroDivisionError

    context(model)
    before = hooks()
    with pytest.raises(ZeroDivisionError), kv(model, fail):
        context(model)
    assert hooks() == before


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_shortened_cache_is_not_continued_at_counted_positions(model):
    with kv(model, keep(KEPT)):
        cache = context(model)
        with pytest.raises(HookError, match="true position_ids"):
            run(model, ids()[:, SEEN:], past_key_values=cache)
        close(continued(model, cache), without(model, dropped(KEPT)))


def test_a_layer_with_a_sliding_window_is_not_shortened():
    model = tiny.build("gemma3")
    with pytest.raises(HookError, match="layer 0: it attends within a sliding window"), kv(model, keep([0, 2])):
        context(model)
    with pytest.raises(HookError, match="sliding window"), kv(model, keep([0, 2])):
        run(model, ids(), past_key_values=DynamicCache())  # a cache that does not know of the window
    with pytest.raises(HookError, match="sliding window"):
        select(context(model), KEPT)
    with pytest.raises(HookError, match="sliding window"):
        concat([context(model), context(model)])
    with kv(model, keep(KEPT), layers=[1, 3]):
        cache = context(model)
    close(continued(model, cache), without(model, dropped(KEPT), layers=[1, 3]))


def test_a_padded_batch_is_not_shortened(model):
    mask = torch.ones(2, SEEN + NEW)
    mask[0, :2] = 0
    with pytest.raises(HookError, match="padded"), kv(model, keep(KEPT)):
        run(model, ids(), attention_mask=mask, past_key_values=DynamicCache())


def test_other_caches_and_impossible_indices_are_refused():
    model = tiny.build("llama")
    cache = context(model)
    for other in (
        StaticCache(config=model.config, max_cache_len=8),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
    ):
        with pytest.raises(HookError, match="Only a DynamicCache"):
            copy(other)
    for wrong in ([SEEN], [-1], torch.ones(SEEN, dtype=torch.bool), torch.zeros(1, 1, 1, 1).long()):
        with pytest.raises(HookError, match="indices"):
            select(cache, wrong)
