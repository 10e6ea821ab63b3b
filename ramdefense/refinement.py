"""Refined attention: Max Attention Suppression (MAS), then Random Attention Dropout (RAD), on plain tensors.

A patch moves the labels of far-away pixels through attention: where a query gives one key much weight, whoever owns
that key owns the query. RAM (Yuan et al., "Towards Robust Semantic Segmentation against Patch-based Attack via
Attention Refinement", IJCV 2024, arXiv 2401.01750) bounds every element of the attention matrix by a threshold T (MAS)
and drops elements at random, at inference too (RAD). The paper's idea is taken as it stands; its formulas could not be
had, so the four suppressions, their names, the form ``"4/N"`` of T and the three compensations are ours.

With A = softmax(S) over the N keys of a row, a patch that owns P keys holds at most P·T of a query's attention after:

- ``"clamp"``: min(A, T). A row may sum to less than 1. Zero gradient where it acts.
- ``"cap"``: softmax(min(S, c)), one c for each row: what exceeds T is cut to T, and the mass cut off goes to the
  other keys in proportion (water-filling). Rows sum to 1.
- ``"temperature"``: softmax(S / τ), the smallest τ ≥ 1 for each row that brings its maximum to T. Rows sum to 1.
- ``"scale"``: A · min(1, T / max A). A row may sum to less than 1; ratios within a row stay.

All of them keep the order of a row's elements, and leave a row that nowhere exceeds T as it is. The functions are
pure: the random mask of RAD is an argument. A key is *masked* when its score is −inf: its weight is exactly 0 and it
does not count in N. A row whose keys are all masked has weights 0 and gradient 0. A large negative *finite* score
(−100 in Swin's shifted windows) is a score like any other: ``"clamp"`` and ``"scale"`` leave such a key at nothing,
``"cap"`` and ``"temperature"`` give it what the other keys may not hold.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUPPRESSIONS = ("clamp", "cap", "temperature", "scale")
UNITS = ("element", "key")
COMPENSATIONS = ("none", "rescale", "renormalise")

_MULTIPLE = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*/\s*N\s*")
_STOCHASTIC = ("cap", "temperature")  # rows that sum to 1, so T cannot be below 1/N
UNIFORM = 1e-6  # T·N this close to 1 means "uniform": 1/3 written in float32 is still a third
_ROUNDS = 12  # of `cap`, before a sort is the faster way
_FAR = 1e30  # `temperature` tells no score that is so far below the largest from another such
_SMALL_FLOATS = (torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------- the options


@dataclass(frozen=True)
class Refinement:
    """The options of a refinement, checked when made; ``refine(scores, **refinement.options)`` applies them.

    Args:
        max_attention: T, a number in (0, 1] or a multiple of 1/N such as ``"3/N"``; 1 means no suppression.
        suppression: one of ``SUPPRESSIONS``.
        dropout: p in [0, 1), the probability that RAD drops an element (or a key).
        unit: ``"element"``, or ``"key"`` (a source position vanishes for every query).
        compensate: one of ``COMPENSATIONS``; see `drop`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range or of unknown name; the message names the value and the remedy.
    """

    max_attention: float | str = "16/N"
    suppression: str = "cap"
    dropout: float = 0.1
    unit: str = "element"
    compensate: str = "rescale"

    def __post_init__(self) -> None:
        _check_suppression(self.max_attention, self.suppression)
        _check_dropout(self.dropout, self.unit, self.compensate)

    @property
    def options(self) -> dict[str, Any]:
        """The options as keyword arguments of `refine` and `attention.refined_attention`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def neutral(self) -> bool:
        """Whether the refinement is plain attention: T = 1 and p = 0."""
        return self.max_attention == 1 and self.dropout == 0

    def bound(self, keys: int) -> float:
        """The largest weight that this refinement can give to one key, in a row of ``keys`` keys, none of them masked.

        T itself without compensation, T / (1 − p) when rescaled (above 1 where T > 1 − p), 1 when renormalised.
        """
        threshold = resolve_max_attention(self.max_attention, keys)
        if self.dropout == 0 or self.compensate == "none":
            return threshold
        return threshold / (1 - self.dropout) if self.compensate == "rescale" else 1.0


