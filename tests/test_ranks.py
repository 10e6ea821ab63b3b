"""One run by several processes: the same rows, each cell once, whoever dies.

Processes that torchrun starts import everything anew, so there are few of them; the others are forked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NB_CLASSES, SHAPE, files, linear_cnn, random_images, random_labels

from evaluation import claims, experiment
from evaluation.experiment import evaluate
from evaluation.results import Results
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

PLUGIN = '''
import os, signal, time
from pathlib import Path
from attacks.catalogue import register_attack
from attacks import PermuteAttack
from evaluation import claims, experiment

experiment.CHUNK = 1
experiment.save_figure = lambda *args, **options: None  # drawing takes longer than all the rest
claims.PATIENCE = 0.05
HERE = Path(__file__).parent

# all begin at the same time, so that each gets a share of what is little work
(HERE / f"loaded-{os.getpid()}").touch()
while len(list(HERE.glob("loaded-*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)


class Logged(PermuteAttack):
    def generate(self, x, y=None, *, images=None):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and (HERE / "die").exists() and os.environ["RANK"] == "1":
            with (HERE / "died").open("a") as file:
                file.write("died\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        with (HERE / "log").open("a") as file:
            kind = type(self.estimator.model).__name__
            file.write(f"{kind} {self.defence_samples} {tuple(images)} {os.getpid()}\\n")
        time.sleep(0.1)
        return super().generate(x, y, images=images)


@register_attack("logged", summary="leaves a line for each call", paper="nobody, 2026")
def logged(estimator, **options):
    return Logged(estimator, **options)
'''


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "CHUNK", 1)
    monkeypatch.setattr(claims, "PATIENCE", 0.02)
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **options: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join("abcd"))
    for i, (image, label) in enumerate(zip(random_images(), random_labels(), strict=True)):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(root / f"images/frame-{i}.png")
        Image.fromarray(label.to(torch.uint8).numpy()).save(root / f"labels/frame-{i}.png")
    return root


# ------------------------------------------------------------------------------------------------------------ torchrun


def launched(tmp_path: Path, processes: int, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The command line, started by torchrun."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "log").write_text("")
    for path in tmp_path.glob("loaded-*"):
        path.unlink()
    tests = Path(__file__).parent
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *more,
        "-m", "evaluation.cli", "evaluate", "--model", "tiny:tiny_attention", "--model", "tiny:linear_cnn",
        "--data", f"folder:{tmp_path / 'data'}", "--attack", "logged", "--patch-size", "5x6", "--max-iter", "2",
        "--defence", "ram", "--plugin", str(tmp_path / "plugin.py"), "--out", str(tmp_path / out), "--device", "cpu",
    ]  # fmt: skip
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD", "TORCHELASTIC"))}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path)


def calls(tmp_path: Path) -> tuple[Counter[str], set[str]]:
    """How often each call of the attack was made, and by which processes."""
    lines = [line.rpartition(" ") for line in (tmp_path / "log").read_text().splitlines()]
    return Counter(call for call, _, _ in lines), {process for _, _, process in lines}


def without(held: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in held.items() if name not in names}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_and_four_processes_write_the_same_bytes_and_make_each_cell_once(data: Path, tmp_path: Path) -> None:
    written, made = {}, {}
    for processes in (1, 2, 4):
        finished = launched(tmp_path, processes, f"run-{processes}")
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("Rows, tables, patches and figures") == 1, "one of them shows the table"
        # the text that would repeat the run names its folder
        written[processes] = without(files(tmp_path / f"run-{processes}"), "run.yaml")
        made[processes], workers = calls(tmp_path)
        assert min(processes, 2) <= len(workers) <= processes
        assert not (tmp_path / f"run-{processes}/claims").exists()
    assert len(written[1]) > 30
    assert written[1] == written[2] == written[4]
    assert made[1] == made[2] == made[4], "cells and checks are made once, whoever makes them"
    assert sum(made[1].values()) > 5 * (1 + 2) + 5, "attention: none, RAM plain and adaptive; linear: none; probes"
    assert any(name.startswith("checks/") for name in written[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_again_what_died_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    finished = launched(tmp_path, 2, "restarted", "--max-restarts=1")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "died").read_text() == "died\n"
    assert not (tmp_path / "restarted/claims").exists()
    assert len(Results.load(tmp_path / "restarted").records) == 5 * (1 + 3) + 5


# -------------------------------------------------------------------------------------------------- started one by one


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


class White:
    """A white square in a corner; tells when it was asked, and by whom."""

    def __init__(self, log: Path, act: Callable[[int, Sequence[int]], None]) -> None:
        self.log, self.act, self.calls = log, act, 0

    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        self.calls += 1
        with self.log.open("a") as file:
            file.write(f"{tuple(images)} {os.getpid()}\n")
        self.act(self.calls, images)
        x[self.mask(x)[:, None].repeat(3, 1)] = 1
        return x

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -4:, -4:] = True
        return mask


def nothing(call: int, images: Sequence[int]) -> None:
    pass


def same(plain: PyTorchSegmenter) -> PyTorchSegmenter:
    return plain.with_model(plain.model)


def run(data: Path, out: Path | None, act: Callable[[int, Sequence[int]], None] = nothing, **change: Any) -> Results:
    log = Path(os.devnull) if out is None else log_of(out)

    def white(target: PyTorchSegmenter, seed: int = 0) -> White:
        return White(log, act)

    white.identity = "white"  # type: ignore[attr-defined]  # the same, whatever it does beside
    model = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    given = {"models": {"m": model}, "attacks": {"white": white}, "defences": {"same": same}} | change
    return evaluate(data=f"folder:{data}", out=out, verbose=False, checks=False, **given)


def begun(work: Callable[[], Any]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def told(results: Results) -> tuple[list[tuple[str, str, int]], list[str]]:
    return [(r.defence, r.variant, r.image) for r in results.records], [str(left) for left in results.left_out]


def until(met: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


def test_a_killed_process_costs_the_cell_that_it_held_and_no_more(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "whole")
    out = tmp_path / "run"

    def hang(call: int, images: Sequence[int]) -> None:
        if tuple(images) == (2,):
            (tmp_path / "hangs").touch()
            time.sleep(600)

    killed = begun(lambda: run(data, out, hang))
    until((tmp_path / "hangs").exists)
    helper = begun(lambda: run(data, out))
    until(lambda: len(list(out.rglob("*.jsonl"))) == 3 * 5 - 2)
    time.sleep(0.2)
    assert helper.is_alive(), "it waits for the cell, and for the one that pastes its patch"
    assert not (out / "cells/m/white/none/plain-00002.jsonl").exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    helper.join(60)
    assert helper.exitcode == 0
    assert files(out) == files(tmp_path / "whole")
    asked = Counter(line.rpartition(" ")[0] for line in log_of(out).read_text().splitlines())
    assert asked == {f"({image},)": 3 if image == 2 else 2 for image in range(5)}, "undefended and under the defence"


def test_processes_that_open_one_new_folder_at_once_make_one_run_of_it(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "whole", images=1)
    for turn in range(5):
        out = tmp_path / f"run-{turn}"
        started = [begun(lambda out=out: run(data, out, images=1)) for _ in range(4)]
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0] * 4
        assert files(out) == files(tmp_path / "whole")
        assert len(log_of(out).read_text().splitlines()) >= 1


def test_of_two_different_runs_in_one_new_folder_one_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    codes = multiprocessing.get_context("fork").SimpleQueue()

    def one(region: str) -> None:
        try:
            run(data, out, region=region)
            codes.put("done")
        except ValueError as error:
            codes.put(str(error))

    started = [begun(lambda region=region: one(region)) for region in ("outside", "everywhere")]
    for process in started:
        process.join(60)
    answers = sorted(codes.get() for _ in started)
    assert answers[1] == "done" or answers[0] == "done"
    assert any("holds another run: it differs in region" in answer for answer in answers)
    Results.load(out)


def test_what_one_process_leaves_out_no_other_tries_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def fail_on_one(call: int, images: Sequence[int]) -> None:
        time.sleep(0.02)
        if tuple(images) == (1,):
            raise RuntimeError("no")

    answers = multiprocessing.get_context("fork").SimpleQueue()

    def one() -> None:
        results = run(data, out, fail_on_one, keep_going=True)
        answers.put(told(results))

    started = [begun(one) for _ in range(3)]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 3
    first, *rest = [answers.get() for _ in started]
    assert all(answer == first for answer in rest)
    alone = run(data, tmp_path / "alone", fail_on_one, keep_going=True)
    assert first == told(alone)
    assert len(first[1]) == 3, "plain on both, and the pasted one that there is no patch for"
    asked = Counter(line.rpartition(" ")[0] for line in log_of(out).read_text().splitlines())
    assert asked == {f"({image},)": 2 for image in range(5)}, "undefended and under the defence"
    # the same command again tries again
    assert not run(data, out, keep_going=True).left_out


def test_what_does_not_apply_is_tried_by_one_process(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def refuse(call: int, images: Sequence[int]) -> None:
        until(lambda: len(list(out.glob("claims/workers/*"))) == 2)
        raise NotApplicableError("no: really not")

    answers = multiprocessing.get_context("fork").SimpleQueue()

    def one() -> None:
        results = run(data, out, refuse, images=1)
        answers.put((len(results.records), results.skipped))

    started = [begun(one) for _ in range(2)]
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    found = [answers.get(), answers.get()]
    assert found[0] == found[1]
    assert [(s.defence, s.attack, s.reason) for s in found[0][1]] == [("none", "white", "no"), ("same", "white", "no")]
    assert len(log_of(out).read_text().splitlines()) == 2, "once undefended, once under the defence"


def test_several_processes_need_a_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes and no folder .* --out"):
        run(data, None)
