"""Smallest perturbations: never under the optimum of a linear model, close to it, and what comes back is as said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from tiny import NB_CLASSES, SHAPE, linear_cnn, random_images, random_labels, tiny_cnn
from torch import Tensor, nn

import attacks.minimal_norm as minimal_norm
from attacks import torch_style
from attacks.art_style import MinimalNormAttack
from attacks.minimal_norm import METHODS, MinimalNormOptions
from attacks.targets import FixedClass
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, Traits

VOID = 255
QUIET: dict[str, Any] = {"verbose": False}


def one_pixel_model(nb_classes: int = 2, seed: int = 0) -> PyTorchSegmenter:
    """A 1×1 convolution with its boundaries among the images: each pixel is a linear classifier of its own."""
    torch.manual_seed(seed)
    model = nn.Conv2d(3, nb_classes, 1).requires_grad_(False)
    model.bias -= model(middling_images()).mean((0, 2, 3))
    return PyTorchSegmenter(model, nb_classes, SHAPE)


def middling_images(number: int = 2) -> Tensor:
    """So far from 0 and 1 that clipping has no say."""
    return 0.4 + 0.2 * random_images(number)


def smallest_norms(segmenter: PyTorchSegmenter, images: Tensor, y: Tensor, norm: str, threshold: float) -> Tensor:
    """The closed form for two classes: the cheapest pixels that make up the share, each moved to its boundary."""
    weight = segmenter.model.weight[:, :, 0, 0].double()
    dual = torch.linalg.vector_norm(weight[0] - weight[1], ord=1 if norm == "inf" else 2)
    logits = segmenter.model(images).double()
    norms = []
    for row, labels in zip(logits, y, strict=True):
        counted = labels != VOID
        own = labels[counted][None]
        away = (row[:, counted].gather(0, own) - row[:, counted].gather(0, 1 - own))[0]
        need = (away / dual).clamp_min(0).sort().values[: math.ceil(threshold * int(counted.sum()) - 1e-9)]
        norms.append(need.max() if norm == "inf" else need.square().sum().sqrt())
    return torch.stack(norms)


def share_won(segmenter: PyTorchSegmenter, adversarial: Tensor, y: Tensor) -> list[float]:
    counted = y != VOID
    won = (segmenter.predict_labels(adversarial) != y) & counted
    return (won.sum((1, 2)) / counted.sum((1, 2))).tolist()


# ---------------------------------------------------------------- strength


@pytest.mark.parametrize("threshold", [0.7, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_the_norm_is_close_to_the_smallest_and_never_under_it(norm: str, threshold: float) -> None:
    segmenter, images = one_pixel_model(), middling_images()
    y = random_labels(2).where(random_labels(2) == VOID, random_labels(2) % 2)
    best = smallest_norms(segmenter, images, y, norm, threshold)
    attack = MinimalNormAttack(segmenter, norm=norm, threshold=threshold, max_iter=150, **QUIET)
    adversarial = attack.generate(images, y)
    assert attack.result.reached == (True, True)
    found = torch.tensor(attack.result.norms, dtype=torch.float64)
    assert (found > best * (1 - 1e-5)).all()
    assert (found < best * 1.05).all()
    actual = torch.linalg.vector_norm((adversarial - images).double().flatten(1), ord=float(norm), dim=1)
    torch.testing.assert_close(actual, found, atol=1e-6, rtol=1e-5)
    assert attack.result.criterion == pytest.approx(share_won(segmenter, adversarial, y))
    assert min(attack.result.criterion) >= threshold - 1e-6


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_towards_a_map_it_comes_close_to_what_a_solver_finds(norm: str) -> None:
    """Every pixel on its target is a convex problem, which falls apart into pixels; scipy solves each."""
    segmenter, images = one_pixel_model(NB_CLASSES), middling_images(1)[:, :, :4, :5]
    target = torch.randint(NB_CLASSES, (1, 4, 5), generator=torch.Generator().manual_seed(3))
    weight = segmenter.model.weight[:, :, 0, 0].double().numpy()
    logits = segmenter.model(images)[0].double().numpy()
    needs = []
    for row in range(4):
        for column in range(5):
            aim = int(target[0, row, column])
            others = [c for c in range(NB_CLASSES) if c != aim]
            slopes = weight[others] - weight[aim]  # slopes @ moved <= room
            room = logits[aim, row, column] - logits[others, row, column]
            if norm == "inf":
                box = np.vstack([np.hstack([s * np.eye(3), -np.ones((3, 1))]) for s in (1, -1)])
                constraints = np.vstack([np.hstack([slopes, np.zeros((3, 1))]), box])
                solved = linprog([0, 0, 0, 1], constraints, np.concatenate([room, np.zeros(6)]), bounds=(None, None))
                needs.append(solved.fun)
            else:
                inside = {"type": "ineq", "fun": lambda d, s=slopes, r=room: r - s @ d, "jac": lambda d, s=slopes: -s}
                solved = minimize(lambda d: d @ d, np.zeros(3), jac=lambda d: 2 * d, constraints=inside, method="SLSQP")
                needs.append(math.sqrt(max(solved.fun, 0.0)))
            assert solved.success
    best = max(needs) if norm == "inf" else float(np.linalg.norm(needs))
    attack = MinimalNormAttack(segmenter, norm=norm, targeted=True, threshold=1.0, max_iter=300, **QUIET)
    adversarial = attack.generate(images, target)
    assert torch.equal(segmenter.predict_labels(adversarial), target)
    assert best * (1 - 1e-4) < attack.result.norms[0] < best * 1.05


def test_clipping_has_its_say() -> None:
    """Where the range is in the way of the cheapest perturbation, what is found is still in the range and succeeds."""
    segmenter, images = one_pixel_model(), middling_images(2)
    images[:, :, ::2] -= images[:, :, ::2].min()
    for norm in ("inf", "2"):
        attack = MinimalNormAttack(segmenter, norm=norm, max_iter=60, **QUIET)
        adversarial = attack.generate(images)
        assert attack.result.reached == (True, True)
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        y = segmenter.predict_labels(images)
        assert min(share_won(segmenter, adversarial, y)) >= 0.99
        best = smallest_norms(segmenter, images, y, norm, 0.99)
        assert (torch.tensor(attack.result.norms) > best * (1 - 1e-5)).all()


def test_dag_steps_along_the_gradient_of_the_pixels_still_to_win() -> None:
    segmenter, images = one_pixel_model(), middling_images(1)
    y = segmenter.predict_labels(images)
    gamma = 0.5 / 255
    one = MinimalNormAttack(segmenter, method="dag", eps_step=gamma, max_iter=1, **QUIET).generate(images, y)
    weight = segmenter.model.weight[:, :, 0, 0]
    direction = torch.stack([weight[0] - weight[1], weight[1] - weight[0]])[y].movedim(-1, 1)
    torch.testing.assert_close(one, images - gamma * direction / direction.abs().max(), atol=1e-7, rtol=0)
    # pixels that are won stay where they are, and what is found is the first iterate that succeeds
    attack = MinimalNormAttack(segmenter, method="dag", norm="2", max_iter=200, **QUIET)
    adversarial = attack.generate(images, y)
    steps = attack.result.steps[0]
    assert attack.result.reached == (True,)
    assert 1 < steps < 200
    before = MinimalNormAttack(segmenter, method="dag", norm="2", max_iter=steps - 1, **QUIET)
    assert share_won(segmenter, before.generate(images, y), y)[0] < 0.99
    assert before.result.reached == (False,)
    need = smallest_norms(segmenter, images, y, "2", 0.99)
    assert float(need) < attack.result.norms[0] < 1.1 * float(need)
    moved = (adversarial - images).abs().amax(1)
    assert int((moved < moved.max() / 2).sum()) > 10


def test_alma_prox_is_closer_than_dag() -> None:
    images, model = middling_images(), linear_cnn().requires_grad_(False)
    model.bias -= model(images).mean((0, 2, 3))
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    options: dict[str, Any] = {"threshold": 0.9, "max_iter": 120, **QUIET}
    for norm in ("inf", "2"):
        norms = {}
        for method in METHODS:
            attack = MinimalNormAttack(segmenter, method=method, norm=norm, **options)
            attack.generate(images)
            assert attack.result.reached == (True, True)
            norms[method] = np.array(attack.result.norms)
        assert (norms["alma_prox"] < norms["dag"]).all()


# ---------------------------------------------------------------- what is returned


@pytest.mark.parametrize("method", METHODS)
def test_an_image_that_succeeds_as_it_is_stays_as_it_is(method: str) -> None:
    segmenter, images = one_pixel_model(), middling_images()
    wrong = 1 - segmenter.predict_labels(images)
    attack = MinimalNormAttack(segmenter, method=method, max_iter=5, **QUIET)
    assert torch.equal(attack.generate(images, wrong), images)
    assert attack.result.norms == (0.0, 0.0)
    assert attack.result.reached == (True, True)
    assert method != "dag" or attack.result.steps == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_reached_is_said(method: str) -> None:
    deaf = one_pixel_model()
    deaf.model.weight.zero_()
    deaf.model.bias.copy_(torch.tensor([1.0, 0.0]))
    images = middling_images()
    attack = MinimalNormAttack(deaf, method=method, max_iter=4, **QUIET)
    adversarial = attack.generate(images)
    assert attack.result.reached == (False, False)
    assert attack.result.criterion == (0.0, 0.0)
    assert torch.equal(adversarial, images), "as good as any other, and the closest"
    half = torch.zeros(2, *SHAPE[1:], dtype=torch.int64)
    half[:, :4] = 1
    aiming = MinimalNormAttack(deaf, method=method, max_iter=4, targeted=True, **QUIET)
    assert torch.equal(aiming.generate(images, half), images)
    assert aiming.result.reached == (False, False)
    assert aiming.result.criterion == (0.75, 0.75)


@pytest.mark.parametrize("method", METHODS)
def test_neither_batch_size_nor_style_changes_a_result(method: str, images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    options: dict[str, Any] = {"method": method, "threshold": 0.8, "max_iter": 12, "eps_step": 0.02, **QUIET}
    attack = MinimalNormAttack(segmenter, batch_size=5, **options)
    whole = attack.generate(images, labels)
    parts = MinimalNormAttack(segmenter, batch_size=2, **options)
    torch.testing.assert_close(parts.generate(images, labels), whole, atol=1e-6, rtol=0)
    assert parts.result.norms == pytest.approx(attack.result.norms, abs=1e-6)
    assert parts.result.steps == attack.result.steps
    atk = torch_style.MinimalNormAttack(model, **options)
    torch.testing.assert_close(atk(images, labels), whole, atol=1e-6, rtol=0)
    assert atk.result.reached == attack.result.reached
    array = attack.generate(images.numpy(), labels.numpy())
    assert np.array_equal(array, whole.numpy())
    passes = 1 if method == "alma_prox" else 0  # the look at the clean image's margins
    assert attack.result.backwards >= sum(attack.result.steps)
    assert attack.result.forwards <= sum(attack.result.steps) + (1 + passes) * len(images)
    assert bool(attack.mask(images).all())


class Dropping(nn.Module):
    """A random defence by the protocol."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.traits = Traits(random=True)
        self.conditions = Conditions()
        self.draws: list[int | None] = []

    def forward(self, images: Tensor) -> Tensor:
        self.draws.append(self.conditions.draw)
        generator = torch.Generator().manual_seed((self.conditions.draw or 0) + 7)
        keep = torch.rand(images.shape[-2:], generator=generator) > 0.1
        output: Tensor = self.model(images * keep)
        return output


