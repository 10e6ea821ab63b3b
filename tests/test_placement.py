"""Where a patch goes: the best place by each measure, for each image by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import NB_CLASSES, SHAPE, linear_cnn, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn

from attacks.attention import watching
from attacks.objectives import cross_entropy, margin
from attacks.optimize import make_patch
from attacks.options import PatchOptions
from attacks.placement import PLACEMENTS, SCAN_STEPS, by_attention, by_gradient, by_scan
from ramdefense import PyTorchSegmenter, RAMDefense
from ramdefense.traits import Conditions, Traits

HEIGHT, WIDTH = SHAPE[1:]


def attention_segmenter() -> PyTorchSegmenter:
    return PyTorchSegmenter(tiny_attention(), NB_CLASSES, SHAPE)


def rectangles(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sum of each rectangle, one by one: (H, W) -> (H - h + 1, W - w + 1)."""
    height, width = shape
    return torch.stack(
        [
            torch.stack([values[top : top + height, left : left + width].sum() for left in range(WIDTH - width + 1)])
            for top in range(HEIGHT - height + 1)
        ]
    )


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (4, 20), (16, 20), (16, 1)])
def test_the_gradient_names_the_best_of_all_rectangles(shape: tuple[int, int]) -> None:
    victim = PyTorchSegmenter(tiny_cnn().double(), NB_CLASSES, SHAPE)
    images, labels = random_images(3).double(), random_labels(3)
    places = by_gradient(victim, images, labels, shape, objective=cross_entropy(False), streams=(0, 1, 2))
    leaf = images.clone().requires_grad_()
    F.cross_entropy(victim.logits(leaf), labels, ignore_index=255, reduction="sum").backward()
    assert leaf.grad is not None
    assert places.dtype == torch.int64
    for slope, place in zip(leaf.grad.abs().sum(1), places.tolist(), strict=True):
        sums = rectangles(slope, shape)
        assert float(sums[place[0], place[1]]) >= float(sums.max()) * (1 - 1e-12)


