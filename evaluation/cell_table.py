"""The cells of a run's table with all that is known of their numbers: intervals, p-values, failed checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evaluation import statistics
from evaluation.results import Results
from evaluation.verdicts import Verdict, failed

_KEY = ("model", "attack", "defence")


@dataclass(frozen=True)
class Figure:
    """A number of the summary: its column, what stands over it, what it is, and how it is written."""

    column: str
    heading: str
    meaning: str
    kind: str = "share"

    def text(self, value: Any) -> str:
        """The value as a reader sees it: shares in percent with one decimal; a dash where there is none."""
        if value is None or math.isnan(value):
            return "—"
        if self.kind == "share":
            return f"{round(100 * value, 1) + 0.0:.1f}".replace("-", "−")  # + 0: no −0.0
        if self.kind == "p":
            return f"{value:.3f}" if value >= 0.001 else "< 0.001"
        return f"{value:.1f}" if self.kind == "seconds" and value < 100 else f"{value:.0f}"


_COUNTED = "counted pixels"
#: Every figure of the summary, with its numerator and denominator.
FIGURES = (
    Figure("success", "fooled", f"Attack success rate: {_COUNTED} predicted as the attacker's target / {_COUNTED} that "
           f"have a target. For an attack without a target: {_COUNTED} predicted wrong / {_COUNTED}. For each image "
           "and seed the variant of the attack counts that fools most. Low is robust."),
    Figure("success_drop", "gain", "Fooled without defence − fooled with it, in points; positive speaks for the "
           "defence."),
    Figure("clean_success", "fooled, no attack", "The same as “fooled” for the clean image: what the model's own "
           "mistakes already give the attacker."),
    Figure("target_miou", "target mIoU", f"mIoU of the prediction under attack against the target map, {_COUNTED}. "
           "Low is robust."),
    Figure("clean_miou", "clean mIoU", "mIoU against the ground truth without attack, the defence in place, whole "
           "image. High is good."),
    Figure("adversarial_miou", "attacked mIoU", f"mIoU against the ground truth under attack, {_COUNTED}. High is "
           "robust."),
    Figure("iou_ratio", "IoU ratio", "Attacked mIoU / clean mIoU of the same pixels, in percent."),
    Figure("pixel_accuracy", "attacked accuracy", f"{_COUNTED.capitalize()} predicted right under attack / "
           f"{_COUNTED}."),
    Figure("changed", "changed", f"{_COUNTED.capitalize()} whose prediction under attack differs from the clean one / "
           f"{_COUNTED}."),
    Figure("clean_region_miou", "clean mIoU, counted", f"Clean mIoU on the {_COUNTED} alone."),
    Figure("clean_pixel_accuracy", "clean accuracy", f"{_COUNTED.capitalize()} predicted right without attack / "
           f"{_COUNTED}."),
    *(
        Figure(f"{variant}_{name}", f"{heading}, {variant}", f"“{heading}” of the {variant} variant alone: {told}.")
        for variant, told in (
            ("plain", "the attack does not know the defence"),
            ("adaptive", "it knows the defence, averages over its randomness and passes through what has no gradient"),
            ("transfer", "the patch was made on the undefended model"),
        )
        for name, heading in (
            ("success", "fooled"), ("target_miou", "target mIoU"), ("adversarial_miou", "attacked mIoU"),
        )
    ),
    Figure("success_seed_std", "fooled, std over seeds", "Sample standard deviation of “fooled” over the attack's "
           "seeds, in points."),
    Figure("images", "images", "How many images the figures of the cell rest on.", "count"),
    Figure("seeds", "seeds", "How many seeds of the attack; their counts are summed.", "count"),
    Figure("steps", "steps", "Steps of the attack for each image, over all its variants.", "count"),
    Figure("forwards", "forward passes", "Forward passes for each image, over all variants.", "count"),
    Figure("backwards", "backward passes", "Backward passes for each image, over all variants.", "count"),
    Figure("seconds", "seconds", "Wall-clock time for each image, over all variants; no two runs share it.", "seconds"),
)  # fmt: skip
P_VALUE = Figure(
    "p_holm",
    "p",
    "Of a two-sided paired permutation test on the same images: how often a defence that makes no difference would "
    "seem to make as much. Corrected for the number of comparisons (Holm).",
    "p",
)
#: What the sortable table has, in this order; all the others are shown with their cell.
COLUMNS = (
    "success", "success_drop", "p_holm", "target_miou", "clean_miou", "adversarial_miou", "images", "seeds", "steps",
    "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A figure of one cell.

    Args:
        figure: Which.
        number: Its value; NaN where there is none.
        low, high: Its interval; NaN where there is none.
    """

    figure: Figure
    number: float
    low: float = math.nan
    high: float = math.nan

    @property
    def text(self) -> str:
        """As a reader sees it."""
        return self.figure.text(self.number)

    @property
    def interval(self) -> str:
        """``[low, high]``, or nothing."""
        if math.isnan(self.low) or math.isnan(self.high) or math.isnan(self.number):
            return ""
        return f"[{self.figure.text(self.low)}, {self.figure.text(self.high)}]"

    @property
    def sort_key(self) -> str:
        """What a table is sorted by; empty where there is no number."""
        return "" if math.isnan(self.number) else repr(float(self.number))


