"""Claims follow from measurements: made-up ones that must hold, and ones that must not."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from tiny import NB_CLASSES, SHAPE, random_images, tiny_cnn

from evaluation.papers import arnab, yuan
from evaluation.papers.catalogue import as_markdown, papers
from evaluation.papers.claims import by_share, measured
from ramdefense.segmenter import PyTorchSegmenter

EPS = (1.0, 8.0)


def ratios(multiscale: float, crf: float, without_crf: float) -> pd.DataFrame:
    """IoU ratios of a protocol in which the undefended model keeps a half, whatever the attack."""
    rows = []
    for attack, eps in itertools.product(arnab._FAMILIES.values(), EPS):
        for defence, made, ratio in (
            ("none", "through", 0.5), ("multiscale", "through", multiscale), ("multiscale", "without", 0.9),
            ("crf", "through", crf), ("crf", "without", without_crf),
        ):  # fmt: skip
            rows.append(("m", defence, attack, eps, made, 1, ratio))
    return pd.DataFrame(rows, columns=["model", "defence", "attack", "eps", "made", "images", "iou_ratio"])


def scales(own: float, others: float) -> pd.DataFrame:
    pairs = itertools.product(("0.5", "1"), repeat=2)
    rows = [("m", made, tested, 1, own if made == tested else others) for made, tested in pairs]
    return pd.DataFrame(rows, columns=["model", "made_on", "tested_on", "images", "iou_ratio"])


@pytest.mark.parametrize(
    ("measured_ratios", "measured_scales", "verdicts"),
    [
        (ratios(0.8, 0.8, 0.5), scales(0.2, 0.9), ["holds"] * 4),
        (ratios(0.5, 0.8, 0.8), scales(0.2, 0.3), ["does not hold", "does not hold", "holds", "does not hold"]),
        (
            ratios(0.505, 0.4, 0.4),
            scales(0.2, 0.7),
            ["does not hold", "holds", "does not hold", "cannot be tried here"],
        ),
    ],
)
def test_verdicts_on_arnab(measured_ratios: pd.DataFrame, measured_scales: pd.DataFrame, verdicts: list[str]) -> None:
    found = arnab.paper(measured_ratios, measured_scales).claims
    assert [claim.verdict for claim, _ in found] == verdicts


def test_the_worse_of_two_attacks_decides() -> None:
    """A defence that is strong only against attacks that do not know it is none."""
    table = ratios(0.5, 0.5, 0.5)
    assert table.query("defence == 'multiscale' and made == 'without'")["iou_ratio"].eq(0.9).all()
    assert arnab.paper(table, scales(0.2, 0.9)).claims[0][0].verdict == "does not hold"


def test_ratios_come_from_the_summary_of_a_run() -> None:
    summary = pd.DataFrame(
        {
            "model": "m", "defence": ["none", "crf"], "attack": f"pixel-ifgsm-ll:eps={8 / 255}", "images": 3,
            "plain_adversarial_miou": [0.1, 0.3], "transfer_adversarial_miou": [np.nan, 0.2],
            "clean_region_miou": [0.4, 0.5],
        }
    )  # fmt: skip
    found = arnab.iou_ratios(summary)
    assert found["iou_ratio"].tolist() == pytest.approx([0.25, 0.6, 0.4])
    assert found["made"].tolist() == ["through", "through", "without"]
    assert found["attack"].unique().tolist() == ["iterative least likely"]
    assert found["eps"].tolist() == [8.0] * 3


def test_scale_transfer_has_every_pair(tmp_path) -> None:
    from test_baselines import Frames

    model = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    found = arnab.scale_transfer({"tiny": model}, Frames(), scales=(0.5, 1.0), verbose=False)
    assert sorted(zip(found["made_on"], found["tested_on"], strict=True)) == sorted(
        itertools.product(("0.5", "1"), repeat=2)
    )
    assert found["iou_ratio"].between(0, 2).all()
    assert len(random_images(2)) == found["images"].iloc[0]
    arnab.draw(ratios(0.8, 0.7, 0.6), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_yuan_reads_its_tables() -> None:
    table, attacks = measured("ram"), measured("ram-attacks")
    before = [claim.verdict for claim, _ in yuan.paper(table, attacks).claims]
    better = attacks.assign(success=attacks["success"].where(attacks["defence"] == "none", 0.0) + 0.0)
    better.loc[better["defence"] == "none", "success"] = 0.5
    assert yuan.paper(table, better).claims[1][0].verdict == "holds"
    worse = attacks.assign(success=0.3)
    assert yuan.paper(table, worse).claims[1][0].verdict == "does not hold"
    ordered = table.assign(target_miou=table["target_miou"].where(table["model"] != "zoo:camvid-segformer", 0.09))
    assert (before[0], yuan.paper(ordered, attacks).claims[0][0].verdict) == ("holds in part", "holds")


def test_shares() -> None:
    assert [by_share(share) for share in (1.0, 0.9, 0.5, 0.1, 0.0)] == [
        "holds", "holds", "holds in part", "does not hold", "does not hold",
    ]  # fmt: skip


def test_the_command_and_the_page_tell_the_same() -> None:
    from pathlib import Path

    from typer.testing import CliRunner

    from evaluation.cli import app

    found = papers()
    text = CliRunner().invoke(app, ["papers"]).output
    told = json.loads(CliRunner().invoke(app, ["papers", "--json"]).output)
    assert [paper["title"] for paper in told] == [paper.title for paper in found]
    for paper in found:
        for claim, _ in paper.claims:
            assert claim.verdict in text
    page = Path(__file__).parent.parent / "docs" / "papers.md"
    assert CliRunner().invoke(app, ["papers", "--markdown"]).output == as_markdown(found) == page.read_text()
