"""The papers, in the order of docs/papers.md, and that page."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.papers import arnab, beyond_claims, fusion_claims, masks_claims, yuan
from evaluation.papers.claims import Paper, measured

_HEADING = """# The papers, tried

What the papers claim that this project starts from, and what came out here, on data and models that two CPU cores can
carry: small networks, 160×120 pixels, few images. Made by `ramdefense papers --markdown` from the measurements in
`evaluation/papers/*.csv`; each verdict follows from them by the rule beside it. A claim that does not hold here may
hold on the papers' models and data, and the other way round.
"""


def papers() -> list[Paper]:
    """Every paper, its claims computed from the measurements that ship."""
    ram = yuan.paper(measured("ram"), measured("ram-attacks"))
    asked_next = tuple((claim, "evaluation.papers.beyond.run") for claim in beyond_claims.claims(measured("beyond")))
    return [
        ram._replace(claims=ram.claims + asked_next),
        arnab.paper(measured("arnab"), measured("arnab-scales")),
        Paper(
            "Vaishnavi, Cong, Eykholt, Prakash, Rahmati",
            "Can Attention Masks Improve Adversarial Robustness?",
            "arXiv 1911.11946",
            tuple((claim, "evaluation.papers.masks.run") for claim in masks_claims.claims(measured("masks"))),
        ),
        Paper(
            "Akumalla, Haney, Bazhenov",
            "Contextual Fusion For Adversarial Robustness",
            "arXiv 2011.09526",
            tuple((claim, "evaluation.papers.fusion.run") for claim in fusion_claims.claims(measured("fusion"))),
        ),
    ]


def as_markdown(found: Sequence[Paper]) -> str:
    """docs/papers.md."""
    parts = [_HEADING]
    for paper in found:
        parts.append(f"## {paper.authors}: “{paper.title}”\n\n{paper.where}\n")
        for claim, run in paper.claims:
            parts.append(
                f"**{claim.claim}** — *{claim.verdict}*\n\n"
                f"- Here: {claim.ours}.\n- The paper: {claim.paper}.\n- {claim.reason}\n- From: `{run}`\n"
            )
    return "\n".join(parts)
