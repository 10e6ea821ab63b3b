"""The attacks in ART's style: its conventions, arrays in and out, errors, the catalogue."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.exceptions import EstimatorError
from tiny import NB_CLASSES, SHAPE, tiny_cnn
from torch import Tensor

import attacks
from attacks import (
    EOT,
    FixedClass,
    MinimalNormAttack,
    Patch,
    PatchAttack,
    Permute,
    PermuteAttack,
    PixelAttack,
    Strip,
    StripAttack,
    TargetMap,
    Untargeted,
)
from attacks.catalogue import register_attack
from attacks.minimal_norm import MinimalNormOptions
from attacks.options import PatchOptions, PixelOptions
from attacks.pixelwise import OwnPrediction
from ramdefense.segmenter import PyTorchSegmenter

FAST: dict[str, Any] = {"max_iter": 3, "eps_step": 0.2, "batch_size": 2, "verbose": False}
VOID = 255


@pytest.mark.parametrize("name", ["permute", "strip", "untargeted"])
def test_every_catalogued_attack(name: str, tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    attack = attacks.attack(name, tiny_segmenter, **FAST)
    assert isinstance(attack, EvasionAttack)
    adversarial = attack.generate(x, y)
    assert isinstance(adversarial, np.ndarray)
    assert (adversarial.shape, adversarial.dtype) == (x.shape, x.dtype)
    mask = attack.mask(x)
    assert (mask.shape, mask.dtype) == ((len(x), *SHAPE[1:]), np.bool_)
    outside = np.broadcast_to(~mask[:, None], x.shape)
    assert np.array_equal(adversarial[outside], x[outside])
    assert (adversarial != x)[~outside].any()
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    patch = attack.patch
    (top, left), (height, width) = (SHAPE[1] - patch.shape[0], SHAPE[2] - patch.shape[1]), patch.shape
    assert np.array_equal(adversarial[:, :, top : top + height, left : left + width], patch.pixels.numpy())
    target = attack.target_map(y)
    assert (target is None) == (not attack.targeted) == (name == "untargeted")
    predicted = tiny_segmenter.predict_labels(adversarial)
    counted = (y != VOID) & ~mask
    hit = (predicted == (y if target is None else target)) == attack.targeted
    rates = (hit & counted).sum((1, 2)) / counted.sum((1, 2))
    assert attack.result.criterion == pytest.approx(rates.tolist(), abs=1e-6)
    assert attack.result.seconds > 0


def test_attacks_do_what_they_are_for(attention_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    """The patch moves pixels that it does not cover towards its map, or away from their labels."""
    for make in (PermuteAttack, StripAttack, PatchAttack):
        attack = make(attention_segmenter, max_iter=30, eps_step=0.1, patch_shape=(8, 8), verbose=False)
        grey = Patch(torch.full((3, 8, 8), 0.5), "lower_right").paste(x)
        adversarial = attack.generate(x, y)
        reference = y if attack.target_map(y) is None else attack.target_map(y)
        counted = (y != VOID) & ~attack.mask(x)
        before, after = (
            ((attention_segmenter.predict_labels(images) == reference) == attack.targeted)[counted].mean()
            for images in (grey, adversarial)
        )
        assert after >= before
        assert np.mean(attack.result.criterion) == pytest.approx(after, abs=0.02)


def test_tensors_and_arrays_give_the_same(tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor) -> None:
    attack = PermuteAttack(tiny_segmenter, **FAST)
    from_array = attack.generate(images.numpy(), labels.numpy())
    from_tensor = attack.generate(images, labels)
    assert isinstance(from_tensor, Tensor)
    assert np.array_equal(from_tensor.numpy(), from_array)
    assert torch.equal(attack.target_map(labels), torch.as_tensor(attack.target_map(labels.numpy())))
    assert isinstance(attack.mask(images), Tensor)
    double = attack.generate(images.double().numpy(), labels.numpy())
    assert double.dtype == np.float64
    outside = np.broadcast_to(~attack.mask(double)[:, None], double.shape)
    assert np.array_equal(double[outside], images.double().numpy()[outside])


def test_labels_as_scores_are_taken_by_their_largest(
    tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor
) -> None:
    whole = labels.masked_fill(labels == VOID, 0)
    one_hot = torch.nn.functional.one_hot(whole, NB_CLASSES).movedim(-1, 1).float()
    attack = PermuteAttack(tiny_segmenter, **FAST)
    assert torch.equal(attack.generate(images, whole), attack.generate(images, one_hot))


def test_without_a_target_the_labels_are_the_map(
    tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor
) -> None:
    target = Permute(0)(labels, nb_classes=NB_CLASSES)
    by_map = PatchAttack(tiny_segmenter, targeted=True, **FAST)
    assert torch.equal(by_map.generate(images, target), PermuteAttack(tiny_segmenter, **FAST).generate(images, labels))
    assert torch.equal(by_map.target_map(target), target)
    brought = PatchAttack(tiny_segmenter, target=TargetMap(target), **FAST)
    assert torch.equal(brought.generate(images, labels), by_map.generate(images, target))
    untargeted = PatchAttack(tiny_segmenter, **FAST)
    assert not untargeted.targeted
    own = tiny_segmenter.predict_labels(images)
    assert torch.equal(untargeted.generate(images), untargeted.generate(images, own))
    for attack in (by_map, PermuteAttack(tiny_segmenter, **FAST)):
        with pytest.raises(ValueError, match="needs `y`"):
            attack.generate(images)


def test_streams_make_the_result_independent_of_how_the_data_are_cut(
    tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor
) -> None:
    attack = StripAttack(tiny_segmenter, random_start=True, **FAST)
    whole = attack.generate(images, labels, images=range(20, 25))
    parts = [attack.generate(images[[row]], labels[[row]], images=[20 + row]) for row in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)
    targets = [attack.target_map(labels[[row]], images=[20 + row]) for row in range(5)]
    assert torch.equal(torch.cat(targets), attack.target_map(labels, images=range(20, 25)))


def test_a_patch_can_be_put_on_other_images(tiny_segmenter: PyTorchSegmenter, images: Tensor, labels: Tensor) -> None:
    attack = PermuteAttack(tiny_segmenter, **FAST)
    with pytest.raises(ValueError, match="no patch yet"):
        attack.apply_patch(images)
    adversarial = attack.generate(images, labels)
    assert torch.equal(attack.apply_patch(images), adversarial)
    other = Patch(torch.rand(3, 2, 5), "upper_left")
    assert torch.equal(attack.apply_patch(images, other), other.paste(images))
    with pytest.raises(ValueError, match="5 patches"):
        attack.apply_patch(images[:2])


@pytest.mark.parametrize("images_of", [lambda x: x * 2, lambda x: x * np.nan, lambda x: x[0]])
def test_bad_images_are_refused(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray, images_of: Any) -> None:
    with pytest.raises(ValueError, match=r"clip range|NaN|shape"):
        PermuteAttack(tiny_segmenter, **FAST).generate(images_of(x), y)


def test_bad_labels_and_places_are_refused(tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray) -> None:
    attack = PermuteAttack(tiny_segmenter, **FAST)
    with pytest.raises(ValueError, match="labels"):
        attack.generate(x, np.where(y == 0, NB_CLASSES, y))
    with pytest.raises(ValueError, match="shape"):
        attack.generate(x, y[:, :-1])
    with pytest.raises(TypeError, match="list"):
        attack.generate(x.tolist(), y)
    with pytest.raises(ValueError, match="17×3 does not fit"):
        PermuteAttack(tiny_segmenter, patch_shape=(17, 3), **FAST).generate(x, y)
    with pytest.raises(ValueError, match="reaches outside"):
        PermuteAttack(tiny_segmenter, patch_location=(12, 16), **FAST).generate(x, y)


def test_only_segmenters_can_be_attacked() -> None:
    classifier = PyTorchClassifier(tiny_cnn(), torch.nn.CrossEntropyLoss(), SHAPE, NB_CLASSES)
    for make in (PatchAttack, PermuteAttack, StripAttack, PixelAttack, MinimalNormAttack):
        with pytest.raises(EstimatorError):
            make(classifier)


def test_params_are_arts(tiny_segmenter: PyTorchSegmenter) -> None:
    for each, options in (
        (PatchAttack, PatchOptions),
        (PixelAttack, PixelOptions),
        (MinimalNormAttack, MinimalNormOptions),
    ):
        attack = each(tiny_segmenter)
        assert attack.attack_params == options.names()
        defaults = options()
        for name in attack.attack_params:
            assert getattr(attack, name) == (defaults.aims if name == "targeted" else getattr(defaults, name))
    for make in (PermuteAttack, StripAttack):
        assert set(PatchAttack.attack_params) - set(make.attack_params) == {"target", "targeted"}
        assert make(tiny_segmenter).targeted


def test_setting_params_is_all_or_nothing(tiny_segmenter: PyTorchSegmenter) -> None:
    attack = PatchAttack(tiny_segmenter)
    attack.set_params(max_iter=7, target=FixedClass(1), patch_shape=(2, 3))
    assert (attack.max_iter, attack.patch_shape, attack.targeted) == (7, (2, 3), True)
    before = repr(attack)
    for wrong in ({"seed": 3, "max_iter": 0}, {"seed": 3, "epsilon": 1}, {"seed": 3, "targeted": False}):
        with pytest.raises(ValueError, match=r"max_iter|epsilon|targeted"):
            attack.set_params(**wrong)
        assert repr(attack) == before
    attack.set_params(target=None, targeted=True)
    assert attack.targeted
    attack.targeted = False
    assert not attack.targeted
    pixel = PixelAttack(tiny_segmenter)
    pixel.set_params(eps=0.1, norm="2", targeted=True)
    assert (pixel.eps, pixel.norm, pixel.targeted) == (0.1, "2", True)
    for wrong in ({"seed": 3, "eps": 0}, {"seed": 3, "norm": "1"}, {"seed": 3, "patch_shape": (2, 2)}):
        with pytest.raises(ValueError, match=r"eps|norm|patch_shape"):
            pixel.set_params(**wrong)
        assert pixel.seed == 0
    permute = PermuteAttack(tiny_segmenter)
    permute.set_params(seed=5)
    assert permute.target == Permute(5)
    with pytest.raises(ValueError, match="no option target"):
        permute.set_params(target=Strip())


def test_an_attribute_set_by_hand_is_checked_when_it_is_used(
    tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray
) -> None:
    attack = PermuteAttack(tiny_segmenter, **FAST)
    attack.max_iter = 1
    attack.generate(x, y)
    assert attack.result.steps == (1,) * len(x)
    attack.max_iter = -1
    with pytest.raises(ValueError, match="max_iter"):
        attack.generate(x, y)


@pytest.mark.parametrize("make", [PatchAttack, PermuteAttack, StripAttack, PixelAttack, MinimalNormAttack])
def test_bad_options_are_refused(tiny_segmenter: PyTorchSegmenter, make: Any) -> None:
    with pytest.raises(TypeError, match=f"{make.__name__} has no option steps; its options are .*max_iter"):
        make(tiny_segmenter, steps=5)
    with pytest.raises(ValueError, match="eps_step"):
        make(tiny_segmenter, eps_step=-1)
    if make in (PermuteAttack, StripAttack):
        with pytest.raises(TypeError, match="sets target itself"):
            make(tiny_segmenter, target=Untargeted())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (PatchAttack, {}),
        (PatchAttack, {"target": FixedClass(2), "eot": EOT(samples=2), "patch_location": (1, 2)}),
        (PatchAttack, {"targeted": True, "optimizer": "adam"}),
        (PermuteAttack, {"seed": 3, "patch_shape": (4, 5), "momentum": 0.5}),
        (StripAttack, {"defence_samples": 2}),
        (PixelAttack, {"eps": 0.1, "norm": "2", "target": FixedClass(1)}),
        (PixelAttack, {"target": OwnPrediction(), "objective": ("cross_entropy", "margin"), "optimizer": "apgd"}),
        (MinimalNormAttack, {"method": "dag", "threshold": 0.5, "targeted": True}),
    ],
)
def test_repr_rebuilds(tiny_segmenter: PyTorchSegmenter, make: Any, options: dict[str, Any]) -> None:
    attack = make(tiny_segmenter, **options)
    again = eval(repr(attack), {**vars(attacks.targets), **globals(), "estimator": tiny_segmenter})
    assert type(again) is make
    assert repr(again) == repr(attack)
    assert all(getattr(again, name) == getattr(attack, name) for name in make.attack_params)


def test_the_catalogue() -> None:
    entries = attacks.attacks()
    assert list(entries)[:3] == ["permute", "strip", "untargeted"]
    assert all(entry.summary and entry.name == name for name, entry in entries.items())
    with pytest.raises(ValueError, match="already"):
        register_attack("permute")(lambda segmenter: None)
    with pytest.raises(ValueError, match="needs a name"):
        register_attack("")
    with pytest.raises(ValueError, match=r"no attack named 'frob': .*there are .*permute, strip"):
        attacks.attack("frob", None)
    with pytest.raises(TypeError):
        entries["mine"] = entries["permute"]  # type: ignore[index]


def test_an_attack_of_ones_own_joins(
    monkeypatch: pytest.MonkeyPatch, tiny_segmenter: PyTorchSegmenter, x: np.ndarray, y: np.ndarray
) -> None:
    import attacks.catalogue as catalogue

    monkeypatch.setattr(catalogue, "_ENTRIES", dict(catalogue._ENTRIES))

    @register_attack("all-road")
    def all_road(segmenter: PyTorchSegmenter, **options: Any) -> PatchAttack:
        """Everything becomes road."""
        return PatchAttack(segmenter, target=FixedClass(1), **options)

    assert attacks.attacks()["all-road"].summary == "Everything becomes road."
    attack = attacks.attack("all-road", tiny_segmenter, **FAST)
    attack.generate(x, y)
    assert set(np.unique(attack.target_map(y))) == {1, VOID}


def test_importing_the_package_is_light_and_complete() -> None:
    code = "import sys, attacks; print(any(name in sys.modules for name in ('torch', 'art', 'torchattacks', 'kornia')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert all(getattr(attacks, name) is not None for name in attacks.__all__)
    assert set(attacks.__all__) <= set(dir(attacks))
    with pytest.raises(AttributeError, match="no attribute 'Patchwork'"):
        attacks.Patchwork  # noqa: B018
