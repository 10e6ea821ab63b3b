"""Intervals, differences, seeds, ensembles and classes of results whose numbers are known."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import JaccardIndex

from evaluation import metrics
from evaluation.resampling import bootstrap, holm
from evaluation.results import VARIANTS, Record, Results, Skipped
from evaluation.statistics import (
    FIGURES,
    class_table,
    intervals,
    paired_differences,
    seed_spread,
    worst_over_attacks,
)

CLASSES = ("road", "house", "tree", "sky")
SIZE = (12, 10)


@dataclass(frozen=True, eq=False, kw_only=True)
class Seeded(Record):
    """A record that says with which seed its attack was run."""

    seed: int = 0


def scene(image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, prediction without attack and a target map, always the same for an image; the sky is in few of them."""
    rng = np.random.default_rng([7, image])
    labels = rng.choice(4 if image % 3 == 0 else 3, size=SIZE)
    clean = np.where(rng.random(SIZE) < 0.8, labels, rng.integers(0, 4, SIZE))
    return labels, clean, (labels + 1) % 4


def record(
    image: int,
    share: float,
    *,
    attack: str = "a",
    defence: str = "none",
    variant: str = "plain",
    seed: int = 0,
    model: str = "m",
    target: np.ndarray | None = None,
    targeted: bool = True,
    counted: np.ndarray | None = None,
) -> Seeded:
    """A record of an attack that brings that share of the pixels, the same ones for the same numbers, onto target."""
    labels, clean, aim = scene(image)
    aim = aim if target is None else target
    rng = np.random.default_rng([11, image, seed])
    attacked = np.where(rng.random(SIZE) < share, aim, clean)
    use = np.ones(SIZE, dtype=bool) if counted is None else counted

    def counts(reference: np.ndarray, prediction: np.ndarray, pixels: np.ndarray = use) -> np.ndarray:
        return metrics.confusion(reference[None], prediction[None], pixels[None], nb_classes=4)[0]

    return Seeded(
        model=model, attack=attack, defence=defence, variant=variant, image=image, name=f"{image}.png", seed=seed,
        clean=counts(labels, clean), whole=counts(labels, clean, np.ones(SIZE, dtype=bool)),
        adversarial=counts(labels, attacked), changed=counts(clean, attacked),
        aim=counts(aim, attacked) if targeted else None, aim_clean=counts(aim, clean) if targeted else None,
    )  # fmt: skip


def results(*records: Record, **options: Any) -> Results:
    return Results(list(records), CLASSES, **options)


def run(images: Sequence[int] = range(8), seed: int = 0) -> list[Seeded]:
    """Two attacks (the second one has no target), two defences and three variants, shares drawn at random."""
    rng = np.random.default_rng(seed)
    found = []
    for attack, targeted in (("a", True), ("b", False)):
        for defence, variants in (("none", ("plain",)), ("ram", VARIANTS)):
            for variant in variants:
                for image in images:
                    share = rng.random() * (0.9 if defence == "none" else 0.4)
                    found.append(
                        record(image, share, attack=attack, defence=defence, variant=variant, targeted=targeted)
                    )
    return found


def rows(frame: pd.DataFrame, *columns: str) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame[list(columns) or frame.columns].to_dict("records")]


# ---------------------------------------------------------------------------------------------------------- intervals


