"""How far a patch reaches: success by distance from it, counted in rings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import distance_transform_edt

from evaluation.metrics import Counts
from evaluation.resampling import Floats, Method, bootstrap

#: Edges of the rings that a run counts in, in shares of the image's diagonal, so that images of any size share them.
RINGS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, math.inf)


def distance_to(mask: ArrayLike) -> NDArray[np.float64]:
    """Euclidean distance of each pixel's centre from the nearest one under the patch, in pixels; 0 under it.

    Shape:
        mask bool ``(H, W)``; returns float64 ``(H, W)``.

    Raises:
        ValueError: a mask that is not two-dimensional, or that no pixel lies under.
    """
    under = np.asarray(mask, dtype=bool)
    if under.ndim != 2:
        raise ValueError(f"mask of shape {under.shape}: one image's, (H, W), is needed")
    if not under.any():
        raise ValueError("no pixel lies under the patch, so none has a distance from it; leave this image out")
    return np.asarray(distance_transform_edt(~under), dtype=np.float64)


def success_by_distance(
    prediction: ArrayLike,
    target: ArrayLike,
    mask: ArrayLike,
    counted: ArrayLike,
    edges: Sequence[float],
    *,
    ignore_index: int = 255,
) -> tuple[Counts, Counts]:
    """Pixels on target and pixels with a target in each ring around the patch, of one image.

    Both may be summed over images, and hits / totals is a ring's success rate. If the rings cover the image (from 0 to
    ``math.inf``), they sum up to the numerator and the denominator of the image's success rate
    (``metrics.success_rate``). For an attack without a target give the labels: success is then totals − hits.

    Args:
        prediction: classes predicted under attack.
        target: the map aimed at, void where there is no target.
        mask: pixels under the patch.
        counted: pixels that count (``metrics.counted_pixels``).
        edges: ring k holds the distances from ``edges[k]``, included, to ``edges[k + 1]``, not included.
        ignore_index: void in the target.

    Shape:
        four times ``(H, W)``; returns hits and totals, int64 ``(len(edges) - 1,)``.

    Raises:
        ValueError: shapes that differ, edges that do not rise, or a mask that ``distance_to`` refuses.
    """
    guess, aim, use = np.asarray(prediction), np.asarray(target), np.asarray(counted, dtype=bool)
    borders = _rising(edges)
    distance = distance_to(mask)
    if not guess.shape == aim.shape == use.shape == distance.shape:
        raise ValueError(
            f"prediction {guess.shape}, target {aim.shape}, counted {use.shape} and mask {distance.shape} must be equal"
        )
    rings = len(borders) - 1
    ring = np.searchsorted(borders, distance, side="right") - 1
    use = use & (aim != ignore_index) & (ring >= 0) & (ring < rings)
    totals = np.bincount(ring[use], minlength=rings)
    hits = np.bincount(ring[use & (guess == aim)], minlength=rings)
    return hits.astype(np.int64), totals.astype(np.int64)


def count_rings(
    prediction: ArrayLike, labels: ArrayLike, target: ArrayLike | None, mask: ArrayLike, counted: ArrayLike
) -> Counts | None:
    """What a run keeps of one image: pixels won by the attack, and pixels that it could win, in each of ``RINGS``.

    Args:
        prediction: classes predicted under attack.
        labels: ground truth.
        target: the map aimed at; None: a pixel is won where the prediction is wrong.
        mask: pixels under the patch.
        counted: pixels that count.

    Shape:
        all ``(H, W)``; returns int64 ``(2, len(RINGS) - 1)``, or None where no pixel lies under the patch.
    """
    under = np.asarray(mask, dtype=bool)
    if not under.any():
        return None
    diagonal = math.hypot(*under.shape)
    edges = [edge * diagonal for edge in RINGS]
    hits, totals = success_by_distance(prediction, labels if target is None else target, under, counted, edges)
    return np.stack([totals - hits if target is None else hits, totals])


def distance_table(
    hits: ArrayLike,
    totals: ArrayLike,
    edges: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> pd.DataFrame:
    """Success rate in each ring, over all images, with its interval over images.

    Args:
        hits, totals: what ``success_by_distance`` counted, for each image.
        edges: of the rings.
        level, resamples, seed, method: as in ``resampling.bootstrap``.

    Shape:
        hits and totals ``(n, rings)``.

    Columns:
        from, to: the ring's edges, in pixels. pixels: its counted pixels with a target, of all images.
        success, success_low, success_high: NaN in a ring without such a pixel.

    Raises:
        ValueError: shapes that do not fit, edges that do not rise, or what ``bootstrap`` refuses.
    """
    borders = _rising(edges)
    counts = np.stack([np.asarray(hits, dtype=np.int64), np.asarray(totals, dtype=np.int64)], axis=1)
    if counts.ndim != 3 or counts.shape[2] != len(borders) - 1:
        raise ValueError(
            f"hits and totals of shape {np.shape(hits)}: (images, {len(borders) - 1}) for {len(borders)} edges"
        )
    found = bootstrap(counts, _rates, level=level, resamples=resamples, seed=seed, method=method)
    return pd.DataFrame(
        {
            "from": borders[:-1],
            "to": borders[1:],
            "pixels": counts[:, 1].sum(axis=0),
            "success": found.estimate,
            "success_low": found.low,
            "success_high": found.high,
        }
    )


def _rates(sums: Floats) -> Floats:
    """Hits and totals ``(R, 2, rings)`` → rates."""
    hits, totals = sums[:, 0], sums[:, 1]
    return np.divide(hits, totals, out=np.full_like(hits, np.nan), where=totals > 0)


def _rising(edges: Sequence[float]) -> Floats:
    if len(edges) < 2 or not all(low < high for low, high in itertools.pairwise(edges)):
        raise ValueError(f"edges={list(edges)}: at least two, rising, for example 0, 16, 32, inf")
    return np.asarray(edges, dtype=np.float64)
