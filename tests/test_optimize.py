"""The loop: strength against a known optimum, locality, step-for-step references, randomness, bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks.objectives import OBJECTIVES
from attacks.optimize import Result, make_patch, reference_map
from attacks.options import OPTIMIZERS, PatchOptions
from attacks.patch import Patch
from attacks.problem import DEFENCE_SAMPLES
from attacks.steps import SCHEDULES
from attacks.streams import stream
from attacks.targets import FixedClass, Permute, Strip, TargetMap, Untargeted
from attacks.terms import Forward
from attacks.transformations import EOT
from ramdefense.traits import Conditions, Traits, conditions, traits_of

VOID = 255


class Segmenter:
    """The least that the loop asks for: a module, and nothing that could hide a mistake."""

    ignore_index = VOID
    device = torch.device("cpu")

    def __init__(self, model: nn.Module, nb_classes: int, clip_values: tuple[float, float] = (0.0, 1.0)) -> None:
        self.model, self.nb_classes, self.clip_values = model, nb_classes, clip_values
        self.batches: list[int] = []

    @property
    def traits(self) -> Traits:
        return traits_of(self.model)

    def logits(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        output: Tensor = self.model(images)
        return output

    def conditions(self, *, images: Sequence[int] | None = None, **how: Any) -> AbstractContextManager[None]:
        return conditions(self.model, images=None if images is None else tuple(images), **how)


def linear(seed: int = 0, classes: int = 2) -> Segmenter:
    """One 3×3 convolution: a linear dense model."""
    torch.manual_seed(seed)
    return Segmenter(nn.Conv2d(3, classes, 3, padding=1), classes)


def small(seed: int = 0, classes: int = 5, kernel: int = 5) -> Segmenter:
    """Two convolutions with something in between; wide enough for a patch to be seen from afar."""
    torch.manual_seed(seed)
    half = kernel // 2
    first, last = nn.Conv2d(3, 8, kernel, padding=half), nn.Conv2d(8, classes, kernel, padding=half)
    return Segmenter(nn.Sequential(first, nn.Tanh(), last), classes)


def frames(count: int, size: tuple[int, int], classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *size, generator=generator)
    labels = torch.randint(0, classes, (count, *size), generator=generator)
    return images, labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, VOID)


def make(segmenter: Segmenter, images: Tensor, y: Tensor | None, **options: Any) -> tuple[Patch, Result]:
    streams = options.pop("streams", None)
    return make_patch(segmenter, images, y, PatchOptions(**{"verbose": False, **options}), streams)


# ---------------------------------------------------------------- strength and locality on the linear model


def slope_of_the_margin(
    weight: np.ndarray, target: np.ndarray, location: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """Gradient of Σ (other logit − target logit) over counted pixels by the patch's pixels, one term at a time."""
    (top, left), (height, width) = location, shape
    slope = np.zeros((3, height, width))
    for row in range(target.shape[0]):
        for column in range(target.shape[1]):
            under = top <= row < top + height and left <= column < left + width
            if under or target[row, column] == VOID:
                continue
            kernel = weight[1 - target[row, column]] - weight[target[row, column]]
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    r, c = row + down - top, column + right - left
                    if 0 <= r < height and 0 <= c < width:
                        slope[:, r, c] += kernel[:, down + 1, right + 1]
    return slope


CASES = [
    (1, (7, 9), (3, 3), (2, 3)),
    (3, (11, 6), (4, 2), (0, 0)),
    (2, (6, 13), (1, 5), (5, 8)),
    (5, (9, 9), (5, 5), (4, 4)),
    (1, (5, 5), (1, 1), (0, 4)),
]


@pytest.mark.parametrize(("count", "size", "shape", "location"), CASES)
@pytest.mark.parametrize("targeted", [True, False])
def test_the_optimum_of_a_linear_model_is_reached_exactly(
    count: int, size: tuple[int, int], shape: tuple[int, int], location: tuple[int, int], targeted: bool
) -> None:
    segmenter = linear(seed=count)
    images, target = frames(count, size, 2, seed=count)
    options: dict[str, Any] = {
        "targeted": targeted, "patch_shape": shape, "patch_location": location, "objective": "margin",
    }  # fmt: skip
    patch, result = make(segmenter, images, target, eps_step=0.1, max_iter=7, keep_best=False, batch_size=2, **options)
    weight = segmenter.model.weight.detach().double().numpy()  # type: ignore[union-attr,operator]
    for row in range(count):
        slope = slope_of_the_margin(weight, target[row].numpy(), location, shape) * (1 if targeted else -1)
        # a vertex of the box where the loss depends on the pixel; the start, untouched, where it does not
        optimum = np.where(np.abs(slope) < 1e-6, 0.5, slope < 0)
        assert np.array_equal(patch.pixels[row].numpy(), optimum)
    best = torch.tensor(result.loss)
    for trial in range(30):
        generator = torch.Generator().manual_seed(trial)
        other = torch.rand(patch.pixels.shape, generator=generator).round()
        assert (loss_of(segmenter, images, target, Patch(other, location), targeted) >= best - 1e-4).all()


