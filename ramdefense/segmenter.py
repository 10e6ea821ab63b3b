"""`PyTorchSegmenter`: a semantic segmentation model as an estimator of the Adversarial Robustness Toolbox (ART)."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from art import config
from art.defences.preprocessor.preprocessor import Preprocessor
from art.estimators.pytorch import PyTorchEstimator
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm.auto import trange  # type: ignore[import-untyped]

from ramdefense.batch_norm import sound_gradients
from ramdefense.checks import check_labels
from ramdefense.outputs import labels_of, logits_of, predictions_of
from ramdefense.preprocessing import preprocess, standardisation
from ramdefense.traits import Conditions, Traits, defended_modules, traits_of
from ramdefense.traits import conditions as model_conditions

Array = TypeVar("Array", np.ndarray, Tensor)


class SegmenterMixin(ABC):
    """What makes an ART estimator a segmenter; the requirement that attacks on segmentation name."""

    estimator_params: ClassVar[list[str]] = ["nb_classes", "ignore_index"]

    @property
    @abstractmethod
    def nb_classes(self) -> int:
        """Number of classes."""

    @property
    @abstractmethod
    def ignore_index(self) -> int:
        """Label of void pixels, which count in no loss and no metric."""


class PyTorchSegmenter(SegmenterMixin, PyTorchEstimator):
    """A PyTorch model for semantic segmentation as an ART estimator.

    Everything runs through one differentiable path, `logits`: preprocessing, model, unwrapping, resizing. During a
    prediction or a gradient the model is in `eval()` mode; its training flags are restored afterwards, its weights
    keep their `requires_grad` and get no gradient, and the caller's arrays are never changed. The model itself, not a
    copy, is moved to the device.

    Args:
        model: returns a tensor, `{"out": ...}`, an object with `.logits` or class queries (see `outputs.logits_of`),
            at the input's size or any other.
        nb_classes: number of classes, at least 2.
        input_shape: (C, H, W) of one image. Other heights and widths work wherever the model takes them.
        loss: None for pixel-wise cross-entropy, or `loss(logits (N, C, H, W), labels (N, H, W) int64) -> Tensor`,
            which has to deal with `ignore_index` itself. For values and gradients it is called with one image at a
            time, so that no image depends on its neighbours, and a result that is not a scalar is averaged; `fit`
            calls it with the batch, and what it returns is averaged.
        optimizer: needed by `fit` only; an optimizer over this model's parameters.
        channels_first: only True; images are (N, C, H, W).
        clip_values: smallest and largest value of a pixel.
        preprocessing: (mean, standard deviation), numbers or one for each channel, or an ART preprocessor.
        preprocessing_defences: ART preprocessor(s), applied before `preprocessing`. A PyTorch one is differentiated,
            for any other its own `estimate_gradient` is the backward pass (BPDA).
        postprocessing_defences: ART postprocessor(s), applied by `predict` only; no gradient sees them.
        ignore_index: label of void pixels.
        output_fn: from what the model returns to logits (N, nb_classes, h, w), in place of `outputs.logits_of`.
        device_type: "cpu" or "gpu"; as everywhere in ART, "gpu" means the CPU where there is no CUDA.
        amp: "bf16" runs the model, and nothing else, under `torch.autocast` in bfloat16: products and convolutions in
            8 bits of precision, logits and gradients of images in float32 at both ends. Predictions are no longer those
            of float32. None: as the weights are.

    Raises:
        TypeError: `model` is no `nn.Module`, or `loss` or `output_fn` cannot be called.
        ValueError: any other argument that does not fit, named with the remedy.
    """

    estimator_params: ClassVar[list[str]] = [
        *PyTorchEstimator.estimator_params,
        *SegmenterMixin.estimator_params,
        "loss",
        "input_shape",
        "optimizer",
        "output_fn",
        "amp",
    ]

    _device: torch.device
    _clip_values: tuple[float, float]
    preprocessing_operations: list[Preprocessor]

    def __init__(
        self,
        model: nn.Module,
        nb_classes: int,
        input_shape: tuple[int, int, int],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        channels_first: bool = True,
        clip_values: tuple[float, float] = (0.0, 1.0),
        preprocessing: Any = (0.0, 1.0),
        preprocessing_defences: Preprocessor | list[Preprocessor] | None = None,
        postprocessing_defences: Any = None,
        ignore_index: int = 255,
        output_fn: Callable[[Any], Tensor] | None = None,
        device_type: str = "cpu",
        amp: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
        super().__init__(
            model=model,
            clip_values=_pair_of_floats(clip_values),
            channels_first=channels_first,
            preprocessing_defences=preprocessing_defences,
            postprocessing_defences=postprocessing_defences,
            preprocessing=standardisation(preprocessing, device_type),
            device_type=device_type,
        )
        self._clip_values = _pair_of_floats(clip_values)
        self._nb_classes = nb_classes
        self._input_shape = tuple(input_shape)
        self._loss = loss
        self._optimizer = optimizer
        self._ignore_index = ignore_index
        self._output_fn = output_fn
        self._amp = amp
        self._own_draws = 0
        self._check_params()
        self._model.to(self._device)

    # ------------------------------------------------------------------------------------------------ properties

    @property
    def model(self) -> nn.Module:
        """The model as it was given."""
        return cast(nn.Module, self._model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def nb_classes(self) -> int:
        """Number of classes."""
        return self._nb_classes

    @property
    def ignore_index(self) -> int:
        """Label of void pixels, which count in no loss."""
        return self._ignore_index

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return self._input_shape

    @property
    def clip_values(self) -> tuple[float, float]:
        """Smallest and largest value of a pixel, as Python floats: ART's attacks refuse NumPy's under NumPy 2."""
        return self._clip_values

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The loss as it was given; None for pixel-wise cross-entropy."""
        return self._loss

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer as it was given."""
        return self._optimizer

    @property
    def output_fn(self) -> Callable[[Any], Tensor] | None:
        """The user's way from what the model returns to logits; None for `outputs.logits_of`."""
        return self._output_fn

    @property
    def amp(self) -> str | None:
        """The precision under which the model runs; None for that of its weights."""
        return self._amp

    @property
    def layer_names(self) -> list[str]:
        """Names of the modules inside the model, in their order; what `get_activations` takes."""
        return [name for name, _ in self.model.named_modules() if name]

    @property
    def traits(self) -> Traits:
        """What an attack must know of the model: the union over the defended modules inside it."""
        return traits_of(self.model)

    def conditions(
        self,
        *,
        images: Sequence[int] | None = None,
        draw: int | None = None,
        straight_through: bool = False,
        undefended: bool = False,
    ) -> AbstractContextManager[None]:
        """Context in which every defended module inside the model runs under these conditions (`traits.Conditions`).

        Args:
            images: number of the random stream of each image of the batches in the context; None means 0..N-1.
            draw: which draw of the randomness; None means the next one. Attacks count their draws up from 0, `predict`
                counts its own down from -1, so that a prediction never repeats what an attack has seen.
            straight_through: use straight-through gradients where a module has them.
            undefended: do as if the defences were not there, where a module can.
        """
        streams = None if images is None else tuple(images)
        return model_conditions(
            self.model, images=streams, draw=draw, straight_through=straight_through, undefended=undefended
        )

    # ------------------------------------------------------------------------------------------------ the one path

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images, differentiable: the path that predictions, gradients and attacks share.

        Preprocessing and its defences are part of it, postprocessing is not. Where a preprocessor makes several
        versions of an image (ART's expectation over transformation), their logits are averaged.

        Args:
            images: in the clip range, on any device, in any floating-point type.

        Shape:
            images: (N, C, H, W); returns (N, nb_classes, H, W) on the segmenter's device

        Raises:
            TypeError: in what the model returned no logits were found.
            ValueError: the shape of `images`, or the number of classes that the model returned, does not fit.
        """
        images = self._as_images(images)
        with self._mode(training=False):
            return self._averaged(self._forward(images)[0], len(images))

    def predict(self, x: Array, batch_size: int = 16, training_mode: bool = False, **kwargs: Any) -> Array:
        """Logits of images, without a gradient, after the postprocessing defences.

        A random model uses one draw for the whole call, and image i of `x` is random stream i, so that the result
        does not depend on `batch_size`; the next call takes the next draw. Inside `conditions` the given draw and
        streams are used.

        Args:
            x: images, NumPy or torch.
            batch_size: images in one forward pass.
            training_mode: predict in `train()` mode.
            kwargs: ignored; ART passes `y` and more.

        Shape:
            x: (N, C, H, W); returns (N, nb_classes, H, W), float32, of the same array type

        Raises:
            ValueError, TypeError: as `logits`.
        """
        images: Tensor = self._as_images(x)

        def logits(part: slice) -> Tensor:
            batch = images[part]
            return self._averaged(self._forward(batch)[0], len(batch)).to(images.device, torch.float32)

        with torch.no_grad(), self._mode(training=training_mode):
            nothing = torch.empty(0, self.nb_classes, *images.shape[-2:], device=images.device)
            predictions = torch.cat([nothing, *self._in_batches(logits, len(images), batch_size)])
        if self.postprocessing_defences:
            processed = self._apply_postprocessing(predictions.cpu().numpy(), fit=False)
            predictions = torch.tensor(processed, dtype=torch.float32, device=images.device)
        return _like(predictions, x)

    def predict_labels(self, x: Array, batch_size: int = 16) -> Array:
        """The most likely class of every pixel, (N, H, W) int64, of the array type of `x`; see `predict`."""
        predictions = self.predict(x, batch_size=batch_size)
        if isinstance(predictions, Tensor):
            return predictions_of(predictions)
        return predictions_of(torch.from_numpy(predictions)).numpy()

    def loss_gradient(self, x: Array, y: Any, training_mode: bool = False, **kwargs: Any) -> Array:
        """Gradient of the loss with respect to the images.

        As in ART's `PyTorchClassifier` the loss is the mean over the batch, here of `compute_loss`'s value for each
        image: the gradient of one image depends on the others only through the factor 1/N. Only the path to the
        images is differentiated; the weights get no gradient.

        Args:
            x: images, NumPy or torch.
            y: label maps or scores of classes, see `outputs.labels_of`.
            training_mode: differentiate in `train()` mode.
            kwargs: ignored; ART passes more.

        Shape:
            x: (N, C, H, W); y: (N, H, W) or (N, nb_classes, H, W); returns the shape, array and number type of `x`

        Raises:
            ValueError, TypeError: images or labels do not fit, or as `logits`.
        """
        images = self._as_images(x).detach().requires_grad_()
        labels = self._as_labels(y, images)
        with torch.enable_grad(), self._mode(training=training_mode):
            loss = self._losses(*self._forward(images, labels)).mean()
            (gradient,) = torch.autograd.grad(loss, images)
        return _like(gradient, x)

    def compute_loss(
        self, x: Array, y: Any, reduction: str = "none", *, batch_size: int = 16, **kwargs: Any
    ) -> Array:
        """The loss of each image: its mean over the counted pixels, 0 for an image of void pixels only.

        Args:
            x: images, NumPy or torch; a tensor keeps its gradient.
            y: label maps or scores of classes, see `outputs.labels_of`.
            reduction: "none" for one value for each image, "mean" or "sum" over the images.
            batch_size: images in one forward pass.
            kwargs: ignored; ART passes more.

        Shape:
            x: (N, C, H, W); y: (N, H, W) or (N, nb_classes, H, W); returns (N,), or () with a reduction

        Raises:
            ValueError, TypeError: images, labels or `reduction` do not fit, or as `logits`.
        """
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f'reduction is {reduction!r}; give "none", "mean" or "sum".')
        images = self._as_images(x)
        labels = self._as_labels(y, images)
        keeps_gradient = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()

        def of_batch(part: slice) -> Tensor:
            batch = images[part]
            return self._averaged(self._losses(*self._forward(batch, labels[part])), len(batch))

        with torch.set_grad_enabled(keeps_gradient), self._mode(training=False):
            losses = torch.cat(self._in_batches(of_batch, len(images), batch_size))
        return _like(losses if reduction == "none" else getattr(losses, reduction)(), x)

    def compute_losses(self, x: Array, y: Any, reduction: str = "none") -> dict[str, Array]:
        """The parts of the loss by name, here `{"total": compute_loss(...)}`; ART's summary writer asks for it."""
        return {"total": self.compute_loss(x, y, reduction)}

    def _predict_framework(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """ART's name for the differentiable path: logits, and the labels after the preprocessing."""
        images = self._as_images(x)
        with self._mode(training=False):
            return self._forward(images, None if y is None else self._as_labels(y, images))

    # ------------------------------------------------------------------------------------------------ inner layers

    def get_activations(
        self, x: Array, layer: int | str | None = None, batch_size: int = 16, framework: bool = False
    ) -> np.ndarray | Tensor:
        """What a module inside the model returns for images; after its last call, where it is called repeatedly.

        Args:
            x: images, NumPy or torch.
            layer: a name in `layer_names`, or an index into them.
            batch_size: images in one forward pass.
            framework: return a tensor with the gradient back to `x`, made in one forward pass; the weights stay out
                of its graph, so that `backward()` leaves nothing in the caller's model.

        Shape:
            x: (N, C, H, W); returns (N, ...), NumPy unless `framework`

        Raises:
            TypeError: `layer` is neither name nor index, or what the module returns is no tensor.
            ValueError: no such module, or the forward pass does not call it.
        """
        name, images, captured = self._layer_name(layer), self._as_images(x), []
        hook = self.model.get_submodule(name).register_forward_hook(lambda _, __, output: captured.append(output))

        def activations(batch: Tensor) -> Tensor:
            captured.clear()
            self._forward(batch, frozen=True)
            if not captured:
                raise ValueError(f"The forward pass does not call the module {name!r}; give one of those it calls.")
            if not isinstance(captured[-1], Tensor):
                raise TypeError(f"The module {name!r} returns a {type(captured[-1]).__name__}; give one inside it.")
            return captured[-1]

        try:
            with self._mode(training=False):
                if framework:
                    return activations(images)
                with torch.no_grad():
                    parts = self._in_batches(lambda part: activations(images[part]).cpu(), len(images), batch_size)
                return torch.cat(parts).float().numpy()
        finally:
            hook.remove()

    def _layer_name(self, layer: int | str | None) -> str:
        names = self.layer_names
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"layer is {layer!r}; give a name in `layer_names` or an index into them.")
        if isinstance(layer, int):
            if not -len(names) <= layer < len(names):
                raise ValueError(f"layer is {layer}; the model has {len(names)} modules, see `layer_names`.")
            return names[layer]
        if layer not in names:
            raise ValueError(f"layer is {layer!r}, which the model does not have; see `layer_names`.")
        return layer

    # ------------------------------------------------------------------------------------------------ training

    def fit(
        self,
        x: np.ndarray | Tensor,
        y: Any,
        batch_size: int = 16,
        nb_epochs: int = 10,
        training_mode: bool = True,
        *,
        scheduler: Any = None,
        generator: torch.Generator | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Train the model with the optimizer given to the segmenter; its training flags are restored afterwards.

        Preprocessors with `apply_fit` act on every batch anew. Every image is used once in an epoch, the last batch
        may be smaller, and a batch of void pixels only makes no step.

        Args:
            x: images, NumPy or torch; they stay where they are, a batch at a time goes to the device.
            y: label maps or scores of classes, see `outputs.labels_of`.
            batch_size: images in one step.
            nb_epochs: passes over the images.
            training_mode: False trains in `eval()` mode, with batch norm and dropout frozen.
            scheduler: learning rate scheduler, stepped after every epoch.
            generator: shuffles the images, on the CPU; None for a new one with seed 0, the same order in every call.
            verbose: show a progress bar with the mean loss of the epoch.
            kwargs: ignored; ART passes more.

        Shape:
            x: (N, C, H, W); y: (N, H, W) or (N, nb_classes, H, W)

        Raises:
            ValueError: no optimizer, or one over other parameters than the model's; images or labels do not fit.
        """
        optimizer = self._usable_optimizer()
        images = self._as_images(x)
        labels = self._as_labels(y, images).cpu()
        generator = generator or torch.Generator().manual_seed(0)
        with torch.enable_grad(), self._mode(training=training_mode):
            epochs = trange(nb_epochs, disable=not verbose, desc="Epochs")
            for _ in epochs:
                losses = []
                for chosen in torch.randperm(len(images), generator=generator).split(_positive(batch_size)):
                    batch = images[chosen.to(images.device)].detach()
                    logits, target = self._forward(batch, labels[chosen].to(self.device), fit=True)
                    if target is None or bool((target == self.ignore_index).all()):
                        continue
                    loss = self._losses(logits, target) if self._loss is None else self._loss(logits, target)
                    optimizer.zero_grad()
                    loss.mean().backward()
                    optimizer.step()
                    losses.append(loss.detach().mean())
                if scheduler is not None:
                    scheduler.step()
                if verbose and losses:
                    epochs.set_postfix(loss=f"{float(torch.stack(losses).mean()):.4f}")

    def _usable_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise ValueError("fit needs an optimizer: give `optimizer=` to the segmenter or set_params(optimizer=...).")
        own = {id(parameter) for parameter in self.model.parameters()}
        if not any(id(parameter) in own for group in self._optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                "The optimizer holds no parameter of this model, so that fit would train another one; make it from "
                "segmenter.model.parameters() and set_params(optimizer=...)."
            )
        return self._optimizer

    # ------------------------------------------------------------------------------------------------ copies and files

    def with_model(self, model: nn.Module) -> Self:
        """A new segmenter with another model and everything else equal; this one stays as it is.

        The optimizer stays behind, because it belongs to the weights of this one's model.

        Args:
            model: put on the device; not copied.
        """
        other = copy.copy(self)
        other._own_draws = 0
        other.set_params(model=model, optimizer=None)
        return other

    def set_params(self, **kwargs: Any) -> None:
        """Set arguments of the constructor by name; when one is refused, all stay as they were.

        Raises:
            TypeError, ValueError: as the constructor, or no such argument.
        """
        before = dict(self.__dict__)
        self.preprocessing_operations = list(self.preprocessing_operations)  # the one in `before` is changed in place
        try:
            device_type = str(kwargs.get("device_type", self.device_type))
            if "preprocessing" in kwargs:
                kwargs = {**kwargs, "preprocessing": standardisation(kwargs["preprocessing"], device_type)}
            if "clip_values" in kwargs:
                kwargs = {**kwargs, "clip_values": _pair_of_floats(kwargs["clip_values"])}
            super().set_params(**kwargs)
            if "device_type" in kwargs:
                self._device = torch.device("cuda" if device_type == "gpu" and torch.cuda.is_available() else "cpu")
            self._model.to(self._device)
        except Exception:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _check_params(self) -> None:
        clip_values = self._clip_values
        super()._check_params()
        self._clip_values = clip_values  # ART turns them into a float32 array
        if not isinstance(self._model, nn.Module):
            raise TypeError(f"model is a {type(self._model).__name__}; give a torch.nn.Module.")
        if isinstance(self._nb_classes, bool) or not isinstance(self._nb_classes, int) or self._nb_classes < 2:
            raise ValueError(f"nb_classes is {self._nb_classes!r}; give an integer of at least 2.")
        shape = self._input_shape
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"input_shape is {shape!r}; give three positive integers, (C, H, W).")
        if isinstance(self._ignore_index, bool) or not isinstance(self._ignore_index, int):
            raise ValueError(f"ignore_index is {self._ignore_index!r}; give an integer, 255 by custom.")
        if not self._channels_first:
            raise ValueError("channels_first is False; images are (N, C, H, W): permute them and leave it True.")
        if self._amp not in (None, "bf16"):
            raise ValueError(f'amp is {self._amp!r}; give "bf16" or None.')
        if self._device_type not in ("cpu", "gpu"):
            raise ValueError(f'device_type is {self._device_type!r}; give "cpu" or "gpu".')
        for name, function in (("loss", self._loss), ("output_fn", self._output_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} is a {type(function).__name__}, which cannot be called.")
        if self._optimizer is not None and not isinstance(self._optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(self._optimizer).__name__}; give a torch.optim.Optimizer.")

    def save(self, filename: str, path: str | None = None) -> None:
        """Write the model's weights and buffers to `path/filename.safetensors`, whole or not at all.

        Args:
            filename: with or without the suffix.
            path: folder, made where it is missing; None for ART's data folder, as in every estimator of ART.
        """
        target = _weights_file(filename, path)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        save_model(self.model, f"{target}.part")
        os.replace(f"{target}.part", target)

    def load(self, filename: str, path: str | None = None) -> None:
        """Read what `save` wrote into this segmenter's model.

        Raises:
            FileNotFoundError: no such file.
            RuntimeError: names or shapes in the file are not those of the model.
        """
        load_model(self.model, _weights_file(filename, path), strict=True, device=str(self.device))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={type(self.model).__name__}, nb_classes={self.nb_classes}, "
            f"input_shape={self.input_shape}, loss={self.loss}, clip_values={self.clip_values}, "
            f"preprocessing={self.preprocessing}, preprocessing_defences={self.preprocessing_defences}, "
            f"postprocessing_defences={self.postprocessing_defences}, ignore_index={self.ignore_index}, "
            f"device={self.device}{f', amp={self.amp!r}' if self.amp else ''})"
        )

    # ------------------------------------------------------------------------------------------------ inside

    def _forward(
        self, images: Tensor, labels: Tensor | None = None, *, fit: bool = False, frozen: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Preprocessing, model, unwrapping, resizing: logits and labels of every version of every image.

        `frozen` keeps the weights out of the graph.
        """
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        images = images.to(self.device, torch.float32 if weight is None else weight.dtype)
        inputs, labels = self._apply_preprocessing(images, labels, fit=fit, no_grad=False)
        conditions = self._conditions_for_versions(len(images), len(inputs))
        with conditions, self._precision(), sound_gradients(self.model, inputs):
            if frozen:
                weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
                output = torch.func.functional_call(self.model, weights, (inputs,))
            else:
                output = self.model(inputs)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        output = output if self._output_fn is None else self._output_fn(output)
        logits = logits_of(output, size, widen=self._amp is not None)
        if logits.shape[:2] != (len(inputs), self.nb_classes):
            raise ValueError(
                f"The model returned logits of shape {tuple(logits.shape)} for {len(inputs)} images; "
                f"nb_classes={self.nb_classes} asks for ({len(inputs)}, {self.nb_classes}, H, W)."
            )
        return (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits), labels

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._amp is None else torch.autocast(self.device.type, torch.bfloat16)

    def _apply_preprocessing(self, x: Any, y: Any, fit: bool = False, no_grad: bool = True) -> tuple[Any, Any]:
        """ART's method, for any chain of preprocessors and differentiable for all of them.

        ART's own refuses to mix PyTorch and NumPy preprocessors, and breaks the graph at the NumPy ones.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not no_grad):
            if isinstance(x, Tensor):
                return preprocess(self.preprocessing_operations, x, y, fit=fit)
            labels = None if y is None else torch.tensor(y, device=self.device)
            images, labels = preprocess(
                self.preprocessing_operations, torch.tensor(x, device=self.device), labels, fit=fit
            )
            return images.detach().cpu().numpy(), None if labels is None else labels.cpu().numpy()

    def _losses(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """(N,): the loss of each image, 0 for one without a counted pixel."""
        assert labels is not None  # preprocessors return the labels that they are given
        counted = (labels != self.ignore_index).flatten(1).sum(1)
        if self._loss is None:
            pixels = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="none")
            return pixels.flatten(1).sum(1) / counted.clamp(min=1)
        losses = [
            self._loss(logits[i : i + 1], labels[i : i + 1]).mean() if counted[i] else logits[i].sum() * 0
            for i in range(len(logits))
        ]
        return torch.stack(losses)

    @staticmethod
    def _averaged(values: Tensor, images: int) -> Tensor:
        """The mean over the versions of each image; `values` itself where there is one version."""
        return values if len(values) == images else values.unflatten(0, (images, -1)).mean(1)

    def _as_images(self, x: Any) -> Tensor:
        """`x` as a floating-point tensor, a NumPy array as a copy."""
        if not isinstance(x, (np.ndarray, Tensor)):
            raise TypeError(f"x is a {type(x).__name__}; give a NumPy array or a torch tensor.")
        images = torch.tensor(x) if isinstance(x, np.ndarray) else x
        if images.ndim != 4 or images.shape[1] != self.input_shape[0]:
            raise ValueError(
                f"x has shape {tuple(images.shape)}; images are (N, {self.input_shape[0]}, H, W), as in input_shape."
            )
        return images if images.is_floating_point() else images.float()

    def _as_labels(self, y: Any, images: Tensor) -> Tensor:
        """`y` as checked label maps (N, H, W) on the device."""
        labels = labels_of(y, self.nb_classes, self.ignore_index)
        given = y if y.ndim == 3 else labels  # before fractions are cut off
        check_labels(given, self.nb_classes, self.ignore_index, (len(images), *images.shape[-2:]))
        own = getattr(self._loss, "ignore_index", self.ignore_index)
        if own != self.ignore_index and bool((labels == self.ignore_index).any()):
            raise ValueError(
                f"y holds void pixels ({self.ignore_index}) and the loss ignores {own}; give both one ignore_index."
            )
        return labels.to(self.device)

    @contextmanager
    def _mode(self, *, training: bool) -> Iterator[None]:
        """The model in `train()` or `eval()` mode; every module's own flag is restored on the way out."""
        flags = [(module, module.training) for module in self.model.modules()]
        if all(flag == training for _, flag in flags):
            yield
            return
        try:
            self.model.train(training)
            yield
        finally:
            for module, flag in flags:
                module.training = flag

    def _current_conditions(self) -> Conditions | None:
        """The conditions under which the model runs; None for a model without a defended module."""
        modules = defended_modules(self.model)
        return cast(Conditions, modules[0].conditions) if modules else None

    def _in_batches(self, function: Callable[[slice], Tensor], images: int, batch_size: int) -> list[Tensor]:
        """`function` of each batch's slice, a random model under that batch's streams and one draw for all batches."""
        _positive(batch_size)
        current = self._current_conditions()
        streams = tuple(range(images)) if current is None or current.images is None else current.images
        if len(streams) != images:
            raise ValueError(f"conditions(images=...) names {len(streams)} streams for {images} images.")
        if current is not None and current.draw is None:
            self._own_draws += 1
            current = replace(current, draw=-self._own_draws)
        results = []
        for start in range(0, images, batch_size):
            part = slice(start, min(start + batch_size, images))
            with nullcontext() if current is None else self._under(replace(current, images=streams[part])):
                results.append(function(part))
        return results

    def _under(self, conditions: Conditions) -> AbstractContextManager[None]:
        return self.conditions(**vars(conditions))

    @contextmanager
    def _conditions_for_versions(self, images: int, versions: int) -> Iterator[None]:
        """Where a preprocessor made several versions of an image, all of them keep the image's random stream."""
        current = self._current_conditions() if images != versions else None
        if current is None:
            yield
            return
        streams = tuple(range(images)) if current.images is None else current.images
        repeated = tuple(stream for stream in streams for _ in range(versions // images))
        with self._under(replace(current, images=repeated)):
            yield


def _pair_of_floats(clip_values: Any) -> tuple[float, float]:
    if clip_values is None or isinstance(clip_values, Mapping) or len(clip_values) != 2:
        raise ValueError(f"clip_values is {clip_values!r}; give (smallest, largest) value of a pixel.")
    if any(np.ndim(value) for value in clip_values):
        raise ValueError("clip_values holds arrays; give two numbers, the same for all pixels.")
    low, high = (float(value) for value in clip_values)
    if not low < high:
        raise ValueError(f"clip_values is {(low, high)}; the first has to be smaller than the second.")
    return low, high


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    return batch_size


def _weights_file(filename: str, path: str | None) -> str:
    name = filename if filename.endswith(".safetensors") else f"{filename}.safetensors"
    return os.path.join(config.ART_DATA_PATH if path is None else path, name)


def _like(tensor: Tensor, x: Array) -> Array:
    """`tensor` as an array of the type of `x`, on its device."""
    if isinstance(x, Tensor):
        return tensor.to(x.device)
    return tensor.detach().cpu().numpy()
