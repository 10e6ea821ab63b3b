"""The experiment: records, summaries computed by hand, resuming, and the promises that an attack must keep."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import files, linear_cnn
from torch import Tensor, nn

from attacks.catalogue import attacks as attack_catalogue
from attacks.catalogue import register_attack
from attacks.patch import Patch
from evaluation import experiment, report
from evaluation.experiment import evaluate
from evaluation.frames import IGNORE_INDEX, Frame
from evaluation.results import Record, Results, worst
from ramdefense import defences as defence_module
from ramdefense.defences import register_defence
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, NotApplicableError, Traits

HEIGHT, WIDTH = 8, 10
CLASSES = ("ground", "house", "tree")


class Frames:
    """Five dark frames, all ground; frame i has i void pixels in its first row."""

    classes: Sequence[str] = CLASSES
    colors: Sequence[tuple[int, int, int]] = ((230, 159, 0), (86, 180, 233), (0, 158, 115))

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        label = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
        label[0, : index % 5] = IGNORE_INDEX
        return Frame(torch.full((3, HEIGHT, WIDTH), 0.1 + 0.01 * (index % 5)), label, f"frame-{index}")


class CornerModel(nn.Module):
    """Believes the lower right pixel: where it is bright, the left ``reach`` columns are houses; else all is ground."""

    def __init__(self, reach: int = WIDTH, threshold: float = 0.5) -> None:
        super().__init__()
        self.reach, self.threshold = reach, threshold
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        bright = images[:, 0, -1, -1] > self.threshold
        logits = torch.zeros(len(images), 3, *images.shape[-2:]) * self.weight
        logits[:, 0] = 1.0
        logits[:, 1, :, : self.reach] = 2.0 * bright[:, None, None]
        return logits


class RandomModel(CornerModel):
    """Declares itself random, notes the conditions of each pass, and believes odd image numbers only."""

    def __init__(self, reach: int) -> None:
        super().__init__(reach)
        self.traits, self.conditions = Traits(random=True), Conditions()
        self.seen: list[Conditions] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.conditions)
        return super().forward(images)


def segmenter(model: nn.Module) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, nb_classes=3, input_shape=(3, HEIGHT, WIDTH))


class CornerAttack:
    """A 2×2 patch in the lower right corner, as bright as ``brightness(segmenter, image)`` says; aims at houses."""

    calls = 0

    def __init__(self, target: PyTorchSegmenter, samples: int | None) -> None:
        self.target, self.samples = target, samples

    def brightness(self, image: int) -> float:
        return 1.0

    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        type(self).calls += 1
        for row, image in enumerate(images):
            x[row, :, -2:, -2:] = self.brightness(image)
        return x

    def target_map(self, y: np.ndarray) -> np.ndarray:
        return np.where(y == IGNORE_INDEX, y, 1)

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -2:, -2:] = True
        return mask


class VariantAttack(CornerAttack):
    """Works undefended; a defended model is fooled by the plain patch on image 1 and by the adaptive one on image 2."""

    calls = 0

    def brightness(self, image: int) -> float:
        model = self.target.model
        if not isinstance(model, RandomModel):
            return 1.0 if image != 4 else 0.0
        return float(image == (1 if self.samples == 1 else 2))


def variant_attack(target: PyTorchSegmenter, defence_samples: int | None = None) -> VariantAttack:
    return VariantAttack(target, defence_samples)


def half_reach(plain: PyTorchSegmenter) -> PyTorchSegmenter:
    """A random model that a bright corner fools in the left half only, and that transfer fools everywhere but at 0."""
    return plain.with_model(RandomModel(WIDTH // 2))


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a small run's time, so only the test that looks at figures draws them."""
    monkeypatch.setattr(report, "RESAMPLES", 20)
    if "figures" not in request.node.name:
        monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)


