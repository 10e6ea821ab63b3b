"""Figures: what a patch does to one image, under each defence.

Drawn with matplotlib's objects and its Agg canvas, never with pyplot: nothing global changes for the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.files import write_figure
from evaluation.frames import IGNORE_INDEX
from evaluation.palette import VOID, hexadecimal, paint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_OUTLINE = "#ff2fd6"  # magenta: rare on photographs, and none of the default class colours


@dataclass(frozen=True, eq=False)
class Panel:
    """One row of a figure: a defence, and what the model sees and says under it.

    Shape:
        image, patched: ``(H, W, 3)`` uint8; clean, attacked: predicted classes ``(H, W)``.
    """

    title: str
    subtitle: str
    image: Array
    patched: Array
    clean: Array
    attacked: Array


def save_figure(
    path: str | Path,
    panels: Sequence[Panel],
    *,
    label: Array,
    target: Array | None,
    mask: Array | None,
    classes: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    title: str,
) -> None:
    """One image under every defence, as PNG.

    Rows are defences; columns are the clean image, the patched one, the prediction on each, and the target map. The
    patch is outlined, and a legend names the classes that occur.

    Args:
        path: the file; its folder is made.
        panels: the rows.
        label: ground truth ``(H, W)``, shown where there is no target.
        target: target map ``(H, W)``, or ``None`` for an attack without one.
        mask: pixels under the patch ``(H, W)``, or ``None``.
        classes, colors: names and RGB (0–255) of the classes.
        title: a line over the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch as Swatch

    height, width = label.shape
    # every length is known, in inches, so no layout engine has to draw the figure to find it
    wide, gap, left, top, bottom = 2.6, 0.06, 0.75, 0.65, 0.45
    high = wide * height / width
    size = left + 5 * (wide + gap), top + len(panels) * (high + gap) + bottom
    figure = Figure(figsize=size)
    figure.text(0.5, 1 - 0.12 / size[1], title, ha="center", va="top", fontsize=11)
    axes = figure.subplots(
        len(panels),
        5,
        squeeze=False,
        gridspec_kw={
            "left": left / size[0],
            "right": 1 - gap / size[0],
            "top": 1 - top / size[1],
            "bottom": (bottom + gap) / size[1],
            "wspace": gap / wide,
            "hspace": gap / high,
        },
    )
    last = ("ground truth", label) if target is None else ("target of the attack", target)
    headings = ("clean image", "patched image", "prediction, clean", "prediction, attacked", last[0])
    shown: set[int] = set()
    for place, (row, panel) in enumerate(zip(axes, panels, strict=True)):
        maps = (panel.clean, panel.attacked, last[1])
        shown.update(*(np.unique(m).tolist() for m in maps))
        pictures = [panel.image, panel.patched, *(paint(m, colors) for m in maps)]
        for column, (axis, picture) in enumerate(zip(row, pictures, strict=True)):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if place == 0:
                axis.set_title(headings[column], fontsize=10)
            if mask is not None and mask.any() and column in (1, 3, 4):
                _outline(axis, mask)
        row[0].set_ylabel(f"{panel.title}\n{panel.subtitle}", fontsize=9)
    swatches = [
        Swatch(facecolor=hexadecimal(colors[i]), edgecolor="0.4", linewidth=0.5, label=classes[i])
        for i in sorted(shown)
        if i < len(classes)
    ]
    if IGNORE_INDEX in shown:
        swatches.append(Swatch(facecolor=hexadecimal(VOID), edgecolor="0.4", linewidth=0.5, label="void"))
    if mask is not None:
        swatches.append(Swatch(facecolor="none", edgecolor=_OUTLINE, label="patch"))
    figure.legend(handles=swatches, loc="lower center", ncols=min(len(swatches), 14), fontsize=8, frameon=False)
    write_figure(Path(path), figure)


def _outline(axis: Any, mask: Array) -> None:
    """The border of the mask, along the edges of its pixels, that at the image's border too."""
    padded = np.pad(mask, 1)
    edges = []
    for row, column in np.argwhere(padded[1:, :] != padded[:-1, :]):
        edges.append(((column - 1.5, row - 0.5), (column - 0.5, row - 0.5)))
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        edges.append(((column - 0.5, row - 1.5), (column - 0.5, row - 0.5)))
    from matplotlib.collections import LineCollection

    axis.add_collection(LineCollection(edges, colors=_OUTLINE, linewidths=1.6, clip_on=False), autolim=False)