def test_every_figure_of_the_summary_has_an_interval_around_it() -> None:
    found = results(*run(), skipped=[Skipped("m", "crf", "no attention")])
    frame, summary = intervals(found, resamples=200), found.summary()
    measured = summary[summary["note"] == ""].reset_index(drop=True)
    of_counts = [
        name for name in summary.columns
        if name not in ("model", "attack", "defence", "images", "note", "failed_checks", "seeds", "success_seed_std")
        and name not in ("steps", "forwards", "backwards", "seconds")
    ]  # fmt: skip
    assert {name for name in frame.columns if not name.endswith(("_low", "_high"))} == {
        "model", "attack", "defence", "images", *of_counts,
    }  # fmt: skip
    for name in ("model", "attack", "defence", "images"):
        assert frame[name].tolist() == measured[name].tolist()
    for name in of_counts:
        np.testing.assert_allclose(frame[name], measured[name], rtol=1e-12, err_msg=name)
        low, value, high = (frame[name + end].to_numpy() for end in ("_low", "", "_high"))
        np.testing.assert_array_equal(np.isnan(low), np.isnan(value), err_msg=name)
        assert (np.isnan(value) | ((low <= value) & (value <= high))).all(), name
        if not name.startswith(("success_drop", "adaptive", "transfer")):
            assert (np.isnan(value) | (low < high)).all(), name
    drop = frame["defence"] == "none"
    assert (frame.loc[drop, ["success_drop", "success_drop_low", "success_drop_high"]] == 0).all(axis=None)


def test_an_interval_is_that_of_the_ratio_of_sums_over_images() -> None:
    """From the pixels of the worst variants, computed apart from the module: hits and totals, both seeds together."""
    records = [
        record(image, share, defence="ram", variant=variant, seed=seed)
        for image in range(6)
        for seed in (0, 1)
        for variant, share in (("plain", 0.1 * image), ("adaptive", 0.3 + 0.1 * seed))
    ]
    (row,) = rows(intervals(records, resamples=500, seed=3))
    hits_totals = []
    for image in range(6):
        best = [
            max((r for r in records if (r.image, r.seed) == (image, seed)), key=lambda r: r.success) for seed in (0, 1)
        ]
        hits_totals.append([sum(np.trace(r.aim) for r in best), sum(r.aim.sum() for r in best)])  # type: ignore[union-attr,arg-type]
    expected = bootstrap(hits_totals, lambda s: s[:, :1] / s[:, 1:], resamples=500, seed=3)
    np.testing.assert_allclose([row["success"], row["success_low"], row["success_high"]], np.ravel(expected))
    assert row["images"] == 6, "all seeds of an image are drawn together"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=3, deadline=None)
def test_the_order_of_records_and_the_other_cells_do_not_matter(seed: int) -> None:
    records = run(range(3))
    shuffled = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
    frame, again = (intervals(r, resamples=50).sort_values(["attack", "defence"]) for r in (records, shuffled))
    pd.testing.assert_frame_equal(frame.reset_index(drop=True), again.reset_index(drop=True))
    alone = intervals([r for r in records if r.attack == "b"], resamples=50)
    pd.testing.assert_frame_equal(frame[frame["attack"] == "b"].reset_index(drop=True), alone)


def test_one_image_has_figures_and_no_intervals() -> None:
    frame = intervals(run(range(1)))
    ends = [name for name in frame.columns if name.endswith(("_low", "_high"))]
    assert frame[ends].isna().all(axis=None)
    assert frame["success"].notna().all()
    assert intervals([]).empty


def test_a_drop_between_different_images_has_no_interval() -> None:
    records = [record(i, 0.9) for i in range(5)] + [record(i, 0.2, defence="ram") for i in range(4)]
    found = results(*records)
    ram = rows(intervals(found))[1]
    assert ram["success_drop"] == pytest.approx(found.summary()["success_drop"][1])
    assert np.isnan([ram["success_drop_low"], ram["success_drop_high"]]).all()
    no_baseline = rows(intervals(records[5:]))[0]
    assert np.isnan(no_baseline["success_drop"])


def test_intervals_are_fast() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 1000, (50, 6, 3, 11))
    start = time.process_time()
    bootstrap(counts, lambda s: metrics.mean_ious(s), resamples=2000)
    assert time.process_time() - start < 1


# -------------------------------------------------------------------------------------------------------- differences


