"""One look of an attack (forward pass, and gradient to the patch) in full, and where the patch can change something.

    python benchmarks/partial.py [--networks cnn,vit] [--sizes 512x1024] [--patches 40,200]
        [--places corner,middle]

Freshly built networks of the zoo, a patch of noise in the lower right corner or in the middle. Each round runs both
looks, one after the other, so that a slow moment of the machine meets both. "local calls" are those of the functions
that see the patch which are computed inside a box; "operations" is the share of the multiply-adds of a forward pass
that is left, the ceiling; "time" the median ratio partial / full; "setup" the clean pass and the comparison with a full
one, in full looks; "error" the largest difference of the logits, over the largest logit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evaluation.networks import ARCHITECTURES, build_network
from ramdefense.locality import Box, Span
from ramdefense.partial import NotPartialError, PartialForward

CLASSES = 11


def seconds(work: Callable[[], object], cuda: bool) -> float:
    """Processor time on a CPU, which other work on the machine hardly touches; wall time on a GPU."""
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    work()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def look(forward: Callable[[Tensor], Tensor], images: Tensor, patch: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Logits and the gradient to the patch, as the loop of attacks asks for them."""
    leaf = patch.detach().requires_grad_()
    pasted = images.clone()
    pasted[..., slice(*box.rows), slice(*box.columns)] = leaf
    logits = forward(pasted)
    return logits.detach(), torch.autograd.grad(logits.square().mean(), leaf)[0]


def place(size: tuple[int, int], side: int, where: str) -> Box:
    tops = [n - side if where == "corner" else (n - side) // 2 for n in size]
    return Box(*(Span(top, top + side) for top in tops))


def measured(
    architecture: str, size: tuple[int, int], side: int, where: str, count: int, rounds: int, device: str
) -> list[str]:
    """The cells of one line."""
    torch.manual_seed(0)
    network = build_network(architecture, CLASSES).eval().to(device)
    images, patch = torch.rand(count, 3, *size, device=device), torch.rand(count, 3, side, side, device=device)
    box, cuda = place(size, side, where), device != "cpu"
    full = seconds(lambda: look(network, images, patch, box), cuda)
    try:
        made: list[PartialForward] = []
        setup = seconds(lambda: made.append(_set_up(network, images, box)), cuda)
    except NotPartialError:
        return ["none", f"{full * 1e3:.0f}", "1.00", "1.00", "", ""]
    partial = made[0]
    (own, _), (value, _) = (look(forward, images, patch, box) for forward in (partial.attempt, network))
    error = float((own - value).abs().max() / value.abs().max())
    ratios, fulls = [], []
    for _ in range(rounds):
        fulls.append(seconds(lambda: look(network, images, patch, box), cuda))
        ratios.append(seconds(lambda: look(partial.attempt, images, patch, box), cuda) / fulls[-1])
    return [
        f"{partial.local_calls}/{partial.calls}",
        f"{statistics.median(fulls) * 1e3:.0f}",
        f"{partial.share:.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{setup / statistics.median(fulls):.1f}",
        f"{error:.0e}",
    ]


def _set_up(network: Callable[[Tensor], Tensor], images: Tensor, box: Box) -> PartialForward:
    partial = PartialForward(network, images, box)
    partial.check(torch.rand_like(images).where(_inside(images, box), images))
    return partial


def _inside(images: Tensor, box: Box) -> Tensor:
    mask = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    box.of(mask).fill_(True)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--networks", default="cnn,nonlocal,swin,vit", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--sizes", default="120x160,256x512")
    parser.add_argument("--patches", default="40,100")
    parser.add_argument("--places", default="corner")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    threads = f"{torch.get_num_threads()} thread(s)"
    table = Table(title=f"Partial over full look, {arguments.images} image(s), {threads}, {arguments.device}")
    columns = ("network", "image", "patch", "place", "local calls", "full, ms", "operations", "time", "setup", "error")
    for column in columns:
        table.add_column(column, justify="left" if column in ("network", "place") else "right")
    for architecture in arguments.networks.split(","):
        for text in arguments.sizes.split(","):
            height, width = map(int, text.split("x"))
            for side in map(int, arguments.patches.split(",")):
                for where in arguments.places.split(","):
                    if side <= min(height, width):
                        given = arguments.images, arguments.rounds, arguments.device
                        line = measured(architecture, (height, width), side, where, *given)
                        table.add_row(architecture, text, str(side), where, *line)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
