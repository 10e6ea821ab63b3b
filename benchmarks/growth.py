"""How cost grows: an attack's step with the size and the number of the images, an attack with its steps, a run with
its processes.

    python benchmarks/growth.py [--sizes 256x256,512x512,512x1024,1024x2048] [--processes 1,2,4]

A freshly built network of the zoo; drawn street scenes, a patch of a tenth of the smaller side in the middle. Seconds
are of processor time, but of the clock for processes. Memory is the peak above what the process has before the attack
(Linux). "what can change" is `partial=True`. A run is `ramdefense evaluate` under torchrun, each process with one
thread; the share of the work that processes do twice (imports, models) shows as growth of the processor time.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from peak import peak_above
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attacks import PatchAttack
from evaluation.networks import build_network
from evaluation.scenes import StreetScenes
from ramdefense import PyTorchSegmenter

CLASSES = 11
STEPS = 4


def scenes_of(size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    scenes = StreetScenes(count, size)
    frames = [scenes[number] for number in range(count)]
    return torch.stack([frame.image for frame in frames]), torch.stack([frame.label for frame in frames])


def attack_on(architecture: str, size: tuple[int, int], count: int, steps: int, partial: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    network = build_network(architecture, CLASSES).eval()
    segmenter = PyTorchSegmenter(network, nb_classes=CLASSES, input_shape=(3, *size))
    images, labels = scenes_of(size, count)
    side = min(size) // 10
    place = (size[0] - side) // 2, (size[1] - side) // 2
    made = PatchAttack(
        segmenter,
        patch_shape=(side, side),
        patch_location=place,
        max_iter=steps,
        batch_size=count,
        partial=partial,
        verbose=False,
    )
    return lambda: made.generate(images, labels)


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Processor seconds, and MB of peak memory above what there was."""
    began = time.process_time()
    peak = peak_above(work)
    return time.process_time() - began, peak / 1e6


def run_with(processes: int) -> tuple[float, float]:
    """Seconds of the clock and of all processors that a small run takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            "-m", "evaluation.cli", "evaluate", "--model", "zoo:scenes-nonlocal", "--data", "scenes:2",
            "--defence", "none", "--defence", "ram", "--attack", "permute", "--images", "2", "--batch-size", "1",
            "--max-iter", "5", "--no-checks", "--out", f"{folder}/run",
        ]  # fmt: skip
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cnn")
    parser.add_argument("--sizes", default="256x256,512x512,512x1024,1024x2048")
    parser.add_argument("--images", default="1,2,4,8")
    parser.add_argument("--steps", default="2,4,8,16")
    parser.add_argument("--processes", default="1,2,4")
    arguments = parser.parse_args()
    sizes = [tuple(map(int, text.split("x"))) for text in arguments.sizes.split(",")]
    counts, steps, processes = ([int(n) for n in getattr(arguments, name).split(",")] for name in (
        "images", "steps", "processes",
    ))  # fmt: skip
    console = Console(width=120)

    table = Table(title=f"An attack of {STEPS} steps on one image, {arguments.network}")
    for column in ("image", "s", "MB", "what can change: s", "MB"):
        table.add_column(column, justify="right")
    attack_on(arguments.network, (64, 64), 1, 1, False)()  # libraries take time and memory of their own at first
    for height, width in sizes:
        costs = [
            cost(attack_on(arguments.network, (height, width), 1, STEPS, partial)) for partial in (False, True)
        ]
        table.add_row(f"{height}x{width}", *(text for s, mb in costs for text in (f"{s:.2f}", f"{mb:.0f}")))
    console.print(table)

    table = Table(title=f"256x256, {arguments.network}: a batch of images ({STEPS} steps), and steps (one image)")
    for column in ("images", "s", "s/image", "steps", "s", "s/step"):
        table.add_column(column, justify="right")
    for count, many in zip(counts, steps, strict=True):
        s, _ = cost(attack_on(arguments.network, (256, 256), count, STEPS, False))
        t, _ = cost(attack_on(arguments.network, (256, 256), 1, many, False))
        table.add_row(
            str(count), f"{s:.2f}", f"{s / count:.2f}", str(many), f"{t:.2f}", f"{t / many:.3f}"
        )
    console.print(table)

    table = Table(title="A run on 2 drawn scenes, none and RAM, by torchrun")
    for column in ("processes", "s of the clock", "over one", "s of the processors"):
        table.add_column(column, justify="right")
    first = None
    for number in processes:
        clock, processor = run_with(number)
        first = clock if first is None else first
        table.add_row(str(number), f"{clock:.1f}", f"{clock / first:.2f}", f"{processor:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
