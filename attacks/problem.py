"""One look of an attack at a batch: loss, success and gradient at a point, averaged over what is random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from attacks.criteria import Criterion
from attacks.interfaces import Victim
from attacks.objectives import Objective
from attacks.terms import Forward
from attacks.threats import Threat
from ramdefense.partial import PartialForward
from ramdefense.traits import Traits

if TYPE_CHECKING:
    from attacks.options import AttackOptions

DEFENCE_SAMPLES = 4
"""Draws of a random defence in each step, unless `defence_samples` says otherwise."""


@dataclass
class Spent:
    """Passes so far, counted in images."""

    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class Look:
    """What a look at a batch shows: (N,), (N,) and the variable's shape; zero is what was not asked for."""

    criterion: Tensor
    loss: Tensor
    gradient: Tensor

    def rows(self, chosen: Tensor) -> Self:
        """The look at some of the images."""
        return replace(self, **{name: value[chosen] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Problem:
    """The images of one batch and everything that is fixed while an attack on them is made."""

    victim: Victim
    threat: Threat
    reference: Tensor
    streams: tuple[int, ...]
    options: AttackOptions
    traits: Traits
    objective: Objective
    criterion: Criterion
    spent: Spent = field(default_factory=Spent)
    partial: PartialForward | None = None  # the victim's logits, computed where a patch can change them

    def __len__(self) -> int:
        return len(self.reference)

    def rows(self, chosen: Tensor) -> Problem:
        """The problem of some of the images; `chosen` holds their indices."""
        some = replace(
            self,
            threat=self.threat.rows(chosen),
            reference=self.reference[chosen],
            streams=tuple(self.streams[row] for row in chosen.tolist()),
        )
        if self.partial is None or len(some) == len(self):
            return some
        with some.under(0):
            return replace(some, partial=self.partial.rows(chosen))

    @cached_property
    def _valid(self) -> Tensor:
        """The pixels with a label, (N, H, W) bool."""
        return self.reference != self.victim.ignore_index

    @property
    def deterministic(self) -> bool:
        """Whether one look at a point says all about it."""
        return self.samples == 1 and not self.threat.samples and not self.random

    @property
    def random(self) -> bool:
        """Whether the model that is looked at draws random numbers."""
        return self.traits.random and not self.options.undefended

    @property
    def samples(self) -> int:
        """Passes in each step. Each has a placement and a draw of its own, so the larger number covers both."""
        drawn = self.options.defence_samples or (DEFENCE_SAMPLES if self.random else 1)
        return max(drawn, self.threat.samples, 1)

    def under(self, draw: int) -> AbstractContextManager[None]:
        """The defence's conditions for one pass; nothing for a model that has none to set."""
        wanted = self.options.straight_through
        straight_through = self.traits.straight_through if wanted is None else wanted
        if self.options.undefended:
            return self.victim.conditions(images=self.streams, draw=draw, undefended=True)
        if not (self.traits.random or self.traits.straight_through or straight_through):
            return nullcontext()
        return self.victim.conditions(images=self.streams, draw=draw, straight_through=straight_through)

    def look(self, variable: Tensor, run: int, step: int, *, gradient: bool, judge: bool = True) -> Look:
        """Loss and, where asked for, success and gradient at `variable`, each the mean over this step's samples."""
        looks = list(self._samples(variable, run, step, gradient, judge))
        self.spent.forwards += len(looks) * len(self)
        self.spent.backwards += len(looks) * len(self) * gradient
        return _mean(looks)

    def _samples(self, variable: Tensor, run: int, step: int, gradient: bool, judge: bool) -> Iterator[Look]:
        progress = step / self.options.max_iter
        for sample in range(self.samples):
            leaf = variable.detach().requires_grad_(gradient)
            # every look of every run draws anew: 0, 1, 2, …
            draw = (run * (self.options.max_iter + 1) + step) * self.samples + sample
            with torch.set_grad_enabled(gradient), self.under(draw):
                placed, covered = self.threat.place(leaf, (run, step, sample))
                counted = self._valid & ~covered
                with ExitStack() as stack:
                    observed = [stack.enter_context(term.observe(self.victim)) for term in self.options.terms]
                    logits = (self.partial or self.victim.logits)(placed)
                loss = self.objective(logits, self.reference, counted, progress)
                for term, seen in zip(self.options.terms, observed, strict=True):
                    loss = loss + term(Forward(leaf, placed, covered, logits, seen))
                # asked for alone: the gradients of the weights are not computed
                slope = torch.autograd.grad(loss.sum(), leaf)[0] if gradient else torch.zeros_like(leaf)
            loss = loss.detach()
            success = self.criterion(logits.detach(), self.reference, counted) if judge else torch.zeros_like(loss)
            yield Look(success, loss, slope)


def _mean(looks: list[Look]) -> Look:
    if len(looks) == 1:
        return looks[0]
    return Look(*(torch.stack(parts).mean(0) for parts in zip(*(vars(look).values() for look in looks), strict=True)))
