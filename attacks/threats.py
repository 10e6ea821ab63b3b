"""What an attack may change, and how far: a threat is a set of perturbations of one batch of images.

The loop of `attacks.optimize` moves a *variable*; a threat says where it starts, which images it stands for and which
of its values are allowed. A patch's variable holds its pixels, a pixel-wise perturbation's the adversarial images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from attacks.diversity import InputDiversity
from attacks.patch import Place, covered_by, for_each_image, paste
from attacks.streams import stream
from attacks.transformations import EOT

NORMS = ("inf", "2")
T = TypeVar("T")


class Threat(Protocol):
    """What the loop asks of a set of perturbations of N images."""

    @property
    def samples(self) -> int:
        """Random placements over which a step averages; 0: placing is not random."""

    def start(self, run: int) -> Tensor:
        """The variable of step 0 of a run: (N, …)."""

    def place(self, variable: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The images that the variable stands for, (N, C, H, W), and the pixels that count nowhere, (H, W) or
        (N, H, W) bool; `key` numbers the random placement."""

    def project(self, variable: Tensor) -> Tensor:
        """The closest allowed value."""

    def rows(self, chosen: Tensor) -> Self:
        """The threat on some of the images; `chosen` holds their indices."""


@dataclass(frozen=True)
class PatchThreat:
    """The pixels of a patch take any value in the clip range.

    Args:
        images: (N, C, H, W).
        streams: Stream number of each image.
        shape: (height, width) of the patch.
        location: (top, left), one such place for each image, or a surface.
        clip_values: (low, high).
        eot: Transformations of the patch, or None.
        random_start: Start the first run at random as well.
        seed: Seed of starts and transformations.
        alpha: (h, w) in [0, 1], how far the patch covers what is under it; None: wholly.
    """

    images: Tensor
    streams: tuple[int, ...]
    shape: tuple[int, int]
    location: Place
    clip_values: tuple[float, float]
    eot: EOT | InputDiversity | None = None
    random_start: bool = False
    seed: int = 0
    alpha: Tensor | None = None

    @property
    def samples(self) -> int:
        return self.eot.samples if self.eot else 0

    def start(self, run: int) -> Tensor:
        """Mid-grey, or uniform in the box from each image's stream."""
        low, high = self.clip_values
        whole = (self.images.shape[1], *self.shape)
        if run == 0 and not self.random_start:
            return self.images.new_full((len(self.images), *whole), (low + high) / 2)
        return low + (high - low) * _uniform(whole, self.seed, self.streams, run).to(self.images)

    def place(self, variable: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if self.eot is None:
            return paste(self.images, variable, self.location, self.alpha), self._covered
        transformation = self.eot.sample([(self.seed, image, *key) for image in self.streams])
        return transformation.apply(self.images, variable, self.location, self.clip_values, self.alpha)

    @cached_property
    def _covered(self) -> Tensor:
        """The pixels under the patch where nothing transforms it, (H, W) or (N, H, W) bool."""
        size = self.images.shape[-2], self.images.shape[-1]
        return covered_by(self.shape, self.location, size, self.images.device, self.alpha)

    def project(self, variable: Tensor) -> Tensor:
        return variable.clamp(*self.clip_values)

    def rows(self, chosen: Tensor) -> Self:
        location = _chosen(self.location, chosen) if for_each_image(self.location) else self.location
        return replace(self, images=self.images[chosen], streams=_chosen(self.streams, chosen), location=location)


@dataclass(frozen=True)
class PixelThreat:
    """Every pixel moves, by at most ε in a norm.

    Args:
        images: (N, C, H, W).
        streams: Stream number of each image.
        clip_values: (low, high).
        eps: Radius of the ball, in the units of the pixels.
        norm: "inf", or "2": of each whole image.
        random_start: Start the first run at random as well.
        seed: Seed of the starts.
    """

    images: Tensor
    streams: tuple[int, ...]
    clip_values: tuple[float, float]
    eps: float
    norm: str = "inf"
    random_start: bool = False
    seed: int = 0

    @property
    def samples(self) -> int:
        return 0

    def start(self, run: int) -> Tensor:
        """The images, or uniform in the cube of side 2ε around them, brought into the ball."""
        if run == 0 and not self.random_start:
            return self.images
        noise = 2 * _uniform(tuple(self.images.shape[1:]), self.seed, self.streams, run).to(self.images) - 1
        if self.norm == "2":  # a cube of that side is far outside the ball: a direction and a length instead
            length = (noise[:, :1, :1, :1] + 1) / 2
            noise = noise / noise.flatten(1).norm(dim=1)[:, None, None, None] * length
        return self.project(self.images + self.eps * noise)

    def place(self, variable: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return variable, torch.zeros(variable.shape[-2:], dtype=torch.bool, device=variable.device)

    def project(self, variable: Tensor) -> Tensor:
        """Into the ball, then into the clip range, which is convex and holds the ball's centre: it stays in both."""
        moved = variable - self.images
        if self.norm == "inf":
            moved = moved.clamp(-self.eps, self.eps)
        else:
            length = moved.flatten(1).norm(dim=1)[:, None, None, None]
            moved = torch.where(length > self.eps, moved * (self.eps / length.clamp_min(1e-30)), moved)
        return (self.images + moved).clamp(*self.clip_values)

    def rows(self, chosen: Tensor) -> Self:
        return replace(self, images=self.images[chosen], streams=_chosen(self.streams, chosen))


def _uniform(shape: tuple[int, ...], seed: int, streams: Sequence[int], run: int) -> Tensor:
    """Uniform in [0, 1), from each image's stream: (N, *shape)."""
    return torch.stack([torch.rand(shape, generator=stream(seed, "start", image, run)) for image in streams])


def _chosen(each: tuple[T, ...], chosen: Tensor) -> tuple[T, ...]:
    return tuple(each[row] for row in chosen.tolist())
