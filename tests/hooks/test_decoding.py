"""Facts about caches, generation and padding."""

import copy

import pytest
import torch
from oracles import DECODERS, answer, replaced
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from midstream.errors import HookError
from midstream.hooks import Site, prune, read, readout, route, sites, write
from midstream.zoo import tiny

PROMPT, LATER = 10, 4


@pytest.fixture(params=DECODERS)
def model(request):
    return tiny.build(request.param)


def ids(model, batch=2, length=PROMPT + LATER):
    return tiny.inputs(model, batch=batch, length=length)["input_ids"]


def cached(model, tokens, **given):
    """Logits (batch, later, vocabulary) of a hand-written loop: the prompt, then one token at a time."""
    cache = DynamicCache(config=model.config)
    logits = [model(tokens[:, :PROMPT], past_key_values=cache, **given).logits[:, -1:]]
    for step in range(PROMPT, tokens.shape[1]):
        logits.append(model(tokens[:, step : step + 1], past_key_values=cache, **given).logits)
    return torch.cat(logits, dim=1), cache


def uncached(model, tokens):
    return model(tokens, use_cache=False).logits[:, PROMPT - 1 :]


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("skip", [(0,), (1,), (0, 2), (0, 1), (("attn", 0), ("mlp", 2))])
@torch.no_grad()
def test_cached_decoding_equals_uncached_with_blocks_skipped(model, skip):
    tokens = ids(model)
    with route(model, skip=skip):
        logits, cache = cached(model, tokens)
        close(logits, uncached(model, tokens))
    lengths = {cache.get_seq_length(layer) for layer in range(4)}
    assert lengths == {tokens.shape[1]}


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "opt"])
@torch.no_grad()
def test_the_naive_way_to_skip_block_0_loses_the_positions(family):
    model = tiny.build(family)
    tokens = ids(model)
    own = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.transformer.h
    own[0].forward = lambda x, *args, **kwargs: x
    naive = cached(model, tokens)[0]
    expected = uncached(model, tokens)
    assert (naive - expected).abs().max() > 1e-2
    del own[0].forward
    with route(model, skip=[0]):
        close(cached(model, tokens)[0], expected)


@torch.no_grad()
def test_cached_decoding_equals_uncached_when_stopped_early(model):
    tokens = ids(model)
    with route(model, stop=1):
        close(cached(model, tokens)[0], uncached(model, tokens))


@torch.no_grad()
def test_cached_decoding_equals_uncached_when_written_by_position(model):
    """A function that goes by `at.positions` acts on the same tokens, however they come."""
    tokens = ids(model)
    direction = torch.linspace(-2, 2, 32)
    edit = lambda x, at: x + direction * (at.positions % 3 == 0)[..., None]
    with write(model, {("out", 1): edit, ("attn", 2): edit, ("mlp", 2): edit, ("in", 3): edit}):
        close(cached(model, tokens)[0], uncached(model, tokens))


@pytest.mark.parametrize("at", [0, 1, 2])
@torch.no_grad()
def test_cached_decoding_equals_uncached_with_the_prompt_pruned(model, at):
    tokens = ids(model)
    kept = torch.tensor([[0, 3, 4, 9], [0, 1, 7, 9]])  # of 10, by item
    later = torch.arange(PROMPT, tokens.shape[1]).expand(2, -1)
    with prune(model, at, lambda x: torch.cat([kept, later], dim=1)):
        expected = uncached(model, tokens)
    with prune(model, at, lambda x: kept):
        logits, cache = cached(model, tokens)
    close(logits, expected)
    if cache.layers[at + 1].is_sliding:
        return
    assert [cache.layers[layer].keys.shape[2] for layer in (at, at + 1)][1] == 4 + LATER


