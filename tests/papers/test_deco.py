"""Facts of DeCo's projector, of its rivals, of relevance through a LLaVA, and the checks of its claims."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from midstream import arena, zoo
from midstream.claims import direction
from midstream.data import shapes
from midstream.hooks import attend
from midstream.measure.relevance import Chain, Gates, accumulate, gated_places, head_mean, trace
from midstream.paper import Result
from midstream.papers.tokens import deco as paper
from midstream.train import visual_bench
from midstream.train.llava import CachedTower, Turn, ask, assemble, exact_answers, greedy, pack, tower_features
from midstream.train.projectors import Resampler, side

WIDTH, OUT = 12, 32
TOWER = SimpleNamespace(hidden_size=WIDTH, num_attention_heads=4, image_size=64, patch_size=8)


def pooled(patches: torch.Tensor, tokens: int) -> torch.Tensor:
    """What AdaptivePool hands to its MLP."""
    projector = paper.AdaptivePool(WIDTH, OUT, tokens=tokens)
    projector.mlp = nn.Identity()
    return projector(patches)


# ------------------------------------------------------------------------------------------ the pooling projector


def test_with_as_many_tokens_as_patches_it_is_the_plain_mlp_projector() -> None:
    patches = torch.randn(2, 64, WIDTH)
    projector = paper.AdaptivePool(WIDTH, OUT, tokens=64)
    torch.testing.assert_close(projector(patches), projector.mlp(patches))


def test_its_mlp_is_that_of_llava() -> None:
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    theirs = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "hidden_size": WIDTH},
            text_config={"hidden_size": OUT, "num_attention_heads": 4},
        )
    )
    ours = paper.AdaptivePool(WIDTH, OUT, tokens=64)
    for mine, name in ((ours.mlp[0], "linear_1"), (ours.mlp[2], "linear_2")):
        mine.load_state_dict(getattr(theirs, name).state_dict())
    patches = torch.randn(2, 64, WIDTH)
    torch.testing.assert_close(ours(patches), theirs(patches))
    torch.testing.assert_close(paper.around(theirs, 64)(patches), theirs(patches))
    torch.testing.assert_close(paper.around(theirs, 1)(patches)[:, 0], theirs(patches.mean(1)))


def test_one_token_is_the_mean_of_all_patches() -> None:
    patches = torch.randn(2, 64, WIDTH)
    torch.testing.assert_close(pooled(patches, 1)[:, 0], patches.mean(1))


def test_halving_the_side_averages_two_by_two_patches_row_by_row() -> None:
    patches = torch.randn(1, 24 * 24, WIDTH)
    found = pooled(patches, 12 * 12)
    for row, column in ((0, 0), (3, 7), (11, 2)):
        places = [(2 * row + down) * 24 + 2 * column + across for down in (0, 1) for across in (0, 1)]
        torch.testing.assert_close(found[0, row * 12 + column], patches[0, places].mean(0))


@pytest.mark.parametrize(("length", "cells"), [(8, 3), (24, 5), (7, 4), (5, 8)])
def test_sides_that_do_not_divide_give_overlapping_windows(length: int, cells: int) -> None:
    patches = torch.randn(1, length * length, WIDTH)
    grid, found = patches.view(length, length, WIDTH), pooled(patches, cells * cells)
    for row in range(cells):
        for column in range(cells):
            rows = slice(math.floor(row * length / cells), math.ceil((row + 1) * length / cells))
            columns = slice(math.floor(column * length / cells), math.ceil((column + 1) * length / cells))
            torch.testing.assert_close(found[0, row * cells + column], grid[rows, columns].mean((0, 1)))


@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 64])
def test_the_pooling_matrix_is_the_pooling(tokens: int) -> None:
    patches = torch.randn(2, 64, WIDTH)
    matrix = paper.pooling_matrix(tokens, 64)
    torch.testing.assert_close(matrix @ patches, pooled(patches, tokens))
    torch.testing.assert_close(matrix.sum(1), torch.ones(tokens))


def test_pooling_commutes_with_one_linear_layer_and_not_with_an_mlp() -> None:
    patches, matrix = torch.randn(2, 64, WIDTH), paper.pooling_matrix(16, 64)
    for layers, commutes in ((1, True), (2, False)):
        projector = paper.AdaptivePool(WIDTH, OUT, tokens=16, layers=layers)
        gap = (projector(patches) - matrix @ projector.mlp(patches)).abs().max()
        assert bool(gap < 1e-5) == commutes


def test_rolling_the_patches_by_one_window_rolls_the_tokens() -> None:
    grid = torch.randn(1, 8, 8, WIDTH)
    projector = paper.AdaptivePool(WIDTH, OUT, tokens=16)
    before = projector(grid.flatten(1, 2)).view(1, 4, 4, OUT)
    for shift, axis in ((1, 1), (1, 2), (-1, 2)):
        after = projector(grid.roll(2 * shift, axis).flatten(1, 2)).view(1, 4, 4, OUT)
        torch.testing.assert_close(after, before.roll(shift, axis))


def test_reading_the_grid_column_by_column_would_be_seen() -> None:
    patches = torch.randn(1, 64, WIDTH)
    turned = patches.view(1, 8, 8, WIDTH).transpose(1, 2).flatten(1, 2)
    assert (pooled(patches, 16) - pooled(turned, 16)).abs().max() > 0.1


def test_a_class_token_left_in_is_refused() -> None:
    with pytest.raises(ValueError, match="class token"):
        paper.AdaptivePool(WIDTH, OUT, tokens=16)(torch.randn(1, 65, WIDTH))


def test_compression_itself_has_no_parameters() -> None:
    sizes = {
        tokens: sum(w.numel() for w in paper.AdaptivePool(WIDTH, OUT, tokens=tokens).parameters()) for tokens in (1, 64)
    }
    assert set(sizes.values()) == {WIDTH * OUT + OUT + OUT * OUT + OUT}


# ------------------------------------------------------------------------------------------------------ the rivals


@pytest.mark.parametrize("arm", paper.ARMS)
def test_every_projector_gives_the_tokens_asked_for_and_the_width_of_the_language_model(arm: str) -> None:
    made = paper.projector(arm, TOWER, OUT, tokens=16, depth=2)
    assert made(torch.randn(2, 64, WIDTH)).shape == (2, 64 if arm == "mlp" else 16, OUT)


@pytest.mark.parametrize(
    ("arm", "blind"), [("qformer", True), ("resampler", False), ("deco", False), ("c_abstractor", False)]
)
def test_only_the_q_former_cannot_tell_in_which_order_patches_come(arm: str, blind: bool) -> None:
    made = paper.projector(arm, TOWER, OUT, tokens=16, depth=2)
    patches = torch.randn(1, 64, WIDTH)
    gap = (made(patches) - made(patches[:, torch.randperm(64)])).abs().max()
    assert bool(gap < 1e-5) == blind


def test_attention_is_that_of_torch() -> None:
    from midstream.train.projectors import Attention

    ours, theirs = Attention(WIDTH, 4), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (ours.query, ours.key, ours.value)]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    queries, context = torch.randn(2, 5, WIDTH), torch.randn(2, 9, WIDTH)
    torch.testing.assert_close(ours(queries, context), theirs(queries, context, context)[0])


# ------------------------------------------------------------------------------------------------------- relevance


def test_the_resampler_is_that_of_idefics_given_its_weights() -> None:
    """Its feed-forward has ReLU and no biases, and patches have no learned positions."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    torch.manual_seed(0)
    config = IdeficsConfig(vision_config={"embed_dim": 16})
    theirs = IdeficsPerceiverResampler(config, 16, depth=2, n_heads=4, head_dim=4, n_latents=4)
    ours = Resampler(16, 16, tokens=4, heads=4, patches=9, depth=2)
    with torch.no_grad():
        ours.positions.zero_()
        ours.latents.copy_(theirs.latents)
        ours.out.weight.copy_(torch.eye(16))
        ours.out.bias.zero_()
        for layer, (attention, feed) in zip(ours.layers, theirs.blocks, strict=True):
            pairs = zip(
                (layer.attention.query, layer.attention.key, layer.attention.value, layer.attention.out),
                (attention.q_proj, attention.k_proj, attention.v_proj, attention.output_proj),
                strict=True,
            )
            for mine, given in [*pairs, (layer.feed_forward[1], feed.fc), (layer.feed_forward[3], feed.c_proj)]:
                mine.weight.copy_(given.weight)
                mine.bias.zero_()
            layer.feed_forward[2] = nn.ReLU()
        patches = torch.randn(3, 9, 16)
        torch.testing.assert_close(ours(patches), theirs(patches))


