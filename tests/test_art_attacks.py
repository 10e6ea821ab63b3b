"""ART's own attacks and checks on a segmenter: those that work, by their effect; those that do not, by their reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    AdversarialPatch,
    AdversarialPatchNumpy,
    AdversarialPatchPyTorch,
    AutoAttack,
    AutoConjugateGradient,
    AutoProjectedGradientDescent,
    BasicIterativeMethod,
    BoundaryAttack,
    CarliniL2Method,
    CarliniLInfMethod,
    DeepFool,
    DPatch,
    ElasticNet,
    FastGradientMethod,
    FeatureAdversariesPyTorch,
    FrameSaliencyAttack,
    GeoDA,
    HopSkipJump,
    MomentumIterativeMethod,
    NewtonFool,
    ProjectedGradientDescent,
    ProjectedGradientDescentNumpy,
    ProjectedGradientDescentPyTorch,
    RobustDPatch,
    SaliencyMapMethod,
    ShadowAttack,
    SimBA,
    SquareAttack,
    TargetedUniversalPerturbation,
    UniversalPerturbation,
    VirtualAdversarialMethod,
    Wasserstein,
    ZooAttack,
)
from art.attacks.evasion.pixel_threshold import PixelAttack
from art.estimators.classification import PyTorchClassifier
from art.evaluations.security_curve.security_curve import SecurityCurve
from art.exceptions import EstimatorError
from art.metrics import loss_gradient_check
from art.summary_writer import SummaryWriter
from tiny import NB_CLASSES, SHAPE, coloured_shapes, linear_cnn, tiny_cnn
from torch import nn

from ramdefense.art_callables import segmentation_criterion, segmentation_loss
from ramdefense.segmenter import PyTorchSegmenter

EPS = 0.2
QUIET = {"verbose": False}


@pytest.fixture(scope="module")
def trained() -> PyTorchSegmenter:
    """A segmenter that knows its task, so that an attack has something to take away."""
    model = tiny_cnn(seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE, optimizer=optimizer, preprocessing=(0.5, 0.25))
    segmenter.fit(*coloured_shapes(24), batch_size=6, nb_epochs=12)
    model.eval()
    return segmenter


@pytest.fixture(scope="module")
def frames() -> tuple[np.ndarray, np.ndarray]:
    """Six images that the segmenter has not seen, with two void rows in each label map."""
    images, labels = coloured_shapes(6, seed=11)
    labels[:, :2] = 255
    arrays = images.numpy(), labels.numpy()
    for array in arrays:
        array.flags.writeable = False
    return arrays


def accuracy(segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> float:
    return float((segmenter.predict_labels(x) == y)[y != 255].mean())


def assert_within(adversarial: np.ndarray, x: np.ndarray, eps: float = EPS) -> None:
    """In the clip range and the budget, and using that budget."""
    assert adversarial.dtype == np.float32
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert eps / 2 < np.abs(adversarial - x).max() <= eps + 1e-6


def one_hot(y: np.ndarray) -> np.ndarray:
    return np.stack([y == c for c in range(NB_CLASSES)], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- those that work


def test_the_segmenter_knows_its_task(trained: PyTorchSegmenter, frames: tuple) -> None:
    assert accuracy(trained, *frames) > 0.93


@pytest.mark.parametrize("labels", [lambda y: y, one_hot, lambda y: None])
def test_fast_gradient_method(trained: PyTorchSegmenter, frames: tuple, labels: Callable) -> None:
    x, y = frames
    adversarial = FastGradientMethod(trained, eps=EPS, batch_size=4).generate(x, labels(y))
    assert_within(adversarial, x)
    assert (trained.compute_loss(adversarial, y) > trained.compute_loss(x, y)).all()


def test_fast_gradient_method_finds_the_optimum_of_a_linear_model() -> None:
    """Where the logits of class 0 are a·(sum of pixels) and the others 0, the best step is the sign of a everywhere."""
    model = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    nn.init.zeros_(model.weight)
    weights = torch.randn(3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.weight[0] = weights[:, None, None]
    segmenter = PyTorchSegmenter(model, 2, SHAPE)
    x, y = np.full((2, *SHAPE), 0.5, dtype=np.float32), np.zeros((2, *SHAPE[1:]), dtype=np.int64)
    adversarial = FastGradientMethod(segmenter, eps=EPS).generate(x, y)
    assert np.allclose(adversarial - x, -EPS * np.sign(weights.numpy())[:, None, None], atol=1e-6)


@pytest.mark.parametrize("attack", [ProjectedGradientDescent, ProjectedGradientDescentNumpy, BasicIterativeMethod])
def test_iterated_gradients(trained: PyTorchSegmenter, frames: tuple, attack: type) -> None:
    x, y = frames
    options = {"eps": EPS, "eps_step": 0.02, "batch_size": 4, "verbose": False}
    losses = [trained.compute_loss(FastGradientMethod(trained, eps=EPS).generate(x, y), y, "mean")]
    for steps in (5, 15):
        adversarial = attack(trained, max_iter=steps, **options).generate(x, y)
        assert_within(adversarial, x)
        losses.append(trained.compute_loss(adversarial, y, "mean"))
    assert losses[0] < losses[2]
    assert losses[1] < losses[2] + 1e-3
    assert accuracy(trained, adversarial, y) < accuracy(trained, x, y) - 0.3


def test_targeted_gradients_reach_the_target(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    target = np.where(y == 255, 255, (y + 1) % NB_CLASSES)
    attack = ProjectedGradientDescent(trained, eps=0.3, eps_step=0.03, max_iter=25, targeted=True, **QUIET)
    adversarial = attack.generate(x, target)
    assert accuracy(trained, adversarial, target) > accuracy(trained, x, target) + 0.4


def test_gradients_in_the_two_norm(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    attack = ProjectedGradientDescent(trained, norm=2, eps=2.0, eps_step=0.5, max_iter=8, **QUIET)
    adversarial = attack.generate(x, y)
    norms = np.linalg.norm((adversarial - x).reshape(len(x), -1), axis=1)
    assert (norms <= 2.0 + 1e-4).all()
    assert (norms > 1.0).all(), "gradients too small for ART's normalisation"
    assert (trained.compute_loss(adversarial, y) > trained.compute_loss(x, y)).all()


@pytest.mark.parametrize("shape", ["(H, W)", "(N, C, H, W)"])
def test_a_mask_is_kept_bit_for_bit(trained: PyTorchSegmenter, frames: tuple, shape: str) -> None:
    x, y = frames
    mask = np.zeros(SHAPE[1:], dtype=np.float32)
    mask[5:11, 3:12] = 1
    given = mask if shape == "(H, W)" else np.broadcast_to(mask, x.shape)
    attack = ProjectedGradientDescent(trained, eps=EPS, eps_step=0.02, max_iter=6, batch_size=4, **QUIET)
    adversarial = attack.generate(x, y, mask=given)
    outside = np.broadcast_to(mask == 0, x.shape)
    assert np.array_equal(adversarial[outside], x[outside])
    assert_within(adversarial, x)
    assert (trained.compute_loss(adversarial, y) > trained.compute_loss(x, y)).all()


def test_void_pixels_draw_no_attack(frames: tuple) -> None:
    """A 3×3 model sees one pixel far: images change up to one row into the void and not beyond."""
    x, _ = frames
    segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    y = segmenter.predict_labels(x)
    y[:, :8] = 255
    adversarial = ProjectedGradientDescent(segmenter, eps=EPS, eps_step=0.02, max_iter=3, **QUIET).generate(x, y)
    changed = (adversarial != x).any(axis=(0, 1, 3))
    assert not changed[:7].any()
    assert changed[7:].all()


def test_momentum(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    attack = MomentumIterativeMethod(trained, eps=EPS, eps_step=0.02, max_iter=8, batch_size=len(x), **QUIET)
    adversarial = attack.generate(x, y)
    assert_within(adversarial, x)
    assert (trained.compute_loss(adversarial, y) > trained.compute_loss(x, y)).all()


@pytest.mark.parametrize("labels", [lambda y: y, one_hot, lambda y: None])
def test_square_with_its_two_functions(trained: PyTorchSegmenter, frames: tuple, labels: Callable) -> None:
    x, y = frames
    np.random.seed(0)  # noqa: NPY002 (ART draws from the global generator)
    attack = SquareAttack(
        trained,
        adv_criterion=segmentation_criterion(0.3),
        loss=segmentation_loss(trained),
        eps=EPS,
        p_init=0.3,  # its first square has to fit into the shorter side
        max_iter=30,
        **QUIET,
    )
    adversarial = attack.generate(x.copy(), labels(y))
    assert_within(adversarial, x)
    losses, before = trained.compute_loss(adversarial, y), trained.compute_loss(x, y)
    # Where the attack aims at the model's own predictions, the loss on the true labels may stay where it was.
    assert (losses.mean() > before.mean()) if labels(y) is None else (losses > before).all()


def test_feature_adversaries_approach_the_guide(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, guide = frames[0][:2].copy(), frames[0][2:4].copy()
    distances = []
    for steps in (2, 20):
        attack = FeatureAdversariesPyTorch(trained, delta=0.3, layer="2", max_iter=steps, step_size=0.03, **QUIET)
        adversarial = attack.generate(x, guide)
        difference = trained.get_activations(adversarial, "2") - trained.get_activations(guide, "2")
        distances.append(np.square(difference).mean())
        assert np.abs(adversarial - x).max() <= 0.3 + 1e-6
    clean = np.square(trained.get_activations(x, "2") - trained.get_activations(guide, "2")).mean()
    assert distances[1] < distances[0] < clean
    assert distances[1] < clean / 2


def test_feature_adversaries_leave_no_gradient_in_the_model(frames: tuple) -> None:
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    x, guide = frames[0][:2].copy(), frames[0][2:4].copy()
    FeatureAdversariesPyTorch(segmenter, delta=0.3, layer="0", max_iter=2, step_size=0.05, **QUIET).generate(x, guide)
    assert all(parameter.grad is None for parameter in segmenter.model.parameters())


def test_security_curve(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    labels = one_hot(np.where(y == 255, 0, y))
    eps, adversarial, clean = SecurityCurve(eps=[0.02, 0.1, 0.3]).evaluate(
        trained, x, labels, max_iter=5, eps_step=0.05, verbose=False
    )
    assert eps == [0.02, 0.1, 0.3]
    assert clean > 0.93
    assert clean > adversarial[0] > adversarial[1] > adversarial[2]


class WithoutGradient(nn.Module):
    """The gradient masking that the security curve is there to find."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + ((8 * images).round() / 8 - images).detach() - images + images.detach()


