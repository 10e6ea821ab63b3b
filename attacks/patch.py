"""A patch: its pixels, where it goes, and pasting it without an attack or a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Images = TypeVar("Images", np.ndarray, Tensor)
Location = tuple[int, int] | str

DEFAULT_SIDE = 150 / 512  # of the shorter side: RAM's evaluation puts 150×150 pixels on an image of 512×512

_CORNERS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "upper_left": lambda free_height, free_width: (0, 0),
    "upper_right": lambda free_height, free_width: (0, free_width),
    "lower_left": lambda free_height, free_width: (free_height, 0),
    "lower_right": lambda free_height, free_width: (free_height, free_width),
    "center": lambda free_height, free_width: (free_height // 2, free_width // 2),
}


def _pair(value: object, name: str, minimum: int) -> tuple[int, int]:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(isinstance(number, Integral) and not isinstance(number, bool) for number in value)
    ):
        raise ValueError(f"`{name}` is {value!r}; it must be two whole numbers.")
    if min(value) < minimum:
        raise ValueError(f"`{name}` is {value!r}; its numbers must be at least {minimum}.")
    return int(value[0]), int(value[1])


def check_shape(patch_shape: object) -> tuple[int, int]:
    """`patch_shape` as (height, width), both at least 1, or a ValueError."""
    return _pair(patch_shape, "patch_shape", 1)


def check_location(location: object) -> Location:
    """`location` as (top, left), both at least 0, or the name of a corner, or a ValueError."""
    if isinstance(location, str):
        if location not in _CORNERS:
            raise ValueError(f"There is no patch location {location!r}; the names are {', '.join(_CORNERS)}.")
        return location
    return _pair(location, "patch_location", 0)


def resolve_shape(patch_shape: tuple[int, int] | None, image_size: tuple[int, int]) -> tuple[int, int]:
    """Size of the patch on an image.

    Args:
        patch_shape: (height, width) in pixels; None: a square of 150/512 of the image's shorter side.
        image_size: (height, width) of the image.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: If the patch is larger than the image.
    """
    if patch_shape is None:
        side = max(1, round(DEFAULT_SIDE * min(image_size)))
        return side, side
    height, width = check_shape(patch_shape)
    if height > image_size[0] or width > image_size[1]:
        raise ValueError(
            f"A patch of {height}×{width} does not fit on an image of {image_size[0]}×{image_size[1]}; "
            "`patch_shape` is (height, width) in pixels."
        )
    return height, width


def resolve_location(location: Location, patch_shape: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Upper left corner of the patch on an image.

    Args:
        location: (top, left) in pixels, or "upper_left", "upper_right", "lower_left", "lower_right", "center".
        patch_shape: (height, width) of the patch.
        image_size: (height, width) of the image.

    Returns:
        (top, left) in pixels.

    Raises:
        ValueError: If the name is unknown, or if a part of the patch would lie outside the image.
    """
    height, width = resolve_shape(patch_shape, image_size)
    free = image_size[0] - height, image_size[1] - width
    location = check_location(location)
    top, left = _CORNERS[location](*free) if isinstance(location, str) else location
    if top > free[0] or left > free[1]:
        raise ValueError(
            f"A patch of {height}×{width} at (top, left) = {(top, left)} reaches outside an image of "
            f"{image_size[0]}×{image_size[1]}; `top` may be at most {free[0]} and `left` at most {free[1]}."
        )
    return top, left


def paste(images: Images, pixels: Images, location: tuple[int, int]) -> Images:
    """The images with the pixels over them, exactly: a copy and an assignment, differentiable in `pixels`.

    Args:
        images: (N, C, H, W) or (C, H, W), array or tensor, unchanged.
        pixels: (N, C, h, w) or (C, h, w), of the same kind.
        location: (top, left), already resolved.

    Returns:
        Images of the same shape, dtype and kind.
    """
    top, left = location
    height, width = pixels.shape[-2:]
    pasted = images.copy() if isinstance(images, np.ndarray) else images.clone()
    pasted[..., top : top + height, left : left + width] = pixels
    return pasted


