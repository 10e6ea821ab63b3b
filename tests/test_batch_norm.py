"""A batch of one image has the gradient that it has among others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ramdefense import PyTorchSegmenter


class Tokens(nn.Module):
    """A convolutional stem with batch normalisation, then tokens: what a hybrid vision transformer begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens)).transpose(1, 2).reshape(len(x), 4, *x.shape[2:])


def gradient(logits: Tensor, images: Tensor) -> Tensor:
    weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return torch.autograd.grad((logits * weights).sum(), images)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_image_and_two(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    segmenter = PyTorchSegmenter(Tokens().to(dtype).eval(), nb_classes=4, input_shape=(3, 6, 8))
    one = torch.rand(1, 3, 6, 8, dtype=dtype, requires_grad=True)
    two = one.detach().repeat(2, 1, 1, 1).requires_grad_()
    alone, among = gradient(segmenter.logits(one), one), gradient(segmenter.logits(two), two)
    torch.testing.assert_close(alone[0], among[0])


def test_against_finite_differences() -> None:
    torch.manual_seed(0)
    segmenter = PyTorchSegmenter(Tokens().double().eval(), nb_classes=4, input_shape=(3, 3, 4))
    assert torch.autograd.gradcheck(segmenter.logits, torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True))
