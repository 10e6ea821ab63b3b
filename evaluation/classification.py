"""Classification data by name: drawn objects; CIFAR-10, GTSRB and COCO where the user has them (nothing is fetched)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.items import ClassificationData, Item

_KNOWN = (
    "'objects[:INFORMATIVENESS[:LENGTH[:SEED]]]', 'cifar10:PATH[:SPLIT]', 'gtsrb:PATH[:SPLIT]', 'coco:PATH[:SPLIT]'"
)
_SPLITS = {"cifar10": ("test", "train"), "gtsrb": ("test", "train"), "coco": ("val2017", "train2017")}
#: The side to which images of unequal sizes are brought where no size is given.
_SIZE = (64, 64)


def load_classification(name: str, *, size: tuple[int, int] | None = None) -> ClassificationData:
    """Data by name.

    Args:
        name: ``objects[:κ[:LENGTH[:SEED]]]`` (drawn, needs no file; 0.5, 1000 and 0 if not given),
            ``cifar10:PATH[:SPLIT]``, ``gtsrb:PATH[:SPLIT]`` (``test`` or ``train``, ``test`` if not given) and
            ``coco:PATH[:SPLIT]`` (``val2017`` if not given). PATH is what torchvision calls ``root``.
        size: ``(height, width)`` of the images; 32×32 for CIFAR-10 and 64×64 for the others if not given.

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
        FileNotFoundError: the files are not there.
        ImportError: COCO without the package pycocotools.
    """
    kind, _, rest = name.partition(":")
    if kind == "objects":
        return _objects(name, rest, size)
    if kind not in _SPLITS:
        raise ValueError(f"unknown data {name!r}; known: {_KNOWN}")
    if not rest:
        raise ValueError(f"data {name!r} needs a path, as in '{kind}:PATH'")
    root, _, split = rest.rpartition(":") if ":" in rest and not Path(rest).exists() else (rest, "", "")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root}")
    split = split or _SPLITS[kind][0]
    if kind != "coco" and split not in _SPLITS[kind]:
        raise ValueError(f"data {name!r}: split {split!r}; known: {', '.join(_SPLITS[kind])}")
    return {"cifar10": cifar10, "gtsrb": gtsrb, "coco": coco_objects}[kind](root, split, size=size)


def _objects(name: str, rest: str, size: tuple[int, int] | None) -> ClassificationData:
    from evaluation.objects import DrawnObjects

    given = rest.split(":") if rest else []
    try:
        kappa, length, seed = [*given, *("0.5", "1000", "0")[len(given) :]]
        numbers = float(kappa), int(length), int(seed)
    except ValueError as error:
        raise ValueError(
            f"data {name!r}: 'objects:INFORMATIVENESS:LENGTH:SEED', three numbers, as in 'objects:0.5:1000:0'"
        ) from error
    if size is None:
        return DrawnObjects(numbers[0], numbers[1], seed=numbers[2])
    return DrawnObjects(numbers[0], numbers[1], seed=numbers[2], size=size)


class ObjectData:
    """Pictures of one object each, opened when they are asked for.

    Args:
        read: from a number to picture, class, mask (bool, of the picture's size, or ``None``) and name.
        length: how many there are.
        classes: their names.
        size: ``(height, width)`` to which pictures (bilinear, anti-aliased) and masks (nearest) are brought; ``None``
            leaves them.

    Raises:
        ValueError: on access, a file that cannot be read or a class out of range; the message names the picture.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Image.Image, int, np.ndarray | None, str]],
        length: int,
        *,
        classes: Sequence[str],
        size: tuple[int, int] | None,
    ) -> None:
        self._read, self._length, self.size = read, length, size
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        try:
            picture, label, mask, name = self._read(index % len(self))
            picture = picture.convert("RGB")
        except FileNotFoundError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever they meet in a damaged file
            raise ValueError(f"item {index} cannot be read ({error}); replace it, or leave it out") from error
        if not 0 <= label < len(self.classes):
            raise ValueError(f"{name}: class {label} is out of range 0–{len(self.classes) - 1}")
        if self.size is not None and picture.size != (self.size[1], self.size[0]):
            picture = picture.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
            if mask is not None:
                nearest = Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)
                mask = np.asarray(nearest, dtype=bool)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div_(255)
        given: Tensor | None = None if mask is None else torch.from_numpy(np.array(mask, dtype=bool))
        return Item(pixels, int(label), given, None, name)

    def __repr__(self) -> str:
        return f"ObjectData({len(self)} pictures in {len(self.classes)} classes, size={self.size})"


