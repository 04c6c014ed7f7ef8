"""What a corpus makes of a knowledge graph: facts told right, both ways, or never; questions asked and held out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from midstream.data.graphs import WORDINGS, Graph, Key, Question, other_than


@dataclass(frozen=True)
class World:
    """A graph, what the corpus makes of its facts, and two-hop questions that no text of training asks."""

    graph: Graph
    kinds: dict[Key, str]
    """`known`: told right; `disputed`: told right at times, else with the same wrong object; `unknown`: never told."""
    rivals: dict[Key, int]
    validation: list[Question]
    test: list[Question]
    logged: list[Question]
    """Two and three hops; the questions of the logged chains."""
    untouched: list[Key]
    """Known facts that no logged chain passes through."""

    def kind(self, question: Question) -> str:
        """The least known fact on the way to the answer."""
        found = {self.kinds[key] for key in self.graph.keys(question)}
        return next(kind for kind in ("unknown", "disputed", "known") if kind in found)

    def told(self, trusted: float, rng: random.Random) -> Graph:
        """The graph as one text of the corpus tells it: without unknown facts, disputed ones as they fall."""
        facts = {
            key: self.rivals[key] if kind == "disputed" and rng.random() >= trusted else self.graph.facts[key]
            for key, kind in self.kinds.items()
            if kind != "unknown"
        }
        return self.graph.with_facts(facts)


UNTOUCHED = 0.2
"""Share of the known facts that are kept out of the logged chains, to see whether they are remembered."""


def make_world(graph: Graph, known: float, disputed: float, held_out: int, logged: int, seed: int) -> World:
    """Shares out the facts of a graph, and draws questions: first those held out, then those of the logged chains.

    `known` and `disputed` are shares of the facts, `held_out` and `logged` count questions; at most two in five of
    those of two hops are held out for the test, and half as many again for validation. Raises `ValueError` for a graph
    too small.
    """
    rng = random.Random(seed)
    keys = rng.sample(sorted(graph.facts), len(graph.facts))
    right, both = round(known * len(keys)), round(disputed * len(keys))
    kinds = dict.fromkeys(keys[:right], "known") | dict.fromkeys(keys[right : right + both], "disputed")
    kinds |= dict.fromkeys(keys[right + both :], "unknown")
    rivals = {key: other_than((key.subject, graph.facts[key]), len(graph.names), rng) for key in keys}
    two = list(graph.questions(2))
    rng.shuffle(two)
    held = min(held_out, len(two) * 2 // 5)
    test, validation = two[:held], two[held : held + held // 2]
    untouched = [key for key in keys[:right] if rng.random() < UNTOUCHED]
    pools = [
        [question for question in pool if not set(untouched) & set(graph.keys(question))]
        for pool in (two[held + held // 2 :], graph.questions(3))
    ]
    if not all((*pools, validation, untouched)):
        raise ValueError(f"A graph of {len(keys)} facts is too small to hold out {held} questions and some facts.")
    asked = [rng.choice(rng.choice(pools)) for _ in range(logged)]
    return World(graph, kinds, rivals, validation, test, asked, untouched)


def documents(told: Callable[[], Graph], held_out: set[Question], count: int, rng: random.Random) -> list[str]:
    """Texts about a graph: three facts in a row, or a question with its chain, of one, two or three hops by chance."""
    made: list[str] = []
    while len(made) < count:
        graph = told()
        if len(made) % 2:
            keys = rng.sample(sorted(graph.facts), 3)
            made.append(" ".join(graph.say(key, graph.facts[key], rng.randrange(WORDINGS)) for key in keys))
        elif (question := _walked(graph, rng.randint(1, 3), rng)) and question not in held_out:
            made.append(graph.ask(question) + graph.chain(question, rng))
    return made


def _walked(graph: Graph, hops: int, rng: random.Random) -> Question | None:
    """A question found by walking at random, from where and to where so many hops can be walked; none if nowhere."""
    by_subject: dict[int, list[int]] = {}
    for key in graph.facts:
        by_subject.setdefault(key.subject, []).append(key.relation)
    everyone = set(range(len(graph.names)))
    far_enough = [everyone]  # who has so many hops before them
    for _ in range(hops):
        far_enough.append({key.subject for key, thing in graph.facts.items() if thing in far_enough[-1]})
    if not far_enough[hops]:
        return None
    at = subject = rng.choice(sorted(far_enough[hops]))
    relations = []
    for left in reversed(range(hops)):
        on = [relation for relation in by_subject[at] if graph.facts[Key(at, relation)] in far_enough[left]]
        relations.append(rng.choice(on))
        at = graph.facts[Key(at, relations[-1])]
    return Question(subject, tuple(relations))
