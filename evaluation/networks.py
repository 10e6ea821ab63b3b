"""The zoo's architectures: five families that differ in how far one output pixel can look.

They are small on purpose (trained from scratch on a few hundred frames, attacked on a CPU) and built from the blocks
of timm, torchvision and segmentation-models-pytorch, so that what is measured on them is how those libraries attend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Padded(nn.Module):
    """Runs a network whose strides must divide the image: pads right and bottom, crops the logits.

    Shape: images ``(N, 3, H, W)`` → logits ``(N, C, H, W)``, any H and W.
    """

    def __init__(self, body: nn.Module, multiple: int) -> None:
        super().__init__()
        self.body, self.multiple = body, multiple

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padding = (-width % self.multiple, -height % self.multiple)
        padded = F.pad(images, (0, padding[0], 0, padding[1]), mode="replicate") if any(padding) else images
        logits = self.body(padded)
        if logits.shape[-2:] != padded.shape[-2:]:
            logits = F.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


def conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, width: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.first = conv(width, width, dilation=dilation)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class NonLocal(nn.Module):
    """Embedded-Gaussian non-local block (Wang et al., CVPR 2018): every position attends to every other.

    Shape: ``(N, C, H, W)`` → the same.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.theta(x).flatten(2).transpose(1, 2)
        keys = self.phi(x).flatten(2)
        values = self.g(x).flatten(2).transpose(1, 2)
        scores = queries @ keys * queries.shape[-1] ** -0.5
        attended = scores.softmax(dim=-1) @ values
        return x + self.out(attended.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:]))


class Fusion(nn.Module):
    """Light decoder: 1×1 to one width, everything at the finest scale, added, one 3×3, classes."""

    def __init__(self, widths: list[int], width: int, nb_classes: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.head = nn.Sequential(conv(width, width), nn.Dropout2d(0.1), nn.Conv2d(width, nb_classes, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        mixed = self.lateral[0](features[0])
        for lateral, feature in zip(self.lateral[1:], features[1:], strict=True):
            mixed = mixed + F.interpolate(lateral(feature), size, mode="bilinear", align_corners=False)
        return self.head(mixed)


class ConvNet(nn.Module):
    """Residual CNN at strides 4 and 8; with ``attention`` a non-local block after its deepest stage."""

    def __init__(self, nb_classes: int, *, attention: bool, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = widths
        self.fine = nn.Sequential(conv(3, a, stride=2), conv(a, b, stride=2), Residual(b))
        deep: list[nn.Module] = [conv(b, c, stride=2), Residual(c), Residual(c, dilation=2)]
        if attention:
            deep += [NonLocal(c, c), Residual(c)]
        else:
            deep += [Residual(c)]
        self.deep = nn.Sequential(*deep)
        self.decoder = Fusion([b, c], 48, nb_classes)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        return self.decoder([fine, self.deep(fine)])


class PositionEmbedding(nn.Module):
    """Learned positions on a grid, resampled bicubically to another grid."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(1, width, *grid))
        nn.init.trunc_normal_(self.grid, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == self.grid.shape[-2:]:
            return x + self.grid
        return x + F.interpolate(self.grid, x.shape[-2:], mode="bicubic", align_corners=False)


class ViTSegmenter(nn.Module):
    """Global self-attention throughout (timm's ViT blocks), and a decoder that sees nothing but the tokens.

    A convolutional stem (Xiao et al., NeurIPS 2021) of stride 8 trains from scratch where a linear patch embedding
    does not. No skip connection passes the attention by.
    """

    def __init__(
        self, nb_classes: int, *, width: int = 128, depth: int = 4, heads: int = 4, grid: tuple[int, int] = (15, 20)
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.stem = nn.Sequential(
            conv(3, 24, stride=2), conv(24, 48, stride=2), nn.Conv2d(48, width, 2, stride=2), nn.BatchNorm2d(width)
        )
        self.position = PositionEmbedding(width, grid)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio=3.0, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Sequential(nn.Conv2d(width, 48 * 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(48), nn.ReLU())
        self.head = nn.Sequential(conv(48, 48), nn.Dropout2d(0.1), nn.Conv2d(48, nb_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.position(self.stem(images))
        tokens = self.norm(self.blocks(x.flatten(2).transpose(1, 2)))
        return self.head(self.up(tokens.transpose(1, 2).reshape(x.shape)))


class SwinSegmenter(nn.Module):
    """Windowed attention with shifts (torchvision's Swin blocks) at strides 4 and 8, decoder over both scales."""

    def __init__(
        self,
        nb_classes: int,
        *,
        width: int = 48,
        depths: tuple[int, int] = (2, 4),
        heads: tuple[int, int] = (2, 4),
        window: int = 5,
    ) -> None:
        from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock

        super().__init__()

        def stage(dim: int, depth: int, heads: int) -> nn.Sequential:
            shifts = [0 if i % 2 == 0 else window // 2 for i in range(depth)]
            return nn.Sequential(
                *(SwinTransformerBlock(dim, heads, [window] * 2, [s] * 2, mlp_ratio=2.0) for s in shifts)
            )

        self.stem = nn.Sequential(conv(3, 32, stride=2), nn.Conv2d(32, width, 2, stride=2), nn.BatchNorm2d(width))
        self.fine = stage(width, depths[0], heads[0])
        self.merge = PatchMerging(width)
        self.deep = stage(2 * width, depths[1], heads[1])
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(2 * width)])
        self.decoder = Fusion([width, 2 * width], 48, nb_classes)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.stem(images).permute(0, 2, 3, 1))
        deep = self.deep(self.merge(fine))
        return self.decoder([norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, (fine, deep), strict=True)])


def _segformer(nb_classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    body = smp.Segformer("mit_b0", encoder_weights=None, decoder_segmentation_channels=64, classes=nb_classes)
    return Padded(body, 32)


#: Architecture → network with that many classes. Names are the zoo's.
ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "cnn": lambda n: Padded(ConvNet(n, attention=False), 8),
    "nonlocal": lambda n: Padded(ConvNet(n, attention=True), 8),
    "swin": lambda n: Padded(SwinSegmenter(n), 8),
    "segformer": _segformer,
    "vit": lambda n: Padded(ViTSegmenter(n), 8),
}


def build_network(architecture: str, nb_classes: int) -> nn.Module:
    """A freshly initialised network of the zoo.

    Raises:
        ValueError: an unknown architecture; the message lists the known ones.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](nb_classes)
