"""What RAM costs a ViT of 12 layers: watching its attention, and refining it.

    python benchmarks/overhead.py [--rounds 5]

Each round runs every model once, one after the other, so that a slow moment of the machine meets all of them; shown are
the medians of a round's time and of its ratio to the plain model, for a forward pass without gradients. "watched" is a
hardened model with the neutral refinement (T = 1, p = 0): each site is seen, and its function runs as it is.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from ramdefense import harden

SIZE = 224
VARIANTS: dict[str, dict[str, float | str]] = {
    "watched": {"max_attention": 1.0, "dropout": 0.0},
    "T = 3/N": {"max_attention": "3/N", "dropout": 0.0},
    "T = 3/N, p = 0.1": {"max_attention": "3/N", "dropout": 0.1},
}


def models() -> dict[str, nn.Module]:
    """A ViT-S/16 of timm (scaled_dot_product_attention), and one of torchvision (nn.MultiheadAttention)."""
    return {
        "timm ViT-S/16": VisionTransformer(embed_dim=384, depth=12, num_heads=6).eval(),
        "torchvision ViT-S/16": TorchvisionViT(SIZE, 16, 12, 6, 384, 1536).eval(),
    }


def seconds(model: nn.Module, images: Tensor) -> float:
    """Processor time on a CPU, which other work on the machine hardly touches; wall time on a GPU."""
    clock = time.perf_counter if images.is_cuda else time.process_time
    start = clock()
    with torch.no_grad():
        model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(plain: nn.Module, rounds: int) -> dict[str, tuple[float, float]]:
    """(seconds, ratio to the plain model) of each variant, medians over rounds."""
    device = next(plain.parameters()).device
    images = torch.rand(2, 3, SIZE, SIZE, device=device)
    contenders = {"plain": plain}
    for name, options in VARIANTS.items():
        contenders[name] = harden(plain, example=(3, SIZE, SIZE), **options)  # type: ignore[arg-type]
    for model in contenders.values():
        seconds(model, images)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, model in contenders.items():
            times[name].append(seconds(model, images))
    return {
        name: (
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, times["plain"], strict=True)),
        )
        for name, own in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    table = Table(title=f"2 images of {SIZE} x {SIZE}, {torch.get_num_threads()} thread(s), {arguments.device}")
    for column in ("model", "variant"):
        table.add_column(column)
    table.add_column("ms", justify="right")
    table.add_column("ratio", justify="right")
    for label, model in models().items():
        model.to(arguments.device).requires_grad_(False)
        for variant, (took, ratio) in measure(model, arguments.rounds).items():
            table.add_row(label, variant, f"{took * 1e3:.1f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
