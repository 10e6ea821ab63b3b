"""Terms for patches that are to be printed: smoothness, and colours that a printer has (Sharif et al., "Accessorize to
a Crime: Real and Stealthy Attacks on State-of-the-Art Face Recognition", CCS 2016, section 5.2).

Both look at the whole patch, (h, w), also where an alpha cuts it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attacks.interfaces import Victim
from attacks.terms import Forward


def printable_colours() -> tuple[tuple[float, float, float], ...]:
    """30 colours that a printer with four inks has in clip range [0, 1]: (red, green, blue) each.

    Paper is 0.9 and full ink 0.1. Where an ink, or two over each other, leave the channels v (1: red, say, is left),
    coverage s prints 0.9 - 0.8 s (1 - v): the six inks and pairs, red, green, blue, cyan, magenta and yellow, at s = ¼,
    ½, ¾, 1, and black at 0, ⅕, …, 1. A model of a printer, not a measured one: print a chart for that.
    """
    hues = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    inks = [(hue, coverage / 4) for hue in hues for coverage in range(1, 5)]
    inks += [((0, 0, 0), coverage / 5) for coverage in range(6)]
    return tuple(
        (0.9 - 0.8 * s * (1 - red), 0.9 - 0.8 * s * (1 - green), 0.9 - 0.8 * s * (1 - blue))
        for (red, green, blue), s in inks
    )


@dataclass(frozen=True)
class TotalVariation:
    """How rough a patch is: weight · Σ |p[i+1, j] - p[i, j]| + |p[i, j+1] - p[i, j]| over its pixels and channels.

    That is the anisotropic total variation (Rudin et al. 1992 for the idea). The paper's, equation 3, takes the root of
    the two squares, which has no gradient on a flat patch, as every one is at its start.

    Args:
        weight: Factor.

    Raises:
        ValueError: If it is no finite number.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def observe(self, victim: Victim) -> AbstractContextManager[Any]:
        return nullcontext()

    def __call__(self, forward: Forward) -> Tensor:
        down, right = (forward.pixels.diff(dim=side).abs().flatten(1).sum(1) for side in (-2, -1))
        return self.weight * (down + right)


@dataclass(frozen=True)
class NonPrintability:
    """How far a patch is from what can be printed: weight · Σ over its pixels of Π over the colours of the Euclidean
    distance from the pixel to the colour (the paper's NPS). It is 0 where each pixel has one of the colours.

    Args:
        weight: Factor. Among the 30 colours a pixel's product is tiny (3·10⁻⁶ in the median over the cube), beside them
            it is not (0.75 at pure red), so it is the colours outside the inks' range that the term drives away.
        colours: (K, C) printable colours in the units of the pixels; None: `printable_colours`, for [0, 1] and RGB.
            Kept as nested tuples.

    Raises:
        ValueError: If the weight is no finite number, or the colours are no table of finite numbers; when called, if
            the patch has another number of channels.
    """

    weight: float = 1.0
    colours: Sequence[Sequence[float]] | Tensor | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if self.colours is None:
            return
        try:
            colours = torch.as_tensor(self.colours, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`colours` is {self.colours!r}; it must be numbers, (K, channels).") from error
        if colours.ndim != 2 or 0 in colours.shape or not torch.isfinite(colours).all():
            raise ValueError(f"`colours` is {self.colours!r}; it must be finite numbers, (K, channels).")
        object.__setattr__(self, "colours", tuple(map(tuple, colours.tolist())))

    def observe(self, victim: Victim) -> AbstractContextManager[Any]:
        return nullcontext()

    def __call__(self, forward: Forward) -> Tensor:
        pixels = forward.pixels
        colours = torch.tensor(printable_colours() if self.colours is None else self.colours).to(pixels)
        if colours.shape[1] != pixels.shape[1]:
            raise ValueError(f"The colours have {colours.shape[1]} channels and the patch {pixels.shape[1]}.")
        # the norm's gradient at 0, on a colour, is 0
        distances = torch.linalg.vector_norm(pixels[:, None] - colours[:, :, None, None], dim=2)
        return self.weight * distances.prod(1).flatten(1).sum(1)


def _check_weight(weight: object) -> None:
    if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
        raise ValueError(f"`weight` is {weight!r}; it must be a finite number.")
