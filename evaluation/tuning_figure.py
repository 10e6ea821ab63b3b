"""The figure of a sweep: what each setting of a defence costs without an attack, and what it gains under one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evaluation.receptive_field import PALETTE
from evaluation.store import NONE
from evaluation.variations import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_MARKERS = "os^Dv<>"


def tuning_figure(table: pd.DataFrame, budget: float, *, title: str = "") -> Figure:
    """Clean mIoU against mIoU under attack, the Pareto front, and the clean mIoU that the budget allows.

    A shape for each variant, a colour for each p, T beside the point, once where several nearly coincide. The front is
    a staircase: what lies between two of its points is not to be had. Settings that were not attacked are ticks along
    the lower edge.

    Args:
        table: as ``Tuned.table``.
        budget: points of clean mIoU.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch as Swatch

    figure = Figure(figsize=(6.6, 4.9), layout="constrained")
    axis = figure.subplots()
    none, swept = table[table["variant"] == NONE], table[table["variant"] != NONE]
    variants, dropouts = list(dict.fromkeys(swept["variant"])), list(dict.fromkeys(swept["drop_probability"]))
    markers = {variant: _MARKERS[i % len(_MARKERS)] for i, variant in enumerate(variants)}
    colours = {p: PALETTE[i % len(PALETTE)] for i, p in enumerate(dropouts)}
    named: list[tuple[str, float, float]] = []
    wide, high = (max(100 * float(np.ptp(table[name].dropna())), 1e-9) for name in ("clean_miou", "robust_miou"))
    for row in swept.to_dict("records"):
        clean, robust, colour = 100 * row["clean_miou"], 100 * row["robust_miou"], colours[row["drop_probability"]]
        if row["images"] == 0:
            axis.plot(clean, 0.015, marker="|", markersize=9, color=colour, transform=axis.get_xaxis_transform(),
                      linestyle="", clip_on=False)  # fmt: skip
            continue
        axis.plot(clean, robust, marker=markers[row["variant"]], color=colour, markersize=6, linestyle="")
        bound = row["max_attention"]
        if not any(bound == t and abs(clean - c) < 0.05 * wide and abs(robust - r) < 0.05 * high for t, c, r in named):
            named.append((bound, clean, robust))  # a name for points that nearly coincide
            axis.annotate(bound, (clean, robust), (9, 4), textcoords="offset points", fontsize=8, color="0.2")
    axis.plot(100 * none["clean_miou"], 100 * none["robust_miou"], marker="*", markersize=13, color="0.25",
              linestyle="")  # fmt: skip
    front = table[table["pareto"]].sort_values(["clean_miou", "robust_miou"])
    axis.plot(100 * front["clean_miou"], 100 * front["robust_miou"], color="0.55", linewidth=1, zorder=0,
              drawstyle="steps-pre")  # fmt: skip
    chosen = table[table["chosen"]]
    axis.plot(100 * chosen["clean_miou"], 100 * chosen["robust_miou"], marker="o", markersize=15, linestyle="",
              markerfacecolor="none", markeredgecolor="0.1", markeredgewidth=1.4)  # fmt: skip
    allowed = 100 * float(none["clean_miou"].iloc[0]) - budget
    axis.axvline(allowed, color="0.3", linestyle=":", linewidth=1.3)
    axis.margins(0.08)
    axis.grid(alpha=0.25)
    axis.set_xlabel("clean mIoU (%)")
    axis.set_ylabel("mIoU under attack (%)")
    axis.set_title(title, fontsize=10)

    def key(text: str, marker: str, colour: str = "0.3", face: str | None = None) -> Line2D:
        return Line2D([], [], marker=marker, color=colour, linestyle="", label=text,
                      markerfacecolor=colour if face is None else face)  # fmt: skip

    keys: list[Line2D | Swatch] = [
        key("no defence", "*", "0.25"),
        key("chosen", "o", "0.1", face="none"),
        Line2D([], [], color="0.55", linewidth=1, label="Pareto front"),
        Line2D([], [], color="0.3", linestyle=":", label=f"budget, {budget:g} point{'s' if budget != 1 else ''}"),
    ]
    keys += [key(variant, marker) for variant, marker in markers.items()]
    keys += [Swatch(facecolor=colour, label=f"p = {number(p)}") for p, colour in colours.items()]
    if (swept["images"] == 0).any():
        keys.append(key("not attacked", "|"))
    figure.legend(handles=keys, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure
