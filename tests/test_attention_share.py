"""Where attention goes: shares by hand, what RAM lets through, rollout as a product, and the two commands."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny import NB_CLASSES, SHAPE, TinyAttention, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from attacks.catalogue import attack
from attacks.patch import rectangle
from evaluation.attention_share import (
    attacked_shares,
    attention_share,
    rollout,
    rollout_figure,
)
from evaluation.cli import app
from ramdefense import NotApplicableError, PyTorchSegmenter, RAMDefense, attention_sites, refine
from ramdefense.streams import keep_mask

HEIGHT, WIDTH = SHAPE[1:]
UNDER = [7, 8, 12, 13]  # of the 4×5 tokens of 4×4 pixels
COVERED = rectangle((8, 8), (4, 8), (HEIGHT, WIDTH))
CENTRES = [(4 * row + 2, 4 * column + 2) for row in range(4) for column in range(5)]
OUTSIDE = [i for i in range(20) if i not in UNDER]


def sharp_attention(seed: int = 0) -> TinyAttention:
    """Scores far from even, so that something can be bounded."""
    model = tiny_attention(seed).eval()
    with torch.no_grad():
        model.qkv.weight[:32].mul_(4)
    return model


def segmenter(model: nn.Module) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, NB_CLASSES, SHAPE)


def scores_of(model: TinyAttention, images: Tensor) -> Tensor:
    tokens = model.embed(images).flatten(2).mT
    q, k, _ = model.qkv(tokens).unflatten(2, (3, model.heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT * q.shape[-1] ** -0.5).detach()


def by_hand(weights: Tensor, under: list[int] = UNDER, outside: list[int] = OUTSIDE) -> float:
    """(N, heads, queries, keys): key by key."""
    return float(sum(weights[:, :, outside, key].double().mean() for key in under))


def only(shares: pd.DataFrame) -> dict[str, float]:
    (row,) = shares.to_dict("records")
    return {str(name): value for name, value in row.items()}


def test_the_share_is_the_mass_on_the_keys_under_the_patch() -> None:
    model, images = sharp_attention(), random_images(3)
    row = only(attention_share(segmenter(model), images, COVERED))
    weights = scores_of(model, images).softmax(-1)
    assert row["share"] == pytest.approx(by_hand(weights), rel=1e-5)
    assert row["share"] != pytest.approx(by_hand(weights, outside=list(range(20))), rel=1e-3), "of the queries outside"
    assert row["unrefined"] == pytest.approx(row["share"], rel=1e-5), "nothing refines"
    assert row["uniform"] == pytest.approx(4 / 20)
    assert row["total"] == pytest.approx(1, rel=1e-6)
    assert (row["heads"], row["queries"], row["keys"], row["occurrence"]) == (2, 20, 20, 0)
    assert row["site"] == attention_sites(model, SHAPE)[0].name


def test_each_image_has_its_own_patch() -> None:
    model, images = sharp_attention(), random_images(2)
    corner = rectangle((4, 4), (0, 0), (HEIGHT, WIDTH))
    row = only(attention_share(segmenter(model), images, torch.stack([COVERED, corner])))
    weights = scores_of(model, images).softmax(-1)
    expected = (by_hand(weights[:1]) + by_hand(weights[1:], [0], list(range(1, 20)))) / 2
    assert row["share"] == pytest.approx(expected, rel=1e-5)
    assert row["uniform"] == pytest.approx((4 / 20 + 1 / 20) / 2)


def test_even_attention_gives_the_patch_its_area() -> None:
    model = tiny_attention()
    with torch.no_grad():
        # places are found by the queries' and keys' changes, so they have to change a little
        model.qkv.weight[:32].mul_(1e-4)
        model.qkv.bias[:32].zero_()
    row = only(attention_share(segmenter(model), random_images(2), COVERED))
    assert row["share"] == pytest.approx(row["uniform"], rel=1e-5)


@pytest.mark.parametrize("suppression", ["cap", "clamp", "temperature", "scale"])
def test_under_ram_the_share_is_what_it_lets_through(suppression: str) -> None:
    """The refined matrix by hand, with the mask of the draw and of the images' streams; the plain one beside it."""
    model, images, streams = sharp_attention(), random_images(2), (6, 3)
    options = {"max_attention": "2/N", "suppression": suppression, "dropout": 0.3}
    hard = RAMDefense(segmenter(model), **options)
    row = only(attention_share(hard, images, COVERED, streams=streams))
    scores = scores_of(model, images)
    keep = keep_mask(scores.shape, 0.3, seed=0, draw=-1, images=streams, site="")
    refined = refine(scores, **options, keep=keep)
    assert row["share"] == pytest.approx(by_hand(refined), rel=1e-5)
    assert row["total"] == pytest.approx(float(refined[:, :, OUTSIDE].double().sum(-1).mean()), rel=1e-5)
    assert row["unrefined"] == pytest.approx(by_hand(scores.softmax(-1)), rel=1e-5)
    assert row["site"] == attention_sites(model, SHAPE)[0].name, "the name in the model that was hardened"
    again = only(attention_share(hard, images.flip(0), COVERED, streams=(3, 6)))
    assert again["share"] == pytest.approx(row["share"], rel=1e-5), "a share belongs to its images"
    assert only(attention_share(hard, images, COVERED, streams=streams, draw=5))["share"] != row["share"]


