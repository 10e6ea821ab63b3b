from __future__ import annotations

import copy
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.defences.postprocessor import HighConfidence
from art.defences.preprocessor import (
    FeatureSqueezing,
    JpegCompression,
    SpatialSmoothing,
    SpatialSmoothingPyTorch,
)
from art.defences.preprocessor.preprocessor import Preprocessor, PreprocessorPyTorch
from art.estimators.estimator import BaseEstimator, LossGradientsMixin, NeuralNetworkMixin
from art.preprocessing.expectation_over_transformation import EoTBrightnessPyTorch
from tiny import NB_CLASSES, SHAPE, coloured_shapes, linear_cnn, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn

from ramdefense.outputs import labels_of, logits_of
from ramdefense.segmenter import PyTorchSegmenter, SegmenterMixin
from ramdefense.traits import Conditions, Traits, conditions, traits_of

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Noisy(nn.Module):
    """A random defence: adds noise that is a function of draw, image stream and nothing else."""

    def __init__(self, straight_through: bool = False) -> None:
        super().__init__()
        self.traits = Traits(random=True, straight_through=straight_through)
        self.conditions = Conditions()
        self.seen: list[Conditions] = []
        self.own_draws = 0

    def forward(self, features: Tensor) -> Tensor:
        self.seen.append(self.conditions)
        draw = self.conditions.draw
        if draw is None:
            draw = self.own_draws
            self.own_draws += 1
        streams = self.conditions.images or tuple(range(len(features)))
        assert len(streams) == len(features)
        noise = [
            torch.randn(features.shape[1:], generator=torch.Generator().manual_seed(1000 * (draw + 500) + stream))
            for stream in streams
        ]
        return features + torch.stack(noise)


def noisy_segmenter(**options: Any) -> PyTorchSegmenter:
    model = nn.Sequential(linear_cnn(), nn.Sequential(Noisy(), nn.Identity()))
    return PyTorchSegmenter(model, NB_CLASSES, SHAPE, **options)


class Returning(nn.Module):
    """A convolution whose logits leave the model in some wrapping."""

    def __init__(self, wrap: Callable[[Tensor], Any], stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, NB_CLASSES, 3, padding=1, stride=stride)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.conv(images))


class AddOne:
    """A picklable loss of the user."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=255) + 1


def normalised(images: Tensor) -> Tensor:
    """`tiny_segmenter`'s preprocessing, written out."""
    mean, std = (torch.tensor(values, dtype=images.dtype)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def written_out_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(N,), pixel by pixel from the definition, for `tiny_segmenter`'s preprocessing."""
    log_probabilities = model(normalised(images)).log_softmax(1)
    losses = []
    for scores, target in zip(log_probabilities, labels, strict=True):
        pixels = [-scores[target[h, w], h, w] for h, w in np.ndindex(*target.shape) if target[h, w] != 255]
        losses.append(torch.stack(pixels).mean())
    return torch.stack(losses)


# ---------------------------------------------------------------------------------------------------- an estimator


def test_is_an_estimator_of_art_by_method_resolution_order(tiny_segmenter: PyTorchSegmenter) -> None:
    order = PyTorchSegmenter.__mro__
    assert {BaseEstimator, LossGradientsMixin, NeuralNetworkMixin, SegmenterMixin} <= set(order)
    assert tiny_segmenter.get_params().keys() == set(PyTorchSegmenter.estimator_params)
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (SegmenterMixin,), {})()


def test_model_is_the_callers_own_module() -> None:
    model = tiny_cnn()
    assert PyTorchSegmenter(model, NB_CLASSES, SHAPE).model is model


def test_clip_values_are_python_floats() -> None:
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE, clip_values=(np.float32(0), np.int64(1)))
    segmenter.set_params(ignore_index=0)
    assert all(type(value) is float for value in segmenter.clip_values)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nb_classes": 1}, ValueError, "nb_classes is 1"),
        ({"nb_classes": 2.5}, ValueError, "nb_classes is 2.5"),
        ({"input_shape": (16, 20)}, ValueError, r"input_shape is \(16, 20\)"),
        ({"clip_values": (1, 0)}, ValueError, "smaller"),
        ({"clip_values": None}, ValueError, "clip_values is None"),
        ({"clip_values": (np.zeros(3), np.ones(3))}, ValueError, "arrays"),
        ({"channels_first": False}, ValueError, "channels_first"),
        ({"device_type": "cuda"}, ValueError, "device_type is 'cuda'"),
        ({"ignore_index": None}, ValueError, "ignore_index is None"),
        ({"preprocessing": (0.5, 0.0)}, ValueError, "standard deviation"),
        ({"preprocessing": (0.5,)}, ValueError, "preprocessing"),
        ({"loss": "dice"}, TypeError, "loss is a str"),
        ({"output_fn": 3}, TypeError, "output_fn is a int"),
        ({"optimizer": 0.1}, TypeError, "optimizer is a float"),
        ({"model": lambda x: x}, TypeError, "model is a function"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": tiny_cnn(), "nb_classes": NB_CLASSES, "input_shape": SHAPE, **options}
    with pytest.raises(error, match=message):
        PyTorchSegmenter(**arguments)


def test_set_params_changes_all_or_nothing(tiny_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    before, params = tiny_segmenter.predict(x), tiny_segmenter.get_params()
    for refused in ({"nb_classes": 0}, {"clip_values": (1, 0)}, {"model": "resnet"}, {"colour": 3}):
        with pytest.raises((ValueError, TypeError)):
            tiny_segmenter.set_params(preprocessing=(0.1, 2.0), preprocessing_defences=SpatialSmoothing(), **refused)
        assert tiny_segmenter.get_params() == params
        assert np.array_equal(tiny_segmenter.predict(x), before)


def test_set_params_takes_effect(tiny_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    tiny_segmenter.set_params(model=linear_cnn(), preprocessing=((0.1,) * 3, (0.5,) * 3), ignore_index=7)
    expected = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing=(0.1, 0.5), ignore_index=7)
    assert np.allclose(tiny_segmenter.predict(x), expected.predict(x), atol=1e-6)
    assert tiny_segmenter.all_framework_preprocessing  # ART makes a NumPy preprocessor of a tuple given later
    assert tiny_segmenter.ignore_index == 7
    assert "ignore_index=7" in repr(tiny_segmenter)


def test_gpu_without_cuda_is_the_cpu(x: np.ndarray) -> None:
    segmenter = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE, device_type="gpu")
    assert segmenter.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert segmenter.predict(x).shape == (5, NB_CLASSES, *SHAPE[1:])
    segmenter.set_params(device_type="cpu")
    assert next(segmenter.model.parameters()).device == segmenter.device == torch.device("cpu")


def test_learning_phase_helpers_of_art(tiny_segmenter: PyTorchSegmenter) -> None:
    tiny_segmenter.model.train()
    tiny_segmenter.set_batchnorm(train=False)
    tiny_segmenter.set_dropout(train=False)
    assert [module.training for module in tiny_segmenter.model] == [True, False, True, True, False, True, True]


# ---------------------------------------------------------------------------------------------------- predictions


def test_logits_are_those_of_the_model_on_normalised_images(tiny_segmenter: PyTorchSegmenter, images: Tensor) -> None:
    expected = tiny_segmenter.model.eval()(normalised(images))
    assert torch.allclose(tiny_segmenter.logits(images), expected, atol=1e-6)
    for batch_size in (1, 2, 5, 99):
        assert torch.allclose(tiny_segmenter.predict(images, batch_size=batch_size), expected, atol=1e-5)


def test_channel_values_stay_channel_values_in_an_image_three_pixels_wide() -> None:
    images = torch.rand(2, 3, 4, 3)
    segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, (3, 4, 3), preprocessing=(MEAN, STD))
    assert torch.allclose(segmenter.logits(images), segmenter.model(normalised(images)), atol=1e-6)


