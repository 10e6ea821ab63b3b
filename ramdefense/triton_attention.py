"""Refined attention on CUDA without its matrix: which calls the kernels take, and their launch.

The mathematics is in `triton_kernels`. Memory is O(N): beside the output 16 bytes for each query (24 with
straight_through), and 4 more in the backward pass, whose sums have a fixed order: equal inputs give equal bytes.

They have never run on a GPU: none was at hand. They were checked in Triton's interpreter, and compiled for the compute
capabilities 8.0 and 9.0; the tile sizes follow the compiler's report of registers and shared memory, not timing. Where
there is a GPU, ``pytest tests/test_triton.py`` checks them and ``benchmarks/cuda_attention.py`` measures them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramdefense.counter import levels_dropped

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 128  # E and Ev beyond it need more registers than there are

_LOG2E = math.log2(math.e)
_BOUNDS = {"clamp": 0, "cap": 1, "scale": 2}
_FREE = 3


NUMBERS = 6  # that a row may have for the backward pass


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, warps of a program, and the loads that are under way at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    *,
    suppression: str,
    dropout: float,
    compensate: str,
) -> bool:
    """Whether `forward` and `backward` take the call; its shapes are those that scaled_dot_product_attention takes.

    They do on an NVIDIA GPU of compute capability 8.0 or more where Triton is installed, for float32, float16 and
    bfloat16, E and Ev up to 128, a mask without gradient, ``"clamp"``, ``"cap"`` and ``"scale"``, and RAD with
    ``"none"`` or ``"rescale"``.
    """
    return (
        all(tensor.is_cuda and tensor.ndim == 4 and tensor.dtype == q.dtype for tensor in (q, k, v))
        and q.dtype in DTYPES
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and 0 < q.shape[-1] <= WIDEST
        and 0 < v.shape[-1] <= WIDEST
        and min(q.shape[0] * q.shape[1], q.shape[2], k.shape[2]) > 0
        and suppression in _BOUNDS
        and (dropout == 0 or compensate != "renormalise")
        and (attn_mask is None or (attn_mask.device == q.device and not attn_mask.requires_grad))
        and (attn_mask is None or attn_mask.dtype in (torch.bool, *DTYPES))
        and _usable(q.device)
    )


@functools.cache
def _usable(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    max_attention: float,
    multiple: bool,
    suppression: str,
    dropout: float,
    unit: str,
    compensate: str,
    seeds: Tensor | None,
    straight_through: bool,
) -> tuple[Tensor, Tensor]:
    """Refined attention of a call that `supports` accepts.

    Args:
        q: (B, H, M, E) float32, float16 or bfloat16, of any strides. Sums are in float32.
        k: (B, H, N, E) of the same dtype.
        v: (B, H, N, Ev) of the same dtype.
        attn_mask: broadcasts to (B, H, M, N), bool (True takes part) or floating point (added); read by its strides.
        scale: of the scores.
        is_causal: query i sees keys 0…i.
        max_attention: T, or x where ``multiple``.
        multiple: whether T is x / N, N the keys of a row that are not masked.
        suppression: ``"clamp"``, ``"cap"`` or ``"scale"``.
        dropout: p of RAD; 0 means none.
        unit: ``"element"`` or ``"key"``.
        compensate: ``"none"`` or ``"rescale"``.
        seeds: (I,) int64 on q's device where ``dropout`` is above 0; I divides B, and batch entry b is of stream
            b // (B / I). Row r of a stream in `counter.keep` is query r % M of its matrix r // M, and the matrix itself
            for ``unit="key"``.
        straight_through: whether `backward` will be that of the softmax without bound.

    Returns:
        The output (B, H, M, Ev) of q's dtype, contiguous, and what `backward` needs of each row, float32
        (NUMBERS, B, H, M), not all of them used.

    Raises:
        ValueError: ``seeds`` missing, or of a number that does not divide B.
    """
    from ramdefense import triton_kernels

    q, k, v = (_within_reach(tensor) for tensor in (q, k, v))
    call = _Call(
        q, k, v, attn_mask, scale, is_causal, max_attention, multiple, suppression, dropout, unit, compensate, seeds
    )
    straight_through = straight_through and call.bound != _FREE
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, heads, queries, v.shape[-1]))
    stats = torch.empty((NUMBERS, batch, heads, queries), dtype=torch.float32, device=q.device)
    tiles = tiles_for("forward", call.width, q.dtype, _capability(q))
    with _on(q):
        triton_kernels.forward[(-(-queries // tiles.queries) * batch * heads,)](
            *call.tensors,
            out,
            stats,
            *call.strides,
            *call.numbers,
            value=call.value,
            **call.constants,
            MULTIPLE=call.multiple,
            PLAIN=straight_through,
            **_launch(tiles),
        )
    return out, stats


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    stats: Tensor,
    *,
    scale: float,
    is_causal: bool,
    max_attention: float,
    multiple: bool,
    suppression: str,
    dropout: float,
    unit: str,
    compensate: str,
    seeds: Tensor | None,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous and of their dtype, of a call of `forward` with the same options.

    Args:
        grad_out: (B, H, M, Ev) of q's dtype, of any strides.
        out, stats: what `forward` returned.
    """
    from ramdefense import triton_kernels

    grad_out, q, k, v = (_within_reach(tensor) for tensor in (grad_out, q, k, v))
    call = _Call(
        q, k, v, attn_mask, scale, is_causal, max_attention, multiple, suppression, dropout, unit, compensate, seeds
    )
    straight_through = straight_through and call.bound != _FREE
    batch, heads, queries, _ = q.shape
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    share = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    numbers = (*call.strides, *grad_out.stride(), *call.numbers)
    constants = {**call.constants, "natural": scale, "STRAIGHT": straight_through}
    of_q, of_kv = (tiles_for(kind, call.width, q.dtype, _capability(q)) for kind in ("backward_q", "backward_kv"))
    with _on(q):
        triton_kernels.backward_q[(-(-queries // of_q.queries) * batch * heads,)](
            *call.tensors, out, stats, grad_out, dq, share, *numbers, **constants, **_launch(of_q)
        )
        triton_kernels.backward_kv[(-(-k.shape[2] // of_kv.keys) * batch * heads,)](
            *call.tensors, stats, grad_out, share, dk, dv, *numbers, **constants, **_launch(of_kv)
        )
    return dq, dk, dv


class _Call:
    """The arguments that the kernels share, in their order."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        is_causal: bool,
        max_attention: float,
        multiple: bool,
        suppression: str,
        dropout: float,
        unit: str,
        compensate: str,
        seeds: Tensor | None,
    ) -> None:
        batch, heads, queries, width = q.shape
        keys = k.shape[2]
        if dropout > 0 and (seeds is None or not len(seeds) or batch % len(seeds)):
            given = "none" if seeds is None else str(len(seeds))
            raise ValueError(f"{given} seeds for a batch of {batch}: give int64 seeds whose number divides it")
        free = max_attention >= (keys if multiple else 1)
        self.bound = _FREE if free else _BOUNDS[suppression]
        self.value, self.multiple = float(max_attention), multiple and not free
        self.width = max(width, v.shape[-1])
        if attn_mask is None:
            kind, mask = 0, q
        else:
            kind = 1 if attn_mask.dtype == torch.bool else 2
            mask = attn_mask.expand(batch, heads, queries, keys)
            mask = mask.view(torch.uint8) if kind == 1 else mask
        self.tensors = (q, k, v, mask, q if seeds is None else seeds)
        self.strides = (*q.stride(), *k.stride(), *v.stride(), *(mask.stride() if kind else (0, 0, 0, 0)))
        streams = 1 if seeds is None else len(seeds)
        rescale = dropout > 0 and compensate == "rescale"
        self.numbers = (
            heads,
            queries,
            keys,
            batch // streams,
            batch * heads * queries,
            scale * _LOG2E,
            levels_dropped(dropout),
            1 / (1 - dropout) if rescale else 1.0,
        )
        self.constants: dict[str, Any] = {
            "E": width,
            "EV": v.shape[-1],
            "E2": _padded(width),
            "EV2": _padded(v.shape[-1]),
            "BOUND": self.bound,
            "MASK": kind,
            "CAUSAL": is_causal,
            "RAD": 0 if dropout == 0 else 1 if unit == "element" else 2,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        }


def _within_reach(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where 32 bits do not count the elements from a matrix's first row to its last."""
    return tensor if tensor.shape[2] * tensor.stride(2) < 2**31 else tensor.contiguous()


def _padded(width: int) -> int:
    """The next power of two from 16, the least that the matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


def _on(q: Tensor) -> Any:
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()  # Triton's interpreter


def _capability(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)


def _launch(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # as Triton does by itself before 3.10
    }


def tiles_for(kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """The tiles of a kernel (``"forward"``, ``"backward_q"`` or ``"backward_kv"``), by the larger of E and Ev."""
    hopper = (9, 0) <= capability < (12, 0)  # those after it have the shared memory of the cards before it
    table = _TILES[hopper, dtype == torch.float32][kernel]
    return table[0 if width <= 32 else 1 if width <= 64 else 2]


# For E up to 32, 64 and 128: as large as the compiler takes them without moving registers to memory, or nearly.
_TILES: dict[tuple[bool, bool], dict[str, tuple[Tiles, Tiles, Tiles]]] = {
    (True, False): {
        "forward": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
        "backward_q": (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3)),
        "backward_kv": (Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3), Tiles(32, 64, 8, 2)),
    },
    (False, False): {
        "forward": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
        "backward_q": (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)),
        "backward_kv": (Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3), Tiles(32, 64, 8, 2)),
    },
    (True, True): {
        "forward": (Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)),
        "backward_q": (Tiles(64, 32, 8, 2), Tiles(64, 16, 4, 2), Tiles(16, 16, 4, 1)),
        "backward_kv": (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 2)),
    },
    (False, True): {
        "forward": (Tiles(128, 32, 8, 2), Tiles(64, 16, 4, 2), Tiles(32, 16, 4, 2)),
        "backward_q": (Tiles(32, 16, 4, 2), Tiles(32, 32, 8, 2), Tiles(16, 16, 4, 1)),
        "backward_kv": (Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 2)),
    },
}
