"""Refined attention without its matrix as an operator of PyTorch, `torch.ops.ramdefense.refined_attention`.

Seen from outside it is one function with a gradient, so `torch.compile` and autocast leave it whole. `fused_attention`
brings any shape that attends into its four dimensions; what has to go through autograd tile after tile
(`rows.Call.closed`) is an autograd function instead.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ramdefense import tiles, triton_attention
from ramdefense.refinement import Refinement
from ramdefense.rows import Call
from ramdefense.streams import Keep


def unfused_because(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    refinement: Refinement,
    keep: Tensor | Keep | None,
) -> str | None:
    """Why a call needs the matrix; None where it does not."""
    if dropout_p > 0:
        return f"dropout_p={dropout_p} drops from torch's own generator"
    if isinstance(keep, Tensor):
        return "keep is a whole mask (streams.keep_of makes one part after part)"
    if attn_mask is not None and attn_mask.requires_grad:
        return "attn_mask wants a gradient, of the size of the matrix"
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if refinement.unit == "key" and q.dim() < 3:
        return "unit='key' needs a dimension for the heads"
    if q.device.type == "cpu":
        return None
    options = {name: getattr(refinement, name) for name in ("suppression", "dropout", "compensate")}
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (_four(tensor, lead) for tensor in (q, k, v))
    if q.is_cuda and triton_attention.supports(q, k, v, attn_mask, **options):
        return None
    return f"{q.device.type} has no kernel for {q.dtype} with {options}"


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    refinement: Refinement,
    keep: Keep | None,
    straight_through: bool,
) -> Tensor:
    """Refined attention of a call for which `unfused_because` has no reason; the shapes are those of the door."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    if attn_mask is not None:
        attn_mask = _four(attn_mask if attn_mask.dim() > 1 else attn_mask[None], lead)
    q, k, v = (_four(tensor, lead) for tensor in (q, k, v))
    shape = (*q.shape[:3], k.shape[2])
    call = Call(shape, attn_mask, is_causal, refinement, _flat(keep, shape), straight_through)
    if q.device.type == "cpu" and not call.closed:
        return _Tiled.apply(q, k, v, call, scale).view(*lead, *q.shape[-2:-1], v.shape[-1])
    out, _ = torch.ops.ramdefense.refined_attention(
        q,
        k,
        v,
        attn_mask,
        None if keep is None else torch.tensor(keep.seeds),
        is_causal,
        scale,
        _written(refinement.max_attention),
        refinement.suppression,
        refinement.dropout,
        refinement.unit,
        refinement.compensate,
        straight_through,
    )
    return out.view(*lead, *out.shape[-2:])


