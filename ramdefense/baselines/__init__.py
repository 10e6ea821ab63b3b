"""Defences of other papers, to stand beside RAM in the same table."""

from __future__ import annotations

from ramdefense.baselines.crf import MeanFieldCRF
from ramdefense.baselines.foreground import ForegroundMask, random_masks, with_masks
from ramdefense.baselines.fusion import ContextualFusion, LateFusion, without_head
from ramdefense.baselines.multiscale import MultiScale

__all__ = [
    "ContextualFusion",
    "ForegroundMask",
    "LateFusion",
    "MeanFieldCRF",
    "MultiScale",
    "random_masks",
    "with_masks",
    "without_head",
]