def resolve_max_attention(max_attention: float | str, keys: int) -> float:
    """The threshold T of a row with ``keys`` keys.

    Args:
        max_attention: a number in (0, 1], returned as it is, or ``"x/N"`` with x > 0, which is min(x / keys, 1).
        keys: N, the number of keys of the row that are not masked; a row without any has T = 1.

    Raises:
        TypeError: ``max_attention`` is neither a number nor a string.
        ValueError: a number outside (0, 1], or a string that is not ``"x/N"``.
    """
    value, multiple = _parse(max_attention)
    return min(value / max(keys, 1), 1.0) if multiple else value


def _parse(max_attention: float | str) -> tuple[float, bool]:
    """The number in ``max_attention``, and whether it is a multiple of 1/N."""
    if isinstance(max_attention, str):
        match = _MULTIPLE.fullmatch(max_attention)
        if match is None or not 0 < float(match[1]) < math.inf:
            raise ValueError(
                f"max_attention={max_attention!r} is malformed: write a multiple of 1/N as 'x/N' with x > 0 "
                "and a capital N, such as '3/N' or '1.5/N', or give a number in (0, 1], such as 0.05, without quotes"
            )
        return float(match[1]), True
    if isinstance(max_attention, bool) or not isinstance(max_attention, numbers.Real):
        raise TypeError(
            f"max_attention={max_attention!r} is a {type(max_attention).__name__}: "
            "give a number in (0, 1] or a string such as '3/N'"
        )
    if not 0 < max_attention <= 1:
        raise ValueError(
            f"max_attention={max_attention!r} is outside (0, 1]: attention weights lie in [0, 1], so 1 switches the "
            "suppression off; for a multiple of 1/N write a string such as '3/N'"
        )
    return float(max_attention), False


def _check_name(option: str, value: object, known: Sequence[str]) -> None:
    if value in known:
        return
    close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"{option}={value!r} is unknown: {hint}choose one of {', '.join(map(repr, known))}")


def _check_suppression(max_attention: float | str, suppression: str) -> None:
    value, multiple = _parse(max_attention)
    _check_name("suppression", suppression, SUPPRESSIONS)
    if multiple and suppression in _STOCHASTIC and value < 1:
        raise ValueError(
            f"max_attention={max_attention!r} with suppression={suppression!r}: rows that sum to 1 have an element of "
            "at least 1/N; use '1/N' or more, or suppression='clamp' or 'scale'"
        )


def _check_dropout(p: float, unit: str, compensate: str) -> None:
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"dropout={p!r} is a {type(p).__name__}: give a probability in [0, 1)")
    if not 0 <= p < 1:
        raise ValueError(f"dropout={p!r} is outside [0, 1): give the probability to drop, such as 0.1, or 0 for none")
    _check_name("unit", unit, UNITS)
    _check_name("compensate", compensate, COMPENSATIONS)


# --------------------------------------------------------------------------------- MAS, Max Attention Suppression


def suppress(
    scores: Tensor, max_attention: float | str, suppression: str = "clamp", *, straight_through: bool = False
) -> Tensor:
    """Attention weights softmax(scores), bounded by T (MAS).

    Args:
        scores: (…, queries, keys), floating point, before the softmax; −inf masks a key.
        max_attention: T, a number in (0, 1] or ``"x/N"``, where N counts the keys of the row that are not masked.
        suppression: one of ``SUPPRESSIONS`` (see the module).
        straight_through: the same weights, but the gradient of the plain softmax (BPDA, Athalye et al. 2018), so that
            an attack is not stopped by a gradient that the suppression zeroes.

    Returns:
        Weights (…, queries, keys) of the dtype of ``scores``, none above T but for the rounding of that dtype. Rows sum
        to 1 for ``"cap"`` and ``"temperature"``, to at most 1 for ``"clamp"`` and ``"scale"``. At T = 1 bit for bit
        ``torch.softmax(scores, -1)``. With ``"cap"`` and ``"temperature"`` a row that has fewer than 1/T unmasked
        keys gets the uniform distribution, the smallest maximum that a row of sum 1 can have.

    Raises:
        TypeError: ``scores`` are not floating point, or an option has the wrong type.
        ValueError: an option out of range, or T < 1/keys with ``"cap"`` or ``"temperature"``, which no row can meet.
    """
    _check_suppression(max_attention, suppression)
    if not scores.is_floating_point():
        raise TypeError(f"scores are {scores.dtype}: attention scores must be floating point")
    value, multiple = _parse(max_attention)
    keys = scores.shape[-1]
    if (value >= keys if multiple else value == 1) or scores.numel() == 0:
        return _softmax(scores)
    if suppression in _STOCHASTIC and not multiple and value * keys < 1 - UNIFORM:
        raise ValueError(
            f"max_attention={max_attention!r} with suppression={suppression!r} and {keys} keys: rows that sum to 1 "
            f"have an element of at least 1/{keys} = {1 / keys:.4g}; raise max_attention (or give '1/N' or more), "
            "or use suppression='clamp' or 'scale'"
        )
    if scores.dtype in _SMALL_FLOATS and suppression != "clamp":  # a clamp is as exact as its dtype
        return suppress(scores.float(), max_attention, suppression, straight_through=straight_through).to(scores.dtype)

    weights = _softmax(scores)
    bound = _BOUNDS[suppression]
    if suppression not in _STOCHASTIC:
        threshold = _threshold(value, multiple, _count_keys(scores) if multiple else keys, scores.dtype)
        if straight_through:
            return _StraightThrough.apply(weights, bound(scores.detach(), weights.detach(), threshold))
        return bound(scores, weights, threshold)

    counted = _count_keys(scores)
    threshold = _threshold(value, multiple, counted, scores.dtype)
    if straight_through:
        return _StraightThrough.apply(weights, bound(*_level(scores.detach(), weights.detach(), threshold, counted)))
    return bound(*_level(scores, weights, threshold, counted))


