"""Security curves on a model that is fooled by a closed form, and what is computed how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import files
from torch import Tensor, nn
from typer.testing import CliRunner

from attacks import catalogue
from evaluation import curves as curves_module
from evaluation import experiment
from evaluation.cli import app
from evaluation.curves import AXES, COLUMNS, Curves, curves
from evaluation.experiment import evaluate
from evaluation.frames import Frame
from evaluation.points import Setting
from evaluation.results import Results
from evaluation.variations import multiple, options_of, varied
from ramdefense import defences as defence_module
from ramdefense.defences import defence, register_defence
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

HEIGHT, WIDTH = 12, 16
CLASSES = ("ground", "house")


class Frames:
    """Dark frames, all ground."""

    classes: Sequence[str] = CLASSES
    colors: Sequence[tuple[int, int, int]] = ((230, 159, 0), (86, 180, 233))

    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        label = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
        return Frame(torch.full((3, HEIGHT, WIDTH), 0.1), label, f"frame-{index}")


class Believer(nn.Module):
    """Counts bright pixels in its last row: that many columns, from the left, are houses, in as many rows as the patch
    took steps (its green); ``bound`` limits the columns, ``wrong`` columns are houses whatever it sees."""

    passes = 0

    def __init__(self, bound: float = 1e9, wrong: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.bound, self.wrong = bound, wrong

    def forward(self, images: Tensor) -> Tensor:
        Believer.passes += 1
        logits = torch.zeros(len(images), 2, HEIGHT, WIDTH) * self.weight
        logits[:, 0] = 1.0
        logits[:, 1, :, : self.wrong] = 2.0
        for logit, image in zip(logits, images, strict=True):
            columns = min(int((image[0, -1] > 0.5).sum()), self.bound)
            logit[1, : round(100 * float(image[1, -1, -1])), : int(columns)] = 2.0
        return logits


def success(side: int, steps: int, bound: float = 1e9) -> float:
    """Of such a patch on such a model: pixels believed to be houses / pixels outside the patch."""
    return steps * min(side, bound) / (HEIGHT * WIDTH - side**2)


class Square:
    """A square in the lower right corner that notes its steps in its green; aims at houses everywhere."""

    made: list[tuple[bool, int, int]] = []  # noqa: RUF012 (emptied by the tests)
    stop_after = 10**9

    def __init__(
        self, target: PyTorchSegmenter, patch_shape: tuple[int, int] = (3, 3), max_iter: int = 5, blue: float = 0.0
    ) -> None:
        self.undefended = target.model.bound > 1e8
        self.shape, self.steps = patch_shape, max_iter

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if len(Square.made) >= Square.stop_after:
            raise KeyboardInterrupt
        Square.made.append((self.undefended, self.shape[0], self.steps))
        x[..., -self.shape[0] :, -self.shape[1] :] = np.array([1, self.steps / 100, 0])[:, None, None]
        return x

    def target_map(self, y: np.ndarray) -> np.ndarray:
        return np.ones_like(y)

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -self.shape[0] :, -self.shape[1] :] = True
        return mask


def square(
    target: PyTorchSegmenter, patch_shape: tuple[int, int] = (3, 3), max_iter: int = 5, blue: float = 0.0
) -> Square:
    return Square(target, patch_shape, max_iter, blue)


def bounded(plain: PyTorchSegmenter, *, max_attention: str = "4/N", dropout: float = 0.0) -> PyTorchSegmenter:
    """Limits the columns to k, and is wrong in 10 p columns without any attack."""
    return plain.with_model(Believer(multiple(max_attention, "k"), round(10 * dropout)))


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registered defence with a bound, no figures, counts at 0."""
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
    if "figure" not in request.node.name:
        monkeypatch.setattr(curves_module, "write_figure", lambda *args: None)
    before = dict(defence_module._DEFENCES), dict(catalogue._ENTRIES)
    register_defence("bounded")(bounded)
    Square.made, Square.stop_after, Believer.passes = [], 10**9, 0
    yield
    for registry, entries in zip((defence_module._DEFENCES, catalogue._ENTRIES), before, strict=True):
        registry.clear()
        registry.update(entries)  # type: ignore[arg-type]


def segmenter() -> PyTorchSegmenter:
    return PyTorchSegmenter(Believer(), nb_classes=2, input_shape=(3, HEIGHT, WIDTH))


