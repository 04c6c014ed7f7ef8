"""T3: facts of the timelines, the paired questions, the probes and the tuning, on tiny random models."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf

from midstream.claims import direction
from midstream.data import shapes
from midstream.data.shapes import Question, Scene, Video
from midstream.paper import Result
from midstream.papers.transfer import t3 as paper
from midstream.train.packing import IGNORED
from midstream.train.recipes import _shapes as world

SMALL = paper.Params(
    n_seeds=2,
    n_videos=2,
    n_told=1,
    probe_train=6,
    probe_test=4,
    probe_epochs=1,
    n_stills=8,
    steps=2,
    step_tokens=300,
    checkpoints=2,
    precision="float32",
)
TEMPORAL = {"first", "last", "before", "after", "beginning", "end", "grow", "shrink", "move", "comes"}
TIMELINES = [paper.timeline(number, seed=0, length=length) for length in (1, 2, 4) for number in range(100)]


def llava(family: str) -> paper.Reader:
    """A random LLaVA of 16 patches, words of the shapes world; SigLIP has no class token, Qwen2 groups its heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": world.vocabulary_size(), "bos_token_id": world.BEGIN, "eos_token_id": world.END}
    image = {"image_size": 32, "patch_size": 8}
    if family == "CLIP, Llama":
        vision = hf.CLIPVisionConfig(projection_dim=32, **image, **sizes)
        parts = {"text_config": hf.LlamaConfig(**words, **sizes), "vision_feature_select_strategy": "default"}
    else:
        vision = hf.SiglipVisionConfig(vision_use_head=False, **image, **sizes)
        text = hf.Qwen2Config(num_key_value_heads=2, **words, **sizes)
        parts = {"text_config": text, "vision_feature_select_strategy": "full"}
    config = hf.LlavaConfig(vision_config=vision, image_token_index=world.IMAGE, image_seq_length=16, **parts)
    model = hf.LlavaForConditionalGeneration(config).eval()
    return paper.Reader(model, world.tokenizer("<s> $A"), SimpleNamespace(image_processor=world.image_processor()))


@pytest.fixture(scope="module")
def reader() -> paper.Reader:
    return llava("CLIP, Llama")


@pytest.fixture(scope="module", params=["CLIP, Llama", "SigLIP, Qwen2"])
def any_reader(request: pytest.FixtureRequest) -> paper.Reader:
    return llava(request.param)


# ------------------------------------------------------------------------------------------------------- timelines


def answer_from_words(told: paper.Timeline, question: Question) -> str:
    """The answer worked out again from the captions' words alone, by another way than the generator's."""
    seen = [{"colour": one(shapes.COLOURS, c), "shape": one(shapes.SHAPES, c), "all": c} for c in told.captions]
    text = question.text
    if question.type == "growth":
        return "grow" if "small" in told.captions[0] else "shrink"
    if question.type == "movement":
        words = shapes.alternatives(question)
        sides = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
        return next(word for word in words if re.search(rf"\b{sides[word]}\b", told.captions[-1]))
    if question.type == "colour":
        return seen[0 if "beginning" in text else -1]["colour"]
    if question.type == "order":
        field = "colour" if " colour " in text else "shape"
        named = shapes.alternatives(question)
        places = {name: [s[field] for s in seen].index(name) for name in named}
        return (min if " first" in text else max)(places, key=places.get)
    if question.type == "referring":
        return refer(seen, text)
    one_name, word, other = re.fullmatch(r"is (.*) (before|after) (.*)\?", text).groups()
    early = first_with(seen, one_name) < first_with(seen, other)
    return "yes" if early == (word == "before") else "no"


def one(values, caption: str) -> str:
    return next(value for value in values if re.search(rf"\b{value}\b", caption))


def first_with(seen: list[dict], name: str) -> int:
    colour = one(shapes.COLOURS, name)
    return [s["colour"] for s in seen].index(colour)


def refer(seen: list[dict], text: str) -> str:
    field = "colour" if text.startswith("what colour") else "shape"
    if "at the" in text:
        return seen[0 if "beginning" in text else -1][field]
    at = [index for index, s in enumerate(seen) if s["colour"] == one(shapes.COLOURS, text.partition(" the ")[2])]
    return seen[at[0] - 1 if "before" in text else at[-1] + 1][field]


