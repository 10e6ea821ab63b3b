"""The masks of accelerators: their definition in plain integers, and how random they are."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from ramdefense.counter import keep, levels_dropped
from ramdefense.streams import keep_mask, keep_of

SEEDS = torch.tensor([0, 1, 2**63 - 1, 1234567])


def splitmix64(state: int) -> int:
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def element(seed: int, row: int, key: int, dropped: int) -> bool:
    word = splitmix64((seed + (row + 1) * 0x9E3779B97F4A7C15) % 2**64)
    y = key * 0x9E3779B1 % 2**32
    y = (y ^ y >> 15) * 0x85EBCA77 % 2**32
    return ((y ^ y >> 14) * (word % 2**32 | 1) + (word >> 32)) % 2**32 >= dropped << 16


def standardised(p: float, rows: int = 1024, keys: int = 1024, seeds: Tensor = SEEDS[3:]) -> Tensor:
    """(streams, rows, keys) float64 of mean 0 and variance 1 by the nominal p."""
    p = levels_dropped(p) / 65536
    return (keep(seeds, rows, keys, levels_dropped(p)).double() - (1 - p)) / math.sqrt(p * (1 - p))


def sigmas(products: Tensor) -> float:
    """How many standard deviations the sum of independent products of mean 0 and variance 1 is from 0."""
    return abs(float(products.sum())) / math.sqrt(products.numel())


def test_by_the_definition_in_whole_numbers() -> None:
    # the first outputs that the authors of splitmix64 give for the seed 1234567
    assert splitmix64(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317
    assert splitmix64((1234567 + 2 * 0x9E3779B97F4A7C15) % 2**64) == 3203168211198807973
    dropped = levels_dropped(0.3)
    masks = keep(SEEDS, 6, 50, dropped)
    for stream, seed in enumerate(SEEDS.tolist()):
        expected = [[element(seed, row, key, dropped) for key in range(50)] for row in range(6)]
        assert masks[stream].tolist() == expected


def test_an_element_does_not_depend_on_the_size() -> None:
    whole = keep(SEEDS, 40, 70, 20000)
    assert torch.equal(keep(SEEDS[1:3], 5, 33, 20000), whole[1:3, :5, :33])


@pytest.mark.parametrize("p", [0.0, 2**-16, 2**-12, 0.1, 0.5, 0.9, 1 - 2**-12])
def test_the_share_of_drops_is_p(p: float) -> None:
    masks = keep(SEEDS, 500, 501, levels_dropped(p))
    sigma = math.sqrt(p * (1 - p) / masks.numel())
    assert abs(masks.logical_not().double().mean().item() - p) <= 4.5 * sigma
    assert (levels_dropped(0.0), levels_dropped(1 - 1e-9)) == (0, 65535)


@pytest.mark.parametrize("p", [0.5, 0.1, 0.01])
def test_rows_and_columns_vary_as_those_of_coins(p: float) -> None:
    """1024 sums of 1024: their variance is 1 but for a relative √(2/1024), also over blocks."""
    x = standardised(p)[0]
    blocks = x.unfold(0, 32, 32).unfold(1, 32, 32).sum((-1, -2)) / 32
    for sums in (x.sum(0) / 32, x.sum(1) / 32, blocks.flatten()):
        assert abs(float(sums.square().mean()) - 1) < 4.5 * math.sqrt(2 / 1024)


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_pairs_triples_and_rectangles_are_independent(p: float) -> None:
    x = standardised(p)[0]
    for lag in (1, 2, 3, 4, 8, 32, 64, 128, 512):
        assert sigmas(x[:, lag:] * x[:, :-lag]) < 4.5
        assert sigmas(x[lag:] * x[:-lag]) < 4.5
        assert sigmas(x[lag:, lag:] * x[:-lag, lag:] * x[lag:, :-lag] * x[:-lag, :-lag]) < 4.5
    for lag in (1, 2, 7, 16):
        assert sigmas(x[:, 2 * lag :] * x[:, lag:-lag] * x[:, : -2 * lag]) < 4.5
        assert sigmas(x[2 * lag :] * x[lag:-lag] * x[: -2 * lag]) < 4.5


def test_pairs_of_neighbours_by_chi_square() -> None:
    kept = keep(SEEDS[1:2], 1024, 1024, 16384)[0].long()
    pairs = torch.bincount((2 * kept[:, ::2] + kept[:, 1::2]).flatten(), minlength=4).double()
    expected = pairs.sum() * torch.tensor([1 / 16, 3 / 16, 3 / 16, 9 / 16], dtype=torch.float64)
    assert chi2.sf(float(((pairs - expected).square() / expected).sum()), 3) > 1e-5


def test_no_pattern_runs_through_the_matrix() -> None:
    """The largest singular value of 512 × 512 coins is about 2√512; a pattern's is more."""
    largest = torch.linalg.matrix_norm(standardised(0.2, 512, 512)[0], 2)
    assert abs(float(largest) / (2 * math.sqrt(512)) - 1) < 0.04


def test_streams_and_neighbouring_seeds_are_independent() -> None:
    x = standardised(0.3, seeds=torch.tensor([5, 6, 5 + 2**32, 2**63 - 1])).flatten(1)
    correlation = torch.corrcoef(x).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 1024


@pytest.mark.slow  # torch imports much for a device without data
def test_a_mask_on_a_device_has_the_shape_of_one_on_a_cpu() -> None:
    """A device without data stands for a GPU."""
    options: dict = {"seed": 1, "draw": 2, "images": (0, 1), "site": "a"}
    for shape in ((4, 3, 5, 6), (4, 6), (3, 5, 6)):
        for unit in ("element", "key"):
            mask = keep_mask(shape, 0.3, unit=unit, device="meta", **options)
            assert mask.shape == keep_mask(shape, 0.3, unit=unit, **options).shape
            assert mask.dtype == torch.bool
    assert len(keep_of((4, 6), 0.3, **options).seeds) == 2
    assert keep_of((3, 6), 0.3, **options).seeds != keep_of((2, 6), 0.3, **options).seeds[:1]
