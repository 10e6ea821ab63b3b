"""The attacks in the style of torchattacks: `atk = PermuteAttack(model); adversarial = atk(images, labels)`.

The model is any `nn.Module` for segmentation, a hardened one included. The optimisation is the one of
`attacks.optimize`; the same options give the same images as `attacks.art_style`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from attacks.minimal_norm import MinimalNormOptions, smallest_perturbation
from attacks.optimize import Result, make_patch, optimize
from attacks.options import AttackOptions, PatchOptions, PixelOptions
from attacks.patch import Patch
from attacks.streams import stream
from attacks.targets import Permute, Strip
from ramdefense.outputs import logits_of
from ramdefense.traits import Traits, conditions, traits_of


class SaveStatistics(NamedTuple):
    """What `save` measured on all images, outside the patch and where the label is not void."""

    pixel_accuracy: float  # per cent of the pixels that keep their label
    miou: float  # per cent, the mean over the classes that labels or predictions hold
    l2: float  # mean over the images of the distance to the clean image
    seconds: float  # for the last batch


class LabelMapAttack(Attack):
    """What torchattacks' base class needs to attack a segmentation model; its modes then work on label maps.

    Args:
        name: Name of the attack.
        model: Returns (N, C, h, w) as a tensor, in a dictionary with `out`, in an object with `.logits` or as class
            queries; logits of another size than the image are resized to it.
        ignore_index: Label of void pixels; they stay void in every target map.
        seed: Seed of `set_mode_targeted_random`.
    """

    def __init__(self, name: str, model: nn.Module, *, ignore_index: int = 255, seed: int = 0) -> None:
        super().__init__(name, model)
        self.ignore_index = ignore_index
        self.seed = seed

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Images (N, C, H, W) as the attack sees them -> logits (N, classes, H, W)."""
        if self._normalization_applied is False:
            inputs = self.normalize(inputs)
        return logits_of(self.model(inputs), (inputs.shape[-2], inputs.shape[-1]))

    @torch.no_grad()
    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """A class other than the label for every pixel, drawn uniformly from each image's stream: (N, H, W)."""
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(1) if labels is None else labels.to(logits.device)
        moves = torch.stack(
            [
                torch.randint(1, logits.shape[1], labels.shape[1:], generator=stream(self.seed, "random", image))
                for image in range(len(labels))
            ]
        )
        targets = (labels + moves.to(labels.device)) % logits.shape[1]
        return labels.where(labels == self.ignore_index, targets)

    @torch.no_grad()
    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The class with the k-th smallest logit, other than the label, for every pixel: (N, H, W)."""
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(1) if labels is None else labels.to(logits.device)
        void = labels == self.ignore_index
        others = logits.scatter(1, labels.masked_fill(void, 0)[:, None], torch.inf)
        return labels.where(void, others.kthvalue(self._kth_min, dim=1).indices)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """As in torchattacks; but training mode, of every module, and normalisation are restored after errors, too."""
        modes = [(module, module.training) for module in self.model.modules()]
        applied = self._normalization_applied
        try:
            return super().__call__(inputs, labels, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training
            self._set_normalization_applied(applied)

    def changed(self, size: tuple[int, int]) -> Tensor:
        """The pixels that the attack covers on an image of (height, width), left out of statistics: bool; here none."""
        return torch.zeros(size, dtype=torch.bool)

    def save(
        self,
        data_loader: Iterable[tuple[Tensor, Tensor]],
        save_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> SaveStatistics | None:
        """Attack a data loader and save what comes out, in the format of torchattacks (`Attack.load` reads it).

        Args:
            data_loader: Gives (images, labels), (N, C, H, W) and (N, H, W); has a length.
            save_path: File to write, whole or not at all; None: none.
            verbose: Let torchattacks print its progress line; its "robust accuracy" is the pixel accuracy here.
            return_verbose: Return the statistics.
            save_predictions: Save the predicted label maps as well.
            save_clean_inputs: Save the images as well.
            save_type: "float", or "int" for 8 bits.

        Returns:
            The statistics with `return_verbose`, else None.
        """
        batches = list[dict[str, Tensor]]()
        confusion: Tensor | None = None
        distances: list[Tensor] = []
        statistics = SaveStatistics(0.0, 0.0, 0.0, 0.0)
        total = len(data_loader)  # type: ignore[arg-type]
        for number, (inputs, labels) in enumerate(data_loader, 1):
            began = time.perf_counter()
            adversarial, labels = self(inputs, labels), labels.cpu()
            logits = self._output_as_given(adversarial)
            predictions = logits.argmax(1).cpu()
            counted = (labels != self.ignore_index) & ~self.changed((labels.shape[-2], labels.shape[-1]))
            counts = _confusion(predictions[counted], labels[counted], logits.shape[1])
            confusion = counts if confusion is None else confusion + counts
            distances.append((adversarial.cpu() - inputs.cpu()).flatten(1).norm(dim=1))
            statistics = _statistics(confusion, torch.cat(distances), time.perf_counter() - began)
            if verbose:
                end = "\r" if number < total else "\n"
                self._save_print(
                    100 * number / total, statistics.pixel_accuracy, statistics.l2, statistics.seconds, end
                )
            if save_path is not None:
                kept = {"adv_inputs": adversarial, "labels": labels}
                kept |= {"preds": predictions} if save_predictions else {}
                kept |= {"clean_inputs": inputs} if save_clean_inputs else {}
                batches.append({name: self._as_saved(name, value, save_type) for name, value in kept.items()})
        if save_path is not None:
            whole: dict[str, Any] = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            path = Path(save_path)
            half_written = path.with_name(f"{path.name}.{os.getpid()}.part")
            torch.save({**whole, "save_type": save_type}, half_written)
            half_written.replace(path)
        return statistics if return_verbose else None

    def _as_saved(self, name: str, value: Tensor, save_type: str) -> Tensor:
        value = value.detach().cpu()
        if name not in ("adv_inputs", "clean_inputs"):
            return value
        if self.normalization_used is not None:
            value = self.inverse_normalize(value)
        return self.to_type(value, "int") if save_type == "int" else value

    @torch.no_grad()
    def _output_as_given(self, inputs: Tensor) -> Tensor:
        """Logits of images as the caller has them, in eval mode, every module's mode restored."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            return self.get_logits(inputs.to(self.device))
        finally:
            for module, training in modes:
                module.training = training


