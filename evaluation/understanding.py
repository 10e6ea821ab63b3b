"""What the commands that look into models are given: segmenters, and a few images of a data set, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.datasets import load_data
from evaluation.given import chosen_images, named_segmenters
from evaluation.survey import read_batch
from ramdefense.segmenter import PyTorchSegmenter


class Given(NamedTuple):
    """Segmenters by name, and images.

    Attributes:
        segmenters: by name, of the data's classes.
        images, labels: (N, 3, H, W) float32 in [0, 1], and (N, H, W) int64.
        names: of the images.
        streams: their indices in the data set, which number their random streams.
    """

    segmenters: dict[str, PyTorchSegmenter]
    images: Tensor
    labels: Tensor
    names: list[str]
    streams: list[int]


def given(
    models: Sequence[str],
    data: str,
    *,
    images: int | None = None,
    size: tuple[int, int] | None = None,
    device_type: str | None = None,
) -> Given:
    """Load models and images by their names, as ``evaluate`` does.

    Raises:
        ValueError: an unknown name, models and data of different classes, more images than there are, or images of
            several sizes.
        FileNotFoundError: files that are not there.
    """
    frames = load_data(data, size=size)
    indices = chosen_images(images, len(frames))
    segmenters = named_segmenters(list(models), frames, indices[0], device_type)
    x, y, names = read_batch(frames, indices)
    return Given(segmenters, torch.from_numpy(x), torch.from_numpy(y), names, indices)
