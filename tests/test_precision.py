"""Batches that do not fit, bfloat16 and compiled models: what stays the same, and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NB_CLASSES, SHAPE, files, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn
from typer.testing import CliRunner

from attacks import PermuteAttack
from attacks.catalogue import attack as by_name
from evaluation import experiment
from evaluation.cli import app
from evaluation.experiment import evaluate
from evaluation.fingerprints import model_fingerprint
from evaluation.frames import Frame
from evaluation.keys import cell_key
from evaluation.memory import BatchSize
from evaluation.precision import prepared
from evaluation.results import Results
from evaluation.runfile import RunFile
from ramdefense.defences import defence
from ramdefense.segmenter import PyTorchSegmenter


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **options: None)


class Frames:
    classes: Sequence[str] = tuple("abcd")
    colors: Sequence[tuple[int, int, int]] = ((0, 0, 0),) * 4

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Frame:
        return Frame(random_images()[index], random_labels()[index], f"frame-{index}")


def segmenter(model: nn.Module, **options: Any) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, NB_CLASSES, SHAPE, **options)


def run(model: nn.Module, out: Path | None = None, **change: Any) -> Results:
    given = {"attacks": "permute", "defences": ("none", "ram"), "max_iter": 2, "patch_shape": (5, 6), "verbose": False}
    given["checks"] = False
    return evaluate({"m": segmenter(model)}, data=Frames(), out=out, **{**given, **change})


# -------------------------------------------------------------------------------------------------------------- memory


class Small(nn.Module):
    """A device with room for so many images: with a gradient, each needs twice as much."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.inner, self.room = tiny_attention(), room
        self.held: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        needed = len(images) * (2 if images.requires_grad else 1)
        if needed > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {needed} images.")
        self.held.append(len(images))
        return self.inner(images)


def test_out_of_memory_halves_the_batch_and_changes_no_row(tmp_path: Path) -> None:
    """Batches of 8, 4 (5 images fit none of them) and 2; the clean predictions would have had room for 4."""
    with pytest.warns(UserWarning, match="out of GPU memory with") as caught:
        squeezed = run(Small(4), tmp_path / "squeezed")
    said = [str(w.message) for w in caught if "out of GPU memory" in str(w.message)]
    assert said == [
        "out of GPU memory with 5 images at once; the run goes on with batches of 3 instead of 8",
        "out of GPU memory with 3 images at once; the run goes on with batches of 2 instead of 3",
    ]
    assert json.loads((tmp_path / "squeezed/config.json").read_text())["environment"]["batch_size_that_fits"] == 2
    for size in (2, 8):
        run(Small(100), tmp_path / f"{size}", batch_size=size)
        assert without_times(tmp_path / "squeezed") == without_times(tmp_path / f"{size}")
    assert len(squeezed.records) == 5 * 4


def without_times(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name != "config.json"}


def test_attacks_are_made_anew_with_the_smaller_batch() -> None:
    made: list[int] = []

    def watched(target: PyTorchSegmenter, batch_size: int = 8, **options: Any) -> PermuteAttack:
        made.append(batch_size)
        return PermuteAttack(target, batch_size=batch_size, patch_shape=(5, 6), max_iter=2, verbose=False)

    model = Small(4)
    with pytest.warns(UserWarning, match="out of GPU memory"):
        evaluate({"m": segmenter(model)}, {"watched": watched}, "none", Frames(), verbose=False, checks=False)
    assert made == [8, 3, 2]
    assert max(model.held) <= 4


@pytest.mark.filterwarnings("ignore:out of GPU memory")
@pytest.mark.parametrize("keep_going", [False, True])
def test_an_image_that_does_not_fit_alone_says_what_to_do(keep_going: bool) -> None:
    what = r"out of GPU memory with a single image \(CUDA out of memory. Tried to allocate 2 images\.\); take smaller"
    if keep_going:
        (left_out,) = run(Small(1), defences="none", keep_going=True).left_out
        assert left_out.reason.startswith("out of GPU memory with a single image")
        return
    with pytest.raises(ValueError, match=what):
        run(Small(1), defences="none")