def loss_of(segmenter: Segmenter, images: Tensor, target: Tensor, patch: Patch, targeted: bool) -> Tensor:
    counted = (target != VOID) & ~patch.mask((images.shape[-2], images.shape[-1]))
    with torch.no_grad():
        return OBJECTIVES["margin"](targeted)(segmenter.logits(patch.paste(images)), target, counted, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"optimizer": "adam"},
        {"step_schedule": "cosine"},
        {"step_schedule": "piecewise"},
        {"random_start": True},
        {"num_restarts": 2},
        {"objective": "margin"},
        {"defence_samples": 2},
    ],
    ids=str,
)
def test_every_rule_reaches_the_optimum_of_the_default_objective(options: dict[str, Any]) -> None:
    """Where each channel pulls one way only, the optimum of the cross entropy is a vertex, too."""
    segmenter = linear()
    direction = torch.tensor([1.0, -1.0, 1.0])
    convolution = segmenter.model
    with torch.no_grad():
        convolution.weight[1] = convolution.weight[0] + convolution.weight[1].abs() * direction[:, None, None]  # type: ignore[index,union-attr,operator]
        convolution.bias[0] += 50.0  # type: ignore[index,union-attr,operator]  # class 1 is never won: no early exit
    images, labels = frames(2, (8, 10), 2)
    labels = torch.zeros_like(labels)
    patch, result = make(
        segmenter, images, labels, target=FixedClass(1), patch_shape=(3, 3), patch_location=(2, 3),
        max_iter=120, eps_step=0.05, **options,
    )  # fmt: skip
    ring = torch.ones(3, 3, dtype=torch.bool)
    ring[1, 1] = False  # its whole neighbourhood is under the patch
    expected = (direction > 0).float()[None, :, None].expand(2, 3, 8)
    torch.testing.assert_close(patch.pixels[:, :, ring], expected, atol=1e-3, rtol=0)
    assert result.steps == (120 * options.get("num_restarts", 1),) * 2


@pytest.mark.parametrize(("count", "size", "shape", "location"), CASES)
def test_outputs_change_exactly_where_the_patch_is_dilated_by_the_kernel(
    count: int, size: tuple[int, int], shape: tuple[int, int], location: tuple[int, int]
) -> None:
    segmenter = linear()
    images, target = frames(count, size, 2)
    patch, _ = make(segmenter, images, target, targeted=True, patch_shape=shape, patch_location=location, max_iter=3)
    patched = patch.paste(images)
    mask = patch.mask(size)
    assert torch.equal(patched[:, :, ~mask], images[:, :, ~mask])
    with torch.no_grad():
        changed = (segmenter.logits(patched) != segmenter.logits(images)).any(1)
    reach = torch.zeros(size, dtype=torch.bool)
    (top, left), (height, width) = location, shape
    reach[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1] = True
    assert torch.equal(changed, reach.expand_as(changed))


# ---------------------------------------------------------------- step for step


def gradient_of(segmenter: Segmenter, images: Tensor, target: Tensor, pixels: Tensor, top: int, left: int) -> Tensor:
    """Gradient of the summed cross entropy outside the patch, written out."""
    pixels = pixels.clone().requires_grad_()
    height, width = pixels.shape[-2:]
    columns = [images[:, :, top : top + height, :left], pixels, images[:, :, top : top + height, left + width :]]
    patched = torch.cat([images[:, :, :top], torch.cat(columns, 3), images[:, :, top + height :]], 2)
    counted = target != VOID
    counted[:, top : top + height, left : left + width] = False
    log = segmenter.model(patched).log_softmax(1).gather(1, target.where(counted, 0)[:, None])[:, 0]
    (-log[counted].sum()).backward()
    assert pixels.grad is not None
    return pixels.grad


def plain(pixels: Tensor, gradient: Tensor, size: float, memory: Any) -> tuple[Tensor, Any]:
    return pixels - size * gradient.sign(), None


def with_momentum(pixels: Tensor, gradient: Tensor, size: float, memory: Any) -> tuple[Tensor, Any]:
    memory = 0.7 * (0 if memory is None else memory) + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
    return pixels - size * memory.sign(), memory


def adam(pixels: Tensor, gradient: Tensor, size: float, memory: Any) -> tuple[Tensor, Any]:
    parameter, optimizer = memory or (None, None)
    if parameter is None:
        parameter = nn.Parameter(pixels.clone())
        optimizer = torch.optim.Adam([parameter], lr=size)
    parameter.data.copy_(pixels)
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.data.clone(), (parameter, optimizer)


