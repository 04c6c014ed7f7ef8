"""Facts about hooks on LLaVA-1.5's own shape in miniature: two unequal stacks, images in a padded batch.

The tower is read at its last block but one without its first token, a projector of two layers follows, and each image
token of the prompt gives its place to one patch. One prompt has one image, the other has two.
"""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import transformers as hf
from oracles import assert_same_state, knocked_out, replaced, state

from midstream.errors import HookError
from midstream.hooks import Site, attend, kv, prune, read, readout, route, sites, write
from midstream.zoo import tiny, tiny_tokenizer

IMAGE = 3  # the id of <image>
PATCHES = 16  # 4 by 4 of 14 by 14 pixels
VISION_BLOCKS, TEXT_BLOCKS = 5, 4
READ_AT = VISION_BLOCKS - 2  # the tower's last block but one, as vision_feature_layer=-2 says
NEW = 4
PROMPTS = ["USER: <image>\nWhat is it? ASSISTANT:", "USER: <image> and <image>\nWhich is larger? ASSISTANT:"]


def build(**changes):
    """A random model; the tower has 5 blocks of width 24, the language model 4 of width 32."""
    vision = hf.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=VISION_BLOCKS,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        projection_dim=16,
    )
    text = hf.LlamaConfig(
        vocab_size=len(tiny_tokenizer.build("llava")),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=TEXT_BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    shape = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    shape |= {"vision_config": vision, "text_config": text, "image_token_index": IMAGE, "image_seq_length": PATCHES}
    config = hf.LlavaConfig(**shape | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config)
        tiny._spread(model)
    return model.eval()


def processor(class_tokens=1):
    """LLaVA's own processor, which writes one image token a patch; padding on the left."""
    tokenizer = tiny_tokenizer.build("llava")
    tokenizer.padding_side = "left"
    size = {"shortest_edge": 56}
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(size=size, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=class_tokens,
        image_token="<image>",
    )


def batch(prompts=tuple(PROMPTS), class_tokens=1, first=0):
    """Model inputs of prompts, their images drawn one after the other, counted from `first`."""
    count = sum(prompt.count("<image>") for prompt in prompts)
    drawn = [np.random.default_rng(first + i).integers(0, 255, (60, 70, 3), dtype=np.uint8) for i in range(count)]
    made = processor(class_tokens)(images=drawn, text=list(prompts), padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture
def model():
    return build()


@pytest.fixture(scope="module")
def inputs():
    return batch()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def generate(model, inputs, **more):
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **arguments | more)


def uncached(model, inputs, generated):
    """Logits of a single run over what was generated."""
    added = torch.ones(len(generated), generated.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], added], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = inputs | {"input_ids": generated, "attention_mask": mask, "position_ids": positions}
    return model(**whole, use_cache=False).logits


def is_image(inputs):
    return inputs["input_ids"] == IMAGE


def merged(model, features, inputs):
    """The text model's answer to patches given as `features` (images, tokens, 24), put into place by hand."""
    patches = model.model.multi_modal_projector(features).flatten(0, 1)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[is_image(inputs)] = patches
    return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits


# --- where things are ---


def test_the_processor_writes_one_image_token_a_patch_and_the_shorter_prompt_is_padded(inputs):
    assert is_image(inputs).sum(1).tolist() == [PATCHES, 2 * PATCHES]
    assert inputs["attention_mask"][:, 0].tolist() == [0, 1]
    assert len(inputs["pixel_values"]) == 3


def test_the_two_stacks_have_their_own_depth_and_their_own_modules(model):
    places = sites(model)
    assert {name: len(stack) for name, stack in places.stacks.items()} == {"vision": VISION_BLOCKS, "text": TEXT_BLOCKS}
    assert places.stack().name == "text"
    assert places.blocks("vision") == list(model.model.vision_tower.encoder.layers)
    assert places.blocks() == list(model.model.language_model.layers)
    assert places.module(Site("text", 2, "attn")) is model.model.language_model.layers[2].self_attn.o_proj
    assert places.module(Site("vision", 2, "mlp")) is model.model.vision_tower.encoder.layers[2].mlp.fc2
    assert places.module(Site("text", 0, "embed")) is model.get_input_embeddings()
    assert len(list(places)) == 1 + 4 * VISION_BLOCKS + 1 + 4 * TEXT_BLOCKS
    with pytest.raises(HookError, match="no block 4 in stack 'text', which has 4"):
        places.site(("out", 4))