def test_numpy_and_torch_in_the_same_out(tiny_segmenter: PyTorchSegmenter, images: Tensor, x: np.ndarray) -> None:
    assert isinstance(tiny_segmenter.predict(x), np.ndarray)
    assert isinstance(tiny_segmenter.predict(images), Tensor)
    assert not tiny_segmenter.predict(images).requires_grad
    assert np.array_equal(tiny_segmenter.predict(x), tiny_segmenter.predict(images).numpy())
    assert tiny_segmenter.predict(x.astype(np.float64)).dtype == np.float32
    labels = tiny_segmenter.predict_labels(x)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, tiny_segmenter.predict(x).argmax(1))
    assert np.array_equal(labels, tiny_segmenter.predict_labels(images).numpy())


def test_no_image_gives_no_prediction(tiny_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    assert tiny_segmenter.predict(x[:0]).shape == (0, NB_CLASSES, *SHAPE[1:])


def test_read_only_arrays_are_taken(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    x.flags.writeable = y.flags.writeable = False
    tiny_segmenter.predict(x)
    tiny_segmenter.loss_gradient(x, y)


def test_images_of_another_size(tiny_segmenter: PyTorchSegmenter) -> None:
    assert tiny_segmenter.predict(torch.rand(2, 3, 10, 7)).shape == (2, NB_CLASSES, 10, 7)


@pytest.mark.parametrize("shape", [(3, 16, 20), (2, 1, 16, 20), (2, 16, 20, 3)])
def test_shapes_that_do_not_fit_are_refused(tiny_segmenter: PyTorchSegmenter, shape: tuple[int, ...]) -> None:
    for images in (torch.zeros(shape), np.zeros(shape, dtype=np.float32)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
            tiny_segmenter.predict(images)
    with pytest.raises(TypeError, match="list"):
        tiny_segmenter.predict([[0.0]])


def test_mode_and_weights_are_left_as_they_were(
    tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray, images: Tensor
) -> None:
    model = tiny_segmenter.model
    for pattern in itertools.product([True, False], repeat=2):
        model.train(pattern[0])
        model[1].training = pattern[1]  # a batch norm that its owner froze, or the other way round
        flags = [module.training for module in model.modules()]
        model[0].weight.requires_grad_(pattern[0])
        state = copy.deepcopy(model.state_dict())
        predictions = tiny_segmenter.predict(x)
        tiny_segmenter.loss_gradient(x, y)
        tiny_segmenter.compute_loss(x, y)
        tiny_segmenter.logits(images)
        tiny_segmenter.get_activations(x, 1)
        tiny_segmenter.get_activations(images.clone().requires_grad_(), 1, framework=True).sum().backward()
        with pytest.raises(ValueError, match="input_shape"):
            tiny_segmenter.predict(images[0])
        assert [module.training for module in model.modules()] == flags
        assert model[0].weight.requires_grad is pattern[0]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert np.array_equal(predictions, tiny_segmenter.predict(x)), "dropout or batch statistics were active"


def test_mode_is_restored_after_an_exception_in_the_model(images: Tensor) -> None:
    segmenter = PyTorchSegmenter(Returning(lambda logits: (logits, logits)), NB_CLASSES, SHAPE)
    with pytest.raises(TypeError):
        segmenter.predict(images)
    assert all(module.training for module in segmenter.model.modules())


def test_training_mode_on_request(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    first, second = (tiny_segmenter.predict(x, training_mode=True) for _ in range(2))
    assert not np.array_equal(first, second)  # dropout
    gradients = [tiny_segmenter.loss_gradient(x, y, training_mode=True) for _ in range(2)]
    assert not np.array_equal(*gradients)


def test_double_and_half_models_take_and_give_what_everything_else_does(x: np.ndarray, y: np.ndarray) -> None:
    expected = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing=(MEAN, STD))
    for model, tolerance in ((linear_cnn().double(), 1e-6), (linear_cnn().bfloat16(), 0.05)):
        segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE, preprocessing=(MEAN, STD))
        assert segmenter.predict(x).dtype == segmenter.loss_gradient(x, y).dtype == np.float32
        assert np.allclose(segmenter.predict(x), expected.predict(x), atol=tolerance)


def test_postprocessing_acts_on_predictions_only(x: np.ndarray, y: np.ndarray, images: Tensor) -> None:
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    segmenter = PyTorchSegmenter(
        linear_cnn(), NB_CLASSES, SHAPE, postprocessing_defences=HighConfidence(cutoff=0.2)
    )
    predictions = plain.predict(x)
    expected = np.where(predictions < 0.2, 0, predictions)
    assert not np.array_equal(predictions, expected)
    assert np.array_equal(segmenter.predict(x), expected)
    assert np.array_equal(segmenter.predict(images).numpy(), expected)
    assert np.array_equal(segmenter.loss_gradient(x, y), plain.loss_gradient(x, y))


# ---------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"out": logits, "aux": logits.sum()},
        lambda logits: {"logits": logits},
        lambda logits: OrderedDict(logits=logits),
        lambda logits: SimpleNamespace(logits=logits, loss=None),
    ],
)
@pytest.mark.parametrize("stride", [1, 4])
def test_wrapped_and_small_logits(wrap: Callable, stride: int, x: np.ndarray, y: np.ndarray) -> None:
    plain = PyTorchSegmenter(Returning(lambda logits: logits, stride), NB_CLASSES, SHAPE)
    segmenter = PyTorchSegmenter(Returning(wrap, stride), NB_CLASSES, SHAPE)
    expected = F.interpolate(plain.model(torch.tensor(x)), SHAPE[1:], mode="bilinear", align_corners=False)
    assert np.allclose(segmenter.predict(x), expected.detach().numpy(), atol=1e-6)
    assert np.array_equal(segmenter.loss_gradient(x, y), plain.loss_gradient(x, y))
    assert np.abs(plain.loss_gradient(x, y)).max() > 0


