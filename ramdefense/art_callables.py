"""The two functions that ART's `SquareAttack` needs to attack a segmenter.

    SquareAttack(segmenter, adv_criterion=segmentation_criterion(0.2), loss=segmentation_loss(segmenter), p_init=0.3)

Its first square covers the share `p_init` of the pixels and has to fit into the image: keep `p_init` under the ratio of
the shorter to the longer side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ramdefense.outputs import labels_of
from ramdefense.segmenter import PyTorchSegmenter


def segmentation_criterion(
    min_miou: float, ignore_index: int = 255
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`SquareAttack(adv_criterion=...)`: an image counts as adversarial once its mIoU falls below `min_miou`.

    The mean is taken over the classes that the image's labels or its prediction hold; void pixels count nowhere, and
    an image of void pixels only is never adversarial.

    Args:
        min_miou: in (0, 1]; a small value makes the attack go on for longer.
        ignore_index: label of void pixels.

    Shape:
        the function takes logits (N, C, H, W) and labels (N, H, W) or (N, C, H, W), and returns (N,) bool

    Raises:
        ValueError: `min_miou` is outside (0, 1].
    """
    if not 0 < min_miou <= 1:
        raise ValueError(f"min_miou is {min_miou}; give a number in (0, 1].")

    def criterion(y_pred: np.ndarray, y: np.ndarray) -> np.ndarray:
        nb_classes = y_pred.shape[1]
        labels = labels_of(y, nb_classes, ignore_index).flatten(1)
        counted = labels != ignore_index
        classes = torch.arange(nb_classes)[None, :, None]
        in_labels = (labels[:, None] == classes) & counted[:, None]
        in_prediction = (torch.tensor(y_pred.argmax(1)).flatten(1)[:, None] == classes) & counted[:, None]
        union = (in_labels | in_prediction).sum(2)
        iou = (in_labels & in_prediction).sum(2) / union.clamp(min=1)
        miou = iou.sum(1) / (union > 0).sum(1).clamp(min=1)
        return ((miou < min_miou) & counted.any(1)).numpy()

    return criterion


def segmentation_loss(segmenter: PyTorchSegmenter) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`SquareAttack(loss=...)`: minus the loss of each image, since that attack looks for small values.

    Shape:
        the function takes images (N, 3, H, W) and labels (N, H, W) or (N, C, H, W), and returns (N,)
    """

    def loss(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return -segmenter.compute_loss(x, y)

    return loss