@torch.no_grad()
def test_two_prunings_compose_in_the_order_of_their_blocks_whichever_was_opened_first(model):
    tokens = ids(model)
    first = (model, 0, lambda x: torch.arange(0, x.shape[1], 2))
    second = (model, 2, lambda x: torch.tensor([0, 1, x.shape[1] - 1]))
    with prune(*first), prune(*second), read(model) as one:
        a = answer(model, {"input_ids": tokens})
    with prune(*second), prune(*first), read(model) as other:
        b = answer(model, {"input_ids": tokens})
    assert torch.equal(a, b)
    assert [x.shape[1] for x in one] == [x.shape[1] for x in other] == [7, 7, 3, 14]
    with prune(*first), prune(*second):
        close(cached(model, tokens)[0][:, 0], cached(model, tokens[:, :PROMPT])[0][:, 0])


@torch.no_grad()
def test_generate_holds_under_every_primitive(model):
    prompt = ids(model, length=PROMPT)
    direction = torch.linspace(-1, 1, 32)
    contexts = {
        "read": read(model),
        "write": write(model, {("out", 1): lambda x, at: x + direction}),
        "skip": route(model, skip=[0, 2]),
        "stop": route(model, stop=2),
        "prune": prune(model, 1, lambda x: torch.tensor([0, 2, 5, 8, 9])),
    }
    for context in contexts.values():
        with context:
            generated = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
            logits, _ = cached(model, generated)
        assert torch.equal(logits[:, :-1].argmax(-1), generated[:, PROMPT:])


@torch.no_grad()
def test_reading_tells_prefill_from_decoding_and_keeps_every_forward(model):
    prompt = ids(model, length=PROMPT)
    with read(model, keep=lambda x: x[:, -1]) as last, read(model, "embed") as embedded:
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [forward.past for forward in last.forwards] == [0, 10, 11, 12]
    assert [forward.decoding for forward in last.forwards] == [False, True, True, True]
    assert [forward[0].shape[1] for forward in embedded.forwards] == [10, 1, 1, 1]
    assert [forward.past for forward in embedded.forwards] == [0, 10, 11, 12]
    with read(model) as whole:
        model(generated[:, :-1], use_cache=False)
    close(last.forwards[-1][2], whole[2][:, -1])
    last.clear()
    with pytest.raises(HookError, match="nothing was read"):
        last[2]


@torch.no_grad()
def test_a_reading_of_deep_blocks_knows_its_own_forward_after_one_of_shallow_blocks(model):
    tokens = ids(model)
    with read(model, layers=[0]) as shallow:
        cached(model, tokens)
    with read(model, layers=[2]) as deep:
        cached(model, tokens)
    pasts = [[forward.past for forward in reading.forwards] for reading in (shallow, deep)]
    assert pasts == [[0, 10, 11, 12, 13]] * 2


