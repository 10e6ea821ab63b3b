"""Names of attacks.

An attack is added by registering a factory under a name, or by adding a preset to `attacks.patchwise` or
`attacks.pixelwise`; nothing else has to know of it.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from attacks.interfaces import CataloguedAttack
from attacks.patchwise import PATCH_ATTACKS
from attacks.pixelwise import PIXEL_ATTACKS
from attacks.presets import Preset
from ramdefense.names import split_name

Factory = Callable[..., CataloguedAttack]


@dataclass(frozen=True)
class Entry:
    """An attack of the catalogue.

    Args:
        name: What it is called on the command line and in tables.
        factory: `factory(segmenter, **options)` makes the attack.
        summary: What it does, in one line.
        paper: Where it comes from; empty if it is ours.
        threat: What it changes: "patch", or "pixel" (every pixel, a little).
        options: What it sets, as text; empty where the factory is all that is known.
    """

    name: str
    factory: Factory
    summary: str
    paper: str = ""
    threat: str = "patch"
    options: str = ""


@dataclass(frozen=True)
class FromPreset:
    """The factory of a preset.

    Attributes:
        open: The options that may be set for many attacks at once, such as `max_iter`: all but those that make this
            attack what it is. A call takes every option.
        identity: A text that is equal where the attack is.
    """

    preset: Preset

    def __call__(self, segmenter: Any, **options: Any) -> CataloguedAttack:
        made: CataloguedAttack = self.preset.art(segmenter, **options)
        return made

    @property
    def open(self) -> tuple[str, ...]:
        return self.preset.open

    @property
    def identity(self) -> str:
        derived = "".join(f", {name}=…" for name in self.preset.derived)
        return f"{self.preset.name}({self.preset.threat}, {self.preset.settings}{derived})"


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

    Args:
        name: As listed by `attacks`; it may carry options: ``"apgd:target=strip,max_iter=100"``.
        segmenter: A `ramdefense.PyTorchSegmenter`.
        options: Options, which come before those in the name.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
        TypeError: On an option that the attack does not have.
    """
    return entry(name).factory(segmenter, **options)


def entry(name: str) -> Entry:
    """The entry of that name, which may carry options: ``"apgd:target=strip,max_iter=100"``.

    Raises:
        ValueError: If there is none; the message lists those there are, and the nearest one.
    """
    base, options = split_name(name)
    if base not in _ENTRIES:
        close = difflib.get_close_matches(base, _ENTRIES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"There is no attack named {base!r}: {hint}there are {', '.join(_ENTRIES)}.")
    found = _ENTRIES[base]
    return replace(found, name=name, factory=functools.partial(found.factory, **options)) if options else found


def attacks() -> Mapping[str, Entry]:
    """Every attack by its name, in the order of registration; a view that follows later registrations."""
    return MappingProxyType(_ENTRIES)


for _preset in (*PATCH_ATTACKS.values(), *PIXEL_ATTACKS.values()):
    _ENTRIES[_preset.name] = Entry(
        _preset.name,
        FromPreset(_preset),
        _preset.summary,
        _preset.paper,
        "patch" if _preset.threat == "patch" else "pixel",
        _preset.settings,
    )


@register_attack(
    "adaptive",
    summary="APGD with three losses, attention-fool, square-patch, PGD and the undefended model's patch; the worst.",
    paper="after Tramer et al., On Adaptive Attacks to Adversarial Example Defenses, NeurIPS 2020",
)
def _adaptive(segmenter: Any, **options: Any) -> CataloguedAttack:
    from attacks.adaptive import adaptive_attack

    return adaptive_attack(segmenter, **options)
