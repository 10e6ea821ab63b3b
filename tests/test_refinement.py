"""MAS and RAD against what they promise: bounds, sums, order, identities, gradients, and independent solutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from ramdefense.attention import refined_attention
from ramdefense.refinement import (
    COMPENSATIONS,
    SUPPRESSIONS,
    Refinement,
    drop,
    refine,
    resolve_max_attention,
    sample_keep,
    suppress,
)

INF = math.inf
STOCHASTIC = ("cap", "temperature")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
fast = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0, sigma: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sigma).to(dtype)


def with_masked_keys(scores: Tensor, seed: int = 0, share: float = 0.3) -> Tensor:
    """−inf at random, and in the whole of the first row."""
    masked = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < share
    masked[..., 0, :] = True
    return scores.masked_fill(masked, -INF)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, str]:
    """Scores (float64, from flat to far beyond the range of exp, with ties and masked keys) and a feasible T."""
    keys = draw(st.integers(1, 40))
    scores = normal(3, 5, keys, seed=draw(st.integers(0, 10**6)), sigma=draw(st.sampled_from([0, 0.3, 3, 30, 2000])))
    if draw(st.booleans()):
        scores = scores.round()
    if draw(st.booleans()):
        scores = with_masked_keys(scores, share=draw(st.floats(0, 1)))
    return scores, f"{draw(st.floats(1, 8)):.3f}/N"


def thresholds(scores: Tensor, max_attention: str) -> Tensor:
    keys = (scores > -INF).sum(-1, keepdim=True).clamp(min=1)
    return (float(max_attention.split("/")[0]) / keys.double()).clamp(max=1)


# ------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@fast
@given(problem=problems())
def test_bound_sum_order_and_masks(suppression: str, dtype: torch.dtype, problem: tuple[Tensor, str]) -> None:
    scores, max_attention = problem[0].to(dtype), problem[1]
    before = scores.clone()
    weights = suppress(scores, max_attention, suppression)
    assert weights.dtype == dtype
    assert torch.equal(scores, before)

    wide = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-14)
    exact, bound = weights.double(), thresholds(scores, max_attention)
    assert (exact <= bound * (1 + wide)).all()
    assert (exact >= 0).all()
    masked = scores == -INF
    assert (exact[masked] == 0).all()

    sums, alive = exact.sum(-1), ~masked.all(-1)
    # half precision rounds each of up to 40 elements, float32 and float64 hardly
    rounding = torch.finfo(dtype).eps * (8 if dtype in (torch.float32, torch.float64) else 1)
    if suppression in STOCHASTIC:
        torch.testing.assert_close(sums[alive], torch.ones_like(sums[alive]), rtol=0, atol=rounding)
    assert (sums <= 1 + rounding).all()

    ordered = exact.gather(-1, scores.double().argsort(-1))
    assert (ordered.diff(dim=-1) >= -wide * ordered[..., 1:]).all()


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@fast
@given(problem=problems())
def test_acts_only_where_it_must(suppression: str, problem: tuple[Tensor, str]) -> None:
    """A row within T stays, and in one beyond it the largest element is at T: no more than needed."""
    scores, max_attention = problem
    plain, weights = suppress(scores, 1.0), suppress(scores, max_attention, suppression)
    bound = thresholds(scores, max_attention)
    over = plain.amax(-1, keepdim=True) > bound * (1 + 1e-9)
    torch.testing.assert_close(torch.where(over, 0, weights), torch.where(over, 0, plain), rtol=1e-9, atol=1e-12)
    largest = weights.amax(-1, keepdim=True)
    torch.testing.assert_close(largest[over], bound[over], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("neutral", [1.0, 1, "12/N", "1e9/N"])
def test_identity_bit_for_bit(suppression: str, dtype: torch.dtype, neutral: float | str) -> None:
    scores = normal(2, 3, 9, 12, dtype=dtype)
    scores[..., ::3] = -INF
    assert torch.equal(refine(scores, max_attention=neutral, suppression=suppression), torch.softmax(scores, -1))


def test_clamp_and_scale_by_their_formulas() -> None:
    scores = with_masked_keys(normal(4, 6, 17))[:, 1:]
    weights = torch.softmax(scores, -1)
    assert torch.equal(suppress(scores, 0.1, "clamp"), weights.minimum(torch.tensor(0.1, dtype=torch.float64)))
    expected = weights * (0.1 / weights.amax(-1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(suppress(scores, 0.1, "scale"), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("max_attention", [0.021, 0.06, 0.3, 0.9])
def test_cap_against_bisection(sigma: float, max_attention: float) -> None:
    """softmax(min(S, c)) with c from brentq; with scores far apart it takes the sort, with others the rounds alone."""
    for row in normal(12, 50, sigma=sigma):
        plain = torch.softmax(row, -1)
        if plain.max() <= max_attention:
            expected = plain
        else:

            def excess(cut: float, row: Tensor = row) -> float:
                return float(torch.logsumexp(row.clamp(max=cut) - cut, -1)) + math.log(max_attention)

            cut = brentq(excess, float(row.min()), float(row.max()), xtol=1e-13, rtol=1e-15)
            expected = torch.softmax(row.clamp(max=cut), -1)
        torch.testing.assert_close(suppress(row[None], max_attention, "cap")[0], expected, rtol=1e-8, atol=1e-9)


def test_cap_is_found_without_a_sort_and_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = normal(30, 200, sigma=100.0)
    usual = suppress(scores, "3/N", "cap")
    for rounds in (1, 10**6):
        monkeypatch.setattr("ramdefense.refinement._ROUNDS", rounds)
        torch.testing.assert_close(suppress(scores, "3/N", "cap"), usual, rtol=1e-12, atol=1e-14)


def test_cap_is_the_closest_row_in_relative_entropy() -> None:
    """Water-filling is the I-projection on {sum 1, max ≤ T}: no feasible direction lowers KL(w ‖ softmax S)."""
    scores = normal(20, 30)
    plain, weights = torch.softmax(scores, -1), suppress(scores, 0.1, "cap")

    def divergence(w: Tensor) -> Tensor:
        return (w * (w / plain).log()).sum(-1)

    for seed in range(20):
        other = torch.softmax(normal(20, 30, seed=seed + 1, sigma=0.2), -1).clamp(max=0.1)
        assert (other.amax(-1) <= 0.1).all()
        other = other / other.sum(-1, keepdim=True)
        step = 1e-3 * (other - weights)
        feasible = (weights + step).amax(-1) <= 0.1 + 1e-12
        assert feasible.any()
        assert (divergence(weights + step) >= divergence(weights) - 1e-12)[feasible].all()


@pytest.mark.parametrize("sigma", [0.5, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("max_attention", [0.021, 0.06, 0.3, 0.9])
def test_temperature_against_brentq(sigma: float, max_attention: float) -> None:
    for row in normal(12, 50, sigma=sigma):
        beta = 1.0
        if torch.softmax(row, -1).max() > max_attention:

            def excess(log_beta: float, row: Tensor = row) -> float:
                gap = (row - row.max()) * math.exp(log_beta)
                return float(torch.logsumexp(gap, -1)) + math.log(max_attention)

            beta = math.exp(brentq(excess, -40, 0, xtol=1e-15, rtol=1e-15))
        expected = torch.softmax(row * beta, -1)
        torch.testing.assert_close(
            suppress(row[None], max_attention, "temperature")[0], expected, rtol=1e-9, atol=1e-13
        )


@pytest.mark.parametrize("suppression", STOCHASTIC)
@pytest.mark.parametrize("far", [-100.0, -1e4, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("rounds", [1, 12])
def test_finite_masks_and_outliers_do_not_break_the_bound(
    suppression: str, far: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ramdefense.refinement._ROUNDS", rounds)
    scores = normal(6, 100, dtype=torch.float32)
    scores[:, :7] = far
    scores[1, :97] = far
    scores[2, 50] = 1e4
    scores[3] = torch.linspace(0, -5000, 100)
    for max_attention in ("1.01/N", "3/N", 0.1, 0.9):
        weights = suppress(scores, max_attention, suppression)
        assert (weights <= resolve_max_attention(max_attention, 100) * (1 + 1e-6)).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(6), rtol=0, atol=2e-6)


@pytest.mark.parametrize("suppression", STOCHASTIC)
def test_rows_with_too_few_keys_are_uniform(suppression: str) -> None:
    scores = normal(8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -INF).requires_grad_()
    weights = suppress(scores, 0.25, suppression)
    for row in range(4):
        torch.testing.assert_close(weights[row, : row + 1], torch.full((row + 1,), 1 / (row + 1)).double())
    assert (weights[4:] <= 0.25 + 1e-12).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(8).double())
    (grad,) = torch.autograd.grad((weights * normal(8, 8, seed=1)).sum(), scores)
    assert (grad[:4] == 0).all()
    assert (grad[4:].abs().amax(-1) > 0).all()
    assert suppress(scores, "1/N", suppression).amax(-1).tolist() == pytest.approx([1 / n for n in range(1, 9)])


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("max_attention", ["3/N", 0.2])
@pytest.mark.parametrize("straight_through", [False, True])
def test_masked_rows_have_no_weight_and_no_gradient(
    suppression: str, max_attention: float | str, straight_through: bool
) -> None:
    scores = with_masked_keys(normal(2, 6, 12)).requires_grad_()
    weights = suppress(scores, max_attention, suppression, straight_through=straight_through)
    assert (weights[:, 0] == 0).all()
    weights = drop(
        weights, 0.3, keep=sample_keep(weights.shape, 0.3, generator=torch.Generator()), compensate="renormalise"
    )
    (grad,) = torch.autograd.grad((weights * normal(2, 6, 12, seed=1)).sum(), scores)
    assert grad.isfinite().all()
    assert (grad[scores == -INF] == 0).all()
    assert (grad[:, 1:].abs().amax(-1) > 0).any()


def test_no_keys_and_no_queries() -> None:
    for shape in ((2, 0, 5), (2, 3, 0), (0, 3, 5)):
        for suppression in SUPPRESSIONS:
            assert refine(torch.zeros(shape), max_attention="2/N", suppression=suppression).shape == shape


# -------------------------------------------------------------------------------------------------------- gradients


def gradcheck(function: Callable[[Tensor], Tensor], scores: Tensor) -> bool:
    """torch.autograd.gradcheck (float64, central differences) on the scores that are not −inf."""
    masked = scores == -INF
    free = scores.masked_fill(masked, 0).requires_grad_()
    return torch.autograd.gradcheck(lambda x: function(x.masked_fill(masked, -INF)), (free,))


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("max_attention", [0.2, "3/N", "1.5/N"])
@pytest.mark.parametrize("sigma", [0.4, 1.5, 4.0])
def test_gradient_against_finite_differences(suppression: str, max_attention: float | str, sigma: float) -> None:
    """Some rows over T, some under, some with masked keys, one masked whole."""
    scores = normal(2, 4, 9, seed=3, sigma=sigma)
    scores[1] = with_masked_keys(scores[1])
    assert gradcheck(lambda x: suppress(x, max_attention, suppression), scores)


@pytest.mark.parametrize("suppression", ["clamp", "cap", "scale"])
def test_second_gradient(suppression: str) -> None:
    scores = normal(3, 6, seed=5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: suppress(x, 0.3, suppression), (scores,))


@pytest.mark.parametrize("compensate", COMPENSATIONS)
@pytest.mark.parametrize("suppression", SUPPRESSIONS)
def test_gradient_of_both_together(suppression: str, compensate: str) -> None:
    scores = normal(2, 4, 7, seed=2)
    keep = sample_keep(scores.shape, 0.4, generator=torch.Generator().manual_seed(0))
    keep[0, 0] = False
    options = {"max_attention": "2/N", "suppression": suppression, "dropout": 0.4, "compensate": compensate}
    assert gradcheck(lambda x: refine(x, keep=keep, **options), scores)


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_straight_through(suppression: str, dtype: torch.dtype) -> None:
    """Forward bit for bit the bounded weights, backward the plain softmax."""
    scores = with_masked_keys(normal(3, 5, 20, dtype=dtype)).requires_grad_()
    grad = normal(3, 5, 20, seed=1, dtype=dtype)
    through = suppress(scores, "2/N", suppression, straight_through=True)
    assert torch.equal(through, suppress(scores, "2/N", suppression))
    (actual,) = torch.autograd.grad(through, scores, grad)
    plain = suppress(scores, 1.0)
    (expected,) = torch.autograd.grad(plain, scores, grad)
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02 if rough else 1e-6, atol=0.02 if rough else 1e-7)
    (bounded,) = torch.autograd.grad(suppress(scores, "2/N", suppression), scores, grad)
    assert not torch.allclose(bounded, expected, rtol=0.1)


@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_float32_rounded(suppression: str, dtype: torch.dtype) -> None:
    scores = normal(4, 16, 300, dtype=dtype)
    weights, exact = suppress(scores, "3/N", suppression), suppress(scores.float(), "3/N", suppression)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights.float(), exact, rtol=eps, atol=torch.finfo(dtype).smallest_normal * eps)
    assert (weights.double() <= 3 / 300 * (1 + eps)).all()


# -------------------------------------------------------------------------------------------------------------- RAD


@pytest.mark.parametrize("unit", ["element", "key"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_over_masks(unit: str, p: float) -> None:
    """Rescaled, the mean over n masks is the weights, within five binomial standard deviations for each element."""
    draws, generator = 4000, torch.Generator().manual_seed(1)
    weights = torch.softmax(normal(4, 6), -1)
    keep = sample_keep((draws, 4, 6), p, unit=unit, generator=generator)
    assert keep.shape == (draws, 1 if unit == "key" else 4, 6)
    share = keep.double().mean(0)
    assert ((share - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / draws)).all()
    dropped = drop(weights.expand(draws, 4, 6), p, keep=keep, unit=unit, compensate="rescale")
    deviation = weights * math.sqrt(p / (1 - p) / draws)
    assert ((dropped.mean(0) - weights).abs() < 5 * deviation).all()
    plain = drop(weights.expand(draws, 4, 6), p, keep=keep, unit=unit, compensate="none")
    torch.testing.assert_close(plain, dropped * (1 - p))


def test_masks_are_independent_and_follow_the_generator() -> None:
    masks = [sample_keep((50, 60), 0.3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    agree = (masks[0] == masks[2]).double().mean()
    assert abs(agree - (0.7**2 + 0.3**2)) < 5 * math.sqrt(0.25 / 3000)
    a, b = masks[0][:, 1:].double() - 0.7, masks[0][:, :-1].double() - 0.7
    assert abs((a * b).mean()) < 5 * 0.21 / math.sqrt(a.numel())


def test_key_unit_takes_a_position_from_every_query() -> None:
    weights = torch.softmax(normal(2, 5, 9), -1)
    keep = sample_keep(weights.shape, 0.5, unit="key", generator=torch.Generator().manual_seed(0))
    gone = drop(weights, 0.5, keep=keep, unit="key") == 0
    assert torch.equal(gone, (~keep).expand_as(gone))


@pytest.mark.parametrize("dtype", DTYPES)
@fast
@given(problem=problems(), p=st.floats(0, 0.95), seed=st.integers(0, 10**6))
def test_compensations(dtype: torch.dtype, problem: tuple[Tensor, str], p: float, seed: int) -> None:
    scores, max_attention = problem[0].to(dtype), problem[1]
    keep = sample_keep(scores.shape, p, generator=torch.Generator().manual_seed(seed))
    weights = suppress(scores, max_attention, "clamp")
    bound, slack = thresholds(scores, max_attention), 1 + 4 * max(torch.finfo(dtype).eps, 1e-15)
    for compensate in COMPENSATIONS:
        dropped = drop(weights, p, keep=keep, compensate=compensate)
        assert dropped.dtype == dtype
        assert (dropped[~keep] == 0).all()
        if compensate == "none":
            assert torch.equal(dropped, torch.where(keep, weights, 0))
            assert (dropped.double() <= bound * slack).all()
        elif compensate == "rescale":
            torch.testing.assert_close(
                dropped.double(), torch.where(keep, weights, 0).double() / (1 - p), rtol=slack - 1, atol=1e-7
            )
            assert (dropped.double() <= bound / (1 - p) * slack).all()
        else:
            kept = torch.where(keep, weights, 0).double().sum(-1)
            some, none = kept > 1e-30, kept == 0  # in between, the smallest numbers of float32 may count as nothing
            before, after = weights.double().sum(-1), dropped.double().sum(-1)
            torch.testing.assert_close(after[some], before[some], rtol=20 * torch.finfo(dtype).eps, atol=1e-6)
            assert (after[none] == 0).all()


@pytest.mark.parametrize("compensate", COMPENSATIONS)
@pytest.mark.parametrize("suppression", SUPPRESSIONS)
def test_promised_bound(suppression: str, compensate: str) -> None:
    """`Refinement.bound` holds over many masks and is reached: T, T / (1 − p), or nothing."""
    refinement = Refinement("2/N", suppression, 0.5, compensate=compensate)
    scores = normal(8, 6, sigma=6)
    generator = torch.Generator().manual_seed(0)
    largest = max(
        refine(scores, keep=sample_keep(scores.shape, 0.5, generator=generator), **refinement.options).max().item()
        for _ in range(300)
    )
    assert largest <= refinement.bound(6) + 1e-12
    assert largest >= (0.5 if compensate == "renormalise" else 0.99) * refinement.bound(6)


# ------------------------------------------------------------------------------------------------ refined_attention

MASKS = ("none", "bool", "float", "bool broadcast", "row masked", "causal")


def attention_problem(mask: str, gqa: bool, lengths: tuple[int, int], dtype: torch.dtype = torch.float64) -> dict:
    queries, keys = lengths
    generator = torch.Generator().manual_seed(7)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    heads = 2 if gqa else 4
    call: dict = {"q": tensor(2, 4, queries, 8) * 2, "k": tensor(2, heads, keys, 8), "v": tensor(2, heads, keys, 5)}
    call["enable_gqa"] = gqa
    allowed = torch.rand((2, 4, queries, keys), generator=generator) < 0.7
    allowed[..., 0] = True
    if mask == "bool":
        call["attn_mask"] = allowed
    elif mask == "float":
        call["attn_mask"] = tensor(queries, keys).masked_fill(~allowed[0, 0], -INF)
    elif mask == "bool broadcast":
        call["attn_mask"] = allowed[:, :1, :1]
    elif mask == "row masked":
        allowed[:, :, 1] = False
        call["attn_mask"] = allowed
    elif mask == "causal":
        call["is_causal"] = True
    return call


def written_out(weigh: Callable[[Tensor], Tensor], call: dict, scale: float | None = None) -> Tensor:
    """Attention with one Python loop for each batch entry and head, ``weigh`` from scores to weights."""
    q, k, v = call["q"], call["k"], call["v"]
    queries, keys = q.shape[-2], k.shape[-2]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    mask = call.get("attn_mask")
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        source = h // (q.shape[1] // k.shape[1])
        scores = torch.einsum("ie,je->ij", q[b, h], k[b, source]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        for i, j in itertools.product(range(queries), range(keys)):
            if call.get("is_causal") and j > i:
                scores[i, j] = -INF
            if mask is not None:
                entry = mask.expand(*q.shape[:2], queries, keys)[b, h, i, j]
                scores[i, j] = (scores[i, j] if entry else -INF) if mask.dtype == torch.bool else scores[i, j] + entry
        out[b, h] = weigh(scores) @ v[b, source]
    return out


@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_neutral_attention_is_sdpa(mask: str, gqa: bool, lengths: tuple[int, int], scale: float | None) -> None:
    """Both the shortcut and the matrix, which an all-true ``keep`` or a T that nothing exceeds sends it through."""
    call = attention_problem(mask, gqa, lengths)
    expected = F.scaled_dot_product_attention(
        *(call[name] for name in "qkv"),
        scale=scale,
        **{name: value for name, value in call.items() if name not in "qkv"},
    )
    keep = torch.ones(lengths, dtype=torch.bool)
    assert torch.equal(refined_attention(**call, scale=scale), expected)
    for options in ({"keep": keep}, {"max_attention": "100/N"}, {"max_attention": 1 - 1e-16, "keep": keep}):
        actual = refined_attention(**call, scale=scale, **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("suppression", SUPPRESSIONS)
def test_refined_attention_written_out(suppression: str, mask: str, gqa: bool) -> None:
    call = attention_problem(mask, gqa, (5, 7))
    keep = sample_keep((2, 4, 5, 7), 0.3, generator=torch.Generator().manual_seed(0))
    options = {"max_attention": "2/N", "suppression": suppression}
    weighed = written_out(lambda scores: suppress(scores, **options), call, scale=0.9)
    torch.testing.assert_close(refined_attention(**call, scale=0.9, **options), weighed, rtol=0, atol=1e-12)

    queue = iter(keep.flatten(0, 1))
    weighed = written_out(lambda scores: suppress(scores, **options) * next(queue) / 0.7, call)
    actual = refined_attention(**call, **options, dropout=0.3, keep=keep, compensate="rescale")
    torch.testing.assert_close(actual, weighed, rtol=0, atol=1e-12)


def test_refined_attention_gradients() -> None:
    call = attention_problem("row masked", True, (3, 5))
    tensors = tuple(call.pop(name)[:1].requires_grad_() for name in "qkv")
    call["attn_mask"] = call["attn_mask"][:1]
    for suppression in SUPPRESSIONS:
        assert torch.autograd.gradcheck(
            lambda q, k, v, s=suppression: refined_attention(q, k, v, **call, max_attention="2/N", suppression=s),
            tensors,
        )


def test_refined_attention_broadcasts_and_takes_two_dimensions() -> None:
    q, k, v = normal(3, 1, 4, 8), normal(1, 2, 6, 8, seed=1), normal(6, 5, seed=2)
    whole = refined_attention(q, k, v, max_attention="2/N")
    assert whole.shape == (3, 2, 4, 5)
    torch.testing.assert_close(whole[2, 1], refined_attention(q[2, 0], k[0, 1], v, max_attention="2/N"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "float", "row masked"])
def test_refined_attention_in_half(dtype: torch.dtype, mask: str) -> None:
    call = attention_problem(mask, False, (6, 9), dtype)
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in call.items()}
    for suppression in SUPPRESSIONS:
        actual = refined_attention(**call, max_attention="2/N", suppression=suppression)
        assert actual.dtype == dtype
        expected = refined_attention(**exact, max_attention="2/N", suppression=suppression)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_patch_influence_is_bounded() -> None:
    """What MAS is for: however loud P keys shout, no output moves by more than P·T of the change of their values."""
    q, k, v = normal(1, 20, 8), normal(1, 40, 8, seed=1), normal(1, 40, 4, seed=2)
    k[:, :3] = 1000 * q.mean(1, keepdim=True).sign()
    other = v.clone()
    other[:, :3] += 1
    for suppression in SUPPRESSIONS:
        options = {"max_attention": "2/N", "suppression": suppression}
        moved = refined_attention(q, k, other, **options) - refined_attention(q, k, v, **options)
        assert moved.max() <= 3 * 2 / 40 + 1e-12
    assert (F.scaled_dot_product_attention(q, k, other) - F.scaled_dot_product_attention(q, k, v)).max() > 0.99


def test_own_dropout_of_the_function() -> None:
    q, k, v = normal(2, 50, 8), normal(2, 50, 8, seed=1), torch.ones(2, 50, 1).double()
    torch.manual_seed(0)
    sums = refined_attention(q, k, v, max_attention=0.999, dropout_p=0.5)
    assert 0.8 < sums.mean() < 1.2
    assert sums.std() > 0.1


# ---------------------------------------------------------------------------------------------------------- options


def test_resolve() -> None:
    assert resolve_max_attention(0.25, 3) == 0.25
    assert resolve_max_attention("4/N", 1024) == 4 / 1024
    assert resolve_max_attention(" 1.5 / N ", 6) == 0.25
    assert resolve_max_attention("4/N", 3) == 1.0
    assert resolve_max_attention("1e2/N", 400) == 0.25
    assert resolve_max_attention(np.float32(0.5), 3) == 0.5


def test_n_counts_the_keys_that_are_not_masked() -> None:
    scores = torch.zeros(1, 10)
    scores[0, 0], scores[0, 5:] = 5.0, -INF
    assert suppress(scores, "2/N").max() == torch.tensor(2 / 5)


def test_neutral_repr_and_equality() -> None:
    assert Refinement(1.0, dropout=0.0).neutral
    assert not Refinement().neutral
    assert not Refinement(1.0, dropout=0.1).neutral
    assert not Refinement("3/N", dropout=0.0).neutral
    refinement = Refinement("3/N", "cap", 0.2, "key", "none")
    assert eval(repr(refinement)) == refinement
    assert Refinement(**refinement.options) == refinement
    assert len({refinement, Refinement("3/N", "cap", 0.2, "key", "none")}) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_attention": 0}, ValueError, r"max_attention=0 is outside \(0, 1\].*'3/N'"),
        ({"max_attention": -0.5}, ValueError, r"max_attention=-0.5 is outside"),
        ({"max_attention": 3}, ValueError, r"max_attention=3 is outside .*'3/N'"),
        ({"max_attention": math.nan}, ValueError, r"max_attention=nan is outside"),
        ({"max_attention": True}, TypeError, r"max_attention=True is a bool.*'3/N'"),
        ({"max_attention": None}, TypeError, r"max_attention=None is a NoneType.*'3/N'"),
        ({"max_attention": "x/N"}, ValueError, r"max_attention='x/N' is malformed.*'3/N'"),
        ({"max_attention": "3/n"}, ValueError, r"max_attention='3/n' is malformed.*capital N"),
        ({"max_attention": "0/N"}, ValueError, r"max_attention='0/N' is malformed.*x > 0"),
        ({"max_attention": "-2/N"}, ValueError, r"max_attention='-2/N' is malformed"),
        ({"max_attention": "1e999/N"}, ValueError, r"malformed"),
        ({"max_attention": "0.1"}, ValueError, r"max_attention='0.1' is malformed.*without quotes"),
        (
            {"max_attention": "0.5/N", "suppression": "cap"},
            ValueError,
            r"'0.5/N' with suppression='cap'.*'1/N' or more",
        ),
        ({"suppression": "clmp"}, ValueError, r"suppression='clmp' is unknown: did you mean 'clamp'\?"),
        ({"suppression": "Temperature"}, ValueError, r"did you mean 'temperature'\?"),
        ({"suppression": "zzz"}, ValueError, r"suppression='zzz' is unknown: choose one of 'clamp', 'cap'"),
        ({"dropout": 1.0}, ValueError, r"dropout=1.0 is outside \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout=-0.1 is outside"),
        ({"dropout": math.nan}, ValueError, r"dropout=nan is outside"),
        ({"dropout": "0.1"}, TypeError, r"dropout='0.1' is a str"),
        ({"unit": "keys"}, ValueError, r"unit='keys' is unknown: did you mean 'key'\?"),
        ({"compensate": "renormalize"}, ValueError, r"did you mean 'renormalise'\?"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Refinement(**options)
    with pytest.raises(error, match=message):
        refine(torch.zeros(2, 3), **options)


def test_bad_tensors() -> None:
    scores = torch.zeros(2, 4, 5)
    with pytest.raises(TypeError, match=r"torch.int64"):
        refine(scores.long())
    with pytest.raises(ValueError, match=r"dropout=0.1 without keep"):
        refine(scores, dropout=0.1)
    with pytest.raises(TypeError, match=r"torch.float32.*bool"):
        drop(scores, 0.1, keep=torch.ones(4, 5))
    for shape in ((3, 5), (3, 2, 4, 5)):
        with pytest.raises(ValueError, match=r"does not broadcast to .*\(2, 4, 5\)"):
            drop(scores, 0.1, keep=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"unit='key'.*1, keys"):
        drop(scores, 0.1, keep=torch.ones(2, 4, 5, dtype=torch.bool), unit="key")
    for suppression in STOCHASTIC:
        with pytest.raises(ValueError, match=r"max_attention=0.1 .*at least 1/5 = 0.2.*'clamp' or 'scale'"):
            suppress(scores, 0.1, suppression)
    for suppression in ("clamp", "scale"):
        assert suppress(scores, 0.1, suppression).max() <= 0.1 + 1e-7
    with pytest.raises(ValueError, match=r"attn_mask .*is_causal"):
        refined_attention(scores, scores, scores, attn_mask=torch.ones(4, 4).bool(), is_causal=True)
    with pytest.raises(ValueError, match=r"4, 3 and 3 heads"):
        refined_attention(*(torch.zeros(h, 5, 8) for h in (4, 3, 3)), enable_gqa=True, max_attention="2/N")
