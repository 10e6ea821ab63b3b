"""How sure a result is: intervals, paired differences between defences, seeds, ensembles of attacks, single classes.

All of it comes from records alone (``evaluation.results``). An image under one seed is the unit whose worst variant
counts; an image, with all its seeds, is the unit that is resampled. The formulas are in docs/evaluation.md,
"Uncertainty", the resampling itself in ``evaluation.resampling``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation import metrics
from evaluation.distance import RINGS, distance_table
from evaluation.resampling import Figure, Floats, Interval, Method, bootstrap, holm, permutation_test
from evaluation.results import VARIANTS, Record, Results, worst
from ramdefense.names import split_name

#: The counts of a record, in the order in which they are stacked.
_PARTS = ("clean", "whole", "adversarial", "changed", "aim", "aim_clean")
_KEY = ["model", "attack", "defence"]
#: Figures of the summary that come from counts, and those of them that it has for single variants.
FIGURES = (
    "success", "clean_success", "target_miou", "adversarial_miou", "pixel_accuracy", "iou_ratio", "changed",
    "clean_miou", "clean_region_miou", "clean_pixel_accuracy",
)  # fmt: skip
_OF_VARIANTS = ("success", "target_miou", "adversarial_miou")
#: Figures that no attack changes, wherever its patch lies.
_WITHOUT_ATTACK = ("clean_miou",)
#: Name of the variant of what ``worst_over_attacks`` makes.
ENSEMBLE = "ensemble"

Key = tuple[str, str, str]
Unit = tuple[int, int]
Units = dict[Unit, Record]


def intervals(
    results: Results | Iterable[Record],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> pd.DataFrame:
    """Confidence intervals over images of every figure of the summary that comes from counts.

    Costs have none: passes and seconds are means over the images attacked together, so they do not vary by image.

    Args:
        results: of a run, or records.
        level, resamples, seed, method: as in ``resampling.bootstrap``. A cell's intervals depend on no other cell.

    Columns:
        model, attack, defence, images: the cell, in the order of the summary, and how many images it has.
        NAME, NAME_low, NAME_high: the figure and its interval, for each figure of the summary: those of ``FIGURES``,
            of the worst variant for each image and seed; VARIANT_success, VARIANT_target_miou and
            VARIANT_adversarial_miou; success_drop, whose interval is a paired one and NaN where the undefended cell
            has other images. All NaN ends with one image, and for a figure that rests on one.

    Raises:
        ValueError: what ``bootstrap`` refuses.
    """
    results = _as_results(results)
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed, "method": method}
    cells = dict(results.groups())
    chosen = {key: _worst(variants.values()) for key, variants in cells.items()}
    rows = []
    for key in _in_order(results, chosen):
        model, attack, _ = key
        counts = _counts(chosen[key].values())
        row: dict[str, Any] = dict(zip(_KEY, key, strict=True)) | {"images": len(counts)}
        row |= _columns(FIGURES, bootstrap(counts, _figures(FIGURES, chosen[key]), **options))
        row |= _columns(("success_drop",), _drop(chosen.get((model, attack, "none"), {}), chosen[key], options))
        for variant in VARIANTS:
            names = [f"{variant}_{name}" for name in _OF_VARIANTS]
            units = _worst([cells[key].get(variant, [])])
            found = bootstrap(_counts(units.values()), _figures(_OF_VARIANTS, units), **options) if units else None
            row |= _columns(names, found or _nothing(len(names)))
        rows.append(row)
    ends = ("", "_low", "_high")
    names = ["success", "success_drop", *FIGURES[1:], *(f"{v}_{name}" for v in VARIANTS for name in _OF_VARIANTS)]
    return pd.DataFrame(rows, columns=[*_KEY, "images", *(name + end for name in names for end in ends)])


def paired_differences(
    results: Results | Iterable[Record],
    baseline: str = "none",
    *,
    figures: Sequence[str] = ("success", "adversarial_miou", "clean_miou"),
    level: float = 0.95,
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
    method: Method = "bca",
) -> pd.DataFrame:
    """What each defence changes against another one, on the same images: difference, interval and p-value.

    Args:
        results: of a run, or records.
        baseline: the defence to compare with.
        figures: of ``FIGURES``; together with the cells they decide how many comparisons the correction is for.
        level, resamples, seed, method: of the paired interval: an image is drawn with both its sides
            (``resampling.bootstrap``). It is not corrected for the number of comparisons.
        permutations: of the paired test (``resampling.permutation_test``), which swaps the two sides of an image.

    Columns:
        model, attack, defence, figure: one row for each. ``clean_miou``, which no attack changes, has one for each
            model and defence, its attack empty, so that one comparison does not count many times.
        images: that both have, with the same seeds; the rest of the row is on these.
        baseline, value, difference: the figure under the baseline, under the defence, and value − baseline. For
            ``success`` a negative difference speaks for the defence.
        low, high: the interval of the difference.
        p, p_holm: two-sided p-value, and the same corrected for all rows of this table by Holm's method.

    Raises:
        ValueError: an unknown figure, a baseline that nothing was measured under, or what the resampling refuses.
    """
    results = _as_results(results)
    unknown = [name for name in figures if name not in FIGURES]
    if unknown:
        raise ValueError(f"figures={unknown}: of {', '.join(FIGURES)}")
    cells = {key: _worst(variants.values()) for key, variants in results.groups()}
    defences = list(dict.fromkeys(defence for _, _, defence in cells))
    if cells and baseline not in defences:
        raise ValueError(f"baseline={baseline!r}: nothing was measured under it; one of {', '.join(defences)}")
    under_attack = [name for name in figures if name not in _WITHOUT_ATTACK]
    without = [name for name in figures if name in _WITHOUT_ATTACK]
    pairs = [(key, cells[key], under_attack) for key in _in_order(results, cells)]
    merged = _over_attacks(cells)
    pairs += [(key, units, without) for key, units in merged.items()]
    bases = cells | merged
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed, "method": method}
    rows: list[dict[str, Any]] = []
    for (model, attack, defence), units, names in pairs:
        base = bases.get((model, attack, baseline), {})
        common = sorted(units.keys() & base.keys())
        if defence == baseline or not common or not names:
            continue
        one, other = (_counts(side[unit] for unit in common) for side in (base, units))
        figure = _figures(names, units)
        found = _paired(one, other, figure, options)
        p_values = permutation_test(one, other, figure, permutations=permutations, seed=seed)
        before, after = (figure(side.sum(axis=0)[None])[0] for side in (one, other))
        for column, name in enumerate(names):
            row = {"model": model, "attack": attack, "defence": defence, "figure": name, "images": len(one)}
            row |= {"baseline": before[column], "value": after[column], "difference": found.estimate[column]}
            rows.append(row | {"low": found.low[column], "high": found.high[column], "p": p_values[column]})
    columns = [*_KEY, "figure", "images", "baseline", "value", "difference", "low", "high", "p"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=np.float64))
    return frame


def seed_spread(results: Results | Iterable[Record]) -> pd.DataFrame:
    """How much the success rate of each cell differs from one attack seed to the next, on the same images.

    Columns:
        model, attack, defence: the cell, in the order of the summary.
        seeds, images: how many seeds it has, and how many images all of them have.
        success_mean, success_std, success_min, success_max: over the seeds, of the success rate of all these images,
            the worst variant taken for each image; the standard deviation with seeds − 1 below, NaN for one seed.
    """
    results = _as_results(results)
    cells = {key: _worst(variants.values()) for key, variants in results.groups()}
    rows = []
    for key in _in_order(results, cells):
        by_seed: dict[int, dict[int, Record]] = {}
        for (image, seed), record in cells[key].items():
            by_seed.setdefault(seed, {})[image] = record
        images = sorted(set.intersection(*(set(records) for records in by_seed.values())))
        rates = [
            float(_figures(("success",), cells[key])(_counts(records[i] for i in images).sum(axis=0)[None])[0, 0])
            for records in by_seed.values()
            if images
        ]
        row: dict[str, Any] = dict(zip(_KEY, key, strict=True)) | {"seeds": len(by_seed), "images": len(images)}
        row["success_mean"] = float(np.mean(rates)) if rates else math.nan
        row["success_std"] = float(np.std(rates, ddof=1)) if len(rates) > 1 else math.nan
        row["success_min"], row["success_max"] = (min(rates), max(rates)) if rates else (math.nan, math.nan)
        rows.append(row)
    spread = [f"success_{name}" for name in ("mean", "std", "min", "max")]
    return pd.DataFrame(rows, columns=[*_KEY, "seeds", "images", *spread])


def worst_over_attacks(results: Results | Iterable[Record]) -> Results:
    """What all attacks with the same aim reach together: for each image and seed the most successful one counts.

    Attacks belong together if they may change the same (``threat`` in the catalogue of attacks; unknown ones among
    themselves), all have a target map or all have none, and the maps have the same number of counted pixels of each
    class on each image, and their labels have, too. These numbers, the sums of the rows of ``aim`` and of
    ``adversarial``, stand for the map and the counted pixels themselves, which records do not hold: an attack with
    another target, a patch elsewhere or of another size, or other images or seeds does not fit in. Different maps of
    the same composition on every image (a map and its mirror image) would be taken for one.

    Returns:
        Results whose records are the chosen ones, their attack ``"worst of A, B, C"``, their variant ``"ensemble"``:
        summary, intervals, paired differences and classes are to be had of them as of any other. No costs. An attack
        that nothing fits is not among them.
    """
    results = _as_results(results)
    families: dict[tuple[str, str, Any], dict[str, list[Record]]] = {}
    for (model, attack, defence), variants in results.groups():
        units = _worst(variants.values())
        if units:
            aim = (threat_of(attack), tuple((unit, aim_fingerprint(units[unit])) for unit in sorted(units)))
            families.setdefault((model, defence, aim), {})[attack] = list(units.values())
    # one order for all, or a family would have other names under other defences
    order = list(dict.fromkeys(record.attack for record in results.records))
    records = []
    for members in families.values():
        if len(members) > 1:
            name = f"worst of {', '.join(sorted(members, key=order.index))}"
            records += [
                dataclasses.replace(
                    r, attack=name, variant=ENSEMBLE, steps=None, forwards=None, backwards=None, seconds=None
                )
                for r in _worst(members.values()).values()
            ]
    return dataclasses.replace(
        results, records=records, skipped=[skip for skip in results.skipped if skip.attack is None]
    )


def class_table(
    results: Results | Iterable[Record],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> pd.DataFrame:
    """IoU of each class, without and under attack, with intervals over images.

    Args:
        results: of a run, or records (whose classes are then numbered).
        level, resamples, seed, method: as in ``resampling.bootstrap``.

    Columns:
        model, attack, defence, class: one row for each; cells in the order of the summary.
        images, pixels: how many images have the class among their counted labels, and how many such pixels there are,
            over all seeds.
        clean_iou, clean_region_iou, adversarial_iou, target_iou, each with _low and _high: against the labels on the
            whole image and on the counted pixels without attack, on the counted pixels under attack, and against the
            target map under attack. Their means over the classes are clean_miou, clean_region_miou, adversarial_miou
            and target_miou. NaN for a class that is absent from reference and prediction; NaN ends for one that a
            single image has.

    Raises:
        ValueError: what ``bootstrap`` refuses.
    """
    results = _as_results(results)
    cells = {key: _worst(variants.values()) for key, variants in results.groups()}
    parts = {"clean": "whole", "clean_region": "clean", "adversarial": "adversarial", "target": "aim"}
    tables = []
    for key in _in_order(results, cells):
        counts = _counts(cells[key].values())
        chosen = counts[:, [_PARTS.index(part) for part in parts.values()]]
        nb_classes = counts.shape[-1]
        found = bootstrap(chosen, _every_class, level=level, resamples=resamples, seed=seed, method=method)
        labels = counts[:, _PARTS.index("adversarial"), 1]  # (images, C)
        table: dict[str, Any] = dict(zip(_KEY, key, strict=True))
        table["class"] = list(results.classes) or [str(number) for number in range(nb_classes)]
        table |= {"images": (labels > 0).sum(axis=0), "pixels": labels.sum(axis=0).astype(np.int64)}
        for name, *columns in zip(parts, *(end.reshape(len(parts), nb_classes) for end in found), strict=True):
            table |= dict(zip((f"{name}_iou", f"{name}_iou_low", f"{name}_iou_high"), columns, strict=True))
        tables.append(pd.DataFrame(table))
    names = [f"{part}_iou{end}" for part in parts for end in ("", "_low", "_high")]
    columns = [*_KEY, "class", "images", "pixels", *names]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def success_by_distance(
    results: Results | Iterable[Record],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> pd.DataFrame:
    """Success rate in each ring around the patch, with intervals over images, the worst variant for each image.

    Args:
        results: of a run, or records.
        level, resamples, seed, method: as in ``resampling.bootstrap``.

    Columns:
        model, attack, defence, images: the cell; attacks that may change every pixel have no distance and no rows.
        from, to: the ring's edges, in shares of the image's diagonal (``distance.RINGS``).
        pixels: its counted pixels that the attack could win, of all images and seeds.
        success, success_low, success_high: share of them that it won; NaN in a ring without such a pixel.
    """
    results = _as_results(results)
    cells = {key: _worst(variants.values()) for key, variants in results.groups()}
    tables = []
    for key in _in_order(results, cells):
        images: dict[int, NDArray[np.int64]] = {}
        for record in cells[key].values():
            if record.rings is not None:
                images[record.image] = images.get(record.image, 0) + record.rings
        if not images:
            continue
        counts = np.stack(list(images.values()))
        rings = distance_table(
            counts[:, 0], counts[:, 1], RINGS, level=level, resamples=resamples, seed=seed, method=method
        )
        head = dict(zip(_KEY, key, strict=True)) | {"images": len(counts)}
        tables.append(rings.assign(**head)[[*head, *rings.columns]])
    columns = [*_KEY, "images", "from", "to", "pixels", "success", "success_low", "success_high"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


# ------------------------------------------------------------------------------------------------------------ details


def _as_results(results: Results | Iterable[Record]) -> Results:
    return results if isinstance(results, Results) else Results(list(results), classes=())


def _worst(groups: Iterable[Sequence[Record]]) -> Units:
    """The most successful record of each image and seed, sorted by image, then by seed."""
    by_seed: dict[int, list[Record]] = {}
    for records in groups:
        for record in records:
            by_seed.setdefault(record.seed, []).append(record)
    units = {(r.image, seed): r for seed, records in by_seed.items() for r in worst(records)}
    return {unit: units[unit] for unit in sorted(units)}


def _in_order(results: Results, cells: Mapping[Key, Units]) -> list[Key]:
    """The cells that have images, in the order of the summary."""
    keys: Iterable[Key] = results.summary()[_KEY].itertuples(index=False, name=None)
    return [key for key in keys if cells.get(key)]


def _over_attacks(cells: Mapping[Key, Units]) -> dict[Key, Units]:
    """One cell, without an attack, for each model and defence: for each unit one record of whatever attack."""
    found: dict[Key, Units] = {}
    for (model, _, defence), units in cells.items():
        held = found.setdefault((model, "", defence), {})
        held |= {unit: record for unit, record in units.items() if unit not in held}
    return found


def _counts(records: Iterable[Record]) -> Floats:
    """What each image adds, over all its seeds: margins of its counts, ``(images, parts, 3, C)``; 0 without a target.

    The images come in ascending order, whatever the order of the records.
    """
    images: dict[int, NDArray[np.int64]] = {}
    for record in records:
        nothing = np.zeros_like(record.clean)
        parts = [getattr(record, part) for part in _PARTS]
        counts = metrics.margins(np.stack([nothing if part is None else part for part in parts]))
        images[record.image] = images.get(record.image, 0) + counts
    return np.stack([images[image] for image in sorted(images)]).astype(np.float64)


def _figures(names: Sequence[str], units: Units) -> Figure:
    """The named figures, ``(R, parts, 3, C)`` → ``(R, F)``, of an attack with a target or of one without."""
    parts = _PARTS if any(record.aim is not None for record in units.values()) else _PARTS[:-2]

    def figure(sums: Floats) -> Floats:
        found = metrics.figures({part: sums[:, number] for number, part in enumerate(parts)})
        return np.stack([found[name] for name in names], axis=-1)

    return figure


def _every_class(sums: Floats) -> Floats:
    return metrics.class_ious(sums).reshape(len(sums), -1)


def _paired(one: Floats, other: Floats, figure: Figure, options: Mapping[str, Any]) -> Interval:
    """Intervals of ``figure(other) − figure(one)``, an image drawn with both its sides."""
    return bootstrap(np.stack([one, other], axis=1), lambda s: figure(s[:, 1]) - figure(s[:, 0]), **options)


def _drop(undefended: Units, defended: Units, options: Mapping[str, Any]) -> Interval:
    """How much lower the success rate is than without defence; an interval if the images and seeds are the same."""
    if not undefended:
        return _nothing(1)
    figure = _figures(("success",), defended)
    one, other = _counts(defended.values()), _counts(undefended.values())
    if undefended.keys() == defended.keys():
        return _paired(one, other, figure, options)
    before, after = (figure(side.sum(axis=0)[None])[0] for side in (other, one))
    return _nothing(1)._replace(estimate=before - after)


def _nothing(figures: int) -> Interval:
    return Interval(*np.full((3, figures), np.nan))


def _columns(names: Sequence[str], found: Interval) -> dict[str, float]:
    return {
        f"{name}{end}": float(values[column])
        for end, values in zip(("", "_low", "_high"), found, strict=True)
        for column, name in enumerate(names)
    }


def threat_of(attack: str) -> str:
    """What an attack of that name may change, as the catalogue has it; empty for one that is not in it."""
    from attacks.catalogue import attacks

    entry = attacks().get(split_name(attack)[0])
    return "" if entry is None else entry.threat


def aim_fingerprint(record: Record) -> tuple[bytes | None, bytes]:
    """What stands for the map aimed at, and for the counted pixels."""
    aim = None if record.aim is None else record.aim.sum(axis=1).tobytes()
    return aim, record.adversarial.sum(axis=1).tobytes()
