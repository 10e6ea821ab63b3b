"""The options of attacks: one set of names for both styles, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from attacks.diversity import InputDiversity
from attacks.geometry import Surface
from attacks.interfaces import Victim
from attacks.objectives import OBJECTIVES, Objective
from attacks.patch import (
    CORNERS,
    Location,
    check_alpha,
    check_location,
    check_shape,
    covered_by,
    for_each_image,
    resolve_location,
    resolve_shape,
)  # fmt: skip
from attacks.square import SquareStep
from attacks.steps import SCHEDULES, AdamStep, ApgdStep, Norm, SignStep, Smoothed, StepRule
from attacks.targets import Target, named_target
from attacks.terms import Term
from attacks.threats import NORMS, PatchThreat, PixelThreat, Threat
from attacks.transformations import EOT

if TYPE_CHECKING:
    from attacks.placement import Placement

#: Step rules by name; each entry makes one from the options and the norm that steps are measured in.
OPTIMIZERS: dict[str, Callable[[AttackOptions, Norm], StepRule]] = {
    "pgd": lambda options, norm: SignStep(options.momentum, norm=norm),
    "nesterov": lambda options, norm: SignStep(options.momentum, nesterov=True, norm=norm),
    "adam": lambda options, norm: AdamStep(),
    "apgd": lambda options, norm: ApgdStep(options.max_iter, norm=norm),
    "square": lambda options, norm: SquareStep(options.max_iter),
}


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """How an attack runs, whatever it changes. With the defaults it takes sign steps with momentum and keeps the best
    iterate; ``momentum=0`` makes it plain sign-PGD, step for step.

    Args:
        target: What the labels are turned into: one of `attacks.targets`, any callable with `targeted`, or a name
            ("permute", "strip", "untargeted", or the number of a class) whose map is drawn by `seed`; None: the map
            that comes with the images is itself the target map (`targeted`) or the labels to leave (not `targeted`).
        targeted: Whether the attack is to reach its map or to leave it; None: as the target says, False without one.
        max_iter: Steps of each run; queries of "square".
        eps_step: Size of a step in the units of the pixels; the learning rate of "adam", the first step of "apgd".
        optimizer: A name in `OPTIMIZERS`: "pgd" (sign steps), "nesterov" (the gradient a step ahead), "adam", "apgd"
            (halves its steps by itself), or "square" (random search, which asks for no gradient).
        step_schedule: "constant", "cosine" (to 0) or "piecewise" (1, from half-way on 0.3, in the last quarter 0.1).
            "apgd" and "square" go by their own.
        momentum: Decay of the accumulated gradient of "pgd" and "nesterov" (MI-FGSM uses 1); 0 is none. The others have
            momentum of their own or none.
        len_kernel: Width in pixels of the Gaussian kernel, odd, that smooths the gradient (TI-FGSM); 1 is none.
        random_start: Start the first run at random.
        num_restarts: Runs for each image and objective, of which the best is kept; every run but the first of an
            objective starts at random.
        keep_best: Keep the iterate with the greatest share of pixels won, of those the one with the least loss, and
            leave an image of which everything is won; False: the last iterate of exactly `max_iter` steps.
        objective: Name in `attacks.objectives.OBJECTIVES`, or a function as described there; several, in a tuple: each
            has its own runs, and the best iterate of all is kept for each image.
        terms: `attacks.terms` that are added to the objective.
        defence_samples: Draws of a random defence for each step, over which the gradient is averaged; None: 1 for a
            deterministic model, `attacks.problem.DEFENCE_SAMPLES` for one that is random.
        straight_through: Ask a defence for its straight-through gradient; None: if it says that it offers one.
        undefended: Work on the model without its defence, where the defence can be left out: what comes out is a
            transferred attack.
        batch_size: Images worked on at once. The result does not depend on it.
        seed: Seed of everything that is random here; each image has streams of its own.
        verbose: Show a progress bar.

    Raises:
        TypeError: On an option that does not exist.
        ValueError: On a value that is out of range.
    """

    target: Target | str | int | None = None
    targeted: bool | None = None
    max_iter: int = 200
    eps_step: float = 0.02
    optimizer: str = "pgd"
    step_schedule: str = "constant"
    momentum: float = 0.9
    len_kernel: int = 1
    random_start: bool = False
    num_restarts: int = 1
    keep_best: bool = True
    objective: str | Objective | tuple[str | Objective, ...] = "cross_entropy"
    terms: tuple[Term, ...] = ()
    defence_samples: int | None = None
    straight_through: bool | None = None
    undefended: bool = False
    batch_size: int = 8
    seed: int = 0
    verbose: bool = True

    @classmethod
    def names(cls) -> list[str]:
        """The names of the options, in their order."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, attack: str, options: dict[str, Any]) -> Self:
        """Checked options of the attack of that name.

        Raises:
            TypeError: If there is no option of a given name; the message lists those there are.
        """
        unknown = sorted(set(options) - set(cls.names()))
        if unknown:
            raise TypeError(f"{attack} has no option {', '.join(unknown)}; its options are {', '.join(cls.names())}.")
        return cls(**options)

    def __post_init__(self) -> None:
        _whole("seed", self.seed)
        goal = self.goal
        if goal is not None and not (callable(goal) and hasattr(goal, "targeted")):
            raise ValueError(f"`target` is {goal!r}; it must be one of attacks.targets, e.g. Permute().")
        if goal is not None and self.targeted is not None and self.targeted != goal.targeted:
            raise ValueError(f"`targeted` is {self.targeted}, but {goal!r} says {goal.targeted}; leave one out.")
        for name in ("max_iter", "num_restarts", "batch_size"):
            _whole(name, getattr(self, name), minimum=1)
        if self.defence_samples is not None:
            _whole("defence_samples", self.defence_samples, minimum=1)
        _real("eps_step", self.eps_step)
        if self.eps_step <= 0:
            raise ValueError(f"`eps_step` is {self.eps_step!r}; it must be above 0.")
        _real("momentum", self.momentum)
        if self.momentum < 0:
            raise ValueError(f"`momentum` is {self.momentum!r}; it must be 0 or above.")
        _whole("len_kernel", self.len_kernel, minimum=1)
        if self.len_kernel % 2 == 0:
            raise ValueError(f"`len_kernel` is {self.len_kernel!r}; it must be odd, so that it has a middle.")
        for name in ("random_start", "keep_best", "undefended", "verbose"):
            _flag(name, getattr(self, name))
        for name in ("targeted", "straight_through"):
            if getattr(self, name) is not None:
                _flag(name, getattr(self, name))
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("step_schedule", self.step_schedule, SCHEDULES)
        if isinstance(self.objective, list):
            object.__setattr__(self, "objective", tuple(self.objective))
        if not self.objectives:
            raise ValueError("`objective` is empty; give at least one.")
        for objective in self.objectives:
            if not callable(objective):
                _one_of("objective", objective, OBJECTIVES)
        if not isinstance(self.terms, tuple) or not all(callable(t) and hasattr(t, "observe") for t in self.terms):
            raise ValueError(f"`terms` is {self.terms!r}; it must be a tuple of attacks.terms.")

    @property
    def aims(self) -> bool:
        """Whether the attack is targeted, once its target has had its say."""
        goal = self.goal
        return bool(self.targeted) if goal is None else goal.targeted

    @property
    def goal(self) -> Target | None:
        """The target, made if it is given by name."""
        if isinstance(self.target, (str, int)):
            return named_target(str(self.target), self.seed)
        return self.target

    @property
    def objectives(self) -> tuple[str | Objective, ...]:
        """The objectives, in their order."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    def make_objectives(self) -> list[Objective]:
        """The objectives, made for this direction of attack."""
        return [OBJECTIVES[given](self.aims) if isinstance(given, str) else given for given in self.objectives]

    @property
    def step_norm(self) -> Norm:
        """The norm that a step is measured in."""
        return "inf"

    def make_step_rule(self) -> StepRule:
        """The step rule."""
        rule = OPTIMIZERS[self.optimizer](self, self.step_norm)
        return Smoothed(rule, self.len_kernel) if self.len_kernel > 1 else rule

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise a ValueError where the attack does not fit on images of (height, width)."""

    def threat(self, victim: Victim, images: Tensor, reference: Tensor, streams: Sequence[int]) -> Threat:
        """What the attack may change on a batch of images, (N, C, H, W) on the victim's device."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PatchOptions(AttackOptions):
    """How a patch is made: `AttackOptions`, and where the patch goes. It starts from mid-grey.

    Args:
        patch_shape: (height, width) in pixels; None: that of `patch_alpha`, the size of the `Surface`, or a square of
            150/512 of the image's shorter side.
        patch_location: (top, left) in pixels; a corner's name (`attacks.patch.resolve_location`); an
            `attacks.geometry.Surface`, onto which the patch is mapped; or a name in `attacks.placement.PLACEMENTS`,
            which finds a place on each image, by the first objective, with passes that no result counts.
        patch_alpha: (h, w) numbers in [0, 1], how far the patch covers what is under it, for a patch of any shape
            (`attacks.geometry.disc`, `several`); None: wholly. Kept as nested tuples.
        eot: Transformations of the patch over which the gradient is averaged, `attacks.EOT` or
            `attacks.diversity.InputDiversity`; None: the patch is pasted as it is.
        partial: Compute only what the patch can change (`attacks.partial`), which costs less on convolutional models
            and large images, and rounds differently. None: where it pays; True: wherever it can be done, an error
            where it cannot; False: never. A universal patch is always made in full.

    Raises:
        TypeError, ValueError: As `AttackOptions`.
    """

    patch_shape: tuple[int, int] | None = None
    patch_location: Location = "lower_right"
    patch_alpha: Sequence[Sequence[float]] | Tensor | None = None
    eot: EOT | InputDiversity | None = None
    partial: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partial is not None:
            _flag("partial", self.partial)
        if self.patch_shape is not None:
            object.__setattr__(self, "patch_shape", check_shape(self.patch_shape))
        if self.placement is None:
            location = check_location(self.patch_location)
            if for_each_image(location):
                raise ValueError(
                    f"`patch_location` is {location!r}, a place for each image, which an `attacks.Patch` takes; an "
                    "attack takes one (top, left), a corner's name, a Surface, or a name in attacks.placement."
                )
            object.__setattr__(self, "patch_location", location)
        if self.patch_location in ("gradient", "scan") and self.objectives[0] == "none":
            raise ValueError(
                f"`patch_location` is {self.patch_location!r}, which goes by the objective, and that is 'none'; give "
                "one, or a place."
            )
        if self.patch_alpha is not None:
            alpha = check_alpha(self.patch_alpha)
            if self.patch_shape not in (None, tuple(alpha.shape)):
                raise ValueError(
                    f"`patch_alpha` is {alpha.shape[0]}×{alpha.shape[1]}, `patch_shape` {self.patch_shape}; they must "
                    "be the same, or leave `patch_shape` out."
                )
            # plain numbers: they compare, and their repr rebuilds them
            object.__setattr__(self, "patch_alpha", tuple(map(tuple, alpha.tolist())))
        if self.eot is not None and not isinstance(self.eot, (EOT, InputDiversity)):
            raise ValueError(f"`eot` is {self.eot!r}; it must be an attacks.EOT, an InputDiversity or None.")
        if self.partial and self.eot is not None:
            raise ValueError("`partial` is True, and `eot` moves the patch about; leave one of them out.")

    @property
    def placement(self) -> Placement | None:
        """What finds a place on each image; None where `patch_location` says it."""
        if not isinstance(self.patch_location, str) or self.patch_location in CORNERS:
            return None
        from attacks.placement import PLACEMENTS

        _one_of("patch_location", self.patch_location, {**CORNERS, **PLACEMENTS})
        return PLACEMENTS[self.patch_location]

    @property
    def alpha(self) -> Tensor | None:
        """`patch_alpha`, (h, w) float32."""
        return None if self.patch_alpha is None else check_alpha(self.patch_alpha)

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the patch for images of (height, width), or a ValueError."""
        shape = self.patch_shape
        if shape is None and self.alpha is not None:
            shape = self.alpha.shape[0], self.alpha.shape[1]
        if isinstance(self.patch_location, Surface):
            return shape or self.patch_location.shape
        return resolve_shape(shape, size)

    def covered(self, size: tuple[int, int]) -> Tensor:
        """The pixels under the patch on any image of (height, width): (height, width) bool.

        Raises:
            ValueError: If the patch does not fit, or a placement finds a place on each image.
        """
        shape = self.shape(size)
        return covered_by(shape, resolve_location(self.patch_location, shape, size), size, alpha=self.alpha)

    def check_size(self, size: tuple[int, int]) -> None:
        shape = self.shape(size)
        if self.placement is None:
            resolve_location(self.patch_location, shape, size)

    def threat(self, victim: Victim, images: Tensor, reference: Tensor, streams: Sequence[int]) -> PatchThreat:
        size = images.shape[-2], images.shape[-1]
        shape, location = self.shape(size), self.patch_location
        if self.placement is not None:
            places = self.placement(
                victim,
                images,
                reference,
                shape,
                objective=self.make_objectives()[0],
                streams=tuple(streams),
                undefended=self.undefended,
            )
            location = check_location(places)
        low, high = (float(value) for value in victim.clip_values)
        return PatchThreat(
            images=images,
            streams=tuple(streams),
            shape=shape,
            location=resolve_location(location, shape, size),
            clip_values=(low, high),
            eot=self.eot,
            random_start=self.random_start,
            seed=self.seed,
            alpha=None if self.alpha is None else self.alpha.to(images),
        )


