"""What the recipes of the shapes world give their models to learn from."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from midstream.data import shapes
from midstream.train.recipes import _shapes as world
from midstream.train.recipes import shapes_clip, shapes_lm, shapes_vlm

WORDS = world.tokenizer("<s> $A").get_vocab()
NAMES = {number: word for word, number in WORDS.items()}
SCENES = shapes.scenes(60, seed=5)


def said(tokens: torch.Tensor) -> list[str]:
    return [NAMES[int(token)] for token in tokens]


# ---------------------------------------------------------------- conversations


def test_only_answers_and_their_ends_are_labelled():
    scene = SCENES[0]
    asked = shapes.questions(scene, random.Random(0))
    caption = world.encode(shapes.caption(scene, random.Random(0), 0), WORDS)
    batch = world.pack([[world.turns(caption, asked, WORDS)]], 500)
    labels = batch["labels"][0]
    answers = " ".join(said(labels[labels != world.IGNORED]))
    assert answers == " ".join(f"{question.answer} </s>" for question in asked)
    assert torch.equal(batch["input_ids"][0][labels != world.IGNORED], labels[labels != world.IGNORED])


def test_rows_of_different_length_are_padded_on_the_right_and_cut_at_the_length():
    captions = [world.encode(shapes.caption(scene, random.Random(0), 0), WORDS) for scene in SCENES]
    batch = world.pack([[world.turns(caption, [], WORDS)] for caption in captions], 30)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (60, 30)
    for tokens, caption in zip(batch["input_ids"].tolist(), captions, strict=True):
        assert tokens == ([world.BEGIN, *caption] + [world.PAD] * 30)[:30]


def test_packed_questions_are_answered_as_if_each_were_asked_alone():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shapes_lm.config())).eval()
    rng, told = random.Random(0), []
    for scene in SCENES[:2]:
        caption = world.encode(shapes.caption(scene, rng, 0), WORDS)
        told.append(world.turns(caption, world.text_questions(scene, rng, shapes.TYPES), WORDS))
    packed, found = world.pack([told], 500), []
    with torch.no_grad():
        together = model(**{name: packed[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits[0]
        for number, each in enumerate(told):
            before = [token for earlier in told[: number + 1] for token in earlier.beginning]
            for question, answer in each.pairs:
                ids = torch.tensor([[world.BEGIN, *before, *question, *answer]])
                found.append(model(ids).logits[0, -len(answer) - 1 : -1])
    answers = (packed["labels"][0] != world.IGNORED).nonzero().flatten()
    torch.testing.assert_close(together[answers - 1], torch.cat(found), atol=1e-4, rtol=0)


def test_no_question_about_a_text_asks_what_a_text_does_not_say():
    asked = [each.text for scene in SCENES for each in world.text_questions(scene, random.Random(0), shapes.TYPES)]
    assert asked
    assert not [text for text in asked if "front of" in text or "behind" in text]


# ---------------------------------------------------------------- the image tower's names


def test_a_things_patch_is_the_one_in_which_its_centre_is_drawn():
    side = world.SIZE // world.PATCH
    for scene in SCENES:
        for thing in scene.things:
            row, column = divmod(shapes_clip.patch_of(thing), side)
            assert column <= thing.x * side <= column + 1
            assert row <= thing.y * side <= row + 1


def test_a_twin_differs_in_one_attribute_of_one_thing_and_never_in_its_place():
    rng = random.Random(0)
    for scene in SCENES:
        other = shapes_clip.twin(scene, rng)
        changed = [
            (number, field)
            for number, (one, two) in enumerate(zip(scene.things, other.things, strict=True))
            for field in asdict(one)
            if getattr(one, field) != getattr(two, field)
        ]
        assert len(changed) == 1
        assert changed[0][1] in shapes_clip.ATTRIBUTES


def test_the_names_to_learn_are_those_of_the_things():
    batch = next(shapes_clip._named(seed=9))
    spec = shapes.Spec(overlap=0.0)
    things = [thing for scene in shapes.scenes(shapes_clip.NAMED, seed=9, spec=spec) for thing in scene.things]
    values = list(shapes_clip.ATTRIBUTES.items())
    for thing, names in zip(things, batch["names"], strict=True):
        assert [values[k][1][name] for k, name in enumerate(names)] == [getattr(thing, field) for field, _ in values]
    assert batch["image"].max() == shapes_clip.NAMED - 1


# ---------------------------------------------------------------- the language model's things


def test_a_gathered_thing_is_the_sum_of_its_words():
    torch.manual_seed(0)
    table = nn.Embedding(world.vocabulary_size(), 8)
    batch = next(shapes_lm._thing_batches(3, WORDS))
    embedded = shapes_lm._with_things(table, batch)
    places = batch["input_ids"] == world.IMAGE
    for vector, words in zip(embedded[places], batch["things"], strict=True):
        torch.testing.assert_close(vector, table(words[words != world.PAD]).sum(0))
    assert torch.equal(embedded[~places], table(batch["input_ids"])[~places])


def test_things_stand_before_the_questions_about_their_own_scene():
    batch = next(shapes_lm._thing_batches(3, WORDS))
    scenes = shapes.scenes(shapes_lm.THINGS_BATCH, seed=3)
    counts = (batch["input_ids"] == world.IMAGE).sum(1).tolist()
    assert counts == [len(scene.things) for scene in scenes]
    described = {tuple(sorted(said(words[words != world.PAD]))) for words in batch["things"][: counts[0]]}
    assert described == {tuple(sorted(shapes.describe(thing).split())) for thing in scenes[0].things}


def test_a_caption_said_again_is_in_another_wording_and_labelled():
    rng, scene, again = random.Random(0), SCENES[0], 0
    for _ in range(20):
        (made,) = shapes_lm.text_conversations([scene], rng, WORDS)
        for question, answer in made.pairs:
            if not question:
                again += 1
                assert answer[:-1] != made.beginning[:-1]
                assert answer[-1] == world.END
    assert again


# ---------------------------------------------------------------- LLaVA's rows


@pytest.mark.parametrize("in_words", [False, True])
def test_a_row_shows_images_or_says_captions_in_their_place(in_words):
    batch = next(shapes_vlm._batches(0, itertools.repeat(in_words)))
    seen = int((batch["input_ids"] == world.IMAGE).sum())
    assert ("pixel_values" in batch) is not in_words
    assert seen == (0 if in_words else shapes_vlm.BATCH * shapes_vlm.VISUAL_TOKENS)


def test_no_answer_is_cut_off():
    for batch, _ in zip(shapes_vlm._batches(0, itertools.repeat(False)), range(12), strict=False):
        assert batch["input_ids"].shape[1] < shapes_vlm.LENGTH
    for batch, _ in zip(shapes_lm._thing_batches(0, WORDS), range(3), strict=False):
        assert batch["input_ids"].shape[1] < shapes_lm.LENGTH
