"""How a patch, or any other variable of an attack, moves: step rules and step-size schedules.

A step rule is made of pure functions. `start(pixels, keys)` makes its state, a dict of tensors whose first dimension is
the image, so that images may leave the batch. `point(pixels, size, state)` says where loss and gradient are taken, and
`update(pixels, seen, size, state, project)` returns the moved and projected pixels and the next state. None of them
alters what it is given, and no image knows of another. Every rule *minimises* the loss; the papers maximise theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Norm = Literal["inf", "2"]


@dataclass(frozen=True)
class Seen:
    """What one evaluation showed.

    Args:
        point: (N, C, h, w), the projected point at which it was made.
        gradient: (N, C, h, w), of the loss; zero for a rule that asks for none.
        loss: (N,).
    """

    point: Tensor
    gradient: Tensor
    loss: Tensor


class StepRule(Protocol):
    """Moves pixels (N, C, h, w) to a smaller loss."""

    gradient: ClassVar[bool]
    """Whether the rule needs the gradient; False spares the backward passes."""

    def start(self, pixels: Tensor, keys: Tensor) -> State:
        """The state before the first step; `keys`, (N,) int64, seed each image's own random numbers."""

    def point(self, pixels: Tensor, size: float, state: State) -> Tensor:
        """Where loss and gradient are taken for the next step of `size`; the loop projects it."""

    def update(
        self, pixels: Tensor, seen: Seen, size: float, state: State, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        """One step of `size`, in the units of the pixels, to a point that `project`, the closest allowed one, keeps."""


class _AtThePixels:
    """A rule that needs the gradient, at the pixels themselves."""

    gradient: ClassVar[bool] = True

    def point(self, pixels: Tensor, size: float, state: State) -> Tensor:
        return pixels


@dataclass(frozen=True)
class SignStep:
    """Steps against the sign of the gradient (PGD, Madry et al. 2018), or against the gradient at length 1.

    Args:
        momentum: Decay of the accumulated gradient (MI-FGSM, Dong et al. 2018, eq. 6). Each gradient is divided by its
            mean absolute value for that image before it is added (with norm "2", by its length). 0 is plain PGD.
        nesterov: Take the gradient ahead, where the momentum alone would lead (NI-FGSM, Lin et al. 2020).
            Without momentum that is where the pixels are.
        norm: "inf", steps by the sign; "2", steps of Euclidean length `size` for each image.

    Raises:
        ValueError: On another norm.
    """

    momentum: float = 0.0
    nesterov: bool = False
    norm: Norm = "inf"
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_norm(self.norm)

    def start(self, pixels: Tensor, keys: Tensor) -> State:
        return {"velocity": torch.zeros_like(pixels)} if self.momentum else {}

    def point(self, pixels: Tensor, size: float, state: State) -> Tensor:
        if not (self.nesterov and self.momentum):
            return pixels
        return pixels - size * self.momentum * state["velocity"]

    def update(
        self, pixels: Tensor, seen: Seen, size: float, state: State, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        if not self.momentum:
            return project(pixels - size * direction(seen.gradient, self.norm)), state
        velocity = self.momentum * state["velocity"] + _unit(seen.gradient, self.norm)
        return project(pixels - size * direction(velocity, self.norm)), {"velocity": velocity}


@dataclass(frozen=True)
class AdamStep(_AtThePixels):
    """Adam (Kingma & Ba 2015) on the pixels, as Brown et al. 2017 move their patch; `size` is the learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def start(self, pixels: Tensor, keys: Tensor) -> State:
        return {
            "mean": torch.zeros_like(pixels),
            "square": torch.zeros_like(pixels),
            "steps": pixels.new_zeros(len(pixels), 1, 1, 1),
        }

    def update(
        self, pixels: Tensor, seen: Seen, size: float, state: State, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        mean = self.beta1 * state["mean"] + (1 - self.beta1) * seen.gradient
        square = self.beta2 * state["square"] + (1 - self.beta2) * seen.gradient.square()
        steps = state["steps"] + 1
        way = (mean / (1 - self.beta1**steps)) / ((square / (1 - self.beta2**steps)).sqrt() + self.epsilon)
        return project(pixels - size * way), {"mean": mean, "square": square, "steps": steps}


@dataclass(frozen=True)
class ApgdStep(_AtThePixels):
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): PGD with momentum that halves its own step size for each image.

    At `checkpoints(max_iter)` an image's step size is halved, and it goes on from its best point so far, if too few of
    the steps since the last checkpoint made the loss smaller (condition 1), or if neither its step size nor its least
    loss has changed since then (condition 2). The first step's `size` is the first step size; what a schedule makes of
    the later ones is ignored. The paper takes twice the radius, which for a box is its width.

    Args:
        max_iter: Steps in all.
        rho: Share of the steps that must make the loss smaller.
        alpha: Share of the new step against the last move.
        norm: "inf", steps by the sign; "2", steps along the gradient at length 1.

    Raises:
        ValueError: On another norm, fewer steps than one, or a share outside [0, 1].
    """

    max_iter: int
    rho: float = 0.75
    alpha: float = 0.75
    norm: Norm = "inf"

    def __post_init__(self) -> None:
        _check_norm(self.norm)
        if self.max_iter < 1:
            raise ValueError(f"`max_iter` is {self.max_iter!r}; it must be at least 1.")
        for name in ("rho", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be from 0 to 1.")

    def start(self, pixels: Tensor, keys: Tensor) -> State:
        never = pixels.new_full((len(pixels),), torch.inf)
        none = torch.zeros_like(never, dtype=torch.int64)
        return {
            "step": none,
            "size": never,
            "checkpoints": torch.tensor(checkpoints(self.max_iter), device=pixels.device).repeat(len(pixels), 1),
            "previous": pixels,
            "loss": never,  # of the previous pixels
            "best": pixels,
            "best_gradient": torch.zeros_like(pixels),
            "best_loss": never,
            # since the last checkpoint: steps, and those to a smaller loss; at it: the least loss, whether it halved
            "steps": none,
            "falls": none,
            "checked_loss": never,
            "halved": none.bool(),
        }

    def update(
        self, pixels: Tensor, seen: Seen, size: float, state: State, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        first = state["step"] == 0
        # iteration k of the paper is known to the end when the loss at x(k+1) is: one step later
        due = (state["checkpoints"] == state["step"][:, None] - 1).any(1)
        # both conditions are about x(0) … x(k), so they come before this look is taken in
        slow = state["falls"] < self.rho * state["steps"]
        stuck = ~state["halved"] & (state["best_loss"] == state["checked_loss"])
        halve = due & (slow | stuck)

        better = seen.loss < state["best_loss"]
        best = pixels.where(_each(better), state["best"])
        best_gradient = seen.gradient.where(_each(better), state["best_gradient"])
        best_loss = seen.loss.where(better, state["best_loss"])

        here = best.where(_each(halve), pixels)
        gradient = best_gradient.where(_each(halve), seen.gradient)
        loss = best_loss.where(halve, seen.loss)
        eta = torch.where(halve, state["size"] / 2, state["size"]).masked_fill(first, size)

        ahead = project(here - _each(eta) * direction(gradient, self.norm))
        mixed = project(here + self.alpha * (ahead - here) + (1 - self.alpha) * (here - state["previous"]))
        return ahead.where(_each(first), mixed), {
            "step": state["step"] + 1,
            "size": eta,
            "checkpoints": state["checkpoints"],
            "previous": here,
            "loss": loss,
            "best": best,
            "best_gradient": best_gradient,
            "best_loss": best_loss,
            "steps": state["steps"].masked_fill(due, 0) + ~first,
            "falls": state["falls"].masked_fill(due, 0) + (~first & (loss < state["loss"])),
            "checked_loss": torch.where(first, seen.loss, state["best_loss"].where(due, state["checked_loss"])),
            "halved": halve.where(due, state["halved"]),
        }


@dataclass(frozen=True)
class Smoothed:
    """Another rule on the smoothed gradient (TI-FGSM, Dong et al. 2019): every channel convolved with a Gaussian.

    Outside the pixels the gradient counts as zero; the kernel may be larger than they are.

    Args:
        rule: The rule that the smoothed gradient goes to.
        len_kernel: Side of the kernel in pixels, odd; 1 changes nothing.
        nsig: Standard deviations from its centre to its edge.

    Raises:
        ValueError: On a rule without gradients, or a kernel that is not odd or has no width.
    """

    rule: StepRule
    len_kernel: int = 15
    nsig: float = 3.0
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rule.gradient:
            raise ValueError(f"`rule` is {self.rule!r}, which takes no gradient; there is nothing to smooth.")
        if self.len_kernel < 1 or self.len_kernel % 2 != 1:
            raise ValueError(f"`len_kernel` is {self.len_kernel!r}; it must be an odd whole number, at least 1.")
        if not self.nsig > 0 or not math.isfinite(self.nsig):
            raise ValueError(f"`nsig` is {self.nsig!r}; it must be a finite number above 0.")

    def start(self, pixels: Tensor, keys: Tensor) -> State:
        return self.rule.start(pixels, keys)

    def point(self, pixels: Tensor, size: float, state: State) -> Tensor:
        return self.rule.point(pixels, size, state)

    def update(
        self, pixels: Tensor, seen: Seen, size: float, state: State, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        if self.len_kernel > 1:
            seen = replace(seen, gradient=smooth(seen.gradient, self.len_kernel, self.nsig))
        return self.rule.update(pixels, seen, size, state, project)


def checkpoints(max_iter: int) -> list[int]:
    """The steps after which `ApgdStep` looks back: ⌈p_j · max_iter⌉ of Croce & Hein 2020, without w_0 = 0.

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    before, percent, found = 0, 22, []
    while percent <= 100:  # whole percents: the paper's fractions, added up in floating point, would round up wrongly
        found.append(-(-percent * max_iter // 100))
        before, percent = percent, percent + max(percent - before - 3, 6)
    return sorted(set(found))


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The sign of the gradient, or for "2" the gradient at Euclidean length 1 for each image; zero stays zero.

    Shape: (N, C, h, w) -> (N, C, h, w).
    """
    if norm == "inf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    # by the largest first, so that the squares of a small gradient do not vanish
    scaled = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    return scaled / torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True).clamp_min(tiny)


def smooth(gradient: Tensor, len_kernel: int, nsig: float) -> Tensor:
    """Every channel convolved with a Gaussian kernel that sums to 1, zero outside: (N, C, h, w) -> (N, C, h, w)."""
    places = torch.linspace(-nsig, nsig, len_kernel, dtype=torch.float64)
    kernel = (-places.square() / 2).softmax(0).to(gradient)
    channels = gradient.shape[1]
    # the Gaussian is a product: one pass down and one across in place of the square of their number
    down = F.conv2d(gradient, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), padding="same", groups=channels)
    return F.conv2d(down, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), padding="same", groups=channels)


# Fraction of the step size at a progress in [0, 1) through the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "piecewise": lambda progress: 1.0 if progress < 0.5 else 0.3 if progress < 0.75 else 0.1,
}


def _unit(gradient: Tensor, norm: Norm) -> Tensor:
    """The gradient divided by its size for each image, so that no step outweighs the others in the momentum."""
    if norm == "2":
        return direction(gradient, norm)
    magnitude = gradient.abs().mean((1, 2, 3), keepdim=True)
    return gradient / magnitude.clamp_min(torch.finfo(gradient.dtype).tiny)


def _each(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)."""
    return values[:, None, None, None]


def _check_norm(norm: str) -> None:
    if norm not in ("inf", "2"):
        raise ValueError(f"`norm` is {norm!r}; it must be 'inf' or '2'.")
