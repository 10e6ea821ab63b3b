"""The lie detector: each check against something built to fail it and something built to pass, and what a run keeps."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import NB_CLASSES, SHAPE, coloured_shapes, files
from torch import Tensor, nn
from typer.testing import CliRunner

from evaluation import checks, experiment, findings
from evaluation.checks import CHECKS
from evaluation.cli import app
from evaluation.experiment import evaluate
from evaluation.findings import Finding
from evaluation.frames import Frame
from evaluation.probes import Batch, Trial, doubled
from evaluation.results import Record, Results
from evaluation.runfile import RunFile
from evaluation.verdicts import Verdict
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, Traits

IMAGES, LABELS = coloured_shapes(6)


class Shapes:
    classes: Sequence[str] = ("grey", "red", "green", "blue")
    colors: Sequence[tuple[int, int, int]] = ((99, 99, 99), (255, 0, 0), (0, 255, 0), (0, 0, 255))

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Frame:
        return Frame(IMAGES[index], LABELS[index], f"shapes-{index}")


class Seer(nn.Module):
    """Right by each pixel's own colour, and led astray by the mean colour of the whole image, which a patch shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> Tensor:
        return by_colour(10 * (images - 0.5) + self.strength * (images.mean(dim=(2, 3), keepdim=True) - 0.38))


def by_colour(colours: Tensor) -> Tensor:
    """Logits of grey, red, green and blue."""
    return torch.cat([torch.zeros_like(colours[:, :1]), colours], dim=1)


class Wrapped(nn.Module):
    """A defence as a function of the image and of the model."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.model, images)


class Declared(Wrapped):
    """The same, which says that it is random."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(model, forward)
        self.traits, self.conditions = Traits(random=True), Conditions()


def wrapped(forward: Callable[[nn.Module, Tensor], Tensor], kind: type[Wrapped] = Wrapped) -> Any:
    return lambda plain: plain.with_model(kind(plain.model, forward))


def constant(images: Tensor, number: int) -> Tensor:
    """Logits of one class everywhere."""
    logits = torch.zeros(len(images), NB_CLASSES, *images.shape[-2:])
    logits[:, number] = 5
    return logits


same = wrapped(lambda model, x: model(x))
rounded = wrapped(lambda model, x: model((8 * x).round() / 8))
one_class = wrapped(lambda model, x: model(x) + constant(x, 0) * 5)
noisy = wrapped(lambda model, x: model(x) + torch.randn(len(x), NB_CLASSES, *x.shape[-2:]))
openly_noisy = wrapped(lambda model, x: model(x) + 0.1 * torch.randn(len(x), NB_CLASSES, *x.shape[-2:]), Declared)


@wrapped
def remembers(model: nn.Module, x: Tensor) -> Tensor:
    """An input detector: what is not nearly one of the frames is all grey."""
    far = (x[:, None] - IMAGES).abs().mean(dim=(2, 3, 4)).amin(dim=1) > 0.01
    return torch.where(far[:, None, None, None], constant(x, 0) + 0 * model(x), model(x))


@wrapped
def no_white(model: nn.Module, x: Tensor) -> Tensor:
    """Sees through a patch that is nearly saturated, and so is fooled less by an attack that goes on."""
    white = (x[:, :1] > 0.95).flatten(1).sum(dim=1) > 20
    return torch.where(white[:, None, None, None], by_colour(10 * (x - 0.5)), model(x))


@wrapped
def small_only(model: nn.Module, x: Tensor) -> Tensor:
    """Is not led astray by a patch of more than 120 pixels."""
    large = (x[:, :1] > 0.7).flatten(1).sum(dim=1) > 120
    return torch.where(large[:, None, None, None], by_colour(10 * (x - 0.5)), model(x))


class Painter:
    """A red patch in a corner, the redder the more steps; what else it does the tests say."""

    def __init__(self, victim: PyTorchSegmenter, redness: float, shape: tuple[int, int]) -> None:
        self.victim, self.redness, self.shape = victim, redness, shape

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        mask = np.broadcast_to(self.mask(x)[:, None], x.shape)
        x[mask] = np.float32(0.4)
        x[:, 0][self.mask(x)] = np.float32(0.4 + 0.6 * self.redness)
        return x

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -self.shape[0] :, -self.shape[1] :] = True
        return mask


