"""Where a patch goes when it is no plain rectangle: surfaces in perspective, and shapes cut out by alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

_FAINT = 1e-3  # opacity that is taken for none: a quarter of an 8-bit step, far above what sampling rounds


@dataclass(frozen=True)
class Surface:
    """A flat rectangle as it is seen in perspective, such as a sign or a billboard, marked by its corners.

    Args:
        corners: Four (row, column) on the image, clockwise from the surface's upper left corner, in pixels from the
            upper left corner of the image: the whole image is (0, 0), (0, W), (H, W), (H, 0), and the centre of its
            first pixel is (0.5, 0.5). Numbers, an array or a tensor, (4, 2).

    Raises:
        ValueError: If these are not four finite points, or do not go clockwise round a convex quadrilateral.
    """

    corners: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        try:
            corners = torch.as_tensor(self.corners, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            corners = torch.full((1,), math.nan)
        if corners.shape != (4, 2) or not torch.isfinite(corners).all():
            raise ValueError(f"`corners` is {self.corners!r}; it must be four (row, column), finite numbers.")
        object.__setattr__(self, "corners", tuple((row, column) for row, column in corners.tolist()))
        (down, right), (on_down, on_right) = self._sides().T, self._sides().roll(-1, 0).T
        turns = right * on_down - down * on_right  # above 0: clockwise, since rows count downwards
        if not (turns > 0).all():
            remedy = "they go counter-clockwise" if (turns < 0).all() else "they make no convex quadrilateral"
            raise ValueError(
                f"`corners` is {self.corners!r}; {remedy}: give the upper left, upper right, lower right and lower "
                "left corner of the surface."
            )

    def _sides(self) -> Tensor:
        """From each corner to the next: (4, 2) float64."""
        corners = torch.tensor(self.corners, dtype=torch.float64)
        return corners.roll(-1, 0) - corners

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels of a patch about as fine as the image: the mean lengths of opposite sides."""
        upper, right, lower, left = self._sides().norm(dim=1).tolist()
        return max(1, round((left + right) / 2)), max(1, round((upper + lower) / 2))

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise a ValueError if a corner lies outside an image of (height, width)."""
        for corner in self.corners:
            if not all(0 <= place <= size for place, size in zip(corner, image_size, strict=True)):
                raise ValueError(
                    f"The corner {corner} of the surface lies outside an image of {image_size[0]}×{image_size[1]}; "
                    "corners are (row, column) in pixels."
                )

    def homography(self, patch_shape: tuple[int, int]) -> Tensor:
        """Where a patch of (height, width) goes: (3, 3) float64, from (column, row) on the patch to (column, row) on
        the image, both from the centre of the first pixel."""
        from kornia.geometry.transform import get_perspective_transform

        height, width = patch_shape
        edges = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
        corners = torch.tensor(self.corners, dtype=torch.float64).flip(-1)
        return get_perspective_transform(edges[None] - 0.5, corners[None] - 0.5)[0]


def view(
    pixels: Tensor, alpha: Tensor | None, homography: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Patches as they are seen through homographies: sampled bilinearly, with a sharp edge.

    A pixel of the image shows the patch where its centre falls on it, and on no other pixel. Colours are weighted with
    their alpha, so what is cut out does not shine through at the border of what is not.

    Args:
        pixels: (N, C, h, w) floating point; the colours are differentiable in them.
        alpha: (h, w) in [0, 1], or None: 1.
        homography: (3, 3) or (N, 3, 3) float64, from (column, row) on the patch to (column, row) on the image, both
            from the centre of the first pixel; of a sign that gives what is before its horizon a depth above 0.
        image_size: (height, width).

    Returns:
        Colours, (N, C, H, W), in the range of each patch's pixels, and opacities in [0, 1], (N, 1, H, W): under 0.001
        they are 0, above 0.999 they are 1.
    """
    (height, width), device = pixels.shape[-2:], pixels.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device, dtype=exact) for n in image_size), indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)], -1).flatten(0, 1)
    back = points @ torch.linalg.inv(homography).mT.to(device, exact).expand(len(pixels), 3, 3)
    depth = back[..., 2:]
    place = back[..., :2] / depth + 0.5  # (column, row) from the patch's upper left corner
    size = torch.tensor([width, height], device=device, dtype=exact)
    # beyond the horizon of a homography points come back mirrored, with a depth under 0
    on_patch = ((place >= 0) & (place < size) & (depth > 0)).all(-1, keepdim=True)
    grid = torch.where(on_patch, 2 * place / size - 1, 0).view(len(pixels), *image_size, 2)

    layers = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    opaque = torch.ones_like(layers[:, :1]) if alpha is None else alpha.to(layers).expand(len(layers), 1, -1, -1)
    layers = torch.cat([layers * opaque, opaque], 1)
    sampled = F.grid_sample(layers, grid.to(layers), padding_mode="border", align_corners=False)
    opacity = sampled[:, -1:] * on_patch.view(-1, 1, *image_size)
    opacity = torch.where(opacity < _FAINT, 0.0, torch.where(opacity > 1 - _FAINT, 1.0, opacity))
    colour = sampled[:, :-1] / torch.where(opacity > 0, sampled[:, -1:], 1.0)
    # rounding must not lead out of the patch's range, nor may its removal stop a gradient
    low, high = (bound(pixels, (-3, -2, -1), keepdim=True) for bound in (torch.amin, torch.amax))
    colour = colour + (colour.clamp(low, high) - colour).detach()
    return colour.to(pixels.dtype), opacity.to(pixels.dtype)


