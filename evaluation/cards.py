"""The models that ship, by their cards alone: no model is made, and no torch is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ZOO = Path(__file__).parent / "zoo"
KINDS = (
    "'zoo:NAME', 'torchvision:NAME', 'smp:ARCH:ENCODER', 'hf:NAME', 'PATH.safetensors' or 'module:function'; "
    "weights of your own go into any of them as 'NAME@PATH.safetensors'"
)


def zoo() -> dict[str, dict[str, Any]]:
    """The shipped models: name → card (recipe, classes, size, validation and test scores, parameters)."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(ZOO.glob("*.json"))}
