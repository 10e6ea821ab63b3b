"""What an attack minimises.

An objective maps logits (N, C, H, W), a reference map (N, H, W) int64, the counted pixels (N, H, W) bool and the
progress, the share in [0, 1] of the run's steps that are made, to one number for each image, (N,), which the attack
minimises. The reference is the target map of a targeted attack and the label map of an untargeted one. Each is the
*sum* of a loss over the counted pixels: no pixel's gradient grows or shrinks with the size of the image, and pixels
that are not counted (void, under the patch) have no part in it at all, whatever their labels are.

`OBJECTIVES` lists them by name; each entry makes the objective for a targeted or an untargeted attack. A pixel is *won*
when it is predicted as its target, or when it is no longer predicted as its label. Weights and masks are recomputed at
every evaluation and no gradient flows through them.

Where the papers weigh or mask a cross entropy CE that an untargeted attack is to raise, the loss here is log C − CE.
The gradient is that of the paper; the constant is ours. A pixel that is still predicted as its label has CE ≤ log C, so
that winning it never raises a masked sum, and a masked sum is 0 when all is won, as in a targeted attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ramdefense.outputs import predictions_of

Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _summed(pixel_loss: Objective) -> Objective:
    """The sum over the counted pixels of a loss (N, H, W) of each pixel, for which the others have label 0."""

    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        loss = pixel_loss(logits, reference.where(counted, 0), counted, progress)
        return loss.where(counted, 0.0).flatten(1).sum(1)

    return objective


def cross_entropy(targeted: bool) -> Objective:
    """Cross entropy to the target, or minus the cross entropy to the label."""
    sign = 1.0 if targeted else -1.0

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return sign * F.cross_entropy(logits, reference, reduction="none")

    return objective


def margin(targeted: bool) -> Objective:
    """How far the target's logit is under the best other one, or how far the label's is above it.

    Neither clipped nor normalised: it pulls on pixels already won as on those still to win, and never saturates.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return pixel_margin(logits, reference, targeted)

    return objective


def none(targeted: bool) -> Objective:
    """Zero, with a graph: for attacks that are all in their terms (`attacks.terms`)."""

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return 0.0 * logits[:, 0]

    return objective


def dag(targeted: bool) -> Objective:
    """The margin of the pixels still to win (DAG, Xie et al. 2017: Σ over the active set of f_label − f_adversarial).

    The paper knows the ground truth and an adversarial label of each pixel, and a pixel is active while it is predicted
    as the former. Here there is one map, so this is ours: targeted, the best other class stands for the ground truth,
    and a pixel is active until it is on target; untargeted, the best other class stands for the adversarial label.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return pixel_margin(logits, reference, targeted).where(_left(logits, reference, targeted), 0.0)

    return objective


def segpgd(targeted: bool) -> Objective:
    """Cross entropy weighed 1 − λ on pixels still to win and λ on pixels won (SegPGD, Gu et al. 2022).

    λ(t) = (t − 1) / 2T at step t of T, which is progress / 2: at first only what is still to win counts, in the end all
    pixels alike. The paper's attack is untargeted; targeted, the weights go by "on target", as in the code of CosPGD's
    authors. It is also SEA's "balanced cross entropy" (first version of arXiv 2306.12941), hence its second name.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        loss = _cross_entropy(logits, reference, targeted)
        return torch.where(_left(logits, reference, targeted), (1 - progress / 2) * loss, progress / 2 * loss)

    return objective


def cospgd(targeted: bool) -> Objective:
    """Cross entropy weighed by cos(softmax(logits), one-hot(label)) (CosPGD, Agnihotri, Jung, Keuper 2024).

    Targeted the weight is 1 − cos to the target. Softmax and both weights are those of the authors' code; others, as
    SEA's authors, have read the paper as having the sigmoid in place of the softmax.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        probabilities = logits.detach().softmax(1)
        cosine = _of_reference(probabilities, reference) / torch.linalg.vector_norm(probabilities, dim=1)
        return (1 - cosine if targeted else cosine) * _cross_entropy(logits, reference, targeted)

    return objective


def masked_cross_entropy(targeted: bool) -> Objective:
    """Cross entropy of the pixels still to win (SEA, Croce, Singh, Hein 2024: 1[argmax u = y] · CE(u, y)).

    The paper's attacks are untargeted; that the targeted mask is "not yet on target" is ours.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return _cross_entropy(logits, reference, targeted).where(_left(logits, reference, targeted), 0.0)

    return objective


