"""Sizes and places as they are typed."""

from __future__ import annotations


def pair(text: str, name: str) -> tuple[int, int]:
    """``"40x60"`` or ``"40"`` → ``(40, 60)`` or ``(40, 40)``.

    Raises:
        ValueError: it is neither; the message begins with ``name``.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{name} {text}: two whole numbers, as in 40x60 (rows first), or one for both")
    return int(parts[0]), int(parts[-1])


def place(text: str, name: str) -> str | tuple[int, int]:
    """``"3x20"`` → ``(3, 20)``; what begins with no digit is the name of a place, and stays."""
    return pair(text, name) if text[:1].isdigit() else text
