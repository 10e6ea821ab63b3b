"""What an attack on a random model sees in the model's place: its expectation over draws, taken in one batch.

ART's attacks run an estimator's model as it is, one draw for each step. Each copy of an image in a batch has a random
stream of its own (`ramdefense.streams`), so a batch that holds each image k times holds k draws of it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

Found = dict[str, Tensor] | list[dict[str, Tensor]]  # a torchvision detector's losses, or what it detects


class MeanLogits(nn.Module):
    """A classifier's logits, averaged over draws.

    Args:
        model: any classifier, images ``(N, …)`` → logits ``(N, K)``.
        draws: how many.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, _checked(draws)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(torch.cat([images] * self.draws))
        return logits.unflatten(0, (self.draws, -1)).mean(0)


class MeanLosses(nn.Module):
    """A torchvision detector whose losses, which are means over a batch, are means over draws as well.

    Without targets it detects with one draw, as the detector itself.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, _checked(draws)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Found:
        if targets is None:
            return cast(Found, self.model(images))
        return cast(Found, self.model(torch.cat([images] * self.draws), list(targets) * self.draws))


def _checked(draws: int) -> int:
    if draws < 1:
        raise ValueError(f"draws={draws}: at least 1")
    return draws