def painter(victim: PyTorchSegmenter, max_iter: int = 20, patch_shape: tuple[int, int] = (8, 8)) -> Painter:
    made = Painter(victim, min(1.0, 0.5 + max_iter / 40), patch_shape)
    made.max_iter = max_iter  # type: ignore[attr-defined]
    return made


def averaging_badly(victim: PyTorchSegmenter, defence_samples: int = 4, seed: int = 0) -> Painter:
    """Works with a single draw alone."""
    return Painter(victim, float(defence_samples == 1), (8, 8))


def averaging(victim: PyTorchSegmenter, defence_samples: int = 4) -> Painter:
    return Painter(victim, 1.0, (8, 8))


def lost_under_a_defence(victim: PyTorchSegmenter) -> Painter:
    """As an attack that finds no gradient on a defended model."""
    return Painter(victim, float(isinstance(victim.model, Seer)), (8, 8))


class Noise(Painter):
    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        mask = np.broadcast_to(self.mask(x)[:, None], x.shape)
        x[mask] = np.random.default_rng(0).random(int(mask.sum())).astype(np.float32)
        return x


@wrapped
def nervous(model: nn.Module, x: Tensor) -> Tensor:
    """All red where neighbouring pixels differ a lot, as they do in noise."""
    unrest = (x[..., 1:] - x[..., :-1]).abs().mean(dim=(1, 2, 3)) > 0.1
    return torch.where(unrest[:, None, None, None], constant(x, 1) + 0 * model(x), model(x))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)


def seer() -> PyTorchSegmenter:
    return PyTorchSegmenter(Seer(), NB_CLASSES, SHAPE)


def run(defence: Any, attack: Any = "untargeted", **options: Any) -> Results:
    attacks = attack if isinstance(attack, (str, list, dict)) else {"a": attack}
    known = {"patch_shape": (8, 8), "max_iter": 8, "eps_step": 0.1} if isinstance(attack, (str, list)) else {}
    return evaluate({"m": seer()}, attacks, {"d": defence}, Shapes(), verbose=False, **{**known, **options})


def verdict(results: Results, check: str, attack: str | None = None, defence: str = "d") -> Verdict:
    found = [v for v in results.verdicts if (v.check, v.defence) == (check, defence) and attack in (None, v.attack)]
    assert len(found) == 1
    return found[0]


# ------------------------------------------------------------------ each check, on what fails it and what does not


@pytest.mark.parametrize(
    ("check", "attack", "bad", "good"),
    [
        ("declared randomness", painter, noisy, openly_noisy),
        ("collapsed prediction", painter, one_class, same),
        ("zero gradients", "untargeted", rounded, same),
        ("unbounded", "untargeted", rounded, same),
        ("unbounded", painter, remembers, same),
        ("more steps", painter, no_white, same),
        ("larger patch", painter, small_only, same),
    ],
)
def test_a_defence_built_to_fail_a_check_does_and_another_passes(check: str, attack: Any, bad: Any, good: Any) -> None:
    failing, passing = (verdict(run(defence, attack), check) for defence in (bad, good))
    assert failing.passed is False, failing
    assert passing.passed is True, passing


@pytest.mark.parametrize(
    ("check", "defence", "bad", "good"),
    [
        ("more samples", openly_noisy, averaging_badly, averaging),
        ("white box", same, lost_under_a_defence, painter),
    ],
)
def test_an_attack_built_to_fail_a_check_does_and_another_passes(check: str, defence: Any, bad: Any, good: Any) -> None:
    failing, passing = (verdict(run(defence, attack), check) for attack in (bad, good))
    assert failing.passed is False, failing
    assert passing.passed is True, passing


def test_an_attack_no_better_than_noise_fails_and_one_that_aims_passes() -> None:
    failing = verdict(run(nervous, lambda victim: Noise(victim, 1.0, (8, 8))), "random patch")
    passing = verdict(run(same, "untargeted"), "random patch")
    assert failing.passed is False, failing
    assert passing.passed is True, passing


def test_a_random_search_that_beats_the_gradient_tells_of_a_masked_one() -> None:
    for defence, passed in ((rounded, False), (same, True)):
        results = run(defence, ["untargeted", "square-patch"], max_iter=30, target="untargeted")
        assert verdict(results, "white box", "untargeted").passed is passed
        assert verdict(results, "white box", "square-patch").passed is None, "it is a black box itself"
        assert verdict(results, "zero gradients", "square-patch").passed is None


