"""Security curves: how far an attack gets as its patch grows, as it takes more steps, as a defence is tightened.

After Biggio and Roli, "Wild Patterns: Ten Years After the Rise of Adversarial Machine Learning", Pattern Recognition
2018: one number at one strength of the attack tells little of a defence; the curve over the strength does. Every point
is a run of its own (``evaluation.points``), and points that several curves have in common are one.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from evaluation.contact import takes
from evaluation.datasets import load_data
from evaluation.files import remove_leftovers, write_figure, write_whole
from evaluation.frames import SegmentationData
from evaluation.given import (
    AttackFactory,
    DefenceFunction,
    chosen_images,
    chosen_seeds,
    named_attacks,
    named_defences,
    named_segmenters,
)
from evaluation.metrics import Region
from evaluation.points import Points, Setting, check_place
from evaluation.progress import Tick, progress_bar
from evaluation.results import Results
from evaluation.statistics import intervals
from evaluation.store import NONE
from evaluation.tables import percent
from evaluation.variations import as_multiple, multiple, number, options_of, probability, varied
from ramdefense.segmenter import PyTorchSegmenter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Curves over the strength of the attack, and over an option of the defence: axis → that option.
OF_ATTACK = ("patch_size", "max_iter")
OF_DEFENCE = {"max_attention": "max_attention", "drop_probability": "dropout"}
AXES = (*OF_ATTACK, *OF_DEFENCE)
COLUMNS = (
    "model", "attack", "defence", "axis", "x", "success", "success_low", "success_high", "adversarial_miou",
    "clean_miou", "images",
)  # fmt: skip

#: About how long the run of a defence takes in units of the undefended one: plain, adaptive and transferred attack.
_EFFORT = 5.0
_SYMBOLS = {"max_attention": "T", "drop_probability": "p"}
_LABELS = {
    "patch_size": "side of the patch (pixels)",
    "max_iter": "steps of the attack",
    "max_attention": "bound T, in multiples of 1/N",
    "drop_probability": "drop probability p",
}


class _Place(NamedTuple):
    """A point of a curve: where it is, and how the attack and the defence are set there."""

    x: float
    setting: Setting
    defence: str  # canonical


@dataclass(frozen=True, eq=False)
class Curves:
    """What was measured.

    Attributes:
        table: one row for each point of each curve, with the columns of ``COLUMNS``; shares from 0 to 1. Under the
            axes of a defence's options ``none`` has the same figures at every x.
        base: how the attack is set where its own axes do not say otherwise.
        notes: which defences and attacks do not apply to which model, and why.
        region: which pixels count.
    """

    table: pd.DataFrame
    base: Setting
    notes: list[str]
    region: str

    def screen(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """For each model and attack a heading, and rows: defence, place, fooled, its interval, mIoU attacked, clean."""
        for (model, attack), of_pair in self.table.groupby(["model", "attack"], sort=False):
            rows: list[tuple[str, ...]] = []
            for _, curve in of_pair.groupby(["axis", "defence"], sort=False):
                for row in curve.to_dict("records"):
                    everywhere = row["defence"] == NONE and row["axis"] in OF_DEFENCE
                    at = f"any {_SYMBOLS[row['axis']]}" if everywhere else _told(row["axis"], row["x"])
                    interval = f"{percent(row['success_low'])}–{percent(row['success_high'])}"
                    mious = (percent(row["adversarial_miou"]), percent(row["clean_miou"]))
                    rows.append((row["defence"], at, percent(row["success"]), interval, *mious))
                    if everywhere:  # the same at every x
                        break
            yield f"{model}, {attack}", rows

    def captions(self) -> list[str]:
        """What stands under the table: how the figures were measured, and what does not apply."""
        lines = [
            "All in %. fooled: the strongest variant of the attack on each image. interval: 95 %, over images.",
            f"Where its own axis does not say otherwise: {self.base}.",
        ]
        if self.region == "outside" and "patch_size" in set(self.table["axis"]):
            lines.append("Pixels under the patch do not count, so of a larger patch fewer pixels are left to fool.")
        return lines + self.notes

    def sentences(self) -> Iterator[str]:
        """One for each curve: its ends, and what lies between where it does not go in one direction."""
        for _, curve in self.table.groupby(_CURVE, sort=False):
            points = [row for row in curve.to_dict("records") if not math.isnan(row["success"])]
            if not points or (points[0]["defence"] == NONE and points[0]["axis"] in OF_DEFENCE):
                continue
            rates = [round(row["success"], 3) for row in points]
            straight = rates in (sorted(rates), sorted(rates, reverse=True))
            told = [_point(row) for row in ([points[0], points[-1]] if straight else points)]
            under = "without defence" if points[0]["defence"] == NONE else f"against {points[0]['defence']}"
            where = f"On {points[0]['model']}, {points[0]['attack']} {under}"
            text = f"{', '.join(told[:-1])} and {told[-1]}"
            yield f"{where} fools {text}{'' if straight else ', not in one direction'}."

    def figure(self) -> Figure:
        """One row of panels for each model and attack, one column for each axis; intervals as bars."""
        from matplotlib.figure import Figure

        from evaluation.receptive_field import PALETTE

        table = self.table
        axes = [axis for axis in AXES if axis in set(table["axis"])]
        pairs = list(dict.fromkeys(zip(table["model"], table["attack"], strict=True)))
        defences = list(dict.fromkeys(table["defence"]))
        figure = Figure(figsize=(0.9 + 3.4 * max(len(axes), 1), 0.7 + 2.9 * max(len(pairs), 1)), layout="constrained")
        panels = figure.subplots(max(len(pairs), 1), max(len(axes), 1), squeeze=False, sharey="row", sharex="col")
        for row, (model, attack) in zip(panels, pairs, strict=False):
            for panel, axis in zip(row, axes, strict=True):
                chosen = table[(table["model"] == model) & (table["attack"] == attack) & (table["axis"] == axis)]
                for place, defence in enumerate(defences):
                    curve = chosen[chosen["defence"] == defence]
                    aside = _BESIDE * (place - (len(defences) - 1) / 2)  # or bars would lie on one another
                    _draw(panel, curve, axis, PALETTE[place % len(PALETTE)], _MARKERS[place % len(_MARKERS)], aside)
                panel.grid(alpha=0.25)
                panel.margins(x=0.1)
                panel.set_ylim(bottom=0)
            row[0].set_ylabel(f"{model.removeprefix('zoo:')}, {attack}\npixels fooled (%)", fontsize=9)
        for panel, axis in zip(panels[-1], axes, strict=False):
            _ticks(panel, axis, sorted(set(table.loc[table["axis"] == axis, "x"])))
        keys: dict[str, Any] = {}
        for panel in panels.flat:
            for handle, text in zip(*panel.get_legend_handles_labels(), strict=True):
                keys.setdefault(text, handle)
        figure.legend(keys.values(), keys.keys(), loc="outside upper center", ncols=len(keys), fontsize=9,
                      frameon=False)  # fmt: skip
        return figure


_CURVE = ["model", "attack", "defence", "axis"]
_MARKERS = "os^Dv<>"
_BESIDE = 4.0  # points between the bars of two defences at one x


def curves(
    models: str | PyTorchSegmenter | Sequence[str | PyTorchSegmenter] | Mapping[str, PyTorchSegmenter],
    axes: Mapping[str, Sequence[Any]],
    attacks: str | Sequence[str] | Mapping[str, AttackFactory] = "strip",
    defences: str | Sequence[str] = (NONE, "ram"),
    data: str | SegmentationData = "scenes",
    *,
    images: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    region: Region = "outside",
    out: str | Path | None = None,
    verbose: bool = True,
    patch_shape: tuple[int, int] | None = None,
    max_iter: int | None = None,
    device_type: str | None = None,
    **attack_options: Any,
) -> Curves:
    """Measure attacks on models over their strength, and over that of a defence.

    Args:
        models, attacks, data, images, size, batch_size, seed, region, device_type, attack_options: as ``evaluate``.
        axes: values, at least two, under the names of ``AXES``. ``patch_size``: sides in pixels, or (height, width);
            ``max_iter``: steps; ``max_attention``: multiples of 1/N, as ``"3/N"``; ``drop_probability``: numbers. The
            last two change those of the defences that have such an option, RAM's ``max_attention`` and ``dropout``.
        defences: names; ``none`` is always among them.
        out: folder, maybe that of a run; ``curves.csv``, ``curves.png`` and the points are written there, and the same
            call again, or one with other values, goes on from there.
        verbose: a progress bar on standard error.
        patch_shape, max_iter: at which the other curves are measured; None: the middle one (by area) of the patch sizes
            and the largest number of steps in ``axes``, or the attack's own.

    Raises:
        ValueError: before any attack: no axis, an unknown one, values that are none, fewer than two or twice the same,
            a patch that does not fit, or an axis that an attack or every defence lacks; and as ``evaluate``.
        FileNotFoundError: files that are not there.
        KeyboardInterrupt: interrupted; what was finished is in the folder.
    """
    values = _values(axes)
    factories = named_attacks(attacks)
    names = list(named_defences(defences))
    base = _base(values, patch_shape, max_iter)
    options = {name: value for name, value in attack_options.items() if value is not None}
    _check(values, factories, names, base, options)
    chosen_seeds(seed)
    frames = load_data(data, size=size) if isinstance(data, str) else data
    first = chosen_images(images, len(frames))[0]
    check_place(_settings(values, base), options, frames, first)
    functions: dict[str, DefenceFunction] = {}
    places = {(name, axis): _places(name, axis, values[axis], base, functions) for axis in values for name in names}
    needed: dict[Setting, dict[str, DefenceFunction]] = {}
    for place in itertools.chain.from_iterable(places.values()):
        needed.setdefault(place.setting, {})[place.defence] = functions[place.defence]
    segmenters = named_segmenters(models, frames, first, device_type)
    common: dict[str, Any] = {
        "images": images, "size": size, "batch_size": batch_size, "seed": seed, "region": region,
        "device_type": device_type,
    }  # fmt: skip
    effort = sum(_effort(setting, name) for setting, under in needed.items() for name in under)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    place_of_points = nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory()
    with place_of_points as folder, progress_bar(verbose, effort * len(segmenters) * len(factories)) as tick:
        remove_leftovers(Path(folder))
        points = Points(Path(folder), data, common, options)
        for model, attack in itertools.product(segmenters.items(), factories.items()):
            found: dict[tuple[Setting, str], dict[str, Any]] = {}
            for setting, under in needed.items():
                finished = functools.partial(_finished, tick, f"{model[0]} · {attack[0]}", setting)
                results = points.measure(model, attack, setting, under, finished)
                for row in intervals(results).to_dict("records"):
                    found[setting, row["defence"]] = {str(column): value for column, value in row.items()}
                notes += _notes(results)
            for (name, axis), curve in places.items():
                rows += [
                    {**found[place.setting, place.defence], "defence": name, "axis": axis, "x": place.x}
                    for place in curve
                    if (place.setting, place.defence) in found  # not where the defence or the attack does not apply
                ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    result = Curves(table, base, list(dict.fromkeys(notes)), region)
    if out is not None:
        write_whole(Path(out) / "curves.csv", table.to_csv(index=False))
        if len(table):
            write_figure(Path(out) / "curves.png", result.figure())
    return result


# ------------------------------------------------------------------------------------------------- what is asked for


def _values(axes: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The values of each axis as they are used, sorted upwards: (height, width), steps, k of k/N, p."""
    if not axes:
        raise ValueError(f"no axis given; values for at least one of {', '.join(AXES)}")
    found: dict[str, list[Any]] = {}
    for axis, given in axes.items():
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r}; the axes are {', '.join(AXES)}")
        listed = [given] if isinstance(given, (str, int, float)) else list(given)
        if len(listed) < 2:
            raise ValueError(f"{axis}={listed}: at least two values make a curve")
        held = [_READ[axis](value) for value in listed]
        at = [_x(axis, value) for value in held]
        twice = [value for value, x in zip(listed, at, strict=True) if at.count(x) > 1]
        if twice:
            raise ValueError(f"{axis}: {', '.join(map(str, twice))} are one place of the curve; give it once")
        found[axis] = sorted(held, key=lambda value, axis=axis: _x(axis, value))  # type: ignore[misc]
    return {axis: found[axis] for axis in AXES if axis in found}


