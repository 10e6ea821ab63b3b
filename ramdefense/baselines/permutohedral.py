"""Gaussian filtering in many dimensions, on the permutohedral lattice (Adams, Baek & Davis, Eurographics 2010).

Points are spread over the corners of the simplices they lie in, the corners are blurred along the lattice's directions,
and the points read the result: O(N d²) for N points in d dimensions, where the sum over all pairs takes O(N² d). Here
the lattice is an index tensor made by sorting, so everything after it is gathers and sums: differentiable in the values
everywhere, and in the features wherever a point does not lie on a face of its simplex.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 2**62  # corners are numbered in an int64


@dataclass(frozen=True, eq=False)
class Lattice:
    """The corners that a set of points touches.

    Attributes:
        weights: (N, d + 1), barycentric coordinates of each point; rows sum to 1.
        corners: (N, d + 1) int64, the numbers 0 to M − 1 of the corners of its simplex.
        neighbours: (d + 1, 2, M) int64, the numbers of the corners on both sides of each, in each direction; M where
            no point touches that corner.
    """

    weights: Tensor
    corners: Tensor
    neighbours: Tensor

    def filter(self, values: Tensor) -> Tensor:
        """Σ_j exp(−|f_i − f_j|² / 2) v_j, approximately and up to one factor for all points.

        Shape:
            values: (N, C); returns (N, C)
        """
        points, number = self.weights.shape
        size = self.neighbours.shape[-1]
        spread = (self.weights[..., None] * values[:, None]).reshape(points * number, -1)
        held = spread.new_zeros(size + 1, values.shape[-1]).index_add(0, self.corners.reshape(-1), spread)
        # corner M stands for all that no point touches: it holds nothing and passes nothing on
        present = torch.ones_like(held[:, :1])
        present[-1] = 0
        nowhere = self.neighbours.new_full((1,), size)
        for both in self.neighbours:
            one, other = (torch.cat([side, nowhere]) for side in both)
            held = (held + 0.5 * (held[one] + held[other])) * present
        return (held[self.corners] * self.weights[..., None]).sum(dim=1)


def lattice(features: Tensor, groups: Tensor | None = None) -> Lattice:
    """The lattice of points whose standard deviation of the filter is 1 in every direction.

    Args:
        features: positions, already divided by the wanted standard deviations.
        groups: a number from 0 for each point; points of different groups do not see each other. None: one group.

    Shape:
        features: (N, d); groups: (N,) int64

    Raises:
        ValueError: features that are not finite, or so far apart that corners cannot be numbered; larger standard
            deviations are the remedy.
    """
    if not bool(features.isfinite().all()):
        raise ValueError("features hold what is not finite; look at the images and the standard deviations")
    dimensions = features.shape[1]
    elevated = features @ _elevation(dimensions).to(features)
    with torch.no_grad():
        origin, rank = _simplex(elevated.detach())
    weights = _barycentric(elevated - origin, rank)
    with torch.no_grad():
        keys = _keys(origin.long(), rank)  # (N, d + 1, d)
        if groups is None:
            groups = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        numbers, steps = _numbered(keys, groups)
        present, corners = torch.unique(numbers, return_inverse=True)
        neighbours = torch.stack(
            [torch.stack([_found(present, present + step), _found(present, present - step)]) for step in steps]
        )
    return Lattice(weights, corners, neighbours)


def _elevation(dimensions: int) -> Tensor:
    """(d, d + 1): onto the plane of the lattice, scaled so that its blur has standard deviation 1 (section 3 there)."""
    basis = torch.zeros(dimensions, dimensions + 1, dtype=torch.float64)
    for row in range(dimensions):
        basis[row, : row + 1] = 1
        basis[row, row + 1] = -(row + 1)
        basis[row] /= math.sqrt((row + 1) * (row + 2))
    return basis * (dimensions + 1) * math.sqrt(2 / 3)


def _simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """Which simplex each point lies in: its corner of remainder 0, and the ranks of the differences to it."""
    number = elevated.shape[1]
    origin = (elevated / number).round() * number
    excess = (origin.sum(dim=1, keepdim=True) / number).round()
    difference = elevated - origin
    # rank 0 is the largest difference; a stable sort makes ties the same everywhere
    order = difference.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(number, device=order.device).expand_as(order).contiguous()
    )
    # the rounded point may lie off the plane; those with the least (most) difference move back by a step
    moved = rank + excess.long()
    origin = torch.where(moved < 0, origin + number, torch.where(moved >= number, origin - number, origin))
    return origin, torch.where(moved < 0, moved + number, torch.where(moved >= number, moved - number, moved))


def _barycentric(difference: Tensor, rank: Tensor) -> Tensor:
    """(N, d + 1): from the sorted differences to the corner of remainder 0 (proposition 4.2 there)."""
    number = difference.shape[1]
    descending = difference.gather(1, rank.argsort(dim=1)) / number
    # corner k (k > 0) has the gap between the (d − k)-th and the next difference, corner 0 what is left
    gaps = (descending[:, :-1] - descending[:, 1:]).flip(1)
    return torch.cat([1 - gaps.sum(dim=1, keepdim=True), gaps], dim=1)


def _keys(origin: Tensor, rank: Tensor) -> Tensor:
    """(N, d + 1, d): the first d coordinates of each corner; the last follows, since they sum to 0."""
    number = origin.shape[1]
    remainder = torch.arange(number, device=origin.device)[None, :, None]
    ranks = rank[:, None, :]
    canonical = torch.where(ranks < number - remainder, remainder, remainder - number)
    return (origin[:, None, :] + canonical)[..., :-1]


def _numbered(keys: Tensor, groups: Tensor) -> tuple[Tensor, list[int]]:
    """One int64 for each corner, and what a step in each of the d + 1 directions adds to it."""
    dimensions = keys.shape[-1]
    low = keys.amin(dim=(0, 1))
    # a neighbour is at most d away, and must not be taken for a corner of the next row
    ranges = (keys.amax(dim=(0, 1)) - low + 1 + 2 * dimensions).tolist()
    if math.prod(ranges) * (int(groups.max()) + 1) > _LARGEST:
        raise ValueError(f"features span {ranges} steps of the lattice, too many to number; widen the deviations")
    number = groups[:, None].expand(keys.shape[:2]).clone()
    strides: list[int] = []
    for axis, length in enumerate(ranges):
        number = number * length + keys[..., axis] - low[axis] + dimensions
        strides = [stride * length for stride in strides] + [1]
    along = sum(strides)
    return number, [*(along - (dimensions + 1) * stride for stride in strides), along]


def _found(present: Tensor, wanted: Tensor) -> Tensor:
    """Places of the wanted numbers among the sorted ones, ``len(present)`` for those that are not there."""
    place = torch.searchsorted(present, wanted).clamp_max(len(present) - 1)
    return torch.where(present[place] == wanted, place, len(present))