def test_an_honest_defence_fails_no_check_and_is_marked_nowhere() -> None:
    results = run(same, ["untargeted", "permute", "pixel-pgd"])
    assert [str(v) for v in results.verdicts if v.passed is False] == []
    assert {(v.defence, v.attack, v.check) for v in results.verdicts} == {
        (defence, attack, check)
        for defence in ("none", "d")
        for attack in (None, "untargeted", "permute", "pixel-pgd")
        for check in (checks.ABOUT_DEFENCES if attack is None else checks.ABOUT_ATTACKS)
    }
    assert set(results.summary()["failed_checks"]) == {""}
    assert "unreliable" not in shown(results) + results.markdown() + " ".join(results.sentences())


def test_what_cannot_be_tried_says_why() -> None:
    class Bare:
        def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.clip(x + np.float32(0.1), 0, 1)

    results = run(same, lambda victim: Bare())
    for check in ("more steps", "larger patch", "more samples"):
        found = verdict(results, check)
        assert found.passed is None
        assert found.detail
    dark = wrapped(lambda model, x: model(x).detach() + 0 * model.strength)
    found = verdict(run(dark, painter), "zero gradients")
    assert found.passed is None
    assert "no gradient" in found.detail


def test_a_check_whose_attack_raises_costs_the_check_alone() -> None:
    def touchy(victim: PyTorchSegmenter, max_iter: int = 20, patch_shape: tuple[int, int] = (8, 8)) -> Painter:
        if patch_shape != (8, 8):
            raise RuntimeError("too large for me")
        return painter(victim, max_iter)

    found = verdict(run(same, touchy), "larger patch")
    assert (found.passed, found.detail) == (None, "it could not be tried: RuntimeError: too large for me")


# --------------------------------------------------------------------------------------------------- figures → findings


def test_zero_gradients_counts_exact_zeros_and_anything_not_finite() -> None:
    assert findings.zero_gradients(np.array([0.0, 1e-30, 0.0, 1.0])).passed is True
    assert findings.zero_gradients(np.array([0.0, 0.0, 0.0, 1.0])) == Finding(
        False, "75.0 % of the gradient entries are exactly zero"
    )
    assert findings.zero_gradients(np.array([np.nan, 1.0])).passed is False
    assert findings.zero_gradients(np.array([np.inf, 1.0])).passed is False
    assert findings.zero_gradients(np.array([])).passed is None


@pytest.mark.parametrize(
    ("less", "more", "passed"),
    [(0.5, 0.46, True), (0.5, 0.44, False), (0.08, 0.05, True), (0.08, 0.03, False), (0.02, 0.0, True),
     (0.0, 1.0, True), (math.nan, 0.1, None)],
)  # fmt: skip
def test_more_may_lose_five_points_or_half_and_two_points_always(
    less: float, more: float, passed: bool | None
) -> None:
    assert findings.more_helps(less, more, "1 step", "2 steps").passed is passed


def test_noise_is_held_against_the_gain_of_the_attack_not_its_success() -> None:
    assert findings.random_patch(0.10, 0.30, 0.31).passed is False, "95 % of the gain"
    assert findings.random_patch(0.10, 0.20, 0.31).passed is True, "48 % of it"
    assert findings.random_patch(0.30, 0.31, 0.60).passed is True, "noise does nothing, though much is wrong anyway"
    assert findings.random_patch(0.30, 0.31, 0.31).passed is None, "neither does anything"


def record(image: int, variant: str, won: int) -> Record:
    counts = np.array([[100 - won, won], [0, 0]])
    return Record("m", "a", "d", variant, image, f"{image}", counts, counts, counts, counts, None, None)


def test_a_white_box_is_beaten_only_beyond_chance() -> None:
    white = [record(i, "plain", 20) for i in range(6)]
    lucky = [record(i, "transfer", 95 if i == 0 else 15) for i in range(6)]
    better = [record(i, "transfer", 40 + i) for i in range(6)]
    assert findings.white_box(white, {"transfer": better}).passed is False
    assert findings.white_box(white, {"transfer": lucky}).passed is True, "one image of six: +7.5 points, by chance"
    assert findings.white_box(white[:3], {"transfer": better}).passed is False, "few images: on all of them"
    assert findings.white_box(white[:3], {"transfer": lucky}).passed is True
    assert findings.white_box(white, {"transfer": []}).passed is None
    both = [*white, *(record(i, "adaptive", 60) for i in range(6))]
    assert findings.white_box(both, {"transfer": better}).passed is True, "the best variant of each image"


