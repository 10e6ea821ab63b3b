"""Small models that attend, for tasks that are not segmentation, and how the detector among them is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from evaluation.networks import conv
from evaluation.papers.learning import Centred, seeded

Target = dict[str, Tensor]
_WIDTH = 48  # of the detector's features


def small_vit(classes: int, size: int = 32, seed: int = 0) -> nn.Sequential:
    """timm's ViT, three layers on patches of 4×4: images ``(N, 3, size, size)`` from 0 to 1 → ``(N, classes)``.

    Its attention has (size / 4)² + 1 keys, one for the class token: 65 at 32×32.
    """
    with seeded(seed):
        vit = VisionTransformer(
            img_size=size, patch_size=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0, num_classes=classes
        )
        return nn.Sequential(Centred(), vit)


class AttendingBackbone(nn.Module):
    """Three convolutions of stride 2 and two transformer blocks: ``(N, 3, S, S)`` → ``(N, 48, S/8, S/8)``."""

    out_channels = _WIDTH

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Centred(), conv(3, 16, stride=2), conv(16, 32, stride=2), conv(32, _WIDTH, stride=2)
        )  # fmt: skip
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // 8) ** 2, _WIDTH))
        self.blocks = nn.Sequential(*(Block(_WIDTH, num_heads=3, mlp_ratio=2.0, mlp_layer=Mlp) for _ in range(2)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        tokens = self.blocks(features.flatten(2).transpose(1, 2) + self.places)
        return cast(Tensor, tokens.transpose(1, 2).reshape(features.shape))


def small_detector(classes: int, size: int = 64, seed: int = 0) -> FasterRCNN:
    """torchvision's Faster R-CNN on an `AttendingBackbone`, for square images of that side; class 0 is background."""
    with seeded(seed):
        return FasterRCNN(
            AttendingBackbone(size),
            min_size=size, max_size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3,
            rpn_anchor_generator=AnchorGenerator(((size // 4, size // 2, 3 * size // 4),), ((0.5, 1.0, 2.0),)),
            rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=40, rpn_pre_nms_top_n_test=60,
            rpn_post_nms_top_n_test=15, rpn_batch_size_per_image=64,
            box_roi_pool=MultiScaleRoIAlign(["0"], 4, 2), box_head=TwoMLPHead(_WIDTH * 16, 96),
            box_predictor=FastRCNNPredictor(96, classes + 1), box_batch_size_per_image=24, box_detections_per_img=5,
        )  # fmt: skip


def train_detector(
    model: nn.Module,
    images: Tensor,
    targets: list[Target],
    *,
    epochs: int,
    lr: float = 2e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """Train a torchvision detector in place on the sum of its losses, on mirrored batches; returned in `eval()` mode.

    Args:
        targets: for each image boxes ``(B, 4)`` as x1, y1, x2, y2 and labels ``(B,)``, as torchvision has them.
        progress: called after each epoch with the share of the work that this was.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    total = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    model.train()
    with seeded(seed):  # a detector samples its proposals with torch's own generator
        for _ in range(epochs):
            for part in torch.randperm(len(images)).split(batch_size):
                x, y = images[part], [targets[i] for i in part.tolist()]
                if torch.rand(()) < 0.5:
                    x, y = x.flip(-1), [mirrored(target, x.shape[-1]) for target in y]
                optimizer.zero_grad()
                sum(model(list(x), y).values()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
            if progress is not None:
                progress(1 / epochs)
    return model.eval()


def mirrored(target: Target, width: int) -> Target:
    """The target of a mirrored image."""
    left, top, right, bottom = target["boxes"].unbind(1)
    return {**target, "boxes": torch.stack((width - right, top, width - left, bottom), 1)}
