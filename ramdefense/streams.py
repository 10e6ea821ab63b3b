"""Random keep-masks with a stream for each image.

A mask is a function of (seed, draw, image, site, call) and of nothing else: not of the batch an image came in, not of
what was drawn before it, not of the process. So an experiment that is cut into other batches, or spread over other
machines of the same kind, sees the same masks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ramdefense import counter

#: The stream of a matrix that all images of a batch share (it has no part that belongs to one image).
SHARED = -1

_LEVELS = counter.LEVELS  # an element costs 16 random bits, so a probability is a multiple of 2**-16


def stream_seed(seed: int, draw: int, image: int, site: str, call: int) -> int:
    """A 63-bit seed for one stream, the same in every process (Python's own ``hash`` is not)."""
    text = f"{seed}|{draw}|{image}|{call}|{site}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream_seeds(
    lead: int,
    *,
    seed: int,
    draw: int,
    images: Sequence[int],
    site: str,
    call: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The seeds of the streams of an attention matrix whose first dimension is ``lead``.

    Returns:
        (streams,) int64: one of each image, or of :data:`SHARED` where ``lead`` is not a multiple of their number.
    """
    streams = tuple(images) if lead % len(images) == 0 else (SHARED,)
    return torch.tensor([stream_seed(seed, draw, image, site, call) for image in streams], device=device)


def keep_mask(
    shape: Sequence[int],
    p: float,
    *,
    seed: int,
    draw: int,
    images: Sequence[int],
    site: str,
    call: int = 0,
    unit: str = "element",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the mask of one attention matrix: True is kept, with probability 1 - p.

    Args:
        shape: shape ``(lead, ..., queries, keys)`` of the attention matrix. Its first dimension is image-major: it
            holds the images, or images x windows, or images x heads.
        p: probability of a drop, in [0, 1); taken to the nearest multiple of 2**-16.
        seed: the defence's seed.
        draw: number of the draw.
        images: number of the stream of each image in the batch.
        site: name of the place that attends.
        call: how many times this place has attended before, in the same forward pass.
        unit: "element", every element by itself; "key", one decision for each key of each matrix (that is, of each
            window and head), which all its queries share.
        device: where the mask is made. A CPU takes its masks from a generator, other devices theirs from `counter`,
            whose bits the kernels of refined attention make again; the two differ.

    Shape:
        Bool, `shape` for "element"; ``(lead, ..., 1, keys)`` for "key", where `shape` has three dimensions or more.

    Where `lead` is not a multiple of the number of images, no part of the matrix belongs to one image: the whole matrix
    is drawn from one stream that is common to every batch (:data:`SHARED`).

    Raises:
        ValueError: p outside [0, 1), an unknown unit, no image, or a shape of less than two dimensions.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p is a probability in [0, 1), got {p!r}")
    if unit not in ("element", "key"):
        raise ValueError(f"unit must be 'element' or 'key', got {unit!r}")
    if not images:
        raise ValueError("images must name the stream of at least one image, got none")
    if len(shape) < 2:
        raise ValueError(f"an attention matrix has at least the dimensions (queries, keys), got shape {tuple(shape)}")
    seeds = stream_seeds(shape[0], seed=seed, draw=draw, images=images, site=site, call=call, device=device)
    part = (shape[0] // len(seeds), *shape[1:])
    drawn = (*part[:-2], 1, part[-1]) if unit == "key" else part
    dropped = counter.levels_dropped(p)
    if seeds.device.type == "cpu":
        keep = _generated(seeds, math.prod(drawn), dropped)
    else:
        keep = counter.keep(seeds, math.prod(drawn[:-1]), drawn[-1], dropped)
    keep = keep.view(len(seeds), *drawn)
    if len(shape) == 2 and unit == "key":  # the rows of a two-dimensional matrix belong to images, too
        keep = keep.expand(len(seeds), *part)
    return keep.reshape(-1, *keep.shape[2:])


def _generated(seeds: Tensor, size: int, dropped: int) -> Tensor:
    """(streams, size) elements from a generator for each seed."""
    # A draw of 64 bits makes four elements: four times cheaper than torch.rand, which spends a draw on each.
    bits = torch.empty(len(seeds), -(-size // 4), dtype=torch.int64)
    generator = torch.Generator()
    for row, seed in zip(bits, seeds.tolist(), strict=True):
        generator.manual_seed(seed)
        row.random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[:, :size] >= dropped - _LEVELS // 2
