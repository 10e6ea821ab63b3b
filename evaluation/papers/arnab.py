"""Arnab, Miksik & Torr, CVPR 2018: multi-scale inference and CRFs against perturbations of every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from evaluation.files import write_figure
from evaluation.frames import SegmentationData
from evaluation.papers.claims import UNTRIED, Claim, Paper, by_share
from ramdefense.names import split_name

if TYPE_CHECKING:
    from ramdefense.segmenter import PyTorchSegmenter

RUN_FILE = "evaluation/papers/arnab.yaml"
#: A ratio that differs by less counts as the same.
TOLERANCE = 0.01
_FAMILIES = {
    "pixel-fgsm": "FGSM",
    "pixel-fgsm-ll": "targeted FGSM",
    "pixel-ifgsm": "iterative FGSM",
    "pixel-ifgsm-ll": "iterative least likely",
}
_UNTARGETED = ("FGSM", "iterative FGSM")
_MADE = {"plain": "through", "transfer": "without"}


def iou_ratios(summary: pd.DataFrame) -> pd.DataFrame:
    """IoU ratio (mIoU under attack / clean mIoU of the same model and defence) of a run of the protocol.

    Args:
        summary: Of the run (``Results.summary``).

    Columns:
        model, defence, attack (the paper's name), eps (of 255), made ("through" the defence, or "without" it),
        images, iou_ratio.
    """
    rows = []
    for row in summary[summary["images"] > 0].to_dict("records"):
        name, options = split_name(row["attack"])
        for variant, made in _MADE.items():
            attacked = row[f"{variant}_adversarial_miou"]
            if pd.notna(attacked):
                rows.append(
                    {
                        "model": row["model"],
                        "defence": row["defence"],
                        "attack": _FAMILIES[name],
                        "eps": 255 * options["eps"],
                        "made": made,
                        "images": row["images"],
                        "iou_ratio": attacked / row["clean_region_miou"],
                    }
                )
    return pd.DataFrame(rows).round({"eps": 6})


def scale_transfer(
    segmenters: Mapping[str, PyTorchSegmenter],
    data: SegmentationData | str,
    *,
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25),
    attack: str = "pixel-ifgsm:eps=8/255",
    **options: Any,
) -> pd.DataFrame:
    """IoU ratio of perturbations that are made at one scale of the input and tested at another.

    Args:
        segmenters: Models by name.
        data, options: Of `evaluation.transfer.transfer`.
        scales: Sizes at which a model runs; perturbations are always of the image's own size.
        attack: By name.

    Columns:
        model, made_on, tested_on (scales), images, iou_ratio.
    """
    from evaluation.transfer import transfer
    from ramdefense.baselines import MultiScale

    tables = []
    for name, segmenter in segmenters.items():
        scaled = {f"{scale:g}": MultiScale(segmenter, scales=(scale,)) for scale in scales}
        table = transfer(scaled, attack, data, **options).frame()
        table = table.assign(model=name, iou_ratio=table["adversarial_miou"] / table["clean_miou"])
        tables.append(table[["model", "made_on", "tested_on", "images", "iou_ratio"]])
    return pd.concat(tables, ignore_index=True)


def paper(ratios: pd.DataFrame, scales: pd.DataFrame) -> Paper:
    """The claims.

    Args:
        ratios: What `iou_ratios` returns.
        scales: What `scale_transfer` returns.
    """
    return Paper(
        "Arnab, Miksik, Torr",
        "On the Robustness of Semantic Segmentation Models to Adversarial Attacks",
        "CVPR 2018, TPAMI 2020, arXiv 1711.09856",
        (
            (_multi_scale(ratios), RUN_FILE),
            (_across_scales(scales), "evaluation.papers.arnab.scale_transfer"),
            (_crf(ratios), RUN_FILE),
            (_masking(ratios), RUN_FILE),
        ),
    )


def _sides(ratios: pd.DataFrame, defence: str) -> pd.DataFrame:
    """One row for each model, attack and ε: the undefended ratio ("none"), and the defended one by how it was made."""
    keys = ["model", "attack", "eps"]
    bare = ratios[ratios["defence"] == "none"].set_index(keys)["iou_ratio"].rename("none")
    held = ratios[ratios["defence"] == defence].pivot(index=keys, columns="made", values="iou_ratio")
    return held.join(bare)


def _images(ratios: pd.DataFrame) -> str:
    few, many = ratios["images"].min(), ratios["images"].max()
    return f"{few} images" if few == many else f"{few} to {many} images"


def _multi_scale(ratios: pd.DataFrame) -> Claim:
    sides = _sides(ratios, "multiscale")
    worst = sides[["through", "without"]].min(axis=1)
    share = float((worst > sides["none"] + TOLERANCE).mean())
    return Claim(
        "Multi-scale inference makes a model more robust.",
        f"IoU ratio {sides['none'].mean():.2f} → {worst.mean():.2f} on the mean, the worse of attacks through it and "
        f"without it; higher in {share:.0%} of {len(sides)} cells (model, attack, ε; {_images(ratios)} each)",
        "no figure at hand",
        by_share(share),
        "Holds where the ratio is higher by more than 0.01 in nine of ten cells, in part in more than one of ten.",
    )


def _across_scales(scales: pd.DataFrame) -> Claim:
    own = scales[scales["made_on"] == scales["tested_on"]].set_index(["model", "tested_on"])["iou_ratio"].rename("own")
    others = scales[scales["made_on"] != scales["tested_on"]].join(own, on=["model", "tested_on"])
    half_way = others["own"] + (1 - others["own"]) / 2
    share = float((others["iou_ratio"] > half_way).mean())
    return Claim(
        "A perturbation that is made at one scale transfers badly to another.",
        f"IoU ratio {own.mean():.2f} at the scale it was made at, {others['iou_ratio'].mean():.2f} at the others",
        "no figure at hand",
        by_share(share),
        "Badly: less than half of the loss is left. Holds in nine of ten pairs of scales, in part in more than one.",
    )


def _crf(ratios: pd.DataFrame) -> Claim:
    sides = _sides(ratios, "crf").query("attack in @_UNTARGETED")
    share = float((sides["through"] > sides["none"] + TOLERANCE).mean())
    return Claim(
        "A CRF makes a model more robust to untargeted attacks that are made through it.",
        f"IoU ratio {sides['none'].mean():.2f} → {sides['through'].mean():.2f}; higher in {share:.0%} of {len(sides)} "
        f"cells ({_images(ratios)} each)",
        "no figure at hand",
        by_share(share),
        "As above.",
    )


def _masking(ratios: pd.DataFrame) -> Claim:
    sides = _sides(ratios, "crf").query("attack in @_UNTARGETED")
    gained = sides[sides["through"] > sides["none"] + TOLERANCE]
    if gained.empty:
        return Claim(
            "That protection is gradient masking: attacks made without the CRF succeed.",
            "there was no protection to explain", "no figure at hand", UNTRIED, "No cell in which the CRF helps.",
        )  # fmt: skip
    kept = (gained["without"] - gained["none"]) / (gained["through"] - gained["none"])
    share = float((kept < 0.5).mean())
    return Claim(
        "That protection is gradient masking: attacks made without the CRF succeed.",
        f"where it helps, IoU ratio {gained['none'].mean():.2f} without it, {gained['through'].mean():.2f} attacked "
        f"through it, {gained['without'].mean():.2f} attacked without it",
        "no figure at hand",
        by_share(share),
        "Masking: an attack made without it takes away half of the gain or more. Holds in nine of ten such cells.",
    )


def draw(ratios: pd.DataFrame, path: str | Path) -> None:
    """The curves, a row for each model and a column for each attack, as PNG; dotted: made without the defence."""
    from matplotlib.figure import Figure

    models, attacks = (list(dict.fromkeys(ratios[axis])) for axis in ("model", "attack"))
    figure = Figure(figsize=(2.9 * len(attacks), 2.3 * len(models) + 0.6), layout="constrained")
    axes = figure.subplots(len(models), len(attacks), squeeze=False, sharex=True, sharey=True)
    colours = {"none": "#000000", "multiscale": "#0072b2", "crf": "#d55e00"}  # Okabe & Ito
    for (model, attack), axis in zip(
        ((model, attack) for model in models for attack in attacks), axes.flat, strict=True
    ):
        cell = ratios[(ratios["model"] == model) & (ratios["attack"] == attack)]
        for (defence, made), line in cell.groupby(["defence", "made"], sort=False):
            axis.plot(
                line["eps"],
                line["iou_ratio"],
                color=colours.get(defence),
                linestyle=":" if made == "without" else "-",
                marker={"none": "o", "multiscale": "s", "crf": "^"}.get(defence, "o"),
                markersize=3,
                label=defence if defence == "none" else f"{defence}, attacked {made} it",
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.25, 1, 4, 16], ["0.25", "1", "4", "16"])
        axis.set_ylim(0, max(1.1, 1.05 * ratios["iou_ratio"].max()))
        axis.grid(alpha=0.3)
        if model == models[0]:
            axis.set_title(attack, fontsize=10)
        if attack == attacks[0]:
            axis.set_ylabel(f"{model}\nIoU ratio", fontsize=9)
        if model == models[-1]:
            axis.set_xlabel("ε of 255", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    write_figure(Path(path), figure)
