"""Objectives: each against its formula in plain Python, pixel by pixel; what all have in common; limit cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attacks.criteria import off_label, on_target
from attacks.objectives import OBJECTIVES, cross_entropy, segpgd

VOID = 255
CLASSES = 4
AIMED = [name for name in OBJECTIVES if name not in ("none", "least_likely")]  # those that the reference steers
MASKED = ["dag", "masked_cross_entropy", "class_balanced_cross_entropy", "masked_spherical"]
DIRECTIONS = pytest.mark.parametrize("targeted", [True, False], ids=["targeted", "untargeted"])
EVERY = pytest.mark.parametrize("name", OBJECTIVES)


def scene(seed: int = 0, scale: float = 1.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, reference map and counted pixels of three images, the last without a counted pixel.

    About half of the pixels are predicted as their reference, so that both sides of every mask are there.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, CLASSES, 4, 5, generator=generator, dtype=dtype)
    reference = torch.randint(0, CLASSES, (3, 4, 5), generator=generator)
    reference = torch.where(torch.rand(3, 4, 5, generator=generator) < 0.4, logits.argmax(1), reference)
    reference = reference.masked_fill(torch.rand(3, 4, 5, generator=generator) < 0.2, VOID)
    counted = (reference != VOID) & (torch.rand(3, 4, 5, generator=generator) < 0.8)
    counted[2] = False
    return logits, reference, counted


def evaluate(
    name: str, targeted: bool, logits: Tensor, reference: Tensor, counted: Tensor, progress: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Value (N,) and gradient on the logits."""
    leaf = logits.clone().requires_grad_()
    loss = OBJECTIVES[name](targeted)(leaf, reference, counted, progress)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


# ---------------------------------------------------------------- the formulas, pixel by pixel


@dataclass(frozen=True)
class Pixel:
    """One counted pixel and what its image says about it."""

    logits: list[float]
    own: int
    targeted: bool
    progress: float
    share_left: float = 0.0
    class_weight: float = 0.0

    @property
    def probabilities(self) -> list[float]:
        top = max(self.logits)
        odds = [math.exp(logit - top) for logit in self.logits]
        return [odd / sum(odds) for odd in odds]

    @property
    def entropy(self) -> float:
        return -math.log(self.probabilities[self.own])

    @property
    def loss(self) -> float:
        """The cross entropy that is weighed: to the target, or log C minus that to the label."""
        return self.entropy if self.targeted else math.log(len(self.logits)) - self.entropy

    @property
    def margin(self) -> float:
        rest = [logit for index, logit in enumerate(self.logits) if index != self.own]
        return (max(rest) - self.logits[self.own]) * (1 if self.targeted else -1)

    @property
    def left(self) -> bool:
        return (self.logits.index(max(self.logits)) == self.own) != self.targeted


def jensen_shannon(pixel: Pixel) -> float:
    """½ KL(p ‖ m) + ½ KL(e ‖ m) as it stands."""
    label = [float(index == pixel.own) for index in range(len(pixel.logits))]
    total = 0.0
    for p, e in zip(pixel.probabilities, label, strict=True):
        middle = (p + e) / 2
        total += sum(part * math.log(part / middle) for part in (p, e) if part > 0) / 2
    return total if pixel.targeted else -total


def cosine(pixel: Pixel) -> float:
    weight = pixel.probabilities[pixel.own] / math.sqrt(sum(p * p for p in pixel.probabilities))
    return 1 - weight if pixel.targeted else weight


def spherical(pixel: Pixel) -> float:
    own = pixel.logits[pixel.own] / math.sqrt(sum(logit * logit for logit in pixel.logits))
    return 1 - own if pixel.targeted else own + 1 / math.sqrt(len(pixel.logits))


def by_progress(pixel: Pixel) -> float:
    return (1 - pixel.progress / 2 if pixel.left else pixel.progress / 2) * pixel.loss


FORMULAS: dict[str, Callable[[Pixel], float]] = {
    "cross_entropy": lambda pixel: pixel.entropy if pixel.targeted else -pixel.entropy,
    "margin": lambda pixel: pixel.margin,
    "none": lambda pixel: 0.0,
    "dag": lambda pixel: pixel.margin if pixel.left else 0.0,
    "segpgd": by_progress,
    "cospgd": lambda pixel: cosine(pixel) * pixel.loss,
    "balanced_cross_entropy": by_progress,
    "masked_cross_entropy": lambda pixel: pixel.loss if pixel.left else 0.0,
    "class_balanced_cross_entropy": lambda pixel: pixel.class_weight * pixel.loss if pixel.left else 0.0,
    "jensen_shannon": jensen_shannon,
    "masked_spherical": lambda pixel: spherical(pixel) if pixel.left else 0.0,
    "ssap": lambda pixel: (pixel.share_left if pixel.left else 1 - pixel.share_left) * pixel.loss,
    "least_likely": lambda pixel: -math.log(min(pixel.probabilities)),
}


