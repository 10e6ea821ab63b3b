"""Tuning where the truth is known: a defence whose cost and whose gain are what a table says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import files, random_images, random_labels
from torch import Tensor, nn
from typer.testing import CliRunner

from evaluation import cleanly, experiment
from evaluation import tuning as tuning_module
from evaluation.cleanly import clean_counts, clean_miou, lost_miou
from evaluation.cli import app
from evaluation.experiment import evaluate
from evaluation.frames import Frame
from evaluation.statistics import paired_differences
from evaluation.tuning import COLUMNS, Option, Tuned, best_within, pareto, tune
from ramdefense import RAMDefense
from ramdefense import defences as defence_module
from ramdefense.defences import defence, register_defence
from ramdefense.segmenter import PyTorchSegmenter

HEIGHT, WIDTH = 8, 40
HALF = WIDTH // 2
CLASSES = ("ground", "house")
#: (k, p) → columns of the left half that are wrong without an attack, and under one; what is not here is as undefended.
UNDEFENDED = (0, 20)
TRUTH: dict[tuple[float, float], tuple[int, int]] = {}


def clean(wrong: int) -> float:
    """mIoU of the halves, so many columns of the left one taken for the right one's class; whole image."""
    return ((HALF - wrong) / HALF + HALF / (HALF + wrong)) / 2


def robust(wrong: int) -> float:
    """The same without the 2×2 pixels under the patch, which lie in the right half."""
    right = HEIGHT * HALF - 4
    return ((HALF - wrong) / HALF + right / (right + HEIGHT * wrong)) / 2


class Frames:
    """Left half ground, right half house."""

    classes: Sequence[str] = CLASSES
    colors: Sequence[tuple[int, int, int]] = ((230, 159, 0), (86, 180, 233))

    def __init__(self, count: int = 6) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        label = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
        label[:, HALF:] = 1
        return Frame(torch.full((3, HEIGHT, WIDTH), 0.1), label, f"frame-{index}")


class Halves(nn.Module):
    """Right but for the columns that the truth says; attacked where the lower right pixel is bright."""

    def __init__(self, wrong: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.wrong = wrong

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, HEIGHT, WIDTH) * self.weight
        logits[:, 0] = 1.0
        logits[:, 1, :, HALF:] = 2.0
        for logit, image in zip(logits, images, strict=True):
            logit[1, :, HALF - self.wrong[int(image[0, -1, -1] > 0.5)] : HALF] = 2.0
        return logits


class Corner:
    """A white corner of 2×2 pixels; without a target."""

    made: list[tuple[int, int]] = []  # noqa: RUF012 (emptied by the tests)
    stop_after = 10**9

    def __init__(self, target: PyTorchSegmenter) -> None:
        self.wrong = target.model.wrong

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if len(Corner.made) >= Corner.stop_after:
            raise KeyboardInterrupt
        Corner.made.append(self.wrong)
        x[..., -2:, -2:] = 1
        return x

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -2:, -2:] = True
        return mask


def corner(target: PyTorchSegmenter) -> Corner:
    return Corner(target)


