"""When an attack has succeeded: a share of the counted pixels, one for each image.

A criterion maps logits (N, C, H, W), a reference map (N, H, W) and the counted pixels (N, H, W) bool to (N,) in [0, 1].
1 is complete success: there is nothing left to win on that image. An image without a counted pixel has 1, for the same
reason.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ramdefense.outputs import predictions_of

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_target(logits: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
    """Success rate of a targeted attack: the share of the counted pixels that are predicted as their target."""
    return _share((predictions_of(logits) == reference) & counted, counted)


def off_label(logits: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
    """Success rate of an untargeted attack: the share of the counted pixels that are not predicted as their label."""
    return _share((predictions_of(logits) != reference) & counted, counted)


def _share(won: Tensor, counted: Tensor) -> Tensor:
    total = counted.flatten(1).sum(1)
    return (won.flatten(1).sum(1) / total).where(total > 0, 1.0)
