"""Batches that fit: out of GPU memory, the batch halves and the work goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Made = TypeVar("Made")


class BatchSize:
    """Images worked on at once; less, once they did not fit.

    Args:
        size: To begin with.
        noted: Called with each smaller size.
    """

    def __init__(self, size: int, noted: Callable[[int], None]) -> None:
        self.size, self.noted = size, noted

    def over(self, images: Sequence[int], work: Callable[[Sequence[int], int], Made]) -> Iterator[Made]:
        """What `work` makes of the images, a batch after the other.

        Args:
            images: All of them.
            work: Called as ``work(batch, size)``, with a batch of at most ``size`` of the images; called again with a
                smaller one where it runs out of memory, so it must change nothing before it returns.

        Raises:
            ValueError: One image alone does not fit; the message says what to do.
        """
        start = 0
        while start < len(images):
            batch = images[start : start + self.size]
            try:
                made = work(batch, self.size)
            except torch.OutOfMemoryError as error:
                self._halve(len(batch), error)
            else:
                start += len(batch)
                yield made
                continue
            # out of the handler, so that nothing holds the tensors of the failed batch any more
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, held: int, error: torch.OutOfMemoryError) -> None:
        if held == 1:
            raise ValueError(
                f"out of GPU memory with a single image ({' '.join(str(error).split())}); take smaller images (size=), "
                "fewer draws in a step (defence_samples=), a smaller model, or device_type='cpu'"
            ) from error
        before, self.size = self.size, (min(self.size, held) + 1) // 2
        warnings.warn(
            f"out of GPU memory with {held} images at once; the run goes on with batches of {self.size} instead of "
            f"{before}",
            stacklevel=4,
        )
        self.noted(self.size)