class _StraightThrough(torch.autograd.Function):
    """The second argument forwards, the gradient to the first backwards."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, bounded: Tensor) -> Tensor:
        return bounded.view_as(bounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _softmax(scores: Tensor) -> Tensor:
    """torch.softmax over the keys, where a row of −inf gives 0 and not NaN, forwards and backwards."""
    weights = torch.softmax(scores, -1)
    if not weights[..., :1].isnan().any():  # a row of −inf shows in any one of its columns
        return weights
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)


def _count_keys(scores: Tensor) -> int | Tensor:
    """N: one number where no key is masked, else (…, queries, 1)."""
    scores = scores.detach()
    if scores.amin() > -math.inf:  # one reduction tells the usual case
        return scores.shape[-1]
    return (scores > -math.inf).sum(-1, keepdim=True)


def row_threshold(max_attention: float | str, keys: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """T of rows with so many unmasked keys: a number for all rows, or a tensor like `keys`, of that dtype.

    Not cut at 1 where `keys` is one number: a bound above 1 bounds nothing.
    """
    return _threshold(*_parse(max_attention), keys, dtype)


def _threshold(value: float, multiple: bool, keys: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """T, for all rows or (…, queries, 1)."""
    if not multiple:
        return value
    if isinstance(keys, int):
        return value / keys
    wide = torch.promote_types(dtype, torch.float32)  # half precision counts to 2048 only
    return (value / keys.clamp(min=1).to(wide)).clamp(max=1).to(dtype)


def _level(
    scores: Tensor, weights: Tensor, threshold: float | Tensor, keys: int | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Rows in which T allows the uniform distribution at best get it, from equal scores and with no bound left."""
    tight = torch.as_tensor(keys * threshold <= 1 + UNIFORM, device=scores.device)
    if not tight.any():
        return scores, weights, threshold
    scores = scores.masked_fill(tight & (scores.detach() > -math.inf), 0)
    threshold = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device).masked_fill(tight, 1)
    return scores, _softmax(scores), threshold


def _clamp(scores: Tensor, weights: Tensor, threshold: float | Tensor) -> Tensor:
    return weights.clamp(max=threshold)


def _scale(scores: Tensor, weights: Tensor, threshold: float | Tensor) -> Tensor:
    # T / max(A, T), and not min(1, T / A): the same number, and finite, with its gradient, in a row of zeros
    return weights * (threshold / weights.amax(-1, keepdim=True).clamp(min=threshold))


def _cap(scores: Tensor, weights: Tensor, threshold: float | Tensor) -> Tensor:
    over, bounds = _exceeding(weights, threshold)
    return _Cap.apply(scores, weights.detach(), bounds) if over.any() else weights


