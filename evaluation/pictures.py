"""What is shown of one image: kept in the run's folder as data, so that figures and pages are made without the models.

A file holds PNGs, in base64 as a page embeds them, under a checksum, and a hash of the rows that it belongs to.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.files import DamagedError, checksum, read_lines, write_lines
from evaluation.palette import palette
from evaluation.results import Record, worst

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: Which images of a model and an attack are kept: by how far the undefended model is fooled on them.
WHICH = ("worst", "median")
#: Longest side of what is kept, in pixels: larger images are shrunk, or a page of them would open on no phone.
LONGEST = 640


@dataclass(frozen=True, eq=False)
class View:
    """What the model sees and says under one defence.

    Args:
        defence: The defence.
        variant: The variant of the attack that fooled it most on this image.
        success: Success rate on this image, 0 to 1, of all its pixels; NaN where none counts.
        patched: The attacked image.
        mask: What the attack might change; None: every pixel.
        clean, attacked: Predicted classes without and under attack.

    Shape:
        patched ``(H, W, 3)`` uint8, mask ``(H, W)`` bool, clean and attacked ``(H, W)`` integers.
    """

    defence: str
    variant: str
    success: float
    patched: Array
    mask: Array | None
    clean: Array
    attacked: Array


@dataclass(frozen=True, eq=False)
class Picture:
    """One image under one attack, with what one model says of it under every defence.

    Args:
        facts: Plain values: model, attack, which, image, name and seed; classes and colors; ``shrunk``, of how many
            pixels along a side one is left; ``views``, for each its defence, variant, success and the patch's corner.
        pngs: PNG files by name, in base64: ``image``, ``label``, ``target`` where the attack has one, and for the view
            number i ``i-patch`` (its transparent pixels are not the attack's), ``i-clean`` and ``i-attacked``. Label
            maps are indices into a palette of the classes' colours.
    """

    facts: Mapping[str, Any]
    pngs: Mapping[str, str]

    @classmethod
    def of(
        cls,
        record: Record,
        which: str,
        *,
        photo: Array,
        label: Array,
        target: Array | None,
        views: Sequence[View],
        classes: Sequence[str],
        colors: Sequence[tuple[int, int, int]],
    ) -> Picture:
        """From arrays of any size.

        Args:
            record: Of the undefended model, under any variant: tells model, attack, image and seed.
            which: One of ``WHICH``.
            photo: The image, ``(H, W, 3)`` uint8.
            label, target: Ground truth and target map, ``(H, W)``, void as 255.
            views: One for each defence.
            classes, colors: Of the data.
        """
        step = -(-max(label.shape) // LONGEST)

        def of_map(labels: Array) -> str:
            return _encoded(labels[::step, ::step], colors)

        pngs = {"image": _encoded(_shrunk(photo, step)), "label": of_map(label)}
        if target is not None:
            pngs["target"] = of_map(target)
        told = []
        for number, view in enumerate(views):
            patch, corner = _cut(_shrunk(view.patched, step), None if view.mask is None else view.mask[::step, ::step])
            pngs |= {
                f"{number}-patch": _encoded(patch),
                f"{number}-clean": of_map(view.clean),
                f"{number}-attacked": of_map(view.attacked),
            }
            success = None if np.isnan(view.success) else float(view.success)
            told.append({"defence": view.defence, "variant": view.variant, "success": success, "corner": corner})
        facts = {name: getattr(record, name) for name in ("model", "attack", "image", "name", "seed")}
        facts |= {"which": which, "shrunk": step, "classes": list(classes), "colors": [list(c) for c in colors]}
        return cls({**facts, "views": told}, pngs)

    @property
    def photo(self) -> Array:
        """The image, ``(H, W, 3)`` uint8."""
        return decoded(self.pngs["image"])

    @property
    def label(self) -> Array:
        """Ground truth, ``(H, W)``."""
        return decoded(self.pngs["label"])

    @property
    def target(self) -> Array | None:
        """Target map, ``(H, W)``."""
        return decoded(self.pngs["target"]) if "target" in self.pngs else None

    @property
    def colors(self) -> list[tuple[int, int, int]]:
        """Of the classes."""
        return [(int(red), int(green), int(blue)) for red, green, blue in self.facts["colors"]]

    def views(self) -> list[View]:
        """One for each defence, in the order of the run."""
        return [self.view(number) for number in range(len(self.facts["views"]))]

    def view(self, number: int) -> View:
        """The view of that number."""
        told = self.facts["views"][number]
        patch, (top, left) = decoded(self.pngs[f"{number}-patch"]), told["corner"]
        photo, whole = self.photo.copy(), patch.shape[2] == 3
        under = np.ones(patch.shape[:2], dtype=bool) if whole else patch[..., 3] > 0
        box = np.s_[top : top + patch.shape[0], left : left + patch.shape[1]]
        photo[box][under] = patch[..., :3][under]
        mask = np.zeros(photo.shape[:2], dtype=bool)
        mask[box] = under
        return View(
            told["defence"],
            told["variant"],
            float("nan") if told["success"] is None else told["success"],
            photo,
            None if whole else mask,
            decoded(self.pngs[f"{number}-clean"]),
            decoded(self.pngs[f"{number}-attacked"]),
        )

    def save(self, path: Path, rows: str) -> None:
        """Write it, whole or not at all; the same bytes for the same picture.

        Args:
            path: The file.
            rows: Hash of the rows that it belongs to (``rows_hash``).

        Raises:
            OSError: It could not be written; the message says what to do.
        """
        lines = [json.dumps({"name": name, "png": png}) for name, png in self.pngs.items()]
        write_lines(path, {"picture": dict(self.facts), "rows": rows}, lines)

    @classmethod
    def load(cls, path: Path, rows: str | None = None) -> Picture | None:
        """Read what ``save`` wrote; None if it belongs to other rows than these, where any are given.

        Raises:
            DamagedError: The file is not what was written.
        """
        header, lines = read_lines(path)
        if rows is not None and header.get("rows") != rows:
            return None
        try:
            held = [json.loads(line) for line in lines]
            return cls(header["picture"], {one["name"]: one["png"] for one in held})
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(path, f"no picture: {error}") from error


def chosen(records: Iterable[Record]) -> dict[str, Record]:
    """The images that are kept: that on which the undefended model is fooled most, and the median one.

    Args:
        records: Of the undefended model under one attack, all variants.

    Returns:
        For each of ``WHICH`` the strongest variant's record; nothing without records.
    """
    ranked = sorted(worst(records), key=lambda record: np.nan_to_num(record.success, nan=-1.0))
    return {"worst": ranked[-1], "median": ranked[(len(ranked) - 1) // 2]} if ranked else {}


def rows_hash(records: Iterable[Record]) -> str:
    """Hash of rows, whatever their order: pictures of other rows are out of date."""
    return checksum("\n".join(sorted(record.to_json() for record in records)).encode())


def as_photo(image: Array) -> Array:
    """``(3, H, W)`` in ``[0, 1]`` → ``(H, W, 3)`` uint8."""
    return np.round(np.clip(np.moveaxis(image, 0, -1), 0, 1) * 255).astype(np.uint8)


def png(array: Array, colors: Sequence[tuple[int, int, int]] | None = None) -> bytes:
    """A PNG file, the same bytes for the same array.

    Args:
        array: ``(H, W, 3)`` or, with opacity, ``(H, W, 4)`` uint8; or a label map ``(H, W)``.
        colors: Of the classes of a label map. Of 256 classes and more no palette can be made: they stay numbers.
    """
    if array.ndim == 2:
        small = len(colors or ()) < 256
        picture = Image.fromarray(array.astype(np.uint8 if small else np.uint16))
        if small:
            picture.putpalette(palette(colors or ()).tobytes())
    else:
        picture = Image.fromarray(array)
    file = io.BytesIO()
    picture.save(file, "png", compress_level=9)
    return file.getvalue()


def decoded(text: str) -> Array:
    """The array of a PNG in base64; of a label map its classes."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture)


def _encoded(array: Array, colors: Sequence[tuple[int, int, int]] | None = None) -> str:
    return base64.b64encode(png(array, colors)).decode()


def _shrunk(photo: Array, step: int) -> Array:
    return photo if step == 1 else np.asarray(Image.fromarray(photo).reduce(step))


def _cut(patched: Array, mask: Array | None) -> tuple[Array, tuple[int, int]]:
    """The smallest rectangle that holds the attack, with opacity, and its corner (top, left)."""
    if mask is None:
        return patched, (0, 0)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        rows = columns = np.zeros(1, dtype=int)
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.dstack([patched[box], np.where(mask[box], 255, 0).astype(np.uint8)]), (int(rows[0]), int(columns[0]))
