"""Looks at a patch that compute only what it can change (`ramdefense.partial`), where that pays.

Off by default: convolutions of another size add in another order, so logits and gradients differ in the last bits, and
a step that goes by signs may then move single pixels the other way. The same options still give the same patch, on the
same machine, and no clock is asked: what pays is judged by counted operations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from attacks.options import PatchOptions
from attacks.problem import Problem
from attacks.streams import stream
from ramdefense.locality import Box
from ramdefense.partial import NotPartialError, PartialForward

LARGEST_SHARE = 0.75
"""Of a full pass's operations that may be left; above it little or nothing is won (benchmarks/partial.py)."""

SET_UP = 4
"""Looks that setting up costs, at most, by the same measure."""


def in_part(problem: Problem) -> Problem:
    """The problem, its looks in part where the options ask for it and it can be done.

    The passes that this takes, three forward and two backward, are counted in no result.

    Raises:
        NotPartialError: A ValueError, where the options insist and it cannot be done.
    """
    options = problem.options
    if not isinstance(options, PatchOptions) or options.partial is False:
        return problem
    runs = len(options.objectives) * options.num_restarts * problem.samples
    if options.partial is None and runs * options.max_iter <= SET_UP:
        return problem
    try:
        partial = _checked(problem)
    except NotPartialError:
        if options.partial:
            raise
        return problem
    pays = partial.share <= LARGEST_SHARE and (1 - partial.share) * runs * options.max_iter > SET_UP
    return replace(problem, partial=partial) if options.partial or pays else problem


def _checked(problem: Problem) -> PartialForward:
    """Passes in part, recorded under one draw of the defence and compared with full ones under another."""
    threat = problem.threat
    clean, covered = threat.place(threat.start(0), (0, 0, 0))
    box = None if threat.samples else Box.around(covered)
    if box is None:
        raise NotPartialError("this attack may change any part of the image; leave `partial` out")
    with problem.under(0):
        partial = PartialForward(problem.victim.logits, clean, box)
    partial.check(_noise(problem, clean), _under(problem, 1))
    return partial


def _under(problem: Problem, draw: int) -> Callable[[], AbstractContextManager[None]]:
    return lambda: problem.under(draw)


def _noise(problem: Problem, clean: Tensor) -> Tensor:
    """The images with patches of noise, each image's own."""
    low, high = (float(value) for value in problem.victim.clip_values)
    shape = problem.threat.start(0).shape[1:]
    drawn = [torch.rand(shape, generator=stream("partial", image)) for image in problem.streams]
    patches = low + (high - low) * torch.stack(drawn).to(clean)
    return problem.threat.place(patches, (0, 0, 0))[0]
