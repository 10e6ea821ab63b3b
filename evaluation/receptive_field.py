"""Effective receptive fields: which pixels one output pixel really listens to, and how far away they are.

After Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016
(arXiv 1701.04128): the gradient 1 is put on the central unit of the output, 0 on all others, and what arrives at the
input is the field. The farther a field reaches, the farther a patch may; `vulnerability_figure` lays the two side by
side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evaluation.store import NONE
from ramdefense.checks import check_images
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Fields = dict[tuple[str, str], Tensor]

#: The shares of a field whose radii are told.
SHARES = (0.5, 0.95)

#: Okabe and Ito's palette for colour-blind readers, black and yellow left out: one is text, the other faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "s^Dv<>"
_DEPTH = 1e-4  # of a map's brightest value; what is less is as dark
_AXES = {
    "radius_50": "radius that holds 50 % of the receptive field (pixels)",
    "radius_95": "radius that holds 95 % of the receptive field (pixels)",
    "relative_50": "radius that holds 50 % of the receptive field (% of the image's diagonal)",
    "relative_95": "radius that holds 95 % of the receptive field (% of the image's diagonal)",
}


def centre(shape: Sequence[int]) -> tuple[int, int]:
    """Row and column of the central pixel of (…, H, W): (H // 2, W // 2), of an even side the one after its middle."""
    return shape[-2] // 2, shape[-1] // 2


def receptive_field(
    segmenter: PyTorchSegmenter,
    images: Tensor,
    *,
    draws: int = 1,
    streams: Sequence[int] | None = None,
    batch_size: int = 8,
) -> Tensor:
    """The effective receptive field of the central output pixel.

    What is back-propagated is the sum over the classes of the logits at the central pixel (`centre`) of the map that
    `segmenter.logits` gives, at the size of the image, whatever the model's own stride. So preprocessing and resizing
    are part of the field. It is the mean over images, draws and colour channels of the absolute value of the gradient
    at the input, divided by its sum.

    The sum of the logits is Luo et al.'s choice of "all channels", and no class's own: a weight that moves two classes
    against each other by the same amount does not show in it.

    Args:
        segmenter: plain or defended; it gets no gradient at its weights.
        images: (N, C, H, W) in the clip range.
        draws: of a random defence, over which the absolute gradients are averaged; its draws 0 … `draws` − 1. A
            deterministic model is asked once.
        streams: number of the random stream of each image; None means 0..N-1.
        batch_size: images in one pass; the field does not depend on it.

    Returns:
        (H, W) float64 on the CPU, at least 0, of sum 1.

    Raises:
        ValueError: images that are none, `draws` below 1, streams that do not fit, or a central pixel that listens to
            no pixel of any image.
    """
    check_images(images, segmenter.clip_values)
    numbers = _streams(streams, len(images))
    if draws < 1:
        raise ValueError(f"draws={draws}: at least 1")
    row, column = centre(images.shape)
    field = torch.zeros(images.shape[-2:], dtype=torch.float64)
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        for draw in range(draws if segmenter.traits.random else 1):
            leaf = images[part].detach().to(segmenter.device).requires_grad_()
            with torch.enable_grad(), segmenter.conditions(images=numbers[part], draw=draw):
                # images know nothing of each other, so the gradient of the sum is that of each
                output = segmenter.logits(leaf)[..., row, column].sum()
                (slope,) = torch.autograd.grad(output, leaf, allow_unused=True)
            if slope is not None:
                field += slope.double().abs().sum((0, 1)).cpu()
    total = float(field.sum())
    if not (math.isfinite(total) and total > 0):
        raise ValueError(
            f"the gradient of the central pixel's logits at the input sums to {total:g} on these {len(images)} images, "
            "so there is no field; give images on which the model is neither constant nor infinite there"
        )
    return field / total


def radius(field: Tensor, share: float) -> float:
    """The radius in pixels of the smallest disc around the central pixel (`centre`) that holds a share of a field.

    A pixel lies in the disc if its middle is no farther from the middle of the central one; 0 is that pixel alone.

    Args:
        field: (H, W), at least 0.
        share: in (0, 1].

    Raises:
        ValueError: a share out of range, or a field of another rank, with negative values or of sum 0.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r}: in (0, 1], such as 0.95")
    if field.ndim != 2 or not bool((field >= 0).all()) or not float(field.sum()) > 0:
        raise ValueError(
            f"a field of shape {tuple(field.shape)} and sum {float(field.sum()):g}: (H, W), none below 0, not all 0"
        )
    row, column = centre(field.shape)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in field.shape)
    distances = torch.hypot(rows[:, None] - row, columns - column).flatten()
    order = distances.argsort(stable=True)
    held = field.double().cpu().flatten()[order].cumsum(0)
    enough = held >= share * held[-1] * (1 - 1e-12)  # rounding of the sum must not cost a ring
    return float(distances[order][enough][0])


# ------------------------------------------------------------------------------------- many models, many defences


def receptive_fields(
    segmenters: Mapping[str, PyTorchSegmenter],
    defences: Mapping[str, Callable[[PyTorchSegmenter], PyTorchSegmenter]],
    images: Tensor,
    *,
    draws: int = 1,
    streams: Sequence[int] | None = None,
    batch_size: int = 8,
) -> tuple[Fields, dict[tuple[str, str], str]]:
    """The field of every model under every defence, by (model, defence); and of those without one, the reason."""
    fields: Fields = {}
    without: dict[tuple[str, str], str] = {}
    for model, segmenter in segmenters.items():
        for defence, function in defences.items():
            try:
                fields[model, defence] = receptive_field(
                    function(segmenter), images, draws=draws, streams=streams, batch_size=batch_size
                )
            except NotApplicableError as error:
                without[model, defence] = str(error).partition(":")[0]
    return fields, without


def radii(fields: Fields) -> pd.DataFrame:
    """One row for each field: model, defence, radius_50 and radius_95 in pixels, relative_50 and relative_95 as shares
    of the image's diagonal."""
    import pandas as pd

    columns = ["model", "defence", *_AXES]
    rows = []
    for (model, defence), field in fields.items():
        found = [radius(field, share) for share in SHARES]
        rows.append([model, defence, *found, *(value / math.hypot(*field.shape) for value in found)])
    return pd.DataFrame(rows, columns=columns)


# ---------------------------------------------------------------------------------------------------------- figures


def field_figure(fields: Mapping[str, Tensor], *, title: str) -> Figure:
    """Maps of one model's fields, side by side on one logarithmic scale, with the discs that hold 50 % and 95 %.

    Args:
        fields: (H, W) of sum 1, by the title of its map.
        title: over them all.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    height, width = next(iter(fields.values())).shape
    wide = 4.2
    figure = Figure(figsize=(len(fields) * wide + 1.2, wide * height / width + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    times = {name: field.numpy() * field.numel() for name, field in fields.items()}
    top = max(float(values.max()) for values in times.values())
    scale = LogNorm(vmin=top * _DEPTH, vmax=top)
    for axis, (name, field) in zip(axes, fields.items(), strict=True):
        drawn = axis.imshow(np.clip(times[name], top * _DEPTH, None), norm=scale, cmap="cividis")
        row, column = centre(field.shape)
        found = [radius(field, share) for share in SHARES]
        for size, style in zip(found, ("-", "--"), strict=True):
            axis.add_patch(Circle((column, row), size, fill=False, color="white", linewidth=1.4, linestyle=style))
        axis.set_title(f"{name}\n50 % in {found[0]:.0f} pixels (line), 95 % in {found[1]:.0f} (dashes)", fontsize=9)
        _bare(axis)
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.85)
    bar.set_label("gradient, × that of an even field", fontsize=9)
    return figure


def vulnerability_figure(table: pd.DataFrame, *, radius: str = "relative_95", success: str = "success") -> Figure:
    """How far models look against how far they are fooled, and where a defence moves them.

    Each model is a filled point, and each defence of it a hollow one at the end of an arrow. One panel for each attack.

    Args:
        table: model, defence ("none" among them), the two columns below, and attack where there are several; such as
            ``radii(fields).merge(results.summary(), on=["model", "defence"])``. Rows with a missing figure are left
            out.
        radius: column of the radius, one of those of `radii`.
        success: column of the attack success rate, a share from 0 to 1.

    Raises:
        ValueError: a column is missing, or nothing is left to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    needed = ("model", "defence", radius, success)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; it needs {', '.join(needed)}")
    table = table.dropna(subset=[radius, success])
    if table.empty:
        raise ValueError("the table has no row with both a radius and a success rate; are the models' names the same?")
    names: dict[str, list[str]] = {
        axis: list(dict.fromkeys(map(str, table[axis]))) if axis in table.columns else [""]
        for axis in ("model", "defence", "attack")
    }
    colours = {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(names["model"])}
    defences = [name for name in names["defence"] if name != NONE]
    markers = {NONE: "o", **{name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(defences)}}
    figure = Figure(figsize=(0.8 + 5.2 * len(names["attack"]), 4.9), layout="constrained")
    panels = figure.subplots(1, len(names["attack"]), squeeze=False, sharex=True, sharey=True)[0]
    percent = 100 if radius.startswith("relative") else 1
    for axis, attack in zip(panels, names["attack"], strict=True):
        of_attack = table[table["attack"] == attack] if attack else table
        points = {
            (str(row["model"]), str(row["defence"])): (percent * float(row[radius]), 100 * float(row[success]))
            for row in of_attack.to_dict("records")
        }
        _points(axis, points, colours, markers)
        axis.set_title(attack, fontsize=10)
        axis.grid(alpha=0.25)
        axis.margins(x=0.2, y=0.12)
    panels[0].set_ylabel("attack success rate (%)")
    figure.supxlabel(_AXES.get(radius, radius), fontsize=10)
    keys = [
        Line2D([], [], color="0.3", marker=marker, linestyle="", label="no defence" if name == NONE else name,
               markerfacecolor="0.3" if name == NONE else "white")
        for name, marker in markers.items()
    ]  # fmt: skip
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=9, frameon=False)
    return figure


