"""A foreground mask before a classifier (Vaishnavi, Cong, Eykholt, Prakash & Rahmati, arXiv 1911.11946), its control.

The background is blacked out, so that nothing in it can be attacked. Where the mask comes from decides what an attacker
can do: one that the data set gives stays as it is; one that a segmenter finds moves with the image.

**How given masks reach a preprocessor.** ART hands a defence whatever part of the images an attack works on (a batch, a
shuffled batch, the ones not fooled yet) and does not say which part it is. So a mask travels *with its image*, as one
more channel (`with_masks`), through whatever batches there are. Nothing is kept between calls. The channel counts as
True from 0.5 on and has no gradient: an attack with a smaller budget than 0.5 (or one that is given ART's ``mask=``)
leaves it as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor

from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.streams import stream_seed

Array = TypeVar("Array", np.ndarray, Tensor)

RANDOM_MASKS = ("shift", "blob")


class ForegroundMask(PreprocessorPyTorch):
    """An ART preprocessing defence that multiplies images by a mask of their foreground.

        given = PyTorchClassifier(..., input_shape=(4, H, W), preprocessing_defences=ForegroundMask())
        given.predict(with_masks(x, masks))
        found = PyTorchClassifier(..., preprocessing_defences=ForegroundMask(segmenter, foreground=[1, 4]))
        found.predict(x)

    Args:
        masks: where the mask comes from:
            ``None``: the last channel of what is classified, see `with_masks`;
            a `PyTorchSegmenter`: the sum of the softmax over the ``foreground`` classes; a copy of it is used, so that
            it stays as it was and gets no gradient into its weights;
            any function from images ``(N, C, H, W)`` to masks ``(N, H, W)`` or ``(N, 1, H, W)``, bool or from 0 to 1.
        foreground: classes of the segmenter that are foreground; needed with a segmenter, and only there.
        hard: round the mask to 0 or 1; its gradient is that of the unrounded mask (straight-through).
        differentiate: whether the gradient of a segmenter's or function's mask counts. ``False`` gives the same
            predictions, and the gradient of an attacker who takes the mask as fixed.
        channels: of an image, without the mask.
        batch_size: images for which a segmenter or a function is asked at once where no gradient is needed.
        apply_fit, apply_predict: as everywhere in ART; the classifier is meant to learn on masked images too.
        device_type: "cpu" or "gpu".

    Raises:
        TypeError: `masks` is none of the three.
        ValueError: no foreground class, one that the segmenter lacks, or foreground classes without a segmenter.
    """

    params: ClassVar[list[str]] = ["foreground", "hard", "differentiate", "channels", "batch_size"]

    def __init__(
        self,
        masks: PyTorchSegmenter | Callable[[Tensor], Tensor] | None = None,
        *,
        foreground: Sequence[int] = (),
        hard: bool = False,
        differentiate: bool = True,
        channels: int = 3,
        batch_size: int = 64,
        apply_fit: bool = True,
        apply_predict: bool = True,
        device_type: str = "cpu",
    ) -> None:
        super().__init__(device_type=device_type, is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        if isinstance(masks, PyTorchSegmenter):
            masks = masks.with_model(copy.deepcopy(masks.model).requires_grad_(False))
        elif not (masks is None or callable(masks)):
            raise TypeError(
                f"masks is a {type(masks).__name__}; give None (masks come with the images, see with_masks), a "
                "PyTorchSegmenter, or a function from images to masks"
            )
        self.masks, self.foreground = masks, tuple(int(index) for index in foreground)
        self.hard, self.differentiate = bool(hard), bool(differentiate)
        self.channels, self.batch_size = int(channels), int(batch_size)
        self._check_params()

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """Masked images, and `y` as it is.

        Shape:
            x: ``(N, channels, H, W)``, with one channel more where masks are given; returns ``(N, channels, H, W)``

        Raises:
            ValueError: another number of channels, or masks that do not fit the images.
        """
        images = self._images(x)
        return images * self.mask(x).to(images.dtype), y

    def mask(self, x: Tensor) -> Tensor:
        """The masks ``(N, 1, H, W)`` from 0 to 1 that `forward` multiplies with, with their gradient."""
        images = self._images(x)
        if self.masks is None:
            return (x[:, self.channels :] >= 0.5).to(x.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiate):
            mask = self._in_batches(self._found, images)
            if self.hard:
                mask = (mask > 0.5).to(mask.dtype) + (mask - mask.detach())
        return mask

    def log_odds(self, x: Tensor) -> Tensor:
        """log(m / (1 − m)) of a segmenter's unrounded mask m, ``(N, 1, H, W)``: where m saturates, this does not.

        Raises:
            ValueError: the masks do not come from a segmenter.
        """
        if not isinstance(self.masks, PyTorchSegmenter):
            raise ValueError("log_odds: this defence has no segmenter; give ForegroundMask(segmenter, foreground=...)")
        logits = self.masks.logits(x)
        inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        inside[list(self.foreground)] = True
        odds = logits[:, inside].logsumexp(1, keepdim=True) - logits[:, ~inside].logsumexp(1, keepdim=True)
        return odds.to(x.device)

    def _found(self, images: Tensor) -> Tensor:
        if isinstance(self.masks, PyTorchSegmenter):
            return self.log_odds(images).sigmoid()
        assert self.masks is not None
        mask = self.masks(images)
        fits = isinstance(mask, Tensor) and mask.numel() == images[:, 0].numel()
        if not fits or tuple(mask.shape) not in ((len(images), *images.shape[2:]), (len(images), 1, *images.shape[2:])):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the mask function returned {shape} for images {tuple(images.shape)}; return (N, H, W) or (N, 1, H, W)"
            )
        mask = mask.reshape(len(images), 1, *images.shape[2:]).to(images)
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("the mask function returned values outside [0, 1]; 1 is foreground, 0 background")
        return mask

    def _in_batches(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return function(images)
        return torch.cat([function(batch) for batch in images.split(self.batch_size)])

    def _images(self, x: Tensor) -> Tensor:
        expected = self.channels + (self.masks is None)
        if x.ndim != 4 or x.shape[1] != expected:
            remedy = "join images and masks with with_masks(images, masks)" if self.masks is None else "see channels"
            raise ValueError(f"x has shape {tuple(x.shape)}; it has to be (N, {expected}, H, W): {remedy}")
        return x[:, : self.channels]

    def _check_params(self) -> None:
        if self.channels < 1 or self.batch_size < 1:
            raise ValueError(f"channels={self.channels}, batch_size={self.batch_size}: each at least 1")
        if not isinstance(self.masks, PyTorchSegmenter):
            if self.foreground:
                raise ValueError(f"foreground={self.foreground} names classes of a segmenter; give one as masks")
            return
        classes = range(self.masks.nb_classes)
        if not self.foreground or any(index not in classes for index in self.foreground):
            raise ValueError(
                f"foreground={self.foreground}: name the foreground's classes, each from 0 to {classes[-1]}"
            )
        if len(set(self.foreground)) == len(classes):
            raise ValueError(f"foreground={self.foreground} are all classes of the segmenter; leave the background out")

    def __repr__(self) -> str:
        source = "given" if self.masks is None else type(self.masks).__name__
        classes = f", foreground={self.foreground}" if self.foreground else ""
        return f"ForegroundMask({source}{classes}, hard={self.hard}, differentiate={self.differentiate})"


def with_masks(images: Array, masks: np.ndarray | Tensor) -> Array:
    """Images with their masks as a last channel: what a classifier behind ``ForegroundMask()`` takes.

    Shape:
        images: ``(N, C, H, W)``; masks: bool or 0/1, ``(N, H, W)`` or ``(N, 1, H, W)``; returns ``(N, C + 1, H, W)`` of
        the array and number type of ``images``

    Raises:
        ValueError: the masks have another size or number, or hold something else than 0 and 1.
    """
    found = torch.as_tensor(masks)
    size: tuple[int, ...] = tuple(images.shape)
    shape: tuple[int, ...] = (size[0], *size[2:])
    if tuple(found.shape) not in (shape, (shape[0], 1, *shape[1:])):
        raise ValueError(f"masks have shape {tuple(found.shape)}; for images {size} give {shape}")
    if found.dtype != torch.bool and not bool(((found == 0) | (found == 1)).all()):
        raise ValueError("masks hold something else than 0 and 1; compare a soft mask with a threshold first")
    found = found.reshape(shape[0], 1, *shape[1:])
    if isinstance(images, Tensor):
        return torch.cat([images, found.to(images)], dim=1)
    return np.concatenate([images, found.cpu().numpy().astype(images.dtype)], axis=1)


def random_masks(
    masks: Tensor, kind: str = "shift", *, seed: int = 0, indices: Sequence[int] | None = None
) -> Tensor:
    """The control of `ForegroundMask`: for each mask one of exactly the same area, at a place drawn at random.

    To be given in place of the true masks, `with_masks(images, random_masks(masks))`: as fixed as those, so that no
    randomness stands between an attack and the gradient.

    Args:
        masks: of the objects.
        kind: ``"shift"``, the mask moved cyclically by a uniformly drawn offset: same area, same shape. The silhouette
            is still that of the object and may give its class away. ``"blob"``, a drawn blob of the same area
            around a uniformly drawn pixel: says nothing about the class but how large the object is.
        seed: of all masks; each has a stream of its own.
        indices: number of each mask's stream; None means 0..N-1.

    Shape:
        masks: bool ``(N, H, W)``; returns the same

    Raises:
        ValueError: an unknown kind, masks of another shape, or as many indices as masks are not given.
    """
    if kind not in RANDOM_MASKS:
        raise ValueError(f"kind={kind!r}; known: {', '.join(RANDOM_MASKS)}")
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks are {masks.dtype} of shape {tuple(masks.shape)}; give bool (N, H, W)")
    streams = range(len(masks)) if indices is None else indices
    if len(streams) != len(masks):
        raise ValueError(f"{len(streams)} indices for {len(masks)} masks; give one for each")
    made = []
    for mask, stream in zip(masks, streams, strict=True):
        generator = torch.Generator().manual_seed(stream_seed(seed, 0, stream, f"random mask {kind}", 0))
        made.append(_shifted(mask, generator) if kind == "shift" else _blob(mask, generator))
    return torch.stack(made) if made else masks.clone()


def _shifted(mask: Tensor, generator: torch.Generator) -> Tensor:
    offsets = [int(torch.randint(side, (), generator=generator)) for side in mask.shape]
    return mask.roll(offsets, (0, 1))


def _blob(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The ``mask.sum()`` pixels that are nearest to a drawn one, where a drawn outline bends what is near."""
    height, width = mask.shape
    row, column = (float(torch.randint(side, (), generator=generator)) for side in mask.shape)
    down, across = torch.meshgrid(torch.arange(height) - row, torch.arange(width) - column, indexing="ij")
    angle = torch.atan2(down, across)
    phases = 2 * math.pi * torch.rand(4, generator=generator)
    weights = 0.3 * torch.rand(4, generator=generator)
    turns = torch.arange(1.0, 5.0)
    outline = 1.3 + (weights * torch.cos(turns * angle[..., None] + phases)).sum(-1)
    distance = torch.hypot(down, across) / outline
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[distance.flatten().argsort(stable=True)[: int(mask.sum())]] = True
    return chosen.view(height, width).to(mask.device)