class _Cap(torch.autograd.Function):
    """With m elements at T, the others share 1 − m·T in proportion: that is min(λA, T), or softmax(min(S, c)).

    Which elements are at T is piecewise constant, so the gradient is that of the softmax over the others. Written out,
    it costs a third of what autograd makes of it.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
        factor, settled = _level_factor(weights, bounds)
        capped = torch.minimum(weights * factor, bounds)
        if not settled.all():
            rows = ~settled.squeeze(-1)
            capped[rows] = _cap_far_apart(scores[rows], weights[rows], bounds[rows])
        ctx.save_for_backward(capped, bounds)
        return capped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return pull_through_cap(grad, *ctx.saved_tensors), None, None


def pull_through_cap(grad: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    """The gradient at the scores from that at the weights that `"cap"` made of them; ``bounds``: (…, queries, 1), T."""
    free = weights * (weights < bounds).to(weights.dtype)
    left = free.sum(-1, keepdim=True).clamp(min=torch.finfo(free.dtype).tiny)
    pulled = grad * free
    return pulled - free * (pulled.sum(-1, keepdim=True) / left)


def _level_factor(weights: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """λ with Σ min(λA, T) = 1 for each row, and whether it was found; both (…, queries, 1).

    Each round is a Newton step, from below, on a piecewise linear function: those above T, those that the mass so freed
    lifts above it, and so on, mostly three to five. Masks are kept as numbers, which is several times faster than bool,
    and rows leave in bulk once most are settled.
    """
    keys = weights.shape[-1]
    factors = torch.ones_like(bounds).view(-1, 1)
    settled = torch.zeros_like(factors, dtype=torch.bool)
    rows: Tensor | None = None  # of those that are left; None: all
    a, bound = weights.reshape(-1, keys), bounds.reshape(-1, 1)
    free = torch.empty_like(a)
    above, level, factor = torch.zeros_like(bound), bound, factors.clone()
    for _ in range(_ROUNDS):
        torch.le(a, level, out=free)
        count = keys - free.sum(-1, keepdim=True)
        changed = (count > above).squeeze(-1)
        left = int(changed.sum())
        if 2 * left < len(a):
            here = torch.arange(len(a), device=a.device) if rows is None else rows
            factors[here[~changed]], settled[here[~changed]] = factor[~changed], True
            if not left:
                break
            rows, a, bound, count = here[changed], a[changed], bound[changed], count[changed]
            free, factor = free[changed], factor[changed]
        above = count
        rest = torch.mul(a, free, out=free).sum(-1, keepdim=True)
        factor = torch.where(count > 0, (1 - count * bound) / rest, 1)
        level = bound / factor
    # a rest close to the smallest floating point number has few digits, or none
    settled &= (factors > 0) & (factors < 1 / math.sqrt(torch.finfo(weights.dtype).tiny))
    return factors.view_as(bounds), settled.view_as(bounds)


def _cap_far_apart(scores: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    """`_Cap` in terms of scores, for rows (rows, keys) whose mass lies in few keys, as under attack."""
    capped = _capped(scores, weights, bounds)
    left = (1 - capped.sum(-1, keepdim=True) * bounds).clamp(min=0)
    return torch.where(capped, bounds, _softmax(scores.masked_fill(capped, -math.inf)) * left)


def _capped(scores: Tensor, weights: Tensor, bound: Tensor) -> Tensor:
    """Which elements of the rows (rows, keys) end at T.

    Each round is a Newton step for c. It ends when nothing exceeds T any more; rows that take long are sorted once.
    """
    capped = weights > bound
    rows = torch.arange(len(scores), device=scores.device)
    now, others = capped.clone(), scores.masked_fill(capped, -math.inf)
    left = 1 - now.sum(-1, keepdim=True) * bound
    step = 0
    while rows.numel():
        step += 1
        if step == _ROUNDS:
            more = _exceeding_sorted(others, bound, left)
        else:
            more = _softmax(others) > bound / left.clamp(min=0)
        count = more.sum(-1, keepdim=True)
        changed = count.squeeze(-1) > 0
        if step != _ROUNDS and not changed.all():  # the sort leaves the last word to the round after it
            capped[rows[~changed]] = now[~changed]
            rows, now, more, count = rows[changed], now[changed], more[changed], count[changed]
            others, bound, left = others[changed], bound[changed], left[changed]
        now |= more
        others.masked_fill_(more, -math.inf)
        left = left - count * bound
    return capped


def _exceeding_sorted(scores: Tensor, bound: Tensor, left: Tensor) -> Tensor:
    """Which scores surely exceed T when they share ``left``: all down to the last that does so after those above it."""
    ordered = scores.sort(-1, descending=True).values
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    above = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    # one too many would stay, one too few comes with the next round, so rounding counts against exceeding
    slack = 16 * torch.finfo(scores.dtype).eps * (1 + ordered.abs() + rest.abs())
    exceeds = ordered - rest - slack > (bound / (left - above * bound)).log()  # NaN where nothing is left: False
    count = (exceeds * (above + 1)).amax(-1, keepdim=True).long()
    return (scores >= ordered.gather(-1, (count - 1).clamp(min=0))) & (count > 0)


def _temperature(scores: Tensor, weights: Tensor, threshold: float | Tensor) -> Tensor:
    """softmax(βG) with G = S − max S and β = 1/τ. Its maximum is 1/Z, so β solves log Z(β) = log Σ exp(βG) = −log T.

    The root is found without a graph. One Newton step from there, with a graph, moves it no further but gives it the
    gradient of the implicit function theorem, ∂β/∂S = −(∂ log Z/∂S) / (∂ log Z/∂β). Second derivatives are not exact.
    """
    over, bounds = _exceeding(weights, threshold)
    if not over.any():
        return weights
    masked = scores.detach() == -math.inf
    top = scores.amax(-1, keepdim=True)
    gap = scores - top.masked_fill(top == -math.inf, 0)
    gap = gap.clamp(min=-_FAR).masked_fill(masked, 0)  # finite, so that no product or sum of gaps overflows
    rows = over.squeeze(-1)
    found, slope = torch.ones_like(bounds), -torch.ones_like(bounds)
    found[rows], slope[rows] = _inverse_temperature(gap.detach()[rows], masked[rows], bounds[rows])
    log_z = torch.logsumexp((found * gap).masked_fill(masked, -math.inf), -1, keepdim=True)
    beta = torch.where(over, found - (log_z + bounds.log()) / slope, 1)
    return _softmax((beta * gap).masked_fill(masked, -math.inf))


def _inverse_temperature(gap: Tensor, masked: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The root β in (0, 1) of log Z(β) = −log T for each row, and the slope of log Z there.

    Newton in u = log β, which no outlier among the scores slows down, in a bracket, which a step that would leave it
    halves; bisection alone for a row that this does not settle. Two to five rounds, as a rule.
    """
    eps, tiny = torch.finfo(gap.dtype).eps, torch.finfo(gap.dtype).tiny
    # log Z is convex in β, so its tangent at β = 0 meets −log T left of the root, and not far from it
    keys = (~masked).sum(-1, keepdim=True)
    low = (-(keys * bound).log() / (gap / keys).sum(-1, keepdim=True)).clamp(tiny, 1).log()
    u, high = low, torch.zeros_like(low)
    slope = -torch.ones_like(low)
    for step in range(200):
        beta = u.exp()
        terms = (gap * beta).exp_().masked_fill_(masked, 0)
        z = terms.sum(-1, keepdim=True)
        slope = terms.mul_(gap).sum(-1, keepdim=True) / z
        excess = (z * bound).log()
        done = (excess.abs() <= 8 * eps) | (high - low <= 2 * eps * u.abs().clamp(min=1))
        if done.all():
            break
        low, high = torch.where(excess >= 0, u, low), torch.where(excess < 0, u, high)
        newton = u - excess / (slope * beta)
        inside = (newton > low) & (newton < high) & (step < 16)
        u = torch.where(done, u, torch.where(inside, newton, (low + high) / 2))
    return u.exp(), slope