class Magnet(nn.Module):
    """Every query looks at the bright token, nearly all of its attention; one head, or two that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, NB_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.avg_pool2d(images.mean(1, keepdim=True), 4)
        keys = tokens.flatten(2).mT
        mixed = ((40 + 1e-3 * keys) @ keys.mT).softmax(-1) @ keys
        return self.head(mixed.mT.reshape(tokens.shape))


def test_ram_takes_a_magnet_its_pull() -> None:
    """Nearly all of the attention lands on one bright token; at most T = 3/N does with RAM."""
    images = torch.full((1, *SHAPE), 0.2)
    images[..., 4:8, 8:12] = 1.0
    covered = rectangle((4, 4), (4, 8), (HEIGHT, WIDTH))
    victim = segmenter(Magnet())
    assert only(attention_share(victim, images, covered))["share"] > 0.99
    row = only(attention_share(RAMDefense(victim, max_attention="3/N", dropout=0), images, covered))
    assert row["share"] == pytest.approx(3 / 20, rel=1e-4)
    assert row["unrefined"] > 0.99
    assert row["uniform"] == pytest.approx(1 / 20)


def test_windows_count_for_what_they_can_see() -> None:
    """torchvision's Swin, two blocks, windows of 4×4 tokens of 4×4 pixels: a patch on one whole window gets nothing
    from the others, and all queries outside it are in the others."""
    from torchvision.models import SwinTransformer

    class Swin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.swin, self.head = SwinTransformer([4, 4], 12, [2], [2], [4, 4]), nn.Conv2d(12, NB_CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.swin.features(images).permute(0, 3, 1, 2))

    victim = PyTorchSegmenter(Swin(), NB_CLASSES, (3, 32, 32))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, shifted = attention_share(victim, images, rectangle((16, 16), (0, 0), (32, 32))).to_dict("records")
    assert first["share"] == first["uniform"] == 0
    assert first["keys"] == 16
    # rolled by two tokens, each window has 4 of its 16 keys under the patch
    assert shifted["uniform"] == pytest.approx(1 / 4)
    # but sees across no border of the image: of 48 queries outside 12 look at 4 of 16 keys, 8 at 4 of 8, 28 at none;
    # fresh weights attend nearly evenly
    assert shifted["share"] == pytest.approx((12 / 4 + 8 / 2) / 48, rel=0.1)
    with pytest.raises(NotApplicableError, match="attends within 4 windows"):
        rollout(victim, images)


@pytest.mark.parametrize(
    ("covered", "message"),
    [
        (COVERED.float(), "covered is torch.float32"),
        (COVERED[1:], r"bool of shape \(16, 20\)"),
        (COVERED.expand(3, -1, -1), r"or \(2, 16, 20\)"),
        (torch.zeros_like(COVERED), "in each image some"),
        (torch.ones_like(COVERED), "and not all"),
    ],
)
def test_what_is_covered_has_to_fit(covered: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_share(segmenter(tiny_attention()), random_images(2), covered)


def test_a_model_without_attention_is_named() -> None:
    for function in (lambda s, x: attention_share(s, x, COVERED), rollout):
        with pytest.raises(NotApplicableError, match=r"^no attention between places of the image.*that attends$"):
            function(segmenter(tiny_cnn()), random_images(1))


# --------------------------------------------------------------------------------------------------------- rollout


class TwoLayers(nn.Module):
    """Two attentions over 4×4 patches, with residual connections, and a class token in front if asked for."""

    def __init__(self, class_token: bool = False, second_width: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, NB_CLASSES, 1)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(8, 24)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8)) if class_token else None
        self.second_width = second_width  # tokens that the second layer's keys are averaged over

    def matrices(self, tokens: Tensor, **options: Any) -> Iterator[Tensor]:
        for layer, width in ((self.first, 1), (self.second, self.second_width)):
            q, k, v = layer(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            k, v = (t.unflatten(2, (-1, width)).mean(3) for t in (k, v))
            scores = 20 * q @ k.mT
            weights = refine(scores, **options) if options else scores.softmax(-1)
            yield weights
            tokens = tokens + (weights @ v).transpose(1, 2).flatten(2)
        self.last = tokens

    def tokens(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).mT
        front = [] if self.class_token is None else [self.class_token.expand(len(tokens), -1, -1)]
        return torch.cat([*front, tokens], 1)

    def forward(self, images: Tensor) -> Tensor:
        list(self.matrices(self.tokens(images)))
        return self.head(self.last[:, -20:].mT.unflatten(2, (4, 5)))


@pytest.mark.parametrize("options", [{}, {"max_attention": "1.5/N", "suppression": "clamp"}])
@pytest.mark.parametrize("class_token", [False, True])
def test_rollout_is_the_product_of_the_layers(class_token: bool, options: dict[str, Any]) -> None:
    """(0.5 A₂ + 0.5 I)(0.5 A₁ + 0.5 I), heads averaged, rows of sum 1, and their mean; A as RAM lets it through. A
    class token passes on what it got, and has no place itself, neither as the row of an output nor on the map."""
    model, images = TwoLayers(class_token).eval(), random_images(2)
    victim = segmenter(model)
    maps = rollout(RAMDefense(victim, **options, dropout=0) if options else victim, images)
    assert maps.shape == (2, HEIGHT, WIDTH)
    with torch.no_grad():
        one, two = (weights.mean(1).double() for weights in model.matrices(model.tokens(images), **options))
    assert (float(one.sum(-1).min()) < 0.95) == bool(options), "a clamped row has lost something"
    eye = torch.eye(one.shape[-1], dtype=torch.float64)
    layers = [0.5 * matrix + 0.5 * eye for matrix in (one, two)]
    first, second = (layer / layer.sum(-1, keepdim=True) for layer in layers)
    expected = (second @ first)[:, -20:].mean(1)[:, -20:]
    expected = expected / expected.sum(-1, keepdim=True)
    rows, columns = zip(*CENTRES, strict=True)
    at_tokens = maps[:, rows, columns]
    torch.testing.assert_close(at_tokens / at_tokens.sum(-1, keepdim=True), expected, rtol=1e-5, atol=0)
    for flow, values in zip(maps, at_tokens, strict=True):
        assert set(flow.unique().tolist()) == set(values.tolist()), "each pixel has the value of a token"
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_rollout_needs_one_sequence_of_tokens() -> None:
    with pytest.raises(NotApplicableError, match=r"\(root\).*its 20 queries are not its 10 keys"):
        rollout(segmenter(TwoLayers(second_width=2)), random_images(1))


# ---------------------------------------------------------------------------------------------------- under attack


def test_attention_is_drawn_to_an_attack_on_it_and_less_so_under_ram() -> None:
    """The attack that pulls attention to its patch, made on the plain model and on the hardened one."""
    plain = segmenter(sharp_attention())
    segmenters = {"none": plain, "ram": RAMDefense(plain, max_attention="1.2/N", dropout=0)}
    x, y = random_images(2).numpy(), random_labels(2).numpy()
    found = attacked_shares(
        segmenters,
        lambda s: attack("attention-fool", s, patch_shape=(8, 8), patch_location=(4, 8), max_iter=6, verbose=False),
        x,
        y,
        streams=(4, 1),
        batch_size=1,
    )
    by_state = {(row["defence"], row["attacked"]): row for row in found.shares.to_dict("records")}
    assert list(by_state) == [("none", False), ("none", True), ("ram", False), ("ram", True)]
    assert by_state["none", True]["share"] > 1.2 * by_state["none", False]["share"]
    assert by_state["ram", True]["share"] <= 4 * 1.2 / 20 < by_state["ram", True]["unrefined"]
    assert by_state["ram", True]["share"] < by_state["none", True]["share"]
    for name, patched in found.patched.items():
        assert torch.equal(patched.covered, COVERED.expand(2, -1, -1))
        expected = only(attention_share(segmenters[name], patched.images, patched.covered, streams=(4, 1)))
        assert by_state[name, True]["share"] == expected["share"]
    with pytest.raises(ValueError, match="every pixel, so there is no patch"):
        attacked_shares({"none": plain}, lambda s: attack("pixel-pgd", s, max_iter=1), x, y, streams=(0, 1))


def test_a_figure_has_the_picture_over_its_map() -> None:
    flow = torch.full((HEIGHT, WIDTH), 1 / (HEIGHT * WIDTH), dtype=torch.float64)
    image = random_images(1)[0]
    figure = rollout_figure({"clean": (image, flow, None), "attacked": (image, 2 * flow, COVERED)}, title="a frame")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["clean", "attacked"]
    shown = figure.axes[3].images[0]
    np.testing.assert_allclose(np.asarray(shown.get_array()), 2.0)
    assert shown.get_clim() == (0, pytest.approx(2.0)), "one scale for both"


# ------------------------------------------------------------------------------------------------------- commands

MODELS = '''
import torch
from torch import nn
from tiny import TinyAttention

def attention():
    torch.manual_seed(0)
    return TinyAttention(nb_classes=11)

def convolution():
    torch.manual_seed(0)
    return nn.Conv2d(3, 11, 3, padding=1)
'''
DATA = ("--data", "scenes:3", "--size", "32x48", "--images", "2", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module of models."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("my_models", None)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_field_prints_the_radii_and_writes_maps_and_a_table(folder: Path) -> None:
    both = ("--model", "my_models:attention", "--model", "my_models:convolution")
    done = call("field", *both, *DATA, "--draws", "1", "--out", "out")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(folder / "out" / "radii.csv")
    assert [*zip(table["model"], table["defence"], strict=True)] == [
        ("my_models:attention", "none"), ("my_models:attention", "ram"), ("my_models:convolution", "none"),
    ]  # fmt: skip
    assert table["radius_95"][2] == pytest.approx(math.sqrt(2)), "one 3×3 convolution"
    assert table["radius_95"][0] > 10
    lines = [line.split() for line in done.output.splitlines()]
    shown = table.to_dict("records")[2]
    assert [
        "my_models:convolution", "none", f"{shown['radius_50']:.1f}", "1.4", f"{100 * shown['relative_50']:.1f}", "2.5",
    ] in lines  # fmt: skip
    assert "n/a: ram does not apply to my_models:convolution: no attention was found in this model" in done.output
    maps = sorted(path.name for path in (folder / "out").glob("*.png"))
    assert len(maps) == 2
    assert all(name.startswith("field-my_models-") for name in maps)


def test_field_beside_a_run(folder: Path) -> None:
    common = ("--model", "my_models:attention", *DATA)
    run = call(
        "evaluate", *common, "--attack", "permute", "--defence", "none", "--max-iter", "1", "--patch-size", "8",
        "--out", "run", "--quiet",
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    done = call("field", *common, "--defence", "none", "--run", "run", "--out", "out")
    assert done.exit_code == 0, done.output
    assert (folder / "out" / "vulnerability.png").read_bytes().startswith(b"\x89PNG")


def test_attention_prints_a_share_for_each_site(folder: Path) -> None:
    done = call(
        "attention", "--model", "my_models:attention", *DATA, "--attack", "strip", "--max-iter", "1",
        "--patch-size", "8", "--patch-location", "0x0", "--out", "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    shares = pd.read_csv(folder / "out" / "attention.csv")
    assert [*zip(shares["defence"], shares["attacked"], strict=True)] == [
        ("none", False), ("none", True), ("ram", False), ("ram", True),
    ]  # fmt: skip
    assert shares["uniform"].tolist() == pytest.approx([4 / 96] * 4)
    line = next(line for line in done.output.splitlines() if "(root)" in line).split()
    expected = [shares["uniform"][0], *shares["share"][[0, 1, 3]], shares["unrefined"][3]]
    assert line[1:] == [f"{100 * value:.1f}" for value in expected]
    assert len(list((folder / "out").glob("rollout-*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("field", "--model", "nothing", *DATA), "unknown model 'nothing'"),
        (("field", "--model", "my_models:attention", *DATA, "--run", "."), "--run draws a figure: give --out"),
        (("field", "--model", "my_models:attention", *DATA, "--defence", "rum"), "did you mean 'ram'"),
        (("field", "--model", "my_models:attention", *DATA, "--draws", "0"), "draws=0: at least 1"),
        (("field", "--model", "my_models:attention", *DATA, "--device", "tpu"), "--device tpu: cpu or gpu"),
        (("attention", "--model", "my_models:convolution", *DATA), "no attention was found in this model"),
        (("attention", "--model", "my_models:attention", *DATA, "--attack", "strap"), "no attack named 'strap'"),
        (("attention", "--model", "my_models:attention", *DATA, "--option", "foo=1"), "option 'foo'"),
        (("attention", "--model", "my_models:attention", *DATA, "--attack", "pixel-fgsm"), "there is no patch"),
    ],
)
def test_a_mistake_is_one_clear_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
