"""Colours of classes: label maps as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.frames import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

VOID = (190, 190, 190)


def palette(colors: Sequence[tuple[int, int, int]]) -> Array:
    """RGB of every label, ``(256 or more, 3)`` uint8; the last one, and whatever is no class, is void's light grey."""
    table = np.full((256 if len(colors) < 256 else len(colors) + 1, 3), VOID, dtype=np.uint8)
    table[: len(colors)] = np.asarray(colors, dtype=np.uint8).reshape(-1, 3)
    return table


def paint(labels: Array, colors: Sequence[tuple[int, int, int]]) -> Array:
    """Label map ``(H, W)`` → RGB picture ``(H, W, 3)`` uint8; void is light grey."""
    table = palette(colors)
    return table[np.where(labels == IGNORE_INDEX, len(table) - 1, labels)]


def hexadecimal(color: Sequence[int]) -> str:
    """``(0, 158, 115)`` → ``"#009e73"``."""
    red, green, blue = color
    return f"#{int(red):02x}{int(green):02x}{int(blue):02x}"