def test_every_answer_follows_from_the_captions_alone() -> None:
    asked = [(told, question) for told in TIMELINES for question in told.questions]
    assert len(asked) > 1000
    assert all(answer_from_words(told, question) == question.answer for told, question in asked)


def test_backwards_timelines_have_other_answers() -> None:
    for told in TIMELINES:
        back = replace(told, captions=told.captions[::-1])
        for question in told.questions:
            if question.type not in ("referring",):
                assert answer_from_words(back, question) != question.answer


def test_all_families_and_lengths_occur_and_two_way_answers_are_balanced() -> None:
    types = [question.type for told in TIMELINES for question in told.questions]
    assert set(types) == {"order", "shuffle", "referring", *paper.ATTRIBUTES}
    assert {len(told.captions) for told in TIMELINES} == {2, 4, 8}
    named = [
        (q.text.index(f" {q.answer}") < q.text.rindex(" or "))
        for told in TIMELINES
        for q in told.questions
        if q.type == "order"
    ]
    assert 0.4 < np.mean(named) < 0.6
    yes = [q.answer == "yes" for told in TIMELINES for q in told.questions if q.type == "shuffle"]
    assert 0.4 < np.mean(yes) < 0.6


def test_no_caption_of_a_timeline_is_worded_as_videos_are_told() -> None:
    told = {caption for timeline in TIMELINES for caption in timeline.captions}
    tested = {event.text for each in paper.asked_videos(40, 8, 0) for event in each.video.timeline}
    assert not told & tested
    beginnings = ("there is", "one thing", "at the")
    assert all(caption.startswith(beginnings) for caption in told)
    assert not any(text.startswith(beginnings) for text in tested)


def test_shuffled_answers_keep_everything_but_the_answers_and_know_nothing() -> None:
    rng = random.Random(0)
    same = []
    for told in TIMELINES * 5:
        other = paper.shuffled(told, rng)
        assert other.captions == told.captions
        for before, after in zip(told.questions, other.questions, strict=True):
            assert before.text == after.text
            if before.type != "referring":
                same.append(before.answer == after.answer)
    assert 0.45 < np.mean(same) < 0.55


def test_questions_that_are_not_temporal_have_the_same_answers_backwards() -> None:
    rng = random.Random(0)
    asked = [q for told in TIMELINES for q in paper.not_temporal(told, rng).questions]
    assert len(asked) > 300
    assert not any(TEMPORAL & set(q.text.rstrip("?").split()) for q in asked)


def test_text_is_made_of_the_vocabulary_alone(reader: paper.Reader) -> None:
    unknown = reader.tokenizer.unk_token_id
    texts = [told.text + " ".join(f"{q.text} {q.answer}" for q in told.questions) for told in TIMELINES]
    texts += [each.told + each.question.text for each in paper.asked_videos(10, 8, 0)]
    assert not any(unknown in reader.tokens(text) for text in texts)


# ------------------------------------------------------------------------------------------------ questions, videos


def test_backwards_the_other_alternative_is_right_and_is_what_the_frames_say() -> None:
    for each in paper.asked_videos(20, 8, 3):
        back = each.backwards()
        assert back.question.text == each.question.text
        assert {each.question.answer, back.question.answer} == set(each.alternatives)
        assert back.backwards() == each
        assert answer_from_frames(back.video, back.question) == back.question.answer


def answer_from_frames(video: Video, question: Question) -> str:
    """Worked out again, from what the first and last frames show."""
    first, last = video.frames[0].things[0], video.frames[-1].things[0]
    if question.type == "order":
        field = "colour" if question.text.startswith("what colour") else "shape"
        shown = [getattr(frame.things[0], field) for frame in video.frames]
        pick = min if "first" in question.text else max
        return pick(shapes.alternatives(question), key=shown.index)
    if question.type == "growth":
        return "grow" if last.radius > first.radius else "shrink"
    if question.type == "movement":
        return {(True, True): "right", (True, False): "left", (False, True): "down", (False, False): "up"}[
            abs(last.x - first.x) > abs(last.y - first.y), (last.x - first.x) + (last.y - first.y) > 0
        ]
    if question.type == "colour":
        return (first if "beginning" in question.text else last).colour
    light = shapes.BACKGROUNDS
    return "brighter" if light[video.frames[-1].background] > light[video.frames[0].background] else "darker"