class SegmentationAttack(LabelMapAttack):
    """An attack whose options are those of `options_class`; each is an attribute, too.

    Arguments:
        model (nn.Module): model to attack.
        ignore_index (int): label of void pixels. (Default: 255)
        options: the keywords of `options_class`, with its defaults.

    After a call `result` holds success, steps and seconds.
    """

    options_class: ClassVar[type[AttackOptions]] = AttackOptions
    search: ClassVar[Callable[..., tuple[Tensor, Any]]] = staticmethod(optimize)  # what finds the adversarial images
    brings: ClassVar[frozenset[str]] = frozenset({"targeted"})  # options that are not set here; the base class has it

    def __init__(self, model: nn.Module, *, ignore_index: int = 255, **options: Any) -> None:
        checked = self.options_class.of(type(self).__name__, options)
        super().__init__(type(self).__name__, model, ignore_index=ignore_index, seed=checked.seed)
        for name in self.options_class.names():
            if name not in self.brings:
                setattr(self, name, getattr(checked, name))
        # a mode that chooses the target map makes sense only where no target does
        self.supported_mode = ["default", "targeted"] if self.target is None else ["default"]
        if self.target is None and checked.targeted:
            self.set_mode_targeted_by_label(quiet=True)
        self.targeted = self._options(bool(checked.targeted)).aims
        self.result: Result | None = None

    def forward(self, images: Tensor, labels: Tensor | None = None, *, streams: Sequence[int] | None = None) -> Tensor:
        """Images in [0, 1] -> adversarial images.

        Args:
            images: (N, C, H, W).
            labels: (N, H, W), or None.
            streams: Stream number of each image, on which all that is random for it depends; None: 0..N-1.

        Raises:
            ValueError: As `attacks.optimize.optimize`.
        """
        options = self._options(self.targeted)
        images = self._in_range(images.detach().to(self.device))
        # a goal may be not to look at labels, `attacks.pixelwise.OwnPrediction`
        own_prediction = getattr(options.goal, "own_prediction", False)
        y = None if labels is None or own_prediction else labels.detach().to(self.device)
        if options.aims and options.target is None:
            y = self.get_target_label(images, y)
        with torch.no_grad(), conditions(self.model, draw=0):
            nb_classes = self.get_logits(images[:1]).shape[1]
        return self._attacked(_ModelAsVictim(self, nb_classes), images, y, options, streams)

    def _attacked(
        self, victim: _ModelAsVictim, images: Tensor, y: Tensor | None, options: Any, streams: Sequence[int] | None
    ) -> Tensor:
        """The adversarial images, like `images`; sets `result`."""
        adversarial, self.result = self.search(victim, images, y, options, streams)
        return adversarial.to(images)

    def _options(self, targeted: bool) -> AttackOptions:
        """The checked options; `targeted`, which torchattacks' modes set, has a say only where no target has one."""
        given = {name: getattr(self, name) for name in self.options_class.names() if name != "targeted"}
        return self.options_class(**given, targeted=targeted if self.target is None else None)

    def _in_range(self, images: Tensor) -> Tensor:
        """Un-normalised images are in [0, 1] but for rounding, which is taken off; others stay as they are."""
        if self._normalization_applied is not False:
            return images
        clipped = images.clamp(0.0, 1.0)
        return clipped if torch.allclose(clipped, images, rtol=0.0, atol=1e-4) else images