def _exceeding(weights: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """Which rows exceed T, and T for each row, both (…, queries, 1)."""
    over = weights.detach().amax(-1, keepdim=True) > threshold
    return over, torch.as_tensor(threshold, dtype=weights.dtype, device=weights.device).expand_as(over)


_BOUNDS: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "clamp": _clamp,
    "cap": _cap,
    "temperature": _temperature,
    "scale": _scale,
}


# ----------------------------------------------------------------------------------- RAD, Random Attention Dropout


def sample_keep(shape: Sequence[int], p: float, *, generator: torch.Generator, unit: str = "element") -> Tensor:
    """An i.i.d. Bernoulli(1 − p) mask for `drop`.

    Args:
        shape: (…, queries, keys) of the weights.
        p: probability to drop, in [0, 1).
        generator: where the randomness comes from; the mask lies on its device.
        unit: ``"element"`` for a mask (…, queries, keys), ``"key"`` for a mask (…, 1, keys) that all queries share.

    Returns:
        bool mask, True where the weight is kept.
    """
    _check_dropout(p, unit, "none")
    size = (*shape[:-2], 1 if unit == "key" else shape[-2], shape[-1])
    return torch.rand(size, generator=generator, device=generator.device) >= p


def drop(weights: Tensor, p: float, *, keep: Tensor, unit: str = "element", compensate: str = "rescale") -> Tensor:
    """Attention weights without those that ``keep`` drops (RAD); training and inference are alike.

    Args:
        weights: (…, queries, keys), floating point, at least 0.
        p: the probability in [0, 1) with which ``keep`` was drawn.
        keep: bool mask that broadcasts to ``weights``, True where the weight is kept; (…, 1, keys) for ``unit="key"``.
        unit: ``"element"`` or ``"key"``; what ``keep`` must look like.
        compensate: ``"none"``: what is dropped is lost; a bound T of the weights still holds.
            ``"rescale"``: times 1 / (1 − p), so that the mean over masks is ``weights``; the bound becomes T / (1 − p).
            ``"renormalise"``: each row keeps the sum that it had before; no bound below that sum holds any more (one
            kept key gets all). A row of which nothing is kept is 0.

    Returns:
        Weights of the shape and dtype of ``weights``.

    Raises:
        TypeError: ``keep`` is not a bool tensor.
        ValueError: ``keep`` does not broadcast to ``weights``, does not fit ``unit``, or an option is out of range.
    """
    _check_dropout(p, unit, compensate)
    _check_keep(keep, weights.shape, unit)
    if compensate == "renormalise":
        exact = weights.float() if weights.dtype in _SMALL_FLOATS else weights
        kept = exact * keep
        after = kept.sum(-1, keepdim=True)
        # less than the smallest normal number counts as nothing: its inverse would overflow
        after = after.masked_fill(after < torch.finfo(after.dtype).tiny, 1)
        return (kept / after * exact.sum(-1, keepdim=True)).to(weights.dtype)
    factor = keep.to(weights.dtype)  # several times faster than a product with bool, there and back
    return weights * (factor.mul_(1 / (1 - p)) if compensate == "rescale" and p > 0 else factor)