@pytest.mark.parametrize("masked", [False, True])
def test_security_curve_detects_masked_gradients(frames: tuple, masked: bool) -> None:
    model = nn.Sequential(WithoutGradient() if masked else nn.Identity(), linear_cnn())
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    curve = SecurityCurve(eps=[0.2])
    curve.evaluate(segmenter, frames[0], segmenter.predict(frames[0]), max_iter=2, eps_step=0.1, verbose=False)
    assert curve.detected_obfuscating_gradients is masked


def test_gradient_check_of_art(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    assert not loss_gradient_check(trained, x, y, verbose=False).any()
    void = np.full_like(y, 255)
    assert loss_gradient_check(trained, x, void, verbose=False).tolist() == [[True, False, False]] * len(x)  # 0, no NaN


def test_summary_writer_of_art_gets_its_losses(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    seen = []

    class Recorder(SummaryWriter):
        def __init__(self) -> None:
            """ART's own needs tensorboardX."""

        def update(self, *args, estimator, x, y, **kwargs) -> None:
            seen.append(estimator.compute_losses(x=x, y=y)["total"])

        def reset(self) -> None:
            """Called after every attack."""

    ProjectedGradientDescent(
        trained, eps=EPS, eps_step=0.02, max_iter=4, summary_writer=Recorder(), **QUIET
    ).generate(x, y)
    assert len(seen) == 4
    assert (seen[-1] > seen[0]).all()


# ---------------------------------------------------------------------------------------------------- the callables


def test_criterion_compares_the_mean_iou_over_counted_pixels() -> None:
    """Two classes in four columns: one void, labels 0 0 1, predictions 0 1 1: IoU 1/2 and 1/2."""
    y = np.tile(np.array([255, 0, 0, 1]), (1, 3, 1))
    prediction = np.tile(np.array([2, 0, 1, 1]), (1, 3, 1))
    logits = one_hot(prediction)
    for labels in (y, one_hot(y)):
        assert segmentation_criterion(0.51)(logits, labels).tolist() == [True]
        assert segmentation_criterion(0.5)(logits, labels).tolist() == [False]
    assert segmentation_criterion(1.0)(logits, np.full_like(y, 255)).tolist() == [False]
    for refused in (0, 1.5):
        with pytest.raises(ValueError, match="min_miou"):
            segmentation_criterion(refused)


# ---------------------------------------------------------------------------------------------------- those that do not

GATE = "asks for ClassifierMixin, whose label checks refuse label maps"
GRADIENTS = "asks for ClassGradientsMixin: gradients of single logits of a class vector"
BOXES = "asks for ObjectDetectorMixin and indexes boxes"


def art_patch(segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray | None) -> object:
    attack = AdversarialPatchPyTorch(segmenter, patch_shape=(3, 6, 6), max_iter=1, targeted=y is not None, **QUIET)
    return attack.generate(x, y)


BLOCKED: list[tuple[str, type[Exception], str, Callable[[PyTorchSegmenter, np.ndarray, np.ndarray], object]]] = [
    *(
        (attack.__name__, EstimatorError, reason, lambda segmenter, x, y, attack=attack: attack(segmenter))
        for reason, attacks in {
            GATE: [
                ProjectedGradientDescentPyTorch,
                AdversarialPatch,
                AdversarialPatchNumpy,
                AutoProjectedGradientDescent,
                AutoConjugateGradient,
                AutoAttack,
                BoundaryAttack,
                HopSkipJump,
                GeoDA,
                SimBA,
                ZooAttack,
                UniversalPerturbation,
                TargetedUniversalPerturbation,
                VirtualAdversarialMethod,
                Wasserstein,
                ShadowAttack,
                PixelAttack,
            ],
            GRADIENTS: [
                DeepFool,
                CarliniL2Method,
                CarliniLInfMethod,
                SaliencyMapMethod,
                NewtonFool,
                ElasticNet,
            ],
            BOXES: [DPatch, RobustDPatch],
        }.items()
        for attack in attacks
    ),
    (
        "FrameSaliencyAttack",
        EstimatorError,
        GRADIENTS,
        lambda segmenter, x, y: FrameSaliencyAttack(segmenter, FastGradientMethod(segmenter)),
    ),
    (
        "AdversarialPatchPyTorch with labels",
        ValueError,
        "check_and_transform_label_format refuses label maps wherever the estimator has nb_classes",
        lambda segmenter, x, y: art_patch(segmenter, x, y),
    ),
    (
        "AdversarialPatchPyTorch without labels",
        IndexError,
        "takes the prediction for a vector over classes",
        lambda segmenter, x, y: art_patch(segmenter, x, None),
    ),
    (
        "MomentumIterativeMethod over several batches",
        ValueError,
        "allocates the momentum for all images and adds a batch to it",
        lambda segmenter, x, y: MomentumIterativeMethod(
            segmenter, eps=EPS, eps_step=0.02, max_iter=1, batch_size=2, verbose=False
        ).generate(x, y),
    ),
    (
        "ProjectedGradientDescent with random restarts",
        ValueError,
        "random initialisation is for classification only",
        lambda segmenter, x, y: ProjectedGradientDescent(
            segmenter, eps=EPS, eps_step=0.02, max_iter=1, num_random_init=1, verbose=False
        ).generate(x, y),
    ),
    (
        "FastGradientMethod, smallest perturbation",
        ValueError,
        "minimal=True is for classification only",
        lambda segmenter, x, y: FastGradientMethod(segmenter, minimal=True).generate(x, y),
    ),
    (
        "SquareAttack without its functions",
        ValueError,
        "has a criterion and a loss for classifiers only",
        lambda segmenter, x, y: SquareAttack(segmenter),
    ),
]


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(attempt, id=name, marks=pytest.mark.xfail(strict=True, raises=error, reason=reason))
        for name, error, reason, attempt in BLOCKED
    ],
)
def test_what_art_does_not_allow_for_a_segmenter(
    trained: PyTorchSegmenter, frames: tuple, attempt: Callable[[PyTorchSegmenter, np.ndarray, np.ndarray], object]
) -> None:
    """When one of these passes, a newer ART has lifted the limit: move it up and say so in the documentation."""
    attempt(trained, *frames)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the mask is silently ignored for all but classifiers")
