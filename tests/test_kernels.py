"""Refined attention without its matrix: the same numbers as with it, at a memory of a few rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ramdefense import attention, harden, refined_attention, rows, tiles
from ramdefense.refinement import COMPENSATIONS, SUPPRESSIONS, UNITS, Refinement
from ramdefense.rows import Call, CompiledRows, PlainRows
from ramdefense.streams import Keep, Reader, drop_level, keep_of

compiled = pytest.mark.skipif(not rows.COMPILED, reason="installed without a compiler")
WAYS = [pytest.param(PlainRows, id="tensors"), pytest.param(CompiledRows, id="compiled", marks=compiled)]
MASKS = ("none", "bool", "float", "causal")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def cut(elements: int) -> None:
        monkeypatch.setattr(tiles, "_ELEMENTS", elements)
        monkeypatch.setattr(tiles, "_ROWS", 3)

    return cut


def problem(
    mask: str, dtype: torch.dtype, *, sigma: float = 2.0, shape: tuple[int, ...] = (2, 3, 13, 17)
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    *lead, queries, keys = shape

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    sizes = {"q": (queries, 8), "k": (keys, 8), "v": (keys, 5)}
    call: dict[str, Any] = {name: tensor(*lead, *size) for name, size in sizes.items()}
    call["q"] *= sigma
    if mask == "bool":
        call["attn_mask"] = torch.rand(lead[0], 1, queries, keys, generator=generator) < 0.7
        call["attn_mask"][0, 0, 2] = False  # one query sees nothing
        call["attn_mask"][0, 0, 3, 1:] = False  # one sees one key
    elif mask == "float":
        masked = torch.rand(queries, keys, generator=generator) < 0.3
        call["attn_mask"] = tensor(queries, keys).masked_fill(masked, -math.inf)
    call["is_causal"] = mask == "causal"
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in call.items()}


def with_gradients(call: dict[str, Any], **options: Any) -> list[Tensor]:
    """The result, and the gradients of a fixed functional of it."""
    leaves = {name: call[name].clone().requires_grad_() for name in "qkv"}
    out = refined_attention(**{**call, **leaves}, **options)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), pull)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], atol: float) -> None:
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=0, atol=atol * max(1.0, float(other.abs().max())))


# --------------------------------------------------------------------------------------------- the same as the matrix


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("suppression", SUPPRESSIONS)
@pytest.mark.parametrize("elements", [1 << 18, 200], ids=["whole images", "some rows"])
def test_every_option_as_with_the_matrix(
    elements: int, suppression: str, mask: str, small_tiles: Callable[[int], None]
) -> None:
    small_tiles(elements)
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        call = problem(mask, dtype)
        for p, unit, compensate in [(0.0, "element", "none"), *((0.3, u, c) for u in UNITS for c in COMPENSATIONS)]:
            options = Refinement("3/N", suppression, p, unit, compensate).options
            keep = keep_of((2, 3, 13, 17), p, seed=1, draw=0, images=(4, 7), site="x", unit=unit) if p else None
            for straight_through in (False, True):
                both = [
                    with_gradients(call, **options, keep=keep, straight_through=straight_through, kernel=kernel)
                    for kernel in ("fused", "plain")
                ]
                assert_same(*both, atol=atol)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suppression", ["clamp", "cap"])
@pytest.mark.parametrize("sigma", [0.1, 3.0, 40.0, 1000.0])
def test_float32_is_as_exact_as_plain_attention(
    sigma: float, suppression: str, way: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rows whose mass lies in one key; the reference is float64, the measure what SDPA itself is off by."""
    monkeypatch.setattr(tiles, "rows_of", lambda call, dtype: way(call))
    call = problem("none", torch.float32, sigma=sigma, shape=(1, 2, 60, 300))
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    options = Refinement("3/N", suppression, 0.0).options
    ours = with_gradients(call, **options, kernel="fused")
    reference = with_gradients(exact, **options, kernel="plain")
    off = [float((a - b).abs().max()) for a, b in zip(with_gradients(call), with_gradients(exact), strict=True)]
    for own, other, own_off in zip(ours, reference, off, strict=True):
        assert float((own - other).abs().max()) <= 4 * own_off + 4e-6 * float(other.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    call = problem("float", dtype)
    keep = keep_of((2, 3, 13, 17), 0.2, seed=1, draw=0, images=(0, 1), site="x")
    options = {**Refinement("3/N", "cap", 0.2).options, "keep": keep}
    ours = with_gradients(call, **options, kernel="fused")
    assert all(x.dtype == dtype for x in ours)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    assert_same(ours, with_gradients(exact, **options, kernel="plain"), atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 2), (3, 1), (2, 16384), (700, 9), (257, 1031)])
