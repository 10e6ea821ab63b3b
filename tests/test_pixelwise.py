"""The pixel-wise attacks: closed forms on linear models, the ball, the papers' rules, both styles by one mechanism."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NB_CLASSES, SHAPE, random_images, random_labels, tiny_cnn
from torch import Tensor, nn

from attacks.art_style import PixelAttack
from attacks.minimal_norm import MinimalNormOptions
from attacks.options import PatchOptions, PixelOptions
from attacks.pixelwise import PIXEL_ATTACKS, OwnPrediction, arnab_iterations
from attacks.presets import Preset
from attacks.targets import FixedClass, Untargeted
from ramdefense.segmenter import PyTorchSegmenter

IN_A_BALL = [name for name, preset in PIXEL_ATTACKS.items() if preset.threat == "pixel"]
ARNAB = ["pixel-fgsm", "pixel-fgsm-ll", "pixel-ifgsm", "pixel-ifgsm-ll"]
ROUNDING = 2.0**-24  # of one sum in [0.5, 1] in single precision
QUIET: dict[str, Any] = {"verbose": False}


def one_pixel_model(nb_classes: int = 2, seed: int = 0) -> PyTorchSegmenter:
    """A 1×1 convolution with its boundaries among the images: each pixel is a linear classifier of its own."""
    torch.manual_seed(seed)
    model = nn.Conv2d(3, nb_classes, 1).requires_grad_(False)
    model.bias -= model(middling_images()).mean((0, 2, 3))
    return PyTorchSegmenter(model, nb_classes, SHAPE)


def middling_images(number: int = 3) -> Tensor:
    """So far from 0 and 1 that clipping has no say."""
    return 0.4 + 0.2 * random_images(number)


def margins(segmenter: PyTorchSegmenter, images: Tensor, y: Tensor, ord: float) -> Tensor:
    """How far each pixel is from leaving its label in the norm that is dual to `ord`: two classes, in double."""
    weight = segmenter.model.weight[:, :, 0, 0].double()
    logits = segmenter.model.double()(images.double())
    segmenter.model.float()
    own, other = (logits.gather(1, index[:, None])[:, 0] for index in (y, 1 - y))
    return (own - other) / torch.linalg.vector_norm(weight[0] - weight[1], ord=ord)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("name", "sign"), [("pixel-fgsm", 1.0), ("pixel-fgsm-ll", -1.0)])
@pytest.mark.parametrize("nb_classes", [2, NB_CLASSES])
def test_fgsm_is_one_step_along_the_sign_of_the_gradient(name: str, sign: float, nb_classes: int) -> None:
    """The gradient of the cross entropy to y is W^T (softmax − one-hot(y)); it is raised, or lowered to the least."""
    segmenter, images, eps = one_pixel_model(nb_classes), random_images(2), 0.03
    adversarial = PIXEL_ATTACKS[name].art(segmenter, eps=eps, **QUIET).generate(images.numpy())
    logits = segmenter.model(images).double().numpy()
    label = logits.argmax(1) if name == "pixel-fgsm" else logits.argmin(1)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    residual = probabilities - np.moveaxis(np.eye(nb_classes)[label], -1, 1)
    weight = segmenter.model.weight[:, :, 0, 0].double().numpy()
    gradient = np.einsum("nchw,ck->nkhw", residual, weight)
    assert np.abs(gradient).min() > 1e-7
    expected = np.clip(images.double().numpy() + sign * eps * np.sign(gradient), 0, 1)
    np.testing.assert_allclose(adversarial, expected, atol=2 * ROUNDING, rtol=0)


@pytest.mark.parametrize("name", IN_A_BALL)
def test_every_attack_in_the_ball_wins_what_can_be_won_on_a_linear_model(name: str) -> None:
    """A pixel can be won if its margin is under ε times the L1 norm of the difference of the weights."""
    segmenter, images, eps = one_pixel_model(), middling_images(), 8 / 255
    y = segmenter.predict_labels(images)  # the other class is the least likely one
    options = {} if name in ARNAB else {"max_iter": 12}
    attack = PIXEL_ATTACKS[name].art(segmenter, eps=eps, **options, **QUIET)
    adversarial = attack.generate(images, y)
    need = margins(segmenter, images, y, ord=1)
    won = segmenter.predict_labels(adversarial) != y
    if name == "pixel-ifgsm-ll":  # a pixel that is won has another least likely class, and is drawn back
        assert (won <= (need < 1.001 * eps)).all()
        return
    assert torch.equal(won[(need - eps).abs() > 1e-4 * eps], (need < eps)[(need - eps).abs() > 1e-4 * eps])
    assert attack.result.criterion == pytest.approx(won.float().mean((1, 2)).tolist(), abs=1e-6)
    assert 0.05 < won.float().mean() < 0.95, "some pixels can be won and some cannot"


def test_the_best_step_in_the_l2_ball_goes_along_the_gradient() -> None:
    """With two classes the sum of the margins is linear, so that its minimum in the ball is ε g/‖g‖ away."""
    segmenter, images, eps = one_pixel_model(), middling_images(), 0.3
    y = random_labels(3, void=False) % 2
    weight = segmenter.model.weight[:, :, 0, 0].double()
    gradient = torch.where((y == 1)[:, None], *((weight[i] - weight[1 - i])[:, None, None] for i in (1, 0)))
    unit = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    for options in ({"max_iter": 1, "eps_step": eps}, {"max_iter": 7, "eps_step": eps / 4, "random_start": True}):
        attack = PixelAttack(
            segmenter, norm="2", eps=eps, objective="margin", momentum=0.0, keep_best=False, **options, **QUIET
        )
        adversarial = attack.generate(images, y)
        if options["max_iter"] == 1:
            torch.testing.assert_close(adversarial.double(), images.double() - eps * unit, atol=1e-6, rtol=0)
        distance = (adversarial - images).double().flatten(1).norm(dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, eps), atol=1e-6, rtol=0)


def test_iterated_fgsm_counts_its_steps_and_comes_to_the_edge_of_the_ball() -> None:
    segmenter, images = one_pixel_model(), middling_images(1)
    for bits, steps in ((1, 2), (4, 5), (8, 10)):
        attack = PIXEL_ATTACKS["pixel-ifgsm"].art(segmenter, eps=bits / 255, **QUIET)
        assert (attack.max_iter, attack.eps_step) == (steps, 1 / 255)
        adversarial = attack.generate(images)
        assert attack.result.steps == (steps,)
        moved = (adversarial - images).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, bits / 255), atol=2 * ROUNDING, rtol=0)


# ---------------------------------------------------------------- the ball


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(IN_A_BALL),
    norm=st.sampled_from(["inf", "2"]),
    eps=st.floats(1e-4, 2.0),
    seed=st.integers(0, 9),
    random_start=st.booleans(),
)
def test_adversarial_images_are_in_the_ball_and_in_the_clip_range(
    name: str, norm: str, eps: float, seed: int, random_start: bool
) -> None:
    images = random_images(2, seed=seed)
    images[:, :, :2], images[:, :, -2:] = 0.0, 1.0
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    steps = {"max_iter": 2, "eps_step": eps} if name in ARNAB else {"max_iter": 3}
    attack = PIXEL_ATTACKS[name].art(
        segmenter, eps=eps, norm=norm, seed=seed, random_start=random_start, **steps, **QUIET
    )
    adversarial = attack.generate(images, random_labels(2))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    moved = (adversarial.double() - images.double()).flatten(1)
    distance = torch.linalg.vector_norm(moved, ord=float(norm), dim=1)
    rounding = ROUNDING * (1 if norm == "inf" else math.sqrt(moved.shape[1]))
    assert (distance <= np.float32(eps).item() + 2 * rounding).all()
    assert (distance > 0).all()


def test_double_precision_stays_double_precision() -> None:
    images = random_images(2).double()
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    adversarial = PixelAttack(segmenter, eps=0.1, max_iter=2, **QUIET).generate(
        images.numpy(), random_labels(2).numpy()
    )
    assert adversarial.dtype == np.float64
    assert np.abs(adversarial - images.numpy()).max() <= 0.1 + 1e-15


# ---------------------------------------------------------------- seeds, batches, styles


def test_neither_batch_size_nor_order_changes_a_result() -> None:
    images, labels = random_images(4), random_labels(4)
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    options: dict[str, Any] = {"random_start": True, "num_restarts": 2, "max_iter": 3, **QUIET}
    for norm in ("inf", "2"):
        whole = PixelAttack(segmenter, norm=norm, batch_size=4, **options).generate(images, labels)
        parts = PixelAttack(segmenter, norm=norm, batch_size=3, **options).generate(images, labels)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
        last = PixelAttack(segmenter, norm=norm, **options).generate(images[[3]], labels[[3]], images=[3])
        torch.testing.assert_close(last, whole[[3]], atol=1e-6, rtol=0)
        assert torch.equal(PixelAttack(segmenter, norm=norm, batch_size=4, **options).generate(images, labels), whole)
        other = PixelAttack(segmenter, norm=norm, seed=1, **options).generate(images, labels)
        assert not torch.allclose(other, whole)


@pytest.mark.parametrize("name", PIXEL_ATTACKS)
def test_both_styles_make_the_same_images(name: str, images: Tensor, labels: Tensor) -> None:
    model, preset = tiny_cnn(), PIXEL_ATTACKS[name]
    options: dict[str, Any] = {
        "max_iter": 3,
        "seed": 2,
        **({} if name not in ARNAB[2:] else {"eps_step": 0.01}),
        **QUIET,
    }
    art = preset.art(PyTorchSegmenter(model, NB_CLASSES, SHAPE), **options)
    atk = preset.torch(model, **options)
    expected = art.generate(images, labels)
    torch.testing.assert_close(atk(images, labels), expected, atol=1e-6, rtol=0)
    assert atk.result.criterion == pytest.approx(art.result.criterion)
    assert bool(art.mask(images).all())
    assert art.mask(images.numpy()).shape == labels.shape
    assert art.target_map(labels) is None
    if preset.threat == "pixel":  # the others give back the image where three steps win nothing
        assert not torch.equal(expected, images)


# ---------------------------------------------------------------- the papers' rules


@pytest.mark.parametrize(
    ("eps", "steps"), [(0.25, 1), (0.5, 1), (1, 2), (2, 3), (4, 5), (8, 10), (16, 20), (32, 36), (0.01, 1), (3.2, 4)]
)
def test_the_iterations_of_arnab_et_al(eps: float, steps: int) -> None:
    """Their radii of section 4.1 first."""
    assert arnab_iterations(eps) == steps
    assert arnab_iterations(255 * (eps / 255)) == steps


@given(st.integers(1, 255))
def test_rounding_adds_no_iteration(bits: int) -> None:
    exact = max(1, min(bits + 4, -(-5 * bits // 4)))
    assert arnab_iterations(255 * (bits / 255)) == arnab_iterations(bits) == exact


@pytest.mark.parametrize("eps", [0, -1, math.nan])
def test_no_iterations_without_a_radius(eps: float) -> None:
    with pytest.raises(ValueError, match=r"`eps` is .* above 0"):
        arnab_iterations(eps)


def test_the_rule_of_arnab_et_al_is_for_the_l_inf_ball() -> None:
    preset = PIXEL_ATTACKS["pixel-ifgsm"]
    with pytest.raises(ValueError, match="give `max_iter` and `eps_step` yourself"):
        preset.resolve(norm="2", eps=1.0)
    assert preset.resolve(norm="2", eps=1.0, max_iter=5, eps_step=0.3)["max_iter"] == 5


@pytest.mark.parametrize("name", ARNAB)
def test_the_attacks_of_arnab_et_al_look_at_no_label(name: str, images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    attack = PIXEL_ATTACKS[name].art(segmenter, **QUIET)
    without = attack.generate(images)
    assert torch.equal(attack.generate(images, labels), without)
    atk = PIXEL_ATTACKS[name].torch(model, **QUIET)
    assert torch.equal(atk(images, labels), atk(images))
    # unless they are asked to
    told = PIXEL_ATTACKS[name].art(segmenter, target=Untargeted(), **QUIET)
    if not name.endswith("-ll"):
        assert not torch.equal(told.generate(images, labels), without)
    own = segmenter.predict_labels(images)
    assert torch.equal(told.generate(images, own), without)


def test_every_attack_takes_a_target(images: Tensor, labels: Tensor) -> None:
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    for preset in PIXEL_ATTACKS.values():
        attack = preset.art(segmenter, target=FixedClass(1), **{"max_iter": 2, "eps_step": 0.02, **QUIET})
        attack.generate(images[:2], labels[:2])
        assert attack.targeted
        aim = attack.target_map(labels)
        assert set(aim.unique().tolist()) == {1, 255}


# ---------------------------------------------------------------- presets


def test_presets_say_what_they_are() -> None:
    for name, preset in PIXEL_ATTACKS.items():
        assert preset.name == name
        assert name.startswith("pixel-")
        assert preset.summary.endswith(".")
        assert preset.paper
        resolved = preset.resolve()
        made = {"pixel": PixelOptions, "minimal": MinimalNormOptions, "patch": PatchOptions}[preset.threat](**resolved)
        assert all(getattr(made, key) == value for key, value in resolved.items())
    with pytest.raises(TypeError):
        PIXEL_ATTACKS["mine"] = PIXEL_ATTACKS["pixel-pgd"]  # type: ignore[index]


def test_what_is_given_overrules_what_is_set_and_what_follows() -> None:
    preset = Preset("mine", "Mine.", "", "pixel", {"max_iter": 7, "momentum": 0.0}, {"eps_step": lambda o: o.eps / 2})
    assert preset.resolve() == {"max_iter": 7, "momentum": 0.0, "eps_step": 8 / 255 / 2}
    assert preset.resolve(eps=0.5, max_iter=3) == {"max_iter": 3, "momentum": 0.0, "eps": 0.5, "eps_step": 0.25}
    assert preset.resolve(eps_step=0.1)["eps_step"] == 0.1
    with pytest.raises(TypeError, match=r"mine has no option epsilon; its options are .*eps"):
        preset.resolve(epsilon=0.1)
    with pytest.raises(ValueError, match="`eps` is -1"):
        preset.resolve(eps=-1)


def test_presets_of_every_threat_make_both_styles(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn()
    for threat, name in (("patch", "PatchAttack"), ("pixel", "PixelAttack"), ("minimal", "MinimalNormAttack")):
        preset = Preset("mine", "Mine.", "", threat, {"max_iter": 2, **QUIET})  # type: ignore[arg-type]
        art = preset.art(PyTorchSegmenter(model, NB_CLASSES, SHAPE))
        atk = preset.torch(model, ignore_index=-1)
        assert (type(art).__name__, type(atk).__name__, atk.ignore_index) == (name, name, -1)
        torch.testing.assert_close(atk(images, labels.where(labels != 255, -1)), art.generate(images, labels))


def test_own_prediction_is_a_value() -> None:
    assert OwnPrediction() == OwnPrediction()
    assert repr(OwnPrediction()) == "OwnPrediction()"
    assert not OwnPrediction().targeted
