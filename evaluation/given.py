"""What a call of the evaluation is given, models, attacks, defences and images, checked and under their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attacks.catalogue import attacks as attack_catalogue
from attacks.catalogue import entry as attack_entry
from evaluation.frames import IGNORE_INDEX, SegmentationData
from evaluation.store import NONE
from ramdefense.defences import defence as defence_by_name
from ramdefense.segmenter import PyTorchSegmenter

AttackFactory = Callable[..., Any]
DefenceFunction = Callable[[PyTorchSegmenter], PyTorchSegmenter]

#: The names that stand for every attack of the catalogue, and for those that change a patch, or every pixel.
ALL = "all"
THREATS = ("patch", "pixel")


def _list(names: Any, what: str) -> list[Any]:
    listed = [names] if isinstance(names, (str, PyTorchSegmenter)) else list(names)
    if not listed:
        raise ValueError(f"no {what} given; at least one")
    return listed


def _unique(names: Sequence[str], what: str) -> None:
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        raise ValueError(f"{what} {', '.join(map(repr, twice))} given twice; a dict gives each a name of its own")


def named_attacks(attacks: str | Sequence[str] | Mapping[str, AttackFactory]) -> dict[str, AttackFactory]:
    """Attacks as ``evaluate`` takes them, by name; a group of the catalogue is its attacks."""
    if isinstance(attacks, Mapping):
        return {name: attacks[name] for name in _list(attacks, "attack")}
    names = _list(attacks, "attack")
    _unique(names, "attack")
    groups = {ALL: list(attack_catalogue())}
    for threat in THREATS:
        groups[threat] = [name for name, entry in attack_catalogue().items() if entry.threat == threat]
    named = [name for name in names if name not in groups]
    names = list(dict.fromkeys([*named, *(name for group in names for name in groups.get(group, []))]))
    return {name: attack_entry(name).factory for name in names}


def named_defences(defences: str | Sequence[str] | Mapping[str, DefenceFunction]) -> dict[str, DefenceFunction]:
    """Defences as ``evaluate`` takes them, by name, none at all the first of them."""
    if isinstance(defences, Mapping):
        functions = dict(defences)
    else:
        names = _list(defences, "defence")
        _unique(names, "defence")
        functions = {name: defence_by_name(name) for name in names}
    functions.pop(NONE, None)
    return {NONE: defence_by_name(NONE), **functions}


def named_segmenters(
    models: str | PyTorchSegmenter | Sequence[str | PyTorchSegmenter] | Mapping[str, PyTorchSegmenter],
    data: SegmentationData,
    first: int,
    device_type: str | None,
) -> dict[str, PyTorchSegmenter]:
    """Segmenters as ``evaluate`` takes them, by name, all of the data's classes."""
    if isinstance(models, Mapping):
        named = list(models.items())
    else:
        named = [(m if isinstance(m, str) else type(m.model).__name__, m) for m in _list(models, "model")]
    _unique([name for name, _ in named], "model")
    segmenters = {}
    for name, model in named:
        if isinstance(model, str):
            from evaluation.models import load_model

            channels, height, width = data[first].image.shape
            shape = (channels, height, width)
            model = load_model(model, nb_classes=len(data.classes), input_shape=shape, device_type=device_type)
        if not isinstance(model, PyTorchSegmenter):
            raise ValueError(f"model {name!r} is a {type(model).__name__}; wrap it in a PyTorchSegmenter")
        if model.nb_classes != len(data.classes):
            raise ValueError(
                f"model {name!r} has {model.nb_classes} classes and the data {len(data.classes)} "
                f"({', '.join(data.classes[:3])}, …); they must be the same classes"
            )
        if model.ignore_index != IGNORE_INDEX:
            raise ValueError(f"model {name!r} ignores {model.ignore_index}; the data's void label is {IGNORE_INDEX}")
        segmenters[name] = model
    if not segmenters:
        raise ValueError("no model given; at least one")
    return segmenters


def chosen_images(images: int | Sequence[int] | None, length: int) -> list[int]:
    """The images that are meant, of a data set of that length: so many, spread evenly, or those indices."""
    if images is None:
        return list(range(length))
    if isinstance(images, int):
        if not 1 <= images <= length:
            raise ValueError(f"images={images}: the data set has {length}; 1 to {length}")
        return [int(i) for i in np.linspace(0, length - 1, images).round()] if images > 1 else [0]
    chosen = [int(i) for i in images]
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < length for i in chosen):
        raise ValueError(f"images={chosen}: different indices from 0 to {length - 1}, at least one")
    return chosen


def chosen_seeds(seed: int | Sequence[int]) -> list[int]:
    """One seed or several, different ones."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in seeds)
    if not seeds or not whole or len(set(seeds)) != len(seeds):
        raise ValueError(f"seed={seed}: a whole number, or different ones, at least one")
    return seeds
