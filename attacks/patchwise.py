"""The patch attacks of the field: presets of the attack that moves the pixels of a patch.

Most of them were made for other threats (a ball around an image, a classifier); what makes each one itself, its loss,
its step rule, its transformation or its place, is taken over, and what a patch is stays the same for all. Without a
`target` they leave the labels that they are given; `target="permute"`, "strip" or a map of one's own makes them
targeted. Where a preset says nothing, the defaults of `attacks.options.PatchOptions` hold: 200 sign steps of 0.02 with
momentum 0.9 from mid-grey, the best iterate kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attacks.attention import AttentionFool
from attacks.diversity import InputDiversity
from attacks.pixelwise import COSPGD, DAG, PGD, SEA, SEGPGD
from attacks.presets import Preset
from attacks.targets import Region
from attacks.transformations import EOT

RAM = "Yuan et al., Towards Robust Semantic Segmentation against Patch-based Attack via Attention Refinement, IJCV 2024"
MI = "Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018"
NI = "Lin et al., Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks, ICLR 2020"
DI = "Xie et al., Improving Transferability of Adversarial Examples with Input Diversity, CVPR 2019"
TI = "Dong et al., Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks, CVPR 2019"
ADVERSARIAL_PATCH = "Brown et al., Adversarial Patch, arXiv 2017"
APGD = "Croce & Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Attacks, ICML 2020"
SSAP = "Nesti et al., Evaluating the Robustness of Semantic Segmentation for Autonomous Driving, WACV 2022"
IPATCH = "Mirsky, IPatch: A Remote Adversarial Patch, arXiv 2021"
ATTENTION_FOOL = "Lovisotto et al., Give Me Your Attention, CVPR 2022"
PATCH_FOOL = "Fu et al., Patch-Fool, ICLR 2022"
SYNTHESIZING = "Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018"
SQUARE = "Andriushchenko et al., Square Attack, ECCV 2020"
CARLINI = "Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017"

PATCH_ATTACKS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "permute",
                "Every class becomes one that the image does not hold, one to one.",
                DAG,
                "patch",
                {"target": "permute"},
            ),
            Preset(
                "strip",
                "Four vertical bands, each of one class that the image does not hold.",
                DAG,
                "patch",
                {"target": "strip"},
            ),
            Preset(
                "untargeted", "Every pixel away from its label, wherever to.", PGD, "patch", {"target": "untargeted"}
            ),
            Preset("pgd", "Plain sign steps.", PGD, "patch", {"momentum": 0.0}),
            Preset("mi", "Sign steps with full momentum.", MI, "patch", {"momentum": 1.0}),
            Preset(
                "ni",
                "Momentum with the gradient taken a step ahead.",
                NI,
                "patch",
                {"optimizer": "nesterov", "momentum": 1.0},
            ),
            Preset(
                "di",
                "The patch is shrunk and padded at random in each step.",
                DI,
                "patch",
                {"eot": InputDiversity(), "momentum": 1.0},
            ),
            Preset(
                "ti",
                "The gradient is smoothed by a Gaussian kernel.",
                TI,
                "patch",
                {"len_kernel": 5, "momentum": 1.0},
            ),
            Preset("adam", "Adam on the pixels.", ADVERSARIAL_PATCH, "patch", {"optimizer": "adam", "eps_step": 0.05}),
            Preset(
                "apgd",
                "Sign steps that halve themselves and go back to the best point.",
                APGD,
                "patch",
                {"optimizer": "apgd", "eps_step": 0.1},
            ),
            Preset(
                "margin", "The margin of the logits, summed over all pixels.", CARLINI, "patch", {"objective": "margin"}
            ),
            Preset("dag", "The margin of the pixels that are not won yet.", DAG, "patch", {"objective": "dag"}),
            Preset(
                "segpgd",
                "Pixels already won weigh less, and ever more as it goes on.",
                SEGPGD,
                "patch",
                {"objective": "segpgd"},
            ),
            Preset(
                "cospgd",
                "Every pixel weighs as much as the prediction fits its label.",
                COSPGD,
                "patch",
                {"objective": "cospgd"},
            ),
            Preset(
                "sea",
                "APGD with four losses; the worst case for each image.",
                SEA,
                "patch",
                {
                    "optimizer": "apgd",
                    "eps_step": 0.1,
                    "objective": (
                        "balanced_cross_entropy",
                        "masked_cross_entropy",
                        "jensen_shannon",
                        "masked_spherical",
                    ),
                },
            ),
            Preset(
                "ssap",
                "Pixels already won against those that are not, weighed by how many are.",
                SSAP,
                "patch",
                {"objective": "ssap"},
            ),
            Preset(
                "ipatch",
                "A patch here that makes one absent class of the image's upper left quarter.",
                IPATCH,
                "patch",
                {"target": Region(), "eot": EOT(samples=2, rotation=0.0, scale=(1.0, 1.0), translation=0.2)},
            ),
            Preset(
                "attention-fool",
                "All queries are pulled to the patch's keys, beside the cross entropy.",
                ATTENTION_FOOL,
                "patch",
                {"terms": (AttentionFool(),)},
            ),
            Preset(
                "attention-fool-alone",
                "All queries are pulled to the patch's keys, and nothing else.",
                ATTENTION_FOOL,
                "patch",
                {"terms": (AttentionFool(),), "objective": "none"},
            ),
            Preset(
                "patch-fool",
                "The patch goes where the model attends most.",
                PATCH_FOOL,
                "patch",
                {"patch_location": "attention"},
            ),
            Preset(
                "at-gradient",
                "The patch goes where the gradient of the loss is largest.",
                "",
                "patch",
                {"patch_location": "gradient"},
            ),
            Preset(
                "at-scan",
                "The patch goes where noise does most harm, of a grid of places.",
                "",
                "patch",
                {"patch_location": "scan"},
            ),
            Preset(
                "eot",
                "Turned, scaled, moved, tilted and lit at random in each step.",
                SYNTHESIZING,
                "patch",
                {"eot": EOT()},
            ),
            Preset(
                "square-patch",
                "Random search without a gradient; each step is one query.",
                SQUARE,
                "patch",
                {"optimizer": "square"},
            ),
        )
    }
)
