"""The attacks in the style of the Adversarial Robustness Toolbox: evasion attacks on a `PyTorchSegmenter`.

`SegmentationAttack` is all that they share: options as attributes, arrays or tensors in and out. What an attack may
change, and how far, is the business of its class of options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from torch import Tensor

from attacks.minimal_norm import MinimalNormOptions, smallest_perturbation
from attacks.optimize import Result, make_patch, optimize, reference_map
from attacks.options import AttackOptions, PatchOptions, PixelOptions
from attacks.patch import Patch
from attacks.targets import Permute, Strip, Target
from ramdefense.outputs import labels_of
from ramdefense.segmenter import SegmenterMixin

Array = TypeVar("Array", np.ndarray, Tensor)


class SegmentationAttack(EvasionAttack):
    """An evasion attack on a segmenter; its options are those of `options_class`.

    Against a defence that says it is random the gradient is averaged over draws, and a straight-through gradient is
    used where one is offered; `defence_samples` and `straight_through` switch that.

    Args:
        estimator: A `ramdefense.PyTorchSegmenter`, or any ART estimator with `SegmenterMixin` and its `logits`.
        options: The keywords of `options_class`, with its defaults. Each is an attribute, too, and `set_params` sets
            them.

    Attributes:
        result: Success, steps, passes and seconds of the last `generate`; None before.

    Raises:
        art.exceptions.EstimatorError: If the estimator is no segmenter.
        TypeError: On an option that does not exist.
        ValueError: On a value that is out of range.
    """

    options_class: ClassVar[type[AttackOptions]] = AttackOptions
    search: ClassVar[Callable[..., tuple[Tensor, Any]]] = staticmethod(optimize)  # what finds the adversarial images
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, SegmenterMixin)

    def __init__(self, estimator: Any, **options: Any) -> None:
        super().__init__(estimator=estimator)
        self.result: Result | None = None
        self._assign(self.options_class.of(type(self).__name__, options))
        self._check_params()

    def generate(self, x: Array, y: Any = None, *, images: Sequence[int] | None = None) -> Array:
        """Attack images.

        Args:
            x: Images, (N, C, H, W), floating point in the clip range, array or tensor.
            y: (N, H, W) label map, integers, array or tensor; scores (N, nb_classes, H, W) are taken by their largest.
                With a `target`, or untargeted: the ground truth; targeted without a `target`: the target map. None,
                for an untargeted attack only: the model's own prediction, so that no label is leaked.
            images: Stream number of each image, on which all that is random for it depends; None: 0..N-1.

        Returns:
            The adversarial images, of the kind, dtype and device of `x`.

        Raises:
            ValueError: On images, labels or stream numbers that do not fit, a patch larger than the image or outside
                it, or a missing target.
            TypeError: If `x` is neither an array nor a tensor.
        """
        options = self._check_params()
        tensor = torch.tensor(x) if isinstance(x, np.ndarray) else x
        # a goal may be not to look at labels, `attacks.pixelwise.OwnPrediction`
        labels = None if getattr(options.goal, "own_prediction", False) else self._labels(y)
        adversarial = self._attacked(tensor, labels, options, images)
        return adversarial.numpy() if isinstance(x, np.ndarray) else adversarial

    def _attacked(self, images: Tensor, y: Tensor | None, options: Any, streams: Sequence[int] | None) -> Tensor:
        """The adversarial images, like `images`; sets `result`."""
        adversarial, self.result = self.search(self.estimator, images, y, options, streams)
        return adversarial.to(images)

    def target_map(self, y: Array, images: Sequence[int] | None = None) -> Array | None:
        """The map that `generate(x, y)` aims at, (N, H, W) int64, of the kind of `y`; None for an untargeted attack."""
        options = self._check_params()
        if not options.aims:
            return None
        labels = self._labels(y)
        assert labels is not None
        # the target looks at labels alone; the images only lend their number and size
        blank = torch.empty(len(labels), 1, *labels.shape[1:])
        reference = reference_map(self.estimator, blank, labels, options, images)
        return reference.numpy() if isinstance(y, np.ndarray) else reference

    def mask(self, x: Array) -> Array:
        """The pixels that the attack may change on these images: (N, H, W) bool, of the kind of `x`; here all."""
        mask = torch.ones(len(x), *x.shape[-2:], dtype=torch.bool)
        return mask.numpy() if isinstance(x, np.ndarray) else mask.to(x.device)

    def set_params(self, **kwargs: Any) -> None:
        """Set options by name, all of them or, if one is refused, none.

        Raises:
            ValueError: On an option that does not exist, as ART has it, or a value that is out of range.
        """
        unknown = sorted(set(kwargs) - set(self.attack_params))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}; see `attack_params`.")
        self._assign(self.options_class(**{**self._given(), **kwargs}))

    @property
    def targeted(self) -> bool:
        """Whether the attack is to reach a map (True) or to leave one."""
        return self._check_params().aims

    @targeted.setter
    def targeted(self, targeted: bool | None) -> None:
        self._targeted = targeted

    @property
    def options(self) -> Any:
        """The options as they stand, checked, of `options_class`."""
        return self._check_params()

    def _assign(self, options: AttackOptions) -> None:
        for name in self.attack_params:
            setattr(self, name, getattr(options, name))

    def _given(self) -> dict[str, Any]:
        """The options as they stand: the attributes, which a user may have set one by one."""
        return {name: self._targeted if name == "targeted" else getattr(self, name) for name in self.attack_params}

    def _check_params(self) -> Any:
        """The checked options, of `options_class`."""
        return self.options_class(**self._given())

    def _labels(self, y: Any) -> Tensor | None:
        if y is None:
            return None
        if isinstance(y, (np.ndarray, Tensor)) and y.ndim == 4:
            return labels_of(y, self.estimator.nb_classes, self.estimator.ignore_index)
        return torch.tensor(y) if isinstance(y, np.ndarray) else y

    def __repr__(self) -> str:
        """A call that makes this attack again, for a variable `estimator`."""
        given = self._given()
        options = ", ".join(f"{name}={given[name]!r}" for name in self.attack_params)
        return f"{type(self).__name__}(estimator, {options})"


class PatchAttack(SegmentationAttack):
    """A patch for each image, made by gradient steps on the pixels of a rectangle that may take any value.

    Nothing outside the rectangle changes, bit for bit; the pixels under it and void pixels are in no loss. Against a
    defence that says it is random the gradient is averaged over draws, and a straight-through gradient is used where
    one is offered; `defence_samples` and `straight_through` switch that.

    Args:
        estimator: A `ramdefense.PyTorchSegmenter`, or any ART estimator with `SegmenterMixin` and its `logits`.
        options: The keywords of `attacks.options.PatchOptions`, with its defaults. Each is an attribute, too, and
            `set_params` sets them.

    Attributes:
        patch: What the last `generate` made, one patch for each image; None before.
        result: Success, steps, passes and seconds of the last `generate`; None before.

    Raises:
        art.exceptions.EstimatorError: If the estimator is no segmenter.
        TypeError: On an option that does not exist.
        ValueError: On a value that is out of range.

    Example:
        >>> attack = PatchAttack(segmenter, target=FixedClass(3), patch_shape=(40, 40))  # doctest: +SKIP
        >>> x_adversarial = attack.generate(x, y)  # doctest: +SKIP
    """

    options_class = PatchOptions
    attack_params: ClassVar[list[str]] = EvasionAttack.attack_params + PatchOptions.names()

    def __init__(self, estimator: Any, **options: Any) -> None:
        super().__init__(estimator, **options)
        self.patch: Patch | None = None

    def _attacked(self, images: Tensor, y: Tensor | None, options: Any, streams: Sequence[int] | None) -> Tensor:
        self.patch, self.result = make_patch(self.estimator, images, y, options, streams)
        return self.patch.paste(images)

    def apply_patch(self, x: Array, patch: Patch | None = None) -> Array:
        """Put a patch on images.

        Args:
            x: Images, (N, C, H, W), array or tensor.
            patch: The patch; None: the one of the last `generate`.

        Returns:
            The patched images, of the kind of `x`.

        Raises:
            ValueError: If there is no patch yet, or if it does not fit on the images.
        """
        patch = self.patch if patch is None else patch
        if patch is None:
            raise ValueError("There is no patch yet; call `generate` first, or give one.")
        return patch.paste(x)

    def mask(self, x: Array) -> Array:
        """The pixels that the attack changes on these images: (N, H, W) bool, of the kind of `x`.

        Raises:
            ValueError: If the patch does not fit, or if `patch_location` names a placement, which finds a place on each
                image, and the last `generate` was not on as many images.
        """
        options = self._check_params()
        size = int(x.shape[-2]), int(x.shape[-1])
        if options.placement is None:
            mask = options.covered(size).repeat(len(x), 1, 1)
        elif self.patch is not None and len(self.patch) == len(x):
            mask = self.patch.mask(size)
        else:
            raise ValueError(
                f"Where {options.patch_location!r} puts the patches on these {len(x)} images is not known; call "
                "`generate` on them first."
            )
        return mask.numpy() if isinstance(x, np.ndarray) else mask.to(x.device)


class PixelAttack(SegmentationAttack):
    """A perturbation of every pixel for each image, within a ball around the image, made by the loop of `PatchAttack`.

    The adversarial images are in the ball, up to the rounding of one addition, and in the clip range. The attacks of
    the papers are presets of it (`attacks.pixelwise`).

    Args:
        estimator: A `ramdefense.PyTorchSegmenter`, or any ART estimator with `SegmenterMixin` and its `logits`.
        options: The keywords of `attacks.options.PixelOptions`, with its defaults. Each is an attribute, too, and
            `set_params` sets them.

    Attributes, errors: As `PatchAttack`, without the patch.

    Example:
        >>> attack = PixelAttack(segmenter, eps=4 / 255, eps_step=1 / 255, max_iter=20)  # doctest: +SKIP
        >>> x_adversarial = attack.generate(x, y)  # doctest: +SKIP
    """

    options_class = PixelOptions
    attack_params: ClassVar[list[str]] = EvasionAttack.attack_params + PixelOptions.names()


class MinimalNormAttack(SegmentationAttack):
    """For each image the smallest perturbation with which a given share of the pixels is won (`attacks.minimal_norm`).

    Args:
        estimator: A `ramdefense.PyTorchSegmenter`, or any ART estimator with `SegmenterMixin` and its `logits`.
        options: The keywords of `attacks.minimal_norm.MinimalNormOptions`, with its defaults. Each is an attribute,
            too, and `set_params` sets them.

    Attributes:
        result: What the last `generate` found: the norm for each image, whether the share was reached, and what it
            took; None before.

    Errors: As `PatchAttack`.

    Example:
        >>> attack = MinimalNormAttack(segmenter, norm="inf", threshold=0.99)  # doctest: +SKIP
        >>> x_adversarial = attack.generate(x, y)  # doctest: +SKIP
        >>> attack.result.norms  # doctest: +SKIP
    """

    options_class = MinimalNormOptions
    attack_params: ClassVar[list[str]] = EvasionAttack.attack_params + MinimalNormOptions.names()
    search = staticmethod(smallest_perturbation)


class _NamedTargetAttack(PatchAttack):
    """A `PatchAttack` that brings its own target, made anew from the seed."""

    attack_params: ClassVar[list[str]] = [
        name for name in PatchAttack.attack_params if name not in ("target", "targeted")
    ]

    def __init__(self, estimator: Any, **options: Any) -> None:
        brought = sorted({"target", "targeted"} & set(options))
        if brought:
            raise TypeError(f"{type(self).__name__} sets {' and '.join(brought)} itself; use PatchAttack for another.")
        super().__init__(estimator, **options)

    @property
    def target(self) -> Target:
        """The target, seeded by `seed`."""
        raise NotImplementedError

    def _given(self) -> dict[str, Any]:
        return {**super()._given(), "target": self.target}


class PermuteAttack(_NamedTargetAttack):
    """`PatchAttack` towards `attacks.targets.Permute`: every class of the image becomes an absent one, one to one.

    `generate(x, y)` takes the ground truth as `y`. Options as of `PatchAttack`, without `target` and `targeted`; `seed`
    seeds the target map, too.
    """

    @property
    def target(self) -> Permute:
        return Permute(self.seed)


class StripAttack(_NamedTargetAttack):
    """`PatchAttack` towards `attacks.targets.Strip`: four vertical bands, each of one class absent from the image.

    `generate(x, y)` takes the ground truth as `y`. Options as of `PatchAttack`, without `target` and `targeted`; `seed`
    seeds the target map, too.
    """

    @property
    def target(self) -> Strip:
        return Strip(seed=self.seed)