def run(axes: dict[str, Any], out: Path | None = None, **change: Any) -> Curves:
    given: dict[str, Any] = {"attacks": {"square": square}, "defences": ["none", "bounded"], "data": Frames()}
    return curves({"believer": segmenter()}, axes, out=out, verbose=False, **{**given, **change})


def points(found: Curves, axis: str, under: str) -> list[tuple[float, float]]:
    rows = found.table[(found.table["axis"] == axis) & (found.table["defence"] == under)]
    return list(zip(rows["x"], rows["success"], strict=True))


# ---------------------------------------------------------------------------------------------------------- the figures


def test_every_curve_is_the_closed_form() -> None:
    found = run(
        {"patch_size": [2, 4, 6], "max_iter": [7, 1, 3], "max_attention": ["1/N", "3/N", "64/N"],
         "drop_probability": [0, 0.2]}
    )  # fmt: skip
    base = Setting((4, 4), 7)  # the middle patch, the most steps
    assert found.base == base
    sides, steps = (2, 4, 6), (1, 3, 7)
    expected = {
        ("patch_size", "none"): [(s, success(s, 7)) for s in sides],
        ("patch_size", "bounded"): [(s, success(s, 7, 4)) for s in sides],
        ("max_iter", "none"): [(m, success(4, m)) for m in steps],
        ("max_iter", "bounded"): [(m, success(4, m, 4)) for m in steps],
        ("max_attention", "none"): [(k, success(4, 7)) for k in (1, 3, 64)],
        ("max_attention", "bounded"): [(k, success(4, 7, k)) for k in (1, 3, 64)],
        ("drop_probability", "none"): [(p, success(4, 7)) for p in (0, 0.2)],
    }
    for (axis, under), wanted in expected.items():
        assert points(found, axis, under) == [(x, pytest.approx(y)) for x, y in wanted], (axis, under)
    # p = 0.2 is wrong in two columns of twelve, without an attack, too
    both = points(found, "drop_probability", "bounded")
    assert both[0] == (0, pytest.approx(success(4, 7, 4)))
    assert both[1] == (0.2, pytest.approx((7 * 4 + 5 * 2) / (HEIGHT * WIDTH - 16)))
    table = found.table
    clean = table[(table["axis"] == "drop_probability") & (table["defence"] == "bounded")]["clean_miou"].tolist()
    # the class "house" is predicted and never there: IoU 0
    assert clean == [1.0, pytest.approx((WIDTH - 2) / WIDTH / 2)]
    assert (table["success_low"] == table["success"]).all(), "all frames are the same: intervals without width"
    assert (table["images"] == 3).all()


def test_the_table_has_the_columns_that_were_agreed_and_is_what_is_written(tmp_path: Path) -> None:
    found = run({"patch_size": [2, (2, 8)]}, tmp_path)
    agreed = "model,attack,defence,axis,x,success,success_low,success_high,adversarial_miou,clean_miou,images"
    written = (tmp_path / "curves.csv").read_text().splitlines()
    assert written[0] == agreed == ",".join(COLUMNS)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curves.csv"), found.table, check_dtype=False)
    assert points(found, "patch_size", "none")[1][0] == 4, "the side of a square with as many pixels as 2×8"
    assert set(AXES) == {"patch_size", "max_iter", "max_attention", "drop_probability"}


def test_sentences_and_the_screen_tell_the_same(tmp_path: Path) -> None:
    found = run({"patch_size": [2, 4], "max_attention": ["1/N", "3/N"]}, max_iter=6)
    first, second, third = found.sentences()
    one, two = (f"{100 * success(s, 6):.1f} %" for s in (2, 4))
    assert first == (
        f"On believer, square without defence fools {one} of the pixels at side 2 and {two} of the pixels at side 4."
    )
    assert "against bounded" in second
    assert f"{100 * success(4, 6, 1):.1f} % of the pixels at T = 1/N (clean mIoU 100.0 %)" in third
    ((heading, rows),) = found.screen()
    assert heading == "believer, square"
    assert [row[1] for row in rows if row[0] == "none"] == ["side 2", "side 4", "any T"]
    assert any("fewer pixels are left" in line for line in found.captions())
    assert not any("fewer" in line for line in run({"max_iter": [1, 2]}).captions())


