"""Adversarial robustness of semantic segmentation: a segmenter for ART, and RAM, which hardens its attention.

    robust = RAMDefense(PyTorchSegmenter(model, nb_classes=11, input_shape=(3, 360, 480)))

`import ramdefense` is light: what stands below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramdefense.attention import refined_attention
    from ramdefense.defences import defence, register_defence
    from ramdefense.interception import AttentionSite, attention_sites
    from ramdefense.ram import HardenedModel, RAMDefense, harden
    from ramdefense.refinement import Refinement, refine
    from ramdefense.segmenter import PyTorchSegmenter, SegmenterMixin
    from ramdefense.traits import Conditions, NotApplicableError, Traits, conditions, traits_of

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "Conditions",
    "HardenedModel",
    "NotApplicableError",
    "PyTorchSegmenter",
    "RAMDefense",
    "Refinement",
    "SegmenterMixin",
    "Traits",
    "attention_sites",
    "conditions",
    "defence",
    "harden",
    "refine",
    "refined_attention",
    "register_defence",
    "traits_of",
]

_HOMES = {
    "attention": ["refined_attention"],
    "defences": ["defence", "register_defence"],
    "interception": ["AttentionSite", "attention_sites"],
    "ram": ["HardenedModel", "RAMDefense", "harden"],
    "refinement": ["Refinement", "refine"],
    "segmenter": ["PyTorchSegmenter", "SegmenterMixin"],
    "traits": ["Conditions", "NotApplicableError", "Traits", "conditions", "traits_of"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
