"""RAM (Yuan et al., arXiv 2401.01750) beyond segmentation: a classifier and a detector, under ART's attacks.

The paper's claims are about segmentation and universal or single patches; those tried here are ours: what readers ask
next. A small ViT learns to tell drawn objects, a small Faster R-CNN with a transformer backbone learns to find them;
both are trained without RAM. `ramdefense.harden` makes copies with its defaults and with a smaller T, and each stands
in ART's own estimator. Each is attacked by ART's own attacks

- adaptively: the attack climbs the expectation over draws of the hardened model itself (`evaluation.papers.draws`);
- by transfer: with what was made on the undefended model.

Predictions are then made on draws that no attack saw. The attacker takes the better of the two, for each image where
the attack is made for each image, as a whole where it is universal, and chooses on draws of its own, which are neither
those of the attack nor those of the score.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from art.attacks.evasion import AdversarialPatchPyTorch, ProjectedGradientDescent, UniversalPerturbation
from art.estimators.classification import PyTorchClassifier
from art.estimators.object_detection import PyTorchObjectDetector
from torch import nn
from torchvision.ops import box_iou, masks_to_boxes

from evaluation.items import Batch, stack_items
from evaluation.objects import OBJECTS, DrawnObjects
from evaluation.papers.attending import Target, small_detector, small_vit, train_detector
from evaluation.papers.beyond_claims import (
    ADAPTIVE,
    CLEAN,
    GREY,
    NONE,
    NOTHING,
    PATCH,
    PGD,
    TRANSFERRED,
    UNIVERSAL,
    WORST,
)
from evaluation.papers.beyond_claims import claims as claims
from evaluation.papers.draws import MeanLogits, MeanLosses
from evaluation.papers.learning import seeded, train
from evaluation.progress import Tick
from ramdefense import conditions, harden

CLASSIFICATION, DETECTION = "classification", "detection"

#: Attacked images by attack and strength.
Made = dict[tuple[str, float], np.ndarray]
#: name → options of `harden`
DEFENCES: dict[str, dict[str, Any]] = {"RAM, T = 16/N": {}, "RAM, T = 3/N": {"max_attention": "3/N"}}


@dataclass(frozen=True)
class Effort:
    """What the attacks may spend.

    Attributes:
        draws: over which the adaptive attacks take the expectation, in each step.
        pgd_steps: of 2.5 eps/steps.
        patch_steps: of Adam on the patch, each over all the images that it is made on.
        made_on: how many training images a universal attack is made on.
        passes: over those images, of the universal perturbation.
    """

    draws: int = 2
    pgd_steps: int = 8
    patch_steps: int = 30
    made_on: int = 48
    passes: int = 1


def run(
    *,
    tasks: Sequence[str] = (CLASSIFICATION, DETECTION),
    informativeness: float = 0.75,
    train_images: tuple[int, int] = (1600, 600),
    test_images: tuple[int, int] = (150, 96),
    epochs: tuple[int, int] = (15, 12),
    eps: tuple[Sequence[float], Sequence[float]] = ((1 / 255, 4 / 255, 16 / 255), (1 / 255, 4 / 255)),
    universal_eps: float = 16 / 255,
    effort: Effort | None = None,
    scored_draws: int = 4,
    seed: int = 0,
    progress: Tick | None = None,
) -> pd.DataFrame:
    """Train, harden, attack, and count.

    Args:
        tasks: which of the two; each is the same whether the other is tried or not.
        informativeness: κ of the drawn objects, see `evaluation.objects`.
        train_images, test_images, epochs: of the classifier (32×32) and of the detector (64×64).
        eps: L∞ radii of PGD, for each task; universal_eps: of the universal perturbation.
        effort: what the attacks may spend.
        scored_draws: over which each prediction of a random model is counted.
        seed: of data, weights, order and masks.
        progress: called with what is being done and the share of the work that this was.

    Returns:
        columns task, defence, attack, strength (eps, or the patch's share of the pixels), made ("adaptive",
        "transferred", "worst of two"; "no attack"), accuracy, images, seed. Accuracy is the share of images and draws
        that are right: the class, or for the detector a box of the right class, with score and IoU of 0.5 at least.

    Raises:
        ValueError: no task, or one that is not known.
    """
    sizes = {CLASSIFICATION: (0, 32), DETECTION: (1, 64)}
    if not tasks or any(task not in sizes for task in tasks):
        raise ValueError(f"tasks={tuple(tasks)}: give some of {', '.join(sizes)}")
    effort = effort or Effort()
    rows: list[dict[str, object]] = []

    def tick(what: str, share: float) -> None:
        if progress is not None:
            progress(what, share / len(tasks))

    for task in tasks:
        number, size = sizes[task]
        learnt, tried = (
            stack_items(DrawnObjects(informativeness, length, size=(size, size), seed=2 * seed + part))
            for part, length in ((1, train_images[number]), (2, test_images[number]))
        )
        kind = _Classification(size) if task == CLASSIFICATION else _Detection(size)
        model = kind.trained(learnt, epochs[number], seed)
        tick(f"{task}: training", 0.2)
        some = learnt._replace(
            images=learnt.images[: effort.made_on],
            labels=learnt.labels[: effort.made_on],
            masks=None if learnt.masks is None else learnt.masks[: effort.made_on],
        )
        transferred: Made | None = None
        for defence, options in {NONE: None, **DEFENCES}.items():
            defended = model if options is None else harden(model, seed=seed, example=kind.shape, **options)
            with _seeded(seed):
                attacked = kind.attacked(defended, 1 if options is None else effort.draws)
                made = kind.attacks(attacked, some, tried, eps[number], universal_eps, effort)
            scores = _Scores(kind, kind.estimator(defended), tried, 1 if options is None else scored_draws)
            for attack, strength, how, right in scores.of(made, transferred):
                rows.append(
                    {"task": task, "defence": defence, "attack": attack, "strength": strength, "made": how,
                     "accuracy": float(right.mean()), "images": len(right), "seed": seed}
                )  # fmt: skip
            transferred = transferred or made
            tick(f"{task}, defence: {defence}", 0.2 if options is None else 0.6 / len(DEFENCES))
    return pd.DataFrame(rows)


class _Task:
    """What differs between the two tasks; the patch lies in the upper left corner, where objects seldom are."""

    def __init__(self, size: int, patch: int) -> None:
        self.shape, self.patch = (3, size, size), patch
        self.area = patch**2 / size**2

    def trained(self, learnt: Batch, epochs: int, seed: int) -> nn.Module:
        raise NotImplementedError

    def estimator(self, model: nn.Module) -> Any:
        raise NotImplementedError

    def attacked(self, model: nn.Module, draws: int) -> Any:
        """The estimator that an attack is given: the expectation over so many draws."""
        raise NotImplementedError

    def truth(self, batch: Batch) -> Any:
        """Labels as ART's attacks take them."""
        raise NotImplementedError

    def right(self, found: Any, batch: Batch) -> np.ndarray:
        """Which predictions are right, ``(N,)``."""
        raise NotImplementedError

    def attacks(
        self, attacked: Any, some: Batch, tried: Batch, eps: Sequence[float], universal_eps: float, effort: Effort
    ) -> Made:
        """Attacked images by attack and strength; universal ones are made on `some`, all are for `tried`."""
        x, y = tried.images.numpy(), self.truth(tried)
        patch = AdversarialPatchPyTorch(
            attacked, rotation_max=0.0, patch_shape=(3, self.patch, self.patch), patch_location=(0, 0),
            patch_type="square", optimizer="Adam", learning_rate=0.05, max_iter=effort.patch_steps, targeted=False,
            batch_size=effort.made_on, verbose=False,
        )  # fmt: skip
        found, _ = patch.generate(some.images.numpy(), self.truth(some))
        made = {(PATCH, self.area): self.pasted(x, found)}
        for radius in eps:
            steps = effort.pgd_steps
            pgd = ProjectedGradientDescent(
                attacked, eps=radius, eps_step=2.5 * radius / steps, max_iter=steps, batch_size=64, verbose=False
            )
            made[PGD, radius] = np.asarray(pgd.generate(x, y))
        return made

    def pasted(self, x: np.ndarray, patch: np.ndarray | float) -> np.ndarray:
        """The patch itself on every image; ART's own `apply_patch` resamples it (by one pixel in some sizes)."""
        x = x.copy()
        x[:, :, : self.patch, : self.patch] = patch
        return x