class PatchAttack(SegmentationAttack):
    """A patch for each image, made by gradient steps on the pixels of a rectangle that may take any value.

    Distance Measure: none; L0 of the rectangle's size, and nothing outside it changes.

    Arguments:
        model (nn.Module): model to attack.
        ignore_index (int): label of void pixels. (Default: 255)
        options: the keywords of `attacks.options.PatchOptions`, with its defaults; each is an attribute, too.

    After a call `patch` holds what was made, one patch for each image, and `result` success, steps and seconds.

    Shape:
        - images: :math:`(N, C, H, W)`, in [0, 1], or normalised after `set_normalization_used`.
        - labels: :math:`(N, H, W)`, classes or `ignore_index`: the ground truth; with `targeted` or in a targeted mode
          without a `target`, what that mode makes of it. None, for an untargeted attack: the model's own prediction.
        - output: :math:`(N, C, H, W)`.

    Examples::
        >>> atk = PatchAttack(model, patch_shape=(40, 40), max_iter=100)  # doctest: +SKIP
        >>> adv_images = atk(images, labels)  # doctest: +SKIP
    """

    options_class = PatchOptions

    def __init__(self, model: nn.Module, *, ignore_index: int = 255, **options: Any) -> None:
        super().__init__(model, ignore_index=ignore_index, **options)
        self.patch: Patch | None = None

    def _attacked(
        self, victim: _ModelAsVictim, images: Tensor, y: Tensor | None, options: Any, streams: Sequence[int] | None
    ) -> Tensor:
        self.patch, self.result = make_patch(victim, images, y, options, streams)
        return self.patch.paste(images)

    def changed(self, size: tuple[int, int]) -> Tensor:
        return super().changed(size) if self.patch is None else self.patch.mask(size)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        adversarial = super().__call__(inputs, labels, *args, **kwargs)
        # normalised images were un-normalised and normalised again, which rounds: outside the patch they are as given
        changed = self.changed((adversarial.shape[-2], adversarial.shape[-1])).to(adversarial.device)
        return torch.where(changed.unsqueeze(-3), adversarial, inputs.detach().to(adversarial))


class PixelAttack(SegmentationAttack):
    """A perturbation of every pixel for each image, within a ball around the image, made by the loop of `PatchAttack`.

    Distance Measure: Linf, L2

    Arguments:
        model (nn.Module): model to attack.
        ignore_index (int): label of void pixels. (Default: 255)
        options: the keywords of `attacks.options.PixelOptions`, with its defaults; each is an attribute, too.

    Shapes as of `PatchAttack`. The attacks of the papers are presets of it (`attacks.pixelwise`).

    Examples::
        >>> atk = PixelAttack(model, eps=8/255, eps_step=2/255, max_iter=10)  # doctest: +SKIP
        >>> adv_images = atk(images, labels)  # doctest: +SKIP
    """

    options_class = PixelOptions


