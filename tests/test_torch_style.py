"""The attacks in torchattacks' style: the same patch as in ART's, its modes, normalisation, training mode, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from tiny import NB_CLASSES, tiny_attention, tiny_cnn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms.functional import normalize

import attacks
from attacks import torch_style
from attacks.targets import FixedClass, Permute, Untargeted
from attacks.transformations import EOT
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, Traits

VOID = 255
FAST: dict[str, Any] = {"max_iter": 4, "eps_step": 0.2, "verbose": False}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Wrapped(nn.Module):
    """A model whose logits come as other libraries return them."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, images: Tensor) -> Any:
        logits = self.model(images)
        if self.kind == "dict":
            return {"out": logits, "aux": logits * 0}
        return type("Output", (), {"logits": logits})()


class Dropping(nn.Module):
    """A random defence by the protocol, with a straight-through gradient to offer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.traits = Traits(random=True, straight_through=True)
        self.conditions = Conditions()
        self.seen: list[Conditions] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.conditions)
        generator = torch.Generator().manual_seed((self.conditions.draw or 0) + 7)
        keep = torch.rand(images.shape[-2:], generator=generator) > 0.2
        output: Tensor = self.model(images * keep)
        return output


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"random_start": True, "num_restarts": 2, "seed": 3},
    "adam": {"optimizer": "adam", "patch_shape": (5, 3), "patch_location": (2, 1)},
    "eot": {"eot": EOT(samples=2), "momentum": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["PermuteAttack", "StripAttack", "PatchAttack"])
def test_both_styles_make_the_same_patch(name: str, options: dict[str, Any], images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn()
    art = getattr(attacks, name)(PyTorchSegmenter(model, NB_CLASSES, tuple(images.shape[1:])), **FAST, **options)
    torch_one = getattr(torch_style, name)(model, **FAST, **options)
    assert isinstance(torch_one, torchattacks.attack.Attack)
    expected, adversarial = art.generate(images, labels), torch_one(images, labels)
    torch.testing.assert_close(adversarial, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch_one.patch.pixels, art.patch.pixels, atol=1e-6, rtol=0)
    assert torch_one.result.criterion == pytest.approx(art.result.criterion)
    assert not adversarial.requires_grad


PIXEL: dict[str, dict[str, Any]] = {
    "inf": {"eps": 0.1, "eps_step": 0.03},
    "2": {"eps": 0.5, "norm": "2", "eps_step": 0.2, "random_start": True, "num_restarts": 2, "seed": 3},
    "apgd": {"eps": 0.1, "eps_step": 0.1, "optimizer": "apgd", "objective": ("cross_entropy", "margin")},
    "target": {"eps": 0.1, "eps_step": 0.03, "target": FixedClass(1), "keep_best": False},
    "named": {"eps": 0.1, "eps_step": 0.03, "target": "permute", "seed": 2, "keep_best": False},
}


@pytest.mark.parametrize("options", PIXEL.values(), ids=PIXEL)
def test_both_styles_make_the_same_perturbation(options: dict[str, Any], images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn()
    quick = {"max_iter": 4, "verbose": False, **options}
    art = attacks.PixelAttack(PyTorchSegmenter(model, NB_CLASSES, tuple(images.shape[1:])), **quick)
    torch_one = torch_style.PixelAttack(model, **quick)
    expected, adversarial = art.generate(images, labels), torch_one(images, labels)
    torch.testing.assert_close(adversarial, expected, atol=1e-6, rtol=0)
    assert torch_one.result.criterion == pytest.approx(art.result.criterion)
    assert torch_one.targeted == art.targeted
    moved = torch.linalg.vector_norm((adversarial - images).flatten(1), ord=float(art.norm), dim=1)
    assert (moved <= art.eps + 1e-6).all()
    assert (moved > art.eps / 2).all()


def test_pixelwise_attacks_on_normalised_images(images: Tensor, labels: Tensor) -> None:
    """The ball is one of images in [0, 1], and what comes back is normalised as what came."""
    model = tiny_cnn()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, tuple(images.shape[1:]), preprocessing=(MEAN, STD))
    expected = attacks.PixelAttack(segmenter, eps=0.1, **FAST).generate(images, labels)
    attack = torch_style.PixelAttack(model, eps=0.1, **FAST)
    attack.set_normalization_used(MEAN, STD)
    adversarial = attack(normalize(images, list(MEAN), list(STD)), labels)
    torch.testing.assert_close(adversarial, normalize(expected, list(MEAN), list(STD)), atol=1e-5, rtol=0)


def test_pixelwise_attacks_in_targeted_modes(images: Tensor, labels: Tensor) -> None:
    make, options = torch_style.PixelAttack, {"max_iter": 3}
    model = tiny_cnn().eval()
    attack = make(model, verbose=False, **options)
    attack.set_mode_targeted_least_likely(quiet=True)
    chosen = attack.get_target_label(images, labels)
    adversarial = attack(images, labels)
    by_option = make(model, targeted=True, verbose=False, **options)
    assert by_option.get_mode() == "targeted(label)"
    assert torch.equal(by_option(images, chosen), adversarial)
    attack.set_mode_default()
    assert not torch.equal(attack(images, labels), adversarial)
    with pytest.raises(ValueError, match="not supported"):
        make(model, target="0", verbose=False).set_mode_targeted_random(quiet=True)


def test_save_counts_every_pixel_of_a_pixelwise_attack(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn().eval()
    attack = torch_style.PixelAttack(model, eps=0.1, **FAST)
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    statistics = attack.save(loader, verbose=False, return_verbose=True)
    kept = (model(attack(images, labels)).argmax(1) == labels)[labels != VOID]
    assert statistics is not None
    assert statistics.pixel_accuracy == pytest.approx(100 * float(kept.float().mean()))


def test_both_styles_against_a_random_defence(images: Tensor, labels: Tensor) -> None:
    model = Dropping(tiny_cnn())
    segmenter = PyTorchSegmenter(model, NB_CLASSES, tuple(images.shape[1:]))
    expected = attacks.PermuteAttack(segmenter, **FAST).generate(images, labels)
    model.seen.clear()
    adversarial = torch_style.PermuteAttack(model, **FAST)(images, labels)
    torch.testing.assert_close(adversarial, expected, atol=1e-6, rtol=0)
    assert {seen.draw for seen in model.seen} == set(range(5 * 4))
    assert all(seen.straight_through for seen in model.seen[1:]), "all but the look at the number of classes"
    assert model.conditions == Conditions()


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_models_may_return_what_they_like(kind: str, images: Tensor, labels: Tensor) -> None:
    expected = torch_style.PermuteAttack(tiny_cnn(), **FAST)(images, labels)
    adversarial = torch_style.PermuteAttack(Wrapped(tiny_cnn(), kind), **FAST)(images, labels)
    assert torch.equal(adversarial, expected)


def test_logits_at_a_quarter_of_the_size(images: Tensor, labels: Tensor) -> None:
    model = tiny_attention()
    attack = torch_style.StripAttack(model, **FAST)
    assert attack.get_logits(images).shape == (5, NB_CLASSES, *images.shape[-2:])
    segmenter = PyTorchSegmenter(model, NB_CLASSES, tuple(images.shape[1:]))
    expected = attacks.StripAttack(segmenter, **FAST).generate(images, labels)
    torch.testing.assert_close(attack(images, labels), expected, atol=1e-6, rtol=0)


def test_normalised_images(images: Tensor, labels: Tensor) -> None:
    """The attack works in [0, 1] and gives back images normalised as they came, the same bits outside the patch."""
    model = tiny_cnn()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, tuple(images.shape[1:]), preprocessing=(MEAN, STD))
    images = images.clone()
    images[0, :, :3], images[1, :, :3] = 0.0, 1.0  # at the ends of the range rounding goes over
    expected = attacks.PermuteAttack(segmenter, **FAST).generate(images, labels)
    attack = torch_style.PermuteAttack(model, **FAST)
    attack.set_normalization_used(MEAN, STD)
    given = normalize(images, list(MEAN), list(STD))
    adversarial = attack(given, labels)
    mask = attack.patch.mask(tuple(images.shape[-2:]))
    assert torch.equal(adversarial[:, :, ~mask], given[:, :, ~mask])
    torch.testing.assert_close(adversarial, normalize(expected, list(MEAN), list(STD)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="clip range"):
        attack(given * 3, labels)
    assert torch.equal(attack(given, labels), adversarial), "an error leaves normalisation as it was"


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_of_every_module_is_restored(training: bool, images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn().train(training)
    model[1].eval()  # a frozen batch norm stays frozen
    modes = [module.training for module in model.modules()]
    attack = torch_style.PermuteAttack(model, **FAST)
    statistics = model[1].running_mean.clone()  # type: ignore[union-attr,operator]
    attack(images, labels)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="clip range"):
        attack(images + 1, labels)
    assert [module.training for module in model.modules()] == modes
    attack.save(DataLoader(TensorDataset(images, labels), batch_size=5), verbose=False, return_verbose=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, statistics)  # type: ignore[arg-type]


def test_targeted_modes(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn().eval()
    target = Permute()(labels, nb_classes=NB_CLASSES)
    by_option = torch_style.PatchAttack(model, targeted=True, **FAST)
    expected = by_option(images, target)
    assert by_option.targeted
    assert by_option.get_mode() == "targeted(label)"
    assert torch.equal(expected, torch_style.PermuteAttack(model, **FAST)(images, labels))
    by_label = torch_style.PatchAttack(model, **FAST)
    assert not by_label.targeted
    away = by_label(images, labels)
    by_label.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(by_label(images, target), expected)
    by_label.set_mode_targeted_by_function(lambda _, y: Permute()(y, nb_classes=NB_CLASSES), quiet=True)
    assert torch.equal(by_label(images, labels), expected)
    by_label.set_mode_default()
    assert torch.equal(by_label(images, labels), away)
    untargeted = torch_style.PatchAttack(model, target=Untargeted(), **FAST)
    assert torch.equal(untargeted(images, labels), away)


def test_random_and_least_likely_targets(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn().eval()
    attack = torch_style.PatchAttack(model, **FAST)
    logits = model(images).detach().numpy()
    attack.set_mode_targeted_random(quiet=True)
    drawn = attack.get_target_label(images, labels)
    counted = labels != VOID
    assert (drawn[~counted] == VOID).all()
    assert (drawn != labels)[counted].all()
    assert torch.bincount(drawn[counted], minlength=NB_CLASSES).min() > counted.sum() / NB_CLASSES / 2
    assert torch.equal(attack.get_target_label(images, labels), drawn)
    attack(images, labels)
    assert attack.result.steps
    for k in (1, 2):
        attack.set_mode_targeted_least_likely(kth_min=k, quiet=True)
        least = attack.get_target_label(images, labels).numpy()
        for image, row, column in [(0, 2, 3), (1, 7, 19), (4, 15, 0)]:
            order = [c for c in logits[image, :, row, column].argsort() if c != labels[image, row, column]]
            assert least[image, row, column] == order[k - 1]
        assert (least[(~counted).numpy()] == VOID).all()
        attack(images, labels)
    # without labels: other than, or least likely beside, the prediction
    own = attack.get_least_likely_label(images)
    assert (own != torch.as_tensor(logits.argmax(1))).all()


def test_an_attack_with_a_target_has_no_targeted_modes(images: Tensor, labels: Tensor) -> None:
    for attack in (
        torch_style.PermuteAttack(tiny_cnn(), **FAST),
        torch_style.PatchAttack(tiny_cnn(), target=FixedClass(0), **FAST),
    ):
        with pytest.raises(ValueError, match="not supported"):
            attack.set_mode_targeted_random(quiet=True)
        with pytest.raises(ValueError, match="needs `y`"):
            attack(images)


def test_own_prediction_where_there_are_no_labels(images: Tensor) -> None:
    model = tiny_cnn().eval()
    attack = torch_style.PatchAttack(model, **FAST)
    assert torch.equal(attack(images), attack(images, model(images).argmax(1)))


def test_save_measures_segmentation(tmp_path: Path, images: Tensor, labels: Tensor, capsys: Any) -> None:
    model = tiny_cnn().eval()
    attack = torch_style.PermuteAttack(model, **FAST)
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    path = tmp_path / "adversarial.pt"
    statistics = attack.save(loader, path, return_verbose=True, save_predictions=True, save_clean_inputs=True)
    printed = capsys.readouterr().out
    assert "100.00 %" in printed
    saved = torch.load(path, weights_only=True)
    expected = torch.cat([attack(batch, y) for batch, y in loader])
    torch.testing.assert_close(saved["adv_inputs"], expected)
    assert torch.equal(saved["clean_inputs"], images)
    assert torch.equal(saved["labels"], labels)
    predictions = model(expected).argmax(1)
    assert torch.equal(saved["preds"], predictions)
    counted = (labels != VOID) & ~attack.patch.mask(tuple(images.shape[-2:]))
    assert statistics is not None
    assert statistics.pixel_accuracy == pytest.approx(100 * float((predictions == labels)[counted].float().mean()))
    jaccard = MulticlassJaccardIndex(NB_CLASSES, ignore_index=VOID)
    miou = jaccard(predictions, labels.where(counted, VOID))
    assert statistics.miou == pytest.approx(100 * float(miou), rel=1e-5)
    distance = np.linalg.norm((expected - images).flatten(1).numpy(), axis=1).mean()
    assert statistics.l2 == pytest.approx(distance, rel=1e-5)
    assert attack.save(loader, verbose=False) is None
    assert capsys.readouterr() == ("", "")
    reloaded = next(iter(attack.load(path, batch_size=5)))
    torch.testing.assert_close(reloaded[0], expected)


def test_save_with_normalisation_and_as_8_bits(tmp_path: Path, images: Tensor, labels: Tensor) -> None:
    attack = torch_style.PermuteAttack(tiny_cnn(), **FAST)
    attack.set_normalization_used(MEAN, STD)
    given = normalize(images, list(MEAN), list(STD))
    loader = DataLoader(TensorDataset(given, labels), batch_size=5)
    attack.save(loader, tmp_path / "a.pt", verbose=False, save_type="int", save_clean_inputs=True)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["adv_inputs"].dtype == torch.uint8
    assert (saved["clean_inputs"].float() / 255 - images).abs().max() < 1.5 / 255


def test_classes_that_are_nowhere_count_as_nothing() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    statistics = torch_style._statistics(confusion, torch.ones(2), 0.0)
    assert statistics.miou == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    assert statistics.pixel_accuracy == pytest.approx(100 * 7 / 8)
    assert torch_style._statistics(torch.zeros(2, 2, dtype=torch.int64), torch.ones(1), 0.0).miou == 0


def test_options(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(TypeError, match="PermuteAttack has no option steps"):
        torch_style.PermuteAttack(tiny_cnn(), steps=3)
    with pytest.raises(TypeError, match="sets targeted itself"):
        torch_style.StripAttack(tiny_cnn(), targeted=True)
    attack = torch_style.PermuteAttack(tiny_cnn(), **FAST)
    attack.seed = 4
    assert attack.target == Permute(4)
    attack.max_iter = 0
    with pytest.raises(ValueError, match="max_iter"):
        attack(images, labels)
    attack.max_iter = 1
    attack(images, labels, streams=range(3, 8))
    assert "PermuteAttack(" in repr(attack)
    assert "max_iter=1" in repr(attack)
    other_void = torch_style.PermuteAttack(tiny_cnn(), ignore_index=-1, **FAST)
    other_void(images, labels.where(labels != VOID, -1))
    assert torch.equal(other_void.patch.pixels, torch_style.PermuteAttack(tiny_cnn(), **FAST)(images, labels)[
        :, :, -other_void.patch.shape[0] :, -other_void.patch.shape[1] :])  # fmt: skip


def test_the_callers_tensors_and_weights_stay(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn()
    before = [value.clone() for value in model.state_dict().values()]
    torch_style.StripAttack(model, **FAST)(images, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