@pytest.fixture
def clean_registries() -> Iterator[None]:
    attacks, defences = dict(attack_catalogue()), dict(defence_module._DEFENCES)
    yield
    from attacks import catalogue

    for registry, before in ((catalogue._ENTRIES, attacks), (defence_module._DEFENCES, defences)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


def run(data: Frames | None = None, **options: Any) -> Results:
    return evaluate(
        {"corner": segmenter(CornerModel())},
        {"bright": variant_attack},
        {"half": half_reach},
        data or Frames(),
        verbose=False,
        **options,
    )


# ------------------------------------------------------------------------------------------------- numbers by hand


def counted(image: int) -> int:
    """Pixels of an image that are neither void nor under the 2×2 patch."""
    return HEIGHT * WIDTH - 4 - image


def left_half(image: int) -> int:
    return HEIGHT * WIDTH // 2 - image


def test_rows_and_summary_are_the_numbers_computed_by_hand() -> None:
    results = run()
    rows = results.rows
    assert len(rows) == 5 * (1 + 3)
    assert set(zip(rows["defence"], rows["variant"], strict=True)) == {
        ("none", "plain"), ("half", "plain"), ("half", "adaptive"), ("half", "transfer"),
    }  # fmt: skip
    success = {(r.defence, r.variant, r.image): r.success for r in results.records}
    for image in range(5):
        # the undefended model believes the corner everywhere; the patch of image 4 stays dark
        assert success["none", "plain", image] == (image != 4)
        share = left_half(image) / counted(image)
        assert success["half", "plain", image] == pytest.approx(share if image == 1 else 0)
        assert success["half", "adaptive", image] == pytest.approx(share if image == 2 else 0)
        assert success["half", "transfer", image] == pytest.approx(share if image != 4 else 0)

    none, half = results.summary().to_dict("records")
    total = sum(counted(i) for i in range(5))
    assert none["success"] == pytest.approx(sum(counted(i) for i in range(4)) / total)
    assert half["success"] == pytest.approx(sum(left_half(i) for i in range(4)) / total)
    assert half["success_drop"] == pytest.approx(none["success"] - half["success"])
    assert half["plain_success"] == pytest.approx(left_half(1) / total)
    assert half["adaptive_success"] == pytest.approx(left_half(2) / total)
    assert half["transfer_success"] == pytest.approx(half["success"])
    # against the target: houses reached / all pixels have target house
    assert half["target_miou"] == pytest.approx(half["success"] / 2), "ground is predicted and never a target: IoU 0"
    ground = total - sum(left_half(i) for i in range(4))
    assert half["adversarial_miou"] == pytest.approx(ground / total / 2)
    assert half["pixel_accuracy"] == pytest.approx(ground / total)
    assert half["changed"] == pytest.approx(half["success"])
    assert half["iou_ratio"] == half["adversarial_miou"], "the clean prediction is right everywhere"
    assert half["clean_success"] == 0
    assert half["clean_miou"] == none["clean_miou"] == 1
    assert half["images"] == none["images"] == 5
    assert np.isnan(none["adaptive_success"])
    assert np.isnan(none["transfer_success"])


def test_worst_takes_the_strongest_variant_of_each_image() -> None:
    half = [r for r in run().records if r.defence == "half" and r.variant != "transfer"]
    chosen = worst(half)
    assert [r.image for r in chosen] == [0, 1, 2, 3, 4]
    assert [r.variant for r in chosen] == ["plain", "plain", "adaptive", "plain", "plain"], "of equals the first"


def test_everywhere_counts_the_pixels_under_the_patch_too() -> None:
    outside, everywhere = run().summary(), run(region="everywhere").summary()
    total = sum(counted(i) + 4 for i in range(5))
    assert everywhere["success"][0] == pytest.approx(sum(counted(i) + 4 for i in range(4)) / total)
    assert everywhere["success"][0] != outside["success"][0]
    counts = [r.adversarial.sum() for r in run(region="everywhere").records]
    assert counts == [HEIGHT * WIDTH - r.image for r in run().records], "void still counts nowhere"


def test_an_attack_without_target_is_scored_by_wrong_pixels() -> None:
    class Blind:
        def generate(self, x: np.ndarray, y: np.ndarray, **kwargs: Any) -> np.ndarray:
            assert not kwargs
            return np.where(np.arange(len(x))[:, None, None, None] >= 0, np.float32(0.9), x)

    results = evaluate(segmenter(CornerModel(reach=3)), {"blind": lambda _: Blind()}, "none", Frames(2), verbose=False)
    (row,) = results.summary().to_dict("records")
    assert row["model"] == "CornerModel"
    total, wrong = 2 * HEIGHT * WIDTH - 1, 2 * HEIGHT * 3 - 1  # no mask: every pixel but the void one counts
    assert row["success"] == pytest.approx(wrong / total)
    assert row["clean_success"] == 0
    assert np.isnan(row["target_miou"])


# ------------------------------------------------------------------------------------------- streams, batches, draws


def test_neither_batches_nor_the_choice_of_images_change_a_row() -> None:
    whole = {(r.defence, r.variant, r.image): r.to_json() for r in run(batch_size=5).records}
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"images": [4, 2]}, {"images": 3, "batch_size": 2}):
        for record in run(**options).records:
            assert record.to_json() == whole[record.defence, record.variant, record.image]
    assert [r.image for r in run(images=3).records[:3]] == [0, 2, 4], "spread over the data set"


