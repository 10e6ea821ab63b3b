"""Contextual fusion for adversarial robustness (Akumalla, Haney & Bazhenov, arXiv 2011.09526), tried on drawn objects.

An object-centric extractor learns to tell objects on contexts that say nothing about them (in the place of ImageNet),
a scene-centric one to tell contexts with objects that say nothing about those (in that of Places365). Both are frozen.
For each informativeness κ a joint classifier is fitted on data of that κ, and so is one on the foreground's features
alone; both are tried on other images of that κ, the same objects for every κ.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from torch import Tensor, nn

from attacks.blur import blur_objects
from evaluation.items import stack_items
from evaluation.objects import CONTEXTS, OBJECTS, DrawnObjects
from evaluation.papers.fusion_claims import (
    BACKGROUND,
    BLUR,
    CLEAN,
    FGSM,
    FOREGROUND,
    FUSION,
    PGD,
    TRANSFERRED,
)
from evaluation.papers.fusion_claims import claims as claims
from evaluation.papers.learning import WIDTH, small_features, train
from evaluation.progress import Tick
from ramdefense.baselines import ContextualFusion, LateFusion


def run(
    *,
    informativeness: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    train_images: int = 1600,
    test_images: int = 240,
    size: tuple[int, int] = (32, 32),
    epochs: int = 12,
    penalties: Sequence[float] = (0.0, 0.01, 0.1),
    eps: Sequence[float] = (1 / 255, 2 / 255, 4 / 255),
    sigmas: Sequence[float] = (1.0, 2.0),
    steps: int = 10,
    seed: int = 0,
    progress: Tick | None = None,
) -> pd.DataFrame:
    """Train, attack, and count.

    Args:
        informativeness: the κ that are tried.
        train_images, test_images, size: of the data; no scene is in both parts.
        epochs: of the object-centric extractor; the scene-centric one, which has less to learn, takes a third of them.
        penalties: the α of the fusions that are tried.
        eps: L∞ radii of FGSM; PGD (steps of 2.5 eps/steps) is tried at the smallest.
        sigmas: of the object's Gaussian blur, in pixels.
        steps: of PGD, which is tried on the foreground alone and on the fusions without and with the largest penalty.
        seed: of data, weights and order.
        progress: called with what is being done and the share of the work that this was.

    Returns:
        columns informativeness, model, penalty, attack, strength (eps or sigma), accuracy (right / all images), images,
        seed
    """

    def tick(what: str, share: float) -> None:
        if progress is not None:
            progress(what, share)

    apart = stack_items(DrawnObjects(0.0, train_images, size=size, seed=3 * seed))
    assert apart.contexts is not None
    objects, scenes = small_features(seed), small_features(seed + 1)
    _learn(objects, len(OBJECTS), apart.images, apart.labels, epochs, seed)
    tick("object-centric extractor", 0.3)
    _learn(scenes, len(CONTEXTS), apart.images, apart.contexts, max(1, epochs // 3), seed)
    tick("scene-centric extractor", 0.1)
    rows: list[dict[str, object]] = []
    shape = (3, *size)
    for kappa in informativeness:
        learnt, tried = (
            stack_items(DrawnObjects(kappa, length, size=size, seed=3 * seed + part))
            for part, length in ((1, train_images), (2, test_images))
        )
        assert tried.masks is not None
        foreground = LateFusion([objects], len(OBJECTS), input_shape=shape)
        models: list[tuple[str, float, LateFusion]] = [
            (FOREGROUND, 0.0, foreground),
            (BACKGROUND, 0.0, LateFusion([scenes], len(OBJECTS), input_shape=shape)),
        ]
        for alpha in penalties:
            fusion = ContextualFusion(objects, scenes, len(OBJECTS), penalty=alpha, input_shape=shape)
            models.append((FUSION, alpha, fusion))
        for _, _, model in models:
            model.fit(learnt.images, learnt.labels).eval()
        x, y = tried.images.numpy(), tried.labels.numpy()
        source = foreground.classifier()
        given = {(CLEAN, 0.0): x}
        given |= {(TRANSFERRED, radius): FastGradientMethod(source, eps=radius).generate(x, y) for radius in eps}
        given |= {(BLUR, sigma): blur_objects(tried.images, tried.masks, sigma).numpy() for sigma in sigmas}
        for name, alpha, model in models:
            judge = model.classifier()
            own = {(FGSM, radius): FastGradientMethod(judge, eps=radius).generate(x, y) for radius in eps}
            if name == FOREGROUND or (name == FUSION and alpha in (penalties[0], penalties[-1])):
                radius = min(eps)
                pgd = ProjectedGradientDescent(
                    judge, eps=radius, eps_step=2.5 * radius / steps, max_iter=steps, batch_size=64, verbose=False
                )
                own[PGD, radius] = pgd.generate(x, y)
            for (attack, strength), images in (given | own).items():
                right = judge.predict(images).argmax(1) == y
                rows.append(
                    {"informativeness": kappa, "model": name, "penalty": alpha, "attack": attack, "strength": strength,
                     "accuracy": float(right.mean()), "images": len(right), "seed": seed}
                )  # fmt: skip
        tick(f"informativeness {kappa:g}", 0.6 / len(informativeness))
    return pd.DataFrame(rows)


def _learn(features: nn.Module, classes: int, images: Tensor, targets: Tensor, epochs: int, seed: int) -> None:
    """Train an extractor in place, under a linear layer that is thrown away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(features, nn.Linear(WIDTH, classes))
    train(model, images, targets, epochs=epochs, seed=seed)
