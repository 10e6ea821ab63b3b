"""Defences by name: functions from a segmenter to a segmenter, which leave the one they are given as it is."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ramdefense.names import split_name

if TYPE_CHECKING:
    from ramdefense.segmenter import PyTorchSegmenter

Defence = Callable[..., "PyTorchSegmenter"]
D = TypeVar("D", bound=Defence)


class _Shipped(NamedTuple):
    """A defence of this package, imported when it is first asked for: they bring torch and ART with them."""

    module: str
    name: str
    summary: str  # the first line of its docstring

    def load(self) -> Defence:
        found: Defence = getattr(import_module(self.module), self.name)
        return found


_DEFENCES: dict[str, Defence | _Shipped] = {}


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
    """The defence of that name, which may carry options: ``"ram:suppression=cap,max_attention=2/N"``.

    Raises:
        ValueError: no such defence, or an option that it does not have; the message lists those there are.
    """
    base, options = split_name(name)
    if base not in _DEFENCES:
        close = difflib.get_close_matches(base, _DEFENCES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no defence is named {base!r}: {hint}there are {', '.join(map(repr, defences()))}")
    held = _DEFENCES[base]
    function = held.load() if isinstance(held, _Shipped) else held
    if not options:
        return function
    # a class says its options in __init__, after self
    signature = inspect.signature(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    try:
        signature.bind(*[None] * (1 + isinstance(function, type)), **options)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.default is not p.empty]
        raise ValueError(f"defence {name!r}: {error}; its options are {', '.join(known) or 'none'}") from error
    return functools.partial(function, **options)


def defences() -> list[str]:
    """The names of all defences, in the order in which they were registered."""
    return list(_DEFENCES)


def summaries() -> dict[str, str]:
    """What each defence does, by name: the first line of its docstring, which may be empty; nothing is imported."""
    return {
        name: held.summary if isinstance(held, _Shipped) else (held.__doc__ or "").strip().partition("\n")[0]
        for name, held in _DEFENCES.items()
    }


@register_defence("none")
def undefended(segmenter: PyTorchSegmenter) -> PyTorchSegmenter:
    """The segmenter itself."""
    return segmenter


_DEFENCES |= {
    "ram": _Shipped(
        "ramdefense.ram",
        "RAMDefense",
        "A segmenter hardened by RAM; a segmenter itself, for every attack that takes one.",
    ),
    "multiscale": _Shipped(
        "ramdefense.baselines",
        "MultiScale",
        "A segmenter whose logits are the mean over scales of its input; differentiable from end to end.",
    ),
    "crf": _Shipped(
        "ramdefense.baselines",
        "MeanFieldCRF",
        "A segmenter whose logits go through a fully connected CRF with Gaussian edge potentials.",
    ),
}
