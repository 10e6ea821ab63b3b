"""What segmentation data are, whatever they come from: an image, a label map and a name, and the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = 255

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
#: Okabe and Ito's palette for colour-blind readers where it reaches, tints of it beyond.
CAMVID_COLORS = (
    (148, 203, 236),
    (213, 94, 0),
    (240, 228, 66),
    (94, 94, 104),
    (204, 153, 187),
    (0, 158, 115),
    (255, 255, 255),
    (140, 100, 50),
    (0, 77, 168),
    (220, 38, 127),
    (20, 20, 20),
)


class Frame(NamedTuple):
    """One image with its labels.

    Shape:
        image: float32 ``(3, H, W)`` in ``[0, 1]``; label: int64 ``(H, W)``, ``255`` where nothing counts.
    """

    image: Tensor
    label: Tensor
    name: str


@runtime_checkable
class SegmentationData(Protocol):
    """What an evaluation needs of a data set; any object that has these four will do."""

    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def colors(self) -> Sequence[tuple[int, int, int]]: ...
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frame: ...