def test_class_queries_become_the_log_of_their_scores() -> None:
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 7, NB_CLASSES + 1).double(), torch.randn(2, 7, 4, 5).double()
    output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks, logits=None)
    expected = torch.zeros(2, NB_CLASSES, 4, 5, dtype=torch.float64)
    for n, c, h, w in np.ndindex(*expected.shape):
        for q in range(7):
            probability = classes[n, q].exp()[c] / classes[n, q].exp().sum()
            expected[n, c, h, w] += probability / (1 + (-masks[n, q, h, w]).exp())
    assert torch.allclose(logits_of(output).exp(), expected, atol=1e-5)
    larger = logits_of(output, (8, 10))
    assert torch.allclose(larger.exp(), F.interpolate(expected, (8, 10), mode="bilinear"), atol=1e-5)
    # A class that no query claims has a finite score, and a gradient back to the queries.
    masks = torch.full_like(masks, -200).requires_grad_()
    output = {"class_queries_logits": classes, "masks_queries_logits": masks}
    (gradient,) = torch.autograd.grad(logits_of(output).sum(), masks)
    assert torch.isfinite(gradient).all()


@pytest.mark.slow  # imports
def test_torchvision_models(x: np.ndarray, y: np.ndarray) -> None:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NB_CLASSES)
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    assert torch.allclose(torch.tensor(segmenter.predict(x)), model.eval()(torch.tensor(x))["out"], atol=1e-5)
    assert np.abs(segmenter.loss_gradient(x, y)).max() > 0


@pytest.mark.slow  # imports
def test_transformers_models(x: np.ndarray, y: np.ndarray) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ones = [1, 1, 1, 1]
    config = transformers.SegformerConfig(
        num_labels=NB_CLASSES,
        depths=ones,
        num_attention_heads=ones,
        sr_ratios=ones,
        hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=16,
    )
    segmenter = PyTorchSegmenter(transformers.SegformerForSemanticSegmentation(config), NB_CLASSES, SHAPE)
    assert segmenter.predict(x).shape == (5, NB_CLASSES, *SHAPE[1:])
    assert np.abs(segmenter.loss_gradient(x, y)).max() > 0


def test_class_queries_agree_with_the_postprocessing_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    output = SimpleNamespace(
        class_queries_logits=3 * torch.randn(2, 7, NB_CLASSES + 1), masks_queries_logits=3 * torch.randn(2, 7, 96, 96)
    )
    processor = transformers.MaskFormerImageProcessor()
    expected = processor.post_process_semantic_segmentation(output, target_sizes=[(40, 50)] * 2)
    assert torch.equal(logits_of(output, (40, 50)).argmax(1), torch.stack(expected))


@pytest.mark.parametrize(
    ("wrap", "described"),
    [
        (lambda logits: (logits, logits), r"tuple of \['Tensor', 'Tensor'\]"),
        (lambda logits: {"main": logits}, r"dict with the keys \['main'\]"),
        (lambda logits: None, "NoneType"),
    ],
)
def test_unknown_outputs_are_named_with_the_remedy(wrap: Callable, described: str, images: Tensor) -> None:
    with pytest.raises(TypeError, match=f"{described}.*output_fn"):
        PyTorchSegmenter(Returning(wrap), NB_CLASSES, SHAPE).logits(images)


def test_output_fn_is_the_remedy(images: Tensor) -> None:
    segmenter = PyTorchSegmenter(
        Returning(lambda logits: (None, logits[:, :, ::2, ::2])), NB_CLASSES, SHAPE, output_fn=lambda output: output[1]
    )
    small = segmenter.model.conv(images)[:, :, ::2, ::2]
    assert torch.equal(segmenter.logits(images), F.interpolate(small, SHAPE[1:], mode="bilinear"))


