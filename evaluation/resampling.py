"""Resampling of images: bootstrap intervals, paired permutation tests, and p-values of many comparisons.

All of it is for figures that are functions of sums: each image brings an array of counts, the arrays are summed over
the images, and the figure is computed from the sums. A resample is then a row of weights, and all resamples together
are one product of matrices; counts are whole numbers below 2^53, so the sums are exact, whatever the order and machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]
#: Sums of many resamples, ``(R, *counts)`` → figures of each, ``(R, F)``; NaN where a figure is not defined.
Figure = Callable[[Floats], Floats]
Method = Literal["bca", "percentile"]
METHODS: tuple[str, ...] = get_args(Method)

#: Resamples whose sums are held at once, so that many classes and many images take no memory to speak of.
_BLOCK = 512
#: z0 from which on the correction for bias is not believed: less than 2.5 % of the resamples on one side.
_STRONG = float(ndtri(0.975))
#: Two figures, all of them shares or differences of shares, that are this close are the same.
_SAME = 1e-12


class Interval(NamedTuple):
    """Point estimates and the ends of their intervals, each ``(F,)``; ``low ≤ estimate ≤ high``, or NaN."""

    estimate: Floats
    low: Floats
    high: Floats


def bootstrap(
    counts: ArrayLike,
    figure: Figure,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Confidence intervals over images: n images drawn out of n with replacement, counts summed, figures computed.

    Method:
        ``"percentile"``: the quantiles (1 − level)/2 and (1 + level)/2 of the resampled figures (Efron, 1979).
        ``"bca"``: other quantiles of the same, which allow for bias and for a standard error that changes with the
        figure (Efron, "Better Bootstrap Confidence Intervals", JASA 1987; equations 14.9–14.15 of Efron and Tibshirani,
        1993): z0 from the share of resampled figures below the estimate (half of those equal to it), the acceleration
        from leaving out one image at a time. Where less than 2.5 % of the resampled figures lie on one side of the
        estimate the percentiles are taken.

        Resamples in which a figure is not defined (a class that none of their images has) are left out for this figure.
        An interval that would miss the estimate is widened up to it.

    Args:
        counts: what each image adds to the sums.
        figure: the figures from such sums, of many resamples at once.
        level: confidence of the interval, between 0 and 1.
        resamples: how many.
        seed: of the draws; for the same number of images and the same seed the same images are drawn.
        method: one of ``METHODS``.

    Shape:
        counts ``(n, *counts)``, whole numbers; figures ``(F,)``.

    Returns:
        Estimates and intervals. NaN ends where a figure rests on a single image, that is with one image, or where the
        figure is not defined without one of them: how it varies over images is then unknown.

    Raises:
        ValueError: no image, a level outside (0, 1), no resample, an unknown method.
    """
    # BCa is the default: a success rate over few images is skewed (some are fooled widely, most hardly), and its
    # intervals then hold the truth more often; over many images the two hardly differ (docs, "Uncertainty").
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a confidence between 0 and 1, for example 0.95")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: at least 1; 2000 is usual")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: one of {', '.join(map(repr, METHODS))}")
    each = _images(counts)
    images, total = len(each), each.sum(axis=0)
    estimate = figure(total[None])[0]
    without = figure(total - each)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    drawn = np.concatenate(list(_blocks(draws, each, figure)))
    low, high = np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    for column in np.flatnonzero(~np.isnan(estimate) & ~np.isnan(without).any(axis=0) & (images > 1)):
        values = drawn[:, column][~np.isnan(drawn[:, column])]
        if not values.size:
            continue
        ends = np.array([(1 - level) / 2, (1 + level) / 2])
        if method == "bca":
            ends = _corrected(ends, values, estimate[column], without[:, column])
        found = np.quantile(values, ends)
        low[column], high[column] = min(found[0], estimate[column]), max(found[1], estimate[column])
    return Interval(estimate, low, high)


