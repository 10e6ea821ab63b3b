"""Expectation over transformation (Athalye et al. 2018): a patch that works as it is printed, turned and lit.

`EOT` says how far a patch may be turned, scaled, moved, tilted and lit; `EOT.sample` draws parameters from random
streams, and `Transformation.apply` puts a patch on images with them. The parameters are all there is to a
transformation: the same ones give the same images again, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from torch import Tensor

from attacks.geometry import Surface, lay, view
from attacks.patch import Place, covered_by, paste
from attacks.streams import stream


@dataclass(frozen=True, eq=False)
class Transformation:
    """One transformation for each of N patches; every field is a CPU tensor.

    Args:
        angle: (N,) turn about the patch's centre, degrees, counter-clockwise.
        scale: (N,) factor on both sides.
        shift: (N, 2) move down and right, as fractions of the patch's height and width.
        corners: (N, 4, 2) move down and right of the upper left, upper right, lower right and lower left corner, before
            turn and scale, as fractions of the patch's height and width.
        brightness: (N,) added to the patch's pixels, as a fraction of the clip range.
        contrast: (N,) factor on their distance to mid-grey.
        noise: (N,) standard deviation of Gaussian noise on them, as a fraction of the clip range.
        noise_seed: (N,) int64, from which the noise is drawn.
    """

    angle: Tensor
    scale: Tensor
    shift: Tensor
    corners: Tensor
    brightness: Tensor
    contrast: Tensor
    noise: Tensor
    noise_seed: Tensor

    @classmethod
    def identity(cls, count: int) -> Transformation:
        """The transformation of `count` patches that changes nothing."""
        zero, one = torch.zeros(count), torch.ones(count)
        return cls(
            angle=zero,
            scale=one,
            shift=torch.zeros(count, 2),
            corners=torch.zeros(count, 4, 2),
            brightness=zero,
            contrast=one,
            noise=zero,
            noise_seed=torch.zeros(count, dtype=torch.int64),
        )

    def record(self) -> dict[str, list[float]]:
        """The parameters as plain numbers, for a file; `from_record` reads them back exactly."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_record(cls, record: dict[str, list[float]]) -> Transformation:
        """The transformation whose `record` this is."""
        dtypes = {"noise_seed": torch.int64}
        return cls(**{name: torch.tensor(value, dtype=dtypes.get(name)) for name, value in record.items()})

    def stays_in_place(self) -> Tensor:
        """(N,) bool: the patches that are neither turned, scaled, moved nor tilted."""
        still = (self.angle == 0) & (self.scale == 1)
        return still & (self.shift == 0).all(1) & (self.corners == 0).flatten(1).all(1)

    def homography(self, patch_shape: tuple[int, int], location: Place) -> Tensor:
        """Where the patch goes: (N, 3, 3) float64, from (column, row) on the patch to (column, row) on the image.

        On a surface the patch is transformed in its own plane, and then seen in the surface's perspective.
        """
        from kornia.geometry.transform import get_perspective_transform

        size = torch.tensor(patch_shape, dtype=torch.float64)
        corners = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.float64) * (size - 1).clamp_min(1)
        centre = corners.mean(0)
        radians = torch.deg2rad(self.angle.double())
        cosine, sine = radians.cos(), radians.sin()
        turn = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)  # on (row, column)
        tilted = corners + self.corners.double() * size - centre
        placed = self.scale.double()[:, None, None] * tilted @ turn.mT
        at = torch.tensor((0, 0) if isinstance(location, Surface) else location, dtype=torch.float64).view(-1, 1, 2)
        placed = placed + centre + at + self.shift.double()[:, None] * size
        transform = get_perspective_transform(corners.flip(-1).expand(len(placed), -1, -1), placed.flip(-1))
        return location.homography(patch_shape) @ transform if isinstance(location, Surface) else transform

    def light(self, pixels: Tensor, clip_values: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """The patches as they are lit: brightness, contrast and noise, clipped to the range.

        Shape: (N, C, h, w) -> (N, C, h, w), differentiable.
        """
        low, high = clip_values

        def each(values: Tensor) -> Tensor:
            return values.to(pixels).view(-1, 1, 1, 1)

        # written as a change of the pixels, so that no change is none in floating point either
        lit = pixels + each(self.contrast - 1) * (pixels - (low + high) / 2) + each(self.brightness) * (high - low)
        if self.noise.any():
            drawn = [
                torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
                for seed in self.noise_seed.tolist()
            ]
            lit = lit + each(self.noise) * (high - low) * torch.stack(drawn).to(pixels)
        return lit.clamp(low, high)

    def apply(
        self,
        images: Tensor,
        pixels: Tensor,
        location: Place,
        clip_values: tuple[float, float] = (0.0, 1.0),
        alpha: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put the transformed patches on the images.

        Patch and alpha are warped together, as four channels, and then laid over the image, so that the border is
        blended once and has no seam. A patch that stays in place is pasted, exactly. On a surface the edge is sharp
        (`attacks.geometry.view`), whether the patch stays or not.

        Args:
            images: (N, C, H, W), in the clip range.
            pixels: (N, C, h, w), in the clip range; the result is differentiable in them.
            location: Place of the patch before it is transformed: (top, left), N of them, or a surface.
            clip_values: The range of the pixels, to which the lit patch is clipped.
            alpha: (h, w) in [0, 1], moved with the pixels; None: 1.

        Returns:
            The images, (N, C, H, W), and the pixels that the patch covers in part or whole, (N, H, W) bool. Pixels that
            are not covered are those of `images`, bit for bit.
        """
        from kornia.geometry.transform import warp_perspective

        shape, size = (pixels.shape[-2], pixels.shape[-1]), (images.shape[-2], images.shape[-1])
        lit = self.light(pixels, clip_values)
        still = self.stays_in_place().to(images.device)
        pasted = paste(images, lit, location, alpha)
        under = covered_by(shape, location, size, images.device, alpha).expand(len(images), -1, -1)
        if self.stays_in_place().all():
            return pasted, under
        homography = self.homography(shape, location)
        if isinstance(location, Surface):
            colour, opacity = view(lit, alpha, homography, size)
            laid = lay(images, colour, opacity)
        else:
            opaque = torch.ones_like(lit[:, :1]) if alpha is None else alpha.to(lit).expand(len(lit), 1, -1, -1)
            layers = torch.cat([lit * opaque, opaque], 1)
            # zeros outside the patch: the warped colours come out already multiplied by the warped alpha
            warped = warp_perspective(layers, homography.to(layers), size, padding_mode="zeros", align_corners=True)
            opacity = warped[:, -1:]
            laid = images * (1 - opacity) + warped[:, :-1]
        where = still[:, None, None]
        return torch.where(where[:, None], pasted, laid), torch.where(where, under, opacity[:, 0] != 0)


@dataclass(frozen=True, kw_only=True)
class EOT:
    """How far a patch is transformed; every parameter is drawn uniformly and apart from the others.

    Args:
        samples: Transformations in each step of an attack, over which the gradient is averaged.
        rotation: Largest turn either way, degrees.
        scale: Smallest and largest factor on both sides.
        translation: Largest move either way, as a fraction of the patch's sides.
        perspective: Distortion, as kornia counts it: twice the largest move of each corner along each side, as a
            fraction of that side; under 0.5, from where on a tilted patch might fold over.
        brightness: Largest amount added or taken, as a fraction of the clip range.
        contrast: Largest change of the factor on the distance to mid-grey, either way.
        noise: Standard deviation of Gaussian noise, as a fraction of the clip range.

    Raises:
        ValueError: On a number outside its range.
    """

    samples: int = 8
    rotation: float = 15.0
    scale: tuple[float, float] = (0.8, 1.2)
    translation: float = 0.1
    perspective: float = 0.2
    brightness: float = 0.1
    contrast: float = 0.1
    noise: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.samples, Integral) or isinstance(self.samples, bool) or self.samples < 1:
            raise ValueError(f"`samples` is {self.samples!r}; it must be a whole number, at least 1.")
        limits = {
            "rotation": 180.0, "translation": math.inf, "perspective": 0.5,
            "brightness": 1.0, "contrast": 1.0, "noise": math.inf,
        }  # fmt: skip
        for name, limit in limits.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= limit or not math.isfinite(value):
                raise ValueError(f"`{name}` is {value!r}; it must be a number from 0 to {limit}.")
        if self.perspective == 0.5:
            raise ValueError("`perspective` is 0.5, at which a patch may fold over; it must be under 0.5.")
        if (
            not isinstance(self.scale, (tuple, list))
            or len(self.scale) != 2
            or not all(isinstance(factor, Real) and math.isfinite(factor) for factor in self.scale)
            or not 0 < self.scale[0] <= self.scale[1]
        ):
            raise ValueError(f"`scale` is {self.scale!r}; it must be (smallest, largest), both above 0.")
        object.__setattr__(self, "scale", tuple(self.scale))

    def sample(self, keys: Sequence[tuple[int | str, ...]]) -> Transformation:
        """Draw one transformation for each key.

        Args:
            keys: Keys of random streams, e.g. `[(seed, image, step, sample), …]`; the same key gives the same
                transformation, whatever the others are.

        Returns:
            The transformation of `len(keys)` patches.
        """
        generators = [stream("eot", *key) for key in keys]
        drawn = torch.stack([torch.rand(14, generator=generator) for generator in generators])
        seeds = torch.stack([torch.randint(2**62, (), generator=generator) for generator in generators])
        both = 2 * drawn - 1  # (-1, 1)
        low, high = self.scale
        return Transformation(
            angle=self.rotation * both[:, 0],
            scale=low + (high - low) * drawn[:, 1],
            shift=self.translation * both[:, 2:4],
            corners=self.perspective / 2 * both[:, 4:12].reshape(-1, 4, 2),
            brightness=self.brightness * both[:, 12],
            contrast=1 + self.contrast * both[:, 13],
            noise=torch.full((len(keys),), float(self.noise)),
            noise_seed=seeds,
        )
