"""Facts of the shapes world: what is drawn, said, asked and filmed agrees with the scene, from one seed."""

import random
import re

import numpy as np
import pytest

from midstream.data import shapes
from midstream.errors import RequestError

SCENES = shapes.scenes(400, seed=7)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", text))


def alone(**attributes: object) -> shapes.Scene:
    """One thing in the middle of a black image."""
    thing = {"shape": "square", "colour": "red", "size": "large", "texture": "plain", "x": 0.5, "y": 0.5, "depth": 0.0}
    return shapes.Scene((shapes.Thing(**{**thing, **attributes}),), "black")


def test_a_scene_depends_on_its_number_seed_and_split_alone() -> None:
    assert shapes.scenes(5, seed=3, start=20) == shapes.scenes(25, seed=3)[20:]
    assert shapes.scenes(5, seed=3) != shapes.scenes(5, seed=4)
    assert not set(shapes.scenes(200)) & set(shapes.scenes(200, split="test"))


def test_scenes_are_the_same_on_every_machine() -> None:
    thing = shapes.scene(0).things[0]
    assert (thing.shape, thing.colour, thing.size, thing.texture) == ("star", "orange", "small", "striped")
    assert thing.x == pytest.approx(0.8671528362936916, abs=1e-12)


def test_the_spec_bounds_what_scenes_hold() -> None:
    spec = shapes.Spec(things=(2, 3), colours=("red", "blue"), shapes=("ring",), overlap=0.0, backgrounds=("white",))
    for scene in shapes.scenes(100, spec=spec):
        assert 2 <= len(scene.things) <= 3
        assert scene.background == "white"
        assert {thing.shape for thing in scene.things} == {"ring"}
        pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
        assert not any(shapes.overlapping(*pair) for pair in pairs)


def test_held_out_pairs_are_never_in_train_and_always_in_test() -> None:
    spec = shapes.Spec(held_out=True)
    pairs = set(shapes.held_out_pairs(spec))
    assert 0 < len(pairs) < len(shapes.COLOURS) * len(shapes.SHAPES) / 4

    def held(scene: shapes.Scene) -> bool:
        return any((thing.colour, thing.shape) in pairs for thing in scene.things)

    assert not any(held(scene) for scene in shapes.scenes(300, spec=spec))
    assert all(held(scene) for scene in shapes.scenes(300, spec=spec, split="test"))
    train = [thing for scene in shapes.scenes(300, spec=spec) for thing in scene.things]
    assert {thing.colour for thing in train} == set(shapes.COLOURS)
    assert {thing.shape for thing in train} == set(shapes.SHAPES)