def test_relevance_without_layers_that_matter_is_the_identity_and_grows_by_each_layer() -> None:
    first, second = torch.rand(2, 1, 5, 5)
    torch.testing.assert_close(accumulate([0 * first]), torch.eye(5)[None])
    eye = torch.eye(5)
    torch.testing.assert_close(accumulate([first, second]), (eye + second) @ (eye + first))


def test_what_argues_against_the_answer_is_cut_before_heads_are_averaged() -> None:
    flow = torch.tensor([[[[1.0, -3.0]], [[-1.0, 5.0]]]])  # two heads
    torch.testing.assert_close(head_mean(flow), torch.tensor([[[0.5, 2.5]]]))


def test_a_gates_gradient_is_attention_times_its_gradient() -> None:
    from midstream.train.projectors import Attention

    module, x = Attention(WIDTH, 4), torch.randn(2, 6, WIDTH)
    gates, kept = Gates(), []
    with gated_places(module, gates), torch.enable_grad():
        handle = module.place.register_forward_hook(lambda _, args, out: kept.append(args[0]))
        (flow, gradient) = torch.autograd.grad(module(x, x).square().sum(), [gates[0], kept[0]])
        handle.remove()
    torch.testing.assert_close(flow, kept[0] * gradient)
    assert not module.place._forward_hooks


