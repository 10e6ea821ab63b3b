"""RAM on a classifier and on a detector, inside ART's own estimators, under ART's own attacks."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from art.attacks.evasion import AdversarialPatchPyTorch, ProjectedGradientDescent, RobustDPatch
from art.estimators.classification import PyTorchClassifier
from art.estimators.object_detection import PyTorchObjectDetector
from torch import nn
from torchvision.models.detection import FasterRCNN

from evaluation.items import Batch, stack_items
from evaluation.objects import DrawnObjects
from evaluation.papers import beyond
from evaluation.papers.attending import mirrored, small_detector, small_vit
from evaluation.papers.claims import HOLDS, IN_PART, NOT, UNTRIED
from evaluation.papers.draws import MeanLogits, MeanLosses
from ramdefense import HardenedModel, conditions, harden

N = 3


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stack_items(DrawnObjects(0.5, N, size=(32, 32)))


@pytest.fixture(scope="module")
def scenes() -> Batch:
    return stack_items(DrawnObjects(0.5, N, size=(64, 64)))


def classifier(model: nn.Module) -> PyTorchClassifier:
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 6, clip_values=(0.0, 1.0), device_type="cpu")


def detector(model: nn.Module) -> PyTorchObjectDetector:
    return PyTorchObjectDetector(model, (3, 64, 64), clip_values=(0.0, 1.0), device_type="cpu")


def hardened_vit(seed: int = 0, **options: Any) -> HardenedModel:
    return harden(small_vit(6), seed=seed, **{"max_attention": "3/N", "dropout": 0.3, **options})


# ---------------------------------------------------------------------------------------------------- the classifier


def test_predictions_follow_seed_draw_and_stream(batch: Batch) -> None:
    x = batch.images.numpy()

    def predicted(seed: int, draw: int | None, images: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
        estimator = classifier(hardened_vit(seed))
        with conditions(estimator.model, images=images, draw=draw):
            return estimator.predict(x[list(images)])

    first = predicted(0, 5)
    np.testing.assert_array_equal(predicted(0, 5), first)
    assert not np.allclose(predicted(0, 6), first)
    assert not np.allclose(predicted(1, 5), first)
    np.testing.assert_allclose(predicted(0, 5, (2,)), first[2:], atol=1e-5)  # whatever the batch it comes in
    estimator, again = classifier(hardened_vit()), classifier(hardened_vit())
    walk = [estimator.predict(x) for _ in range(2)]
    assert not np.allclose(*walk)
    np.testing.assert_array_equal(walk, [again.predict(x) for _ in range(2)])


def test_mean_logits_are_the_mean_over_draws_one_by_one(batch: Batch) -> None:
    x, model = batch.images, hardened_vit().eval()
    with torch.no_grad():
        with conditions(model, draw=7):
            found = MeanLogits(model, 4)(x)
        passes = []
        for copy_ in range(4):
            with conditions(model, draw=7, images=tuple(range(copy_ * N, (copy_ + 1) * N))):
                passes.append(model(x))
        torch.testing.assert_close(found, torch.stack(passes).mean(0), atol=1e-5, rtol=1e-4)
        assert float(torch.stack(passes).std(0).max()) > 1e-3
        plain = small_vit(6).eval()
        torch.testing.assert_close(MeanLogits(plain, 3)(x), plain(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="draws=0"):
        MeanLogits(plain, 0)


def test_arts_patch_attack_and_pgd_run_on_the_hardened_classifier(batch: Batch) -> None:
    x, y = batch.images.numpy(), batch.labels.numpy()
    plain = small_vit(6).eval()
    weights = copy.deepcopy(plain.state_dict())
    hardened = harden(plain, max_attention="3/N", example=(3, 32, 32))
    assert [site.keys for site in hardened.sites] == [65] * 3
    estimator = classifier(MeanLogits(hardened, 2))
    pgd = ProjectedGradientDescent(estimator, eps=4 / 255, eps_step=2 / 255, max_iter=3, verbose=False)
    adversarial = pgd.generate(x, y)
    assert hardened.refined_calls == 3
    assert 0 < np.abs(adversarial - x).max() <= 4 / 255 + 1e-6
    patch = AdversarialPatchPyTorch(
        estimator, rotation_max=0.0, patch_shape=(3, 8, 8), patch_location=(0, 0), patch_type="square", targeted=False,
        optimizer="Adam", learning_rate=0.05, max_iter=2, verbose=False,
    )  # fmt: skip
    found, _ = patch.generate(x, y)
    assert found.shape == (3, 8, 8)
    assert (found != 0.5).any()
    # ART trains it in the very place where the trial pastes it
    changed = np.abs(patch.apply_patch(x, scale=1.0) - x).max((0, 1)) > 0
    assert np.argwhere(changed).max() == 7
    gradients = [classifier(model).loss_gradient(x, np.eye(6, dtype=np.float32)[y]) for model in (plain, hardened)]
    assert not np.allclose(*gradients)  # the attack sees the defence, not the model below it
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert not any(isinstance(module, HardenedModel) for module in plain.modules())


# ------------------------------------------------------------------------------------------------------ the detector


def confident(seed: int = 0) -> FasterRCNN:
    """An untrained detector; all its scores stand above the threshold, so that post-processing keeps every box."""
    return small_detector(6, 64, seed).eval()


def test_the_attention_of_a_detector_is_found_and_its_ranked_scores_are_none() -> None:
    """Faster R-CNN picks boxes with integers made from a softmax's result; these are no weights that sum keys."""
    hardened = harden(confident(), example=(3, 64, 64))
    assert [site.name for site in hardened.sites] == [f"backbone.blocks.{i}.attn" for i in range(2)]
    assert [site.keys for site in hardened.sites] == [64] * 2


