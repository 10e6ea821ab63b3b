"""What readers of RAM ask next, beside what `evaluation.papers.beyond.run` measured."""

from __future__ import annotations

import pandas as pd

from evaluation.papers.claims import HOLDS, IN_PART, NOT, UNTRIED, Claim, difference

NONE = "none"
CLEAN, GREY, PATCH, PGD, UNIVERSAL = "clean", "grey square", "universal patch", "PGD", "universal perturbation"
NOTHING, ADAPTIVE, TRANSFERRED, WORST = "no attack", "adaptive", "transferred", "worst of two"


def claims(table: pd.DataFrame) -> list[Claim]:
    """Our questions beside this table's numbers, averaged over its seeds and, for PGD, over its radii.

    A claim holds where every hardened model gains and the interval leaves out zero, in part where one of them does.
    Where an attack takes nothing from the undefended model, nothing can be gained: the claim cannot be tried.
    """
    made = []
    defences = [name for name in table["defence"].unique() if name != NONE]
    for task in table["task"].unique():
        part = table[table["task"] == task]
        images = int(part.groupby("seed")["images"].first().sum())

        def accuracy(defence: str, attack: str, how: str, part: pd.DataFrame = part) -> float:
            same = (part["defence"] == defence) & (part["attack"] == attack) & (part["made"] == how)
            return float(part.loc[same, "accuracy"].mean())

        for attack in (PATCH, PGD, UNIVERSAL):
            if attack not in set(part["attack"]):
                continue
            alone = accuracy(NONE, attack, ADAPTIVE)
            gains = {name: difference(accuracy(name, attack, WORST), alone, images) for name in defences}
            signs = [gain.sign for gain in gains.values()]
            taken = difference(accuracy(NONE, CLEAN, NOTHING), alone, images)
            verdict = HOLDS if min(signs) > 0 else IN_PART if max(signs) > 0 else NOT
            made.append(
                Claim(
                    f"RAM improves accuracy under a {attack}, {task} (ours)"
                    if attack != PGD
                    else f"RAM improves accuracy under pixel-wise PGD, {task} (ours)",
                    "; ".join(f"{name}: {gain}" for name, gain in gains.items()),
                    "not tried: segmentation alone",
                    verdict if taken.sign > 0 else UNTRIED,
                    f"the worse of adaptive and transferred; undefended {100 * alone:.1f} %, from which its own attack "
                    f"takes {taken}" + ("" if taken.sign > 0 else ": there is nothing to defend against"),
                )
            )
        losses = {
            name: difference(accuracy(name, CLEAN, NOTHING), accuracy(NONE, CLEAN, NOTHING), images)
            for name in defences
        }
        signs = [loss.sign for loss in losses.values()]
        made.append(
            Claim(
                f"Without clean loss, {task} (ours)",
                "; ".join(f"{name}: {loss}" for name, loss in losses.items()),
                "not tried: segmentation alone",
                HOLDS if min(signs) > -1 else IN_PART if max(signs) > -1 else NOT,
                "clean accuracy less that of the undefended model; no model was trained with RAM",
            )
        )
    made.append(
        Claim(
            "The same on ImageNet's ViTs and COCO's detectors", "none", "not tried: segmentation alone", UNTRIED,
            "neither the weights nor the data are here; harden(model) takes any of them in the same two lines",
        )
    )  # fmt: skip
    return made
