"""Contextual fusion: the penalty's closed forms, frozen extractors, more modalities, and ART's attacks through it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod
from tiny import random_images
from torch import Tensor, nn
from torch.nn import functional as F

from ramdefense.baselines import ContextualFusion, LateFusion, without_head

SHAPE = (3, 16, 20)


def extractor(width: int, seed: int, flat: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.AdaptiveMaxPool2d(1), nn.Flatten()] if flat else []))


def fusion(**options: object) -> ContextualFusion:
    options = {"input_shape": SHAPE, **options}
    return ContextualFusion(extractor(5, 0), extractor(7, 1, flat=True), 3, **options)


def data(number: int = 60) -> tuple[Tensor, Tensor]:
    """Classes that colour tells, with noise."""
    labels = torch.arange(number) % 3
    images = 0.6 * random_images(number)
    images[torch.arange(number), labels] += 0.1
    return images, labels


def test_features_are_pooled_and_concatenated() -> None:
    model, x = fusion().eval(), random_images(4)
    z = model.features(x)
    assert model.widths == (5, 7)
    torch.testing.assert_close(z[:, :5], model.extractors[0](x).mean(dim=(2, 3)))
    torch.testing.assert_close(z[:, 5:], model.extractors[1](x))
    torch.testing.assert_close(model(x), F.linear(z, model.joint.weight, model.joint.bias))
    foreground, background = model.weights()
    torch.testing.assert_close(model(x), z[:, :5] @ foreground.T + z[:, 5:] @ background.T + model.joint.bias)


def test_the_penaltys_gradient_is_twice_alpha_theta_on_the_foreground_alone() -> None:
    model = fusion(penalty=0.3)
    assert model.penalty().item() == pytest.approx(0.3 * model.weights()[0].square().sum().item())
    model.penalty().backward()
    torch.testing.assert_close(model.joint.weight.grad[:, :5], 2 * 0.3 * model.joint.weight[:, :5])
    assert (model.joint.weight.grad[:, 5:] == 0).all()
    images, labels = data(9)
    model.eval()
    expected = F.cross_entropy(model(images), labels) + model.penalty()
    torch.testing.assert_close(model.loss(model(images), labels), expected)


@pytest.mark.parametrize("penalty", [0.0, 0.05, (0.02, 0.1)])
def test_fit_reaches_the_optimum_of_the_penalised_problem(penalty: float | tuple[float, float]) -> None:
    """At the optimum of a convex problem its gradient is zero: that of the cross-entropy is −2(α + decay)θ."""
    images, labels = data()
    model = fusion(penalty=penalty).fit(images, labels, decay=1e-3).eval()
    z = model.features(images)
    error = (model(images).softmax(dim=1) - F.one_hot(labels, 3)).detach() / len(labels)
    alphas = (penalty, 0.0) if isinstance(penalty, float) else penalty
    for part, alpha, theta in zip(z.split(model.widths, dim=1), alphas, model.weights(), strict=True):
        torch.testing.assert_close(error.T @ part, -2 * (alpha + 1e-3) * theta, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(error.sum(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    assert (model(images).argmax(1) == labels).float().mean() > 0.8


def test_a_larger_penalty_takes_the_foregrounds_weights_to_zero() -> None:
    images, labels = data()
    norms = []
    for alpha in (0.0, 1e-3, 1e-1, 1e6):
        norms.append(float(fusion(penalty=alpha).fit(images, labels).weights()[0].detach().norm()))
    assert norms[0] > norms[1] > norms[2] > norms[3]
    assert norms[3] < 1e-5
    # what is left is the classifier on the background alone
    alone = LateFusion([extractor(7, 1, flat=True)], 3, input_shape=SHAPE).fit(images, labels).eval()
    pushed = fusion(penalty=1e6).fit(images, labels).eval()
    torch.testing.assert_close(pushed(images), alone(images), atol=2e-3, rtol=1e-3)


def test_fit_does_not_depend_on_batches_order_or_luck() -> None:
    images, labels = data()
    torch.manual_seed(1)
    one = fusion().fit(images, labels, batch_size=7)
    torch.manual_seed(2)
    other = fusion().fit(images.flip(0), labels.flip(0))
    torch.testing.assert_close(one.joint.weight, other.joint.weight, atol=1e-3, rtol=1e-3)


def test_frozen_extractors_stay_and_those_that_were_given_too() -> None:
    first, second = extractor(5, 0), extractor(7, 1)
    model = ContextualFusion(first, second, 3, input_shape=SHAPE)
    before = copy.deepcopy(model.extractors.state_dict())
    images, labels = data()
    model.fit(images, labels)
    model.classifier().fit(images.numpy(), np.eye(3, dtype=np.float32)[labels], batch_size=20, nb_epochs=2)
    for name, value in model.extractors.state_dict().items():  # running statistics among them
        assert torch.equal(value, before[name]), name
    assert not model.extractors[0][1].training
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert torch.equal(first[1].running_mean, torch.zeros(5))


def test_extractors_that_are_not_frozen_learn() -> None:
    images, labels = data()
    model = fusion(frozen=False)
    before = model.extractors[0][0].weight.detach().clone()
    start = model.eval().loss(model(images), labels).item()
    model.train().fit_all(images, labels, epochs=4, lr=1e-2, batch_size=16)
    assert model.training
    assert not torch.equal(model.extractors[0][0].weight, before)
    model.eval()
    assert float(model.loss(model(images), labels)) < start
    with pytest.raises(ValueError, match="frozen=False"):
        fusion().fit_all(images, labels)


def test_a_third_modality_fits_without_a_change() -> None:
    """A fourth channel, say depth, that an extractor of its own reads."""

    class Depth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 3:].flatten(1)[:, ::40]

    class Colour(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = extractor(4, seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x[:, :3])

    model = ContextualFusion(Colour(0), Colour(1), 3, others=[Depth()], input_shape=(4, 16, 20), penalty=(0.1, 0, 0.2))
    assert model.widths == (4, 4, 8)
    images, labels = data(30)
    depth = labels[:, None, None, None] * 0.2 + 0.05 * random_images(30)[:, :1]
    model.fit(torch.cat([images, depth], dim=1), labels).eval()
    assert (model(torch.cat([images, depth], dim=1)).argmax(1) == labels).float().mean() > 0.9
    assert [float(w.norm()) > 0 for w in model.weights()] == [True] * 3
    wrong = 0.1 * model.weights()[0].square().sum() + 0.2 * model.weights()[2].square().sum()
    torch.testing.assert_close(model.penalty(), wrong)


def test_art_attacks_it() -> None:
    images, labels = data()
    model = fusion(penalty=0.1).fit(images, labels)
    estimator = model.classifier()
    x, y = images.numpy(), labels.numpy()
    model.eval()
    np.testing.assert_allclose(estimator.predict(x), model(images).detach(), atol=1e-6)
    losses = estimator.compute_loss(x, y, reduction="mean")
    assert float(losses) == pytest.approx(float(model.loss(model(images), labels)), rel=1e-5)
    adversarial = FastGradientMethod(estimator, eps=0.1).generate(x, y)
    leaf = images.clone().requires_grad_()
    F.cross_entropy(model(leaf), labels).backward()
    expected = (images + 0.1 * leaf.grad.sign()).clamp(0, 1)
    assert np.isclose(adversarial, expected, atol=1e-6).mean() > 0.999  # the penalty moves no image
    assert (estimator.predict(adversarial).argmax(1) == y).mean() < (estimator.predict(x).argmax(1) == y).mean()


def test_arts_fit_trains_the_penalised_loss() -> None:
    images, labels = data()
    sums = []
    for alpha in (0.0, 10.0):
        torch.manual_seed(0)
        model = fusion(penalty=alpha)
        with torch.no_grad():
            model.joint.weight.fill_(0.1)
        model.classifier(lr=0.02).fit(images.numpy(), np.eye(3, dtype=np.float32)[labels], batch_size=30, nb_epochs=8)
        sums.append(float(model.weights()[0].detach().abs().sum()))
    assert sums[1] < 0.3 * sums[0]


def test_pickling_and_copies() -> None:
    images, labels = data(12)
    model = fusion(penalty=0.1).fit(images, labels).eval()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(images), model(images))
        assert again.alphas == model.alphas
    classifier = copy.deepcopy(model).classifier()
    assert classifier.loss.fusion is classifier.model
    assert "penalty=(0.1, 0.0)" in repr(model)


def test_a_network_without_its_head() -> None:
    from torchvision.models import resnet18

    network = resnet18(weights=None)
    features = without_head(network)
    model = LateFusion([features], 3, input_shape=(3, 32, 32))
    assert model.widths == (512,)
    assert network.fc.out_features == 1000
    with pytest.raises(ValueError, match="layer4"):
        without_head(network, "head")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LateFusion([], 3), "at least one"),
        (lambda: fusion(penalty=-1), "penalty=-1"),
        (lambda: fusion(penalty=(1, 2, 3)), "2 of them"),
        (lambda: LateFusion([extractor(3, 0)], 1, input_shape=SHAPE), "nb_classes=1"),
        (lambda: LateFusion([nn.Flatten(1, 2)], 3, input_shape=SHAPE), r"\(N, D\) or \(N, D, h, w\)"),
        (lambda: fusion().fit(*data(), decay=0), "decay=0"),
        (lambda: fusion().fit(data()[0], data()[1] + 1), "from 0 to 2"),
        (lambda: fusion().fit(data()[0], data()[1][:4]), "one for each image"),
    ],
)
def test_errors_name_value_and_remedy(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_what_is_no_extractor() -> None:
    with pytest.raises(TypeError, match="function"):
        LateFusion([lambda x: x], 3)

    class Dictionary(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x}

    with pytest.raises(TypeError, match="returned a dict"):
        LateFusion([Dictionary()], 3)
