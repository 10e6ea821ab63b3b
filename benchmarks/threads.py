"""What threads cost where other processes run: a gradient of a small model with one thread, with one for each core, and
with as many that sleep while they wait.

    python benchmarks/threads.py [--rounds 1]

Beside it run as many busy processes as is said: none, and one for each core. Each measurement is a fresh process, since
the way of waiting is chosen when OpenMP loads; shown are medians over the rounds of the wall time of one gradient (the
median of five) and of its ratio to one thread in the same round. Whatever else runs on the machine runs beside all of
them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from evaluation.threads import usable_cores

GRADIENT = """
import statistics, time, torch
from torch import nn
layer = nn.TransformerEncoderLayer(96, 4, 192, batch_first=True, norm_first=True)
model = nn.Sequential(nn.Conv2d(3, 96, 8, 8), nn.Flatten(2))
images = torch.rand(2, 3, 120, 160, requires_grad=True)
def seconds():
    start = time.perf_counter()
    tokens = model(images).transpose(1, 2)
    for _ in range(4):
        tokens = layer(tokens)
    torch.autograd.grad(tokens.square().sum(), images)
    return time.perf_counter() - start
seconds()
print(statistics.median(seconds() for _ in range(5)))
"""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that only count."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def seconds(threads: int, waiting: dict[str, str]) -> float:
    """Of one gradient, in a fresh process."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = {**kept, **waiting, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", GRADIENT], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    cores = max(2, int(usable_cores()))
    ways = {
        "1 thread": (1, {}),
        f"{cores} threads": (cores, {}),
        f"{cores} threads, OMP_WAIT_POLICY=PASSIVE": (cores, {"OMP_WAIT_POLICY": "PASSIVE"}),
    }
    table = Table(title=f"one gradient of a small transformer for 2 images, {cores} cores")
    for column in ("busy processes beside it", "threads", "ms", "ratio"):
        table.add_column(column, justify="left" if column == "threads" else "right")
    for beside in (0, cores):
        times: dict[str, list[float]] = {name: [] for name in ways}
        with busy(beside):
            for _ in range(arguments.rounds):
                for name, (threads, waiting) in ways.items():
                    times[name].append(seconds(threads, waiting))
        for name, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(own, times["1 thread"], strict=True))
            table.add_row(str(beside), name, f"{1e3 * statistics.median(own):.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