def test_sizes(queries: int, keys: int, way: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "rows_of", lambda call, dtype: way(call))
    shape = (2, 2, queries, keys)
    call = problem("none", torch.float32, shape=shape)
    keep = keep_of(shape, 0.1, seed=1, draw=0, images=(0, 1), site="x")
    for suppression in ("clamp", "cap"):
        options = {**Refinement("16/N", suppression, 0.1).options, "keep": keep}
        assert_same(*(with_gradients(call, **options, kernel=kernel) for kernel in ("fused", "plain")), atol=2e-5)


@pytest.mark.slow
def test_a_long_row_for_every_key() -> None:
    """N = 16384, where the matrix of one head has a gigabyte: some queries against float64."""
    call = problem("none", torch.float32, sigma=1.0, shape=(1, 1, 16384, 16384))
    out = refined_attention(**call, max_attention="16/N", suppression="cap")
    some = [0, 5000, 16383]
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    exact["q"] = exact["q"][..., some, :]
    expected = refined_attention(**exact, max_attention="16/N", suppression="cap", kernel="plain")
    torch.testing.assert_close(out[..., some, :].double(), expected, rtol=0, atol=1e-6)


def test_rows_that_only_the_plain_way_settles(small_tiles: Callable[[int], None]) -> None:
    """T so low that some rows may be uniform at best, and one row whose mass lies in few keys, far apart."""
    small_tiles(200)
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        call = problem("bool", dtype)
        call["q"][0, 0, 5] *= 1e4
        for options in ({"max_attention": 0.1}, {"max_attention": "1/N"}, {"max_attention": "2/N"}):
            both = [with_gradients(call, **options, suppression="cap", kernel=kernel) for kernel in ("fused", "plain")]
            assert_same(*both, atol=atol)


def test_shapes_that_broadcast() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator) for size in ((3, 1, 4, 8), (1, 2, 6, 8), (6, 5)))
    mask = torch.rand(2, 1, 6, generator=generator) < 0.8
    for tensors, attn_mask in (((q, k, v), mask), ((q[:, 0], k[0, :1], v), None), ((q[0, 0], k[0, 0], v), mask[0])):
        options = {"attn_mask": attn_mask, "max_attention": "2/N"}
        fused, plain = (refined_attention(*tensors, **options, kernel=kernel) for kernel in ("fused", "plain"))
        torch.testing.assert_close(fused, plain)
    views = (x.transpose(1, 2) for x in (torch.randn(2, 7, 3, 8, generator=generator) for _ in range(3)))
    q, k, v = views  # as timm hands them over
    torch.testing.assert_close(
        refined_attention(q, k, v, max_attention="2/N", kernel="fused"), refined_attention(q, k, v, max_attention="2/N")
    )


# --------------------------------------------------------------------------------------------------------- its masks