def _check_keep(keep: Tensor, shape: torch.Size, unit: str) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        kind = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep is {kind}: give a bool tensor, True where a weight is kept (see sample_keep)")
    try:
        fits = np.broadcast_shapes(keep.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"keep of shape {tuple(keep.shape)} does not broadcast to the attention's {tuple(shape)}")
    if unit == "key" and keep.ndim > 1 and keep.shape[-2] != 1:
        raise ValueError(
            f"keep of shape {tuple(keep.shape)} with unit='key': all queries share one mask, give shape (…, 1, keys)"
        )


# --------------------------------------------------------------------------------------------------- both together


def refine(
    scores: Tensor,
    *,
    max_attention: float | str = 1.0,
    suppression: str = "clamp",
    dropout: float = 0.0,
    unit: str = "element",
    compensate: str = "rescale",
    keep: Tensor | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Attention weights from scores: MAS, then RAD.

    Args:
        scores: (…, queries, keys), floating point; −inf masks a key.
        max_attention, suppression, straight_through: see `suppress`.
        dropout, unit, compensate, keep: see `drop`; ``keep`` is needed where ``dropout`` is above 0.

    Returns:
        Weights (…, queries, keys) of the dtype of ``scores``; at ``max_attention=1`` without ``keep`` bit for bit
        ``torch.softmax(scores, -1)`` (0, not NaN, in a row that is masked whole). `Refinement.bound` is their maximum.

    Raises:
        TypeError, ValueError: as `suppress` and `drop`; ``dropout`` above 0 without ``keep``.
    """
    _check_dropout(dropout, unit, compensate)
    if dropout > 0 and keep is None:
        raise ValueError(f"dropout={dropout!r} without keep: give the mask, for instance from sample_keep")
    weights = suppress(scores, max_attention, suppression, straight_through=straight_through)
    return weights if keep is None else drop(weights, dropout, keep=keep, unit=unit, compensate=compensate)