class Bright(nn.Module):
    """Attention to what is bright: each token of 4×4 pixels has its brightness as its key, every query is 1."""

    def __init__(self, sharpness: float = 20.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.head = nn.Conv2d(1, NB_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.avg_pool2d(images.mean(1, keepdim=True), 4)
        keys = tokens.flatten(2).mT
        queries = torch.ones_like(keys) * self.sharpness + 1e-3 * keys
        mixed = (queries @ keys.mT).softmax(-1) @ keys
        return self.head(mixed.mT.reshape(tokens.shape))


def test_attention_goes_where_the_attention_goes() -> None:
    """One image has its bright square here, the other there."""
    images = torch.full((2, *SHAPE), 0.2)
    images[0, :, 8:12, 4:8] = images[1, :, 0:4, 16:20] = 1.0
    victim = PyTorchSegmenter(Bright(), NB_CLASSES, SHAPE)
    places = by_attention(victim, images, random_labels(2), (6, 6), objective=cross_entropy(False), streams=(0, 1))
    for (top, left), (bright_top, bright_left) in zip(places.tolist(), [(8, 4), (0, 16)], strict=True):
        assert top <= bright_top + 1.5 <= top + 6
        assert left <= bright_left + 1.5 <= left + 6


def test_attention_is_summed_over_the_queries_outside() -> None:
    """By hand, over all whole places: no rectangle gets more, token by token on the true grid."""
    victim, images = attention_segmenter(), random_images(3)
    with torch.no_grad():
        victim.model.qkv.weight.mul_(3.0)  # type: ignore[union-attr]
    shape = (6, 7)
    places = by_attention(victim, images, random_labels(3), shape, objective=cross_entropy(False), streams=(0, 1, 2))
    with watching(victim.model) as seen:
        victim.logits(images)
    weights = seen[0].weights().detach().mean(1)  # (N, queries, keys)
    centres = [(row * 4 + 1.5, column * 4 + 1.5) for row in range(4) for column in range(5)]

    def received(image: int, top: int, left: int) -> float:
        inside = [
            i
            for i, (y, x) in enumerate(centres)
            if top <= round(y) < top + shape[0] and left <= round(x) < left + shape[1]
        ]
        outside = [i for i in range(20) if i not in inside]
        return float(weights[image][outside][:, inside].sum()) / max(len(outside), 1)

    for image, (top, left) in enumerate(places.tolist()):
        best = max(received(image, y, x) for y in range(HEIGHT - 5) for x in range(WIDTH - 6))
        # the tokens' centres are found to about a pixel, so a place next to the best one may be named
        near = max(received(image, y, x) for y in (top - 1, top, top + 1) for x in (left - 1, left, left + 1))
        assert near == pytest.approx(best, rel=1e-5)


class Sensitive(nn.Module):
    """Every pixel's logits follow the pixels of one square, and nothing else."""

    def __init__(self, top: int, left: int) -> None:
        super().__init__()
        self.area = (..., slice(top, top + 4), slice(left, left + 4))
        self.weight = nn.Parameter(torch.ones(NB_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        spread = images[self.area].flatten(1).std(1)  # noise raises it
        first = torch.nn.functional.one_hot(torch.tensor(0), NB_CLASSES)
        logits = spread[:, None] * self.weight * first
        return logits[..., None, None].expand(-1, -1, *images.shape[-2:])


@pytest.mark.parametrize(("top", "left"), [(0, 0), (12, 16), (6, 8)])
def test_the_scan_finds_what_hurts(top: int, left: int) -> None:
    victim = PyTorchSegmenter(Sensitive(top, left), NB_CLASSES, SHAPE)
    images, target = torch.full((2, *SHAPE), 0.5), torch.zeros(2, HEIGHT, WIDTH, dtype=torch.int64)
    target[:, :3] = 255
    places = by_scan(victim, images, target, (8, 8), objective=margin(True), streams=(0, 1))
    assert places.shape == (2, 2)
    for found_top, found_left in places.tolist():
        overlap = max(0, min(found_top + 8, top + 4) - max(found_top, top)) * max(
            0, min(found_left + 8, left + 4) - max(found_left, left)
        )
        assert overlap >= 8


def test_the_scan_compares_a_place_with_the_clean_image_on_the_same_pixels() -> None:
    """A model that the patch does not move gains nothing by covering pixels that count: the first place is kept."""

    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.randn(NB_CLASSES, HEIGHT, WIDTH))

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.expand(len(images), -1, -1, -1)

    victim = PyTorchSegmenter(Deaf(), NB_CLASSES, SHAPE)
    places = by_scan(victim, random_images(2), random_labels(2), (8, 8), objective=margin(False), streams=(0, 1))
    assert places.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("hard", [False, True])
def test_a_place_belongs_to_its_image(name: str, hard: bool) -> None:
    """In another batch, in another order, a second time: the same; inside the image, and nothing given is changed."""
    victim = attention_segmenter()
    victim = RAMDefense(victim, max_attention="4/N", dropout=0.4) if hard else victim
    images, labels, place = random_images(4), random_labels(4), PLACEMENTS[name]
    before = images.clone()
    whole = place(victim, images, labels, (5, 6), objective=cross_entropy(False), streams=(3, 4, 5, 6))
    assert whole.shape == (4, 2)
    assert whole.dtype == torch.int64
    assert ((whole >= 0) & (whole <= torch.tensor([HEIGHT - 5, WIDTH - 6]))).all()
    order = [2, 0]
    part = place(victim, images[order], labels[order], (5, 6), objective=cross_entropy(False), streams=(5, 3))
    assert torch.equal(part, whole[order])
    assert torch.equal(images, before)
    assert all(parameter.grad is None for parameter in victim.model.parameters())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_patch_as_large_as_the_image_has_one_place(name: str) -> None:
    places = PLACEMENTS[name](
        attention_segmenter(), random_images(2), random_labels(2), (HEIGHT, WIDTH), objective=margin(False),
        streams=(0, 1),
    )  # fmt: skip
    assert places.tolist() == [[0, 0], [0, 0]]


def test_the_scan_costs_what_it_says() -> None:
    victim, passes = attention_segmenter(), []
    victim.model.register_forward_hook(lambda *_: passes.append(1))
    by_scan(victim, random_images(2), random_labels(2), (4, 4), objective=margin(False), streams=(0, 1))
    assert len(passes) == SCAN_STEPS**2 + 1


def test_attention_needs_a_model_with_attention() -> None:
    victim = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    with pytest.raises(ValueError, match="no attention"):
        by_attention(victim, random_images(1), random_labels(1), (4, 4), objective=margin(False), streams=(0,))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_an_attack_takes_a_placement_by_its_name(name: str) -> None:
    victim, images, labels = attention_segmenter(), random_images(2), random_labels(2)
    options = PatchOptions(patch_shape=(6, 6), patch_location=name, max_iter=2, verbose=False)
    patch, _ = make_patch(victim, images, labels, options)
    expected = PLACEMENTS[name](victim, images, labels, (6, 6), objective=cross_entropy(False), streams=(0, 1))
    assert torch.as_tensor(patch.location).tolist() == expected.tolist()
    assert math.isfinite(float(patch.pixels.sum()))


@pytest.mark.parametrize("name", ["gradient", "scan"])
def test_an_attack_on_the_undefended_model_places_its_patch_there(name: str) -> None:
    """A defence that makes the right half of the image black leaves nothing to find there; without it there is."""
    plain = PyTorchSegmenter(HalfBlind(blind=False), NB_CLASSES, SHAPE)
    defended = PyTorchSegmenter(HalfBlind(blind=True), NB_CLASSES, SHAPE)
    images, labels = random_images(2), random_labels(2)

    def places(victim: PyTorchSegmenter, **options: bool) -> list[list[int]]:
        chosen = PatchOptions(patch_shape=(6, 6), patch_location=name, max_iter=1, verbose=False, **options)
        return torch.as_tensor(make_patch(victim, images, labels, chosen)[0].location).tolist()

    assert all(left < WIDTH // 2 for _, left in places(defended))
    assert places(defended, undefended=True) == places(plain)
    assert any(left >= WIDTH // 2 for _, left in places(plain))


class HalfBlind(nn.Module):
    """Sees the right half of an image three times as strongly as the left, or, as its own defence, not at all."""

    traits = Traits()

    def __init__(self, *, blind: bool) -> None:
        super().__init__()
        self.model, self.blind, self.conditions = linear_cnn(), blind, Conditions()

    def forward(self, x: Tensor) -> Tensor:
        seen = x.clone()
        seen[..., WIDTH // 2 :] = 0 if self.blind and not self.conditions.undefended else 3 * x[..., WIDTH // 2 :]
        return self.model(seen)


def test_a_placement_by_the_objective_needs_one() -> None:
    for name in ("gradient", "scan"):
        with pytest.raises(ValueError, match="goes by the objective, and that is 'none'"):
            PatchOptions(patch_location=name, objective="none")
    PatchOptions(patch_location="attention", objective="none")
