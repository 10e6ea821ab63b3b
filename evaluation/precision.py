"""Models in less precision, or compiled: faster where the hardware is, and no longer the same numbers."""

from __future__ import annotations

import copy

from ramdefense.segmenter import PyTorchSegmenter


def prepared(segmenter: PyTorchSegmenter, *, amp: str | None, compiled: bool) -> PyTorchSegmenter:
    """The segmenter as it was given, or another one with its weights.

    Args:
        segmenter: Stays as it is.
        amp: As `PyTorchSegmenter`.
        compiled: Its model is a copy that `torch.compile` compiles when it first runs. A copy of it, as a defence
            makes one, is not compiled.

    Raises:
        ValueError: An unknown precision.
    """
    if compiled:
        model = copy.deepcopy(segmenter.model)
        model.compile()
        segmenter = segmenter.with_model(model)
    if amp is not None:
        segmenter = segmenter.with_model(segmenter.model)
        segmenter.set_params(amp=amp)
    return segmenter