# --- reading ---


def test_the_tower_has_one_row_an_image_and_the_text_one_a_prompt(model, inputs):
    plain = model(**inputs).logits
    with read(model, stack="vision") as tower, read(model) as text:
        assert torch.equal(model(**inputs).logits, plain)
    assert tower[0].shape == (3, 1 + PATCHES, 24)
    assert text[0].shape == (*inputs["input_ids"].shape, 32)


def test_what_is_read_equals_what_the_model_records_itself(model, inputs):
    with read(model, stack="vision") as tower, read(model, "in", stack="vision") as into, read(model) as text:
        recorded = model(**inputs, output_hidden_states=True).hidden_states
    own = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.equal(into[0], own[0])
    assert all(torch.equal(tower[block], own[block + 1]) for block in range(VISION_BLOCKS))
    assert all(torch.equal(text[block], recorded[block + 1]) for block in range(TEXT_BLOCKS - 1))


def test_patches_enter_the_text_after_its_embedding(model, inputs):
    """`embed` still holds the placeholder's embedding at every image token; the first `in` holds the patch."""
    with (
        read(model, stack="vision") as tower,
        read(model, "embed") as embedded,
        read(model, "in", layers=[0]) as into,
    ):
        model(**inputs)
    patches = model.model.multi_modal_projector(tower[READ_AT][:, 1:]).flatten(0, 1)
    placeholder = model.get_input_embeddings().weight[IMAGE]
    assert torch.equal(into[0][is_image(inputs)], patches)
    assert torch.equal(embedded[0][is_image(inputs)], placeholder.expand_as(patches))
    assert torch.equal(into[0][~is_image(inputs)], embedded[0][~is_image(inputs)])


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [(-2, [3]), (-1, [4]), (3, [2]), ([-2, -4], [3, 1])],
)
def test_hidden_state_n_of_the_tower_is_what_block_n_minus_1_puts_out(asked, blocks, inputs):
    model = build(vision_feature_layer=asked)
    with read(model, stack="vision") as tower:
        logits = model(**inputs).logits
    features = torch.cat([tower[block][:, 1:] for block in blocks], dim=-1)
    torch.testing.assert_close(merged(model, features, inputs), logits, atol=1e-6, rtol=0)


def test_the_tower_runs_in_the_prefill_alone(model, inputs):
    with read(model, stack="vision") as tower, read(model) as text:
        generate(model, inputs)
    assert [(forward.past, sorted(forward)) for forward in tower.forwards] == [(0, list(range(VISION_BLOCKS)))]
    tokens = inputs["input_ids"].shape[1]
    assert [forward.past for forward in text.forwards] == [0, tokens, tokens + 1, tokens + 2]
    assert [forward[3].shape[1] for forward in text.forwards] == [tokens, 1, 1, 1]


def test_a_call_without_an_image_runs_the_text_alone(model, inputs):
    words = batch(["USER: What is it? ASSISTANT:"]) | {"pixel_values": None}
    with read(model, stack="vision") as tower, read(model) as text:
        model(**inputs)
        model(**words)
        model(**inputs)
    assert (len(tower.forwards), len(text.forwards)) == (2, 3)


# --- writing ---


def test_an_edit_of_the_tower_reaches_the_text_up_to_the_block_that_is_read(model, inputs):
    plain = model(**inputs).logits
    for block in range(VISION_BLOCKS):
        with write(model, {Site("vision", block, "out"): lambda x, at: x * 2 + torch.linspace(-1, 1, 24)}):
            edited = model(**inputs).logits
        assert torch.equal(edited, plain) == (block > READ_AT)