@pytest.mark.parametrize("arm", ["qformer", "resampler"])
def test_the_map_of_a_projector_follows_its_layers_one_by_one(arm: str) -> None:
    made = paper.projector(arm, TOWER, OUT, tokens=4, depth=2)
    maps = [torch.rand(1, 4, keys) for keys in ((4, 64, 4, 64) if arm == "qformer" else (68, 68))]
    among, across = torch.eye(4)[None], torch.zeros(1, 4, 64)
    for layer in maps:
        to_patches = layer[..., :64] if layer.shape[2] > 4 else torch.zeros(1, 4, 64)
        to_queries = layer[..., 64:] if arm == "resampler" else layer if layer.shape[2] == 4 else torch.zeros(1, 4, 4)
        among, across = among + to_queries @ among, across + to_patches + to_queries @ across
    torch.testing.assert_close(made.query_to_patch(maps, 64), across)


def tiny_llava(arm: str) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """LLaVA-1.5's shape with a projector of ours: 16 patches, 4 visual tokens and 6 words; all else unchanged."""
    model = zoo.load("tiny:llava").model
    model.requires_grad_(False)
    if arm != "own":
        made = paper.projector(arm, model.config.vision_config, model.config.text_config.hidden_size, 4, 2)
        model.model.multi_modal_projector = made.requires_grad_(False)
    count = 16 if arm in ("own", "mlp") else 4
    ids = torch.cat([torch.full((2, count), model.config.image_token_id), torch.randint(5, 90, (2, 6))], 1)
    size = model.config.vision_config.image_size
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, size, size), "attention_mask": torch.ones_like(ids)}
    return model, inputs, torch.full((2,), ids.shape[1] - 1)


