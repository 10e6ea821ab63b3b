"""What a page shows of a cell's images: layers of PNGs that the page holds once, outlines, and a legend."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.frames import IGNORE_INDEX
from evaluation.palette import VOID, hexadecimal, paint
from evaluation.pictures import Picture, View, decoded, png

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: Colours of changed pixels, told apart by readers of every kind of colour vision (Okabe and Ito), and by lightness.
TO_TARGET, TO_OTHER = (213, 94, 0), (0, 114, 178)
_CHOSEN = {
    "worst": "the image on which the undefended model is fooled most",
    "median": "the median image: the undefended model is fooled more on half of them",
}


@dataclass(frozen=True)
class Sprite:
    """A PNG that the page holds once, and where it lies on the image, in pixels."""

    name: str
    data: str
    left: int
    top: int
    width: int
    height: int
    smooth: bool


@dataclass
class Sprites:
    """All PNGs of a page, each once, however often it is shown."""

    held: dict[tuple[str, int, int], Sprite] = field(default_factory=dict)

    def add(self, data: str, *, left: int = 0, top: int = 0, smooth: bool = False) -> str:
        """Hold a PNG, given in base64, and return its name."""
        key = (data, left, top)
        if key not in self.held:
            height, width = decoded(data).shape[:2]
            self.held[key] = Sprite(f"p{len(self.held)}", data, left, top, width, height, smooth)
        return self.held[key].name


@dataclass(frozen=True)
class Layers:
    """One small picture: PNGs on each other, and the patch's outline."""

    title: str
    sprites: Sequence[str]
    outline: str = ""
    faded: str = ""


@dataclass(frozen=True)
class CellPicture:
    """One image of a cell.

    Args:
        which, caption: Which image it is, in a word and in words.
        sizes: width and height, in pixels, as kept.
        layers: The small pictures.
        wiped, before, after: What the slider wipes between, and what stands at its ends.
        legend: Classes that occur, with their colours.
        changed: Colours of the changed pixels, with what they mean.
        told: What the attack reached on it, in words.
    """

    which: str
    caption: str
    sizes: tuple[int, int]
    layers: Sequence[Layers]
    wiped: str
    before: Layers
    after: Layers
    legend: Sequence[tuple[str, str]]
    changed: Sequence[tuple[str, str]]
    told: str


def cell_picture(picture: Picture, defence: str, sprites: Sprites, *, region: str = "outside") -> CellPicture | None:
    """What is shown of one image under one defence; None where the picture does not have it.

    Args:
        picture: Of the cell's model and attack.
        defence: The cell's.
        sprites: Where the PNGs go.
        region: Which pixels count, as in ``evaluate``.
    """
    facts, pngs = picture.facts, picture.pngs
    names = [told["defence"] for told in facts["views"]]
    if defence not in names:
        return None
    number = names.index(defence)
    view = picture.view(number)
    height, width = view.clean.shape
    photo = sprites.add(pngs["image"], smooth=True)
    edge = outline(view.mask)
    changes, meanings = _changes(picture, view, region)

    def of_map(name: str) -> str:
        if len(facts["classes"]) < 256:
            return sprites.add(pngs[name])
        return sprites.add(base64.b64encode(png(paint(decoded(pngs[name]), picture.colors))).decode())

    top, left = facts["views"][number]["corner"]
    patched = sprites.add(pngs[f"{number}-patch"], left=left, top=top)
    clean, attacked = of_map(f"{number}-clean"), of_map(f"{number}-attacked")
    changed = sprites.add(base64.b64encode(png(changes)).decode())
    layers = [Layers("Image", [photo]), Layers("Image under attack", [photo, patched], edge)]
    layers += [Layers("Ground truth", [of_map("label")])]
    if "target" in pngs:
        layers += [Layers("What the attacker wants", [of_map("target")], edge)]
    layers += [
        Layers("Prediction without attack", [clean]),
        Layers("Prediction under attack", [attacked], edge),
        Layers("Changed pixels", [changed], edge, photo),
    ]
    if defence == "none" or "none" not in names:
        wiped = "Prediction"
        before, after = Layers("without attack", [clean]), Layers("under attack", [attacked], edge)
    else:
        wiped = "Prediction under attack"
        other = names.index("none")
        before = Layers("no defence", [of_map(f"{other}-attacked")], outline(picture.view(other).mask))
        after = Layers(defence, [attacked], edge)
    caption = _CHOSEN.get(facts["which"], facts["which"])
    return CellPicture(
        which=facts["which"],
        caption=f"{facts['name']}: {caption}",
        sizes=(width, height),
        layers=layers,
        wiped=wiped,
        before=before,
        after=after,
        legend=_legend(picture, number),
        changed=meanings,
        told=_told(picture, number),
    )


def outline(mask: Array | None) -> str:
    """The border of a mask ``(H, W)`` as the path of an SVG, along the edges of its pixels; empty without one."""
    if mask is None or not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.int8)
    parts = []
    for line, start, stop in _runs(np.diff(padded, axis=0)[:, 1:-1] != 0):
        parts.append(f"M{start} {line}H{stop}")
    for line, start, stop in _runs(np.diff(padded, axis=1)[1:-1].T != 0):
        parts.append(f"M{line} {start}V{stop}")
    return "".join(parts)


def _runs(edges: Array) -> list[tuple[int, int, int]]:
    """Rows of flags → (row, first, one past the last) of each run."""
    steps = np.diff(np.pad(edges.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    return [
        (int(row), int(start), int(stop))
        for (row, start), (_, stop) in zip(np.argwhere(steps == 1), np.argwhere(steps == -1), strict=True)
    ]


def _changes(picture: Picture, view: View, region: str) -> tuple[Array, list[tuple[str, str]]]:
    """Pixels that count and whose prediction the attack changed, ``(H, W, 4)``, and what the colours mean."""
    label, target = picture.label, picture.target
    changed = (view.clean != view.attacked) & (label != IGNORE_INDEX)
    if region == "outside" and view.mask is not None:
        changed &= ~view.mask
    drawn = np.zeros((*label.shape, 4), dtype=np.uint8)
    drawn[changed] = (*TO_OTHER, 255)
    if target is None:
        return drawn, [(hexadecimal(TO_OTHER), "changed by the attack")]
    drawn[changed & (view.attacked == target)] = (*TO_TARGET, 255)
    return drawn, [
        (hexadecimal(TO_TARGET), "changed to the attacker's target"),
        (hexadecimal(TO_OTHER), "changed to another class"),
    ]


def _legend(picture: Picture, number: int) -> list[tuple[str, str]]:
    names = ["label", "target", f"{number}-clean", f"{number}-attacked"]
    shown = set().union(*(np.unique(decoded(picture.pngs[name])).tolist() for name in names if name in picture.pngs))
    classes = picture.facts["classes"]
    legend = [(hexadecimal(picture.colors[c]), str(classes[c])) for c in sorted(shown) if c < len(classes)]
    return legend + ([(hexadecimal(VOID), "void: counts nowhere")] if IGNORE_INDEX in shown else [])


def _told(picture: Picture, number: int) -> str:
    views, step = picture.facts["views"], picture.facts["shrunk"]
    view = views[number]
    said = f"The {view['variant']} attack fools {_percent(view['success'])} of this image's pixels"
    without = next((v for v in views if v["defence"] == "none"), None)
    if without is not None and view["defence"] != "none":
        said += f"; without defence {_percent(without['success'])}"
    return f"{said}." + (f" Shown at 1/{step} of its size." if step > 1 else "")


def _percent(share: float | None) -> str:
    return "none" if share is None or math.isnan(share) else f"{100 * share:.1f} %"