@pytest.mark.parametrize(
    ("rule", "options"),
    [(plain, {"momentum": 0.0}), (with_momentum, {"momentum": 0.7}), (adam, {"optimizer": "adam"})],
    ids=["pgd", "momentum", "adam"],
)
@pytest.mark.parametrize("targeted", [True, False])
def test_each_step_is_the_one_in_the_books(rule: Callable[..., Any], options: dict[str, Any], targeted: bool) -> None:
    segmenter = small()
    images, target = frames(3, (13, 10), 5)
    pixels, memory = torch.full((3, 3, 4, 3), 0.5), None
    for step in range(1, 8):
        slope = gradient_of(segmenter, images, target, pixels, 6, 2) * (1 if targeted else -1)
        pixels, memory = rule(pixels, slope, 0.15, memory)
        pixels = pixels.clamp(0, 1)
        patch, result = make(
            segmenter, images, target, targeted=targeted, patch_shape=(4, 3), patch_location=(6, 2),
            max_iter=step, eps_step=0.15, keep_best=False, batch_size=2, **options,
        )  # fmt: skip
        # Adam divides by the gradient's size, so that rounding in the gradient shows a little more
        torch.testing.assert_close(patch.pixels, pixels, atol=1e-5 if rule is adam else 1e-6, rtol=0)
        assert result.steps == (step,) * 3
        assert (result.forwards, result.backwards) == (3 * step + 3, 3 * step)


def test_schedules() -> None:
    segmenter = linear()
    images, target = frames(1, (6, 6), 2)
    for name, schedule in SCHEDULES.items():
        patch, _ = make(
            segmenter, images, target, targeted=True, patch_shape=(1, 1), patch_location="center", objective="margin",
            keep_best=False, max_iter=10, eps_step=0.01, step_schedule=name,
        )  # fmt: skip
        moved = (patch.pixels - 0.5).abs()
        total = 0.01 * sum(schedule(step / 10) for step in range(10))
        torch.testing.assert_close(moved, torch.full_like(moved, total), atol=1e-6, rtol=1e-5)
        assert schedule(0.0) == 1
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)
    assert SCHEDULES["piecewise"](0.9) < SCHEDULES["piecewise"](0.6) < 1


# ---------------------------------------------------------------- objectives


def test_an_objective_of_the_users_own() -> None:
    segmenter = small()
    images, target = frames(2, (9, 9), 5)

    def first_logit(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return logits[:, 0].where(counted, 0).flatten(1).sum(1)

    patch, result = make(segmenter, images, target, objective=first_logit, max_iter=5, keep_best=False)
    counted = (target != VOID) & ~patch.mask((9, 9))
    with torch.no_grad():
        own = first_logit(segmenter.logits(patch.paste(images)), target, counted, 1.0)
        grey = first_logit(segmenter.logits(Patch(torch.full((3, *patch.shape), 0.5), "lower_right").paste(images)),
                           target, counted, 1.0)  # fmt: skip
    assert (own < grey).all()
    assert result.loss == pytest.approx(own.tolist(), rel=1e-5)


# ---------------------------------------------------------------- what is kept


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_more_steps_never_help_less(seed: int, targeted: bool) -> None:
    segmenter = small(seed)
    images, target = frames(2, (12, 12), 5, seed)
    before = (-1.0, -1.0)
    for steps in (1, 2, 4, 8, 16):
        patch, result = make(segmenter, images, target, targeted=targeted, max_iter=steps, eps_step=0.3, seed=seed)
        assert all(now >= then for now, then in zip(result.criterion, before, strict=True))
        before = result.criterion
        assert result.criterion == pytest.approx(success(segmenter, images, target, patch, targeted).tolist())


def success(segmenter: Segmenter, images: Tensor, target: Tensor, patch: Patch, targeted: bool) -> Tensor:
    counted = (target != VOID) & ~patch.mask((images.shape[-2], images.shape[-1]))
    with torch.no_grad():
        hit = (segmenter.logits(patch.paste(images)).argmax(1) == target) == targeted
    return (hit & counted).flatten(1).sum(1) / counted.flatten(1).sum(1)


def test_the_best_iterate_is_kept_and_ties_go_to_the_least_loss() -> None:
    segmenter = small(3)
    images, target = frames(4, (12, 12), 5)
    common: dict[str, Any] = {"targeted": True, "eps_step": 0.4}
    iterates = [make(segmenter, images, target, max_iter=steps, keep_best=False, **common)[1] for steps in range(1, 13)]
    _, best = make(segmenter, images, target, max_iter=12, **common)
    grey = Patch(torch.full((3, 4, 4), 0.5), "lower_right")
    for image in range(4):
        start = float(success(segmenter, images, target, grey, True)[image])
        seen = [(run.criterion[image], -run.loss[image]) for run in iterates]
        assert best.criterion[image] == pytest.approx(max(start, *(won for won, _ in seen)))
        if best.criterion[image] > start:
            assert -best.loss[image] == pytest.approx(max(seen)[1], rel=1e-5)
    assert any(run.criterion != iterates[-1].criterion for run in iterates), "the last would do as well"


def test_restarts_are_never_worse_and_differ() -> None:
    segmenter = small(1)
    images, target = frames(3, (12, 12), 5)
    common: dict[str, Any] = {"targeted": True, "eps_step": 0.3, "max_iter": 4, "random_start": True}
    runs = [make(segmenter, images, target, num_restarts=number, **common) for number in (1, 2, 5)]
    scores = [run[1].criterion for run in runs]
    assert all(a <= b <= c for a, b, c in zip(*scores, strict=True))
    assert scores[0] != scores[2]
    assert runs[2][1].steps == (20, 20, 20)
    other_seed = make(segmenter, images, target, seed=5, **common)[0]
    assert not torch.equal(other_seed.pixels, runs[0][0].pixels)


def easy() -> Segmenter:
    """A model whose class is set by the mean of the image, so that a patch wins everything at once, or nothing."""

    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3))[:, None, None, None].expand(-1, 1, *images.shape[-2:])
            return torch.cat([0.55 - mean, mean - 0.55], 1)

    return Segmenter(Mean(), 2)