def _shape(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, Integral) else tuple(value)
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, Integral) or side < 1:
            raise ValueError(f"patch_size {value}: a side of 1 pixel or more, or (height, width)")
    return int(height), int(width)


def _steps(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"max_iter {value}: a whole number of steps, at least 1")
    return int(value)


_READ = {
    "patch_size": _shape,
    "max_iter": _steps,
    "max_attention": lambda value: multiple(value, "max_attention"),
    "drop_probability": lambda value: probability(value, "drop_probability"),
}


def _x(axis: str, value: Any) -> float:
    """Where a value lies; of a patch the side of a square of its area."""
    return math.sqrt(value[0] * value[1]) if axis == "patch_size" else float(value)


def _told(axis: str, x: float) -> str:
    """A place on an axis in words."""
    if axis == "patch_size":
        return f"side {x:.4g}"
    if axis == "max_iter":
        return f"{number(x)} step{'s' if x != 1 else ''}"
    return f"T = {as_multiple(x)}" if axis == "max_attention" else f"p = {number(x)}"


def _point(row: Mapping[Hashable, Any]) -> str:
    """A point of a curve in words; clean mIoU where the axis changes it."""
    clean = f" (clean mIoU {percent(row['clean_miou'])} %)" if row["axis"] in OF_DEFENCE else ""
    return f"{percent(row['success'])} % of the pixels at {_told(row['axis'], row['x'])}{clean}"