@pytest.mark.parametrize("arm", ["own", *paper.ARMS])
def test_relevance_runs_through_a_llava_and_leaves_it_as_it_was(arm: str) -> None:
    model, inputs, last = tiny_llava(arm)
    before = model(**inputs).logits
    chain = trace(model, inputs, last, torch.tensor([7, 8]))
    assert torch.equal(model(**inputs).logits, before)
    assert chain.patch_to_patch.shape == (2, 16, 16)
    assert chain.gradient_times_input.shape == chain.text_to_patch.shape == (2, 16)
    assert (chain.gradient_times_input > 0).any()
    assert bool(chain.text_to_patch.isfinite().all()) == (arm != "c_abstractor")


def test_the_chain_is_what_eager_attentions_and_their_gradients_give() -> None:
    """The definition spelled out: gradients of recorded attentions, layer by layer, one image at a time."""
    model, inputs, last = tiny_llava("deco")
    chain = trace(model, inputs, last, torch.tensor([7, 8]))
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def keep(weights, at):
        weights.requires_grad_() if weights.is_leaf else None
        weights.retain_grad()
        seen[at.stack, at.layer] = weights

    model.model.vision_tower.embeddings.requires_grad_(True)
    with attend(model, probs=keep, stack="vision"), attend(model, probs=keep, stack="text"):
        logits = model(**inputs).logits
    (logits[0, last[0], 7] + logits[1, last[1], 8]).backward()
    relevance = {}
    for stack in ("vision", "text"):
        layers = [seen[stack, n] for n in range(4)]
        r = torch.eye(layers[0].shape[-1]).expand(2, -1, -1)
        for a in layers:
            if a.grad is not None:
                r = r + (a * a.grad).clamp(min=0).mean(1).detach() @ r
        relevance[stack] = r
    torch.testing.assert_close(chain.patch_to_patch, relevance["vision"][:, 1:, 1:])
    torch.testing.assert_close(chain.text_to_query, relevance["text"][:, -1, :4])
    slow = relevance["text"][:, -1:, :4] @ paper.pooling_matrix(4, 16) @ relevance["vision"][:, 1:, 1:]
    torch.testing.assert_close(chain.text_to_patch, slow[:, 0])


def test_all_relevance_on_the_object_lifts_it_by_one_over_its_size() -> None:
    covered = torch.zeros(1, 64)
    covered[0, :4] = 1
    assert paper.lift(covered, covered).item() == pytest.approx(16)
    assert paper.lift(torch.ones(1, 64), covered).item() == pytest.approx(1)


def test_even_pooling_gives_an_object_its_share_of_the_fullest_window() -> None:
    covered = torch.zeros(1, 64)
    covered[0, [0, 1, 8]] = 1  # three of the four patches of the first 2 × 2 window
    assert paper.even_share(16, covered).item() == pytest.approx(0.75)
    assert paper.overlap_of_queries(paper.pooling_matrix(16, 64)[None]).item() == pytest.approx(0, abs=1e-6)
    assert paper.overlap_of_queries(torch.ones(1, 5, 64)).item() == pytest.approx(1)


def test_kept_maps_are_shares_and_of_the_query_that_matters_most() -> None:
    chain = Chain(
        text_to_query=torch.tensor([[1.0, 3.0]]),
        query_to_patch=torch.tensor([[[1.0, 0.0, 1.0], [0.0, 2.0, 2.0]]]),
        patch_to_patch=torch.eye(3)[None],
        gradient_times_input=torch.zeros(1, 3),
    )
    rows = pd.DataFrame(paper.map_rows(chain))
    shares = {part: found["share"].tolist() for part, found in rows.groupby("part")}
    assert shares["text to query"] == pytest.approx([0.25, 0.75])
    assert shares["query to patch"] == pytest.approx([0, 0.5, 0.5])
    assert shares["text to patch"] == pytest.approx([1 / 14, 6 / 14, 7 / 14])


