"""The smallest perturbation of every pixel with which an attack succeeds, in place of the best one within a ball.

Success is a share of the counted pixels, `threshold`, that are won. An image counts for nothing in another one's
search, so neither the batch size nor the order of the images changes a result. Two methods are here:

"dag" (Xie et al., "Adversarial Examples for Semantic Segmentation and Object Detection", ICCV 2017, Algorithm 1): the
gradients of f_label − f_adversarial are summed over the pixels that are still to win, the sum is scaled so that no
value moves by more than γ, and the image is done as soon as it succeeds. Nothing makes the perturbation smaller again.
The paper's f_label and f_adversarial are those of the objective "dag" here.

"alma_prox", in the style of ALMA prox (Rony, Pesquet, Ben Ayed, "Proximal Splitting Adversarial Attack for Semantic
Segmentation", CVPR 2023): minimise ‖δ‖ subject to margin_j(x + δ) ≤ 0 on the counted pixels, by the multipliers of an
augmented Lagrangian and forward-backward steps, a gradient step on the constraints and a proximal step on the norm;
the constraints that are hardest to meet are let go, ever more until, half-way, the share of `threshold` is left.
Simpler than theirs:
- The proximal step on λ‖δ‖ clips δ to a level (norm "inf") or shrinks it to a length (norm "2"), which λ implies. Here
  that level is chosen, by whether the image succeeds at it, and λ is what it implies.
- The forward step goes along the sign (or, "2", the direction) of the gradient, by a share of that level that falls
  over the run, in place of their variable metric.
- The penalty is (max(0, μ + ρ g)² − μ²) / 2ρ with one ρ for all; theirs is another one, with a ρ for each constraint
  that grows where the constraint is not met.
- A constraint g is the margin over the mean margin of the clean image, theirs is a difference of logits ratio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from attacks.criteria import off_label, on_target
from attacks.frozen import frozen
from attacks.interfaces import Victim
from attacks.objectives import OBJECTIVES, pixel_margin
from attacks.optimize import Result, observed_traits, reference_map
from attacks.options import AttackOptions
from attacks.problem import Problem, Spent
from attacks.steps import Norm, direction
from attacks.streams import stream_numbers
from attacks.threats import NORMS, PixelThreat
from ramdefense.checks import check_images

_RHO = 1.0  # penalty of the augmented Lagrangian, in units of the clean image's mean margin
_MEMORY = 0.9  # share of the old multiplier in the new one: a running average, as in ALMA
_GROWTH = (0.2, 0.01)  # by which share the level grows or shrinks in a step, from the first step to the last
_LARGEST = 1e3  # a multiplier may be
_STRIDE = (0.5, 0.03)  # length of a forward step as a share of the level, from the first step to the last


@dataclass(frozen=True)
class MinimalNormResult(Result):
    """`attacks.optimize.Result`, of which `loss` is the norm of each perturbation, and whether it does what it should.

    Args:
        reached: Whether the share `threshold` was reached, for each image. Where it was not, the image is the one with
            the largest share that was seen.
    """

    reached: tuple[bool, ...]

    @property
    def norms(self) -> tuple[float, ...]:
        """The norm of each perturbation."""
        return self.loss


@dataclass(frozen=True, kw_only=True)
class MinimalNormOptions(AttackOptions):
    """How a smallest perturbation is sought: those of `AttackOptions` that have a say in it, and what is minimised.

    Args:
        eps_step: "dag": γ, by how much a value changes at most in a step, in both norms. "alma_prox": the first level
            (norm "2": of a change by as much of every value).
        max_iter: Steps; "dag" makes fewer where it succeeds.
        method: "alma_prox" or "dag".
        norm: "inf", or "2" (of the whole image). "dag" takes the same way in both.
        threshold: Share of the counted pixels that are to be won, in (0, 1].

    Raises:
        TypeError, ValueError: As `AttackOptions`.
    """

    eps_step: float = 0.5 / 255
    method: str = "alma_prox"
    norm: Norm = "inf"
    threshold: float = 0.99

    _with_a_say: ClassVar[tuple[str, ...]] = (
        *("target", "targeted", "max_iter", "eps_step", "method", "norm", "threshold"),
        *("defence_samples", "straight_through", "undefended", "batch_size", "seed", "verbose"),
    )

    @classmethod
    def names(cls) -> list[str]:
        return list(cls._with_a_say)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, table in (("method", METHODS), ("norm", NORMS)):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, table))}."
                )
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ValueError(f"`threshold` is {self.threshold!r}; it must be a number.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` is {self.threshold!r}; it must be above 0 and at most 1.")

    def threat(self, victim: Victim, images: Tensor, reference: Tensor, streams: Sequence[int]) -> PixelThreat:
        """Any image in the clip range."""
        low, high = (float(value) for value in victim.clip_values)
        return PixelThreat(images=images, streams=tuple(streams), clip_values=(low, high), eps=math.inf)


def smallest_perturbation(
    victim: Victim,
    images: Tensor,
    y: Tensor | None,
    options: MinimalNormOptions,
    streams: Sequence[int] | None = None,
) -> tuple[Tensor, MinimalNormResult]:
    """Find, for each image, the closest one with which the attack succeeds.

    Args:
        victim: The segmenter to attack.
        images: (N, C, H, W) floating point in the clip range, on any device, unchanged.
        y: See `attacks.optimize.reference_map`.
        options: How.
        streams: Stream number of each image; None: 0..N-1.

    Returns:
        The adversarial images, (N, C, H, W) on the CPU, and what they took.

    Raises:
        ValueError: On images or labels that do not fit.
    """
    began = time.perf_counter()
    low, high = (float(value) for value in victim.clip_values)
    check_images(images, (low, high))
    streams = stream_numbers(streams, len(images))
    reference = reference_map(victim, images, y, options, streams)
    traits = observed_traits(victim, images[:1], options)

    batches = range(0, len(images), options.batch_size)
    found: list[_Found] = []
    spent = Spent()
    bar = tqdm(total=len(batches) * options.max_iter, disable=not options.verbose)
    with bar as progress, frozen(victim.model):
        for first in batches:
            rows = slice(first, first + options.batch_size)
            wanted = reference[rows].to(victim.device)
            problem = Problem(
                victim=victim,
                threat=options.threat(victim, images[rows].detach().to(victim.device), wanted, streams[rows]),
                reference=wanted,
                streams=streams[rows],
                options=options,
                traits=traits,
                objective=OBJECTIVES["dag"](options.aims),
                criterion=on_target if options.aims else off_label,
                spent=spent,
            )
            found.append(METHODS[options.method](problem, options, progress))
    result = MinimalNormResult(
        criterion=tuple(torch.cat([batch.criterion for batch in found]).tolist()),
        loss=tuple(torch.cat([batch.norm for batch in found]).tolist()),
        steps=tuple(torch.cat([batch.steps for batch in found]).tolist()),
        forwards=spent.forwards,
        backwards=spent.backwards,
        seconds=time.perf_counter() - began,
        reached=tuple(torch.cat([batch.criterion >= options.threshold for batch in found]).tolist()),
    )
    return torch.cat([batch.images.cpu() for batch in found]), result


@dataclass
class _Found:
    """The closest successful image so far for each image of a batch, or the most successful one."""

    images: Tensor
    criterion: Tensor
    norm: Tensor
    steps: Tensor

    @classmethod
    def nothing(cls, images: Tensor) -> Self:
        never = images.new_full((len(images),), torch.inf)
        return cls(images.clone(), -never, never, torch.zeros_like(never, dtype=torch.int64))

    def keep(self, rows: Tensor, images: Tensor, criterion: Tensor, norm: Tensor, threshold: float) -> None:
        """Take the images `rows` where they are better: closer among the successful, before that more successful."""
        success, least = criterion.clamp(max=threshold), self.criterion[rows].clamp(max=threshold)
        better = (success > least) | ((success == least) & (norm < self.norm[rows]))
        self.images[rows] = images.where(better[:, None, None, None], self.images[rows])
        self.criterion[rows] = criterion.to(self.criterion).where(better, self.criterion[rows])
        self.norm[rows] = norm.where(better, self.norm[rows])


def _dag(problem: Problem, options: MinimalNormOptions, progress: tqdm) -> _Found:
    """Steps along the gradient of the pixels still to win; images that succeed leave."""
    clean = moved = problem.threat.start(0)
    found = _Found.nothing(clean)
    rows = torch.arange(len(problem), device=clean.device)
    for step in range(options.max_iter + 1):
        look = problem.look(moved, 0, step, gradient=step < options.max_iter)
        found.keep(rows, moved, look.criterion, _norm(moved - clean, options.norm), options.threshold)
        stay = (look.criterion < options.threshold).nonzero()[:, 0]
        if not len(stay) or step == options.max_iter:
            progress.update(options.max_iter - step)
            break
        rows, clean, moved, problem, look = rows[stay], clean[stay], moved[stay], problem.rows(stay), look.rows(stay)
        largest = look.gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(clean.dtype).tiny)
        moved = problem.threat.project(moved - options.eps_step * look.gradient / largest)
        found.steps[rows] += 1
        progress.update()
    return found


def _alma_prox(problem: Problem, options: MinimalNormOptions, progress: tqdm) -> _Found:
    """Forward steps on an augmented Lagrangian, proximal steps to a level that falls as the images succeed."""
    clean = moved = problem.threat.start(0)
    found = _Found.nothing(clean)
    everything = torch.arange(len(problem), device=clean.device)
    low, high = problem.victim.clip_values
    widest = _norm(torch.full_like(clean, high - low), options.norm)
    level = _norm(torch.full_like(clean, options.eps_step), options.norm)
    scale = problem.look(clean, 0, 0, gradient=False).loss / (clean.shape[-2] * clean.shape[-1])
    ones = torch.ones_like(problem.reference, dtype=clean.dtype)
    penalty = _Penalty(options.aims, 1.0, ones, scale.clamp_min(torch.finfo(clean.dtype).tiny)[:, None, None])
    for step in range(options.max_iter + 1):
        done = step / options.max_iter
        look = replace(problem, objective=penalty).look(moved, 0, step, gradient=step < options.max_iter)
        # the last constraint goes half-way, so that what was done for those that went can be taken back
        penalty = penalty.next(1 - (1 - options.threshold) * min(1.0, 2 * done))
        norm = _norm(moved - clean, options.norm)
        found.keep(everything, moved, look.criterion, norm, options.threshold)
        if step == options.max_iter:
            break
        growth, stride = (first * (last / first) ** done for first, last in (_GROWTH, _STRIDE))
        closest = found.norm.where(found.criterion >= options.threshold, torch.inf)
        # nothing is known of the right level before the first success, so until then it grows as fast as ever
        larger = level * (1 + torch.where(closest.isinf(), _GROWTH[0], growth))
        smaller = level.minimum(closest) * (1 - growth)
        level = torch.where(look.criterion >= options.threshold, smaller, larger.minimum(closest).minimum(widest))
        forward = moved - clean - stride * level[:, None, None, None] * direction(look.gradient, options.norm)
        moved = problem.threat.project(clean + _proximal(forward, level, options.norm))
        found.steps += 1
        progress.update()
    return found


METHODS: dict[str, Callable[[Problem, MinimalNormOptions, tqdm], _Found]] = {"alma_prox": _alma_prox, "dag": _dag}


@dataclass(frozen=True)
class _Penalty:
    """One step's share of the augmented Lagrangian, as an objective; it remembers the multipliers that it came to.

    Its gradient is that of (max(0, μ + ρ g)² − μ²) / 2ρ, its value is not: nothing looks at that.

    Args:
        targeted: Whether the reference is a target map.
        share: Share of the counted pixels whose constraints are kept, the easiest ones.
        multipliers: μ, (N, H, W).
        scale: What margins are divided by, (N, 1, 1).
        seen: max(0, μ + ρ g), (N, H, W), for each pass so far.
    """

    targeted: bool
    share: float
    multipliers: Tensor
    scale: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        margins = pixel_margin(logits.where(counted[:, None], 0.0), reference.where(counted, 0), self.targeted)
        constraints = margins.detach() / self.scale
        pulled = _easiest(constraints, counted, self.share)
        weights = (self.multipliers + _RHO * constraints).clamp(0, _LARGEST).where(pulled, 0.0)
        self.seen.append(weights)
        return (weights * margins).flatten(1).sum(1)

    def next(self, share: float) -> _Penalty:
        """The penalty of the next step."""
        come_to = torch.stack(self.seen).mean(0)
        multipliers = _MEMORY * self.multipliers + (1 - _MEMORY) * come_to
        return replace(self, share=share, multipliers=multipliers, seen=[])


def _easiest(constraints: Tensor, counted: Tensor, share: float) -> Tensor:
    """That share, rounded up, of each image's counted pixels, where the constraints are smallest: (N, H, W) bool."""
    ordered = constraints.masked_fill(~counted, torch.inf).flatten(1).sort(1).values
    number = (share * counted.flatten(1).sum(1) - 1e-6).ceil().long().clamp_min(1)  # 0.99 · 100 may come out above 99
    return counted & (constraints <= ordered.gather(1, number[:, None] - 1)[:, :, None])


def _norm(perturbation: Tensor, norm: str) -> Tensor:
    """(N, C, H, W) -> (N,)."""
    return torch.linalg.vector_norm(perturbation.flatten(1), ord=float(norm), dim=1)


def _proximal(perturbation: Tensor, level: Tensor, norm: str) -> Tensor:
    """The proximal operator of λ‖·‖, by what it comes to: values clipped to a level, or a length cut to it."""
    level = level[:, None, None, None]
    if norm == "inf":
        return perturbation.clamp(-level, level)
    length = _norm(perturbation, norm)[:, None, None, None]
    return torch.where(length > level, perturbation * (level / length), perturbation)