def cifar10(root: str | Path, split: str = "test", *, size: tuple[int, int] | None = None) -> ObjectData:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, ``ROOT/cifar-10-batches-py``; it has no masks.

    Raises:
        FileNotFoundError: the files are not there, or are not those that torchvision knows (it compares checksums).
    """
    from torchvision.datasets import CIFAR10

    data = _found(lambda: CIFAR10(str(root), train=split == "train"), root, "cifar-10-batches-py")

    def read(index: int) -> tuple[Image.Image, int, None, str]:
        picture, label = data[index]
        return picture, label, None, f"{split}-{index:05d}"

    return ObjectData(read, len(data), classes=data.classes, size=size)


def gtsrb(root: str | Path, split: str = "test", *, size: tuple[int, int] | None = None) -> ObjectData:
    """GTSRB's 43 traffic signs (Stallkamp et al., IJCNN 2011) through torchvision, ``ROOT/gtsrb/GTSRB/…``.

    The mask is the sign's box, from the ``GT-*.csv`` beside the pictures (training) or ``ROOT/gtsrb/GT-final_test.csv``
    (test), its sides included; where there is no such file, there is no mask.

    Raises:
        FileNotFoundError: the files are not there.
    """
    from torchvision.datasets import GTSRB

    data = _found(lambda: GTSRB(str(root), split=split), root, "gtsrb/GTSRB")
    samples = [(Path(path), int(label)) for path, label in data._samples]
    boxes = _boxes(Path(root) / "gtsrb", split, {path.parent for path, _ in samples})

    def read(index: int) -> tuple[Image.Image, int, np.ndarray | None, str]:
        path, label = samples[index]
        with Image.open(path) as file:
            picture = file.convert("RGB")
        box, mask = boxes.get(path), None
        if box is not None:
            left, top, right, bottom = box
            mask = np.zeros((picture.height, picture.width), dtype=bool)
            mask[top : bottom + 1, left : right + 1] = True
        return picture, label, mask, f"{path.parent.name}/{path.stem}"

    classes = [f"sign {number}" for number in range(43)]
    return ObjectData(read, len(samples), classes=classes, size=size or _SIZE)


def _boxes(base: Path, split: str, folders: set[Path]) -> dict[Path, tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each picture that a table of GTSRB names."""
    if split == "test":
        tables = [(base / "GT-final_test.csv", base / "GTSRB" / "Final_Test" / "Images")]
    else:
        tables = [(table, folder) for folder in sorted(folders) for table in sorted(folder.glob("GT-*.csv"))]
    found = {}
    for table, folder in tables:
        with table.open(newline="") as file:
            for row in csv.DictReader(file, delimiter=";", skipinitialspace=True):
                if all(row.get(f"Roi.{side}") for side in ("X1", "Y1", "X2", "Y2")):
                    left, top, right, bottom = (int(row[f"Roi.{side}"]) for side in ("X1", "Y1", "X2", "Y2"))
                    found[folder / row["Filename"]] = left, top, right, bottom
    return found


def coco_objects(
    root: str | Path,
    split: str = "val2017",
    *,
    size: tuple[int, int] | None = None,
    margin: float = 0.5,
    min_side: int = 32,
) -> ObjectData:
    """MS-COCO's objects (Lin et al., ECCV 2014), each cut out of its picture with some context and its exact mask.

    Through torchvision's `CocoDetection` from ``ROOT/SPLIT`` and ``ROOT/annotations/instances_SPLIT.json``. A cut-out
    is a square around the object's box, ``1 + margin`` times its longer side where the picture reaches that far, and
    else what the picture has of it. Crowds, and objects with a side under `min_side` pixels, are left out.

    Raises:
        ImportError: pycocotools is not installed.
        FileNotFoundError: the files are not there.
        ValueError: no object is left, or a margin below 0.
    """
    if margin < 0:
        raise ValueError(f"margin={margin}: at least 0; 0.5 leaves a quarter of the box's longer side around it")
    try:
        import_module("pycocotools.coco")
    except ImportError as error:
        raise ImportError("COCO's masks need the package pycocotools: pip install pycocotools") from error
    from torchvision.datasets import CocoDetection

    root = Path(root)
    pictures, table = root / split, root / "annotations" / f"instances_{split}.json"
    for path in (pictures, table):
        if not path.exists():
            raise FileNotFoundError(f"no {path}: COCO lies in ROOT/{split} and ROOT/annotations/instances_{split}.json")
    data = CocoDetection(str(pictures), str(table))
    categories = data.coco.loadCats(sorted(data.coco.getCatIds()))
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    objects = [
        annotation
        for annotation in data.coco.loadAnns(sorted(data.coco.getAnnIds()))
        if not annotation.get("iscrowd") and min(annotation["bbox"][2:]) >= min_side
    ]
    if not objects:
        raise ValueError(f"{table}: no object has both sides of at least {min_side} pixels; give a smaller min_side")

    def read(index: int) -> tuple[Image.Image, int, np.ndarray, str]:
        annotation: dict[str, Any] = objects[index]
        path = pictures / data.coco.loadImgs(annotation["image_id"])[0]["file_name"]
        with Image.open(path) as file:
            picture = file.convert("RGB")
        left, top, width, height = annotation["bbox"]
        half = (1 + margin) * max(width, height) / 2
        middle = (left + width / 2, top + height / 2)
        box = (
            max(0, round(middle[0] - half)), max(0, round(middle[1] - half)),
            min(picture.width, round(middle[0] + half)), min(picture.height, round(middle[1] + half)),
        )  # fmt: skip
        mask = np.asarray(data.coco.annToMask(annotation), dtype=bool)[box[1] : box[3], box[0] : box[2]]
        return picture.crop(box), numbers[annotation["category_id"]], mask, f"{path.stem}-{annotation['id']}"

    names = [category["name"] for category in categories]
    return ObjectData(read, len(objects), classes=names, size=size or _SIZE)


def _found(make: Callable[[], Any], root: str | Path, where: str) -> Any:
    """A torchvision data set, with its error for missing files as ours."""
    try:
        return make()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root} has no {where} as torchvision knows it ({str(error).partition('.')[0]}); nothing is downloaded "
            "here, so put the data set's own files there"
        ) from error