@torch.no_grad()
def test_a_prefill_can_be_patched_and_decoding_left_alone(model):
    tokens = ids(model)
    seen = []

    def patch(x, at):
        seen.append((at.decoding, tuple(at.positions[0].tolist())))
        return x if at.decoding else torch.zeros_like(x)

    with write(model, {("out", 0): patch}):
        cached(model, tokens)
    assert seen == [(False, tuple(range(10))), *((True, (place,)) for place in range(10, 14))]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_equal_single_runs(model, side):
    tokens, length = ids(model, length=12), 8
    pad = torch.zeros(1, 4, dtype=torch.long)
    short = torch.cat([pad, tokens[:1, :length]] if side == "left" else [tokens[:1, :length], pad], dim=1)
    batch = torch.cat([short, tokens[1:]])
    mask = torch.ones_like(batch)
    mask[0, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    real = slice(4, 12) if side == "left" else slice(0, 8)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kept = torch.tensor([[0, 3, 7], [0, 3, 7]])
    offset = torch.tensor([[real.start], [0]])
    direction = torch.linspace(-2, 2, 32)
    steer = {("out", 0): lambda x, at: x + direction * (at.positions == 3)[..., None]}

    def values(places, **given):
        with read(model) as out, write(model, steer), route(model, skip=[1]), prune(model, 2, lambda x: places):
            return out, model(**given, use_cache=False).logits

    padded, logits = values(kept + offset, input_ids=batch, attention_mask=mask, position_ids=positions)
    single, expected = values(kept[:1], input_ids=tokens[:1, :length])
    close(padded[0][0, real], single[0][0])
    close(padded[2][0], single[2][0])
    close(logits[0, real], expected[0])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_decode_as_single_runs_after_pruning(side):
    for family in ("gpt2", "llama", "qwen3"):
        model = tiny.build(family)
        tokens = ids(model)
        mask = torch.ones_like(tokens)
        mask[0, slice(0, 3) if side == "left" else slice(7, 10)] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        kept = torch.tensor([[3, 5, 9], [0, 2, 9]] if side == "left" else [[0, 3, 6], [0, 2, 9]])
        cache = DynamicCache(config=model.config)
        with prune(model, 1, lambda x, kept=kept: kept):
            model(tokens[:, :10], attention_mask=mask[:, :10], position_ids=positions[:, :10], past_key_values=cache)
            later = {"attention_mask": mask, "position_ids": positions[:, 10:]}
            padded = model(tokens[:, 10:], past_key_values=cache, **later).logits
        alone = tokens[:1, mask[0].bool()]
        cache = DynamicCache(config=model.config)
        with prune(model, 1, lambda x, left=side == "left": torch.tensor([0, 2, 6] if left else [0, 3, 6])):
            model(alone[:, :7], past_key_values=cache)
            single = model(alone[:, 7:], past_key_values=cache).logits
        close(padded[:1], single)


@torch.no_grad()
def test_self_speculation_drafts_crops_and_verifies_to_the_same_tokens(model):
    """Drafting with blocks left out on the model's own cache leaves no trace once the cache is cropped."""
    tokens = ids(model, batch=1, length=5)  # within Gemma's window, past which its cache cannot be cropped
    cache = DynamicCache(config=model.config)
    model(tokens[:, :3], past_key_values=cache)
    with route(model, skip=[0, 2]):
        for step in (3, 4):
            model(tokens[:, step : step + 1], past_key_values=cache)
    cache.crop(-2)
    verified = model(tokens[:, 3:], past_key_values=cache).logits
    close(verified, model(tokens, use_cache=False).logits[:, 3:])


@torch.no_grad()
def test_a_block_refuses_to_attend_to_what_it_did_not_see(model):
    tokens = ids(model, length=5)
    cache = DynamicCache(config=model.config)
    with route(model, stop=1):
        model(tokens[:, :4], past_key_values=cache)
    untouched = copy.deepcopy(cache)
    with pytest.raises(HookError, match="block 2 would attend"), route(model, stop=2):
        model(tokens[:, 4:], past_key_values=cache)
    assert model(tokens[:, 4:], past_key_values=untouched).logits.isnan().any()  # it shows where nothing refuses


@torch.no_grad()
def test_exits_may_differ_from_token_to_token_with_propagation(model):
    """Each token's state at its exit is what later blocks make keys and values of (CALM)."""
    tokens = ids(model, batch=1, length=5)
    exits = [1, 3, 0, 2, 3]
    cache = DynamicCache(config=model.config)
    got = []
    for step, last in enumerate(exits):
        with route(model, stop=lambda block, x, last=last: block >= last, propagate=True):
            got.append(model(tokens[:, step : step + 1], past_key_values=cache).logits)

    def hold(x, at):  # all at once, each token's stream held still after its exit
        exited = torch.tensor([at.layer > last for last in exits])
        return torch.where(exited[None, :, None], held.forwards[-1][at.layer - 1], x)

    with read(model) as held, write(model, {("out", block): hold for block in (1, 2, 3)}):
        close(torch.cat(got, dim=1), model(tokens, use_cache=False).logits)


@torch.no_grad()
def test_t5_decodes_as_uncached_with_its_first_block_skipped_or_pruned_prompts():
    model = tiny.build("t5")
    inputs = tiny.inputs(model, length=9)
    tokens = torch.randint(4, 120, (2, 6), generator=torch.Generator().manual_seed(3))
    encoded = model.encoder(inputs["input_ids"])

    def loop():
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        steps = [tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]]
        return torch.cat(
            [model(decoder_input_ids=s, encoder_outputs=encoded, past_key_values=cache).logits for s in steps], dim=1
        )

    def whole():
        return model(decoder_input_ids=tokens, encoder_outputs=encoded, use_cache=False).logits

    for context in (lambda: route(model, skip=[0, 2]), lambda: route(model, stop=1), lambda: read(model)):
        with context():
            close(loop(), whole())
    with prune(model, 1, lambda x: torch.tensor([0, 2, 4, 5]) if x.shape[1] == 6 else torch.tensor([0, 2])):
        close(loop()[:, 4:], whole()[:, 4:])


