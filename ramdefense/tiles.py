"""Refined attention on a CPU without its matrix: tiles of whole rows, small enough to stay in the cache.

A tile holds scores of some queries with all keys, so a row's bound is found as in `refinement`, in place. Between the
passes a row is two numbers, a shift a and a top t, with which its weights are, before RAD,

    P = t · min(e, 1),   e = exp(S − a).

For `"clamp"` t = T and a = L + ln T, L the log-sum-exp of the row: min(softmax(S), T). For `"cap"` a is lower by ln λ,
where λ makes min(λA, T) sum to 1. With F = e where e ≤ 1, else 0, G the gradient at P, already times t, the gradient at
S is F·G − e·t·ΣFG (clamp) and F·G − F·(ΣFG / ΣF) (cap): the backward pass makes a tile again from its two numbers.
Everything else (`"scale"`, `"temperature"`, `"renormalise"`, and rows that only `refinement` settles exactly) goes
through `refine` tile after tile, forwards and, with autograd, backwards.

RAD's mask is read from its streams in memory order, in the backward pass once more; nothing of it is kept. Memory is
O(queries + keys) and four tiles, whatever the options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ramdefense.rows import Call, Rows, rows_of

_ELEMENTS = 1 << 18  # of a tile: with its like, in the cache of a core; smaller ones make matrix products slow
_ROWS = 64  # at least, however long a row is


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """Refined attention.

    Args:
        q: (B, H, M, E), floating point.
        k: (B, H, N, E).
        v: (B, H, N, Ev).
        call: the options.
        scale: of the scores.

    Returns:
        (B, H, M, Ev) of the dtype of `q`, and (B, H, M, 2), the shift and the top of each row for `pull_back`: NaN
        where it has to go through `refine`; float32, or float64 with `q`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=wide)
    numbers = torch.empty((*q.shape[:-1], 2), dtype=wide)
    work, rows, key_keep = _Work(call, wide), rows_of(call, wide), _key_keep(call)
    on_values = key_keep if call.closed else None  # a mask over keys is one over values; else `refine` applies it
    for tile in _tiles(call.shape):
        queries = tile.of(q).to(wide)
        columns = work.held("columns", tile, lambda tile: _transposed(tile, k, wide).mul_(scale))
        values = work.held("values", tile, lambda tile: _kept_values(tile, v, wide, on_values))
        scores = work.scores(tile, queries, columns)
        found = rows.bound(scores, tile.of(numbers)) if call.closed else None
        if found is None:
            scores = call.refined(work.scores(tile, queries, columns), _keep(rows, tile, scores, call, key_keep))
            tile.of(numbers).fill_(math.nan)
        torch.bmm(scores, values, out=tile.of(out))
        if found is not None:
            tile.of(out).mul_(found.mul_(call.factor))
    return out.to(q.dtype), numbers


def pull_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q, k and v of `attend`, from the gradient (B, H, M, Ev) at its result and from its `numbers`."""
    wide, numbers = numbers.dtype, numbers.contiguous()  # its rows are read by address
    at_q, at_k, at_v = (torch.zeros(tensor.shape, dtype=wide) for tensor in (q, k, v))
    work, rows, key_keep = _Work(call, wide), rows_of(call, wide), _key_keep(call)
    on_values = key_keep if call.closed else None  # a mask over keys is one over values; else `refine` applies it
    for tile in _tiles(call.shape):
        queries, pulled, own = tile.of(q).to(wide), tile.of(grad).to(wide), tile.of(numbers)
        columns = work.held("columns", tile, lambda tile: _transposed(tile, k, wide).mul_(scale))
        keys = work.held("keys", tile, lambda tile: tile.all(k).to(wide).contiguous())
        values = work.held("values", tile, lambda tile: _transposed(tile, v, wide))
        scores = work.scores(tile, queries, columns)
        refined = bool(own.isnan().any())
        if not refined:
            pulled = pulled * (own[..., 1:] * call.factor)
        slope = torch.bmm(pulled, values, out=work.slope(tile))
        if on_values is not None:
            slope.mul_(tile.all(on_values).transpose(1, 2))
        if refined:
            scores, slope = call.pull_refined(scores, slope, _keep(rows, tile, scores, call, key_keep))
        else:
            rows.pull(scores, slope, own)
        tile.all(at_v).baddbmm_(scores.transpose(1, 2), pulled)
        torch.bmm(slope, keys, out=tile.of(at_q))
        tile.all(at_k).baddbmm_(slope.transpose(1, 2), queries)
    if on_values is not None:
        at_v *= on_values
    return at_q.mul_(scale).to(q.dtype), at_k.mul_(scale).to(k.dtype), at_v.to(v.dtype)


def _transposed(tile: _Tile, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy (matrices, width, keys), in order: matrix products with it are faster than with a view."""
    return tile.all(tensor).transpose(1, 2).to(dtype).clone(memory_format=torch.contiguous_format)


