"""What refined attention costs beside `scaled_dot_product_attention`: time, memory, where it goes, and in whole models.

    python benchmarks/attention_cost.py [--tokens 2048,4096,8192] [--heads 2] [--width 32]

Forward and backward, float32. Each round runs every contender once, one after the other; shown are medians of the
rounds' ratios to `scaled_dot_product_attention`, of processor time. "matrix" is RAM written out, `kernel="plain"`.
Memory is the peak that a fresh process reaches above what it had with its inputs made. The last table is a whole
model at 512 × 512, logits and the gradient to the image.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peak import peak_above
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.networks import build_network
from ramdefense import harden, refined_attention
from ramdefense.rows import COMPILED
from ramdefense.streams import keep_of

WAYS: dict[str, dict[str, Any]] = {
    "scaled_dot_product_attention": {},
    "clamp, 16/N": {"max_attention": "16/N", "suppression": "clamp"},
    "cap, 16/N": {"max_attention": "16/N", "suppression": "cap"},
    "cap, 3/N": {"max_attention": "3/N", "suppression": "cap"},
    "cap, 16/N, p = 0.1": {"max_attention": "16/N", "suppression": "cap", "dropout": 0.1},
    "matrix: cap, 16/N, p = 0.1": {
        "max_attention": "16/N", "suppression": "cap", "dropout": 0.1, "kernel": "plain",
    },
}  # fmt: skip
LARGEST_MATRIX = 4096  # tokens, from which on the matrix is left out


def pass_of(way: str, tokens: int, heads: int, width: int) -> Callable[[], object]:
    """One forward and backward pass, of inputs that are made now."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, pull = (torch.randn(1, heads, tokens, width, generator=generator) for _ in range(4))
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    options = dict(WAYS[way])
    if "dropout" in options:
        shape = (1, heads, tokens, tokens)
        options["keep"] = keep_of(shape, options["dropout"], seed=0, draw=0, images=(0,), site="")
    attend = refined_attention if options else F.scaled_dot_product_attention
    return lambda: torch.autograd.grad(attend(q, k, v, **options), (q, k, v), pull)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def rounds_of(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """(seconds, ratio to the first), medians."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    first = next(iter(times.values()))
    return {
        name: (statistics.median(own), statistics.median(a / b for a, b in zip(own, first, strict=True)))
        for name, own in times.items()
    }


# ------------------------------------------------------------------------------------------------------------ memory


def peak_of(way: str, tokens: int, heads: int, width: int) -> int:
    """Bytes above what the process has with its inputs made; for a fresh process (Linux)."""
    work = pass_of(way, tokens, heads, width)
    small = pass_of(way, 64, heads, width)
    small()  # libraries take memory of their own at their first call
    return peak_above(work)


def peaks(ways: Sequence[str], tokens: int, heads: int, width: int) -> dict[str, int]:
    """`peak_of` in a process for each."""
    shape = [str(tokens), str(heads), str(width)]
    calls = {way: [sys.executable, __file__, "--peak", way, *shape] for way in ways}
    return {
        way: int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        for way, call in calls.items()
    }


# ---------------------------------------------------------------------------------------------------------- profile


def profile(tokens: int, heads: int, width: int) -> dict[str, float]:
    """Where a pass of cap and RAD spends its time, in percent."""
    work = pass_of("cap, 16/N, p = 0.1", tokens, heads, width)
    work()
    watch = cProfile.Profile()
    watch.enable()
    # the backward pass of one thread's graph runs in another; this one runs the operator itself
    with torch.autograd.set_multithreading_enabled(False):
        work()
    watch.disable()
    stats: Any = pstats.Stats(watch)
    taken = {name: own for (_, _, name), (_, _, own, _, _) in stats.stats.items()}
    parts = {
        "matrix products": ("method torch.bmm", "baddbmm_"),
        "rows, forwards": ("_rows.bound",),
        "rows, backwards": ("_rows.pull",),
    }
    found = {
        part: sum(own for name, own in taken.items() if any(word in name for word in words))
        for part, words in parts.items()
    }
    total = sum(taken.values())
    found["everything else"] = total - sum(found.values())
    return {part: 100 * own / total for part, own in found.items()}


# ------------------------------------------------------------------------------------------------------ whole models


def models() -> dict[str, nn.Module]:
    """The zoo's ViT, 4096 tokens of a 512 × 512 image, and timm's ViT-S/16, 1024."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return {
        "zoo's vit, 4096 tokens": build_network("vit", 11),
        "timm's ViT-S/16, 1024 tokens": VisionTransformer(img_size=512, embed_dim=384, depth=12, num_heads=6),
    }


