"""The README's code is run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

README = (Path(__file__).parent.parent / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_ten_lines_of_python_run(capsys) -> None:
    (block,) = [b for b in _blocks("python") if "load_model" in b]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    shares = [float(share) for share in re.findall(r"[\d.]+", capsys.readouterr().out)]
    assert len(shares) == 4
    assert all(0 <= share <= 1 for share in shares)


@pytest.mark.slow
def test_a_registered_attack_and_defence_show_in_the_table(tmp_path, monkeypatch) -> None:
    from evaluation.cli import app

    monkeypatch.chdir(tmp_path)
    for block in _blocks("python"):
        name = re.match(r"# (my_\w+\.py)\n", block)
        if name:
            (tmp_path / name[1]).write_text(block)
    (command,) = [b for b in _blocks("sh") if "--plugin" in b]
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "ramdefense"
    result = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "all-sky" in result.output
    assert "strict-ram" in result.output


@pytest.mark.slow
def test_the_baselines_stand_in_the_table_of_the_demo(tmp_path, monkeypatch) -> None:
    from evaluation.cli import app

    monkeypatch.chdir(tmp_path)
    (command,) = [line for b in _blocks("sh") for line in b.splitlines() if "demo --defence" in line]
    _, *arguments = shlex.split(command)
    result = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "multiscale" in result.output
    assert "crf" in result.output
