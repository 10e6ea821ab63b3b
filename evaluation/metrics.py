"""Metrics from confusion counts.

Counts are kept for each image, and every figure is a pure function of their sum: so any subset of the images, any
merge of partial runs and any resampling gives its figure without looking at a pixel again. mIoU is never an average
over batches or over images.

A pixel is *counted* if its label is not void and, with ``region="outside"`` (the default everywhere), it does not lie
under the patch: what a model says about the patch itself is no effect of the patch on the scene.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Region = Literal["outside", "everywhere"]
REGIONS: tuple[str, ...] = get_args(Region)
Counts = NDArray[np.int64]


def counted_pixels(
    labels: ArrayLike, mask: ArrayLike | None = None, *, region: Region = "outside", ignore_index: int = 255
) -> NDArray[np.bool_]:
    """Which pixels count.

    Args:
        labels: ground truth.
        mask: pixels under the patch; ``None`` if the attack has no patch.
        region: ``"outside"`` leaves out what lies under the patch, ``"everywhere"`` does not.
        ignore_index: label of void pixels.

    Shape:
        labels int64 ``(..., H, W)``, mask bool of the same shape (or one that broadcasts to it); returns bool.

    Raises:
        ValueError: an unknown region.
    """
    if region not in REGIONS:
        raise ValueError(f"region={region!r}: one of {', '.join(map(repr, REGIONS))}")
    counted = np.asarray(labels) != ignore_index
    if mask is not None and region == "outside":
        counted = counted & ~np.asarray(mask, dtype=bool)
    return counted


def confusion(
    reference: ArrayLike, prediction: ArrayLike, counted: ArrayLike, *, nb_classes: int, ignore_index: int = 255
) -> Counts:
    """Confusion counts of each image, in one pass.

    Args:
        reference: what the prediction is held against: the ground truth, a target map or another prediction.
        prediction: predicted classes.
        counted: the pixels that count (``counted_pixels``); those where the reference is void never do.
        nb_classes: number of classes C.
        ignore_index: void in the reference.

    Shape:
        three times ``(N, H, W)``; returns int64 ``(N, C, C)``, reference down, prediction across.

    Raises:
        ValueError: shapes that differ, or a counted class outside ``0..C-1``.
    """
    truth, guess = np.asarray(reference), np.asarray(prediction)
    use = np.broadcast_to(np.asarray(counted, dtype=bool), truth.shape) & (truth != ignore_index)
    if truth.ndim != 3 or guess.shape != truth.shape:
        raise ValueError(f"reference {truth.shape} and prediction {guess.shape} must be equal and (N, H, W)")
    image = np.broadcast_to(np.arange(len(truth))[:, None, None], truth.shape)[use]
    row, column = truth[use].astype(np.int64), guess[use].astype(np.int64)
    for name, values in (("reference", row), ("prediction", column)):
        if values.size and not 0 <= values.min() <= values.max() < nb_classes:
            raise ValueError(
                f"{name} holds classes {values.min()} to {values.max()}; the classes are 0–{nb_classes - 1}"
            )
    cell = (image * nb_classes + row) * nb_classes + column
    return np.bincount(cell, minlength=len(truth) * nb_classes**2).reshape(len(truth), nb_classes, nb_classes)


def merge(counts: ArrayLike) -> Counts:
    """Counts of many images → counts of them all: ``(N, C, C)`` → ``(C, C)``."""
    array = np.asarray(counts, dtype=np.int64)
    return array.reshape(-1, *array.shape[-2:]).sum(axis=0)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def pixel_accuracy(counts: Counts) -> float:
    """Counted pixels predicted as the reference / counted pixels; NaN where nothing is counted."""
    return _share(float(np.trace(counts)), float(counts.sum()))


def class_iou(counts: Counts) -> NDArray[np.float64]:
    """Intersection over union of each class, ``(C,)``; NaN for a class absent from both reference and prediction."""
    hit = np.diagonal(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(union > 0, hit / union, np.nan)


def mean_iou(counts: Counts) -> float:
    """Mean of ``class_iou`` over the classes that occur in the reference or in the prediction; NaN if none does."""
    values = class_iou(counts)
    seen = ~np.isnan(values)
    return float(values[seen].mean()) if seen.any() else float("nan")


def iou_ratio(adversarial: Counts, clean: Counts) -> float:
    """mIoU under attack / clean mIoU of the same model (Arnab et al., CVPR 2018); NaN where the latter is 0."""
    return _share(mean_iou(adversarial), mean_iou(clean))


def success_rate(target: Counts) -> float:
    """Attack success rate, from counts against the target map.

    Counted pixels predicted as the target / counted pixels that have a target.
    """
    return pixel_accuracy(target)


def error_rate(adversarial: Counts) -> float:
    """Success of an attack without a target: counted pixels predicted as another class than the label / counted."""
    return 1.0 - pixel_accuracy(adversarial)


def target_miou(target: Counts) -> float:
    """mIoU between the prediction under attack and the target map (RAM, IJCV 2024); lower is more robust."""
    return mean_iou(target)


def changed_share(changed: Counts) -> float:
    """Share of counted pixels whose prediction the attack changed, from counts of clean against attacked prediction."""
    return 1.0 - pixel_accuracy(changed)