def test_paired_differences_by_hand() -> None:
    """Three images, fooled wholly without the defence and not at all with it: p is 2 / 2³; three rows correct it."""
    records = []
    for image in range(3):
        fooled, safe = record(image, 1.0), record(image, 0.0, defence="ram")
        assert fooled.aim is not None
        assert np.trace(fooled.aim) == SIZE[0] * SIZE[1]
        records += [fooled, safe]
    frame = paired_differences(results(*records), resamples=100)
    assert rows(frame, "model", "attack", "defence", "figure") == [
        {"model": "m", "attack": "a", "defence": "ram", "figure": "success"},
        {"model": "m", "attack": "a", "defence": "ram", "figure": "adversarial_miou"},
        {"model": "m", "attack": "", "defence": "ram", "figure": "clean_miou"},
    ]
    success, adversarial, clean = rows(frame)
    chance = sum(np.trace(r.aim_clean) for r in records[1::2]) / sum(r.aim_clean.sum() for r in records[1::2])
    assert (success["baseline"], success["value"]) == (1, pytest.approx(chance))
    assert success["difference"] == pytest.approx(chance - 1)
    assert success["low"] <= success["difference"] <= success["high"] < 0
    assert success["p"] == adversarial["p"] == 2 / 8
    assert clean["difference"] == clean["low"] == clean["high"] == 0
    assert clean["p"] == 1
    assert frame["p_holm"].tolist() == [0.75, 0.75, 1.0]


def test_differences_are_those_of_the_summary_and_corrected_over_all_rows() -> None:
    found = results(*run(), *(dataclasses.replace(r, defence="crf") for r in run(seed=5) if r.defence == "ram"))
    frame, summary = paired_differences(found, resamples=50, permutations=99), found.summary()
    assert len(frame) == 2 * 2 * 2 + 2, "attacks × defences × two figures, and the clean mIoU of each defence"
    for row in rows(frame):
        at = summary[summary["attack"] == (row["attack"] or "a")].set_index("defence")[row["figure"]]
        assert row["difference"] == pytest.approx(at[row["defence"]] - at["none"])
        assert row["low"] <= row["difference"] <= row["high"]
    np.testing.assert_array_equal(frame["p_holm"], holm(frame["p"]))
    assert frame["p_holm"].max() <= 1
    one = paired_differences(found, figures=["success"], resamples=50, permutations=99)
    assert len(one) == 4
    assert (one["p_holm"] <= frame[frame["figure"] == "success"]["p_holm"].to_numpy()).all()
    other_way = paired_differences(found, "ram", figures=["success"], resamples=50, permutations=999)
    back = other_way[other_way["defence"] == "none"]
    there = paired_differences(found, figures=["success"], resamples=50, permutations=999)
    there = there[there["defence"] == "ram"]
    np.testing.assert_allclose(back["difference"], -there["difference"].to_numpy())
    np.testing.assert_allclose(back["p"], there["p"].to_numpy())


def test_a_paired_interval_is_narrower_than_two_apart() -> None:
    """Images differ much and the defence takes a little off each: only the pairs show it."""
    share = np.linspace(0.1, 0.95, 10)
    records = [record(i, s) for i, s in enumerate(share)]
    records += [record(i, s - 0.08, defence="ram") for i, s in enumerate(share)]
    difference = rows(paired_differences(records, figures=["success"]))[0]
    none, ram = rows(intervals(records))
    assert none["success_low"] < ram["success_high"], "apart, the two intervals overlap"
    assert difference["high"] < 0
    assert difference["p"] == 2 / 2**10
    assert ram["success_drop_low"] == pytest.approx(-difference["high"])
    assert ram["success_drop_high"] == pytest.approx(-difference["low"])


def test_differences_are_on_images_and_seeds_that_both_have() -> None:
    records = [record(i, 0.9, seed=s) for i in range(5) for s in (0, 1)]
    records += [record(i, 0.3, seed=s, defence="ram") for i in range(1, 6) for s in (1, 2)]
    common = [r for r in records if r.image in range(1, 5) and r.seed == 1]
    found, expected = (paired_differences(r, resamples=50) for r in (records, common))
    pd.testing.assert_frame_equal(found, expected)
    assert set(found["images"]) == {4}


