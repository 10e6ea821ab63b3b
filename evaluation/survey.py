"""The frames of a run, looked at once before any work: what is in each, and which of them cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluation.fingerprints import frame_bytes
from evaluation.frames import IGNORE_INDEX, Frame, SegmentationData
from ramdefense.checks import check_images, check_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Survey:
    """What was found.

    Args:
        fingerprints: image → what is in its frame, of all that could be read.
        unreadable: image → why its frame could not be read.
        fingerprint: of all frames together; None where some could not be read.
    """

    fingerprints: Mapping[int, str] = field(default_factory=dict)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    fingerprint: str | None = ""


def survey(data: SegmentationData, images: Sequence[int], *, keep_going: bool) -> Survey:
    """Read and check every frame.

    Args:
        data: The data set.
        images: Which of its frames.
        keep_going: Note frames that cannot be read, whatever is raised; otherwise the first one raises it.

    Raises:
        ValueError: None of the frames can be read; without ``keep_going``, one that is damaged.
    """
    whole = hashlib.sha256()
    fingerprints: dict[int, str] = {}
    unreadable: dict[int, str] = {}
    for image in images:
        try:
            frame = read_frame(data, image)
        except Exception as error:  # a user's data set may raise anything
            if not keep_going:
                raise
            unreadable[image] = reason(error)
            continue
        own = hashlib.sha256()
        for part in frame_bytes(frame):
            own.update(part)
            whole.update(part)
        fingerprints[image] = own.hexdigest()[:16]
    if not fingerprints:
        raise ValueError(f"none of the {len(images)} images can be read; the first: {unreadable[images[0]]}")
    return Survey(fingerprints, unreadable, None if unreadable else whole.hexdigest()[:16])


def read_frame(data: SegmentationData, image: int) -> Frame:
    """A frame whose image and label map are what they must be.

    Raises:
        ValueError: They are not; the message names the frame.
    """
    frame = data[image]
    try:
        check_images(frame.image[None])
        check_labels(frame.label[None], len(data.classes), IGNORE_INDEX, tuple(frame.image.shape[-2:]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"image {image} ({frame.name}): {error}") from error
    return frame


def read_batch(
    data: SegmentationData, images: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Frames as a batch: images (N, 3, H, W), label maps (N, H, W) and names.

    Raises:
        ValueError: A frame is not what it must be, or they are of different sizes.
    """
    frames = [read_frame(data, image) for image in images]
    sizes = {image: tuple(frame.image.shape[-2:]) for image, frame in zip(images, frames, strict=True)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"image {image} has {height}×{width}" for image, (height, width) in sizes.items())
        raise ValueError(f"images of different sizes do not make a batch ({listed}); give a size")
    x, y = torch.stack([frame.image for frame in frames]), torch.stack([frame.label for frame in frames])
    return x.numpy(), y.numpy(), [frame.name for frame in frames]


def first_readable(data: SegmentationData, images: Sequence[int]) -> int:
    """The first of these frames that can be read; the first of all where none can."""
    for image in images:
        try:
            read_frame(data, image)
        except Exception:  # a user's data set may raise anything; the survey tells what it was
            continue
        return image
    return images[0]


def reason(error: Exception) -> str:
    """What was raised, in one line; its kind too where the text alone may not tell."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".removesuffix(": ")
