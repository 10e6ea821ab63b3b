"""What is imported when: names and help without torch, a hardened model without ART."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from tiny import NB_CLASSES, SHAPE, tiny_attention

import ramdefense.ram
from evaluation.fingerprints import identity
from ramdefense.defences import defence, defences, summaries
from ramdefense.ram import RAMDefense
from ramdefense.segmenter import PyTorchSegmenter

HEAVY = (
    "torch", "torchvision", "art", "torchattacks", "kornia", "timm", "transformers", "segmentation_models_pytorch",
    "scipy", "sklearn", "matplotlib", "pandas", "numpy", "PIL",
)  # fmt: skip


def imported(code: str) -> set[str]:
    """Which of the heavy packages a fresh process has imported after some code."""
    told = f"\nimport sys; print(*(name for name in {HEAVY} if name in sys.modules), sep=',', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    return set(done.stderr.strip().split(",")) - {""}


def command(*arguments: str) -> str:
    """Code that calls the command line and goes on after it."""
    called = f"import sys; sys.argv = ['ramdefense', *{arguments!r}]\nfrom evaluation.cli import main\n"
    return called + "try: main()\nexcept SystemExit as end: assert not end.code\n"


def test_the_packages_bring_nothing() -> None:
    listed = "print(len(dir(ramdefense)), len(dir(attacks)), len(dir(evaluation)))"
    assert imported(f"import ramdefense, attacks, evaluation; {listed}") == set()


@pytest.mark.parametrize(
    "arguments", [("--help",), ("evaluate", "--help"), ("models",), ("defences",)], ids=lambda a: " ".join(a)
)
def test_commands_that_only_tell_bring_nothing(arguments: tuple[str, ...]) -> None:
    assert imported(command(*arguments)) == set()


def test_papers_bring_what_reads_tables() -> None:
    assert imported(command("papers")) == {"pandas", "numpy"}


@pytest.mark.slow
def test_a_hardened_model_brings_torch_alone() -> None:
    named = "from ramdefense import Refinement, attention_sites, harden, refined_attention, register_defence"
    assert imported(named) <= {"torch", "numpy"}


def test_ram_is_found_where_it_was() -> None:
    """Pickles and the folders of runs name it so."""
    assert ramdefense.RAMDefense is ramdefense.ram.RAMDefense is RAMDefense is defence("ram")
    assert identity(RAMDefense) == "ramdefense.ram.RAMDefense"
    assert b"ramdefense.ram\n" in pickle.dumps(RAMDefense, protocol=0)
    assert "RAMDefense" in dir(ramdefense.ram)
    with pytest.raises(AttributeError, match="RAMDefence"):
        _ = ramdefense.ram.RAMDefence
    defended = RAMDefense(PyTorchSegmenter(tiny_attention(), NB_CLASSES, SHAPE))
    assert type(pickle.loads(pickle.dumps(defended))) is type(defended)


def test_a_summary_is_the_first_line_of_the_docstring() -> None:
    assert summaries() == {name: (defence(name).__doc__ or "").strip().partition("\n")[0] for name in defences()}
    assert all(summaries()[name] for name in ("none", "ram", "multiscale", "crf"))
