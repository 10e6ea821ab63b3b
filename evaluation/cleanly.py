"""How well models do without an attack: counts of each image, each defence in a file of its own."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation import metrics
from evaluation.files import DamagedError, read_lines, write_lines
from evaluation.fingerprints import model_fingerprint, versions_of
from evaluation.frames import SegmentationData
from evaluation.resampling import Interval, bootstrap
from evaluation.store import file_name
from evaluation.survey import read_batch
from ramdefense.segmenter import PyTorchSegmenter

Margins = NDArray[np.int64]


def clean_counts(
    segmenter: PyTorchSegmenter, data: SegmentationData, images: Sequence[int], batch_size: int = 8
) -> Margins:
    """Margins of the counts of label against prediction, whole image: ``(N, 3, C)``, as ``evaluate`` counts them."""
    found = []
    for start in range(0, len(images), batch_size):
        batch = tuple(images[start : start + batch_size])
        x, y, _ = read_batch(data, batch)
        with segmenter.conditions(images=batch, draw=-1):  # the draw that no attack sees
            predicted = segmenter.predict_labels(x, batch_size=batch_size)
        counts = metrics.confusion(y, predicted, metrics.counted_pixels(y), nb_classes=len(data.classes))
        found.append(metrics.margins(counts))
    return np.concatenate(found)


def kept_counts(
    folder: Path,
    name: str,
    deciding: dict[str, object],
    segmenter: PyTorchSegmenter,
    data: SegmentationData,
    images: Sequence[int],
    batch_size: int = 8,
) -> Margins:
    """``clean_counts``, computed once and kept in a file.

    Args:
        folder: of the files.
        name: of the defence, for the file.
        deciding: what decides the counts beside weights, images and versions: the defence and the frames. All of it is
            in the file's name as a hash, so that no other counts are taken for these.
        segmenter: the defended model.
    """
    key = json.dumps(
        {**deciding, "model": model_fingerprint(segmenter), "images": list(images),
         "versions": versions_of("ramdefense", "torch")}, sort_keys=True,
    )  # fmt: skip
    path = folder / f"{file_name(name)}--{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
    if path.exists():
        try:
            return np.array([json.loads(line) for line in read_lines(path)[1]], dtype=np.int64)
        except DamagedError as error:
            warnings.warn(f"{error.path} is damaged ({error.problem}); it is computed again", stacklevel=2)
    counts = clean_counts(segmenter, data, images, batch_size)
    write_lines(path, {"defence": name}, [json.dumps(of_image.tolist()) for of_image in counts])
    return counts


def clean_miou(counts: Margins) -> float:
    """mIoU of the sum of such counts."""
    return float(metrics.mean_ious(counts.sum(axis=0)))


def lost_miou(before: Margins, after: Margins) -> Interval:
    """Clean mIoU before − after, of the same images, with its 95 % interval over images (an image with both sides)."""
    return bootstrap(
        np.stack([before, after], axis=1),
        lambda sums: (metrics.mean_ious(sums[:, 0]) - metrics.mean_ious(sums[:, 1]))[:, None],
    )
