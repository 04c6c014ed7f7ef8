"""Short stories from a grammar: three to six sentences about a child, an animal and a place, made from one seed.

A story is plain text with names, numbers, questions and speech, so that many things can be checked of it by code. A
quarter of all pairs of animal and place is held out: no story of the split `train` holds both words of such a pair,
every story of the split `test` may.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "test"]

WORDS: dict[str, tuple[str, ...]] = {
    "name": ("Lily", "Tom", "Mia", "Ben", "Zoe", "Max", "Ann", "Leo", "Eva", "Sam", "Ida", "Jack"),
    "animal": ("dog", "cat", "fox", "hen", "bear", "frog", "duck", "goat", "wolf", "crow", "mouse", "horse"),
    "place": ("park", "lake", "farm", "shop", "hill", "wood", "beach", "bridge", "school", "river", "barn", "market"),
    "thing": ("ball", "hat", "kite", "book", "drum", "lamp", "boat", "rope", "coin", "bell", "cup", "shoe"),
    "food": ("bread", "soup", "cake", "rice", "honey", "plums", "cheese", "nuts"),
    "colour": ("red", "blue", "green", "white", "black", "yellow", "brown", "pink"),
    "kind": ("small", "loud", "brave", "shy", "tall", "clever", "hungry", "quiet"),
    "weather": ("sunny", "windy", "cold", "foggy", "warm", "rainy"),
    "feeling": ("happy", "sad", "proud", "tired", "angry", "calm"),
    "did": ("danced", "sang", "slept", "played", "swam", "laughed", "waited", "worked"),
    "time": ("Today", "Yesterday", "Once", "Later"),
    "number": ("2", "3", "4", "5", "6", "7"),
}
OPENINGS = (
    "{time}, {name} went to the {place} with a {kind} {animal}.",
    "{name} had a {kind} {animal} that lived near the {place}.",
    "One {weather} morning a {kind} {animal} came to the {place}.",
    "A {animal} and a {kind} {animal} met {name} at the {place}.",
)
MIDDLES = (
    "It was {weather} and {weather} there.",
    "{name} had {number} {colour} cups and some {food}.",
    "The {animal} found a {colour} {thing}, a {thing} and a {kind} {name2}.",
    'Then {name} asked, "Where is my {colour} {thing}?"',
    "They {did} and {did} for {number} days.",
    "Soon {name} gave the {thing} to the {animal}.",
    "But the {kind} {animal} wanted {food}, not {food}.",
    '"Look at the {thing}!" said {name}.',
    "In the {place}, {name} hid {number} things under a {thing}.",
    "After lunch they {did} by the {place}.",
)
ENDINGS = (
    "In the end, {name} was {feeling}.",
    "At night everyone {did} and felt {feeling}.",
    "So they went home with the {thing}.",
    "And where did the {animal} sleep?",
    "The {kind} {animal} was {feeling} and {feeling}.",
)
SENTENCES = (3, 6)
"""Fewest and most of a story."""


def stories(count: int, *, seed: int = 0, split: Split = "train", start: int = 0) -> list[str]:
    """Stories number `start` to `start + count - 1` of a split; each depends on its own number and the seed alone."""
    return [story(number, seed=seed, split=split) for number in range(start, start + count)]


def story(number: int, *, seed: int = 0, split: Split = "train") -> str:
    """One story of a split; a training story with a held-out pair is drawn again."""
    rng = random.Random(f"story/{seed}/{split}/{number}")
    while True:
        text = " ".join(_sentences(rng))
        if split == "test" or not holds_out(text):
            return text


def held_out_pairs() -> frozenset[tuple[str, str]]:
    """The pairs of animal and place kept from training: each word is in other pairs."""
    return frozenset(
        (animal, place)
        for row, animal in enumerate(WORDS["animal"])
        for column, place in enumerate(WORDS["place"])
        if (row + column) % 4 == 0
    )


_PAIRS = held_out_pairs()


def holds_out(text: str) -> bool:
    """Whether both words of a held-out pair stand in the text."""
    found = set(re.findall(r"[a-z]+", text))
    animals, places = found.intersection(WORDS["animal"]), found.intersection(WORDS["place"])
    return any((animal, place) in _PAIRS for animal in animals for place in places)


def _sentences(rng: random.Random) -> Iterator[str]:
    """An opening, different middles, an ending; words of one class are all different until the class is used up."""
    left = {kind: rng.sample(words, len(words)) for kind, words in WORDS.items()}
    hero = left["name"].pop()
    forms = [rng.choice(OPENINGS), *rng.sample(MIDDLES, rng.randint(*SENTENCES) - 2), rng.choice(ENDINGS)]
    for form in forms:
        yield re.sub(r"{(\w+?)(2?)}", lambda slot: _word(slot, left, hero, rng), form)


def _word(slot: re.Match[str], left: dict[str, list[str]], hero: str, rng: random.Random) -> str:
    """A new word of the slot's class; a name is mostly the hero's, for stories come back to their heroes."""
    kind, second = slot.groups()
    if kind == "name" and not second and rng.random() < 0.6:
        return hero
    if not left[kind]:
        left[kind] = rng.sample(WORDS[kind], len(WORDS[kind]))
    return left[kind].pop()
