"""Resampling against scipy, definitions and truths that are known because the data are simulated."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation import metrics
from evaluation.resampling import METHODS, bootstrap, holm, permutation_test


def rate(sums: np.ndarray) -> np.ndarray:
    """Hits and totals, (R, 2) → (R, 1)."""
    return np.divide(sums[:, :1], sums[:, 1:], out=np.full_like(sums[:, :1], np.nan), where=sums[:, 1:] > 0)


def miou(sums: np.ndarray) -> np.ndarray:
    return metrics.mean_ious(sums)[:, None]


def shares(rng: np.random.Generator, images: int, a: float = 2, b: float = 6) -> np.ndarray:
    """Images of different sizes, each with a success rate of its own, a / (a + b) on the mean."""
    totals = rng.integers(500, 2000, images)
    return np.stack([rng.binomial(totals, rng.beta(a, b, images)), totals], axis=1)


counts_of_images = st.builds(
    lambda seed, images: shares(np.random.default_rng(seed), images), st.integers(0, 2**32 - 1), st.integers(2, 12)
)


# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_the_truth_as_often_as_they_say(method: str) -> None:
    rng = np.random.default_rng(0)
    for level, low, high in ((0.95, 0.90, 0.98), (0.5, 0.42, 0.58)):
        found = [
            bootstrap(shares(rng, 40), rate, level=level, resamples=200, seed=k, method=method)  # type: ignore[arg-type]
            for k in range(300)
        ]
        covered = np.mean([i.low[0] <= 0.25 <= i.high[0] for i in found])
        assert low <= covered <= high, f"{covered} of the {level} intervals hold the truth"


def test_bca_covers_a_skewed_rate_more_often() -> None:
    """Few images fooled widely, most hardly: where the percentiles fall short, BCa falls less short."""
    rng = np.random.default_rng(0)
    data = [shares(rng, 15, a=0.3, b=4) for _ in range(300)]
    truth = 0.3 / 4.3
    missed = {}
    for method in METHODS:
        found = [bootstrap(x, rate, resamples=250, seed=k, method=method) for k, x in enumerate(data)]  # type: ignore[arg-type]
        missed[method] = sum(not i.low[0] <= truth <= i.high[0] for i in found)
    assert missed["bca"] < 0.9 * missed["percentile"], missed


@pytest.mark.parametrize(("method", "name"), [("bca", "BCa"), ("percentile", "percentile")])
def test_intervals_agree_with_scipy(method: str, name: str) -> None:
    data = shares(np.random.default_rng(0), 10, a=0.3, b=3)  # skewed, so that the two methods differ
    ours = bootstrap(data, rate, resamples=40_000, seed=1, method=method)  # type: ignore[arg-type]
    theirs = stats.bootstrap(
        (data[:, 0], data[:, 1]), lambda hit, total, axis: hit.sum(axis=axis) / total.sum(axis=axis),
        paired=True, n_resamples=40_000, method=name, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.low[0] == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high[0] == pytest.approx(theirs.high, abs=0.02 * width)
    if method == "bca":
        plain = bootstrap(data, rate, resamples=40_000, seed=1, method="percentile")
        assert abs(ours.high[0] - plain.high[0]) > 0.05 * width, "else this shows nothing"


def test_weights_are_resamples() -> None:
    """The product of matrices is the sum over the images drawn, one by one."""
    data = shares(np.random.default_rng(3), 7)
    found = bootstrap(data, rate, resamples=700, seed=11, method="percentile")  # more than one block
    draws = np.random.default_rng(11).multinomial(7, np.full(7, 1 / 7), size=700)
    values = [
        sum(hit for hit, _ in drawn) / sum(total for _, total in drawn)
        for drawn in ([data[i].tolist() for i in range(7) for _ in range(row[i])] for row in draws)
    ]
    np.testing.assert_allclose([found.low[0], found.high[0]], np.quantile(values, [0.025, 0.975]), rtol=1e-12)
    assert found.estimate[0] == data[:, 0].sum() / data[:, 1].sum()


@given(counts_of_images, st.sampled_from(METHODS), st.integers(1, 50), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_an_interval_holds_its_estimate_and_knows_no_scale(
    data: np.ndarray, method: str, factor: int, seed: int
) -> None:
    options = {"resamples": 50, "seed": seed, "method": method}
    found = bootstrap(data, rate, **options)
    assert found.low[0] <= found.estimate[0] <= found.high[0]
    np.testing.assert_allclose(bootstrap(factor * data, rate, **options), found, rtol=1e-12)
    np.testing.assert_array_equal(bootstrap(data, rate, **options), found)
    # several figures at once are each what they are alone, and a share's complement has the complement's interval
    both = bootstrap(data, lambda s: np.concatenate([rate(s), 1 - rate(s)], axis=1), **options)
    np.testing.assert_array_equal([end[0] for end in both], [end[0] for end in found])
    np.testing.assert_allclose([1 - both.high[1], 1 - both.low[1]], [found.low[0], found.high[0]], atol=1e-12)


@given(counts_of_images, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_higher_level_is_a_wider_interval(data: np.ndarray, seed: int) -> None:
    ends = [bootstrap(data, rate, level=level, resamples=200, seed=seed) for level in (0.5, 0.8, 0.95, 0.99)]
    assert all(wide.low[0] <= tight.low[0] and tight.high[0] <= wide.high[0]
               for tight, wide in itertools.pairwise(ends))  # fmt: skip


def test_what_rests_on_one_image_has_no_interval() -> None:
    found = bootstrap([[3, 4]], rate)
    assert found.estimate[0] == 0.75
    assert np.isnan([found.low[0], found.high[0]]).all()
    assert np.isnan(bootstrap([[3, 4]], lambda sums: sums)[1:]).all(), "whether or not it is defined without the image"
    # a class that one image of three holds: without it there is nothing to vary
    per_class = bootstrap(
        [[[3, 2], [4, 5]], [[1, 0], [4, 0]], [[2, 0], [4, 0]]], lambda s: rate(np.moveaxis(s, 2, 1).reshape(-1, 2))
        .reshape(-1, 2)
    )  # fmt: skip
    assert np.isnan(per_class.low).tolist() == np.isnan(per_class.high).tolist() == [False, True]
    assert per_class.estimate[1] == 0.4
    nothing = bootstrap([[0, 0], [0, 0]], rate)
    assert np.isnan(nothing).all()


def test_an_estimate_beyond_all_resamples_is_still_held() -> None:
    """A class of its own in each image, never met: whichever images are drawn, fewer of these classes count."""
    images = 12
    counts = np.zeros((images, 3, images + 1), dtype=np.int64)
    counts[:, :, 0] = 100
    counts[range(images), 1, range(1, images + 1)] = 10
    found = bootstrap(counts, miou, resamples=300)
    assert found.low[0] == found.estimate[0] == pytest.approx(1 / (images + 1))
    assert found.high[0] > found.estimate[0]
    for lucky in (0, 50):  # one image unlike the others, the worse or the better one: a figure that is skewed
        counts[:, 0, 0] = 100 - lucky
        counts[0, 0, 0] = 50 + lucky
        skewed = bootstrap(counts, miou, resamples=300)
        percentile = bootstrap(counts, miou, resamples=300, method="percentile")
        assert skewed.low[0] == skewed.estimate[0] < skewed.high[0] == percentile.high[0]


def test_an_extreme_level_of_a_skewed_figure_is_no_narrower() -> None:
    data = [[0, 100]] * 59 + [[100, 100]]
    usual, extreme = (bootstrap(data, rate, level=level, resamples=500) for level in (0.95, 1 - 1e-14))
    assert extreme.low[0] <= usual.low[0] < usual.high[0] <= extreme.high[0]


# ------------------------------------------------------------------------------------------------- permutation tests


def test_an_exact_p_value_by_hand() -> None:
    # of 10 pixels each: the difference is −(4 + 3 + 1) / 30, all one way; of the 8 swaps only none and all reach it
    one, other = [[8, 10], [5, 10], [2, 10]], [[4, 10], [2, 10], [1, 10]]
    assert permutation_test(one, other, rate).tolist() == [2 / 8]
    # the differences are −4, −3, +2 and −1: |sum| = 6. Any choice of signs gives ±(10 − 2·(what is flipped)), which is
    # 6 or more where what is flipped makes 2 at most: nothing, the 1, the 2. Three, and three of the other sign
    one, other = [[4, 10], [3, 10], [0, 10], [1, 10]], [[0, 10], [0, 10], [2, 10], [0, 10]]
    assert permutation_test(one, other, rate).tolist() == [6 / 16]
    # sizes count: the small image's own rate goes from 0 to 1, and swapping it alone changes the pooled rate little
    one, other = [[90, 100], [0, 1]], [[10, 100], [1, 1]]
    # differences: found (11 − 90)/101, first swapped (91 − 10)/101, which is further, and the negatives of both
    assert permutation_test(one, other, rate).tolist() == [1.0]
    one, other = [[90, 100], [1, 1]], [[10, 100], [0, 1]]
    assert permutation_test(one, other, rate).tolist() == [0.5]
    assert permutation_test(one, one, rate).tolist() == [1.0]
    assert permutation_test([[1, 2]], [[2, 2]], rate).tolist() == [1.0], "one image shows nothing"


def test_p_values_agree_with_scipy() -> None:
    rng = np.random.default_rng(4)
    one, other = shares(rng, 8), shares(rng, 8, a=3)
    other[:, 1] = rng.integers(2000, 2500, 8)  # a patch that lies elsewhere: not the same number of pixels

    both = np.concatenate([one, other])

    def pooled(rows: np.ndarray) -> float:
        hits, totals = both[rows].sum(axis=0)
        return float(hits / totals)

    theirs = stats.permutation_test(
        (np.arange(8), np.arange(8, 16)), lambda a, b: pooled(b) - pooled(a), permutation_type="samples",
        vectorized=False, n_resamples=np.inf,
    )  # fmt: skip
    assert permutation_test(one, other, rate)[0] == pytest.approx(theirs.pvalue)
    monte_carlo = permutation_test(one, other, rate, permutations=255, seed=1)[0]
    assert monte_carlo != theirs.pvalue
    assert monte_carlo == pytest.approx(theirs.pvalue, abs=0.1)
    assert permutation_test(one, other, rate, permutations=255, seed=1)[0] == monte_carlo
    assert permutation_test(one, other, rate, permutations=256)[0] == pytest.approx(theirs.pvalue), "2^8 are all"


def test_ties_are_ties_whatever_the_rounding() -> None:
    """A mean of three classes' rates, small numbers, so that many permutations tie; the same in fractions."""
    rng = np.random.default_rng(8)
    for _ in range(300):
        totals = rng.integers(1, 4, (4, 3)) + np.zeros((2, 1, 1), dtype=np.int64)  # sides, images, classes
        sides = np.stack([rng.integers(0, totals + 1), totals], axis=2)  # sides, images, (hits, totals), classes

        def mean_rate(counts: np.ndarray) -> Fraction:
            hits, pixels = counts.sum(axis=0).tolist()
            return sum((Fraction(h, n) for h, n in zip(hits, pixels, strict=True)), Fraction()) / 3

        found = [
            abs(mean_rate(sides[1 - np.array(which), range(4)]) - mean_rate(sides[np.array(which), range(4)]))
            for which in itertools.product((0, 1), repeat=4)
        ]
        p = permutation_test(*sides, lambda s: (s[:, 0] / s[:, 1]).mean(axis=1, keepdims=True))[0]
        assert p == sum(value >= found[0] for value in found) / 16