def rectangle(
    patch_shape: tuple[int, int],
    location: tuple[int, int],
    image_size: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """The pixels that a patch covers: (H, W) bool."""
    covered = torch.zeros(image_size, dtype=torch.bool, device=device)
    covered[location[0] : location[0] + patch_shape[0], location[1] : location[1] + patch_shape[1]] = True
    return covered


@dataclass(frozen=True, eq=False)
class Patch:
    """Pixels and the place where they go.

    Args:
        pixels: (C, h, w), one patch for every image, or (N, C, h, w), one for each; floating point, array or tensor,
            in the range of the images. Copied.
        location: (top, left) in pixels, or a corner's name (`resolve_location`), which is looked up on each size of
            image anew.

    Raises:
        ValueError: On pixels of another rank, an empty patch, a dtype that is not floating point, NaN or infinity, or a
            location that is none.
    """

    pixels: Tensor
    location: Location

    def __post_init__(self) -> None:
        pixels = torch.as_tensor(self.pixels).detach().cpu().clone()
        if pixels.ndim not in (3, 4) or 0 in pixels.shape:
            raise ValueError(f"Patch pixels are (C, h, w) or (N, C, h, w), not empty; got {tuple(pixels.shape)}.")
        if not pixels.is_floating_point():
            raise ValueError(f"Patch pixels are floating point, in the range of the images; got {pixels.dtype}.")
        if not torch.isfinite(pixels).all():
            raise ValueError("Patch pixels hold NaN or infinity.")
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "location", check_location(self.location))

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def __len__(self) -> int:
        """Number of patches; 1 where one patch serves every image."""
        return 1 if self.pixels.ndim == 3 else len(self.pixels)

    def paste(self, images: Images) -> Images:
        """Paste the patch: its pixels exactly, everything else untouched bit for bit.

        Args:
            images: (N, C, H, W) or (C, H, W), array or tensor of floating point, of any size that holds the patch.

        Returns:
            Images of the same shape, dtype, kind and device; the given ones stay as they are.

        Raises:
            TypeError: If `images` is neither an array nor a tensor.
            ValueError: If the patch does not fit, or the shapes or the number of images do not match.
        """
        self._check_images(images)
        location = resolve_location(self.location, self.shape, (images.shape[-2], images.shape[-1]))
        if isinstance(images, np.ndarray):
            return paste(images, self.pixels.numpy(), location)
        return paste(images, self.pixels.to(images), location)

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """The pixels under the patch on an image of (height, width): (height, width) bool."""
        return rectangle(self.shape, resolve_location(self.location, self.shape, image_size), image_size)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        half_written = path.with_name(f"{path.name}.{os.getpid()}.part")
        save_file({"pixels": self.pixels.contiguous()}, half_written, metadata={"location": json.dumps(self.location)})
        half_written.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch that `save` wrote; nothing in the file is executed.

        Raises:
            ValueError: If the file holds no patch.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "pixels" not in file.keys() or "location" not in metadata:  # noqa: SIM118 (it is no dict)
                    raise ValueError(f"{os.fspath(path)} holds no patch; `Patch.save` writes one.")
                location = json.loads(metadata["location"])
                return cls(file.get_tensor("pixels"), location if isinstance(location, str) else tuple(location))
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is no safetensors file ({error}); `Patch.save` writes one.") from error

    def _check_images(self, images: object) -> None:
        if not isinstance(images, (np.ndarray, Tensor)):
            raise TypeError(f"A patch is pasted on an array or a tensor, not on {type(images).__name__}.")
        floating = (
            images.is_floating_point() if isinstance(images, Tensor) else np.issubdtype(images.dtype, np.floating)
        )
        if not floating:
            raise ValueError(f"Images are floating point, in the range of the patch; got {images.dtype}.")
        channels = self.pixels.shape[-3]
        if images.ndim not in (3, 4) or images.shape[-3] != channels:
            raise ValueError(
                f"Images are (N, {channels}, H, W) or ({channels}, H, W) for this patch; got {tuple(images.shape)}."
            )
        if self.pixels.ndim == 4 and (images.ndim == 3 or len(images) != len(self.pixels)):
            raise ValueError(
                f"{len(self.pixels)} patches, one for each image, do not go on images of shape {tuple(images.shape)}; "
                "give as many images, or a patch of (C, h, w), which goes on any number."
            )

    def __repr__(self) -> str:
        return f"Patch(pixels=<{'×'.join(map(str, self.pixels.shape))}>, location={self.location!r})"
