"""What an evaluation found: one record for each image and variant of the attack, and tables that are functions of them.

A record holds confusion counts (``metrics``), nothing rounded and nothing averaged. Every number in a table, on a page
or in a file comes from records alone, so a run can be merged, cut and read again without the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evaluation import metrics, tables
from evaluation.files import DamagedError, read_lines, write_whole
from evaluation.keys import PRECISION, cell_key
from evaluation.metrics import Counts
from evaluation.verdicts import Verdict, failed, read_verdicts

if TYPE_CHECKING:
    from rich.console import Group

#: How the attack deals with a defence: it does not know it; it knows it; its patch was made on the undefended model.
VARIANTS = ("plain", "adaptive", "transfer")
_KEY = ["model", "attack", "defence"]


@dataclass(frozen=True, eq=False)
class Record:
    """One image, one model under one defence, one variant of one attack.

    Attributes:
        image: index in the data set. name: its name there.
        clean: label against prediction without attack, counted pixels.
        whole: the same on the whole image, void excepted.
        adversarial: label against prediction under attack, counted pixels.
        changed: prediction without attack against prediction under attack, counted pixels.
        aim, aim_clean: target map against the prediction with and without attack; ``None`` for an attack without one.
        steps: that the attack made for this image, over all its runs; 0 for a patch that was made before; ``None``
            where the attack does not say.
        forwards, backwards: passes that it made, the mean over the images attacked with this one; likewise.
        seconds: wall-clock time, the mean over the images of its file. Not among what is written for a record, which
            is the same in every run.
        seed: of the attack.
        rings: pixels won by the attack, and pixels that it could win, in each ring around the patch
            (``distance.count_rings``); ``None`` where the attack may change every pixel.

    Shape:
        every count is int64 ``(C, C)``, reference down, prediction across; ``rings`` is int64 ``(2, rings)``.
    """

    model: str
    attack: str
    defence: str
    variant: str
    image: int
    name: str
    clean: Counts
    whole: Counts
    adversarial: Counts
    changed: Counts
    aim: Counts | None
    aim_clean: Counts | None
    steps: int | None = None
    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None
    seed: int = 0
    rings: Counts | None = None

    @property
    def success(self) -> float:
        """Success rate on this image: pixels on target, or wrong ones where there is no target; NaN if none count."""
        return metrics.error_rate(self.adversarial) if self.aim is None else metrics.success_rate(self.aim)

    def to_json(self) -> str:
        """One line, the same bytes for the same record; counts as ``[reference, prediction, pixels]`` where not 0."""
        written = {name: _sparse(value) for name, value in vars(self).items() if name != "seconds"}
        written["rings"] = None if self.rings is None else self.rings.tolist()
        return json.dumps(written, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str, nb_classes: int, seconds: float | None = None) -> Record:
        """Read what ``to_json`` wrote; the seconds come from elsewhere."""
        values = json.loads(line) | {"seconds": seconds}
        for name in ("clean", "whole", "adversarial", "changed", "aim", "aim_clean"):
            if values[name] is not None:
                values[name] = _dense(values[name], nb_classes)
        if values.get("rings") is not None:  # which files of earlier versions lack
            values["rings"] = np.array(values["rings"], dtype=np.int64)
        return cls(**values)


def _sparse(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return [[int(r), int(c), int(value[r, c])] for r, c in zip(*np.nonzero(value), strict=True)]


def _dense(triples: list[list[int]], nb_classes: int) -> Counts:
    counts = np.zeros((nb_classes, nb_classes), dtype=np.int64)
    for row, column, pixels in triples:
        counts[row, column] = pixels
    return counts


@dataclass(frozen=True)
class Skipped:
    """A defence that does not apply to a model, or an attack that does not, and why.

    Args:
        model: The model.
        defence: The defence; of an attack that does not apply, the one it was tried on.
        reason: Why, in a few words.
        attack: The attack that does not apply; None: the defence itself does not, whatever the attack.
    """

    model: str
    defence: str
    reason: str
    attack: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """What a run that keeps going could not do, and why: a frame that cannot be read, or images whose attack failed.

    Args:
        reason: What went wrong.
        images: Indices in the data set.
        model, attack, defence, variant, seed: Where; None for a frame, which is left out everywhere.
    """

    reason: str
    images: tuple[int, ...]
    model: str | None = None
    attack: str | None = None
    defence: str | None = None
    variant: str | None = None
    seed: int | None = None

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> LeftOut:
        """From its fields as JSON has them."""
        return cls(**{**written, "images": tuple(written["images"])})

    def __str__(self) -> str:
        many = len(self.images) > 3
        listed = f"{self.images[0]} … {self.images[-1]}" if many else ", ".join(map(str, self.images))
        named = f"image{'s' if len(self.images) > 1 else ''} {listed}"
        if self.model is None:
            return f"{named}: {self.reason}"
        seed = f" · seed {self.seed}" if self.seed else ""
        return f"{self.model} · {self.attack} · {self.defence} · {self.variant}{seed}, {named}: {self.reason}"


def read_configuration(folder: Path) -> dict[str, Any]:
    """What a run's ``config.json`` holds.

    Raises:
        DamagedError: it is not what a run writes there; the message names it.
    """
    path = folder / "config.json"
    try:
        configuration: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in {"models": dict, "attacks": dict, "defences": dict, "options": dict, "data": dict}.items():
            if not isinstance(configuration[name], kind):
                raise ValueError(f"{name} is no mapping")
        if not isinstance(configuration["data"]["classes"], list):
            raise ValueError("the classes are no list")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(path, f"it lacks {error}" if isinstance(error, KeyError) else error) from error
    return configuration


def read_rows(folder: Path, path: Path, nb_classes: int) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a file of rows in a run's folder, with their time.

    Raises:
        DamagedError: it, or the file of its time, is damaged; the message names it.
    """
    header, lines = read_lines(path)
    times = folder / "times" / path.relative_to(folder / "cells").with_suffix(".json")
    seconds = read_lines(times)[0].get("seconds") if times.exists() else None
    try:
        return header, [Record.from_json(line, nb_classes, seconds) for line in lines]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedError(path, f"no rows: {error}") from error


