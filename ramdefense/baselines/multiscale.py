"""Multi-scale inference: the logits of an image at several sizes, averaged (Arnab, Miksik & Torr, CVPR 2018)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ramdefense.defended import DefendedSegmenter
from ramdefense.outputs import logits_of
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, NotApplicableError, Traits


class MultiScale(DefendedSegmenter):
    """A segmenter whose logits are the mean over scales of its input; differentiable from end to end.

    Images are resized bilinearly (with antialiasing where they shrink) after the segmenter's preprocessing, the logits
    back to the image's size. With `undefended` conditions (``traits``) the model runs at scale 1 alone.

    Args:
        segmenter: a `PyTorchSegmenter`; it stays as it was.
        scales: relative to the image.
        flip: also the mirror image at each scale, its logits mirrored back.

    Raises:
        TypeError: `segmenter` is no `PyTorchSegmenter`.
        ValueError: no scale, or one that is not a positive number.
        NotApplicableError: the model does not take images of one of these sizes.
    """

    def __init__(
        self, segmenter: PyTorchSegmenter, *, scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25), flip: bool = False
    ) -> None:
        model = MultiScaleModel(copy.deepcopy(segmenter.model), scales, flip=flip, output_fn=segmenter.output_fn)
        self._become(segmenter, model, output_fn=None)
        example = torch.full((1, *segmenter.input_shape), sum(segmenter.clip_values) / 2)
        with torch.no_grad():
            self.logits(example)


class MultiScaleModel(nn.Module):
    """Shape: ``(N, C, H, W)`` → logits ``(N, nb_classes, H, W)``."""

    traits = Traits()

    def __init__(
        self,
        model: nn.Module,
        scales: Sequence[float],
        *,
        flip: bool = False,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scales = tuple(float(scale) for scale in scales)
        if not self.scales or not all(0 < scale < float("inf") for scale in self.scales):
            raise ValueError(f"scales={scales!r}: at least one, all positive numbers, such as (0.5, 0.75, 1.0, 1.25)")
        self.model, self.flip, self.output_fn = model, bool(flip), output_fn
        self.conditions = Conditions()

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if self.conditions.undefended:
            return self._logits(images, size)
        found = []
        for scale in self.scales:
            scaled = _resized(images, scale)
            try:
                found.append(self._logits(scaled, size))
                if self.flip:
                    found.append(self._logits(scaled.flip(-1), size).flip(-1))
            except (AssertionError, RuntimeError, ValueError) as error:
                if scaled.shape == images.shape or isinstance(error, torch.OutOfMemoryError):
                    raise
                height, width = scaled.shape[-2:]
                raise NotApplicableError(
                    f"the model takes no other size than {size[0]}×{size[1]}: at scale {scale:g} ({height}×{width}) it "
                    f"says {error}"
                ) from error
        return torch.stack(found).mean(dim=0)

    def _logits(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        output = self.model(images)
        return logits_of(output if self.output_fn is None else self.output_fn(output), size)

    def extra_repr(self) -> str:
        return f"scales={self.scales}, flip={self.flip}"


def _resized(images: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=scale < 1)
