"""Files that are there whole or not at all, and in which any damage shows."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PART = re.compile(r"\.(?P<pid>\d{1,9})(?:@(?P<host>.+))?\.part$")
#: The headers of files that were written before files had checksums.
_WITHOUT_CHECKSUM = ({"cell", "lines"}, {"skipped", "lines"}, {"seconds"})


class DamagedError(ValueError):
    """A file of a run does not hold what was written; the message names it."""

    def __init__(self, path: Path, problem: object) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path} is damaged ({problem}); repeat the run, which computes it again")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, flush it to the disk, and move it there.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; the message names it and says what to do.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}@{platform.node()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OSError:
    """What is raised where a file of a run could not be written; names it and says what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = f"make room for {path.parent}" if full else f"see that {path.parent} can be written to"
    message = f"{path} could not be written ({error.strerror or error}); {remedy} and repeat the call, "
    return OSError(error.errno, f"{message}which goes on from what is finished")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written; what another one may be writing stays."""
    # os.walk passes over what another process removes meanwhile
    for path in (Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        found = _PART.search(path.name)
        if found and found["host"] in (None, platform.node()) and not alive(int(found["pid"])):
            path.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether another process has that number; where there is no asking (Windows), yes."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is someone else's
        return True
    return True


def checksum(content: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_figure(path: Path, figure: Figure) -> None:
    """A figure as PNG, the same bytes for the same figure; its folder is made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}@{platform.node()}.part")
    FigureCanvasAgg(figure).print_png(part, metadata={"Software": None})
    part.replace(path)


def write_lines(path: Path, header: dict[str, Any], lines: Iterable[str] = ()) -> None:
    """A file of JSON lines; the first, the header, tells how many follow and has a checksum over itself and them."""
    body = list(lines)
    write_whole(path, _sealed(header | {"lines": len(body)}, "".join(f"{line}\n" for line in body).encode()))


def read_lines(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Header and lines that ``write_lines`` wrote.

    Raises:
        DamagedError: the file is not, byte for byte, what was written.
    """
    content = path.read_bytes()
    first, _, body = content.partition(b"\n")
    try:
        header = json.loads(first)
        lines = body.decode().splitlines()
        if len(lines) != header.get("lines", 0):
            raise ValueError(f"{len(lines)} lines instead of {header.get('lines', 0)}")
        if set(header) in _WITHOUT_CHECKSUM:
            return header, lines
        del header["sha256"]
        if _sealed(header, body) != content:
            raise ValueError("its checksum is another one")
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedError(path, error if isinstance(error, ValueError) else "it has no header") from error
    return header, lines


def _sealed(header: dict[str, Any], body: bytes) -> bytes:
    """Header and body with the checksum of both."""
    seal = checksum(json.dumps(header).encode() + b"\n" + body)
    return json.dumps(header | {"sha256": seal}).encode() + b"\n" + body
