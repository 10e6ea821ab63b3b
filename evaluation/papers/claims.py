"""What a paper claims beside what was measured here."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import NamedTuple

import pandas as pd

HOLDS, IN_PART, NOT, UNTRIED = "holds", "holds in part", "does not hold", "cannot be tried here"


class Claim(NamedTuple):
    """One claim of a paper.

    Attributes:
        claim: in a sentence.
        ours: our number, in words.
        paper: the paper's number, in words.
        verdict: `HOLDS`, `IN_PART`, `NOT` or `UNTRIED`.
        reason: why this verdict: the rule that it follows from, or what stands in the way.
    """

    claim: str
    ours: str
    paper: str
    verdict: str
    reason: str


class Paper(NamedTuple):
    """A paper, and its claims with what each was tried by: a run file, a command or a function."""

    authors: str
    title: str
    where: str
    claims: tuple[tuple[Claim, str], ...]


def by_share(share: float) -> str:
    """The verdict on a claim that was tried many times: it holds in nine tenths of them, or in more than one tenth."""
    if share >= 0.9:
        return HOLDS
    return IN_PART if share > 0.1 else NOT


def measured(name: str) -> pd.DataFrame:
    """A measurement that ships, by the name of its file without suffix."""
    with (files("evaluation.papers") / f"{name}.csv").open() as file:
        return pd.read_csv(file)


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
