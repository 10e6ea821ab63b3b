"""Adversarial patches for semantic segmentation.

The names here are the ART-style attacks and the parts that they are made of; `attacks.torch_style` has the same attacks
as subclasses of `torchattacks.attack.Attack`. Everything loads on first use, so `import attacks` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.art_style import PatchAttack, PermuteAttack, StripAttack
    from attacks.catalogue import attack, attacks, register_attack
    from attacks.patch import Patch
    from attacks.targets import FixedClass, Permute, Strip, TargetMap, Untargeted
    from attacks.transformations import EOT

__all__ = [
    "EOT",
    "FixedClass",
    "Patch",
    "PatchAttack",
    "Permute",
    "PermuteAttack",
    "Strip",
    "StripAttack",
    "TargetMap",
    "Untargeted",
    "attack",
    "attacks",
    "register_attack",
]

_HOME = {
    **dict.fromkeys(("PatchAttack", "PermuteAttack", "StripAttack"), "art_style"),
    **dict.fromkeys(("attack", "attacks", "register_attack"), "catalogue"),
    **dict.fromkeys(("FixedClass", "Permute", "Strip", "TargetMap", "Untargeted"), "targets"),
    "EOT": "transformations",
    "Patch": "patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"attacks.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