def looks(model: nn.Module, image: Tensor) -> dict[str, Callable[[], object]]:
    """The model, hardened with the defaults, and without RAD."""
    plain = model.eval().requires_grad_(False)
    hardened, without_rad = harden(plain, example=image), harden(plain, example=image, dropout=0.0)
    each = {"plain": plain, "RAM": hardened, "RAM, p = 0": without_rad}

    def look(own: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(own(image).square().mean(), image)

    return {name: look(own) for name, own in each.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2048,4096,8192")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=4, metavar=("WAY", "TOKENS", "HEADS", "WIDTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, *shape = arguments.peak
        sys.stdout.write(str(peak_of(way, *map(int, shape))))
        return
    sizes = [int(text) for text in arguments.tokens.split(",")]
    shape = arguments.heads, arguments.width
    rows = "C" if COMPILED else "tensor operations (installed without a compiler)"
    where = f"{shape[0]} heads of {shape[1]}, {torch.get_num_threads()} thread(s), rows in {rows}"
    console = Console(width=120)

    time_table = Table(title=f"Time over scaled_dot_product_attention, {where}")
    memory_table = Table(title="Peak memory, MB, and over scaled_dot_product_attention")
    for table in (time_table, memory_table):
        table.add_column("tokens")
        for tokens in sizes:
            table.add_column(str(tokens), justify="right")
    ratios, memory = {}, {}
    for tokens in sizes:
        ways = [way for way in WAYS if tokens <= LARGEST_MATRIX or "matrix" not in way]
        ratios[tokens] = rounds_of({way: pass_of(way, tokens, *shape) for way in ways}, arguments.rounds)
        memory[tokens] = peaks([ways[0], *(way for way in ways if "p = 0.1" in way)], tokens, *shape)
    for way in WAYS:
        cells = [ratios[tokens].get(way) for tokens in sizes]
        first = way == next(iter(WAYS))
        texts = ["" if c is None else f"{c[0] * 1e3:.0f} ms" if first else f"{c[1]:.2f}" for c in cells]
        time_table.add_row(way, *texts)
        peak = [(memory[tokens].get(way), memory[tokens][next(iter(WAYS))]) for tokens in sizes]
        if any(own for own, _ in peak):
            memory_table.add_row(way, *("" if own is None else f"{own / 1e6:.0f} ({own / of:.2f})" for own, of in peak))
    console.print(time_table)
    console.print(memory_table)

    part_table = Table(title="Where a pass of cap, 16/N, p = 0.1 goes, percent")
    parts = {tokens: profile(tokens, *shape) for tokens in sizes[-2:]}
    part_table.add_column("tokens")
    for name in next(iter(parts.values())):
        part_table.add_column(name, justify="right")
    for tokens, taken in parts.items():
        part_table.add_row(str(tokens), *(f"{share:.0f}" for share in taken.values()))
    console.print(part_table)

    model_table = Table(title="A whole model at 512 × 512, over the plain one")
    for column in ("model", "plain, ms", "RAM", "RAM, p = 0"):
        model_table.add_column(column, justify="left" if column == "model" else "right")
    for name, model in models().items():
        image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found = rounds_of(looks(model, image), arguments.rounds)
        plain, *others = found.values()
        model_table.add_row(name, f"{plain[0] * 1e3:.0f}", *(f"{ratio:.2f}" for _, ratio in others))
    console.print(model_table)


if __name__ == "__main__":
    main()
