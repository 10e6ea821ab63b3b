"""Objects on contexts drawn by a program, with exact object masks: classification data that is always there.

Six kinds of things, each with a context of its own: boats on the sea, camels in the desert, deer in the forest, buses
in the city, bears in the snow, cows in the field. How often a thing is where it belongs is the *informativeness* κ:
with probability κ it stands in its own context, else in one drawn uniformly from all K. So a context c says of the
label y

    P(c = own | y) = p = κ + (1 − κ)/K,    P(c = another | y) = q = (1 − κ)/K,

and since labels and contexts are both uniform: the best classifier that sees the context alone is right with
probability p (`context_accuracy`), and the mutual information is log₂K + p log₂p + (K − 1) q log₂q bits
(`context_information`), 0 at κ = 0 and log₂K at κ = 1. Colours and textures of the things are drawn from one palette
for all classes, so that the shape tells the class.

The thing, the context, and the light are drawn from three streams of item i: whatever κ, item i shows the same thing in
the same place, and a larger κ only moves some of them to their own context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from evaluation.items import Item

OBJECTS = ("boat", "camel", "deer", "bus", "bear", "cow")
CONTEXTS = ("sea", "desert", "forest", "city", "snow", "field")
_FINE = 4  # the canvas of a thing is that much larger, and averaged: its coverage is exact to 1/16 of a pixel

Colour = tuple[float, float, float]
Point = tuple[float, float]
#: Of all classes alike; bright and dark ones against every context.
_PALETTE: tuple[Colour, ...] = (
    (0.62, 0.44, 0.26), (0.36, 0.24, 0.16), (0.80, 0.70, 0.52), (0.84, 0.84, 0.82), (0.22, 0.22, 0.24),
    (0.50, 0.50, 0.52), (0.66, 0.24, 0.18), (0.24, 0.36, 0.60), (0.74, 0.60, 0.20), (0.30, 0.46, 0.32),
)  # fmt: skip


def context_accuracy(informativeness: float, classes: int = len(OBJECTS)) -> float:
    """Accuracy of the best classifier that sees nothing but which context it is: κ + (1 − κ)/K."""
    return informativeness + (1 - informativeness) / classes


def context_information(informativeness: float, classes: int = len(OBJECTS)) -> float:
    """Mutual information of label and context in bits: log₂K + p log₂p + (K − 1) q log₂q, see this module's text."""
    own = context_accuracy(informativeness, classes)
    other = (1 - informativeness) / classes
    return math.log2(classes) + sum(n * p * math.log2(p) for n, p in ((1, own), (classes - 1, other)) if p > 0)