def stub(
    plain: PyTorchSegmenter, *, suppression: str = "cap", max_attention: str = "16/N", dropout: float = 0.1
) -> PyTorchSegmenter:
    return plain.with_model(Halves(TRUTH.get((float(max_attention.removesuffix("/N")), dropout), UNDEFENDED)))


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registered stub, no figures, counts at 0."""
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
    if "figure" not in request.node.name:
        monkeypatch.setattr(tuning_module, "write_figure", lambda *args: None)
    before = dict(defence_module._DEFENCES)
    register_defence("stub")(stub)
    Corner.made, Corner.stop_after = [], 10**9
    TRUTH.clear()
    TRUTH.update({(1, 0): (4, 5), (3, 0): (2, 10), (5, 0): (1, 8), (16, 0): (0, 15), (64, 0): (0, 20)})
    yield
    defence_module._DEFENCES.clear()
    defence_module._DEFENCES.update(before)


def run(budget: float, out: Path | None = None, **change: Any) -> Tuned:
    model = {"halves": PyTorchSegmenter(Halves(UNDEFENDED), nb_classes=2, input_shape=(3, HEIGHT, WIDTH))}
    given: dict[str, Any] = {"attack": {"corner": corner}, "defence": "stub", "drop_probability": [0]}
    return tune(model, Frames(), budget, out=out, verbose=False, **{**given, **change})


def chosen(tuned: Tuned) -> str:
    (row,) = tuned.table[tuned.table["chosen"]].to_dict("records")
    return str(row["max_attention"] or row["variant"])


COSTS = {wrong: 100 * (1 - clean(wrong)) for wrong in (0, 1, 2, 4)}


# ------------------------------------------------------------------------------------------------- the truth is found


@pytest.mark.parametrize(
    ("budget", "best"),
    [
        (0, "16/N"),  # free, and gains; 64/N is free and gains nothing
        (COSTS[1] - 0.01, "16/N"),
        (COSTS[1] + 0.01, "5/N"),
        (COSTS[2] + 0.01, "5/N"),  # 3/N costs more and gains less
        (COSTS[4] - 0.01, "5/N"),
        (COSTS[4] + 0.01, "1/N"),
        (100, "1/N"),
    ],
)
def test_the_best_within_the_budget_is_chosen(budget: float, best: str) -> None:
    tuned = run(budget)
    assert chosen(tuned) == best
    assert tuned.best == {"suppression": "cap", "max_attention": best, "dropout": 0}
    assert tuned.defence(PyTorchSegmenter(Halves(UNDEFENDED), nb_classes=2, input_shape=(3, HEIGHT, WIDTH))) \
        .model.wrong == TRUTH[float(best[:-2]), 0]  # fmt: skip


def test_every_figure_is_the_closed_form_and_the_front_is_marked(tmp_path: Path) -> None:
    tuned = run(0, tmp_path, attack_all=True)
    table = tuned.table
    assert table["max_attention"].tolist() == ["", "1/N", "3/N", "5/N", "16/N", "64/N"]
    assert table["variant"].tolist() == ["none"] + 5 * ["cap"]
    truth = [UNDEFENDED, *TRUTH.values()]
    assert table["clean_miou"].tolist() == pytest.approx([clean(c) for c, _ in truth])
    assert table["robust_miou"].tolist() == pytest.approx([robust(r) for _, r in truth])
    assert table["success"].tolist() == pytest.approx([HEIGHT * r / (HEIGHT * WIDTH - 4) for _, r in truth])
    assert table["pareto"].tolist() == [False, True, False, True, True, False]
    assert (table["images"] == 6).all()
    assert tuned.costs["cost"].tolist() == pytest.approx([1 - clean(c) for c, _ in truth])
    agreed = "model,attack,variant,max_attention,drop_probability,clean_miou,robust_miou,success,images,pareto,chosen"
    assert (tmp_path / "tune.csv").read_text().splitlines()[0] == agreed == ",".join(COLUMNS)
    read = pd.read_csv(tmp_path / "tune.csv", keep_default_na=False, na_values={"drop_probability": ""})
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert (tmp_path / "tune-costs.csv").exists()


def test_only_what_is_within_the_budget_is_attacked() -> None:
    tuned = run(COSTS[1] + 0.01)
    assert set(Corner.made) == {UNDEFENDED, TRUTH[5, 0], TRUTH[16, 0], TRUTH[64, 0]}
    over = tuned.table[tuned.table["images"] == 0]
    assert over["max_attention"].tolist() == ["1/N", "3/N"]
    assert over["robust_miou"].isna().all()
    assert over["clean_miou"].tolist() == pytest.approx([clean(4), clean(2)]), "told all the same"
    assert not over["pareto"].any()


def test_nothing_within_the_budget_or_nothing_better_is_no_defence() -> None:
    worse = run(0, max_attention=["1/N", "3/N"])
    assert (chosen(worse), worse.best, worse.name) == ("none", None, "none")
    assert Corner.made == [UNDEFENDED]
    told = " ".join(worse.sentences())
    assert "No setting beats the undefended model: none is within the budget" in told
    assert "0 of 2 settings" in told
    equal = run(50, max_attention=["64/N"])
    assert (chosen(equal), equal.best) == ("none", None), "a tie goes to no defence"
    assert "none of those has a higher mIoU under attack" in " ".join(equal.sentences())
    plain = PyTorchSegmenter(Halves(UNDEFENDED), nb_classes=2, input_shape=(3, HEIGHT, WIDTH))
    assert equal.defence(plain) is plain


def test_of_equals_the_cleaner_then_the_weaker_is_chosen() -> None:
    TRUTH.update({(1, 0): (1, 6), (3, 0): (1, 6), (5, 0): (0, 6), (16, 0): (0, 6)})
    assert chosen(run(5)) == "16/N"
    TRUTH[16, 0] = (1, 6)
    assert chosen(run(5)) == "5/N", "as robust, and cleaner"
    TRUTH.update({(16, 0.0): (0, 6), (16, 0.2): (0, 6)})
    tuned = run(5, drop_probability=[0.2, 0], max_attention=["16/N"], variants=["clamp", "cap"])
    assert tuned.best == {"suppression": "clamp", "max_attention": "16/N", "dropout": 0}, "p = 0, the first variant"


@pytest.mark.parametrize("attacked", [1, 3])
def test_clean_miou_may_rest_on_more_images_than_are_attacked(attacked: int) -> None:
    tuned = run(100, images=attacked)
    assert set(tuned.table["images"]) == {attacked}
    assert set(tuned.costs["images"]) == {6}
    assert set(run(100, images=attacked, clean_images=2).costs["images"]) == {2}


# ------------------------------------------------------------------------------------------------ rules, on any numbers

some = st.integers(0, 4).map(lambda n: n / 4)
maybe = some | st.just(math.nan)


@given(st.lists(st.tuples(maybe, maybe), max_size=8))
def test_the_front_is_what_no_other_point_dominates(found: list[tuple[float, float]]) -> None:
    marked = pareto([c for c, _ in found], [r for _, r in found])
    for (c, r), on_front in zip(found, marked, strict=True):
        if math.isnan(c) or math.isnan(r):
            assert not on_front
            continue
        better = [(a, b) for a, b in found if a >= c and b >= r and (a, b) != (c, r)]
        assert on_front == (not better)


options = st.builds(
    Option, st.sampled_from(["cap", "clamp"]), st.sampled_from([1.0, 3.0, 16.0]), st.sampled_from([0.0, 0.1])
)


@settings(max_examples=200)
@given(
    st.lists(options, max_size=6, unique=True).flatmap(
        lambda held: st.tuples(st.just([Option(), *held]), st.lists(st.tuples(some, maybe), min_size=len(held) + 1,
                               max_size=len(held) + 1))
    ),
    st.sampled_from([0.0, 25.0, 60.0]),
)  # fmt: skip
def test_the_choice_is_allowed_and_nothing_allowed_is_better(
    held: tuple[list[Option], list[tuple[float, float]]], budget: float
) -> None:
    choices, figures = held
    before = [c for c, _ in figures]
    after = [r for _, r in figures]
    best = best_within(choices, before, after, [before[0] - c for c in before], budget)
    allowed = [0] + [
        i for i in range(1, len(choices)) if 100 * (before[0] - before[i]) <= budget and not math.isnan(after[i])
    ]
    at = choices.index(best)
    assert at in allowed
    if math.isnan(after[at]):
        assert allowed == [0]
        return
    for i in allowed:
        if math.isnan(after[i]):
            continue
        assert after[i] <= after[at]
        if after[i] == after[at]:
            assert before[i] <= before[at]
            if before[i] == before[at] and i != at:
                other = choices[i]
                assert other.variant != "none"
                assert best.variant == "none" or other.multiple <= best.multiple
                if best.variant != "none" and other.multiple == best.multiple:
                    assert other.dropout >= best.dropout


# -------------------------------------------------------------------------------------------------------- clean figures


class Noise:
    """Random frames of the tiny models' size."""

    classes: Sequence[str] = tuple("abcd")
    colors: Sequence[tuple[int, int, int]] = ((0, 0, 0), (80, 0, 0), (0, 80, 0), (0, 0, 80))

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Frame:
        return Frame(random_images()[index], random_labels()[index], f"frame-{index}")