def test_predictions_use_the_streams_of_the_images_and_a_draw_that_no_attack_uses() -> None:
    model = RandomModel(WIDTH)
    evaluate({"m": segmenter(model)}, {"bright": variant_attack}, "none", Frames(), images=[3, 1, 4], batch_size=2,
             checks=False, verbose=False)  # fmt: skip
    assert {c.draw for c in model.seen} == {-1}
    assert {c.images for c in model.seen} == {(3, 1), (4,)}


def test_an_undefended_model_that_is_random_meets_the_adaptive_attack_too() -> None:
    model = segmenter(RandomModel(WIDTH))
    results = evaluate({"m": model}, {"bright": variant_attack}, "none", Frames(), verbose=False)
    assert {r.variant for r in results.records} == {"plain", "adaptive"}


def test_options_reach_the_attacks_that_have_them_and_the_plain_one_does_not_adapt() -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def open_attack(target: PyTorchSegmenter, **options: Any) -> CornerAttack:
        seen.append((type(target.model).__name__, options))
        return CornerAttack(target, None)

    def strict_attack(target: PyTorchSegmenter, seed: int) -> CornerAttack:
        assert seed == 3
        return CornerAttack(target, None)

    evaluate({"m": segmenter(CornerModel())}, {"open": open_attack, "strict": strict_attack}, {"half": half_reach},
             Frames(1), seed=3, max_iter=7, defence_samples=9, checks=False, verbose=False)  # fmt: skip
    models = [name for name, _ in seen]
    assert models == ["CornerModel", "RandomModel", "RandomModel", "CornerModel"], "none, plain, adaptive, transfer"
    plain, adaptive = seen[1][1], seen[2][1]
    assert (plain["defence_samples"], plain["straight_through"]) == (1, False)
    assert adaptive["defence_samples"] == 9
    assert "straight_through" not in adaptive
    assert all(options["max_iter"] == 7 and options["seed"] == 3 for _, options in seen)


# --------------------------------------------------------------------------------------------------- a run is a folder


def figures(results: Results) -> Any:
    return results.summary().drop(columns="seconds")


def test_a_run_in_a_folder_and_without_one_are_the_same_and_can_be_read_again(tmp_path: Path) -> None:
    results = run(out=tmp_path / "run")
    assert figures(results).equals(figures(run()))
    loaded = Results.load(tmp_path / "run")
    assert loaded.summary().equals(results.summary())
    assert loaded.rows.equals(results.rows)
    assert json.loads((tmp_path / "run/summary.json").read_text())[1]["defence"] == "half"
    assert (tmp_path / "run/summary.csv").read_text().startswith("model,attack,defence,images,success")
    configuration = json.loads((tmp_path / "run/config.json").read_text())
    assert configuration["seed"] == 0
    assert configuration["environment"]["numpy"] == np.__version__
    assert not list((tmp_path / "run").rglob("*.part"))


def test_transfer_is_the_patch_of_the_undefended_model(tmp_path: Path) -> None:
    run(out=tmp_path)
    patch = Patch.load(tmp_path / "patches/corner/bright/none/plain-00000.safetensors")
    assert patch.location == (HEIGHT - 2, WIDTH - 2)
    assert patch.pixels.shape == (5, 3, 2, 2)
    assert patch.pixels[:4].eq(1).all()
    assert patch.pixels[4].eq(0).all()
    defended = half_reach(segmenter(CornerModel()))
    loaded = Results.load(tmp_path)
    for record in loaded.records:
        if record.variant == "transfer":
            frame = Frames()[record.image]
            pasted = Patch(patch.pixels[record.image], patch.location).paste(frame.image)
            labels = defended.predict_labels(pasted[None].numpy())[0]
            outside = np.ones((HEIGHT, WIDTH), dtype=bool)
            outside[-2:, -2:] = False
            use = outside & (frame.label.numpy() != IGNORE_INDEX)
            assert record.aim is not None
            assert record.aim[1, 1] == (labels[use] == 1).sum()


