"""Claims and their two verdicts.

*Direction*: does the claim's comparison hold at our scale, over seeds, with an interval?
*Number*: is the paper's figure reproduced in the paper's own setting? The two are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from midstream.measure.intervals import Interval
from midstream.paper import Result

Direction = Literal["holds", "fails", "unclear"]
Side = Literal["above", "below"]


@dataclass(frozen=True)
class Comparison:
    """One measured quantity that a claim says lies above (or below) a threshold fixed before the run."""

    what: str
    interval: Interval
    side: Side = "above"
    threshold: float = 0.0
    unit: str = ""

    @property
    def verdict(self) -> Direction:
        """`holds` when the whole interval is on the claimed side, `fails` when it is wholly on the other."""
        above, below = self.interval.low > self.threshold, self.interval.high < self.threshold
        if not above and not below:
            return "unclear"
        return "holds" if above == (self.side == "above") else "fails"


def direction(comparisons: Sequence[Comparison]) -> Direction:
    """A claim holds when each comparison holds, fails when one fails, and is unclear otherwise."""
    if not comparisons:
        raise ValueError("a claim needs at least one comparison: a check that looks at nothing cannot fail")
    verdicts = {comparison.verdict for comparison in comparisons}
    if "fails" in verdicts:
        return "fails"
    return "unclear" if "unclear" in verdicts else "holds"


@dataclass(frozen=True)
class PaperNumber:
    """A figure the paper reports, and how to read ours.

    `tolerance` is absolute, in the figure's unit, and fixed before any run in the paper's setting, which is that of
    `preset`.
    """

    what: str
    value: float
    setting: str
    source: str
    tolerance: float
    unit: str = ""
    ours: Callable[[Result], Interval] | None = None
    preset: str = "paper"

    def verdict(self, result: Result | None, preset: str, needs: str) -> str:
        """`reproduced`, `differs`, or `not attempted: needs …` unless the result is of the number's preset."""
        if result is None or preset != self.preset or self.ours is None:
            return f"not attempted: needs {needs}"
        gap = abs(self.ours(result).estimate - self.value)
        return "reproduced" if gap <= self.tolerance else "differs"


@dataclass(frozen=True)
class Control:
    """A result in which the claimed effect is absent by construction; the check must not say `holds` on it."""

    name: str
    apply: Callable[[Result], Result]


@dataclass(frozen=True)
class Claim:
    """One headline claim of a paper, in our words, with its check and the control that must turn it red.

    `reported` says in a few words what the paper shows for it; where it shows a figure only, `numbers` is empty.
    """

    id: str
    statement: str
    numbers: tuple[PaperNumber, ...]
    check: Callable[[Result], tuple[Comparison, ...]]
    control: Control
    reported: str = ""

    def direction(self, result: Result) -> Direction:
        """The direction verdict on a result."""
        return direction(self.check(result))
