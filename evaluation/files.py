"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, flush it to the disk, and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_figure(path: Path, figure: Figure) -> None:
    """A figure as PNG, the same bytes for the same figure; its folder is made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    FigureCanvasAgg(figure).print_png(part, metadata={"Software": None})
    part.replace(path)


def write_lines(path: Path, header: dict[str, Any], lines: Iterable[str]) -> None:
    """A file of JSON lines whose first line tells how many follow."""
    body = list(lines)
    write_whole(path, "\n".join([json.dumps(header | {"lines": len(body)}), *body]) + "\n")


def read_lines(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Header and lines that ``write_lines`` wrote.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(first)
        if header["lines"] == len(lines):
            return header, lines
        problem = f"{len(lines)} lines instead of {header['lines']}"
    except (ValueError, KeyError, TypeError) as error:
        problem = str(error)
    raise ValueError(f"{path} is damaged ({problem}); delete it and run again")
