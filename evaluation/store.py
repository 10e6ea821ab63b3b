"""The folder of a run: its configuration, and for each finished cell a file of rows, of patches and of its time.

The rows of a cell come last, so a cell with rows is finished. Their file has a checksum over itself and of the patches,
and tells what decided it; a damaged one counts as not finished.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.changes import Changes
from evaluation.claims import FOLDER as CLAIMS
from evaluation.claims import WORKERS
from evaluation.files import DamagedError, checksum, read_lines, remove_leftovers, write_lines, write_whole
from evaluation.fingerprints import versions_of
from evaluation.keys import PRECISION, cell_key
from evaluation.results import LeftOut, Record, Skipped, read_configuration, read_rows
from evaluation.survey import Survey
from evaluation.verdicts import Verdict, read_verdicts, verdict_lines

#: The defence that is none; every gain is measured against it.
NONE = "none"
_LEFT_OUT = ".left_out.jsonl"


@dataclass(frozen=True)
class Cell:
    """What decides a file of rows, beside the configuration of the run."""

    model: str
    defence: str
    attack: str
    variant: str
    chunk: int  # position of its first image among the run's images
    seed: int | None = None  # of the attack; None for the first seed of the run

    @property
    def path(self) -> str:
        """Its place in the run's folders, without a suffix."""
        folders = "/".join(file_name(name) for name in (self.model, self.attack, self.defence))
        variant = self.variant if self.seed is None else f"{self.variant}-seed{self.seed}"
        return f"{folders}/{variant}-{self.chunk:05d}"


