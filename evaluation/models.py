"""Segmenters by name: the zoo's, torchvision's, segmentation-models-pytorch's, transformers', files and factories."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from evaluation.cards import KINDS, ZOO
from evaluation.cards import zoo as zoo
from evaluation.networks import ARCHITECTURES, build_network
from evaluation.training import MEAN, STD
from ramdefense.segmenter import PyTorchSegmenter

if TYPE_CHECKING:
    from torch import Tensor


def load_model(
    name: str,
    *,
    nb_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    pretrained: bool = True,
    device_type: str | None = None,
) -> PyTorchSegmenter:
    """A segmenter by name.

    Args:
        name: ``zoo:NAME`` (a shipped model); ``torchvision:NAME`` (a segmentation model with its default weights);
            ``smp:ARCH:ENCODER`` (an architecture of segmentation-models-pytorch with its ImageNet encoder);
            ``hf:NAME`` (a model of the transformers hub or a local folder of one); ``PATH.safetensors`` with the card
            ``PATH.json`` beside it, as ``ramdefense train`` writes it; ``module:function``, a factory without
            arguments that returns a `PyTorchSegmenter` or, with ``nb_classes`` and ``input_shape`` given here, an
            ``nn.Module``. ``NAME@PATH.safetensors`` loads weights of your own into it.
        nb_classes: classes of the output, where the name does not say.
        input_shape: ``(3, H, W)``, where the name does not say or you want another.
        pretrained: ``False`` leaves ``torchvision:`` and ``smp:`` models without downloaded weights.
        device_type: ``"cpu"`` or ``"gpu"``; ``None`` takes a GPU where there is one.

    Raises:
        ValueError: an unknown name; the message lists what is known.
        FileNotFoundError: no such file.
    """
    device_type = device_type or ("gpu" if torch.cuda.is_available() else "cpu")
    base, _, weights = name.partition("@")
    kind, _, rest = base.partition(":")
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    if kind == "zoo" or base.endswith(".safetensors"):
        path = ZOO / f"{rest}.safetensors" if kind == "zoo" else Path(base)
        if kind == "zoo" and not path.exists():
            near = difflib.get_close_matches(rest, zoo(), 1)
            hint = f"; did you mean 'zoo:{near[0]}'?" if near else ""
            raise ValueError(f"no model {rest!r} in the zoo{hint} It has: {', '.join(zoo())}")
        model, card = load_file(path)
        nb_classes, mean, std = len(card["classes"]), tuple(card["mean"]), tuple(card["std"])
        input_shape = input_shape or (3, *card["size"])
    elif kind == "torchvision":
        model, classes = _torchvision(rest, nb_classes, pretrained and not weights)
        nb_classes, input_shape = nb_classes or classes, input_shape or (3, 520, 520)
    elif kind == "smp":
        nb_classes = _needed(nb_classes, "nb_classes", name)
        model, input_shape = _smp(rest, nb_classes, pretrained and not weights), input_shape or (3, 512, 512)
    elif kind == "hf":
        model, classes, mean, std, shape = _transformers(rest)
        nb_classes, input_shape = classes, input_shape or shape
    elif rest:
        made = _factory(kind, rest)
        if isinstance(made, PyTorchSegmenter):
            return made
        model, mean, std = made, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        nb_classes = _needed(nb_classes, "nb_classes", name)
        input_shape = _needed(input_shape, "input_shape", name)
    else:
        raise ValueError(f"unknown model {name!r}; a model is {KINDS}")
    if weights:
        model.load_state_dict(_read(Path(weights)))
    return PyTorchSegmenter(
        model,
        nb_classes=nb_classes,
        input_shape=input_shape,
        preprocessing=(_per_channel(mean), _per_channel(std)),
        device_type=device_type,
    )


def load_file(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Network and card of ``PATH.safetensors`` and ``PATH.json``, as `evaluation.training.save` writes them.

    The card's ``recipe.architecture`` is a name of the zoo, ``smp:ARCH:ENCODER`` or ``module:function``.

    Raises:
        FileNotFoundError: one of the two files is missing.
    """
    weights = Path(path)
    card_path = weights.with_suffix(".json")
    for file in (weights, card_path):
        if not file.exists():
            raise FileNotFoundError(f"no file {file}; a model is a NAME.safetensors with its card NAME.json beside it")
    card = json.loads(card_path.read_text())
    architecture, nb_classes = card["recipe"]["architecture"], len(card["classes"])
    kind, _, rest = architecture.partition(":")
    if architecture in ARCHITECTURES or not rest:
        model = build_network(architecture, nb_classes)
    else:
        model = _smp(rest, nb_classes, pretrained=False) if kind == "smp" else _factory(kind, rest)
    model.load_state_dict(_read(weights))
    return model, card


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file as read

    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    return read(str(path))


def _per_channel(values: Sequence[float]) -> Any:
    import numpy as np

    return np.asarray(values, dtype=np.float32).reshape(3, 1, 1)


def _needed(value: Any, option: str, name: str) -> Any:
    if value is None:
        raise ValueError(f"model {name!r} does not say its {option}: give {option}=…")
    return value


def _torchvision(name: str, nb_classes: int | None, pretrained: bool) -> tuple[nn.Module, int]:
    from torchvision.models import get_model, get_model_weights, list_models, segmentation

    known = list_models(module=segmentation)
    if name not in known:
        raise ValueError(f"unknown torchvision segmentation model {name!r}; known: {', '.join(known)}")
    if pretrained:
        weights = get_model_weights(name).DEFAULT
        return get_model(name, weights=weights), len(weights.meta["categories"])
    classes = nb_classes or 21
    return get_model(name, weights=None, weights_backbone=None, num_classes=classes), classes


def _smp(name: str, nb_classes: int, pretrained: bool) -> nn.Module:
    import segmentation_models_pytorch as smp

    architecture, _, encoder = name.partition(":")
    if not encoder:
        raise ValueError(f"model 'smp:{name}' needs an encoder, as in 'smp:segformer:mit_b0'")
    return smp.create_model(
        architecture, encoder_name=encoder, encoder_weights="imagenet" if pretrained else None, classes=nb_classes
    )


def _transformers(name: str) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...], tuple[int, int, int]]:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"model 'hf:{name}' needs transformers: pip install 'ramdefense[transformers]'") from error
    config = transformers.AutoConfig.from_pretrained(name)
    universal = config.model_type in ("maskformer", "mask2former", "oneformer")
    task = "Universal" if universal else "Semantic"
    model = getattr(transformers, f"AutoModelFor{task}Segmentation").from_pretrained(name)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except OSError:  # a folder without a processor's file: ImageNet's statistics are transformers' own default
        mean, std = MEAN, STD
    size = getattr(config, "image_size", None) or 512
    height, width = (size, size) if isinstance(size, int) else size
    return model, config.num_labels, mean, std, (3, height, width)


def _factory(module: str, function: str) -> Any:
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"unknown model '{module}:{function}' ({error}); a model is {KINDS}") from error
    return make()
