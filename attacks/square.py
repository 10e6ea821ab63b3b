"""Random search on the pixels, without gradients (Square Attack, Andriushchenko et al. 2020), adapted to a box.

It asks for the loss alone, so a defence that hides its gradient hides nothing from it: where it beats a gradient
attack, the gradient is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.steps import Seen, State
from attacks.streams import stream

FAR = 1e6
"""So far outside that its projection is an edge of what is allowed, whatever that is."""

# Steps of the paper's 10 000 after which the share of the pixels that a square covers is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class SquareStep:
    """Squares at random places, in which every channel goes to one edge of its range; kept where the loss falls.

    As in the paper, section 3: the first point is vertical stripes one pixel wide, whatever the start; then each step
    tries one square, which shrinks as the steps go by. The range is that of the pixels, so every pixel ends at one of
    its edges: the clip range for a patch, both ends of the ball for an L∞ perturbation. (Under L2 it is not the
    paper's attack on that norm.) A step is one query. `size` is not used. Each image draws from a stream of its own.

    The loss is believed as it is seen. Under a random defence a lucky one stays, so average over enough draws.

    Args:
        max_iter: Steps in all, to which the paper's schedule is stretched.
        p_init: Share of the pixels that the first squares cover.

    Raises:
        ValueError: On a number out of range.
    """

    max_iter: int
    p_init: float = 0.3
    gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_iter < 1:
            raise ValueError(f"`max_iter` is {self.max_iter!r}; it must be at least 1.")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"`p_init` is {self.p_init!r}; it must be above 0 and at most 1.")

    def start(self, pixels: Tensor, keys: Tensor) -> State:
        stripes = torch.stack([_stripes(key, pixels.shape[1], pixels.shape[3]) for key in keys.tolist()])
        high = stripes.to(pixels.device).expand(pixels.shape)
        return {
            "keys": keys.to(pixels.device),
            "step": torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device),
            "loss": pixels.new_full((len(pixels),), torch.inf),
            "high": high,  # which values are at the upper edge, and which would be in the proposal
            "proposal": high,
        }

    def point(self, pixels: Tensor, size: float, state: State) -> Tensor:
        return torch.full_like(pixels, FAR).where(state["proposal"], -FAR)

    def update(
        self, pixels: Tensor, seen: Seen, size: float, state: State, project: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, State]:
        better = seen.loss < state["loss"]
        high = state["proposal"].where(better[:, None, None, None], state["high"])
        step = state["step"] + 1
        return seen.point.where(better[:, None, None, None], pixels), {
            "keys": state["keys"],
            "step": step,
            "loss": seen.loss.where(better, state["loss"]),
            "high": high,
            "proposal": self._propose(high, state["keys"].tolist(), step.tolist()),
        }

    def side(self, step: int, height: int, width: int) -> int:
        """Side of the square of a step: the paper's p, halved as its schedule says, and at least one pixel."""
        done = step / self.max_iter * 10_000
        share = self.p_init / 2 ** sum(done > halving for halving in HALVINGS)
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def _propose(self, high: Tensor, keys: list[int], steps: list[int]) -> Tensor:
        """`high` (N, C, h, w) bool with one square changed."""
        channels, height, width = high.shape[1:]
        inside = torch.zeros(len(high), 1, height, width, dtype=torch.bool)
        colours = torch.empty(len(high), channels, 1, 1, dtype=torch.bool)
        for row, (key, step) in enumerate(zip(keys, steps, strict=True)):
            generator, side = stream("square", key, step), self.side(step, height, width)
            top = int(torch.randint(height - side + 1, (), generator=generator))
            left = int(torch.randint(width - side + 1, (), generator=generator))
            inside[row, :, top : top + side, left : left + side] = True
            colours[row, :, 0, 0] = torch.randint(2, (channels,), generator=generator).bool()
        inside, colours = inside.to(high.device), colours.to(high.device)
        # a square that has its colour already would waste the query: it gets the opposite one
        same = ((high == colours) | ~inside).flatten(1).all(1)
        return (colours ^ same[:, None, None, None]).where(inside, high)


def _stripes(key: int, channels: int, width: int) -> Tensor:
    """(C, 1, w) bool: which columns of each channel start at the upper edge."""
    return torch.randint(2, (channels, 1, width), generator=stream("square", key, 0)).bool()
