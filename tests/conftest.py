"""Fixtures that several test files share. Add to them; the data are checked to be unchanged after every test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny import NB_CLASSES, SHAPE, linear_cnn, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor

from ramdefense.segmenter import PyTorchSegmenter


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two threads for each process are slower than one wherever anything else runs."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_segmenter() -> PyTorchSegmenter:
    """Three convolutions with batch norm and dropout, with normalisation."""
    return PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE, preprocessing=((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))


@pytest.fixture
def linear_segmenter() -> PyTorchSegmenter:
    """One 3×3 convolution on raw pixels."""
    return PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)


@pytest.fixture
def attention_segmenter() -> PyTorchSegmenter:
    """Self-attention over 4×4 patches, logits at a quarter of the size."""
    return PyTorchSegmenter(tiny_attention(), NB_CLASSES, SHAPE)


@pytest.fixture
def images() -> Iterator[Tensor]:
    """(5, *SHAPE) float32 in [0, 1]; fails the test that changes it."""
    data = random_images()
    yield data
    assert torch.equal(data, random_images()), "the test changed the images it was given"


@pytest.fixture
def labels() -> Iterator[Tensor]:
    """(5, H, W) int64, two void rows on top; fails the test that changes it."""
    data = random_labels()
    yield data
    assert torch.equal(data, random_labels()), "the test changed the labels it was given"


@pytest.fixture
def x() -> Iterator[np.ndarray]:
    """`images` as an array."""
    data = random_images().numpy()
    yield data
    assert np.array_equal(data, random_images().numpy()), "the test changed the images it was given"


@pytest.fixture
def y() -> Iterator[np.ndarray]:
    """`labels` as an array."""
    data = random_labels().numpy()
    yield data
    assert np.array_equal(data, random_labels().numpy()), "the test changed the labels it was given"
