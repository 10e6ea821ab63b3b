"""Claims: who has a piece, when it is free again, and that every piece is done, by one."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
import time
from pathlib import Path

import pytest

from evaluation import claims as module
from evaluation.claims import Claims, machine
from evaluation.walk import Piece, once, settled, walk


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)


def claim(folder: Path, piece: str, worker: str) -> Path:
    path = folder / "claims" / f"{piece}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(worker)
    return path


def sign_of_life(folder: Path, worker: str, seconds_ago: float = 0.0) -> Path:
    path = folder / "claims/workers" / worker
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("at work")
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def dead_process() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return int(process.pid)


LIVING = f"{machine()}.{os.getppid()}.0"


def test_a_piece_is_one_processs_until_it_gives_it_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as mine:
        assert mine.take("a/b")
        path = tmp_path / "claims/a/b.claim"
        assert path.read_text() == mine.worker
        mine.release("a/b")
        assert not path.exists()
        claim(tmp_path, "a/b", LIVING)
        sign_of_life(tmp_path, LIVING)
        assert not mine.take("a/b")
        mine.release("a/b")
        assert path.read_text() == LIVING, "only who holds it gives it back"
    assert path.exists(), "what a living process holds stays"


@pytest.mark.parametrize(
    ("worker", "ago", "free"),
    [
        ("elsewhere.77.0", 0, False),
        ("elsewhere.77.0", module.SILENCE - 5, False),
        ("elsewhere.77.0", module.SILENCE + 5, True),
        ("elsewhere.77.0", None, True),  # it ended without giving back
        ("node.with.dots.77.0", 0, False),
        (f"{platform.node()}.DEAD.0", 0, False),  # another machine, or container, of this name
        (LIVING, 0, False),
        (LIVING, module.SILENCE + 5, True),  # it hangs, or its number is another process's
        (f"{machine()}.DEAD.0", 0, True),
        (f"{machine()}.{os.getpid()}.0", 0, True),  # this process's number, from before
        ("scribble", 0, False),
        ("scribble", None, True),
    ],
)
def test_a_claim_is_free_when_its_process_is_gone_or_silent(
    tmp_path: Path, worker: str, ago: float | None, free: bool
) -> None:
    worker = worker.replace("DEAD", str(dead_process()))
    path = claim(tmp_path, "x", worker)
    if ago is not None:
        sign_of_life(tmp_path, worker, ago)
    with Claims(tmp_path) as mine:
        assert mine.take("x") is free
        assert path.read_text() == (mine.worker if free else worker)
    assert path.exists() is not free


def test_the_clock_is_that_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is an hour ahead does not take what others hold."""
    claim(tmp_path, "x", "elsewhere.77.0")
    sign_of_life(tmp_path, "elsewhere.77.0")
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    with Claims(tmp_path) as mine:
        assert not mine.take("x")


def test_a_claim_that_names_no_one_yet_speaks_for_itself(tmp_path: Path) -> None:
    path = claim(tmp_path, "x", "")
    with Claims(tmp_path) as mine:
        assert not mine.take("x"), "it is just being made"
        os.utime(path, (time.time() - module.SILENCE - 5,) * 2)
        assert mine.take("x"), "its process died in between"