def test_a_finished_run_computes_nothing_again(tmp_path: Path) -> None:
    run(out=tmp_path)
    before = files(tmp_path)
    VariantAttack.calls = 0
    again = run(out=tmp_path, batch_size=2)
    assert VariantAttack.calls == 0
    assert files(tmp_path) == before
    assert again.summary().equals(Results.load(tmp_path).summary())


def test_an_interrupted_run_keeps_what_is_finished_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "CHUNK", 2)
    run(out=tmp_path / "whole")
    generate = VariantAttack.generate

    def stop_at_the_fifth(self: VariantAttack, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        if VariantAttack.calls == 4:
            raise KeyboardInterrupt
        return generate(self, x, y, images)

    VariantAttack.calls = 0
    monkeypatch.setattr(VariantAttack, "generate", stop_at_the_fifth)
    stopped = run(out=tmp_path / "stopped")
    assert stopped.interrupted
    held = [(r.defence, r.image) for r in stopped.records]
    assert held == [*(("none", image) for image in range(5)), ("half", 0), ("half", 1)]
    assert Results.load(tmp_path / "stopped").rows.equals(stopped.rows)
    assert "INTERRUPTED" in shown(stopped)
    monkeypatch.setattr(VariantAttack, "generate", generate)
    VariantAttack.calls = 0
    run(out=tmp_path / "stopped", checks=False)
    assert VariantAttack.calls == 2 + 3, "two chunks of plain and three of adaptive were left"
    run(out=tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run(out=tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=r"differs in seed\."):
        run(out=tmp_path / "run", seed=1)
    with pytest.raises(ValueError, match=r"differs in data\."):
        run(Frames(4), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"differs in models, region\."):
        evaluate({"corner": segmenter(CornerModel().double())}, {"bright": variant_attack}, {"half": half_reach},
                 Frames(), out=tmp_path / "run", region="everywhere", verbose=False)  # fmt: skip
    assert files(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        run(out=tmp_path / "other")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run(out=tmp_path)
    path = tmp_path / "cells/corner/bright/none/plain-00000.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=r"plain-00000\.jsonl is damaged \(4 lines instead of 5\)"):
        Results.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Results.load(tmp_path / "nowhere")


def test_figures_are_drawn_and_show_something(tmp_path: Path) -> None:
    run(out=tmp_path)
    pictures = {p.name: np.asarray(Image.open(p).convert("RGB")) for p in (tmp_path / "figures").iterdir()}
    assert set(pictures) == {"corner--bright--worst.png", "corner--bright--median.png"}
    for picture in pictures.values():
        assert picture.shape[0] > 200
        colours = {tuple(c) for c in np.unique(picture.reshape(-1, 3), axis=0).tolist()}
        assert {Frames.colors[0], Frames.colors[1]} <= colours, "ground and house are both painted"
        assert (255, 47, 214) in colours, "the patch is outlined"


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    names = ["zoo:a/b", "zoo:a b"]
    evaluate({name: segmenter(CornerModel()) for name in names}, {"../x": variant_attack}, "none", Frames(1),
             out=tmp_path / "run", verbose=False)  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert [r.model for r in Results.load(tmp_path / "run").records] == names


def test_runs_that_differ_in_their_models_make_one_table(tmp_path: Path) -> None:
    def part(name: str, data: Frames | None = None) -> Results:
        model = segmenter(CornerModel())
        factories, functions = {"bright": variant_attack}, {"half": half_reach}
        evaluate({name: model}, factories, functions, data or Frames(), verbose=False, out=tmp_path / name)
        return Results.load(tmp_path / name)

    one, two = part("one"), part("two")
    both = Results.joined([one, two, one])
    assert list(both.summary()["model"].unique()) == ["one", "two"]
    for single in (one, two):
        mine = both.summary()
        mine = mine[mine["model"] == single.records[0].model].reset_index(drop=True)
        assert mine.equals(single.summary())
    lines = both.markdown().splitlines()
    assert len(lines) == 2 + len(both.summary())
    assert len({line.count("|") for line in lines}) == 1
    other = Results(two.records, two.classes, [], {**two.configuration, "models": {"one": "other weights"}})
    with pytest.raises(ValueError, match="'one' among the models"):
        Results.joined([one, other])
    with pytest.raises(ValueError, match="differ in data"):
        Results.joined([one, part("three", Frames(2))])
    with pytest.raises(ValueError, match="at least one"):
        Results.joined([])


# ------------------------------------------------------------------------------------------------- defences, plug-ins


def shown(results: Results) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table())
    return console.export_text()


def test_a_defence_that_does_not_apply_is_shown_and_the_run_goes_on(tmp_path: Path, attention_segmenter: Any) -> None:
    class Labelled(Frames):
        classes = ("a", "b", "c", "d")
        colors = (*Frames.colors, (0, 0, 0))

    corner = PyTorchSegmenter(nn.Conv2d(3, 4, 1), nb_classes=4, input_shape=(3, HEIGHT, WIDTH))
    options: dict[str, Any] = {"max_iter": 2, "patch_shape": (3, 3), "verbose": False}
    results = evaluate({"cnn": corner, "attention": attention_segmenter}, "permute", ["ram"], Labelled(2),
                       out=tmp_path, **options)  # fmt: skip
    assert [(s.model, s.defence) for s in results.skipped] == [("cnn", "ram")]
    assert {(r.model, r.defence) for r in results.records} == {
        ("cnn", "none"), ("attention", "none"), ("attention", "ram"),
    }  # fmt: skip
    assert {r.variant for r in results.records if r.defence == "ram"} == {"plain", "adaptive", "transfer"}
    assert "n/a: ram does not apply to cnn: no attention" in shown(results)
    assert "gain" in shown(results)  # the last column fits into the 80 that a terminal has at least
    loaded = Results.load(tmp_path)
    assert loaded.skipped == results.skipped
    assert loaded.summary().equals(results.summary())

    def broken(plain: PyTorchSegmenter) -> PyTorchSegmenter:
        raise ValueError("max_attention=7")

    with pytest.raises(ValueError, match="max_attention=7"):
        evaluate({"cnn": corner}, "permute", {"broken": broken}, Labelled(1), **options)


@pytest.mark.usefixtures("clean_registries")
def test_what_a_user_registers_shows_in_the_table() -> None:
    @register_attack("white")
    def white(target: PyTorchSegmenter, **options: Any) -> CornerAttack:
        return CornerAttack(target, None)

    @register_defence("deaf")
    def deaf(plain: PyTorchSegmenter) -> PyTorchSegmenter:
        return plain.with_model(CornerModel(reach=1))

    results = evaluate({"m": segmenter(CornerModel())}, "white", "deaf", Frames(), verbose=False)
    text = shown(results)
    assert "attack: white" in text
    assert "deaf" in text
    (none, deaf_row) = results.summary().to_dict("records")
    assert none["success"] == 1
    assert deaf_row["success"] < 0.15
    assert f"▼ {100 * deaf_row['success_drop']:.1f}" in text
    assert results.sentences() == [
        f"On m, deaf lowers the share of pixels that the white patch fools: 100.0 % without it, "
        f"{100 * deaf_row['success']:.1f} % with it (the strongest variant of the attack on each image); "
        "clean mIoU 100.0 % and 100.0 %."
    ]


def test_an_attack_of_art_in_the_table() -> None:
    from art.attacks.evasion import FastGradientMethod

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    results = evaluate(
        {"conv": segmenter(model)},
        {"fgsm": lambda target: FastGradientMethod(target, eps=0.3, batch_size=2)},
        "none",
        Frames(3),
        verbose=False,
    )
    (row,) = results.summary().to_dict("records")
    assert row["success"] >= row["clean_success"]
    assert row["changed"] > 0


# ----------------------------------------------------------------------------------------------------------- refusals


class Leaky(CornerAttack):
    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        x[:, :, 0, 0] += 0.01
        return x


class Overbright(CornerAttack):
    def brightness(self, image: int) -> float:
        return 1.5


class Aimless:
    targeted = True

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda t: Leaky(t, None), "changed pixels outside its mask"),
        (lambda t: Overbright(t, None), "no valid images"),
        (lambda t: Aimless(), "is targeted and does not say at what"),
    ],
)
def test_an_attack_that_breaks_its_promise_stops_the_run(attack: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate({"m": segmenter(CornerModel())}, {"bad": attack}, "none", Frames(1), verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": "permutate"}, "no attack named 'permutate': did you mean 'permute'"),
        ({"attacks": ["permute", "permute"]}, "given twice"),
        ({"attacks": []}, "no attack given"),
        ({"defences": "rum"}, "did you mean 'ram'"),
        ({"models": {}}, "no model given"),
        ({"models": {"m": 3}}, "wrap it in a PyTorchSegmenter"),
        ({"data": "scene"}, "unknown data"),
        ({"images": 6}, "images=6: the data set has 5"),
        ({"images": [1, 1]}, "different indices"),
        ({"images": []}, "at least one"),
        ({"region": "inside"}, "region='inside'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"epsilon_step": 1}, "option 'epsilon_step': none of the attacks"),
        ({"attacks": "permute", "epsilon_step": 1}, "option 'epsilon_step': none of the attacks \\(permute\\) has it"),
        ({"data": "scenes:2"}, "has 3 classes and the data 11"),
    ],
)
def test_mistakes_are_named_before_any_work(change: dict[str, Any], message: str) -> None:
    model = CornerModel()
    arguments: dict[str, Any] = {
        "models": {"m": segmenter(model)}, "attacks": {"bright": variant_attack}, "defences": "none", "data": Frames(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate(**{**arguments, **change}, verbose=False)
    assert model.calls == 0


def test_frames_of_different_sizes_and_damaged_labels_are_refused() -> None:
    class Uneven(Frames):
        def __getitem__(self, index: int) -> Frame:
            image, label, name = super().__getitem__(index)
            return Frame(image[:, index:], label[index:], name)

    class Wrong(Frames):
        def __getitem__(self, index: int) -> Frame:
            image, label, name = super().__getitem__(index)
            return Frame(image, label + 7, name)

    with pytest.raises(ValueError, match="give a size"):
        run(Uneven())
    with pytest.raises(ValueError, match="7"):
        run(Wrong())


def test_a_record_survives_json() -> None:
    for record in run().records:
        again = Record.from_json(record.to_json(), 3)
        assert again.to_json() == record.to_json()
        np.testing.assert_array_equal(again.adversarial, record.adversarial)


def test_what_an_attack_took_is_told_for_each_image(tmp_path: Path) -> None:
    began = time.perf_counter()
    results = evaluate(
        {"m": segmenter(linear_cnn(len(CLASSES)))},
        ("permute",),
        ("none",),
        Frames(),
        images=2,
        max_iter=3,
        out=tmp_path / "r",
        verbose=False,
    )
    took = time.perf_counter() - began
    (row,) = results.summary().to_dict("records")
    assert (row["steps"], row["forwards"], row["backwards"]) == (3, 4, 3)
    assert 0 < row["seconds"] <= took
    (again,) = Results.load(tmp_path / "r").summary().to_dict("records")
    assert [again[name] for name in ("steps", "forwards", "backwards", "seconds")] == [
        row[name] for name in ("steps", "forwards", "backwards", "seconds")
    ]


def test_an_attack_that_does_not_apply_is_skipped(tmp_path: Path) -> None:
    class Choosy:
        def __init__(self, segmenter: Any, **options: Any) -> None: ...
        def generate(self, x: Any, y: Any = None) -> Any:
            raise NotApplicableError("no eyes: this model cannot be dazzled")

    named = {"dazzle": Choosy, "permute": attack_catalogue()["permute"].factory}
    model = {"m": segmenter(linear_cnn(len(CLASSES)))}
    results = evaluate(model, named, ("none",), Frames(), images=1, max_iter=1, out=tmp_path / "r", verbose=False)
    for found in (results, Results.load(tmp_path / "r")):
        assert found.summary()[["attack", "note"]].values.tolist() == [["dazzle", "no eyes"], ["permute", ""]]
        assert "n/a: dazzle does not apply to m: no eyes" in shown(found)


def test_a_place_for_each_image_is_kept_with_it() -> None:
    """A patch that goes elsewhere on each image is transferred to where it was."""

    class Wandering:
        def __init__(self, segmenter: Any, **options: Any) -> None: ...
        def generate(self, x: Any, y: Any = None, *, images: Any = None) -> Any:
            x = x.copy()
            for row, image in enumerate(images):
                x[row, :, image : image + 4, 2 * image : 2 * image + 4] = 1.0
            self.images = images
            return x

        def mask(self, x: Any) -> Any:
            mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
            for row, image in enumerate(self.images):
                mask[row, image : image + 4, 2 * image : 2 * image + 4] = True
            return mask

    results = evaluate(
        {"m": segmenter(CornerModel())}, {"w": Wandering}, {"same": lambda s: s}, Frames(), images=3, verbose=False
    )
    plain = {r.image: r for r in results.records if (r.defence, r.variant) == ("none", "plain")}
    moved = {r.image: r for r in results.records if (r.defence, r.variant) == ("same", "transfer")}
    assert len(plain) == len(moved) == 3
    for image, record in plain.items():
        assert np.array_equal(record.adversarial, moved[image].adversarial)