def test_a_collapsed_prediction_is_one_that_the_labels_and_the_model_do_not_share() -> None:
    good = np.array([[60, 2, 2], [1, 20, 1], [1, 1, 12]])
    flat = np.array([[64, 0, 0], [22, 0, 0], [14, 0, 0]])
    lost = np.array([[62, 2, 0], [2, 20, 0], [7, 7, 0]])
    assert findings.collapsed_prediction(good, good).passed is True
    assert findings.collapsed_prediction(flat, good).passed is False
    assert findings.collapsed_prediction(flat, None).passed is False, "the model alone"
    assert findings.collapsed_prediction(lost, good).passed is True, "two of three classes, and 0.6 of the mIoU"
    half = np.array([[50, 0], [0, 50]])
    assert findings.collapsed_prediction(np.array([[30, 20], [25, 25]]), half).passed is False, "0.38 of the mIoU"
    assert findings.collapsed_prediction(np.array([[40, 10], [10, 40]]), half).passed is True
    assert findings.collapsed_prediction(np.array([[100, 0], [0, 0]]), None).passed is True, "all labels are that class"


@pytest.mark.parametrize(
    ("place", "shape", "larger", "moved"),
    [((8, 12), (8, 8), (16, 16), (0, 4)), ((0, 0), (3, 4), (6, 8), (0, 0)), ((5, 5), (4, 4), (8, 8), (3, 3)),
     ((0, 2), (12, 15), (16, 20), (0, 0))],
)  # fmt: skip
def test_a_doubled_patch_holds_the_first_one_and_stays_on_the_image(
    place: tuple[int, int], shape: tuple[int, int], larger: tuple[int, int], moved: tuple[int, int]
) -> None:
    mask = np.zeros((2, 16, 20), dtype=bool)
    mask[:, place[0] : place[0] + shape[0], place[1] : place[1] + shape[1]] = True
    batch = Batch([0, 1], np.zeros((2, 3, 16, 20), np.float32), np.zeros((2, 16, 20), np.int64))
    trial = Trial([batch], [batch.x], [mask], [None], [batch.y])
    assert doubled(trial) == {"patch_shape": larger, "patch_location": moved}
    ragged = mask.copy()
    ragged[:, place[0], place[1]] = False
    assert doubled(Trial([batch], [batch.x], [ragged], [None], [batch.y])) is None, "no rectangle"
    assert doubled(Trial([batch], [batch.x], [None], [None], [batch.y])) is None, "no patch"


def test_success_outside_two_patches_has_one_denominator() -> None:
    y = np.zeros((1, 4, 4), np.int64)
    y[0, 0] = 255
    small, large = np.zeros((2, 1, 4, 4), dtype=bool)
    small[0, 3, 3], large[0, 2:, 2:] = True, True
    predicted = np.ones_like(y)
    predicted[0, 1] = 0
    batch = Batch([0], np.zeros((1, 3, 4, 4), np.float32), y)
    one = Trial([batch], [batch.x], [small], [None], [predicted])
    two = Trial([batch], [batch.x], [large], [None], [predicted])
    assert one.success() == 7 / 11
    assert one.success("everywhere") == 8 / 12
    assert one.success(hidden=[large]) == two.success(hidden=[small]) == 4 / 8


# ------------------------------------------------------------------------------------------------------ a run's folder


