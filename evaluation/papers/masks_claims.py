"""What is claimed of attention masks, beside what `evaluation.papers.masks.run` measured."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.papers.claims import HOLDS, IN_PART, NOT, UNTRIED, Claim, difference

PLAIN, ADVERSARIAL = "plain", "adversarial"
NONE, OBJECT, SHIFT, BLOB = "none", "data set", "random shift", "random blob"
SEGMENTER, SILHOUETTE = "segmenter", "silhouette alone"
CLEAN, PGD = "clean", "PGD"
FIXED, THROUGH, JOINT, WORST = "PGD, mask as fixed", "PGD through the mask", "PGD on both", "worst of three"


def claims(table: pd.DataFrame) -> list[Claim]:
    """The paper's claims beside this table's numbers, averaged over its seeds.

    Adversarially trained classifiers are compared at the largest radius; plain ones, which fall sooner, at the smallest
    one.
    """
    radii = table.loc[table["eps"] > 0, "eps"]
    at = {ADVERSARIAL: float(radii.max()), PLAIN: float(radii.min())}
    images = int(table.groupby("seed")["images"].first().sum())

    def accuracy(training: str, mask: str, attack: str) -> float:
        rows = table[(table["training"] == training) & (table["mask"] == mask) & (table["attack"] == attack)]
        return float(rows.loc[np.isclose(rows["eps"], 0.0 if attack == CLEAN else at[training]), "accuracy"].mean())

    made = []
    for training in (ADVERSARIAL, PLAIN):
        gain = difference(accuracy(training, OBJECT, PGD), accuracy(training, NONE, PGD), images)
        wanted = 20.0 if training == ADVERSARIAL else 0.0
        verdict = NOT if gain.sign < 1 else HOLDS if gain.points > wanted else IN_PART
        made.append(
            Claim(
                f"A foreground mask improves accuracy under L∞ PGD, {training} training",
                f"{gain} at eps = {255 * at[training]:g}/255",
                "over 20 points (MS-COCO)" if training == ADVERSARIAL else "improves",
                verdict,
                f"{100 * accuracy(training, OBJECT, PGD):.1f} % with the data set's masks, "
                f"{100 * accuracy(training, NONE, PGD):.1f} % without; masks alone, without a picture, give "
                f"{100 * accuracy(PLAIN, SILHOUETTE, CLEAN):.1f} %, which no attack on pixels can take away",
            )
        )
    for control in (BLOB, SHIFT):
        gains = [
            difference(accuracy(training, OBJECT, PGD), accuracy(training, control, PGD), images)
            for training in (ADVERSARIAL, PLAIN)
        ]
        signs = [gain.sign for gain in gains]
        made.append(
            Claim(
                f"A foreground mask beats a {control.split()[0]} mask of the same size ({control.split()[1]})",
                f"{gains[0]} (adversarial training), {gains[1]} (plain)",
                "foreground beats random",
                HOLDS if min(signs) > 0 else NOT if max(signs) < 1 else IN_PART,
                "a blob says nothing of the class" if control == BLOB else "the moved mask still shows the silhouette",
            )
        )
    worst, fixed = (accuracy(ADVERSARIAL, SEGMENTER, attack) for attack in (WORST, FIXED))
    loss = difference(worst, fixed, images)
    gain = difference(worst, accuracy(ADVERSARIAL, NONE, PGD), images)
    made.append(
        Claim(
            "The gain stays where a segmenter makes the mask and the attack moves it (ours; adversarial training)",
            f"{gain} against no mask; {loss} against the attacker who takes the mask as fixed",
            "not tried",
            HOLDS if gain.sign > 0 and gain.points > 20 else IN_PART if gain.sign > 0 else NOT,
            "the worst of three attacks for each image: mask as fixed, through the mask, on mask and classifier",
        )
    )
    made.append(
        Claim(
            "The same on GTSRB and MS-COCO", "none", "over 20 points on MS-COCO", UNTRIED,
            "the data are not here; load_classification('gtsrb:PATH') and ('coco:PATH') read them where they are",
        )
    )  # fmt: skip
    return made
