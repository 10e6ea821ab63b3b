"""Step rules: known optima, references written from the papers, torchattacks, and images apart from each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks.square import SquareStep
from attacks.steps import AdamStep, ApgdStep, Seen, SignStep, Smoothed, StepRule, checkpoints, direction, smooth

Loss = Callable[[Tensor], Tensor]
Project = Callable[[Tensor], Tensor]

STEPS = 14
GRADIENT_RULES: list[StepRule] = [
    SignStep(),
    SignStep(0.9),
    SignStep(0.9, nesterov=True),
    SignStep(norm="2"),
    SignStep(0.9, nesterov=True, norm="2"),
    AdamStep(),
    ApgdStep(STEPS),
    ApgdStep(STEPS, norm="2"),
]
RULES: list[StepRule] = [*GRADIENT_RULES, Smoothed(SignStep(0.9), 5), Smoothed(ApgdStep(STEPS), 7), SquareStep(STEPS)]


def box(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 1)


def look(loss: Loss, point: Tensor, gradient: bool) -> Seen:
    """One evaluation; a rule that asks for no gradient gets none that could help it."""
    leaf = point.detach().requires_grad_()
    value = loss(leaf)
    slope = torch.autograd.grad(value.sum(), leaf)[0] if gradient else torch.full_like(point, torch.nan)
    return Seen(point, slope, value.detach())


def walk(
    rule: StepRule,
    loss: Loss,
    pixels: Tensor,
    steps: int,
    size: float | Callable[[int], float],
    project: Project = box,
    keys: Tensor | None = None,
) -> Iterator[tuple[Seen, Tensor]]:
    """What the loop does: each evaluation and the pixels after it."""
    state = rule.start(pixels, torch.arange(len(pixels)) if keys is None else keys)
    for step in range(steps):
        now = size(step) if callable(size) else size
        seen = look(loss, project(rule.point(pixels, now, state)), rule.gradient)
        pixels, state = rule.update(pixels, seen, now, state, project)
        yield seen, pixels


def last(*args: Any, **kwargs: Any) -> Tensor:
    *_, (_, pixels) = walk(*args, **kwargs)
    return pixels


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(weight: Tensor) -> Loss:
    return lambda pixels: (weight * pixels).flatten(1).sum(1)


def quadratic(centre: Tensor) -> Loss:
    return lambda pixels: (pixels - centre).square().flatten(1).sum(1)


# ---------------------------------------------------------------- known optima


@pytest.mark.parametrize("rule", [*GRADIENT_RULES, Smoothed(SignStep(), 1)], ids=repr)
@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (5, 1, 1, 1), (2, 3, 7, 2)], ids=str)
def test_the_corner_that_is_the_optimum_of_a_linear_loss_is_reached_exactly(
    rule: StepRule, shape: tuple[int, ...]
) -> None:
    weight = uniform(*shape, seed=1) - 0.5
    size = 60.0 if getattr(rule, "norm", "inf") == "2" else 0.9
    assert torch.equal(last(rule, linear(weight), uniform(*shape), STEPS, size), (weight < 0).float())


@pytest.mark.parametrize("rule", [rule for rule in GRADIENT_RULES if getattr(rule, "norm", "inf") == "2"], ids=repr)
def test_the_optimum_of_a_linear_loss_over_a_euclidean_ball(rule: StepRule) -> None:
    weight, centre = uniform(3, 3, 4, 5, seed=1) - 0.5, uniform(3, 3, 4, 5)

    def ball(pixels: Tensor) -> Tensor:
        offset = pixels - centre
        return centre + offset * (2 / offset.flatten(1).norm(dim=1).clamp_min(2))[:, None, None, None]

    optimum = centre - 2 * weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(last(rule, linear(weight), centre, STEPS, 0.5, ball), optimum, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (SignStep(), lambda step: 0.5 * 0.97**step),
        (AdamStep(), lambda step: 0.1 * 0.98**step),
        (AdamStep(), 0.02),
        (ApgdStep(300), 1.0),
        (ApgdStep(300, norm="2"), 1.0),
    ],
    ids=repr,
)
def test_the_optimum_of_a_quadratic_loss_over_the_box(rule: StepRule, size: float | Callable[[int], float]) -> None:
    centre = 2 * uniform(3, 3, 4, 5, seed=1) - 0.5  # inside and outside
    loss = quadratic(centre)
    looks = [seen for seen, _ in walk(rule, loss, uniform(3, 3, 4, 5), 300, size)]
    best = torch.stack([seen.loss for seen in looks]).argmin(0)
    reached = torch.stack([looks[step].point[image] for image, step in enumerate(best.tolist())])
    torch.testing.assert_close(reached, box(centre), atol=0.01, rtol=0)


# ---------------------------------------------------------------- references


def wavy(images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of a loss with many minima, for pixels (images, 2, 3, 3), in double precision."""
    parts = [uniform(images, 2, 3, 3, seed=10 * seed + part, dtype=torch.float64) for part in range(3)]
    return parts[0] - 0.5, 5 + 20 * parts[1], 6 * parts[2]


