"""Every attack of the catalogue, by the same measure: strength, locality, seeds, targets, repr, names, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import art_style, catalogue, ensemble, targets, transformations
from attacks.attention import AttentionFool
from attacks.catalogue import attack, attacks, entry, register_attack
from attacks.diversity import InputDiversity
from attacks.page import page
from attacks.patchwise import PATCH_ATTACKS
from attacks.pixelwise import PIXEL_ATTACKS, OwnPrediction
from ramdefense.names import ratio, split_name
from ramdefense.segmenter import PyTorchSegmenter

SIZE, SIDE, CLASSES = (16, 16), 4, 4
PATCH = {"patch_shape": (8, 8), "patch_location": "lower_right"}


class Glance(nn.Module):
    """Every pixel is labelled by the mean colour of the image, taken by an almost uniform attention over 4×4 tokens.

    Two classes, whose difference is linear in the image but for the little that the attention adds.
    """

    def __init__(self, bias: float = 0.0, attention: float = 1e-3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.query, self.key = (nn.Parameter(attention * torch.randn(3, 3, generator=generator)) for _ in range(2))
        self.slope = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
        self.bias = bias

    def forward(self, images: Tensor) -> Tensor:
        tokens = nn.functional.avg_pool2d(images, SIDE).flatten(2).mT
        scores = (tokens @ self.query) @ (tokens @ self.key).mT
        level = (scores.softmax(-1) @ tokens) @ self.slope + self.bias
        grid = level.unflatten(1, (images.shape[2] // SIDE, images.shape[3] // SIDE))
        spread = nn.functional.interpolate(grid[:, None], scale_factor=SIDE)
        return 10 * torch.cat([spread, -spread], 1)


def glancing(bias: float = 0.0, attention: float = 1e-3) -> PyTorchSegmenter:
    return PyTorchSegmenter(Glance(bias, attention), nb_classes=2, input_shape=(3, *SIZE))


def frames(number: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    images = 0.4 + 0.2 * torch.rand(number, 3, *SIZE, generator=generator)
    labels = torch.zeros(number, *SIZE, dtype=torch.int64)
    labels[:, :, :8] = 1
    labels[:, 0] = 255
    return images.numpy(), labels.numpy()


def options_of(name: str, **options: Any) -> dict[str, Any]:
    """Those of the options that an attack leaves open."""
    factory = entry(name).factory
    return {key: value for key, value in options.items() if key in getattr(factory, "open", options)}


#: How much of what the best patch can do each has to do; less where it is moved or shrunk in each look, or where the
#: search is blind, and by nature nothing where the loss is not looked at.
STRENGTH = {"eot": 0.5, "di": 0.6, "ipatch": 0.5, "square-patch": 0.7, "attention-fool-alone": None}


@pytest.mark.parametrize("name", [name for name, e in attacks().items() if e.threat == "patch"])
def test_every_patch_attack_comes_near_the_optimum_of_a_model_that_is_linear(name: str) -> None:
    share = STRENGTH.get(name, 0.9)
    if share is None:
        pytest.skip("it looks at attention alone; tests/test_attention.py measures that")
    # everything is class 1 unless the mean colour moves by `share` of what the best patch, a vertex, moves it
    grey, slope = np.full((1, 3, *SIZE), 0.5, np.float32), np.array([2.0, -1.0, 0.5])
    at_grey = float(0.5 * slope.sum())
    best = 0.25 * 0.5 * np.abs(slope).sum()  # a quarter of the pixels, half the range
    y = np.ones((1, *SIZE), np.int64)
    open_options = options_of(name, **PATCH, target="0", max_iter=600 if name == "square-patch" else 150, verbose=False)
    made = attack(name, glancing(bias=-at_grey - share * best), **open_options)
    if made.target_map(y) is None or name in ("permute", "strip"):
        y[:] = 1  # leave class 1, or the one absent class instead of it, which is 0
    adversarial = made.generate(grey, y)
    aim = made.target_map(y)
    predicted = glancing(bias=-at_grey - share * best).predict_labels(adversarial)
    counted = ~made.mask(grey) & (True if aim is None else aim != 255)
    if name == "strip":  # some bands may be of class 1 as it is
        counted &= aim == 0
    assert (predicted[counted] == 0).all()
    result = made.result
    assert result.seconds > 0
    assert result.forwards >= max(result.steps)
    assert (result.backwards == 0) == (name == "square-patch")


@pytest.mark.parametrize("name", attacks())
@pytest.mark.parametrize("target", [None, "permute", "1"])
def test_every_attack_keeps_its_promises(name: str, target: str | None) -> None:
    x, y = frames()
    given = options_of(name, **PATCH, max_iter=3, verbose=False, **({} if target is None else {"target": target}))
    if target is not None and "target" not in given:
        pytest.skip("it brings its own target")
    segmenter = glancing(-0.7, attention=1.0)
    made = attack(name, segmenter, **given)
    before = x.copy(), y.copy()
    adversarial = made.generate(x, y, images=[5, 7])
    assert np.array_equal(x, before[0])
    assert np.array_equal(y, before[1])
    assert adversarial.shape == x.shape
    assert adversarial.dtype == x.dtype
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    mask = made.mask(x)
    assert np.array_equal(adversarial.transpose(0, 2, 3, 1)[~mask], x.transpose(0, 2, 3, 1)[~mask])
    aim = made.target_map(y, [5, 7])
    assert (aim is None) == (not made.targeted)
    if aim is not None:
        assert (aim[y == 255] == 255).all()
    # the same seed gives the same, alone as in a batch, arrays as tensors
    again = attack(name, segmenter, **given).generate(x, y, images=[5, 7])
    assert np.array_equal(adversarial, again)
    alone = attack(name, segmenter, **given).generate(torch.from_numpy(x[1:]), torch.from_numpy(y[1:]), images=[7])
    np.testing.assert_allclose(alone.numpy(), adversarial[1:], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in attacks() if name != "adaptive"])
def test_a_repr_makes_the_attack_again(name: str) -> None:
    segmenter = glancing()
    made = attack(name, segmenter, **options_of(name, max_iter=7, seed=3))
    words = {**vars(targets), **vars(transformations), **vars(art_style), "InputDiversity": InputDiversity,
             "AttentionFool": AttentionFool, "OwnPrediction": OwnPrediction, "estimator": segmenter}  # fmt: skip
    rebuilt = eval(repr(made), words)  # it is our own
    assert repr(rebuilt) == repr(made)
    assert type(rebuilt) is type(made)


def test_the_adaptive_attack_leaves_out_what_does_not_apply() -> None:
    plain = PyTorchSegmenter(nn.Conv2d(3, 2, 3, padding=1), nb_classes=2, input_shape=(3, *SIZE))
    made = attack("adaptive", plain, max_iter=2, verbose=False, target="permute", **PATCH)
    assert isinstance(made, ensemble.WorstCaseAttack)
    assert "attention-fool" not in made.attacks
    assert "attention-fool" in attack("adaptive", glancing()).attacks  # type: ignore[attr-defined]
    x, y = frames()
    made.generate(x, y)
    assert set(made.chosen or ()) <= set(made.attacks)
    each = np.array(list((made.judged or {}).values()))
    assert np.allclose(each.max(0), made.result.criterion)  # type: ignore[union-attr]


def test_there_are_twenty_and_more_and_each_says_what_it_is() -> None:
    assert len(attacks()) >= 20
    assert set(PATCH_ATTACKS) | set(PIXEL_ATTACKS) <= set(attacks())
    for name, e in attacks().items():
        assert e.name == name
        assert e.summary.endswith(".")
        assert json.dumps(e.options)


def test_a_name_may_carry_options() -> None:
    assert split_name("ram") == ("ram", {})
    assert split_name("apgd:target=strip,patch_shape=(3, 4),max_iter=5") == (
        "apgd",
        {"target": "strip", "patch_shape": (3, 4), "max_iter": 5},
    )
    made = attack("apgd:target=strip,max_iter=5", glancing(), max_iter=6)
    assert (made.target, made.max_iter, made.optimizer) == ("strip", 6, "apgd")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"no attack named 'apdg': did you mean 'apgd'"):
        entry("apdg")
    with pytest.raises(ValueError, match="no option"):
        entry("apgd:target")


def test_an_attack_is_added_by_registering_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_ENTRIES", dict(catalogue._ENTRIES))

    @register_attack("grey", paper="Nobody, Nothing, 2020")
    def grey(segmenter: Any, **options: Any) -> Any:
        """A grey patch."""
        return art_style.PatchAttack(segmenter, **{**options, "max_iter": 1})

    assert attacks()["grey"].summary == "A grey patch."
    with pytest.raises(ValueError, match="already"):
        register_attack("grey")(grey)


def test_the_page_is_up_to_date() -> None:
    held = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text()
    assert held == page(), "run: python -m attacks.page > docs/attacks.md"


# ---------------------------------------------------------------- input diversity


def test_input_diversity_shrinks_and_pads_within_the_patch() -> None:
    images, patch = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 6, 6)
    drawn = InputDiversity(resize_rate=0.5, diversity_prob=1.0).sample([(0, 0), (0, 1)])
    placed, covered = drawn.apply(images, patch, (3, 4))
    assert torch.equal(placed[:, :, ~covered], images[:, :, ~covered])
    assert covered.sum() == 36
    inside = placed[:, :, 3:9, 4:10]
    assert (inside == 0).any()
    assert not torch.equal(inside, patch)
    ones, _ = drawn.apply(images, torch.ones_like(patch), (3, 4))
    height = (ones[:, 0, 3:9, 4:10] > 0).any(2).sum(1)
    assert torch.equal(height, (drawn.scale * 6).round().long())
    never, _ = InputDiversity(diversity_prob=0.0).sample([(0, 0), (0, 1)]).apply(images, patch, (3, 4))
    assert torch.equal(never[:, :, 3:9, 4:10], patch)
    one = InputDiversity().sample([(0, 1)])
    assert torch.equal(one.scale, InputDiversity().sample([(5, 5), (0, 1)]).scale[1:])


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"resize_rate": 0.0}, {"diversity_prob": 1.5}])
def test_input_diversity_refuses_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        InputDiversity(**wrong)


def test_ratios_are_numbers_and_multiples_of_one_nth_are_text() -> None:
    assert split_name("pixel-fgsm:eps=8/255,norm=inf") == ("pixel-fgsm", {"eps": 8 / 255, "norm": "inf"})
    assert split_name("ram:max_attention=3/N") == ("ram", {"max_attention": "3/N"})
    assert [ratio(value) for value in ("0.5/255", "3/0", 4, "a/b")] == [0.5 / 255, "3/0", 4, "a/b"]