def _points(
    axis: Axes,
    points: Mapping[tuple[str, str], tuple[float, float]],
    colours: Mapping[str, str],
    markers: Mapping[str, str],
) -> None:
    for (model, defence), place in points.items():
        colour, start = colours[model], points.get((model, NONE))
        face = colour if defence == NONE else "white"
        axis.plot(*place, marker=markers[defence], color=colour, markerfacecolor=face, markersize=8, linestyle="")
        if defence != NONE and start is not None:
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", place, start, arrowprops=arrow)
    named = {model: points.get((model, NONE), place) for (model, _), place in points.items()}
    wide, high = (max(np.ptp([place[i] for place in points.values()]), 1e-9) for i in (0, 1))
    above: list[tuple[float, float]] = []
    for model, place in sorted(named.items(), key=lambda item: item[1][1]):
        # names of points that nearly coincide go one over the other
        near = sum(abs(place[0] - x) < 0.2 * wide and abs(place[1] - y) < 0.06 * high for x, y in above)
        above.append(place)
        text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": colours[model]}
        axis.annotate(model.removeprefix("zoo:"), place, (0, 8 + 11 * near), **text)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _streams(streams: Sequence[int] | None, images: int) -> list[int]:
    numbers = list(range(images)) if streams is None else [int(number) for number in streams]
    if len(numbers) != images:
        raise ValueError(f"{len(numbers)} streams for {images} images: one for each")
    return numbers
