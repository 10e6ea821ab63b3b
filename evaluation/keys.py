"""The key of a file of rows: equal where everything that decides the rows is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: Parts of a configuration that are there only where they are not the usual: they decide the rows, too.
PRECISION = ("amp", "compile")


def cell_key(configuration: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Hash of everything that decides a cell of a run, but for what is in its frames.

    Args:
        configuration: as in the run's ``config.json``.
        cell: its model, attack, defence and so on, by name; ``seed`` is ``None`` in the first seed's cells.
    """
    seeds = configuration["seed"]
    deciding = {
        "cell": dict(cell),
        **{axis: configuration[f"{axis}s"].get(cell[axis]) for axis in ("model", "attack", "defence")},
        "classes": configuration["data"]["classes"],
        "first seed": seeds[0] if isinstance(seeds, list) else seeds,
        **{name: configuration[name] for name in ("options", "region", "versions")},
        **{name: configuration[name] for name in PRECISION if name in configuration},
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