def test_the_class_token_reaches_the_text_only_through_attention(model, inputs):
    plain = model(**inputs).logits

    def edited(block):
        def fn(x, at):
            return torch.cat([x[:, :1] + 3, x[:, 1:]], dim=1)

        with write(model, {Site("vision", block, "out"): fn}):
            return model(**inputs).logits

    assert torch.equal(edited(READ_AT), plain)
    assert not torch.equal(edited(READ_AT - 1), plain)


def test_an_edit_of_one_image_moves_no_prompt_but_its_own(model, inputs):
    plain = model(**inputs).logits
    real = inputs["attention_mask"].bool()

    def fn(x, at):
        return torch.cat([x[:1] + torch.linspace(-3, 3, 24), x[1:]])

    with write(model, {Site("vision", 1, "out"): fn}):
        edited = model(**inputs).logits
    assert torch.equal(edited[1], plain[1])
    assert not torch.allclose(edited[0, -1], plain[0, -1], atol=1e-3)
    before = is_image(inputs)[0].int().argmax()
    assert torch.equal(edited[0, :before][real[0, :before]], plain[0, :before][real[0, :before]])


def test_an_edit_of_image_tokens_at_embed_is_overwritten_by_the_patches(model, inputs):
    plain = model(**inputs).logits
    image = is_image(inputs)[..., None]
    with write(model, {"embed": lambda x, at: torch.where(image, x + 5, x)}):
        assert torch.equal(model(**inputs).logits, plain)
    with write(model, {("in", 0): lambda x, at: torch.where(image, x + torch.linspace(-3, 3, 32), x)}):
        assert not torch.allclose(model(**inputs).logits, plain, atol=1e-3)


def test_patches_written_at_the_first_block_equal_patches_of_other_images(model, inputs):
    others = batch(first=7)
    with read(model, "in", layers=[0]) as into:
        expected = model(**others).logits
    patched = into[0][is_image(others)]

    def swap(x, at):
        return x.masked_scatter(is_image(inputs)[..., None], patched)

    with write(model, {("in", 0): swap}):
        assert torch.equal(model(**inputs).logits, expected)


def test_positions_of_a_padded_prompt_are_true_in_generation(model, inputs):
    seen = []

    def look(x, at):
        seen.append((at.past, at.positions[0].tolist(), at.positions[1].tolist()))
        return x

    with write(model, {("out", 1): look}):
        generate(model, inputs)
    length, tokens = inputs["attention_mask"].sum(1).tolist(), inputs["input_ids"].shape[1]
    assert seen[0][1][-length[0] :] == list(range(length[0]))
    assert seen[0][2] == list(range(length[1]))
    assert seen[1:] == [(tokens + i, [length[0] + i], [length[1] + i]) for i in range(NEW - 1)]


def test_in_the_tower_a_position_is_a_patch(model, inputs):
    seen = []

    def look(x, at):
        seen.append(at)
        return x

    with write(model, {Site("vision", 2, "out"): look}):
        generate(model, inputs)
    [at] = seen
    assert (at.stack, at.layer, at.past, at.decoding) == ("vision", 2, 0, False)
    assert at.positions.tolist() == [list(range(1 + PATCHES))]


# --- attention ---


def test_attention_is_seen_in_each_stack_by_itself(model, inputs):
    plain = generate(model, inputs)
    seen = {}

    def look(weights, at):
        seen.setdefault(at.stack, []).append((at.layer, at.past, tuple(weights.shape), weights))

    with attend(model, probs=look, stack="vision"), attend(model, probs=look):
        assert torch.equal(generate(model, inputs), plain)
    tokens = inputs["input_ids"].shape[1]
    assert [each[:3] for each in seen["vision"]] == [
        (layer, 0, (3, 3, 1 + PATCHES, 1 + PATCHES)) for layer in range(VISION_BLOCKS)
    ]
    first, second = seen["text"][0], seen["text"][TEXT_BLOCKS]
    assert first[:3] == (0, 0, (2, 4, tokens, tokens))
    assert second[:3] == (0, tokens, (2, 4, 1, tokens + 1))
    assert len(seen["text"]) == TEXT_BLOCKS * NEW
    assert (seen["vision"][0][3] > 0).all()  # every patch looks at every other
    assert (first[3].triu(1) == 0).all()
    padded = inputs["attention_mask"] == 0
    assert (first[3][0][:, ~padded[0]][..., padded[0]] == 0).all()