def test_fast_gradient_method_keeps_a_mask(trained: PyTorchSegmenter, frames: tuple) -> None:
    x, y = frames
    mask = np.zeros(SHAPE[1:], dtype=np.float32)
    mask[:4] = 1
    adversarial = FastGradientMethod(trained, eps=EPS).generate(x, y, mask=mask)
    assert np.array_equal(adversarial[:, :, 4:], x[:, :, 4:])


@pytest.mark.xfail(strict=True, raises=ValueError, reason="compares argmax(y, axis=1) with the prediction")
def test_security_curve_with_label_maps(trained: PyTorchSegmenter, frames: tuple) -> None:
    SecurityCurve(eps=[0.1]).evaluate(trained, *frames, max_iter=1, eps_step=0.05, verbose=False)


def test_why_a_segmenter_is_not_a_classifier_of_art(frames: tuple) -> None:
    """The reason for this package's estimator: ART's classifier runs the same model and takes no label map."""
    classifier = PyTorchClassifier(
        linear_cnn(), nn.CrossEntropyLoss(), SHAPE, NB_CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
    )
    x, y = frames
    assert classifier.predict(x).shape == (6, NB_CLASSES, *SHAPE[1:])
    with pytest.raises(ValueError, match="Shape of labels"):
        FastGradientMethod(classifier, eps=EPS).generate(x, y)
