"""Weights that an attack does not ask about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter asks for a gradient; on the way out each asks again as it did.

    An attack takes the gradient of the patch alone, so none is computed for the weights in any case. But autograd
    keeps for them, from the forward pass to the backward one, the input of every linear layer and normalisation. No
    number changes.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
