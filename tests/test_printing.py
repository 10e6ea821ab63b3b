"""Total variation and non-printability against loops, their gradients, and what they do to a patch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_images, random_labels
from torch import Tensor

from attacks.optimize import make_patch
from attacks.options import PatchOptions
from attacks.printing import NonPrintability, TotalVariation, printable_colours
from attacks.terms import Forward
from ramdefense import PyTorchSegmenter

COLOURS = ((0.0, 0.2, 0.4), (0.5, 0.5, 0.5), (0.9, 0.1, 0.3))


def forward(pixels: Tensor) -> Forward:
    nothing = torch.zeros(())
    return Forward(pixels=pixels, images=nothing, covered=nothing, logits=nothing, observed=None)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variation_by_loop(patch: Tensor) -> float:
    total = 0.0
    for channel in patch.tolist():
        for row, line in enumerate(channel):
            for column, value in enumerate(line):
                if row + 1 < len(channel):
                    total += abs(channel[row + 1][column] - value)
                if column + 1 < len(line):
                    total += abs(line[column + 1] - value)
    return total


def score_by_loop(patch: Tensor, colours: Any) -> float:
    return sum(
        math.prod(math.dist(patch[:, row, column].tolist(), colour) for colour in colours)
        for row in range(patch.shape[1])
        for column in range(patch.shape[2])
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_against_loops(height: int, width: int, seed: int) -> None:
    pixels = noise(2, 3, height, width, seed=seed)
    variation, score = TotalVariation(0.3)(forward(pixels)), NonPrintability(0.7, COLOURS)(forward(pixels))
    all_thirty = NonPrintability(2.0)(forward(pixels))
    assert variation.shape == score.shape == (2,)
    for row, patch in enumerate(pixels):
        assert float(variation[row]) == pytest.approx(0.3 * variation_by_loop(patch), abs=1e-9)
        assert float(score[row]) == pytest.approx(0.7 * score_by_loop(patch, COLOURS), rel=1e-5)
        assert float(all_thirty[row]) == pytest.approx(2 * score_by_loop(patch, printable_colours()), rel=1e-4)


def test_closed_forms() -> None:
    steps = torch.arange(5.0).expand(3, 4, 5)[None]  # 4 rises of 1 in each of 4 rows and 3 channels
    assert TotalVariation()(forward(steps)).tolist() == [48]
    assert TotalVariation()(forward(torch.full((1, 3, 4, 5), 0.5))).tolist() == [0]
    printed = torch.tensor(COLOURS).T[None, :, None]
    assert NonPrintability(1.0, COLOURS)(forward(printed)).tolist() == [0]
    black_and_white = NonPrintability(1.0, ((0, 0, 0), (1, 1, 1)))
    assert float(black_and_white(forward(torch.full((1, 3, 2, 2), 0.5)))) == pytest.approx(4 * 0.75)


@pytest.mark.parametrize("term", [TotalVariation(0.5), NonPrintability(0.5, COLOURS)], ids=["variation", "score"])
def test_gradients(term: Any) -> None:
    leaf = noise(2, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda pixels: term(forward(pixels)), leaf)
    flat = torch.full((1, 3, 3, 4), 0.5, requires_grad=True)  # flat, and on one of the colours
    (slope,) = torch.autograd.grad(term(forward(flat)).sum(), flat)
    assert not slope.any(), "0 at the minimum, and not NaN"


def test_the_colours_are_thirty_and_printable() -> None:
    colours = printable_colours()
    assert len({tuple(round(channel, 6) for channel in colour) for colour in colours}) == 30
    assert all(0.1 - 1e-9 <= channel <= 0.9 + 1e-9 for colour in colours for channel in colour)
    for full in ((0.9, 0.1, 0.1), (0.1, 0.9, 0.9), (0.1, 0.1, 0.1), (0.9, 0.9, 0.9), (0.9, 0.7, 0.7)):
        assert any(math.dist(full, colour) < 1e-9 for colour in colours)


@pytest.mark.parametrize(
    "term", [TotalVariation(0.5), NonPrintability(), NonPrintability(2.0, COLOURS), NonPrintability(1.0, torch.eye(3))]
)
def test_repr_rebuilds(term: Any) -> None:
    assert eval(repr(term)) == term
    assert hash(term) == hash(eval(repr(term)))


@pytest.mark.parametrize("weight", [math.nan, math.inf, "much", None, True])
def test_bad_weights_are_refused(weight: Any) -> None:
    for term in (TotalVariation, NonPrintability):
        with pytest.raises(ValueError, match="`weight`"):
            term(weight)


@pytest.mark.parametrize("colours", [(), (0.1, 0.2, 0.3), ((math.nan, 0, 0),), "red", ((0, 0, 0), (1, 1))])
def test_bad_colours_are_refused(colours: Any) -> None:
    with pytest.raises(ValueError, match="`colours`"):
        NonPrintability(1.0, colours)


def test_colours_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="3 channels and the patch 1"):
        NonPrintability()(forward(noise(1, 1, 2, 2)))


def test_an_attack_with_the_terms_makes_smoother_and_more_printable_patches(
    linear_segmenter: PyTorchSegmenter,
) -> None:
    images, labels = random_images(2), random_labels(2)

    def make(*terms: Any) -> Tensor:
        options = PatchOptions(terms=terms, random_start=True, max_iter=20, keep_best=False, verbose=False)
        return make_patch(linear_segmenter, images, labels, options)[0].pixels

    plain = forward(make())
    smooth, printable = forward(make(TotalVariation(10.0))), forward(make(NonPrintability(1.0, COLOURS)))
    assert (TotalVariation()(smooth) < 0.5 * TotalVariation()(plain)).all()
    score = NonPrintability(1.0, COLOURS)
    assert (score(printable) < 0.5 * score(plain)).all()