class DrawnObjects:
    """Drawn objects on contexts; item ``i`` depends on ``(informativeness, size, seed, i)`` only.

    Args:
        informativeness: κ in ``[0, 1]``; how much the context says about the class.
        length: number of items; a longer set begins with the items of a shorter one. Item ``i`` has class ``i mod 6``,
            so that the classes are equally frequent.
        size: ``(height, width)`` in pixels.
        seed: another seed, other items.

    Shape:
        ``objects[i]`` is an `Item`: image float32 ``(3, H, W)`` in ``[0, 1]``, mask bool ``(H, W)``: every pixel that
        the object covers in part or in whole, which are exactly the pixels that differ from `without_object`.

    Raises:
        ValueError: κ outside [0, 1], a length below 1, a side below 16 pixels, or a negative seed.
    """

    def __init__(
        self, informativeness: float, length: int = 1000, *, size: tuple[int, int] = (64, 64), seed: int = 0
    ) -> None:
        if not 0 <= informativeness <= 1:
            raise ValueError(f"informativeness={informativeness}: from 0 (the context says nothing) to 1 (everything)")
        if length < 1:
            raise ValueError(f"length={length}: at least one item")
        if len(size) != 2 or min(size) < 16:
            raise ValueError(f"size={size}: (height, width), each at least 16 pixels")
        if seed < 0:
            raise ValueError(f"seed={seed}: 0 or more")
        self.informativeness, self.length, self.seed = float(informativeness), length, seed
        self.size = (int(size[0]), int(size[1]))
        self.classes: Sequence[str] = OBJECTS
        self.contexts: Sequence[str] = CONTEXTS

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        index = self._index(index)
        label, context = index % len(OBJECTS), self._context(index)
        drawn, coverage = _thing(label, self.size, self._stream(index, 1))
        image = self._developed(index, _context(context, self.size, self._stream(index, 2)), drawn, coverage)
        return Item(image, label, torch.from_numpy(coverage > 0), context, f"object-{self.seed}-{index:05d}")

    def without_object(self, index: int) -> torch.Tensor:
        """The scene of item ``index`` as it was before the object was drawn on it, float32 ``(3, H, W)``."""
        index = self._index(index)
        return self._developed(index, _context(self._context(index), self.size, self._stream(index, 2)))

    def _index(self, index: int) -> int:
        if not -self.length <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        return index % self.length

    def _stream(self, index: int, part: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *self.size, index, part))

    def _context(self, index: int) -> int:
        rng = self._stream(index, 0)
        at_home, elsewhere = rng.random() < self.informativeness, int(rng.integers(len(CONTEXTS)))
        return index % len(OBJECTS) if at_home else elsewhere

    def _developed(
        self, index: int, image: np.ndarray, drawn: np.ndarray | None = None, coverage: np.ndarray | None = None
    ) -> torch.Tensor:
        """Context, thing, light and noise. Nothing is clipped: a pixel that the thing covers cannot become equal."""
        rng = self._stream(index, 3)
        if drawn is not None and coverage is not None:
            image = image * (1 - coverage[..., None]) + drawn * coverage[..., None]
        light = rng.uniform(0.85, 1.0) * rng.uniform(0.95, 1.0, 3)
        light = light * _field(rng, self.size, (3, 3), 0.88, 1.0)[..., None]
        noise = np.clip(rng.standard_normal((*self.size, 3)) * rng.uniform(0.004, 0.02), -0.05, 0.05)
        developed = 0.05 + 0.9 * np.clip(image, 0, 1) * light + noise
        return torch.from_numpy(np.ascontiguousarray(developed.transpose(2, 0, 1)).astype(np.float32))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(informativeness={self.informativeness}, length={self.length}, size={self.size}, "
            f"seed={self.seed})"
        )


# ------------------------------------------------------------------------------------------------------------- things


class _Pen:
    """Draws a thing in its own frame, x to the front and y up, each from −1 to 1, onto a transparent canvas."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.rng, self.size = rng, size
        self.image = Image.new("RGBA", (size[1] * _FINE, size[0] * _FINE))
        self.canvas = ImageDraw.Draw(self.image)
        self.reach = min(size) * _FINE * rng.uniform(0.3, 0.44)
        self.flip = rng.choice((-1.0, 1.0))
        self.turn = rng.normal(0, 0.09)
        self.stretch = rng.uniform(0.85, 1.18)
        margin = 1.02 * self.reach  # the thing stays inside the picture but for an antler or a mast
        self.centre = (
            rng.uniform(margin, size[1] * _FINE - margin),
            rng.uniform(max(margin, 0.42 * size[0] * _FINE), size[0] * _FINE - margin),
        )
        main, second = rng.choice(len(_PALETTE), 2, replace=False)
        self.main, self.second = self._vary(_PALETTE[main]), self._vary(_PALETTE[second])
        self.shade: Colour = (0.72 * self.main[0], 0.72 * self.main[1], 0.72 * self.main[2])

    def _vary(self, colour: Colour) -> Colour:
        r, g, b = np.clip(np.asarray(colour) + self.rng.normal(0, 0.05, 3), 0.05, 0.95).tolist()
        return r, g, b

    def _pixel(self, point: Point) -> Point:
        x, y = point[0] * self.stretch * self.flip, point[1] / self.stretch
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return (
            self.centre[0] + self.reach * (x * cos - y * sin),
            self.centre[1] - self.reach * (x * sin + y * cos),
        )

    @staticmethod
    def _ink(colour: Colour) -> tuple[int, int, int, int]:
        return round(255 * colour[0]), round(255 * colour[1]), round(255 * colour[2]), 255

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.canvas.polygon([self._pixel(point) for point in points], fill=self._ink(colour))

    def oval(self, x: float, y: float, across: float, up: float, colour: Colour) -> None:
        angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        self.polygon([(x + across * math.cos(a), y + up * math.sin(a)) for a in angles], colour)

    def limb(self, start: Point, end: Point, wide: float, colour: Colour, narrow: float | None = None) -> None:
        """A line of the given width, that may end narrower."""
        along = (end[0] - start[0], end[1] - start[1])
        length = math.hypot(*along)
        across = (-along[1] / length / 2, along[0] / length / 2)
        thin = wide if narrow is None else narrow
        self.polygon(
            (
                (start[0] + across[0] * wide, start[1] + across[1] * wide),
                (end[0] + across[0] * thin, end[1] + across[1] * thin),
                (end[0] - across[0] * thin, end[1] - across[1] * thin),
                (start[0] - across[0] * wide, start[1] - across[1] * wide),
            ),
            colour,
        )

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours ``(H, W, 3)`` with a texture, and coverage ``(H, W)``, both from 0 to 1."""
        pixels = np.asarray(self.image.convert("RGBa").reduce(_FINE), dtype=np.float64) / 255  # times coverage
        coverage = pixels[..., 3]
        colours = pixels[..., :3] / np.maximum(coverage, 1e-9)[..., None]
        return np.clip(colours * self._texture()[..., None], 0.02, 0.98), coverage

    def _texture(self) -> np.ndarray:
        """Grain, and on some things of every class stripes or spots."""
        rng, (height, width) = self.rng, self.size
        texture = 1 + 0.05 * rng.standard_normal(self.size)
        kind, strength = rng.integers(4), rng.uniform(0.1, 0.25)
        if kind == 0:
            rows, columns = np.mgrid[:height, :width]
            angle, period = rng.uniform(0, math.pi), rng.uniform(3, 7) * min(self.size) / 64
            wave = np.sin(2 * math.pi * (rows * math.sin(angle) + columns * math.cos(angle)) / period)
            texture *= 1 - strength * (wave > 0.2)
        elif kind == 1:
            texture *= 1 - strength * (_field(rng, self.size, (16, 16), 0, 1) > 0.58)
        return texture