def test_images_that_are_done_leave() -> None:
    segmenter = easy()
    images = torch.stack([torch.full((3, 6, 6), level) for level in (0.1, 0.6, 0.54)])
    options: dict[str, Any] = {"target": FixedClass(1), "patch_shape": (4, 4), "eps_step": 0.1, "max_iter": 9}
    labels = torch.zeros(3, 6, 6, dtype=torch.int64)
    _, result = make(segmenter, images, labels, **options)
    assert result.criterion == (0.0, 1.0, 1.0)
    # mean of the second: (20·0.6 + 16·p)/36 > 0.55 from p = 0.5 on; of the third from 0.5625, one step
    assert result.steps == (9, 0, 1)
    # two looks at one image come first: is the model random without saying so?
    assert segmenter.batches == [1, 1, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert (result.forwards, result.backwards) == (13, 12)
    _, twice = make(easy(), images, labels, num_restarts=2, **options)
    assert twice.steps == (18, 0, 1), "what is done is not done again"
    _, to_the_end = make(easy(), images, labels, keep_best=False, **options)
    assert to_the_end.steps == (9, 9, 9)


def test_an_image_without_a_counted_pixel_is_done_at_once() -> None:
    images, labels = frames(2, (8, 8), 5)
    labels[0] = VOID
    patch, result = make(small(), images, labels, targeted=True, max_iter=3)
    assert result.steps == (0, 3)
    assert result.criterion[0] == 1
    assert (patch.pixels[0] == 0.5).all()


# ---------------------------------------------------------------- what has no influence


class Noisy(nn.Module):
    """Adds to the logits of some pixels what an attack that looked at them could not miss."""

    def __init__(self, model: nn.Module, where: Tensor) -> None:
        super().__init__()
        self.model, self.where = model, where

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        loud = 100 * torch.sin(50 * images.mean((1, 2, 3)))[:, None, None, None] * torch.ones_like(logits)
        loud[:, 0] = 0
        return logits + loud * self.where[:, None]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "none"])
@pytest.mark.parametrize("targeted", [True, False])
def test_void_pixels_and_those_under_the_patch_have_no_influence(objective: str, targeted: bool) -> None:
    quiet = small()
    images, target = frames(2, (12, 11), 5)
    options: dict[str, Any] = {
        "targeted": targeted, "patch_shape": (4, 4), "patch_location": (3, 5), "objective": objective, "max_iter": 6,
    }  # fmt: skip
    patch, result = make(quiet, images, target, **options)
    under = patch.mask((12, 11))
    loud = Segmenter(Noisy(quiet.model, (target == VOID) | under), 5)
    again, same = make(loud, images, target, **options)
    assert torch.equal(again.pixels, patch.pixels)
    assert (same.criterion, same.loss) == (result.criterion, result.loss)
    relabelled = torch.where(under, (target + 1) % 5, target)
    assert torch.equal(make(quiet, images, relabelled, **options)[0].pixels, patch.pixels)
    counted = Segmenter(Noisy(quiet.model, (target != VOID) & ~under), 5)
    assert not torch.equal(make(counted, images, target, **options)[0].pixels, patch.pixels)


# ---------------------------------------------------------------- randomness


