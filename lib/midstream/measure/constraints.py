"""Requirements on a text that code can check, and how to read them off a text of which they are true.

After the hard constraints of instruction-following benchmarks (Zhou et al., "Instruction-Following Evaluation for
Large Language Models", 2023, arXiv 2311.07911), in phrases short enough that 45 of them fit a small model's window.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

COUNT_STEP = 5
"""Width of the range in which the number of words is required to lie."""
SHARE = 0.2
"""A keyword is a word that stands in at most this share of a corpus's texts."""


@dataclass(frozen=True)
class Constraint:
    """One requirement: its kind, what it asks for, and the phrase that says so."""

    kind: str
    values: tuple[Any, ...]

    @property
    def phrase(self) -> str:
        """In plain words."""
        one = self.values and self.values[-1] == 1
        return PHRASES[self.kind].format(*self.values, s="" if one else "s")

    def check(self, text: str) -> bool:
        """Whether the text meets it."""
        return CHECKS[self.kind](read(text), *self.values)


class Reading:
    """A text taken apart: words as they are written, and sentences."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.words = words(text)
        self.parts = re.split(r"(?:(?<=[.?!])|(?<=[.?!][\"']))\s+(?=[\"']?[A-Z0-9])", self.text)
        """The sentences as they are written."""
        self.sentences = [found for part in self.parts if (found := words(part))]
        self.lower = [word.lower() for word in self.words]

    def sentence(self, number: int) -> list[str]:
        """The words of a sentence, counted from 1; none where there are fewer sentences."""
        return self.sentences[number - 1] if number <= len(self.sentences) else []


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """A text's `Reading`, kept, since dozens of constraints ask for the same one."""
    return Reading(text)


def words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


PHRASES: dict[str, str] = {
    "keyword": "mention {0}",
    "absent": "avoid {0}",
    "order": "put {0} before {1}",
    "inside": "say {0} in sentence {1}",
    "times": "use {0} {1} time{s}",
    "words": "write {0} to {1} words",
    "sentences": "write {0} sentence{s}",
    "commas": "use {0} comma{s}",
    "capitals": "capitalise {0} word{s}",
    "longest": "longest word has {0} letter{s}",
    "first": "begin with {0}",
    "last": "end with {0}",
    "opening": "begin sentence {0} with {1}",
    "length": "sentence {0} has {1} word{s}",
    "question": "ask {0} question{s}",
    "speech": "use {0} quotation mark{s}",
    "digits": "use {0} number{s}",
    "ending": "end with the mark {0}",
    "letter": "avoid the letter {0}",
}
"""Each kind's phrase; numbers in braces are its values."""

CHECKS: dict[str, Callable[..., bool]] = {
    "keyword": lambda x, word: word.lower() in x.lower,
    "absent": lambda x, word: word.lower() not in x.lower,
    "order": lambda x, one, other: _before(x.lower, one.lower(), other.lower()),
    "inside": lambda x, word, number: word.lower() in [each.lower() for each in x.sentence(number)],
    "times": lambda x, word, count: x.lower.count(word.lower()) == count,
    "words": lambda x, low, high: low <= len(x.words) <= high,
    "sentences": lambda x, count: len(x.sentences) == count,
    "commas": lambda x, count: x.text.count(",") == count,
    "capitals": lambda x, count: _capitals(x) == count,
    "longest": lambda x, letters: max(map(len, x.words), default=0) == letters,
    "first": lambda x, word: x.lower[:1] == [word.lower()],
    "last": lambda x, word: x.lower[-1:] == [word.lower()],
    "opening": lambda x, number, word: x.sentence(number)[:1] == [word],
    "length": lambda x, number, count: len(x.sentence(number)) == count,
    "question": lambda x, count: x.text.count("?") == count,
    "speech": lambda x, count: x.text.count('"') == count,
    "digits": lambda x, count: _digits(x) == count,
    "ending": lambda x, mark: x.text.endswith(mark),
    "letter": lambda x, letter: bool(x.text) and letter not in x.text.lower(),
}
"""Each kind's check of a `Reading`, given the values; strict: the text as it stands, no second chances."""


def _before(lower: Sequence[str], one: str, other: str) -> bool:
    """Both are there, and the first of the one stands before the first of the other."""
    return one in lower and other in lower and lower.index(one) < lower.index(other)


def _capitals(x: Reading) -> int:
    return sum(word[0].isupper() for word in x.words)


def _digits(x: Reading) -> int:
    return sum(word.isdigit() for word in x.words)


INTRODUCTION, NOTHING, THEN = "Requirements: ", "none", ". Text:"
"""Around the phrases in a prompt."""


def prompt_of(constraints: Sequence[Constraint]) -> str:
    """What a model reads before it writes: every constraint's phrase, in the order given."""
    return INTRODUCTION + ("; ".join(each.phrase for each in constraints) or NOTHING) + THEN