def _beast(pen: _Pen, *, body: Point, hips: float, leg: float, neck: Point, head: Point, tail: float) -> Point:
    """What four legs carry: body and legs, a tail, a neck from the shoulder, and the head; where the head begins."""
    rng, (long, high) = pen.rng, body
    foot = hips - leg
    for x, colour in ((-0.75, pen.shade), (0.6, pen.shade), (-0.9, pen.main), (0.8, pen.main)):
        stride = rng.uniform(-0.12, 0.12)
        pen.limb((x * long, hips), (x * long + stride, foot), 0.34 * high + 0.08, colour, 0.12)
    pen.oval(0, hips + high * 0.6, long, high, pen.main)
    pen.oval(-0.5 * long, hips + high * 0.6, long * 0.55, high * 1.02, pen.main)
    pen.oval(0.5 * long, hips + high * 0.6, long * 0.55, high * 1.0, pen.main)
    pen.limb((-long * 0.95, hips + high), (-long - 0.1, hips + high - tail), 0.09, pen.shade, 0.05)
    shoulder = (0.75 * long, hips + high * 0.85)
    at = (shoulder[0] + neck[0], shoulder[1] + neck[1] + rng.uniform(-0.06, 0.06))
    pen.limb(shoulder, at, 0.3 + 0.3 * high, pen.main, 0.2)
    pen.limb((at[0] - 0.08, at[1] + 0.03), (at[0] + head[0], at[1] - 0.1), head[1], pen.main, head[1] * 0.6)
    return at


def _boat(pen: _Pen) -> None:
    rng = pen.rng
    deck, keel, bow = rng.uniform(-0.35, -0.15), rng.uniform(-0.8, -0.6), rng.uniform(0.85, 1.0)
    pen.polygon(((-0.95, deck), (bow, deck + 0.08), (0.62, keel), (-0.72, keel)), pen.main)
    pen.polygon(((-0.95, deck), (bow, deck + 0.08), (0.9, deck - 0.1), (-0.9, deck - 0.14)), pen.shade)
    left, right, roof = rng.uniform(-0.6, -0.3), rng.uniform(0.05, 0.4), deck + rng.uniform(0.35, 0.6)
    pen.polygon(((left, deck), (left + 0.05, roof), (right - 0.08, roof), (right, deck)), pen.second)
    for x in np.arange(left + 0.14, right - 0.14, 0.22).tolist():
        pen.polygon(((x, roof - 0.12), (x + 0.1, roof - 0.12), (x + 0.1, roof - 0.28), (x, roof - 0.28)), pen.shade)
    if rng.random() < 0.5:  # a mast with a sail, or a funnel
        mast = rng.uniform(left, right)
        pen.limb((mast, deck), (mast, 1.0), 0.06, pen.shade)
        pen.polygon(((mast + 0.05, 0.95), (mast + 0.05, roof), (0.75, roof)), pen.second)
    else:
        pen.limb((left + 0.25, roof), (left + 0.22, roof + 0.3), 0.2, pen.main)


