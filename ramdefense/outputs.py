"""What segmentation models return, as logits at the input's size; what callers give as labels, as label maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = 1e-6  # keeps the logarithm of a class that no query claims finite, and its gradient non-zero


def logits_of(output: Any, size: tuple[int, int] | None = None, *, widen: bool = False) -> Tensor:
    """Class logits from whatever a segmentation model returned.

    Understood are a tensor; a mapping with `out` (torchvision) or `logits`; an object with `.logits` (transformers);
    and class queries (`class_queries_logits` with `masks_queries_logits`: MaskFormer, Mask2Former, OneFormer). For
    queries q with class probabilities p_q (the last one, "no object", left out) and masks m_q the score of class c is
    Σ_q p_q(c)·sigmoid(m_q) (Cheng et al., 2021, "Per-pixel classification is not all you need", section 3.4); its
    logarithm is returned, so that a softmax of it is the score normalised over classes.

    Args:
        output: the model's return value.
        size: (H, W) to which the logits are resized, bilinear with `align_corners=False`; None keeps their own size.
        widen: make the logits float32 before anything is done with them; else they keep their number type.

    Shape:
        returns (N, C, H, W)

    Raises:
        TypeError: nothing in `output` is known to hold logits; `output_fn` of the segmenter is the remedy.
        ValueError: the logits are not of rank 4.
    """
    classes, masks = _field(output, "class_queries_logits"), _field(output, "masks_queries_logits")
    if isinstance(classes, Tensor) and isinstance(masks, Tensor):
        if widen:
            classes, masks = classes.float(), masks.float()
        scores = torch.einsum("nqc,nqhw->nchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
        return torch.log(_resized(scores, size) + _FLOOR)
    for candidate in (output, _field(output, "out"), _field(output, "logits")):
        if isinstance(candidate, Tensor):
            if candidate.ndim != 4:
                raise ValueError(
                    f"The model returned logits of shape {tuple(candidate.shape)}; a segmenter needs (N, C, H, W). "
                    "Give `output_fn`, a function from what the model returns to such a tensor."
                )
            return _resized(candidate.float() if widen else candidate, size)
    raise TypeError(
        f"The model returned {_described(output)}, in which no logits (N, C, H, W) were found. "
        "Give `output_fn`, a function from what the model returns to such a tensor."
    )


def predictions_of(logits: Tensor) -> Tensor:
    """The class of every pixel: (N, C, H, W) -> (N, H, W) int64, without a gradient.

    It is `argmax(1)`, of equal logits the first and NaN above all, by a kernel that takes a fifth of the time on a CPU,
    where `argmax` over classes can cost as much as several layers of a small network.
    """
    return logits.detach().max(1).indices


def labels_of(y: Any, nb_classes: int, ignore_index: int = 255) -> Tensor:
    """Label maps from label maps or from scores of classes, which is what ART's attacks hand over.

    Args:
        y: label maps (N, H, W) of whole numbers in any type, or one-hot labels, probabilities or logits
            (N, nb_classes, H, W), NumPy array or tensor. The class of a pixel is the largest score; a pixel whose
            scores are all exactly zero, in one-hot labels one without a class, is void.
        nb_classes: number of classes.
        ignore_index: label of void pixels.

    Shape:
        returns (N, H, W), int64, without a gradient, never `y` itself

    Raises:
        TypeError: `y` is neither an array nor a tensor.
        ValueError: `y` has another shape.
    """
    if not isinstance(y, (np.ndarray, Tensor)):
        raise TypeError(f"y is a {type(y).__name__}; give a NumPy array or a torch tensor.")
    scores = torch.tensor(y) if isinstance(y, np.ndarray) else y.detach().clone()
    if scores.ndim == 3:
        return scores.long()
    if scores.ndim == 4 and scores.shape[1] == nb_classes:
        return torch.where((scores == 0).all(1), ignore_index, scores.float().argmax(1))
    raise ValueError(
        f"y has shape {tuple(scores.shape)}; give label maps (N, H, W) or scores (N, {nb_classes}, H, W), "
        "one for each class."
    )


def _field(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, Tensor) else getattr(output, name, None)


def _resized(logits: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} with the keys {sorted(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {kind} of {[type(item).__name__ for item in output]}"
    return f"a {kind}"
