"""A run's folder after kills, damage, full disks and files of other runs."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import NB_CLASSES, SHAPE, files, linear_cnn, random_images, random_labels
from torch import Tensor
from typer.testing import CliRunner

from evaluation import experiment, report
from evaluation.cli import app
from evaluation.datasets import FolderData, TorchvisionData
from evaluation.experiment import evaluate
from evaluation.files import DamagedError, read_lines, remove_leftovers, write_lines, write_whole
from evaluation.frames import Frame
from evaluation.results import LeftOut, Record, Results
from ramdefense.segmenter import PyTorchSegmenter

CLASSES = tuple("abcd")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images in a file, no figures, and a page of few resamples."""
    monkeypatch.setattr(experiment, "CHUNK", 2)
    monkeypatch.setattr(report, "RESAMPLES", 20)
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images and label maps, as ``folder:PATH`` reads them."""
    root = tmp_path / "data"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for i, (image, label) in enumerate(zip(random_images(), random_labels(), strict=True)):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(root / f"images/frame-{i}.png")
        Image.fromarray(label.to(torch.uint8).numpy()).save(root / f"labels/frame-{i}.png")
    return root


class White:
    """A white square in a corner, which depends on the seed."""

    made: list[tuple[int, ...]] = []  # noqa: RUF012 (emptied by the tests)

    def __init__(self, target: PyTorchSegmenter, seed: int = 0, side: int = 4) -> None:
        self.side, self.right = side, seed % 2 == 0

    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        White.made.append(tuple(images))
        x[self.mask(x)[:, None].repeat(3, 1)] = 1
        return x

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -self.side :, slice(-self.side, None) if self.right else slice(self.side)] = True
        return mask


def white(target: PyTorchSegmenter, seed: int = 0, side: int = 4) -> White:
    return White(target, seed, side)


def black(target: PyTorchSegmenter, seed: int = 0, side: int = 4) -> White:
    return White(target, seed, side)


def same(plain: PyTorchSegmenter) -> PyTorchSegmenter:
    return plain.with_model(plain.model)


def other(plain: PyTorchSegmenter) -> PyTorchSegmenter:
    return plain.with_model(plain.model)


def segmenter(seed: int = 0) -> PyTorchSegmenter:
    return PyTorchSegmenter(linear_cnn(seed=seed), NB_CLASSES, SHAPE)


def run(source: Path | Any, out: Path | None, **change: Any) -> Results:
    White.made = []
    given: dict[str, Any] = {"models": {"m": segmenter()}, "attacks": {"white": white}, "defences": {"same": same}}
    name = f"folder:{source}" if isinstance(source, Path) else source
    return evaluate(**{**given, "data": name, "out": out, "verbose": False, **change})


# --------------------------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def killed_at(monkeypatch: pytest.MonkeyPatch, write: int, before_the_move: bool) -> Callable[[], None]:
    """The process ends in its write number ``write``: with a file beside its place, or with it moved there."""
    fsync, replace, calls = os.fsync, Path.replace, {"fsync": 0, "replace": 0}

    def counted(name: str) -> bool:
        calls[name] += 1
        return calls[name] == write

    def ending_fsync(file: int) -> None:
        if counted("fsync") and before_the_move:
            raise Killed
        fsync(file)

    def ending_replace(self: Path, target: Path) -> Path:
        moved = replace(self, target)
        if counted("replace") and not before_the_move:
            raise Killed
        return moved

    monkeypatch.setattr(os, "fsync", ending_fsync)
    monkeypatch.setattr(Path, "replace", ending_replace)
    return monkeypatch.undo


@pytest.mark.parametrize("before_the_move", [True, False])
def test_a_run_that_ends_in_any_of_its_writes_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, before_the_move: bool
) -> None:
    with pytest.MonkeyPatch.context() as outer:
        outer.setattr(experiment, "CHUNK", 2)
        run(folder, tmp_path / "whole", images=1)
        whole = files(tmp_path / "whole")
        in_all = len(White.made)
        for write in range(1, 100):
            out = tmp_path / f"killed-{write}"
            with pytest.MonkeyPatch.context() as inner:
                killed_at(inner, write, before_the_move)
                try:
                    run(folder, out, images=1)
                    break  # there is no such write
                except Killed:
                    pass
            done = len(White.made)
            kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.jsonl")}
            run(folder, out, images=1)
            assert files(out) == whole, f"killed in write {write}"
            assert len(White.made) in (in_all - done, in_all - done + 1), "at most the cell in work is made again"
            assert {p: p.stat().st_mtime_ns for p in kept} == kept, "what is finished is not written again"
        else:
            pytest.fail("the run never ended")
        tables = 4  # the page is one of them
        finished = 2 + 2 * 3 + 2 + 2 + 2 * 2 + tables
        assert write == finished + 1, "configuration, threads, two cells with patches, one without, pictures, verdicts"


def child(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    evaluate(
        ["tiny:tiny_attention", "tiny:linear_cnn"], ["permute", "untargeted"], ["none", "ram"], f"folder:{data}",
        out=out, max_iter=3, patch_shape=(5, 6), verbose=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_lose_no_cell_and_repeat_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked from this process, which has imported everything already, so a child lives for its run alone."""
    monkeypatch.setattr("tiny.linear_cnn", lambda: linear_cnn(NB_CLASSES))
    log, chunk = tmp_path / "log", experiment._Run._chunk

    def logged(self: Any, cell: Any, *rest: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{cell.path}\n")
        return chunk(self, cell, *rest)

    monkeypatch.setattr(experiment._Run, "_chunk", logged)
    fork = multiprocessing.get_context("fork")

    def begin(out: Path) -> Any:
        log.write_text("")
        process = fork.Process(target=child, args=(folder, out))
        process.start()
        return process

    def finished(out: Path) -> dict[str, bytes]:
        cells = out / "cells"
        return {str(p.relative_to(cells)): p.read_bytes() for p in cells.rglob("*.jsonl")}

    def written(out: Path) -> int:
        return sum(len(names) for _, _, names in os.walk(out))  # which does not mind what vanishes meanwhile

    undisturbed = begin(tmp_path / "whole")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    whole = files(tmp_path / "whole")
    cells_of_run = set(log.read_text().split())
    assert len(cells_of_run) == 2 * 3 * (1 + 3) + 2 * 3, "RAM, in three variants, on the model with attention"

    moments = random.Random(0)
    kills, rounds, amid = 0, 0, 0
    while kills < 20:
        out = tmp_path / f"killed-{rounds}"
        rounds += 1
        while True:
            before = finished(out)
            process = begin(out)
            # by what it has written, not by a clock: a busy machine must not move all kills to the start
            left = written(tmp_path / "whole") - written(out)
            enough = written(out) + moments.randint(0, left) if kills < 20 and left > 0 else math.inf
            while process.is_alive() and written(out) < enough:
                process.join(0.001)
            process.join(moments.uniform(0, 0.01) if enough < math.inf else None)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            after = finished(out)
            assert before.items() <= after.items(), "no finished cell is lost"
            again = set(log.read_text().split()) & {name.removesuffix(".jsonl") for name in before}
            assert not again, "no finished cell is repeated"
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            amid += 0 < len(after) < len(cells_of_run)
        assert files(out) == whole
        shutil.rmtree(out)
    assert kills == 20
    assert amid >= 5, "kills between the first cell and the last"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(folder, out, images=1)
    fork = multiprocessing.get_context("fork")
    dead = fork.Process(target=int)
    dead.start()
    dead.join()
    living = os.getppid()
    cells = out / "cells/m/white/none"
    names = {pid: f"plain-00002.jsonl.{pid}@{os.uname().nodename}.part" for pid in (dead.pid, living, os.getpid())}
    for name in (*names.values(), f"x.png.{dead.pid}.part", f"y.{dead.pid}@elsewhere.part", "thesis.part"):
        (cells / name).write_text("half")
    remove_leftovers(out)
    kept = {p.name for p in cells.iterdir() if p.suffix == ".part"}
    assert kept == {names[living], f"y.{dead.pid}@elsewhere.part", "thesis.part"}
    assert len(Results.load(out).records) == 3


def test_a_folder_with_only_a_leftover_is_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / f"run/config.json.{os.getpid()}@{os.uname().nodename}.part").write_text('{"models"')
    run(folder, tmp_path / "run", images=1)
    assert not list(tmp_path.rglob("*.part"))


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_change_of_any_byte_of_a_file_of_lines_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path, {"cell": {"model": "m"}, "key": "k"}, ['{"a":1}', '{"b":[2,3]}'])
    assert read_lines(path)[1] == ['{"a":1}', '{"b":[2,3]}']
    written = path.read_bytes()
    for place in range(len(written)):
        for flipped in (1, 128):
            path.write_bytes(written[:place] + bytes([written[place] ^ flipped]) + written[place + 1 :])
            with pytest.raises(DamagedError, match=r"x\.jsonl is damaged"):
                read_lines(path)
        path.write_bytes(written[:place])
        with pytest.raises(DamagedError, match=r"x\.jsonl is damaged"):
            read_lines(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("kind", ["cells/{}.jsonl", "patches/{}.safetensors", "times/{}.json"])
def test_a_damaged_file_is_named_and_its_cell_alone_computed_again(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    out = tmp_path / "run"
    run(folder, out)
    before = files(out)
    path = out / kind.format("m/white/none/plain-00002")
    damage(path)
    gone = damage is Path.unlink
    if kind.startswith("times") and gone:
        run(folder, out)
        assert White.made == [], "a time is no result: without it there is none"
        assert np.isnan(Results.load(out).summary()["seconds"][0])
        return
    if not kind.startswith("patches") and not gone:
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            Results.load(out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(folder, out)
    said = [str(w.message) for w in caught if "damaged" in str(w.message)]
    assert said == [] if gone and kind.startswith("cells") else len(said) == 1 and str(path) in said[0]
    assert White.made == [(2, 3)]
    assert files(out) == before
    Results.load(out)


def test_a_damaged_configuration_is_named(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", images=1)
    path = tmp_path / "run/config.json"
    for text in ("", "{", "[]", '{"models": {}}', path.read_text()[:100]):
        path.write_text(text)
        for call in (lambda: Results.load(tmp_path / "run"), lambda: run(folder, tmp_path / "run", images=1)):
            with pytest.raises(ValueError, match=r"config\.json is damaged"):
                call()


def test_folders_from_before_there_were_checksums_are_read_and_gone_on_with(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run(folder, out)
    for path in out.rglob("cells/**/*.jsonl"):
        first, *rest = path.read_text().splitlines()
        header = json.loads(first)
        cell = {name: value for name, value in header["cell"].items() if name != "seed"}
        rows = [{name: value for name, value in json.loads(line).items() if name != "seed"} for line in rest]
        lines = [json.dumps({"cell": cell, "lines": len(rest)}), *(json.dumps(row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    for path in out.rglob("times/**/*.json"):
        path.write_text(json.dumps({"seconds": json.loads(path.read_text())["seconds"]}) + "\n")
    loaded = Results.load(out)
    assert loaded.summary().equals(results.summary())
    assert {record.seed for record in loaded.records} == {0}
    run(folder, out)
    assert White.made == []


# -------------------------------------------------------------------------------------------------------- a full disk


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int, number: int) -> None:
    fsync, calls = os.fsync, [0]

    def filling(file: int) -> None:
        calls[0] += 1
        if calls[0] > writes:
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", filling)


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_full_disk_is_named_and_what_is_finished_stays(folder: Path, tmp_path: Path, keep_going: bool) -> None:
    run(folder, tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as inner:
        full_after(inner, 6, errno.ENOSPC)
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\); make room for .*run/"):
            run(folder, out, keep_going=keep_going)
    assert not list(out.rglob("*.part"))
    assert len(Results.load(out).records) == 2
    run(folder, out)
    assert files(out) == files(tmp_path / "whole")


def test_what_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x could not be written .* see that .*file can be written to"):
        write_whole(tmp_path / "file/x", "text")


# ----------------------------------------------------------------------------------------------- frames and label maps


def cut_image(root: Path) -> str:
    truncate(root / "images/frame-2.png")
    return r"images/frame-2\.png cannot be read as an image"


def no_image(root: Path) -> str:
    (root / "images/frame-2.png").write_text("no picture")
    return r"images/frame-2\.png cannot be read as an image"


def flipped_image(root: Path) -> str:
    flip(root / "images/frame-2.png")
    return r"images/frame-2\.png cannot be read as an image"


def cut_label(root: Path) -> str:
    truncate(root / "labels/frame-2.png")
    return r"labels/frame-2\.png cannot be read as an image"


def small_label(root: Path) -> str:
    Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).save(root / "labels/frame-2.png")
    return r"labels/frame-2\.png: the label map is 4×3 and its image 20×16"


def other_class(root: Path) -> str:
    Image.fromarray(np.full(SHAPE[1:], 77, dtype=np.uint8)).save(root / "labels/frame-2.png")
    return r"labels/frame-2\.png: class index 77 is out of range 0–3"


def coloured_label(root: Path) -> str:
    Image.fromarray(np.zeros((*SHAPE[1:], 3), dtype=np.uint8)).save(root / "labels/frame-2.png")
    return r"labels/frame-2\.png: a label map is an 8-bit index image"


@pytest.mark.parametrize(
    "spoil", [cut_image, no_image, flipped_image, cut_label, small_label, other_class, coloured_label]
)
def test_a_bad_frame_is_named_and_left_out_by_a_run_that_keeps_going(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    whole = run(folder, tmp_path / "whole")
    shutil.copytree(folder, tmp_path / "good")
    message = spoil(folder)
    for out in (None, tmp_path / "refused"):
        with pytest.raises(ValueError, match=message):
            run(folder, out)
    out = tmp_path / "run"
    results = run(folder, out, keep_going=True)
    assert [left.images for left in results.left_out] == [(2,)]
    for found in (results, Results.load(out), run(folder, None, keep_going=True)):
        assert found.left_out == results.left_out
        rows = {record.to_json() for record in found.records}
        assert rows == {record.to_json() for record in whole.records if record.image != 2}, "the others are the same"
        assert set(found.summary()["images"]) == {4}
        assert f"left out: image 2: {results.left_out[0].reason}"[:60] in shown(found)
    run(folder, out, keep_going=True)
    assert White.made == [], "still not to be read: nothing to do"
    with pytest.raises(ValueError, match=message):
        run(folder, out)
    shutil.copytree(tmp_path / "good", folder, dirs_exist_ok=True)
    run(folder, out, checks=False)
    assert White.made == [(2, 3)] * 2, "the file of rows that lacked it, undefended and defended"
    mended = run(folder, out)
    assert White.made == [(0, 4)] * 2, "the checks, which rested on other rows"
    assert mended.left_out == Results.load(out).left_out == []
    assert files(out) == files(tmp_path / "whole")


def test_a_frame_that_goes_bad_later_stays_where_it_was_read(folder: Path, tmp_path: Path) -> None:
    """Undefended rows and patches are there; the defended ones lack the frame, and their patches fit the others."""
    out = tmp_path / "run"
    whole = run(folder, out)
    shutil.rmtree(out / "cells/m/white/same")
    cut_image(folder)
    results = run(folder, out, keep_going=True, checks=False)
    assert White.made == [(0, 1), (3,), (4,)]
    assert [left.images for left in results.left_out] == [(2,)]
    rows = {record.to_json() for record in results.records}
    assert rows == {r.to_json() for r in whole.records if r.image != 2 or r.defence == "none"}
    assert Results.load(out).left_out == results.left_out


def test_a_run_without_a_readable_frame_is_refused(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        empty(path)
    with pytest.raises(ValueError, match=r"none of the 5 images can be read; the first: .*frame-0\.png"):
        run(folder, None, keep_going=True)


def test_frames_of_a_users_own_data_are_named(folder: Path) -> None:
    class Own(FolderData):
        def __getitem__(self, index: int) -> Frame:
            image, label, name = super().__getitem__(index)
            return Frame(image, label + (9 if index == 3 else 0), name)

    data = Own(folder / "images", folder / "labels", classes=CLASSES)
    with pytest.raises(ValueError, match=r"image 3 \(frame-3\): y holds the labels"):
        run(data, None)
    assert {r.image for r in run(data, None, keep_going=True).records} == {0, 1, 2, 4}


def test_frames_of_torchvision_are_named() -> None:
    class Voc:
        images = ("a.jpg", "b.jpg", "c.jpg")

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
            if index == 1:
                raise OSError("image file is truncated")
            return Image.new("RGB", (6, 5)), Image.new("P", (6, 5 + index))

    data = TorchvisionData(Voc(), classes=CLASSES)  # type: ignore[arg-type]
    assert data[0].label.shape == (5, 6)
    with pytest.raises(ValueError, match=r"frame 1 of Voc \(b\.jpg\) cannot be read \(image file is truncated\)"):
        data[1]
    with pytest.raises(ValueError, match=r"frame 2 of Voc \(c\.jpg\): the label map is 6×7 and its image 6×5"):
        data[2]


# ------------------------------------------------------------------------------------------------ attacks that raise


class Faulty(White):
    """Raises on image 2."""

    broken = True

    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        if Faulty.broken and 2 in images:
            raise RuntimeError("out of\nluck")
        return super().generate(x, y, images)


def faulty(target: PyTorchSegmenter, seed: int = 0) -> White:
    return Faulty(target, seed)


def shown(results: Results) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(results.table())
    return console.export_text()


def test_a_cell_whose_attack_raises_is_left_out_until_it_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both: dict[str, Any] = {"attacks": {"faulty": faulty, "white": white}}
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="luck"):
        run(folder, out, **both)
    assert {r.image for r in Results.load(out).records} == {0, 1}, "what is finished stays"
    results = run(folder, out, keep_going=True, **both)
    for found in (results, Results.load(out), run(folder, None, keep_going=True, **both)):
        left = {(o.attack, o.defence, o.variant, o.images, o.seed) for o in found.left_out}
        assert left == {("faulty", *rest, (2, 3), 0) for rest in
                        (("none", "plain"), ("same", "plain"), ("same", "transfer"))}  # fmt: skip
        assert {r.image for r in found.records if r.attack == "faulty"} == {0, 1, 4}
        assert {r.image for r in found.records if r.attack == "white"} == {0, 1, 2, 3, 4}
        assert "left out: m · faulty · none · plain, images 2, 3: RuntimeError: out of luck" in shown(found)
    monkeypatch.setattr(Faulty, "broken", False)
    run(folder, out, keep_going=True, checks=False, **both)
    assert White.made == [(2, 3)] * 2
    again = run(folder, out, keep_going=True, **both)
    assert again.left_out == Results.load(out).left_out == []
    run(folder, tmp_path / "whole", **both)
    assert files(out) == files(tmp_path / "whole")


def test_figures_show_what_there_is_and_are_drawn_again_when_there_is_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []

    def draw(path: Path, panels: Sequence[Any], **rest: Any) -> None:
        drawn.append([panel.title for panel in panels])
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def faulty_defended(target: PyTorchSegmenter, seed: int = 0) -> White:
        return Faulty(target, seed) if target.model.bias.sum() == 0 else White(target, seed)

    def zeroed(plain: PyTorchSegmenter) -> PyTorchSegmenter:
        model = linear_cnn()
        torch.nn.init.zeros_(model.bias)
        return plain.with_model(model)

    monkeypatch.setattr(experiment, "save_figure", draw)
    rest: dict[str, Any] = {"images": [2], "seed": (0, 1), "keep_going": True, "out": tmp_path / "run"}
    cut: dict[str, Any] = {"attacks": {"a": faulty_defended}, "defences": {"zeroed": zeroed, "same": same}}
    for broken, titles in ((True, ["none", "zeroed", "same"]), (False, ["none", "zeroed", "same"])):
        monkeypatch.setattr(Faulty, "broken", broken)
        run(folder, **rest, **cut)
        assert drawn == [titles] * 2, "the patch of the undefended model there is in both"
        drawn.clear()
    run(folder, **rest, **cut)
    assert drawn == [], "nothing new to show"


def test_what_failed_alike_is_told_once() -> None:
    cell = {"model": "m", "attack": "a", "defence": "none", "variant": "plain", "seed": 0}
    left_out = [LeftOut("no luck", (2 * i, 2 * i + 1), **cell) for i in range(40)]  # type: ignore[arg-type]
    text = shown(Results([record()], CLASSES, left_out=[*left_out, LeftOut("cut", (7,)), LeftOut("cut", (8,))]))
    assert "left out: m · a · none · plain, images 0 … 79: no luck" in text
    assert text.count("left out") == 3


def record(**change: Any) -> Record:
    counts = np.eye(4, dtype=np.int64)
    given = dict.fromkeys(("clean", "whole", "adversarial", "changed", "aim", "aim_clean"), counts)
    return Record(**{"model": "m", "attack": "a", "defence": "none", "variant": "plain", "image": 0, "name": "n",
                     **given, **change})  # fmt: skip


def test_the_command_finishes_the_rest_and_ends_with_1(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tiny.linear_cnn", lambda: linear_cnn(NB_CLASSES))
    cut_image(folder)
    command = ["evaluate", "--model", "tiny:linear_cnn", "--data", f"folder:{folder}", "--attack", "untargeted",
               "--defence", "none", "--max-iter", "1", "--quiet", "--out", str(tmp_path / "run")]  # fmt: skip
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 2
    assert "frame-2.png cannot be read" in stopped.stderr
    done = CliRunner().invoke(app, [*command, "--keep-going"])
    assert done.exit_code == 1, done.output
    assert "left out: image 2:" in " ".join(done.output.split())
    shown_again = CliRunner().invoke(app, ["table", str(tmp_path / "run")])
    assert shown_again.exit_code == 0
    assert done.output.startswith(shown_again.output)


# ------------------------------------------------------------------------------------------------- files of other runs


class Shifted(FolderData):
    def __getitem__(self, index: int) -> Frame:
        image, label, name = super().__getitem__(index)
        return Frame(brighter(image), label, name)


def brighter(image: Tensor) -> Tensor:
    return image * 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"models": {"m": segmenter(seed=1)}},
        {"attacks": {"white": black}},
        {"defences": {"same": other}},
        {"side": 3},
        {"seed": 1},
        {"region": "everywhere"},
        {"images": [0, 1, 2, 4]},
        {"data": "shifted"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_of_rows_of_another_run_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    if "data" in change:
        change = {"data": Shifted(folder / "images", folder / "labels", classes=CLASSES)}
    run(folder, tmp_path / "run")
    run(folder, tmp_path / "other", **change)
    name = "cells/m/white/same/plain-00002"
    for suffix in (".jsonl", ".safetensors"):
        kind = name if suffix == ".jsonl" else name.replace("cells", "patches")
        shutil.copy(tmp_path / "other" / f"{kind}{suffix}", tmp_path / "run" / f"{kind}{suffix}")
    with pytest.raises(ValueError, match=r"same/plain-00002\.jsonl belongs to another run"):
        run(folder, tmp_path / "run")
    if "images" not in change:  # whose rows are right, though not where they belong
        with pytest.raises(ValueError, match=r"belongs to another run"):
            Results.load(tmp_path / "run")


def test_rows_under_another_name_are_refused(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run")
    cells = tmp_path / "run/cells/m/white"
    shutil.copy(cells / "none/plain-00000.jsonl", cells / "same/plain-00000.jsonl")
    with pytest.raises(ValueError, match=r"same/plain-00000\.jsonl belongs to another run"):
        run(folder, tmp_path / "run")


def test_other_versions_are_another_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, tmp_path / "run")
    monkeypatch.setattr(experiment, "versions_of", lambda *names: dict.fromkeys(names, "99"))
    run(folder, tmp_path / "other")
    shutil.copy(tmp_path / "other/config.json", tmp_path / "run/config.json")
    with pytest.raises(ValueError, match="belongs to another run"):
        run(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another run"):
        Results.load(tmp_path / "run")


# --------------------------------------------------------------------------------------------------------------- seeds


def test_several_seeds_have_files_of_their_own_and_the_first_those_of_a_run_with_one(
    folder: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path / "one")
    results = run(folder, tmp_path / "two", seed=(0, 5))
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    cells = {name for name in one if name.startswith(("cells", "patches"))}
    assert all(two[name] == one[name] for name in cells)
    assert {name for name in two if name.startswith(("cells", "patches"))} - cells == {
        name.replace("plain-", "plain-seed5-").replace("transfer-", "transfer-seed5-") for name in cells
    }
    loaded = Results.load(tmp_path / "two")
    assert loaded.rows.equals(results.rows)
    assert loaded.summary().equals(results.summary())
    assert {(r.image, r.seed) for r in loaded.records} == {(i, s) for i in range(5) for s in (0, 5)}
    run(folder, tmp_path / "two", seed=(0, 5))
    assert White.made == []
    with pytest.raises(ValueError, match="differs in seed"):
        run(folder, tmp_path / "two", seed=(5, 0))


@pytest.mark.parametrize("seed", [(), (1, 1), (1, True), "01", 1.5])
def test_seeds_that_are_none(folder: Path, seed: Any) -> None:
    with pytest.raises(ValueError, match="seed="):
        run(folder, None, seed=seed)


def test_the_worst_variant_is_taken_for_each_image_and_seed_and_counts_are_summed() -> None:
    def made(image: int, seed: int, variant: str, wrong: int) -> Record:
        counts = np.zeros((4, 4), dtype=np.int64)
        counts[0, 0], counts[0, 1] = 10 - wrong, wrong
        return record(image=image, seed=seed, variant=variant, adversarial=counts, aim=None, aim_clean=None)

    fooled = {(0, 0): (1, 4), (1, 0): (6, 2), (0, 7): (0, 0), (1, 7): (3, 9)}  # (image, seed) → plain, transfer
    records = [
        made(*key, variant, wrong)
        for key, pair in fooled.items()
        for variant, wrong in zip(("plain", "transfer"), pair, strict=True)
    ]
    (row,) = Results(records, CLASSES).summary().to_dict("records")
    assert (row["images"], row["seeds"]) == (2, 2)
    assert row["success"] == pytest.approx((4 + 6 + 0 + 9) / 40)
    assert row["plain_success"] == pytest.approx((1 + 6 + 0 + 3) / 40)
    first, second = (4 + 6) / 20, (0 + 9) / 20
    assert row["success_seed_std"] == pytest.approx(abs(first - second) / 2**0.5)
    (alone,) = Results([r for r in records if r.seed == 7], CLASSES).summary().to_dict("records")
    assert alone["seeds"] == 1
    assert np.isnan(alone["success_seed_std"])
    assert alone["success"] == pytest.approx(second)
    # a variant that lacks an image of one seed: that image counts for this seed in no variant
    fewer = [r for r in records if (r.image, r.seed, r.variant) != (1, 7, "plain")]
    (less,) = Results(fewer, CLASSES).summary().to_dict("records")
    assert less["success"] == pytest.approx((4 + 6 + 0) / 30)
