"""The command line, through typer's runner: what a user types, and what a user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attacks import catalogue
from evaluation import experiment, models
from evaluation.cli import app
from evaluation.sizes import pair
from ramdefense import defences

PLUGIN = '''
import numpy as np
from attacks import register_attack
from ramdefense.defences import register_defence

@register_attack("white-square", summary="A white square.")
class WhiteSquare:
    def __init__(self, segmenter, patch_shape=(4, 4)):
        self.height, self.width = patch_shape

    def generate(self, x, y):
        x[..., -self.height :, -self.width :] = 1
        return x

    def mask(self, x):
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[..., -self.height :, -self.width :] = True
        return mask

@register_defence("same-again")
def same_again(segmenter):
    """Changes nothing."""
    return segmenter.with_model(segmenter.model)
'''
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


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plug-in and a module of models in the current folder, registries as they were, no figures."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
    monkeypatch.setenv("COLUMNS", "120")
    before = dict(catalogue._ENTRIES), dict(defences._DEFENCES)
    yield
    for registry, entries in zip((catalogue._ENTRIES, defences._DEFENCES), before, strict=True):
        registry.clear()
        registry.update(entries)  # type: ignore[arg-type]
    for name in ("my_models", "ramdefense_plugin_plugin"):
        sys.modules.pop(name, None)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


EVALUATE = (
    "evaluate", "--model", "my_models:attention", "--data", "scenes:3", "--size", "32x48", "--plugin", "plugin.py",
    "--attack", "white-square", "--defence", "same-again", "--quiet",
)  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "art", "pandas", "matplotlib")
    code = f"import sys; from evaluation.cli import app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    help_text = call("--help").output
    for command in ("evaluate", "table", "demo", "sites", "train", "attacks", "defences", "models"):
        assert command in help_text
        assert call(command, "--help").exit_code == 0


def test_evaluate_with_a_plugin_writes_a_run_and_resumes_it() -> None:
    first = call(*EVALUATE, "--out", "run", "--images", "2", "--patch-size", "5x6")
    assert first.exit_code == 0, first.output
    assert "attack: white-square" in first.output
    assert "same-again" in first.output
    summary = json.loads(Path("run/summary.json").read_text())
    assert [row["defence"] for row in summary] == ["none", "same-again"]
    assert all(row["images"] == 2 for row in summary)
    assert json.loads(Path("run/config.json").read_text())["options"] == {"patch_shape": [5, 6]}
    before = {p: p.stat().st_mtime_ns for p in Path("run/cells").rglob("*.jsonl")}
    assert first.output.startswith(call("table", "run").output)
    assert call("table", "run", "--markdown").output.count("| same-again") == 1
    assert "95%" in call("intervals", "run", "--resamples", "50", "--out", "sure").output
    assert {path.name for path in Path("sure").iterdir()} == {"intervals.csv", "differences.csv"}
    again = call(*EVALUATE, "--out", "run", "--images", "2", "--patch-size", "5x6")
    assert again.output == first.output
    assert {p: p.stat().st_mtime_ns for p in Path("run/cells").rglob("*.jsonl")} == before


def test_evaluate_with_the_real_attack_and_ram() -> None:
    done = call(
        "evaluate", "--model", "my_models:attention", "--model", "my_models:convolution", "--data", "scenes:2",
        "--size", "32x48", "--attack", "permute", "--max-iter", "2", "--patch-size", "8", "--patch-location", "0x3",
        "--option", "eps_step=0.2", "--option", "optimizer=adam", "--seed", "3", "--region", "everywhere",
        "--batch-size", "1", "--device", "cpu", "--out", "run", "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "n/a: ram does not apply to my_models:convolution" in done.output
    configuration = json.loads(Path("run/config.json").read_text())
    assert configuration["options"] == {
        "eps_step": 0.2, "max_iter": 2, "optimizer": "adam", "patch_location": [0, 3], "patch_shape": [8, 8],
    }  # fmt: skip
    assert (configuration["seed"], configuration["region"]) == (3, "everywhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--model", "my_models:attention", "--data", "scene"), "unknown data 'scene'"),
        (("evaluate", "--model", "zoo:nothing", "--data", "scenes:2"), "no model 'nothing' in the zoo"),
        (("evaluate", "--model", "nothing", "--data", "scenes:2"), "unknown model 'nothing'"),
        (("evaluate", "--model", "my_models:missing", "--data", "scenes:2"), "my_models:missing"),
        (("evaluate", "--model", "a.safetensors", "--data", "scenes:2"), "no file a.safetensors"),
        (("evaluate", "--model", "x", "--data", "camvid:/nowhere"), "no folder /nowhere/images"),
        ((*EVALUATE, "--attack", "blue-square"), "no attack named 'blue-square'"),
        ((*EVALUATE, "--defence", "rum"), "did you mean 'ram'"),
        ((*EVALUATE, "--images", "4"), "images=4: the data set has 3"),
        ((*EVALUATE, "--patch-size", "5x"), "--patch-size 5x: two whole numbers"),
        ((*EVALUATE, "--size", "32x48x3"), "--size 32x48x3: two whole numbers"),
        ((*EVALUATE, "--region", "inside"), "region='inside'"),
        ((*EVALUATE, "--device", "tpu"), "--device tpu: cpu or gpu"),
        ((*EVALUATE, "--option", "eps_step"), "--option eps_step: NAME=VALUE"),
        ((*EVALUATE, "--option", "eps_step=[1"), "the value is no YAML"),
        ((*EVALUATE, "--option", "epsilon=1"), "option 'epsilon': none of the attacks"),
        ((*EVALUATE, "--plugin", "other.py"), "--plugin other.py: no such file"),
        ((*EVALUATE, "--plugin", "no_such_module"), "--plugin no_such_module: no such module"),
        ((*EVALUATE, "--out", "."), "is not empty and holds no run"),
        (("sites", "--model", "zoo:nothing"), "no model 'nothing' in the zoo"),
        (("sites", "--model", "my_models:attention", "--size", "32x48"), "does not say its nb_classes"),
        (("train", "recipe.yaml"), "no file recipe.yaml"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, "one line"
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


def test_a_bug_keeps_its_traceback() -> None:
    Path("broken.py").write_text("1 / 0")
    done = call("attacks", "--plugin", "broken.py")
    assert isinstance(done.exception, ZeroDivisionError)


def test_sites() -> None:
    done = call("sites", "--model", "my_models:attention", "--size", "32x48", "--classes", "11")
    assert done.exit_code == 0, done.output
    row = next(line.split() for line in done.output.splitlines() if "softmax" in line)
    assert row[1:] == ["global", "2", "96", "96", "softmax"], "8×12 tokens of 4×4 pixels"
    done = call("sites", "--model", "my_models:convolution", "--size", "32x48", "--classes", "11")
    assert done.exit_code == 0
    assert "has no attention: RAM does not apply" in done.output


def test_lists() -> None:
    attacks = call("attacks", "--plugin", "plugin.py").output
    assert all(name in attacks for name in ("permute", "strip", "untargeted", "white-square", "A white square."))
    listed = call("defences", "--plugin", "plugin.py").output
    assert all(name in listed for name in ("none", "ram", "same-again", "Changes nothing."))
    shown = call("models").output
    assert all(f"zoo:{name}" in shown for name in models.zoo())
    assert "'torchvision:NAME'" in shown


def test_train_writes_a_model_that_evaluates() -> None:
    Path("recipe.yaml").write_text(
        'architecture: cnn\ntrain: "scenes:3"\nval: "scenes:2"\ntest: "scenes:2"\nsize: [32, 48]\n'
        "steps: 2\nbatch_size: 2\n"
    )
    done = call("train", "recipe.yaml", "--out", "models/mine", "--quiet")
    assert done.exit_code == 0, done.output
    assert "test: mIoU" in done.output
    assert Path("models/mine.safetensors").exists()
    done = call("evaluate", "--model", "models/mine.safetensors", "--data", "scenes:1", "--size", "32x48", "--plugin",
                "plugin.py", "--attack", "white-square", "--defence", "none", "--quiet")  # fmt: skip
    assert done.exit_code == 0, done.output
    Path("bad.yaml").write_text("architektur: cnn\n")
    done = call("train", "bad.yaml")
    assert done.exit_code == 2
    assert "architektur" in done.stderr


def test_demo_ends_with_the_table_a_sentence_and_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from ramdefense.segmenter import PyTorchSegmenter

    def load(name: str, *, input_shape: tuple[int, int, int], **_: object) -> PyTorchSegmenter:
        import my_models  # type: ignore[import-not-found]

        made = {"zoo:scenes-nonlocal": my_models.attention, "zoo:scenes-cnn": my_models.convolution}[name]()
        return PyTorchSegmenter(made, nb_classes=11, input_shape=input_shape)

    monkeypatch.setattr(models, "load_model", load)
    done = call("demo", "--images", "1", "--max-iter", "1", "--quiet")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert text.index("attack: permute") < text.index("attack: strip") < text.index("On zoo:scenes-nonlocal, ram ")
    assert text.endswith("Figures: runs/demo/figures Page: runs/demo/report.html")
    assert Path("runs/demo/report.html").exists()
    assert Path("runs/demo/summary.csv").exists()


def test_pairs() -> None:
    expected = {"40": (40, 40), "40x60": (40, 60), "40×60": (40, 60), "4X6": (4, 6)}
    assert {text: pair(text, "--size") for text in expected} == expected
