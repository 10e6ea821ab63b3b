"""Small networks and how the trials train them, on a CPU in half a minute each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.networks import conv

WIDTH = 64  # features of `small_features`


def small_features(seed: int = 0) -> nn.Sequential:
    """Four convolutions: images ``(N, 3, H, W)`` in ``[0, 1]`` → features ``(N, 64)``."""
    with seeded(seed):
        return nn.Sequential(
            Centred(), conv(3, 16), conv(16, 32, stride=2), conv(32, 64, stride=2), conv(64, WIDTH),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip


def small_classifier(classes: int, seed: int = 0) -> nn.Sequential:
    """`small_features` and a linear layer: logits ``(N, classes)``."""
    with seeded(seed):
        return nn.Sequential(small_features(seed), nn.Linear(WIDTH, classes))


def small_segmenter(seed: int = 0) -> nn.Sequential:
    """Background or object for each cell of 2×2 pixels: ``(N, 3, H, W)`` → logits ``(N, 2, H/2, W/2)``."""
    with seeded(seed):
        return nn.Sequential(
            Centred(), conv(3, 16, stride=2), conv(16, 24), conv(24, 24, dilation=2), conv(24, 24, dilation=4),
            nn.Conv2d(24, 2, 1),
        )  # fmt: skip


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights drawn in this context depend on the seed alone, and torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Centred(nn.Module):
    """``[0, 1]`` → ``[−2, 2]``."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 4 - 2


Loss = Callable[[Tensor, Tensor], Tensor]


def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    lr: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
    loss: Loss = F.cross_entropy,
    before: Callable[[Tensor], Tensor] | None = None,
    eps: float = 0.0,
    steps: int = 3,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """Train a model in place, with AdamW under one cycle, on mirrored and moved batches; returned in `eval()` mode.

    Args:
        model: its parameters that require a gradient are trained.
        inputs, targets: all of them. Targets that are maps ``(N, H, W)`` are mirrored and moved (cyclically, by up to 4
            pixels) with the images.
        before: what happens to a batch of inputs before the model sees it (a mask), inside the attack as well.
        eps: adversarial training (Madry et al., ICLR 2018) in an L∞ ball of this radius, `steps` steps of 2 eps/steps
            from a random start; 0 is ordinary training.
        progress: called after each epoch with the share of the work that is done.

    Shape:
        inputs: ``(N, C, H, W)`` from 0 to 1; targets: int64, whatever `loss` takes
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=1e-3)
    total = epochs * -(-len(inputs) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)

    def forward(x: Tensor) -> Tensor:
        return model(x if before is None else before(x))

    for _ in range(epochs):
        for part in torch.randperm(len(inputs), generator=generator).split(batch_size):
            x, y = inputs[part], targets[part]
            if torch.rand((), generator=generator) < 0.5:
                x, y = x.flip(-1), y.flip(-1) if y.ndim == 3 else y
            moves = tuple((torch.randint(9, (2,), generator=generator) - 4).tolist())
            x, y = x.roll(moves, (-2, -1)), y.roll(moves, (-2, -1)) if y.ndim == 3 else y
            if eps:
                model.eval()
                x = _attacked(forward, x, y, loss, eps, steps, generator)
            model.train()
            optimizer.zero_grad()
            loss(forward(x), y).backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(1 / epochs)
    return model.eval()


def _attacked(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    eps: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    adversarial = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(forward(adversarial), y), adversarial)
        moved = adversarial.detach() + 2 * eps / steps * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, low), high)
    return adversarial
