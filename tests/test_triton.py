"""The kernels of refined attention: against float64 in Triton's interpreter, through the compiler, and on a GPU.

The interpreter runs in one process for all cases, since Triton decides at its import what it is.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from ramdefense import counter, triton_attention
from ramdefense.refinement import SUPPRESSIONS, refined_attention

triton = pytest.importorskip("triton")

NAMES = tuple(name for name in SUPPRESSIONS if name != "temperature")
ODD = (1, 1, 33, 45, 16, 16)

CASES: dict[str, dict] = {}
for _name in NAMES:
    _own = {"suppression": _name}
    CASES |= {
        f"{_name}, 3/N, any strides": {**_own, "shape": (1, 2, 33, 45, 16, 16), "kind": "strided"},
        f"{_name}, 0.1, E 24, Ev 40": {**_own, "shape": (1, 1, 20, 45, 24, 40), "max_attention": 0.1},
        f"{_name}, one key": {**_own, "shape": (1, 1, 7, 1, 16, 16)},
        f"{_name}, one query": {**_own, "shape": (1, 1, 1, 7, 16, 16)},
        f"{_name}, 130 keys, E 64": {**_own, "shape": (1, 1, 40, 130, 64, 32), "tiles": (64, 64)},
        f"{_name}, added mask": {**_own, "shape": (1, 2, 17, 45, 16, 16), "mask": "lowest"},
        f"{_name}, mask of keys": {**_own, "shape": (1, 1, 7, 45, 16, 16), "mask": "keys", "max_attention": "2/N"},
        f"{_name}, causal": {**_own, "shape": (1, 1, 33, 33, 16, 16), "is_causal": True, "tiles": (16, 32)},
        f"{_name}, causal, RAD": {**_own, "shape": ODD, "is_causal": True, "tiles": (32, 16), "dropout": 0.3},
        f"{_name}, RAD of keys": {**_own, "shape": ODD, "dropout": 0.3, "unit": "key", "compensate": "none"},
        f"{_name}, RAD in windows": {**_own, "shape": (4, 2, 8, 9, 16, 16), "dropout": 0.5, "streams": 2},
        f"{_name}, straight through": {**_own, "shape": ODD, "straight_through": True, "dropout": 0.2, "mask": "bool"},
        f"{_name}, far apart": {**_own, "shape": ODD, "sigma": 300.0, "wide": 100},  # 300: four digits less
        f"{_name}, twins": {**_own, "shape": (1, 1, 20, 30, 16, 16), "kind": "twins"},
        f"{_name}, float16": {**_own, "shape": ODD, "dtype": "float16"},
        f"{_name}, bfloat16": {**_own, "shape": ODD, "dtype": "bfloat16", "dropout": 0.1},
        f"{_name}, bfloat16, offset": {**_own, "shape": (1, 1, 7, 45, 16, 16), "dtype": "bfloat16", "kind": "offset"},
    }
CASES |= {
    "no bound": {"shape": ODD, "max_attention": 1, "mask": "lowest", "dropout": 0.3, "straight_through": True},
    "no bound, causal": {"shape": ODD, "max_attention": 1, "is_causal": True},
    "cap, 1/N": {"suppression": "cap", "shape": ODD, "max_attention": "1/N", "mask": "bool"},
    "cap, rows of few keys": {"suppression": "cap", "shape": ODD, "max_attention": 0.2, "is_causal": True},
    # 41 of 120 keys reach T or share what it leaves, and each of Newton's steps brings one: the search by halving
    "cap, stairs": {
        "suppression": "cap",
        "shape": (1, 1, 2, 120, 16, 16),
        "max_attention": "2.9/N",
        "kind": "stairs",
        "step": 3.0,
        "rounds": 36,
        "tiles": (16, 128),
    },
}
HALF = {"float16": 1e-3, "bfloat16": 8e-3}


@cache
def answers() -> dict[str, dict]:
    program = Path(__file__).with_name("triton_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program],
        input=json.dumps(list(CASES.values())),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_against_float64(name: str) -> None:
    """Relative errors of float32's last digit but one, in half precision those of its products."""
    case, answer = CASES[name], answers()[name]
    dtype = case.get("dtype", "float32")
    assert answer["dtypes"] == [f"torch.{dtype}"] * 4
    assert max(answer["errors"]) < HALF.get(dtype, 1e-6) * case.get("wide", 1), answer["errors"]