class Flicker(nn.Module):
    """A defence that drops channels at random, as the protocol wants it: by draw and stream, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.traits = Traits(random=True)
        self.conditions = Conditions()
        self.seen: list[Conditions] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.conditions)
        streams = self.conditions.images or range(len(images))
        keep = [torch.rand(3, generator=stream("flicker", image, self.conditions.draw or 0)) > 0.4 for image in streams]
        output: Tensor = self.model(images * torch.stack(keep)[:, :, None, None])
        return output


def test_gradients_are_averaged_over_the_draws_of_a_random_defence() -> None:
    defended = Segmenter(Flicker(small().model), 5)
    images, target = frames(2, (10, 10), 5)
    place: dict[str, Any] = {"patch_shape": (3, 3), "patch_location": (4, 5), "targeted": True}
    for asked, draws in ((None, DEFENCE_SAMPLES), (1, 1), (7, 7)):
        defended.model.seen.clear()  # type: ignore[operator,union-attr]
        pixels = torch.full((2, 3, 3, 3), 0.5)
        for step in range(2):
            slopes = []
            for draw in range(step * draws, (step + 1) * draws):
                with defended.conditions(images=(11, 4), draw=draw):
                    slopes.append(gradient_of(defended, images, target, pixels, 4, 5))
            pixels = (pixels - 0.1 * torch.stack(slopes).mean(0).sign()).clamp(0, 1)
        defended.model.seen.clear()  # type: ignore[operator,union-attr]
        patch, result = make(
            defended, images, target, max_iter=2, eps_step=0.1, momentum=0.0, defence_samples=asked, keep_best=False,
            streams=(11, 4), **place,
        )  # fmt: skip
        torch.testing.assert_close(patch.pixels, pixels, atol=1e-6, rtol=0)
        seen: list[Conditions] = defended.model.seen  # type: ignore[assignment]
        assert [each.draw for each in seen] == list(range(3 * draws)), "0, 1, 2, …, each draw once"
        assert {each.images for each in seen} == {(11, 4)}
        assert (result.forwards, result.backwards) == (2 * 3 * draws, 2 * 2 * draws)
        assert defended.model.conditions == Conditions()


def test_transformations_and_draws_go_together() -> None:
    """Each pass has a transformation and a draw of its own: as many passes as the larger number, not the product."""
    defended = Segmenter(Flicker(small().model), 5)
    images, target = frames(2, (10, 10), 5)
    for samples in (2, 6):
        _, result = make(defended, images, target, eot=EOT(samples=samples), defence_samples=4, max_iter=2)
        passes = max(samples, 4)
        assert (result.forwards, result.backwards) == (2 * 3 * passes, 2 * 2 * passes)
    draws = [seen.draw for seen in defended.model.seen]  # type: ignore[operator,union-attr]
    assert draws[-3 * 6 :] == list(range(3 * 6))


def test_what_is_kept_under_randomness_is_never_done() -> None:
    """An estimate of 1 from a few draws is no proof."""

    class Sure(Flicker):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 0 + torch.tensor([0.0, 9.0])[:, None, None]

    segmenter = Segmenter(Sure(nn.Conv2d(3, 2, 1)), 2)
    images, labels = frames(1, (6, 6), 2)
    _, result = make(segmenter, images, labels, target=FixedClass(1), max_iter=3)
    assert (result.criterion, result.steps) == ((1.0,), (3,))


class Flat(nn.Module):
    """A defence whose gradient is nowhere but straight through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.traits = Traits(straight_through=True)
        self.conditions = Conditions()

    def forward(self, images: Tensor) -> Tensor:
        steps = (images * 4).round() / 4
        if self.conditions.straight_through:
            steps = images + (steps - images).detach()
        output: Tensor = self.model(steps)
        return output


@pytest.mark.parametrize(("asked", "moves"), [(None, True), (True, True), (False, False)])
def test_the_straight_through_gradient_is_used_where_it_is_offered(asked: bool | None, moves: bool) -> None:
    segmenter = Segmenter(Flat(small().model), 5)
    images, target = frames(2, (10, 10), 5)
    patch, _ = make(segmenter, images, target, targeted=True, max_iter=3, keep_best=False, straight_through=asked)
    assert bool((patch.pixels != 0.5).any()) == moves
    assert segmenter.model.conditions == Conditions()


COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"random_start": True, "num_restarts": 2},
    "momentum": {"momentum": 0.9, "keep_best": False},
    "adam": {"optimizer": "adam"},
    "eot": {"eot": EOT(samples=2)},
    "untargeted": {"target": Untargeted()},
    "strip": {"target": Strip()},
}


