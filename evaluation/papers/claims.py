"""A claim of a paper, what was measured here, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import pandas as pd

Verdict = Literal["holds", "holds in part", "does not hold", "cannot be tried here"]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        claim: In one sentence.
        theirs: The paper's figure, or "no figure at hand" where its text could not be had.
        ours: What was measured here.
        verdict: What follows.
        why: The rule by which it follows, or why it cannot be tried.
        run: The command, or the run file, that the measurement came from.
    """

    claim: str
    theirs: str
    ours: str
    verdict: Verdict
    why: str
    run: str


@dataclass(frozen=True)
class Paper:
    """A paper and its claims."""

    authors: str
    title: str
    where: str
    claims: tuple[Claim, ...]


def by_share(share: float) -> Verdict:
    """The verdict on a claim that was tried many times: nine tenths of them hold, or a tenth, or something between."""
    if share >= 0.9:
        return "holds"
    return "holds in part" if share > 0.1 else "does not hold"


def measured(name: str) -> pd.DataFrame:
    """A measurement by the name of its file, without suffix."""
    with (files("evaluation.papers") / f"{name}.csv").open() as file:
        return pd.read_csv(file)
