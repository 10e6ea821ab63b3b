"""Refined attention on a GPU: the Triton kernels beside scaled_dot_product_attention, the plain way, and the ceiling.

    python benchmarks/cuda_attention.py [--sizes 1024 2048 4096 8192 16384] [--dtypes bfloat16 float16 float32]

Each round runs every contender once, forward and backward, one after the other; shown are medians of a round's time and
of its ratio to scaled_dot_product_attention, and the peak of memory above what the inputs take.
Beside them the ceiling of attention itself: seven matrix products (two forward, five backward) at the rate of a large
matrix product on this GPU, and its inputs and outputs once at the rate of a large copy; float32 counts a product as
three of TF32 where these are faster. The kernels' own products: eleven, and one for each further step of `cap`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ramdefense import triton_attention
from ramdefense.refinement import refine

PRODUCTS = 7  # S, O; S again, dP, dV, dQ, dK
Pass = Callable[[], object]


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    operations: float
    bytes: float


def milliseconds(run: Pass) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median(run: Pass, rounds: int = 10) -> float:
    run()
    return statistics.median(milliseconds(run) for _ in range(rounds))


def rates(dtype: torch.dtype, device: str) -> Rates:
    """Measured: a product of 8192 × 8192 matrices of random numbers, and a copy of 1 GiB (read and written)."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    operations = 2 * 8192**3 / median(lambda: a @ b) * 1e3
    if dtype == torch.float32:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        operations = max(operations, 2 * 8192**3 / median(lambda: a @ b) * 1e3 / 3)
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    return Rates(operations, 2 * 4 * (1 << 28) / median(lambda: target.copy_(source)) * 1e3)


def ceiling(batch: int, heads: int, size: int, width: int, dtype: torch.dtype, found: Rates) -> float:
    """Milliseconds below which no forward and backward pass of attention can be: by operations or by bytes."""
    operations = PRODUCTS * 2 * batch * heads * size**2 * width
    tensors = 4 + 8  # q, k, v, o; then these, the gradient of o, and those of q, k and v
    moved = tensors * batch * heads * size * width * dtype.itemsize
    return 1e3 * max(operations / found.operations, moved / found.bytes)


def contenders(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, x: float, dropout: float) -> dict[str, Pass]:
    """A forward and backward pass of each; T is x/N."""
    scale = 1 / math.sqrt(q.shape[-1])
    seeds = torch.arange(q.shape[0], device=q.device)

    def fused() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

    def plain() -> object:
        weights = refine((q.float() * scale) @ k.float().transpose(-2, -1), max_attention=f"{x}/N", suppression="cap")
        return torch.autograd.grad(weights.to(v.dtype) @ v, (q, k, v), grad)

    def ours(suppression: str, p: float) -> Pass:
        options = {
            "scale": scale,
            "is_causal": False,
            "max_attention": x,
            "multiple": True,
            "suppression": suppression,
            "dropout": p,
            "unit": "element",
            "compensate": "rescale",
            "seeds": seeds,
            "straight_through": False,
        }

        @torch.no_grad()
        def run() -> object:
            out, stats = triton_attention.forward(q, k, v, None, **options)
            return triton_attention.backward(grad, q, k, v, None, out, stats, **options)

        return run

    named = {"scaled_dot_product_attention": fused}
    for suppression in ("clamp", "scale", "cap"):
        named[f"ours, {suppression}"] = ours(suppression, 0.0)
    named[f"ours, cap, p = {dropout}"] = ours("cap", dropout)
    return named | {"plain, cap": plain}


def measure(named: dict[str, Pass], rounds: int) -> dict[str, tuple[float, float, float] | None]:
    """(milliseconds, ratio to the first, peak memory in bytes) of each, or None where memory was short."""
    memory: dict[str, int] = {}
    for name, run in list(named.items()):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            run()
            run()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        torch.cuda.synchronize()
        memory[name] = torch.cuda.max_memory_allocated() - before
    times: dict[str, list[float]] = {name: [] for name in memory}
    for _ in range(rounds):
        for name, own in times.items():
            own.append(milliseconds(named[name]))
    first = times[next(iter(named))]
    return {
        name: (
            statistics.median(times[name]),
            statistics.median(a / b for a, b in zip(times[name], first, strict=True)),
            memory[name],
        )
        if name in memory
        else None
        for name in named
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64, help="E and Ev")
    parser.add_argument("--x", type=float, default=16.0, help="of T = x/N")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        console.print("No GPU here: torch.cuda.is_available() is False, so nothing was measured.")
        return
    name, width = torch.cuda.get_device_name(), arguments.width
    for dtype in (getattr(torch, text) for text in arguments.dtypes):
        found = rates(dtype, "cuda")
        table = Table(
            title=f"{name}, {dtype}, batch {arguments.batch}, {arguments.heads} heads of {width}, "
            f"T = {arguments.x:g}/N; {found.operations / 1e12:.0f} T operations/s, {found.bytes / 1e9:.0f} GB/s"
        )
        for column in ("N", "contender", "ms", "ratio", "MiB", "ratio", "ceiling, ms", "reached"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for size in arguments.sizes:
            shape = (arguments.batch, arguments.heads, size, width)
            q, k, v, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
            for tensor in (q, k, v):
                tensor.requires_grad_()
            best = ceiling(*shape, dtype, found)
            measured = measure(contenders(q, k, v, grad, arguments.x, arguments.dropout), arguments.rounds)
            reference = measured["scaled_dot_product_attention"]
            for contender, result in measured.items():
                if result is None or reference is None:
                    table.add_row(str(size), contender, "out of memory")
                    continue
                took, ratio, memory = result
                table.add_row(
                    str(size),
                    contender,
                    f"{took:.2f}",
                    f"{ratio:.2f}",
                    f"{memory / 2**20:.0f}",
                    f"{memory / reference[2]:.2f}",
                    f"{best:.2f}",
                    f"{best / took:.0%}",
                )
        console.print(table)


if __name__ == "__main__":
    main()
