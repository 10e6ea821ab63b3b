"""Data: what is read is what the files say, and what is wrong with a file is said with its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.datasets import TorchvisionData, default_colors, load_data, stack


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind / "test").mkdir(parents=True)
    for name in ("b", "a"):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(tmp_path / f"images/test/{name}.png")
        Image.fromarray(rng.integers(0, 12, (6, 8), dtype=np.uint8)).save(tmp_path / f"labels/test/{name}.png")
    return tmp_path


def test_camvid_layout(folder) -> None:
    data = load_data(f"camvid:{folder}:test")
    images, labels, names = stack(data, range(2))
    assert names == ["a", "b"]
    raw = np.asarray(Image.open(folder / "images/test/a.png"))
    index = np.asarray(Image.open(folder / "labels/test/a.png")).astype(np.int64)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    np.testing.assert_allclose(images[0].permute(1, 2, 0) * 255, raw, atol=1e-4)
    np.testing.assert_array_equal(labels[0], np.where(index == 11, 255, index))
    assert load_data(f"camvid:{folder}").files == data.files  # test is the default split


def test_resizing_keeps_labels_labels(folder) -> None:
    frame = load_data(f"camvid:{folder}:test", size=(12, 16))[0]
    assert frame.image.shape == (3, 12, 16)
    assert set(frame.label.unique().tolist()) <= {*range(11), 255}


def test_folder_with_its_own_classes(folder) -> None:
    (folder / "classes.txt").write_text("\n".join(f"class {i}" for i in range(12)))
    data = load_data(f"folder:{folder}:test")
    assert len(data.classes) == len(data.colors) == 12
    assert (data[0].label <= 11).all()


def test_torchvision_data_maps_raw_labels() -> None:
    image = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
    label = Image.fromarray(np.array([[7, 8, 0], [255, 8, 7]], np.uint8))
    data = TorchvisionData([(image, label)], classes=("road", "sidewalk"), mapping={7: 0, 8: 1, -1: 0})
    assert data[0].label.tolist() == [[0, 1, 255], [255, 1, 0]]
    with pytest.raises(IndexError):
        data[1]


def test_voc_and_cityscapes_through_torchvision(tmp_path) -> None:
    voc = tmp_path / "VOCdevkit/VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / part).mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("x\n")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(voc / "JPEGImages/x.jpg")
    Image.fromarray(np.full((4, 5), 20, np.uint8)).save(voc / "SegmentationClass/x.png")
    data = load_data(f"voc:{tmp_path}")
    assert len(data.classes) == 21
    assert data[0].label.unique().tolist() == [20]

    city = tmp_path / "city"
    for part in ("leftImg8bit/val/bonn", "gtFine/val/bonn"):
        (city / part).mkdir(parents=True)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(city / "leftImg8bit/val/bonn/bonn_1_1_leftImg8bit.png")
    Image.fromarray(np.array([[7] * 5, [0] * 5, [33] * 5, [26] * 5], np.uint8)).save(
        city / "gtFine/val/bonn/bonn_1_1_gtFine_labelIds.png"
    )
    data = load_data(f"cityscapes:{city}")
    assert len(data.classes) == 19
    assert [row[0] for row in data[0].label.tolist()] == [0, 255, 18, 13]  # road, void, bicycle, car


def test_what_is_wrong_is_said_with_the_files_name(folder) -> None:
    Image.fromarray(np.full((6, 8), 200, np.uint8)).save(folder / "labels/test/a.png")
    with pytest.raises(ValueError, match=r"a\.png.*200.*0–10"):
        load_data(f"camvid:{folder}:test")[0]
    Image.fromarray(np.zeros((5, 8), np.uint8)).save(folder / "labels/test/a.png")
    with pytest.raises(ValueError, match=r"a\.png.*8×5.*8×6"):
        load_data(f"camvid:{folder}:test")[0]
    (folder / "labels/test/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        load_data(f"camvid:{folder}:test")
    for wrong in ("camvid", "nothing:here", "scenes:many", "scenes:1:2:3"):
        with pytest.raises(ValueError, match=wrong.partition(":")[0]):
            load_data(wrong)


@pytest.mark.parametrize("count", [3, 20, 150])
def test_default_colours_are_distinct(count: int) -> None:
    assert len(set(default_colors(count))) == count


def test_scenes_take_a_length_and_a_seed() -> None:
    one, other = load_data("scenes:3:1", size=(32, 48)), load_data("scenes:3:2", size=(32, 48))
    assert len(one) == 3
    assert len(load_data("scenes")) == 100
    assert torch.equal(one[2].image, load_data("scenes:5:1", size=(32, 48))[2].image)
    assert not torch.equal(one[0].image, other[0].image)
