"""Multi-scale inference by hand; the CRF against exact sums over all pairs; both together with RAM."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NB_CLASSES, SHAPE, linear_cnn, random_images, tiny_attention, tiny_cnn
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.experiment import evaluate
from ramdefense.baselines import MeanFieldCRF, MultiScale
from ramdefense.baselines.crf import mean_field
from ramdefense.baselines.permutohedral import lattice
from ramdefense.defences import defence, defences
from ramdefense.ram import RAMDefense
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

# ------------------------------------------------------------------------------------------------------------ lattice


@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 7.0]))
@settings(max_examples=25, deadline=None)
def test_every_point_lies_in_its_simplex(dimensions: int, seed: int, spread: float) -> None:
    points = torch.randn(50, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    grid = lattice(points)
    assert grid.weights.min() > -1e-9
    torch.testing.assert_close(grid.weights.sum(dim=1), torch.ones(50, dtype=torch.float64))
    # a direction and its opposite lead back
    size = grid.neighbours.shape[-1]
    for one, other in grid.neighbours:
        there = one < size
        assert torch.equal(other[one[there]], torch.arange(size)[there])


@pytest.mark.parametrize(("dimensions", "side"), [(1, 200), (2, 60), (3, 22)])
def test_filter_has_standard_deviation_one_in_every_direction(dimensions: int, side: int) -> None:
    axis = torch.linspace(-6, 6, side, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(*[axis] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    # how wide it is depends on where in its simplex a point lies: one for the mean over many points
    centres = points.abs().amax(dim=1).argsort()[: len(points) // 5**dimensions]
    impulses = torch.zeros(len(points), len(centres), dtype=torch.float64)
    impulses[centres, torch.arange(len(centres))] = 1
    answers = lattice(points).filter(impulses)
    offsets = points[:, None] - points[centres]
    variance = (answers[..., None] * offsets**2).sum(0) / answers.sum(0)[:, None]
    expected = torch.ones(dimensions, dtype=torch.float64)
    torch.testing.assert_close(variance.mean(dim=0), expected, atol=0.07, rtol=0)


@pytest.mark.parametrize("dimensions", [2, 3, 5])
def test_filter_against_the_sum_over_all_pairs(dimensions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(1500, dimensions, dtype=torch.float64, generator=generator) * 3
    values = torch.cat([(points.sum(1, keepdim=True) > 1.5 * dimensions).double(), torch.ones_like(points[:, :1])], 1)
    kernel = torch.exp(-0.5 * torch.cdist(points, points) ** 2)
    exact, found = kernel @ values, lattice(points).filter(values)
    error = exact[:, :1] / exact[:, 1:] - found[:, :1] / found[:, 1:]
    assert error.abs().mean() < 0.02
    assert error.abs().max() < 0.1


def test_groups_do_not_see_each_other() -> None:
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).double().repeat(2, 1)
    groups = torch.arange(2).repeat_interleave(40)
    values = torch.cat([torch.ones(40, 1), torch.zeros(40, 1)]).double()
    both, one = lattice(points, groups).filter(values), lattice(points[:40]).filter(values[:40])
    torch.testing.assert_close(both[:40], one)
    assert (both[40:] == 0).all()


def test_filter_is_differentiable_in_values_and_features() -> None:
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(12, 3, dtype=torch.float64, generator=generator) * 3).requires_grad_()
    values = torch.rand(12, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, v: lattice(f).filter(v), (points, values))


def test_lattice_refuses() -> None:
    with pytest.raises(ValueError, match="not finite"):
        lattice(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="too many to number"):
        lattice(torch.rand(4, 5) * 1e7)


# ---------------------------------------------------------------------------------------------------------------- CRF


def exact_mean_field(
    logits: Tensor, image: Tensor, iterations: int, alpha: float, beta: float, gamma: float, w1: float, w2: float
) -> Tensor:
    """One image, float64, sums over all pairs: logits (K, H, W), image (3, H, W) → Q (K, H, W)."""
    _, height, width = logits.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(-1, 2).double()
    colours = image.reshape(3, -1).T.double()
    far = torch.cdist(places, places) ** 2
    k1 = torch.exp(-far / (2 * alpha**2) - torch.cdist(colours, colours) ** 2 / (2 * beta**2))
    k2 = torch.exp(-far / (2 * gamma**2))
    mixed = w1 * k1 / k1.sum(1, keepdim=True) + w2 * k2 / k2.sum(1, keepdim=True)
    unary = logits.reshape(len(logits), -1).T.double()
    beliefs = unary.softmax(1)
    for _ in range(iterations):
        beliefs = (unary + mixed @ beliefs).softmax(1)
    return beliefs.T.reshape(logits.shape)


def scene(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A picture of three flat regions with noise, and noisy logits of them: (1, 3, 18, 22), (1, 3, 18, 22)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(18, 22, dtype=torch.int64)
    labels[:, 11:] = 1
    labels[12:] = 2
    colours = torch.tensor([[40.0, 60, 200], [200, 80, 60], [90, 190, 90]])
    image = (colours[labels].permute(2, 0, 1) + 6 * torch.randn(3, 18, 22, generator=generator)).clamp(0, 255)
    logits = 1.2 * F.one_hot(labels, 3).permute(2, 0, 1) + torch.randn(3, 18, 22, generator=generator)
    return logits[None].double(), image[None].double()


@pytest.mark.parametrize("weights", [(2.0, 1.0), (4.0, 0.0), (0.0, 3.0)])
def test_mean_field_against_all_pairs(weights: tuple[float, float]) -> None:
    logits, image = scene()
    found = mean_field(
        logits, image, theta_alpha=6.0, theta_beta=25.0, theta_gamma=1.5, bilateral_weight=weights[0],
        spatial_weight=weights[1],
    ).exp()[0]  # fmt: skip
    exact = exact_mean_field(logits[0], image[0], 5, 6.0, 25.0, 1.5, *weights)
    torch.testing.assert_close(found.sum(0), torch.ones(18, 22, dtype=torch.float64))
    if weights[0] == 0:  # the spatial kernel is exact
        torch.testing.assert_close(found, exact)
    assert (found - exact).abs().mean() < 0.02
    assert (found.argmax(0) == exact.argmax(0)).double().mean() > 0.97
    # and it is far from doing nothing
    assert (logits[0].softmax(0) - exact).abs().mean() > 5 * (found - exact).abs().mean()


def test_without_iterations_or_weights_nothing_changes() -> None:
    logits, image = scene()
    for options in ({"iterations": 0}, {"bilateral_weight": 0.0, "spatial_weight": 0.0}):
        torch.testing.assert_close(mean_field(logits, image, **options), logits.log_softmax(1))  # type: ignore[arg-type]


def test_the_crf_mends_noise_along_the_edges_of_the_picture() -> None:
    logits, image = scene()
    truth = torch.zeros(18, 22, dtype=torch.int64)
    truth[:, 11:] = 1
    truth[12:] = 2
    before = (logits.argmax(1) == truth).double().mean()
    after = (mean_field(logits, image, bilateral_weight=6.0).argmax(1) == truth).double().mean()
    assert before < 0.8
    assert after > 0.97


def test_mean_field_gradients_are_those_of_finite_differences() -> None:
    logits, image = scene()
    logits, image = logits[..., :5, :6].clone().requires_grad_(), image[..., :5, :6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mean_field(a, b, iterations=2), (logits, image), atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    (one, first), (two, second) = scene(0), scene(1)
    both = mean_field(torch.cat([one, two]), torch.cat([first, second]))
    torch.testing.assert_close(both, torch.cat([mean_field(one, first), mean_field(two, second)]))


def segmenter(model: nn.Module | None = None, **options: Any) -> PyTorchSegmenter:
    given: dict[str, Any] = {"preprocessing": ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), **options}
    return PyTorchSegmenter(tiny_attention() if model is None else model, NB_CLASSES, SHAPE, **given)


def test_the_crf_sees_the_colours_of_the_image(images: Tensor) -> None:
    plain = segmenter()
    found = MeanFieldCRF(plain).logits(images)
    torch.testing.assert_close(found, mean_field(plain.logits(images), images * 255), atol=1e-4, rtol=1e-4)
    scaled = segmenter(preprocessing=None, clip_values=(0.0, 255.0))
    inputs = images * 255
    torch.testing.assert_close(
        MeanFieldCRF(scaled).logits(inputs), mean_field(scaled.logits(inputs), inputs), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "options", [{"iterations": -1}, {"iterations": 1.5}, {"theta_beta": 0.0}, {"spatial_weight": -1.0}]
)
def test_crf_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MeanFieldCRF(segmenter(), **options)


# -------------------------------------------------------------------------------------------------------- multi-scale


def test_multiscale_is_the_mean_of_resized_passes(images: Tensor) -> None:
    plain = segmenter(tiny_cnn())
    found = MultiScale(plain, scales=(0.5, 1.0), flip=True).logits(images)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    expected = torch.zeros_like(found)
    with torch.no_grad():
        for scale in (0.5, 1.0):
            size = (round(SHAPE[1] * scale), round(SHAPE[2] * scale))
            scaled = F.interpolate((images - mean) / std, size, mode="bilinear", antialias=scale < 1)
            for mirrored in (False, True):
                logits = plain.model.eval()(scaled.flip(-1) if mirrored else scaled)
                logits = F.interpolate(logits, SHAPE[1:], mode="bilinear")
                expected += (logits.flip(-1) if mirrored else logits) / 4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_scale_is_the_model_itself(images: Tensor) -> None:
    plain = segmenter()
    torch.testing.assert_close(MultiScale(plain, scales=(1.0,)).logits(images), plain.logits(images))


def test_multiscale_needs_a_model_of_many_sizes() -> None:
    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear_cnn()

        def forward(self, images: Tensor) -> Tensor:
            if tuple(images.shape[1:]) != SHAPE:
                raise AssertionError(f"height {images.shape[-2]} is not {SHAPE[1]}")
            return self.body(images)

    with pytest.raises(NotApplicableError, match=r"no other size than 16×20: at scale 0\.5 \(8×10\)"):
        MultiScale(segmenter(OneSize()))
    for scales in ((), (0.0,), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="scales="):
            MultiScale(segmenter(), scales=scales)


# --------------------------------------------------------------------------------------------------- in the same table


@pytest.mark.parametrize("baseline", [MultiScale, MeanFieldCRF])
def test_a_baseline_is_a_segmenter_like_any_other(baseline: Any, images: Tensor) -> None:
    plain = segmenter(output_fn=_doubled)
    weights = copy.deepcopy(plain.model.state_dict())
    defended = baseline(plain)
    expected = defended.logits(images)
    for again in (copy.deepcopy(defended), pickle.loads(pickle.dumps(defended))):
        torch.testing.assert_close(again.logits(images), expected)
    with defended.conditions(undefended=True):
        torch.testing.assert_close(defended.logits(images), plain.logits(images))
    assert isinstance(defended, baseline)
    assert "=" in repr(defended).rpartition("device=")[2]
    gradient = defended.loss_gradient(images.numpy(), np.zeros((5, *SHAPE[1:]), dtype=np.int64))
    assert np.isfinite(gradient).all()
    assert (gradient != 0).mean() > 0.9
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


def _doubled(output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("baseline", [MultiScale, MeanFieldCRF])
def test_ram_inside_and_around(baseline: Any, images: Tensor) -> None:
    plain = segmenter()
    options: dict[str, Any] = {"max_attention": "2/N", "dropout": 0.0}
    inside, around = baseline(RAMDefense(plain, **options)), RAMDefense(baseline(plain), **options)
    for both in (inside, around):
        assert isinstance(both, baseline)
        assert isinstance(both, RAMDefense)
        assert not torch.allclose(both.logits(images), baseline(plain).logits(images), atol=1e-4)
        assert not torch.allclose(both.logits(images), RAMDefense(plain, **options).logits(images), atol=1e-4)
    torch.testing.assert_close(inside.logits(images), around.logits(images))
    random = baseline(RAMDefense(plain, dropout=0.3))
    assert random.traits.random


def test_baselines_stand_in_the_table_by_name() -> None:
    assert {"multiscale", "crf"} <= set(defences())
    assert defence("crf:iterations=3")(segmenter()).model.options["iterations"] == 3
    found = evaluate(
        {"tiny": segmenter(tiny_cnn())}, "untargeted", ("none", "multiscale", "crf"), Frames(), images=2, max_iter=2,
        patch_shape=(4, 4), verbose=False,
    )  # fmt: skip
    assert set(found.summary()["defence"]) == {"none", "multiscale", "crf"}
    assert found.summary()["success"].notna().all()


class Frames:
    """Two frames of noise."""

    classes = tuple("abcd")
    colors = ((0, 0, 0),) * NB_CLASSES

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        from evaluation.frames import Frame

        return Frame(random_images(2)[index], torch.full(SHAPE[1:], index, dtype=torch.int64), str(index))