def pixels_of(
    image: int, logits: Tensor, reference: Tensor, counted: Tensor, targeted: bool, progress: float
) -> list[Pixel]:
    """The counted pixels of one image."""
    found = [
        Pixel(logits[image, :, row, column].tolist(), int(reference[image, row, column]), targeted, progress)
        for row, column in counted[image].nonzero().tolist()
    ]
    labels = [pixel.own for pixel in found]
    return [
        Pixel(
            pixel.logits, pixel.own, targeted, progress,
            share_left=sum(other.left for other in found) / len(found),
            class_weight=len(found) / (len(set(labels)) * labels.count(pixel.own)),
        )
        for pixel in found
    ]  # fmt: skip


@EVERY
@DIRECTIONS
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_formula_pixel_by_pixel(name: str, targeted: bool, progress: float, seed: int) -> None:
    logits, reference, counted = scene(seed)
    expected = [
        sum(FORMULAS[name](pixel) for pixel in pixels_of(image, logits, reference, counted, targeted, progress))
        for image in range(3)
    ]
    loss, _ = evaluate(name, targeted, logits, reference, counted, progress)
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    single, _ = evaluate(name, targeted, logits.float(), reference, counted, progress)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_scene_has_pixels_on_both_sides_of_every_mask() -> None:
    logits, reference, counted = scene()
    for image in range(2):
        left = [pixel.left for pixel in pixels_of(image, logits, reference, counted, True, 0.0)]
        assert {True, False} == set(left)


# the weights of CosPGD alone change with the logits and are not differentiated: its gradient is not that of its value
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cospgd"])
@DIRECTIONS
@pytest.mark.parametrize("image", [0, 1])
def test_the_gradient_is_that_of_the_value(name: str, targeted: bool, image: int) -> None:
    """Central differences in every logit of an image, each in a row of one batch."""
    logits, reference, counted = (tensor[image] for tensor in scene())
    _, slope = evaluate(name, targeted, logits[None], reference[None], counted[None])
    count, small = logits.numel(), 1e-6
    moves = small * torch.eye(count, dtype=torch.float64).view(count, *logits.shape)
    maps = reference.expand(count, -1, -1), counted.expand(count, -1, -1)
    above, below = (OBJECTIVES[name](targeted)(logits + move, *maps, 0.25) for move in (moves, -moves))
    torch.testing.assert_close((above - below) / (2 * small), slope.flatten(), atol=1e-7, rtol=1e-6)


@DIRECTIONS
def test_cospgd_weighs_the_gradient(targeted: bool) -> None:
    logits, reference, counted = scene()
    _, slope = evaluate("cospgd", targeted, logits, reference, counted)
    _, plain = evaluate("cross_entropy", targeted, logits, reference, counted)
    for image in range(2):
        pixels = pixels_of(image, logits, reference, counted, targeted, 0.25)
        for pixel, (row, column) in zip(pixels, counted[image].nonzero().tolist(), strict=True):
            expected = cosine(pixel) * plain[image, :, row, column]
            torch.testing.assert_close(slope[image, :, row, column], expected)


# ---------------------------------------------------------------- what all have in common


@EVERY
@DIRECTIONS
def test_pixels_that_are_not_counted_have_no_part(name: str, targeted: bool) -> None:
    logits, reference, counted = scene()
    loss, slope = evaluate(name, targeted, logits, reference, counted)
    assert (slope.movedim(1, -1)[~counted] == 0).all()
    for junk, label in ((1e4, VOID), (-1e4, 0), (0.0, 3), (7.0, -1)):
        spoiled = logits.where(counted[:, None], junk)
        again, same = evaluate(name, targeted, spoiled, reference.where(counted, label), counted)
        assert torch.equal(again, loss)
        assert torch.equal(same, slope)


@EVERY
@DIRECTIONS
def test_an_image_without_a_counted_pixel_is_zero(name: str, targeted: bool) -> None:
    logits, reference, counted = scene()
    loss, slope = evaluate(name, targeted, logits, reference, counted)
    assert loss.shape == (3,)
    assert loss[2] == 0
    assert (slope[2] == 0).all()


