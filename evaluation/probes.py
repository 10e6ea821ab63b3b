"""What a check tries on a few images: an attack with fewer steps, a larger patch, noise, one gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from attacks.art_style import PixelAttack, SegmentationAttack
from attacks.criteria import off_label
from attacks.optimize import observed_traits
from attacks.options import AttackOptions, PixelOptions
from attacks.problem import DEFENCE_SAMPLES, Problem
from attacks.streams import stream
from evaluation.contact import generate, mask_of, takes, target_map
from evaluation.frames import IGNORE_INDEX
from evaluation.metrics import Region, counted_pixels
from ramdefense.segmenter import PyTorchSegmenter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Images = NDArray[np.float32]
    Maps = NDArray[np.int64]
    Masks = NDArray[np.bool_] | None

#: Steps of the unbounded attack. Each may go 2.5 / steps of the clip range (Madry et al. 2018: 2.5 ε / steps), so that
#: every pixel can reach every value and come back; the zoo's models are wrong on 98 % of the pixels and more after 20.
UNBOUNDED_STEPS = 20
_STRIDE = 2.5
#: An attack's own options that the unbounded one takes over: how it steps, and how it deals with a defence.
_KEPT = (
    "optimizer", "step_schedule", "momentum", "len_kernel", "defence_samples", "straight_through", "undefended", "seed",
)  # fmt: skip


class Defended(Protocol):
    """A segmenter under a defence, and what it predicts on a draw that no attack sees."""

    @property
    def name(self) -> str: ...
    @property
    def segmenter(self) -> PyTorchSegmenter: ...
    def predict(self, x: Images, images: Sequence[int]) -> Maps: ...


class Batch(NamedTuple):
    """Images (N, C, H, W) and label maps (N, H, W), and their numbers in the data set."""

    images: list[int]
    x: Images
    y: Maps


@dataclass(frozen=True)
class Trial:
    """What an attack did to some batches: for each, the images, the pixels it might change, its aim, the prediction."""

    batches: Sequence[Batch]
    adversarial: Sequence[Images]
    masks: Sequence[Masks]
    aims: Sequence[Maps | None]
    predicted: Sequence[Maps]
    attack: Any = None

    def success(self, region: Region = "outside", hidden: Sequence[Masks] | None = None) -> float:
        """Success rate over all its images; NaN if no pixel counts.

        Args:
            region: as in ``metrics.counted_pixels``.
            hidden: further pixels that do not count, whatever the region.
        """
        won = total = 0
        for row, (batch, mask, aim, predicted) in enumerate(
            zip(self.batches, self.masks, self.aims, self.predicted, strict=True)
        ):
            counted = counted_pixels(batch.y, mask, region=region)
            if hidden is not None:
                counted = counted_pixels(batch.y, hidden[row]) & counted_pixels(batch.y, mask)
            if aim is not None:
                counted &= aim != IGNORE_INDEX
            won += int((predicted != batch.y if aim is None else predicted == aim)[counted].sum())
            total += int(counted.sum())
        return won / total if total else float("nan")


@dataclass(frozen=True)
class Probe:
    """One attack on one defended model, to be tried with other options on a few images.

    Args:
        defended: the model under the defence.
        make: ``make(**options)`` gives the attack as the run has it, but for these options.
        factory: what makes it, to ask which options it takes.
        batches: the images.
        seed: of what is random here.
    """

    defended: Defended
    make: Callable[..., Any]
    factory: Callable[..., Any]
    batches: Sequence[Batch]
    seed: int = 0

    def takes(self, option: str) -> bool:
        """Whether the attack may be made with another value of this option."""
        return takes(self.factory, option)

    def trial(self, **options: Any) -> Trial:
        """The attack with these options in place of its own."""
        return self._trial(self.make(**options))

    def _trial(self, attack: Any) -> Trial:
        adversarial, masks, aims = [], [], []
        for images, x, y in self.batches:
            aims.append(target_map(attack, y, images))
            adversarial.append(generate(attack, x, y, images))
            masks.append(mask_of(attack, x))
        return self._scored(adversarial, masks, aims, attack)

    def _scored(
        self, adversarial: Sequence[Images], masks: Sequence[Masks], aims: Sequence[Maps | None], attack: Any
    ) -> Trial:
        predicted = [
            self.defended.predict(x, batch.images) for x, batch in zip(adversarial, self.batches, strict=True)
        ]
        return Trial(self.batches, adversarial, masks, aims, predicted, attack)

    def noise(self, like: Trial) -> Trial:
        """Random pixels where an attack changed some, from each image's own stream.

        Under a patch every value of the clip range is as likely; an attack that may change all pixels gives way to
        random signs times its largest change of that image.
        """
        low, high = self.defended.segmenter.clip_values
        made = []
        for batch, mask, adversarial in zip(self.batches, like.masks, like.adversarial, strict=True):
            drawn = [
                torch.rand(batch.x.shape[1:], generator=stream(self.seed, "random patch", image)).numpy()
                for image in batch.images
            ]
            values = np.stack(drawn).astype(np.float32)
            if mask is None:
                reach = np.abs(adversarial - batch.x).max(axis=(1, 2, 3), keepdims=True)
                made.append(np.clip(batch.x + np.where(values < 0.5, -reach, reach), low, high).astype(np.float32))
            else:
                made.append(np.where(mask[:, None], low + (high - low) * values, batch.x).astype(np.float32))
        return self._scored(made, like.masks, like.aims, None)

    def unbounded(self, attack: Any, known: dict[PixelOptions, Trial]) -> Trial:
        """An attack that may change every pixel to any value, to make every pixel wrong; all pixels count.

        An attack made of our options lends its step rule and what it does about a defence; one that takes ``eps`` gets
        the whole clip range; for any other one plain sign steps stand in, since the pixels under a patch are in no
        loss of a patch attack, which so has none under a patch that is the whole image.

        Args:
            attack: the attack as the run has it.
            known: what was tried before on this defended model; added to.
        """
        segmenter = self.defended.segmenter
        low, high = segmenter.clip_values
        if not isinstance(attack, SegmentationAttack) and self.takes("eps"):
            given = {"eps": high - low, "target": "untargeted"}
            return self.trial(**given, max_iter=UNBOUNDED_STEPS, eps_step=_STRIDE * (high - low) / UNBOUNDED_STEPS)
        options = whole_image(attack, segmenter, len(self.batches[0].images))
        if options not in known:
            given = {name: getattr(options, name) for name in PixelOptions.names()}
            known[options] = self._trial(PixelAttack(segmenter, **given))
        return known[options]

    def gradients(self, attack: Any, masks: Sequence[Masks]) -> NDArray[np.float32]:
        """The gradient of the cross entropy to the labels at the pixels that the attack may change, all in one row.

        As an adaptive attack differentiates the defended model: the mean over its draws, straight through what says
        that it has such a gradient. All pixels that are not void are in the loss, those under the patch too: where the
        model looks at a small neighbourhood, the middle of a patch would else have no gradient for a good reason.

        Raises:
            RuntimeError: nothing passes a gradient back to the image.
        """
        segmenter = self.defended.segmenter
        parts = []
        for batch, mask in zip(self.batches, masks, strict=True):
            options = whole_image(attack, segmenter, len(batch.images))
            x = torch.from_numpy(batch.x).to(segmenter.device)
            y = torch.from_numpy(batch.y).to(segmenter.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # undeclared randomness has a check of its own
                traits = observed_traits(segmenter, x[:1], options)
            problem = Problem(
                victim=segmenter,
                threat=options.threat(segmenter, x, y, batch.images),
                reference=y,
                streams=tuple(batch.images),
                options=options,
                traits=traits,
                objective=options.make_objectives()[0],
                criterion=off_label,
            )
            found = problem.look(x, 0, 0, gradient=True).gradient.cpu().numpy()
            changeable = np.ones(batch.y.shape, dtype=bool) if mask is None else mask
            # nothing is said of an image without a label
            changeable = changeable & (batch.y != IGNORE_INDEX).any(axis=(1, 2), keepdims=True)
            parts.append(np.moveaxis(found, 1, -1)[changeable].ravel())
        return np.concatenate(parts)


def whole_image(attack: Any, segmenter: PyTorchSegmenter, batch_size: int) -> PixelOptions:
    """Options of an untargeted attack with the cross entropy on the whole image, stepping as this attack does.

    Args:
        attack: whose step rule, samples and straight-through gradient are taken, where it has them.
        segmenter: for its clip range.
        batch_size: images at once.
    """
    low, high = segmenter.clip_values
    own: Mapping[str, Any] = {}
    if isinstance(attack, SegmentationAttack):
        own = {name: getattr(attack, name) for name in _KEPT if hasattr(attack, name)}
    elif getattr(attack, "defence_samples", None):
        own = {"defence_samples": attack.defence_samples}
    return PixelOptions(
        **own,
        target="untargeted",
        eps=high - low,
        eps_step=_STRIDE * (high - low) / UNBOUNDED_STEPS,
        max_iter=UNBOUNDED_STEPS,
        batch_size=batch_size,
        verbose=False,
    )


def gradient_free(attack: Any) -> bool:
    """Whether an attack made of our options asks for no gradient; of any other one nothing is known: False."""
    return isinstance(attack, SegmentationAttack) and not attack.options.make_step_rule().gradient


def samples_of(attack: Any) -> int:
    """Draws of a random defence in each of its steps."""
    return int(getattr(attack, "defence_samples", None) or DEFENCE_SAMPLES)


def steps_of(attack: Any) -> int | None:
    """Steps that it makes; None where it does not say."""
    steps = getattr(attack, "max_iter", None)
    return None if steps is None else int(steps)


def undeclared_randomness(segmenter: PyTorchSegmenter, batches: Sequence[Batch]) -> bool:
    """Whether two predictions of one of the images differ though the segmenter does not say that it is random."""
    if segmenter.traits.random:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the attacks themselves warn of it
        return any(
            observed_traits(segmenter, torch.from_numpy(batch.x[row : row + 1]), AttackOptions()).random
            for batch in batches
            for row in range(len(batch.images))
        )


def doubled(trial: Trial) -> dict[str, Any] | None:
    """The options that give a patch of twice the side, as far as it fits, around the place of the trial's patch.

    Returns:
        ``patch_shape`` and, if the patch is at one place on all images, ``patch_location``; None where there is no
        rectangular patch of one size, or none larger.
    """
    boxes = set()
    for mask in trial.masks:
        for covered in [] if mask is None else mask:
            rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
            if not len(rows) or covered.sum() != (np.ptp(rows) + 1) * (np.ptp(columns) + 1):
                return None
            boxes.add((int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1))
    if len({box[2:] for box in boxes}) != 1:
        return None
    sizes = [batch.y.shape[-2:] for batch in trial.batches]
    limit = min(height for height, _ in sizes), min(width for _, width in sizes)
    top, left, *shape = next(iter(boxes))
    larger = tuple(min(2 * side, most) for side, most in zip(shape, limit, strict=True))
    if larger == tuple(shape):
        return None
    options: dict[str, Any] = {"patch_shape": larger}
    if len(boxes) == 1:
        options["patch_location"] = tuple(
            min(max(at - (new - old) // 2, 0), most - new)
            for at, new, old, most in zip((top, left), larger, shape, limit, strict=True)
        )
    return options
