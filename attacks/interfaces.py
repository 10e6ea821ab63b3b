"""What an attack asks of a segmenter, and what a table asks of an attack."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ramdefense.traits import Traits


class Victim(Protocol):
    """What an attack asks of a segmenter."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def nb_classes(self) -> int: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def clip_values(self) -> tuple[float, float]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def traits(self) -> Traits: ...

    def logits(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, nb_classes, H, W), differentiable."""

    def conditions(
        self,
        *,
        images: Sequence[int] | None = None,
        draw: int | None = None,
        straight_through: bool = False,
        undefended: bool = False,
    ) -> AbstractContextManager[None]:
        """The conditions under which a defended model runs inside a `with`."""


class CataloguedAttack(Protocol):
    """What a table asks of an attack; arrays and tensors alike, and what comes back is of the kind that went in."""

    def generate(self, x: Any, y: Any = None, *, images: Sequence[int] | None = None) -> Any:
        """Images (N, C, H, W) and ground truth (N, H, W) -> adversarial images; `images`: their stream numbers."""

    def target_map(self, y: Any, images: Sequence[int] | None = None) -> Any:
        """The map that the attack aims at, (N, H, W); None for an untargeted attack."""

    def mask(self, x: Any) -> Any:
        """The pixels that the attack may change, (N, H, W) bool."""
