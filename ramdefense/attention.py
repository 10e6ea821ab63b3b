"""`scaled_dot_product_attention` with refined weights: the one door, and the ways behind it.

*Plain* writes the matrix (…, queries, keys) and refines it as `refinement` says: any options, any device, any
derivative. *Fused* never has the matrix: O(queries + keys) memory, forwards and backwards, and RAD's mask is made where
it is needed and never kept; on a CPU tile after tile (`tiles`), on an NVIDIA GPU in one kernel for each pass
(`triton_attention`). Both give the same result to rounding, and the same masks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ramdefense.operators import fused_attention, unfused_because
from ramdefense.refinement import Refinement, refine
from ramdefense.rows import COMPILED
from ramdefense.streams import Keep

Kernel = Literal["auto", "plain", "fused"]
KERNELS: tuple[Kernel, ...] = ("auto", "plain", "fused")

_LARGE = 1 << 20  # elements of one matrix, from which on memory counts for more than the time of uncompiled tiles


def refined_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    max_attention: float | str = 1.0,
    suppression: str = "clamp",
    dropout: float = 0.0,
    unit: str = "element",
    compensate: str = "rescale",
    keep: Tensor | Keep | None = None,
    straight_through: bool = False,
    kernel: Kernel = "auto",
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with refined weights, and with all its other semantics.

    At T = 1 and p = 0 it is that function itself.

    Args:
        q: (…, heads, queries, E).
        k: (…, heads, keys, E); with ``enable_gqa`` its heads divide those of ``q``.
        v: (…, heads, keys, Ev).
        attn_mask: broadcasts to (…, queries, keys); bool (True takes part) or floating point (added to the scores).
        dropout_p: the function's own dropout, from torch's default generator, after RAD.
        is_causal: query i sees keys 0…i (counted from the top left, also where queries and keys differ in number).
        scale: of the scores, 1/√E where it is None.
        enable_gqa: each head of ``k`` and ``v`` serves a group of heads of ``q``.
        max_attention, suppression, dropout, unit, compensate, straight_through: see `refine`.
        keep: RAD's mask, see `refine`, or `streams.keep_of` of the attention matrix, which the fused way never draws as
            a whole.
        kernel: ``"plain"``; ``"fused"``, without second derivatives; or ``"auto"``: fused where the call allows it and
            it is the faster (on a CPU in float32 or half where the package was installed with a compiler, and on a
            GPU), or where the matrix of a head has a million elements or more; else plain.

    Returns:
        (…, heads, queries, Ev) of the dtype of ``q``. A query that may see no key gets 0.

    Raises:
        TypeError, ValueError: as `refine`; ``attn_mask`` and ``is_causal`` together; heads that do not fit;
            ``kernel="fused"`` for a call that it cannot take.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask is given with is_causal=True: put the causal mask into attn_mask, or leave one out")
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown: choose one of {', '.join(map(repr, KERNELS))}")
    refinement = Refinement(max_attention, suppression, dropout, unit, compensate)
    if keep is None and refinement.neutral:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if dropout > 0 and keep is None:
        raise ValueError(f"dropout={dropout!r} without keep: give the mask, for instance from sample_keep")
    if enable_gqa:
        if q.shape[-3] % k.shape[-3] or k.shape[-3] != v.shape[-3]:
            raise ValueError(
                f"enable_gqa with {q.shape[-3]}, {k.shape[-3]} and {v.shape[-3]} heads of q, k and v: "
                "k and v need the same number of heads, a divisor of that of q"
            )
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    fast = q.is_cuda or (COMPILED and q.dtype != torch.float64)
    if kernel == "fused" or (kernel == "auto" and (fast or q.shape[-2] * k.shape[-2] >= _LARGE)):
        reason = unfused_because(q, k, v, attn_mask, dropout_p, refinement, keep)
        if reason is None:
            assert keep is None or isinstance(keep, Keep)
            return fused_attention(q, k, v, attn_mask, is_causal, scale, refinement, keep, straight_through)
        if kernel == "fused":
            raise ValueError(f"kernel='fused' cannot take this call: {reason}; use 'auto' or 'plain'")
    if isinstance(keep, Keep):
        keep = keep.mask(q.device)
    weights = refine(
        _scores(q, k, attn_mask, is_causal, scale), **refinement.options, keep=keep, straight_through=straight_through
    )
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights.to(v.dtype) @ v


def _scores(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """(…, queries, keys), in float32 where the input is half."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(exact) * scale) @ k.to(exact).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask.to(exact)