@torch.no_grad()
def test_pruning_refuses_what_it_cannot_match():
    model = tiny.build("llama")
    tokens = ids(model)
    half = lambda x: torch.arange(0, x.shape[1], 2)
    with prune(model, 1, half):
        with pytest.raises(HookError, match="a cache that grows"):
            model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=20))
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(HookError, match="cropped or edited"):
            model(tokens[:, :1], past_key_values=cache)
    for wrong in ([0, 0, 1], [0, 14], [-1, 2]):
        with pytest.raises(HookError, match="each place once"), prune(model, 1, lambda x, w=wrong: torch.tensor(w)):
            model(tokens)
    with pytest.raises(HookError, match="integer places"), prune(model, 1, lambda x: x[0, :, 0] > 0):
        model(tokens)
    with pytest.raises(HookError, match="no block follows"), prune(model, 3, half):
        pass


@torch.no_grad()
def test_pruning_refuses_an_argument_of_unknown_meaning_along_the_tokens():
    model = tiny.build("llama")  # whose blocks are handed what a call adds
    with pytest.raises(HookError, match="token_weights"), prune(model, 1, lambda x: torch.arange(3)):
        model(ids(model), token_weights=torch.ones(2, 14))


@torch.no_grad()
def test_confidence_can_be_read_out_inside_stop(model):
    """A readout inside a forward disturbs neither it nor what is being read."""
    tokens = ids(model)
    asked = []

    def confident(block, x):
        asked.append(readout(model, x[:, -1]).softmax(-1).amax(-1))
        return block == 2

    with read(model) as out, route(model, stop=confident):
        logits = model(tokens).logits
    assert len(asked) == 3
    assert len(out.forwards) == 1
    with route(model, stop=2):
        assert torch.equal(model(tokens).logits, logits)
    close(asked[2], logits[:, -1].softmax(-1).amax(-1), 1e-6)


@torch.no_grad()
def test_soft_prompts_by_inputs_embeds_and_by_a_write_at_embed_agree(model):
    tokens = ids(model)
    prompt = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(5))
    embeddings = model.get_input_embeddings()(tokens)
    expected = model(inputs_embeds=torch.cat([prompt, embeddings[:, 3:]], dim=1)).logits
    with write(model, {"embed": lambda x, at: torch.cat([prompt, x[:, 3:]], dim=1)}):
        assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
def test_skipping_equals_its_oracle_in_generation(model):
    prompt = ids(model, length=PROMPT)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with replaced([sites(model).blocks()[0], sites(model).blocks()[2]]):
        expected = model.generate(prompt, **arguments)
    with route(model, skip=[0, 2]):
        assert torch.equal(model.generate(prompt, **arguments), expected)


def test_llava_generates_alike_with_image_tokens_pruned_from_prompt_and_from_an_uncached_run():
    model = tiny.build("llava")
    inputs = tiny.inputs(model)
    kept = torch.cat([torch.arange(0, 16, 4), torch.arange(16, 28)])
    with torch.no_grad(), prune(model, 1, lambda x: torch.cat([kept, torch.arange(28, x.shape[1])])):
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        whole = inputs | {"input_ids": generated, "attention_mask": torch.ones_like(generated)}
        logits = model(**whole, use_cache=False).logits
    assert torch.equal(logits[:, 27:-1].argmax(-1), generated[:, 28:])
    assert Site("text", 1, "out") in list(sites(model))
