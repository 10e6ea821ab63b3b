"""Receptive fields: closed forms, and the radius against a count of every disc."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NB_CLASSES, SHAPE, random_images, tiny_attention, tiny_cnn
from torch import Tensor, nn

from evaluation.receptive_field import (
    centre,
    field_figure,
    radii,
    radius,
    receptive_field,
    receptive_fields,
    vulnerability_figure,
)
from ramdefense import PyTorchSegmenter, RAMDefense
from ramdefense.defences import defence

HEIGHT, WIDTH = SHAPE[1:]
ROW, COLUMN = 8, 10


class Linear(nn.Module):
    """Logits that are a function of the mean of the colour channels, the same for every class."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images.mean(1, keepdim=True)).expand(-1, NB_CLASSES, -1, -1)


def field_of(function: Callable[[Tensor], Tensor]) -> Tensor:
    return receptive_field(PyTorchSegmenter(Linear(function), NB_CLASSES, SHAPE), random_images(2))


def box(size: int, dilation: int = 1) -> Callable[[Tensor], Tensor]:
    padding = dilation * (size // 2)
    return lambda x: F.conv2d(x, torch.ones(1, 1, size, size), padding=padding, dilation=dilation)


def placed(values: Tensor, top: int, left: int) -> Tensor:
    """Values on a map of zeros, divided by their sum."""
    field = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    field[top : top + values.shape[0], left : left + values.shape[1]] = values.double() / values.sum().double()
    return field


def tokens(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 4)


def block(row: int, column: int) -> Tensor:
    return placed(torch.ones(4, 4), 4 * row, 4 * column)


# What the central pixel (8, 10) reads of a map at a quarter of the size, bilinear with corners not aligned: it lies at
# (8.5 / 4 - 0.5, 10.5 / 4 - 0.5) = (1.625, 2.125).
UPSAMPLED = 0.375 * 0.875 * block(1, 2) + 0.375 * 0.125 * block(1, 3) + 0.625 * 0.875 * block(2, 2) + (
    0.625 * 0.125 * block(2, 3)
)
EVEN = torch.full((HEIGHT, WIDTH), 1 / (HEIGHT * WIDTH), dtype=torch.float64)
TRIANGLE = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])

FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "identity": (lambda x: x, placed(torch.ones(1, 1), ROW, COLUMN)),
    "5×5 box": (box(5), placed(torch.ones(5, 5), ROW - 2, COLUMN - 2)),
    "two 3×3 boxes": (lambda x: box(3)(box(3)(x)), placed(TRIANGLE[:, None] * TRIANGLE, ROW - 2, COLUMN - 2)),
    "dilated": (
        box(3, dilation=3),
        placed(torch.eye(7)[::3].sum(0)[:, None] * torch.eye(7)[::3].sum(0), ROW - 3, COLUMN - 3),
    ),
    "residual": (
        lambda x: 4 * x - box(3)(x),  # 3 in the middle, -1 around it
        placed(torch.tensor([[1, 1, 1], [1, 3, 1], [1, 1, 1]]), ROW - 1, COLUMN - 1),
    ),
    "global mean": (lambda x: x.mean((2, 3), keepdim=True).expand_as(x), EVEN),
    "stride 4, upsampled by the segmenter": (tokens, UPSAMPLED),
    "non-linear": (lambda x: (x - 0.5).abs(), placed(torch.ones(1, 1), ROW, COLUMN)),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_field_is_the_closed_form(name: str) -> None:
    function, expected = FORMS[name]
    field = field_of(function)
    assert field.dtype == torch.float64
    assert float(field.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(field, expected, rtol=1e-6, atol=1e-9)


def test_the_centre_of_an_even_side_is_the_pixel_after_its_middle() -> None:
    assert centre((16, 20)) == (8, 10)
    assert centre((15, 21)) == (7, 10), "that of an odd one is its middle"


class Colours(nn.Module):
    """Red is read on the spot, green one pixel further right, blue not; classes weigh 3, -1, 0 and 0."""

    def forward(self, images: Tensor) -> Tensor:
        red, green, _ = images.unbind(1)
        mixed = red + green.roll(-1, 2)
        return mixed[:, None] * torch.tensor([3.0, -1.0, 0.0, 0.0])[:, None, None]


def test_logits_are_summed_over_classes_and_gradients_averaged_over_colours_after_preprocessing() -> None:
    """2/std on each colour: 2/0.5 of red on the centre and 2/0.25 of green beside it."""
    segmenter = PyTorchSegmenter(Colours(), NB_CLASSES, SHAPE, preprocessing=((0.1, 0.2, 0.3), (0.5, 0.25, 0.1)))
    expected = placed(torch.tensor([[4.0, 8.0]]), ROW, COLUMN)
    torch.testing.assert_close(receptive_field(segmenter, random_images(2)), expected, rtol=1e-6, atol=0)


def test_absolute_values_are_averaged_over_images() -> None:
    """The centre's gradient is 2(x - 0.5) and cancels over the two images; the pixel above has 0.2 on both."""
    segmenter = PyTorchSegmenter(Linear(lambda x: (x - 0.5).pow(2) + 0.2 * x.roll(1, 2)), NB_CLASSES, SHAPE)
    images = torch.stack([torch.full(SHAPE, 0.2), torch.full(SHAPE, 0.8)])
    expected = placed(torch.tensor([[0.2], [0.6]]), ROW - 1, COLUMN)
    torch.testing.assert_close(receptive_field(segmenter, images), expected, rtol=1e-5, atol=0)


def test_the_field_leaves_the_segmenter_as_it_was_and_does_not_depend_on_the_batch() -> None:
    segmenter, images = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE), random_images(3)
    segmenter.model.train()
    whole = receptive_field(segmenter, images)
    torch.testing.assert_close(receptive_field(segmenter, images, batch_size=1), whole, rtol=1e-6, atol=0)
    assert segmenter.model.training
    assert all(parameter.grad is None for parameter in segmenter.model.parameters())
    assert not images.requires_grad
    outside = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    outside[ROW - 2 : ROW + 3, COLUMN - 2 : COLUMN + 3] = False
    assert float(whole[outside].sum()) == 0, "two 3×3 convolutions reach two pixels far"


# ------------------------------------------------------------------------------------------------------- attention


