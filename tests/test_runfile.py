"""A run as a YAML file: what it may say, what it says wrong, and that it repeats the run that wrote it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import files
from typer.testing import CliRunner, Result

from attacks import catalogue
from evaluation import experiment
from evaluation.cli import app
from evaluation.runfile import RunFile
from ramdefense import defences

SMALL: dict[str, Any] = {"models": "tiny:x", "data": "scenes:2"}

PLUGIN = """
from attacks import register_attack

@register_attack("white-square", summary="A white square.")
class WhiteSquare:
    def __init__(self, segmenter, patch_shape=(4, 4), patch_location=(0, 0), seed=0):
        (self.height, self.width), (self.top, self.left) = patch_shape, patch_location
        self.seed = seed

    def generate(self, x, y):
        x[..., self.top : self.top + self.height, self.left : self.left + self.width] = 1 / (1 + self.seed)
        return x
"""
MODELS = """
import torch
from tiny import TinyAttention

def attention():
    torch.manual_seed(0)
    return TinyAttention(nb_classes=11)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plug-in and a model in the current folder, registries as they were, no figures."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "my_model.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
    before = dict(catalogue._ENTRIES), dict(defences._DEFENCES)
    yield tmp_path
    for registry, entries in zip((catalogue._ENTRIES, defences._DEFENCES), before, strict=True):
        registry.clear()
        registry.update(entries)  # type: ignore[arg-type]
    for name in ("my_model", "ramdefense_plugin_plugin"):
        sys.modules.pop(name, None)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def written(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def cells(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.startswith(("cells", "patches"))}


COMMAND = (
    "evaluate", "--model", "my_model:attention", "--data", "scenes:3", "--size", "32x48", "--plugin", "plugin.py",
    "--attack", "white-square", "--attack", "margin", "--defence", "ram:max_attention=3/N", "--images", "1",
    "--patch-size", "5x6", "--patch-location", "3x7", "--max-iter", "2", "--option", "optimizer=adam",
    "--seed", "3", "--seed", "1", "--region", "everywhere", "--batch-size", "1", "--target", "4", "--device", "cpu",
)  # fmt: skip


def test_the_file_that_a_run_writes_repeats_it_byte_for_byte(here: Path) -> None:
    first = call(*COMMAND, "--out", "first")
    assert first.exit_code == 0, first.output
    again = call("evaluate", "first/run.yaml", "--out", "second")
    assert again.exit_code == 0, again.output
    assert len(cells(here / "first")) > 10
    assert files(here / "second") == {
        **files(here / "first"), "run.yaml": (here / "second/run.yaml").read_bytes()
    }  # fmt: skip
    one, two = (yaml.safe_load((here / name / "run.yaml").read_text()) for name in ("first", "second"))
    assert two == {**one, "out": "second"}
    before = cells(here / "first")
    resumed = call("evaluate", "first/run.yaml")
    assert resumed.exit_code == 0, resumed.output
    assert cells(here / "first") == before


def test_the_file_is_there_when_the_work_begins(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment._Run, "pieces", stop)
    assert call(*COMMAND, "--out", "run").exit_code == 130
    assert RunFile.read("run/run.yaml").attacks == ["white-square", "margin"]


def test_a_refused_folder_keeps_its_file(here: Path) -> None:
    command = [*COMMAND[:11], "--defence", "none", "--images", "1", "--out", "run"]
    assert call(*command).exit_code == 0
    before = (here / "run/run.yaml").read_bytes()
    refused = call(*command, "--seed", "9")
    assert refused.exit_code == 2
    assert "differs in seed" in refused.stderr
    assert (here / "run/run.yaml").read_bytes() == before


def test_options_beside_the_file_overrule_it(here: Path) -> None:
    path = written(
        here / "mine.yaml", models="my_model:attention", data="scenes:3", size="32x48", attacks=["permute"],
        defences="none", max_iter=2, images=3, seed=1, options={"optimizer": "adam", "eps_step": 0.1},
    )  # fmt: skip
    done = call("evaluate", str(path), "--images", "1", "--max-iter", "1", "--option", "eps_step=0.2", "--out", "run")
    assert done.exit_code == 0, done.output
    run = RunFile.read("run/run.yaml")
    assert (run.images, run.max_iter, run.seed) == (1, 1, [1])
    assert run.options == {"optimizer": "adam", "eps_step": 0.2}
    assert run.models == ["my_model:attention"]


def test_neither_a_file_nor_a_model() -> None:
    for arguments, message in (
        (("evaluate",), "no models given: --model"),
        (("evaluate", "--model", "x"), "no data given: --data"),
        (("evaluate", "nowhere.yaml"), "no file nowhere.yaml"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacs": "strip"}, "unknown key 'attacs'; did you mean 'attacks'?"),
        ({"Batch_Size": 3}, "unknown key 'Batch_Size'; did you mean 'batch_size'?"),
        ({"qqq": 1}, "unknown key 'qqq'; the keys are models, data, attacks"),
        ({3: 1}, "unknown key '3'"),
        ({"batch_size": "many"}, "batch_size='many': Input should be a valid integer"),
        ({"images": "all"}, "images='all': Input should be a valid integer"),
        ({"images": [1, "two"]}, "images=[1, 'two']:"),
        ({"seed": []}, "seed=[]: at least one"),
        ({"seed": True}, "seed=True: Input should be a valid integer"),
        ({"seed": [0, 1.5]}, "seed=[0, 1.5]: Input should be a valid integer"),
        ({"region": "inside"}, "region='inside': Input should be 'outside' or 'everywhere'"),
        ({"size": [1, 2, 3]}, "size=[1, 2, 3]:"),
        ({"size": "5x"}, "size='5x': size 5x: two whole numbers"),
        ({"patch_shape": "wide"}, "patch_shape='wide':"),
        ({"keep_going": "yes"}, "keep_going='yes': Input should be a valid boolean"),
        ({"models": []}, "models=[]: at least one"),
        ({"models": [3]}, "models=[3]: Input should be a valid string"),
        ({"device": "tpu"}, "device='tpu': Input should be 'cpu' or 'gpu'"),
        ({"options": [1]}, "options=[1]: Input should be a valid dictionary"),
        ({"options": {"max_iter": 3}}, "options: 'max_iter' is a key of its own"),
        ({"max_iter": 1.5, "out": 3}, "out=3: Input should be a valid string; max_iter=1.5: Input should be"),
    ],
)
def test_a_mistake_names_the_file_the_key_what_was_given_and_the_remedy(
    tmp_path: Path, change: dict[Any, Any], message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **change}))
    with pytest.raises(ValueError, match=r"^.*run\.yaml: ") as raised:
        RunFile.read(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: tiny:x", "data is missing"),
        ("{}", "models is missing; data is missing"),
        ("- models", "a run file is a mapping with the keys models, data"),
        ("", "holds None"),
        ("models: [", "is no YAML"),
    ],
)
def test_what_is_no_run(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml") as raised:
        RunFile.read(tmp_path / "run.yaml")
    assert message in str(raised.value)


def test_one_thing_may_be_said_in_several_ways() -> None:
    for size in (40, "40", "40x40", "40×40", [40, 40]):
        assert RunFile.checked({**SMALL, "size": size}).size == (40, 40)
    places = {"3x20": (3, 20), "upper_left": "upper_left", (3, 20): (3, 20), ((1, 2), (3, 4)): [(1, 2), (3, 4)]}
    for place, meant in places.items():
        assert RunFile.checked({**SMALL, "patch_location": as_yaml(place)}).patch_location == meant
    for seed, several in ((3, [3]), ([3], [3]), ([3, 1], [3, 1])):
        assert RunFile.checked({**SMALL, "seed": seed}).seed == several
    for target in (5, "5"):
        assert RunFile.checked({**SMALL, "target": target}).arguments()["target"] == "5"
    run = RunFile.checked(SMALL)
    assert (run.models, run.attacks, run.defences) == (["tiny:x"], ["permute", "strip"], ["none", "ram"])


def as_yaml(value: Any) -> Any:
    return [as_yaml(one) for one in value] if isinstance(value, tuple) else value


NAMES = st.text(min_size=1, max_size=8)
PAIRS = st.tuples(st.integers(0, 99), st.integers(0, 99))


@settings(deadline=None, max_examples=50)
@given(
    st.fixed_dictionaries(
        {"models": st.lists(NAMES, min_size=1), "data": NAMES},
        optional={
            "attacks": st.lists(NAMES, min_size=1),
            "target": NAMES,
            "images": st.integers() | st.lists(st.integers()),
            "size": PAIRS,
            "seed": st.lists(st.integers(), min_size=1),
            "max_iter": st.integers(),
            "patch_location": PAIRS | st.sampled_from(["upper_left", "center"]),
            "options": st.dictionaries(
                NAMES.map("x{}".format), st.integers() | st.floats(allow_nan=False) | NAMES | st.booleans()
            ),
            "keep_going": st.booleans(),
        },
    )
)
def test_what_is_written_is_read_again(values: dict[str, Any]) -> None:
    run = RunFile.checked(values)
    assert RunFile.checked(yaml.safe_load(run.to_yaml())) == run
    assert RunFile.checked(run.model_dump()) == run