@pytest.mark.filterwarnings("ignore:out of GPU memory")
@pytest.mark.parametrize("room", [1, 2, 3, 5, 8, 100])
def test_every_image_is_worked_on_once_whatever_fits(room: int) -> None:
    noted: list[int] = []
    tried: list[int] = []

    def work(batch: Sequence[int], size: int) -> list[int]:
        tried.append(len(batch))
        assert len(batch) <= size
        if len(batch) > room:
            raise torch.OutOfMemoryError("no")
        return list(batch)

    batches = BatchSize(8, noted.append)
    images = list(range(100, 121))
    made = list(batches.over(images, work))
    assert [image for batch in made for image in batch] == images
    assert batches.size <= max(room, 8 if room >= 8 else room)
    assert len(noted) == sum(size > room for size in tried), "one note for each that did not fit"
    assert batches.size * 2 >= min(room, 8), "no smaller than it needs to be"


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def work(batch: Sequence[int], size: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(BatchSize(8, pytest.fail).over([0, 1], work))


# ----------------------------------------------------------------------------------------------------------------- amp


@pytest.mark.parametrize("make", [tiny_cnn, tiny_attention])
def test_bfloat16_is_inside_the_model_alone(make: Any) -> None:
    seen: dict[str, torch.dtype] = {}
    model = make()
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    layer.register_forward_hook(lambda module, given, made: seen.update(given=given[0].dtype, made=made.dtype))
    exact, rough = segmenter(make()), segmenter(model, amp="bf16")
    x, y = random_images(), random_labels()
    logits = rough.logits(x)
    assert seen == {"given": torch.float32, "made": torch.bfloat16}
    assert logits.dtype == torch.float32
    error = float((logits - exact.logits(x)).abs().max().detach())
    assert 0 < error < 0.03
    if make is tiny_attention:  # resized in float32: in bfloat16 many pixels between two others would have one value
        assert len(logits.unique()) > 1000
    one, two = exact.loss_gradient(x, y), rough.loss_gradient(x, y)
    assert two.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), 0) > 0.99
    assert not torch.equal(one, two)


def test_a_defended_model_keeps_its_precision_and_is_refined() -> None:
    model = tiny_attention()
    model.qkv.weight.data *= 8  # attention that is not even, so that there is something to refine
    ram = defence("ram:max_attention=1/N,dropout=0,suppression=clamp")
    x = random_images()
    refined, exact = ram(segmenter(model, amp="bf16")), ram(segmenter(model))
    assert refined.amp == "bf16"
    effect = (exact.logits(x) - segmenter(model).logits(x)).abs().max()
    error = (refined.logits(x) - exact.logits(x)).abs().max()
    assert 0 < error < effect / 3, "what RAM does is more than what the precision does"


def test_attention_is_watched_in_bfloat16() -> None:
    x, y = random_images().numpy(), random_labels().numpy()
    options: dict[str, Any] = {"patch_shape": (5, 6), "max_iter": 3, "verbose": False}
    results = []
    for amp in (None, "bf16"):
        attack = by_name("attention-fool-alone", segmenter(tiny_attention(), amp=amp), **options)
        assert attack.generate(x, y).dtype == np.float32
        results.append(attack.result.loss)
    assert results[0] != results[1]
    assert results[0] == pytest.approx(results[1], rel=0.02)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match='amp is \'fp8\'; give "bf16" or None'):
        segmenter(tiny_cnn(), amp="fp8")
    with pytest.raises(ValueError, match='amp is \'fp8\'; give "bf16" or None'):
        run(tiny_cnn(), amp="fp8")


# ------------------------------------------------------------------------------------------------ what decides the rows


CONFIGURATION: dict[str, Any] = {
    "models": {"m": "1"}, "attacks": {"a": "2"}, "defences": {"none": "3"}, "data": {"classes": ["x"]}, "seed": 0,
    "options": {}, "region": "outside", "versions": {},
}  # fmt: skip
CELL = {"model": "m", "attack": "a", "defence": "none", "variant": "plain", "chunk": 0, "seed": None}