def test_attention_equals_what_the_model_gives_out_itself(model, inputs):
    model.set_attn_implementation("eager")
    seen = []
    with attend(model, probs=lambda weights, at: seen.append(weights) or None):
        own = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(seen, own, strict=True):
        for row in range(2):
            torch.testing.assert_close(ours[row][:, real[row]], theirs[row][:, real[row]], atol=1e-6, rtol=0)


def cut_off(model, inputs, layers):
    """In some layers of the text, no word sees an image token."""
    image = is_image(inputs)

    def cut(scores, at):
        keys = torch.zeros(2, at.key_positions.shape[0], dtype=torch.bool)
        keys[:, : image.shape[1]] = image
        words = ~keys[:, at.query_positions]
        return scores.masked_fill(words[:, None, :, None] & keys[:, None, None], -torch.inf)

    return attend(model, scores=cut, layers=layers)


def words_only(inputs):
    """Places (2, kept) of everything but images; the row with fewer image tokens loses as much padding."""
    image = is_image(inputs)
    most = int(image.sum(1).max())
    places = []
    for row in range(2):
        padding = (inputs["attention_mask"][row] == 0).nonzero().flatten()
        dropped = torch.cat([image[row].nonzero().flatten(), padding[: most - int(image[row].sum())]])
        assert len(dropped) == most
        places.append(torch.tensor([at for at in range(image.shape[1]) if at not in set(dropped.tolist())]))
    return torch.stack(places)


# --- pruning visual tokens ---


@pytest.fixture(scope="module")
def balanced():
    """Two prompts of other lengths with one image each, so that each loses as many tokens."""
    return batch(["USER: <image>\nWhat is it? ASSISTANT:", "USER: Look at this <image>\nWhich is larger? ASSISTANT:"])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_pruning_all_patches_equals_hiding_them_from_every_word_later_on(model, balanced, at):
    kept = words_only(balanced)
    with cut_off(model, balanced, range(at + 1, TEXT_BLOCKS)):
        expected = model(**balanced).logits
    with prune(model, at, lambda x: kept):
        pruned = model(**balanced).logits
    real = balanced["attention_mask"].bool() & ~is_image(balanced)
    torch.testing.assert_close(pruned[real], expected[real], atol=1e-5, rtol=0)
    assert not torch.allclose(pruned[:, -1], model(**balanced).logits[:, -1], atol=1e-3)


def some_patches(inputs, share=4):
    """Places (2, kept) of all words and of every fourth patch, one row for each prompt."""
    image = is_image(inputs)
    order = image.cumsum(1)
    keep = ~image | (order % share == 0)
    return torch.stack([row.nonzero().flatten() for row in keep])


def test_survivors_of_pruned_patches_equal_those_of_a_run_where_nothing_sees_the_dropped(model, balanced):
    kept = some_patches(balanced)
    with read(model, layers=[2]) as plain:
        model(**balanced)
    with knocked_out(model, "text", 1, kept, causal=True), read(model, layers=[2, 3]) as expected:
        model(**balanced)
    with prune(model, 1, lambda x: kept), read(model, layers=[2, 3]) as pruned:
        model(**balanced)
    index = kept[..., None].expand(-1, -1, 32)
    real = balanced["attention_mask"].bool().gather(1, kept)
    assert pruned[2].shape[1] == kept.shape[1] < plain[2].shape[1]
    torch.testing.assert_close(pruned[2][real], expected[2].gather(1, index)[real], atol=1e-5, rtol=0)
    whole = expected[3].gather(1, index)[real]
    torch.testing.assert_close(pruned[3].gather(1, index)[real], whole, atol=1e-5, rtol=0)  # put back in its place