def test_the_example_is_the_first_question_about_several_things() -> None:
    one, two = (next(s for s in shapes.scenes(50, seed=3) if len(s.things) == n) for n in (1, 2))
    images = visual_bench.Pool([one, two], torch.zeros(2, 65, 4), [], [])
    asked = [visual_bench.Asked(image, "colour", Turn((1,), (2,)), 0) for image in (0, 1, 1)]
    assert paper.example(images, asked) is asked[1]
    assert paper.example(images, asked[:1]) is asked[0]


def test_coverage_of_patches_adds_up_to_the_mask() -> None:
    scene = shapes.scenes(1, seed=3)[0]
    covered = paper.coverage(scene, 64)
    areas = shapes.masks(scene, 64).reshape(len(scene.things), -1).mean(1)
    torch.testing.assert_close(covered.mean(1), torch.from_numpy(areas).float())


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def bench() -> visual_bench.Bench:
    """The trained tower with a tiny random language model."""
    return visual_bench.prepare("shapes-clip", "tiny:llama", bins=32, precision="float32", seed=0)


def test_cached_features_give_the_same_answers_as_images(bench: visual_bench.Bench) -> None:
    images = visual_bench.pool(bench, 4, seed=5)
    model = paper.new_model(bench, "deco", 16, depth=2, seed=0)
    inputs = {**bench.rows(images.asked, 16), "pixel_values": images.features}
    cached = model(**inputs).logits
    model.model.vision_tower = bench.tower
    whole = model(**{**inputs, "pixel_values": visual_bench.pixels(bench, images.scenes)}).logits
    torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-4)


def test_llava_itself_drops_the_class_token_of_cached_features(bench: visual_bench.Bench) -> None:
    features = torch.randn(2, 65, bench.tower.config.hidden_size)
    model = paper.new_model(bench, "mlp", 64, depth=2, seed=0)
    assert isinstance(model.model.vision_tower, CachedTower)
    found = torch.stack(model.get_image_features(features, return_dict=True).pooler_output)
    torch.testing.assert_close(found, model.model.multi_modal_projector(features[:, 1:]))


def test_features_are_the_last_hidden_state_but_one(bench: visual_bench.Bench) -> None:
    images = visual_bench.pixels(bench, shapes.scenes(2, seed=1))
    states = bench.tower(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower_features(bench.tower, images), states[-2])


def test_a_model_put_together_from_parts_shares_their_weights() -> None:
    tower, language = zoo.load("tiny:clip_vision").model.vision_model, zoo.load("tiny:llama").model
    made = assemble(tower, language, paper.AdaptivePool(32, 32, tokens=4), 3, 4)
    assert made.model.language_model is language.model
    assert made.lm_head is language.lm_head
    assert not any(weight.is_meta for weight in made.parameters())


def test_every_arm_of_a_seed_starts_from_the_same_language_model_and_sees_the_same_questions(
    bench: visual_bench.Bench,
) -> None:
    images = visual_bench.pool(bench, 8, seed=5)
    models = [paper.new_model(bench, arm, 16, depth=2, seed=0) for arm in ("deco", "qformer")]
    for mine, other in zip(*(model.model.language_model.parameters() for model in models), strict=True):
        assert torch.equal(mine, other)
        assert mine is not other
    rows = [next(paper.batches(bench, images, tokens, seed=1, size=4)) for tokens in (16, 64)]
    words = [row["input_ids"][row["input_ids"] != bench.image_token] for row in rows]
    assert torch.equal(*words)
    assert torch.equal(rows[0]["pixel_values"], rows[1]["pixel_values"])


