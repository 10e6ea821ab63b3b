"""Drawn objects: masks against the scene without the object, the context's informativeness against its closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.items import ClassificationData, Item, stack_items
from evaluation.objects import CONTEXTS, OBJECTS, DrawnObjects, context_accuracy, context_information


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_the_mask_is_exactly_what_the_object_changed(size: tuple[int, int]) -> None:
    data = DrawnObjects(0.3, 24, size=size, seed=3)
    for index in range(12):
        item = data[index]
        changed = (item.image != data.without_object(index)).any(dim=0)
        assert torch.equal(changed, item.mask)
        assert 0.02 < item.mask.float().mean() < 0.5


def test_items_have_the_promised_form() -> None:
    data = DrawnObjects(0.5, 12, size=(32, 40))
    assert isinstance(data, ClassificationData)
    item = data[7]
    assert isinstance(item, Item)
    assert item.image.dtype == torch.float32
    assert item.image.shape == (3, 32, 40)
    assert item.image.min() >= 0
    assert item.image.max() <= 1
    assert item.mask.dtype == torch.bool
    assert (item.label, item.name) == (1, "object-0-00007")
    batch = stack_items(data)
    assert batch.images.shape == (12, 3, 32, 40)
    assert batch.labels.bincount().tolist() == [2] * 6
    assert batch.masks.shape == (12, 32, 40)
    assert len(data.classes) == len(data.contexts) == 6


def test_an_item_depends_on_its_number_and_the_seed_alone() -> None:
    one, longer, other = DrawnObjects(0.5, 8), DrawnObjects(0.5, 20), DrawnObjects(0.5, 8, seed=1)
    assert torch.equal(one[5].image, longer[5].image)
    assert torch.equal(one[-1].image, one[7].image)
    assert not torch.equal(one[5].image, other[5].image)
    with pytest.raises(IndexError):
        one[8]


def test_a_larger_informativeness_moves_things_home_and_changes_nothing_else() -> None:
    none, some, all_of_it = (DrawnObjects(kappa, 60, size=(32, 32)) for kappa in (0.0, 0.5, 1.0))
    home = {
        data.informativeness: {index for index in range(60) if data[index].context == index % 6}
        for data in (none, some, all_of_it)
    }
    assert home[0.0] < home[0.5] < home[1.0] == set(range(60))
    for index in range(8):
        a, b = none[index], all_of_it[index]
        assert torch.equal(a.mask, b.mask)  # the same thing in the same place
        if index in home[0.0]:
            assert torch.equal(a.image, b.image)
        else:
            assert not torch.equal(a.image[:, ~a.mask], b.image[:, ~b.mask])


@pytest.mark.parametrize("kappa", [0.0, 0.25, 0.8])
def test_the_best_guess_from_the_context_is_right_as_often_as_the_closed_form_says(kappa: float) -> None:
    number = 6000
    data = DrawnObjects(kappa, number, size=(32, 32), seed=5)
    contexts = np.array([data._context(index) for index in range(number)])
    labels = np.arange(number) % 6
    table = np.zeros((6, 6))
    np.add.at(table, (contexts, labels), 1 / number)
    p = context_accuracy(kappa)
    assert p == pytest.approx(kappa + (1 - kappa) / 6)
    assert table.max(axis=1).sum() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / number) + 0.01)
    outer = table.sum(0, keepdims=True) * table.sum(1, keepdims=True)
    information = (table * np.log2(np.where(table > 0, table, 1) / outer)).sum()
    assert information == pytest.approx(context_information(kappa), abs=0.03)


def test_information_at_both_ends() -> None:
    assert context_information(0) == pytest.approx(0, abs=1e-12)
    assert context_information(1) == pytest.approx(math.log2(6))
    assert context_accuracy(1) == 1


@given(st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_information_grows_with_informativeness(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert context_information(low) <= context_information(high) + 1e-12


def test_colour_alone_tells_no_class() -> None:
    """The things' mean colours: no class is nearer to its own mean than chance allows by much."""
    data = DrawnObjects(0.0, 180, size=(32, 32), seed=9)
    items = [data[index] for index in range(180)]
    colours = torch.stack([item.image[:, item.mask].mean(dim=1) for item in items])
    labels = torch.tensor([item.label for item in items])
    means = torch.stack([colours[:90][labels[:90] == label].mean(dim=0) for label in range(6)])
    right = (torch.cdist(colours[90:], means).argmin(dim=1) == labels[90:]).float().mean()
    assert right < 0.45


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"informativeness": 1.1}, "informativeness=1.1"),
        ({"informativeness": 0.5, "length": 0}, "length=0"),
        ({"informativeness": 0.5, "size": (8, 32)}, r"size=\(8, 32\)"),
        ({"informativeness": 0.5, "seed": -1}, "seed=-1"),
    ],
)
def test_errors_name_the_value(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DrawnObjects(**arguments)


def test_batches_are_of_one_size() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        stack_items(DrawnObjects(0.5, 3), [])
    with pytest.raises(ValueError, match="size="):
        stack_items([DrawnObjects(0, 1, size=(32, 32))[0], DrawnObjects(0, 1, size=(32, 40))[0]])


def test_every_class_and_context_has_a_drawing_of_its_own() -> None:
    data = DrawnObjects(1.0, len(OBJECTS), size=(32, 32), seed=2)
    batch = stack_items(data)
    assert batch.contexts.tolist() == list(range(len(CONTEXTS)))
    differences = (batch.images[:, None] - batch.images).abs().mean(dim=(2, 3, 4))
    assert (differences + torch.eye(6) > 0.02).all()
