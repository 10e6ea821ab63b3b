"""The one loop that makes patches and perturbations, on tensors, behind both styles of attack.

One step is one forward and one backward pass for each sample of the randomness: the pass at the point of step t gives
the gradient that moves it and the success that it had. The images of one batch know nothing of each other, so an image
that is done leaves, and every random number belongs to an image's stream, so neither the batch size nor the order of
the images changes a result.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from attacks.criteria import off_label, on_target
from attacks.frozen import frozen
from attacks.interfaces import Victim
from attacks.late import Late
from attacks.options import AttackOptions, PatchOptions
from attacks.partial import in_part
from attacks.patch import Patch, for_each_image
from attacks.problem import Problem, Spent
from attacks.steps import SCHEDULES, Seen, State
from attacks.streams import stream, stream_numbers
from attacks.threats import Threat
from ramdefense.checks import check_images, check_labels
from ramdefense.outputs import predictions_of
from ramdefense.traits import Traits

_SAME = 1e-3  # of the largest logit: what kernels that add in another order may differ by


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
    options: AttackOptions,
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
            wanted = "the ground truth" if options.goal else "the target map"
            raise ValueError(f"A targeted attack needs `y`, {wanted}, (N, H, W).")
        y = _own_prediction(victim, images, streams, options.batch_size)
    check_labels(y, victim.nb_classes, victim.ignore_index, (len(images), *images.shape[-2:]))
    y = y.long()
    goal = options.goal
    if goal is None:
        return y
    reference = goal(
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
        The patches, (N, C, h, w), where the options say or, by a placement, each where it was made, and what they took.

    Raises:
        ValueError: On images or labels that do not fit, or a patch that does not fit on them.
    """
    places = list[tuple[int, int]]()

    def threat(victim: Victim, images: Tensor, reference: Tensor, streams: Sequence[int]) -> Threat:
        made = options.threat(victim, images, reference, streams)
        places.extend(made.location if for_each_image(made.location) else ())
        return made

    pixels, result = optimize(victim, images, y, options, streams, threat=threat)
    return Patch(pixels, tuple(places) or options.patch_location, options.alpha), result


def optimize(
    victim: Victim,
    images: Tensor,
    y: Tensor | None,
    options: AttackOptions,
    streams: Sequence[int] | None = None,
    *,
    threat: Callable[[Victim, Tensor, Tensor, Sequence[int]], Threat] | None = None,
) -> tuple[Tensor, Result]:
    """Find, for each image, the best value of what the options let an attack change: pixels of a patch, or the image.

    Args:
        victim: The segmenter to attack.
        images: (N, C, H, W) floating point in the clip range, on any device, unchanged.
        y: See `reference_map`.
        options: How; their `threat` says what the variable is.
        streams: Stream number of each image; None: 0..N-1.
        threat: What makes the threat of each batch; None: the options.

    Returns:
        The variable, (N, …) on the CPU, and what it took.

    Raises:
        ValueError: On images or labels that do not fit.
    """
    began = time.perf_counter()
    low, high = (float(value) for value in victim.clip_values)
    check_images(images, (low, high))
    options.check_size((images.shape[-2], images.shape[-1]))
    streams = stream_numbers(streams, len(images))
    reference = reference_map(victim, images, y, options, streams)
    traits = observed_traits(victim, images[:1], options)

    batches = range(0, len(images), options.batch_size)
    runs = len(options.objectives) * options.num_restarts
    kept: list[_Kept] = []
    spent = Spent()
    bar = tqdm(total=len(batches) * runs * options.max_iter, disable=not options.verbose)
    with bar as progress, frozen(victim.model):
        for first in batches:
            rows = slice(first, first + options.batch_size)
            moved = images[rows].detach().to(victim.device)
            wanted = reference[rows].to(victim.device)
            problem = Problem(
                victim=victim,
                threat=(threat or options.threat)(victim, moved, wanted, streams[rows]),
                reference=wanted,
                streams=streams[rows],
                options=options,
                traits=traits,
                objective=options.make_objectives()[0],
                criterion=on_target if options.aims else off_label,
                spent=spent,
            )
            kept.append(_best_of_runs(in_part(problem), progress))
    result = Result(
        criterion=tuple(torch.cat([batch.criterion for batch in kept]).tolist()),
        loss=tuple(torch.cat([batch.loss for batch in kept]).tolist()),
        steps=tuple(torch.cat([batch.steps for batch in kept]).tolist()),
        forwards=spent.forwards,
        backwards=spent.backwards,
        seconds=time.perf_counter() - began,
    )
    return torch.cat([batch.variable.cpu() for batch in kept]), result


@torch.no_grad()
def observed_traits(victim: Victim, image: Tensor, options: AttackOptions) -> Traits:
    """The victim's traits as it declares them, and `random` where it is found to be: two looks at one image differ."""
    traits = victim.traits
    if traits.random or options.undefended:
        return traits
    image = image.detach().to(victim.device)
    one, two = victim.logits(image), victim.logits(image)
    if float((one - two).abs().max()) <= _SAME * float(one.abs().max()):
        return traits
    warnings.warn(
        "The model gives two predictions for one image without declaring that it is random; it is attacked as a random "
        "one, over several draws. A defence declares it by an attribute `traits = ramdefense.Traits(random=True)`.",
        stacklevel=2,
    )
    return replace(traits, random=True)


