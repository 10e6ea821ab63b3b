"""A fully connected CRF after a segmentation model, by mean-field inference (Krähenbühl & Koltun, NeurIPS 2011).

As a layer, differentiable from end to end (CRF-RNN, Zheng et al., ICCV 2015).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ramdefense.baselines.permutohedral import lattice
from ramdefense.defended import DefendedSegmenter
from ramdefense.outputs import logits_of
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, Traits


class MeanFieldCRF(DefendedSegmenter):
    """A segmenter whose logits go through a fully connected CRF with Gaussian edge potentials.

    With `undefended` conditions (``traits``) the CRF is left out, which is how an attack is made without it.

    Args:
        segmenter: a `PyTorchSegmenter`; it stays as it was. What the CRF takes for the colours is the image as the
            model is given it, after the segmenter's preprocessing defences, its standardisation undone.
        iterations, theta_alpha, theta_beta, theta_gamma, bilateral_weight, spatial_weight: see `mean_field`.

    Raises:
        TypeError: `segmenter` is no `PyTorchSegmenter`.
        ValueError: an option out of its range, or a preprocessing that is not (mean, standard deviation).
    """

    def __init__(
        self,
        segmenter: PyTorchSegmenter,
        *,
        iterations: int = 5,
        theta_alpha: float | None = None,
        theta_beta: float = 13.0,
        theta_gamma: float = 3.0,
        bilateral_weight: float = 2.0,
        spatial_weight: float = 1.0,
    ) -> None:
        model = CRFModel(
            copy.deepcopy(segmenter.model),
            colours=_undoing(segmenter),
            output_fn=segmenter.output_fn,
            iterations=iterations,
            theta_alpha=theta_alpha,
            theta_beta=theta_beta,
            theta_gamma=theta_gamma,
            bilateral_weight=bilateral_weight,
            spatial_weight=spatial_weight,
        )
        self._become(segmenter, model, output_fn=None)


class CRFModel(nn.Module):
    """Shape: ``(N, 3, H, W)`` → logits ``(N, nb_classes, H, W)``.

    Args:
        model: what gives the unary potentials.
        colours: (scale, shift), each (C, 1, 1), that make colours from 0 to 255 of the model's inputs.
        output_fn: as of `PyTorchSegmenter`.
        options: of `mean_field`.
    """

    traits = Traits()

    def __init__(
        self,
        model: nn.Module,
        colours: tuple[Tensor, Tensor],
        output_fn: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check(**options)
        self.model, self.output_fn, self.options = model, output_fn, options
        # buffers follow the model to its device, and are no weights
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", colours[0].float(), persistent=False)
        self.register_buffer("shift", colours[1].float(), persistent=False)
        self.conditions = Conditions()

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        size = (images.shape[-2], images.shape[-1])
        logits = logits_of(output if self.output_fn is None else self.output_fn(output), size)
        if self.conditions.undefended:
            return logits
        return mean_field(logits.float(), images.float() * self.scale + self.shift, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def mean_field(
    logits: Tensor,
    images: Tensor,
    *,
    iterations: int = 5,
    theta_alpha: float | None = None,
    theta_beta: float = 13.0,
    theta_gamma: float = 3.0,
    bilateral_weight: float = 2.0,
    spatial_weight: float = 1.0,
) -> Tensor:
    """Mean-field inference in a fully connected CRF (Krähenbühl & Koltun 2011, algorithm 1), with Potts compatibility.

    Energy of a labelling: unary −log softmax(logits), and for each pair of pixels with different labels
    w1 k1 + w2 k2, where k1 = exp(−|p_i − p_j|² / 2θ_α² − |c_i − c_j|² / 2θ_β²) and k2 = exp(−|p_i − p_j|² / 2θ_γ²).
    Each kernel is divided by its sum over j, as CRF-RNN does, and j = i is among the neighbours, as in the published
    implementations. An iteration is Q ← softmax(logits + w1 K1 Q + w2 K2 Q). The first kernel is filtered on the
    permutohedral lattice, which is an approximation; the second is separable and exact.

    Args:
        logits: of the model.
        images: colours from 0 to 255.
        iterations: 0 returns the log-softmax of the logits.
        theta_alpha: standard deviation in space of the bilateral kernel, in pixels; None: 0.16 of the longer side,
            DeepLab's 80 pixels on images of 500.
        theta_beta: standard deviation in colour of it, in units of 0–255.
        theta_gamma: standard deviation of the spatial kernel, in pixels.
        bilateral_weight, spatial_weight: w1 and w2. The defaults are ours: published ones belong to the models that
            they were fitted or learnt with.

    Shape:
        logits: (N, K, H, W); images: (N, C, H, W); returns logits (N, K, H, W) whose softmax is Q, normalised so that
        their exponentials sum to 1

    Raises:
        ValueError: an option out of its range.
    """
    if theta_alpha is None:
        theta_alpha = 0.16 * max(images.shape[-2:])
    options = {"theta_alpha": theta_alpha, "theta_beta": theta_beta, "theta_gamma": theta_gamma}
    _check(iterations=iterations, bilateral_weight=bilateral_weight, spatial_weight=spatial_weight, **options)
    unary = logits.log_softmax(dim=1)
    filters: list[tuple[float, Callable[[Tensor], Tensor]]] = []
    if iterations and bilateral_weight:
        filters.append((bilateral_weight, _bilateral(images, theta_alpha, theta_beta)))
    if iterations and spatial_weight:
        filters.append((spatial_weight, _spatial(logits.shape[-2], logits.shape[-1], theta_gamma)))
    found = unary
    for _ in range(iterations):
        beliefs = found.exp()
        found = unary
        for weight, smooth in filters:
            found = found + weight * smooth(beliefs)
        found = found.log_softmax(dim=1)
    return found


def _bilateral(images: Tensor, theta_alpha: float, theta_beta: float) -> Callable[[Tensor], Tensor]:
    number, _, height, width = images.shape
    axes = (torch.arange(side, device=images.device, dtype=images.dtype) for side in (height, width))
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 2).expand(number, -1, -1)
    colours = images.flatten(2).transpose(1, 2)
    features = torch.cat([places / theta_alpha, colours / theta_beta], dim=2).flatten(0, 1)
    groups = torch.arange(number, device=images.device).repeat_interleave(height * width)
    grid = lattice(features, groups)

    def smooth(beliefs: Tensor) -> Tensor:
        rows = beliefs.flatten(2).transpose(1, 2).flatten(0, 1)
        # the sum over the kernel is that of a further class which every pixel has
        filtered = grid.filter(torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1))
        mean = filtered[:, :-1] / filtered[:, -1:]
        return mean.reshape(number, height * width, -1).transpose(1, 2).reshape(beliefs.shape)

    return smooth


def _spatial(height: int, width: int, theta_gamma: float) -> Callable[[Tensor], Tensor]:
    """Rows, then columns, each as one matrix; a product of two divisions by the sums is the division by the sum."""
    down, across = (_gaussian(side, theta_gamma) for side in (height, width))
    return lambda beliefs: down.to(beliefs) @ beliefs @ across.to(beliefs).T


def _gaussian(side: int, theta: float) -> Tensor:
    places = torch.arange(side, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((places[:, None] - places) / theta) ** 2)
    return kernel / kernel.sum(dim=1, keepdim=True)


def _undoing(segmenter: PyTorchSegmenter) -> tuple[Tensor, Tensor]:
    """Scale and shift from what the model is given to colours from 0 to 255."""
    low, high = segmenter.clip_values
    to_255 = 255 / (high - low)
    channels = segmenter.input_shape[0]
    step = segmenter.preprocessing
    mean, std = (torch.zeros(channels), torch.ones(channels)) if step is None else _standardisation(step, channels)
    return (std * to_255).view(-1, 1, 1), ((mean - low) * to_255).view(-1, 1, 1)


def _standardisation(step: Any, channels: int) -> tuple[Tensor, Tensor]:
    mean, std = (getattr(step, name, None) for name in ("mean", "std"))
    if mean is None or std is None:
        raise ValueError(
            f"preprocessing is a {type(step).__name__}; the CRF must undo it to see colours: give the segmenter "
            "(mean, standard deviation), and put other steps among its preprocessing_defences"
        )
    return tuple(torch.as_tensor(v).flatten().float().expand(channels) for v in (mean, std))  # type: ignore[return-value]


def _check(**options: Any) -> None:
    for name, value in options.items():
        if name == "iterations":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"iterations={value!r}: a whole number from 0")
        elif name == "theta_alpha" and value is None:
            continue
        elif name.startswith("theta"):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: a positive number")
        elif not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}: a number from 0")
