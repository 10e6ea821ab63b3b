"""The lie detector of a run: for each model, defence and attack, what must hold if the numbers are to be believed.

After Carlini et al., "On Evaluating Adversarial Robustness" (2019), section 5, and AutoAttack's checks (Croce and Hein,
ICML 2020): a defence that hides its gradient, or an attack that does not work, looks like robustness. Each check is a
function from figures to a ``Finding`` (``evaluation.findings``); ``Checker`` gets the figures, from the rows of the run
and from a few images (``evaluation.probes``), and keeps what it found in the run's folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks.problem import DEFENCE_SAMPLES
from evaluation import metrics
from evaluation.findings import (
    Finding,
    collapsed_prediction,
    declared_randomness,
    more_helps,
    random_patch,
    rates,
    tallies,
    unbounded,
    untried,
    white_box,
    zero_gradients,
)
from evaluation.given import chosen_images
from evaluation.probes import (
    Batch,
    Defended,
    Probe,
    Trial,
    doubled,
    gradient_free,
    samples_of,
    steps_of,
    undeclared_randomness,
)
from evaluation.results import Record, worst
from evaluation.statistics import aim_fingerprint, threat_of
from evaluation.store import NONE, Store
from evaluation.survey import read_batch, reason
from evaluation.verdicts import Verdict

if TYPE_CHECKING:
    from evaluation.frames import SegmentationData
    from evaluation.metrics import Counts, Region

#: At most so many steps are a probe's "few": an attack of thousands of steps needs no more to show where it is going.
FEW_STEPS = 50

ABOUT_DEFENCES = ("declared randomness", "collapsed prediction")
ABOUT_ATTACKS = (
    "zero gradients", "more steps", "larger patch", "more samples", "white box", "unbounded", "random patch",
)  # fmt: skip
CHECKS = (*ABOUT_DEFENCES, *ABOUT_ATTACKS)


def probed_batches(data: SegmentationData, images: Sequence[int], number: int, batch_size: int) -> list[Batch]:
    """So many of these images, spread evenly over them, in batches.

    Args:
        data: the data set.
        images: those of the run that can be read.
        number: how many are probed, at least 1; all, if there are no more.
        batch_size: images in a batch.
    """
    chosen = [images[at] for at in chosen_images(min(number, len(images)), len(images))]
    parts = (chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size))
    return [Batch(part, *read_batch(data, part)[:2]) for part in parts]


@dataclass(frozen=True)
class Checker:
    """Checks the finished cells of a run, each once.

    Args:
        store: of the run; keeps the verdicts.
        factories: the attacks by name.
        make: ``make(attack, variant, segmenter=…, **options)`` gives the attack of a row, but for these options.
        batches: the images that are probed; None: nothing is computed, only what is held is read.
        region: where pixels count.
        seed: of the attack whose rows the probes are held against.
    """

    store: Store
    factories: Mapping[str, Callable[..., Any]]
    make: Callable[..., Any]
    batches: Sequence[Batch] | None
    region: Region
    seed: int

    def model(self, model: str, applied: Sequence[Defended], records: Iterable[Record]) -> list[Verdict]:
        """The verdicts on a model under the defences that apply to it, from its records and its probes."""
        rows: dict[str, dict[str, list[Record]]] = {}
        for record in records:
            if record.model == model:
                rows.setdefault(record.defence, {}).setdefault(record.attack, []).append(record)
        digests = {defence: _digest(found) for defence, found in rows.items()}
        verdicts: list[Verdict] = []
        for defended in applied:
            own = rows.get(defended.name, {})
            if not own:
                continue
            known: dict[Any, Trial] = {}  # what several attacks share
            black_boxes = functools.cache(functools.partial(self._black_boxes, defended, tuple(own)))
            basis = [digests[defended.name], digests.get(NONE), [list(b.images) for b in self.batches or ()]]
            about: list[tuple[str | None, Callable[[], Mapping[str, Finding]]]] = [
                (None, functools.partial(self._defence, defended, own, rows.get(NONE, {}))),
                *((name, functools.partial(self._attack, defended, name, own, known, black_boxes)) for name in own),
            ]
            for attack, find in about:
                cell = {"model": model, "attack": attack, "defence": defended.name}
                held = self.store.verdicts(cell, None if self.batches is None else _hash(basis))
                if held is None and self.batches is not None:
                    held = [
                        Verdict(name, model, defended.name, attack, finding.passed, finding.detail)
                        for name, finding in find().items()
                    ]
                    self.store.keep_verdicts(cell, _hash(basis), held)
                verdicts += held or []
        return verdicts

    def _defence(
        self, defended: Defended, own: Mapping[str, list[Record]], undefended: Mapping[str, list[Record]]
    ) -> dict[str, Finding]:
        segmenter, batches = defended.segmenter, self.batches or ()
        mine, theirs = _whole(own), _whole(undefended)
        common = sorted(mine.keys() & theirs.keys()) if defended.name != NONE else sorted(mine)
        before = np.sum([theirs[image] for image in common], axis=0) if defended.name != NONE and common else None
        return {
            "declared randomness": _tried(
                lambda: declared_randomness(segmenter.traits.random, undeclared_randomness(segmenter, batches))
            ),
            "collapsed prediction": collapsed_prediction(np.sum([mine[image] for image in common], axis=0), before)
            if common
            else untried("no image has rows with and without the defence"),
        }

    def _attack(
        self,
        defended: Defended,
        name: str,
        own: Mapping[str, list[Record]],
        known: dict[Any, Trial],
        black_boxes: Callable[[], list[str]],
    ) -> dict[str, Finding]:
        white = [record for record in own[name] if record.variant != "transfer"]
        variant = "adaptive" if any(record.variant == "adaptive" for record in white) else "plain"
        probe = Probe(
            defended,
            functools.partial(self.make, name, variant, segmenter=defended.segmenter),
            self.factories[name],
            self.batches or (),
            self.seed,
        )
        attack = probe.make()
        steps = steps_of(attack) if probe.takes("max_iter") else None
        few = None if steps is None else max(1, min(steps // 4, FEW_STEPS))
        # the run's own patches may be gone: what the probes are held against is made anew, in few steps
        base = functools.cache(lambda: probe.trial(**({} if few is None else {"max_iter": few})))
        probed = [image for batch in probe.batches for image in batch.images]
        full = [r for r in white if r.image in probed and r.seed == self.seed]
        reached = [r for r in full if r.variant == variant]
        no_gradient = gradient_free(attack)

        def steps_matter() -> Finding:
            if steps is None or few is None or few == steps:
                return untried("the attack has no number of steps that could be less")
            return more_helps(base().success(self.region), _success(reached, probed), f"{few} steps", f"{steps} steps")

        def size_matters() -> Finding:
            options = doubled(base())
            if options is None or not probe.takes("patch_shape"):
                return untried("there is no rectangular patch whose size could be another")
            larger = probe.trial(**({} if few is None else {"max_iter": few}), **options)
            less = base().success(hidden=larger.masks)
            sides = "×".join(map(str, options["patch_shape"]))
            return more_helps(less, larger.success(hidden=base().masks), "its own patch", f"one of {sides}")

        def samples_matter() -> Finding:
            if not defended.segmenter.traits.random:
                return untried("the defended model is not random")
            if not probe.takes("defence_samples") or getattr(attack, "eot", None) is not None:
                return untried("the attack has no number of draws of its own")
            samples = samples_of(attack)
            other = probe.trial(
                **({} if few is None else {"max_iter": few}),
                defence_samples=1 if samples > 1 else DEFENCE_SAMPLES,
            )
            less, more = (other, base()) if samples > 1 else (base(), other)
            count = max(samples, DEFENCE_SAMPLES if samples == 1 else 1)
            return more_helps(less.success(self.region), more.success(self.region), "1 draw", f"{count} draws")

        def knowledge_helps() -> Finding:
            if no_gradient:
                return untried("the attack is a black-box one itself")
            others = {"transfer": [record for record in own[name] if record.variant == "transfer"]}
            others |= {other: own[other] for other in black_boxes() if comparable(name, own[name], other, own[other])}
            return white_box(white, others)

        def gradient_is_there() -> Finding:
            if no_gradient:
                return untried("the attack uses no gradient")
            try:
                return zero_gradients(probe.gradients(attack, base().masks))
            except RuntimeError as error:
                return untried(f"no gradient comes back to the image: {reason(error)}")

        def everything_falls() -> Finding:
            if no_gradient:
                return untried("a search without a gradient does not get there in so few steps")
            return unbounded(probe.unbounded(attack, known).success("everywhere"))

        def noise_does_less() -> Finding:
            noise = probe.noise(base()).success(self.region)
            return random_patch(_without(full, probed), noise, _success(worst(full), probed))

        tried = (
            gradient_is_there, steps_matter, size_matters, samples_matter, knowledge_helps, everything_falls,
            noise_does_less,
        )  # fmt: skip
        return {check: _tried(find) for check, find in zip(ABOUT_ATTACKS, tried, strict=True)}

    def _black_boxes(self, defended: Defended, attacks: Sequence[str]) -> list[str]:
        """Those of the attacks that use no gradient."""
        return [name for name in attacks if gradient_free(self.make(name, "plain", segmenter=defended.segmenter))]


def comparable(name: str, records: Iterable[Record], other: str, others: Iterable[Record]) -> bool:
    """Whether two attacks change the same and, by ``statistics.aim_fingerprint``, have the same aim on each image."""
    aims = {(record.image, record.seed): aim_fingerprint(record) for record in records}
    met = [(aims[r.image, r.seed], aim_fingerprint(r)) for r in others if (r.image, r.seed) in aims]
    return threat_of(name) == threat_of(other) and all(one == two for one, two in met)


# ------------------------------------------------------------------------------------------------------------ details


def _tried(find: Callable[[], Finding]) -> Finding:
    """What is found; where an attack cannot be made or run as the check wants it, why."""
    try:
        return find()
    except Exception as error:  # an attack may raise anything, and a check is no reason to lose a run
        return untried(f"it could not be tried: {reason(error)}")


def _success(records: Sequence[Record], images: Sequence[int]) -> float:
    """Success rate on these images; NaN if one of them has no row."""
    if {record.image for record in records} != set(images):
        return math.nan
    return float(rates(tallies(records).sum(axis=0)[None])[0, 0])


def _without(records: Sequence[Record], images: Sequence[int]) -> float:
    """Success of no attack on these images; NaN if one of them has no row."""
    chosen = {record.image: record for record in records}
    if not chosen or set(chosen) != set(images):
        return math.nan
    counts = [record.clean if record.aim_clean is None else record.aim_clean for record in chosen.values()]
    hit = metrics.pixel_accuracy(metrics.merge(counts))
    return 1 - hit if next(iter(chosen.values())).aim_clean is None else hit


def _whole(rows: Mapping[str, list[Record]]) -> dict[int, Counts]:
    """Clean counts of each image, which no attack changes."""
    return {record.image: record.whole for records in rows.values() for record in records}


def _digest(rows: Mapping[str, list[Record]]) -> str:
    """What is in the rows of a defence: verdicts that rest on other rows are none."""
    digest = hashlib.sha256()
    for attack in sorted(rows):
        for record in sorted(rows[attack], key=lambda r: (r.variant, r.seed, r.image)):
            digest.update(repr((attack, record.variant, record.seed, record.image)).encode())
            for name in ("whole", "clean", "adversarial", "aim"):
                counts = getattr(record, name)
                digest.update(b"-" if counts is None else counts.tobytes())
    return digest.hexdigest()


def _hash(basis: Any) -> str:
    return hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:16]
