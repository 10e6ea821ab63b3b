"""Checks of images and label maps, made before any work, with errors that name the value and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_images(x: Any, clip_values: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuse what is not a batch of images in the clip range.

    Args:
        x: images, a NumPy array or a tensor; nothing in it is changed.
        clip_values: smallest and largest value a pixel may have.

    Shape:
        x: (N, C, H, W), floating point, none of the four zero.

    Raises:
        TypeError: `x` is neither an array nor a tensor, or holds no floating-point numbers.
        ValueError: `x` has another rank, is empty, holds NaN or infinity, or leaves the clip range.
    """
    images = _tensor(x, "x")
    if not images.is_floating_point():
        raise TypeError(
            f"x holds {images.dtype} values; images are floating point in {clip_values}: divide 8-bit images by 255."
        )
    if images.ndim != 4:
        raise ValueError(f"x has shape {tuple(images.shape)}; images are (N, C, H, W): add or reorder dimensions.")
    if images.numel() == 0:
        raise ValueError(f"x has shape {tuple(images.shape)}, which holds no pixel; give at least one image.")
    lowest, highest = (float(value) for value in torch.aminmax(images.detach()))
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError("x holds NaN or infinite values; replace them before.")
    low, high = (float(torch.tensor(value, dtype=images.dtype)) for value in clip_values)  # as x's dtype rounds them
    if lowest < low or highest > high:
        raise ValueError(
            f"x has values from {lowest:g} to {highest:g}, outside the clip range {tuple(clip_values)}; scale or clip "
            "the images (normalisation belongs to the segmenter's `preprocessing`)."
        )


def check_labels(
    y: Any, nb_classes: int, ignore_index: int = 255, spatial: tuple[int, ...] | None = None
) -> None:
    """Refuse what is not a batch of label maps.

    Args:
        y: label maps, a NumPy array or a tensor, integers or whole floating-point numbers; nothing in it is changed.
        nb_classes: labels are 0..nb_classes-1 or `ignore_index`.
        ignore_index: label of void pixels.
        spatial: expected (H, W), or (N, H, W) to check the number of maps too; None checks neither.

    Shape:
        y: (N, H, W)

    Raises:
        TypeError: `y` is neither an array nor a tensor.
        ValueError: `y` has another rank or size, is empty, or holds something that is not a label.
    """
    labels = _tensor(y, "y").detach()
    if labels.ndim != 3:
        raise ValueError(f"y has shape {tuple(labels.shape)}; label maps are (N, H, W).")
    if spatial is not None and tuple(labels.shape[-len(spatial) :]) != tuple(spatial):
        wanted = "x".join(str(size) for size in spatial)
        raise ValueError(
            f"y has shape {tuple(labels.shape)}, which does not fit the images' {wanted}; "
            "resize the label maps with nearest neighbour."
        )
    if labels.numel() == 0:
        raise ValueError(f"y has shape {tuple(labels.shape)}, which holds no pixel; give at least one label map.")
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):  # NaN is not equal to itself
        raise ValueError("y holds NaN or fractions; labels are whole numbers.")
    wrong = ((labels < 0) | (labels >= nb_classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        found = sorted({int(value) for value in labels[wrong].unique()[:5].tolist()})
        raise ValueError(
            f"y holds the labels {found}; labels are 0..{nb_classes - 1} or {ignore_index} (ignore_index) "
            "for void pixels."
        )


def _tensor(array: Any, name: str) -> Tensor:
    """`array` as a tensor that is only read."""
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        if array.dtype == object or array.dtype.kind not in "buif":
            raise TypeError(f"{name} is an array of {array.dtype}; give an array of numbers with one shape.")
        return torch.tensor(array) if array.dtype.kind != "u" else torch.tensor(array.astype(np.int64))
    raise TypeError(f"{name} is a {type(array).__name__}; give a NumPy array or a torch tensor.")
