"""Target maps: Permute and Strip as DAG makes them, and the simpler ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attacks.targets import FixedClass, Permute, Region, Strip, Target, TargetMap, Untargeted

VOID = 255


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Label maps of up to 4 images, some of whose pixels may be void, and the number of classes."""
    classes = draw(st.integers(2, 12))
    count, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(4, 11))
    held = draw(st.integers(1, classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(0, held, (count, height, width), generator=generator)
    void = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return labels.masked_fill(void, VOID), classes


def pairs(labels: Tensor, targets: Tensor) -> dict[int, set[int]]:
    """Which classes each class of one image is sent to."""
    sent: dict[int, set[int]] = {}
    for label, target in zip(labels.flatten().tolist(), targets.flatten().tolist(), strict=True):
        sent.setdefault(label, set()).add(target)
    return sent


@given(label_maps(), st.integers(0, 10))
def test_permute_is_one_to_one_and_leaves_no_class_where_it_was(maps: tuple[Tensor, int], seed: int) -> None:
    labels, classes = maps
    targets = Permute(seed)(labels, nb_classes=classes)
    assert targets.dtype == torch.int64
    assert targets.shape == labels.shape
    for before, after in zip(labels, targets, strict=True):
        sent = pairs(before, after)
        assert sent.pop(VOID, {VOID}) == {VOID}
        assert all(len(to) == 1 for to in sent.values())
        reached = [next(iter(to)) for to in sent.values()]
        assert len(set(reached)) == len(sent)
        assert all(0 <= to < classes and to != label for label, to in zip(sent, reached, strict=True))
        if 2 * len(sent) <= classes:
            assert not set(reached) & set(sent), "enough classes are absent: none that is present may be a target"


def test_permute_draws_every_absent_class_and_every_derangement() -> None:
    labels = torch.tensor([0, 1, 1, 0]).view(1, 2, 2)
    seen = {tuple(Permute(seed)(labels, nb_classes=5)[0, 0].tolist()) for seed in range(200)}
    assert seen == {(a, b) for a in (2, 3, 4) for b in (2, 3, 4) if a != b}
    crowded = torch.arange(4).view(1, 2, 2)
    drawn = [tuple(Permute(seed)(crowded, nb_classes=4).flatten().tolist()) for seed in range(900)]
    assert len(set(drawn)) == 9  # there are 9 derangements of 4
    assert min(drawn.count(table) for table in set(drawn)) > 60  # of 100 expected, uniform


@given(label_maps(), st.integers(1, 4), st.integers(0, 10))
def test_strip_makes_bands_of_equal_width_of_absent_classes(maps: tuple[Tensor, int], bands: int, seed: int) -> None:
    labels, classes = maps
    targets = Strip(bands, seed)(labels, nb_classes=classes)
    assert torch.equal(targets == VOID, labels == VOID)
    for before, after in zip(labels, targets, strict=True):
        present = set(before.unique().tolist()) - {VOID}
        used = set(after.unique().tolist()) - {VOID}
        if len(present) < classes:
            assert not used & present
        columns = [set(after[:, column].tolist()) - {VOID} for column in range(after.shape[1])]
        assert all(len(column) <= 1 for column in columns)
    full = torch.zeros_like(labels)  # one class, nothing void: the bands can be measured
    columns = Strip(bands, seed)(full, nb_classes=13)[0, 0]
    _, widths = torch.unique_consecutive(columns, return_counts=True)
    assert len(widths) == bands, "there are enough absent classes for each band to have its own"
    assert widths.max() - widths.min() <= 1


def test_strip_where_every_class_is_present_draws_from_all_of_them() -> None:
    labels = torch.arange(3).repeat(1, 4, 4)
    seen = {Strip(seed=seed)(labels, nb_classes=3)[0, 0, 0].item() for seed in range(50)}
    assert seen == {0, 1, 2}


@given(label_maps(), st.sampled_from([Permute(3), Strip(seed=3), Region(seed=3)]), st.randoms())
def test_the_target_of_an_image_depends_on_its_stream_and_not_on_its_company(
    maps: tuple[Tensor, int], target: Target, random: object
) -> None:
    labels, classes = maps
    images = tuple(range(7, 7 + len(labels)))
    whole = target(labels, nb_classes=classes, images=images)
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = target(labels[order], nb_classes=classes, images=[images[row] for row in order])
    assert torch.equal(shuffled, whole[order])
    for row, image in enumerate(images):
        assert torch.equal(target(labels[row : row + 1], nb_classes=classes, images=[image]), whole[row : row + 1])


def test_images_and_seeds_have_targets_of_their_own() -> None:
    labels = torch.zeros(1, 4, 8, dtype=torch.int64)
    for make in (Permute, lambda seed: Strip(seed=seed), lambda seed: Region(seed=seed)):
        by_image = {tuple(make(0)(labels, nb_classes=40, images=[i]).flatten().tolist()) for i in range(8)}
        by_seed = {tuple(make(seed)(labels, nb_classes=40).flatten().tolist()) for seed in range(8)}
        assert len(by_image) > 4
        assert len(by_seed) > 4


@given(label_maps(), st.integers(0, 10))
def test_a_region_becomes_one_absent_class_and_nothing_else_counts(maps: tuple[Tensor, int], seed: int) -> None:
    labels, classes = maps
    box = (0.5, 0.0, 1.0, 0.25)
    top, right = round(0.5 * labels.shape[1]), round(0.25 * labels.shape[2])
    targets = Region(box=box, seed=seed)(labels, nb_classes=classes)
    for label, target in zip(labels, targets, strict=True):
        inside, held = target[top:, :right], set(label.unique().tolist()) - {VOID}
        assert torch.equal(inside == VOID, label[top:, :right] == VOID)
        assert (target == VOID).sum() == target.numel() - (inside != VOID).sum(), "void outside"
        drawn = set(inside.unique().tolist()) - {VOID}
        assert len(drawn) <= 1
        assert not drawn & held or len(held) == classes
    named = Region(0, box)(labels, nb_classes=classes)
    assert torch.equal(named, torch.where(targets == VOID, targets, 0))


def test_the_simple_targets() -> None:
    labels = torch.tensor([[[0, 1], [VOID, 2]]])
    assert torch.equal(Untargeted()(labels, nb_classes=3), labels)
    assert not Untargeted().targeted
    assert FixedClass(1)(labels, nb_classes=3).tolist() == [[[1, 1], [VOID, 1]]]
    own = np.array([[2, VOID], [1, 0]])
    assert TargetMap(own)(labels, nb_classes=3).tolist() == [[[2, VOID], [VOID, 0]]]
    assert TargetMap(torch.tensor(own)[None])(labels, nb_classes=3).tolist() == [[[2, VOID], [VOID, 0]]]
    assert all(target.targeted for target in (Permute(), Strip(), FixedClass(0), TargetMap(own)))


@pytest.mark.parametrize(
    "target",
    [
        *(Permute(), Strip(bands=2), Untargeted(), FixedClass(0), Region(), Region(1)),
        TargetMap(np.zeros((2, 2), dtype=np.int64)),
    ],
    ids=lambda target: type(target).__name__,
)
def test_labels_are_checked_and_stay_as_they_are(target: Target) -> None:
    labels = torch.tensor([[[0, 1], [VOID, 3]]])
    before = labels.clone()
    target(labels, nb_classes=4)
    assert torch.equal(labels, before)
    with pytest.raises(ValueError, match="Label 3 is neither a class, 0 to 2, nor"):
        target(labels, nb_classes=3)
    with pytest.raises(ValueError, match="Label 255"):
        target(labels, nb_classes=4, ignore_index=-1)
    with pytest.raises(ValueError, match="int64"):
        target(labels.float(), nb_classes=4)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        target(labels[0], nb_classes=4)
    with pytest.raises(ValueError, match="at least 2"):
        target(labels, nb_classes=1)


def test_errors() -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="classes are 0 to 3"):
        FixedClass(4)(labels, nb_classes=4)
    with pytest.raises(ValueError, match="classes are 0 to 3"):
        Region(4)(labels, nb_classes=4)
    with pytest.raises(ValueError, match="fractions of the image in that order"):
        Region(box=(0.5, 0.0, 0.2, 1.0))
    with pytest.raises(ValueError, match="3 stream numbers for 2 images"):
        Permute()(labels, nb_classes=4, images=[0, 1, 2])
    with pytest.raises(ValueError, match="at least 1"):
        Strip(bands=0)
    with pytest.raises(ValueError, match="cannot hold 5 bands"):
        Strip(bands=5)(labels, nb_classes=9)
    with pytest.raises(ValueError, match="target map has shape"):
        TargetMap(np.zeros((3, 4), dtype=np.int64))(labels, nb_classes=4)
    with pytest.raises(ValueError, match="Label 7"):
        TargetMap(np.full((4, 4), 7))(labels, nb_classes=4)