def test_what_is_not_defined_has_no_p_value() -> None:
    assert np.isnan(permutation_test([[1, 2], [1, 2]], [[0, 0], [0, 0]], rate)).all()
    # swapping one of these two images alone leaves nothing on one side, which counts as far
    assert permutation_test([[2, 2], [0, 0]], [[0, 0], [1, 2]], rate).tolist() == [1.0]


@pytest.mark.parametrize("permutations", [9999, 99])
def test_p_values_are_uniform_where_there_is_nothing_to_find(permutations: int) -> None:
    """Both sides of an image drawn alike, exact (2^8) and by chance (99): P(p ≤ α) is α at most, and hardly less."""
    rng = np.random.default_rng(6)
    p = np.array([
        permutation_test(shares(rng, 8), shares(rng, 8), rate, permutations=permutations, seed=k)[0]
        for k in range(600)
    ])  # fmt: skip
    for alpha in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=3.5 * np.sqrt(alpha * (1 - alpha) / 600) + 2**-7)


def test_p_values_are_small_where_there_is_something() -> None:
    rng = np.random.default_rng(7)
    p = permutation_test(shares(rng, 12, a=6, b=2), shares(rng, 12), rate)[0]
    assert p == pytest.approx(2 / 2**12, abs=8 / 2**12)
    many = permutation_test(shares(rng, 60, a=6, b=2), shares(rng, 60), rate, permutations=99)[0]
    assert many == 1 / 100, "the one found counts among the random ones, so it is never 0"