@pytest.mark.parametrize("method", METHODS)
def test_a_random_defence_is_attacked_over_its_draws(method: str, images: Tensor) -> None:
    model = Dropping(one_pixel_model().model)
    segmenter = PyTorchSegmenter(model, 2, SHAPE)
    attack = MinimalNormAttack(segmenter, method=method, max_iter=6, eps_step=0.02, threshold=0.95, **QUIET)
    first = attack.generate(images[:2])
    assert {draw for draw in model.draws if draw is not None} == set(range(4 * 7))
    assert torch.equal(attack.generate(images[:2]), first)
    assert min(attack.result.criterion) > 0.1


# ---------------------------------------------------------------- options


def test_options_that_have_no_say_are_refused(images: Tensor) -> None:
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    for name in ("momentum", "objective", "num_restarts", "keep_best", "optimizer", "random_start"):
        with pytest.raises(TypeError, match=f"MinimalNormAttack has no option {name}; its options are .*threshold"):
            MinimalNormAttack(segmenter, **{name: 1})
    assert set(MinimalNormOptions.names()) <= set(vars(MinimalNormOptions()))
    assert MinimalNormAttack.attack_params == MinimalNormOptions.names()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "cw"}, "`method` is 'cw'; it must be one of 'alma_prox', 'dag'"),
        ({"norm": "1"}, "`norm` is '1'; it must be one of 'inf', '2'"),
        ({"threshold": 0}, "`threshold` is 0; it must be above 0 and at most 1"),
        ({"threshold": 1.5}, "`threshold` is 1.5"),
        ({"threshold": True}, "`threshold` is True; it must be a number"),
        ({"max_iter": 0}, "`max_iter` is 0"),
    ],
)
def test_bad_options_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MinimalNormOptions(**wrong)