def test_wrong_number_of_classes_or_dimensions(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(5, 4, 16, 20\).*nb_classes=7"):
        PyTorchSegmenter(linear_cnn(), 7, SHAPE).logits(images)
    with pytest.raises(ValueError, match=r"\(5, 4\)"):
        PyTorchSegmenter(Returning(lambda logits: logits.mean((2, 3))), NB_CLASSES, SHAPE).logits(images)


# ---------------------------------------------------------------------------------------------------- loss, gradient


def test_loss_is_the_mean_over_the_counted_pixels(
    tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor
) -> None:
    expected = written_out_loss(tiny_segmenter.model.eval(), images, labels)
    for batch_size in (2, 16):
        assert torch.allclose(tiny_segmenter.compute_loss(images, labels, batch_size=batch_size), expected, atol=1e-5)
    losses = tiny_segmenter.compute_loss(images.numpy(), labels.numpy())
    assert isinstance(losses, np.ndarray)
    assert losses.shape == (5,)
    assert tiny_segmenter.compute_loss(images, labels, "mean").item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert tiny_segmenter.compute_loss(images, labels, "sum").item() == pytest.approx(expected.sum().item(), rel=1e-5)
    (total,) = tiny_segmenter.compute_losses(images, labels).values()
    assert torch.equal(total, tiny_segmenter.compute_loss(images, labels))
    with pytest.raises(ValueError, match="reduction is 'max'"):
        tiny_segmenter.compute_loss(images, labels, "max")


def test_gradient_equals_autograd_written_out(tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor) -> None:
    inputs = images.clone().requires_grad_()
    written_out_loss(tiny_segmenter.model.eval(), inputs, labels).mean().backward()
    gradient = tiny_segmenter.loss_gradient(images, labels)
    assert torch.allclose(gradient, inputs.grad, rtol=1e-4, atol=1e-9)
    assert gradient.abs().max() > 1e-5


def test_gradient_equals_finite_differences_in_float64(labels: Tensor) -> None:
    images = random_images().double()
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, NB_CLASSES, 3, stride=2)).double()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE, preprocessing=(MEAN, STD))
    gradient = segmenter.loss_gradient(images, labels)
    single = PyTorchSegmenter(copy.deepcopy(model).float(), NB_CLASSES, SHAPE, preprocessing=(MEAN, STD))
    assert torch.allclose(single.loss_gradient(images.float(), labels), gradient.float(), rtol=1e-3, atol=1e-7)
    generator, step = torch.Generator().manual_seed(3), 1e-5
    for _ in range(40):
        index = tuple(int(torch.randint(0, size, (), generator=generator)) for size in images.shape)
        moved = torch.zeros_like(images)
        moved[index] = step
        high, low = (segmenter.compute_loss(images + sign * moved, labels, "mean") for sign in (1, -1))
        assert (high - low).item() / (2 * step) == pytest.approx(gradient[index].item(), rel=1e-5, abs=1e-10)


def test_gradient_of_a_linear_model_in_closed_form(linear_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    """∂L/∂x = Kᵀ(softmax − onehot)/(pixels·N): the transposed convolution of the residuals."""
    y = random_labels(void=False).numpy()
    one_hot = F.one_hot(torch.tensor(y), NB_CLASSES).movedim(3, 1)
    residual = torch.tensor(linear_segmenter.predict(x)).softmax(1) - one_hot
    expected = F.conv_transpose2d(residual / (5 * 16 * 20), linear_segmenter.model.weight, padding=1)
    assert np.allclose(linear_segmenter.loss_gradient(x, y), expected.detach().numpy(), rtol=1e-4, atol=1e-8)


def test_gradient_has_shape_array_and_number_type_of_the_images(
    tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor
) -> None:
    expected = tiny_segmenter.loss_gradient(images, labels)
    for given in (images.numpy(), images.numpy().astype(np.float64), images.double(), images.clone().requires_grad_()):
        gradient = tiny_segmenter.loss_gradient(given, labels)
        assert type(gradient) is type(given)
        assert gradient.dtype == given.dtype
        assert np.allclose(np.asarray(gradient), expected.numpy(), rtol=1e-4, atol=1e-8)
    with torch.no_grad():
        assert torch.equal(tiny_segmenter.loss_gradient(images, labels), expected)


def test_labels_in_every_form_agree(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    expected = tiny_segmenter.loss_gradient(x, y)
    one_hot = np.stack([y == c for c in range(NB_CLASSES)], axis=1).astype(np.float32)  # void pixels have no class
    logits = 5 * one_hot - 1 + 0.1 * np.random.default_rng(0).random(one_hot.shape)
    no_void = random_labels(void=False).numpy()
    for form in (y, y.astype(np.uint8), y.astype(np.float32), one_hot, one_hot.astype(bool), torch.tensor(one_hot)):
        assert np.array_equal(tiny_segmenter.loss_gradient(x, form), expected)
        assert np.array_equal(tiny_segmenter.compute_loss(x, form), tiny_segmenter.compute_loss(x, y))
    shown = np.where(y == 255, logits.argmax(1), y)
    assert np.array_equal(tiny_segmenter.loss_gradient(x, logits), tiny_segmenter.loss_gradient(x, shown))
    assert not np.array_equal(expected, tiny_segmenter.loss_gradient(x, no_void))
    assert labels_of(torch.tensor(y), NB_CLASSES).dtype == torch.int64


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (random_labels(4), ValueError, "does not fit"),
        (random_labels().mT, ValueError, "does not fit"),
        (random_labels()[0], ValueError, r"\(16, 20\)"),
        (torch.zeros(5, 3, 16, 20), ValueError, r"\(N, 4, H, W\)"),
        (random_labels() + 2, ValueError, "labels"),
        (random_labels().float() + 0.5, ValueError, "whole numbers"),
        (None, TypeError, "NoneType"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    tiny_segmenter: PyTorchSegmenter, images: Tensor, y: Any, error: type[Exception], message: str
) -> None:
    for call in (tiny_segmenter.loss_gradient, tiny_segmenter.compute_loss):
        with pytest.raises(error, match=message):
            call(images, y)


@pytest.mark.parametrize("void", [255, -100, 3])
def test_void_pixels_count_nowhere(images: Tensor, void: int) -> None:
    """Whatever the model says at void pixels, the loss is the same; and their own gradient is zero in a 1×1 model."""
    model = nn.Conv2d(3, NB_CLASSES, 1)
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE, ignore_index=void)
    labels = torch.where(random_labels() == 255, void, random_labels() % 3)
    region = labels == void
    changed = torch.where(region[:, None], 1 - images, images)
    assert region.any()
    assert torch.allclose(segmenter.compute_loss(changed, labels), segmenter.compute_loss(images, labels), atol=1e-6)
    gradient = segmenter.loss_gradient(images, labels)
    assert (gradient.movedim(1, 3)[region] == 0).all()
    assert (gradient.movedim(1, 3)[~region] != 0).any()


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(ignore_index=255)])
def test_an_image_of_void_pixels_only_gives_zero(loss: Any, images: Tensor, labels: Tensor) -> None:
    segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, loss)
    void = labels.clone()
    void[2] = 255
    losses, gradient = segmenter.compute_loss(images, void), segmenter.loss_gradient(images, void)
    assert losses[2] == 0
    assert (losses[[0, 1, 3, 4]] > 0).all()
    assert (gradient[2] == 0).all()
    others = [0, 1, 3, 4]
    assert torch.allclose(gradient[others], segmenter.loss_gradient(images, labels)[others], atol=1e-8)
    void[:] = 255
    assert (segmenter.compute_loss(images, void) == 0).all()
    assert (segmenter.loss_gradient(images, void) == 0).all()