def test_refusals_of_differences() -> None:
    with pytest.raises(ValueError, match=r"baseline='crf'.*one of none, ram"):
        paired_differences(run(range(2)), "crf")
    with pytest.raises(ValueError, match=r"figures=\['steps'\]"):
        paired_differences(run(range(2)), figures=["success", "steps"])
    assert paired_differences([]).empty
    assert set(FIGURES) < set(intervals([]).columns)


# -------------------------------------------------------------------------------------------------------------- seeds


def test_spread_over_seeds_by_hand() -> None:
    share = {0: 0.2, 1: 0.5, 2: 0.9}
    records = [
        record(image, s / (1 + (variant == "plain")), seed=seed, defence="ram", variant=variant)
        for image in range(3)
        for seed, s in share.items()
        for variant in ("plain", "adaptive")
    ]
    records.append(record(3, 1.0, seed=0, defence="ram", variant="adaptive"))
    records.append(record(3, 1.0, seed=0, defence="ram", variant="plain"))
    (row,) = rows(seed_spread(records))
    rates = []
    for seed in share:
        best = [r for r in records if r.seed == seed and r.image < 3 and r.variant == "adaptive"]
        rates.append(metrics.success_rate(metrics.merge([r.aim for r in best])))  # type: ignore[misc]
    mean = sum(rates) / 3
    assert (row["seeds"], row["images"]) == (3, 3), "the fourth image has one seed alone"
    assert row["success_mean"] == pytest.approx(mean)
    assert row["success_std"] == pytest.approx((sum((r - mean) ** 2 for r in rates) / 2) ** 0.5)
    assert (row["success_min"], row["success_max"]) == (pytest.approx(min(rates)), pytest.approx(max(rates)))


def test_one_seed_has_no_spread() -> None:
    found = results(*run())
    frame = seed_spread(found)
    assert frame["success_std"].isna().all()
    for name in ("mean", "min", "max"):
        np.testing.assert_allclose(frame[f"success_{name}"], found.summary()["success"])


# ---------------------------------------------------------------------------------------------------------- ensembles


def test_the_worst_attack_counts_for_each_image_before_averaging() -> None:
    """Each attack fools every other image: each alone half of them, both together all."""
    records = [
        record(image, 1.0 if image % 2 == turn else 0.0, attack=attack, defence=defence)
        for attack, turn in (("a", 0), ("b", 1))
        for defence in ("none", "ram")
        for image in range(6)
    ]
    records = [r for r in records if r.defence == "none"] + [r for r in records if r.defence == "ram"][::-1]
    together = worst_over_attacks(results(*records))
    assert {r.attack for r in together.records} == {"worst of a, b"}
    assert together.summary()["success"].tolist() == [1.0, 1.0]
    assert results(*records).summary()["success"].max() < 0.7
    assert (paired_differences(together, figures=["success"])["difference"] == 0).all(), "defences keep their pairs"
    assert len(intervals(together)) == 2
    inapplicable = [Skipped("m", "crf", "no attention"), Skipped("m", "none", "no attention", attack="c")]
    noted = worst_over_attacks(results(*records, skipped=inapplicable)).summary()
    assert rows(noted, "attack", "defence")[2:] == [{"attack": "worst of a, b", "defence": "crf"}]
    for r in together.records:
        assert r.to_json(), "can be written as any other record"
        assert r.steps is None


