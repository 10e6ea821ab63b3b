"""Input diversity (Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity", CVPR 2019),
on the patch: in each look it is shrunk and padded at random to its own size again, or left as it is.

The paper shrinks and pads the whole image; to do so with the patch, which is all that the attack has, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.patch import Place, covered_by, paste
from attacks.streams import stream


@dataclass(frozen=True, kw_only=True)
class InputDiversity:
    """How a patch is shrunk.

    Args:
        samples: Draws in each step, over which the gradient is averaged.
        resize_rate: The smallest factor on both sides, in (0, 1].
        diversity_prob: The probability that a patch is shrunk at all.

    Raises:
        ValueError: On a number outside its range.
    """

    samples: int = 1
    resize_rate: float = 0.8
    diversity_prob: float = 0.5

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`samples` is {self.samples!r}; it must be at least 1.")
        if not 0 < self.resize_rate <= 1:
            raise ValueError(f"`resize_rate` is {self.resize_rate!r}; it must be above 0 and at most 1.")
        if not 0 <= self.diversity_prob <= 1:
            raise ValueError(f"`diversity_prob` is {self.diversity_prob!r}; it must be a probability.")

    def sample(self, keys: Sequence[tuple[int | str, ...]]) -> Shrunk:
        """Draw one size and place for each key; the same key gives the same, whatever the others are."""
        drawn = torch.stack([torch.rand(4, generator=stream("diversity", *key)) for key in keys])
        scale = self.resize_rate + (1 - self.resize_rate) * drawn[:, 1]
        return Shrunk(torch.where(drawn[:, 0] < self.diversity_prob, scale, 1.0), drawn[:, 2:])


@dataclass(frozen=True, eq=False)
class Shrunk:
    """One size and place for each of N patches.

    Args:
        scale: (N,) factor on both sides, in (0, 1].
        place: (N, 2) where in the room that is left, down and right, in [0, 1).
    """

    scale: Tensor
    place: Tensor

    def apply(
        self,
        images: Tensor,
        pixels: Tensor,
        location: Place,
        clip_values: tuple[float, float] = (0.0, 1.0),
        alpha: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put the shrunk patches on the images.

        Args:
            images: (N, C, H, W).
            pixels: (N, C, h, w), in the clip range; the result is differentiable in them.
            location: Place of the patch: (top, left), N of them, or a surface.
            clip_values: The lower end is what patches are padded with.
            alpha: (h, w) in [0, 1], which stays where it is; None: 1.

        Returns:
            The images, (N, C, H, W), and the pixels under the patch, (H, W) or (N, H, W) bool.
        """
        shape = pixels.shape[-2], pixels.shape[-1]
        drawn = zip(pixels, self.scale.tolist(), self.place.tolist(), strict=True)
        shrunk = torch.stack([_shrink(patch, scale, place, float(clip_values[0])) for patch, scale, place in drawn])
        size = images.shape[-2], images.shape[-1]
        return paste(images, shrunk, location, alpha), covered_by(shape, location, size, images.device, alpha)


def _shrink(patch: Tensor, scale: float, place: list[float], padding: float) -> Tensor:
    """A patch (C, h, w) times `scale`, laid at `place` on a canvas of its own size."""
    height, width = (max(1, round(scale * side)) for side in patch.shape[-2:])
    down, right = patch.shape[-2] - height, patch.shape[-1] - width
    if not (down or right):
        return patch
    small = F.interpolate(patch[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = int(place[0] * (down + 1)), int(place[1] * (right + 1))
    return F.pad(small, (left, right - left, top, down - top), value=padding)
