"""How often an interval over images holds the truth, on simulated images whose truth is known.

    python benchmarks/coverage.py [--experiments 1000]

The table of docs/evaluation.md, "Uncertainty". A success rate: images of 500 to 2000 pixels, each with a rate of its
own from a Beta distribution. mIoU: eight classes, from one that all images have to one that a twentieth has, the rarer
the worse recognised; its truth is that of 60 000 images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from evaluation.metrics import mean_ious
from evaluation.resampling import METHODS, Figure, Floats, bootstrap

IMAGES = (10, 20, 50, 100)
PRESENT = (1, 1, 1, 0.5, 0.5, 0.2, 0.1, 0.05)
RECOGNISED = (0.95, 0.9, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1)
MISTAKEN_FOR = (0.3, 0.3, 0.2, 0.1, 0.05, 0.02, 0.02, 0.01)
Counts = NDArray[np.int64]


def rate(sums: Floats) -> Floats:
    """Hits and totals (R, 2) → (R, 1)."""
    return sums[:, :1] / sums[:, 1:]


def miou(sums: Floats) -> Floats:
    """Margins (R, 3, C) → (R, 1)."""
    return mean_ious(sums)[:, None]


def hits(rng: np.random.Generator, images: int, a: float, b: float) -> Counts:
    """Hits and totals of each image, (n, 2)."""
    totals = rng.integers(500, 2000, images)
    return np.stack([rng.binomial(totals, rng.beta(a, b, images)), totals], axis=1)


def pictures(rng: np.random.Generator, images: int) -> Counts:
    """Margins of each image, (n, 3, C)."""
    shape = (images, len(PRESENT))
    labels = rng.poisson((rng.random(shape) < PRESENT) * rng.gamma(1, 300, shape))
    right = rng.binomial(labels, np.clip(RECOGNISED + rng.normal(0, 0.1, shape), 0, 1))
    wrong = rng.multinomial((labels - right).sum(axis=1), MISTAKEN_FOR)
    return np.stack([right, labels, right + wrong], axis=1)


def coverage(draw: Callable[[int], Counts], figure: Figure, truth: float, images: int, experiments: int) -> list[float]:
    """The share of intervals that hold the truth, for each method."""
    held = dict.fromkeys(METHODS, 0)
    for seed in range(experiments):
        data = draw(images)
        for method in METHODS:
            found = bootstrap(data, figure, resamples=1000, seed=seed, method=method)  # type: ignore[arg-type]
            held[method] += bool(found.low[0] <= truth <= found.high[0])
    return [held[method] / experiments for method in METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    experiments = parser.parse_args().experiments
    rng = np.random.default_rng(1)
    many = pictures(rng, 60_000).sum(axis=0, dtype=np.float64)
    table = Table("figure", "images", *METHODS)
    for name, draw, figure, truth in (
        ("success, Beta(2, 6)", lambda n: hits(rng, n, 2, 6), rate, 2 / 8),
        ("success, Beta(0.3, 4)", lambda n: hits(rng, n, 0.3, 4), rate, 0.3 / 4.3),
        ("mIoU", lambda n: pictures(rng, n), miou, float(miou(many[None])[0, 0])),
    ):
        for images in IMAGES:
            shares = coverage(draw, figure, truth, images, experiments)
            table.add_row(name, str(images), *(f"{100 * share:.1f}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
