"""What is said of a scene: captions in several wordings, and questions with the one right answer.

All text is lower case, its words are those of `WORDS`, and every question is about something the scene settles.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from midstream.data.shapes.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing, overlapping

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CLEAR_OF = 0.15
"""How far apart two centres must lie, in shares of the side, to be called left of or above one another."""
SAME_COLOUR_ODDS = 0.32
"""About the number of scenes with two things of one colour for each scene of several things without."""
TYPES = ("colour", "shape", "count", "relation", "existence", "position", "comparison")


@dataclass(frozen=True)
class Question:
    """One question about a scene."""

    type: str
    text: str
    answer: str
    """One or two words."""


# ---------------------------------------------------------------------------------------------------- captions


def caption(scene: Scene, rng: random.Random, wording: int | None = None) -> str:
    """A caption in one of `len(WORDINGS)` wordings, drawn unless named; the things come in an order drawn anew.

    All but the last two wordings name every thing with all attributes.
    """
    things = list(scene.things)
    rng.shuffle(things)
    chosen = rng.choice(WORDINGS) if wording is None else WORDINGS[wording]
    return chosen(things, rng)


def describe(thing: Thing, *, where: bool = True) -> str:
    """`a large striped red circle at the top left`; a plain texture is left unsaid."""
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    place = f" at the {thing.position}" if where else ""
    return f"a {thing.size} {texture}{thing.colour} {thing.shape}{place}"


def a(words: str) -> str:
    """The words with their indefinite article: `a red circle`, `an orange ring`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(things: Sequence[Thing], rng: random.Random) -> str:
    return " and ".join(map(describe, things))


def _there_is(things: Sequence[Thing], rng: random.Random) -> str:
    return "there is " + ", ".join(map(describe, things))


def _counted(things: Sequence[Thing], rng: random.Random) -> str:
    noun = "thing" if len(things) == 1 else "things"
    return f"{NUMBERS[len(things)]} {noun}: " + ", ".join(map(describe, things))


def _place_first(things: Sequence[Thing], rng: random.Random) -> str:
    return ", ".join(f"at the {thing.position} {describe(thing, where=False)}" for thing in things)


def _short(things: Sequence[Thing], rng: random.Random) -> str:
    return " and ".join(a(f"{thing.colour} {thing.shape}") for thing in things)


def _related(things: Sequence[Thing], rng: random.Random) -> str:
    """Two things and how they stand to one another, where that is clear; else the short caption."""
    for one, other in itertools.permutations(things, 2):
        if relations := _relations(one, other):
            names = (a(f"{thing.colour} {thing.shape}") for thing in (one, other))
            return f" {rng.choice(relations)} ".join(names)
    return _short(things, rng)


WORDINGS: tuple[Callable[[Sequence[Thing], random.Random], str], ...] = (
    _listed,
    _there_is,
    _counted,
    _place_first,
    _short,
    _related,
)

# --------------------------------------------------------------------------------------------------- questions


def questions(scene: Scene, rng: random.Random, types: Sequence[str] = TYPES) -> list[Question]:
    """One question of each type that the scene can settle, in the order of `types`.

    Questions to be answered by yes or no have either answer with equal chance, over scenes.
    """
    asked = (_ASKED[type](scene, rng) for type in types)
    return [question for question in asked if question]


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    found = _named(scene, rng, without="colour")
    return found and Question("colour", f"what colour is {found[1]}?", found[0].colour)


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    found = _named(scene, rng, without="shape")
    return found and Question("shape", f"what shape is {found[1]}?", found[0].shape)


def _position(scene: Scene, rng: random.Random) -> Question | None:
    found = _named(scene, rng, without="position")
    if not found or not found[0].stands_clearly:
        return None
    return Question("position", f"where is {found[1]}?", found[0].position)


