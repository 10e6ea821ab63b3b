"""Runs the kernels in Triton's interpreter, in a process of its own: the switch must be set before Triton is imported.

Reads a list of cases (JSON) from standard input and writes for each the relative errors of the output and of the three
gradients against `refined_attention` in float64, or what the case asks for.
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ramdefense import counter, triton_attention, triton_kernels
from ramdefense.attention import refined_attention
from ramdefense.triton_attention import Tiles

INF = math.inf
OPTIONS = {"suppression": "clamp", "dropout": 0.0, "unit": "element", "compensate": "rescale"}


def masks(name: str | None, queries: int, keys: int) -> Tensor | None:
    """Masks with a row that is masked whole and one with one key; "lowest" has a row of equal, finite, huge numbers."""
    if name is None:
        return None
    chance = torch.rand(1, 1, queries, keys, generator=torch.Generator().manual_seed(7))
    taken = chance > 0.3
    taken[:, :, queries // 2] = False
    taken[:, :, queries // 3] = False
    taken[:, :, queries // 3, keys // 2] = True
    if name == "bool":
        return taken
    if name == "keys":  # (keys,), read with strides of 0
        return taken[0, 0, 0]
    added = torch.randn(taken.shape, generator=torch.Generator().manual_seed(8)).masked_fill(~taken, -INF)
    if name == "lowest":
        added[:, :, queries // 4] = torch.finfo(torch.float32).min
    return added


def inputs(case: dict) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    batch, heads, queries, keys, width, values = case["shape"]
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    shapes = ((queries, width), (keys, width), (keys, values), (queries, values))
    q, k, v, grad = (torch.randn(batch, heads, *shape, generator=generator) for shape in shapes)
    q *= case.get("sigma", 1.5)
    if case.get("kind") == "stairs":  # scores −d, −2d, … : Newton brings a key a step
        q.zero_()
        k.zero_()
        q[..., 0], k[..., 0] = 1.0, -case["step"] * torch.arange(keys, dtype=torch.float32)
    if case.get("kind") == "twins":  # every key twice: ties
        k[..., keys // 2 :, :] = k[..., : keys - keys // 2, :]
    if case.get("kind") == "offset":  # what a bf16 product of dO·V has to lose
        v += 20.0
    if case.get("kind") == "strided":
        q, grad = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, grad))
        v = v.transpose(2, 3).contiguous().transpose(2, 3)
    return [t.to(getattr(torch, case.get("dtype", "float32"))) for t in (q, k, v, grad)]


def run(case: dict) -> dict:
    q, k, v, grad = inputs(case)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    mask = masks(case.get("mask"), queries, keys)
    own = {name: case.get(name, default) for name, default in OPTIONS.items()}
    limit, straight = case.get("max_attention", "3/N"), case.get("straight_through", False)
    causal, scale = case.get("is_causal", False), 1.0 if case.get("kind") == "stairs" else 1 / math.sqrt(width)
    streams = case.get("streams", batch)
    seeds = torch.arange(1, streams + 1) * 1234567890123456789 % 2**63 if own["dropout"] else None
    given = {
        **own,
        "scale": scale,
        "is_causal": causal,
        "max_attention": float(limit.split("/")[0]) if isinstance(limit, str) else limit,
        "multiple": isinstance(limit, str),
        "seeds": seeds,
        "straight_through": straight,
    }
    out, stats = triton_attention.forward(q, k, v, mask, **given)
    grads = triton_attention.backward(grad, q, k, v, mask, out, stats, **given)

    keep = None
    if seeds is not None:
        matrices = batch // streams * heads
        rows = matrices * queries if own["unit"] == "element" else matrices
        keep = counter.keep(seeds, rows, keys, counter.levels_dropped(own["dropout"])).view(batch, heads, -1, keys)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    added = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    own["max_attention"] = limit if limit != 1 else "1e9/N"  # not torch's function, whose gradient "lowest" breaks
    expected = refined_attention(
        *exact, attn_mask=added, is_causal=causal, scale=scale, **own, keep=keep, straight_through=straight
    )
    expected.backward(grad.double())
    pairs = zip((out, *grads), (expected.detach(), *(t.grad for t in exact)), strict=True)
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1)) for a, b in pairs]
    return {"errors": errors, "dtypes": [str(t.dtype) for t in (out, *grads)]}


def multiply_bfloat16() -> None:
    """The interpreter of Triton 3.9 keeps bfloat16 as uint16, and multiplies matrices of these as integers."""
    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: object, a: object, b: object, *more: object) -> object:
        factors = (wide(handle) if handle.dtype.scalar == tl.bfloat16 else handle for handle in (a, b))
        return product(self, *factors, *more)

    def wide(handle: object) -> object:
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot


if __name__ == "__main__":
    multiply_bfloat16()
    torch.set_num_threads(1)
    answers = []
    for case in json.load(sys.stdin):
        tiles = Tiles(*case.get("tiles", (32, 32)), 4, 1)
        triton_attention.tiles_for = lambda *_, tiles=tiles: tiles
        triton_kernels.ROUNDS = tl.constexpr(case.get("rounds", 96))
        answers.append(run(case))
    json.dump(answers, sys.stdout)