def _four(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(…, rows, columns) as (B, H, rows, columns); a view where there are no more than two leading dimensions."""
    rows, columns = tensor.shape[-2:]
    heads = lead[-1] if len(lead) > 1 else 1
    return tensor.expand(*lead, rows, columns).reshape(math.prod(lead) // heads, heads, rows, columns)


def _flat(keep: Keep | None, shape: tuple[int, int, int, int]) -> Keep | None:
    """The same mask for a matrix in four dimensions; the first and second are one to it."""
    batch, heads, queries, keys = shape
    return None if keep is None else replace(keep, shape=(batch * heads, queries, keys))


class _Tiled(torch.autograd.Function):
    """Tiles that go through autograd one after the other, which an operator cannot."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor:
        out, numbers = tiles.attend(q, k, v, call, scale)
        ctx.save_for_backward(q, k, v, numbers)
        ctx.call, ctx.scale = call, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, numbers = ctx.saved_tensors
        return (*tiles.pull_back(grad, q, k, v, numbers, ctx.call, ctx.scale), None, None)


def _written(max_attention: float | str) -> str:
    return max_attention if isinstance(max_attention, str) else repr(float(max_attention))


# ------------------------------------------------------------------------------------------------------ the operators

# written out: torch.library.custom_op would infer it, and import the compiler at the first call, which takes seconds
_OPTIONS = (
    "bool is_causal, float scale, str max_attention, str suppression, float dropout, str unit, str compensate, "
    "bool straight_through"
)
_LIBRARY = torch.library.Library("ramdefense", "DEF")
_LIBRARY.define(
    "refined_attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? seeds, "
    f"{_OPTIONS}) -> (Tensor out, Tensor numbers)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "refined_attention_backward(Tensor grad, Tensor out, Tensor numbers, Tensor q, Tensor k, Tensor v, "
    f"Tensor? attn_mask, Tensor? seeds, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ramdefense::refined_attention", "CPU", lib=_LIBRARY)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor | None,
    is_causal: bool,
    scale: float,
    max_attention: str,
    suppression: str,
    dropout: float,
    unit: str,
    compensate: str,
    straight_through: bool,
) -> tuple[Tensor, Tensor]:
    """Refined attention of (B, H, M, E), (B, H, N, E) and (B, H, N, Ev), and what its gradient needs of each row.

    ``seeds``: (streams,) int64 on the CPU, of RAD's streams; the rest as in `attention.refined_attention`.
    """
    refinement = _refinement(max_attention, suppression, dropout, unit, compensate)
    call = _call(q, k, attn_mask, seeds, is_causal, refinement, straight_through)
    return tiles.attend(q, k, v, call, scale)


@torch.library.impl("ramdefense::refined_attention_backward", "CPU", lib=_LIBRARY)
def _pull_back(
    grad: Tensor,
    out: Tensor,
    numbers: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor | None,
    is_causal: bool,
    scale: float,
    max_attention: str,
    suppression: str,
    dropout: float,
    unit: str,
    compensate: str,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at q, k and v from that at the result of the operator."""
    refinement = _refinement(max_attention, suppression, dropout, unit, compensate)
    call = _call(q, k, attn_mask, seeds, is_causal, refinement, straight_through)
    return tiles.pull_back(grad, q, k, v, numbers, call, scale)


def _refinement(max_attention: str, suppression: str, dropout: float, unit: str, compensate: str) -> Refinement:
    return Refinement(
        max_attention if "/" in max_attention else float(max_attention), suppression, dropout, unit, compensate
    )


def _call(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor | None,
    is_causal: bool,
    refinement: Refinement,
    straight_through: bool,
) -> Call:
    shape = (*q.shape[:3], k.shape[2])
    keep = None if seeds is None else Keep(shape, refinement.dropout, tuple(seeds.tolist()), refinement.unit)
    return Call(shape, attn_mask, is_causal, refinement, _flat(keep, shape), straight_through)


@torch.library.impl("ramdefense::refined_attention", "CUDA", lib=_LIBRARY)
def _attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, seeds: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return triton_attention.forward(q, k, v, attn_mask, **_named(seeds, q.device, *options))


@torch.library.impl("ramdefense::refined_attention_backward", "CUDA", lib=_LIBRARY)
def _pull_back_on_cuda(
    grad: Tensor,
    out: Tensor,
    numbers: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_attention.backward(grad, q, k, v, attn_mask, out, numbers, **_named(seeds, q.device, *options))


def _named(
    seeds: Tensor | None,
    device: torch.device,
    is_causal: bool,
    scale: float,
    max_attention: str,
    suppression: str,
    dropout: float,
    unit: str,
    compensate: str,
    straight_through: bool,
) -> dict[str, Any]:
    value, _, multiple = max_attention.partition("/")
    return {
        "scale": scale,
        "is_causal": is_causal,
        "max_attention": float(value),
        "multiple": bool(multiple),
        "suppression": suppression,
        "dropout": dropout,
        "unit": unit,
        "compensate": compensate,
        "seeds": None if seeds is None else seeds.to(device, non_blocking=True),
        "straight_through": straight_through,
    }


@torch.library.register_fake("ramdefense::refined_attention", lib=_LIBRARY)
def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if q.is_cuda:
        return out, q.new_empty((triton_attention.NUMBERS, *q.shape[:-1]), dtype=torch.float32)
    return out, q.new_empty((*q.shape[:-1], 2), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("ramdefense::refined_attention_backward", lib=_LIBRARY)
def _pull_back_shapes(
    grad: Tensor, out: Tensor, numbers: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, seeds, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, attn_mask, seeds)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.ramdefense.refined_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, *(None for _ in ctx.options))


def _no_more(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("the fused kernel has no second derivative; call refined_attention with kernel='plain'")


torch.library.register_autograd("ramdefense::refined_attention", _gradients, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("ramdefense::refined_attention_backward", _no_more, lib=_LIBRARY)
