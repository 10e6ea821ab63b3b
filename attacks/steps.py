"""How a patch moves: step rules, step-size schedules and the box it stays in.

A step rule is a pair of pure functions. `start(pixels)` makes its state, a dict of tensors whose first dimension is the
image, so that images may leave the batch; `update(pixels, gradient, size, state)` returns the moved pixels and the next
state, and alters neither of those it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


class StepRule(Protocol):
    """Moves patches (N, C, h, w) against their gradient."""

    def start(self, pixels: Tensor) -> State:
        """The state before the first step."""

    def update(self, pixels: Tensor, gradient: Tensor, size: float, state: State) -> tuple[Tensor, State]:
        """One step of `size`, in the units of the pixels, not yet projected into the box."""


@dataclass(frozen=True)
class SignStep:
    """Steps along the sign of the gradient (PGD, Madry et al. 2018), with momentum as in MI-FGSM (Dong et al. 2018).

    Args:
        momentum: Decay of the accumulated gradient, each gradient divided by its mean absolute value for that image
            before it is added; 0 is plain sign-PGD.
    """

    momentum: float = 0.0

    def start(self, pixels: Tensor) -> State:
        return {"velocity": torch.zeros_like(pixels)} if self.momentum else {}

    def update(self, pixels: Tensor, gradient: Tensor, size: float, state: State) -> tuple[Tensor, State]:
        if not self.momentum:
            return pixels - size * gradient.sign(), state
        magnitude = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        velocity = self.momentum * state["velocity"] + gradient / magnitude
        return pixels - size * velocity.sign(), {"velocity": velocity}


@dataclass(frozen=True)
class AdamStep:
    """Adam (Kingma & Ba 2015) on the pixels, as Brown et al. 2017 move their patch; `size` is the learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def start(self, pixels: Tensor) -> State:
        return {
            "mean": torch.zeros_like(pixels),
            "square": torch.zeros_like(pixels),
            "steps": pixels.new_zeros(len(pixels), 1, 1, 1),
        }

    def update(self, pixels: Tensor, gradient: Tensor, size: float, state: State) -> tuple[Tensor, State]:
        mean = self.beta1 * state["mean"] + (1 - self.beta1) * gradient
        square = self.beta2 * state["square"] + (1 - self.beta2) * gradient.square()
        steps = state["steps"] + 1
        direction = (mean / (1 - self.beta1**steps)) / ((square / (1 - self.beta2**steps)).sqrt() + self.epsilon)
        return pixels - size * direction, {"mean": mean, "square": square, "steps": steps}


# Fraction of the step size at a progress in [0, 1) through the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "piecewise": lambda progress: 1.0 if progress < 0.5 else 0.3 if progress < 0.75 else 0.1,
}


def project_box(pixels: Tensor, low: float, high: float) -> Tensor:
    """The closest pixels within [low, high]."""
    return pixels.clamp(low, high)