def test_a_curve_that_turns_round_says_so() -> None:
    table = pd.DataFrame(
        [{**dict.fromkeys(COLUMNS, 0.5), "model": "m", "attack": "a", "defence": "ram", "axis": "max_iter", "x": x,
          "success": y} for x, y in ((1, 0.1), (10, 0.3), (50, 0.2))]
    )  # fmt: skip
    (sentence,) = Curves(table, Setting(), [], "outside").sentences()
    assert "30.0 %" in sentence
    assert "not in one direction" in sentence


def test_the_figure_has_a_panel_for_each_axis_and_a_line_for_each_defence(tmp_path: Path) -> None:
    found = run({"patch_size": [2, 4], "max_attention": ["1/N", "3/N"]}, tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    figure = found.figure()
    sizes, bounds = figure.axes
    assert [len(panel.containers) for panel in (sizes, bounds)] == [2, 1], "no defence is a level line over T"
    assert bounds.get_xscale() == "log"
    assert [label.get_text() for label in bounds.get_xticklabels()] == ["1/N", "3/N"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no defence", "bounded"]
    heights = sizes.containers[0].lines[0].get_ydata()
    assert np.allclose(heights, [100 * success(s, 5) for s in (2, 4)])


# ------------------------------------------------------------------------------------------- nothing is computed twice


def test_points_that_curves_have_in_common_are_computed_once(tmp_path: Path) -> None:
    run({"patch_size": [2, 4, 6], "max_iter": [3, 7], "max_attention": ["1/N", "4/N"], "drop_probability": [0, 0.2]})
    undefended = [made for made in Square.made if made[0]]
    # (4, 7) is on all four curves; the sweeps of T and p attack the undefended model nowhere else
    assert sorted(undefended) == sorted((True, s, m) for s, m in ((2, 7), (4, 7), (6, 7), (4, 3)))
    defended = [made for made in Square.made if not made[0]]
    # at the base T = 4/N and p = 0 are what the defence is by itself, so only T = 1/N and p = 0.2 come on top
    assert sorted(defended) == sorted((False, s, m) for s, m in ((2, 7), (4, 7), (6, 7), (4, 3), (4, 7), (4, 7)))


def test_again_computes_nothing_and_more_values_only_what_is_new(tmp_path: Path) -> None:
    first = run({"max_attention": ["1/N", "3/N"]}, tmp_path)
    before = files(tmp_path)
    Square.made = []
    again = run({"max_attention": ["1/N", "3/N"]}, tmp_path)
    assert Square.made == []
    assert files(tmp_path) == before
    pd.testing.assert_frame_equal(first.table, again.table)
    run({"max_attention": ["1/N", "2/N", "3/N"]}, tmp_path)
    assert Square.made == [(False, 3, 5)]


def test_other_images_or_options_are_other_points_and_never_mix(tmp_path: Path) -> None:
    run({"max_iter": [1, 2]}, tmp_path)
    for change in ({"images": 2}, {"seed": 3}, {"region": "everywhere"}, {"blue": 0.5}):
        Square.made = []
        found = run({"max_iter": [1, 2]}, tmp_path, **change)
        assert len(Square.made) == 4, change
        assert (found.table["images"] == change.get("images", 3)).all()
    Square.made = []
    run({"max_iter": [1, 2]}, tmp_path)
    assert Square.made == [], "the first ones are still there"


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    axes = {"max_iter": [1, 3], "max_attention": ["1/N", "3/N"]}
    whole = tmp_path / "whole"
    run(axes, whole)
    in_all = len(Square.made)
    for after in sorted({0, 1, in_all // 2, in_all - 1}):
        out = tmp_path / f"stopped-{after}"
        Square.made, Square.stop_after = [], after
        with pytest.raises(KeyboardInterrupt):
            run(axes, out)
        assert not (out / "curves.csv").exists()
        Square.made, Square.stop_after = [], 10**9
        run(axes, out)
        assert len(Square.made) == in_all - after
        assert files(out) == files(whole)


@pytest.mark.parametrize("writes", range(1, 40, 3))
def test_killed_while_it_takes_over_a_run_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    class Killed(BaseException):
        pass

    whole, out = tmp_path / "whole", tmp_path / "killed"
    axes = {"max_attention": ["1/N", "3/N"]}
    run(axes, whole)
    replace, left = Path.replace, [writes]

    def killing(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killing)
        with suppress(Killed):
            run(axes, out)
    run(axes, out)
    assert files(out) == files(whole)


def test_a_point_is_the_run_that_evaluate_would_make(tmp_path: Path) -> None:
    run({"max_attention": ["1/N", "3/N"]}, tmp_path / "sweep")
    (place,) = (tmp_path / "sweep/points/believer/square").iterdir()
    name, function = varied("bounded", max_attention="1/N")
    evaluate({"believer": segmenter()}, {"square": square}, {name: function}, Frames(), out=tmp_path / "alone",
             verbose=False, checks=False, report=False)  # fmt: skip
    (point,) = (path for path in place.iterdir() if (path / "cells/believer/square" / path.name).exists()
                and Results.load(path).summary()["defence"].tolist() == ["none", name])  # fmt: skip
    assert files(point) == files(tmp_path / "alone")


def test_a_runs_folder_takes_curves_and_stays_that_run(tmp_path: Path) -> None:
    def direct() -> Results:
        return evaluate({"believer": segmenter()}, {"square": square}, ["none", "bounded"], Frames(), out=tmp_path,
                        verbose=False)  # fmt: skip

    rows = direct().rows
    run({"max_iter": [1, 2]}, tmp_path)
    assert (tmp_path / "curves.csv").exists()
    pd.testing.assert_frame_equal(Results.load(tmp_path).rows, rows)
    Square.made = []
    pd.testing.assert_frame_equal(direct().rows, rows)
    assert Square.made == []


def test_a_damaged_point_is_computed_again(tmp_path: Path) -> None:
    run({"max_iter": [1, 2]}, tmp_path)
    before = files(tmp_path)
    damaged = sorted(tmp_path.glob("points/**/none/cells/**/*.jsonl"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="is damaged"):
        run({"max_iter": [1, 2]}, tmp_path)
    assert files(tmp_path) == before


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run({"max_iter": [1, 2]}).table) == 4
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- what does not apply


def test_a_defence_without_meaning_on_a_model_is_a_note_and_no_curve() -> None:
    @register_defence("none of it")
    def without(plain: PyTorchSegmenter, max_attention: str = "1/N") -> PyTorchSegmenter:
        raise NotApplicableError("no attention: none at all")

    found = run({"max_attention": ["1/N", "2/N"]}, defences=["none of it"])
    assert set(found.table["defence"]) == {"none"}
    assert found.notes == ["n/a: none of it does not apply to believer: no attention"]


def test_an_axis_of_defences_leaves_out_those_that_have_no_such_option() -> None:
    @register_defence("fixed")
    def fixed(plain: PyTorchSegmenter) -> PyTorchSegmenter:
        return plain.with_model(Believer(2))

    found = run({"max_attention": ["1/N", "2/N"], "max_iter": [1, 2]}, defences=["bounded", "fixed"])
    assert points(found, "max_attention", "fixed") == []
    assert points(found, "max_iter", "fixed") == [(m, pytest.approx(success(3, m, 2))) for m in (1, 2)]


@pytest.mark.parametrize(
    ("axes", "change", "said"),
    [
        ({}, {}, "no axis given.*patch_size"),
        ({"patches": [1, 2]}, {}, "unknown axis 'patches'.*patch_size, max_iter"),
        ({"patch_size": []}, {}, r"patch_size=\[\]: at least two"),
        ({"max_iter": [5]}, {}, r"max_iter=\[5\]: at least two"),
        ({"patch_size": [0, 2]}, {}, "patch_size 0: a side of 1"),
        ({"patch_size": [(2, 8), 4]}, {}, "one place of the curve"),
        ({"patch_size": [2, 13]}, {}, "13×13 does not fit"),
        ({"max_iter": [1, 2.5]}, {}, "max_iter 2.5: a whole number"),
        ({"max_iter": [0, 2]}, {}, "max_iter 0: a whole number of steps, at least 1"),
        ({"max_iter": [2, 2]}, {}, "one place"),
        ({"max_attention": ["3", "4/N"]}, {}, "max_attention 3: a multiple of 1/N"),
        ({"max_attention": ["0/N", "4/N"]}, {}, "max_attention 0/N"),
        ({"drop_probability": [0, 1]}, {}, "drop_probability 1: a probability from 0 to below 1"),
        ({"drop_probability": ["x", 0]}, {}, "drop_probability x"),
        ({"max_attention": ["1/N", "4/N"]}, {"defences": ["none"]}, "none of the defences.*add --defence ram"),
        ({"max_attention": ["0.5/N", "4/N"]}, {"defences": ["ram"]}, "0.5/N.*use '1/N' or more"),
        ({"max_iter": [1, 2]}, {"colour": 3}, "option 'colour': none of the attacks"),
        ({"max_iter": [1, 2]}, {"defences": ["bonded"]}, "did you mean 'bounded'"),
        ({"max_iter": [1, 2]}, {"images": 9}, "images=9"),
        ({"max_iter": [1, 2]}, {"attacks": {"fixed": lambda target: square(target)}}, "'fixed' has no max_iter"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(axes: Any, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run(axes, tmp_path / "out", **change)
    assert Square.made == []
    assert Believer.passes == 0
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- names of defences


def test_one_name_for_all_spellings_of_a_defence() -> None:
    assert varied("ram")[0] == varied("ram:max_attention=16/N,dropout=0.1")[0] == "ram"
    assert varied("ram:dropout=0.3", dropout=0.1)[0] == "ram"
    assert varied("ram", dropout=0.0)[0] == varied("ram:dropout=0")[0] == "ram:dropout=0"
    one, two = varied("ram", dropout=0.2, max_attention="3/N"), varied("ram:max_attention=3/N", dropout=0.2)
    assert one[0] == two[0] == "ram:max_attention=3/N,dropout=0.2"
    assert one[1].keywords == two[1].keywords == {"max_attention": "3/N", "dropout": 0.2}  # type: ignore[attr-defined]
    assert varied("none") == ("none", defence("none"))


def test_a_varied_defence_is_what_its_name_says(attention_segmenter: PyTorchSegmenter) -> None:
    name, function = varied("ram:seed=3", suppression="clamp", max_attention="2/N")
    one, two = function(attention_segmenter).model, defence(name)(attention_segmenter).model
    assert one.refinement == two.refinement
    assert (one.seed, one.refinement.suppression, one.refinement.max_attention) == (3, "clamp", "2/N")
    assert options_of("ram")["suppression"] == "cap"
    with pytest.raises(ValueError, match="'none' has no option 'dropout'"):
        varied("none", dropout=0.1)


# -------------------------------------------------------------------------------------------------- the command line

@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``ramdefense curves`` on four drawn scenes and a tiny model, by a real attack."""
    (tmp_path / "my_curve_models.py").write_text(
        "import torch\nfrom tiny import TinyAttention\n\n\ndef attention():\n"
        "    torch.manual_seed(0)\n    return TinyAttention(nb_classes=11)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")

    def call(*more: str) -> Any:
        common = ["curves", "--model", "my_curve_models:attention", "--data", "scenes:3", "--size", "32x48",
                  "--images", "2", "--out", "out", "--quiet"]  # fmt: skip
        return CliRunner().invoke(app, [*common, *more])

    return call


def test_the_command_measures_every_curve_and_names_what_it_wrote(command: Callable[..., Any], tmp_path: Path) -> None:
    result = command("--patch-size", "8,12x10", "--max-iter", "2", "--max-attention", "1/N, 3/N",
                     "--drop-probability", "0,0.3")  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out/curves.csv")
    assert set(table["axis"]) == {"patch_size", "max_attention", "drop_probability"}
    assert len(table) == 3 * 2 * 2
    for said in ("my_curve_models:attention, strip", "T = 3/N", "p = 0.3", "a patch of 12×10, 2 steps", "out"):
        assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no curve asked for"),
        (("--max-iter", "5"), "no curve asked for"),
        (("--max-iter", "5,,6"), "--max-iter '5,,6': an empty place"),
        (("--max-iter", "5,x"), "--max-iter x: a whole number"),
        (("--patch-size", "8,y"), "--patch-size y"),
        (("--max-attention", "3/N"), "at least two values"),
        (("--max-iter", "5", "--base-max-iter", "6", "--patch-size", "2,4"), "say the same thing twice"),
        (("--patch-size", "8,400"), "does not fit"),
    ],
)
def test_the_command_tells_what_is_wrong(command: Callable[..., Any], arguments: Sequence[str], said: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert not Path("out").exists()
