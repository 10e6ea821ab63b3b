"""The heat map of success rates: which cell stands where, and its colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.cell_table import CellRow
from evaluation.palette import hexadecimal

#: Told apart by readers of every kind of colour vision, and by their lightness alone (Nuñez et al., PLOS ONE 2018).
COLOUR_MAP = "cividis"


@dataclass(frozen=True)
class Tile:
    """A cell of the heat map: what was measured there, if anything, and its colours."""

    cell: CellRow | None
    colour: str = ""
    ink: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Models and defences along one side, attacks along the other, whichever is the longer one down.

    Args:
        turned: Whether the attacks are down.
        groups: Each model and its defences.
        attacks: The attacks.
        tiles: Rows of tiles.
        top: The success rate that has the last colour; the first one is 0.
        colours: Of the scale, from 0 to ``top``.
    """

    turned: bool
    groups: Sequence[tuple[str, Sequence[str]]]
    attacks: Sequence[str]
    tiles: Sequence[Sequence[Tile]]
    top: float
    colours: Sequence[str]


def heat_map(cells: Sequence[CellRow]) -> HeatMap:
    """Arrange cells and colour them.

    Args:
        cells: Of ``cell_table.cell_rows``.
    """
    held = {cell.key: cell for cell in cells}
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    groups = [
        (model, list(dict.fromkeys(cell.defence for cell in cells if cell.model == model)))
        for model in dict.fromkeys(cell.model for cell in cells)
    ]
    pairs = [(model, defence) for model, defences in groups for defence in defences]
    rates = [cell.values["success"].number for cell in cells]
    greatest = max((rate for rate in rates if not math.isnan(rate)), default=1.0)
    top = min(1.0, max(0.1, math.ceil(10 * greatest - 1e-9) / 10))

    def tile(model: str, attack: str, defence: str) -> Tile:
        cell = held.get((model, attack, defence))
        rate = math.nan if cell is None else cell.values["success"].number
        if math.isnan(rate):
            return Tile(cell)
        colour = colour_of(rate / top)
        return Tile(cell, hexadecimal(colour), ink_on(colour))

    turned = len(attacks) > len(pairs)
    if turned:
        tiles = [[tile(model, attack, defence) for model, defence in pairs] for attack in attacks]
    else:
        tiles = [[tile(model, attack, defence) for attack in attacks] for model, defence in pairs]
    scale = [hexadecimal(colour_of(step / 10)) for step in range(11)]
    return HeatMap(turned, groups, attacks, tiles, top, scale)


def colour_of(share: float) -> tuple[int, int, int]:
    """The colour of a share of the scale, 0 to 1: RGB from 0 to 255."""
    import matplotlib

    red, green, blue, _ = matplotlib.colormaps[COLOUR_MAP](min(max(share, 0.0), 1.0), bytes=True)
    return int(red), int(green), int(blue)


def luminance(colour: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2); 4.5 is enough to read."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(colour: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on it: one of them always has a contrast of 4.5."""
    return "#000000" if contrast(colour, (0, 0, 0)) >= contrast(colour, (255, 255, 255)) else "#ffffff"