def waves(coefficients: tuple[Tensor, Tensor, Tensor]) -> Loss:
    height, frequency, phase = coefficients
    return lambda x: (height * (frequency * x + phase).sin()).flatten(1).sum(1) + x.flatten(1).sum(1).square() / 50


class WaveByHand:
    """The same loss for one image, in NumPy."""

    def __init__(self, coefficients: tuple[Tensor, Tensor, Tensor], image: int) -> None:
        self.height, self.frequency, self.phase = (part[image].numpy() for part in coefficients)

    def __call__(self, x: np.ndarray) -> float:
        return float((self.height * np.sin(self.frequency * x + self.phase)).sum() + x.sum() ** 2 / 50)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.height * self.frequency * np.cos(self.frequency * x + self.phase) + x.sum() / 25


def apgd_by_the_book(
    loss: WaveByHand, start: np.ndarray, eta: float, iterations: int, norm: str, rho: float, alpha: float
) -> tuple[list[np.ndarray], list[str]]:
    """Croce & Hein 2020, Algorithm 1, line by line, on f = -loss: every x(k) as evaluated, and what each check said."""

    def f(x: np.ndarray) -> float:
        return -loss(x)

    def project(x: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(x, 0.0), 1.0)

    def ascent(x: np.ndarray) -> np.ndarray:
        gradient = -loss.gradient(x)
        return np.sign(gradient) if norm == "inf" else gradient / math.sqrt((gradient**2).sum())

    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    w = sorted({math.ceil(fraction * iterations) for fraction in p if fraction <= 1})

    x = [start, project(start + eta * ascent(start))]
    value = [f(x[0]), f(x[1])]
    evaluated = list(x)
    f_max = [value[0], max(value)]  # of the points up to x(k)
    x_max = x[0] if f_max[1] == value[0] else x[1]
    step_size = [eta]
    said = []
    for k in range(1, iterations):
        step_size.append(eta)
        z = project(x[k] + eta * ascent(x[k]))
        new = project(x[k] + alpha * (z - x[k]) + (1 - alpha) * (x[k] - x[k - 1]))
        evaluated.append(new)
        f_new = f(new)
        if f_new > f_max[-1]:
            x_max = new
        f_max.append(max(f_new, f_max[-1]))
        if k in w:
            before = w[w.index(k) - 1]
            rises = sum(value[i + 1] > value[i] for i in range(before, k))
            first = rises < rho * (k - before)
            second = step_size[before] == step_size[k] and f_max[before] == f_max[k]
            said.append("first" * first + "second" * second)
            if first or second:
                eta /= 2
                new, f_new = x_max, f_max[-1]
        x.append(new)
        value.append(f_new)
    return evaluated, said


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_apgd_is_the_papers_algorithm(norm: Any) -> None:
    """Each step from where the reference is, so that no rounding grows, and every decision is made on the same loss."""
    images, eta, answers = 24, 0.7, set()
    start = uniform(images, 2, 3, 3, seed=3, dtype=torch.float64)
    cases = ((100, 0.75, 0.75), (60, 0.05, 0.6), (37, 0.5, 0.9), (20, 0.61, 0.75), (11, 0.43, 0.8), (3, 1.0, 1.0))
    for iterations, rho, alpha in cases:
        losses = [WaveByHand(wavy(images, iterations), image) for image in range(images)]
        books = [
            apgd_by_the_book(loss, x.numpy(), eta, iterations, norm, rho, alpha)
            for loss, x in zip(losses, start, strict=True)
        ]
        answers |= {answer for _, said in books for answer in said}
        path = [torch.tensor(np.stack(points)) for points in zip(*(points for points, _ in books), strict=True)]
        rule = ApgdStep(iterations, rho=rho, alpha=alpha, norm=norm)
        state = rule.start(start, torch.arange(images))
        for step in range(iterations):
            rows = list(zip(losses, path[step].numpy(), strict=True))
            gradient = torch.tensor(np.stack([loss.gradient(x) for loss, x in rows]))
            value = torch.tensor([loss(x) for loss, x in rows], dtype=torch.float64)
            moved, state = rule.update(path[step], Seen(path[step], gradient, value), eta, state, box)
            torch.testing.assert_close(moved, path[step + 1], atol=1e-12, rtol=0)
    assert answers == {"", "first", "second", "firstsecond"}, "every branch was taken"