@given(counts_of_images, st.integers(0, 2**32 - 1), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_a_p_value_knows_neither_sides_nor_order_nor_scale(data: np.ndarray, seed: int, factor: int) -> None:
    rng = np.random.default_rng(seed)
    other = data.copy()
    other[:, 0] = rng.binomial(data[:, 1], rng.random(len(data)))
    order = rng.permutation(len(data))
    p = permutation_test(data, other, rate)[0]
    assert p >= 2.0 ** (1 - len(data))
    assert permutation_test(other, data, rate)[0] == p
    assert permutation_test(data[order], other[order], rate)[0] == p
    assert permutation_test(factor * data, factor * other, rate)[0] == p


# --------------------------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    # 0.01·4 = 0.04, 0.02·3 = 0.06, 0.03·2 = 0.06, 0.04·1 = 0.04 → 0.06, since none is less than one before
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, np.nan, 0.02, 0.7]), [1.0, np.nan, 0.06, 1.0], equal_nan=True)
    assert holm([]).tolist() == []
    assert holm([0.2]).tolist() == [0.2]


@given(
    st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.02]), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.05, 0.2]),
)
@settings(max_examples=100, deadline=None)
def test_holm_rejects_what_his_procedure_rejects(p: list[float], alpha: float) -> None:
    """Step down: reject the smallest while it is at most α / (how many are left); stop at the first that is not."""
    rejected: set[int] = set()
    for left, index in zip(range(len(p), 0, -1), sorted(range(len(p)), key=p.__getitem__), strict=True):
        if p[index] * left > alpha:
            break
        rejected.add(index)
    assert {i for i, value in enumerate(holm(p)) if value <= alpha} == rejected
    # and it is the closed procedure over Bonferroni's tests of all sets of hypotheses (Marcus, Peritz, Gabriel, 1976)
    sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))]
    np.testing.assert_allclose(holm(p), closed, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    data = [[1, 2], [2, 2]]
    with pytest.raises(ValueError, match="level=95"):
        bootstrap(data, rate, level=95)
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap(data, rate, resamples=0)
    with pytest.raises(ValueError, match="method='t'"):
        bootstrap(data, rate, method="t")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap(np.zeros((0, 2)), rate)
    with pytest.raises(ValueError, match="the same images"):
        permutation_test(data, data[:1], rate)
    with pytest.raises(ValueError, match="permutations=0"):
        permutation_test(data, data, rate, permutations=0)