def test_attacks_with_other_aims_are_not_mixed() -> None:
    elsewhere = np.ones(SIZE, dtype=bool)
    elsewhere[:3, :3] = False
    others: dict[str, dict[str, Any]] = {
        "other-target": {"target": np.zeros(SIZE, dtype=np.int64)},
        "no-target": {"targeted": False},
        "other-patch": {"counted": elsewhere},
        "l2": {},  # of the catalogue, and no patch
    }
    from attacks.catalogue import attacks

    pixelwise = next(name for name, entry in attacks().items() if entry.threat == "pixel")
    others[pixelwise] = others.pop("l2")
    records = [record(i, 0.5, attack="a") for i in range(4)]
    for name, options in others.items():
        assert worst_over_attacks(records + [record(i, 0.9, attack=name, **options) for i in range(4)]).records == []
    # as many pixels of a single target class, but not the same pixels
    corners = [np.ones(SIZE, dtype=bool), np.ones(SIZE, dtype=bool)]
    corners[0][:3, :3] = corners[1][-3:, -3:] = False
    house = np.ones(SIZE, dtype=np.int64)
    moved = [record(i, 0.5, attack=f"{k}", target=house, counted=c) for i in range(4) for k, c in enumerate(corners)]
    assert worst_over_attacks(moved).records == []
    fewer = [record(i, 0.9, attack="unfinished") for i in range(3)]
    assert worst_over_attacks(records + fewer).records == []
    shifted = [dataclasses.replace(r, attack="shifted", image=r.image + 1) for r in records]
    assert worst_over_attacks(records + shifted).records == []
    # the one that differs in a single image does not fit in, and keeps nobody else from it
    odd = [record(i, 0.9, attack="odd", **(others["other-target"] if i == 2 else {})) for i in range(4)]
    twin = [record(i, 0.8, attack="twin", variant=v) for i in range(4) for v in ("plain", "transfer")]
    assert {r.attack for r in worst_over_attacks(records + odd + twin).records} == {"worst of a, twin"}
    blind = [record(i, 0.8, attack=name, targeted=False) for i in range(4) for name in ("x", "y")]
    assert {r.attack for r in worst_over_attacks(records + blind).records} == {"worst of x, y"}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_an_ensemble_is_no_weaker_than_its_members_on_any_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = [
        record(i, rng.random(), attack=attack, variant=variant, seed=s, defence="ram")
        for attack in ("a", "b", "c")
        for variant in VARIANTS
        for i in range(3)
        for s in (0, 1)
    ]
    together = worst_over_attacks(records).records
    assert len(together) == 6, "one for each image and seed"
    assert results(*together).summary()["images"].tolist() == [3], "whichever variants they were"
    for r in together:
        assert isinstance(r, Seeded)
        assert r.success == max(m.success for m in records if (m.image, m.seed) == (r.image, r.seed))


# ------------------------------------------------------------------------------------------------------------ classes


def test_classes_agree_with_torchmetrics_and_average_to_the_summary() -> None:
    shares = (0.2, 0.6, 0.4, 0.9, 0.1)
    counted = np.ones(SIZE, dtype=bool)
    counted[:4, :4] = False
    records = [record(i, share, counted=counted) for i, share in enumerate(shares)]
    frame, (summary,) = class_table(results(*records), resamples=100), rows(results(*records).summary())
    assert frame["class"].tolist() == list(CLASSES)
    pictures = [scene(i) for i in range(len(shares))]
    rng = [np.random.default_rng([11, i, 0]) for i in range(len(shares))]
    attacked = [
        np.where(r.random(SIZE) < share, aim, clean)
        for r, share, (_, clean, aim) in zip(rng, shares, pictures, strict=True)
    ]
    labels, clean, aim = (torch.from_numpy(np.stack(part)) for part in zip(*pictures, strict=True))
    jaccard = JaccardIndex(task="multiclass", num_classes=4, average="none", ignore_index=255)
    beside, aim = (torch.where(torch.from_numpy(counted), part, 255) for part in (labels, aim))
    for name, reference, prediction in (
        ("clean_iou", labels, clean),
        ("clean_region_iou", beside, clean),
        ("adversarial_iou", beside, torch.from_numpy(np.stack(attacked))),
        ("target_iou", aim, torch.from_numpy(np.stack(attacked))),
    ):
        np.testing.assert_allclose(frame[name], jaccard(prediction, reference).numpy(), rtol=1e-6)
        assert frame[name].mean() == pytest.approx(summary[name.replace("iou", "miou")])
        assert ((frame[f"{name}_low"] <= frame[name]) & (frame[name] <= frame[f"{name}_high"])).all()
    assert frame["images"].tolist() == [5, 5, 5, 2], "the sky is in the images 0 and 3"
    assert frame["pixels"].tolist() == torch.bincount(beside.flatten())[:4].tolist()


