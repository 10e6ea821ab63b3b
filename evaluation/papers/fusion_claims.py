"""What is claimed of contextual fusion, beside what `evaluation.papers.fusion.run` measured."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.papers.claims import HOLDS, IN_PART, NOT, UNTRIED, Claim, Difference, difference

FOREGROUND, BACKGROUND, FUSION = "foreground alone", "background alone", "fusion"
CLEAN, FGSM, TRANSFERRED, PGD, BLUR = "clean", "FGSM", "FGSM on the foreground", "PGD", "blur"


def claims(table: pd.DataFrame) -> list[Claim]:
    """The paper's claims beside this table's numbers, averaged over its seeds and over the attack's strengths."""
    images = int(table.groupby("seed")["images"].first().sum())
    kappas = sorted(table["informativeness"].unique())
    alphas = sorted(table.loc[table["model"] == FUSION, "penalty"].unique())

    def accuracy(model: str, attack: str, kappa: float, alpha: float = 0.0) -> float:
        same = (table["model"] == model) & (table["attack"] == attack) & np.isclose(table["penalty"], alpha)
        return float(table.loc[same & np.isclose(table["informativeness"], kappa), "accuracy"].mean())

    def gain(attack: str, kappa: float, alpha: float = 0.0) -> Difference:
        return difference(accuracy(FUSION, attack, kappa, alpha), accuracy(FOREGROUND, attack, kappa), images)

    def curve(attack: str, alpha: float = 0.0) -> str:
        return ", ".join(f"{gain(attack, kappa, alpha).points:+.1f}" for kappa in kappas)

    at = "κ = " + ", ".join(f"{kappa:g}" for kappa in kappas)
    made = []
    for attack, name in (
        (FGSM, "FGSM on the joint model"),
        (TRANSFERRED, "FGSM made on the foreground"),
        (BLUR, "blur of the foreground"),
    ):
        signs = [gain(attack, kappa).sign for kappa in kappas if kappa > 0]
        made.append(
            Claim(
                f"Fusion improves accuracy under {name}",
                f"{curve(attack)} points at {at}",
                "improves (MS-COCO)",
                HOLDS if min(signs) > 0 else IN_PART if max(signs) > 0 else NOT,
                f"fusion without penalty against the foreground alone; at {at}: intervals that leave out zero for "
                f"{sum(sign > 0 for sign in signs)} of {len(signs)} κ > 0; with α = {alphas[-1]:g}: "
                f"{curve(attack, alphas[-1])}",
            )
        )
    signs = [gain(CLEAN, kappa).sign for kappa in kappas]
    made.append(
        Claim(
            "Without clean loss", f"{curve(CLEAN)} points at {at}", "no clean loss", NOT if min(signs) < 0 else HOLDS,
            "clean accuracy of fusion less that of the foreground alone",
        )
    )  # fmt: skip
    growth = {
        attack: Difference(
            gain(attack, kappas[-1]).points - gain(attack, kappas[0]).points,
            float(np.hypot(gain(attack, kappas[-1]).margin, gain(attack, kappas[0]).margin)),
        )
        for attack in (FGSM, TRANSFERRED, BLUR)
    }
    grown = [change.sign > 0 for change in growth.values()]
    made.append(
        Claim(
            "The gains grow with how distinct the contexts are",
            "; ".join(f"{attack}: {change}" for attack, change in growth.items()),
            "larger on MS-COCO than on CIFAR-10",
            HOLDS if all(grown) else IN_PART if any(grown) else NOT,
            f"gain at κ = {kappas[-1]:g} less gain at κ = {kappas[0]:g}",
        )
    )
    if len(alphas) > 1:
        strongest = alphas[-1]
        informed = [kappa for kappa in kappas if kappa > 0]
        changes = {
            attack: [
                difference(accuracy(FUSION, attack, kappa, strongest), accuracy(FUSION, attack, kappa), images)
                for kappa in informed
            ]
            for attack in (TRANSFERRED, BLUR)
        }
        clean = [100 * (accuracy(FUSION, CLEAN, k, strongest) - accuracy(FUSION, CLEAN, k)) for k in informed]
        better = [change.sign > 0 for found in changes.values() for change in found]
        made.append(
            Claim(
                "The penalty on the foreground's weights helps where the foreground is attacked",
                "; ".join(
                    f"{attack}: {', '.join(f'{change.points:+.1f}' for change in found)} points"
                    for attack, found in changes.items()
                ) + " at κ = " + ", ".join(f"{kappa:g}" for kappa in informed),
                "biases the joint classifier to the background",
                HOLDS if all(better) else IN_PART if any(better) else NOT,
                f"α = {strongest:g} less α = 0; clean accuracy changes by "
                + ", ".join(f"{change:+.1f}" for change in clean),
            )
        )  # fmt: skip
    held = [gain(PGD, kappa) for kappa in kappas if kappa > 0]
    made.append(
        Claim(
            "The gain stays under PGD on the joint model (ours)",
            f"{curve(PGD)} points at {at}", "not tried",
            HOLDS if all(g.sign > 0 for g in held) else IN_PART if any(g.sign > 0 for g in held) else NOT,
            "PGD at the smallest radius, where FGSM takes one step",
        )
    )  # fmt: skip
    made.append(
        Claim(
            "The same with ResNet-18 on MS-COCO and CIFAR-10", "none", "see the paper", UNTRIED,
            "neither the data nor Places365's weights are here; load_classification('coco:PATH') and "
            "without_head(resnet18()) take them where they are",
        )
    )  # fmt: skip
    return made
