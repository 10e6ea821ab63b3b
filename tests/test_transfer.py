"""The matrix of transfer, the universal patch on unseen frames, and their two commands."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny import coloured_shapes, files, linear_cnn, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from attacks import FixedClass, Patch, PatchAttack, PermuteAttack
from attacks.art_style import PixelAttack
from attacks.universal import UniversalPatchAttack
from evaluation import evaluate, experiment
from evaluation import transfer as module
from evaluation.cli import app
from evaluation.frames import IGNORE_INDEX, Frame
from evaluation.transfer import NO_PATCH, Transfer, transfer, universal
from ramdefense import defences
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

HEIGHT, WIDTH = 16, 20


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)


class Frames:
    """Five dark frames, all of class 0; frame i has i void pixels in its first row."""

    classes: Sequence[str] = tuple("abcd")
    colors: Sequence[tuple[int, int, int]] = ((0, 0, 0), (99, 0, 0), (0, 99, 0), (0, 0, 99))

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        label = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
        label[0, : index % 5] = IGNORE_INDEX
        return Frame(torch.full((3, HEIGHT, WIDTH), 0.1 + 0.01 * index), label, f"frame-{index}")


class Noise(Frames):
    """Random frames."""

    def __getitem__(self, index: int) -> Frame:
        return Frame(random_images(self.count)[index], random_labels(self.count)[index], str(index))


def segmenter(model: nn.Module) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, nb_classes=4, input_shape=(3, HEIGHT, WIDTH))


class Believer(nn.Module):
    """Believes some channels of the lower right pixel: where one is bright, the left ``reach`` columns are class 1."""

    def __init__(self, channels: Sequence[int], reach: int = WIDTH) -> None:
        super().__init__()
        self.channels, self.reach = channels, reach

    def forward(self, images: Tensor) -> Tensor:
        bright = (images[:, list(self.channels), -1, -1] > 0.5).any(1)
        logits = torch.zeros(len(images), 4, HEIGHT, WIDTH)
        logits[:, 0] = 1.0
        logits[:, 1, :, : self.reach] = 2.0 * bright[:, None, None]
        return logits


class Painter:
    """Paints the 2×2 lower right corner of all images but number 3 in the channels that the models believe."""

    calls = 0

    def __init__(self, victim: PyTorchSegmenter, seed: int = 0) -> None:
        believers = [m for m in victim.model.modules() if isinstance(m, Believer)]
        self.channels = sorted({channel for believer in believers for channel in believer.channels})

    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        type(self).calls += 1
        painted = x.copy()
        for row, image in enumerate(images):
            painted[row, self.channels, -2:, -2:] = float(image != 3)
        return painted

    def target_map(self, y: np.ndarray) -> np.ndarray:
        return np.where(y == IGNORE_INDEX, y, 1)

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), HEIGHT, WIDTH), dtype=bool)
        mask[:, -2:, -2:] = True
        return mask


def shown(result: Any) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    return str(console.export_text())


MODELS = {"red": [0], "green": [1], "both": [0, 1]}


def believers() -> dict[str, PyTorchSegmenter]:
    return {name: segmenter(Believer(channels, 8)) for name, channels in MODELS.items()}


def run(**options: Any) -> Transfer:
    return transfer(believers(), {"paint": Painter}, Frames(), verbose=False, **options)


def fooled(images: Sequence[int] = range(5)) -> float:
    """Of the pixels outside the patch that are not void, those in the left eight columns of all images but number 3."""
    total = sum(HEIGHT * WIDTH - 4 - image for image in images)
    return sum(HEIGHT * 8 - image for image in images if image != 3) / total


# --------------------------------------------------------------------------------------------------------- the matrix


def test_the_matrix_is_the_one_computed_by_hand() -> None:
    result = run()
    matrix = result.matrix()
    yes = fooled()
    assert list(matrix.columns) == ["red", "green", "both"]
    expected = {NO_PATCH: [0, 0, 0], "red": [yes, 0, yes], "green": [0, yes, yes], "both": [yes, yes, yes]}
    assert list(matrix.index) == list(expected)
    for made_on, cells in expected.items():
        assert matrix.loc[made_on].tolist() == pytest.approx(cells), made_on
    frame = result.frame()
    assert len(frame) == 9
    assert set(frame["images"]) == {5}
    assert set(frame["clean_miou"]) == {1.0}
    assert not result.interrupted
    text = shown(result)
    assert "attack: paint" in text
    assert next(line.split() for line in text.splitlines() if line.strip().startswith("both")) == [
        "both",
        *3 * [f"{100 * yes:.1f}"],
    ]


def test_some_images_and_other_batches() -> None:
    few = run(images=[4, 1], batch_size=1)
    assert few.matrix().loc["red", "both"] == pytest.approx(fooled([1, 4]))
    assert set(few.frame()["images"]) == {2}
    everywhere = run(region="everywhere").matrix().loc["red", "red"]
    assert everywhere == pytest.approx(sum(HEIGHT * 8 - i for i in (0, 1, 2, 4)) / (5 * HEIGHT * WIDTH - 10))


def test_the_others_at_once() -> None:
    matrix = run(ensembles=True).matrix()
    yes = fooled()
    assert list(matrix.index[4:]) == ["all but red", "all but green", "all but both"]
    assert matrix.loc["all but both"].tolist() == pytest.approx([yes, yes, yes])
    assert matrix.loc["all but green"].tolist() == pytest.approx([yes, yes, yes]), "both believes in green"
    assert list(matrix.columns) == ["red", "green", "both"]
    with pytest.raises(ValueError, match="there are 1; at least 3"):
        transfer(believers()["red"], {"paint": Painter}, Frames(), ensembles=True)


def real(attack: Any = "permute", **options: Any) -> Transfer:
    given = {"max_iter": 3, "eps_step": 0.3, "patch_shape": (6, 7), "verbose": False, **options}
    return transfer({"cnn": segmenter(tiny_cnn()), "attention": segmenter(tiny_attention())}, attack, Noise(), **given)


def test_the_diagonal_is_evaluates_white_box_number_and_the_rest_what_the_patches_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (experiment, module):
        monkeypatch.setattr(place, "CHUNK", 2)
    frame = real(out=tmp_path, batch_size=3).frame().set_index(["made_on", "tested_on"])
    models = {"cnn": segmenter(tiny_cnn()), "attention": segmenter(tiny_attention())}
    options: dict[str, Any] = {"max_iter": 3, "eps_step": 0.3, "patch_shape": (6, 7), "verbose": False}
    white = evaluate(models, "permute", "none", Noise(), **options).summary().set_index("model")
    for name in models:
        for column in ("success", "clean_success", "adversarial_miou"):
            assert frame.loc[(name, name), column] == white.loc[name, column]
    attack = PermuteAttack(models["cnn"], **options)
    x, y = random_images().numpy(), random_labels().numpy()
    predicted = models["attention"].predict_labels(attack.generate(x, y))
    counted = (y != IGNORE_INDEX) & ~attack.mask(x)
    hit = (predicted == attack.target_map(y))[counted].mean()
    assert frame.loc[("cnn", "attention"), "success"] == pytest.approx(hit)
    assert 0 < hit < 1
    assert pd.read_csv(tmp_path / "transfer.csv").set_index(["made_on", "tested_on"]).equals(frame)


def test_a_random_model_is_attacked_adaptively_and_judged_on_the_draw_of_evaluate() -> None:
    defended = defences.defence("ram:max_attention=3/N")(segmenter(tiny_attention()))
    options: dict[str, Any] = {"max_iter": 2, "patch_shape": (6, 7), "defence_samples": 2, "verbose": False}
    frame = transfer({"ram": defended, "cnn": segmenter(tiny_cnn())}, "permute", Noise(3), **options).frame()
    white = evaluate({"ram": defended}, "permute", "none", Noise(3), **options).summary()
    assert frame.set_index(["made_on", "tested_on"]).loc[("ram", "ram"), "success"] == white["adaptive_success"][0]


def test_pixelwise_attacks_and_attacks_that_do_not_apply() -> None:
    frame = real({"pixels": PixelAttack}, patch_shape=None, eps=0.1).frame()
    assert len(frame) == 4

    class Picky(Painter):
        def __init__(self, victim: PyTorchSegmenter) -> None:
            if victim.model.channels == [1]:
                raise NotApplicableError("no red: nothing to paint")
            super().__init__(victim)

    none = transfer({"green": segmenter(Believer([1]))}, {"picky": Picky}, Frames(), verbose=False)
    assert none.frame().empty
    assert "picky does not apply to green" in shown(none)
    result = transfer(believers(), {"picky": Picky}, Frames(), verbose=False)
    assert list(result.matrix().index) == [NO_PATCH, "red", "both"]
    assert list(result.matrix().columns) == ["red", "green", "both"]
    assert "picky does not apply to green: no red" in shown(result)


def test_a_run_that_is_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (experiment, module):
        monkeypatch.setattr(place, "CHUNK", 2)
    run(out=tmp_path / "whole")
    assert run().frame().equals(run(out=tmp_path / "whole").frame())
    generate = Painter.generate

    def stop(self: Painter, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        if Painter.calls == 4:
            raise KeyboardInterrupt
        return generate(self, x, y, images)

    Painter.calls = 0
    monkeypatch.setattr(Painter, "generate", stop)
    stopped = run(out=tmp_path / "stopped")
    assert stopped.interrupted
    assert stopped.frame().empty
    monkeypatch.setattr(Painter, "generate", generate)
    Painter.calls = 0
    again = run(out=tmp_path / "stopped")
    assert Painter.calls == 3 * 3 - 4, "chunks that were not finished"
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    Painter.calls = 0
    assert run(out=tmp_path / "stopped").frame().equals(again.frame())
    assert Painter.calls == 0
    with pytest.raises(ValueError, match="holds another run: it differs in seed"):
        run(out=tmp_path / "stopped", seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": "no-such"}, "no attack named 'no-such'"),
        ({"attack": {"one": Painter, "two": Painter}}, r"2 attacks \(one, two\); exactly one"),
        ({"attack": "permute", "epsilon": 1}, "option 'epsilon'"),
        ({"models": {"three": PyTorchSegmenter(linear_cnn(3), 3, (3, HEIGHT, WIDTH))}}, "3 classes and the data 4"),
        ({"images": 6}, "the data set has 5"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"models": believers(), "attack": {"paint": Painter}, "data": Frames(), **change}
    with pytest.raises(ValueError, match=message):
        transfer(**given, verbose=False)


# ---------------------------------------------------------------------------------------------- the universal patch


class Shapes(Frames):
    """Rectangles in red, green and blue."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count)
        self.images, self.labels = coloured_shapes(count, seed)

    def __getitem__(self, index: int) -> Frame:
        return Frame(self.images[index], self.labels[index], str(index))