def class_balanced_cross_entropy(targeted: bool) -> Objective:
    """Masked cross entropy in which every class weighs the same (SEA, Croce, Singh, Hein 2024: against the mIoU).

    The paper weighs a class by its inverse frequency in the data set; an attack here sees one image, so the frequency
    is that of the counted pixels of the image's reference map, and the mean weight is 1. That is ours, as is the
    targeted mask, "not yet on target".
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        pixels = counted.flatten(1).to(logits)
        sizes = logits.new_zeros(logits.shape[:2]).scatter_add(1, reference.flatten(1), pixels)
        even = pixels.sum(1, keepdim=True) / (sizes > 0).sum(1, keepdim=True).clamp_min(1)
        weights = (even / sizes.clamp_min(1)).gather(1, reference.flatten(1)).view_as(reference)
        loss = _cross_entropy(logits, reference, targeted).where(_left(logits, reference, targeted), 0.0)
        return weights * loss

    return objective


def jensen_shannon(targeted: bool) -> Objective:
    """Jensen–Shannon divergence of softmax(logits) and the one-hot target, or minus that to the label (SEA, Croce,
    Singh, Hein 2024: JS(p, e) = ½ KL(p ‖ m) + ½ KL(e ‖ m), m = ½ (p + e)).

    It is in [0, log 2] and flat at both ends, so that untargeted it lets go of pixels well won; targeted, which is
    ours, it hardly pulls on pixels that are far from their target. With q the probability of the reference class it is
    log 2 + ½ (q log q − (1 + q) log(1 + q)), whatever the other classes have.
    """
    sign = 1.0 if targeted else -1.0

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        log_q = -F.cross_entropy(logits, reference, reduction="none")
        q = log_q.exp()
        return sign * (math.log(2) + 0.5 * (q * log_q - (1 + q) * q.log1p()))

    return objective


def masked_spherical(targeted: bool) -> Objective:
    """The label's logit, with the logits on the unit sphere, of the pixels still to win (SEA, Croce, Singh, Hein, first
    version of arXiv 2306.12941: the attack raises −1[argmax u = y] · u_y / ‖u‖₂).

    The loss is û_y + 1/√C for the label, 1 − û_y for the target. The constants, which keep a pixel that is still to
    win from being under 0, are ours, and so is the targeted loss with its mask, "not yet on target". No size of the
    logits saturates it. Where all other logits are negative the margin may rise before it falls.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        own = _of_reference(F.normalize(logits, dim=1), reference)
        loss = 1 - own if targeted else own + 1 / math.sqrt(logits.shape[1])
        return loss.where(_left(logits, reference, targeted), 0.0)

    return objective


def ssap(targeted: bool) -> Objective:
    """γ · Σ CE over the pixels not yet fooled + (1 − γ) · Σ CE over those fooled (Nesti et al. 2022).

    γ is the share of the counted pixels that are not yet fooled, the adaptive choice in the authors' code. They scale
    each sum's gradient on the patch to length 1 before they add the two; an objective sees no patch, so here they are
    added as they are. That "fooled" means "on target" in a targeted attack is ours.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        loss, left = _cross_entropy(logits, reference, targeted), _left(logits, reference, targeted)
        total = counted.flatten(1).sum(1).clamp_min(1)
        share = ((left & counted).flatten(1).sum(1).to(logits) / total)[:, None, None]
        return torch.where(left, share * loss, (1 - share) * loss)

    return objective


def least_likely(targeted: bool) -> Objective:
    """Cross entropy to the class that is now the least likely, argmin of the logits (Arnab, Miksik, Torr 2018, after
    Kurakin, Goodfellow, Bengio 2017).

    The reference says which pixels are counted and nothing else, so it is the same for both directions of attack.
    """

    @_summed
    def objective(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(logits, logits.detach().min(1).indices, reduction="none")

    return objective


def _left(logits: Tensor, reference: Tensor, targeted: bool) -> Tensor:
    """The pixels still to win, (N, H, W) bool."""
    on_reference = predictions_of(logits) == reference
    return ~on_reference if targeted else on_reference


def _of_reference(values: Tensor, reference: Tensor) -> Tensor:
    """The value of each pixel's reference class: (N, C, H, W), (N, H, W) -> (N, H, W)."""
    return values.gather(1, reference[:, None])[:, 0]


def _cross_entropy(logits: Tensor, reference: Tensor, targeted: bool) -> Tensor:
    """Cross entropy to the target, or log C minus the cross entropy to the label: (N, H, W)."""
    loss = F.cross_entropy(logits, reference, reduction="none")
    return loss if targeted else math.log(logits.shape[1]) - loss


def pixel_margin(logits: Tensor, reference: Tensor, targeted: bool) -> Tensor:
    """How far each pixel is from being won, in logits: (N, H, W)."""
    other = logits.scatter(1, reference[:, None], -torch.inf).amax(1)
    own = _of_reference(logits, reference)
    return other - own if targeted else own - other


OBJECTIVES: dict[str, Callable[[bool], Objective]] = {
    "cross_entropy": cross_entropy,
    "margin": margin,
    "none": none,
    "dag": dag,
    "segpgd": segpgd,
    "cospgd": cospgd,
    "balanced_cross_entropy": segpgd,
    "masked_cross_entropy": masked_cross_entropy,
    "class_balanced_cross_entropy": class_balanced_cross_entropy,
    "jensen_shannon": jensen_shannon,
    "masked_spherical": masked_spherical,
    "ssap": ssap,
    "least_likely": least_likely,
}