@dataclass(frozen=True, kw_only=True)
class PixelOptions(AttackOptions):
    """How a pixel-wise perturbation is made: `AttackOptions`, and how far. It starts from the image.

    Args:
        eps: Radius of the ball around the image, in the units of the pixels.
        norm: "inf", or "2" (of the whole image; steps then go along the gradient, normalised to length `eps_step`).

    Raises:
        TypeError, ValueError: As `AttackOptions`.
    """

    max_iter: int = 100
    eps: float = 8 / 255
    norm: Norm = "inf"
    eps_step: float = 2 / 255

    def __post_init__(self) -> None:
        _real("eps", self.eps)
        if self.eps <= 0:
            raise ValueError(f"`eps` is {self.eps!r}; it must be above 0.")
        if self.norm not in NORMS:
            raise ValueError(f"`norm` is {self.norm!r}; it must be one of {', '.join(map(repr, NORMS))}.")
        super().__post_init__()

    @property
    def step_norm(self) -> Norm:
        return self.norm

    def threat(self, victim: Victim, images: Tensor, reference: Tensor, streams: Sequence[int]) -> PixelThreat:
        low, high = (float(value) for value in victim.clip_values)
        return PixelThreat(
            images=images,
            streams=tuple(streams),
            clip_values=(low, high),
            eps=self.eps,
            norm=self.norm,
            random_start=self.random_start,
            seed=self.seed,
        )


def _whole(name: str, value: object, minimum: int | None = None) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number.")
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` is {value!r}; it must be at least {minimum}.")


def _real(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number.")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; it must be True or False.")


def _one_of(name: str, value: object, table: dict[str, Any]) -> None:
    if value not in table:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, table))}.")