def _figures(records: Sequence[Record]) -> dict[str, float]:
    """Every figure of a group of records, from the sum of their counts."""
    parts = {}
    for name in ("clean", "whole", "adversarial", "changed", "aim", "aim_clean"):
        counts = [getattr(record, name) for record in records if getattr(record, name) is not None]
        if counts:
            parts[name] = metrics.margins(metrics.merge(counts))
    return {name: float(value) for name, value in metrics.figures(parts).items()}


#: What an attack costs, for each image, over all its variants.
_COSTS = ("steps", "forwards", "backwards", "seconds")


def _costs(variants: Iterable[list[Record]], images: int) -> dict[str, float]:
    """What each image took, over all variants of the attack; NaN where one of them does not say."""
    records = [record for variant in variants for record in variant]
    return {
        name: sum(math.nan if getattr(r, name) is None else getattr(r, name) for r in records) / images
        for name in _COSTS
    }


def worst(records: Iterable[Record]) -> list[Record]:
    """For each image and seed the record with the highest success rate; of equals, the first in ``VARIANTS``."""
    best: dict[tuple[int, int], Record] = {}
    for record in sorted(records, key=lambda r: _order(r.variant)):
        score = -1.0 if math.isnan(record.success) else record.success
        held = best.get((record.image, record.seed))
        if held is None or score > (-1.0 if math.isnan(held.success) else held.success):
            best[record.image, record.seed] = record
    return [best[key] for key in sorted(best)]


def _success_over_seeds(records: Sequence[Record]) -> float:
    """Sample standard deviation of the success rate over the seeds; NaN for one seed."""
    seeds = {record.seed for record in records}
    if len(seeds) < 2:
        return math.nan
    return float(np.std([_figures([r for r in records if r.seed == seed])["success"] for seed in seeds], ddof=1))


def _order(variant: str) -> tuple[int, str]:
    return (VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)), variant