@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("model", ["plain", "random"])
def test_neither_batch_size_nor_order_changes_a_patch(options: dict[str, Any], model: str) -> None:
    segmenter = small(2) if model == "plain" else Segmenter(Flicker(small(2).model), 5)
    images, labels = frames(5, (12, 10), 3)
    options = {"target": Permute(), "max_iter": 4, "eps_step": 0.2, **options}
    whole, result = make(segmenter, images, labels, batch_size=5, **options)
    for size in (1, 2):
        patch, same = make(segmenter, images, labels, batch_size=size, **options)
        torch.testing.assert_close(patch.pixels, whole.pixels, atol=1e-6, rtol=0)
        assert same.criterion == pytest.approx(result.criterion, abs=1e-6)
        assert (same.forwards, same.backwards, same.steps) == (result.forwards, result.backwards, result.steps)
    order = [3, 0, 4]
    patch, _ = make(segmenter, images[order], labels[order], batch_size=2, streams=order, **options)
    torch.testing.assert_close(patch.pixels, whole.pixels[order], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- transformations


class FineOrBright(nn.Module):
    """Class 1 where the image as a whole is bright, or full of a pattern so fine that no turn leaves it whole."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        fine = F.conv2d(grey, torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])).relu().mean((1, 2, 3))
        score = grey.mean((1, 2, 3)) + 0.8 * fine
        logit = 100 * (score - (12 / 24) ** 2)[:, None, None, None].expand(-1, 1, *images.shape[-2:])
        return torch.cat([-logit, logit], 1)


def test_a_patch_made_with_eot_survives_transformations_that_it_has_not_seen() -> None:
    segmenter = Segmenter(FineOrBright(), 2)
    images, labels = torch.zeros(2, 3, 24, 24), torch.zeros(2, 24, 24, dtype=torch.int64)
    eot = EOT(samples=4, rotation=30, scale=(1, 1.1), perspective=0.05)
    options: dict[str, Any] = {
        "target": FixedClass(1), "patch_shape": (12, 12), "patch_location": (6, 6), "max_iter": 40, "eps_step": 0.05,
        "random_start": True, "keep_best": False,
    }  # fmt: skip
    fixed, _ = make(segmenter, images, labels, **options)
    robust, _ = make(segmenter, images, labels, eot=eot, **options)
    won = {}
    for name, patch in (("fixed", fixed), ("robust", robust)):
        assert (segmenter.logits(patch.paste(images)).argmax(1) == 1).all(), "pasted as it is, each succeeds"
        held_out = [eot.sample([("held out", image, draw) for image in range(2)]) for draw in range(40)]
        placed = torch.cat([drawn.apply(images, patch.pixels, (6, 6))[0] for drawn in held_out])
        won[name] = float((segmenter.logits(placed).argmax(1) == 1).float().mean())
    assert won["robust"] > 0.9
    assert won["fixed"] < 0.5


def test_eot_that_does_nothing_is_the_plain_attack() -> None:
    segmenter = small()
    images, target = frames(2, (12, 12), 5)
    still = EOT(samples=1, rotation=0, scale=(1, 1), translation=0, perspective=0, brightness=0, contrast=0, noise=0)
    plain_patch, _ = make(segmenter, images, target, targeted=True, max_iter=6, keep_best=False)
    patch, _ = make(segmenter, images, target, targeted=True, max_iter=6, keep_best=False, eot=still)
    assert torch.equal(patch.pixels, plain_patch.pixels)


# ---------------------------------------------------------------- the map aimed at, and manners


def test_reference_maps() -> None:
    segmenter = small()
    images, labels = frames(2, (9, 9), 3)
    with torch.no_grad():
        own = segmenter.logits(images).argmax(1)
    assert torch.equal(reference_map(segmenter, images, None, PatchOptions()), own)
    assert torch.equal(reference_map(segmenter, images, None, PatchOptions(target=Untargeted())), own)
    assert torch.equal(reference_map(segmenter, images, labels, PatchOptions(targeted=True)), labels)
    wanted = Permute(4)(labels, nb_classes=5, images=(6, 7))
    assert torch.equal(reference_map(segmenter, images, labels, PatchOptions(target=Permute(4)), (6, 7)), wanted)
    for options in (PatchOptions(targeted=True), PatchOptions(target=Permute())):
        with pytest.raises(ValueError, match="needs `y`"):
            reference_map(segmenter, images, None, options)


def test_nothing_of_the_callers_changes() -> None:
    segmenter = small()
    images, labels = frames(2, (9, 9), 3)
    before = images.clone(), labels.clone(), [parameter.clone() for parameter in segmenter.model.parameters()]
    make(segmenter, images, labels, target=Permute(), max_iter=2, eot=EOT(samples=2))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    for parameter, old in zip(segmenter.model.parameters(), before[2], strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
        assert parameter.requires_grad


def test_the_patch_stays_in_the_clip_range() -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(nn.Conv2d(3, 3, 3, padding=1), 3, clip_values=(-2.0, 6.0))
    images, labels = frames(1, (9, 9), 3)
    start, _ = make(segmenter, images, labels, max_iter=1, eps_step=1e-6)
    torch.testing.assert_close(start.pixels, torch.full_like(start.pixels, 2.0), atol=1e-5, rtol=0)
    patch, _ = make(segmenter, images, labels, max_iter=9, eps_step=1.0, keep_best=False)
    assert (patch.pixels.min(), patch.pixels.max()) == (-2.0, 6.0)
    drawn, _ = make(segmenter, images, labels, max_iter=1, eps_step=1e-6, random_start=True)
    assert -2 <= drawn.pixels.min() < -1 < 5 < drawn.pixels.max() <= 6


def test_the_attack_works_inside_no_grad_and_in_double_precision() -> None:
    segmenter = small()
    images, labels = frames(2, (9, 9), 3)
    with torch.no_grad():
        patch, _ = make(segmenter, images, labels, target=Permute(), max_iter=4)
    assert torch.equal(patch.pixels, make(segmenter, images, labels, target=Permute(), max_iter=4)[0].pixels)
    segmenter.model.double()
    double, _ = make(segmenter, images.double(), labels, target=Permute(), max_iter=4)
    assert double.pixels.dtype == torch.float64
    torch.testing.assert_close(double.pixels.float(), patch.pixels, atol=1e-6, rtol=0)


def test_the_progress_bar_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = frames(1, (9, 9), 3)
    make(small(), images, labels, max_iter=2)
    assert capsys.readouterr() == ("", "")
    make(small(), images, labels, max_iter=2, verbose=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert "2/2" in output.err


def test_an_interrupted_attack_leaves_the_model_as_it_was() -> None:
    class Interrupting(Flicker):
        def forward(self, images: Tensor) -> Tensor:
            if self.conditions.draw == 5:
                raise KeyboardInterrupt
            return super().forward(images)

    segmenter = Segmenter(Interrupting(small().model), 5)
    images, labels = frames(1, (9, 9), 3)
    with pytest.raises(KeyboardInterrupt):
        make(segmenter, images, labels, max_iter=9)
    assert segmenter.model.conditions == Conditions()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.full((1, 3, 9, 9), 2.0)}, "clip range"),
        ({"images": torch.full((1, 3, 9, 9), torch.nan)}, "NaN"),
        ({"images": torch.zeros(3, 9, 9)}, "shape"),
        ({"y": torch.full((1, 9, 9), 5)}, "5"),
        ({"y": torch.zeros(1, 9, 8, dtype=torch.int64)}, "shape"),
        ({"y": torch.zeros(2, 9, 9, dtype=torch.int64)}, "shape"),
        ({"patch_shape": (10, 2)}, "10×2 does not fit on an image of 9×9"),
        ({"patch_location": (8, 8)}, "reaches outside"),
        ({"streams": (1, 2)}, "2 stream numbers for 1 images"),
        ({"target": FixedClass(9)}, "classes are 0 to 4"),
        ({"target": TargetMap(np.zeros((4, 4), dtype=np.int64))}, "target map has shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_any_work(change: dict[str, Any], message: str) -> None:
    segmenter = small()
    given: dict[str, Any] = {
        "images": torch.zeros(1, 3, 9, 9), "y": torch.zeros(1, 9, 9, dtype=torch.int64), **change
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        make(segmenter, **given)
    assert segmenter.batches == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": 0}, {"max_iter": 2.0}, {"max_iter": True}, {"eps_step": 0}, {"eps_step": math.nan},
        {"eps_step": "0.1"}, {"optimizer": "sgd"}, {"step_schedule": "linear"}, {"momentum": -1},
        {"num_restarts": 0}, {"defence_samples": 0}, {"batch_size": 0}, {"seed": 0.5}, {"seed": None},
        {"objective": "hinge"}, {"eot": 8}, {"target": "permutation"}, {"targeted": 1}, {"straight_through": "yes"},
        {"random_start": None}, {"keep_best": 1}, {"verbose": 2}, {"patch_shape": (3,)}, {"patch_shape": (0, 1)},
        {"patch_location": "middle"}, {"patch_location": (-1, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name.removeprefix("patch_") if name == "patch_location" else f"`{name}`"):
        PatchOptions(**options)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="leave one out"):
        PatchOptions(target=Permute(), targeted=False)
    assert PatchOptions(target=Permute(), targeted=True).aims
    assert not PatchOptions(target=Untargeted()).aims


def test_numbers_of_numpy_are_numbers() -> None:
    options = PatchOptions(max_iter=np.int64(3), eps_step=np.float32(0.1), patch_shape=(np.int64(2), 2))
    assert options.patch_shape == (2, 2)


def test_an_unknown_option_is_refused_with_those_there_are() -> None:
    with pytest.raises(TypeError, match=r"Permute has no option epsilon, steps; its options are .*max_iter"):
        PatchOptions.of("Permute", {"steps": 3, "epsilon": 1})


# ---------------------------------------------------------------- defences that hide, or can be left out


class Silent(nn.Module):
    """Random without saying so: noise on the logits from torch's own generator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits + 0.1 * torch.randn_like(logits)


def test_a_model_that_is_random_without_saying_so_is_found_out() -> None:
    images, target = frames(1, (9, 9), 5)
    with pytest.warns(UserWarning, match=r"without declaring that it is random.*Traits\(random=True\)"):
        _, result = make(Segmenter(Silent(small().model), 5), images, target, max_iter=3)
    assert result.forwards == (3 + 1) * DEFENCE_SAMPLES


def test_a_model_that_rounds_otherwise_each_time_is_not_random(recwarn: pytest.WarningsRecorder) -> None:
    class Rounding(Silent):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images)
            return logits * (1 + 1e-6 * torch.randn(()))

    images, target = frames(1, (9, 9), 5)
    _, result = make(Segmenter(Rounding(small().model), 5), images, target, max_iter=3)
    assert result.forwards == 4
    assert not recwarn.list


