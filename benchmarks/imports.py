"""What it costs to import the packages, and to ask the command line for something.

    python benchmarks/imports.py [--rounds 2]

Each row is a fresh process; each round runs every row once, one after the other, and shown are medians of the processor
time of a whole process, Python's own start included. "beyond torch" is what it has over `import torch` in the same
round. Every file is compiled before, in a folder of this program's own, as an installed package is. The most expensive
packages of a row are from one more process with `-X importtime`, by the share of it that their own files take.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter

from rich.console import Console
from rich.table import Table

COMMAND = "import sys; sys.argv = ['ramdefense', *{!r}.split()]; from evaluation.cli import main; main()"
ROWS = {
    "torch": "import torch",
    "ramdefense": "import ramdefense",
    "attacks": "import attacks",
    "evaluation": "import evaluation",
    "ramdefense.harden": "from ramdefense import harden",
    "ramdefense.PyTorchSegmenter": "from ramdefense import PyTorchSegmenter",
    "$ ramdefense --help": COMMAND.format("--help"),
    "$ ramdefense models": COMMAND.format("models"),
    "$ ramdefense defences": COMMAND.format("defences"),
    "$ ramdefense papers": COMMAND.format("papers"),
}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| \s*(\S+)")


def seconds(code: str, environment: dict[str, str]) -> float:
    """Processor time of a fresh process."""
    before = os.times()
    _run(["-c", code], environment)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def dearest(code: str, environment: dict[str, str], number: int = 3) -> list[tuple[str, float]]:
    """Packages, and the share of all the time of imports that their own files take."""
    spent: Counter[str] = Counter()
    for took, module in _LINE.findall(_run(["-X", "importtime", "-c", code], environment)):
        spent[module.partition(".")[0]] += int(took)
    return [(package, took / spent.total()) for package, took in spent.most_common(number)]


def _run(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    table = Table(title=f"processor time of a fresh process, medians of {arguments.rounds} rounds; seconds")
    table.add_column("import", no_wrap=True)
    for column in ("seconds", "beyond torch"):
        table.add_column(column, justify="right")
    table.add_column("the most expensive packages in it")
    with tempfile.TemporaryDirectory() as compiled:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": compiled, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        for name in ("ramdefense.PyTorchSegmenter", "$ ramdefense models", "$ ramdefense papers"):  # all that is timed
            _run(["-c", ROWS[name]], environment)
        times: dict[str, list[float]] = {name: [] for name in ROWS}
        for _ in range(arguments.rounds):
            for name, code in ROWS.items():
                times[name].append(seconds(code, environment))
        for name, code in ROWS.items():
            beyond = statistics.median(own - torch for own, torch in zip(times[name], times["torch"], strict=True))
            table.add_row(
                name,
                f"{statistics.median(times[name]):.2f}",
                f"{beyond:+.2f}" if beyond > 0 else "less",
                ", ".join(f"{package} {share:.0%}" for package, share in dearest(code, environment)),
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
