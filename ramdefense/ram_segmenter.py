"""RAM on a segmenter: `ramdefense.ram.harden` for everything that attacks an ART estimator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ramdefense.defended import DefendedSegmenter
from ramdefense.ram import Patterns, harden
from ramdefense.segmenter import PyTorchSegmenter


class RAMDefense(DefendedSegmenter):
    """A segmenter hardened by RAM; a segmenter itself, for every attack that takes one.

    Everything but the model is as in `segmenter`, which stays as it was; the model is a hardened deep copy. The class
    of the result derives from RAMDefense and from the class of `segmenter`, so that what that class overrides stays.

    Args:
        segmenter: a `PyTorchSegmenter`.
        max_attention, suppression, dropout, unit, compensate, include, exclude, seed: see `harden`.
        example: an input of the model, or its shape, to look for the sites; the segmenter's `input_shape` where None.

    Raises:
        TypeError: `segmenter` is no `PyTorchSegmenter`, or an option has the wrong type.
        ValueError: as `harden`.
    """

    __module__ = "ramdefense.ram"  # where it is asked for; pickles and the folders of runs name it so

    def __init__(
        self,
        segmenter: PyTorchSegmenter,
        *,
        max_attention: float | str = "16/N",
        suppression: str = "cap",
        dropout: float = 0.1,
        unit: str = "element",
        compensate: str = "rescale",
        include: Patterns = None,
        exclude: Patterns = None,
        seed: int = 0,
        example: Tensor | Sequence[int] | None = None,
    ) -> None:
        hardened = harden(
            segmenter.model,
            max_attention=max_attention,
            suppression=suppression,
            dropout=dropout,
            unit=unit,
            compensate=compensate,
            include=include,
            exclude=exclude,
            seed=seed,
            example=segmenter.input_shape if example is None else example,
        )
        self._become(segmenter, hardened)
