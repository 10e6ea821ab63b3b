"""Attack × defence tables: models and data by name, experiments, results, figures and the command line.

Everything loads on first use, so ``import evaluation`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.cards import zoo
    from evaluation.datasets import load_data
    from evaluation.experiment import evaluate
    from evaluation.frames import Frame, SegmentationData
    from evaluation.models import load_model
    from evaluation.results import Results
    from evaluation.scenes import StreetScenes

__all__ = ["Frame", "Results", "SegmentationData", "StreetScenes", "evaluate", "load_data", "load_model", "zoo"]

_HOME = {
    **dict.fromkeys(("Frame", "SegmentationData"), "frames"),
    "Results": "results",
    "StreetScenes": "scenes",
    "evaluate": "experiment",
    "load_data": "datasets",
    "load_model": "models",
    "zoo": "cards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'evaluation' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"evaluation.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
