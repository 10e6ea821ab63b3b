from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramdefense.checks import check_images, check_labels

GOOD = np.linspace(0, 1, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
MAPS = np.arange(2 * 4 * 5).reshape(2, 4, 5) % 4


def changed(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[7] = value
    return array


def with_array_types(array: np.ndarray) -> list:
    return [array, torch.tensor(array)]


@pytest.mark.parametrize("x", [*with_array_types(GOOD), GOOD.astype(np.float64), GOOD.astype(np.float16)])
def test_images_that_fit_pass(x: object) -> None:
    check_images(x)


def test_bounds_are_those_that_the_images_number_type_can_hold() -> None:
    low, high = 0.1, 0.7  # float32 rounds the first up and the second down or up; both are in the range as they are
    check_images(np.full((1, 3, 2, 2), high, dtype=np.float32), (low, high))
    check_images(np.full((1, 3, 2, 2), low, dtype=np.float32), (low, high))
    above = np.nextafter(np.float32(high), np.float32(1))
    with pytest.raises(ValueError, match="clip range"):
        check_images(np.full((1, 3, 2, 2), above, dtype=np.float32), (low, high))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (changed(GOOD, np.nan), ValueError, "NaN"),
        (changed(GOOD, np.inf), ValueError, "NaN or infinite"),
        (changed(GOOD, -0.01), ValueError, "clip range"),
        (GOOD * 255, ValueError, "255"),
        (GOOD[0], ValueError, r"\(3, 4, 5\)"),
        (GOOD[:0], ValueError, "no pixel"),
        ((GOOD * 255).astype(np.uint8), TypeError, "divide"),
        (np.array([GOOD, None], dtype=object), TypeError, "object"),
        (GOOD.tolist(), TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
)
def test_images_that_do_not_fit_are_refused(x: object, error: type[Exception], message: str) -> None:
    for array in [x, *([torch.tensor(x)] if isinstance(x, np.ndarray) and x.dtype != object else [])]:
        with pytest.raises(error, match=message):
            check_images(array)


def test_another_clip_range() -> None:
    check_images(GOOD * 255, (0, 255))
    with pytest.raises(ValueError, match="clip range"):
        check_images(GOOD - 0.5, (0, 255))


@pytest.mark.parametrize("y", [*with_array_types(MAPS), MAPS.astype(np.uint8), MAPS.astype(np.float32), MAPS % 2 == 0])
def test_labels_that_fit_pass(y: object) -> None:
    check_labels(y, 4, spatial=(4, 5))
    check_labels(y, 4, spatial=(2, 4, 5))


def test_void_pixels_pass_under_their_own_number_only() -> None:
    for void in (255, -100, -1):
        check_labels(changed(MAPS, void), 4, ignore_index=void)
    with pytest.raises(ValueError, match=r"\[255\].*-100"):
        check_labels(changed(MAPS, 255), 4, ignore_index=-100)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (changed(MAPS, 4), r"\[4\]"),
        (changed(MAPS, -1), r"\[-1\]"),
        (changed(MAPS.astype(np.float32), 1.5), "whole numbers"),
        (changed(MAPS.astype(np.float32), np.nan), "whole numbers"),
        (MAPS[0], r"\(4, 5\)"),
        (MAPS[:, None], r"\(2, 1, 4, 5\)"),
        (MAPS[:0], "no pixel"),
        (MAPS.transpose(0, 2, 1), "4x5"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y: np.ndarray, message: str) -> None:
    for array in with_array_types(y):
        with pytest.raises(ValueError, match=message):
            check_labels(array, 4, spatial=(4, 5))


def test_number_of_label_maps_is_checked_on_request() -> None:
    with pytest.raises(ValueError, match="3x4x5"):
        check_labels(MAPS, 4, spatial=(3, 4, 5))
    with pytest.raises(TypeError, match="list"):
        check_labels(MAPS.tolist(), 4)


@settings(max_examples=60, deadline=None)
@given(value=st.integers(-300, 300), nb_classes=st.integers(2, 200), void=st.integers(-200, 260))
def test_a_label_passes_exactly_when_it_is_a_class_or_void(value: int, nb_classes: int, void: int) -> None:
    y = np.full((1, 2, 2), value)
    if 0 <= value < nb_classes or value == void:
        check_labels(y, nb_classes, void)
    else:
        with pytest.raises(ValueError, match=str(value)):
            check_labels(y, nb_classes, void)


def test_nothing_is_changed() -> None:
    x, y = GOOD.copy(), MAPS.copy()
    x.flags.writeable = y.flags.writeable = False
    check_images(x)
    check_labels(y, 4)
