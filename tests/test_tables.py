"""A summary as a person reads it: which way round, and what is averaged."""

from __future__ import annotations

import io
import math

import pandas as pd
import pytest

from evaluation.results import VARIANTS
from evaluation.tables import as_markdown, means, on_screen, percent, uncertain_rows

NAN = math.nan


def summary(*rows: tuple[str, str, str, float, bool]) -> pd.DataFrame:
    """Rows of (model, attack, defence, success, targeted), the other figures filled in."""
    before = {(model, attack): success for model, attack, defence, success, _ in rows if defence == "none"}
    table = []
    for model, attack, defence, success, targeted in rows:
        row = {"model": model, "attack": attack, "defence": defence, "images": 2, "note": "", "success": success}
        row |= {"success_drop": before[model, attack] - success, "target_miou": 0.1 if targeted else NAN}
        row |= {"clean_miou": 0.5, "clean_success": 0.01, "adversarial_miou": 0.25}
        row |= {
            f"{variant}_success": NAN if defence == "none" and variant != "plain" else success for variant in VARIANTS
        }
        table.append(row | {"steps": 7.0, "forwards": 8.0, "backwards": 7.0, "seconds": 1.25})
    return pd.DataFrame(table)


def on_paper(frame: pd.DataFrame) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=80).print(on_screen(frame, ["a note"], counted="All pixels count."))
    return file.getvalue()


MANY = summary(
    *(("vit", attack, "none", success, True) for attack, success in (("strip", 0.4), ("apgd", 0.6), ("dag", 0.2))),
    *(("vit", attack, "ram", success, True) for attack, success in (("strip", 0.1), ("apgd", 0.3), ("dag", 0.05))),
    ("vit", "pixel-pgd", "none", 1.0, True),
    ("vit", "pixel-pgd", "ram", 0.9, True),
    ("vit", "untargeted", "none", 0.8, False),
    ("vit", "untargeted", "ram", 0.7, False),
)


def test_many_attacks_go_down_the_side_with_their_mean() -> None:
    text = on_paper(MANY)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert text.count("model: vit") == 1
    assert "clean mIoU: none 50.0, ram 50.0" in text
    assert "a note" in text
    none, ram = (line.split() for line in text.split("mean of 3")[1].splitlines()[:2])
    assert none[:3] == ["none", "1.0", "40.0"], "the pixel-wise one and the one without a target are not among them"
    assert ram[:6] == ["ram", "1.0", "15.0", "15.0", "15.0", "15.0"]
    assert "25.0" in ram, "what the defence gains, on the mean"
    assert {"8", "1.2"} <= set(none), "passes and seconds"
    assert "mean of 1" not in text, "one attack has no mean"


def test_a_few_attacks_have_a_table_each() -> None:
    frame = MANY[MANY["attack"].isin(["strip", "apgd"])]
    text = on_paper(frame)
    assert "attack: strip (7 steps, 8 forwards, 7 backwards, 1.2 s an image)" in text
    assert "mean of" not in text
    assert as_markdown(frame).startswith("| attack | model | defence | clean miou |")


def test_three_models_under_three_attacks_are_no_reason_to_turn() -> None:
    frame = pd.concat([MANY.assign(model=name) for name in ("a", "b", "c", "d", "e")])
    assert "attack: strip" in on_paper(frame)


def test_markdown_of_many_attacks() -> None:
    text = as_markdown(MANY)
    lines = text.splitlines()
    assert lines[0] == "**vit** (clean mIoU: none 50.0, ram 50.0)"
    assert "| mean of 3 | ram | 1.0 | 15.0 | 15.0 | 15.0 | 15.0 | 25.0 | 7 | 8 | 7 | 1.2 |" in lines
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_a_mean_is_over_the_same_attacks_under_every_defence() -> None:
    rows = MANY[MANY["attack"].isin(["strip", "apgd", "dag"])].to_dict("records")
    extra = [dict(rows[0], attack="attention-fool", success=0.9), dict(rows[3], attack="attention-fool", success=NAN)]
    extra[1]["note"] = "no attention"
    unfinished = [dict(rows[0], attack="attention-fool", success=0.9)]
    inapplicable = [dict(row, defence="crf", success=NAN, note="no attention") for row in rows[:3]]
    for of_all in (means(rows), means(rows + extra), means(rows + unfinished), means(rows + inapplicable)):
        assert [(row["attack"], row["defence"]) for row in of_all] == [("mean of 3", "none"), ("mean of 3", "ram")]
        assert [row["success"] for row in of_all] == pytest.approx([0.4, 0.15])
    assert means(rows[:2]) == [], "two are too few"
    assert means([]) == []


def test_percent() -> None:
    assert [percent(value) for value in (0.1234, 1.0, NAN, None)] == ["12.3", "100.0", "—", "—"]


def test_a_defence_that_does_not_apply_is_said_once() -> None:
    rows = MANY.to_dict("records")
    frame = pd.DataFrame([dict(row, note="no attention") if row["defence"] == "ram" else row for row in rows])
    assert as_markdown(frame).splitlines()[0] == "**vit** (clean mIoU: none 50.0, ram n/a)"
    for text in (as_markdown(frame), on_paper(frame)):
        assert text.count("ram") == 1
        assert text.count("mean of 3") == 1


def test_an_attack_that_does_not_apply_stands_among_its_like() -> None:
    other = [
        dict(row, model="cnn", success=NAN, target_miou=NAN, note="no attention") if row["attack"] == "dag" else
        dict(row, model="cnn")
        for row in MANY.to_dict("records")
    ]  # fmt: skip
    text = as_markdown(pd.concat([MANY, pd.DataFrame(other)])).split("**cnn**")[1]
    attacks = [line.split("|")[1].strip() for line in text.splitlines()[4:]]
    assert attacks[:6] == ["strip", "apgd", "dag", "strip", "apgd", "dag"]


def test_a_gain_is_a_difference_the_other_way_round() -> None:
    cell = {"model": "vit", "attack": "strip", "defence": "ram"}
    defended = cell | {"success": 0.1, "success_low": 0.05, "success_high": 0.2}
    plain = cell | {"defence": "none", "success": 0.4, "success_low": 0.3, "success_high": NAN}
    difference = cell | {"difference": -0.3, "low": -0.35, "high": -0.2, "p_holm": 0.0123}
    differences = [difference | {"figure": "clean_miou", "difference": 0.9}, difference | {"figure": "success"}]
    assert uncertain_rows(pd.DataFrame([plain, defended]), pd.DataFrame(differences)) == [
        ("vit", "strip", "none", "40.0", "30.0–—", "", "", ""),
        ("vit", "strip", "ram", "10.0", "5.0–20.0", "30.0", "20.0–35.0", "0.012"),
    ]
