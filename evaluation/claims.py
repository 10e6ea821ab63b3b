"""Work that several processes share through a folder, each piece of it taken by one of them.

Nothing but files: the processes need not know of each other, may start and end at any time, and one that dies loses
only what it had in work. A process has a file in ``claims/workers`` which it touches every few seconds; a piece is
taken by creating ``claims/PIECE.claim``, which names that worker, and is free again when the file is gone or the worker
dead. Two that take over a dead one's piece at the same moment may both do it: what is done twice must come out the
same, and its files must be written whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evaluation.files import alive, unwritable

#: Seconds between two signs of life.
BEAT = 10.0
#: Seconds without one after which another machine's process counts as dead; NFS may keep an old time for 60.
SILENCE = 180.0
#: Seconds between two looks at what another process has in work.
PATIENCE = 0.5
FOLDER, WORKERS = "claims", "workers"
_CLAIM, _MARK = ".claim", ".mark"
_AT_WORK, _FINISHED = "at work", "finished"


class Claims:
    """This process among those that work on a folder, one object in each; without a folder, the only one.

    Used as a context, which gives back what is held on the way out. It is left together: who has made a mark waits
    until all that are at work have finished, too, and so have seen it.

    Args:
        folder: Of the run; None: every piece is this process's.

    Raises:
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / FOLDER
        self.worker = f"{machine()}.{os.getpid()}.{secrets.token_hex(4)}"
        self._state = _AT_WORK
        self._marked: set[str] = set()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        if self.folder is not None:
            self._sign_of_life()
            self._beating.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.folder is None:
            return
        try:
            if exception[0] is None and self._marked:
                self._state = _FINISHED
                self._sign_of_life()
                while any(_read(self._file(w)) != _FINISHED for w in self._workers() if w != self.worker):
                    self.wait()
        finally:
            self._ended.set()
            self._beating.join()
            self._tidy()

    # ------------------------------------------------------------------------------------------------------- pieces

    def take(self, piece: str) -> bool:
        """Whether the piece is this process's from now on; not if another one has it.

        Args:
            piece: Its name, a path below the folder.
        """
        path = self._path(piece, _CLAIM)
        if path is None:
            return True
        try:
            self._make(path, self._create)
        except FileExistsError:
            holder = _read(path)
            if holder is None or self._works(holder, path):
                return False
            self._make(path, self._replace)
            return _read(path) == self.worker
        return True

    def release(self, piece: str) -> None:
        """Give a piece back, done or not."""
        path = self._path(piece, _CLAIM)
        if path is not None and _read(path) == self.worker:
            path.unlink(missing_ok=True)

    def mark(self, piece: str) -> None:
        """Say to all that are at work that a piece of which no file tells so is settled: done, or tried in vain."""
        path = self._path(piece, _MARK)
        self._marked.add(piece)
        if path is not None:
            self._make(path, self._replace)

    def marked(self, piece: str) -> bool:
        """Whether a process that is still there, this one or another, has marked the piece."""
        if piece in self._marked:
            return True
        path = self._path(piece, _MARK)
        worker = None if path is None else _read(path)
        return bool(path is not None and worker and self._works(worker, path))

    @contextmanager
    def alone(self, piece: str) -> Iterator[None]:
        """For what every process does, one after the other."""
        while not self.take(piece):
            self.wait()
        try:
            yield
        finally:
            self.release(piece)

    def wait(self) -> None:
        """A moment between two looks at what others do."""
        time.sleep(PATIENCE)

    # ------------------------------------------------------------------------------------------------------ workers

    def _path(self, piece: str, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / (piece + suffix)

    def _file(self, worker: str) -> Path:
        assert self.folder is not None
        return self.folder / WORKERS / worker

    def _workers(self) -> list[str]:
        """Those that live."""
        assert self.folder is not None
        try:
            names = os.listdir(self.folder / WORKERS)
        except FileNotFoundError:
            return []
        return [name for name in names if self._works(name, self._file(name))]

    def _works(self, worker: str, path: Path) -> bool:
        """Whether a worker lives: its process does, and it gave a sign of life not long ago.

        Args:
            worker: Its name; empty in a file that was made and not written yet, which speaks for itself.
            path: The file that it is named in.
        """
        if worker == self.worker:
            return True
        host, _, process = worker.rpartition(".")[0].rpartition(".")
        if host == machine() and process.isdigit() and not alive(int(process)):
            return False
        try:
            return self._now() - (self._file(worker) if worker else path).stat().st_mtime < SILENCE
        except FileNotFoundError:
            return False

    def _now(self) -> float:
        """When this process last gave a sign of life, by the clock of the file system: machines' clocks differ."""
        own = self._file(self.worker)
        if not own.exists():  # removed by one that held this process for dead
            self._sign_of_life()
        return own.stat().st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the next one may get through
                self._sign_of_life()

    def _sign_of_life(self) -> None:
        self._make(self._file(self.worker), self._write_state)

    def _write_state(self, path: Path) -> None:
        path.write_text(self._state)

    def _create(self, path: Path) -> None:
        with path.open("x") as file:
            file.write(self.worker)

    def _replace(self, path: Path) -> None:
        part = path.with_name(f"{path.name}.{self.worker}")
        part.write_text(self.worker)
        os.replace(part, path)

    def _make(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write a file whose folder may be missing, or vanish when another process tidies up.

        Raises:
            FileExistsError: ``write`` does.
            OSError: It cannot be written; the message says what to do.
        """
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise unwritable(path, error) from error
            try:
                return write(path)
            except FileNotFoundError:
                continue
            except FileExistsError:
                raise
            except OSError as error:
                raise unwritable(path, error) from error

    def _tidy(self) -> None:
        """Remove what this process and the dead leave behind; the folder itself, if nothing else is in it."""
        assert self.folder is not None
        own = self._file(self.worker)
        for folder, _, names in os.walk(self.folder, topdown=False):  # what vanishes meanwhile is passed over
            for path in (Path(folder, name) for name in names):
                worker = path.name if path.parent.name == WORKERS else _read(path)
                if worker is not None and (worker == self.worker or not self._works(worker, path)) and path != own:
                    path.unlink(missing_ok=True)
        own.unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.folder, topdown=False):
            with suppress(OSError):  # another one is at work in it
                os.rmdir(folder)


@functools.cache
def machine() -> str:
    """Where process numbers mean the same as here: machines and containers may share a name, and reboot."""
    parts = []
    with suppress(OSError):  # there where Linux is
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return f"{platform.node()}-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:8]}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
