"""Can attention masks improve adversarial robustness? (Vaishnavi et al., arXiv 1911.11946), tried on drawn objects.

Small classifiers learn the same objects behind different masks: none; the data set's masks of the objects; two controls
of the same area (`ramdefense.baselines.random_masks`), the object's silhouette elsewhere and a blob elsewhere. Each is
trained plainly, then adversarially from there. One more learns behind the soft masks of a segmenter, which an attacker
can move. It is tried by an attacker who takes the mask as fixed (the paper's), by PGD through the mask, and by PGD on
segmenter and classifier together.

One more classifier sees nothing but the masks: how far the silhouette alone gives the class away. No attack on pixels
reaches a mask that the data set gives, so that much is safe by construction and not by the classifier's merit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.mask_and_classifier import MaskAndClassifierPGD
from evaluation.items import Batch, stack_items
from evaluation.objects import DrawnObjects
from evaluation.papers.learning import small_classifier, small_segmenter, train
from evaluation.papers.masks_claims import (
    ADVERSARIAL,
    BLOB,
    CLEAN,
    FIXED,
    JOINT,
    NONE,
    OBJECT,
    PGD,
    PLAIN,
    SEGMENTER,
    SHIFT,
    SILHOUETTE,
    THROUGH,
    WORST,
)
from evaluation.papers.masks_claims import claims as claims
from evaluation.progress import Tick
from ramdefense.baselines import ForegroundMask, random_masks, with_masks
from ramdefense.segmenter import PyTorchSegmenter


def run(
    *,
    informativeness: float = 0.5,
    train_images: int = 1200,
    test_images: int = 200,
    size: tuple[int, int] = (32, 32),
    epochs: int = 10,
    adversarial_epochs: int = 3,
    eps: Sequence[float] = (1 / 255, 4 / 255),
    training_eps: float = 4 / 255,
    steps: int = 10,
    seed: int = 0,
    progress: Tick | None = None,
) -> pd.DataFrame:
    """Train, attack, and count.

    Args:
        informativeness: κ of the drawn objects, see `evaluation.objects`.
        train_images, test_images, size: of the data; no scene is in both parts.
        epochs: of plain training; adversarial_epochs: of adversarial training, which begins where plain training ends.
        eps: L∞ radii of the attacks, in the images' unit; each has `steps` steps of 2.5 eps/steps.
        training_eps: radius of adversarial training.
        seed: of data, weights and order.
        progress: called with what is being done and the share of the work that this was.

    Returns:
        columns training, mask, attack, eps, accuracy (right on attacked images / all images), images, seed
    """
    learnt, tried = (
        stack_items(DrawnObjects(informativeness, length, size=size, seed=2 * seed + part))
        for part, length in ((1, train_images), (2, test_images))
    )
    y = tried.labels.numpy()
    rows: list[dict[str, object]] = []

    def tick(what: str, share: float) -> None:
        if progress is not None:
            progress(what, share)

    def row(training: str, mask: str, attack: str, radius: float, right: np.ndarray) -> None:
        accuracy = float(right.mean())
        rows.append(
            {"training": training, "mask": mask, "attack": attack, "eps": radius, "accuracy": accuracy,
             "images": len(right), "seed": seed}
        )  # fmt: skip

    def pgd(attacked: PyTorchClassifier, x: np.ndarray, radius: float) -> np.ndarray:
        attack = ProjectedGradientDescent(
            attacked, eps=radius, eps_step=2.5 * radius / steps, max_iter=steps, batch_size=64, verbose=False
        )
        return np.asarray(attack.generate(x, y))

    def right(judge: PyTorchClassifier, x: np.ndarray) -> np.ndarray:
        return np.asarray(judge.predict(x).argmax(1) == y)

    segmenter = _segmenter(learnt, epochs, seed)
    tick("segmenter", 0.05)
    silhouettes, shapes = (_masks(batch)[:, None].float().expand(-1, 3, -1, -1) for batch in (learnt, tried))
    alone = train(small_classifier(6, seed), silhouettes, learnt.labels, epochs=epochs, seed=seed)
    row(PLAIN, SILHOUETTE, CLEAN, 0.0, right(_estimator(alone, shapes), shapes.numpy()))
    tick(SILHOUETTE, 0.05)

    for mask in (NONE, OBJECT, SHIFT, BLOB, SEGMENTER):
        inputs, x = _inputs(learnt, mask, seed), _inputs(tried, mask, seed + 1).numpy()
        defence, fixed = _defences(mask, segmenter)
        before = None if defence is None else lambda batch, d=defence: d.forward(batch)[0]
        model = small_classifier(6, seed)
        for training, number, radius_learnt in ((PLAIN, epochs, 0.0), (ADVERSARIAL, adversarial_epochs, training_eps)):
            train(model, inputs, learnt.labels, epochs=number, lr=3e-3 if training == PLAIN else 1e-3, seed=seed,
                  before=before, eps=radius_learnt)  # fmt: skip
            judge = _estimator(model, inputs, defence)
            row(training, mask, CLEAN, 0.0, right(judge, x))
            for radius in eps:
                straight = right(judge, pgd(judge, x, radius))
                if mask != SEGMENTER:
                    row(training, mask, PGD, radius, straight)
                    continue
                joint = MaskAndClassifierPGD(judge, radius, 2.5 * radius / steps, steps, weight=5.0, seed=seed)
                found = {
                    FIXED: right(judge, pgd(_estimator(model, inputs, fixed), x, radius)),
                    THROUGH: straight,
                    JOINT: right(judge, joint.generate(x, y, masks=tried.masks)),
                }
                for attack, result in (*found.items(), (WORST, np.logical_and.reduce(list(found.values())))):
                    row(training, mask, attack, radius, result)
            tick(f"{training}, mask: {mask}", 0.15 if mask == SEGMENTER else 0.075)
    return pd.DataFrame(rows)


def _segmenter(data: Batch, epochs: int, seed: int) -> PyTorchSegmenter:
    """Object or background, trained on the data set's masks."""
    size = (data.images.shape[-2], data.images.shape[-1])
    model = train(small_segmenter(seed), data.images, _masks(data).long(), epochs=epochs, seed=seed, loss=_map_loss)
    return PyTorchSegmenter(model, nb_classes=2, input_shape=(3, *size))


def _map_loss(logits: Tensor, labels: Tensor) -> Tensor:
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, labels)


def _inputs(data: Batch, mask: str, seed: int) -> Tensor:
    """What the classifier is given: the images, with masks of that kind as a fourth channel."""
    if mask in (NONE, SEGMENTER):
        return data.images
    masks = _masks(data)
    return with_masks(data.images, masks if mask == OBJECT else random_masks(masks, mask.split()[1], seed=seed))


def _defences(mask: str, segmenter: PyTorchSegmenter) -> tuple[ForegroundMask | None, ForegroundMask | None]:
    """What masks the classifier's inputs, and the same for an attacker who takes the mask as fixed."""
    if mask == NONE:
        return None, None
    if mask != SEGMENTER:
        return ForegroundMask(), ForegroundMask()
    through, fixed = (ForegroundMask(segmenter, foreground=[1], differentiate=yes) for yes in (True, False))
    return through, fixed


def _masks(data: Batch) -> Tensor:
    if data.masks is None:
        raise ValueError("the data have no masks; drawn objects and COCO have them")
    return data.masks


def _estimator(model: nn.Module, inputs: Tensor, defence: ForegroundMask | None = None) -> PyTorchClassifier:
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(inputs.shape[1:]), 6, clip_values=(0.0, 1.0), device_type="cpu",
        preprocessing_defences=defence,
    )  # fmt: skip
