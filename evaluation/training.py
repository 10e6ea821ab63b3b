"""Training of the zoo: one small recipe file in, half-precision weights and a card with their scores out.

Several processes (torchrun, `srun`) share each batch: its gradient is that of the whole batch, all-reduced by
`DistributedDataParallel`. Batch norm sees the whole batch on GPUs (`SyncBatchNorm`) and each process's share of it on
CPUs, and dropout draws otherwise in each process; a network without both trains as in one process, up to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.datasets import load_data, stack
from evaluation.frames import IGNORE_INDEX, SegmentationData
from evaluation.metrics import confusion, counted_pixels, mean_iou, merge, pixel_accuracy
from evaluation.networks import build_network
from ramdefense.outputs import logits_of
from ramdefense.processes import Launch, group, rank, share, total, world

logger = logging.getLogger(__name__)

#: ImageNet's statistics, the habit of the field; the segmenter normalises with them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run.

    Args:
        architecture: a name of `evaluation.networks.ARCHITECTURES`.
        train, val, test: data by name, as `evaluation.datasets.load_data` takes it; ``{data}`` in it stands for the
            folder given on the command line.
        size: ``(height, width)`` that the network is trained and scored at.
        steps: optimiser steps; batch_size: frames in each.
        lr: peak learning rate of AdamW under a one-cycle schedule; weight_decay: its decay.
        scale: range of the random zoom before cropping, relative to ``size``.
        average: decay of the moving average of the weights; the average is what is scored and kept.
        class_balance: exponent γ of the loss weights ``frequency ** -γ``, so that poles count beside roads.
        every: steps between two validations; the best validation mIoU is kept.
        seed: of everything random.
        citation: of the data; copied into the card.
    """

    architecture: str
    train: str
    val: str
    test: str
    size: tuple[int, int] = (120, 160)
    steps: int = 2000
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.02
    scale: tuple[float, float] = (0.8, 1.6)
    average: float = 0.995
    class_balance: float = 0.25
    every: int = 200
    seed: int = 0
    citation: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a YAML recipe.

        Raises:
            ValueError: a key that no recipe has, or a missing one; the message lists them.
        """
        values = yaml.safe_load(Path(path).read_text())
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if not isinstance(values, dict) or set(values) - known or required - set(values):
            given = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"{path}: keys {given}; a recipe needs {sorted(required)} and may have {sorted(known)}")
        for key in ("size", "scale"):
            if key in values:
                values[key] = tuple(values[key])
        return cls(**values)


def _in_memory(data: SegmentationData) -> tuple[Tensor, Tensor]:
    images, labels, _ = stack(data, range(len(data)))
    return (images * 255).round().to(torch.uint8), labels.to(torch.uint8)


class _Augment:
    """Zoom, crop, flip and light, drawn for each frame of a batch from an own generator."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator) -> None:
        self.size, self.scale, self.generator = size, scale, generator

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, generator=self.generator) * (high - low) + low

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.part(images, labels, slice(None))

    def part(self, images: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of the batch, drawn as all of it is."""
        count = images.shape[0]
        zoom = self._uniform(count, *self.scale)
        flip = torch.where(torch.rand(count, generator=self.generator) < 0.5, -1.0, 1.0)
        slack = (1 - 1 / zoom).clamp_min(0)  # the crop stays inside the frame; a zoom under 1 shows the border as void
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = flip / zoom, 1 / zoom
        theta[:, 0, 2] = self._uniform(count, -1, 1) * slack
        theta[:, 1, 2] = self._uniform(count, -1, 1) * slack
        shape = (count, 1, 1, 1)
        contrast = self._uniform(count, 0.7, 1.3).view(shape)[rows]
        brightness = self._uniform(count, -0.15, 0.15).view(shape)[rows]
        tint = self._uniform(count * 3, -0.05, 0.05).view(count, 3, 1, 1)[rows]

        theta, images, labels = theta[rows], images[rows], labels[rows]
        grid = F.affine_grid(theta, [len(theta), 3, *self.size], align_corners=False)
        image = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
        outside = (grid.abs() > 1).any(dim=-1)
        label = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
        label = label[:, 0].round().long().masked_fill(outside, IGNORE_INDEX)
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        return ((image - mean) * contrast + mean + brightness + tint).clamp_(0, 1), label


def _normalise(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def score(model: nn.Module, data: SegmentationData, *, batch_size: int = 16) -> dict[str, float]:
    """mIoU and pixel accuracy (both 0–1) of a network over a data set, from summed confusion counts.

    In a process group each process looks at its share of the batches, and all have the scores.
    """
    model.eval()
    device = _device_of(model)
    counts = [np.zeros((1, len(data.classes), len(data.classes)), dtype=np.int64)]
    for start in share(range(0, len(data), batch_size)):
        images, labels, _ = stack(data, range(start, min(start + batch_size, len(data))))
        size = (labels.shape[-2], labels.shape[-1])
        prediction = logits_of(model(_normalise(images).to(device)), size).argmax(dim=1).cpu()
        counted = counted_pixels(labels, ignore_index=IGNORE_INDEX)
        counts.append(confusion(labels, prediction, counted, nb_classes=len(data.classes)))
    summed = total(torch.from_numpy(merge(np.concatenate(counts))).to(device)).cpu().numpy()
    return {"miou": mean_iou(summed), "pixel_accuracy": pixel_accuracy(summed)}


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _InMemory:
    """A data set decoded once."""

    def __init__(self, data: SegmentationData) -> None:
        self.classes, self.colors = data.classes, data.colors
        self.frames = [data[i] for i in range(len(data))]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Any:
        return self.frames[index]


def train(
    recipe: Recipe,
    *,
    data: str = "",
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    device_type: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a zoo network from scratch; several processes that were started together do it together.

    Args:
        recipe: what to do; its ``batch_size`` is that of all processes together.
        data: folder that ``{data}`` in the recipe's data names stands for.
        progress: called as ``progress(step, steps, figures)`` after every step; ``figures`` holds the loss, and the
            validation scores where they were just taken.
        device_type: ``"cpu"`` or ``"gpu"``; ``None``: a GPU where there is one.

    Returns:
        The network in half-precision-rounded float32, on the CPU, and its card: recipe, scores, parameters, versions,
        seconds; the same in every process, but for the seconds.

    Raises:
        ValueError: fewer frames in a batch than processes.
    """
    launch = Launch.of()
    if recipe.batch_size < launch.world:
        raise ValueError(
            f"batch_size={recipe.batch_size} for {launch.world} processes: at least a frame for each; take fewer "
            "processes, or a larger batch_size in the recipe"
        )
    gpu = device_type != "cpu" and torch.cuda.is_available()
    with group(launch, "gpu" if gpu else "cpu"):
        return _train(recipe, data, progress, torch.device("cuda", torch.cuda.current_device()) if gpu else _CPU)


_CPU = torch.device("cpu")


def _train(
    recipe: Recipe,
    data: str,
    progress: Callable[[int, int, dict[str, float]], None] | None,
    device: torch.device,
) -> tuple[nn.Module, dict[str, Any]]:
    train_set, val_set, test_set = (
        load_data(name.format(data=data), size=size)
        for name, size in (
            # half as large again, so that a zoomed crop is no blur
            (recipe.train, (recipe.size[0] * 3 // 2, recipe.size[1] * 3 // 2)),
            (recipe.val, recipe.size),
            (recipe.test, recipe.size),
        )
    )
    val_set = _InMemory(val_set)
    images, labels = _in_memory(train_set)
    nb_classes = len(train_set.classes)
    generator = torch.Generator().manual_seed(recipe.seed)
    augment = _Augment(recipe.size, recipe.scale, generator)
    frequency = torch.bincount(labels.flatten().long(), minlength=256)[:nb_classes].float()
    weight = (frequency / frequency.sum()).clamp_min(1e-4) ** -recipe.class_balance
    weight = weight / weight.mean()

    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from the global generator
        torch.manual_seed(recipe.seed)
        model = build_network(recipe.architecture, nb_classes).to(device)
        averaged = copy.deepcopy(model)
        step_model = model
        if world() > 1:
            model, step_model = _shared(model)
            torch.manual_seed(recipe.seed + rank())  # dropout differs between the shares of a batch
        optimizer = torch.optim.AdamW(_decay_groups(model, recipe.weight_decay), lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
        weight = weight.to(device)
        best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        started = time.perf_counter()
        order = torch.empty(0, dtype=torch.long)
        for step in range(1, recipe.steps + 1):
            if len(order) < recipe.batch_size:
                order = torch.cat([order, torch.randperm(len(images), generator=generator)])
            chosen, order = order[: recipe.batch_size], order[recipe.batch_size :]
            x, y = augment.part(images[chosen], labels[chosen], slice(rank(), None, world()))
            model.train()
            logits = logits_of(step_model(_normalise(x).to(device)), recipe.size)
            loss = _loss(logits, y.to(device), weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            _average_statistics(model)
            _average(averaged, model, min(recipe.average, (1 + step) / (10 + step)))
            figures = {"loss": float(total(loss.detach())) / world()}
            if step % recipe.every == 0 or step == recipe.steps:
                scores = score(averaged, val_set)
                figures |= {f"val_{name}": value for name, value in scores.items()}
                if scores["miou"] > best[0]:
                    best = scores["miou"], {k: v.clone() for k, v in averaged.state_dict().items()}
            if progress is not None:
                progress(step, recipe.steps, figures)

    # what ships is half precision, so what is scored is what ships
    averaged.load_state_dict({k: v.half().to(v.dtype) if v.is_floating_point() else v for k, v in best[1].items()})
    model = averaged.eval()
    card = {
        "recipe": dataclasses.asdict(recipe),
        "classes": list(train_set.classes),
        "size": list(recipe.size),
        "mean": list(MEAN),
        "std": list(STD),
        "val": score(model, val_set),
        "test": score(model, test_set),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
    }
    return model.cpu(), card


def _shared(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The network as it is trained by several processes, and the same wrapped so that gradients are means over them."""
    device = _device_of(model)
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # without its broadcast of buffers: the first process's statistics would be everyone's (`_average_statistics`)
    return model, nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )


def _loss(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy, the weighted mean over the pixels of the whole batch; in one of several processes, such that the
    mean over the processes is it."""
    if world() == 1:
        return F.cross_entropy(logits, y, weight=weight, ignore_index=IGNORE_INDEX)
    counted = y[y != IGNORE_INDEX]
    summed = F.cross_entropy(logits, y, weight=weight, ignore_index=IGNORE_INDEX, reduction="sum")
    return summed * world() / total(weight[counted].sum())


@torch.no_grad()
def _average_statistics(model: nn.Module) -> None:
    """Running statistics of batch norm: the mean of what the processes have, each from its share of the batch."""
    if world() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(total(buffer) / world())


def _decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels alone, not on norms, biases and positions."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "position" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "position" in n]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def save(model: nn.Module, card: dict[str, Any], path: str | Path) -> None:
    """Writes ``PATH.safetensors`` in half precision and ``PATH.json``, the card."""
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, str(target.with_suffix(".safetensors")))
    target.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    logger.info("wrote %s", target.with_suffix(".safetensors"))