def test_arts_patch_attack_runs_on_the_hardened_detector(scenes: Batch) -> None:
    x = scenes.images.numpy()
    truth = [{name: value.numpy() for name, value in target.items()} for target in beyond.boxed(scenes)]
    plain = confident()
    weights = copy.deepcopy(plain.state_dict())
    hardened = harden(plain, max_attention="3/N", example=(3, 64, 64))
    estimator = detector(hardened)
    gradient = estimator.loss_gradient(x, truth)
    assert hardened.refined_calls == 2
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max((1, 2, 3)) > 0).all()
    attack = RobustDPatch(
        estimator, patch_shape=(3, 16, 16), patch_location=(0, 0), crop_range=(0, 0), brightness_range=(1.0, 1.0),
        rotation_weights=(1, 0, 0, 0), sample_size=1, learning_rate=0.1, max_iter=2, targeted=True, verbose=False,
    )  # fmt: skip
    before = attack._patch.copy()
    assert (attack.generate(x, truth) != before).any()
    assert (attack.apply_patch(x)[:, :, 16:, 16:] == x[:, :, 16:, 16:]).all()
    for model in (hardened, MeanLosses(hardened, 2)):
        with conditions(model, images=tuple(range(N)), draw=-1):
            found = [detector(model).predict(x) for _ in range(2)]
        assert len(found[0]) == N
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one["boxes"], other["boxes"])
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_mean_losses_are_the_losses_of_every_image_that_many_times() -> None:
    class Sizes(nn.Module):
        def forward(self, images: torch.Tensor, targets: Any = None) -> Any:
            assert targets is None or len(targets) == len(images)
            return len(images) if targets is None else {"loss": images.flatten(1).sum(1) * torch.tensor(targets)}

    images = torch.tensor([[1.0], [10.0]])
    found = MeanLosses(Sizes(), 3)(images, [1.0, 2.0])  # type: ignore[list-item]
    assert found["loss"].tolist() == [1.0, 20.0] * 3  # type: ignore[call-overload]
    assert MeanLosses(Sizes(), 3)(images) == 2


def test_boxes_are_those_of_the_masks(scenes: Batch) -> None:
    assert scenes.masks is not None
    for target, mask, label in zip(beyond.boxed(scenes), scenes.masks, scenes.labels, strict=True):
        left, top, right, bottom = (int(side) for side in target["boxes"][0])
        rows, columns = torch.where(mask)
        assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert target["labels"].tolist() == [int(label) + 1]
        turned = mirrored(target, 64)["boxes"][0].int().tolist()
        assert turned == [64 - right, top, 64 - left, bottom]
    with pytest.raises(ValueError, match="no masks"):
        beyond.boxed(scenes._replace(masks=None))


