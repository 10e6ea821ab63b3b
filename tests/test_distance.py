"""Distance from the patch against brute force, and rings that make up the whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import metrics
from evaluation.distance import RINGS, count_rings, distance_table, distance_to, success_by_distance
from evaluation.experiment import evaluate
from evaluation.results import Results
from evaluation.statistics import success_by_distance as success_by_distance_of_cells

IGNORE = 255


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.02, 0.2, 0.7]))
@settings(max_examples=80, deadline=None)
def test_distance_is_to_the_nearest_pixel_under_the_patch(seed: int, height: int, width: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < share
    mask[rng.integers(height), rng.integers(width)] = True
    under = np.argwhere(mask)
    expected = [[min(math.dist((y, x), there) for there in under) for x in range(width)] for y in range(height)]
    np.testing.assert_allclose(distance_to(mask), expected, rtol=1e-12)


def test_rings_by_hand() -> None:
    mask = np.array([[True, False, False, False, False]])
    target = np.array([[1, 1, IGNORE, 1, 2]])
    prediction = np.array([[1, 1, 1, 0, 2]])
    counted = np.array([[False, True, True, True, True]])
    # distances 0 to 4; the first is under the patch, the third has no target
    hits, totals = success_by_distance(prediction, target, mask, counted, [0, 2, 3, math.inf])
    assert hits.tolist() == [1, 0, 1]
    assert totals.tolist() == [1, 0, 2]
    assert hits.dtype == totals.dtype == np.int64
    hits, totals = success_by_distance(prediction, target, mask, counted, [1, 4])
    assert (hits.tolist(), totals.tolist()) == ([1], [2]), "the lower edge belongs to a ring, the upper one does not"


@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.1, 20), min_size=0, max_size=4, unique=True))
@settings(max_examples=60, deadline=None)
def test_rings_sum_to_the_success_rate(seed: int, inner: list[float]) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (4, 9, 11))
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    target = np.where(rng.random(labels.shape) < 0.2, IGNORE, rng.integers(0, 3, labels.shape))
    prediction = rng.integers(0, 3, labels.shape)
    mask = np.zeros(labels.shape, dtype=bool)
    mask[:, 2:5, 3:6] = True
    counted = metrics.counted_pixels(labels, mask)
    edges = [0.0, *sorted(inner), math.inf]
    rings = [success_by_distance(prediction[i], target[i], mask[i], counted[i], edges) for i in range(4)]
    hits, totals = (np.stack(part) for part in zip(*rings, strict=True))
    counts = metrics.confusion(target, prediction, counted, nb_classes=3)
    np.testing.assert_array_equal(totals.sum(axis=1), counts.sum(axis=(1, 2)))
    assert hits.sum() / totals.sum() == metrics.success_rate(metrics.merge(counts))
    # without a target: against the labels, what is not hit
    wrong = [success_by_distance(prediction[i], labels[i], mask[i], counted[i], edges) for i in range(4)]
    against = metrics.merge(metrics.confusion(labels, prediction, counted, nb_classes=3))
    assert sum((t - h).sum() for h, t in wrong) / sum(t.sum() for _, t in wrong) == pytest.approx(
        metrics.error_rate(against)
    )
    table = distance_table(hits, totals, edges, resamples=50)
    assert table["pixels"].sum() == totals.sum()
    met = table[table["pixels"] > 0]
    assert (met["success"] * met["pixels"]).sum() == pytest.approx(hits.sum())
    sure = met.dropna()
    assert ((sure["success_low"] <= sure["success"]) & (sure["success"] <= sure["success_high"])).all()


def test_an_attack_that_reaches_no_further_than_five_pixels_shows_it() -> None:
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:20, 10:20] = True
    target = np.ones(mask.shape, dtype=np.int64)
    prediction = (distance_to(mask) <= 5).astype(np.int64)
    found = [success_by_distance(prediction, target, mask, ~mask, [0, 3, 5.01, 8, math.inf])] * 2
    hits, totals = (np.stack(part) for part in zip(*found, strict=True))
    table = distance_table(hits, totals, [0, 3, 5.01, 8, math.inf])
    assert table["success"].tolist() == [1, 1, 0, 0]
    assert table["from"].tolist() == [0, 3, 5.01, 8]


def test_refusals() -> None:
    plane = np.zeros((3, 4), dtype=np.int64)
    mask = plane == 0
    with pytest.raises(ValueError, match="no pixel lies under the patch"):
        distance_to(~mask)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4\)"):
        distance_to(mask[None])
    for edges in ([0], [0, 4, 4], [3, 1], [0, math.nan]):
        with pytest.raises(ValueError, match="edges="):
            success_by_distance(plane, plane, mask, mask, edges)
    with pytest.raises(ValueError, match="must be equal"):
        success_by_distance(plane, plane[:2], mask, mask, [0, 1])
    with pytest.raises(ValueError, match=r"\(images, 2\) for 3 edges"):
        distance_table([[1]], [[1]], [0, 1, 2])


def test_rings_of_a_run_make_up_its_success_rate(tmp_path: Path) -> None:
    """Summed over the rings they are the numerator and the denominator of each row; the reach of the model shows."""
    from test_experiment import CornerAttack, CornerModel, Frames, segmenter

    def corner(target, **_):
        return CornerAttack(target, None)

    class Untargeted:
        def __init__(self, target):
            self.generate, self.mask = CornerAttack(target, None).generate, CornerAttack(target, None).mask

    found = evaluate(
        {"reaching 4": segmenter(CornerModel(4))},
        {"aimed": corner, "untargeted": lambda target, **_: Untargeted(target)},
        "none",
        Frames(),
        out=tmp_path,
        verbose=False,
    )
    for record in found.records:
        assert record.rings is not None
        won, could = record.rings.sum(axis=1)
        assert won / could == pytest.approx(record.success, abs=1e-12)
    read = Results.load(tmp_path)
    assert [r.to_json() for r in read.records] == [r.to_json() for r in found.records]
    table = success_by_distance_of_cells(read, resamples=50)
    aimed = table[table["attack"] == "aimed"].set_index("from")["success"]
    # 8×10 pixels, the patch in the corner, houses in the four columns on the left: only there, so only far away
    assert np.isnan(aimed[0.0]), "no pixel outside the patch is so near"
    assert aimed[0.1] == 0
    assert aimed[0.45] > 0.5
    assert len(table) == 2 * (len(RINGS) - 1)


def test_rings_need_a_patch_and_scale_with_the_image() -> None:
    nothing = np.zeros((6, 8), dtype=np.int64)
    assert count_rings(nothing, nothing, None, nothing.astype(bool), nothing == 0) is None
    for scale in (1, 4):  # the same picture, larger: the same shares in the same rings
        mask = np.zeros((6 * scale, 8 * scale), dtype=bool)
        mask[: 2 * scale, : 2 * scale] = True
        target = np.ones(mask.shape, dtype=np.int64)
        prediction = np.zeros_like(target)
        prediction[:, 4 * scale :] = 1
        rings = count_rings(prediction, np.zeros_like(target), target, mask, ~mask)
        assert rings is not None
        assert rings.sum(axis=1).tolist() == [(prediction == 1).sum(), (~mask).sum()]
        assert (rings * scale**-2)[0, :2].tolist() == [0, 0], "near the patch nothing is won, at any size"
