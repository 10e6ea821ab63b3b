"""What the checks of a run found (``evaluation.checks``), and which of its numbers they call into question."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.files import DamagedError, read_lines


@dataclass(frozen=True)
class Verdict:
    """One check of one attack on one model under one defence.

    Args:
        check: Its name, as ``zero gradients``.
        model: The model.
        defence: The defence.
        attack: The attack; None: the check is about the defended model, and so about every attack on it.
        passed: Whether what must hold does; None: the check does not apply here, or could not be tried.
        detail: One sentence with the figures that it rests on, or why it could not be tried.
    """

    check: str
    model: str
    defence: str
    attack: str | None
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        named = (self.model, *([self.attack] if self.attack is not None else []), self.defence)
        return f"{' · '.join(named)}: {self.check}: {self.detail}"

    def concerns(self, model: str, attack: str, defence: str) -> bool:
        """Whether it is about this cell of the table."""
        return (self.model, self.defence) == (model, defence) and self.attack in (None, attack)


def failed(verdicts: Iterable[Verdict], model: str, attack: str, defence: str) -> list[Verdict]:
    """The failed checks of a cell of the table; one is enough to call its numbers unreliable."""
    return [v for v in verdicts if v.passed is False and v.concerns(model, attack, defence)]


def verdict_lines(verdicts: Iterable[Verdict]) -> list[str]:
    """One line of JSON each."""
    return [json.dumps(vars(verdict)) for verdict in verdicts]


def read_verdicts(path: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Header and verdicts of a file of a run.

    Raises:
        DamagedError: it is not, byte for byte, what was written; the message names it.
    """
    header, lines = read_lines(path)
    try:
        if not {"cell", "key", "basis"} <= header.keys():
            raise ValueError("no header of verdicts")
        return header, [Verdict(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise DamagedError(path, f"no verdicts: {error}") from error
