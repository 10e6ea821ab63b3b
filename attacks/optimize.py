"""The one loop that makes patches, on tensors, behind both styles of attack.

One step is one forward and one backward pass for each sample of the randomness: the forward pass at the patch of step t
gives the gradient that moves it and the success that it had. Patches of one batch know nothing of each other, so an
image that is done leaves, and every random number belongs to an image's stream, so neither the batch size nor the order
of the images changes a result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from attacks.criteria import Criterion, off_label, on_target
from attacks.objectives import Objective
from attacks.options import PatchOptions
from attacks.patch import Patch, paste, rectangle, resolve_location, resolve_shape
from attacks.steps import SCHEDULES, State, project_box
from attacks.streams import stream, stream_numbers
from ramdefense.checks import check_images, check_labels
from ramdefense.traits import Traits

DEFENCE_SAMPLES = 4
"""Draws of a random defence in each step, unless `defence_samples` says otherwise."""


class Victim(Protocol):
    """What the loop asks of a segmenter."""

    @property
    def nb_classes(self) -> int: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def clip_values(self) -> tuple[float, float]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def traits(self) -> Traits: ...

    def logits(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, nb_classes, H, W), differentiable."""

    def conditions(
        self, *, images: Sequence[int] | None = None, draw: int | None = None, straight_through: bool = False
    ) -> AbstractContextManager[None]:
        """The conditions under which a defended model runs inside a `with`."""


@dataclass(frozen=True)
class Result:
    """What it took to make the patches, and what they reached by the attack's own criterion.

    Args:
        criterion: Share of the counted pixels won, for each image, in [0, 1]; under a random defence or EOT an estimate
            from the samples of one step, the best of many, hence optimistic.
        loss: The objective at the kept patch, for each image.
        steps: Steps made, for each image, over all restarts.
        forwards: Forward passes, counted in images.
        backwards: Backward passes, counted in images.
        seconds: Wall-clock time.
    """

    criterion: tuple[float, ...]
    loss: tuple[float, ...]
    steps: tuple[int, ...]
    forwards: int
    backwards: int
    seconds: float


def reference_map(
    victim: Victim,
    images: Tensor,
    y: Tensor | None,
    options: PatchOptions,
    streams: Sequence[int] | None = None,
) -> Tensor:
    """The map that an attack aims at, or that an untargeted one leaves: (N, H, W) int64.

    Args:
        victim: The segmenter; asked for its own prediction where there is no label map.
        images: (N, C, H, W).
        y: Label map, or target map of a targeted attack without a target; (N, H, W) int64.
        options: For `target` and `targeted`.
        streams: Stream number of each image.

    Raises:
        ValueError: If `y` is None and the attack is targeted, or `y` does not fit.
    """
    streams = stream_numbers(streams, len(images))
    if y is None:
        if options.aims:
            wanted = "the ground truth" if options.target else "the target map"
            raise ValueError(f"A targeted attack needs `y`, {wanted}, (N, H, W).")
        y = _own_prediction(victim, images, streams, options.batch_size)
    check_labels(y, victim.nb_classes, victim.ignore_index, (len(images), *images.shape[-2:]))
    y = y.long()
    if options.target is None:
        return y
    reference = options.target(
        y, nb_classes=victim.nb_classes, ignore_index=victim.ignore_index, images=streams
    )
    check_labels(reference, victim.nb_classes, victim.ignore_index, (len(images), *images.shape[-2:]))
    return reference


def make_patch(
    victim: Victim,
    images: Tensor,
    y: Tensor | None,
    options: PatchOptions,
    streams: Sequence[int] | None = None,
) -> tuple[Patch, Result]:
    """Make one patch for each image.

    Args:
        victim: The segmenter to attack.
        images: (N, C, H, W) floating point in the clip range, on any device, unchanged.
        y: See `reference_map`.
        options: How.
        streams: Stream number of each image; None: 0..N-1.

    Returns:
        The patches, (N, C, h, w), and what they took.

    Raises:
        ValueError: On images or labels that do not fit, or a patch that does not fit on them.
    """
    began = time.perf_counter()
    low, high = (float(value) for value in victim.clip_values)
    check_images(images, (low, high))
    size = images.shape[-2], images.shape[-1]
    shape = resolve_shape(options.patch_shape, size)
    location = resolve_location(options.patch_location, shape, size)
    streams = stream_numbers(streams, len(images))
    reference = reference_map(victim, images, y, options, streams)

    batches = range(0, len(images), options.batch_size)
    kept: list[_Kept] = []
    spent = _Spent()
    with tqdm(total=len(batches) * options.num_restarts * options.max_iter, disable=not options.verbose) as progress:
        for first in batches:
            rows = slice(first, first + options.batch_size)
            problem = _Problem(
                victim=victim,
                images=images[rows].detach().to(victim.device),
                reference=reference[rows].to(victim.device),
                streams=streams[rows],
                shape=shape,
                location=location,
                options=options,
                traits=victim.traits,
                objective=options.make_objective(),
                criterion=on_target if options.aims else off_label,
                spent=spent,
            )
            kept.append(_best_of_restarts(problem, progress))
    pixels = torch.cat([batch.pixels.cpu() for batch in kept])
    result = Result(
        criterion=tuple(torch.cat([batch.criterion for batch in kept]).tolist()),
        loss=tuple(torch.cat([batch.loss for batch in kept]).tolist()),
        steps=tuple(torch.cat([batch.steps for batch in kept]).tolist()),
        forwards=spent.forwards,
        backwards=spent.backwards,
        seconds=time.perf_counter() - began,
    )
    return Patch(pixels, options.patch_location), result


