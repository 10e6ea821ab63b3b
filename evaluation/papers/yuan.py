"""Yuan et al., IJCV 2024: RAM itself."""

from __future__ import annotations

import itertools

import pandas as pd

from evaluation.papers.claims import HOLDS, IN_PART, NOT, UNTRIED, Claim, Paper

_TABLE = "docs/results.md, “CamVid: five models”"
_ATTACKS = "docs/results.md, “every patch attack”"
#: How far the attention of a model reaches.
_REACH = {"cnn": "none", "swin": "windows", "nonlocal": "one global block", "vit": "global throughout"}


def paper(table: pd.DataFrame, attacks: pd.DataFrame) -> Paper:
    """The claims.

    Args:
        table: Summary of the five models under Permute and Strip.
        attacks: Summary of every patch attack on the ViT.
    """
    return Paper(
        "Yuan, Zhang, Wang, Shan, Chen",
        "Towards Robust Semantic Segmentation against Patch-based Attack via Attention Refinement",
        "IJCV 2024, arXiv 2401.01750",
        (
            (_wide_fields(table), _TABLE),
            (_average(attacks), _ATTACKS),
            (_both_families(table), _TABLE),
            (_adversarial_training(), "—"),
        ),
    )


def _wide_fields(table: pd.DataFrame) -> Claim:
    bare = table[table["defence"] == "none"].assign(family=table["model"].str.rpartition("-")[2])
    miou = 100 * bare.groupby("family")["target_miou"].mean()
    ordered = [miou[family] for family in _REACH]
    rises = all(low < high for low, high in itertools.pairwise(ordered))
    outside = miou["segformer"] < miou["vit"] and miou["segformer"] < miou["cnn"]
    return Claim(
        "The wider a model's attention reaches, the more a patch does: none, windows, global.",
        "target mIoU, mean of Permute and Strip: "
        + ", ".join(f"{miou[family]:.1f} ({family}, {reach})" for family, reach in _REACH.items())
        + f", {miou['segformer']:.1f} (segformer, global)",
        "target mIoU 5.86 (UPerNet/ConvNeXt), 29.25 (SeMask/Swin), 74.57 (Segmenter/ViT)",
        HOLDS if rises and not outside else IN_PART if rises else NOT,
        "The order must hold for all five models; SegFormer, whose attention is global, is the least fooled of all."
        if outside
        else "The order must hold for all five models.",
    )


def _average(attacks: pd.DataFrame) -> Claim:
    targeted = attacks[attacks["target_miou"].notna() & (attacks["images"] > 0)]
    sides = {side: targeted[targeted["defence"] == side].set_index("attack") for side in ("none", "ram")}
    shared = sides["none"].index.intersection(sides["ram"].index)
    success = {side: 100 * frame.loc[shared, "success"] for side, frame in sides.items()}
    drop = success["none"].mean() - success["ram"].mean()
    better = float((success["ram"] < success["none"]).mean())
    return Claim(
        "RAM takes about 20 points off an attack's success, on the average over about ten patch attacks.",
        f"{drop:.1f} points over {len(shared)} targeted attacks on the ViT ({success['none'].mean():.1f} → "
        f"{success['ram'].mean():.1f} % of the pixels on target, the worst of plain, adaptive and transferred)",
        "about 20 points",
        HOLDS if drop >= 20 else IN_PART if drop > 0 and better > 0.9 else NOT,
        "Holds from 20 points on. Ours is the share of pixels on target, the paper's the mIoU with the target map.",
    )


def _both_families(table: pd.DataFrame) -> Claim:
    cells = table[table["images"] > 0].pivot(index=["model", "attack"], columns="defence", values="success")
    drops = (100 * (cells["none"] - cells["ram"])).dropna().groupby("model").mean()
    drops = drops.rename(lambda model: model.rpartition("-")[2])
    helped = float((drops >= 5).mean())
    return Claim(
        "It works for CNNs with attention and for vision transformers.",
        "points taken off, mean of Permute and Strip: " + ", ".join(f"{d:.1f} ({m})" for m, d in drops.items()),
        "no figure at hand",
        HOLDS if helped == 1 else IN_PART if helped else NOT,
        "A model is helped from 5 points on. Windows of 25 keys are hardly touched by the default threshold of 16/N.",
    )


def _adversarial_training() -> Claim:
    return Claim(
        "It complements adversarial training.",
        "not measured",
        "no figure at hand",
        UNTRIED,
        "The zoo holds no adversarially trained segmentation model: training one takes many times as long.",
    )
