"""Several models attacked as one, and several attacks of which each image keeps the strongest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from torch import Tensor, nn

from attacks.criteria import off_label, on_target
from attacks.interfaces import CataloguedAttack
from attacks.optimize import Result, observed_traits, reference_map
from attacks.options import AttackOptions
from attacks.patch import Patch
from attacks.streams import stream_numbers
from ramdefense.outputs import labels_of
from ramdefense.segmenter import PyTorchSegmenter, SegmenterMixin

Array = TypeVar("Array", np.ndarray, Tensor)

UNSEEN = -1_000_000
"""Draws of a random defence from here down decide between attacks: no attack (0, 1, …) and no prediction (-1, -2, …)
sees them."""

DRAWS = 8
"""How many of them, unless `draws` says otherwise."""


class FusedLogits(nn.Module):
    """The mean of the logits of several segmenters (Dong et al. 2018, eq. 7: an ensemble in logits).

    Args:
        segmenters: Each brings its own preprocessing and its own way to logits at the size of the images. They run in
            `eval()` mode, whatever mode this module is in.
        weights: One for each, summing to 1.
    """

    def __init__(self, segmenters: Sequence[PyTorchSegmenter], weights: Sequence[float]) -> None:
        super().__init__()
        self.segmenters, self.weights = tuple(segmenters), tuple(weights)
        self.members = nn.ModuleList(segmenter.model for segmenter in segmenters)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in the clip range -> logits (N, nb_classes, H, W)."""
        parts = [weight * s.logits(images) for weight, s in zip(self.weights, self.segmenters, strict=True)]
        return torch.stack(parts).sum(0)


def ensemble(segmenters: Sequence[PyTorchSegmenter], weights: Sequence[float] | None = None) -> PyTorchSegmenter:
    """One segmenter whose logits are the mean of those of several: an attack on it is one on them all.

    What is made on it is meant for a model that is not among them. The models are shared, not copied; defended ones
    keep their traits, and run under the conditions that the ensemble is given.

    Args:
        segmenters: With the same classes, channels, clip range, void label and device; each with its own preprocessing.
        weights: How much each one counts, 0 or above, in any unit; None: all the same.

    Raises:
        ValueError: If there is none, if they differ in what they must share, or on weights that do not fit.
    """
    if not segmenters:
        raise ValueError("An ensemble needs at least one segmenter.")
    first = segmenters[0]
    for other in segmenters[1:]:
        for name, of in _SHARED.items():
            if of(other) != of(first):
                raise ValueError(f"The segmenters differ in {name}: {of(first)} and {of(other)}; it must be the same.")
    given = [1.0] * len(segmenters) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(segmenters) or not all(w >= 0 and math.isfinite(w) for w in given) or sum(given) == 0:
        raise ValueError(
            f"`weights` is {weights!r}; give a number of 0 or above for each of the {len(segmenters)} segmenters, "
            "not all of them 0."
        )
    total = sum(given)
    # copies with the same model: what is set on a segmenter later does not reach into the ensemble
    members = [segmenter.with_model(segmenter.model) for segmenter in segmenters]
    return PyTorchSegmenter(
        FusedLogits(members, [weight / total for weight in given]),
        nb_classes=first.nb_classes,
        input_shape=first.input_shape,  # type: ignore[arg-type]
        clip_values=first.clip_values,
        ignore_index=first.ignore_index,
        device_type=first.device_type,
    )


_SHARED: dict[str, Callable[[PyTorchSegmenter], Any]] = {
    "nb_classes": lambda segmenter: segmenter.nb_classes,
    "channels": lambda segmenter: segmenter.input_shape[0],
    "clip_values": lambda segmenter: segmenter.clip_values,
    "ignore_index": lambda segmenter: segmenter.ignore_index,
    "device": lambda segmenter: segmenter.device,
}


