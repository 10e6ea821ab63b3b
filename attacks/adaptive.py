"""The attack that a defence has to survive: several of different kinds, of which each image keeps the worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attacks.ensemble import WorstCaseAttack
from attacks.patchwise import PATCH_ATTACKS
from attacks.presets import Preset
from ramdefense.interception import attention_sites

#: Three losses under one step rule; the pull on attention; no gradient at all; plain steps; and the patch that was made
#: as if the defence were not there.
MEMBERS: Mapping[str, Mapping[str, Any]] = {
    "apgd": {"objective": ("cross_entropy", "margin", "jensen_shannon")},
    "attention-fool": {},
    "square-patch": {},
    "pgd": {},
    "untouched": {"undefended": True, "objective": "margin"},
}
_PRESET = {"untouched": "margin"}


def adaptive_attack(estimator: Any, **options: Any) -> WorstCaseAttack:
    """The named ensemble of `ramdefense evaluate --attack adaptive`.

    The attention attack is left out on a model without attention, and the patch of the undefended model where there is
    no defence, since it would be the margin attack once more.

    Args:
        estimator: A `ramdefense.PyTorchSegmenter`.
        options: Of `attacks.options.PatchOptions`, for all members alike; those that make a member what it is stay.
    """
    shape = tuple(estimator.input_shape)
    members = {}
    for name, own in MEMBERS.items():
        if name == "attention-fool" and not attention_sites(estimator.model, shape):
            continue
        preset: Preset = PATCH_ATTACKS[_PRESET.get(name, name)]
        given = {key: value for key, value in options.items() if key not in own and key not in preset.options}
        members[name] = preset.art(estimator, **given, **own)
    return WorstCaseAttack(estimator, members, batch_size=options.get("batch_size", 8))