def test_checkpoints() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]


def test_apgd_knows_only_the_first_size() -> None:
    loss, start = waves(wavy(3, 5)), uniform(3, 2, 3, 3, dtype=torch.float64)
    constant = [pixels for _, pixels in walk(ApgdStep(STEPS), loss, start, STEPS, 0.5)]
    falling = [pixels for _, pixels in walk(ApgdStep(STEPS), loss, start, STEPS, lambda step: 0.5 * 0.8**step)]
    assert all(torch.equal(a, b) for a, b in zip(constant, falling, strict=True))


def test_nesterov_looks_ahead_as_in_the_paper() -> None:
    coefficients = wavy(3, seed=7)
    start, size, momentum = uniform(3, 2, 3, 3, dtype=torch.float64), 0.05, 0.8
    steps = list(walk(SignStep(momentum, nesterov=True), waves(coefficients), start, 9, size))
    for image in range(3):
        loss, x, velocity = WaveByHand(coefficients, image), start[image].numpy(), np.zeros((2, 3, 3))
        for seen, pixels in steps:
            ahead = np.clip(x - size * momentum * velocity, 0, 1)
            np.testing.assert_allclose(seen.point[image].numpy(), ahead, atol=1e-12)
            gradient = loss.gradient(ahead)
            velocity = momentum * velocity + gradient / np.abs(gradient).mean()
            x = np.clip(x - size * np.sign(velocity), 0, 1)
            np.testing.assert_allclose(pixels[image].numpy(), x, atol=1e-12)


def test_adam_is_torchs_adam() -> None:
    loss, start = waves(wavy(3, seed=8)), uniform(3, 2, 3, 3, dtype=torch.float64)
    ours = [pixels for _, pixels in walk(AdamStep(0.8, 0.95, 1e-6), loss, start, 9, 0.03, lambda pixels: pixels)]
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    for pixels in ours:
        optimizer.zero_grad()
        loss(parameter).sum().backward()
        optimizer.step()
        torch.testing.assert_close(pixels, parameter.data, atol=1e-12, rtol=0)