def test_pruned_generation_in_a_padded_batch_equals_an_uncached_run(model, balanced):
    kept, tokens = some_patches(balanced), balanced["input_ids"].shape[1]

    def select(x):
        later = torch.arange(tokens, x.shape[1]).expand(2, -1)
        return torch.cat([kept, later], dim=1)

    with prune(model, 1, select):
        generated = generate(model, balanced)
        logits = uncached(model, balanced, generated)
    assert torch.equal(logits[:, tokens - 1 : -1].argmax(-1), generated[:, tokens:])
    with prune(model, 1, select):
        assert torch.equal(generate(model, balanced), generated)


def test_a_pruned_prompt_generates_alike_alone_and_beside_a_longer_one(model, balanced):
    kept, tokens = some_patches(balanced), balanced["input_ids"].shape[1]
    with prune(model, 1, lambda x: kept):
        together = generate(model, balanced)[:, tokens:]
    for row in range(2):
        real = balanced["attention_mask"][row].bool()
        one = {name: balanced[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        one["pixel_values"] = balanced["pixel_values"][row : row + 1]
        places = some_patches(one)
        with prune(model, 1, lambda x, places=places: places):
            assert torch.equal(generate(model, one)[0, -NEW:], together[row])


def test_later_blocks_keep_survivors_only_in_the_cache(model, balanced):
    kept, tokens = some_patches(balanced), balanced["input_ids"].shape[1]
    with prune(model, 1, lambda x: kept):
        cache = model(**balanced, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [tokens, tokens, kept.shape[1], kept.shape[1]]


def test_pruned_patches_are_gone_from_attention_at_their_true_places(model, balanced):
    seen = []

    def look(weights, at):
        seen.append((at.layer, weights.shape[-1], at.position_ids))

    kept = some_patches(balanced)
    with prune(model, 1, lambda x: kept), attend(model, probs=look):
        model(**balanced, position_ids=(balanced["attention_mask"].cumsum(1) - 1).clamp(min=0))
    tokens = balanced["input_ids"].shape[1]
    assert [(layer, keys) for layer, keys, _ in seen] == [
        (0, tokens),
        (1, tokens),
        (2, kept.shape[1]),
        (3, kept.shape[1]),
    ]
    assert torch.equal(seen[2][2], (balanced["attention_mask"].cumsum(1) - 1).clamp(min=0).gather(1, kept))


# --- pruning in the tower ---


def test_patches_pruned_in_the_tower_come_back_to_their_places_for_the_text(model, inputs):
    kept = torch.tensor([0, 2, 5, 9, 16])
    with knocked_out(model, "vision", 1, kept[None], causal=False), read(model, stack="vision") as expected:
        model(**inputs)
    with read(model, stack="vision") as plain:
        model(**inputs)
    with prune(model, 1, lambda x: kept, stack="vision"), read(model, stack="vision") as tower:
        logits = model(**inputs).logits
    assert tower[READ_AT].shape == (3, 5, 24)
    torch.testing.assert_close(tower[READ_AT], expected[READ_AT][:, kept], atol=1e-5, rtol=0)
    features = plain[1].clone()
    features[:, kept] = tower[READ_AT]
    torch.testing.assert_close(merged(model, features[:, 1:], inputs), logits, atol=1e-5, rtol=0)


def test_patches_that_do_not_come_back_are_missed_by_the_prompt(model, inputs):
    model(**inputs)  # transformers' recorders in the tower stay from the first call on
    before = state(model)
    with (
        pytest.raises(ValueError, match="Image features and image tokens do not match"),
        prune(model, 1, lambda x: torch.arange(9), restore=False, stack="vision"),
    ):
        model(**inputs)
    assert_same_state(before, state(model))


def test_fewer_patches_with_as_many_image_tokens_are_read_by_the_text(model, inputs):
    """A prompt that is written for the patches that stay: shorter for the text from its first block on."""
    kept = torch.tensor([0, 3, 6, 9, 12])
    mask = is_image(inputs)
    order = torch.where(mask, (mask.cumsum(1) - 1) % PATCHES + 1, 0)
    rows = [(~mask[row] | torch.isin(order[row], kept[1:])) for row in range(2)]
    short = [inputs["input_ids"][row, rows[row]] for row in range(2)]
    width = max(map(len, short))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in short])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": inputs["pixel_values"]}
    with (
        prune(model, 1, lambda x: kept, restore=False, stack="vision"),
        read(model, stack="vision") as tower,
        read(model, "in", layers=[0]) as into,
    ):
        model(**given)
    patches = model.model.multi_modal_projector(tower[READ_AT][:, 1:]).flatten(0, 1)
    assert torch.equal(into[0][ids == IMAGE], patches)


# --- routing ---


@pytest.mark.parametrize("skipped", [(0,), (1, 2), (READ_AT,), (VISION_BLOCKS - 1,)])
def test_skipping_blocks_of_the_tower_equals_throwing_their_work_away(model, inputs, skipped):
    plain = model(**inputs).logits
    with replaced(sites(model).blocks("vision")[block] for block in skipped):
        expected = generate(model, inputs)
    with route(model, skip=skipped, stack="vision"):
        assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(model(**inputs).logits, plain) == (skipped == (VISION_BLOCKS - 1,))


@pytest.mark.parametrize("last", range(VISION_BLOCKS))
def test_a_tower_that_stops_early_hands_on_the_block_it_stopped_at(model, inputs, last):
    with read(model, stack="vision") as tower:
        model(**inputs)
    with route(model, stop=last, stack="vision"):
        stopped = model(**inputs).logits
    features = tower[min(last, READ_AT)][:, 1:]
    torch.testing.assert_close(merged(model, features, inputs), stopped, atol=1e-6, rtol=0)


def test_skipping_blocks_of_the_text_in_generation_equals_throwing_their_work_away(model, inputs):
    with replaced(sites(model).blocks()[block] for block in (1, 2)):
        expected = generate(model, inputs)
    with route(model, skip=[1, 2]):
        assert torch.equal(generate(model, inputs), expected)


# --- readout and the cache ---


@pytest.mark.parametrize("last", range(TEXT_BLOCKS))
def test_a_readout_of_the_text_equals_a_run_that_stops_there(model, inputs, last):
    with read(model) as text:
        plain = model(**inputs).logits
    with route(model, stop=last):
        stopped = model(**inputs).logits
    assert torch.equal(readout(model, text[last]), stopped)
    torch.testing.assert_close(readout(model, text[last][:, -1]), stopped[:, -1], atol=1e-6, rtol=0)
    assert torch.equal(stopped, plain) == (last == TEXT_BLOCKS - 1)


def test_a_readout_of_the_patches_without_an_image_is_refused(model, inputs):
    with read(model, stack="vision") as patches:
        model(**inputs)
    with pytest.raises(HookError, match="ran no block of the stack vision"):
        readout(model, patches[0], stack="vision")


def test_an_edited_cache_of_patches_equals_attention_edited_in_every_later_call(model, balanced):
    """Values of image tokens set to zero once filled: later tokens get nothing from them, the first is as it was."""
    image = is_image(balanced)

    def forget(keys, values, at):
        return keys, values.masked_fill(image[:, None, :, None], 0)

    def silence(weights, at):
        if not at.decoding:
            return None
        gone = torch.nn.functional.pad(image, (0, weights.shape[-1] - image.shape[1]))
        return weights.masked_fill(gone[:, None, None], 0)

    with attend(model, probs=silence):
        expected = generate(model, balanced, return_dict_in_generate=True, output_logits=True)
    with kv(model, forget):
        found = generate(model, balanced, return_dict_in_generate=True, output_logits=True)
    plain = generate(model, balanced, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.logits[0], plain.logits[0])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)
    assert not torch.allclose(found.logits[1], plain.logits[1], atol=1e-3)