def test_a_loss_of_the_users(images: Tensor, labels: Tensor) -> None:
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    cross_entropy = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, nn.CrossEntropyLoss(ignore_index=255))
    plus_one = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, AddOne())
    expected = plain.compute_loss(images, labels)
    assert torch.allclose(cross_entropy.compute_loss(images, labels), expected, atol=1e-6)
    assert torch.allclose(plus_one.compute_loss(images, labels), expected + 1, atol=1e-6)
    for segmenter in (cross_entropy, plus_one):
        gradient = segmenter.loss_gradient(images, labels)
        assert torch.allclose(gradient, plain.loss_gradient(images, labels), atol=1e-7)
    unreduced = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, nn.CrossEntropyLoss(reduction="none"))
    full = random_labels(void=False)
    assert torch.allclose(unreduced.compute_loss(images, full), plain.compute_loss(images, full), atol=1e-6)
    with pytest.raises(ValueError, match="the loss ignores -100"):
        unreduced.loss_gradient(images, labels)


def test_one_image_does_not_depend_on_its_neighbours(tiny_segmenter: PyTorchSegmenter, images: Tensor) -> None:
    labels = random_labels()
    labels[0, :14] = 255  # few counted pixels in one image change nothing for the others
    together = tiny_segmenter.loss_gradient(images, labels)
    for i in range(5):
        alone = tiny_segmenter.loss_gradient(images[i : i + 1], labels[i : i + 1])[0]
        assert torch.allclose(together[i], alone / 5, rtol=1e-4, atol=1e-9)


def test_compute_loss_of_a_tensor_keeps_its_gradient(tiny_segmenter: PyTorchSegmenter, labels: Tensor) -> None:
    images = random_images().requires_grad_()
    (gradient,) = torch.autograd.grad(tiny_segmenter.compute_loss(images, labels, batch_size=2).mean(), images)
    assert torch.allclose(gradient, tiny_segmenter.loss_gradient(images.detach(), labels), rtol=1e-4, atol=1e-9)
    assert not tiny_segmenter.compute_loss(images.detach(), labels).requires_grad


# ---------------------------------------------------------------------------------------------------- preprocessing


class Squaring(Preprocessor):
    """Not differentiable by torch; says itself that its gradient is 2x."""

    def __init__(self, apply_fit: bool = False, apply_predict: bool = True) -> None:
        super().__init__(is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)

    def __call__(self, x: np.ndarray, y: Any = None) -> tuple[np.ndarray, Any]:
        x *= x  # in place, as some of ART's own
        return x.astype(np.float64), y

    def estimate_gradient(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        return 2 * x * grad


DEFENCES = {
    "SpatialSmoothing": lambda: SpatialSmoothing(window_size=3, channels_first=True),
    "FeatureSqueezing": lambda: FeatureSqueezing(clip_values=(0, 1), bit_depth=3),
    "JpegCompression": lambda: JpegCompression(clip_values=(0, 1), quality=50, channels_first=True),
    "SpatialSmoothingPyTorch": lambda: SpatialSmoothingPyTorch(window_size=3, channels_first=True, device_type="cpu"),
    "Squaring": Squaring,
}


@pytest.mark.parametrize("name", DEFENCES)
def test_preprocessing_defences(name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Forward: the model sees the defended images. Backward: the defence's own estimate of its gradient."""
    defence = DEFENCES[name]()
    segmenter = PyTorchSegmenter(
        linear_cnn(), NB_CLASSES, SHAPE, preprocessing=(MEAN, STD), preprocessing_defences=defence
    )
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing=(MEAN, STD))
    defended = defence(x.copy())[0].astype(np.float32)
    assert np.abs(defended - x).max() > 0.01
    assert np.allclose(segmenter.predict(x), plain.predict(defended), atol=1e-5)
    assert np.allclose(segmenter.compute_loss(x, y), plain.compute_loss(defended, y), atol=1e-5)
    expected = defence.estimate_gradient(x, plain.loss_gradient(defended, y))
    gradient = segmenter.loss_gradient(x, y)
    assert gradient.dtype == np.float32
    assert np.allclose(gradient, expected, rtol=1e-4, atol=1e-8)
    assert np.abs(gradient).max() > 1e-5
    tensor_gradient = segmenter.loss_gradient(torch.tensor(x), torch.tensor(y))
    assert np.array_equal(tensor_gradient.numpy(), gradient)


def test_torch_and_numpy_defences_mix_in_any_order(x: np.ndarray, y: np.ndarray) -> None:
    """ART itself refuses these chains."""
    smoothing, squaring = DEFENCES["SpatialSmoothingPyTorch"](), Squaring()
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    for chain in ([smoothing, squaring], [squaring, smoothing], [squaring, squaring, smoothing]):
        segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing_defences=chain)
        defended, gradient = x.copy(), None
        seen = []
        for step in chain:
            seen.append(defended)
            defended = step(defended.copy())[0].astype(np.float32)
        gradient = plain.loss_gradient(defended, y)
        for step, before in zip(chain[::-1], seen[::-1], strict=True):
            gradient = step.estimate_gradient(before, gradient)
        assert np.allclose(segmenter.loss_gradient(x, y), gradient, rtol=1e-4, atol=1e-8)