@given(st.lists(st.integers(1, 23), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 2**63 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_mask_read_in_parts_is_the_mask(parts: list[int], streams: int, seed: int) -> None:
    size = sum(parts)
    keep = Keep((streams, 1, size), 0.4, tuple((seed + 7 * i) % 2**63 for i in range(streams)))
    whole = keep.mask().view(-1)
    reader = Reader(size, keep.seeds)
    read = torch.cat([reader.read(part).clone() for part in parts * streams])
    assert torch.equal(read >= drop_level(0.4), whole)
    reader = Reader(size, keep.seeds)
    assert torch.equal(reader.read(size * streams) >= drop_level(0.4), whole)  # over the ends of streams


@compiled
def test_the_compiled_generator_is_that_of_torch() -> None:
    """More than one state of the Mersenne twister, odd rows, seeds above 32 bits, tiles over several streams."""
    keep = Keep((6, 1, 7, 401), 0.4, (3, 2**40 + 5, 2**63 - 1))
    call = Call((6, 1, 7, 401), None, False, Refinement(1.0, "clamp", 0.4), keep, False)
    ours = CompiledRows(call)
    parts = ((1, 3, 401), (1, 4, 401), (4, 7, 401), (1, 7, 401))
    read = torch.cat([ours.keep(torch.Size(part)).flatten() for part in parts])
    assert torch.equal(read, keep.mask().flatten())


def test_the_backward_pass_sees_the_mask_of_the_forward_pass() -> None:
    """With q = k = 0 and T = 1 the result is the mean of the kept values, so its gradient at v is the mask."""
    keep = keep_of((1, 2, 5, 40), 0.5, seed=3, draw=1, images=(0,), site="x")
    v = torch.ones(1, 2, 40, 1, requires_grad=True)
    zero = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 40, 4)
    out = refined_attention(*zero, v, max_attention="40/N", dropout=0.5, keep=keep, compensate="none", kernel="fused")
    (gradient,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(gradient[..., 0], keep.mask().float().sum(-2) / 40)


# ------------------------------------------------------------------------------------------------------ what it costs


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any function returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_as_large_as_the_matrix(way: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the keys and queries, sixteen times the matrix: no tensor grows by more than four."""
    monkeypatch.setattr(tiles, "rows_of", lambda call, dtype: way(call))
    monkeypatch.setattr(tiles, "_ELEMENTS", 1)
    monkeypatch.setattr(tiles, "_ROWS", 16)
    largest = []
    for n in (128, 512):
        call = problem("none", torch.float32, shape=(1, 2, n, n))
        keep = keep_of((1, 2, n, n), 0.1, seed=1, draw=0, images=(0,), site="x")
        what = Call((1, 2, n, n), None, False, Refinement("16/N", "cap", 0.1), keep, False)
        with Largest() as seen:
            out, numbers = tiles.attend(call["q"], call["k"], call["v"], what, 0.3)
            tiles.pull_back(out, call["q"], call["k"], call["v"], numbers, what, 0.3)
        largest.append(seen.elements)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 512 * 512 / 8


# ------------------------------------------------------------------------------------------------ operator, and door


def operands() -> tuple[Any, ...]:
    call = problem("none", torch.float64, shape=(1, 2, 5, 7))
    q, k, v = (call[name].requires_grad_() for name in "qkv")
    return q, k, v, None, torch.tensor([5]), False, 0.4, "2/N", "cap", 0.2, "element", "rescale", False


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.ramdefense.refined_attention.default, operands())
    q, k, v, mask, seeds, *options = operands()
    q, k, v = (x.detach() for x in (q, k, v))
    out, numbers = torch.ops.ramdefense.refined_attention(q, k, v, mask, seeds, *options)
    arguments = (torch.ones_like(out), out, numbers, q, k, v, mask, seeds, *options)
    torch.library.opcheck(torch.ops.ramdefense.refined_attention_backward.default, arguments)
    attend = torch.ops.ramdefense.refined_attention
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask, seeds, *options)[0], operands()[:3])


def test_compiles_in_one_graph() -> None:
    call = problem("none", torch.float32)
    keep = keep_of((2, 3, 13, 17), 0.2, seed=1, draw=0, images=(0, 1), site="x")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return refined_attention(2 * q, k, v, max_attention="3/N", dropout=0.2, keep=keep, kernel="fused")

    q, k, v = (call[name].requires_grad_() for name in "qkv")
    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), torch.autograd.grad(attend(q, k, v).sum(), q))


@pytest.mark.parametrize(("built", "dtype", "n", "expected"), [
    (True, torch.float32, 9, True),
    (True, torch.float64, 9, False),
    (False, torch.float32, 1000, False),
    (False, torch.float32, 1024, True),
    (True, torch.float64, 1024, True),
])  # fmt: skip
def test_which_way_is_taken(
    built: bool, dtype: torch.dtype, n: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    fused = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda *args: taken.append(True) or fused(*args))
    monkeypatch.setattr(attention, "COMPILED", built)
    x = torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    refined_attention(x, x, x, max_attention="3/N")
    assert bool(taken) == expected
    taken.clear()
    refined_attention(x, x, x, max_attention="3/N", attn_mask=torch.zeros(n, n, requires_grad=True, dtype=dtype))
    refined_attention(x, x, x, max_attention="3/N", kernel="plain")
    assert not taken


def test_what_it_refuses() -> None:
    x = torch.zeros(1, 1, 4, 4)
    bias, keep = torch.zeros(4, 4, requires_grad=True), torch.ones(4, 4, dtype=torch.bool)
    for options, word in (
        ({"dropout_p": 0.5}, "dropout_p=0.5"),
        ({"keep": keep, "dropout": 0.1}, "keep is a whole mask"),
        ({"attn_mask": bias}, "attn_mask wants a gradient"),
    ):
        with pytest.raises(ValueError, match=f"kernel='fused' cannot take this call: {word}"):
            refined_attention(x, x, x, max_attention="2/N", kernel="fused", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kernel='quick' is unknown"):
        refined_attention(x, x, x, max_attention="2/N", kernel="quick")  # type: ignore[arg-type]
    y = torch.randn(1, 1, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(
        refined_attention(y, y, y, max_attention="2/N", kernel="fused").sum(), y, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(slope.sum(), y)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(*tokens.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(4 * q, k, v).transpose(1, 2).reshape(tokens.shape)


def test_a_hardened_model_gives_the_same_either_way() -> None:
    torch.manual_seed(0)
    hardened = harden(Attending(), example=(6, 5, 7), max_attention="3/N", dropout=0.3)
    images = torch.randn(2, 6, 5, 7, requires_grad=True)
    results = []
    for kernel in ("fused", "plain"):
        model = copy.deepcopy(hardened)
        model.kernel = kernel  # type: ignore[assignment]
        out = model(images)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), images)])
    assert_same(*results, atol=1e-5)