def _bus(pen: _Pen) -> None:
    rng = pen.rng
    roof, floor = rng.uniform(0.3, 0.6), -0.5
    front = rng.uniform(0.86, 0.98)
    pen.polygon(((-0.98, floor), (-0.98, roof), (front - 0.1, roof), (front, roof - 0.25), (front, floor)), pen.main)
    sill = roof - rng.uniform(0.35, 0.5)
    for x in np.arange(-0.86, front - 0.3, rng.uniform(0.26, 0.38)).tolist():
        pen.polygon(((x, roof - 0.1), (x + 0.2, roof - 0.1), (x + 0.2, sill), (x, sill)), pen.second)
    pen.polygon(((-0.98, floor + 0.12), (front, floor + 0.12), (front, floor), (-0.98, floor)), pen.shade)
    for x in (-0.55, 0.5):
        pen.oval(x, floor - 0.05, 0.2, 0.2, (0.1, 0.1, 0.11))
        pen.oval(x, floor - 0.05, 0.08, 0.08, pen.second)


def _camel(pen: _Pen) -> None:
    rng = pen.rng
    head = _beast(pen, body=(0.6, 0.24), hips=-0.2, leg=0.75, neck=(0.3, 0.32), head=(0.28, 0.17), tail=0.4)
    for x in (0.0,) if rng.random() < 0.5 else (-0.28, 0.25):
        pen.polygon(((x - 0.3, 0.12), (x - 0.08, 0.56), (x + 0.08, 0.56), (x + 0.3, 0.12)), pen.main)
    pen.limb((head[0] - 0.05, head[1]), (head[0] - 0.09, head[1] + 0.15), 0.07, pen.shade)


def _deer(pen: _Pen) -> None:
    rng = pen.rng
    head = _beast(pen, body=(0.58, 0.2), hips=-0.15, leg=0.82, neck=(0.2, 0.36), head=(0.28, 0.16), tail=0.12)
    for side in (-0.1, 0.1):
        tip = (head[0] - 0.15 + 2 * side, head[1] + rng.uniform(0.3, 0.48))
        pen.limb((head[0], head[1] + 0.03), tip, 0.09, pen.shade, 0.06)
        fork = ((head[0] + tip[0]) / 2, (head[1] + tip[1]) / 2)
        pen.limb(fork, (tip[0] + 0.26, tip[1] - 0.02), 0.07, pen.shade, 0.05)


def _bear(pen: _Pen) -> None:
    rng = pen.rng
    head = _beast(pen, body=(0.68, 0.36), hips=-0.35, leg=0.5, neck=(0.14, 0.0), head=(0.3, 0.26), tail=0.1)
    pen.oval(head[0], head[1], 0.2, 0.19, pen.main)
    for side in (-0.12, 0.1):
        pen.oval(head[0] + side, head[1] + 0.18, 0.07, rng.uniform(0.06, 0.09), pen.shade)


def _cow(pen: _Pen) -> None:
    rng = pen.rng
    head = _beast(pen, body=(0.68, 0.32), hips=-0.28, leg=0.6, neck=(0.2, 0.06), head=(0.3, 0.24), tail=0.6)
    for side in (-0.16, 0.1):
        pen.limb((head[0] + side / 2, head[1] + 0.06), (head[0] + side, head[1] + 0.3), 0.09, pen.shade, 0.04)
    pen.oval(-0.35, -0.3, 0.16, 0.12, pen.shade)
    for _ in range(int(rng.integers(0, 4))):
        pen.oval(rng.uniform(-0.5, 0.4), rng.uniform(-0.15, 0.15), 0.15, 0.11, pen.second)


_THINGS: tuple[Callable[[_Pen], None], ...] = (_boat, _camel, _deer, _bus, _bear, _cow)