class Removable(nn.Module):
    """A defence that gives nothing away, and that can be left out."""

    traits = Traits(random=True)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.conditions = model, Conditions()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits if self.conditions.undefended else 0 * logits


def test_an_attack_on_the_model_without_its_defence_is_the_one_on_the_plain_model() -> None:
    images, target = frames(2, (9, 9), 5)
    plain, _ = make(small(), images, target, max_iter=4)
    transferred, result = make(Segmenter(Removable(small().model), 5), images, target, max_iter=4, undefended=True)
    assert torch.equal(plain.pixels, transferred.pixels)
    assert result.forwards == 2 * 5, "without its defence it is not random"
    stopped, _ = make(Segmenter(Removable(small().model), 5), images, target, max_iter=4)
    assert (stopped.pixels == 0.5).all()


# ---------------------------------------------------------------- several objectives, terms, smoothing, names


def test_of_several_objectives_the_best_is_kept_for_each_image() -> None:
    images, target = frames(3, (12, 12), 5)
    options: dict[str, Any] = {"targeted": True, "max_iter": 6, "patch_shape": (5, 5)}
    names = ("cross_entropy", "margin", "least_likely")
    each = [make(small(), images, target, objective=name, **options)[1] for name in names]
    _, together = make(small(), images, target, objective=names, **options)
    assert together.criterion == tuple(max(values) for values in zip(*(r.criterion for r in each), strict=True))
    assert together.steps == tuple(sum(values) for values in zip(*(r.steps for r in each), strict=True))


