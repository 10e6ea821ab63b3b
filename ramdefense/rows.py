"""The rows of one tile of `tiles`: bounded in place, and pulled back through.

Two ways that agree to rounding: `CompiledRows` is C, made when the package is installed where there is a compiler, each
row one visit to the cache; `PlainRows` is the same written with tensor operations, for every floating point type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ramdefense.refinement import UNIFORM, Refinement, pull_through_cap, refine, row_threshold, suppress
from ramdefense.streams import Keep, Reader, drop_level

try:
    from ramdefense import _rows
except ImportError:
    COMPILED = False  # installed without a compiler
else:
    COMPILED = True

_ROUNDS = 12  # of Newton's steps for a cap; rows that take more are left to `refinement`


@dataclass(frozen=True)
class Call:
    """What is the same for every tile of a call.

    Args:
        shape: (B, H, M, N) of the attention matrix.
        attn_mask: None, or bool or floating point that broadcasts to `shape`.
        is_causal: query i sees keys 0…i.
        refinement: MAS and RAD.
        keep: RAD's mask; None where nothing is dropped.
        straight_through: the gradient is that of plain attention under RAD.
    """

    shape: tuple[int, int, int, int]
    attn_mask: Tensor | None
    is_causal: bool
    refinement: Refinement
    keep: Keep | None
    straight_through: bool

    @property
    def closed(self) -> bool:
        """Whether two numbers for a row say it all."""
        own = self.refinement
        stopped = self.straight_through and own.suppression != "clamp"
        return own.suppression in ("clamp", "cap") and not stopped and (self.factor > 0 or self.keep is None)

    @property
    def factor(self) -> float:
        """What RAD multiplies the weights with that it keeps; 0 where each row has a factor of its own."""
        own = self.refinement
        if self.keep is None or own.compensate == "none":
            return 1.0
        return 1 / (1 - own.dropout) if own.compensate == "rescale" else 0.0

    @property
    def masked(self) -> bool:
        return self.is_causal or self.attn_mask is not None

    @property
    def capped(self) -> bool:
        return self.refinement.suppression == "cap"

    def refined(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        """The weights as `refinement` makes them."""
        return refine(scores, **self.refinement.options, keep=keep, straight_through=self.straight_through)

    def threshold(self, scores: Tensor) -> tuple[float | Tensor, int | Tensor]:
        """T of the rows, and how many of their keys are not masked: numbers where all are alike, else (…, rows, 1)."""
        counted = (scores > -math.inf).sum(-1, keepdim=True) if self.masked else scores.shape[-1]
        return row_threshold(self.refinement.max_attention, counted, scores.dtype), counted

    def pull_refined(self, scores: Tensor, slope: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weights of `refined`, and the gradient at the scores from that at the weights."""
        if not self.closed:
            with torch.enable_grad():
                leaf = scores.clone().requires_grad_()
                weights = self.refined(leaf, keep)
            (slope,) = torch.autograd.grad(weights, leaf, slope)
            return weights.detach(), slope
        # only the cap leaves rows to `refinement`; written out, since an operator knows no autograd
        threshold, counted = self.threshold(scores)
        bounds = torch.as_tensor(threshold, dtype=scores.dtype).expand(*scores.shape[:-1], 1)
        factor = self.factor if keep is None else keep.to(scores.dtype) * self.factor
        weights = suppress(scores, self.refinement.max_attention, "cap")
        uniform = torch.as_tensor(counted * threshold <= 1 + UNIFORM)
        slope = pull_through_cap(slope * factor, weights, bounds).masked_fill(uniform, 0)
        return weights * factor, slope


class Rows(Protocol):
    """The rows of a call, tile after tile in memory order; RAD's streams are read on the way."""

    def bound(self, scores: Tensor, numbers: Tensor) -> Tensor | None:
        """Bound and drop in place: the weights are the result, (…, rows, 1), times what `scores` then holds.

        `numbers`, (…, rows, 2), takes the shift and the top of each row. None where `refinement` has to settle a row;
        `scores` is spent then, and nothing of the streams is read.
        """

    def pull(self, scores: Tensor, slope: Tensor, numbers: Tensor) -> None:
        """In place, `scores` to the weights over their top, and `slope` from the gradient at the weights, times the
        top, to that at the scores."""

    def keep(self, shape: torch.Size) -> Tensor | None:
        """RAD's mask of the next tile, bool, for `refine`; None where its elements have none."""


