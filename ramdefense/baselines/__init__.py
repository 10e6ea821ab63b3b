"""Defences of other papers, to stand beside RAM in the same table."""

from __future__ import annotations

from ramdefense.baselines.crf import MeanFieldCRF
from ramdefense.baselines.multiscale import MultiScale

__all__ = ["MeanFieldCRF", "MultiScale"]
