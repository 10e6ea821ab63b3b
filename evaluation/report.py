"""The page of a run, and its tables: functions of what is in its folder alone; no model is needed.

The page is one file that asks nothing of the network (``page/``: Jinja2 templates, a style sheet and a small script).
Everything that comes from a run is escaped where it is written, and there is no other way for it to get there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from evaluation import lead, statistics
from evaluation.cell_pictures import CellPicture, Sprites, cell_picture
from evaluation.cell_table import COLUMNS, FIGURES, P_VALUE, CellRow, cell_rows
from evaluation.charts import DASHES, MARKERS, RING, Chart, Datum, Look, line_chart, scatter
from evaluation.files import write_whole
from evaluation.heat_map import heat_map
from evaluation.pictures import WHICH, Picture
from evaluation.results import Results, read_configuration
from evaluation.verdicts import Verdict, failed

if TYPE_CHECKING:
    import jinja2

#: Of the images, for every interval on a page.
RESAMPLES = 2000
#: What ``curves.csv`` varies, as it stands under a chart.
AXES = {
    "patch_size": "side of the patch, pixels",
    "max_iter": "steps of the attack",
    "max_attention": "RAM's bound: k of k/N",
    "drop_probability": "RAM's drop probability p",
}


def write_report(
    folder: Path, results: Results | None = None, out: Path | None = None, *, with_page: bool = True
) -> Path:
    """Write a run's ``rows.csv``, ``summary.csv``, ``summary.json`` and its page.

    Args:
        folder: Of the run.
        results: What it holds, if that is known already.
        out: Where the page goes; ``report.html`` in the folder, if not given.
        with_page: Without, only the tables are written.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError: No run in the folder.
        ValueError: A damaged file, or no row yet; the message says so.
        OSError: A file could not be written; the message says what to do.
    """
    results = Results.load(folder) if results is None else results
    _check_rows(results, folder)
    # what the folder says of itself: the page is the same, whoever asks for it
    results = replace(results, configuration=read_configuration(folder)).ordered()
    results.to_csv(folder / "summary.csv")
    results.to_json(folder / "summary.json")
    write_whole(folder / "rows.csv", results.rows.to_csv(index=False))
    out = folder / "report.html" if out is None else out
    if with_page:
        write_whole(out, page(results, [folder], resamples=RESAMPLES))
    return out


def write_joined_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one page about runs that differ in their models, attacks or defences alone.

    Raises:
        ValueError, FileNotFoundError, OSError: As ``write_report`` and ``Results.joined``.
    """
    runs = [Results.load(folder) for folder in folders]
    for run, folder in zip(runs, folders, strict=True):
        _check_rows(run, folder)
    lacking = [name for run in runs for name in lead.unfinished(run)]
    write_whole(out, page(Results.joined(runs).ordered(), folders, lacking=lacking, resamples=RESAMPLES))
    return out


