"""Knowledge graphs, and a generated one of people: facts in words, and questions whose answer lies some facts away."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

RELATIONS = ("friend", "teacher", "doctor", "cousin", "neighbour", "guide", "rival", "boss")
_SYLLABLES = [onset + vowel for onset in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDINGS = 2
"""How many ways there are to say a fact."""


class Key(NamedTuple):
    """What a fact is about: the place of a name, and the place of a relation."""

    subject: int
    relation: int


class Question(NamedTuple):
    """From a subject along relations, in the order in which they are followed."""

    subject: int
    relations: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Entities, here people, and facts about them; a relation leads from an entity to one other."""

    names: tuple[str, ...]
    relations: tuple[str, ...]
    facts: Mapping[Key, int]
    """Key → place of the object's name."""
    pattern: re.Pattern[str] = field(repr=False)
    """Any of the names, as a whole word."""
    asks: str = "Who"
    """The word with which a question begins."""

    def questions(self, hops: int) -> Iterator[Question]:
        """Every question of so many hops that the facts answer."""
        follow: dict[int, list[int]] = {}
        for key in self.facts:
            follow.setdefault(key.subject, []).append(key.relation)
        paths = [Question(subject, ()) for subject in follow]
        for _ in range(hops):
            paths = [Question(q.subject, (*q.relations, r)) for q in paths for r in follow.get(self.walk(q)[-1], ())]
        yield from paths

    def walk(self, question: Question) -> list[int]:
        """The people met on the way, the subject first, the answer last."""
        met = [question.subject]
        for relation in question.relations:
            met.append(self.facts[Key(met[-1], relation)])
        return met

    def keys(self, question: Question) -> list[Key]:
        """The facts that a question passes through."""
        return [Key(person, r) for person, r in zip(self.walk(question), question.relations, strict=False)]

    def ask(self, question: Question) -> str:
        """`Who is the teacher of the friend of Bavo?`"""
        asked = " of ".join(f"the {self.relations[relation]}" for relation in reversed(question.relations))
        return f"{self.asks} is {asked} of {self.names[question.subject]}?"

    def say(self, key: Key, of: int, wording: int) -> str:
        """One fact, or a claim that looks like one, in one of `WORDINGS` wordings."""
        subject, relation, thing = self.names[key.subject], self.relations[key.relation], self.names[of]
        return (f"The {relation} of {subject} is {thing}.", f"{subject} has the {relation} {thing}.")[wording]

    def chain(self, question: Question, rng: random.Random) -> str:
        """The facts that answer a question, in order, each in a wording drawn anew; begins with a space."""
        said = (self.say(key, self.facts[key], rng.randrange(WORDINGS)) for key in self.keys(question))
        return "".join(f" {step}" for step in said)

    def mentions(self, text: str) -> list[tuple[int, int]]:
        """Where names stand in a text, as ranges of characters."""
        return [match.span() for match in self.pattern.finditer(text)]

    def with_facts(self, facts: Mapping[Key, int]) -> Graph:
        """The same people with other facts."""
        return replace(self, facts=facts)


def generate(people: int, relations: int, facts_each: int, seed: int) -> Graph:
    """A graph in which each person has `facts_each` of the first `relations` relations, to people drawn at random.

    Raises `ValueError` for more relations, facts or people than there can be.
    """
    if not facts_each <= relations <= len(RELATIONS) or not 2 <= people <= len(_SYLLABLES) ** 2:
        raise ValueError(
            f"A graph has 2 to {len(_SYLLABLES) ** 2} people, at most {len(RELATIONS)} relations and no more facts a "
            f"person than relations; got {people} people, {relations} relations, {facts_each} facts a person."
        )
    rng = random.Random(seed)
    names = invented_names(people, rng)
    facts = {
        Key(subject, relation): other_than((subject,), people, rng)
        for subject in range(people)
        for relation in sorted(rng.sample(range(relations), facts_each))
    }
    return with_names(names, RELATIONS[:relations], facts)


def invented_names(count: int, rng: random.Random) -> tuple[str, ...]:
    """So many different names of two syllables, such as Bavo."""
    pairs = rng.sample(range(len(_SYLLABLES) ** 2), count)
    base = len(_SYLLABLES)
    return tuple((_SYLLABLES[pair // base] + _SYLLABLES[pair % base]).capitalize() for pair in pairs)


def with_names(
    names: tuple[str, ...], relations: tuple[str, ...], facts: Mapping[Key, int], asks: str = "Who"
) -> Graph:
    """A graph whose names can be found in texts."""
    return Graph(names, relations, facts, re.compile(rf"\b(?:{'|'.join(names)})\b"), asks)


def other_than(taken: Sequence[int], people: int, rng: random.Random) -> int:
    """A person who is none of those named."""
    return rng.choice([person for person in range(people) if person not in taken])
