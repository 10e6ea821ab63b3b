"""The pixel-wise attacks of the papers: presets of the attacks that perturb every pixel.

Where a preset says nothing, the defaults of `attacks.options.PixelOptions` hold: 100 steps within 8/255.

Budgets and steps are in the units of the pixels; rules that a paper states in 8-bit units are taken for images in
[0, 1]. Where nothing else is said, an attack leaves the labels that it is given, and a `target` makes it targeted.
Momentum, which the papers do not have, is off; the best iterate is kept, which the papers do not do, except by the
attacks of Arnab et al., which are their paper's to the letter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from attacks.options import PixelOptions
from attacks.presets import Preset
from attacks.targets import Untargeted

ARNAB = "Arnab et al., On the Robustness of Semantic Segmentation Models to Adversarial Attacks, CVPR 2018"
PGD = "Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018"
SEGPGD = "Gu et al., SegPGD: An Effective and Efficient Adversarial Attack for Evaluating Segmentation, ECCV 2022"
COSPGD = "Agnihotri et al., CosPGD: A Unified White-Box Adversarial Attack for Pixel-Wise Prediction Tasks, ICML 2024"
SEA = "Croce et al., Towards Reliable Evaluation and Fast Training of Robust Semantic Segmentation, ECCV 2024"
DAG = "Xie et al., Adversarial Examples for Semantic Segmentation and Object Detection, ICCV 2017"
ALMA = "Rony et al., Proximal Splitting Adversarial Attack for Semantic Segmentation, CVPR 2023"


@dataclass(frozen=True)
class OwnPrediction(Untargeted):
    """No target, and no ground truth either: the attack leaves the model's own prediction on every pixel.

    The attacks of both styles then look at no label, whatever labels they are given (Arnab et al., section 4).
    """

    own_prediction: ClassVar[bool] = True


def arnab_iterations(eps: float) -> int:
    """Steps of 1 that Arnab et al. make (section 4, after Kurakin et al. 2017): max(1, ⌈min(ε + 4, 1.25 ε)⌉).

    Args:
        eps: Radius in 8-bit units, above 0: 8 for 8/255 on images in [0, 1].

    Returns:
        Number of iterations.

    Raises:
        ValueError: If `eps` is not above 0.
    """
    if not eps > 0:
        raise ValueError(f"`eps` is {eps!r}; it must be above 0, in 8-bit units.")
    steps = min(eps + 4, 1.25 * eps)
    return max(1, math.ceil(steps - 1e-6 * steps))  # 255 · (8/255) may come out above 8: that is no further step


def _arnab(rule: Callable[[float], float]) -> Callable[[PixelOptions], float]:
    """A rule of Arnab et al. on the radius in 8-bit units, for the L∞ ball, which it was made for."""

    def derived(options: PixelOptions) -> float:
        if options.norm != "inf":
            raise ValueError(
                f"`norm` is {options.norm!r}, and the iterations of Arnab et al. are a rule for the norm 'inf'; "
                "give `max_iter` and `eps_step` yourself."
            )
        return rule(255 * options.eps)

    return derived


def _times_eps(factor: float) -> Mapping[str, Callable[[Any], Any]]:
    """The step as a multiple of the radius."""
    return {"eps_step": lambda options: factor * options.eps}


_PLAIN = {"optimizer": "pgd", "momentum": 0.0}
_TO_THE_LETTER = {**_PLAIN, "target": OwnPrediction(), "keep_best": False}
_LEAST_LIKELY = {**_TO_THE_LETTER, "objective": "least_likely"}
_ITERATED = {"max_iter": _arnab(arnab_iterations), "eps_step": _arnab(lambda eps: 1 / 255)}
_RANDOM_START = {**_PLAIN, "random_start": True}

PIXEL_ATTACKS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "pixel-fgsm",
                "One step of size ε along the sign, away from the model's own prediction.",
                ARNAB,
                "pixel",
                {**_TO_THE_LETTER, "max_iter": 1},
                _times_eps(1.0),
            ),
            Preset(
                "pixel-fgsm-ll",
                "One step of size ε along the sign, towards every pixel's least likely class.",
                ARNAB,
                "pixel",
                {**_LEAST_LIKELY, "max_iter": 1},
                _times_eps(1.0),
            ),
            Preset(
                "pixel-ifgsm",
                "Steps of 1/255 along the sign, away from the model's own prediction; their number follows from ε.",
                ARNAB,
                "pixel",
                _TO_THE_LETTER,
                _ITERATED,
            ),
            Preset(
                "pixel-ifgsm-ll",
                "Steps of 1/255 along the sign, towards the class that is then the least likely.",
                ARNAB,
                "pixel",
                _LEAST_LIKELY,
                _ITERATED,
            ),
            Preset(
                "pixel-pgd",
                "Sign steps of ε/4 from a random start.",
                PGD,
                "pixel",
                _RANDOM_START,
                _times_eps(1 / 4),
            ),
            Preset(
                "pixel-segpgd",
                "PGD that weighs pixels already won less, and ever more as it goes on.",
                SEGPGD,
                "pixel",
                {**_RANDOM_START, "objective": "segpgd"},
                _times_eps(1 / 4),
            ),
            Preset(
                "pixel-cospgd",
                "PGD that weighs every pixel by how well the prediction fits its label.",
                COSPGD,
                "pixel",
                {**_RANDOM_START, "objective": "cospgd"},
                _times_eps(1 / 4),
            ),
            Preset(
                "pixel-sea",
                "APGD with four losses; the worst case for each image.",
                SEA,
                "pixel",
                {
                    "optimizer": "apgd",
                    "objective": (
                        "balanced_cross_entropy",
                        "masked_cross_entropy",
                        "jensen_shannon",
                        "masked_spherical",
                    ),
                },
                _times_eps(2.0),
            ),
            Preset(
                "pixel-dag",
                "Steps along the gradient of the pixels still to win, until they are won.",
                DAG,
                "minimal",
                {"method": "dag"},
            ),
            Preset(
                "pixel-alma",
                "The smallest perturbation by an augmented Lagrangian with a proximal step (a simpler ALMA prox).",
                ALMA,
                "minimal",
                {"method": "alma_prox"},
            ),
        )
    }
)