@pytest.mark.parametrize("wrong", [{"things": (0, 2)}, {"things": (3, 2)}, {"things": (1, 10)}])
def test_impossible_numbers_of_things_are_refused(wrong: dict) -> None:
    with pytest.raises(RequestError):
        shapes.Spec(**wrong)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_have_the_side_asked_for_and_the_thing_its_colour(size: int) -> None:
    image = shapes.render([alone()], size)[0]
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[size // 2, size // 2] / 255, shapes.COLOURS["red"], atol=0.01)
    np.testing.assert_allclose(image[0, 0] / 255, shapes.BACKGROUNDS["black"], atol=0.01)


def test_sides_outside_32_to_128_are_refused() -> None:
    with pytest.raises(RequestError, match="32 to 128"):
        shapes.render([alone()], 16)


def test_edges_are_anti_aliased() -> None:
    red = shapes.render([alone(shape="circle")], 64)[0][..., 0]
    between = (red > 30) & (red < 200)
    assert 10 < between.sum() < 80


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("size", [48, 96])
def test_boxes_hold_the_masks_tightly(shape: str, size: int) -> None:
    scene = alone(shape=shape, x=0.4, y=0.6)
    rows, columns = np.nonzero(shapes.masks(scene, size)[0])
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / size
    np.testing.assert_allclose(shapes.boxes(scene)[0], seen, atol=2.1 / size)


def test_masks_do_not_overlap_and_depth_is_that_of_the_nearest() -> None:
    crowded = [scene for scene in SCENES if len(scene.things) > 2][:60]
    for scene in crowded:
        masks, depth = shapes.masks(scene), shapes.depth(scene)
        assert masks.sum(0).max() <= 1
        for thing, mask in zip(scene.things, masks, strict=True):
            assert (depth[mask] == thing.depth).all()
        assert (depth[~masks.any(0)] == 1).all()


def test_a_thing_that_overlaps_another_leaves_some_of_it_to_be_seen() -> None:
    for scene in SCENES:
        for mask, whole in zip(shapes.masks(scene), scene.things, strict=True):
            full = shapes.masks(shapes.Scene((whole,), scene.background))[0]
            assert mask.sum() > 0.25 * full.sum()


def test_the_nearer_thing_is_drawn_over_the_farther_one() -> None:
    near, far = alone(depth=0.0).things[0], alone(depth=0.5, colour="blue", x=0.55).things[0]
    for order in ((near, far), (far, near)):
        image = shapes.render([shapes.Scene(order)], 64)[0]
        np.testing.assert_allclose(image[32, 34] / 255, shapes.COLOURS["red"], atol=0.01)


def test_all_text_is_made_of_the_vocabulary() -> None:
    rng = random.Random(0)
    for scene in SCENES:
        for wording in range(len(shapes.WORDINGS)):
            assert words(shapes.caption(scene, rng, wording)) <= set(shapes.VOCABULARY)
        for question in shapes.questions(scene, rng):
            assert words(f"{question.text} {question.answer}") <= set(shapes.VOCABULARY)
    for video in shapes.videos(200):
        question = shapes.video_question(video, rng)
        text = " ".join([event.text for event in video.timeline] + [question.text, question.answer])
        assert words(text) <= set(shapes.VOCABULARY)


def test_full_captions_name_every_attribute_of_every_thing() -> None:
    rng = random.Random(1)
    for scene in SCENES[:100]:
        for wording in range(4):
            said = words(shapes.caption(scene, rng, wording))
            for thing in scene.things:
                assert {thing.colour, thing.shape, thing.size, *thing.position.split()} <= said
                assert thing.texture == "plain" or thing.texture in said


def answer_again(question: shapes.Question, scene: shapes.Scene) -> str:
    """The answer found anew from the words of the question, by looking for the things it names."""
    nouns = {**{shape: shape for shape in shapes.SHAPES}, **{f"{shape}s": shape for shape in shapes.SHAPES}}
    nouns["crosses"] = "cross"

    def fits(phrase: str) -> list[shapes.Thing]:
        """Things that a phrase such as `the red circle at the top left` fits."""
        phrase, _, place = phrase.partition(" at the ")
        found = list(scene.things)
        for word in phrase.split():
            if word in shapes.COLOURS:
                found = [thing for thing in found if thing.colour == word]
            elif word in shapes.SIZES:
                found = [thing for thing in found if thing.size == word]
            elif word in shapes.TEXTURES:
                found = [thing for thing in found if thing.texture == word]
            elif word in nouns:
                found = [thing for thing in found if thing.shape == nouns[word]]
        return [thing for thing in found if not place or thing.position == place]

    def one(phrase: str) -> shapes.Thing:
        (thing,) = fits(phrase)
        return thing

    text = question.text.removesuffix("?")
    yes = {True: "yes", False: "no"}
    numbers = "zero one two three four".split()  # noqa: SIM905
    if text.startswith("what colour is "):
        return one(text.removeprefix("what colour is ")).colour
    if text.startswith("what shape is "):
        return one(text.removeprefix("what shape is ")).shape
    if text.startswith("where is "):
        return one(text.removeprefix("where is ")).position
    if text.startswith("how many "):
        return numbers[len(fits(text.removeprefix("how many ").removesuffix(" are there")))]
    if text.startswith("is there "):
        return yes[bool(fits(text.removeprefix("is there ")))]
    if match := re.fullmatch(r"do (.+) and (.+) have the same colour", text):
        return yes[one(match[1]).colour == one(match[2]).colour]
    if match := re.fullmatch(r"are there (more|fewer) (\w+) things than (\w+) things", text):
        first, second = len(fits(match[2])), len(fits(match[3]))
        return yes[first > second if match[1] == "more" else first < second]
    if match := re.fullmatch(r"is (.+) (larger|smaller) than (.+)", text):
        first, second = one(match[1]).radius, one(match[3]).radius
        return yes[first > second if match[2] == "larger" else first < second]
    match = re.fullmatch(r"is (.+) (left of|right of|above|below|in front of|behind) (.+)", text)
    assert match, text
    a, b = one(match[1]), one(match[3])
    truth = {
        "left of": a.x < b.x,
        "right of": a.x > b.x,
        "above": a.y < b.y,
        "below": a.y > b.y,
        "in front of": a.depth < b.depth,
        "behind": a.depth > b.depth,
    }
    return yes[truth[match[2]]]


def test_every_answer_is_found_again_from_the_words_of_its_question() -> None:
    rng = random.Random(2)
    asked = [(question, scene) for scene in SCENES for question in shapes.questions(scene, rng)]
    assert {question.type for question, _ in asked} == set(shapes.TYPES)
    for question, scene in asked:
        assert answer_again(question, scene) == question.answer, question


def test_yes_and_no_are_about_as_frequent() -> None:
    rng = random.Random(3)
    asked = [question for scene in shapes.scenes(3000) for question in shapes.questions(scene, rng)]
    for type in ("relation", "existence", "comparison"):
        answers = [question.answer == "yes" for question in asked if question.type == type]
        assert abs(np.mean(answers) - 0.5) < 0.05, type


def test_the_timeline_covers_every_frame_once() -> None:
    for video in shapes.videos(100):
        covered = [frame for event in video.timeline for frame in range(event.first, event.last + 1)]
        assert covered == list(range(len(video.frames)))
        assert len(video.timeline) >= 2


def test_reversing_the_frames_swaps_the_answer() -> None:
    for number, video in enumerate(shapes.videos(300)):
        forth = shapes.video_question(video, random.Random(number))
        back = shapes.video_question(video.reversed(), random.Random(number))
        named = [w for w in words(forth.text) if w in shapes.VOCABULARY]
        assert forth.answer in named
        if video.kind not in ("order", "colour"):  # there, the words of the question are drawn from the frames' order
            assert forth.answer != back.answer


def test_the_answer_stands_first_and_second_equally_often() -> None:
    rng = random.Random(4)
    places = []
    for video in shapes.videos(2000):
        question = shapes.video_question(video, rng)
        first = re.findall(r"(\w+) or", question.text)[0]
        places.append(first == question.answer)
    assert abs(np.mean(places) - 0.5) < 0.04


def test_no_single_frame_settles_a_question_about_order_growth_movement_or_brightness() -> None:
    """Each video and its reverse have the same frames and opposite answers, and both are as likely to be drawn."""
    rng = random.Random(5)
    made = shapes.videos(1000, kinds=("growth", "movement", "brightness"))
    answers = [shapes.video_question(video, rng).answer for video in made]
    for pair in (("grow", "shrink"), ("left", "right"), ("up", "down"), ("brighter", "darker")):
        chosen = [answer == pair[0] for answer in answers if answer in pair]
        assert abs(np.mean(chosen) - 0.5) < 0.1


@pytest.mark.parametrize("wrong", [{"frames": 3}, {"kinds": ("dance",)}])
def test_impossible_videos_are_refused(wrong: dict) -> None:
    with pytest.raises(RequestError):
        shapes.videos(1, **wrong)
