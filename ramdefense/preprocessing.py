"""ART's preprocessors as differentiable steps on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import Preprocessor, PreprocessorPyTorch
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import Tensor


def preprocess(
    steps: list[Preprocessor], x: Tensor, y: Tensor | None = None, *, fit: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Images and labels after a chain of ART's preprocessors, in which PyTorch and NumPy ones may be mixed.

    A PyTorch preprocessor is differentiated; for any other its own `estimate_gradient` is the backward pass.

    Args:
        steps: applied in their order, each one only where its `apply_fit` or `apply_predict` says so.
        x: images, not changed.
        y: label maps; some preprocessors repeat them together with the images.
        fit: whether this is training.

    Shape:
        x: (N, C, H, W); y: (N, H, W); returns both, with a multiple of N where a step makes several versions
    """
    images = x
    for step in steps:
        if not (step.apply_fit if fit else step.apply_predict):
            continue
        if isinstance(step, PreprocessorPyTorch):
            # Some write into their input; only the caller's has to be protected.
            images, y = step.forward(images.clone() if images is x else images, y)
        else:
            images, y = _through_numpy(step, images, y)
        images = images.to(x.dtype)  # ART's standardisation makes float32 of half precision
    return images, y


class _EstimatedGradient(torch.autograd.Function):
    """What a preprocessor made outside of torch, with the preprocessor's own estimate as the backward pass (BPDA)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processed: Tensor, step: Preprocessor, array: np.ndarray) -> Tensor:
        ctx.step, ctx.array = step, array
        return processed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        estimate = ctx.step.estimate_gradient(ctx.array, gradient.cpu().numpy())
        return torch.tensor(estimate, dtype=gradient.dtype, device=gradient.device), None, None, None


def _through_numpy(step: Preprocessor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A preprocessor that works on arrays as a differentiable step on tensors."""
    array = x.detach().cpu().numpy().copy()
    processed, labels = step(array.copy(), None if y is None else y.cpu().numpy())
    # NumPy 2 promotes to float64 in some of ART's preprocessors.
    result = _EstimatedGradient.apply(x, torch.tensor(processed, dtype=x.dtype, device=x.device), step, array)
    return result, None if y is None else torch.tensor(labels, device=y.device)


def standardisation(preprocessing: Any, device_type: str) -> Any:
    """(mean, standard deviation) as ART's PyTorch preprocessor; anything else as it is.

    Values for channels get the shape (C, 1, 1): ART would take a vector for values of columns in an image that has as
    many columns as channels.
    """
    if not isinstance(preprocessing, (tuple, list)):
        return preprocessing
    if len(preprocessing) != 2:
        raise ValueError(f"preprocessing is {preprocessing!r}; give (mean, standard deviation) or a preprocessor.")
    mean, std = (np.asarray(value, dtype=np.float32) for value in preprocessing)
    mean, std = np.broadcast_arrays(mean, std)
    if not (std > 0).all():
        raise ValueError(f"preprocessing has the standard deviation {preprocessing[1]!r}; give positive numbers.")
    if mean.ndim == 1:
        mean, std = mean[:, None, None], std[:, None, None]
    return StandardisationMeanStdPyTorch(mean=mean.copy(), std=std.copy(), device_type=device_type)
