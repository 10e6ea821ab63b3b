"""Target maps: what each pixel is to be mistaken for.

A target is a function from label maps to target maps; `targeted` says whether the attack is to reach the map it returns
or to leave it. Void pixels stay void in every one of them.

Permute and Strip are named after the target maps of DAG (Xie et al., "Adversarial Examples for Semantic Segmentation
and Object Detection", ICCV 2017), the two settings in which RAM (Yuan et al., IJCV 2024) was evaluated. What happens
where an image holds too many classes is our own definition, marked so below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from attacks.streams import stream, stream_numbers


@runtime_checkable
class Target(Protocol):
    """Anything that turns label maps into the maps that an attack aims at."""

    @property
    def targeted(self) -> bool:
        """True if the attack is to reach the returned map, False if it is to leave it."""

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """Label maps (N, H, W) int64 -> target maps (N, H, W) int64."""


@dataclass(frozen=True)
class Permute:
    """Every class of the image becomes another class, one to one, drawn at random from the classes absent from it.

    Ours, where fewer classes are absent than present: the map is then a derangement of all classes, uniform among them,
    so that it is still one to one and leaves no class where it was.

    Args:
        seed: Seed of the maps; each image has a stream of its own.
    """

    seed: int = 0
    targeted: ClassVar[bool] = True

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """Args:
            labels: Ground truth, (N, H, W) int64, classes in [0, nb_classes) or `ignore_index`.
            nb_classes: Number of classes, at least 2.
            ignore_index: Label of void pixels; they stay void.
            images: Stream number of each image; None: 0..N-1.

        Returns:
            Target maps, (N, H, W) int64.

        Raises:
            ValueError: On labels of another shape, dtype or range, or fewer than 2 classes.
        """
        present = _present(labels, nb_classes, ignore_index)
        tables = [
            _one_to_one(row, stream(self.seed, "permute", image))
            for row, image in zip(present, stream_numbers(images, len(labels)), strict=True)
        ]
        return _look_up(tables, labels, ignore_index)


@dataclass(frozen=True)
class Strip:
    """Vertical bands of equal width, each of one class drawn at random, absent from the image where possible.

    The content of the image has no say in where a band lies. Widths differ by one pixel at most. Ours: the bands are of
    different classes as long as there are enough absent ones; where there are fewer they repeat, and where the image
    holds every class the bands are drawn from all of them.

    Args:
        bands: Number of bands, at least 1.
        seed: Seed of the maps; each image has a stream of its own.
    """

    bands: int = 4
    seed: int = 0
    targeted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise ValueError(f"`bands` is {self.bands}; it must be at least 1.")

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """As `Permute.__call__`; also refuses an image narrower than the number of bands."""
        present = _present(labels, nb_classes, ignore_index)
        width = labels.shape[-1]
        if width < self.bands:
            raise ValueError(f"An image {width} pixels wide cannot hold {self.bands} bands; use fewer `bands`.")
        classes = []
        for row, image in zip(present, stream_numbers(images, len(labels)), strict=True):
            shuffled = _absent(row, stream(self.seed, "strip", image))
            classes.append(shuffled[torch.arange(self.bands) % len(shuffled)])
        band = torch.arange(width) * self.bands // width
        columns = torch.stack(classes)[:, band].to(labels.device)  # (N, W)
        return torch.where(labels == ignore_index, labels, columns[:, None, :])


@dataclass(frozen=True)
class Untargeted:
    """No target: the attack moves every pixel away from its label, wherever to."""

    targeted: ClassVar[bool] = False

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """The labels themselves, checked as in `Permute.__call__`."""
        _present(labels, nb_classes, ignore_index)
        return labels


@dataclass(frozen=True)
class FixedClass:
    """Every pixel becomes one and the same class.

    Args:
        index: The class, in [0, nb_classes).
    """

    index: int
    targeted: ClassVar[bool] = True

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """As `Permute.__call__`; also refuses an `index` that is no class."""
        _present(labels, nb_classes, ignore_index)
        if not 0 <= self.index < nb_classes:
            raise ValueError(f"`index` is {self.index}; the classes are 0 to {nb_classes - 1}.")
        return torch.where(labels == ignore_index, labels, self.index)


@dataclass(frozen=True)
class Region:
    """One rectangle becomes one class, and nothing else counts: the aim of a patch that is somewhere else (Mirsky,
    "IPatch: A Remote Adversarial Patch", 2021).

    Args:
        index: The class, in [0, nb_classes); None: for each image one drawn at random, absent from it where possible.
        box: (top, left, bottom, right) as fractions of the image's height and width.
        seed: Seed of the classes that are drawn; each image has a stream of its own.
    """

    index: int | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.5, 0.5)
    seed: int = 0
    targeted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        top, left, bottom, right = self.box
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise ValueError(
                f"`box` is {self.box!r}; it must be (top, left, bottom, right), fractions of the image in that order."
            )

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """As `FixedClass.__call__`; void outside the rectangle."""
        present = _present(labels, nb_classes, ignore_index)
        inside = torch.full_like(labels, ignore_index)
        height, width = labels.shape[-2:]
        top, bottom = round(self.box[0] * height), round(self.box[2] * height)
        left, right = round(self.box[1] * width), round(self.box[3] * width)
        inside[:, top:bottom, left:right] = labels[:, top:bottom, left:right]
        if self.index is not None:
            return FixedClass(self.index)(inside, nb_classes=nb_classes, ignore_index=ignore_index)
        drawn = [
            _absent(row, stream(self.seed, "region", image))[0]
            for row, image in zip(present, stream_numbers(images, len(labels)), strict=True)
        ]
        classes = torch.stack(drawn).to(labels.device)[:, None, None]
        return torch.where(inside == ignore_index, inside, classes)


@dataclass(frozen=True, eq=False)
class TargetMap:
    """A map that the user brings.

    Args:
        map: (H, W) for every image, or (N, H, W) for the N images of one call; int64, array or tensor. Pixels that are
            void in it or in the labels stay void.
    """

    map: Any
    targeted: ClassVar[bool] = True

    def __call__(
        self, labels: Tensor, *, nb_classes: int, ignore_index: int = 255, images: Sequence[int] | None = None
    ) -> Tensor:
        """As `Permute.__call__`; also refuses a map of another size than the labels."""
        _present(labels, nb_classes, ignore_index)
        wanted = torch.as_tensor(self.map).to(labels.device)
        if wanted.shape not in (labels.shape, labels.shape[1:]):
            raise ValueError(
                f"The target map has shape {tuple(wanted.shape)}; the labels need {tuple(labels.shape[1:])} "
                f"or {tuple(labels.shape)}."
            )
        wanted = wanted.expand_as(labels)
        _present(wanted, nb_classes, ignore_index)
        return torch.where(labels == ignore_index, labels, wanted)

    def __repr__(self) -> str:
        return f"TargetMap(map=<{'×'.join(map(str, self.map.shape))}>)"


_NAMED: dict[str, Callable[[int], Target]] = {
    "permute": Permute,
    "strip": lambda seed: Strip(seed=seed),
    "untargeted": lambda seed: Untargeted(),
}


def named_target(name: str, seed: int = 0) -> Target:
    """A target by its name: "permute", "strip", "untargeted", or the number of a class for all pixels, such as "3".

    Args:
        name: Which.
        seed: Seed of the maps that are drawn.

    Raises:
        ValueError: If there is none of that name.
    """
    if name.isdecimal():
        return FixedClass(int(name))
    if name not in _NAMED:
        known = ", ".join(map(repr, _NAMED))
        raise ValueError(f"`target` is {name!r}; the names are {known}, or the number of a class, such as '3'.")
    return _NAMED[name](seed)


def _present(labels: Tensor, nb_classes: int, ignore_index: int) -> Tensor:
    """Which classes each image holds: (N, nb_classes) bool on the CPU."""
    if nb_classes < 2:
        raise ValueError(f"`nb_classes` is {nb_classes}; a target needs at least 2 classes.")
    if labels.ndim != 3 or labels.dtype != torch.int64:
        raise ValueError(f"Label maps are (N, H, W) int64; got {tuple(labels.shape)} {labels.dtype}.")
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= nb_classes))
    if wrong.any():
        label = int(labels[wrong][0])
        raise ValueError(f"Label {label} is neither a class, 0 to {nb_classes - 1}, nor `ignore_index` {ignore_index}.")
    slots = torch.where(counted, labels, nb_classes).flatten(1)
    seen = torch.zeros(len(labels), nb_classes + 1, dtype=torch.bool, device=labels.device)
    return seen.scatter_(1, slots, True)[:, :nb_classes].cpu()


def _absent(present: Tensor, generator: torch.Generator) -> Tensor:
    """The classes that an image does not hold, or all where it holds every one, shuffled."""
    candidates = (~present).nonzero()[:, 0] if not present.all() else torch.arange(len(present))
    return candidates[torch.randperm(len(candidates), generator=generator)]


def _one_to_one(present: Tensor, generator: torch.Generator) -> Tensor:
    """A table (nb_classes,) that sends each present class to a class of its own, never to itself."""
    here, absent = present.nonzero()[:, 0], (~present).nonzero()[:, 0]
    identity = torch.arange(len(present))
    if len(here) <= len(absent):
        drawn = torch.randperm(len(absent), generator=generator)[: len(here)]
        return identity.scatter(0, here, absent[drawn])
    while True:  # uniform among derangements; one permutation in e is one, so this ends after three draws or so
        table = torch.randperm(len(present), generator=generator)
        if not (table == identity).any():
            return table


def _look_up(tables: list[Tensor], labels: Tensor, ignore_index: int) -> Tensor:
    void = labels == ignore_index
    table = torch.stack(tables).to(labels.device)
    mapped = table.gather(1, labels.masked_fill(void, 0).flatten(1)).view_as(labels)
    return torch.where(void, labels, mapped)