class _Classification(_Task):
    def __init__(self, size: int) -> None:
        super().__init__(size, 3 * size // 8)

    def trained(self, learnt: Batch, epochs: int, seed: int) -> nn.Module:
        model = small_vit(len(OBJECTS), self.shape[1], seed)
        return train(model, learnt.images, learnt.labels, epochs=epochs, lr=2e-3, seed=seed)

    def estimator(self, model: nn.Module) -> PyTorchClassifier:
        return PyTorchClassifier(
            model, nn.CrossEntropyLoss(), self.shape, len(OBJECTS), clip_values=(0.0, 1.0), device_type="cpu"
        )

    def attacked(self, model: nn.Module, draws: int) -> PyTorchClassifier:
        return self.estimator(MeanLogits(model, draws))

    def truth(self, batch: Batch) -> np.ndarray:
        return batch.labels.numpy()

    def right(self, found: np.ndarray, batch: Batch) -> np.ndarray:
        return np.asarray(found.argmax(1) == batch.labels.numpy())

    def attacks(
        self, attacked: Any, some: Batch, tried: Batch, eps: Sequence[float], universal_eps: float, effort: Effort
    ) -> Made:
        made = super().attacks(attacked, some, tried, eps, universal_eps, effort)
        inner = {"eps": universal_eps, "eps_step": universal_eps / 4, "max_iter": 5, "verbose": False}
        universal = UniversalPerturbation(
            attacked, attacker="pgd", attacker_params=inner, delta=0.0, max_iter=effort.passes, eps=universal_eps,
            norm="inf", verbose=False,
        )  # fmt: skip
        universal.generate(some.images.numpy(), self.truth(some))
        noise = np.zeros((1, *self.shape), np.float32) if universal.noise is None else universal.noise
        made[UNIVERSAL, universal_eps] = np.clip(tried.images.numpy() + noise, 0, 1).astype(np.float32)
        return made


class _Detection(_Task):
    def __init__(self, size: int) -> None:
        super().__init__(size, size // 4)

    def trained(self, learnt: Batch, epochs: int, seed: int) -> nn.Module:
        model = small_detector(len(OBJECTS), self.shape[1], seed)
        return train_detector(model, learnt.images, boxed(learnt), epochs=epochs, seed=seed)

    def estimator(self, model: nn.Module) -> PyTorchObjectDetector:
        return PyTorchObjectDetector(model, self.shape, clip_values=(0.0, 1.0), device_type="cpu")

    def attacked(self, model: nn.Module, draws: int) -> PyTorchObjectDetector:
        return self.estimator(MeanLosses(model, draws))

    def truth(self, batch: Batch) -> Any:
        return [{name: value.numpy() for name, value in target.items()} for target in boxed(batch)]

    def right(self, found: list[dict[str, np.ndarray]], batch: Batch) -> np.ndarray:
        return np.array([is_found(one, target) for one, target in zip(found, boxed(batch), strict=True)])


def boxed(batch: Batch) -> list[Target]:
    """What a torchvision detector learns: the box around each mask, its class from 1 on, and a score of 1 for ART.

    Raises:
        ValueError: data without masks.
    """
    if batch.masks is None:
        raise ValueError("the data have no masks, and boxes are made from them; drawn objects and COCO have them")
    boxes = masks_to_boxes(batch.masks).float()
    boxes[:, 2:] += 1  # the last pixel belongs to the box
    return [
        {"boxes": box[None], "labels": label[None] + 1, "scores": torch.ones(1)}
        for box, label in zip(boxes, batch.labels, strict=True)
    ]


def is_found(found: dict[str, np.ndarray], target: Target) -> bool:
    """Whether a box of the right class has a score and an IoU of 0.5 at least."""
    if not len(found["boxes"]):
        return False
    overlap = box_iou(torch.from_numpy(found["boxes"]), target["boxes"])[:, 0].numpy()
    return bool(((overlap >= 0.5) & (found["scores"] >= 0.5) & (found["labels"] == target["labels"].item())).any())


class _Scores:
    """How often the predictions of one estimator are right, on draws that no attack saw.

    An attack's draws are those of the model's own counter, from 0 on; those here are negative.
    """

    def __init__(self, kind: _Task, estimator: Any, tried: Batch, draws: int) -> None:
        self.kind, self.estimator, self.tried = kind, estimator, tried
        self.scored, self.attackers = range(-draws, 0), range(-2 * draws, -draws)

    def of(self, made: Made, transferred: Made | None) -> Iterator[tuple[str, float, str, np.ndarray]]:
        """Attack, strength, how it was made, and for each image the share of draws on which the prediction is right."""
        x = self.tried.images.numpy()
        yield CLEAN, 0.0, NOTHING, self.right(x, self.scored)
        yield GREY, self.kind.area, NOTHING, self.right(self.kind.pasted(x, 0.5), self.scored)
        for (attack, strength), images in made.items():
            adaptive = self.right(images, self.scored)
            yield attack, strength, ADAPTIVE, adaptive
            if transferred is None:
                continue
            other = transferred[attack, strength]
            right = self.right(other, self.scored)
            yield attack, strength, TRANSFERRED, right
            mine, theirs = (self.right(given, self.attackers) for given in (images, other))
            better = theirs < mine if attack == PGD else theirs.mean() < mine.mean()  # a universal one is one choice
            yield attack, strength, WORST, np.where(better, right, adaptive)

    def right(self, x: np.ndarray, draws: range) -> np.ndarray:
        """For each image, the share of these draws on which the prediction is right, ``(N,)``."""
        found = []
        for draw in draws:
            with conditions(self.estimator.model, images=tuple(range(len(x))), draw=draw):
                found.append(self.kind.right(self.estimator.predict(x, batch_size=len(x)), self.tried))
        return np.asarray(np.mean(found, axis=0))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """ART's attacks draw from Python's generator and from torch's; both are left as they were."""
    before = random.getstate()
    random.seed(seed)
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(before)