def test_a_target_brings_its_map(images: Tensor, labels: Tensor) -> None:
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    attack = MinimalNormAttack(segmenter, target=FixedClass(2), threshold=0.3, max_iter=40, **QUIET)
    adversarial = attack.generate(images, labels)
    counted = labels != VOID
    hit = ((segmenter.predict_labels(adversarial) == 2) & counted).sum((1, 2)) / counted.sum((1, 2))
    assert attack.result.criterion == pytest.approx(hit.tolist())
    with pytest.raises(ValueError, match="needs `y`"):
        attack.generate(images)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99, 1.0])
def test_the_easiest_constraints_are_as_many_as_the_share(share: float) -> None:
    constraints = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(3, 10, 10, dtype=torch.bool)
    counted[1, :5], counted[2] = False, False
    easiest = minimal_norm._easiest(constraints, counted, share)
    assert easiest.sum((1, 2)).tolist() == [math.ceil(share * 100 - 1e-9), math.ceil(share * 50 - 1e-9), 0]
    assert not easiest[~counted].any()
    for image in (0, 1):
        kept, left = easiest[image], counted[image] & ~easiest[image]
        assert not left.any() or constraints[image][kept].max() < constraints[image][left].min()


def test_the_proximal_step_is_that_of_the_norm() -> None:
    """Against the definition, by a fine search over levels: argmin of λ‖d‖ + ½‖d − v‖²."""
    v = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for norm in ("inf", "2"):
        for level in (0.3, 0.8):
            moved = minimal_norm._proximal(v, torch.tensor([level], dtype=torch.float64), norm)
            # the λ that the level implies: what is cut off, in the dual norm
            weight = float((v - moved).abs().sum() if norm == "inf" else (v - moved).norm())

            def cost(d: Tensor, norm: str = norm, weight: float = weight) -> float:
                return weight * float(minimal_norm._norm(d, norm)) + 0.5 * float((d - v).square().sum())

            generator = torch.Generator().manual_seed(1)
            for _ in range(200):
                nudge = 0.01 * torch.randn(v.shape, generator=generator, dtype=torch.float64)
                assert cost(moved) <= cost(moved + nudge)
            for other in (0.9 * level, 1.1 * level):
                assert cost(moved) <= cost(minimal_norm._proximal(v, torch.tensor([other], dtype=torch.float64), norm))
