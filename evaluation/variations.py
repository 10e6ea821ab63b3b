"""A defence by name with some of its options changed, and one name for all spellings of the same defence."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from evaluation.given import DefenceFunction
from evaluation.store import NONE
from ramdefense.defences import defence
from ramdefense.names import split_name
from ramdefense.refinement import Refinement

#: Options of a refinement that a sweep changes, checked as RAM checks them.
_CHECKED = ("max_attention", "suppression", "dropout")


def options_of(name: str) -> dict[str, Any]:
    """The options that a named defence has, by their defaults, those in its name in their place; in one order.

    Raises:
        ValueError: no such defence, or an option that it does not have.
    """
    defence(name)
    base, given = split_name(name)
    function = defence(base)
    # a class says its options in __init__, after self
    signature = inspect.signature(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    known = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    return {**known, **given}


def varied(name: str, **changes: Any) -> tuple[str, DefenceFunction]:
    """The defence of that name with options changed: its canonical name, and the function.

    The canonical name leaves out what is at its default, so that ``"ram"`` and ``"ram:max_attention=16/N"`` have one.

    Raises:
        ValueError: no such defence, an option that it does not have, or a value that RAM would refuse.
    """
    base = split_name(name)[0]
    held = options_of(name)
    unknown = [option for option in changes if option not in held]
    if unknown:
        raise ValueError(f"defence {name!r} has no option {unknown[0]!r}; its options are {', '.join(held) or 'none'}")
    held = {option: plain(value) for option, value in (held | changes).items()}
    Refinement(**{option: held[option] for option in _CHECKED if option in held})
    usual = options_of(base)
    chosen = {option: value for option, value in held.items() if option not in usual or value != usual[option]}
    if base == NONE or not chosen:
        return base, defence(base)
    return spelled(base, chosen), functools.partial(defence(base), **chosen)


def plain(value: Any) -> Any:
    """A whole number as such, so that 0 and 0.0 are one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def spelled(base: str, options: dict[str, Any]) -> str:
    """A name with its options, as the command line takes it: ``"ram:max_attention=3/N"``."""
    return f"{base}:{','.join(f'{option}={value}' for option, value in options.items())}" if options else base


def multiple(text: object, option: str) -> float:
    """The k of ``"k/N"``.

    Raises:
        ValueError: it is no multiple of 1/N above 0; the message begins with ``option``.
    """
    number, slash, divisor = str(text).partition("/")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not isinstance(text, str) or slash != "/" or divisor.strip() != "N" or not 0 < value < float("inf"):
        raise ValueError(f"{option} {text}: a multiple of 1/N above 0, as in 3/N, N the number of keys")
    return value


def as_multiple(value: float) -> str:
    """The ``"k/N"`` of a k."""
    return f"{number(value)}/N"


def number(value: float) -> str:
    """A number as it would be typed: whole ones without a point."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def probability(value: object, option: str) -> float:
    """A probability below 1.

    Raises:
        ValueError: it is none; the message begins with ``option``.
    """
    try:
        held = float(str(value))
    except ValueError:
        held = -1.0
    if isinstance(value, bool) or not 0 <= held < 1:
        raise ValueError(f"{option} {value}: a probability from 0 to below 1, as in 0.1")
    return held