def _count(scene: Scene, rng: random.Random) -> Question:
    """Of all things, or of those with one attribute: first the number is drawn, then what there is that many of."""
    if rng.random() < 1 / 4:
        return Question("count", "how many things are there?", NUMBERS[len(scene.things)])
    by_number: dict[int, list[tuple[str, str]]] = {}
    for field in ("colour", "shape", "size"):
        for value in _values(field):
            by_number.setdefault(_number(scene, field, value), []).append((field, value))
    number = rng.choice(sorted(by_number))
    field, value = rng.choice(by_number[number])
    return Question("count", f"how many {_plural(field, value)} are there?", NUMBERS[number])


def _plural(field: str, value: str) -> str:
    if field != "shape":
        return f"{value} things"
    return "crosses" if value == "cross" else f"{value}s"


def _existence(scene: Scene, rng: random.Random) -> Question:
    """Of a colour and a shape: there, or with one of the two changed so that it is not."""
    pairs = {(thing.colour, thing.shape) for thing in scene.things}
    colour, shape = rng.choice(sorted(pairs))
    if rng.random() < 0.5:
        return Question("existence", f"is there {a(f'{colour} {shape}')}?", "yes")
    near = [(c, shape) for c in COLOURS] + [(colour, s) for s in SHAPES]
    # half of the absent pairs join a colour and a shape that are both there, where the scene has such
    mixed = [(c, s) for c, _ in sorted(pairs) for _, s in sorted(pairs) if (c, s) not in pairs]
    absent = [pair for pair in near if pair not in pairs]
    colour, shape = rng.choice(mixed if mixed and rng.random() < 0.5 else absent)
    return Question("existence", f"is there {a(f'{colour} {shape}')}?", "no")


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    """Two things; the relation asked for is theirs, or its opposite."""
    pairs = [pair for pair in itertools.permutations(scene.things, 2) if _relations(*pair)]
    rng.shuffle(pairs)
    for one, other in pairs:
        names = _name(one, scene, rng, without="position"), _name(other, scene, rng, without="position")
        if names[0] and names[1]:
            relation, answer = rng.choice(_relations(one, other)), "yes"
            if rng.random() < 0.5:
                relation, answer = OPPOSITES[relation], "no"
            return Question("relation", f"is {names[0]} {relation} {names[1]}?", answer)
    return None


def _comparison(scene: Scene, rng: random.Random) -> Question | None:
    """Of two things' sizes or colours, or of two numbers."""
    kinds = [_compare_sizes, _compare_colours, _compare_numbers]
    rng.shuffle(kinds)
    return next((question for kind in kinds if (question := kind(scene, rng))), None)


def _compare_sizes(scene: Scene, rng: random.Random) -> Question | None:
    """The one asked for first is the larger one, or the smaller one, with equal chance."""
    pairs = [(a, b) for a, b in itertools.permutations(scene.things, 2) if a.size == "large" and b.size == "small"]
    rng.shuffle(pairs)
    for large, small in pairs:
        first = _name(large, scene, rng, without="size"), _name(small, scene, rng, without="size")
        if first[0] and first[1]:
            word = rng.choice(("larger", "smaller"))
            swapped = rng.random() < 0.5
            names = first[::-1] if swapped else first
            answer = "yes" if (word == "larger") != swapped else "no"
            return Question("comparison", f"is {names[0]} {word} than {names[1]}?", answer)
    return None


def _compare_colours(scene: Scene, rng: random.Random) -> Question | None:
    """Two of one colour wherever there are such; elsewhere two that differ, asked seldom enough to even out."""
    pairs = list(itertools.permutations(scene.things, 2))
    same = [pair for pair in pairs if pair[0].colour == pair[1].colour]
    if not same and rng.random() > SAME_COLOUR_ODDS:
        return None
    rng.shuffle(pairs)
    for one, other in same or pairs:
        names = _name(one, scene, rng, without="colour"), _name(other, scene, rng, without="colour")
        if names[0] and names[1]:
            answer = "yes" if same else "no"
            return Question("comparison", f"do {names[0]} and {names[1]} have the same colour?", answer)
    return None


