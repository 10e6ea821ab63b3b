"""Models by name: every spelling, and the errors of a wrong one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from evaluation.models import load_model, zoo
from evaluation.networks import ARCHITECTURES, build_network
from evaluation.training import Recipe, save
from ramdefense.segmenter import PyTorchSegmenter


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
def test_every_architecture_gives_logits_at_the_size_of_any_image(name: str, size: tuple[int, int]) -> None:
    model = build_network(name, 5).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def _card(architecture: str) -> dict:
    recipe = Recipe(architecture=architecture, train="scenes:2", val="scenes:2", test="scenes:2", size=(24, 32))
    return {
        "recipe": dataclasses.asdict(recipe), "classes": list("abcd"), "size": [24, 32],
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip


def test_a_saved_file_comes_back_with_the_same_logits(tmp_path) -> None:
    model = build_network("vit", 4).eval()
    save(model, _card("vit"), tmp_path / "mine")
    segmenter = load_model(str(tmp_path / "mine.safetensors"), device_type="cpu")
    x = torch.rand(2, 3, 24, 32)
    with torch.no_grad():
        expected = model((x - 0.5) / 0.25).numpy()
    assert segmenter.input_shape == (3, 24, 32)
    assert segmenter.nb_classes == 4
    np.testing.assert_allclose(segmenter.predict(x.numpy()), expected, atol=2e-2)  # half precision


def test_weights_of_ones_own(tmp_path) -> None:
    model = load_model("smp:fpn:tu-mobilenetv3_small_100", nb_classes=4, pretrained=False).model
    save(model, _card("smp:fpn:tu-mobilenetv3_small_100"), tmp_path / "mine")
    name = f"smp:fpn:tu-mobilenetv3_small_100@{tmp_path / 'mine.safetensors'}"
    again = load_model(name, nb_classes=4, input_shape=(3, 32, 32))
    from_card = load_model(str(tmp_path / "mine.safetensors"))
    for one, two in zip(again.model.parameters(), from_card.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_torchvision_and_factory(monkeypatch, tmp_path) -> None:
    name = "torchvision:lraspp_mobilenet_v3_large"
    segmenter = load_model(name, pretrained=False, nb_classes=3, input_shape=(3, 32, 48))
    assert segmenter.predict(np.zeros((1, 3, 32, 48), np.float32)).shape == (1, 3, 32, 48)
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\nfrom ramdefense import PyTorchSegmenter\n"
        "def plain(): return nn.Conv2d(3, 4, 1)\n"
        "def ready(): return PyTorchSegmenter(plain(), nb_classes=4, input_shape=(3, 8, 8))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(load_model("my_models:ready"), PyTorchSegmenter)
    assert load_model("my_models:plain", nb_classes=4, input_shape=(3, 8, 8)).nb_classes == 4
    with pytest.raises(ValueError, match="nb_classes"):
        load_model("my_models:plain")


def test_transformers_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=4,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    segmenter = load_model(f"hf:{tmp_path / 'tiny'}", input_shape=(3, 32, 32))
    assert segmenter.nb_classes == 4
    assert segmenter.predict(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 4, 32, 32)


@pytest.mark.parametrize("name", ["nonsense", "zoo:camvid-vti", "torchvision:nope", "no_such_module:f"])
def test_a_wrong_name_is_named_and_the_known_ones_listed(name: str) -> None:
    with pytest.raises(ValueError, match=name.partition(":")[2] or name):
        load_model(name)


def test_the_zoo_holds_what_its_cards_say() -> None:
    cards = zoo()
    assert {"camvid-cnn", "camvid-nonlocal", "camvid-swin", "camvid-segformer", "camvid-vit"} <= set(cards)
    for name, card in cards.items():
        model = load_model(f"zoo:{name}").model
        assert sum(p.numel() for p in model.parameters()) == card["parameters"]
        assert card["citation" if "citation" in card else "recipe"], json.dumps(card)
