"""Metrics against torchmetrics, and what makes counts safe to merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from evaluation import metrics

IGNORE = 255


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Labels (with void), predictions, mask and the number of classes, some of which may be absent."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(2, 7))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    present = rng.choice(classes, size=draw(st.integers(1, classes)), replace=False)
    labels = rng.choice(present, size=shape)
    labels[rng.random(shape) < draw(st.sampled_from([0.0, 0.3]))] = IGNORE
    mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.4]))
    right = np.where(labels == IGNORE, 0, labels)
    prediction = np.where(rng.random(shape) < 0.5, right, rng.integers(0, classes, shape))
    return labels, prediction, mask, classes


@given(batches())
@settings(max_examples=150, deadline=None)
def test_agrees_with_torchmetrics(batch: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> None:
    labels, prediction, mask, classes = batch
    counted = metrics.counted_pixels(labels, mask)
    counts = metrics.merge(metrics.confusion(labels, prediction, counted, nb_classes=classes))
    assert counts.sum() == counted.sum()
    if not counted.any():
        assert np.isnan(metrics.mean_iou(counts))
        assert np.isnan(metrics.pixel_accuracy(counts))
        return
    seen = torch.from_numpy(np.where(counted, labels, IGNORE)), torch.from_numpy(prediction)
    options = {"num_classes": classes, "ignore_index": IGNORE}
    accuracy = MulticlassAccuracy(average="micro", **options)(seen[1], seen[0])
    assert metrics.pixel_accuracy(counts) == pytest.approx(accuracy.item(), abs=1e-6)
    # torchmetrics looks at void pixels' predictions nowhere, and leaves absent classes out of the mean as we do
    jaccard = MulticlassJaccardIndex(average="macro", **options)(seen[1], seen[0])
    assert metrics.mean_iou(counts) == pytest.approx(jaccard.item(), abs=1e-6)
    each = MulticlassJaccardIndex(average="none", **options)(seen[1], seen[0]).numpy()
    ours = metrics.class_iou(counts)
    np.testing.assert_allclose(np.nan_to_num(ours), np.nan_to_num(each), atol=1e-6)


@given(batches(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_partition_of_the_images_gives_the_same_counts(
    batch: tuple[np.ndarray, np.ndarray, np.ndarray, int], seed: int
) -> None:
    labels, prediction, mask, classes = batch
    counted = metrics.counted_pixels(labels, mask)
    whole = metrics.confusion(labels, prediction, counted, nb_classes=classes)
    part = np.random.default_rng(seed).integers(0, 2, len(labels)).astype(bool)
    parts = [
        metrics.confusion(labels[p], prediction[p], counted[p], nb_classes=classes) for p in (part, ~part) if p.any()
    ]
    np.testing.assert_array_equal(metrics.merge(np.concatenate(parts)), metrics.merge(whole))
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate([whole[part], whole[~part]]))


@given(batches(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_void_and_covered_pixels_never_count(
    batch: tuple[np.ndarray, np.ndarray, np.ndarray, int], seed: int
) -> None:
    labels, prediction, mask, classes = batch
    counted = metrics.counted_pixels(labels, mask)
    counts = metrics.confusion(labels, prediction, counted, nb_classes=classes)
    elsewhere = np.random.default_rng(seed).integers(0, classes, labels.shape)
    repainted = np.where(counted, prediction, elsewhere)
    np.testing.assert_array_equal(metrics.confusion(labels, repainted, counted, nb_classes=classes), counts)
    relabelled = np.where(mask & (labels != IGNORE), elsewhere, labels)
    np.testing.assert_array_equal(metrics.confusion(relabelled, prediction, counted, nb_classes=classes), counts)


def test_region_everywhere_counts_under_the_patch_too() -> None:
    labels = np.array([[[0, 1], [IGNORE, 1]]])
    mask = np.array([[[True, False], [True, False]]])
    assert metrics.counted_pixels(labels, mask).tolist() == [[[False, True], [False, True]]]
    assert metrics.counted_pixels(labels, mask, region="everywhere").tolist() == [[[True, True], [False, True]]]


def test_figures_by_hand() -> None:
    # 10 pixels: class 0: 4 right, 1 taken for 1; class 1: 2 right, 3 taken for 0; class 2 absent from both
    counts = np.array([[4, 1, 0], [3, 2, 0], [0, 0, 0]])
    assert metrics.pixel_accuracy(counts) == pytest.approx(0.6)
    np.testing.assert_allclose(metrics.class_iou(counts), [4 / 8, 2 / 6, np.nan])
    assert metrics.mean_iou(counts) == pytest.approx((4 / 8 + 2 / 6) / 2)
    assert metrics.success_rate(counts) == pytest.approx(0.6)
    assert metrics.target_miou(counts) == metrics.mean_iou(counts)
    assert metrics.error_rate(counts) == pytest.approx(0.4)
    assert metrics.changed_share(counts) == pytest.approx(0.4)
    perfect = np.diag([5, 5, 0])
    assert metrics.iou_ratio(counts, perfect) == pytest.approx(metrics.mean_iou(counts))
    assert np.isnan(metrics.iou_ratio(counts, np.array([[0, 5, 0], [5, 0, 0], [0, 0, 0]])))


def test_sum_of_counts_is_not_the_average_of_images() -> None:
    """The trap: an image of one sky pixel must not weigh as much as one of a thousand."""
    large, small = np.array([[1000, 0], [0, 0]]), np.array([[0, 1], [0, 0]])
    averaged = (metrics.mean_iou(large) + metrics.mean_iou(small)) / 2
    summed = metrics.mean_iou(metrics.merge(np.stack([large, small])))
    assert averaged == pytest.approx(0.5)
    assert summed == pytest.approx((1000 / 1001 + 0) / 2)


def test_refusals() -> None:
    labels = np.zeros((1, 2, 2), dtype=np.int64)
    with pytest.raises(ValueError, match="region='inside'"):
        metrics.counted_pixels(labels, region="inside")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prediction holds classes 0 to 7"):
        metrics.confusion(labels, labels + np.array([0, 7]), labels == 0, nb_classes=3)
    with pytest.raises(ValueError, match="reference holds"):
        metrics.confusion(labels - 1, labels, labels == 0, nb_classes=3)
    with pytest.raises(ValueError, match="must be equal"):
        metrics.confusion(labels, labels[:, :1], labels == 0, nb_classes=3)