class Store:
    """Finished cells, in a folder or, without one, the undefended patches in memory."""

    def __init__(self, folder: Path | None, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self._configuration: Mapping[str, Any] = {}
        self._survey = Survey()
        self._changes: dict[Cell, tuple[list[int], Changes]] = {}
        self._found_damaged: set[Path] = set()

    def check_free(self) -> None:
        """See that the folder holds a run, or nothing but what processes that are about to begin one have made.

        Raises:
            ValueError: It holds something else.
        """
        if self.folder is None or not self.folder.is_dir() or (self.folder / "config.json").exists():
            return
        for held in self.folder.iterdir():
            if held.suffix != ".part" and not (held.name == CLAIMS and (held / WORKERS).is_dir()):
                if (self.folder / "config.json").exists():  # another process was faster
                    return
                raise ValueError(f"{self.folder} is not empty and holds no run; choose another folder")

    def open(
        self,
        configuration: Mapping[str, Any],
        environment: Mapping[str, Any],
        survey: Survey | None = None,
        run_file: str | None = None,
    ) -> None:
        """Make the folder, or see that it holds this very run.

        Args:
            configuration: What decides the run.
            environment: What is only noted.
            survey: Of the run's frames.
            run_file: Text that would repeat the run, kept as ``run.yaml``.

        Raises:
            ValueError: The folder holds another run, or something else.
        """
        self._configuration = configuration
        if survey is not None:
            self._survey = survey
        if self.folder is None:
            return
        if self.folder.exists():
            remove_leftovers(self.folder)
        path = self.folder / "config.json"
        if not path.exists():
            self.check_free()
            packages = ("numpy", "torchvision", "adversarial-robustness-toolbox", "torchattacks", "kornia", "timm")
            extra = {**environment, **versions_of(*packages), "python": platform.python_version()}
            self._write_configuration({**configuration, "environment": extra})
        else:
            self._check_same(read_configuration(self.folder), json.loads(json.dumps(configuration)))
        if run_file is not None:
            write_whole(self.folder / "run.yaml", run_file)

    def _check_same(self, held: dict[str, Any], given: dict[str, Any]) -> None:
        """Raise a ValueError where the run that is held is not the given one."""
        completed = False
        if None in (held["data"].get("fingerprint"), given["data"].get("fingerprint")):
            # not all frames could be read, then or now: each cell tells which frames it was made from
            completed = held["data"].get("fingerprint") is None and given["data"].get("fingerprint") is not None
            fingerprint = given["data"]["fingerprint"] if completed else held["data"].get("fingerprint")
            held = {**held, "data": {**held["data"], "fingerprint": fingerprint}}
            given = {**given, "data": {**given["data"], "fingerprint": fingerprint}}
        keys = (*given, *(key for key in PRECISION if key not in given))
        differing = [key for key in keys if held.get(key) != given.get(key)]
        if differing:
            raise ValueError(
                f"{self.folder} holds another run: it differs in {', '.join(differing)}. "
                "Choose another folder, or repeat the call that began it"
            )
        if completed:
            self._write_configuration(held)

    def _write_configuration(self, configuration: Mapping[str, Any]) -> None:
        assert self.folder is not None
        write_whole(self.folder / "config.json", json.dumps(configuration, indent=2) + "\n")

    def _path(self, kind: str, cell: Cell, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / (cell.path + suffix)

    def read(self, cell: Cell, images: Sequence[int]) -> list[Record] | None:
        """The rows of a finished cell; ``None`` if it is not finished, or damaged, or lacks a frame that can be read.

        Args:
            cell: The cell.
            images: All images that it is to hold, readable or not.

        Raises:
            ValueError: The file belongs to another run; the message names it.
        """
        if self.folder is None or not self._path("cells", cell, ".jsonl").exists():
            return None
        path = self._path("cells", cell, ".jsonl")
        try:
            header, records = read_rows(self.folder, path, len(self.classes))
            self._check_patches(cell, header.get("patches"))
        except DamagedError as error:
            if error.path not in self._found_damaged:  # it is looked at again before it is computed
                self._found_damaged.add(error.path)
                warnings.warn(f"{error.path} is damaged ({error.problem}); its cell is computed again", stacklevel=2)
            return None
        if "key" in header:
            self._check_owner(path, header, cell, images)
            if any(int(image) in self._survey.fingerprints for image in header["unreadable"]):
                return None
        self._path("cells", cell, _LEFT_OUT).unlink(missing_ok=True)  # a kill may have come before this
        return records

    def _check_patches(self, cell: Cell, written: str | None) -> None:
        if written is None:
            return
        path = self._path("patches", cell, ".safetensors")
        if not path.exists():
            raise DamagedError(path, "it is gone")
        if checksum(path.read_bytes()) != written:
            raise DamagedError(path, "its checksum is another one")

    def _check_owner(self, path: Path, header: Mapping[str, Any], cell: Cell, images: Sequence[int]) -> None:
        """Raise a ValueError if a file of rows was made under another configuration or from other frames."""
        problem = None
        if header["key"] != cell_key(self._configuration, vars(cell)):
            problem = "its weights, attack, defence, options, seed, region or versions are others"
        elif {int(image) for image in (*header["frames"], *header["unreadable"])} != set(images):
            problem = "its images are others"
        else:
            held = {int(image): fingerprint for image, fingerprint in header["frames"].items()}
            now = self._survey.fingerprints
            other = [image for image in held if now.get(image, held[image]) != held[image]]
            if other:
                problem = f"image {other[0]} is another one"
        if problem is not None:
            raise ValueError(f"{path} belongs to another run: {problem}. Remove the file, or choose another folder")

    def write(self, cell: Cell, images: Sequence[int], records: Sequence[Record], changes: Changes | None) -> None:
        """Keep a finished cell.

        Args:
            cell: The cell.
            images: All images that it was to hold; ``records`` lack those that cannot be read.
            records: Its rows.
            changes: Its patches, of the images in ``records``; ``None`` where they are another cell's.

        Raises:
            OSError: A file could not be written; the message names it and says what to do.
        """
        if self.folder is None:
            if changes is not None and cell.defence == NONE:
                self._changes[cell] = [r.image for r in records], changes
            return
        header: dict[str, Any] = {
            "cell": vars(cell),
            "key": cell_key(self._configuration, vars(cell)),
            "frames": {str(r.image): self._survey.fingerprints.get(r.image) for r in records},
            "unreadable": {str(i): self._survey.unreadable[i] for i in images if i in self._survey.unreadable},
        }
        if changes is not None:
            header["patches"] = changes.save(self._path("patches", cell, ".safetensors"))
        if records:
            # in a file of their own: the rows are the same in every run, the time is not
            write_lines(self._path("times", cell, ".json"), {"seconds": records[0].seconds})
        write_lines(self._path("cells", cell, ".jsonl"), header, [r.to_json() for r in records])
        self._path("cells", cell, _LEFT_OUT).unlink(missing_ok=True)

    def changes(self, cell: Cell, images: Sequence[int] | None = None) -> Changes:
        """What the attack of a finished cell did to its images.

        Args:
            cell: The cell.
            images: Which of them, in which order; all in the order of its rows, if not given.

        Raises:
            ValueError: The cell was left out, or lacks one of the images, or its file is damaged.
        """
        if self.folder is None:
            held, changes = self._changes.get(cell, ([], None))
        elif self._path("cells", cell, ".jsonl").exists():
            rows = read_rows(self.folder, self._path("cells", cell, ".jsonl"), len(self.classes))[1]
            held, changes = [r.image for r in rows], Changes.load(self._path("patches", cell, ".safetensors"))
        else:
            held, changes = [], None
        wanted = held if images is None else list(images)
        if changes is None or not set(wanted) <= set(held):
            raise ValueError(f"there are no patches of {cell.path} for the images {wanted}: they were left out")
        return changes.take([held.index(image) for image in wanted])

    def skip(self, skipped: Skipped) -> None:
        """Note a defence or an attack that does not apply to a model."""
        if self.folder is not None:
            path = self._skipped_path(skipped.model, skipped.defence, skipped.attack)
            write_lines(path, {"skipped": vars(skipped)})

    def skipped(self, model: str, defence: str, attack: str | None) -> Skipped:
        """What ``skip`` noted."""
        return Skipped(**read_lines(self._skipped_path(model, defence, attack))[0]["skipped"])

    def _skipped_path(self, model: str, defence: str, attack: str | None) -> Path:
        assert self.folder is not None
        named = [defence, *([attack] if attack else [])]
        return self.folder / "cells" / file_name(model) / f"{'--'.join(map(file_name, named))}.skipped.jsonl"

    def verdicts(self, about: Mapping[str, Any], basis: str | None) -> list[Verdict] | None:
        """The verdicts that are held on something; ``None`` if there are none, or damaged ones.

        Args:
            about: model, attack (None: every one) and defence.
            basis: hash of what they must rest on; None: on anything.

        Raises:
            ValueError: The file belongs to another run; the message names it.
        """
        path = self._verdicts_path(about)
        if path is None or not path.exists():
            return None
        try:
            header, verdicts = read_verdicts(path)
        except DamagedError as error:
            warnings.warn(f"{error.path} is damaged ({error.problem}); its checks are made again", stacklevel=2)
            return None
        if header["key"] != cell_key(self._configuration, about):
            raise ValueError(f"{path} belongs to another run. Remove the file, or choose another folder")
        return verdicts if basis in (None, header["basis"]) else None

    def keep_verdicts(self, about: Mapping[str, Any], basis: str, verdicts: Sequence[Verdict]) -> None:
        """Keep verdicts, as ``verdicts`` gives them."""
        path = self._verdicts_path(about)
        if path is not None:
            header = {"cell": dict(about), "key": cell_key(self._configuration, about), "basis": basis}
            write_lines(path, header, verdict_lines(verdicts))

    def _verdicts_path(self, about: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        named = [about["model"], *([about["attack"]] if about["attack"] is not None else [])]
        return self.folder.joinpath("checks", *map(file_name, named), f"{file_name(about['defence'])}.jsonl")

    def leave_out(self, cell: Cell, left_out: LeftOut) -> None:
        """Note a cell that could not be computed, until it is."""
        if self.folder is not None:
            path = self._path("cells", cell, _LEFT_OUT)
            key = cell_key(self._configuration, vars(cell))
            write_lines(path, {"cell": vars(cell), "key": key, "left_out": vars(left_out)})

    def left_out(self, cell: Cell) -> LeftOut:
        """What ``leave_out`` noted."""
        return LeftOut.of(read_lines(self._path("cells", cell, _LEFT_OUT))[0]["left_out"])

    def note(self, environment: Mapping[str, Any]) -> None:
        """Add to what is only noted of the run; one process at a time."""
        if self.folder is not None:
            held = read_configuration(self.folder)
            self._write_configuration({**held, "environment": {**held.get("environment", {}), **environment}})


def file_name(name: str) -> str:
    """A name that every file system takes; different names stay different."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