class Context(nn.Module):
    """Class k is colour k, class 0 has none; the mean colour of the whole image adds to its class everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        context = 10 * (images.mean((2, 3), keepdim=True) - 0.4)
        return torch.cat([torch.full_like(images[:, :1], 0.7), images + context], 1)


GREEN = {"green": functools.partial(PatchAttack, target=FixedClass(2))}
FIT: dict[str, Any] = {"max_iter": 10, "eps_step": 0.1, "patch_shape": (8, 8), "batch_size": 4, "verbose": False}


def test_a_universal_patch_beats_the_others_on_unseen_frames(tmp_path: Path) -> None:
    victim = segmenter(Context())
    result = universal(victim, Shapes(8, 0), Shapes(6, 1), GREEN, out=tmp_path, test_images=5, **FIT)
    patch = Patch.load(tmp_path / "patch.safetensors")
    assert patch.pixels.shape == (3, 8, 8)
    assert torch.equal(patch.pixels, result.attack.patch.pixels)
    by_hand = UniversalPatchAttack(victim, target=FixedClass(2), **FIT).fit(Shapes(8, 0))
    assert torch.equal(by_hand.patch.pixels, patch.pixels)
    rates = result.successes()
    assert list(rates) == [NO_PATCH, "grey", "random", "universal"]
    assert rates["universal"] > max(rates[kind] for kind in (NO_PATCH, "grey", "random")) + 0.3
    chosen = [0, 1, 2, 4, 5]  # spread evenly
    outside = ~patch.mask((HEIGHT, WIDTH))
    images = Shapes(6, 1).images[chosen]
    for kind, other in {"universal": patch, "grey": Patch(torch.full((3, 8, 8), 0.5), "lower_right"),
                        NO_PATCH: None}.items():  # fmt: skip
        seen = images if other is None else other.paste(images)
        assert rates[kind] == pytest.approx(float((victim.predict_labels(seen) == 2)[:, outside].float().mean()))
    assert "5 frames that the patch has not seen" in shown(result)
    before = files(tmp_path)
    again = universal(victim, Shapes(8, 0), Shapes(6, 1), GREEN, out=tmp_path, test_images=5, **FIT)
    assert again.successes() == rates
    assert files(tmp_path) == before
    assert again.attack.result == result.attack.result, "not fitted anew"
    without = universal(victim, Shapes(8, 0), Shapes(6, 1), GREEN, test_images=5, **FIT)
    assert without.successes() == rates


def test_train_frames_are_chosen_by_their_number() -> None:
    victim = segmenter(Context())
    some = universal(victim, Shapes(8, 0), Shapes(2, 1), GREEN, images=[1, 6, 3], epochs=2, **FIT)
    data = Shapes(8, 0)
    by_hand = UniversalPatchAttack(victim, target=FixedClass(2), **FIT).fit([data[1], data[6], data[3]], epochs=2)
    assert torch.equal(some.attack.patch.pixels, by_hand.patch.pixels)


def test_a_patch_is_not_tested_on_what_it_was_made_on() -> None:
    victim = segmenter(Context())
    for data, options in ((Shapes(8, 0), {}), (Shapes(8, 0), {"test_images": [7], "images": [7, 1]})):
        with pytest.raises(ValueError, match="test frames are among the train frames"):
            universal(victim, data, Shapes(8, 0), GREEN, **options, **FIT)
    universal(victim, Shapes(8, 0), Shapes(8, 0), GREEN, images=range(4), test_images=range(4, 8), **FIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": {"pixels": PixelAttack}, "patch_shape": None}, "'pixels': A PixelAttack cannot be made universal"),
        ({"attack": {"paint": Painter}}, "option 'max_iter': attack 'paint' does not have it"),
        ({"attack": "permute", "epsilon": 1}, "option 'epsilon'"),
        ({"epochs": 0}, "`epochs` is 0"),
        ({"test": "scenes:2"}, "4 classes and the data 11"),
    ],
)
def test_mistakes_with_universal_patches_are_named(change: dict[str, Any], message: str) -> None:
    given = {"train": Shapes(4, 0), "test": Shapes(2, 1), "attack": GREEN, **FIT, **change}
    with pytest.raises(ValueError, match=message):
        universal(segmenter(Context()), **given)


# ------------------------------------------------------------------------------------------------- the command line

MY_MODELS = """
from tiny import linear_cnn, tiny_attention, tiny_cnn, TinyAttention
def convolution(): return linear_cnn(11)
def deeper(): return tiny_cnn(11)
def attention(): return TinyAttention(nb_classes=11)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_transfer.py").write_text(MY_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_transfer(here: Path) -> None:
    models = [part for name in ("convolution", "deeper") for part in ("--model", f"models_of_transfer:{name}")]
    command = ("transfer", *models, "--data", "scenes:3", "--size", "32x48", "--attack", "permute", "--images", "2",
               "--max-iter", "2", "--patch-size", "8x9", "--patch-location", "upper_left", "--option", "eps_step=0.2",
               "--out", "run", "--quiet")  # fmt: skip
    done = call(*command)
    assert done.exit_code == 0, done.output
    assert "attack: permute" in done.output
    assert "no patch" in done.output
    frame = pd.read_csv(here / "run/transfer.csv")
    assert list(frame["made_on"]) == [
        n for n in ("models_of_transfer:convolution", "models_of_transfer:deeper") for _ in "ab"
    ]
    assert len(list((here / "run/made/patches").rglob("*.safetensors"))) == 2
    assert call(*command).output == done.output
    for extra, message in ((("--ensembles",), "at least 3"), (("--device", "tpu"), "--device tpu"),
                           (("--target", "strip"), "option 'target'")):  # fmt: skip
        wrong = call(*command, *extra)
        assert wrong.exit_code == 2
        assert message in wrong.stderr