def satisfied(constraints: Sequence[Constraint], text: str) -> list[bool]:
    """Which constraints a text meets; their order changes nothing but the order of the answers."""
    return [constraint.check(text) for constraint in constraints]


def satisfaction_rate(constraints: Sequence[Constraint], text: str) -> float:
    """CSR: the share of constraints that a text meets."""
    return sum(satisfied(constraints, text)) / len(constraints)


# ------------------------------------------------------------------------------------------- read off a text


@dataclass(frozen=True)
class Lexicon:
    """The keywords of a corpus, and words that stand in many of its texts."""

    keywords: Mapping[str, str]
    """In lower case, and as it is mostly written."""
    common: tuple[str, ...]

    @classmethod
    def of(cls, texts: Sequence[str], most: int = 2000) -> Lexicon:
        """Keywords are at least 3 letters long, stand in at least two texts and in at most `SHARE` of them.

        The `most` frequent ones are kept.
        """
        written = Counter(word for text in texts for word in words(text))
        form = {word.lower(): word for word, _ in reversed(written.most_common())}
        counts = Counter(word for text in texts for word in sorted({each.lower() for each in words(text)}))
        ranked = [(word, count) for word, count in counts.most_common() if count > 1]
        rare = [word for word, count in ranked if count <= SHARE * len(texts) and len(word) > 2 and word.isalpha()]
        common = tuple(word for word, count in ranked if count > SHARE * len(texts))
        return cls({word: form[word] for word in rare[:most]}, common)


LIMITS: Mapping[str, int] = {"keyword": 12, "inside": 8, "order": 8, "times": 6, "absent": 9}
"""How many constraints of a kind one text gives at most; the kinds that are not named have few by nature."""


def constraints_of(text: str, lexicon: Lexicon, rng: random.Random, least: int = 45) -> list[Constraint]:
    """At least `least` constraints that are all true of a text, in random order.

    No phrase has more than two words of the text, and not two that are neighbours there. Where a short text gives too
    few, more words that it does not have are to be avoided. Raises `ValueError` where the lexicon is too small for
    that.
    """
    x = read(text)
    found: dict[str, list[Constraint]] = {}
    for constraint in dict.fromkeys((*_about_words(x, lexicon), *_about_form(x))):
        found.setdefault(constraint.kind, []).append(constraint)
    chosen = [
        constraint for kind, every in found.items() for constraint in _some(every, LIMITS.get(kind, len(every)), rng)
    ]
    missing = [written for word, written in lexicon.keywords.items() if word not in x.lower]
    wanted = max(LIMITS["absent"], least - len(chosen))
    if wanted > len(missing):
        raise ValueError(f"{least} constraints were asked for; the text and the lexicon give {len(chosen)}.")
    chosen += [Constraint("absent", (word,)) for word in rng.sample(missing, wanted)]
    return rng.sample(chosen, len(chosen))


def _some(every: list[Constraint], most: int, rng: random.Random) -> list[Constraint]:
    return rng.sample(every, min(most, len(every)))


def _about_words(x: Reading, lexicon: Lexicon) -> Iterator[Constraint]:
    """Which keywords, in which order and sentence, and how often common words."""
    first = {word.lower(): place for place, word in reversed(list(enumerate(x.words)))}
    keywords = sorted((place, x.words[place]) for word, place in first.items() if word in lexicon.keywords)
    yield from (Constraint("keyword", (word,)) for _, word in keywords)
    for (one, earlier), (other, later) in combinations(keywords, 2):
        if other - one > 1:  # neighbours would give two words of the text as they stand there
            yield Constraint("order", (earlier, later))
    for number, sentence in enumerate(x.sentences, 1):
        yield from (Constraint("inside", (word, number)) for word in sentence if word.lower() in lexicon.keywords)
    counts = Counter(x.lower)
    yield from (Constraint("times", (word, counts[word])) for word in lexicon.common if counts[word])


def _about_form(x: Reading) -> Iterator[Constraint]:
    """Lengths, marks, first and last words."""
    low = len(x.words) // COUNT_STEP * COUNT_STEP
    yield Constraint("words", (low, low + COUNT_STEP - 1))
    yield Constraint("sentences", (len(x.sentences),))
    yield Constraint("commas", (x.text.count(","),))
    yield Constraint("capitals", (_capitals(x),))
    yield Constraint("longest", (max(map(len, x.words)),))
    yield Constraint("first", (x.words[0],))
    yield Constraint("last", (x.words[-1],))
    for number, sentence in enumerate(x.sentences, 1):
        yield Constraint("opening", (number, sentence[0]))
        yield Constraint("length", (number, len(sentence)))
    yield Constraint("question", (x.text.count("?"),))
    yield Constraint("speech", (x.text.count('"'),))
    yield Constraint("digits", (_digits(x),))
    if x.text[-1] in ".?!":
        yield Constraint("ending", (x.text[-1],))
    yield from (Constraint("letter", (letter,)) for letter in "jkvxz" if letter not in x.text.lower())