def test_patches_taken_out_of_the_cache_equal_patches_hidden_from_later_calls(model):
    one = batch(PROMPTS[:1])
    image = is_image(one)[0]
    tokens = len(image)

    def drop(keys, values, at):
        return keys[:, :, ~image], values[:, :, ~image]

    def hide(scores, at):
        gone = torch.nn.functional.pad(image, (0, scores.shape[-1] - tokens))
        return scores.masked_fill(gone, -torch.inf) if at.decoding else None

    token = torch.tensor([[9]])
    with attend(model, scores=hide):
        cache = model(**one, use_cache=True).past_key_values
        expected = model(token, past_key_values=cache).logits
    with kv(model, drop):
        cache = model(**one, use_cache=True).past_key_values
        assert {layer.keys.shape[2] for layer in cache.layers} == {tokens - PATCHES}
        found = model(token, past_key_values=cache, position_ids=torch.tensor([[tokens]])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_patches_are_not_taken_out_of_the_cache_of_a_padded_batch(model, balanced):
    with (
        pytest.raises(HookError, match="padded batch"),
        kv(model, lambda keys, values, at: (keys[:, :, PATCHES:], values[:, :, PATCHES:])),
    ):
        model(**balanced, use_cache=True)


def test_the_tower_has_no_cache_to_edit(model, inputs):
    called = []
    with kv(model, lambda keys, values, at: called.append(at), stack="vision", decoding=True):
        generate(model, inputs)
    assert called == []


# --- what goes wrong ---


def test_a_prompt_with_too_few_image_tokens_is_the_models_own_error_and_leaves_no_trace(model, inputs):
    model(**inputs)  # transformers' recorders in the tower stay from the first call on
    wrong = batch(class_tokens=0)  # without the class token that is dropped later: one a prompt too few
    assert is_image(wrong).sum(1).tolist() == [PATCHES - 1, 2 * (PATCHES - 1)]
    before = state(model)
    with (
        pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 45"),
        read(model) as text,
        read(model, stack="vision") as tower,
        prune(model, 1, lambda x: torch.arange(3)),
        write(model, {("out", 1): lambda x, at: x + 1}),
    ):
        model(**wrong)
    assert (len(text.forwards), len(tower.forwards)) == (0, 1)
    assert_same_state(before, state(model))


def test_after_a_failed_call_the_next_one_is_read_as_the_first(model, inputs):
    wrong = batch(class_tokens=0)
    plain = model(**inputs).logits
    with read(model) as text, read(model, stack="vision") as tower:
        with pytest.raises(ValueError, match="do not match"):
            model(**wrong)
        tower.clear()
        assert torch.equal(model(**inputs).logits, plain)
    assert (len(text.forwards), len(tower.forwards)) == (1, 1)


def test_the_model_is_as_before_after_hooks_on_both_stacks_in_generation(model, balanced):
    generate(model, balanced, output_hidden_states=True, return_dict_in_generate=True)
    before, plain = state(model), generate(model, balanced)
    kept = some_patches(balanced)
    with ExitStack() as contexts:
        for context in (
            read(model, stack="vision"),
            write(model, {Site("vision", 1, "mlp"): lambda x, at: x * 2, ("attn", 2): lambda x, at: x * 2}),
            attend(model, probs=lambda weights, at: weights, stack="vision"),
            attend(model, scores=lambda scores, at: scores, layers=[1]),
            prune(model, 1, lambda x: torch.arange(0, 17, 2), stack="vision"),
            prune(model, 2, lambda x: kept),
            route(model, skip=[3], stack="vision"),
            route(model, skip=[0]),
            kv(model, lambda keys, values, at: None),
        ):
            contexts.enter_context(context)
        assert not torch.equal(generate(model, balanced), plain)
    assert_same_state(before, state(model))
    assert torch.equal(generate(model, balanced), plain)
