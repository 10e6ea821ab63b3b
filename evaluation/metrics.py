"""Metrics from confusion counts.

Counts are kept for each image, and every figure is a pure function of their sum: so any subset of the images, any
merge of partial runs and any resampling gives its figure without looking at a pixel again. mIoU is never an average
over batches or over images.

A pixel is *counted* if its label is not void and, with ``region="outside"`` (the default everywhere), it does not lie
under the patch: what a model says about the patch itself is no effect of the patch on the scene.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def margins(counts: ArrayLike) -> Counts:
    """All that any figure needs of confusion counts, 3·C numbers out of C²; like them, they may be summed over images.

    Shape:
        ``(..., C, C)`` → ``(..., 3, C)``: for each class the pixels where reference and prediction agree on it, those
        of the reference and those of the prediction.
    """
    array = np.asarray(counts, dtype=np.int64)
    return np.stack([np.diagonal(array, axis1=-2, axis2=-1), array.sum(axis=-1), array.sum(axis=-2)], axis=-2)


def _ratio(part: ArrayLike, whole: ArrayLike) -> NDArray[np.float64]:
    """Part / whole, element by element; NaN where the whole is 0."""
    above, below = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(above, below, out=np.full(np.broadcast_shapes(above.shape, below.shape), np.nan), where=below != 0)


def accuracies(of: ArrayLike) -> NDArray[np.float64]:
    """``pixel_accuracy`` from margins, ``(..., 3, C)`` → ``(...)``."""
    array = np.asarray(of)
    return _ratio(array[..., 0, :].sum(axis=-1), array[..., 1, :].sum(axis=-1))


def class_ious(of: ArrayLike) -> NDArray[np.float64]:
    """``class_iou`` from margins, ``(..., 3, C)`` → ``(..., C)``."""
    hit, reference, predicted = np.moveaxis(np.asarray(of), -2, 0)
    return _ratio(hit, reference + predicted - hit)


def mean_ious(of: ArrayLike) -> NDArray[np.float64]:
    """``mean_iou`` from margins, ``(..., 3, C)`` → ``(...)``."""
    values = class_ious(of)
    seen = ~np.isnan(values)
    return _ratio(np.where(seen, values, 0).sum(axis=-1), seen.sum(axis=-1))


def figures(parts: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
    """Every figure of an evaluation, from margins of sums; of many sums at once, as resampling needs it.

    Args:
        parts: the margins of a record's counts, under the names that they have there (``evaluation.results.Record``):
            clean, whole, adversarial, changed and, for an attack with a target, aim and aim_clean.

    Shape:
        every part ``(..., 3, C)``; every figure ``(...)``, NaN where it is not defined.
    """
    clean, adversarial = parts["clean"], parts["adversarial"]
    targeted = "aim" in parts
    return {
        "success": accuracies(parts["aim"]) if targeted else 1 - accuracies(adversarial),
        "clean_success": accuracies(parts["aim_clean"]) if targeted else 1 - accuracies(clean),
        "target_miou": mean_ious(parts["aim"]) if targeted else np.full_like(accuracies(clean), np.nan),
        "adversarial_miou": mean_ious(adversarial),
        "pixel_accuracy": accuracies(adversarial),
        "iou_ratio": _ratio(mean_ious(adversarial), mean_ious(clean)),
        "changed": 1 - accuracies(parts["changed"]),
        "clean_miou": mean_ious(parts["whole"]),
        "clean_region_miou": mean_ious(clean),
        "clean_pixel_accuracy": accuracies(clean),
    }


def pixel_accuracy(counts: Counts) -> float:
    """Counted pixels predicted as the reference / counted pixels; NaN where nothing is counted."""
    return float(accuracies(margins(counts)))


def class_iou(counts: Counts) -> NDArray[np.float64]:
    """Intersection over union of each class, ``(C,)``; NaN for a class absent from both reference and prediction."""
    return class_ious(margins(counts))


def mean_iou(counts: Counts) -> float:
    """Mean of ``class_iou`` over the classes that occur in the reference or in the prediction; NaN if none does."""
    return float(mean_ious(margins(counts)))


def iou_ratio(adversarial: Counts, clean: Counts) -> float:
    """mIoU under attack / clean mIoU of the same model (Arnab et al., CVPR 2018); NaN where the latter is 0."""
    return float(_ratio(mean_iou(adversarial), mean_iou(clean)))


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