class WorstCaseAttack(EvasionAttack):
    """Several attacks, of which each image keeps the one that wins most of its pixels.

    All of them are judged alike, by the share of pixels won on the segmenter as it stands. Where it is random that is
    the mean over draws that no attack has seen, so that the luckiest guess at the defence does not pass for the
    strongest attack. Of equals the first is kept.

    Args:
        estimator: The segmenter to judge on; the one that the attacks were made for, or should have been.
        attacks: Name → attack; in a list they are named "0", "1", … They must aim at the same map and change the same
            pixels, so make them with the same seed and the same patch; `of` does.
        draws: Draws of a random defence to judge on; None: `DRAWS` for a segmenter that is random, 1 for any other.
        batch_size: Images judged at once.

    Attributes:
        chosen: Name of the attack that each image of the last `generate` kept; None before.
        judged: Name → share of the pixels won on each image; None before.
        patch: The patches kept, where every attack made one of the same place and size; None otherwise, and before.
        result: Share won and loss of the attack that was kept (by its own objective), for each image; steps, passes and
            seconds of all of them, the passes of the judging included. None before, as `patch`.

    Raises:
        art.exceptions.EstimatorError: If the estimator is no segmenter.
        ValueError: If there is no attack, or on a number that is out of range.
    """

    attack_params: ClassVar[list[str]] = [*EvasionAttack.attack_params, "attacks", "draws", "batch_size"]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, SegmenterMixin)

    def __init__(
        self,
        estimator: Any,
        attacks: Mapping[str, CataloguedAttack] | Sequence[CataloguedAttack],
        *,
        draws: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(estimator=estimator)
        self.attacks, self.draws, self.batch_size = attacks, draws, batch_size
        self.chosen: tuple[str, ...] | None = None
        self.judged: dict[str, tuple[float, ...]] | None = None
        self.patch: Patch | None = None
        self.result: Result | None = None
        self._check_params()

    @classmethod
    def of(
        cls,
        estimator: Any,
        factories: Mapping[str, Callable[..., CataloguedAttack]],
        *,
        draws: int | None = None,
        **options: Any,
    ) -> Self:
        """The worst case of attacks made here, each by `factory(estimator, **options)`, so that their targets agree."""
        made = {name: factory(estimator, **options) for name, factory in factories.items()}
        return cls(estimator, made, draws=draws, batch_size=options.get("batch_size", 8))

    def generate(self, x: Array, y: Any = None, *, images: Sequence[int] | None = None) -> Array:
        """Run every attack, and keep for each image what the strongest made of it.

        Args:
            x: Images, (N, C, H, W), floating point in the clip range, array or tensor.
            y: Ground truth, (N, H, W) or scores (N, nb_classes, H, W); None, where every attack is untargeted: the
                model's own prediction.
            images: Stream number of each image; None: 0..N-1.

        Returns:
            The adversarial images, of the kind, dtype and device of `x`.

        Raises:
            ValueError: If the attacks differ in target or mask, and whatever they raise themselves.
        """
        began = time.perf_counter()
        members = self._check_params()
        streams = stream_numbers(images, len(x))
        aim = None if y is None else self.target_map(y, streams)

        # an attack may work in place: each has copies of its own
        batches = [torch.as_tensor(attack.generate(_copy(x), _copy(y), images=streams)) for attack in members.values()]
        mask = self.mask(x)  # after the attacks, which may choose where their patch goes
        reference = self._reference(torch.as_tensor(x), y, aim, streams)
        criterion = off_label if aim is None else on_target
        won, passes = self._judge(batches, reference, torch.as_tensor(mask), streams, criterion)

        best = won.argmax(0)  # the first of equals
        rows = torch.arange(len(x))
        names = tuple(members)
        self.chosen = tuple(names[index] for index in best.tolist())
        self.judged = {name: tuple(row.tolist()) for name, row in zip(names, won, strict=True)}
        self.patch = _kept_patch([getattr(attack, "patch", None) for attack in members.values()], best)
        kept = torch.stack([batch.to(batches[0]) for batch in batches])[best.to(batches[0].device), rows]
        self.result = self._sum(members, best, won, passes, began)
        return kept.numpy() if isinstance(x, np.ndarray) else kept

    def target_map(self, y: Array, images: Sequence[int] | None = None) -> Array | None:
        """The map that all the attacks aim at, (N, H, W), of the kind of `y`; None if they are untargeted."""
        members = self._check_params()
        return _agreed("target", {name: attack.target_map(y, images) for name, attack in members.items()})

    def mask(self, x: Array) -> Array:
        """The pixels that all the attacks may change, (N, H, W) bool, of the kind of `x`."""
        return _agreed("mask", {name: attack.mask(x) for name, attack in self._check_params().items()})

    @property
    def targeted(self) -> bool:
        """Whether the attacks are to reach a map (True) or to leave one."""
        return any(getattr(attack, "targeted", False) for attack in self._check_params().values())

    def set_params(self, **kwargs: Any) -> None:
        """Set arguments by name, all of them or, if one is refused, none."""
        before = {name: getattr(self, name) for name in self.attack_params}
        try:
            super().set_params(**kwargs)
        except ValueError:
            super().set_params(**before)
            raise

    def _check_params(self) -> dict[str, CataloguedAttack]:
        """The attacks by name."""
        super()._check_params()
        members = self.attacks
        if not isinstance(members, Mapping):
            members = {str(number): attack for number, attack in enumerate(members)}
        if not members:
            raise ValueError("`attacks` is empty; give at least one.")
        for name, value in (("draws", self.draws), ("batch_size", self.batch_size)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "draws" and value is None):
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        return dict(members)

    def _reference(self, x: Tensor, y: Any, aim: Any, streams: tuple[int, ...]) -> Tensor:
        """What the predictions are held against: the target map, the labels, or the segmenter's own prediction."""
        if aim is not None:
            return torch.as_tensor(aim)
        labels = None if y is None else labels_of(y, self.estimator.nb_classes, self.estimator.ignore_index)
        return reference_map(self.estimator, x, labels, AttackOptions(batch_size=self.batch_size), streams)

    @torch.no_grad()
    def _judge(
        self,
        batches: Sequence[Tensor],
        reference: Tensor,
        mask: Tensor,
        streams: tuple[int, ...],
        criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, int]:
        """Share of the pixels won by each attack on each image, (attacks, N) on the CPU, and the passes it took."""
        victim = self.estimator
        counted = (reference != victim.ignore_index) & ~mask.to(reference.device)
        random = observed_traits(victim, batches[0][:1], AttackOptions()).random
        draws = (DRAWS if random else 1) if self.draws is None else self.draws
        won = torch.zeros(len(batches), len(streams), dtype=torch.float64)
        for first in range(0, len(streams), self.batch_size):
            rows = slice(first, first + self.batch_size)
            wanted, use = reference[rows].to(victim.device), counted[rows].to(victim.device)
            for number, batch in enumerate(batches):
                for draw in range(draws):
                    with victim.conditions(images=streams[rows], draw=UNSEEN - draw):
                        logits = victim.logits(batch[rows].to(victim.device))
                    won[number, rows] += criterion(logits, wanted, use).cpu().double() / draws
        return won, len(batches) * len(streams) * draws

    def _sum(
        self, members: Mapping[str, CataloguedAttack], best: Tensor, won: Tensor, passes: int, began: float
    ) -> Result:
        """What all of it took; an attack that does not say what it took counts for nothing."""
        results = [getattr(attack, "result", None) for attack in members.values()]
        told = [result for result in results if isinstance(result, Result)]
        chosen = [(results[number], row) for row, number in enumerate(best.tolist())]
        return Result(
            criterion=tuple(won.amax(0).tolist()),
            loss=tuple(kept.loss[row] if isinstance(kept, Result) else math.nan for kept, row in chosen),
            steps=tuple(sum(result.steps[row] for result in told) for row in range(len(best))),
            forwards=sum(result.forwards for result in told) + passes,
            backwards=sum(result.backwards for result in told),
            seconds=time.perf_counter() - began,
        )

    def __repr__(self) -> str:
        """A call that makes this attack again, for a variable `estimator`."""
        members = ", ".join(f"{name!r}: {attack!r}" for name, attack in self._check_params().items())
        return f"{type(self).__name__}(estimator, {{{members}}}, draws={self.draws!r}, batch_size={self.batch_size!r})"


def _agreed(what: str, values: Mapping[str, Any]) -> Any:
    """What all attacks say, if they say the same."""
    (first, value), *others = values.items()
    for name, other in others:
        same = value is None if other is None else value is not None and np.array_equal(_array(other), _array(value))
        if not same:
            raise ValueError(
                f"The attacks {first!r} and {name!r} differ in their {what}, so that no image can choose between them; "
                "make them with the same seed, target and patch."
            )
    return value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else None if value is None else value.copy()


def _array(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _kept_patch(patches: Sequence[Any], best: Tensor) -> Patch | None:
    """The patch of each image from the attack that it kept; None where they are not of one kind."""
    if not all(isinstance(patch, Patch) and patch.pixels.ndim == 4 for patch in patches):
        return None
    first = patches[0]
    if any((patch.location, patch.pixels.shape) != (first.location, first.pixels.shape) for patch in patches):
        return None
    # shapes cut out by alpha, if they are not of one shape, are not of one mask either
    rows = torch.arange(len(best))
    return Patch(torch.stack([patch.pixels for patch in patches])[best, rows], first.location, first.alpha)