def _key_keep(call: Call) -> Tensor | None:
    """RAD's mask over keys, (B, H, N, 1), drawn once for all tiles; None where it has none."""
    keep = call.keep
    if keep is None or keep.unit != "key":
        return None
    return keep.mask().view(*call.shape[:2], call.shape[3], 1)


def _kept_values(tile: _Tile, v: Tensor, dtype: torch.dtype, key_keep: Tensor | None) -> Tensor:
    values = tile.all(v).to(dtype)
    return (values if key_keep is None else values * tile.all(key_keep)).contiguous()


def _keep(rows: Rows, tile: _Tile, scores: Tensor, call: Call, key_keep: Tensor | None) -> Tensor | None:
    """RAD's mask of a tile as `refine` takes it."""
    if call.keep is None or call.keep.unit == "element":
        return rows.keep(scores.shape)
    if key_keep is None or call.closed:  # the values are masked already
        return torch.ones(1, 1, dtype=torch.bool)
    return tile.all(key_keep).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------- tiles


class _Tile(NamedTuple):
    """A part of (B, H, M, …): some images with all heads, or some heads of an image, or some rows of a head."""

    images: slice
    heads: slice
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows of (B, H, M, …), as (matrices, rows, …); a view where that is contiguous."""
        return tensor[self.images, self.heads, self.rows].flatten(0, 1)

    def all(self, tensor: Tensor) -> Tensor:
        """All that its matrices have of (B, H, …), as (matrices, …); a view where that is contiguous."""
        return tensor[self.images, self.heads].flatten(0, 1)


def _tiles(shape: tuple[int, int, int, int]) -> Iterator[_Tile]:
    """The tiles of a (B, H, M, N) in memory order."""
    images, heads, queries, keys = shape
    rows = max(_ELEMENTS // keys, _ROWS)
    if rows < 2 * queries:
        rows, several, many = min(rows, queries), 1, 1
    else:
        rows, matrices = queries, rows // queries
        several = min(heads, matrices)
        many = max(matrices // heads, 1) if several == heads else 1
    for image in range(0, images, many):
        for head in range(0, heads, several):
            for row in range(0, queries, rows):
                yield _Tile(slice(image, image + many), slice(head, head + several), slice(row, row + rows))


class _Work:
    """Memory that the tiles of one call use one after the other."""

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        self._call, self._dtype = call, dtype
        self._memory: dict[str, Tensor] = {}
        self._held: dict[str, tuple[tuple[slice, slice], Tensor]] = {}

    def held(self, name: str, tile: _Tile, make: Callable[[_Tile], Tensor]) -> Tensor:
        """What tiles of the same matrices share, made once for them: never that of all matrices at a time."""
        matrices = tile.images, tile.heads
        if name not in self._held or self._held[name][0] != matrices:
            self._held[name] = matrices, make(tile)
        return self._held[name][1]

    def scores(self, tile: _Tile, queries: Tensor, columns: Tensor) -> Tensor:
        scores = torch.bmm(queries, columns, out=self._take("scores", tile))
        mask = self._call.attn_mask
        if mask is not None:
            part = mask.expand(self._call.shape)[tile.images, tile.heads, tile.rows].reshape(scores.shape)
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, -math.inf)
            else:
                scores += part
        if self._call.is_causal:
            first, (rows, keys) = tile.rows.start, scores.shape[1:]
            scores.masked_fill_(torch.arange(keys) > torch.arange(first, first + rows)[:, None], -math.inf)
        return scores

    def slope(self, tile: _Tile) -> Tensor:
        return self._take("slope", tile)

    def _take(self, name: str, tile: _Tile) -> Tensor:
        images, heads, rows = (len(range(size)[part]) for size, part in zip(self._call.shape, tile, strict=False))
        shape = images * heads, rows, self._call.shape[3]
        if name not in self._memory:  # the first tile is the largest
            self._memory[name] = torch.empty(math.prod(shape), dtype=self._dtype)
        return self._memory[name][: math.prod(shape)].view(shape)