class MinimalNormAttack(SegmentationAttack):
    """For each image the smallest perturbation with which a given share of the pixels is won (`attacks.minimal_norm`).

    Distance Measure: Linf, L2

    Arguments:
        model (nn.Module): model to attack.
        ignore_index (int): label of void pixels. (Default: 255)
        options: the keywords of `attacks.minimal_norm.MinimalNormOptions`, with its defaults; each is an attribute.

    After a call `result` holds the norm for each image, whether the share was reached, and what it took. Shapes as of
    `PatchAttack`.

    Examples::
        >>> atk = MinimalNormAttack(model, norm="inf", threshold=0.99)  # doctest: +SKIP
        >>> adv_images = atk(images, labels)  # doctest: +SKIP
    """

    options_class = MinimalNormOptions
    search = staticmethod(smallest_perturbation)


class _NamedTargetAttack(PatchAttack):
    """A `PatchAttack` that brings its own target, made anew from the seed."""

    brings = PatchAttack.brings | {"target"}

    def __init__(self, model: nn.Module, *, ignore_index: int = 255, **options: Any) -> None:
        chosen = sorted({"target", "targeted"} & set(options))
        if chosen:
            raise TypeError(f"{type(self).__name__} sets {' and '.join(chosen)} itself; use PatchAttack for another.")
        super().__init__(model, ignore_index=ignore_index, **options)


class PermuteAttack(_NamedTargetAttack):
    """`PatchAttack` towards `attacks.targets.Permute`: every class of the image becomes an absent one, one to one.

    Arguments, shapes and use as of `PatchAttack`, without `target` and `targeted`; labels are the ground truth.

    Examples::
        >>> adv_images = PermuteAttack(model, max_iter=100)(images, labels)  # doctest: +SKIP
    """

    @property
    def target(self) -> Permute:
        return Permute(self.seed)


class StripAttack(_NamedTargetAttack):
    """`PatchAttack` towards `attacks.targets.Strip`: four vertical bands, each of one class absent from the image.

    Arguments, shapes and use as of `PatchAttack`, without `target` and `targeted`; labels are the ground truth.

    Examples::
        >>> adv_images = StripAttack(model, max_iter=100)(images, labels)  # doctest: +SKIP
    """

    @property
    def target(self) -> Strip:
        return Strip(seed=self.seed)


class _ModelAsVictim:
    """A torchattacks attack's model, as the loop wants it."""

    clip_values = (0.0, 1.0)

    def __init__(self, attack: LabelMapAttack, nb_classes: int) -> None:
        self._attack = attack
        self.nb_classes = nb_classes

    @property
    def ignore_index(self) -> int:
        return self._attack.ignore_index

    @property
    def device(self) -> torch.device:
        return torch.device(self._attack.device)

    @property
    def traits(self) -> Traits:
        return traits_of(self._attack.model)

    def logits(self, images: Tensor) -> Tensor:
        return self._attack.get_logits(images)

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self._attack.model
        return model

    def conditions(
        self,
        *,
        images: Sequence[int] | None = None,
        draw: int | None = None,
        straight_through: bool = False,
        undefended: bool = False,
    ) -> AbstractContextManager[None]:
        streams = None if images is None else tuple(images)
        return conditions(
            self._attack.model,
            images=streams,
            draw=draw,
            straight_through=straight_through,
            undefended=undefended,
        )


def _confusion(predictions: Tensor, labels: Tensor, nb_classes: int) -> Tensor:
    """Counts (nb_classes, nb_classes), rows labels, columns predictions."""
    return torch.bincount(labels * nb_classes + predictions, minlength=nb_classes**2).view(nb_classes, nb_classes)


def _statistics(confusion: Tensor, distances: Tensor, seconds: float) -> SaveStatistics:
    right = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - right
    seen = union > 0  # a class in neither labels nor predictions counts as nothing, not as 1
    accuracy = right.sum() / confusion.sum().clamp(min=1)
    miou = (right[seen] / union[seen]).mean() if seen.any() else torch.zeros(())
    return SaveStatistics(100 * float(accuracy), 100 * float(miou), float(distances.mean()), seconds)
