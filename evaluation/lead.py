"""A run in a few plain sentences: what was measured, and what is missing from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.results import Results, gathered


def title(results: Results) -> str:
    """What a page about a run is called."""
    return f"Segmentation under attack: {_listed(_names(results, 'model'), 'models')}"


def lead(results: Results) -> str:
    """What was measured, in two or three sentences."""
    images = len({record.image for record in results.records})
    data = results.configuration.get("data", {}).get("name", "")
    attacks, defences = _names(results, "attack"), [d for d in _names(results, "defence") if d != "none"]
    options = results.configuration.get("options", {})
    how = []
    if shape := _shape(options.get("patch_shape")):
        how.append(f"a patch of {shape} pixels")
    if steps := options.get("max_iter"):
        how.append(f"{steps} steps")
    with_what = f", with {' and '.join(how)}" if how else ""
    under = f", without defence and under {_listed(defences, 'defences')}" if defences else ", without defence"
    return (
        f"{images} image{'s' if images != 1 else ''}{f' of {data}' if data else ''} "
        f"{'were' if images != 1 else 'was'} attacked by {_listed(attacks, 'attacks')}{with_what}, on "
        f"{_listed(_names(results, 'model'), 'models')}{under}. “Fooled” is the share of pixels on which the model "
        "says what the attacker wants: the lower, the more robust. Each number is that of the strongest variant of the "
        "attack on each image."
    )


def unfinished(results: Results) -> list[str]:
    """The cells of a run, by name, that lack images which nothing explains: it was stopped, or goes on elsewhere.

    A cell is finished with its last variant: without defence the plain one, else the transferred one.
    """
    configuration = results.configuration
    if "images" not in configuration.get("data", {}):
        return []
    seeds = configuration.get("seed", 0)
    unreadable = {image for left in results.left_out if left.model is None for image in left.images}
    images = set(configuration["data"]["images"]) - unreadable
    units = {(image, seed) for image in images for seed in (seeds if isinstance(seeds, list) else [seeds])}
    held: dict[tuple[str, str, str, str], set[tuple[int, int]]] = {}
    for record in results.records:
        held.setdefault((record.model, record.attack, record.defence, record.variant), set()).add(
            (record.image, record.seed)
        )
    explained = {(left.model, left.attack, left.defence) for left in results.left_out}
    explained |= {(skip.model, skip.attack, skip.defence) for skip in results.skipped}
    inapplicable = {(skip.model, skip.attack) for skip in results.skipped if skip.attack is not None}
    lacking = []
    for model in configuration["models"]:
        for attack in configuration["attacks"]:
            for defence in configuration["defences"]:
                if {(model, attack, defence), (model, None, defence)} & explained or (model, attack) in inapplicable:
                    continue
                last = "plain" if defence == "none" else "transfer"
                if not units <= held.get((model, attack, defence, last), set()):
                    lacking.append(f"{model} · {attack} · {defence}")
    return lacking


def missing(results: Results, lacking: Sequence[str]) -> list[tuple[str, str]]:
    """What a reader must know is not there: (what kind, which), most serious first."""
    told: list[tuple[str, str]] = []
    if lacking:
        shown = "; ".join(lacking[:6]) + (f"; and {len(lacking) - 6} more" if len(lacking) > 6 else "")
        those = f"{len(lacking)} cell{'s lack' if len(lacking) > 1 else ' lacks'} images ({shown})"
        told.append(("Not finished", f"{those}. The command that began the run goes on with it."))
    elif results.interrupted:
        told.append(("Interrupted", "Only what was finished is here."))
    told += sorted(("Left out", str(left)) for left in gathered(results.left_out))
    told += [
        ("Not applicable", f"{skip.attack or skip.defence} on {skip.model}: {skip.reason}") for skip in results.skipped
    ]
    return list(dict.fromkeys(told))


def _names(results: Results, axis: str) -> list[str]:
    measured = {getattr(record, axis) for record in results.records}
    given: Mapping[str, Any] = results.configuration.get(f"{axis}s", {})
    tried = measured | {getattr(skip, axis) for skip in results.skipped if getattr(skip, axis)}
    return [name for name in dict.fromkeys([*given, *sorted(measured)]) if name in tried]


def _listed(names: Sequence[str], kind: str) -> str:
    """Names as a clause; many of them are counted."""
    if len(names) > 4:
        return f"{len(names)} {kind}"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _shape(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
