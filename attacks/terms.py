"""What may be added to an attack's objective: numbers that look at a whole forward pass, not at the logits alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from attacks.interfaces import Victim


@dataclass(frozen=True)
class Forward:
    """One forward pass of an attack on a batch.

    Args:
        pixels: The variable: the patches, (N, C, h, w), or the adversarial images.
        images: What the model saw, (N, C, H, W).
        covered: The pixels under the patch, (H, W) or (N, H, W) bool.
        logits: (N, nb_classes, H, W).
        observed: What the term's own `observe` gave.
    """

    pixels: Tensor
    images: Tensor
    covered: Tensor
    logits: Tensor
    observed: Any


class Term(Protocol):
    """A number for each image that is minimised beside the objective."""

    def observe(self, victim: Victim) -> AbstractContextManager[Any]:
        """A context around the forward pass, in which a term may watch the model; `nullcontext()` for most."""

    def __call__(self, forward: Forward) -> Tensor:
        """(N,), differentiable in `forward.pixels`, its weight included."""