def test_verdicts_are_made_once_kept_whole_and_the_same_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(rounded, out=tmp_path / "one")
    assert {v.check for v in first.verdicts} == set(CHECKS)
    assert run(rounded).verdicts == first.verdicts, "with and without a folder"
    run(rounded, out=tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    kept = sorted(str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one/checks").rglob("*.jsonl"))
    assert kept == [f"checks/m/{name}.jsonl" for name in ("d", "none", "untargeted/d", "untargeted/none")]

    def never(*args: Any) -> Any:
        raise AssertionError("computed twice")

    with monkeypatch.context() as patched:
        patched.setattr(checks.Checker, "_attack", never)
        patched.setattr(checks.Checker, "_defence", never)
        assert run(rounded, out=tmp_path / "one").verdicts == first.verdicts
    loaded = Results.load(tmp_path / "one")
    assert loaded.verdicts == first.verdicts
    assert loaded.summary().equals(first.summary())
    assert Results.joined([loaded, loaded]).verdicts == first.verdicts
    assert run(rounded, out=tmp_path / "one", check_images=3).verdicts != first.verdicts, "on other images"


def test_a_damaged_file_of_verdicts_is_named_and_made_again(tmp_path: Path) -> None:
    first = run(rounded, out=tmp_path)
    before, path = files(tmp_path), tmp_path / "checks/m/untargeted/d.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"passed": false', b'"passed": true '))
    with pytest.raises(ValueError, match=r"untargeted.d\.jsonl is damaged"):
        Results.load(tmp_path)
    with pytest.warns(UserWarning, match=r"d\.jsonl is damaged .* checks are made again"):
        assert run(rounded, out=tmp_path).verdicts == first.verdicts
    assert files(tmp_path) == before


def test_verdicts_of_another_run_are_refused(tmp_path: Path) -> None:
    for name, steps in (("one", 8), ("two", 9)):
        run(rounded, out=tmp_path / name, max_iter=steps)
    shutil.copy(tmp_path / "two/checks/m/untargeted/d.jsonl", tmp_path / "one/checks/m/untargeted/d.jsonl")
    for again in (lambda: Results.load(tmp_path / "one"), lambda: run(rounded, out=tmp_path / "one")):
        with pytest.raises(ValueError, match=r"checks.m.untargeted.d\.jsonl belongs to another run"):
            again()


def test_without_checks_nothing_is_made_and_what_is_held_still_counts(tmp_path: Path) -> None:
    plain = run(rounded, out=tmp_path, checks=False)
    assert plain.verdicts == []
    assert not (tmp_path / "checks").exists()
    assert set(plain.summary()["failed_checks"]) == {""}
    checked = run(rounded, out=tmp_path)
    assert checked.rows.equals(plain.rows), "checks change no row"
    assert run(rounded, out=tmp_path, checks=False).verdicts == checked.verdicts, "switching them off hides nothing"
    with pytest.raises(ValueError, match="check_images=0: at least 1"):
        run(rounded, check_images=0)


def test_the_switches_of_a_run_file() -> None:
    given = {"models": "zoo:x", "data": "scenes"}
    assert RunFile.checked(given).arguments()["checks"] is True
    told = RunFile.checked({**given, "checks": False, "check_images": 3}).arguments()
    assert (told["checks"], told["check_images"]) == (False, 3)


# --------------------------------------------------------------------------------------------------------------- marks


def shown(results: Results) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table())
    return console.export_text()


def test_a_cell_with_a_failed_check_is_unreliable_wherever_it_is_shown(tmp_path: Path) -> None:
    results = run(rounded, out=tmp_path)
    none, defended = results.summary().to_dict("records")
    assert none["failed_checks"] == ""
    assert "zero gradients; " in defended["failed_checks"]
    assert results.unreliable() == {("m", "untargeted", "d")}
    text = shown(results)
    assert text.count("unreliable") == 1 + sum(v.passed is False for v in results.verdicts)
    flat = " ".join(text.split())
    assert "unreliable: m · untargeted · d: zero gradients: 100.0 % of the gradient entries are exactly zero" in flat
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "| untargeted | m | d **unreliable** |" in results.markdown()
    assert "- unreliable: m · untargeted · d: zero gradients: 100.0 %" in results.markdown()
    assert "Unreliable, since a check failed: zero gradients" in results.sentences()[0]
    assert "zero gradients" in (tmp_path / "summary.csv").read_text()

    table = results.verdict_table()
    assert list(table) == ["model", "defence", "attack", "check", "passed", "detail"]
    assert len(table) == len(results.verdicts)
    command = CliRunner()
    assert "unreliable" in command.invoke(app, ["table", str(tmp_path)]).output
    assert "(unreliable)" in command.invoke(app, ["intervals", str(tmp_path), "--resamples", "20"]).output
    listed = command.invoke(app, ["table", str(tmp_path), "--checks"]).output
    assert "NO" in listed
    assert "yes" in listed


def test_a_verdict_on_a_defence_is_one_on_each_attack_and_on_their_mean() -> None:
    verdicts = [Verdict("collapsed prediction", "m", "d", None, False, "one class")]
    results = run(same, ["untargeted", "permute", "strip"], checks=False)
    results.verdicts = verdicts
    assert results.unreliable() == {("m", attack, "d") for attack in ("untargeted", "permute", "strip")}
    assert shown(results).count("unreliable") == 3 + 1
