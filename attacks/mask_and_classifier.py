"""An attack on a classifier behind a segmenter's mask that attacks both: the adaptive attack on `ForegroundMask`.

ART's own PGD already goes through a soft mask. But the mask hides the background's gradient where it is near 0, and the
object's where an attack has just begun to uncover it, so the loss of the mask itself is a second thing to climb:

    cross-entropy(classifier(x · m(x)), y) + weight · mean over pixels of the mask's logistic loss against `masks`
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor
from torch.nn import functional as F

from ramdefense.baselines.foreground import ForegroundMask
from ramdefense.segmenter import PyTorchSegmenter


class MaskAndClassifierPGD(EvasionAttack):
    """Projected gradient steps in an L∞ ball, up the classifier's loss and the mask's loss together.

    Of all its steps (the clean image among them) the one with the largest cross-entropy is kept, for each image.

    Args:
        estimator: with a `ForegroundMask` that has a segmenter among its `preprocessing_defences`.
        eps: radius of the ball, in the images' own unit.
        eps_step: of one step.
        max_iter: number of steps.
        weight: of the mask's loss; 0 leaves ordinary PGD through the mask.
        random_start: begin at a uniformly drawn point of the ball.
        batch_size: images worked on at once.
        seed: of the random start.

    Raises:
        EstimatorError: the estimator is no `PyTorchClassifier`.
        ValueError: it has no such defence, or a number is out of range.
    """

    attack_params: ClassVar[list[str]] = [
        *EvasionAttack.attack_params, "eps", "eps_step", "max_iter", "weight", "random_start", "batch_size", "seed",
    ]  # fmt: skip
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: PyTorchClassifier,
        eps: float = 8 / 255,
        eps_step: float = 2 / 255,
        max_iter: int = 20,
        *,
        weight: float = 1.0,
        random_start: bool = True,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(estimator=estimator)
        self.eps, self.eps_step, self.max_iter, self.weight = float(eps), float(eps_step), max_iter, float(weight)
        self.random_start, self.batch_size, self.seed = random_start, batch_size, seed
        self._check_params()

    def generate(
        self, x: np.ndarray, y: np.ndarray | None = None, *, masks: np.ndarray | Tensor | None = None
    ) -> np.ndarray:
        """Adversarial images.

        Args:
            x: clean images.
            y: classes, as numbers or one-hot; None for the classifier's own predictions.
            masks: which the segmenter is led away from; None for its own on `x`, rounded.

        Shape:
            x: ``(N, C, H, W)``; y: ``(N,)`` or ``(N, classes)``; masks: bool ``(N, H, W)``; returns the shape of x
        """
        labels = self.estimator.predict(x, batch_size=self.batch_size) if y is None else np.asarray(y)
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        defence, images = self._defence(), torch.tensor(x, dtype=torch.float32, device=self.estimator.device)
        if masks is None:
            with torch.no_grad():
                aims = defence.mask(images)[:, 0] > 0.5
        else:
            aims = torch.as_tensor(masks, device=images.device)
        if aims.shape != (len(images), *images.shape[2:]):
            raise ValueError(f"masks have shape {tuple(aims.shape)}; for x {tuple(images.shape)} give (N, H, W)")
        classes = torch.tensor(labels, dtype=torch.int64, device=images.device)
        generator = torch.Generator().manual_seed(self.seed)
        parts = (images.split(self.batch_size), classes.split(self.batch_size), aims.split(self.batch_size))
        found = [self._batch(defence, *part, generator) for part in zip(*parts, strict=True)]
        return torch.cat(found).cpu().numpy().astype(x.dtype)

    def _batch(
        self, defence: ForegroundMask, images: Tensor, labels: Tensor, aims: Tensor, generator: torch.Generator
    ) -> Tensor:
        low, high = (0.0, 1.0) if self.estimator.clip_values is None else map(float, self.estimator.clip_values)
        lowest, highest = (images - self.eps).clamp(min=low), (images + self.eps).clamp(max=high)
        best, most = images.clone(), images.new_full((len(images),), -torch.inf)
        x = images
        for step in range(self.max_iter + 2):  # the clean image, `max_iter` steps, and the value of the last one
            x = x.detach().requires_grad_()
            logits, _ = self.estimator._predict_framework(x)
            losses = F.cross_entropy(logits, labels, reduction="none")
            better = losses.detach() > most
            most, best = most.where(~better, losses.detach()), best.where(~better[:, None, None, None], x.detach())
            if step == self.max_iter + 1:
                break
            if step == 0 and self.random_start:
                noise = torch.rand(images.shape, generator=generator).to(images)
                x = lowest + (highest - lowest) * noise
                continue
            total = losses.sum()
            if self.weight:
                odds = defence.log_odds(x)[:, 0]
                wrong = F.binary_cross_entropy_with_logits(odds, aims.to(odds), reduction="none")
                total = total + self.weight * wrong.mean(dim=(1, 2)).sum()
            (gradient,) = torch.autograd.grad(total, x)
            x = torch.minimum(torch.maximum(x + self.eps_step * gradient.sign(), lowest), highest)
        return best

    def _defence(self) -> ForegroundMask:
        for defence in self.estimator.preprocessing_defences or []:
            if isinstance(defence, ForegroundMask) and isinstance(defence.masks, PyTorchSegmenter):
                return defence
        raise ValueError("the estimator has no ForegroundMask with a segmenter among its preprocessing_defences")

    def _check_params(self) -> None:
        if not (self.eps > 0 and self.eps_step > 0 and self.weight >= 0):
            raise ValueError(
                f"eps={self.eps}, eps_step={self.eps_step}: positive numbers; weight={self.weight}: not negative"
            )
        if self.max_iter < 1 or self.batch_size < 1:
            raise ValueError(f"max_iter={self.max_iter}, batch_size={self.batch_size}: each at least 1")
        self._defence()