def test_precision_decides_the_key_and_old_keys_stay() -> None:
    plain = cell_key(CONFIGURATION, CELL)
    assert plain == "7e8468057f732db6", "as before there was a choice"
    others = {cell_key(CONFIGURATION | change, CELL) for change in ({"amp": "bf16"}, {"compile": True})}
    assert len({plain, *others}) == 3


def test_the_fingerprint_of_a_model_tells_its_precision() -> None:
    exact, rough = segmenter(tiny_cnn()), segmenter(tiny_cnn(), amp="bf16")
    assert model_fingerprint(exact) != model_fingerprint(rough)
    assert model_fingerprint(prepared(exact, amp="bf16", compiled=False)) == model_fingerprint(rough)
    assert exact.amp is None, "the one that was given stays"


def test_a_folder_of_another_precision_is_refused(tmp_path: Path) -> None:
    run(tiny_cnn(), tmp_path / "exact", defences="none")
    run(tiny_cnn(), tmp_path / "rough", defences="none", amp="bf16")
    assert json.loads((tmp_path / "rough/config.json").read_text())["amp"] == "bf16"
    for folder, amp in (("exact", "bf16"), ("rough", None)):
        with pytest.raises(ValueError, match="holds another run: it differs in models, amp"):
            run(tiny_cnn(), tmp_path / folder, defences="none", amp=amp)
    with pytest.raises(ValueError, match="differ in amp"):
        Results.joined([Results.load(tmp_path / "exact"), Results.load(tmp_path / "rough")])


def test_a_run_file_has_both() -> None:
    held = RunFile.checked({"models": "zoo:scenes-cnn", "data": "scenes:2", "amp": "bf16", "compile": True})
    assert held.arguments()["amp"] == "bf16"
    assert held.arguments()["compile"] is True
    with pytest.raises(ValueError, match="amp='fp16'"):
        RunFile.checked({"models": "zoo:scenes-cnn", "data": "scenes:2", "amp": "fp16"})
    assert RunFile.checked({"models": "m", "data": "d"}).arguments()["amp"] is None


def test_the_command_line_has_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def noted(**arguments: Any) -> Results:
        given.update(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(experiment, "evaluate", noted)
    arguments = ["evaluate", "--model", "zoo:scenes-cnn", "--data", "scenes:2", "--amp", "bf16", "--compile"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert (given["amp"], given["compile"]) == ("bf16", True)


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
def test_a_compiled_model_is_a_copy_and_a_defence_of_it_is_not_compiled() -> None:
    given = segmenter(tiny_attention())
    compiled = prepared(given, amp=None, compiled=True)
    assert compiled.model is not given.model
    assert compiled.model._compiled_call_impl is not None
    assert given.model._compiled_call_impl is None
    refined = defence("ram:dropout=0")(compiled)  # which runs the copy that it makes, to see that it attends
    assert all(module._compiled_call_impl is None for module in refined.model.modules())
    assert torch.equal(refined.logits(random_images()), defence("ram:dropout=0")(given).logits(random_images()))
    assert model_fingerprint(compiled) == model_fingerprint(given), "the configuration tells it"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_attacks_on_a_compiled_model_are_those_on_the_model_also_where_they_watch_its_attention(tmp_path: Path) -> None:
    attacks = ["permute", "attention-fool-alone"]
    compiled = run(tiny_attention(), tmp_path / "compiled", attacks=attacks, compile=True)
    eager = run(tiny_attention(), tmp_path / "eager", attacks=attacks)
    assert json.loads((tmp_path / "compiled/config.json").read_text())["compile"] is True
    assert len(compiled.records) == len(eager.records) == 2 * 5 * 4
    for one, two in zip(compiled.records, eager.records, strict=True):
        assert np.abs(one.adversarial - two.adversarial).sum() <= 6, "some pixels of 280, by rounding"