def rows_of(call: Call, dtype: torch.dtype) -> Rows:
    """The fastest way for scores of that type."""
    return CompiledRows(call) if COMPILED and dtype == torch.float32 else PlainRows(call)


# -------------------------------------------------------------------------------------------------- tensor operations


class PlainRows:
    def __init__(self, call: Call) -> None:
        self.call = call
        keep = call.keep if call.keep is not None and call.keep.unit == "element" else None
        self._reader = None if keep is None else Reader(math.prod(keep.drawn), keep.seeds)
        self._level = 0 if keep is None else drop_level(keep.p)
        self._spare: dict[str, Tensor] = {}

    def bound(self, scores: Tensor, numbers: Tensor) -> Tensor | None:
        call = self.call
        threshold, counted = call.threshold(scores)
        largest = scores.amax(-1, keepdim=True)
        if call.masked:
            largest.masked_fill_(largest == -math.inf, 0)
        e = scores.sub_(largest).exp_()
        total = e.sum(-1, keepdim=True)
        level = total * threshold
        if call.capped:
            found = _cap_level(e, total, level, threshold, counted)
            if found is None:
                return None
            level = found
        torch.minimum(e, level, out=e)
        kept = self._kept(e)
        if kept is not None:
            e.mul_(kept)
        top = torch.as_tensor(threshold, dtype=e.dtype).expand_as(level)
        numbers.copy_(torch.cat([largest + level.log(), top], -1))
        factor = top / level
        if call.masked:  # where every key is masked, weights are 0, and gradients
            empty = total == 0
            numbers.masked_fill_(empty, 0)
            factor.masked_fill_(empty, 0)
        return factor

    def pull(self, scores: Tensor, slope: Tensor, numbers: Tensor) -> None:
        shift, top = numbers.split(1, -1)
        e = scores.sub_(shift).exp_()
        kept = self._kept(e)
        if kept is not None:
            slope.mul_(kept)
        free = e
        if not self.call.straight_through:
            # e where it is below the bound, else 0, in one pass; an e that equals the bound passes, as in torch.clamp
            limit = 1 + 16 * torch.finfo(e.dtype).eps
            out = self._take("free", e)
            free = torch.ops.aten.hardtanh_backward.grad_input(e, e, -1.0, limit, grad_input=out)
        slope.mul_(free)
        row = slope.sum(-1, keepdim=True)
        if self.call.capped:
            row /= free.sum(-1, keepdim=True).clamp(min=torch.finfo(free.dtype).tiny)
            slope.addcmul_(free, row, value=-1)
        else:
            slope.addcmul_(e, row.mul_(top), value=-1)
        e.clamp_(max=1)
        if kept is not None:
            e.mul_(kept)

    def keep(self, shape: torch.Size) -> Tensor | None:
        return None if self._reader is None else self._reader.read(math.prod(shape)).view(shape) >= self._level

    def _kept(self, like: Tensor) -> Tensor | None:
        """RAD's mask as numbers, several times faster than bool."""
        if self._reader is None:
            return None
        bits = self._reader.read(like.numel()).view(like.shape)
        return torch.ge(bits, self._level, out=self._take("kept", like))

    def _take(self, name: str, like: Tensor) -> Tensor:
        if name not in self._spare or self._spare[name].numel() < like.numel():
            self._spare[name] = torch.empty(like.numel(), dtype=like.dtype)
        return self._spare[name][: like.numel()].view(like.shape)


