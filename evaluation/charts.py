"""Charts as shapes: where lines, markers and ticks of an SVG go. A template draws them (``page/charts.html``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Size of a chart and the margins of its plot, in the units of the SVG.
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 44
#: Looks in the order in which they are given away: a line's dashes, and a marker's shape around (0, 0).
DASHES = ("", "7 4", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2")
MARKERS = (
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z", "M-3.6-3.6H3.6V3.6H-3.6Z", "M0-4.8L4.6 3.6H-4.6Z", "M0-5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6-3.6H-4.6Z", "M-4-1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4Z",
)  # fmt: skip
#: Around a point that has a marker of its own already.
RING = "M-8 0A8 8 0 1 0 8 0A8 8 0 1 0 -8 0ZM-6.2 0A6.2 6.2 0 1 1 6.2 0A6.2 6.2 0 1 1 -6.2 0Z"
#: How many colours the style sheet has for lines.
COLOURS = 6


@dataclass(frozen=True)
class Datum:
    """One measured point: x, y, and the interval of y (NaN where there is none)."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    label: str = ""


@dataclass(frozen=True)
class Look:
    """How a series is told from the others: by colour, dashes and marker; ``joined``: whether it is a line at all."""

    colour: int
    dash: str
    marker: str
    joined: bool = True

    @classmethod
    def of(cls, colour: int, shape: int) -> Look:
        """The looks of those numbers; beyond the last one they begin again."""
        return cls(colour % COLOURS, DASHES[shape % len(DASHES)], MARKERS[shape % len(MARKERS)])


@dataclass(frozen=True)
class Mark:
    """A drawn point: its place, the ends of its interval (None: it has none), and its words."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Line:
    """A series, drawn."""

    name: str
    look: Look
    marks: Sequence[Mark]
    path: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart; ticks are (place, text)."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[tuple[str, Look, Sequence[Datum]]]
) -> Chart:
    """Shares, 0 to 1, over a quantity: one line for each series, in percent from 0 upwards.

    The quantity's axis is logarithmic where it is positive and spans more than a factor of 5; its ticks are the values
    that were measured.
    """
    values = sorted({datum.x for _, _, data in series for datum in data})
    logarithmic = bool(values) and values[0] > 0 and values[-1] > 5 * values[0]
    across = _scale([math.log(v) for v in values] if logarithmic else values, LEFT + 12, WIDTH - RIGHT - 12)
    highest = max((h for _, _, data in series for d in data for h in (d.y, d.high) if not math.isnan(h)), default=1.0)
    steps = nice_ticks(0.0, max(highest, 0.02))
    down = _scale([steps[0], steps[-1]], HEIGHT - BOTTOM, TOP)
    lines = [
        Line(name, look, *_drawn(data, lambda x: across(math.log(x) if logarithmic else x), down, look.joined))
        for name, look, data in series
    ]
    x_ticks = _without_collisions([(across(math.log(v) if logarithmic else v), f"{v:g}") for v in values])
    return Chart(title, x_label, y_label, x_ticks, [(down(v), f"{100 * v:g}") for v in steps], lines)


def scatter(title: str, x_label: str, y_label: str, series: Sequence[tuple[str, Look, Sequence[Datum]]]) -> Chart:
    """Shares against shares, 0 to 1, in percent; the axes hold what there is. Lines go from left to right."""
    points = [datum for _, _, data in series for datum in data]
    x_steps = nice_ticks(min((d.x for d in points), default=0.0), max((d.x for d in points), default=1.0))
    y_steps = nice_ticks(min((d.y for d in points), default=0.0), max((d.y for d in points), default=1.0))
    across = _scale([x_steps[0], x_steps[-1]], LEFT + 8, WIDTH - RIGHT - 12)
    down = _scale([y_steps[0], y_steps[-1]], HEIGHT - BOTTOM - 6, TOP + 4)
    lines = [Line(name, look, *_drawn(data, across, down, look.joined)) for name, look, data in series]
    x_ticks = _without_collisions([(across(v), f"{100 * v:g}") for v in x_steps])
    return Chart(title, x_label, y_label, x_ticks, [(down(v), f"{100 * v:g}") for v in y_steps], lines)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Evenly spaced round numbers that hold both ends, at most ``most`` intervals between them."""
    if high - low < 1e-9:
        low, high = low - 0.005, high + 0.005
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1, 2, 2.5, 5, 10, 20, 25):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [round(step * number, 10) for number in range(first, last + 1)]


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """A linear map of the range of the values onto start … end; of one value onto the middle."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _drawn(
    data: Sequence[Datum], across: Callable[[float], float], down: Callable[[float], float], joined: bool
) -> tuple[list[Mark], str]:
    marks = []
    for datum in sorted(data, key=lambda d: d.x):
        if math.isnan(datum.y):
            continue
        known = not (math.isnan(datum.low) or math.isnan(datum.high))
        low, high = (down(datum.low), down(datum.high)) if known else (None, None)
        marks.append(Mark(across(datum.x), down(datum.y), low, high, datum.label))
    path = "M" + "L".join(f"{mark.x} {mark.y}" for mark in marks) if joined and len(marks) > 1 else ""
    return marks, path


def _without_collisions(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Ticks whose words have room; the ends stay."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        if not kept or place - kept[-1][0] >= 4 + 3.2 * (len(text) + len(kept[-1][1])):
            kept.append((place, text))
    return kept
