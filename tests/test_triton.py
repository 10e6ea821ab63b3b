"""The kernels of refined attention: against float64 in Triton's interpreter, through the compiler, and on a GPU.

The interpreter runs in one process for all cases, since Triton decides at its import what it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ramdefense import counter, triton_attention
from ramdefense.attention import refined_attention
from ramdefense.refinement import SUPPRESSIONS

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


# ------------------------------------------------------------------------------------------------- what is taken


def fake(*shape: int, dtype: torch.dtype = torch.float16, **changes: object) -> SimpleNamespace:
    """What `supports` asks a tensor on a GPU."""
    own = {"shape": torch.Size(shape), "ndim": len(shape), "dtype": dtype, "is_cuda": True, "device": "cuda:0"}
    return SimpleNamespace(**{**own, "requires_grad": False, **changes})


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"attn_mask": fake(9, dtype=torch.bool)}, True),
        ({"dropout": 0.5}, True),
        ({"compensate": "renormalise"}, True),  # without RAD there is nothing to compensate
        ({"compensate": "renormalise", "dropout": 0.5}, False),
        ({"suppression": "temperature"}, False),
        ({"q": fake(2, 3, 7, 16, is_cuda=False)}, False),
        ({"q": fake(2, 3, 7, 16, dtype=torch.bfloat16)}, False),
        ({"q": fake(2, 6, 7, 16)}, False),  # grouped heads
        ({"q": fake(2, 3, 0, 16)}, False),
        ({"q": fake(2, 3, 7, 160), "k": fake(2, 3, 9, 160)}, False),
        ({"attn_mask": fake(7, 9, requires_grad=True)}, False),
        ({"attn_mask": fake(7, 9, dtype=torch.int64)}, False),
        ({"attn_mask": fake(7, 9, device="cpu")}, False),
    ],
)
def test_supports(changes: dict, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_usable", lambda device: True)
    tensors = {"q": fake(2, 3, 7, 16), "k": fake(2, 3, 9, 16), "v": fake(2, 3, 9, 24), "attn_mask": None}
    options = {"suppression": "cap", "dropout": 0.0, "compensate": "rescale"}
    assert triton_attention.supports(**{**tensors, **options, **changes}) is taken


def options_of(**changes: object) -> dict:
    own = {"scale": 0.2, "is_causal": False, "max_attention": 3.0, "multiple": True, "suppression": "cap"}
    own |= {"dropout": 0.1, "unit": "element", "compensate": "rescale", "seeds": None, "straight_through": False}
    return {**own, **changes}


@pytest.mark.parametrize("seeds", [None, torch.arange(2)])
def test_seeds_that_do_not_fit_are_named(seeds: torch.Tensor | None) -> None:
    q = torch.zeros(3, 1, 4, 16)
    with pytest.raises(ValueError, match="for a batch of 3: give int64 seeds whose number divides it"):
        triton_attention.forward(q, q, q, None, **options_of(seeds=seeds))


# --------------------------------------------------------------------------------------------------------- on a GPU


def on_gpu(size: int, dtype: torch.dtype, suppression: str, **changes: object) -> tuple[list, list]:
    """Output and gradients of the kernels, and the same rows of the output and of dQ in float64."""
    generator = torch.Generator("cuda").manual_seed(size)
    q, k, v, grad = (torch.randn(1, 2, size, 64, device="cuda", generator=generator).to(dtype) for _ in range(4))
    q *= 2
    seeds = torch.tensor([123456789], device="cuda")
    given = options_of(scale=0.125, suppression=suppression, seeds=seeds, **changes)
    out, stats = triton_attention.forward(q, k, v, None, **given)
    found = [out, *triton_attention.backward(grad, q, k, v, None, out, stats, **given)]
    again = triton_attention.backward(grad, q, k, v, None, out, stats, **given)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True)), "sums in another order"

    rows = torch.arange(size, device="cuda") if size <= 2048 else torch.randperm(size, device="cuda")[:64]
    keep = counter.keep(seeds, 2 * size, size, counter.levels_dropped(given["dropout"])).view(1, 2, size, size)
    exact = [t.double().requires_grad_() for t in (q[:, :, rows], k, v)]
    own = {name: given[name] for name in ("suppression", "dropout", "unit", "compensate", "straight_through", "scale")}
    expected = refined_attention(*exact, **own, max_attention="3/N", keep=keep[:, :, rows])
    expected.backward(grad[:, :, rows].double())
    if size > 2048:
        return [out[:, :, rows], found[1][:, :, rows]], [expected.detach(), exact[0].grad]
    return found, [expected.detach(), *(t.grad for t in exact)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", triton_attention.DTYPES)
@pytest.mark.parametrize("suppression", NAMES)
@pytest.mark.parametrize("size", [1, 77, 1024, 16384])
def test_on_a_gpu_against_float64(size: int, suppression: str, dtype: torch.dtype) -> None:
    wide = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    for straight_through in (False, True):
        for ours, expected in zip(*on_gpu(size, dtype, suppression, straight_through=straight_through), strict=True):
            assert (ours.double() - expected).norm() <= wide * expected.norm().clamp(min=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_of_a_gpu_are_those_of_the_definition() -> None:
    seeds = torch.tensor([1, 2**62 + 12345])
    assert torch.equal(counter.keep(seeds.cuda(), 70, 300, 6554).cpu(), counter.keep(seeds, 70, 300, 6554))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("suppression", NAMES)
def test_memory_is_linear(suppression: str) -> None:
    """At 16384 tokens: a matrix of one byte an element would be 512 MiB, the tensors of this call are 8 MiB."""
    q = torch.randn(1, 2, 16384, 64, device="cuda", dtype=torch.float16)
    given = options_of(suppression=suppression, seeds=torch.tensor([3], device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, stats = triton_attention.forward(q, q, q, None, **given)
    triton_attention.backward(out, q, q, q, None, out, stats, **given)
    assert torch.cuda.max_memory_allocated() - before < 24 << 20
