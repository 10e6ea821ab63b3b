"""The runs of a sweep: how an attack is set, on which model, against which defence; one small ordinary run for each.

    points / MODEL / ATTACK / patch-HEIGHTxWIDTH--steps-STEPS--HASH / DEFENCE

Each is what ``evaluate`` writes, so it goes on where it was stopped and can be looked at with ``ramdefense table``. The
run of a defence begins with what the undefended run beside it has finished, rows and patches, so nothing is attacked
twice. The hash stands for images, size, seed, region and further options, so sweeps that differ in them share a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.patch import resolve_location, resolve_shape
from evaluation.contact import takes
from evaluation.experiment import evaluate
from evaluation.files import write_whole
from evaluation.fingerprints import identity, plain_value
from evaluation.frames import SegmentationData
from evaluation.given import AttackFactory, DefenceFunction
from evaluation.results import Results, read_configuration
from evaluation.store import NONE, file_name
from ramdefense.defences import defence
from ramdefense.segmenter import PyTorchSegmenter

#: Folder of the points, in the folder of a sweep.
POINTS = "points"


@dataclass(frozen=True)
class Setting:
    """How an attack is set; None: as it is by itself.

    Args:
        patch_shape: (height, width) in pixels.
        max_iter: steps.
    """

    patch_shape: tuple[int, int] | None = None
    max_iter: int | None = None

    @property
    def name(self) -> str:
        """For a folder."""
        patch = "default" if self.patch_shape is None else "{}x{}".format(*self.patch_shape)
        return f"patch-{patch}--steps-{'default' if self.max_iter is None else self.max_iter}"

    def __str__(self) -> str:
        patch = "the attack's own patch" if self.patch_shape is None else "a patch of {}×{}".format(*self.patch_shape)
        steps = "its own number of steps" if self.max_iter is None else f"{self.max_iter} steps"
        return f"{patch}, {steps}"


@dataclass(frozen=True)
class Points:
    """The runs of a sweep, in a folder.

    Args:
        folder: of the sweep.
        data: as ``evaluate`` takes them.
        common: what else ``evaluate`` is told, the same for every run: images, size, batch_size, seed, region,
            device_type.
        options: of the attacks; each goes to those that have it.
    """

    folder: Path
    data: str | SegmentationData
    common: Mapping[str, Any]
    options: Mapping[str, Any]

    def measure(
        self,
        model: tuple[str, PyTorchSegmenter],
        attack: tuple[str, AttackFactory],
        setting: Setting,
        defences: Mapping[str, DefenceFunction],
        finished: Callable[[str], None] = lambda defence: None,
    ) -> Results:
        """One attack, so set, on one model without defence and under each of these.

        Args:
            model, attack: with their names.
            setting: of the attack.
            defences: by name; ``none`` is always measured.
            finished: called after each run.

        Returns:
            The rows of all of them together.

        Raises:
            KeyboardInterrupt: a run was interrupted; what was finished is in the folder.
            ValueError, OSError: as ``evaluate``.
        """
        given = {**self.options, "patch_shape": setting.patch_shape, "max_iter": setting.max_iter}
        options = {name: value for name, value in given.items() if value is not None and takes(attack[1], name)}
        place = self.folder / POINTS / file_name(model[0]) / file_name(attack[0]) / self._folder(setting, options)
        runs = []
        for name, function in {NONE: defence(NONE), **defences}.items():
            folder = place / file_name(name)
            if name != NONE:
                _take_over(place / NONE, folder, name, function)
            results = evaluate(
                {model[0]: model[1]}, {attack[0]: attack[1]}, {name: function}, self.data,
                out=folder, verbose=False, checks=False, report=False, **self.common, **options,
            )  # fmt: skip
            if results.interrupted:
                raise KeyboardInterrupt
            runs.append(results)
            finished(name)
        return Results.joined(runs)

    def _folder(self, setting: Setting, options: Mapping[str, Any]) -> str:
        """Of the runs with this setting; no two sweeps that differ share one."""
        deciding = {name: value for name, value in self.common.items() if name not in ("batch_size", "device_type")}
        deciding |= {"data": self.data if isinstance(self.data, str) else type(self.data).__name__, **options}
        written = json.dumps({name: plain_value(value) for name, value in deciding.items()}, sort_keys=True)
        return f"{setting.name}--{hashlib.sha256(written.encode()).hexdigest()[:6]}"


def check_place(settings: Iterable[Setting], options: Mapping[str, Any], data: SegmentationData, image: int) -> None:
    """Raise a ValueError if the patch of a setting does not fit on an image of the data, where the options put it."""
    height, width = data[image].image.shape[-2:]
    for setting in settings:
        if setting.patch_shape is not None:
            resolve_shape(setting.patch_shape, (height, width))
            if options.get("patch_location") is not None:
                resolve_location(options["patch_location"], setting.patch_shape, (height, width))


def _take_over(source: Path, target: Path, name: str, function: DefenceFunction) -> None:
    """Begin the run of a defence with what the undefended run has finished; what is there already stays.

    The key of a cell is the same in both, since it depends on no other defence of its run.
    """
    if not (target / "config.json").exists():
        configuration = read_configuration(source)
        configuration["defences"] = {**configuration["defences"], name: identity(function)}
        # a folder with anything else and without this file would be no run
        write_whole(target / "config.json", json.dumps(configuration, indent=2) + "\n")
    for kind in ("patches", "times", "cells"):  # the rows last: a cell that has them is finished
        for path in sorted((source / kind).rglob("*.*")):
            held = target / kind / path.relative_to(source / kind)
            if path.is_file() and path.suffix in (".jsonl", ".json", ".safetensors") and not held.exists():
                write_whole(held, path.read_bytes())
