"""The options of a patch attack: one set of names for both styles, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Self

from attacks.objectives import OBJECTIVES, Objective
from attacks.patch import Location, check_location, check_shape
from attacks.steps import SCHEDULES, AdamStep, SignStep, StepRule
from attacks.targets import Target
from attacks.transformations import EOT

OPTIMIZERS: dict[str, Callable[[float], StepRule]] = {
    "pgd": lambda momentum: SignStep(momentum),
    "adam": lambda momentum: AdamStep(),
}


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """How a patch is made. With the defaults it is sign-PGD with momentum from mid-grey, the best iterate kept;
    ``momentum=0`` makes it plain sign-PGD, step for step.

    Args:
        target: What the labels are turned into (`attacks.targets`, or any callable with `targeted`); None: the map that
            comes with the images is itself the target map (`targeted`) or the labels to leave (not `targeted`).
        targeted: Whether the attack is to reach its map or to leave it; None: as the target says, False without one.
        patch_shape: (height, width) in pixels; None: a square of 150/512 of the image's shorter side.
        patch_location: (top, left) in pixels, or a corner's name (`attacks.patch.resolve_location`).
        max_iter: Steps of each run.
        eps_step: Size of a step in the units of the pixels; the learning rate of Adam.
        optimizer: "pgd" (sign steps) or "adam".
        step_schedule: "constant", "cosine" (to 0) or "piecewise" (1, from half-way on 0.3, in the last quarter 0.1).
        momentum: Decay of the accumulated gradient of "pgd" (MI-FGSM uses 1); 0 is none. Adam has moments of its own
            and takes none of it.
        random_start: Start the first run from uniform random pixels, in place of mid-grey.
        num_restarts: Runs for each image, of which the best is kept; every run but the first starts at random.
        keep_best: Keep the iterate with the greatest share of pixels won, of those the one with the least loss, and
            leave an image of which everything is won; False: the last iterate of exactly `max_iter` steps.
        objective: Name in `attacks.objectives.OBJECTIVES`, or a function as described there.
        eot: Transformations of the patch over which the gradient is averaged; None: the patch is pasted as it is.
        defence_samples: Draws of a random defence for each step, over which the gradient is averaged; None: 1 for a
            deterministic model, `attacks.optimize.DEFENCE_SAMPLES` for one that says it is random.
        straight_through: Ask a defence for its straight-through gradient; None: if it says that it offers one.
        batch_size: Images worked on at once. The result does not depend on it.
        seed: Seed of everything that is random here; each image has streams of its own.
        verbose: Show a progress bar.

    Raises:
        TypeError: On an option that does not exist.
        ValueError: On a value that is out of range.
    """

    target: Target | None = None
    targeted: bool | None = None
    patch_shape: tuple[int, int] | None = None
    patch_location: Location = "lower_right"
    max_iter: int = 200
    eps_step: float = 0.02
    optimizer: str = "pgd"
    step_schedule: str = "constant"
    momentum: float = 0.9
    random_start: bool = False
    num_restarts: int = 1
    keep_best: bool = True
    objective: str | Objective = "cross_entropy"
    eot: EOT | None = None
    defence_samples: int | None = None
    straight_through: bool | None = None
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
        if self.target is not None and not (callable(self.target) and hasattr(self.target, "targeted")):
            raise ValueError(f"`target` is {self.target!r}; it must be one of attacks.targets, e.g. Permute().")
        if self.target is not None and self.targeted is not None and self.targeted != self.target.targeted:
            raise ValueError(
                f"`targeted` is {self.targeted}, but {self.target!r} says {self.target.targeted}; leave one out."
            )
        if self.patch_shape is not None:
            object.__setattr__(self, "patch_shape", check_shape(self.patch_shape))
        object.__setattr__(self, "patch_location", check_location(self.patch_location))
        for name in ("max_iter", "num_restarts", "batch_size"):
            _whole(name, getattr(self, name), minimum=1)
        if self.defence_samples is not None:
            _whole("defence_samples", self.defence_samples, minimum=1)
        _whole("seed", self.seed)
        _real("eps_step", self.eps_step)
        if self.eps_step <= 0:
            raise ValueError(f"`eps_step` is {self.eps_step!r}; it must be above 0.")
        _real("momentum", self.momentum)
        if self.momentum < 0:
            raise ValueError(f"`momentum` is {self.momentum!r}; it must be 0 or above.")
        for name in ("random_start", "keep_best", "verbose"):
            _flag(name, getattr(self, name))
        for name in ("targeted", "straight_through"):
            if getattr(self, name) is not None:
                _flag(name, getattr(self, name))
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("step_schedule", self.step_schedule, SCHEDULES)
        if not callable(self.objective):
            _one_of("objective", self.objective, OBJECTIVES)
        if self.eot is not None and not isinstance(self.eot, EOT):
            raise ValueError(f"`eot` is {self.eot!r}; it must be an attacks.EOT or None.")

    @property
    def aims(self) -> bool:
        """Whether the attack is targeted, once its target has had its say."""
        return bool(self.targeted) if self.target is None else self.target.targeted

    def make_objective(self) -> Objective:
        """The objective, made for this direction of attack."""
        return OBJECTIVES[self.objective](self.aims) if isinstance(self.objective, str) else self.objective

    def make_step_rule(self) -> StepRule:
        """The step rule."""
        return OPTIMIZERS[self.optimizer](self.momentum)


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