def test_the_command_universal(here: Path) -> None:
    command = ("universal", "--model", "models_of_transfer:deeper", "--data", "scenes:4", "--test", "scenes:3:1",
               "--size", "32x48", "--attack", "mi", "--target", "3", "--epochs", "2", "--batch-size", "2",
               "--patch-size", "10", "--out", "run", "--quiet")  # fmt: skip
    done = call(*command)
    assert done.exit_code == 0, done.output
    for kind in ("no patch", "grey", "random", "universal"):
        assert any(line.strip().startswith(kind) for line in done.output.splitlines())
    assert Patch.load(here / "run/patch.safetensors").pixels.shape == (3, 10, 10)
    assert call(*command).output == done.output
    same = call("universal", "--model", "models_of_transfer:deeper", "--data", "scenes:4", "--test", "scenes:3",
                "--size", "32x48")  # fmt: skip
    assert same.exit_code == 2
    assert "3 of 3 test frames are among the train frames" in same.stderr


def test_what_all_names_share_is_said_once() -> None:
    models = {f"zoo:camvid-{name}": model for name, model in believers().items()}
    text = shown(transfer(models, {"paint": Painter}, Frames(), verbose=False))
    assert text.count("zoo:camvid-") == 1
    assert "made on" in text
    assert text.split("no patch")[0].split()[-4:-1] == ["red", "green", "both"]