@dataclass(eq=False)
class Results:
    """Records of a run, and the tables made from them.

    Attributes:
        records: one for each model × attack × defence × variant × seed × image.
        skipped: defences that do not apply to a model.
        classes: names of the classes.
        configuration: what decides the run, as in its ``config.json``.
        interrupted: the run was stopped; what was finished is here.
        left_out: frames that could not be read and cells whose attack failed, in a run that keeps going.
        verdicts: what the checks of the run found.
    """

    records: list[Record]
    classes: Sequence[str]
    skipped: list[Skipped] = field(default_factory=list)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    left_out: list[LeftOut] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def rows(self) -> pd.DataFrame:
        """One row for each record, its figures from the counts of that image alone; shares from 0 to 1."""
        return pd.DataFrame(
            [
                {name: getattr(r, name) for name in (*_KEY, "variant", "seed", "image", "name")} | _figures([r])
                for r in self.records
            ]
        )

    def groups(self) -> Iterator[tuple[tuple[str, str, str], dict[str, list[Record]]]]:
        """``(model, attack, defence)`` and its records by variant, on the images and seeds that all variants have."""
        grouped: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
        for record in self.records:
            cell = grouped.setdefault((record.model, record.attack, record.defence), {})
            cell.setdefault(record.variant, []).append(record)
        for key, variants in grouped.items():
            common = set.intersection(*({(r.image, r.seed) for r in records} for records in variants.values()))
            yield (
                key,
                {
                    variant: sorted(
                        (r for r in variants[variant] if (r.image, r.seed) in common), key=lambda r: (r.seed, r.image)
                    )
                    for variant in sorted(variants, key=_order)
                },
            )

    def summary(self) -> pd.DataFrame:
        """One row for each model, attack and defence; shares from 0 to 1.

        Columns:
            model, attack, defence, images: the cell, and how many images it has.
            success: attack success rate. Counted pixels predicted as the target / counted pixels that have a target
                (for an attack without a target: counted pixels predicted wrong / counted pixels), the worst variant of
                the attack taken for each image and seed. ``success_drop``: how much lower than without defence.
            seeds: how many seeds of the attack; their counts are summed. ``success_seed_std``: sample standard
                deviation of ``success`` over them, NaN for one.
            target_miou, adversarial_miou, pixel_accuracy, iou_ratio, changed: of the same worst records.
            clean_success: ``success`` of no attack at all, by the same target and pixels.
            clean_miou: mIoU without attack, this defence in place, whole image; clean_region_miou and
                clean_pixel_accuracy: on the counted pixels.
            steps, forwards, backwards, seconds: what the attack took for each image and seed, over all its variants.
            VARIANT_success, VARIANT_target_miou, VARIANT_adversarial_miou: of one variant of the attack.
            note: why the defence does not apply to the model; empty otherwise.
            failed_checks: the checks (``evaluation.checks``) that failed, joined by "; "; one makes the row unreliable.
        """
        table: list[dict[str, Any]] = []
        for (model, attack, defence), variants in self.groups():
            chosen = worst(r for records in variants.values() for r in records)
            if not chosen:
                continue
            row: dict[str, Any] = dict(zip(_KEY, (model, attack, defence), strict=True))
            row |= (
                {"images": len({r.image for r in chosen}), "note": ""}
                | _figures(chosen)
                | _costs(variants.values(), len(chosen))
            )
            row |= {"seeds": len({r.seed for r in chosen}), "success_seed_std": _success_over_seeds(chosen)}
            for variant in VARIANTS:
                figures = _figures(variants[variant]) if variant in variants else {}
                for name in ("success", "target_miou", "adversarial_miou"):
                    row[f"{variant}_{name}"] = figures.get(name, math.nan)
            table.append(row)
        attacks = list(dict.fromkeys(row["attack"] for row in table))
        for skip in self.skipped:
            table += [
                {
                    "model": skip.model, "attack": attack, "defence": skip.defence, "images": 0, "seeds": 0,
                    "note": skip.reason,
                }
                for attack in (attacks if skip.attack is None else [skip.attack])
            ]  # fmt: skip
        columns = [*_KEY, "images", "success", "success_drop", "success_seed_std", "seeds", *_columns(), "note"]
        frame = pd.DataFrame(table).reindex(columns=columns)
        keys = zip(*(frame[axis] for axis in _KEY), strict=True)
        frame["failed_checks"] = [self._failed_checks(*key) for key in keys]
        undefended = {
            (r["model"], r["attack"]): r["success"] for r in table if r["defence"] == "none" and not r["note"]
        }
        frame["success_drop"] = [
            undefended.get((m, a), math.nan) - s
            for m, a, s in zip(frame["model"], frame["attack"], frame["success"], strict=True)
        ]
        order = {axis: self._names(axis) for axis in _KEY}
        place = [
            tuple(_index(order[axis], row[axis]) for axis in ("attack", "model", "defence"))
            for row in frame.to_dict("records")
        ]
        return frame.iloc[sorted(range(len(frame)), key=place.__getitem__)].reset_index(drop=True)

    def _failed_checks(self, model: str, attack: str, defence: str) -> str:
        found = failed(self.verdicts, model, attack, defence)
        return "; ".join(dict.fromkeys(verdict.check for verdict in found))

    def _failures(self) -> list[str]:
        """A line for each check that failed."""
        return [f"{tables.UNRELIABLE}: {verdict}" for verdict in self.verdicts if verdict.passed is False]

    def unreliable(self) -> set[tuple[str, str, str]]:
        """(model, attack, defence) of the rows of the summary that a failed check calls into question."""
        rows = self.summary()
        return set(rows.loc[rows["failed_checks"] != "", _KEY].itertuples(index=False, name=None))

    def verdict_table(self) -> pd.DataFrame:
        """One row for each verdict.

        Columns:
            model, defence, attack: what it is about; attack is empty where it is about every one.
            check: its name. passed: True or False; None where it does not apply or could not be tried.
            detail: the figures that it rests on, or the reason.
        """
        columns = ["model", "defence", "attack", "check", "passed", "detail"]
        rows = [{name: getattr(verdict, name) for name in columns} for verdict in self.verdicts]
        frame = pd.DataFrame(rows, columns=columns).astype({"passed": object})
        frame["attack"] = frame["attack"].fillna("")
        return frame

    def _names(self, axis: str) -> list[str]:
        """Models, attacks or defences in the order in which they were given."""
        given = list(self.configuration.get(f"{axis}s", ()))
        return list(dict.fromkeys(given + [getattr(record, axis) for record in self.records]))

    def table(self) -> Group:
        """The summary for the screen (``rich``): percentages, and what each defence gains."""
        under = " and pixels under the patch" if self.configuration.get("region", "outside") == "outside" else ""
        notes = [
            f"n/a: {skip.attack or skip.defence} does not apply to {skip.model}: {skip.reason}" for skip in self.skipped
        ]
        notes += [f"left out: {left_out}" for left_out in gathered(self.left_out)]
        notes = [*self._failures(), *notes]
        if self.interrupted:
            notes.insert(0, "INTERRUPTED: only what was finished is here.")
        counted = f"Void pixels{under} count nowhere; clean mIoU is of the whole image."
        return tables.on_screen(self.summary(), notes, counted=counted)

    def markdown(self) -> str:
        """The summary as Markdown, in percent."""
        return tables.as_markdown(self.summary(), self._failures())

    def sentences(self) -> list[str]:
        """What the table shows, one plain sentence for each model, attack and defence."""
        return list(tables.as_sentences(self.summary()))

    def to_csv(self, path: str | Path) -> None:
        """Write the summary as CSV."""
        write_whole(Path(path), self.summary().to_csv(index=False))

    def to_json(self, path: str | Path) -> None:
        """Write the summary as a JSON list of objects; what is not a number is ``null``."""
        write_whole(Path(path), self.summary().to_json(orient="records", indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read a run's folder, finished or not.

        Raises:
            FileNotFoundError: no run in it.
            ValueError: a damaged file, or one that belongs to another run; the message names it.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no run: it has no config.json")
        configuration = read_configuration(folder)
        classes = configuration["data"]["classes"]
        records, skipped = [], []
        left_out: list[LeftOut] = []
        frames: dict[str, str] = {}
        for path in sorted((folder / "cells").rglob("*.jsonl")):
            header, rows = read_rows(folder, path, len(classes))
            _check_same_run(path, header, configuration, frames)
            if "skipped" in header:
                skipped.append(Skipped(**header["skipped"]))
            elif "left_out" in header and not path.with_name(path.name.replace(".left_out", "")).exists():
                left_out.append(LeftOut.of(header["left_out"]))
            left_out += [LeftOut(reason, (int(image),)) for image, reason in header.get("unreadable", {}).items()]
            records += rows
        verdicts: list[Verdict] = []
        for path in sorted((folder / "checks").rglob("*.jsonl")):
            header, found = read_verdicts(path)
            _check_same_run(path, header, configuration, frames)
            verdicts += found
        left_out = list(dict.fromkeys(left_out))
        return cls(records, classes, skipped, configuration, left_out=left_out, verdicts=verdicts).ordered()

    def ordered(self) -> Results:
        """The same in the order of the configuration, whatever the order in which it was found."""
        axes = {axis: list(self.configuration.get(f"{axis}s", ())) for axis in _KEY}
        seed = self.configuration.get("seed", 0)
        seeds = seed if isinstance(seed, list) else [seed]
        records = sorted(
            self.records,
            key=lambda r: (
                *(_index(axes[axis], getattr(r, axis)) for axis in _KEY), _order(r.variant), _index(seeds, r.seed),
                r.image,
            ),
        )  # fmt: skip
        skipped = sorted(
            self.skipped,
            key=lambda s: tuple(_index(axes[axis], getattr(s, axis) or "") for axis in ("model", "defence", "attack")),
        )
        # stable: the checks of one cell stay in their order, those of a defence come before those of its attacks
        verdicts = sorted(
            self.verdicts,
            key=lambda v: (
                *(_index(axes[axis], getattr(v, axis)) for axis in ("model", "defence")),
                -1 if v.attack is None else _index(axes["attack"], v.attack),
            ),
        )
        return replace(self, records=records, skipped=skipped, verdicts=verdicts)

    @classmethod
    def joined(cls, runs: Sequence[Results]) -> Results:
        """One result from runs that differ in their models, attacks or defences alone.

        Raises:
            ValueError: no run, runs on other data, images, options, seeds or counted pixels, or one name (of a model,
                attack or defence) for different things.
        """
        if not runs:
            raise ValueError("no run given; at least one")
        first = runs[0]
        for other in runs[1:]:
            for key in ("data", "options", "seed", "region", *PRECISION):
                one, two = first.configuration.get(key), other.configuration.get(key)
                if one != two:
                    raise ValueError(f"the runs differ in {key}, so their rows do not belong into one table")
        axes: dict[str, dict[str, str]] = {f"{axis}s": {} for axis in _KEY}
        for run in runs:
            for axis, names in axes.items():
                for name, value in run.configuration[axis].items():
                    if names.setdefault(name, value) != value:
                        raise ValueError(f"{name!r} among the {axis} is not the same thing in all runs")
        records = {
            (r.model, r.attack, r.defence, r.variant, r.seed, r.image): r for run in reversed(runs) for r in run.records
        }
        skipped = list(dict.fromkeys(skip for run in runs for skip in run.skipped))
        interrupted = any(run.interrupted for run in runs)
        left_out = list(dict.fromkeys(left for run in runs for left in run.left_out))
        verdicts = list(dict.fromkeys(verdict for run in runs for verdict in run.verdicts))
        configuration = {**first.configuration, **axes}
        return cls(list(records.values()), first.classes, skipped, configuration, interrupted, left_out, verdicts)


def _columns() -> list[str]:
    shared = [
        "clean_success", "target_miou", "adversarial_miou", "pixel_accuracy", "iou_ratio", "changed", "clean_miou",
        "clean_region_miou", "clean_pixel_accuracy", *_COSTS,
    ]  # fmt: skip
    return shared + [f"{v}_{name}" for v in VARIANTS for name in ("success", "target_miou", "adversarial_miou")]


def _check_same_run(
    path: Path, header: Mapping[str, Any], configuration: Mapping[str, Any], frames: dict[str, str]
) -> None:
    """Raise a ValueError if a file of a folder was made by another run than the others.

    Args:
        frames: image → what is in its frame, by the files before this one; those of this one are added.
    """
    if "key" in header and header["key"] != cell_key(configuration, header["cell"]):
        raise ValueError(f"{path} belongs to another run than the folder's config.json; remove the file")
    for image, fingerprint in header.get("frames", {}).items():
        if frames.setdefault(image, fingerprint) != fingerprint:
            raise ValueError(f"{path} belongs to another run: its image {image} is not that of the other files")


def gathered(left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """What went wrong in the same way for several files of one cell, together."""
    together: dict[LeftOut, tuple[int, ...]] = {}
    for one in left_out:
        alike = replace(one, images=() if one.model is not None else one.images)
        together[alike] = (*together.get(alike, ()), *one.images)
    return [replace(alike, images=tuple(sorted(set(images)))) for alike, images in together.items()]


def _index(names: Sequence[Any], name: Any) -> int:
    return names.index(name) if name in names else len(names)