def _base(values: Mapping[str, list[Any]], patch_shape: tuple[int, int] | None, max_iter: int | None) -> Setting:
    """How the attack is set where an axis does not say otherwise."""
    sizes, steps = values.get("patch_size"), values.get("max_iter")
    if patch_shape is None and sizes:
        patch_shape = sizes[len(sizes) // 2]
    if max_iter is None and steps:
        max_iter = steps[-1]  # fewer flatter the defence
    return Setting(
        None if patch_shape is None else _shape(patch_shape), None if max_iter is None else _steps(max_iter)
    )


def _settings(values: Mapping[str, list[Any]], base: Setting) -> list[Setting]:
    sizes = [Setting(shape, base.max_iter) for shape in values.get("patch_size", ())]
    return [base, *sizes, *(Setting(base.patch_shape, steps) for steps in values.get("max_iter", ()))]


def _check(
    values: Mapping[str, list[Any]],
    attacks: Mapping[str, AttackFactory],
    defences: Sequence[str],
    base: Setting,
    options: Mapping[str, Any],
) -> None:
    """Raise a ValueError where an axis or an option is none of an attack or of any defence."""
    for axis, option in zip(OF_ATTACK, ("patch_shape", "max_iter"), strict=True):
        lacking = [name for name, factory in attacks.items() if not takes(factory, option)]
        if axis in values and lacking:
            raise ValueError(f"{axis}: attack {lacking[0]!r} has no {option}, or sets it itself; leave one of them out")
        if getattr(base, option) is not None and len(lacking) == len(attacks):
            raise ValueError(f"{option}={getattr(base, option)}: none of the attacks ({', '.join(attacks)}) has it")
    for option in options:
        if not any(takes(factory, option) for factory in attacks.values()):
            raise ValueError(f"option {option!r}: none of the attacks ({', '.join(attacks)}) has it, or leaves it open")
    for axis, option in OF_DEFENCE.items():
        if axis in values and not any(option in options_of(name) for name in defences):
            listed = ", ".join(defences)
            raise ValueError(f"{axis}: none of the defences ({listed}) has the option {option}; add --defence ram")


def _places(
    name: str, axis: str, values: Sequence[Any], base: Setting, functions: dict[str, DefenceFunction]
) -> list[_Place]:
    """The points of one defence's curve; the defences that they need are entered among the functions."""
    places = []
    option = OF_DEFENCE.get(axis)
    if option is not None and name != NONE and option not in options_of(name):
        return []
    for value in values:
        setting, changes = base, {}
        if axis == "patch_size":
            setting = Setting(value, base.max_iter)
        elif axis == "max_iter":
            setting = Setting(base.patch_shape, value)
        elif name != NONE:
            changes = {str(option): as_multiple(value) if axis == "max_attention" else value}
        canonical, function = varied(name, **changes)
        functions[canonical] = function
        places.append(_Place(_x(axis, value), setting, canonical))
    return places


def _effort(setting: Setting, name: str) -> float:
    """About how long a run takes."""
    return (setting.max_iter or 1) * (1.0 if name == NONE else _EFFORT)


def _finished(tick: Tick, label: str, setting: Setting, name: str) -> None:
    tick(f"{label} · {setting} · {name}", _effort(setting, name))


def _notes(results: Results) -> list[str]:
    return [
        f"n/a: {skip.attack or skip.defence.partition(':')[0]} does not apply to {skip.model}: {skip.reason}"
        for skip in results.skipped
    ]


# ------------------------------------------------------------------------------------------------------- the figure


def _draw(panel: Axes, curve: pd.DataFrame, axis: str, colour: str, marker: str, aside: float) -> None:
    """The curve of one defence, moved aside by so many points."""
    from matplotlib.transforms import ScaledTranslation

    curve = curve.dropna(subset=["success"])
    if curve.empty:
        return
    name = str(curve["defence"].iloc[0])
    label = "no defence" if name == NONE else name
    success = 100 * curve["success"]
    ends = [(success - 100 * curve["success_low"]).fillna(0), (100 * curve["success_high"] - success).fillna(0)]
    if name == NONE and axis in OF_DEFENCE:  # the same at every x
        panel.axhline(success.iloc[0], color=colour, linestyle="--", linewidth=1.4, label=label)
        panel.axhspan(success.iloc[0] - ends[0].iloc[0], success.iloc[0] + ends[1].iloc[0], color=colour, alpha=0.12,
                      linewidth=0)  # fmt: skip
        return
    drawn = panel.errorbar(curve["x"], success, yerr=ends, color=colour, marker=marker, markersize=5, linewidth=1.4,
                           elinewidth=1, capsize=3, label=label)  # fmt: skip
    for artist in drawn.get_children():  # now that the limits of the panel know where it is
        artist.set_transform(panel.transData + ScaledTranslation(aside / 72, 0, panel.figure.dpi_scale_trans))


def _ticks(panel: Axes, axis: str, places: Sequence[float]) -> None:
    """A tick at every value; steps and T, which are chosen by factors, on a logarithmic scale."""
    if axis in ("max_iter", "max_attention"):
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xticks(list(places), [as_multiple(x) if axis == "max_attention" else f"{x:.4g}" for x in places])
    panel.set_xlabel(_LABELS[axis], fontsize=9)
