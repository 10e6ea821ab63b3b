"""How many threads a process of the command line works with.

A thread for each core is right on an idle machine and wrong on any other: threads that wait for one another spin, and
on two cores that something else uses, two threads for each process were 7 to 18 times slower than one
(`benchmarks/threads.py`). So ``ramdefense`` counts the cores that are free, and where some are not, its threads sleep
while they wait. The number decides how sums are rounded, so a run keeps the one that it was begun with, wherever it
goes on.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

#: Either of them is the user's own choice.
SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
NOTE = "threads.json"


def leave_room(environment: MutableMapping[str, str]) -> None:
    """Choose the number of threads of a process that has not imported torch yet; what the user has set stays.

    Args:
        environment: Of the process. ``OMP_NUM_THREADS`` is set, which torch, MKL and OpenBLAS read when they load, and
            where not every core is free ``OMP_WAIT_POLICY``, for a run that was begun with more threads.
    """
    if any(name in environment for name in SET_BY_USER):
        return
    usable, beside = share_of(environment, usable_cores())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = free_threads(usable, beside, load, os.cpu_count() or 1)
    environment["OMP_NUM_THREADS"] = str(threads)
    if threads < int(usable):
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def free_threads(usable: float, beside: int, load: float, machine: int) -> int:
    """Free cores for each process, at least 1.

    Args:
        usable: Cores that these processes may use.
        beside: Processes that share them, this one included.
        load: Of the machine: how many processes want a core, on the mean over the last minute.
        machine: Cores of the machine. What runs elsewhere takes nothing from this process as long as it has others.

    Raises:
        ValueError: No process.
    """
    if beside < 1:
        raise ValueError(f"beside={beside}: at least 1, the process itself")
    free = min(usable, machine - math.floor(load + 0.5))
    return max(1, int(free // beside))


def share_of(environment: Mapping[str, str], cores: float) -> tuple[float, int]:
    """Cores that the processes of a launch on this machine may use, and how many processes these are.

    Args:
        environment: torchrun says `LOCAL_WORLD_SIZE`. SLURM says `SLURM_CPUS_PER_TASK`, which is for one process alone,
            or else, for each machine of a step, how many processes it has.
        cores: Those that this process may use.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        return cores, max(1, int(environment["LOCAL_WORLD_SIZE"]))
    if "SLURM_CPUS_PER_TASK" in environment:
        return min(cores, int(environment["SLURM_CPUS_PER_TASK"])), 1
    if "SLURM_STEP_TASKS_PER_NODE" in environment:
        tasks: list[int] = []
        for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
            tasks += [int(number)] * int(times or 1)
        node = int(environment.get("SLURM_NODEID", "0"))
        return cores, tasks[node] if node < len(tasks) else 1
    return cores, 1


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that this process may use: those that it is bound to, and no more than its control group's share of time.

    Args:
        groups: Where the control groups (version 2) are mounted.
        own: The file that names this process's.
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with suppress(OSError):  # there where Linux is
        named = re.search(r"^0::/(.*)$", own.read_text(), re.MULTILINE)
        group = groups / (named[1] if named else "")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the root has no limit, and "max" is none
                quota, period = (folder / "cpu.max").read_text().split()
                cores = min(cores, int(quota) / int(period))
            if folder == groups:
                break
    return cores


def keep_threads(folder: Path) -> None:
    """Work with the number of threads that a run was begun with; note the present one where it begins here.

    Args:
        folder: Of the run. One process at a time may be here.

    Raises:
        ValueError: The note does not tell a number.
        OSError: It could not be written; the message says what to do.
    """
    import torch

    from evaluation.files import write_whole

    path, own = folder / NOTE, torch.get_num_threads()
    if not path.exists():
        write_whole(path, json.dumps({"threads": own}) + "\n")
        return
    try:
        held = int(json.loads(path.read_text())["threads"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not tell a number of threads ({error}); remove it, and the run goes on with {own}"
        ) from error
    if held != own:
        warnings.warn(
            f"{folder} was begun with {held} thread{'s' * (held > 1)} and goes on so, which keeps its rounding; "
            f"this process had {own}, on {usable_cores():g} cores. A new folder takes any number",
            stacklevel=2,
        )
        torch.set_num_threads(held)
