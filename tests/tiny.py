"""Models and data small enough for a test; importable, so that they can be pickled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

NB_CLASSES = 4
SHAPE = (3, 16, 20)  # height and width differ, so that a swap of the two shows


def tiny_cnn(nb_classes: int = NB_CLASSES, seed: int = 0) -> nn.Sequential:
    """Three convolutions with batch norm and dropout, so that training mode and evaluation mode differ."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.Conv2d(8, nb_classes, 1),
    )


def linear_cnn(nb_classes: int = NB_CLASSES, seed: int = 0) -> nn.Conv2d:
    """One 3×3 convolution: a dense linear model, whose optimal patch has a closed form."""
    torch.manual_seed(seed)
    return nn.Conv2d(3, nb_classes, 3, padding=1)


class TinyAttention(nn.Module):
    """Patches of 4×4, one explicit multi-head self-attention over all of them, logits at a quarter of the size."""

    def __init__(self, nb_classes: int = NB_CLASSES, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Conv2d(width, nb_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.embed(images)
        tokens = features.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.head((tokens + mixed).transpose(1, 2).reshape(features.shape))


def tiny_attention(seed: int = 0) -> TinyAttention:
    """A `TinyAttention` with seeded weights."""
    torch.manual_seed(seed)
    return TinyAttention()


def random_images(number: int = 5, seed: int = 0) -> Tensor:
    """(number, *SHAPE) uniform in [0, 1]."""
    return torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


def random_labels(number: int = 5, seed: int = 1, void: bool = True) -> Tensor:
    """(number, H, W) uniform over the classes; with `void`, the two upper rows are 255."""
    labels = torch.randint(0, NB_CLASSES, (number, *SHAPE[1:]), generator=torch.Generator().manual_seed(seed))
    if void:
        labels[:, :2] = 255
    return labels


def coloured_shapes(number: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A task that can be learnt: rectangles in red, green or blue (classes 1 to 3) on grey (class 0), with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((number, *SHAPE), 0.4)
    labels = torch.zeros(number, *SHAPE[1:], dtype=torch.int64)
    for i in range(number):
        for colour in torch.randperm(3, generator=generator).tolist():
            top, left = (int(torch.randint(0, size - 6, (), generator=generator)) for size in SHAPE[1:])
            area = (slice(top, top + 6), slice(left, left + 6))
            images[i][:, *area] = 0.2
            images[i][colour, *area] = 0.8
            labels[i][area] = colour + 1
    return (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1), labels


def files(folder: Path) -> dict[str, bytes]:
    """What a run keeps; without what tells how long it took, which no two runs share."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    timed = {"summary.csv", "summary.json", "report.html", "times"}
    return {str(path): (folder / path).read_bytes() for path in paths if not timed & set(path.parts)}