def test_only_answers_are_labelled_and_padding_is_masked() -> None:
    packed = pack([[Turn((5, 6), (7, 2)), Turn((8,), (9, 2))], [Turn((5,), (7, 2))]], [1, 3, 3], pad=0)
    assert packed["input_ids"].tolist() == [[1, 3, 3, 5, 6, 7, 2, 8, 9, 2], [1, 3, 3, 5, 7, 2, 0, 0, 0, 0]]
    assert packed["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]
    ignored = -100
    assert packed["labels"][0].tolist() == [*[ignored] * 5, 7, 2, ignored, 9, 2]
    single = ask([Turn((5, 6), (7, 2)), Turn((5,), (7, 2))], [1, 3, 3], pad=0)
    assert single["input_ids"].tolist() == [[1, 3, 3, 5, 6, 7, 2], [1, 3, 3, 5, 7, 2, 0]]
    assert single["attention_mask"].sum(1).tolist() == [7, 6]
    assert single["labels"][1].tolist() == [*[ignored] * 4, 7, 2, ignored]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_questions_in_one_row_are_answered_as_if_each_were_asked_alone(
    bench: visual_bench.Bench, attention: str
) -> None:
    images = visual_bench.pool(bench, 2, seed=5)
    model = paper.new_model(bench, "deco", 16, depth=2, seed=0)
    model.set_attn_implementation(attention)
    together = {**bench.rows(images.asked, 16), "pixel_values": images.features}
    asked = [each for row in images.asked for each in row]
    alone = {**bench.single(asked, 16), "pixel_values": images.features[[each.image for each in asked]]}
    with torch.no_grad():
        found, expected = (
            model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1][
                batch["labels"][:, 1:] != -100
            ]
            for batch in (together, alone)
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_exact_answer_is_what_greedy_decoding_says(bench: visual_bench.Bench) -> None:
    images = visual_bench.pool(bench, 6, seed=5)
    model = paper.new_model(bench, "deco", 16, depth=2, seed=0)
    asked = [each for row in images.asked for each in row][:20]
    features = images.features[[each.image for each in asked]]
    inputs = {**bench.single(asked, 16), "pixel_values": features}
    said = greedy(model, inputs, 3)
    for row in range(0, 20, 2):  # every other question gets for its answer what the model says
        asked[row] = visual_bench.Asked(
            asked[row].image, "colour", Turn(asked[row].turn.question, tuple(said[row].tolist()))
        )
    inputs = {**bench.single(asked, 16), "pixel_values": features}
    expected = [tuple(said[n, : len(each.turn.answer)].tolist()) == each.turn.answer for n, each in enumerate(asked)]
    assert exact_answers(model, inputs).tolist() == expected
    assert expected[::2] == [True] * 10


def test_greedy_is_generate(bench: visual_bench.Bench) -> None:
    images = visual_bench.pool(bench, 2, seed=5)
    model = paper.new_model(bench, "qformer", 16, depth=2, seed=0)
    each = images.asked[0][0]
    inputs = {**bench.single([each], 16), "pixel_values": images.features[:1]}
    prompt = inputs["input_ids"][:, : -len(each.turn.answer)]
    theirs = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=images.features[:1],
        max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert greedy(model, inputs, 4).tolist() == theirs[:, prompt.shape[1] :].tolist()


def test_a_box_said_in_bins_overlaps_its_object_by_half_at_least() -> None:
    truth = np.concatenate([shapes.boxes(scene) for scene in shapes.scenes(100, seed=2)])
    rounded = np.array([visual_bench.from_bins(np.array(visual_bench.to_bins(box, 32)), 32) for box in truth])
    assert (visual_bench.iou(rounded, truth) >= 0.5).all()


def test_overlap_of_boxes_is_one_with_themselves_and_zero_with_strangers() -> None:
    one, shifted, far = np.array([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.6, 0.6, 0.9, 0.9]])[:, None]
    assert visual_bench.iou(one, one) == pytest.approx(1)
    assert visual_bench.iou(one, shifted) == pytest.approx(1 / 3)
    assert visual_bench.iou(one, far) == 0
    assert visual_bench.iou(one[:, [2, 3, 0, 1]], one) == 0  # no area


def test_shuffled_patches_are_the_same_patches_elsewhere_and_the_class_token_stays() -> None:
    features = torch.randn(3, 65, 4)
    shuffled = visual_bench.shuffled_patches(features, seed=0)
    assert torch.equal(shuffled[:, 0], features[:, 0])
    assert not torch.equal(shuffled, features)
    torch.testing.assert_close(shuffled.sum(1), features.sum(1))


