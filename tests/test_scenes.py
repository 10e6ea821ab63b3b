"""Drawn street scenes: exact, repeatable, and worth training on."""

from __future__ import annotations

import pytest
import torch

from evaluation.frames import IGNORE_INDEX, SegmentationData
from evaluation.scenes import StreetScenes

SKY, ROAD, CAR = 0, 3, 8


def test_frames_are_what_the_project_promises() -> None:
    scenes = StreetScenes(3)
    assert isinstance(scenes, SegmentationData)
    assert len(scenes) == 3
    for frame in (scenes[i] for i in range(len(scenes))):
        assert frame.image.shape == (3, 96, 128)
        assert frame.image.dtype == torch.float32
        assert 0 <= float(frame.image.min()) < float(frame.image.max()) <= 1
        assert frame.label.shape == (96, 128)
        assert frame.label.dtype == torch.int64
        values = set(frame.label.unique().tolist())
        assert values <= {*range(len(scenes.classes)), IGNORE_INDEX}
    assert len({scenes[i].name for i in range(3)}) == 3


def test_a_scene_depends_on_seed_size_and_index_only() -> None:
    short, long = StreetScenes(2), StreetScenes(50)
    long[7]  # another order of access
    for index in (0, 1):
        assert torch.equal(short[index].image, long[index].image)
        assert torch.equal(short[index].label, long[index].label)
    assert torch.equal(long[-1].image, long[49].image)
    different = (long[1].label, StreetScenes(1, seed=1)[0].label)
    assert not any(torch.equal(short[0].label, label) for label in different)


def test_another_size_has_other_scenes() -> None:
    """A model trained on large scenes has not seen the small ones of the same index."""
    small, large = StreetScenes(20, (48, 64)), StreetScenes(20, (96, 128))
    same, crossed = (
        torch.stack([(small[i].label == large[(i + by) % 20].label[::2, ::2]).float().mean() for i in range(20)])
        for by in (0, 1)
    )
    assert float(same.mean()) == pytest.approx(float(crossed.mean()), abs=0.1)
    assert float(same.max()) < 0.95


def test_every_class_occurs_where_it_belongs() -> None:
    scenes = StreetScenes(60, (72, 96))
    labels = torch.stack([scenes[i].label for i in range(len(scenes))])
    share = torch.stack([(labels == c).flatten(1).any(1).float().mean() for c in range(len(scenes.classes))])
    assert (share > 0.3).all(), dict(zip(scenes.classes, share.tolist(), strict=True))
    assert (labels != IGNORE_INDEX).float().mean() > 0.95
    height = torch.arange(72.0)[None, :, None].expand_as(labels)
    assert height[labels == SKY].mean() < 25 < height[labels == CAR].mean() < height[labels == ROAD].mean()
    assert not (labels[:, 45:] == SKY).any(), "sky under the horizon"


def test_labels_are_exact() -> None:
    """An edge of the label map is an edge of the picture: the picture explains the labels at no shift but zero."""
    scenes = StreetScenes(12)
    scores = []
    for shift in (-2, -1, 0, 1, 2):
        contrast = []
        for index in range(len(scenes)):
            image, label, _ = scenes[index]
            edge = (label[:, 1:] != label[:, :-1]).roll(shift, dims=1)[:, 3:-3]
            step = (image[:, :, 1:] - image[:, :, :-1]).abs().sum(0)[:, 3:-3]
            contrast.append(step[edge].mean())
        scores.append(torch.stack(contrast).mean())
    assert int(torch.stack(scores).argmax()) == 2, scores


def test_colour_alone_does_not_tell_the_class() -> None:
    """The look of a pixel is ambiguous: the best guess from its colour alone is far from right."""
    scenes = StreetScenes(60, (72, 96))
    votes = torch.zeros(512 * 11)
    tests = []
    for index in range(len(scenes)):
        image, label, _ = scenes[index]
        cell = ((image * 7.999).long() * torch.tensor([64, 8, 1])[:, None, None]).sum(0)
        seen = label != IGNORE_INDEX
        if index < 40:
            votes += torch.bincount(cell[seen] * 11 + label[seen], minlength=512 * 11)
        else:
            tests.append((cell[seen], label[seen]))
    best = votes.view(512, 11).argmax(1)
    right = torch.cat([best[cell] == label for cell, label in tests]).float().mean()
    assert 0.3 < right < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 2, "size": (8, 64)}, "at least 32"),
        ({"length": 2, "seed": -1}, "seed=-1"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreetScenes(**arguments)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        StreetScenes(2)[2]
