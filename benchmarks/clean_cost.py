"""What each suppression costs without an attack: clean mIoU over thresholds, on every second frame of a data set.

    python benchmarks/clean_cost.py --data camvid:PATH:val zoo:camvid-vit zoo:camvid-nonlocal

RAD is on (p = 0.1, rescaled, as by default), and scored on one draw.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from evaluation import load_data, load_model
from evaluation.datasets import stack
from evaluation.metrics import confusion, counted_pixels, mean_iou, merge
from ramdefense import RAMDefense
from ramdefense.refinement import SUPPRESSIONS
from ramdefense.segmenter import PyTorchSegmenter

THRESHOLDS = ("3/N", "5/N", "8/N", "12/N", "16/N", "24/N")


def clean_miou(segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> str:
    counts = confusion(y, segmenter.predict_labels(x), counted_pixels(y), nb_classes=segmenter.nb_classes)
    return f"{100 * mean_iou(merge(counts)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        segmenter = load_model(name)
        data = load_data(arguments.data, size=segmenter.input_shape[1:])
        images, labels, _ = stack(data, range(0, len(data), 2))
        x, y = images.numpy(), labels.numpy()

        table = Table(title=f"{name}, {len(y)} frames: clean mIoU % {clean_miou(segmenter, x, y)} without RAM")
        for column in ("T", *SUPPRESSIONS):
            table.add_column(column, justify="right")
        for threshold in THRESHOLDS:
            defended = [RAMDefense(segmenter, max_attention=threshold, suppression=kind) for kind in SUPPRESSIONS]
            table.add_row(threshold, *(clean_miou(one, x, y) for one in defended))
        Console().print(table)


if __name__ == "__main__":
    main()
