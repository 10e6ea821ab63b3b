"""What an attack minimises.

An objective maps logits (N, C, H, W), a reference map (N, H, W) int64 and the counted pixels (N, H, W) bool to one
number for each image, (N,), which the attack minimises. The reference is the target map of a targeted attack and the
label map of an untargeted one. Each is the *sum* of a loss over the counted pixels: no pixel's gradient grows or
shrinks with the size of the image, and pixels that are not counted (void, under the patch) have no part in it at all.

`OBJECTIVES` lists them by name; each entry makes the objective for a targeted or an untargeted attack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(targeted: bool) -> Objective:
    """Cross entropy to the target, or minus the cross entropy to the label."""
    sign = 1.0 if targeted else -1.0

    def objective(logits: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, reference.masked_fill(~counted, -100), ignore_index=-100, reduction="none")
        return sign * loss.flatten(1).sum(1)

    return objective


def margin(targeted: bool) -> Objective:
    """How far the target's logit is under the best other one, or how far the label's is above it.

    Neither clipped nor normalised: it pulls on pixels already won as on those still to win, and never saturates.
    """
    sign = 1.0 if targeted else -1.0

    def objective(logits: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
        index = reference.where(counted, 0)[:, None]
        wanted = logits.gather(1, index)[:, 0]
        other = logits.scatter(1, index, -torch.inf).amax(1)
        return sign * (other - wanted).where(counted, 0.0).flatten(1).sum(1)

    return objective


OBJECTIVES: dict[str, Callable[[bool], Objective]] = {"cross_entropy": cross_entropy, "margin": margin}
