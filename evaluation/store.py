"""The folder of a run: its configuration, and for each finished cell a file of rows, of patches and of its time."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.changes import Changes
from evaluation.files import read_lines, write_lines, write_whole
from evaluation.fingerprints import versions_of
from evaluation.results import Record, Skipped, seconds_of

#: The defence that is none; every gain is measured against it.
NONE = "none"


@dataclass(frozen=True)
class Cell:
    """What decides a file of rows, beside the configuration of the run."""

    model: str
    defence: str
    attack: str
    variant: str
    chunk: int  # position of its first image among the run's images

    @property
    def path(self) -> str:
        """Its place in the run's folders, without a suffix."""
        folders = "/".join(file_name(name) for name in (self.model, self.attack, self.defence))
        return f"{folders}/{self.variant}-{self.chunk:05d}"


class Store:
    """Finished cells, in a folder or, without one, the undefended patches in memory."""

    def __init__(self, folder: Path | None, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self._changes: dict[Cell, Changes] = {}

    def open(self, configuration: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Make the folder, or see that it holds this very run."""
        if self.folder is None:
            return
        path = self.folder / "config.json"
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no run; choose another folder")
            packages = ("numpy", "torchvision", "adversarial-robustness-toolbox", "torchattacks", "kornia", "timm")
            extra = {**environment, **versions_of(*packages), "python": platform.python_version()}
            write_whole(path, json.dumps({**configuration, "environment": extra}, indent=2) + "\n")
            return
        held = json.loads(path.read_text())
        given = json.loads(json.dumps(configuration))
        differing = [key for key in given if held.get(key) != given[key]]
        if differing:
            raise ValueError(
                f"{self.folder} holds another run: it differs in {', '.join(differing)}. "
                "Choose another folder, or repeat the call that began it"
            )

    def _path(self, kind: str, cell: Cell, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / (cell.path + suffix)

    def read(self, cell: Cell) -> list[Record] | None:
        """The rows of a finished cell; ``None`` if it is not finished."""
        if self.folder is None or not self._path("cells", cell, ".jsonl").exists():
            return None
        path = self._path("cells", cell, ".jsonl")
        seconds = seconds_of(self.folder, path)
        return [Record.from_json(line, len(self.classes), seconds) for line in read_lines(path)[1]]

    def write(self, cell: Cell, records: Sequence[Record], changes: Changes | None) -> None:
        """Keep a finished cell; ``changes`` is ``None`` where it is another cell's."""
        if self.folder is None:
            if changes is not None and cell.defence == NONE:
                self._changes[cell] = changes
            return
        if changes is not None:
            path = self._path("patches", cell, ".safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            changes.save(path)
        # in a file of their own: the rows are the same in every run, the time is not
        write_whole(self._path("times", cell, ".json"), json.dumps({"seconds": records[0].seconds}) + "\n")
        # the rows come last: a cell with rows is finished
        write_lines(self._path("cells", cell, ".jsonl"), {"cell": vars(cell)}, [r.to_json() for r in records])

    def changes(self, cell: Cell) -> Changes:
        """What the attack of a finished cell did to each of its images."""
        if self.folder is None:
            return self._changes[cell]
        return Changes.load(self._path("patches", cell, ".safetensors"))

    def skip(self, skipped: Skipped) -> None:
        """Note a defence or an attack that does not apply to a model."""
        if self.folder is not None:
            named = [skipped.defence, *([skipped.attack] if skipped.attack else [])]
            path = (
                self.folder / "cells" / file_name(skipped.model) / f"{'--'.join(map(file_name, named))}.skipped.jsonl"
            )
            write_lines(path, {"skipped": vars(skipped)}, [])


def file_name(name: str) -> str:
    """A name that every file system takes; different names stay different."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