@dataclass
class _Kept:
    """The values kept so far for the images of a batch, what they reached, and the steps made for them."""

    variable: Tensor
    criterion: Tensor
    loss: Tensor
    steps: Tensor

    @classmethod
    def nothing(cls, variable: Tensor) -> _Kept:
        """Values that every other is better than."""
        never = variable.new_full((len(variable),), torch.inf)
        return cls(variable.clone(), -never, never.clone(), torch.zeros_like(never, dtype=torch.int64))

    def keep(
        self, rows: Tensor, variable: Tensor, criterion: Tensor, loss: Tensor, *, final: bool = False
    ) -> None:
        """Take the values of the images `rows` where they are better: more won or, as much won, less loss; `final`:
        an image of which everything is won keeps what it has."""
        won, lost = self.criterion[rows], self.loss[rows]
        better = (criterion > won) | ((criterion == won) & (loss < lost))
        if final:
            better &= won < 1
        self.variable[rows] = variable.where(better[:, None, None, None], self.variable[rows])
        self.criterion[rows] = criterion.to(won.dtype).where(better, won)
        self.loss[rows] = loss.to(lost.dtype).where(better, lost)


def _best_of_runs(problem: Problem, progress: tqdm) -> _Kept:
    """Every restart with every objective on the images that are not done; the best of each image is kept."""
    options = problem.options
    best = _Kept.nothing(problem.threat.start(0))
    left = torch.arange(len(problem), device=best.steps.device)
    for number, objective in enumerate(options.make_objectives()):
        for restart in range(options.num_restarts):
            if problem.deterministic and options.keep_best:
                left = left[best.criterion[left] < 1]
            if len(left):
                chosen = replace(problem.rows(left), objective=objective)
                run = _run(chosen, number * options.num_restarts + restart, restart, progress)
                best.keep(left, run.variable, run.criterion, run.loss)
                best.steps[left] += run.steps
            else:
                progress.update(options.max_iter)
    return best


def _run(problem: Problem, run: int, restart: int, progress: tqdm) -> _Kept:
    """One run of the loop over the images of a problem, from the start of that restart."""
    options = problem.options
    rule, schedule = options.make_step_rule(), SCHEDULES[options.step_schedule]
    # the first run of each objective starts where the first of all does
    variable = problem.threat.start(run if restart else 0)
    state: State = rule.start(variable, _keys(problem, run).to(variable.device))
    kept = _Kept.nothing(variable)
    rows = torch.arange(len(problem), device=variable.device)  # of the kept values, for the images still in the batch
    # an estimate of 1 from a few draws is no proof, so only a deterministic problem is ever done
    leaving = options.keep_best and problem.deterministic
    late = Late(variable.is_cuda)
    for step in range(options.max_iter):
        step_size = schedule(step / options.max_iter) * options.eps_step
        point = rule.point(variable, step_size, state)
        point = point if point is variable else problem.threat.project(point)
        look = problem.look(point, run, step, gradient=rule.gradient, judge=options.keep_best)
        if options.keep_best:
            kept.keep(rows, point, look.criterion, look.loss, final=leaving)
        won = late.read(look.criterion == 1) if leaving else []
        if any(won):
            stay = torch.tensor([row for row, done in enumerate(won) if not done], dtype=torch.int64)
            if not len(stay):
                progress.update(options.max_iter - step)
                return kept
            rows, variable, point = rows[stay], variable[stay], point[stay]
            problem, look = problem.rows(stay), look.rows(stay)
            state = {name: value[stay] for name, value in state.items()}
            late.rows(stay)
        seen = Seen(point, look.gradient, look.loss)
        variable, state = rule.update(variable, seen, step_size, state, problem.threat.project)
        # an image that is done, and not yet known to be, makes no step that counts
        kept.steps[rows] += kept.criterion[rows] < 1 if leaving else 1
        progress.update()
    last = problem.look(variable, run, options.max_iter, gradient=False)
    kept.keep(rows, variable, last.criterion, last.loss, final=leaving)
    return kept


def _keys(problem: Problem, run: int) -> Tensor:
    """A seed for each image's own random numbers in a step rule: (N,) int64."""
    seeds = [stream(problem.options.seed, "step", image, run).initial_seed() for image in problem.streams]
    return torch.tensor(seeds, dtype=torch.int64)


@torch.no_grad()
def _own_prediction(victim: Victim, images: Tensor, streams: tuple[int, ...], batch_size: int) -> Tensor:
    """What the model says of the images itself, (N, H, W), under draw 0 of a random defence."""
    maps = []
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        with victim.conditions(images=streams[rows], draw=0):
            maps.append(predictions_of(victim.logits(images[rows].to(victim.device))).to(images.device))
    return torch.cat(maps)
