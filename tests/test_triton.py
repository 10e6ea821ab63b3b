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


# ------------------------------------------------------------------------------------------------- the compiler alone


def compiled(kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int], **changes: object) -> object:
    """The kernel as for a GPU of that compute capability, for the tiles of that head dimension."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ramdefense import triton_kernels

    function = getattr(triton_kernels, kernel)
    tiles = triton_attention.tiles_for(kernel, width, dtype, capability)
    half = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    fixed: dict = dict.fromkeys(("stride_qe", "stride_ke", "stride_ve", "stride_ge"), 1)
    fixed |= {"E": width, "EV": width, "E2": width, "EV2": width, "BOUND": 1, "MASK": 0, "CAUSAL": False, "RAD": 1}
    fixed |= {"MULTIPLE": True, "PLAIN": False, "STRAIGHT": False, "PRECISION": "ieee" if half != "fp32" else "tf32x3"}
    fixed |= {"BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, **changes}
    kinds = {"SEEDS": "*i64", "STATS": "*fp32", "SHARE": "*fp32", "MASK_": "*u8" if fixed["MASK"] == 1 else f"*{half}"}
    kinds |= dict.fromkeys(("Q", "K", "V", "OUT", "GRAD", "DQ", "DK", "DV"), f"*{half}")
    kinds |= dict.fromkeys(("scale", "factor", "value", "natural"), "fp32")
    names = function.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    even = [name for name in names if signature[name][0] == "*" or (name.startswith("stride") and name not in fixed)]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: fixed[name] for name in names if name in fixed},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)


KERNELS = ("forward", "backward_q", "backward_kv")
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10}  # bytes that one program can have


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_a_gpu(
    kernel: str, capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(kernel, 64, torch.bfloat16, capability)
    assert made.metadata.shared <= SHARED[capability]
    assert ("wgmma" in made.asm["ptx"]) == (capability == (9, 0))  # Hopper's own matrix instructions
    assert made.asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"BOUND": 0, "MASK": 1, "RAD": 2, "PLAIN": True, "STRAIGHT": True, "MULTIPLE": False},
        {"BOUND": 2, "MASK": 2, "RAD": 0},
        {"BOUND": 3, "CAUSAL": True, "queries": 1, "keys": 1, "heads": 1, "dropped": 1, "size": 1, "per_stream": 1},
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_branch_compiles(
    kernel: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with numbers that are 1: Triton compiles these in, as it does on a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiled(kernel, 32, torch.float16, (8, 0), **changes).asm["cubin"]


def test_tiles_fit_every_card() -> None:
    """The matrix unit's least tile is 16, that of Hopper 64 rows for a group of four warps."""
    for capability in SHARED:
        for dtype in triton_attention.DTYPES:
            for kernel in KERNELS:
                for width in (1, 32, 33, 64, 65, 128):
                    tiles = triton_attention.tiles_for(kernel, width, dtype, capability)
                    assert min(tiles.queries, tiles.keys) >= 16
                    assert tiles.warps in (4, 8)