def test_clean_miou_and_its_cost_are_those_of_the_table(attention_segmenter: PyTorchSegmenter) -> None:
    class Nothing:
        def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return x

    ram = {"ram": RAMDefense(attention_segmenter, max_attention="2/N", dropout=0.3)}
    results = evaluate({"m": attention_segmenter}, {"nothing": lambda target: Nothing()}, {"ram": lambda _: ram["ram"]},
                       Noise(), verbose=False)  # fmt: skip
    images = list(range(5))
    before = clean_counts(attention_segmenter, Noise(), images, batch_size=2)
    after = clean_counts(ram["ram"], Noise(), images, batch_size=3)
    assert [clean_miou(before), clean_miou(after)] == results.summary()["clean_miou"].tolist()
    assert clean_miou(before) != clean_miou(after), "or nothing was shown"
    (row,) = paired_differences(results, figures=["clean_miou"], permutations=9).to_dict("records")
    lost = lost_miou(before, after)
    assert [lost.estimate[0], lost.low[0], lost.high[0]] == pytest.approx(
        [-row["difference"], -row["high"], -row["low"]], abs=0.01
    )
    assert lost.estimate[0] == pytest.approx(clean_miou(before) - clean_miou(after))


def test_ram_itself_is_tuned_and_ready_to_use(attention_segmenter: PyTorchSegmenter, tmp_path: Path) -> None:
    tuned = tune({"m": attention_segmenter}, Noise(), 100, attack="strip", variants=["clamp"],
                 max_attention=["1/N", "30/N"], drop_probability=[0.0], images=2, max_iter=1, patch_shape=(4, 4),
                 out=tmp_path, verbose=False)  # fmt: skip
    assert tuned.table["variant"].tolist() == ["none", "clamp", "clamp"]
    if tuned.best is not None:
        one, two = tuned.defence(attention_segmenter), RAMDefense(attention_segmenter, **tuned.best)
        assert one.model.refinement == two.model.refinement
        assert defence(tuned.name)(attention_segmenter).model.refinement == two.model.refinement


