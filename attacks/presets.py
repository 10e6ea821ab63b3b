"""An attack of a paper is a set of options: a preset, which both styles make into an attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from attacks.minimal_norm import MinimalNormOptions
from attacks.options import AttackOptions, PatchOptions, PixelOptions

_OPTIONS: dict[str, type[AttackOptions]] = {
    "patch": PatchOptions,
    "pixel": PixelOptions,
    "minimal": MinimalNormOptions,
}
_ATTACKS = {"patch": "PatchAttack", "pixel": "PixelAttack", "minimal": "MinimalNormAttack"}


@dataclass(frozen=True)
class Preset:
    """An attack by its name: options, and options that follow from others, all of which the user may overrule.

    Args:
        name: What it is called on the command line and in tables.
        summary: What it does, in one line.
        paper: Where it comes from.
        threat: What it may change: "patch", "pixel" (within a ball), or "minimal" (as little as needed).
        options: The options that it sets.
        derived: For each option that follows from others, such as a step from the radius: a function of the checked
            options of everything else.

    Example:
        >>> attack = PIXEL_ATTACKS["pixel-pgd"].art(segmenter, eps=4 / 255)  # doctest: +SKIP
        >>> atk = PIXEL_ATTACKS["pixel-pgd"].torch(model, eps=4 / 255)  # doctest: +SKIP
    """

    name: str
    summary: str
    paper: str
    threat: Literal["patch", "pixel", "minimal"]
    options: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    @property
    def open(self) -> tuple[str, ...]:
        """The names of the options that the preset leaves open: all but those that make it what it is."""
        return tuple(n for n in _OPTIONS[self.threat].names() if n not in self.options and n not in self.derived)

    @property
    def settings(self) -> str:
        """What the preset sets, as text."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def resolve(self, **given: Any) -> dict[str, Any]:
        """The options of the attack.

        They are worked out once, here: an option that is set on the attack later changes no other one.

        Args:
            given: Options that overrule those of the preset.

        Raises:
            TypeError: On an option that does not exist.
            ValueError: On a value that is out of range.
        """
        options = {**self.options, **given}
        checked = _OPTIONS[self.threat].of(self.name, options)
        return options | {name: rule(checked) for name, rule in self.derived.items() if name not in given}

    def art(self, estimator: Any, **given: Any) -> Any:
        """The attack in the style of ART (`attacks.art_style`), with the options of `resolve`."""
        return self._make("attacks.art_style", estimator, self.resolve(**given))

    def torch(self, model: Any, *, ignore_index: int = 255, **given: Any) -> Any:
        """The attack in the style of torchattacks (`attacks.torch_style`), with the options of `resolve`."""
        return self._make("attacks.torch_style", model, {"ignore_index": ignore_index, **self.resolve(**given)})

    def _make(self, module: str, attacked: Any, keywords: dict[str, Any]) -> Any:
        # imported late: ART and torchattacks take seconds, and presets are listed without them
        return getattr(import_module(module), _ATTACKS[self.threat])(attacked, **keywords)
