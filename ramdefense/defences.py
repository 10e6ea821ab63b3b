"""Defences by name: functions from a segmenter to a segmenter, which leave the one they are given as it is."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

from ramdefense.ram import RAMDefense
from ramdefense.segmenter import PyTorchSegmenter

Defence = Callable[..., PyTorchSegmenter]
D = TypeVar("D", bound=Defence)

_DEFENCES: dict[str, Defence] = {}


def register_defence(name: str) -> Callable[[D], D]:
    """Decorator that enters a defence, `function(segmenter, **options) -> segmenter`, under a name.

    Raises:
        ValueError: the name is taken, or empty.
    """
    if not name or not isinstance(name, str):
        raise ValueError(f"a defence needs a name, got {name!r}")
    if name in _DEFENCES:
        raise ValueError(f"a defence named {name!r} is registered already; choose another name")

    def enter(function: D) -> D:
        _DEFENCES[name] = function
        return function

    return enter


def defence(name: str) -> Defence:
    """The defence of that name.

    Raises:
        ValueError: no such defence; the message lists those there are.
    """
    if name not in _DEFENCES:
        close = difflib.get_close_matches(str(name), _DEFENCES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no defence is named {name!r}: {hint}there are {', '.join(map(repr, defences()))}")
    return _DEFENCES[name]


def defences() -> list[str]:
    """The names of all defences, in the order in which they were registered."""
    return list(_DEFENCES)


@register_defence("none")
def undefended(segmenter: PyTorchSegmenter) -> PyTorchSegmenter:
    """The segmenter itself."""
    return segmenter


register_defence("ram")(RAMDefense)