@EVERY
@DIRECTIONS
def test_images_know_nothing_of_each_other(name: str, targeted: bool) -> None:
    logits, reference, counted = scene()
    loss, slope = evaluate(name, targeted, logits, reference, counted)
    for image in range(3):
        row = slice(image, image + 1)
        alone, lone_slope = evaluate(name, targeted, logits[row], reference[row], counted[row])
        torch.testing.assert_close(alone, loss[row])
        torch.testing.assert_close(lone_slope, slope[row])


@EVERY
@DIRECTIONS
def test_what_is_given_is_left_as_it_is(name: str, targeted: bool) -> None:
    given = scene()
    before = [tensor.clone() for tensor in given]
    OBJECTIVES[name](targeted)(*given, 0.5)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))


@EVERY
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits_are_safe(name: str, targeted: bool, dtype: torch.dtype) -> None:
    logits, reference, counted = scene(dtype=dtype)
    tied = torch.ones_like(logits)
    for extreme in (1e4 * logits, 1e4 * logits - 1e5, 1e-8 * logits, tied, 1e4 * tied, 0 * tied, 1e4 * logits.round()):
        loss, slope = evaluate(name, targeted, extreme, reference, counted)
        assert loss.isfinite().all()
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", AIMED)
@DIRECTIONS
def test_every_pixel_is_pulled_the_right_way(name: str, targeted: bool) -> None:
    """Down the gradient the target's logit rises and the label's falls, at the pixels that the attack works on."""
    logits, reference, counted = scene()
    _, slope = evaluate(name, targeted, logits, reference, counted)
    own = slope.gather(1, reference.where(counted, 0)[:, None])[:, 0] * (-1 if targeted else 1)
    left = (logits.argmax(1) == reference) != targeted
    assert (own[counted & left] > 0).all()
    assert (own[counted & ~left] == 0).all() if name in MASKED else (own[counted & ~left] > 0).all()


@pytest.mark.parametrize("name", AIMED)
@DIRECTIONS
def test_a_small_step_down_the_gradient_lowers_the_objective(name: str, targeted: bool) -> None:
    logits, reference, counted = scene()
    loss, slope = evaluate(name, targeted, logits, reference, counted)
    lower, _ = evaluate(name, targeted, logits - 1e-4 * slope, reference, counted)
    assert (lower[:2] < loss[:2]).all()


@pytest.mark.parametrize("name", AIMED)
@DIRECTIONS
def test_steps_down_the_gradient_win_everything(name: str, targeted: bool) -> None:
    logits, reference, counted = scene()
    criterion = on_target if targeted else off_label
    start = criterion(logits, reference, counted)
    assert (start[:2] < 0.8).all()
    shares = [start]
    for step in range(30):
        _, slope = evaluate(name, targeted, logits, reference, counted, step / 30)
        logits = logits - 0.25 * slope.sign()
        shares.append(criterion(logits, reference, counted))
    assert (shares[5] > start)[:2].all()
    assert (shares[-1] == 1).all()


# ---------------------------------------------------------------- limit cases


