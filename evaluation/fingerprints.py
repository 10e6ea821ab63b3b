"""What decides a run, as short texts that are equal when the thing is: models, data, functions, versions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evaluation.frames import Frame, SegmentationData
from ramdefense.segmenter import PyTorchSegmenter


def identity(function: Callable[..., Any]) -> str:
    """What a function calls itself, or where it is defined: two lambdas of one module are not told apart."""
    own = getattr(function, "identity", None)
    if isinstance(own, str):
        return own
    if isinstance(function, functools.partial):
        return f"{identity(function.func)}({', '.join(f'{k}={v!r}' for k, v in function.keywords.items())})"
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def plain_value(value: Any) -> Any:
    """A value as JSON has it: itself, or what it prints as."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return repr(value)


def model_fingerprint(segmenter: PyTorchSegmenter) -> str:
    """Class of the model, and a hash of its weights, of the preprocessing and of its precision, if that is reduced."""
    digest = hashlib.sha256(repr(segmenter.clip_values).encode())
    if segmenter.amp is not None:
        digest.update(segmenter.amp.encode())
    for step in segmenter.preprocessing_operations:
        digest.update(repr([type(step).__name__, *((name, getattr(step, name)) for name in step.params)]).encode())
    for name, value in segmenter.model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{type(segmenter.model).__name__}:{digest.hexdigest()[:16]}"


def data_fingerprint(data: SegmentationData, images: Sequence[int]) -> str:
    """Hash of these images and their label maps."""
    digest = hashlib.sha256()
    for image in images:
        for part in frame_bytes(data[image]):
            digest.update(part)
    return digest.hexdigest()[:16]


def frame_bytes(frame: Frame) -> tuple[bytes, ...]:
    """What is in a frame: shape, image and label map."""
    return str(tuple(frame.image.shape)).encode(), frame.image.numpy().tobytes(), frame.label.numpy().tobytes()


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions by distribution name."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
