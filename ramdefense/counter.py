"""The keep-masks of accelerators: each element from its own position, so that a kernel can make it where it needs it.

On a CPU a mask comes from a generator, one number after the other (`streams`). A GPU works on all parts of a matrix at
once and must not store the mask, forwards nor backwards; there element (row, key) of an image's part of the matrix is

    keep  ⇔  (y · a + b mod 2³²) ≥ dropped · 2¹⁶,    y = mix(key),  (a, b) = splitmix64(seed + (row + 1) · φ), a odd,

where row counts the queries of all the part's heads, and `dropped` is p in units of 2⁻¹⁶. That is multiply-add-shift
hashing (Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer arithmetic without
primes", STACS 1996): 64 random bits for each row, one multiplication and one comparison for each element. Elements of
one row are pairwise independent but for 2⁻¹⁶, rows are independent as far as splitmix64 (Steele, Lea and Flood,
OOPSLA 2014) makes them so. It is no generator for cryptography.

The functions below are the definition, in torch operations on any device; the kernels (`triton_kernels`) give the same
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 16  # a probability is a multiple of 1 / LEVELS

_LOW = 0xFFFFFFFF


def levels_dropped(p: float) -> int:
    """The probability p in [0, 1) in units of 2**-16, to the nearest; never all of them."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep(seeds: Tensor, rows: int, keys: int, dropped: int) -> Tensor:
    """The masks of some streams.

    Args:
        seeds: (streams,) int64, at least 0: `streams.stream_seed` of each image.
        rows: of one stream: the queries of all its matrices, one matrix after the other, or the number of its matrices
            where all queries of a matrix share one decision for each key.
        keys: of one row.
        dropped: how many of 65536 elements are dropped; see `levels_dropped`.

    Returns:
        (streams, rows, keys) bool on the device of ``seeds``, True is kept.
    """
    words = _splitmix(seeds[:, None] + _wrapped(0x9E3779B97F4A7C15) * torch.arange(1, rows + 1, device=seeds.device))
    # a signed comparison does for an unsigned one where both sides have the upper bit flipped
    factor = _as_int32((words & _LOW) | 1)[..., None]
    offset = _as_int32((words >> 32 & _LOW) ^ 1 << 31)[..., None]
    return torch.addcmul(offset, factor, _as_int32(column_words(keys, seeds.device))) >= (dropped << 16) - (1 << 31)


def column_words(keys: int, device: torch.device | str) -> Tensor:
    """mix(0), …, mix(keys − 1): (keys,) int64 in [0, 2**32), all different."""
    y = torch.arange(keys, device=device) * 0x9E3779B1 & _LOW
    y = (y ^ y >> 15) * 0x85EBCA77 & _LOW
    return y ^ y >> 14


def _splitmix(z: Tensor) -> Tensor:
    """splitmix64's output function, on int64 that wrap around."""
    z = (z ^ _shifted(z, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _wrapped(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits without the sign."""
    return z >> bits & (1 << 64 - bits) - 1


def _wrapped(number: int) -> int:
    """The int64 with the bits of an uint64."""
    return number - (1 << 64) if number >> 63 else number


def _as_int32(word: Tensor) -> Tensor:
    """The int32 with the bits of an uint32 that an int64 holds."""
    return (word - (word >> 31 << 32)).to(torch.int32)
