"""Foreground masks before a classifier: where they come from, what they leave to an attack, and their control."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import linear_cnn, random_images, tiny_cnn
from torch import Tensor, nn

from attacks.blur import blur_objects
from attacks.mask_and_classifier import MaskAndClassifierPGD
from ramdefense.baselines import ForegroundMask, random_masks, with_masks
from ramdefense.segmenter import PyTorchSegmenter

SIZE = (16, 20)
EPS = 8 / 255


def masks(number: int = 7, seed: int = 3) -> Tensor:
    """Rectangles, each somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(number, *SIZE, dtype=torch.bool)
    for mask in found:
        top, left = int(torch.randint(8, (), generator=generator)), int(torch.randint(10, (), generator=generator))
        mask[top : top + 6, left : left + 9] = True
    return found


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(6 * 4 * 5, 4)
    )


def classifier(defence: ForegroundMask | None, channels: int = 3, model: nn.Module | None = None) -> PyTorchClassifier:
    model = network() if model is None else model
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (channels, *SIZE), 4, torch.optim.Adam(model.parameters(), 1e-3),
        clip_values=(0.0, 1.0), preprocessing_defences=defence, device_type="cpu",
    )  # fmt: skip


def segmenter(seed: int = 0) -> PyTorchSegmenter:
    return PyTorchSegmenter(tiny_cnn(seed=seed), nb_classes=4, input_shape=(3, *SIZE))


def soft(images: Tensor) -> Tensor:
    """A mask function with a gradient."""
    return (images.mean(dim=1) * 6 - 3).sigmoid()


def behind_a_segmenter() -> PyTorchClassifier:
    return classifier(ForegroundMask(segmenter(), foreground=[1]))


def sensitive_segmenter() -> PyTorchSegmenter:
    model = linear_cnn()
    with torch.no_grad():
        model.weight.mul_(8)
    return PyTorchSegmenter(model, nb_classes=4, input_shape=(3, *SIZE))


SOURCES = {
    "given": (lambda: ForegroundMask(), 4),
    "segmenter": (lambda: ForegroundMask(segmenter(), foreground=[1, 2]), 3),
    "function": (lambda: ForegroundMask(soft), 3),
}

# ------------------------------------------------------------------------------------------------------------- masks


def test_given_masks_black_out_the_background() -> None:
    x, m = random_images(7), masks()
    masked, labels = ForegroundMask().forward(with_masks(x, m), "labels")
    assert labels == "labels"
    assert torch.equal(masked, torch.where(m[:, None], x, torch.zeros(())))
    array = with_masks(x.numpy(), m[:, None].float())
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, with_masks(x, m).numpy())
    np.testing.assert_array_equal(ForegroundMask()(array)[0], masked)


