"""Where a patch does most harm: a place for each image, chosen before the patch is made.

A placement takes a segmenter, images, the map to reach or to leave and the size of a patch, and returns (top, left) for
each image. It is a function of the image, its stream number and the model: neither of the batch nor of chance. A random
defence is seen under its draw 0. `PLACEMENTS` lists them by name.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attacks.attention import locate, watching
from attacks.interfaces import Victim
from attacks.objectives import Objective
from attacks.streams import stream

ATTENTION_STEPS = 32
"""Places that `by_attention` compares in each direction: no more, evenly spread, the first and the last among them."""

SCAN_STEPS = 6
"""Places that `by_scan` tries in each direction; each pair costs a forward pass."""

Size = tuple[int, int]


class Placement(Protocol):
    """A way to choose the place of a patch."""

    def __call__(
        self,
        victim: Victim,
        images: Tensor,
        reference: Tensor,
        shape: Size,
        *,
        objective: Objective,
        streams: tuple[int, ...],
        undefended: bool = False,
    ) -> Tensor:
        """The place of the patch on each image.

        Args:
            victim: The segmenter.
            images: (N, C, H, W) in the clip range, on the victim's device, unchanged.
            reference: (N, H, W) int64, the map to reach or to leave.
            shape: (height, width) of the patch, which fits on the images.
            objective: What the attack will minimise.
            streams: Stream number of each image.
            undefended: Look at the model without its defence, where the defence can be left out.

        Returns:
            (N, 2) int64: (top, left); of several equally good places the first, row by row.
        """


def by_attention(
    victim: Victim,
    images: Tensor,
    reference: Tensor,
    shape: Size,
    *,
    objective: Objective,
    streams: tuple[int, ...],
    undefended: bool = False,
) -> Tensor:
    """The place whose keys get most of the attention of the rest of the image.

    After the patch selection of Patch-Fool (Fu et al., ICLR 2022), which takes the token with the largest sum of its
    column of the attention matrix, over all queries and the heads of one layer. Ours: a rectangle of any size in the
    place of a token, only queries outside it (what looks at itself tells nothing of its influence elsewhere), and the
    mean over all attentions with places (`attacks.attention.locate`), since which layer is best depends on the model.
    A defence's suppression of attention is left out of the weights, though not of what the later ones see.

    Raises:
        ValueError: On a model with no attention.
    """
    size = (images.shape[-2], images.shape[-1])
    located = locate(victim, (images.shape[1], *size))
    tops, lefts = (_spread(side - extent, ATTENTION_STEPS) for side, extent in zip(size, shape, strict=True))
    corners = torch.cartesian_prod(tops, lefts).to(images.device)
    given = torch.zeros(len(images), len(corners), device=images.device)
    with torch.no_grad():
        with victim.conditions(images=streams, draw=0, undefended=undefended), watching(victim.model) as seen:
            victim.logits(images)
        for attention in seen:
            places = located.get(attention.call)
            if places is None:
                continue
            weights = places.arrange(attention.weights(), len(images)).mean(2)  # of the heads
            outside = (~_inside(places.queries, corners, shape)).to(weights)
            inside = _inside(places.keys, corners, shape).to(weights)
            for image, matrix in enumerate(weights):  # one by one: (windows, queries, corners) is large
                received = ((matrix @ inside) * outside).sum((0, 1))
                given[image] += received / outside.sum((0, 1)).clamp_min(1)
    return corners[given.argmax(1)]


def by_gradient(
    victim: Victim,
    images: Tensor,
    reference: Tensor,
    shape: Size,
    *,
    objective: Objective,
    streams: tuple[int, ...],
    undefended: bool = False,
) -> Tensor:
    """The place with the largest sum of |∂ objective / ∂ pixel|: the best of all rectangles of that size."""
    leaf = images.detach().requires_grad_()
    passed = victim.traits.straight_through and not undefended
    conditions = victim.conditions(images=streams, draw=0, straight_through=passed, undefended=undefended)
    with torch.enable_grad(), conditions:
        loss = objective(victim.logits(leaf), reference, reference != victim.ignore_index, 0.0)
        slope = torch.autograd.grad(loss.sum(), leaf)[0]
    # exact to float64: rectangles may differ by little
    upto = torch.nn.functional.pad(slope.double().abs().sum(1).cumsum(1).cumsum(2), (1, 0, 1, 0))
    height, width = shape
    sums = upto[:, height:, width:] - upto[:, :-height, width:] - upto[:, height:, :-width] + upto[:, :-height, :-width]
    best = sums.flatten(1).argmax(1)
    return torch.stack([best // sums.shape[2], best % sums.shape[2]], 1)


@torch.no_grad()
def by_scan(
    victim: Victim,
    images: Tensor,
    reference: Tensor,
    shape: Size,
    *,
    objective: Objective,
    streams: tuple[int, ...],
    undefended: bool = False,
) -> Tensor:
    """The place where a patch of noise lowers the objective most, of `SCAN_STEPS` in each direction.

    The noise is each image's own and the same at all places. The objective with the patch is compared with that without
    it on the same pixels, those that the patch leaves: they differ from place to place.
    """
    low, high = (float(value) for value in victim.clip_values)
    size = (images.shape[-2], images.shape[-1])
    patch = (images.shape[1], *shape)
    noise = torch.stack([torch.rand(patch, generator=stream("scan", number)) for number in streams]).to(images)
    noise = low + (high - low) * noise
    counted = reference != victim.ignore_index
    tops, lefts = (_spread(side - extent, SCAN_STEPS) for side, extent in zip(size, shape, strict=True))
    corners = torch.cartesian_prod(tops, lefts).to(images.device)
    harm = []
    with victim.conditions(images=streams, draw=0, undefended=undefended):
        clean = victim.logits(images)
        for top, left in corners.tolist():
            area = (..., slice(top, top + shape[0]), slice(left, left + shape[1]))
            patched, left_over = images.clone(), counted.clone()
            patched[area], left_over[area] = noise, False
            before = objective(clean, reference, left_over, 0.0)
            harm.append(before - objective(victim.logits(patched), reference, left_over, 0.0))
    return corners[torch.stack(harm, 1).argmax(1)]


def _spread(free: int, steps: int) -> Tensor:
    """At most so many whole numbers from 0 to `free`, evenly spread, both ends among them."""
    return torch.linspace(0, free, min(steps, free + 1), dtype=torch.float64).round().long()


def _inside(places: Tensor, corners: Tensor, shape: Size) -> Tensor:
    """Which tokens lie in each rectangle: (windows, tokens, 2) and (P, 2) -> (windows, tokens, P) bool."""
    offset = places.round()[:, :, None] - corners
    return ((offset >= 0) & (offset < torch.tensor(shape, device=places.device))).all(-1)


#: Placements by name.
PLACEMENTS: dict[str, Placement] = {"attention": by_attention, "gradient": by_gradient, "scan": by_scan}