def _cap_level(
    e: Tensor, total: Tensor, level: Tensor, threshold: float | Tensor, counted: int | Tensor
) -> Tensor | None:
    """Where `"cap"` cuts e, (…, rows, 1), the largest e of a row being 1; None where rounding would show.

    Newton from below, as in `refinement`: with m elements above the level, the others share 1 − m·T, so the level at
    which they would reach T is T times their sum over that. A row is settled once none of the others exceeds it.
    """
    tight = torch.as_tensor(counted * threshold <= 1 + UNIFORM)  # rows that may be uniform at best
    over = (level < 1) & (total > 0)
    if bool((tight & (total > 0)).any()):
        return None
    if not bool(over.any()):
        return level
    keys = e.shape[-1]
    found = level.reshape(-1, 1).clone()
    rows = over.view(-1).nonzero()[:, 0]
    e = e.view(-1, keys)
    bound = torch.as_tensor(threshold, dtype=e.dtype).expand_as(level).reshape(-1, 1)
    if len(rows) < len(e):
        e, bound = e[rows], bound[rows]
    now, free, others = found[rows], torch.empty_like(e), torch.empty_like(e)
    for _ in range(_ROUNDS):
        torch.le(e, now, out=free)
        above = keys - free.sum(-1, keepdim=True)
        torch.mul(e, free, out=others)
        now = bound * others.sum(-1, keepdim=True) / (1 - above * bound)
        unsettled = (others.amax(-1, keepdim=True) > now).view(-1)
        left = int(unsettled.sum())
        if 2 * left < len(e):
            found[rows] = now
            if not left:
                break
            rows, now, bound, e = rows[unsettled], now[unsettled], bound[unsettled], e[unsettled]
            free, others = free[:left], others[:left]
    else:
        return None
    # below this the sum of the others has few digits, or none; NaN and what is negative fail, too
    enough = found > math.sqrt(torch.finfo(e.dtype).tiny)
    return found.view_as(level) if bool((enough | (total == 0).view(-1, 1)).all()) else None


# ----------------------------------------------------------------------------------------------------------------- C


class CompiledRows:
    """float32 alone."""

    def __init__(self, call: Call) -> None:
        self.call = call
        keys = call.shape[3]
        keep = call.keep if call.keep is not None and call.keep.unit == "element" else None
        self._seeds = () if keep is None else keep.seeds
        self._rows = 0 if keep is None else math.prod(keep.drawn) // keys  # of one stream
        self._drop_level = 0 if keep is None else drop_level(keep.p)
        self._stream = torch.empty(_rows.STREAM_BYTES, dtype=torch.uint8)
        self._read = 0  # rows, of all streams
        self._spare = torch.empty(2, keys)
        value = call.refinement.max_attention
        self._multiple = isinstance(value, str)
        self._max_attention = float(row_threshold(value, 1, torch.float32))

    def bound(self, scores: Tensor, numbers: Tensor) -> Tensor | None:
        factors = torch.empty(*scores.shape[:-1], 1)
        before = self._stream.clone(), self._read
        keys, options = scores.shape[-1], (self._max_attention, self._multiple, self.call.masked, self.call.capped)
        for part, stream in self._parts(scores):
            own = _address(scores, part), _address(numbers, part), _address(factors, part), self._spare.data_ptr()
            if not _rows.bound(*own, stream, self._drop_level, len(part), keys, *options):
                self._stream, self._read = before
                return None
        return factors

    def pull(self, scores: Tensor, slope: Tensor, numbers: Tensor) -> None:
        keys, options = scores.shape[-1], (self.call.capped, self.call.straight_through)
        for part, stream in self._parts(scores):
            own = _address(scores, part), _address(slope, part), _address(numbers, part), self._spare.data_ptr()
            _rows.pull(*own, stream, self._drop_level, len(part), keys, *options)

    def keep(self, shape: torch.Size) -> Tensor | None:
        if not self._seeds:
            return None
        kept = torch.empty(shape)
        for part, stream in self._parts(kept):
            _rows.read(stream, _address(kept, part), len(part) * shape[-1], self._drop_level)
        return kept.bool()

    def _parts(self, tile: Tensor) -> Iterator[tuple[range, int]]:
        """The rows of a tile, stream by stream, and the address of the stream, 0 where there is none."""
        rows = tile.shape[:-1].numel()
        if not self._seeds:
            yield range(rows), 0
            return
        first = 0
        while first < rows:
            number, within = divmod(self._read, self._rows)
            if not within:
                _rows.seed(self._stream.data_ptr(), self._seeds[number])
            count = min(rows - first, self._rows - within)
            yield range(first, first + count), self._stream.data_ptr()
            first += count
            self._read += count


def _address(tensor: Tensor, rows: range) -> int:
    """Where those rows of a contiguous tensor begin."""
    return tensor.data_ptr() + rows.start * tensor.shape[-1] * tensor.element_size()