def classifier(shape: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.Tanh(), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize(
    ("rule", "peer", "options", "exact"),
    [
        (SignStep(), "PGD", {"random_start": False}, True),
        (SignStep(norm="2"), "PGDL2", {"random_start": False}, False),
        (SignStep(0.9), "MIFGSM", {"decay": 0.9}, True),
        (SignStep(0.9, nesterov=True), "NIFGSM", {"decay": 0.9}, True),
        (
            Smoothed(SignStep(0.9), 5, 2),
            "TIFGSM",
            {"decay": 0.9, "len_kernel": 5, "nsig": 2, "diversity_prob": 0},
            False,
        ),
        (Smoothed(SignStep(), 15), "TIFGSM", {"diversity_prob": 0}, False),
    ],
    ids=str,
)
def test_the_same_steps_as_torchattacks(rule: StepRule, peer: str, options: dict[str, Any], exact: bool) -> None:
    model = classifier((3, 8, 8))
    images, labels = 0.4 + 0.2 * uniform(4, 3, 8, 8), torch.tensor([0, 4, 2, 1])
    if peer == "TIFGSM":
        options = {**options, "diversity_prob": 0}
    attack = getattr(torchattacks, peer)(model, eps=100.0, alpha=0.004, steps=7, **options)
    theirs = attack(images, labels)

    def loss(pixels: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(model(pixels), labels, reduction="none") / len(pixels)

    ours = last(rule, loss, images, 7, 0.004)
    assert not torch.equal(ours, images)
    torch.testing.assert_close(ours, theirs, atol=0.0 if exact else 1e-6, rtol=0)


# ---------------------------------------------------------------- the smoothed gradient


@pytest.mark.parametrize(("len_kernel", "nsig"), [(1, 3), (3, 1), (5, 3), (15, 3), (7, 0.5)])
def test_the_kernel_is_torchattacks_own(len_kernel: int, nsig: float) -> None:
    attack = torchattacks.TIFGSM(classifier((3, 2, 2)), len_kernel=len_kernel, nsig=nsig)
    theirs = attack.stacked_kernel[0, 0]
    size = 2 * len_kernel + 1
    impulse = torch.zeros(1, 3, size, size)
    impulse[0, 1, len_kernel, len_kernel] = 1
    smoothed = smooth(impulse, len_kernel, nsig)
    half = len_kernel // 2
    middle = slice(len_kernel - half, len_kernel + half + 1)
    torch.testing.assert_close(smoothed[0, 1, middle, middle], theirs, atol=1e-7, rtol=0)
    smoothed[0, 1, middle, middle] = 0
    assert not smoothed.any(), "neither farther away nor in another channel"


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (6, 4), (13, 11)])
@pytest.mark.parametrize("len_kernel", [3, 9])
def test_smoothing_against_a_loop_over_pixels(size: tuple[int, int], len_kernel: int) -> None:
    gradient = uniform(2, 3, *size, seed=4, dtype=torch.float64) - 0.5
    half = len_kernel // 2
    places = [-2 + 4 * i / (len_kernel - 1) for i in range(len_kernel)]
    weight = np.outer(*2 * [[math.exp(-(place**2) / 2) for place in places]])
    expected = np.zeros(gradient.shape)
    for row, column in np.ndindex(*size):
        for down, right in np.ndindex(len_kernel, len_kernel):
            r, c = row + down - half, column + right - half
            if 0 <= r < size[0] and 0 <= c < size[1]:
                expected[:, :, row, column] += weight[down, right] / weight.sum() * gradient[:, :, r, c].numpy()
    np.testing.assert_allclose(smooth(gradient, len_kernel, 2).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
def test_a_kernel_of_one_pixel_is_the_inner_rule(rule: StepRule) -> None:
    loss, start = waves(wavy(3, 5)), uniform(3, 2, 3, 3)
    plain = walk(rule, loss, start, STEPS, 0.2)
    for (_, ours), (_, expected) in zip(walk(Smoothed(rule, 1), loss, start, STEPS, 0.2), plain, strict=True):
        assert torch.equal(ours, expected)


def test_a_direction_has_length_one_however_small_the_gradient() -> None:
    gradient = uniform(4, 3, 2, 2) - 0.5
    gradient[3] = 0
    for scale in (1e-30, 1.0, 1e30):
        length = direction(gradient * scale, "2").flatten(1).norm(dim=1)
        torch.testing.assert_close(length, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert torch.equal(direction(gradient, "inf"), gradient.sign())


# ---------------------------------------------------------------- manners


@pytest.mark.parametrize("rule", RULES, ids=repr)
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_images_that_leave_the_batch_change_nothing_for_the_others(rule: StepRule, data: st.DataObject) -> None:
    images = 4
    coefficients = wavy(images, seed=data.draw(st.integers(0, 50)))
    start, keys = uniform(images, 2, 3, 3), torch.tensor([7, 2**62, 0, -3])
    whole = [pixels for _, pixels in walk(rule, waves(coefficients), start, STEPS, 0.3, keys=keys)]
    rows, pixels, state = torch.arange(images), start, rule.start(start, keys)
    for step in range(STEPS):
        stay = torch.tensor(data.draw(st.permutations(range(len(rows)))))
        stay = stay[: data.draw(st.integers(max(1, len(rows) - 1), len(rows)))]
        rows, pixels, state = rows[stay], pixels[stay], {name: value[stay] for name, value in state.items()}
        loss = waves(tuple(part[rows] for part in coefficients))  # type: ignore[arg-type]
        seen = look(loss, box(rule.point(pixels, 0.3, state)), rule.gradient)
        pixels, state = rule.update(pixels, seen, 0.3, state, box)
        assert torch.equal(pixels, whole[step][rows])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_leave_what_they_are_given_and_stay_where_they_may(rule: StepRule) -> None:
    loss = waves(wavy(3, seed=2))
    pixels, keys = uniform(3, 2, 3, 3), torch.arange(3)
    state = rule.start(pixels, keys)
    for _ in range(STEPS):
        point = box(rule.point(pixels, 0.2, state))
        seen = look(loss, point, rule.gradient)
        given_ones = [pixels, keys, seen.point, seen.gradient, seen.loss, *state.values()]
        before = [value.clone() for value in given_ones]
        rule.point(pixels, 0.2, state)
        moved, new = rule.update(pixels, seen, 0.2, state, box)
        for value, old in zip(given_ones, before, strict=True):
            torch.testing.assert_close(value, old, atol=0, rtol=0, equal_nan=True)
        assert set(new) == set(state)
        assert all(len(value) == 3 for value in new.values())
        assert moved.dtype == pixels.dtype
        assert 0 <= moved.min() <= moved.max() <= 1
        pixels, state = moved, new


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_repr_of_a_rule_rebuilds_it(rule: StepRule) -> None:
    assert eval(repr(rule)) == rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignStep(norm="1"), "`norm` is '1'"),  # type: ignore[arg-type]
        (lambda: ApgdStep(9, norm=2), "`norm` is 2"),  # type: ignore[arg-type]
        (lambda: ApgdStep(0), "`max_iter` is 0"),
        (lambda: ApgdStep(9, rho=1.5), "`rho` is 1.5"),
        (lambda: ApgdStep(9, alpha=-0.1), "`alpha` is -0.1"),
        (lambda: Smoothed(SignStep(), 4), "`len_kernel` is 4; it must be an odd"),
        (lambda: Smoothed(SignStep(), -3), "`len_kernel` is -3"),
        (lambda: Smoothed(SignStep(), 3, 0), "`nsig` is 0"),
        (lambda: Smoothed(SquareStep(9)), "takes no gradient"),
        (lambda: SquareStep(0), "`max_iter` is 0"),
        (lambda: SquareStep(9, p_init=0), "`p_init` is 0"),
        (lambda: SquareStep(9, p_init=1.1), "`p_init` is 1.1"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- random squares


def test_squares_only_ever_lower_the_loss_and_change_one_square() -> None:
    rule, start = SquareStep(60), uniform(3, 2, 7, 9)
    loss = quadratic(uniform(3, 2, 7, 9, seed=1))
    state = rule.start(start, torch.arange(3))
    pixels, lowest = start, torch.full((3,), torch.inf)
    for step in range(60):
        seen = look(loss, box(rule.point(pixels, 0.1, state)), gradient=False)
        assert ((seen.point == 0) | (seen.point == 1)).all(), "every value is at an edge"
        if step == 0:
            assert (seen.point == seen.point[:, :, :1]).all(), "vertical stripes"
            assert len({tuple(image.flatten().tolist()) for image in seen.point}) == 3
        else:
            for image in range(3):
                rows, columns = (seen.point[image] != pixels[image]).any(0).nonzero(as_tuple=True)
                assert len(rows), "a query that changes nothing is wasted"
                side = rule.side(step, 7, 9)
                assert rows.max() - rows.min() < side
                assert columns.max() - columns.min() < side
        before = pixels
        pixels, state = rule.update(pixels, seen, 0.1, state, box)
        better = seen.loss < lowest
        assert torch.equal(pixels, torch.where(better[:, None, None, None], seen.point, before))
        assert (loss(pixels) <= lowest).all()
        lowest = loss(pixels)
    assert (lowest < loss(box(rule.point(start, 0.1, rule.start(start, torch.arange(3)))))).all()


@pytest.mark.parametrize("project", [box, lambda pixels: pixels.clamp(0.3, 0.45).clamp(-3, 0.4)])
def test_squares_find_the_optimum_of_a_linear_loss(project: Project) -> None:
    weight = uniform(2, 2, 4, 5, seed=1) - 0.5
    reached = last(SquareStep(1500), linear(weight), project(uniform(2, 2, 4, 5)), 1500, 0.0, project)
    low, high = project(torch.full_like(weight, -9)), project(torch.full_like(weight, 9))
    assert torch.equal(reached, low.where(weight > 0, high))


def test_the_squares_shrink_as_in_the_paper() -> None:
    rule = SquareStep(10_000, p_init=0.64)
    starts = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    for halvings, first in enumerate(starts):
        side = max(round(100 * math.sqrt(0.64 / 2**halvings)), 1)
        last_one = ([*starts, 10_000][halvings + 1]) - 1
        assert rule.side(first, 100, 100) == rule.side(last_one, 100, 100) == side
    assert SquareStep(100, p_init=0.64).side(1, 100, 100) == rule.side(100, 100, 100)
    assert rule.side(0, 400, 3) == 3
    assert rule.side(9000, 4, 4) == 1


def test_squares_belong_to_their_key() -> None:
    loss, start = quadratic(uniform(2, 3, 5, 5, seed=1)[:1].expand(2, -1, -1, -1)), torch.zeros(2, 3, 5, 5)
    same = last(SquareStep(30), loss, start, 30, 0.1, keys=torch.tensor([4, 4]))
    other = last(SquareStep(30), loss, start, 30, 0.1, keys=torch.tensor([4, 5]))
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], other[0])
    assert not torch.equal(other[0], other[1])