def test_the_segmenters_mask_is_the_sum_of_its_softmax() -> None:
    model, x = segmenter(), random_images(5)
    defence = ForegroundMask(model, foreground=[1, 3], batch_size=2)
    expected = model.logits(x).softmax(dim=1)[:, [1, 3]].sum(dim=1, keepdim=True)
    torch.testing.assert_close(defence.mask(x), expected)
    torch.testing.assert_close(defence.log_odds(x), (expected / (1 - expected)).log(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(defence.forward(x)[0], x * expected)
    hard = ForegroundMask(model, foreground=[1, 3], hard=True)
    assert set(hard.mask(x).unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(hard.mask(x), (expected > 0.5).float(), atol=0, rtol=0)


def test_the_segmenter_that_was_given_stays_as_it_was() -> None:
    model = segmenter()
    defence = ForegroundMask(model, foreground=[1])
    estimator = classifier(defence)
    estimator.loss_gradient(random_images(3).numpy(), np.eye(4, dtype=np.float32)[:3])
    for parameter in model.model.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
    assert all(p.grad is None for p in defence.masks.model.parameters())


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("source", ["segmenter", "function"])
def test_gradient_through_the_mask_against_finite_differences(source: str) -> None:
    defence = SOURCES[source][0]()
    if source == "segmenter":
        defence.masks.model.double().eval()
    model = network().double()
    x = random_images(1).double().requires_grad_()

    def loss(images: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(defence.forward(images)[0]), torch.tensor([1]))

    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-6
    for place in [(0, 0, 2, 3), (0, 1, 8, 11), (0, 2, 15, 0), (0, 0, 9, 19)]:
        moved = torch.zeros_like(x)
        moved[place] = step
        slope = (loss(x + moved) - loss(x - moved)) / (2 * step)
        assert float(gradient[place]) == pytest.approx(slope.item(), rel=1e-3, abs=1e-9)


def test_an_attacker_who_takes_the_mask_as_fixed_predicts_the_same_and_sees_another_gradient() -> None:
    model, source, x = network(), segmenter(), random_images(4).numpy()
    through = classifier(ForegroundMask(source, foreground=[1]), model=model)
    fixed = classifier(ForegroundMask(source, foreground=[1], differentiate=False), model=model)
    np.testing.assert_array_equal(through.predict(x), fixed.predict(x))
    y = np.eye(4, dtype=np.float32)
    seen = fixed.loss_gradient(x, y)
    assert np.abs(through.loss_gradient(x, y) - seen).max() > 1e-5
    with torch.no_grad():
        mask = ForegroundMask(source, foreground=[1]).mask(torch.tensor(x))
    images = (torch.tensor(x) * mask).requires_grad_()
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    np.testing.assert_allclose(seen, (images.grad * mask).numpy(), atol=1e-7)


def test_a_hard_mask_has_the_gradient_of_the_soft_one() -> None:
    source, x = segmenter(), random_images(2).requires_grad_()
    (plain,) = torch.autograd.grad((ForegroundMask(source, foreground=[1]).mask(x)).sum(), x)
    rounded = ForegroundMask(source, foreground=[1], hard=True)
    (straight,) = torch.autograd.grad(rounded.mask(x).sum(), x)
    torch.testing.assert_close(straight, plain)


@pytest.mark.parametrize("source", list(SOURCES))
def test_gradients_from_numpy_and_torch_agree(source: str) -> None:
    make, channels = SOURCES[source]
    estimator, x = classifier(make(), channels), random_images(3)
    x = with_masks(x, masks(3)) if channels == 4 else x
    y = torch.tensor([0, 1, 2])
    array = estimator.loss_gradient(x.numpy(), np.eye(4, dtype=np.float32)[y])
    np.testing.assert_allclose(array, estimator.loss_gradient(x, nn.functional.one_hot(y, 4).float()), atol=1e-8)
    assert array.shape == x.shape


def test_no_gradient_outside_given_masks_nor_into_them() -> None:
    x, m = with_masks(random_images(7), masks()), masks().numpy()
    gradient = classifier(ForegroundMask(), 4).loss_gradient(x.numpy(), np.eye(4, dtype=np.float32)[np.arange(7) % 4])
    outside = np.broadcast_to(~m[:, None], (7, 3, *SIZE))
    assert (gradient[:, :3][outside] == 0).all()
    assert (gradient[:, 3] == 0).all()
    assert (gradient[:, :3][~outside] != 0).mean() > 0.9


# -------------------------------------------------------------------------------------------------------- ART's attacks


@pytest.mark.parametrize("restarts", [0, 1])
def test_pgd_in_batches_keeps_each_mask_with_its_image(restarts: int) -> None:
    """Seven images in batches of three: a mask that belonged to another image would show outside its own."""
    estimator, x, m = classifier(ForegroundMask(), 4), random_images(7), masks()
    given, y = with_masks(x.numpy(), m), np.arange(7) % 4
    attack = ProjectedGradientDescent(
        estimator, eps=EPS, eps_step=EPS / 2, max_iter=4, batch_size=3, num_random_init=restarts, verbose=False
    )
    adversarial = attack.generate(given, y)
    before, after = estimator.compute_loss(given, y), estimator.compute_loss(adversarial, y)
    assert (after > before).all()
    moved = np.abs(adversarial - given)
    assert moved.max() <= EPS + 1e-6
    if restarts == 0:
        inside = m.numpy()
        assert moved[:, :3].max(axis=1)[~inside].max() == 0
        assert (moved[:, :3].max(axis=1)[inside] > 0).mean() > 0.95
        one_by_one = np.concatenate([attack.generate(given[i : i + 1], y[i : i + 1]) for i in range(7)])
        np.testing.assert_allclose(adversarial, one_by_one, atol=1e-6)
    # a random start has moved the mask's channel: by less than half, which changes no mask
    np.testing.assert_array_equal(ForegroundMask().mask(torch.tensor(adversarial))[:, 0] > 0, m)


def test_what_lies_outside_given_masks_changes_nothing() -> None:
    estimator, x, m = classifier(ForegroundMask(), 4), random_images(7), masks()
    other = torch.where(m[:, None], x, random_images(7, seed=5))
    np.testing.assert_array_equal(
        estimator.predict(with_masks(x.numpy(), m)), estimator.predict(with_masks(other.numpy(), m))
    )


def test_arts_adversarial_trainer_shuffles_masks_with_their_images() -> None:
    estimator, seen = classifier(ForegroundMask(), 4), []
    x, m = random_images(7), masks()
    coloured = torch.where(m[:, None], torch.full_like(x, 0.6), torch.full_like(x, 0.1))
    estimator.model[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    trainer = AdversarialTrainerMadryPGD(estimator, nb_epochs=1, batch_size=3, eps=EPS, eps_step=EPS / 2, max_iter=2)
    trainer.fit(with_masks(coloured.numpy(), m), np.eye(4, dtype=np.float32)[np.arange(7) % 4])
    assert seen
    for batch in seen:  # whatever the order: blacked out, or the object's own colour
        assert (((batch - 0.6).abs() <= EPS + 1e-6) | (batch == 0)).all()


def test_the_joint_attack_is_no_weaker_than_the_attacker_who_does_not_know_the_segmenter() -> None:
    model, source = network(), sensitive_segmenter()
    estimator = classifier(ForegroundMask(source, foreground=[1]), model=model)
    naive = classifier(ForegroundMask(source, foreground=[1], differentiate=False), model=model)
    x, y, m = random_images(7).numpy(), np.arange(7) % 4, masks()
    joint = MaskAndClassifierPGD(estimator, EPS, EPS / 4, 10, weight=0.1, batch_size=3, random_start=False)
    found = joint.generate(x, y, masks=m)
    assert found.dtype == np.float32
    assert np.abs(found - x).max() <= EPS + 1e-6
    pgd = ProjectedGradientDescent(naive, eps=EPS, eps_step=EPS / 4, max_iter=10, verbose=False).generate(x, y)
    assert estimator.compute_loss(found, y).mean() > estimator.compute_loss(pgd, y).mean()
    # the kept step is never worse than the clean image
    assert (estimator.compute_loss(found, y) >= estimator.compute_loss(x, y) - 1e-6).all()


def test_the_joint_attack_moves_the_mask_further_the_more_the_mask_weighs() -> None:
    source, x, m, y = sensitive_segmenter(), random_images(4), masks(4), np.arange(4)
    defence = ForegroundMask(source, foreground=[1])
    estimator = classifier(defence)

    def wrong(images: np.ndarray) -> float:
        odds = defence.log_odds(torch.tensor(images))[:, 0]
        return float(nn.functional.binary_cross_entropy_with_logits(odds, m.float()))

    found = [
        wrong(MaskAndClassifierPGD(estimator, EPS, EPS / 4, 8, weight=weight).generate(x.numpy(), y, masks=m))
        for weight in (0.0, 100.0)
    ]
    assert found[1] > found[0] + 0.01
    with pytest.raises(ValueError, match="masks have shape"):
        MaskAndClassifierPGD(estimator).generate(x.numpy(), masks=m[:2])
    assert MaskAndClassifierPGD(estimator, max_iter=1).generate(x.numpy()).shape == x.shape


# ------------------------------------------------------------------------------------------------------------- control


@given(st.integers(0, 2**31), st.sampled_from(["shift", "blob"]), st.integers(1, 14), st.integers(1, 18))
@settings(max_examples=30, deadline=None)
def test_random_masks_have_the_same_area(seed: int, kind: str, height: int, width: int) -> None:
    m = torch.zeros(2, *SIZE, dtype=torch.bool)
    m[0, :height, :width] = True
    made = random_masks(m, kind, seed=seed)
    assert made.dtype == torch.bool
    assert made.sum(dim=(1, 2)).tolist() == m.sum(dim=(1, 2)).tolist()


def test_a_shifted_mask_keeps_its_shape_and_a_blob_does_not() -> None:
    m = masks(5)
    for mask, made in zip(m, random_masks(m, "shift"), strict=True):
        spectrum = torch.fft.fft2(mask.float()).abs()  # the same for every cyclic shift, and for little else
        torch.testing.assert_close(spectrum, torch.fft.fft2(made.float()).abs(), atol=1e-3, rtol=1e-4)
    blobs = torch.fft.fft2(random_masks(m, "blob").float()).abs()
    assert ((blobs - torch.fft.fft2(m.float()).abs()).abs().amax(dim=(1, 2)) > 1).all()


def test_a_random_mask_depends_on_its_number_alone() -> None:
    m = masks(6)
    whole = random_masks(m, "blob", seed=4)
    assert torch.equal(whole[2:4], random_masks(m[2:4], "blob", seed=4, indices=[2, 3]))
    assert not torch.equal(whole, random_masks(m, "blob", seed=5))
    overlap = (random_masks(m[:1].expand(200, -1, -1), "shift") & m[0]).float().mean()
    assert overlap == pytest.approx((54 / 320) ** 2, rel=0.35)  # as if the place were drawn uniformly


# ---------------------------------------------------------------------------------------------------------------- blur


def test_only_the_object_is_blurred() -> None:
    x, m = random_images(3), masks(3)
    blurred = blur_objects(x, m, 2.0)
    assert torch.equal(blurred[(~m)[:, None].expand_as(x)], x[(~m)[:, None].expand_as(x)])
    inside = m[:, None].expand_as(x)
    assert blurred[inside].std() < 0.5 * x[inside].std()
    assert torch.equal(blur_objects(x, m, 0), x)
    assert blur_objects(x, m, 50.0).isfinite().all()
    # against the sum over a Gaussian, far from the image's sides
    picture, everywhere = torch.zeros(1, 1, 31, 31), torch.ones(1, 31, 31, dtype=torch.bool)
    picture[0, 0, 15, 15] = 1
    steps = torch.arange(-15.0, 16)
    weights = torch.exp(-(steps**2) / 8) * (steps.abs() <= 6)
    expected = torch.outer(weights, weights) / weights.sum() ** 2
    torch.testing.assert_close(blur_objects(picture, everywhere, 2.0)[0, 0], expected)


# -------------------------------------------------------------------------------------------------------------- errors


def test_pickling() -> None:
    x = random_images(3)
    for defence in (ForegroundMask(segmenter(), foreground=[1], hard=True), ForegroundMask(soft)):
        again = pickle.loads(pickle.dumps(defence))
        assert torch.equal(again.forward(x)[0], defence.forward(x)[0])
        assert repr(again) == repr(defence)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ForegroundMask(segmenter()), r"foreground=\(\)"),
        (lambda: ForegroundMask(segmenter(), foreground=[4]), "from 0 to 3"),
        (lambda: ForegroundMask(segmenter(), foreground=[0, 1, 2, 3]), "leave the background out"),
        (lambda: ForegroundMask(foreground=[1]), "give one as masks"),
        (lambda: ForegroundMask(channels=0), "channels=0"),
        (lambda: ForegroundMask().forward(random_images(2)), "with_masks"),
        (lambda: ForegroundMask().log_odds(random_images(2)), "no segmenter"),
        (lambda: ForegroundMask(lambda x: x).forward(random_images(2)), "mask function returned"),
        (lambda: ForegroundMask(lambda x: 2 + x[:, 0]).forward(random_images(2)), r"outside \[0, 1\]"),
        (lambda: with_masks(random_images(2), masks(3)), "masks have shape"),
        (lambda: with_masks(random_images(2), masks(2) * 0.5), "0 and 1"),
        (lambda: random_masks(masks(2), "square"), "shift, blob"),
        (lambda: random_masks(masks(2).float()), "bool"),
        (lambda: random_masks(masks(2), indices=[1]), "1 indices for 2"),
        (lambda: blur_objects(random_images(2), masks(2), -1), "sigma=-1"),
        (lambda: blur_objects(random_images(2), masks(3), 1), "masks are"),
        (lambda: MaskAndClassifierPGD(classifier(ForegroundMask(soft))), "no ForegroundMask with a segmenter"),
        (lambda: MaskAndClassifierPGD(behind_a_segmenter(), eps=-1), "eps=-1"),
        (lambda: MaskAndClassifierPGD(behind_a_segmenter(), max_iter=0), "max_iter=0"),
    ],
)
def test_errors_name_value_and_remedy(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_what_is_no_source_of_masks() -> None:
    with pytest.raises(TypeError, match="PyTorchSegmenter"):
        ForegroundMask("masks.png")
