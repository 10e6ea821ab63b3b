"""What an attack did to a few images: the pixels that it set, kept apart from the images, to be laid on them again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluation.files import checksum, write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Changes:
    """The smallest rectangle that holds every pixel that an attack might change on N images.

    Args:
        pixels: (N, C, h, w) float32, what is in that rectangle of the adversarial images.
        mask: (N, h, w) bool, which of them the attack might change; None: every pixel of the image.
        location: (top, left) of the rectangle.
    """

    pixels: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    location: tuple[int, int]

    @classmethod
    def of(cls, batches: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_] | None]) -> Changes:
        """From adversarial images, (n, C, H, W) for each batch, and the attack's masks, (n, H, W) or None for all."""
        images = np.concatenate(batches)
        given = [m for m in masks if m is not None]
        if len(given) < len(masks):
            return cls(images, None, (0, 0))
        mask = np.concatenate(given)
        rows, columns = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
        if not len(rows):
            return cls(images[..., :0, :0], mask[..., :0, :0], (0, 0))
        box = np.s_[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(images[box], mask[box], (int(rows[0]), int(columns[0])))

    def paste(
        self, x: NDArray[np.float32], rows: slice = slice(None)
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """The adversarial images again, and the attack's mask, (n, H, W), or None.

        Args:
            x: (n, C, H, W), the images that the attack had.
            rows: Which of the N images these are.
        """
        if self.mask is None:
            return self.pixels[rows].copy(), None
        pixels, mask = self.pixels[rows], self.mask[rows]
        box = np.s_[..., self.location[0] : self.location[0] + mask.shape[-2],
                    self.location[1] : self.location[1] + mask.shape[-1]]  # fmt: skip
        adversarial, whole = x.copy(), np.zeros((len(x), *x.shape[-2:]), dtype=bool)
        adversarial[box] = np.where(mask[:, None], pixels, adversarial[box])
        whole[box] = mask
        return adversarial, whole

    def take(self, rows: Sequence[int]) -> Changes:
        """Those of the images at these positions, in this order."""
        chosen = list(rows)
        return Changes(self.pixels[chosen], None if self.mask is None else self.mask[chosen], self.location)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a safetensors file, whole or not at all.

        Returns:
            Its checksum.

        Raises:
            OSError: it could not be written; the message says what to do.
        """
        from safetensors.torch import save

        tensors = {"pixels": torch.from_numpy(np.ascontiguousarray(self.pixels))}
        if self.mask is not None:
            tensors["mask"] = torch.from_numpy(np.ascontiguousarray(self.mask))
        content = save(tensors, metadata={"location": json.dumps(self.location)})
        write_whole(Path(path), content)
        return checksum(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Changes:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                names, metadata = set(file.keys()), file.metadata() or {}
                if "pixels" not in names or "location" not in metadata:
                    raise ValueError(f"{os.fspath(path)} holds no patches of a run")
                mask = file.get_tensor("mask") if "mask" in names else None
                top, left = json.loads(metadata["location"])
                return cls(file.get_tensor("pixels"), mask, (top, left))
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is no safetensors file ({error})") from error
