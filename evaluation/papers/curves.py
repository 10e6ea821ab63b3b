"""The trial of fusion as curves: accuracy over how much the context says, one panel for each attack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.files import write_figure
from evaluation.papers.fusion_claims import BACKGROUND, BLUR, CLEAN, FGSM, FOREGROUND, TRANSFERRED


def save_curves(table: pd.DataFrame, path: str | Path) -> None:
    """Draw a table of `evaluation.papers.fusion.run`; each attack averaged over its strengths, and over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for axes, attack in zip(panels, (CLEAN, FGSM, TRANSFERRED, BLUR), strict=True):
        part = table[table["attack"] == attack]
        for (model, alpha), rows in part.groupby(["model", "penalty"], sort=False):
            line = rows.groupby("informativeness")["accuracy"].mean()
            name = f"{model}, α = {alpha:g}" if model not in (FOREGROUND, BACKGROUND) else model
            style = {FOREGROUND: "--", BACKGROUND: ":"}.get(str(model), "-")
            axes.plot(np.asarray(line.index), 100 * line.to_numpy(), style, marker=".", label=name)
        axes.set_title(attack, fontsize=10)
        axes.set_xlabel("informativeness κ")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right, % of the images")
    panels[0].set_ylim(-2, 102)
    panels[0].legend(fontsize=7)
    write_figure(Path(path), figure)