class Darkness:
    """A term that wants black patches, and sees what it observed."""

    def observe(self, victim: Any) -> AbstractContextManager[Any]:
        return nullcontext(victim)

    def __call__(self, forward: Forward) -> Tensor:
        assert isinstance(forward.observed, Segmenter)
        assert forward.covered.sum() == forward.pixels[0, 0].numel()
        return 1e6 * forward.pixels.flatten(1).sum(1)


def test_terms_are_minimised_beside_the_objective() -> None:
    images, target = frames(2, (9, 9), 5)
    options: dict[str, Any] = {"max_iter": 6, "eps_step": 0.1, "keep_best": False, "momentum": 0.0}
    patch, _ = make(small(), images, target, terms=(Darkness(),), **options)
    assert patch.pixels.max() == 0
    plain, _ = make(small(), images, target, **options)
    assert plain.pixels.max() > 0
    with pytest.raises(ValueError, match="terms"):
        PatchOptions(terms=[Darkness()])  # type: ignore[arg-type]


def test_random_search_asks_for_no_gradient() -> None:
    images, target = frames(2, (12, 12), 5)
    _, start = make(small(), images, target, max_iter=1)
    _, result = make(small(), images, target, optimizer="square", max_iter=60)
    assert result.backwards == 0
    assert result.forwards == 2 * 61
    assert all(a > b for a, b in zip(result.criterion, start.criterion, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("len_kernel", [1, 3])
def test_every_optimizer_is_independent_of_the_batch(optimizer: str, len_kernel: int) -> None:
    if optimizer == "square" and len_kernel > 1:
        pytest.skip("random search has no gradient to smooth")
    images, target = frames(3, (10, 10), 5)
    options: dict[str, Any] = {"optimizer": optimizer, "len_kernel": len_kernel, "max_iter": 5, "num_restarts": 2}
    together, _ = make(small(), images, target, **options)
    alone, _ = make(small(), images[2:], target[2:], streams=[2], **options)
    torch.testing.assert_close(together.pixels[2:], alone.pixels, atol=1e-6, rtol=0)


def test_a_target_by_name_is_drawn_by_the_seed() -> None:
    images, labels = frames(2, (9, 9), 5)
    for name, target in (("permute", Permute(3)), ("strip", Strip(seed=3)), ("2", FixedClass(2))):
        named = reference_map(small(), images, labels, PatchOptions(target=name, seed=3))
        assert torch.equal(named, reference_map(small(), images, labels, PatchOptions(target=target)))
    assert not PatchOptions(target="untargeted").aims
    with pytest.raises(ValueError, match=r"'mirror'.*'permute', 'strip', 'untargeted'"):
        PatchOptions(target="mirror")
