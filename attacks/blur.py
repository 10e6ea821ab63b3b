"""Gaussian blur of the object alone: the corruption that contextual fusion was tried under (arXiv 2011.09526)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blur_objects(images: Tensor, masks: Tensor, sigma: float) -> Tensor:
    """Images in which what lies under the masks is blurred; every other pixel stays, bit for bit.

    Args:
        images: on any device.
        masks: of the objects.
        sigma: standard deviation of the Gaussian in pixels, at least 0; it is cut off at 3σ, or where the image ends.

    Shape:
        images: ``(N, C, H, W)``; masks: bool ``(N, H, W)``; returns the shape of the images

    Raises:
        ValueError: a negative sigma, or masks of another shape.
    """
    from kornia.filters import gaussian_blur2d

    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma={sigma}: a number of pixels, at least 0")
    if masks.dtype != torch.bool or masks.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"masks are {masks.dtype} of shape {tuple(masks.shape)}; give bool (N, H, W) for "
            f"images {tuple(images.shape)}"
        )
    if sigma == 0:
        return images.clone()
    radius = min(math.ceil(3 * sigma), min(images.shape[2:]) - 1)
    blurred = gaussian_blur2d(images, 2 * radius + 1, (sigma, sigma), border_type="reflect")
    return torch.where(masks[:, None], blurred, images)
