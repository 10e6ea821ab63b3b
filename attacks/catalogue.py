"""Names of attacks. An attack is added by registering a factory under a name, and nothing else has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol


class CataloguedAttack(Protocol):
    """What a table asks of an attack; arrays and tensors alike, and what comes back is of the kind that went in."""

    def generate(self, x: Any, y: Any = None, *, images: Sequence[int] | None = None) -> Any:
        """Images (N, C, H, W) and ground truth (N, H, W) -> adversarial images; `images`: their stream numbers."""

    def target_map(self, y: Any, images: Sequence[int] | None = None) -> Any:
        """The map that the attack aims at, (N, H, W); None for an untargeted attack."""

    def mask(self, x: Any) -> Any:
        """The pixels that the attack may change, (N, H, W) bool."""


Factory = Callable[..., CataloguedAttack]


@dataclass(frozen=True)
class Entry:
    """An attack of the catalogue.

    Args:
        name: What it is called on the command line and in tables.
        factory: `factory(segmenter, **options)` makes the attack.
        summary: What it does, in one line.
        paper: Where it comes from; empty if it is ours.
    """

    name: str
    factory: Factory
    summary: str
    paper: str = ""


_ENTRIES: dict[str, Entry] = {}


def register_attack(name: str, *, summary: str = "", paper: str = "") -> Callable[[Factory], Factory]:
    """Decorator: enter a factory `(segmenter, **options) -> attack` under a name.

    Args:
        name: A name not yet taken.
        summary: What the attack does, in one line; empty: the first line of the factory's docstring.
        paper: Where it comes from.

    Raises:
        ValueError: If the name is taken or empty.
    """
    if not name:
        raise ValueError("An attack needs a name.")
    if name in _ENTRIES:
        raise ValueError(f"There is an attack named {name!r} already; choose another name.")

    def enter(factory: Factory) -> Factory:
        first_line = (factory.__doc__ or "").strip().partition("\n")[0]
        _ENTRIES[name] = Entry(name, factory, summary or first_line, paper)
        return factory

    return enter


def attack(name: str, segmenter: Any, **options: Any) -> CataloguedAttack:
    """Make the attack of that name on a segmenter.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
        TypeError: On an option that the attack does not have.
    """
    if name not in _ENTRIES:
        raise ValueError(f"There is no attack named {name!r}; there are {', '.join(_ENTRIES)}.")
    return _ENTRIES[name].factory(segmenter, **options)


def attacks() -> Mapping[str, Entry]:
    """Every attack by its name, in the order of registration; a view that follows later registrations."""
    return MappingProxyType(_ENTRIES)


DAG = "Xie et al., Adversarial Examples for Semantic Segmentation and Object Detection, ICCV 2017 (target maps)"
PGD = "Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018 (sign steps)"


@register_attack("permute", summary="Every class becomes one that the image does not hold, one to one.", paper=DAG)
def _permute(segmenter: Any, **options: Any) -> CataloguedAttack:
    from attacks.art_style import PermuteAttack

    return PermuteAttack(segmenter, **options)


@register_attack("strip", summary="Four vertical bands, each of one class that the image does not hold.", paper=DAG)
def _strip(segmenter: Any, **options: Any) -> CataloguedAttack:
    from attacks.art_style import StripAttack

    return StripAttack(segmenter, **options)


@register_attack("untargeted", summary="Every pixel away from its label, wherever to.", paper=PGD)
def _untargeted(segmenter: Any, **options: Any) -> CataloguedAttack:
    from attacks.art_style import PatchAttack
    from attacks.targets import Untargeted

    return PatchAttack(segmenter, target=Untargeted(), **options)