class Mixing(nn.Module):
    """Attention with given scores over tokens of 4×4 pixels, whose values are their brightness."""

    def __init__(self, scores: Tensor, residual: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("scores", scores)
        self.residual = residual

    def forward(self, images: Tensor) -> Tensor:
        grid = tokens(images.mean(1, keepdim=True))
        values = grid.flatten(2).mT
        mixed = self.scores.expand(len(images), -1, -1).softmax(-1) @ values
        return (mixed + self.residual * values).mT.reshape(grid.shape).expand(-1, NB_CLASSES, -1, -1)


def test_uniform_attention_adds_an_even_floor() -> None:
    segmenter = PyTorchSegmenter(Mixing(torch.zeros(20, 20), residual=3.0), NB_CLASSES, SHAPE)
    field = receptive_field(segmenter, random_images(2))
    torch.testing.assert_close(field, 0.75 * UPSAMPLED + 0.25 * EVEN, rtol=1e-5, atol=1e-9)
    assert radius(field, 0.95) > radius(UPSAMPLED, 0.95), "a quarter of the field lies all over the image"


@pytest.mark.parametrize("suppression", ["cap", "clamp"])
def test_ram_bounds_what_a_peaked_key_has_of_the_field(suppression: str) -> None:
    """Every query gives key 2, at the upper border, e^4 times as much as any other. RAM lets T = 3/N through: `cap`
    gives the rest to the others, `clamp` loses it, and what is left counts for the more."""
    scores = torch.zeros(20, 20)
    scores[:, 2] = 4.0
    peak = math.exp(4) / (math.exp(4) + 19)
    segmenter = PyTorchSegmenter(Mixing(scores), NB_CLASSES, SHAPE)
    here = (slice(0, 4), slice(8, 12))
    assert float(receptive_field(segmenter, random_images(1))[here].sum()) == pytest.approx(peak, rel=1e-5)
    hard = RAMDefense(segmenter, max_attention="3/N", suppression=suppression, dropout=0)
    bound = 3 / 20
    expected = bound if suppression == "cap" else bound / (bound + 1 - peak)
    assert expected < peak / 2
    assert float(receptive_field(hard, random_images(1))[here].sum()) == pytest.approx(expected, rel=1e-5)


def test_a_random_defence_is_averaged_over_its_draws() -> None:
    """Three draws are the mean of three fields by hand; the same call gives the same field, and more draws another."""
    hard, images = RAMDefense(PyTorchSegmenter(tiny_attention(), NB_CLASSES, SHAPE), dropout=0.5), random_images(2)
    by_hand = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for draw in range(3):
        leaf = images.clone().requires_grad_()
        with hard.conditions(images=(4, 9), draw=draw):
            hard.logits(leaf)[:, :, ROW, COLUMN].sum().backward()
        assert leaf.grad is not None
        by_hand += leaf.grad.double().abs().sum((0, 1))
    field = receptive_field(hard, images, draws=3, streams=(4, 9))
    torch.testing.assert_close(field, by_hand / by_hand.sum(), rtol=1e-5, atol=0)
    torch.rand(3)
    assert torch.equal(receptive_field(hard, images, draws=3, streams=(4, 9)), field)
    assert not torch.allclose(receptive_field(hard, images, draws=1, streams=(4, 9)), field)


def test_a_deterministic_model_is_asked_once() -> None:
    segmenter, passes = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE), []
    segmenter.model.register_forward_hook(lambda *_: passes.append(1))
    receptive_field(segmenter, random_images(2), draws=5)
    assert len(passes) == 1


def test_a_field_that_is_none_is_named() -> None:
    cancels = PyTorchSegmenter(nn.Sequential(Colours(), nn.Conv2d(4, 4, 1, bias=False)), NB_CLASSES, SHAPE)
    nn.init.zeros_(cancels.model[1].weight)  # type: ignore[index, arg-type]
    with pytest.raises(ValueError, match="sums to 0 on these 2 images"):
        receptive_field(cancels, random_images(2))
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    with pytest.raises(ValueError, match="draws=0: at least 1"):
        receptive_field(segmenter, random_images(2), draws=0)
    with pytest.raises(ValueError, match="3 streams for 2 images"):
        receptive_field(segmenter, random_images(2), streams=(1, 2, 3))
    with pytest.raises(ValueError, match="outside the clip range"):
        receptive_field(segmenter, random_images(2) * 2)


# ---------------------------------------------------------------------------------------------------------- radius