def _compare_numbers(scene: Scene, rng: random.Random) -> Question | None:
    """Of two colours that are there, in different numbers."""
    counts = {colour: _number(scene, "colour", colour) for colour in sorted({t.colour for t in scene.things})}
    pairs = [(a, b) for a, b in itertools.permutations(counts, 2) if counts[a] > counts[b]]
    if not pairs:
        return None
    many, few = rng.choice(pairs)
    word = rng.choice(("more", "fewer"))
    swapped = rng.random() < 0.5
    first, second = (few, many) if swapped else (many, few)
    answer = "yes" if (word == "more") != swapped else "no"
    return Question("comparison", f"are there {word} {first} things than {second} things?", answer)


_ASKED: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "existence": _existence,
    "position": _position,
    "comparison": _comparison,
}

# ------------------------------------------------------------------------------------- naming and relating things

OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
}


def _relations(one: Thing, other: Thing) -> list[str]:
    """All relations that one thing clearly has to another."""
    across, down = other.x - one.x, other.y - one.y
    found = []
    if abs(across) > CLEAR_OF:
        found.append("left of" if across > 0 else "right of")
    if abs(down) > CLEAR_OF:
        found.append("above" if down > 0 else "below")
    if overlapping(one, other):
        found.append("in front of" if one.depth < other.depth else "behind")
    return found


def _named(scene: Scene, rng: random.Random, without: str) -> tuple[Thing, str] | None:
    """A thing of the scene and a phrase that fits it alone, the attribute `without` unsaid; None where none has one."""
    things = list(scene.things)
    rng.shuffle(things)
    named = ((thing, _name(thing, scene, rng, without)) for thing in things)
    return next(((thing, name) for thing, name in named if name), None)


def _name(thing: Thing, scene: Scene, rng: random.Random, without: str) -> str | None:
    """`the red circle`, `the large thing at the top left`: drawn from the shortest phrases that fit one thing only."""
    for length in (1, 2, 3):
        phrases = [phrase for phrase in _phrases(thing, scene, without) if phrase[0] == length]
        if phrases:
            return rng.choice(phrases)[1]
    return None


def _phrases(thing: Thing, scene: Scene, without: str) -> Iterator[tuple[int, str]]:
    """Every set of up to three attributes that fits this thing alone, as its size and the phrase."""
    known = [field for field in ("size", "texture", "colour", "shape", "position") if field != without]
    if thing.texture == "plain":
        known.remove("texture")
    if not thing.stands_clearly and "position" in known:
        known.remove("position")
    for length in (1, 2, 3):
        for fields in itertools.combinations(known, length):
            if all(other is thing or not _same(thing, other, fields) for other in scene.things):
                yield length, _phrase(thing, fields)


def _same(one: Thing, other: Thing, fields: Sequence[str]) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def _phrase(thing: Thing, fields: Sequence[str]) -> str:
    words = [getattr(thing, field) for field in ("size", "texture", "colour") if field in fields]
    words.append(thing.shape if "shape" in fields else "thing")
    place = f" at the {thing.position}" if "position" in fields else ""
    return f"the {' '.join(words)}{place}"


def _values(field: str) -> tuple[str, ...]:
    return {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}[field]


def _number(scene: Scene, field: str, value: str) -> int:
    return sum(getattr(thing, field) == value for thing in scene.things)


_OTHER_WORDS = """
top bottom left right center above below in front of behind at the a an thing things and there is are what colour shape
where how many do have same yes no larger smaller more fewer than ? , : .
"""
_ATTRIBUTES = (*COLOURS, *SHAPES, *(_plural("shape", shape) for shape in SHAPES), *SIZES, *TEXTURES, *NUMBERS)
WORDS: tuple[str, ...] = tuple(dict.fromkeys((*_ATTRIBUTES, *_OTHER_WORDS.split())))
"""Every word and mark that captions, questions and answers are made of."""