class Blackening(PreprocessorPyTorch):
    """Writes into the tensor that it is given."""

    def __init__(self) -> None:
        super().__init__(device_type="cpu", is_fitted=True)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        x[..., :10] = 0
        return x, y


def test_a_preprocessor_that_writes_into_its_input_spares_the_callers(images: Tensor, labels: Tensor) -> None:
    segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing_defences=Blackening())
    assert torch.allclose(segmenter.predict(images)[..., :8], segmenter.predict(0 * images)[..., :8], atol=1e-6)
    gradient = segmenter.loss_gradient(images, labels)
    assert (gradient[..., :10] == 0).all()
    assert (gradient[..., 10:] != 0).any()


def test_defences_act_where_they_say(x: np.ndarray) -> None:
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    off = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing_defences=Squaring(apply_predict=False))
    assert np.array_equal(off.predict(x), plain.predict(x))


def test_arts_own_preprocessing_methods_agree_with_the_path(x: np.ndarray, y: np.ndarray) -> None:
    segmenter = PyTorchSegmenter(
        linear_cnn(), NB_CLASSES, SHAPE, preprocessing=(MEAN, STD), preprocessing_defences=Squaring()
    )
    inputs, labels = segmenter._apply_preprocessing(x, y)
    assert np.array_equal(labels, y)
    assert np.allclose(segmenter.model(torch.tensor(inputs)).detach().numpy(), segmenter.predict(x), atol=1e-5)
    back = segmenter._apply_preprocessing_gradient(x, np.ones_like(x))
    assert np.allclose(back, 2 * x / np.array(STD)[:, None, None], rtol=1e-5)
    logits, _ = segmenter._predict_framework(torch.tensor(x).requires_grad_())
    assert logits.requires_grad
    assert np.allclose(logits.detach().numpy(), segmenter.predict(x), atol=1e-5)


def test_expectation_over_transformation_repeats_images_and_labels(x: np.ndarray, y: np.ndarray) -> None:
    """Three brightnesses of each image: logits and losses are averaged, the gradient is that of the mean loss."""
    eot = EoTBrightnessPyTorch(nb_samples=3, clip_values=(0.0, 1.0), delta=0.2)
    segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, preprocessing_defences=eot)
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    np.random.seed(0)  # noqa: NPY002 (ART draws from the global generator)
    deltas = np.random.uniform(  # noqa: NPY002
        -0.2, 0.2, size=(5, 3)
    ).astype(np.float32)
    bright = [(x[:, None] + deltas[:, :, None, None, None])[:, k].clip(0, 1) for k in range(3)]

    def replayed(call: Callable[[], np.ndarray]) -> np.ndarray:
        np.random.seed(0)  # noqa: NPY002
        return call()

    mean_logits = np.mean([plain.predict(version) for version in bright], axis=0)
    assert np.allclose(replayed(lambda: segmenter.predict(x)), mean_logits, atol=1e-5)
    mean_loss = np.mean([plain.compute_loss(version, y) for version in bright], axis=0)
    assert np.allclose(replayed(lambda: segmenter.compute_loss(x, y)), mean_loss, atol=1e-5)
    gradients = [
        plain.loss_gradient(version, y)
        * ((x + deltas[:, k, None, None, None] > 0) & (x + deltas[:, k, None, None, None] < 1))
        for k, version in enumerate(bright)
    ]
    gradient = replayed(lambda: segmenter.loss_gradient(x, y))
    assert gradient.shape == x.shape
    assert np.allclose(gradient, np.mean(gradients, axis=0), rtol=1e-3, atol=1e-7)


# ---------------------------------------------------------------------------------------------------- inner layers


