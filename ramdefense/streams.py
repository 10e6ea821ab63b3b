"""Random keep-masks with a stream for each image.

A mask is a function of (seed, draw, image, site, call) and of nothing else: not of the batch an image came in, not of
what was drawn before it, not of the process. So an experiment that is cut into other batches, or spread over other
machines of the same kind, sees the same masks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ramdefense import counter

#: The stream of a matrix that all images of a batch share (it has no part that belongs to one image).
SHARED = -1

_LEVELS = counter.LEVELS  # an element costs 16 random bits, so a probability is a multiple of 2**-16
_PER_WORD = 4  # elements that a draw of 64 bits makes


def stream_seed(seed: int, draw: int, image: int, site: str, call: int) -> int:
    """A 63-bit seed for one stream, the same in every process (Python's own ``hash`` is not)."""
    text = f"{seed}|{draw}|{image}|{call}|{site}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Keep:
    """The mask of one attention matrix, before it is drawn: as a whole by `mask`, or part after part by `Reader`.

    Attributes:
        shape: ``(lead, ..., queries, keys)`` of the attention matrix.
        p: probability of a drop, in [0, 1); taken to the nearest multiple of 2**-16.
        seeds: of the streams, one for each image, or one alone that the whole matrix shares.
        unit: "element" or "key".
    """

    shape: tuple[int, ...]
    p: float
    seeds: tuple[int, ...]
    unit: str = "element"

    @property
    def drawn(self) -> tuple[int, ...]:
        """Shape of what one stream draws."""
        part = (self.shape[0] // len(self.seeds), *self.shape[1:])
        return (*part[:-2], 1, part[-1]) if self.unit == "key" else part

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """The whole mask, bool, True is kept; see `keep_mask` for its shape."""
        drawn = self.drawn
        size = math.prod(drawn)
        if torch.device(device).type == "cpu":
            bits = torch.empty(len(self.seeds), -(-size // _PER_WORD), dtype=torch.int64)
            generator = torch.Generator()
            for row, seed in zip(bits, self.seeds, strict=True):
                draw_words(row, generator.manual_seed(seed))
            keep = bits.view(torch.int16)[:, :size] >= drop_level(self.p)
        else:
            seeds = torch.tensor(self.seeds, device=device)
            keep = counter.keep(seeds, size // drawn[-1], drawn[-1], counter.levels_dropped(self.p))
        keep = keep.view(len(self.seeds), *drawn)
        if len(self.shape) == 2 and self.unit == "key":  # the rows of a two-dimensional matrix belong to images, too
            keep = keep.expand(len(self.seeds), self.shape[0] // len(self.seeds), self.shape[1])
        return keep.reshape(-1, *keep.shape[2:])


class Reader:
    """The mask of a matrix on a CPU, part after part in memory order: the same bits as `Keep.mask`, never the whole.

    Args:
        size: how many elements one stream draws.
        seeds: of the streams, in the order in which they are read.
    """

    def __init__(self, size: int, seeds: Sequence[int]) -> None:
        self._size, self._seeds = size, iter(seeds)
        self._generator = torch.Generator()
        self._read = size  # of the stream that is open: all, so that the first read opens one
        self._words = torch.empty(1, dtype=torch.int64)
        self._last = 0

    def read(self, count: int) -> Tensor:
        """The next `count` elements, 16 random bits each as int16: kept where at least `drop_level`.

        The result is only good until the next read.
        """
        parts = []
        while count:
            if self._read == self._size:
                self._generator.manual_seed(next(self._seeds))
                self._read = 0
            taken = min(count, self._size - self._read)
            count -= taken
            part = self._within(taken)
            parts.append(part.clone() if count else part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _within(self, count: int) -> Tensor:
        """The next elements of the stream that is open."""
        begin, end = self._read, self._read + count
        first, last = begin // _PER_WORD, -(-end // _PER_WORD)
        old = -(-begin // _PER_WORD) - first  # 1 where the part before ended within a word
        if len(self._words) < last - first:
            self._words = torch.empty(last - first, dtype=torch.int64)
        words = self._words[: last - first]
        words[:old] = self._last
        draw_words(words[old:], self._generator)
        self._last, self._read = int(words[-1]), end
        offset = begin - first * _PER_WORD
        return words.view(torch.int16)[offset : offset + count]


def draw_words(words: Tensor, generator: torch.Generator) -> None:
    """Fill `words`, int64, with random bits: four elements each, four times cheaper than torch.rand, which spends a
    draw on each."""
    words.random_(-(2**63), None, generator=generator)


def drop_level(p: float) -> int:
    """The 16 bits of an element, as a signed number, below which it is dropped."""
    return counter.levels_dropped(p) - _LEVELS // 2


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
        device: where the mask is made. A CPU takes its masks from a generator, other devices theirs from `counter`,
            whose bits the kernels of refined attention make again; the two differ.
        shape, p, seed, draw, images, site, call, unit: see `keep_of`.

    Shape:
        Bool, `shape` for "element"; ``(lead, ..., 1, keys)`` for "key", where `shape` has three dimensions or more.

    Raises:
        ValueError: as `keep_of`.
    """
    keep = keep_of(shape, p, seed=seed, draw=draw, images=images, site=site, call=call, unit=unit)
    return keep.mask(device)


def keep_of(
    shape: Sequence[int],
    p: float,
    *,
    seed: int,
    draw: int,
    images: Sequence[int],
    site: str,
    call: int = 0,
    unit: str = "element",
) -> Keep:
    """The mask of one attention matrix, not drawn yet.

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
    streams = tuple(images) if shape[0] % len(images) == 0 else (SHARED,)
    return Keep(tuple(shape), p, tuple(stream_seed(seed, draw, image, site, call) for image in streams), unit)