def test_images_too_few_to_tell_are_called_so() -> None:
    one = run(100, clean_images=1)
    assert one.costs["cost_low"].isna().all()
    assert "rests on 1 image: whether it keeps to the budget" in " ".join(one.sentences())
    many = " ".join(run(100).sentences())
    assert "rests on" not in many
    assert "too few to tell" not in many
    assert "optimistic: measure it on others" in many
    wide = run(5)
    wide.costs.loc[wide.table["chosen"], "cost_high"] = 0.09
    assert "too few to tell that it keeps to the budget" in " ".join(wide.sentences())


# ----------------------------------------------------------------------------------------------------------- resuming


def test_again_computes_nothing_and_another_budget_only_what_it_adds(tmp_path: Path) -> None:
    first = run(0, tmp_path)
    before = files(tmp_path)
    Corner.made = []
    again = run(0, tmp_path)
    assert Corner.made == []
    pd.testing.assert_frame_equal(first.table, again.table)
    assert files(tmp_path) == before
    run(COSTS[1] + 0.01, tmp_path)
    assert set(Corner.made) == {TRUTH[5, 0]}
    Corner.made = []
    run(100, tmp_path, max_attention=["1/N", "5/N"])
    assert set(Corner.made) == {TRUTH[1, 0]}


def test_clean_passes_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    counted = cleanly.clean_counts
    monkeypatch.setattr(cleanly, "clean_counts", lambda *given: made.append(1) or counted(*given))
    run(0, tmp_path)
    assert len(made) == 6
    run(3, tmp_path)
    assert len(made) == 6
    run(3, tmp_path, clean_images=3)
    assert len(made) == 12, "on other images they are others"
    for file in sorted(tmp_path.glob("points/halves/clean/none--*.jsonl")):
        file.write_bytes(file.read_bytes().replace(b"[", b"[1", 1))
    with pytest.warns(UserWarning, match="is damaged"):
        run(3, tmp_path)
    assert len(made) == 13


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    run(5, whole)
    in_all, wanted = len(Corner.made), files(whole)
    for after in (0, 1, in_all - 1):
        out = tmp_path / f"attacking-{after}"
        Corner.made, Corner.stop_after = [], after
        with pytest.raises(KeyboardInterrupt):
            run(5, out)
        assert not (out / "tune.csv").exists()
        Corner.made, Corner.stop_after = [], 10**9
        run(5, out)
        assert len(Corner.made) == in_all - after
        assert files(out) == wanted
    counted, left = cleanly.clean_counts, [3]

    def stopping(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return counted(*given)

    out = tmp_path / "looking"
    with monkeypatch.context() as patched:
        patched.setattr(cleanly, "clean_counts", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(5, out)
    run(5, out)
    assert files(out) == wanted


def test_curves_and_tuning_share_a_folder_and_its_points(tmp_path: Path) -> None:
    from evaluation.curves import curves

    run(100, tmp_path)
    Corner.made = []
    model = {"halves": PyTorchSegmenter(Halves(UNDEFENDED), nb_classes=2, input_shape=(3, HEIGHT, WIDTH))}
    found = curves(model, {"max_attention": ["1/N", "5/N"]}, {"corner": corner}, "stub:dropout=0", Frames(),
                   out=tmp_path, verbose=False)  # fmt: skip
    assert Corner.made == []
    assert found.table["adversarial_miou"].tolist() == pytest.approx([robust(20), robust(20), robust(5), robust(8)])


# ------------------------------------------------------------------------------------------------------ what is shown


def test_the_figure_has_a_point_for_each_setting_and_the_budget(tmp_path: Path) -> None:
    tuned = run(COSTS[1] + 0.01, tmp_path)
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = tuned.figure().axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    drawn = [(x[0], y[0]) for x, y in lines if len(x) == 1]
    for k in (5, 16, 64):
        assert (pytest.approx(100 * clean(TRUTH[k, 0][0])), pytest.approx(100 * robust(TRUTH[k, 0][1]))) in drawn
    upright = [x[0] for x, _ in lines if len(x) == 2 and len(set(x)) == 1]
    assert upright == [pytest.approx(100 - tuned.budget)]
    assert [text.get_text() for text in axis.texts] == ["5/N", "16/N", "64/N"]


@pytest.mark.parametrize(
    ("budget", "change", "said"),
    [
        (-1, {}, "budget=-1: points"),
        (math.nan, {}, "budget=nan"),
        (1, {"max_attention": []}, "max_attention: no value"),
        (1, {"drop_probability": []}, "drop_probability: no value"),
        (1, {"variants": []}, "variants: no value"),
        (1, {"max_attention": ["3/N", "3/N"]}, "twice"),
        (1, {"max_attention": ["three"]}, "max_attention three: a multiple of 1/N"),
        (1, {"max_attention": ["0.5/N"]}, "use '1/N' or more"),
        (1, {"drop_probability": [1.0]}, "drop_probability 1.0: a probability"),
        (1, {"variants": ["cup"]}, "did you mean 'cap'"),
        (1, {"defence": "none"}, "'none' has no option 'suppression'"),
        (1, {"defence": "stab"}, "did you mean 'stub'"),
        (1, {"defence": "ram"}, "no attention was found"),
        (1, {"attack": ["strip", "permute"]}, "2 attacks"),
        (1, {"colour": 1}, "option 'colour': attack 'corner'"),
        (1, {"max_iter": 3}, "option 'max_iter': attack 'corner'"),
        (1, {"images": 7}, "images=7"),
        (1, {"clean_images": 7}, "images=7"),
        (1, {"attack": "strip", "patch_shape": (9, 9)}, "9×9 does not fit"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(
    budget: float, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        run(budget, tmp_path / "out", **change)
    assert Corner.made == []
    assert not (tmp_path / "out").exists()


def test_the_command_prints_how_to_use_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tuned_models.py").write_text(
        "import torch\nfrom tiny import TinyAttention\n\n\ndef attention():\n"
        "    torch.manual_seed(0)\n    return TinyAttention(nb_classes=11)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    command = ["tune", "--model", "my_tuned_models:attention", "--data", "scenes:3", "--size", "32x48", "--images", "2",
               "--max-iter", "1", "--patch-size", "8", "--budget", "50", "--drop-probability", "0", "--out", "out",
               "--quiet"]  # fmt: skip
    result = CliRunner().invoke(app, [*command, "--max-attention", "1/N,8/N"])
    assert result.exit_code == 0, result.output
    (row,) = pd.read_csv("out/tune.csv", keep_default_na=False).query("chosen").to_dict("records")
    if row["variant"] == "none":
        assert "No setting beats the undefended model" in result.output
    else:
        assert f"--defence ram:suppression=cap,max_attention={row['max_attention']},dropout=0" in result.output
        assert "RAMDefense(segmenter, " in result.output
    wrong = CliRunner().invoke(app, [*command, "--max-attention", "1/N,"])
    assert wrong.exit_code == 2
    assert "--max-attention '1/N,': an empty place" in wrong.output
