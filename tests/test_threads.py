"""How many threads the command line takes, and that a run keeps the number that it was begun with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import linear_cnn

from evaluation.experiment import evaluate
from evaluation.scenes import StreetScenes
from evaluation.threads import free_threads, keep_threads, leave_room, share_of, usable_cores
from ramdefense.segmenter import PyTorchSegmenter


@pytest.mark.parametrize(
    ("usable", "beside", "load", "machine", "threads"),
    [
        (2, 1, 0.3, 2, 2),  # idle: the little that always runs takes no core
        (2, 1, 1.0, 2, 1),
        (2, 1, 6.0, 2, 1),  # more than busy
        (16, 1, 0.0, 16, 16),
        (16, 4, 0.0, 16, 4),
        (16, 4, 2.0, 16, 3),
        (16, 3, 0.0, 16, 5),
        (4, 1, 8.0, 64, 4),  # four cores of a large machine that has others for its load
        (4, 1, 62.0, 64, 2),
        (0.5, 1, 0.0, 8, 1),  # half a core's time
        (2.5, 1, 0.0, 8, 2),
        (1, 8, 0.0, 1, 1),
    ],
)
def test_free_cores_for_each_process(usable: float, beside: int, load: float, machine: int, threads: int) -> None:
    assert free_threads(usable, beside, load, machine) == threads


@given(st.floats(0.1, 256), st.integers(1, 64), st.floats(0, 300), st.integers(1, 256))
def test_never_more_than_there_are_and_never_none(usable: float, beside: int, load: float, machine: int) -> None:
    threads = free_threads(usable, beside, load, machine)
    assert threads >= 1
    assert threads == 1 or threads * beside <= min(usable, machine)
    assert free_threads(usable, beside, load + 1, machine) <= threads
    assert free_threads(usable, beside + 1, load, machine) <= threads


def test_no_process_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="beside=0"):
        free_threads(4, 0, 0.0, 4)


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (8, 1)),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "16"}, (8, 4)),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_STEP_TASKS_PER_NODE": "4"}, (2, 1)),
        ({"SLURM_CPUS_PER_TASK": "32"}, (8, 1)),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, (8, 4)),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, (8, 4)),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, (8, 3)),
    ],
)
def test_what_torchrun_and_slurm_say(environment: dict[str, str], share: tuple[float, int]) -> None:
    assert share_of(environment, 8) == share


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, np.inf),
        ({"": "max 100000"}, np.inf),
        ({"job/task": "50000 100000"}, 0.5),
        ({"job": "100000 100000", "job/task": "max 100000"}, 1.0),
        ({"job": "25000 100000", "job/task": "50000 100000"}, 0.25),
        ({"elsewhere": "1000 100000"}, np.inf),
    ],
)
def test_the_tightest_control_group_above_counts(tmp_path: Path, limits: dict[str, str], cores: float) -> None:
    own, groups = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("1:name=systemd:/other\n0::/job/task\n")
    for group in ("job/task", "elsewhere"):
        (groups / group).mkdir(parents=True)
    for group, limit in limits.items():
        (groups / group / "cpu.max").write_text(f"{limit}\n")
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(groups, own) == min(cores, bound)
    assert usable_cores(groups, tmp_path / "there is none") == bound


def test_what_the_user_has_set_stays() -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment = {name: "3"}
        leave_room(environment)
        assert environment == {name: "3"}


@pytest.mark.parametrize(
    ("load", "given", "chosen"),
    [
        (0.2, {}, {"OMP_NUM_THREADS": "4"}),
        (1.3, {}, {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}),
        (9.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}),
        (0.2, {"LOCAL_WORLD_SIZE": "2"}, {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_where_not_every_core_is_free_threads_sleep_while_they_wait(
    load: float, given: dict[str, str], chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.threads.usable_cores", lambda: 4.0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    environment = dict(given)
    leave_room(environment)
    assert environment == given | chosen


def test_the_command_chooses_and_the_library_does_not(tmp_path: Path) -> None:
    plugin = "import os, sys; print(os.environ.get('OMP_NUM_THREADS'), 'torch' in sys.modules)"
    (tmp_path / "plugin.py").write_text(plugin)
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}

    def told(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
            env={**kept, **environment},
        )  # fmt: skip
        return done.stdout.partition("\n")[0]

    command = "import sys; sys.argv[1:] = ['defences', '--plugin', 'plugin.py']; import evaluation.cli as c; c.main()"
    library = "import ramdefense, attacks, evaluation, evaluation.cli, plugin"
    assert told(command, LOCAL_WORLD_SIZE="100000") == "1 False"
    assert told(command, LOCAL_WORLD_SIZE="100000", OMP_NUM_THREADS="5") == "5 False"
    assert told(library, LOCAL_WORLD_SIZE="100000") == "None False"


class Watched:
    """Notes with how many threads it is made; changes nothing."""

    seen: list[int] = []  # noqa: RUF012 (emptied by the test)

    def __init__(self, target: PyTorchSegmenter) -> None: ...

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        Watched.seen.append(torch.get_num_threads())
        return x


def test_a_run_goes_on_with_the_threads_it_was_begun_with(tmp_path: Path) -> None:
    """Whoever goes on: the rounding of a sum depends on the number."""

    def run(threads: int, name: str) -> list[int]:
        Watched.seen = []
        torch.set_num_threads(threads)
        segmenter = PyTorchSegmenter(linear_cnn(nb_classes=11), 11, (3, 32, 40))
        data = StreetScenes(1, size=(32, 40))
        options: dict[str, Any] = {"checks": False, "report": False, "verbose": False}
        evaluate({"m": segmenter}, {"watched": Watched}, "none", data, out=tmp_path / name, **options)
        return Watched.seen

    assert run(2, "run") == [2]
    assert json.loads((tmp_path / "run/threads.json").read_text()) == {"threads": 2}
    for path in (tmp_path / "run/cells").rglob("*.jsonl"):
        path.unlink()  # as if it had been killed before
    with pytest.warns(UserWarning, match="begun with 2 threads and goes on so"):
        assert run(1, "run") == [2]
    assert run(1, "another") == [1]


def test_a_damaged_note_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "threads.json").write_text("two")
    with pytest.raises(ValueError, match=r"threads\.json.*remove it"):
        keep_threads(tmp_path)
