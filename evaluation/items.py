"""What classification data are, whatever they come from: an image, a class, a mask of the object where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One image of one object.

    Attributes:
        image: float32 ``(3, H, W)`` in ``[0, 1]``.
        label: class of the object.
        mask: bool ``(H, W)``, True on the object; ``None`` where the data set has none.
        context: kind of the background; ``None`` where the data set does not tell.
        name: of the image.
    """

    image: Tensor
    label: int
    mask: Tensor | None
    context: int | None
    name: str


@runtime_checkable
class ClassificationData(Protocol):
    """What a trial of a classifier needs of a data set; any object that has these three will do."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class Batch(NamedTuple):
    """Items as a batch.

    Shape:
        images: float32 ``(N, 3, H, W)``; labels: int64 ``(N,)``; masks: bool ``(N, H, W)`` or ``None``; contexts: int64
        ``(N,)`` or ``None``.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor | None
    contexts: Tensor | None
    names: list[str]


def stack_items(data: ClassificationData, indices: Sequence[int] | None = None) -> Batch:
    """Items as a batch, all of them if no indices are given; masks and contexts where every item has one.

    Raises:
        ValueError: no item, or items of different sizes.
    """
    items = [data[i] for i in (range(len(data)) if indices is None else indices)]
    if not items:
        raise ValueError("indices=[]: a batch needs at least one item")
    sizes = {tuple(item.image.shape[-2:]) for item in items}
    if len(sizes) > 1:
        raise ValueError(f"images of the sizes {sorted(sizes)} in one batch; give the data a size=(height, width)")
    masks = [item.mask for item in items if item.mask is not None]
    contexts = [item.context for item in items if item.context is not None]
    return Batch(
        torch.stack([item.image for item in items]),
        torch.tensor([item.label for item in items]),
        torch.stack(masks) if len(masks) == len(items) else None,
        torch.tensor(contexts) if len(contexts) == len(items) else None,
        [item.name for item in items],
    )