@pytest.mark.parametrize("name", MASKED)
@DIRECTIONS
def test_masked_losses_are_zero_when_all_is_won_and_winning_never_raises_them(name: str, targeted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    objective = OBJECTIVES[name](targeted)
    criterion = on_target if targeted else off_label
    for seed in range(2):
        logits, reference, counted = scene(seed)
        logits = logits - 4 * seed  # label logits under 0 as well, which the sphere can see
        loss = objective(logits, reference, counted, 0.0)
        order = counted.nonzero()[torch.randperm(int(counted.sum()), generator=generator)]
        for image, row, column in order.tolist():
            own = int(reference[image, row, column])
            vector = torch.randn(CLASSES, generator=generator, dtype=torch.float64) - 1
            rest = vector.clone()
            rest[own] = -torch.inf
            # just over the border, where the other side may be seen to cost something
            vector[own] = rest.max() + (1e-9 if targeted else -1e-9)
            logits[image, :, row, column] = vector
            lower = objective(logits, reference, counted, 0.0)
            assert lower[image] <= loss[image]
            loss = lower
        assert (criterion(logits, reference, counted) == 1).all()
        assert (loss == 0).all()


@DIRECTIONS
def test_segpgd_starts_as_the_masked_loss_and_ends_as_half_the_plain_one(targeted: bool) -> None:
    given = scene()
    first, slope = evaluate("segpgd", targeted, *given, progress=0.0)
    masked, masked_slope = evaluate("masked_cross_entropy", targeted, *given)
    assert torch.equal(first, masked)
    assert torch.equal(slope, masked_slope)
    _, last = evaluate("segpgd", targeted, *given, progress=1.0)
    _, plain = evaluate("cross_entropy", targeted, *given)
    torch.testing.assert_close(last, plain / 2)


def test_the_balanced_cross_entropy_of_sea_is_segpgd() -> None:
    assert OBJECTIVES["balanced_cross_entropy"] is segpgd


@EVERY
@DIRECTIONS
def test_only_segpgd_looks_at_the_progress(name: str, targeted: bool) -> None:
    given = scene()
    first, last = (OBJECTIVES[name](targeted)(*given, progress) for progress in (0.0, 0.9))
    assert torch.equal(first, last) == (OBJECTIVES[name] is not segpgd)


def predicted(logit: float, right: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One image whose prediction is all but one-hot: of the reference class, or of the one after it."""
    reference = torch.arange(CLASSES).repeat(2)[None, None]
    label = reference if right else (reference + 1) % CLASSES
    one_hot = torch.nn.functional.one_hot(label, CLASSES).movedim(-1, 1).double()
    return logit * one_hot, reference, torch.ones(1, 1, 2 * CLASSES, dtype=torch.bool)


def test_cospgd_weighs_a_one_hot_prediction_with_one_or_nothing() -> None:
    for right in (True, False):
        given = predicted(30.0, right)
        _, plain = evaluate("cross_entropy", True, *given)
        _, away = evaluate("cospgd", False, *given)
        _, towards = evaluate("cospgd", True, *given)
        torch.testing.assert_close(away, -plain if right else 0 * plain, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(towards, 0 * plain if right else plain, atol=1e-10, rtol=1e-10)


def test_the_jensen_shannon_divergence_goes_from_zero_to_log_two() -> None:
    objective = OBJECTIVES["jensen_shannon"](True)
    pixels = 2 * CLASSES
    assert float(objective(*predicted(60.0, True), 0.0)) == pytest.approx(0, abs=1e-12)
    assert float(objective(*predicted(60.0, False), 0.0)) == pytest.approx(pixels * math.log(2))
    for scale in (0.01, 1.0, 100.0):
        logits, reference, counted = scene(scale=scale)
        loss = objective(logits, reference, counted, 0.0)
        assert (loss >= 0).all()
        assert (loss <= math.log(2) * counted.flatten(1).sum(1)).all()


@DIRECTIONS
def test_the_sphere_forgets_the_size_of_the_logits(targeted: bool) -> None:
    logits, reference, counted = scene()
    objective = OBJECTIVES["masked_spherical"](targeted)
    loss = objective(logits, reference, counted, 0.0)
    torch.testing.assert_close(objective(1e3 * logits, reference, counted, 0.0), loss)


@DIRECTIONS
def test_ssap_is_the_plain_loss_where_nothing_or_everything_is_fooled(targeted: bool) -> None:
    for right in (True, False):
        given = predicted(3.0, right)
        _, slope = evaluate("ssap", targeted, *given)
        _, plain = evaluate("cross_entropy", targeted, *given)
        torch.testing.assert_close(slope, plain)


@DIRECTIONS
def test_classes_of_one_size_are_balanced_already(targeted: bool) -> None:
    given = predicted(3.0, not targeted)
    balanced, slope = evaluate("class_balanced_cross_entropy", targeted, *given)
    masked, masked_slope = evaluate("masked_cross_entropy", targeted, *given)
    torch.testing.assert_close(balanced, masked)
    torch.testing.assert_close(slope, masked_slope)


def test_a_rare_class_pulls_as_much_as_a_common_one() -> None:
    reference = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, VOID]]])
    logits = torch.zeros(1, CLASSES, 1, 8, dtype=torch.float64)
    logits[:, 2] = 1.0  # all equally far from a target
    _, slope = evaluate("class_balanced_cross_entropy", True, logits, reference, reference != VOID)
    common, rare = (slope[0, label, 0][reference[0, 0] == label].sum() for label in (0, 1))
    torch.testing.assert_close(common, rare)


def test_least_likely_aims_at_the_argmin_and_ignores_the_reference() -> None:
    logits, reference, counted = scene()
    loss, slope = evaluate("least_likely", False, logits, reference, counted)
    for targeted, other in ((True, reference), (False, (reference + 1) % CLASSES)):
        again, same = evaluate("least_likely", targeted, logits, other, counted)
        assert torch.equal(again, loss)
        assert torch.equal(same, slope)
    towards = cross_entropy(True)(logits, logits.argmin(1), counted, 0.0)
    torch.testing.assert_close(loss, towards)
    # the target is looked up anew: once another class is the lowest, that one is pulled up
    lowered = logits.clone()
    lowered[:, 1] = -50.0
    _, slope = evaluate("least_likely", False, lowered, reference, counted)
    assert (slope[:, 1][counted] < 0).all()
    assert (slope[:, [0, 2, 3]].movedim(1, -1)[counted] > 0).all()