def test_the_chosen_rate_is_the_one_of_the_lowest_loss_of_each_arm() -> None:
    tuning = pd.DataFrame({"arm": ["deco", "deco", "mlp", "mlp"], "rate": [1, 2, 1, 2], "loss": [0.3, 0.2, 0.1, 0.4]})
    assert paper.best_rates(paper.Params(), tuning) == {"deco": 2, "mlp": 1}


# ------------------------------------------------------------------------------------------------------- the claims


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    arms = {"deco": 0.0, "qformer": 1.0, "resampler": 1.2, "c_abstractor": 0.8}
    rows: dict[str, list[dict]] = {"curve": [], "answers": [], "cost": [], "relevance": []}
    for seed in range(4):
        for arm, worse in arms.items():
            run = {"arm": arm, "tokens": 16, "seed": seed}
            for step in range(2, 101, 2):
                lag = (1 + worse) * 20 * (1 + 0.01 * rng.standard_normal())
                rows["curve"].append({**run, "step": step, "loss": 2 * math.exp(-step / lag)})
            for images in ("own", "shuffled"):
                lost = 200 if images == "shuffled" else 0
                for step in (50, 100) if images == "own" else (100,):
                    for kind, slope in (("colour", 60), ("count", 60), ("box", 200)):
                        right = 800 - slope * worse - lost + int(rng.integers(0, 8))
                        rows["answers"].append(
                            {**run, "step": step, "images": images, "type": kind, "n": 1000, "right": right}
                        )
            cost = {
                "visual_tokens": 16,
                "projector": 1000 * (1 + worse),
                "train_seconds": 1,
                "inference_ms": 1,
                "rate": 1,
            }
            rows["cost"].append({**run, **cost})
            near = 0.01 * rng.standard_normal()
            rows["relevance"].append(
                {**run, "n": 9, "lift": 2 - worse + near, "others": 1, "room": -worse + near * worse}
            )
    return Result(
        {name: pd.DataFrame(found) for name, found in rows.items()},
        {"tokens": 16, "patches": 64, "language_parameters": 1e6},
    )


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds", claim.check(result)
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()}, result.scalars)
    assert direction(claim.check(single)) == "unclear"


def test_steps_to_one_loss_are_counted_to_the_level_of_the_slowest_arm() -> None:
    steps = paper.steps_to(ideal())
    last = steps.groupby("arm")["steps"].mean()
    assert last["resampler"] == last.max() == 100
    assert last["deco"] < last["c_abstractor"] < last["qformer"]


def test_arms_that_leave_nothing_to_compare_are_refused() -> None:
    with pytest.raises(ValueError, match="needed for a comparison"):
        paper.Params(arms=("deco", "mlp"))
    with pytest.raises(ValueError, match="resampler must be among"):
        paper.Params(fewer_arms=("deco", "resampler"))


def test_arms_that_are_not_known_and_grids_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown projector"):
        paper.Params(arms=("deco", "pooling"))
    with pytest.raises(ValueError, match="no square"):
        paper.Params(tokens=15)
    assert side(16) == 4


@pytest.mark.filterwarnings("ignore")
def test_the_experiment_fills_every_table_and_every_check_reads_it() -> None:
    params = paper.Params(
        language="tiny:llama", arms=("deco", "qformer"), n_seeds=2, steps=4, batch_size=2, tune_steps=4,
        learning_rates=(1e-3, 2e-3), val_images=4, test_images=6, relevance_images=2, timing_repeats=1,
    )  # fmt: skip
    result = paper.experiment(params)
    assert set(result.tables) == {"tuning", "curve", "answers", "cost", "relevance", "maps", "example"}
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()
    rows = arena.rows(arena.PROJECTORS, paper.arena_rows(result))
    assert set(rows["method"]) == {"adaptive pooling (DeCo)", "Q-Former"}
