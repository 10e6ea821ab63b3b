"""Keep-masks: a function of (seed, draw, image, site, call), fair, independent, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from ramdefense.streams import keep_mask, stream_seed

SHAPE = (12, 3, 20, 33)


def draw(shape: tuple[int, ...] = SHAPE, p: float = 0.3, **changes: object) -> torch.Tensor:
    options: dict = {"seed": 1, "draw": 2, "images": (0, 1, 2, 3), "site": "blocks.0.attn", "call": 0}
    return keep_mask(shape, p, **{**options, **changes})


def test_an_image_has_one_mask_whatever_batch_it_comes_in() -> None:
    whole = draw()
    for image in range(4):
        alone = draw((3, 3, 20, 33), images=(image,))
        assert torch.equal(alone, whole[3 * image : 3 * image + 3])
    assert torch.equal(draw((6, 3, 20, 33), images=(3, 1)), torch.cat([whole[9:12], whole[3:6]]))


@pytest.mark.parametrize("change", [{"seed": 2}, {"draw": 3}, {"draw": -1}, {"site": "blocks.1.attn"}, {"call": 1}])
def test_whatever_names_the_stream_changes_it(change: dict) -> None:
    """Two fair masks with p = 0.3 agree on 0.58 of the elements."""
    agreement = (draw() == draw(**change)).float().mean()
    assert abs(agreement - 0.58) < 0.03


def test_images_are_independent() -> None:
    parts = draw().view(4, -1).float()
    correlation = torch.corrcoef(parts) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(parts.shape[1])


@pytest.mark.parametrize("p", [0.0, 2**-12, 0.1, 0.5, 0.9, 1 - 2**-12])
def test_the_share_of_drops_is_p(p: float) -> None:
    keep = draw((4, 500, 501), p)
    sigma = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(keep.logical_not().double().mean().item() - p) <= 4.5 * sigma + 2**-17
    assert keep.dtype == torch.bool
    assert keep.shape == (4, 500, 501)


def test_neighbours_are_independent() -> None:
    """Four elements come from one 64-bit number."""
    keep = draw((1, 1000, 1001), 0.2, images=(7,)).flatten().double()
    keep = (keep - keep.mean()) / keep.std()
    for lag in (1, 2, 3, 4, 1001):
        assert abs((keep[lag:] * keep[:-lag]).mean()) < 5 / math.sqrt(keep.numel())


def test_a_key_is_one_decision_for_all_queries_of_a_matrix() -> None:
    keep = draw(unit="key", p=0.5)
    assert keep.shape == (12, 3, 1, 33)
    assert not torch.equal(keep[0], keep[1])
    assert torch.equal(keep[3:6], draw((3, 3, 20, 33), unit="key", p=0.5, images=(1,)))
    # a two-dimensional matrix: rows 0-2 are of the first image, rows 3-5 of the second
    rows = draw((6, 33), unit="key", p=0.5, images=(0, 1))
    assert rows.shape == (6, 33)
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[2], rows[3])


def test_a_matrix_that_the_batch_shares_has_one_stream_for_every_batch() -> None:
    shared = draw((1, 3, 20, 33), images=(0, 1))
    assert torch.equal(shared, draw((1, 3, 20, 33), images=(4, 5, 6)))
    assert not torch.equal(shared, draw((1, 3, 20, 33), images=(0,)))


def test_seeds_are_the_same_in_every_process_and_differ() -> None:
    assert stream_seed(3, -1, 5, "a.b", 2) == 2124196091014431915
    seeds = {stream_seed(0, d, i, s, c) for d in range(9) for i in range(9) for s in ("a", "b") for c in range(3)}
    assert len(seeds) == 9 * 9 * 2 * 3


def test_torchs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.0}, r"\[0, 1\), got 1.0"),
        ({"p": -0.1}, r"-0.1"),
        ({"unit": "row"}, "'row'"),
        ({"images": ()}, "at least one image"),
        ({"shape": (4,)}, r"\(queries, keys\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**change)
