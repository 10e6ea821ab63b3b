"""Adversarial patches and perturbations for semantic segmentation.

The names here are the ART-style attacks and the parts that they are made of; `attacks.torch_style` has the same attacks
as subclasses of `torchattacks.attack.Attack`. Everything loads on first use, so `import attacks` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.art_style import MinimalNormAttack, PatchAttack, PermuteAttack, PixelAttack, StripAttack
    from attacks.attention import AttentionFool
    from attacks.catalogue import attack, attacks, register_attack
    from attacks.diversity import InputDiversity
    from attacks.ensemble import WorstCaseAttack
    from attacks.geometry import Surface, disc, several
    from attacks.patch import Patch
    from attacks.printing import NonPrintability, TotalVariation
    from attacks.targets import FixedClass, Permute, Region, Strip, TargetMap, Untargeted
    from attacks.transformations import EOT
    from attacks.universal import UniversalPatchAttack

__all__ = [
    "EOT",
    "AttentionFool",
    "FixedClass",
    "InputDiversity",
    "MinimalNormAttack",
    "NonPrintability",
    "Patch",
    "PatchAttack",
    "Permute",
    "PermuteAttack",
    "PixelAttack",
    "Region",
    "Strip",
    "StripAttack",
    "Surface",
    "TargetMap",
    "TotalVariation",
    "UniversalPatchAttack",
    "Untargeted",
    "WorstCaseAttack",
    "attack",
    "attacks",
    "disc",
    "register_attack",
    "several",
]

_HOMES = {
    "art_style": ["MinimalNormAttack", "PatchAttack", "PermuteAttack", "PixelAttack", "StripAttack"],
    "attention": ["AttentionFool"],
    "catalogue": ["attack", "attacks", "register_attack"],
    "diversity": ["InputDiversity"],
    "ensemble": ["WorstCaseAttack"],
    "geometry": ["Surface", "disc", "several"],
    "patch": ["Patch"],
    "printing": ["NonPrintability", "TotalVariation"],
    "targets": ["FixedClass", "Permute", "Region", "Strip", "TargetMap", "Untargeted"],
    "transformations": ["EOT"],
    "universal": ["UniversalPatchAttack"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"attacks.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
