"""What an attack must know of a defended model, and under which conditions that model runs.

A *defended module* is any `nn.Module` with two attributes, `traits: Traits` and `conditions: Conditions` (assignable).
That is the whole protocol: a defence joins by having these two, wherever in a model it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


class NotApplicableError(ValueError):
    """This defence or attack has no meaning on this model, such as RAM on a model without attention.

    A table then shows "n/a" for the pair, and goes on.
    """


@dataclass(frozen=True)
class Traits:
    """What an attack must know of a defended model.

    Attributes:
        random: two forward passes on one input may differ.
        straight_through: the module offers a straight-through gradient for a step whose gradient is zero.
    """

    random: bool = False
    straight_through: bool = False


@dataclass(frozen=True)
class Conditions:
    """Under which a defended module runs its next forward passes.

    Attributes:
        images: number of the random stream of each image in the batch; None means 0..N-1.
        draw: which draw of the randomness; None means the module's own next one.
        straight_through: use the straight-through gradient, where the module has one.
        undefended: do as if the defence were not there, where the module can (a module that cannot ignores it).
    """

    images: tuple[int, ...] | None = None
    draw: int | None = None
    straight_through: bool = False
    undefended: bool = False


def defended_modules(model: nn.Module) -> list[nn.Module]:
    """Every module inside `model` (itself included) that follows the protocol of this file."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "traits", None), Traits)
        and isinstance(getattr(module, "conditions", None), Conditions)
    ]


def traits_of(model: nn.Module) -> Traits:
    """The union of the traits of every defended module inside `model`; `Traits()` for a plain model."""
    traits: list[Traits] = [module.traits for module in defended_modules(model)]  # type: ignore[misc]
    return Traits(random=any(t.random for t in traits), straight_through=any(t.straight_through for t in traits))


@contextmanager
def conditions(
    model: nn.Module,
    *,
    images: tuple[int, ...] | None = None,
    draw: int | None = None,
    straight_through: bool = False,
    undefended: bool = False,
) -> Iterator[None]:
    """Run every defended module inside `model` under these conditions; what was set before is restored on the way out.

    Args:
        model: any module; without a defended module inside, nothing happens.
        images: number of the random stream of each image in the next batches, or None for 0..N-1.
        draw: which draw of the randomness, or None for each module's own next one.
        straight_through: use straight-through gradients where a module has them.
        undefended: do as if the defences were not there, where a module can.
    """
    streams = None if images is None else tuple(int(i) for i in images)
    given = Conditions(streams, draw, straight_through, undefended)
    before: list[tuple[nn.Module, Conditions]] = [
        (module, module.conditions)  # type: ignore[misc]
        for module in defended_modules(model)
    ]
    try:
        for module, _ in before:
            module.conditions = given  # type: ignore[assignment]
        yield
    finally:
        for module, conditions_before in before:
            module.conditions = conditions_before  # type: ignore[assignment]