def test_a_class_of_one_image_has_no_interval_and_one_of_none_no_iou() -> None:
    records = [record(i, 0.3, targeted=False) for i in range(3)]

    def without(counts: np.ndarray, classes: Sequence[int]) -> np.ndarray:
        left = counts.copy()
        left[list(classes)] = left[:, list(classes)] = 0
        return left

    parts = ("clean", "whole", "adversarial", "changed")
    cut = [
        dataclasses.replace(r, **{p: without(getattr(r, p), [2] if r.image == 0 else [2, 3]) for p in parts})
        for r in records
    ]
    frame = class_table(cut, resamples=50)
    assert frame["class"].tolist() == ["0", "1", "2", "3"], "records alone have no names"
    assert frame["adversarial_iou"].isna().tolist() == [False, False, True, False]
    assert frame["adversarial_iou_low"].isna().tolist() == [False, False, True, True]
    assert frame["target_iou"].isna().all()
    assert class_table([]).empty


# --------------------------------------------------------------------------------------------- figures of many sums


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_figures_of_many_sums_are_those_of_each(seed: int, sums: int, targeted: bool) -> None:
    rng = np.random.default_rng(seed)
    names = ["clean", "whole", "adversarial", "changed", *(["aim", "aim_clean"] if targeted else [])]
    counts = {name: rng.integers(0, 4, (sums, 3, 3)) * (rng.random((sums, 3, 3)) < 0.3) for name in names}
    found = metrics.figures({name: metrics.margins(c) for name, c in counts.items()})
    for k in range(sums):
        one = {name: c[k] for name, c in counts.items()}
        clean, adversarial = one["clean"], one["adversarial"]
        expected = {
            "success": metrics.success_rate(one["aim"]) if targeted else metrics.error_rate(adversarial),
            "clean_success": metrics.success_rate(one["aim_clean"]) if targeted else metrics.error_rate(clean),
            "target_miou": metrics.target_miou(one["aim"]) if targeted else math.nan,
            "adversarial_miou": metrics.mean_iou(adversarial),
            "pixel_accuracy": metrics.pixel_accuracy(adversarial),
            "iou_ratio": metrics.iou_ratio(adversarial, clean),
            "changed": metrics.changed_share(one["changed"]),
            "clean_miou": metrics.mean_iou(one["whole"]),
            "clean_region_miou": metrics.mean_iou(clean),
            "clean_pixel_accuracy": metrics.pixel_accuracy(clean),
        }
        nothing = {"aim": None, "aim_clean": None}
        row = rows(results(Record("m", "a", "none", "plain", 0, "0", **{**nothing, **one})).rows)[0]
        for name, values in found.items():
            assert values[k] == pytest.approx(row[name], nan_ok=True), name
            assert values[k] == pytest.approx(expected[name], nan_ok=True), name
        assert set(found) == set(FIGURES) == set(expected) <= set(row)


def test_margins_of_sums_are_sums_of_margins() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (5, 4, 4))
    np.testing.assert_array_equal(metrics.margins(counts).sum(axis=0), metrics.margins(metrics.merge(counts)))
    assert metrics.margins([[4, 1, 0], [3, 2, 0], [0, 0, 0]]).tolist() == [[4, 2, 0], [5, 5, 0], [7, 3, 0]]


def test_rows_come_in_the_order_of_the_summary() -> None:
    records = [record(i, 0.5, model=m, attack=a) for m in ("m", "n") for a in ("a", "b") for i in range(2)]
    found = results(*records)
    cells = rows(found.summary(), "model", "attack")
    assert cells[1] == {"model": "n", "attack": "a"}, "not the order of the records"
    for frame in (intervals(found, resamples=20), seed_spread(found), class_table(found, resamples=20)[::4]):
        assert rows(frame, "model", "attack") == cells


def test_frames_can_be_written() -> None:
    found = results(*run(range(3)))
    for frame in (intervals(found), paired_differences(found), seed_spread(found), class_table(found)):
        assert len(json.loads(frame.to_json(orient="records"))) == len(frame)
        assert frame.to_csv(index=False).count("\n") == len(frame) + 1