@pytest.mark.parametrize(
    ("box", "score", "label", "right"),
    [
        ((0, 0, 10, 10), 0.9, 2, True),
        ((0, 0, 10, 5.1), 0.9, 2, True),
        ((0, 0, 10, 4.9), 0.9, 2, False),
        ((0, 0, 10, 10), 0.4, 2, False),
        ((0, 0, 10, 10), 0.9, 1, False),
    ],
)
def test_an_object_is_found(box: tuple[float, ...], score: float, label: int, right: bool) -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}
    found = {"boxes": np.array([box], np.float32), "scores": np.array([score]), "labels": np.array([label])}
    assert beyond.is_found(found, target) is right
    assert not beyond.is_found({name: value[:0] for name, value in found.items()}, target)


# -------------------------------------------------------------------------------------------------- trial and claims


def table(under_attack: tuple[float, float, float], clean: tuple[float, float, float]) -> pd.DataFrame:
    """Accuracies of: no defence, and two hardened models; adaptive and transferred attacks alone look better."""
    rows = []
    for task, attacks in (
        (beyond.CLASSIFICATION, (beyond.PATCH, beyond.PGD, beyond.UNIVERSAL)),
        (beyond.DETECTION, (beyond.PATCH, beyond.PGD)),
    ):
        for i, defence in enumerate((beyond.NONE, *beyond.DEFENCES)):
            rows.append((task, defence, beyond.CLEAN, 0.0, beyond.NOTHING, clean[i]))
            for attack in attacks:
                for strength in (0.1, 0.2) if attack == beyond.PGD else (0.1,):
                    if defence == beyond.NONE:
                        rows.append((task, defence, attack, strength, beyond.ADAPTIVE, under_attack[i]))
                        continue
                    rows.append((task, defence, attack, strength, beyond.WORST, under_attack[i]))
                    rows += [
                        (task, defence, attack, strength, how, 1.0) for how in (beyond.ADAPTIVE, beyond.TRANSFERRED)
                    ]
    made = pd.DataFrame(rows, columns=["task", "defence", "attack", "strength", "made", "accuracy"])
    return made.assign(images=200, seed=0)


@pytest.mark.parametrize(
    ("under_attack", "clean", "gain", "loss"),
    [
        ((0.2, 0.5, 0.6), (0.9, 0.88, 0.87), HOLDS, HOLDS),
        ((0.2, 0.22, 0.6), (0.9, 0.88, 0.7), IN_PART, IN_PART),
        ((0.2, 0.22, 0.1), (0.9, 0.7, 0.6), NOT, NOT),
        ((0.2, 0.5, 0.6), (0.24, 0.22, 0.2), UNTRIED, HOLDS),  # the attack takes nothing
    ],
)
def test_claims(
    under_attack: tuple[float, float, float], clean: tuple[float, float, float], gain: str, loss: str
) -> None:
    made = beyond.claims(table(under_attack, clean))
    assert [claim.verdict for claim in made] == [gain] * 3 + [loss] + [gain] * 2 + [loss] + [UNTRIED]
    assert f"{100 * (under_attack[1] - under_attack[0]):+.1f}" in made[0].ours
    assert all("not tried" in claim.paper for claim in made)


def test_what_the_documentation_says_is_what_the_shipped_table_says() -> None:
    with files("evaluation.papers").joinpath("beyond.csv").open() as file:
        shipped = pd.read_csv(file)
    text = (Path(__file__).parent.parent / "docs" / "ram.md").read_text()
    for claim in beyond.claims(shipped):
        assert f"| {claim.claim} | {claim.ours} | {claim.verdict} |" in text


def test_an_unknown_task_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"tasks=\('depth',\)"):
        beyond.run(tasks=("depth",))


@pytest.mark.slow
def test_the_trial_from_end_to_end() -> None:
    seen: list[float] = []
    effort = beyond.Effort(draws=2, pgd_steps=2, patch_steps=2, made_on=6, passes=1)

    def trial() -> pd.DataFrame:
        return beyond.run(
            train_images=(48, 24), test_images=(12, 6), epochs=(1, 1), effort=effort, scored_draws=2,
            progress=lambda what, share: seen.append(share),
        )  # fmt: skip

    found = trial()
    assert sum(seen) == pytest.approx(1)
    assert ((found["accuracy"] >= 0) & (found["accuracy"] <= 1)).all()
    # clean, grey, and four attacks for no defence (PGD at three radii); three times each for a hardened model
    assert len(found) == (2 + 5 + 2 * (2 + 15)) + (2 + 3 + 2 * (2 + 9))
    assert len(beyond.claims(found)) == 8
    pd.testing.assert_frame_equal(trial(), found)
