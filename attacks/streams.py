"""Random numbers that belong to an image, not to its place in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def stream(*key: int | str) -> torch.Generator:
    """A generator that is a function of `key` alone, the same in every process and on every machine.

    Args:
        key: What the numbers are for, e.g. `(seed, "start", restart, image)`.

    Returns:
        A CPU generator: numbers are drawn on the CPU and moved, so that an accelerator sees the same ones.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # 63 bits: a positive int64


def stream_numbers(images: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The stream number of each of `count` images: `images` checked, or `0, 1, …` where it is None.

    Raises:
        ValueError: If `images` has not one number for each image.
    """
    if images is None:
        return tuple(range(count))
    numbers = tuple(int(number) for number in images)
    if len(numbers) != count:
        raise ValueError(f"`images` gives {len(numbers)} stream numbers for {count} images; give one for each image.")
    return numbers