def _corrected(ends: Floats, values: Floats, estimate: float, without: Floats) -> Floats:
    """The quantiles that BCa takes in place of the plain ones."""
    bias = ndtri(((values < estimate).mean() + (values <= estimate).mean()) / 2)
    if abs(bias) >= _STRONG:
        # z0 counts twice: a strong bias, known from a handful of resamples or none, would leave no width
        return ends
    deviations = without.mean() - without
    scale = 6 * (deviations**2).sum() ** 1.5
    acceleration = (deviations**3).sum() / scale if scale > 0 else 0.0
    shifted = bias + ndtri(ends)
    stretch = 1 - acceleration * shifted
    # beyond the pole, which only extreme levels reach, the formula turns round
    return ndtr(bias + shifted / stretch) if (stretch > 0).all() else ends


def permutation_test(
    one: ArrayLike, other: ArrayLike, figure: Figure, *, permutations: int = 9999, seed: int = 0
) -> Floats:
    """Two-sided p-values of ``figure(sum of other) − figure(sum of one)``, the same images in both.

    The null hypothesis: for each image, which of its two counts belongs to which side is a toss. So the counts of some
    images are swapped, and the very figures of the table, ratios of sums, are computed again: p is the share of
    permutations whose difference is at least as far from 0 as the one found. All 2^n of them if they are no more than
    ``permutations`` (p is exact, 2^(1−n) at least); else as many random ones, and the one found counts among them:
    (1 + those at least as far) / (1 + permutations), which is never too small (Phipson and Smyth, 2010).

    Args:
        one, other: what each image adds to the sums of either side.
        figure: the figures from such sums, as in ``bootstrap``.
        permutations: how many at most.
        seed: of the random ones.

    Shape:
        one and other ``(n, *counts)``; returns ``(F,)``, NaN where a figure is not defined on one side. A permutation
        that leaves it undefined counts as far from 0.

    Raises:
        ValueError: sides of different shapes, no image, no permutation.
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations}: at least 1; 9999 is usual")
    first, second = _images(one), _images(other)
    if first.shape != second.shape:
        raise ValueError(f"counts of shapes {first.shape} and {second.shape}: a paired test needs the same images")
    images, sums = len(first), (first.sum(axis=0), second.sum(axis=0))

    def difference(moved: Floats) -> Floats:
        return figure(sums[1] - moved) - figure(sums[0] + moved)

    exact = images < permutations.bit_length()
    swaps = (
        np.arange(2**images)[:, None] >> np.arange(images) & 1
        if exact
        else np.random.default_rng(seed).integers(0, 2, size=(permutations, images))
    )
    found = np.abs(difference(np.zeros_like(sums[0])[None])[0])
    far = sum(
        (~(np.abs(block) < found - _SAME)).sum(axis=0) for block in _blocks(swaps, second - first, difference)
    )
    p = far / len(swaps) if exact else (1 + far) / (1 + permutations)
    return np.where(np.isnan(found), np.nan, p)


def holm(p_values: ArrayLike) -> Floats:
    """p-values corrected for their number by Holm's step-down method (Scand. J. Statist. 6, 1979).

    Sorted upwards, the i-th of m is multiplied by m − i + 1; none is less than one before it, none more than 1. All
    that are below α hold together: the chance of a single false one is at most α, however they depend on each other.

    Shape:
        ``(m,)``; returns the same, in the same order. NaN stays NaN and does not count among the m.
    """
    p = np.asarray(p_values, dtype=np.float64)
    corrected = np.full_like(p, np.nan)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


def _images(counts: ArrayLike) -> Floats:
    each = np.asarray(counts, dtype=np.float64)
    if each.ndim < 1 or not len(each):
        raise ValueError(f"counts of shape {each.shape}: at least one image is needed")
    return each


def _blocks(weights: NDArray[np.int64], each: Floats, figure: Figure) -> Iterator[Floats]:
    """The figures of sums weighted by each row of weights, a block of rows at a time."""
    flat = each.reshape(len(each), -1)
    for start in range(0, len(weights), _BLOCK):
        sums = weights[start : start + _BLOCK].astype(np.float64) @ flat
        yield figure(sums.reshape(-1, *each.shape[1:]))
