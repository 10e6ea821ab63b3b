"""What a paper claims beside what was measured here."""

from __future__ import annotations

import math
from typing import NamedTuple

HOLDS, IN_PART, NOT, UNTRIED = "holds", "holds in part", "does not hold", "cannot be tried here"


class Claim(NamedTuple):
    """One claim of a paper.

    Attributes:
        claim: in a sentence.
        ours: our number, in words.
        paper: the paper's number, in words.
        verdict: `HOLDS`, `IN_PART`, `NOT` or `UNTRIED`.
        reason: why this verdict.
    """

    claim: str
    ours: str
    paper: str
    verdict: str
    reason: str


class Difference(NamedTuple):
    """A difference of two accuracies in points (percent of the images), with the half width of its 95 % interval."""

    points: float
    margin: float

    @property
    def sign(self) -> int:
        """1 or −1 where the interval leaves out zero, else 0."""
        return 0 if abs(self.points) <= self.margin else int(math.copysign(1, self.points))

    def __str__(self) -> str:
        return f"{self.points:+.1f} ± {self.margin:.1f} points"


def difference(one: float, other: float, images: int) -> Difference:
    """one − other, two shares of as many images each, with 1.96 √(p₁(1 − p₁)/n + p₂(1 − p₂)/n) around it.

    The images are the same ones in both and tend to be right together, so this interval is wider than it has to be.
    """
    variance = (one * (1 - one) + other * (1 - other)) / images
    return Difference(100 * (one - other), 196 * math.sqrt(variance))