def test_whoever_ignores_the_order_of_frames_is_right_half_of_the_time(any_reader: paper.Reader) -> None:
    asked = paper.asked_videos(6, 8, 0)
    features = paper.frame_features(any_reader, [frame for each in asked for frame in each.video.frames], 2)
    means = [torch.stack([features[f] for f in each.video.frames]).double().mean(0).float() for each in asked]
    rows = [any_reader.row(mean, [each.question], asked=False) for mean, each in zip(means, asked, strict=True)]
    assert np.mean(paper.right(any_reader, rows, asked)) == 0.5


def test_rows_with_visual_tokens_read_as_llava_reads_them(any_reader: paper.Reader) -> None:
    scenes = shapes.scenes(3, spec=paper.STILL)
    question = Question("colour", "what colour is the thing?", "red")
    features = paper.frame_features(any_reader, scenes, pool=1)
    rows = [any_reader.row(features[scene], [question], asked=False) for scene in scenes]
    batch = paper.padded(rows)
    pixels = world.pixels(shapes.render(scenes, 32))
    with torch.no_grad():
        expected = any_reader.model(input_ids=batch["input_ids"], pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(paper.next_logits(any_reader, rows), expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_answer(any_reader: paper.Reader) -> None:
    asked = paper.asked_videos(3, 8, 0)
    rows = [any_reader.row(each.told, [each.question], asked=False) for each in asked]
    together = paper.next_logits(any_reader, rows)
    alone = torch.cat([paper.next_logits(any_reader, [row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_pooling_is_the_mean_of_neighbours() -> None:
    features = torch.randn(2, 16, 3)
    grid = features.reshape(2, 4, 4, 3)
    expected = grid[:, 2:4, 0:2].mean((1, 2))  # the third of four windows
    torch.testing.assert_close(paper.pooled(features, 2)[:, 2], expected)
    torch.testing.assert_close(paper.pooled(features, 1), features)


def test_only_answers_and_their_ends_are_labelled(reader: paper.Reader) -> None:
    row = reader.row("a red circle.", [Question("order", "what colour comes first?", "red")])
    labelled = [label for label in row.text.labels if label != IGNORED]
    assert reader.tokenizer.convert_ids_to_tokens(labelled) == ["red", "</s>"]
    assert [i for i, label in zip(row.text.tokens, row.text.labels, strict=True) if label != IGNORED] == labelled


# ---------------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("kind", paper.PROBED)
def test_reversing_the_frames_swaps_the_class(kind: str) -> None:
    films, classes = paper.probe_videos(kind, 6, "black", 8, 0, "train")
    assert classes[:6].tolist() == [1 - c for c in classes[6:].tolist()]
    assert all(frame.background == "black" for film in films for frame in film.frames)


@pytest.mark.parametrize("kind", paper.PROBED)
def test_a_probe_on_the_mean_of_frames_is_at_chance_exactly(reader: paper.Reader, kind: str) -> None:
    result = list(paper.run_probes(reader, SMALL, 0))
    mean = [row for row in result if row["probe"] == "linear, mean of frames" and row["kind"] == kind]
    assert [row["accuracy"] for row in mean] == [0.5]


def test_an_lstm_probe_learns_what_only_order_tells_and_the_mean_does_not() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 8)[:, None] * torch.randn(4)
    up = ramp + 0.3 * torch.randn(64, 8, 4)
    states, classes = torch.cat([up, up.flip(1)]), torch.arange(2).repeat_interleave(64)
    params = SMALL.model_copy(update={"probe_epochs": 20})
    probe = paper.fit_probe(paper.LstmProbe(4), states, classes, params, 0)
    assert paper.probe_accuracy(probe, states, classes) > 0.95


def test_resizing_averages_squares_of_tokens_frame_by_frame() -> None:
    states = torch.randn(2, 3 * 16, 5)
    grids = states.reshape(2, 3, 4, 4, 5)
    small = paper.resized(states, frames=3, grid=2).reshape(2, 3, 2, 2, 5)
    torch.testing.assert_close(small[1, 2, 1, 0], grids[1, 2, 2:4, 0:2].mean((0, 1)))
    torch.testing.assert_close(paper.resized(states, frames=3, grid=4), states)
    back = paper.resized(states.reshape(2, 3, 16, 5).flip(1).flatten(1, 2), frames=3, grid=2)
    torch.testing.assert_close(back.reshape(2, 3, 2, 2, 5), small.flip(1))


def test_the_language_models_states_of_a_prefix_do_not_depend_on_what_follows(any_reader: paper.Reader) -> None:
    films = torch.randn(2, 12, 32)
    whole, half = paper.read_by_language(any_reader, films), paper.read_by_language(any_reader, films[:, :6])
    torch.testing.assert_close(whole[:, :6], half, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- tuning


def test_arms_see_equally_many_tokens_and_every_image_its_own(reader: paper.Reader) -> None:
    shown = paper.Shown(paper.images(reader, SMALL, 0), paper.films(reader, SMALL, 0))
    params = SMALL.model_copy(update={"step_tokens": 1536})
    assert reader.tokenizer.pad_token_id == 0
    totals = {}
    for arm in (*paper.ARMS, paper.CEILING):
        steps = paper.batches(arm, reader, shown, params, 0)
        totals[arm] = sum(int(next(steps)["input_ids"].ne(0).sum()) for _ in range(20))
    assert max(totals.values()) < 1.05 * min(totals.values())
    assert all(
        sum(token == world.IMAGE for token in row.text.tokens) == len(row.visual) for row in shown.images + shown.films
    )


def test_an_album_shows_as_many_images_as_a_timeline_has_captions_and_asks_nothing_about_time() -> None:
    told = {frame for timeline in TIMELINES for frame in timeline.video.frames}
    for number in range(60):
        shown, asked = paper.album(number, 2, 0)
        assert len(shown) == 4
        assert not told & set(shown)
        assert not any(TEMPORAL & set(question.text.rstrip("?").split()) for question in asked)
    assert sum(bool(paper.album(number, 2, 0)[1]) for number in range(60)) > 50


def test_shuffled_answers_are_all_that_parts_that_arm_from_the_timelines(reader: paper.Reader) -> None:
    shown = paper.Shown(paper.images(reader, SMALL, 0), paper.films(reader, SMALL, 0))
    ours, control = (paper.batches(arm, reader, shown, SMALL, 0) for arm in ("timelines", "shuffled answers"))
    for _ in range(10):
        one, other = next(ours), next(control)
        assert one["visual"].equal(other["visual"])
        assert one["labels"].ne(IGNORED).equal(other["labels"].ne(IGNORED))
        differ = one["input_ids"] != other["input_ids"]
        assert differ.any()
        assert (one["labels"][differ] != IGNORED).all()


def test_tuning_moves_the_language_model_alone_and_leaves_the_given_model(any_reader: paper.Reader) -> None:
    before = {name: value.clone() for name, value in any_reader.model.state_dict().items()}
    tuned = paper.learn("timelines", any_reader, paper.Shown(paper.images(any_reader, SMALL, 0), []), SMALL, 0)
    moved = {name for name, value in tuned.model.state_dict().items() if not value.cpu().equal(before[name])}
    assert moved
    assert all("language_model" in name or name.startswith("lm_head") for name in moved)
    assert all(value.equal(before[name]) for name, value in any_reader.model.state_dict().items())


def test_the_experiment_fills_every_table_and_every_check_reads_it(
    reader: paper.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = SimpleNamespace(model=reader.model, tokenizer=reader.tokenizer, processor=reader.processor)
    monkeypatch.setattr(paper.zoo, "load", lambda name, **options: language)
    result = paper.experiment(SMALL)
    assert set(result.tables) == {"probes", "answers", "images", "checkpoints"}
    assert set(result.tables["answers"]["arm"]) == {"none", "text model", *paper.ARMS, paper.CEILING}
    assert (result.tables["answers"]["accuracy"].between(0, 1)).all()
    for claim in paper.CLAIMS:
        assert claim.check(result)
    assert Result.from_dict(result.to_dict()).to_dict() == result.to_dict()


# ---------------------------------------------------------------------------------------------------------- claims


def ideal() -> Result:
    """A made-up result in which every claim holds clearly; only the checks are under test here."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"probes": [], "answers": [], "images": [], "checkpoints": []}
    probes = {
        ("LSTM", "vis"): 0.98,
        ("LSTM", "llm"): 0.97,
        ("linear, last token", "llm"): 0.9,
        ("LSTM, shuffled labels", "vis"): 0.5,
        ("linear, mean of frames", "vis"): 0.5,
        ("linear, last frame", "vis"): 0.9,
    }
    arms = {"none": 0.5, "timelines": 0.65, "shuffled answers": 0.5, "other text": 0.51, "images only": 0.5}
    for seed in range(4):

        def near(value: float) -> float:
            return value + 0.005 * rng.standard_normal()

        for kind in shapes.KINDS:
            for arm, value in arms.items():
                for medium in ("video", "text"):
                    rows["answers"].append(
                        {"seed": seed, "arm": arm, "medium": medium, "kind": kind, "accuracy": near(value)}
                    )
            told = {"seed": seed, "arm": "text model", "medium": "text", "kind": kind, "accuracy": near(0.52)}
            rows["answers"].append(told)
        for kind in paper.PROBED:
            for (probe, states), value in probes.items():
                rows["probes"].append(
                    {"seed": seed, "kind": kind, "probe": probe, "states": states, "accuracy": near(value)}
                )
        rows["images"] += [{"seed": seed, "arm": arm, "accuracy": near(0.9)} for arm in arms]
        for step in range(6):
            score = near(0.5 + 0.05 * step)
            rows["checkpoints"].append({"seed": seed, "step": step, "text": score, "video": near(0.6 * score)})
    return Result({name: pd.DataFrame(entries) for name, entries in rows.items()})


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_each_check_holds_on_a_clear_effect_and_turns_red_on_its_control(claim) -> None:
    result = ideal()
    assert claim.direction(result) == "holds"
    assert claim.direction(claim.control.apply(result)) != "holds"


@pytest.mark.parametrize("claim", paper.CLAIMS, ids=lambda claim: claim.id)
def test_no_check_decides_on_a_single_seed(claim) -> None:
    result = ideal()
    single = Result({name: table[table["seed"] == 0] for name, table in result.tables.items()}, result.scalars)
    assert direction(claim.check(single)) == "unclear"


@pytest.mark.parametrize("arm", ["none", *paper.ARMS[1:]])
def test_transfer_turns_red_when_any_control_does_as_well(arm: str) -> None:
    result = ideal()
    table = result.tables["answers"]
    stand_in = table[table["arm"] == "timelines"].assign(arm=arm)
    equal = result.with_table("answers", pd.concat([table[table["arm"] != arm], stand_in], ignore_index=True))
    assert direction(paper.check_transfer(equal)) != "holds"


def test_brightness_which_no_timeline_tells_of_does_not_count() -> None:
    result = ideal()
    table = result.tables["answers"].copy()
    table.loc[table["kind"] == "brightness", "accuracy"] = 1.0
    changed = paper.on_video(result.with_table("answers", table), "timelines")
    assert changed.equals(paper.on_video(result, "timelines"))
    assert not any(q.type == "brightness" for told in TIMELINES for q in told.questions)


def test_videos_with_few_shapes_hold_two_things() -> None:
    spec = shapes.Spec(shapes=("circle", "square"))
    films = shapes.videos(10, kinds=("order",), spec=spec)
    assert all(len({frame.things[0] for frame in film.frames}) == 2 for film in films)


def test_a_video_is_one_thing_a_frame() -> None:
    assert all(len(frame.things) == 1 for film in shapes.videos(10) for frame in film.frames)
    assert isinstance(shapes.videos(1)[0].frames[0], Scene)
