"""A segmenter that is another one with a changed model: what every defence written as a class derives from."""

from __future__ import annotations

import functools
import types
from typing import Any, Self

from torch import nn

from ramdefense.segmenter import PyTorchSegmenter


class DefendedSegmenter(PyTorchSegmenter):
    """Everything but the model is as in the segmenter that it was made from, which stays as it was.

    The class of an instance derives from the defence's class and from that of the segmenter, so that what the latter
    overrides stays. A defence writes an ``__init__(self, segmenter, **options)`` that ends with `_become`.

    Raises:
        TypeError: `segmenter` is no `PyTorchSegmenter`.
    """

    def __new__(cls, segmenter: PyTorchSegmenter, **options: Any) -> Self:
        if not isinstance(segmenter, PyTorchSegmenter):
            raise TypeError(
                f"segmenter is a {type(segmenter).__name__}; wrap a model in ramdefense.PyTorchSegmenter first, or use "
                "ramdefense.harden(model) for the model alone"
            )
        return object.__new__(_both(cls, type(segmenter)))

    def _become(self, segmenter: PyTorchSegmenter, model: nn.Module, **changes: Any) -> None:
        """Take everything from a segmenter but the model and what else is given by name."""
        other = segmenter.with_model(model)
        if changes:
            other.set_params(**changes)
        self.__dict__.update(vars(other))

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self)
        return _rebuilt, kind.__bases__ if "__both__" in vars(kind) else (kind, kind), self.__dict__.copy()

    def __repr__(self) -> str:
        segmenter = super().__repr__()
        options = self.model.extra_repr()
        return f"{segmenter[:-1]}, {options})" if options else segmenter


@functools.cache
def _both(own: type, plain: type) -> type:
    """A class that is both; made only where neither derives from the other."""
    if issubclass(own, plain):
        return own
    if issubclass(plain, own):
        return plain
    name = f"{own.__name__}[{plain.__name__}]"
    return types.new_class(name, (own, plain), exec_body=lambda body: body.update(__both__=True, __module__=__name__))


def _rebuilt(own: type, plain: type) -> Any:
    return object.__new__(_both(own, plain))