def test_of_many_one_takes_a_piece(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, takers = fork.Barrier(3), fork.SimpleQueue()

    def race() -> None:
        with Claims(tmp_path) as mine:
            for turn in range(100):
                start.wait()
                if mine.take(f"{turn}"):
                    takers.put(turn)
            start.wait()  # all are there to the end

    processes = [fork.Process(target=race) for _ in range(3)]
    for process in processes:
        process.start()
    taken = [takers.get() for _ in range(100)]
    for process in processes:
        process.join()
    assert sorted(taken) == list(range(100))
    assert takers.empty()


def test_when_two_take_over_at_once_both_may_do_it_and_nothing_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        two.worker = LIVING
        sign_of_life(tmp_path, LIVING)
        path = claim(tmp_path, "x", "gone.1.0")
        works = Claims._works
        second: list[bool] = []

        def meanwhile(self: Claims, worker: str, file: Path) -> bool:
            found = works(self, worker, file)
            if self is one and not second:
                second.append(True)
                second.append(two.take("x"))  # both have seen the dead one's claim
            return found

        monkeypatch.setattr(Claims, "_works", meanwhile)
        assert one.take("x")
        assert second[1]
        two.release("x")
        assert path.read_text() == one.worker, "the last one to write it holds it"
        one.release("x")
        assert not path.exists()


def test_a_mark_is_good_as_long_as_who_made_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "claims/x.mark"
    with Claims(tmp_path) as mine:
        assert not mine.marked("x")
        claim(tmp_path, "x", LIVING).rename(path)
        life = sign_of_life(tmp_path, LIVING)
        assert mine.marked("x")
        life.unlink()
        assert not mine.marked("x")
        mine.mark("x")
        assert mine.marked("x")
    with Claims(tmp_path) as later:
        assert not later.marked("x")


def test_nothing_is_left_of_the_last_and_of_the_dead(tmp_path: Path) -> None:
    claim(tmp_path, "m/a", f"{machine()}.{dead_process()}.0")
    sign_of_life(tmp_path, f"{machine()}.{dead_process()}.0")
    with Claims(tmp_path) as mine:
        mine.take("m/b")
        mine.mark("m/c")
    assert list(tmp_path.iterdir()) == []


def test_who_has_marked_leaves_when_the_others_have_finished(tmp_path: Path) -> None:
    left = threading.Event()

    def leave() -> None:
        with Claims(tmp_path) as mine:
            mine.mark("x")
        left.set()

    life = sign_of_life(tmp_path, LIVING)
    thread = threading.Thread(target=leave)
    thread.start()
    assert not left.wait(0.1)
    assert (tmp_path / "claims/x.mark").exists()
    life.write_text("finished")
    assert left.wait(5)
    thread.join()


def test_an_interrupt_does_not_wait_for_others(tmp_path: Path) -> None:
    sign_of_life(tmp_path, LIVING)

    def interrupted() -> None:
        with Claims(tmp_path) as mine:
            mine.take("y")
            mine.mark("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.rglob("*.claim"))


def test_signs_of_life_go_on_while_the_process_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    with Claims(tmp_path) as mine:
        file = tmp_path / "claims/workers" / mine.worker
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 5
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > time.time() - 60


def test_without_a_folder_everything_is_ours() -> None:
    done = list[str]()
    with Claims(None) as mine:
        assert mine.take("x")
        assert mine.take("x")
        once(settled("y", lambda: done.append("y"), mine), mine)
        once(settled("y", lambda: done.append("y"), mine), mine)
        with mine.alone("z"):
            done.append("z")
    assert done == ["y", "z"]


# --------------------------------------------------------------------------------------------------------------- walks


def file_piece(folder: Path, name: str, needs: str | None = None, slow: float = 0.0) -> Piece:
    """A file, of which each making leaves a line."""
    path = folder / name

    def make() -> None:
        time.sleep(slow)
        with (folder / "log").open("a") as log:
            log.write(f"{name} {os.getpid()}\n")
        path.write_text(name)

    return Piece(name, path.exists, make, lambda: needs is None or (folder / needs).exists())


def worker(folder: Path, ready: str = "") -> None:
    module.PATIENCE = 0.01
    with Claims(folder) as mine:
        pieces = [file_piece(folder, f"a{i}", slow=0.002) for i in range(20)]
        pieces += [file_piece(folder, f"b{i}", needs=f"a{19 - i}") for i in range(20)]
        walk(pieces, mine)
        once(settled("tables", lambda: (folder / "log").open("a").write("tables 0\n") and None, mine), mine)


def test_processes_that_walk_over_the_same_pieces_do_each_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=worker, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    made = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    pieces = sorted([f"{letter}{i}" for letter in "ab" for i in range(20)])
    assert sorted(name for name, _ in made if name != "tables") == pieces
    assert len({process for _, process in made}) > 2, "one process alone did all"
    assert not (tmp_path / "claims").exists()


def test_what_a_killed_process_held_is_done_by_another(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")

    def hold() -> None:
        with Claims(tmp_path) as mine:
            mine.take("a3")
            (tmp_path / "held").touch()
            time.sleep(600)

    holder = fork.Process(target=hold)
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    helper = fork.Process(target=worker, args=(tmp_path,))
    helper.start()
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("[ab][0-9]*"))) < 38 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert helper.is_alive(), "it waits for the piece, and for the one that needs it"
    assert not (tmp_path / "a3").exists()
    os.kill(int(holder.pid), signal.SIGKILL)
    holder.join()
    helper.join(20)
    assert helper.exitcode == 0
    assert (tmp_path / "a3").exists()
    assert not (tmp_path / "claims").exists()


def test_an_error_gives_the_piece_back(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with Claims(tmp_path) as mine:
        with pytest.raises(RuntimeError):
            walk([Piece("x", lambda: False, fail)], mine)
        assert not list(tmp_path.rglob("*.claim"))


def test_a_piece_that_was_finished_since_the_last_look_is_not_done_again(tmp_path: Path) -> None:
    looks = iter([False, True])
    with Claims(tmp_path) as mine:
        walk([Piece("x", lambda: next(looks), lambda: pytest.fail("done again"))], mine)