def page(
    results: Results,
    folders: Sequence[Path] = (),
    *,
    lacking: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> str:
    """The page of a run as HTML; the same text for the same run.

    Args:
        results: Of the run, with at least one row.
        folders: Of the run, or of the runs that were joined: for pictures, curves, a sweep and the run's file.
        lacking: Cells that are not finished; found from the results, if not given.
        level, resamples: Of the intervals.
    """
    cells = cell_rows(results, level=level, resamples=resamples)
    sprites = Sprites()
    shown = _pictures(cells, folders, sprites, str(results.configuration.get("region", "outside")))
    context = {
        "title": lead.title(results),
        "lead": lead.lead(results),
        "findings": results.sentences(),
        "missing": lead.missing(results, lead.unfinished(results) if lacking is None else lacking),
        "unreliable": [cell for cell in cells if cell.failed],
        "cells": cells,
        "heat": heat_map(cells),
        "columns": [next(f for f in (*FIGURES, P_VALUE) if f.column == column) for column in COLUMNS],
        "choices": {
            axis: list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in ("model", "attack", "defence")
        },
        "figures": FIGURES,
        "meanings": [(f.heading, f.meaning) for f in (*FIGURES, P_VALUE)],
        "level": level,
        "resamples": resamples,
        "pictures": shown,
        "kept_none": not any(shown.values()),
        "sprites": list(sprites.held.values()),
        "verdicts": _sorted(results.verdicts),
        "curves": _curves(folders, results.verdicts),
        "sweep": _sweep(folders),
        "classes": _classes(results, level, resamples),
        "rings": _rings(results, level, resamples),
        "configuration": _configuration(results.configuration),
        "run_files": [
            (folder / "run.yaml").read_text(encoding="utf-8") for folder in folders if (folder / "run.yaml").exists()
        ],
    }
    return _environment().get_template("report.html").render(context)


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("evaluation", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _check_rows(results: Results, folder: Path) -> None:
    if not results.records:
        raise ValueError(f"{folder} holds no rows yet; repeat the command that began the run, then ask again")


def _pictures(
    cells: Iterable[CellRow], folders: Sequence[Path], sprites: Sprites, region: str
) -> dict[int, list[CellPicture]]:
    """What each cell shows, by its number."""
    held: dict[tuple[str, str], dict[str, Picture]] = {}
    for folder in folders:
        for path in sorted((folder / "pictures").rglob("*.jsonl")):
            picture = Picture.load(path)
            if picture is not None:
                of_pair = held.setdefault((picture.facts["model"], picture.facts["attack"]), {})
                of_pair.setdefault(picture.facts["which"], picture)
    found: dict[int, list[CellPicture]] = {}
    for cell in cells:
        of_cell = held.get((cell.model, cell.attack), {})
        images: dict[tuple[int, int], Picture] = {}
        for which in WHICH:  # the median image may be the worst one, too
            if which in of_cell:
                facts = of_cell[which].facts
                images.setdefault((facts["image"], facts["seed"]), of_cell[which])
        views = [cell_picture(picture, cell.defence, sprites, region=region) for picture in images.values()]
        found[cell.number] = [view for view in views if view is not None]
    return found


def _sorted(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Failed ones, those not tried, and passed ones."""
    return {
        "failed": [v for v in verdicts if v.passed is False],
        "not tried": [v for v in verdicts if v.passed is None],
        "passed": [v for v in verdicts if v.passed],
    }


def _rows(folders: Iterable[Path], name: str) -> pd.DataFrame:
    """The rows of a CSV file of each folder that has it; names stay names, whatever they look like."""
    text = dict.fromkeys(("model", "attack", "defence", "variant", "axis"), str)
    paths = [folder / name for folder in folders if (folder / name).exists()]
    tables = [pd.read_csv(path, dtype=text, keep_default_na=False, na_values=["", "nan", "NaN"]) for path in paths]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _curves(folders: Sequence[Path], verdicts: Sequence[Verdict]) -> dict[str, Any] | None:
    """Security curves: one chart for each axis and attack, one line for each model and defence."""
    frame = _rows(folders, "curves.csv")
    if frame.empty:
        return None
    models, defences = list(frame["model"].unique()), list(frame["defence"].unique())
    looks = {(m, d): Look.of(models.index(m), defences.index(d)) for m, d in _pairs(frame, "model", "defence")}
    groups: dict[str, list[Chart]] = {}
    for axis, attack in _pairs(frame, "axis", "attack"):
        here = frame[(frame["axis"] == axis) & (frame["attack"] == attack)]
        series = []
        for model, defence in _pairs(here, "model", "defence"):
            of_line = here[(here["model"] == model) & (here["defence"] == defence)]
            doubt = " ⚠ unreliable" if failed(verdicts, model, attack, defence) else ""
            data = [
                Datum(
                    float(row["x"]),
                    float(row["success"]),
                    float(row["success_low"]),
                    float(row["success_high"]),
                    f"{model}, {defence}{doubt}: {_percent(row['success'])} % fooled at {float(row['x']):g}",
                )
                for row in of_line.to_dict("records")
                if math.isfinite(row["x"])
            ]
            series.append((f"{model} · {defence}{doubt}", looks[model, defence], data))
        label = AXES.get(axis, axis)
        groups.setdefault(label[:1].upper() + label[1:], []).append(line_chart(attack, label, "fooled, %", series))
    headings = ("axis", "attack", "model", "defence", "x", "fooled", "clean mIoU", "attacked mIoU", "images")
    table = [
        (
            AXES.get(row["axis"], row["axis"]), row["attack"], row["model"], row["defence"], f"{row['x']:g}",
            f"{_percent(row['success'])} [{_percent(row['success_low'])}, {_percent(row['success_high'])}]",
            _percent(row["clean_miou"]), _percent(row["adversarial_miou"]), f"{row['images']:.0f}",
        )
        for row in frame.to_dict("records")
    ]  # fmt: skip
    legend = [
        (f"{model} · {defence}" + (" ⚠ unreliable" if _any_failed(verdicts, model, defence) else ""), look)
        for (model, defence), look in looks.items()
    ]
    return {"groups": groups, "headings": headings, "rows": table, "legend": legend}


def _any_failed(verdicts: Sequence[Verdict], model: str, defence: str) -> bool:
    return any(v.passed is False and (v.model, v.defence) == (model, defence) for v in verdicts)


def _sweep(folders: Sequence[Path]) -> dict[str, Any] | None:
    """RAM's settings, clean against robust: one chart for each model and attack, with what none of the others beats."""
    frame = _rows(folders, "tune.csv")
    if frame.empty:
        return None
    names = {
        "front": "Pareto front: no other setting is better in both", "other": "other settings",
        "none": "without defence", "chosen": "the chosen setting",
    }  # fmt: skip
    looks = {
        "other": Look(0, "", MARKERS[0], joined=False),
        "front": Look(1, DASHES[1], MARKERS[1]),
        "none": Look(2, "", MARKERS[2], joined=False),
        "chosen": Look(4, "", RING, joined=False),
    }
    charts, table = [], []
    for model, attack in _pairs(frame, "model", "attack"):
        groups: dict[str, list[Datum]] = {name: [] for name in ("other", "front", "none", "chosen")}
        for row in frame[(frame["model"] == model) & (frame["attack"] == attack)].to_dict("records"):
            setting = _setting(row)
            front, picked = _flag(row["pareto"]), _flag(row["chosen"])
            told = f"{setting}: clean {_percent(row['clean_miou'])} %, robust {_percent(row['robust_miou'])} %"
            datum = Datum(float(row["clean_miou"]), float(row["robust_miou"]), label=told)
            kind = "none" if row["variant"] == "none" else "front" if front else "other"
            groups[kind].append(datum)
            if kind == "none" and front:
                groups["front"].append(replace(datum, label=""))  # the line of the front passes through it
            if picked:
                groups["chosen"].append(datum)
            marks = [name for name, holds in (("chosen", picked), ("Pareto front", front)) if holds]
            table.append(
                (
                    model, attack, setting, _percent(row["clean_miou"]), _percent(row["robust_miou"]),
                    _percent(row["success"]), f"{row['images']:.0f}", ", ".join(marks),
                )
            )  # fmt: skip
        # the front first, so that its line lies under the points
        series = [(names[name], looks[name], groups[name]) for name in ("front", "other", "none", "chosen")]
        charts.append(scatter(f"{model} · {attack}", "clean mIoU, %", "attacked mIoU, %", series))
    headings = ("model", "attack", "setting", "clean mIoU", "attacked mIoU", "fooled", "images", "")
    legend = [(names[name], look) for name, look in looks.items()]
    return {"groups": {"": charts}, "headings": headings, "rows": table, "legend": legend}


def _setting(row: Mapping[Any, Any]) -> str:
    if row["variant"] == "none":
        return "no defence"
    parts = [str(row["variant"])]
    if isinstance(row["max_attention"], str):
        parts.append(f"T = {row['max_attention']}")
    if not pd.isna(row["drop_probability"]):
        parts.append(f"p = {float(row['drop_probability']):g}")
    return ", ".join(parts)


def _flag(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "1.0")


def _pairs(frame: pd.DataFrame, one: str, other: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(frame[one], frame[other], strict=True)))


def _classes(results: Results, level: float, resamples: int) -> list[dict[str, Any]]:
    """IoU of each class: one table for each model and attack, two columns for each defence."""
    frame = statistics.class_table(results, level=level, resamples=resamples)
    return _tables(results, frame.assign(name=frame["class"]), ("clean_iou", "adversarial_iou"))


def _rings(results: Results, level: float, resamples: int) -> list[dict[str, Any]]:
    """Success by distance from the patch: one table for each model and attack, a column for each defence."""
    frame = statistics.success_by_distance(results, level=level, resamples=resamples)
    names = [
        f"{100 * low:g} to {100 * high:g} %" if math.isfinite(high) else f"over {100 * low:g} %"
        for low, high in zip(frame["from"], frame["to"], strict=True)
    ]
    return _tables(results, frame.assign(name=names), ("success",))


def _tables(results: Results, frame: pd.DataFrame, figures: Sequence[str]) -> list[dict[str, Any]]:
    """One table for each model and attack: a row for each name, its figures with intervals under each defence."""
    tables = []
    for model, attack in _pairs(frame, "model", "attack"):
        here = frame[(frame["model"] == model) & (frame["attack"] == attack)]
        defences = list(here["defence"].unique())
        rows: dict[str, list[str]] = {}
        for row in here.to_dict("records"):
            rows.setdefault(row["name"], []).extend(_with_interval(row, name) for name in figures)
        doubtful = [d for d in defences if failed(results.verdicts, model, attack, d)]
        tables.append({"model": model, "attack": attack, "defences": defences, "rows": rows, "doubtful": doubtful})
    return tables


def _with_interval(row: Mapping[Any, Any], name: str) -> str:
    ends = [row[f"{name}_low"], row[f"{name}_high"]]
    interval = "" if any(map(math.isnan, ends)) else f" [{_percent(ends[0])}, {_percent(ends[1])}]"
    return _percent(row[name]) + interval


def _percent(share: float) -> str:
    return "—" if math.isnan(share) else f"{100 * share:.1f}"


def _configuration(configuration: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """What decided the run, key by key."""
    rows: list[tuple[str, str]] = []
    for key, value in configuration.items():
        if isinstance(value, Mapping) and value:
            rows += _configuration(value, f"{before}{key} · ")
        else:
            rows.append((f"{before}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