@dataclass(frozen=True)
class CellRow:
    """One model under one attack and one defence.

    Args:
        number: From 0, its place in the table.
        model, attack, defence: The cell.
        values: Its figures by column, those of ``FIGURES`` and ``p_holm``.
        failed: Its failed checks; one is enough to call its numbers unreliable.
        note: Why the defence or the attack does not apply; empty otherwise.
    """

    number: int
    model: str
    attack: str
    defence: str
    values: Mapping[str, Value]
    failed: tuple[Verdict, ...]
    note: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Model, attack and defence."""
        return self.model, self.attack, self.defence

    @property
    def name(self) -> str:
        """For a heading."""
        return f"{self.model} · {self.attack} · {self.defence}"


def cell_rows(results: Results, *, level: float = 0.95, resamples: int = 2000) -> list[CellRow]:
    """The cells of the summary, in its order.

    Args:
        results: Of a run.
        level, resamples: Of the intervals (``statistics.intervals``).
    """
    ends = _by_cell(statistics.intervals(results, level=level, resamples=resamples))
    p_values = _p_values(results, level, resamples)
    rows = []
    for number, (key, row) in enumerate(_by_cell(results.summary()).items()):
        model, attack, defence = key
        measured = not row["note"]
        held = {**row, **p_values.get(key, {})}
        of_cell = ends.get(key, {})
        values = {
            figure.column: Value(
                figure,
                float(held.get(figure.column, math.nan)) if measured else math.nan,
                float(of_cell.get(f"{figure.column}_low", math.nan)),
                float(of_cell.get(f"{figure.column}_high", math.nan)),
            )
            for figure in (*FIGURES, P_VALUE)
        }
        if defence == "none":
            values["success_drop"] = Value(values["success_drop"].figure, math.nan)  # no defence takes nothing off
        rows.append(
            CellRow(
                number, model, attack, defence, values, tuple(failed(results.verdicts, *key)), str(row["note"] or "")
            )
        )
    return rows


def _by_cell(frame: pd.DataFrame) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
    return {(row["model"], row["attack"], row["defence"]): row for row in rows}


def _p_values(results: Results, level: float, resamples: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    if not any(record.defence == "none" for record in results.records):
        return {}
    # the figures that `ramdefense intervals` compares, so that it corrects for as many
    found = statistics.paired_differences(results, level=level, resamples=resamples)
    return _by_cell(found[found["figure"] == "success"][[*_KEY, "p_holm"]])