def test_radii_by_hand() -> None:
    square = placed(torch.ones(3, 3), ROW - 1, COLUMN - 1)
    assert radius(placed(torch.ones(1, 1), ROW, COLUMN), 1.0) == 0
    assert [radius(square, share) for share in (1 / 9, 0.5, 5 / 9, 0.6, 1.0)] == [0, 1, 1, math.sqrt(2), math.sqrt(2)]
    assert radius(placed(torch.ones(1, 1), 0, 0), 0.01) == pytest.approx(math.hypot(8, 10)), "the farthest corner"
    assert radius(10 * square, 0.5) == 1, "a field need not sum to 1"


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 999), share=st.floats(0.01, 1.0))
def test_no_smaller_disc_holds_the_share(height: int, width: int, seed: int, share: float) -> None:
    field = torch.from_numpy(np.random.default_rng(seed).random((height, width)) ** 4)
    rows, columns = np.mgrid[:height, :width]
    distances = np.sqrt((rows - height // 2) ** 2.0 + (columns - width // 2) ** 2.0)
    held = {r: field.numpy()[distances <= r].sum() / field.numpy().sum() for r in np.unique(distances)}
    expected = min(r for r, mass in held.items() if mass >= share - 1e-11)
    assert radius(field, share) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="share="):
        radius(EVEN, share)


@pytest.mark.parametrize("field", [EVEN[0], -EVEN, 0 * EVEN])
def test_a_radius_needs_a_field(field: Tensor) -> None:
    with pytest.raises(ValueError, match="not all 0"):
        radius(field, 0.5)


# -------------------------------------------------------------------------------------------------- many, and figures


def test_models_and_defences_and_what_does_not_apply() -> None:
    segmenters = {
        "attention": PyTorchSegmenter(tiny_attention(), NB_CLASSES, SHAPE),
        "cnn": PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE),
    }
    functions = {"none": defence("none"), "ram": defence("ram:max_attention=2/N")}
    fields, without = receptive_fields(segmenters, functions, random_images(2), draws=2)
    assert list(fields) == [("attention", "none"), ("attention", "ram"), ("cnn", "none")]
    assert list(without) == [("cnn", "ram")]
    assert without["cnn", "ram"] == "no attention was found in this model"
    table = radii(fields)
    diagonal = math.hypot(HEIGHT, WIDTH)
    for row, field in zip(table.to_dict("records"), fields.values(), strict=True):
        assert row["radius_50"] == radius(field, 0.5)
        assert row["relative_95"] == pytest.approx(radius(field, 0.95) / diagonal)
    assert table["radius_95"][2] < table["radius_95"][0], "a small convolution sees less than attention"
    figure = field_figure({"none": fields["attention", "none"], "ram": fields["attention", "ram"]}, title="attention")
    assert len(figure.axes) == 3
    assert "95 % in" in figure.axes[0].get_title()


VULNERABLE = pd.DataFrame(
    [
        ("cnn", "strip", "none", 0.2, 0.07),
        ("vit", "strip", "none", 0.8, 0.32),
        ("vit", "strip", "ram", 0.7, 0.07),
        ("cnn", "permute", "none", 0.2, 0.06),
        ("vit", "permute", "none", 0.8, 0.27),
        ("vit", "permute", "ram", 0.7, 0.08),
        ("swin", "permute", "none", 0.4, math.nan),
    ],
    columns=["model", "attack", "defence", "relative_95", "success"],
)


def test_vulnerability_beside_the_receptive_field() -> None:
    """Every point where the table has it, an arrow from each model to its defended self, a panel for each attack."""
    from matplotlib.text import Annotation

    figure = vulnerability_figure(VULNERABLE)
    assert [axis.get_title() for axis in figure.axes] == ["strip", "permute"]
    assert "95 % of the receptive field" in figure.get_supxlabel()
    assert "success rate" in figure.axes[0].get_ylabel()
    for axis, attack in zip(figure.axes, ("strip", "permute"), strict=True):
        expected = VULNERABLE[(VULNERABLE["attack"] == attack) & VULNERABLE["success"].notna()]
        drawn = sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axis.lines)  # type: ignore[index]
        points = sorted(zip(100 * expected["relative_95"], 100 * expected["success"], strict=True))
        np.testing.assert_allclose(drawn, points)
        notes = [child for child in axis.get_children() if isinstance(child, Annotation)]
        assert sorted(note.get_text() for note in notes) == ["", "cnn", "vit"]
        (arrow,) = [note for note in notes if note.arrow_patch is not None]
        assert arrow.xyann == pytest.approx(points[-1]), "from the undefended model"
        assert arrow.xy == pytest.approx((70.0, points[1][1])), "to the defended one"
    only = vulnerability_figure(VULNERABLE[VULNERABLE["attack"] == "strip"].drop(columns="attack"))
    assert len(only.axes) == 1


def test_a_table_without_figures_is_refused() -> None:
    with pytest.raises(ValueError, match="no column 'relative_50'"):
        vulnerability_figure(VULNERABLE, radius="relative_50")
    with pytest.raises(ValueError, match="no row with both"):
        vulnerability_figure(VULNERABLE[VULNERABLE["model"] == "swin"])
