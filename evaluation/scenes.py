"""Street scenes drawn by a program, with exact labels: data that is always there.

The world is flat and measured in metres: x to the right of the road's middle, y above the ground, z ahead. Every
shape is projected by one pinhole and drawn once, on a canvas of four bands: three of colour and one that holds the
class. So a label cannot disagree with its pixels. Things are where they belong (cars on the road, people on the
pavement, sky above roofs), while their local look is shared (grey walls, grey road, grey clouds; trunks and poles;
a shop's board and a sign), so a model gains by looking at the context, as it does on photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from evaluation.frames import CAMVID_CLASSES, CAMVID_COLORS, IGNORE_INDEX, Frame

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
#: Contrast of the fine (pixel) and coarse (3 × 3 pixels) texture of each class.
_FINE = np.array([0.4, 1.3, 0.6, 1.2, 1.4, 3.0, 0.6, 1.5, 0.6, 1.0, 1.0], dtype=np.float32) / 100
_COARSE = np.array([0.5, 2.0, 0.5, 1.4, 2.2, 6.0, 0.3, 2.5, 0.5, 1.0, 1.0], dtype=np.float32) / 100
_SUPERSAMPLING = 2  # the canvas is drawn larger and averaged: smooth edges, as a lens makes them
_FAR = 90.0  # metres

Colour = tuple[float, float, float]
Point = tuple[float, float]

_WALLS: tuple[Colour, ...] = (
    (164, 96, 74), (188, 164, 132), (152, 148, 142), (204, 192, 168), (126, 98, 84), (172, 118, 88), (122, 128, 134),
    (212, 178, 128), (142, 152, 140), (186, 188, 190), (96, 92, 96), (178, 138, 118),
)  # fmt: skip
_CARS: tuple[Colour, ...] = (
    (178, 30, 34), (28, 52, 120), (22, 24, 28), (222, 222, 220), (150, 154, 160), (84, 88, 94), (34, 88, 66),
    (206, 164, 42), (120, 38, 56), (96, 136, 176),
)  # fmt: skip
_CLOTHES: tuple[Colour, ...] = (
    (34, 36, 52), (160, 40, 44), (216, 212, 204), (52, 84, 132), (90, 90, 92), (60, 92, 58), (214, 150, 42),
    (120, 84, 62), (146, 82, 132), (24, 24, 26),
)  # fmt: skip
_SIGNS: tuple[tuple[Colour, Colour], ...] = (
    ((196, 32, 36), (240, 238, 232)), ((28, 78, 168), (236, 238, 240)), ((242, 196, 30), (30, 30, 30)),
    ((236, 236, 230), (190, 34, 36)), ((30, 112, 70), (232, 234, 228)),
)  # fmt: skip


class _World:
    """A pinhole camera over flat ground, the light, and the canvas that both draw on."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.rng = rng
        self.height, self.width = size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING
        self.eye = rng.uniform(1.35, 1.9)  # metres above the ground
        self.focal = self.width * rng.uniform(0.72, 0.95)
        self.horizon = self.height * rng.uniform(0.43, 0.53)
        self.centre = self.width * rng.uniform(0.4, 0.6)
        self.x = 0.0  # metres to the right of the middle of the road
        self.bend = rng.uniform(-1, 1) ** 3 * 0.004  # metres sideways for each square metre ahead
        dusk = rng.random()
        self.sun = rng.choice((-1.0, 1.0))  # the side that the light comes from
        self.contrast = rng.uniform(0.04, 0.3)  # between lit and shaded walls
        if dusk < 0.5:  # a clear day
            self.zenith, self.haze = (92.0, 142.0, 204.0), (206.0, 220.0, 232.0)
        elif dusk < 0.85:  # overcast
            self.zenith, self.haze = (168.0, 174.0, 182.0), (214.0, 214.0, 212.0)
        else:  # a low sun
            self.zenith, self.haze = (104.0, 118.0, 158.0), (240.0, 200.0, 160.0)
        self.reach = rng.uniform(60, 240)  # metres in which haze takes two thirds of a colour
        self.image = Image.new("RGBA", (self.width, self.height))
        self.pen = ImageDraw.Draw(self.image)

    def pixel(self, x: float, y: float, z: float) -> Point:
        return (
            self.centre + self.focal * ((x - self.x) / z + self.bend * z),
            self.horizon + self.focal * (self.eye - y) / z,
        )

    def ink(self, colour: Colour, z: float, label: int) -> tuple[int, int, int, int]:
        clear = math.exp(-z / self.reach)
        r = int(colour[0] * clear + self.haze[0] * (1 - clear))
        g = int(colour[1] * clear + self.haze[1] * (1 - clear))
        b = int(colour[2] * clear + self.haze[2] * (1 - clear))
        if not (0 <= r <= 255 and 0 <= g <= 255 and 0 <= b <= 255):
            r, g, b = min(255, max(0, r)), min(255, max(0, g)), min(255, max(0, b))
        return r, g, b, label

    def polygon(self, points: Sequence[tuple[float, float, float]], colour: Colour, label: int) -> None:
        self.pen.polygon([self.pixel(*p) for p in points], fill=self.ink(colour, points[0][2], label))

    def upright(self, x0: float, x1: float, y0: float, y1: float, z: float, colour: Colour, label: int) -> None:
        """A rectangle that faces the camera."""
        self.polygon(((x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)), colour, label)

    def wall(self, x: float, z0: float, z1: float, y0: float, y1: float, colour: Colour, label: int) -> None:
        """A rectangle along the street."""
        self.polygon(((x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)), colour, label)

    def ground(self, x0: float, x1: float, z0: float, z1: float, colour: Colour, label: int) -> None:
        """A rectangle on the ground, cut where it bends."""
        steps, ratio = (1, z1 / z0) if z1 < 2.5 * z0 else (8, (z1 / z0) ** 0.125)
        cuts = [z0 * ratio**i for i in range(steps + 1)]
        near = [self.pixel(x0, 0, z) for z in cuts]
        away = [self.pixel(x1, 0, z) for z in reversed(cuts)]
        self.pen.polygon(near + away, fill=self.ink(colour, min(z0 + 4, _FAR), label))

    def ball(
        self, x: float, y: float, z: float, across: float, up: float, colour: Colour, label: int, rim: float = 0.0
    ) -> None:
        """An ellipse with the given radii in metres; only its rim of that many metres where ``rim`` is not zero."""
        u, v = self.pixel(x, y, z)
        scale = self.focal / z
        box = (u - across * scale, v - up * scale, u + across * scale, v + up * scale)
        ink = self.ink(colour, z, label)
        if rim:
            self.pen.ellipse(box, outline=ink, width=max(1, round(rim * scale)))
        else:
            self.pen.ellipse(box, fill=ink)