def _thing(label: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours ``(H, W, 3)`` and coverage ``(H, W)`` of one thing."""
    pen = _Pen(size, rng)
    _THINGS[label](pen)
    return pen.finished()


# ----------------------------------------------------------------------------------------------------------- contexts


def _field(
    rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int], low: float, high: float
) -> np.ndarray:
    """Smooth noise ``(H, W)`` of so many cells between two values."""
    noise = Image.fromarray(rng.random(cells, dtype=np.float32))
    smooth = np.asarray(noise.resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float64)
    return low + (high - low) * np.clip(smooth, 0, 1)


def _around(rng: np.random.Generator, colour: Colour, spread: float = 0.05) -> np.ndarray:
    return np.asarray(np.clip(np.asarray(colour) + rng.normal(0, spread) + rng.normal(0, spread / 2, 3), 0.03, 0.97))


class _Ground:
    """Sky over ground, with the row of the horizon; contexts draw on it with shapes in shares of the picture."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator, ground: Colour, sky: Colour) -> None:
        self.rng, (self.height, self.width) = rng, size
        self.horizon = rng.uniform(0.25, 0.5)
        above, below = _around(rng, sky), _around(rng, ground)
        rows = (np.arange(self.height) + 0.5)[:, None, None] / self.height
        fade = np.clip(rows / self.horizon, 0, 1)
        pale = 0.5 * above + 0.5 * np.array((0.85, 0.87, 0.9))
        far = np.clip((rows - self.horizon) / (1 - self.horizon), 0, 1)
        picture = np.where(rows < self.horizon, above * (1 - fade) + pale * fade, below * (0.82 + 0.18 * far))
        self.paper = Image.fromarray((255 * np.broadcast_to(picture, (*size, 3))).astype(np.uint8))
        self.canvas = ImageDraw.Draw(self.paper)

    def polygon(self, points: Sequence[Point], colour: np.ndarray) -> None:
        ink = tuple(int(255 * value) for value in np.clip(colour, 0, 1))
        self.canvas.polygon([(x * self.width, y * self.height) for x, y in points], fill=ink)

    def box(self, left: float, top: float, right: float, bottom: float, colour: np.ndarray) -> None:
        self.polygon(((left, top), (right, top), (right, bottom), (left, bottom)), colour)

    def finished(self, fine: float, coarse: float, stretch: tuple[int, int]) -> np.ndarray:
        """The picture ``(H, W, 3)`` with the ground's texture; ``stretch``: how many coarse cells there are."""
        size = (self.height, self.width)
        texture = 1 + fine * self.rng.standard_normal(size) + coarse * (_field(self.rng, size, stretch, -1, 1))
        below = (np.arange(self.height)[:, None] > self.horizon * self.height) * 0.85 + 0.15
        picture = np.asarray(self.paper, dtype=np.float64) / 255
        return np.asarray(np.clip(picture * (1 + (texture - 1) * below)[..., None], 0.02, 0.98))


def _sea(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ground = _Ground(size, rng, (0.24, 0.42, 0.56), (0.55, 0.68, 0.82))
    crest = _around(rng, (0.5, 0.64, 0.72))
    for _ in range(int(rng.integers(8, 24))):
        x, y, wide = rng.uniform(-0.1, 1), rng.uniform(ground.horizon + 0.02, 1), rng.uniform(0.05, 0.25)
        ground.box(x, y, x + wide, y + 0.018, crest)
    return ground.finished(0.03, 0.18, (24, 4))


def _desert(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ground = _Ground(size, rng, (0.80, 0.66, 0.44), (0.62, 0.74, 0.86))
    for _ in range(int(rng.integers(2, 5))):
        x, y = rng.uniform(0, 1), rng.uniform(ground.horizon, 0.9)
        wide, high = rng.uniform(0.3, 0.7), rng.uniform(0.05, 0.2)
        sand = _around(rng, (0.76, 0.6, 0.38))
        ground.polygon(((x - wide, y + 0.05), (x, y - high), (x + 0.6 * wide, y + 0.05)), sand)
        ground.polygon(((x, y - high), (x + 0.6 * wide, y + 0.05), (x - 0.1 * wide, y + 0.05)), 0.82 * sand)
    return ground.finished(0.05, 0.1, (6, 5))


def _forest(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ground = _Ground(size, rng, (0.30, 0.30, 0.18), (0.30, 0.42, 0.26))
    for _ in range(int(rng.integers(6, 12))):
        x, wide, foot = rng.uniform(-0.05, 1.05), rng.uniform(0.02, 0.08), rng.uniform(ground.horizon, 0.8)
        ground.box(x, -0.1, x + wide, foot, _around(rng, (0.30, 0.22, 0.16)))
    for _ in range(int(rng.integers(8, 18))):
        x, y, r = rng.uniform(0, 1), rng.uniform(-0.05, ground.horizon + 0.05), rng.uniform(0.05, 0.14)
        angles = np.linspace(0, 2 * math.pi, 9)[:-1]
        reach = r * rng.uniform(0.7, 1.2, len(angles))
        leaves = [(x + far * math.cos(a), y + far * math.sin(a)) for a, far in zip(angles, reach, strict=True)]
        ground.polygon(leaves, _around(rng, (0.22, 0.38, 0.16), 0.06))
    return ground.finished(0.12, 0.3, (12, 12))


def _city(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ground = _Ground(size, rng, (0.42, 0.42, 0.44), (0.66, 0.72, 0.78))
    x = -rng.uniform(0, 0.15)
    while x < 1:
        wide, top = rng.uniform(0.12, 0.3), rng.uniform(-0.05, ground.horizon - 0.08)
        wall = _around(rng, (0.58, 0.50, 0.46), 0.09)
        ground.box(x, top, x + wide - 0.01, ground.horizon + 0.06, wall)
        step = rng.uniform(0.05, 0.08)
        for row in np.arange(top + 0.03, ground.horizon, step).tolist():
            for column in np.arange(x + 0.02, x + wide - 0.05, step).tolist():
                ground.box(column, row, column + step / 2, row + step / 2, 0.5 * wall)
        x += wide
    ground.box(0, ground.horizon + 0.06, 1, ground.horizon + 0.12, _around(rng, (0.56, 0.55, 0.53)))
    if rng.random() < 0.7:
        at = rng.uniform(ground.horizon + 0.2, 0.9)
        for x in np.arange(rng.uniform(-0.2, 0), 1, 0.25).tolist():
            ground.box(x, at, x + 0.12, at + 0.025, np.array((0.8, 0.8, 0.76)))
    return ground.finished(0.05, 0.05, (5, 5))


def _snow(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ground = _Ground(size, rng, (0.86, 0.88, 0.92), (0.68, 0.74, 0.82))
    for _ in range(int(rng.integers(1, 4))):
        x, wide, top = rng.uniform(0, 1), rng.uniform(0.2, 0.5), ground.horizon - rng.uniform(0.08, 0.25)
        rock = _around(rng, (0.56, 0.60, 0.68))
        ground.polygon(((x - wide, ground.horizon), (x, top), (x + wide, ground.horizon)), rock)
        ground.polygon(((x - wide * 0.35, top + 0.06), (x, top), (x + wide * 0.35, top + 0.06)), np.array((0.92,) * 3))
    for _ in range(int(rng.integers(0, 6))):
        x, foot, high = rng.uniform(0, 1), rng.uniform(ground.horizon, 0.7), rng.uniform(0.1, 0.25)
        fir = _around(rng, (0.2, 0.3, 0.28))
        ground.polygon(((x - 0.35 * high, foot), (x, foot - high), (x + 0.35 * high, foot)), fir)
    return ground.finished(0.02, 0.07, (6, 4))


def _meadow(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ground = _Ground(size, rng, (0.44, 0.58, 0.26), (0.52, 0.68, 0.86))
    for _ in range(int(rng.integers(1, 4))):
        x, wide, high = rng.uniform(0, 1), rng.uniform(0.2, 0.6), rng.uniform(0.03, 0.1)
        angles = np.linspace(math.pi, 2 * math.pi, 9)
        hill = [(x + wide * math.cos(a), ground.horizon + 0.01 + high * math.sin(a)) for a in angles]
        ground.polygon(hill, _around(rng, (0.36, 0.52, 0.28)))
    post = _around(rng, (0.42, 0.34, 0.24))
    if rng.random() < 0.6:
        at = ground.horizon + rng.uniform(0.03, 0.12)
        ground.box(0, at, 1, at + 0.016, post)
        for x in np.arange(rng.uniform(0, 0.15), 1, 0.16).tolist():
            ground.box(x, at - 0.03, x + 0.02, at + 0.07, post)
    return ground.finished(0.09, 0.12, (14, 8))


_CONTEXTS = (_sea, _desert, _forest, _city, _snow, _meadow)


def _context(context: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A context ``(H, W, 3)`` from 0 to 1 without a thing in it."""
    return _CONTEXTS[context](size, rng)