def lay(under: Tensor, over: Tensor, alpha: Tensor) -> Tensor:
    """`over` on `under`: (1 - α) under + α over, exactly the one where α is 0 and the other where it is 1.

    Shape: any that broadcast; the same dtype. No value leaves the range between the two.
    """
    return torch.where(alpha == 0, under, torch.where(alpha == 1, over, torch.lerp(under, over, alpha)))


def disc(side: int) -> Tensor:
    """Alpha of a disc as wide as its square: (side, side), 1 where the pixel's centre is in the disc, 0 elsewhere.

    Raises:
        ValueError: If `side` is no whole number, at least 1.
    """
    if not isinstance(side, Integral) or isinstance(side, bool) or side < 1:
        raise ValueError(f"`side` is {side!r}; it must be a whole number, at least 1.")
    square = (torch.arange(int(side)) - (side - 1) / 2).square()
    return (square[:, None] + square <= (side / 2) ** 2).float()


def several(rectangles: Sequence[tuple[int, int, int, int]]) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """Several patches at once: one patch on the smallest rectangle around them, cut out by its alpha.

    Args:
        rectangles: (top, left, height, width) of each on the image, in pixels.

    Returns:
        Location (top, left), shape (height, width) and alpha, (height, width), 1 on the rectangles and 0 between.

    Raises:
        ValueError: If there is none, or a number is not whole or too small.

    Example:
        >>> location, shape, alpha = several([(2, 3, 4, 4), (10, 3, 4, 6)])
        >>> location, shape, int(alpha.sum())
        ((2, 3), (12, 6), 40)
    """
    if not rectangles:
        raise ValueError("`rectangles` is empty; give at least one (top, left, height, width).")
    for each in rectangles:
        whole = len(each) == 4 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in each)
        if not whole or min(each[:2]) < 0 or min(each[2:]) < 1:
            raise ValueError(f"{each!r} is no rectangle; it must be (top, left, height, width), whole numbers.")
    given = torch.tensor(rectangles)
    top, left = given[:, :2].amin(0).tolist()
    height, width = ((given[:, :2] + given[:, 2:]).amax(0) - given[:, :2].amin(0)).tolist()
    alpha = torch.zeros(height, width)
    for row, column, rows, columns in rectangles:
        alpha[row - top : row - top + rows, column - left : column - left + columns] = 1
    return (top, left), (height, width), alpha