def _shade(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _vary(rng: np.random.Generator, colour: Colour, spread: float = 14) -> Colour:
    r, g, b, grey = rng.normal(0, spread, 4).tolist()
    return colour[0] + r / 2 + grey, colour[1] + g / 2 + grey, colour[2] + b / 2 + grey


def _pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    return _vary(rng, colours[int(rng.integers(len(colours)))])


def _stretch(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A few float32 cells as a smooth field of the given size."""
    return np.asarray(Image.fromarray(cells).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _sky(world: _World) -> None:
    """A vertical gradient with clouds: smooth noise of a few cells, thresholded softly."""
    rng, rows = world.rng, max(2, int(world.horizon) + 2)
    along = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** 1.3
    sky = np.asarray(world.zenith, np.float32) * (1 - along) + np.asarray(world.haze, np.float32) * along
    cells = _stretch(rng.random((5, 7), dtype=np.float32), (rows, world.width))
    cloud = np.clip((cells - rng.uniform(0.3, 0.8)) * 2.5, 0, 1)[..., None] * rng.uniform(0.3, 0.95)
    sky = sky * (1 - cloud) + rng.uniform(190, 250) * cloud
    paper = np.full((rows, world.width, 4), SKY, dtype=np.uint8)
    paper[..., :3] = np.clip(sky, 0, 255)
    world.image.paste(Image.fromarray(paper, "RGBA"), (0, 0))


def _skyline(world: _World) -> None:
    """What closes the street at the far end: roofs and tree tops in the haze."""
    rng, z = world.rng, _FAR
    span = world.width / world.focal * z
    x = -span
    while x < span:
        wide = rng.uniform(6, 18)
        if rng.random() < 0.6:
            world.upright(x, x + wide, 0, rng.uniform(6, 17), z, _pick(rng, _WALLS), BUILDING)
        else:
            tall = rng.uniform(3, 8)
            world.ball(x + wide / 2, tall * 0.5, z, wide * 0.7, tall, _vary(rng, (64, 88, 48)), TREE)
        x += wide * rng.uniform(0.6, 1.0)


def _street(world: _World, half: float, kerb: float) -> None:
    """Pavement everywhere, the road on it, lane markings on the road."""
    rng = world.rng
    grey = rng.uniform(78, 128)
    road: Colour = (grey * rng.uniform(0.96, 1.04), grey, grey * rng.uniform(0.97, 1.08))
    light = grey + rng.uniform(8, 66)
    pave: Colour = (light * rng.uniform(1.0, 1.08), light, light * rng.uniform(0.88, 1.0))
    world.pen.rectangle((0, world.horizon, world.width, world.height), fill=world.ink(pave, _FAR * 0.5, PAVEMENT))
    world.ground(-60, 60, 1, _FAR, pave, PAVEMENT)
    for side in (-1, 1):  # joints between the slabs
        for z in np.arange(2.5, 16, rng.uniform(0.9, 1.6)).tolist():
            world.ground(side * half, side * (half + kerb), z, z + 0.07, _shade(pave, 0.86), PAVEMENT)
        world.ground(side * half, side * (half + 0.22), 1, _FAR, _shade(pave, rng.uniform(0.75, 1.15)), PAVEMENT)
    world.ground(-half, half, 1, _FAR, road, ROAD)
    for _ in range(int(rng.integers(0, 4))):  # mended asphalt
        x, z = rng.uniform(-half, half * 0.6), rng.uniform(3, 25)
        patch = min(half, x + rng.uniform(0.6, 2.5))
        world.ground(x, patch, z, z + rng.uniform(1, 6), _shade(road, rng.uniform(0.82, 1.12)), ROAD)
    paint = _shade((232, 230, 222), rng.uniform(0.75, 1.0))
    lanes = (-half / 2, 0.0, half / 2) if half > 4.6 else (0.0,)
    for x in lanes:
        start = rng.uniform(0, 5)
        for z in np.arange(1.5 + start, 60, rng.uniform(5, 8)).tolist():
            world.ground(x - 0.08, x + 0.08, z, z + 2.6, paint, ROAD)
    if rng.random() < 0.6:
        for side in (-1, 1):
            world.ground(side * (half - 0.35), side * (half - 0.22), 1, _FAR, paint, ROAD)
    if rng.random() < 0.25:  # a crossing
        z = rng.uniform(5, 18)
        for x in np.arange(-half + 0.4, half - 0.4, 0.9).tolist():
            world.ground(x, x + 0.48, z, z + 2.8, paint, ROAD)


def _house(world: _World, side: float, x: float, z0: float, z1: float) -> None:
    """A block along the street: a wall with windows, a front that faces the camera, a shop or a door."""
    rng = world.rng
    colour, tall = _pick(rng, _WALLS), rng.uniform(5, 17)
    lit = 1 + world.contrast * (1 if side == -world.sun else -1)
    deep = x + side * rng.uniform(9, 16)
    world.upright(x, deep, 0, tall, z0, _shade(colour, 1.04 if lit < 1 else 0.9), BUILDING)
    storey, bay = rng.uniform(2.7, 3.5), rng.uniform(2.2, 3.6)
    glass = _vary(rng, (64, 76, 92) if rng.random() < 0.75 else (168, 184, 198), 12)
    floors = range(int((tall - 0.6) // storey))
    for row in floors:
        for x0 in np.arange(0.8, abs(deep - x) - 1, bay).tolist():
            left, low = x + side * x0, row * storey + 0.9
            world.upright(left, left + side * bay * 0.5, low, low + storey * 0.5, z0, _shade(glass, 0.9), BUILDING)
    world.wall(x, z0, z1, 0, tall, _shade(colour, lit), BUILDING)
    world.wall(x, z0, z1, tall - 0.5, tall, _shade(colour, lit * 0.78), BUILDING)
    if z0 < 30:  # farther windows would be thinner than a pixel
        for row in floors:
            low = row * storey + (0.9 if row else 0.5)
            for z in np.arange(z0 + 0.7, min(z1 - bay * 0.5, 40), bay).tolist():
                pane = _shade(glass, rng.uniform(0.8, 1.2))
                world.wall(x, z, z + bay * 0.5, low, low + storey * (0.52 if row else 0.62), pane, BUILDING)
    if rng.random() < 0.4:  # a shop's board: a sign's look, a building's place
        board, edge = _SIGNS[int(rng.integers(len(_SIGNS)))]
        world.wall(x, z0 + 0.5, z1 - 0.5, storey * 0.86, storey * 1.08, _shade(board, 0.85), BUILDING)
        world.wall(x, z0 + 1.2, z1 - 1.2, storey * 0.93, storey * 1.01, edge, BUILDING)


def _tree(world: _World, x: float, z: float, small: bool = False) -> None:
    rng = world.rng
    leaf = _vary(rng, (72, 104, 46), 16) if rng.random() < 0.85 else _vary(rng, (138, 108, 50), 16)
    tall = rng.uniform(0.6, 1.4) if small else rng.uniform(3.6, 7.5)
    if not small:
        world.upright(x - 0.14, x + 0.14, 0, tall * 0.7, z, _vary(rng, (84, 72, 60)), TREE)
    spread = tall * rng.uniform(0.28, 0.42) * (1.5 if small else 1)
    middle = tall * (0.5 if small else 0.72)
    world.ball(x, middle, z, spread * 0.7, spread * 0.6, leaf, TREE)
    for dx, dy, wide, light in rng.normal(0, 0.5, (3 if small else 9 if z < 20 else 5, 4)).clip(-1, 1).tolist():
        size = spread * min(0.8, max(0.4, 0.58 + 0.2 * wide))
        light = 1 + 0.24 * dy + 0.1 * dx * world.sun + 0.12 * light
        at = max(size * 0.8, middle + dy * spread * 0.7)
        world.ball(x + dx * spread, at, z, size, size * 0.85, _shade(leaf, light), TREE)


def _fence(world: _World, x: float, z0: float, z1: float) -> None:
    rng = world.rng
    tall = rng.uniform(0.9, 1.9)
    colour = _vary(rng, ((122, 92, 62), (150, 152, 152), (70, 74, 76), (190, 186, 176))[int(rng.integers(4))])
    world.wall(x, z0, z1, 0, tall, colour, FENCE)
    for z in np.arange(z0, min(z1, 30), rng.uniform(0.35, 1.0)).tolist():
        world.wall(x, z, z + 0.12, 0, tall, _shade(colour, 0.66), FENCE)
    world.wall(x, z0, z1, tall * 0.86, tall, _shade(colour, 1.14), FENCE)


def _pole(world: _World, x: float, z: float) -> None:
    """A lamp, a road sign or a traffic light at the kerb."""
    rng, side = world.rng, math.copysign(1, x)
    colour = _vary(rng, (96, 98, 100), 18)
    kind = rng.random()
    tall = rng.uniform(5.5, 8) if kind < 0.4 else rng.uniform(2.4, 3.4)
    world.upright(x - 0.075, x + 0.075, 0, tall, z, colour, POLE)
    if kind < 0.4:  # a lamp, its arm over the road
        world.upright(x, x - side * 1.5, tall - 0.14, tall, z, colour, POLE)
        world.upright(x - side * 1.1, x - side * 1.7, tall - 0.24, tall - 0.06, z, _shade(colour, 1.3), POLE)
    elif kind < 0.85:
        face, edge = _SIGNS[int(rng.integers(len(_SIGNS)))]
        size, shape = rng.uniform(0.34, 0.48), rng.random()
        if shape < 0.45:
            world.ball(x, tall, z, size, size, face, SIGN)
            world.ball(x, tall, z, size * 0.6, size * 0.6, edge, SIGN)
        elif shape < 0.7:
            for part, paint in ((1.15, face), (0.6, edge)):
                r = size * part
                world.polygon(((x - r, tall - r * 0.8, z), (x + r, tall - r * 0.8, z), (x, tall + r, z)), paint, SIGN)
        else:
            world.upright(x - size * 1.4, x + size * 1.4, tall - size, tall + size, z, face, SIGN)
            world.upright(x - size * 1.0, x + size * 1.0, tall - size * 0.3, tall + size * 0.3, z, edge, SIGN)
    else:
        world.upright(x - 0.22, x + 0.22, tall - 0.2, tall + 0.95, z, (34, 36, 36), SIGN)
        on = int(rng.integers(3))
        for i, lamp in enumerate(((220, 50, 40), (230, 170, 40), (60, 200, 90))):
            world.ball(x, tall + 0.75 - 0.37 * i, z, 0.13, 0.13, _shade(lamp, 1.0 if i == on else 0.3), SIGN)


def _car(world: _World, x: float, z: float) -> None:
    """A car seen from behind or from the front, with the flank that the camera sees."""
    rng = world.rng
    colour, length = _pick(rng, _CARS), rng.uniform(3.8, 4.8)
    half, belt, roof = rng.uniform(0.82, 0.95), rng.uniform(0.82, 1.0), rng.uniform(1.38, 1.6)
    if rng.random() < 0.15:  # a van
        belt, roof, half = 1.2, rng.uniform(1.9, 2.4), 1.0
    away = rng.random() < 0.65
    glass, dark = _vary(rng, (52, 62, 74), 8), (22, 22, 24)
    world.ground(x - half * 1.06, x + half * 1.06, z - 0.2, z + length, (42, 42, 46), ROAD)  # its shadow
    flank = x - half if x > world.x else x + half
    lean = 0.2 * math.copysign(1, x - flank)
    lit = 1 + world.contrast * (1 if (flank > x) == (world.sun > 0) else -1)
    rear = z + length
    world.wall(flank, z, rear, 0.28, belt, _shade(colour, lit * 0.92), CAR)
    sill, eaves = belt - 0.03, flank + lean
    world.polygon(
        ((flank, sill, z + 0.3), (flank, sill, rear - 0.9), (eaves, roof, rear - 1.5), (eaves, roof, z + 0.7)),
        _shade(glass, 1.2), CAR,
    )  # fmt: skip
    for at in (z + 0.8, rear - 0.8):
        world.wall(flank, at - 0.3, at + 0.3, 0, 0.6, dark, CAR)
    for side in (-1, 1):
        world.upright(x + side * half, x + side * (half - 0.24), 0, 0.4, z, dark, CAR)
    world.upright(x - half, x + half, 0.26, belt, z, colour, CAR)
    world.polygon(
        ((x - half, sill, z), (x + half, sill, z), (x + half, belt, z + 0.5), (x - half, belt, z + 0.5)),
        _shade(colour, 1.15), CAR,
    )  # fmt: skip
    for inset, low, high, paint in ((0.0, belt, roof, _shade(colour, 1.08)), (0.08, belt + 0.04, roof - 0.1, glass)):
        wide, top = half - 0.04 - inset, half - 0.2 - inset
        world.polygon(
            ((x - wide, low, z + 0.3), (x + wide, low, z + 0.3), (x + top, high, z + 0.7), (x - top, high, z + 0.7)),
            paint, CAR,
        )  # fmt: skip
    lamp: Colour = (206, 34, 30) if away else (250, 246, 220)
    for side in (-1, 1):
        world.upright(x + side * half, x + side * (half - 0.26), belt - 0.28, belt - 0.1, z, lamp, CAR)
    world.upright(x - 0.26, x + 0.26, 0.42, 0.54, z, (226, 222, 196) if away else (234, 234, 230), CAR)
    world.upright(x - half, x + half, 0.26, 0.38, z, _shade(colour, 0.55), CAR)


def _body(world: _World, x: float, z: float, foot: float, tall: float, label: int) -> None:
    """Legs, coat and head from ``foot`` metres up; people and riders share it."""
    rng = world.rng
    coat, trousers = _pick(rng, _CLOTHES), _shade(_pick(rng, _CLOTHES), 0.7)
    skin = _shade((226, 178, 148), rng.uniform(0.4, 1.05))
    hip, neck, stride = foot + tall * 0.46, foot + tall * 0.84, rng.uniform(0, 0.22)
    for side in (-1, 1):
        at = x + side * stride
        leg = ((x, hip, z), (x + side * 0.17, hip, z), (at + side * 0.1, foot, z), (at, foot, z))
        world.polygon(leg, trousers, label)
    world.polygon(
        ((x - 0.19, hip - 0.08, z), (x + 0.19, hip - 0.08, z), (x + 0.23, neck - 0.06, z), (x, neck + 0.04, z),
         (x - 0.23, neck - 0.06, z)), coat, label,
    )  # fmt: skip
    for side in (-1, 1):
        world.upright(x + side * 0.2, x + side * 0.3, hip - 0.02, neck - 0.08, z, _shade(coat, 0.86), label)
    world.ball(x, foot + tall * 0.925, z, 0.115, 0.14, skin, label)
    world.ball(x, foot + tall * 0.96, z, 0.12, 0.09, _shade((70, 50, 36), rng.uniform(0.3, 1.4)), label)


def _pedestrian(world: _World, x: float, z: float) -> None:
    _body(world, x, z, 0.0, world.rng.uniform(1.5, 1.88), PEDESTRIAN)


def _bicyclist(world: _World, x: float, z: float) -> None:
    rng = world.rng
    frame, turn = _pick(rng, _CARS), rng.uniform(0.1, 0.9)  # sine of the angle between the bicycle and the street
    reach = 0.52 * turn
    for end in (-reach, reach):
        world.ball(x + end, 0.34, z, max(0.07, 0.34 * turn), 0.34, (26, 26, 28), BICYCLIST, rim=0.07)
    corners = ((-1, 0.34), (0, 0.42), (1, 0.34), (0.7, 0.9), (-0.4, 0.86))
    world.polygon([(x + reach * along, up, z) for along, up in corners], frame, BICYCLIST)
    _body(world, x, z, 0.3, rng.uniform(1.35, 1.5), BICYCLIST)
    world.upright(x + reach * 0.6 - 0.24, x + reach * 0.6 + 0.24, 0.98, 1.05, z, (30, 30, 32), BICYCLIST)


def _compose(world: _World) -> None:
    """Background, then everything that stands, the farthest first."""
    rng = world.rng
    half, kerb = rng.uniform(2.9, 5.4), rng.uniform(2.0, 4.4)
    world.x = rng.uniform(-0.7, 0.7) * half
    _sky(world)
    _skyline(world)
    _street(world, half, kerb)
    standing: list[tuple[float, Callable[[], None]]] = []

    def stand(z: float, draw: Callable[..., None], *at: float) -> None:
        standing.append((z, lambda: draw(world, *at)))

    for side in (-1.0, 1.0):
        edge, z = side * (half + kerb), rng.uniform(1.2, 6)
        built = rng.choice((0.35, 0.7, 0.95))  # a park, a suburb, a town
        while z < _FAR:
            end = z + rng.uniform(7, 18)
            if rng.random() < built:
                garden = rng.uniform(0, 4) if built < 0.8 else 0.0
                stand(end, _house, side, edge + side * garden, z, end - rng.uniform(0, 1.5))
            else:
                for at in np.arange(z, end, rng.uniform(3.5, 6)).tolist():
                    stand(at, _tree, edge + side * rng.uniform(1.2, 6), at)
                if rng.random() < 0.5:
                    for at in np.arange(z, min(end, 40), 1.8).tolist():
                        stand(at, _tree, edge + side * rng.uniform(0.6, 1.6), at, True)
            if rng.random() < (0.22 if built > 0.8 else 0.55):
                stand(end - 0.01, _fence, edge, z, end)
            z = end
        for at in np.arange(rng.uniform(4, 14), 60, rng.uniform(9, 22)).tolist():
            stand(at, _pole, side * (half + rng.uniform(0.3, 0.7)), at)
        if rng.random() < 0.4:  # an avenue
            for at in np.arange(rng.uniform(5, 12), 60, rng.uniform(8, 14)).tolist():
                stand(at, _tree, side * (half + 0.9), at)
        if rng.random() < 0.55:  # cars parked at the kerb
            at = rng.uniform(3, 16)
            while at < 60:
                stand(at, _car, side * (half - 1.05), at)
                at += rng.uniform(5.6, 17)
        for _ in range(int(rng.integers(0, 5))):
            at = rng.uniform(3.5, 1 + 29 * rng.random() ** 0.5 + 3.5)
            stand(at, _pedestrian, side * (half + rng.uniform(0.5, kerb)), at)
    ahead = rng.uniform(6, 26)
    for lane in (-0.45, 0.45):
        at = ahead if lane > 0 else rng.uniform(6, 26)
        while at < 70:
            if rng.random() < 0.55:
                stand(at, _car, lane * half * rng.uniform(0.75, 1.05), at)
            at += rng.uniform(8, 26)
    for _ in range(int(rng.choice((0, 1, 1, 2)))):
        at = rng.uniform(4, 22)
        stand(at, _bicyclist, rng.choice((-1.0, 1.0)) * (half - rng.uniform(0.5, 1.6)), at)
    if rng.random() < 0.2:
        at = rng.uniform(6, 16)
        stand(at, _pedestrian, rng.uniform(-half, half), at)
    for _, draw in sorted(standing, key=lambda item: -item[0]):
        draw()
    if rng.random() < 0.3:  # the bonnet of the car that carries the camera: no class, as in Cityscapes
        rise, grey = world.height * rng.uniform(0.03, 0.09), int(rng.uniform(20, 120))
        box = (-0.1 * world.width, world.height - rise, 1.1 * world.width, world.height + 3 * rise)
        world.pen.ellipse(box, fill=(grey, grey, grey + 6, IGNORE_INDEX))


def _develop(world: _World, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Canvas → image ``(H, W, 3)`` in ``[0, 1]`` and labels ``(H, W)``: averaging, texture, light, noise."""
    rng, (height, width) = world.rng, size
    label = np.asarray(world.image.getchannel("A"))[1::_SUPERSAMPLING, 1::_SUPERSAMPLING]
    image = np.asarray(world.image.convert("RGB").reduce(_SUPERSAMPLING), dtype=np.float32) / 255
    kind = np.where(label == IGNORE_INDEX, CAR, label)
    coarse = _stretch(rng.standard_normal((height // 3 + 1, width // 3 + 1), dtype=np.float32), size)
    fine = rng.standard_normal((height, width), dtype=np.float32)
    texture = 1 + 1.8 * _FINE[kind] * fine + 1.8 * _COARSE[kind] * coarse
    light = _stretch(rng.uniform(0.86, 1.1, (3, 4)).astype(np.float32), size)
    cast = (rng.uniform(0.82, 1.12) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    image *= (texture * light)[..., None] * cast
    image += rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(0.004, 0.02))
    np.clip(image, 0, 1, out=image)
    return image ** np.float32(rng.uniform(0.85, 1.2)), label


class StreetScenes:
    """Drawn street scenes in CamVid's eleven classes; scene ``i`` depends on ``(seed, size, i)`` only.

    Args:
        length: number of scenes; a longer set begins with the scenes of a shorter one.
        size: ``(height, width)`` in pixels.
        seed: another seed, other scenes; ``load_data("scenes")`` is seed 0. Another size has other scenes too, so that
            a model trained on large ones and scored on small ones has seen none of them.

    Shape:
        ``scenes[i]`` is a ``Frame``: image float32 ``(3, H, W)`` in ``[0, 1]``, label int64 ``(H, W)`` with classes
        0–10, and 255 (the bonnet of the camera's own car) where nothing counts.

    Raises:
        ValueError: a length below 1, or a side below 32 pixels.
    """

    def __init__(self, length: int, size: tuple[int, int] = (96, 128), seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length={length}: at least one scene")
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"size={size}: (height, width), each at least 32 pixels")
        if seed < 0:
            raise ValueError(f"seed={seed}: 0 or more")
        self.length, self.size, self.seed = length, (int(size[0]), int(size[1])), seed
        self.classes: Sequence[str] = CAMVID_CLASSES
        self.colors: Sequence[tuple[int, int, int]] = CAMVID_COLORS

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Frame:
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        index %= self.length
        world = _World(self.size, np.random.default_rng((self.seed, *self.size, index)))
        _compose(world)
        image, label = _develop(world, self.size)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return Frame(pixels, torch.from_numpy(label.astype(np.int64)), f"scene-{self.seed}-{index:05d}")

    def __repr__(self) -> str:
        return f"StreetScenes(length={self.length}, size={self.size}, seed={self.seed})"
