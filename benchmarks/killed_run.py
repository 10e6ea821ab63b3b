"""A whole evaluation, killed (SIGKILL) several times in the middle, against the same one undisturbed.

    python benchmarks/killed_run.py --data camvid:PATH:test --size 120x160 --model zoo:camvid-vit … --out FOLDER

Every file of rows, of patches and of pictures must be the same, byte for byte. What tells how long something took
(times, and the tables and the page made with them) is left out: no two runs share it.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich import print

TIMED = {"times", "summary.csv", "summary.json", "report.html", "run.yaml", "claims"}


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same in both, by its place in the folder."""
    held = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in held.items() if not TIMED & set(name.parts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    known, rest = parser.parse_known_args()  # the rest is what `ramdefense evaluate` takes
    command = [sys.executable, "-m", "evaluation.cli", "evaluate", *rest, "--quiet", "--out"]
    if (known.out / "undisturbed").exists() or (known.out / "killed").exists():
        parser.error(f"--out {known.out}: it holds runs; choose another folder")

    started = time.perf_counter()
    subprocess.run([*command, str(known.out / "undisturbed")], check=True)
    took = time.perf_counter() - started
    print(f"undisturbed: {took:.0f} s")

    draw = random.Random(known.seed)
    for number in range(known.kills):
        process = subprocess.Popen([*command, str(known.out / "killed")], stdout=subprocess.DEVNULL)
        # each time it goes on from what is finished, so a share of the whole time is always in the middle
        moment = took / (known.kills + 1) * draw.uniform(0.8, 1.2)
        try:
            code = process.wait(moment)
            sys.exit(f"run {number + 1} ended with {code} before it could be killed")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        finished = len(list((known.out / "killed" / "cells").rglob("*.jsonl")))
        print(f"killed after {moment:.0f} s, {finished} cells finished")
    subprocess.run([*command, str(known.out / "killed")], check=True, stdout=subprocess.DEVNULL)

    one, other = files(known.out / "undisturbed"), files(known.out / "killed")
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if differing:
        sys.exit(f"{len(differing)} of {len(one)} files differ: {', '.join(differing[:5])}")
    print(f"all {len(one)} files are the same, byte for byte ({sum(map(len, one.values())) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