def test_activations_by_name_and_index(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, images: Tensor) -> None:
    model, names = tiny_segmenter.model.eval(), tiny_segmenter.layer_names
    expected = model[:3](normalised(images)).detach().numpy()
    assert names == ["0", "1", "2", "3", "4", "5", "6"]
    for layer in ("2", 2, -5):
        for batch_size in (2, 16):
            activations = tiny_segmenter.get_activations(x, layer, batch_size)
            assert isinstance(activations, np.ndarray)
            assert np.allclose(activations, expected, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    for layer, error in (("9", ValueError), (7, ValueError), (None, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="layer is"):
            tiny_segmenter.get_activations(x, layer)


def test_activations_in_the_framework_lead_back_to_the_images_only(
    tiny_segmenter: PyTorchSegmenter, images: Tensor
) -> None:
    inputs = images.clone().requires_grad_()
    tiny_segmenter.get_activations(inputs, "3", framework=True).square().sum().backward()
    reference = images.clone().requires_grad_()
    tiny_segmenter.model.eval()[:4](normalised(reference)).square().sum().backward()
    assert torch.allclose(inputs.grad, reference.grad, rtol=1e-4, atol=1e-6)
    tiny_segmenter.model.zero_grad()
    tiny_segmenter.get_activations(inputs, "3", framework=True).sum().backward()
    assert all(parameter.grad is None for parameter in tiny_segmenter.model.parameters())


def test_activations_that_are_not_there(images: Tensor) -> None:
    model = Returning(lambda logits: logits)
    model.unused = nn.Identity()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    with pytest.raises(ValueError, match="does not call the module 'unused'"):
        segmenter.get_activations(images, "unused")
    nested = PyTorchSegmenter(nn.Sequential(Returning(lambda logits: {"out": logits})), NB_CLASSES, SHAPE)
    with pytest.raises(TypeError, match="returns a dict"):
        nested.get_activations(images, "0")


# ---------------------------------------------------------------------------------------------------- training


def test_fit_learns_a_task() -> None:
    model = tiny_cnn(seed=2)
    segmenter = PyTorchSegmenter(
        model, NB_CLASSES, SHAPE, optimizer=torch.optim.Adam(model.parameters(), lr=0.02), preprocessing=(0.5, 0.25)
    )
    images, labels = coloured_shapes(24)
    labels[:, 0] = 255
    before = segmenter.compute_loss(images, labels, "mean")
    segmenter.fit(images.numpy(), labels.numpy(), batch_size=5, nb_epochs=12)
    test_images, test_labels = coloured_shapes(12, seed=9)
    accuracy = (segmenter.predict_labels(test_images) == test_labels).float().mean()
    assert segmenter.compute_loss(images, labels, "mean") < before / 3
    assert accuracy > 0.95
    model.eval()
    segmenter.fit(images, labels, nb_epochs=1)
    assert not model.training, "the training flags were not restored"


def test_fit_is_the_loop_written_out() -> None:
    images, labels = coloured_shapes(7)
    model, copied = linear_cnn(), linear_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    PyTorchSegmenter(model, NB_CLASSES, SHAPE, optimizer=optimizer).fit(
        images, labels, batch_size=3, nb_epochs=2, scheduler=scheduler, generator=torch.Generator().manual_seed(4)
    )
    generator = torch.Generator().manual_seed(4)
    for rate in (0.5, 0.25):
        order = torch.randperm(7, generator=generator)
        for chosen in (order[:3], order[3:6], order[6:]):  # the last, smaller batch is used too
            loss = F.cross_entropy(copied(images[chosen]), labels[chosen])
            gradients = torch.autograd.grad(loss, list(copied.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(copied.parameters(), gradients, strict=True):
                    parameter -= rate * gradient
    assert torch.allclose(model.weight, copied.weight, atol=1e-6)
    assert scheduler.last_epoch == 2


def test_fit_is_reproducible_and_shuffles() -> None:
    images, labels = coloured_shapes(6)

    def fitted(seed: int | None) -> Tensor:
        model = linear_cnn()
        segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        segmenter.fit(images, labels, batch_size=2, nb_epochs=1, generator=generator)
        return model.weight.detach()

    assert torch.equal(fitted(None), fitted(None))
    assert torch.equal(fitted(None), fitted(0))
    assert not torch.equal(fitted(1), fitted(2))


def test_fit_uses_defences_for_training_and_the_users_loss() -> None:
    images, labels = coloured_shapes(4)

    def fitted(x: Tensor, loss: Any, **options: Any) -> PyTorchSegmenter:
        segmenter = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, loss, **options)
        segmenter.set_params(optimizer=torch.optim.SGD(segmenter.model.parameters(), lr=0.2))
        segmenter.fit(x, labels, batch_size=2, nb_epochs=4)
        return segmenter

    training_only = fitted(images, AddOne(), preprocessing_defences=Squaring(apply_fit=True, apply_predict=False))
    assert torch.allclose(training_only.model.weight, fitted(images.square(), None).model.weight, atol=1e-6)
    prediction_only = fitted(images, lambda logits, labels: 0 * logits.sum(), preprocessing_defences=Squaring())
    assert torch.equal(prediction_only.model.weight, linear_cnn().weight)  # trained by the loss that was given
    defended = fitted(images, None, preprocessing_defences=Squaring())
    assert torch.equal(defended.model.weight, fitted(images, None).model.weight)


def test_a_batch_of_void_pixels_only_does_no_harm() -> None:
    images, labels = coloured_shapes(4)
    labels[:] = 255
    model = linear_cnn()
    for loss in (None, nn.CrossEntropyLoss(ignore_index=255)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        PyTorchSegmenter(model, NB_CLASSES, SHAPE, loss, optimizer).fit(images, labels, nb_epochs=2)
    assert torch.equal(model.weight, linear_cnn().weight)


def test_fit_without_a_usable_optimizer(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    with pytest.raises(ValueError, match="needs an optimizer"):
        tiny_segmenter.fit(x, y)
    tiny_segmenter.set_params(optimizer=torch.optim.SGD(tiny_cnn().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no parameter of this model"):
        tiny_segmenter.fit(x, y)


# ---------------------------------------------------------------------------------------------------- copies, files


def test_save_and_load(tmp_path: Path, tiny_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    tiny_segmenter.save("weights", str(tmp_path / "new" / "folder"))
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["weights.safetensors"]
    other = PyTorchSegmenter(tiny_cnn(seed=5), NB_CLASSES, SHAPE, preprocessing=(MEAN, STD))
    assert not np.array_equal(other.predict(x), tiny_segmenter.predict(x))
    other.load("weights.safetensors", str(tmp_path / "new" / "folder"))
    assert np.array_equal(other.predict(x), tiny_segmenter.predict(x))
    with pytest.raises(RuntimeError):
        PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE).load("weights", str(tmp_path / "new" / "folder"))
    with pytest.raises(FileNotFoundError):
        other.load("nothing", str(tmp_path))


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[1].weight = model[0].weight
    segmenter = PyTorchSegmenter(model, 3, SHAPE)
    segmenter.save("tied", str(tmp_path))
    expected = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    segmenter.load("tied", str(tmp_path))
    assert torch.equal(model[1].weight, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda segmenter: pickle.loads(pickle.dumps(segmenter))])
def test_copies_are_equal_and_independent(copied: Callable, x: np.ndarray, y: np.ndarray) -> None:
    model = tiny_attention()
    segmenter = PyTorchSegmenter(
        model,
        NB_CLASSES,
        SHAPE,
        AddOne(),
        torch.optim.Adam(model.parameters(), lr=0.01),
        preprocessing=(MEAN, STD),
        preprocessing_defences=[DEFENCES["SpatialSmoothing"]()],
    )
    before = segmenter.predict(x)
    twin = copied(segmenter)
    assert type(twin) is PyTorchSegmenter
    assert twin.model is not model
    assert np.array_equal(twin.predict(x), before)
    assert np.array_equal(twin.loss_gradient(x, y), segmenter.loss_gradient(x, y))
    twin.fit(x, y, nb_epochs=2)  # its optimizer holds its own weights
    twin.set_params(preprocessing=(0.0, 1.0))
    assert not np.array_equal(twin.predict(x), before)
    assert np.array_equal(segmenter.predict(x), before)


def test_with_model(x: np.ndarray, y: np.ndarray) -> None:
    class Special(PyTorchSegmenter):
        pass

    model = tiny_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"preprocessing": (MEAN, STD), "ignore_index": 3, "clip_values": (0, 2)}
    segmenter = Special(model, NB_CLASSES, SHAPE, AddOne(), optimizer, **options)
    before, params = segmenter.predict(x), segmenter.get_params()
    other = segmenter.with_model(linear_cnn())
    expected = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE, AddOne(), **options)
    assert type(other) is Special
    assert np.array_equal(other.predict(x), expected.predict(x))
    labels = np.where(y == 255, 3, y)
    assert np.array_equal(other.loss_gradient(x, labels), expected.loss_gradient(x, labels))
    assert {**other.get_params(), "model": model, "optimizer": optimizer} == params
    with pytest.raises(ValueError, match="needs an optimizer"):
        other.fit(x, labels)  # the old one would train the old model
    other.set_params(preprocessing_defences=Squaring(), nb_classes=9)
    assert segmenter.get_params() == params
    assert segmenter.model is model
    assert np.array_equal(segmenter.predict(x), before)


# ---------------------------------------------------------------------------------------------------- defended models


def test_traits_are_a_union(tiny_segmenter: PyTorchSegmenter) -> None:
    assert tiny_segmenter.traits == Traits()
    assert noisy_segmenter().traits == Traits(random=True)
    both = nn.Sequential(linear_cnn(), Noisy(), Noisy(straight_through=True))
    assert traits_of(both) == Traits(random=True, straight_through=True)


def test_conditions_reach_nested_modules_and_are_restored() -> None:
    segmenter = noisy_segmenter()
    noisy = segmenter.model[1][0]
    noisy.conditions = own = Conditions(draw=77)
    with segmenter.conditions(images=[4, 5], draw=3, straight_through=True):
        assert noisy.conditions == Conditions(images=(4, 5), draw=3, straight_through=True)
        with conditions(segmenter.model, draw=8):
            assert noisy.conditions == Conditions(draw=8)
        assert noisy.conditions.draw == 3
    assert noisy.conditions is own
    with pytest.raises(RuntimeError, match="stop"), segmenter.conditions(draw=1):
        raise RuntimeError("stop")
    assert noisy.conditions is own


def test_conditions_of_a_plain_model_are_harmless(tiny_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    with tiny_segmenter.conditions(images=range(5), draw=2):
        predictions = tiny_segmenter.predict(x)
    assert np.array_equal(predictions, tiny_segmenter.predict(x))


def test_a_random_prediction_does_not_depend_on_the_batch_size(x: np.ndarray) -> None:
    predictions = [noisy_segmenter().predict(x, batch_size=batch_size) for batch_size in (1, 2, 3, 5, 16)]
    for prediction in predictions[1:]:
        assert np.allclose(prediction, predictions[0], atol=1e-6)
    plain = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE).predict(x)
    assert np.abs(predictions[0] - plain).mean() > 0.5
    noise = predictions[0] - plain
    assert all(not np.allclose(noise[0], noise[i]) for i in range(1, 5)), "images share a stream"


def test_every_prediction_takes_the_next_draw_below_zero(x: np.ndarray) -> None:
    segmenter = noisy_segmenter()
    first, second = segmenter.predict(x, batch_size=2), segmenter.predict(x, batch_size=2)
    assert not np.allclose(first, second)
    seen = segmenter.model[1][0].seen
    assert [(c.images, c.draw) for c in seen] == [((0, 1), d) if i == 0 else ((2, 3), d) if i == 1 else ((4,), d)
                                                  for d in (-1, -2) for i in range(3)]
    with segmenter.conditions(draw=-1):
        assert np.allclose(segmenter.predict(x), first, atol=1e-6)
    again = noisy_segmenter()
    assert np.array_equal(again.predict(x, batch_size=2), first)
    assert segmenter.model[1][0].conditions == Conditions()


def test_given_conditions_are_cut_into_batches(x: np.ndarray, y: np.ndarray) -> None:
    segmenter = noisy_segmenter()
    noisy = segmenter.model[1][0]
    with segmenter.conditions(images=(9, 8, 7, 6, 5), draw=4, straight_through=True):
        segmenter.predict(x, batch_size=3)
    assert noisy.seen == [Conditions((9, 8, 7), 4, True), Conditions((6, 5), 4, True)]
    with segmenter.conditions(images=(9, 8, 7, 6, 5), draw=4):
        together = segmenter.predict(x)
    with segmenter.conditions(images=(7, 6), draw=4):
        assert np.allclose(segmenter.predict(x[2:4]), together[2:4], atol=1e-6)
    with segmenter.conditions(draw=4):
        losses = [segmenter.compute_loss(x, y, batch_size=batch_size) for batch_size in (2, 5)]
    assert np.allclose(*losses, atol=1e-6)
    with segmenter.conditions(images=(1, 2)), pytest.raises(ValueError, match="2 streams for 5 images"):
        segmenter.predict(x)


def test_conditions_are_restored_when_a_batch_fails(x: np.ndarray) -> None:
    segmenter = noisy_segmenter()
    segmenter.model.append(Returning(lambda logits: logits))  # takes 3 channels, gets 4
    with pytest.raises(RuntimeError):
        segmenter.predict(x, batch_size=2)
    assert segmenter.model[1][0].conditions == Conditions()


def test_versions_of_an_image_share_its_stream(x: np.ndarray) -> None:
    eot = EoTBrightnessPyTorch(nb_samples=2, clip_values=(0.0, 1.0), delta=0.2)
    segmenter = noisy_segmenter(preprocessing_defences=eot)
    with segmenter.conditions(images=(3, 4, 5, 6, 7), draw=1):
        segmenter.predict(x, batch_size=3)
    assert [c.images for c in segmenter.model[1][0].seen] == [(3, 3, 4, 4, 5, 5), (6, 6, 7, 7)]


def test_batch_size_has_to_be_positive(tiny_segmenter: PyTorchSegmenter, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        tiny_segmenter.predict(x, batch_size=0)