@dataclass
class _Spent:
    """Passes so far, counted in images."""

    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class _Problem:
    """The images of one batch and everything that is fixed while their patches are made."""

    victim: Victim
    images: Tensor
    reference: Tensor
    streams: tuple[int, ...]
    shape: tuple[int, int]
    location: tuple[int, int]
    options: PatchOptions
    traits: Traits
    objective: Objective
    criterion: Criterion
    spent: _Spent

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, chosen: Tensor) -> _Problem:
        """The problem of some of the images; `chosen` holds their indices."""
        numbers = tuple(self.streams[row] for row in chosen.tolist())
        return replace(self, images=self.images[chosen], reference=self.reference[chosen], streams=numbers)

    @property
    def deterministic(self) -> bool:
        """Whether one look at a patch says all about it."""
        return self.samples == 1 and self.options.eot is None and not self.traits.random

    @property
    def samples(self) -> int:
        """Passes in each step. Each has a transformation and a draw of its own, so the larger number covers both."""
        drawn = self.options.defence_samples or (DEFENCE_SAMPLES if self.traits.random else 1)
        return max(drawn, self.options.eot.samples if self.options.eot else 1)

    def under(self, draw: int) -> AbstractContextManager[None]:
        """The defence's conditions for one pass; nothing for a model that has none to set."""
        wanted = self.options.straight_through
        straight_through = self.traits.straight_through if wanted is None else wanted
        if not (self.traits.random or self.traits.straight_through or straight_through):
            return nullcontext()
        return self.victim.conditions(images=self.streams, draw=draw, straight_through=straight_through)

    def start(self, restart: int) -> Tensor:
        """The pixels of step 0: mid-grey, or uniform in the box from each image's stream."""
        low, high = (float(value) for value in self.victim.clip_values)
        whole = (self.images.shape[1], *self.shape)
        if restart == 0 and not self.options.random_start:
            return self.images.new_full((len(self), *whole), (low + high) / 2)
        drawn = [
            torch.rand(whole, generator=stream(self.options.seed, "start", image, restart)) for image in self.streams
        ]
        return low + (high - low) * torch.stack(drawn).to(self.images)

    def place(self, pixels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The images with the patches on them, and the pixels under these, (H, W) or (N, H, W) bool."""
        if self.options.eot is None:
            size = self.images.shape[-2], self.images.shape[-1]
            return paste(self.images, pixels, self.location), rectangle(
                self.shape, self.location, size, self.images.device
            )
        low, high = self.victim.clip_values
        transformation = self.options.eot.sample([(self.options.seed, image, *key) for image in self.streams])
        return transformation.apply(self.images, pixels, self.location, (low, high))

    def look(self, pixels: Tensor, restart: int, step: int, *, gradient: bool) -> _Look:
        """Loss, success and, where asked for, gradient of the patches, each the mean over this step's samples."""
        looks = list(self._samples(pixels, restart, step, gradient))
        self.spent.forwards += len(looks) * len(self)
        self.spent.backwards += len(looks) * len(self) * gradient
        return _mean(looks)

    def _samples(self, pixels: Tensor, restart: int, step: int, gradient: bool) -> Iterator[_Look]:
        valid = self.reference != self.victim.ignore_index
        for sample in range(self.samples):
            leaf = pixels.detach().requires_grad_(gradient)
            # every look of every restart draws anew: 0, 1, 2, …
            draw = (restart * (self.options.max_iter + 1) + step) * self.samples + sample
            with torch.set_grad_enabled(gradient), self.under(draw):
                placed, covered = self.place(leaf, (restart, step, sample))
                counted = valid & ~covered
                logits = self.victim.logits(placed)
                loss = self.objective(logits, self.reference, counted)
                # asked for alone: the gradients of the weights are not computed
                slope = torch.autograd.grad(loss.sum(), leaf)[0] if gradient else torch.zeros_like(leaf)
            yield _Look(self.criterion(logits.detach(), self.reference, counted), loss.detach(), slope)


@dataclass(frozen=True)
class _Look:
    """What a look at the patches of a batch shows: (N,), (N,) and (N, C, h, w), zero if no gradient was asked for."""

    criterion: Tensor
    loss: Tensor
    gradient: Tensor

    def rows(self, chosen: Tensor) -> _Look:
        """The look at some of the patches."""
        return _Look(self.criterion[chosen], self.loss[chosen], self.gradient[chosen])


def _mean(looks: list[_Look]) -> _Look:
    if len(looks) == 1:
        return looks[0]
    return _Look(*(torch.stack(parts).mean(0) for parts in zip(*(vars(look).values() for look in looks), strict=True)))


@dataclass
class _Kept:
    """The patches kept so far for the images of a batch, what they reached, and the steps made for them."""

    pixels: Tensor
    criterion: Tensor
    loss: Tensor
    steps: Tensor

    @classmethod
    def nothing(cls, pixels: Tensor) -> _Kept:
        """Patches that every other is better than."""
        never = pixels.new_full((len(pixels),), torch.inf)
        return cls(pixels.clone(), -never, never.clone(), torch.zeros_like(never, dtype=torch.int64))

    def keep(self, rows: Tensor, pixels: Tensor, criterion: Tensor, loss: Tensor) -> None:
        """Take the patches of the images `rows` where they are better: more won or, as much won, less loss."""
        won, lost = self.criterion[rows], self.loss[rows]
        better = (criterion > won) | ((criterion == won) & (loss < lost))
        self.pixels[rows] = pixels.where(better[:, None, None, None], self.pixels[rows])
        self.criterion[rows] = criterion.to(won.dtype).where(better, won)
        self.loss[rows] = loss.to(lost.dtype).where(better, lost)


def _best_of_restarts(problem: _Problem, progress: tqdm) -> _Kept:
    """Run every restart on the images that are not done, and keep the best patch of each."""
    best = _Kept.nothing(problem.start(0))
    left = torch.arange(len(problem), device=problem.images.device)
    for restart in range(problem.options.num_restarts):
        if problem.deterministic and problem.options.keep_best:
            left = left[best.criterion[left] < 1]
        if len(left):
            run = _run(problem.rows(left), restart, progress)
            best.keep(left, run.pixels, run.criterion, run.loss)
            best.steps[left] += run.steps
        else:
            progress.update(problem.options.max_iter)
    return best


def _run(problem: _Problem, restart: int, progress: tqdm) -> _Kept:
    """One run of the loop over the images of a problem."""
    options = problem.options
    low, high = (float(value) for value in problem.victim.clip_values)
    rule, schedule = options.make_step_rule(), SCHEDULES[options.step_schedule]
    pixels = problem.start(restart)
    state: State = rule.start(pixels)
    kept = _Kept.nothing(pixels)
    rows = torch.arange(len(problem), device=pixels.device)  # of the kept patches, for the images still in the batch
    for step in range(options.max_iter):
        look = problem.look(pixels, restart, step, gradient=True)
        if options.keep_best:
            kept.keep(rows, pixels, look.criterion, look.loss)
            # an estimate of 1 from a few draws is no proof, so only a deterministic problem is ever done
            if problem.deterministic and bool((look.criterion == 1).any()):
                stay = (look.criterion < 1).nonzero()[:, 0]
                if not len(stay):
                    progress.update(options.max_iter - step)
                    return kept
                rows, pixels, problem, look = rows[stay], pixels[stay], problem.rows(stay), look.rows(stay)
                state = {name: value[stay] for name, value in state.items()}
        step_size = schedule(step / options.max_iter) * options.eps_step
        pixels, state = rule.update(pixels, look.gradient, step_size, state)
        pixels = project_box(pixels, low, high)
        kept.steps[rows] += 1
        progress.update()
    last = problem.look(pixels, restart, options.max_iter, gradient=False)
    kept.keep(rows, pixels, last.criterion, last.loss)
    return kept


@torch.no_grad()
def _own_prediction(victim: Victim, images: Tensor, streams: tuple[int, ...], batch_size: int) -> Tensor:
    """What the model says of the images itself, (N, H, W), under draw 0 of a random defence."""
    maps = []
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        with victim.conditions(images=streams[rows], draw=0):
            maps.append(victim.logits(images[rows].to(victim.device)).argmax(1).to(images.device))
    return torch.cat(maps)
