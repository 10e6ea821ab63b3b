"""A patch: its pixels, where it goes, and pasting it without an attack or a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from attacks.geometry import Surface, lay, view

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Images = TypeVar("Images", np.ndarray, Tensor)
Places = tuple[tuple[int, int], ...]  # (top, left) on each image of a batch
Place = tuple[int, int] | Places | Surface
Location = Place | str

DEFAULT_SIDE = 150 / 512  # of the shorter side: RAM's evaluation puts 150×150 pixels on an image of 512×512

CORNERS: dict[str, Callable[[int, int], tuple[int, int]]] = {
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
    """`location` as (top, left), both at least 0, one such place for each image, a surface or the name of a corner, or
    a ValueError."""
    if isinstance(location, Surface):
        return location
    if isinstance(location, str):
        if location not in CORNERS:
            raise ValueError(f"There is no patch location {location!r}; the names are {', '.join(CORNERS)}.")
        return location
    listed = location.tolist() if isinstance(location, (np.ndarray, Tensor)) else location
    if isinstance(listed, (tuple, list)) and listed and isinstance(listed[0], (tuple, list)):
        return tuple(_pair(place, "patch_location", 0) for place in listed)
    return _pair(listed, "patch_location", 0)


def check_alpha(alpha: Any) -> Tensor:
    """`alpha` as (h, w) float32 on the CPU, in [0, 1] and somewhere above 0, or a ValueError."""
    try:
        alpha = torch.as_tensor(alpha, dtype=torch.float32).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`patch_alpha` is {alpha!r}; it must be numbers in [0, 1], (h, w).") from error
    if alpha.ndim != 2 or 0 in alpha.shape:
        raise ValueError(f"`patch_alpha` has shape {tuple(alpha.shape)}; it must be (h, w), that of the patch.")
    if not ((alpha >= 0) & (alpha <= 1)).all() or not alpha.any():
        raise ValueError("`patch_alpha` must be in [0, 1], and somewhere above 0.")
    return alpha


def for_each_image(location: Location) -> TypeIs[Places]:
    """Whether a location that was checked has a place for each image."""
    return isinstance(location, tuple) and isinstance(location[0], tuple)


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


def resolve_location(location: Location, patch_shape: tuple[int, int], image_size: tuple[int, int]) -> Place:
    """Place of the patch on an image.

    Args:
        location: (top, left) in pixels; one such place for each image, (N, 2); a `Surface`; or "upper_left",
            "upper_right", "lower_left", "lower_right", "center".
        patch_shape: (height, width) of the patch.
        image_size: (height, width) of the image.

    Returns:
        (top, left) in pixels of the patch's upper left corner, N of them, or the surface.

    Raises:
        ValueError: If the name is unknown, or if a part of the patch would lie outside the image.
    """
    location = check_location(location)
    if isinstance(location, Surface):
        location.check(image_size)
        return location
    height, width = resolve_shape(patch_shape, image_size)
    free = image_size[0] - height, image_size[1] - width
    place = CORNERS[location](*free) if isinstance(location, str) else location
    for top, left in place if for_each_image(place) else (place,):
        if top > free[0] or left > free[1]:
            raise ValueError(
                f"A patch of {height}×{width} at (top, left) = {(top, left)} reaches outside an image of "
                f"{image_size[0]}×{image_size[1]}; `top` may be at most {free[0]} and `left` at most {free[1]}."
            )
    return place


def paste(images: Images, pixels: Images, location: Place, alpha: Tensor | None = None) -> Images:
    """The images with the pixels over them, differentiable in `pixels`.

    Without a surface and alpha it is a copy and an assignment. With alpha it is images·(1 - α) + pixels·α, exactly the
    pixels where α is 1. Where the patch does not cover them, images stay as they are bit for bit.

    Args:
        images: (N, C, H, W) or (C, H, W), array or tensor, unchanged.
        pixels: (N, C, h, w) or (C, h, w), of the same kind.
        location: Already resolved.
        alpha: (h, w) in [0, 1]; None: 1.

    Returns:
        Images of the same shape, dtype and kind.
    """
    if isinstance(location, Surface) or alpha is not None or for_each_image(location):
        if isinstance(images, np.ndarray):
            tensor = torch.from_numpy(np.ascontiguousarray(images))
            return paste(tensor, torch.as_tensor(pixels).to(tensor), location, alpha).numpy()
        alpha = None if alpha is None else alpha.to(images)
        if isinstance(location, Surface):
            size = images.shape[-2], images.shape[-1]
            patches = pixels if pixels.ndim == 4 else pixels[None]
            laid = lay(images, *view(patches, alpha, location.homography((patches.shape[-2], patches.shape[-1])), size))
            return laid if images.ndim == 4 else laid[0]
    under = _under(location, images, pixels)
    pasted = images.copy() if isinstance(images, np.ndarray) else images.clone()
    pasted[under] = pixels if alpha is None else lay(images[under], pixels, alpha)
    return pasted


def _under(location: tuple[int, int] | Places, images: Images, pixels: Images) -> Any:
    """Index of the pixels of the images that lie under those of the patch."""
    height, width = pixels.shape[-2:]
    if not for_each_image(location):
        top, left = location
        return ..., slice(top, top + height), slice(left, left + width)
    corners = torch.tensor(location, device=images.device)
    number, channel, down, right = (
        torch.arange(count, device=images.device) for count in (len(images), images.shape[1], height, width)
    )
    rows, columns = corners[:, :1] + down, corners[:, 1:] + right
    return number[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]


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


def covered_by(
    patch_shape: tuple[int, int],
    location: Place,
    image_size: tuple[int, int],
    device: torch.device | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """The pixels that a patch covers in part or whole: (H, W) bool, or (N, H, W) with a place for each image."""
    if alpha is None and not isinstance(location, Surface) and not for_each_image(location):
        return rectangle(patch_shape, location, image_size, device)
    # as the paste of white on black shows it
    black = torch.zeros(len(location) if for_each_image(location) else 1, 1, *image_size, device=device)
    shown = paste(black, torch.ones(1, *patch_shape, device=device), location, alpha)[:, 0] > 0
    return shown if for_each_image(location) else shown[0]


@dataclass(frozen=True, eq=False)
class Patch:
    """Pixels and the place where they go.

    Args:
        pixels: (C, h, w), one patch for every image, or (N, C, h, w), one for each; floating point, array or tensor,
            in the range of the images. Copied.
        location: (top, left) in pixels; one such place for each image, (N, 2); an `attacks.geometry.Surface`, onto
            which the patch is mapped; or a corner's name (`resolve_location`), which is looked up on each size of image
            anew.
        alpha: (h, w) in [0, 1], how far the patch covers what is under it, for a patch of any shape; None: wholly.
            Kept as float32. Copied.

    Raises:
        ValueError: On pixels of another rank, an empty patch, a dtype that is not floating point, NaN or infinity, a
            location that is none, or as many places as are not the patches.
    """

    pixels: Tensor
    location: Location
    alpha: Tensor | None = None

    def __post_init__(self) -> None:
        pixels = torch.as_tensor(self.pixels).detach().cpu().clone()
        if pixels.ndim not in (3, 4) or 0 in pixels.shape:
            raise ValueError(f"Patch pixels are (C, h, w) or (N, C, h, w), not empty; got {tuple(pixels.shape)}.")
        if not pixels.is_floating_point():
            raise ValueError(f"Patch pixels are floating point, in the range of the images; got {pixels.dtype}.")
        if not torch.isfinite(pixels).all():
            raise ValueError("Patch pixels hold NaN or infinity.")
        object.__setattr__(self, "pixels", pixels)
        location = check_location(self.location)
        if for_each_image(location) and pixels.ndim == 4 and len(location) != len(pixels):
            raise ValueError(f"{len(pixels)} patches do not go to {len(location)} places; give one for each.")
        object.__setattr__(self, "location", location)
        if self.alpha is not None:
            alpha = check_alpha(self.alpha)
            if alpha.shape != pixels.shape[-2:]:
                raise ValueError(f"Alpha is of the patch's size, {self.shape}; got {tuple(alpha.shape)}.")
            object.__setattr__(self, "alpha", alpha)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def __len__(self) -> int:
        """Number of patches; 1 where one patch serves every image."""
        return 1 if self.pixels.ndim == 3 else len(self.pixels)

    def paste(self, images: Images) -> Images:
        """Paste the patch: its pixels exactly, where it is opaque and on no surface; what it does not cover stays
        untouched bit for bit.

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
            return paste(images, self.pixels.numpy(), location, self.alpha)
        return paste(images, self.pixels.to(images), location, self.alpha)

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """The pixels under the patch, in part or whole, on an image of (height, width): (height, width) bool, or
        (N, height, width) with a place for each image."""
        location = resolve_location(self.location, self.shape, image_size)
        return covered_by(self.shape, location, image_size, alpha=self.alpha)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        half_written = path.with_name(f"{path.name}.{os.getpid()}.part")
        tensors = {"pixels": self.pixels} | ({} if self.alpha is None else {"alpha": self.alpha})
        location = vars(self.location) if isinstance(self.location, Surface) else self.location
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            half_written,
            metadata={"location": json.dumps(location)},
        )
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
                location = Surface(**location) if isinstance(location, dict) else location
                alpha = file.get_tensor("alpha") if "alpha" in file.keys() else None  # noqa: SIM118
                return cls(file.get_tensor("pixels"), location, alpha)
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
        if for_each_image(self.location) and (images.ndim == 3 or len(images) != len(self.location)):
            raise ValueError(
                f"A patch with {len(self.location)} places, one for each image, does not go on images of shape "
                f"{tuple(images.shape)}; give as many images, or one (top, left)."
            )

    def __repr__(self) -> str:
        alpha = "" if self.alpha is None else f", alpha=<{'×'.join(map(str, self.alpha.shape))}>"
        return f"Patch(pixels=<{'×'.join(map(str, self.pixels.shape))}>, location={self.location!r}{alpha})"
