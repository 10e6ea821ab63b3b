"""Names that carry options, as attacks and defences have them on the command line: ``"ram:max_attention=3/N"``."""

from __future__ import annotations

import ast
import re
from typing import Any

_OUTSIDE_BRACKETS = re.compile(r",(?![^(\[]*[)\]])")  # a comma that separates options, not the numbers of a pair


_RATIO = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*")


def ratio(value: Any) -> Any:
    """The number that a text such as ``8/255`` stands for; anything else as it is."""
    found = _RATIO.fullmatch(value) if isinstance(value, str) else None
    return float(found[1]) / float(found[2]) if found and float(found[2]) else value


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """A name that may carry options, ``"NAME:KEY=VALUE,KEY=VALUE"``, as the bare name and the options.

    A value is a Python literal, a ratio of two numbers such as ``8/255``, or else the text as it stands, as ``3/N``.

    Raises:
        ValueError: an option that is not KEY=VALUE.
    """
    base, colon, text = str(name).partition(":")
    options: dict[str, Any] = {}
    for part in _OUTSIDE_BRACKETS.split(text) if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"{name!r}: {part!r} is no option; write NAME:KEY=VALUE,KEY=VALUE")
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):  # a word, or "3/N"
            options[key.strip()] = ratio(value.strip())
    return base, options
