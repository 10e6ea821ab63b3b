"""Classification data by name: drawn ones, and the real sets' formats in tiny folders made by hand."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.datasets import CIFAR10

from evaluation.classification import coco_objects, load_classification
from evaluation.items import ClassificationData, stack_items


def test_objects_by_name() -> None:
    data = load_classification("objects:0.25:30:2", size=(32, 32))
    assert (data.informativeness, len(data), data.seed, data.size) == (0.25, 30, 2, (32, 32))
    assert len(load_classification("objects:0")) == 1000
    assert load_classification("objects").informativeness == 0.5


@pytest.mark.parametrize("name", ["nothing:here", "cifar10", "gtsrb:", "objects:much", "objects:1:2:3:4", "objects:2"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"objects|needs a path|informativeness"):
        load_classification(name)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_classification(f"cifar10:{tmp_path / 'nowhere'}")
    for kind in ("cifar10", "gtsrb"):
        with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
            load_classification(f"{kind}:{tmp_path}")
    with pytest.raises(ValueError, match="split 'val'"):
        load_classification(f"gtsrb:{tmp_path}:val")


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's own format with two pictures; torchvision is told the checksums of these files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072) % 251
    written = {"test_batch": {"data": pixels.astype(np.uint8), "labels": [3, 9]},
               "batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}  # fmt: skip
    sums = {}
    for name, content in written.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path


def test_cifar10(cifar: Path) -> None:
    data = load_classification(f"cifar10:{cifar}")
    assert isinstance(data, ClassificationData)
    assert len(data) == 2
    assert data.classes[3] == "class 3"
    assert (data[1].label, data[1].mask, data[1].context) == (9, None, None)
    expected = (np.arange(3072).reshape(3, 32, 32) % 251) / 255
    np.testing.assert_allclose(data[0].image, expected, atol=1e-6)
    assert data[0].image.dtype == torch.float32
    assert load_classification(f"cifar10:{cifar}", size=(16, 24))[0].image.shape == (3, 16, 24)
    assert stack_items(data).masks is None


def test_a_damaged_cifar10_is_refused(cifar: Path) -> None:
    (cifar / "cifar-10-batches-py/test_batch").write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        load_classification(f"cifar10:{cifar}")


HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def test_gtsrb_has_boxes_where_its_tables_do(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    test, train = base / "GTSRB/Final_Test/Images", base / "GTSRB/Training/00014"
    for folder in (test, train):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for path in (test / "00000.ppm", train / "00000_00000.ppm", train / "00000_00001.ppm"):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    (base / "GT-final_test.csv").write_text(HEADER + "00000.ppm;40;30;5;6;34;24;16\n")
    (train / "GT-00014.csv").write_text(HEADER + "00000_00000.ppm;40;30;1;2;3;4;14\n")
    item = load_classification(f"gtsrb:{tmp_path}", size=(30, 40))[0]
    assert item.label == 16
    rows, columns = torch.nonzero(item.mask, as_tuple=True)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (5, 6, 34, 24)
    assert item.mask.sum() == 30 * 19
    with Image.open(test / "00000.ppm") as file:
        np.testing.assert_allclose(item.image.permute(1, 2, 0) * 255, np.asarray(file), atol=1e-4)
    learnt = load_classification(f"gtsrb:{tmp_path}:train")
    assert [learnt[i].label for i in range(len(learnt))] == [0, 0]  # torchvision numbers the folders that there are
    assert learnt[0].image.shape == (3, 64, 64)
    assert learnt[0].mask is not None
    assert learnt[1].mask is None  # no line in the table
    assert stack_items(learnt).masks is None
    (test / "00000.ppm").write_bytes(b"P6 nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_classification(f"gtsrb:{tmp_path}")[0]


class _Coco:
    """What of pycocotools' COCO the loader and torchvision call, on polygons."""

    def __init__(self, path: str) -> None:
        self.table = json.loads(Path(path).read_text())
        self.imgs = {image["id"]: image for image in self.table["images"]}

    def getCatIds(self) -> list[int]:
        return [category["id"] for category in self.table["categories"]]

    def loadCats(self, ids: list[int]) -> list[dict]:
        return [category for number in ids for category in self.table["categories"] if category["id"] == number]

    def getAnnIds(self) -> list[int]:
        return [annotation["id"] for annotation in self.table["annotations"]]

    def loadAnns(self, ids: list[int]) -> list[dict]:
        return [annotation for number in ids for annotation in self.table["annotations"] if annotation["id"] == number]

    def loadImgs(self, number: int) -> list[dict]:
        return [self.imgs[number]]

    def annToMask(self, annotation: dict) -> np.ndarray:
        image = self.imgs[annotation["image_id"]]
        canvas = Image.new("L", (image["width"], image["height"]))
        for polygon in annotation["segmentation"]:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        return np.asarray(canvas)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's own format: one picture of 100×80, a triangle in it, a thing that is too small, and a crowd."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "val2017/000000000139.png")
    triangle = [20, 10, 60, 10, 20, 50]
    narrow = [1, 1, 5, 41, 1, 41]
    annotations = [
        {"id": number, "image_id": 139, "category_id": kind, "iscrowd": crowd, "bbox": box, "segmentation": outline}
        for number, kind, crowd, box, outline in (
            (5, 18, 0, [20, 10, 40, 40], [triangle]),
            (6, 3, 0, [1, 1, 4, 40], [narrow]),
            (7, 3, 1, [0, 0, 90, 70], []),
        )
    ]
    table = {
        "images": [{"id": 139, "file_name": "000000000139.png", "width": 100, "height": 80}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": annotations,
    }
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(table))
    return tmp_path


def _check_coco(folder: Path) -> None:
    data = load_classification(f"coco:{folder}", size=(60, 60))
    assert data.classes == ("car", "dog")
    assert len(data) == 1  # neither what is too small nor the crowd
    item = data[0]
    assert (item.label, item.name) == (1, "000000000139-5")
    # the box is 20..60 × 10..50, the square around it 60 wide and cut off at the picture's upper side
    raw = coco_objects(folder, size=(60, 70))[0]
    whole = np.asarray(Image.open(folder / "val2017/000000000139.png"))
    crop = Image.fromarray(whole[0:60, 10:70]).resize((70, 60), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(raw.image.permute(1, 2, 0) * 255, np.asarray(crop), atol=1e-4)
    inside = item.mask.numpy()
    assert inside[10:51, 10:51].sum() == inside.sum()  # within the box, whose ends Pillow draws too
    assert inside[14, 14]
    assert not inside[46, 46]  # the half of the box that is not the triangle
    assert 0.45 < inside.sum() / 1600 < 0.56
    assert len(coco_objects(folder, min_side=4)) == 2
    with pytest.raises(ValueError, match="min_side"):
        coco_objects(folder, min_side=90)
    with pytest.raises(ValueError, match="margin=-1"):
        coco_objects(folder, margin=-1)


def test_coco_objects_are_cut_out_with_their_masks(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pycocotools.coco")
    module.COCO = _Coco
    package = types.ModuleType("pycocotools")
    package.coco = module
    monkeypatch.setitem(sys.modules, "pycocotools", package)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", module)
    _check_coco(coco)
    with pytest.raises(FileNotFoundError, match="train2017"):
        load_classification(f"coco:{coco}:train2017")


def test_coco_with_the_real_package(coco: Path) -> None:
    pytest.importorskip("pycocotools")
    _check_coco(coco)


def test_coco_without_pycocotools_names_it(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        load_classification(f"coco:{coco}")
