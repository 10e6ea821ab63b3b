"""What the figures of a check mean: whether what must hold does, on plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evaluation import metrics
from evaluation.resampling import permutation_test
from evaluation.results import Record, worst
from evaluation.tables import percent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from evaluation.metrics import Counts

#: By how much success may fall where it should not: 5 points or half of it, whichever is less, and always 2. On two
#: images one draw of a random defence differs from another by a point or two, and a kink in the loss costs as much.
TOLERANCE = 0.05
HALF = 0.5
SMALL = 0.02
#: Share of zero gradient entries from which on an attack moves less than half of what it may move. Rounding, an
#: argmax or a hard threshold give 1; networks on images, ReLU or not, hardly any.
ZERO_SHARE = 0.5
#: Success that an unbounded attack must reach. A model that looks at its input at all can be made wrong about every
#: pixel; the zoo's reach 0.98 to 1 in as many steps, and one in which each pixel weighs on all others 0.93, where a sum
#: of losses gets stuck. A hidden gradient leaves the clean error, a detector the share of what it does not answer.
UNBOUNDED_SUCCESS = 0.9
#: Noise does as much as the attack from this share of the attack's gain on. Gains up to ``SMALL`` are none: which of
#: two attacks that do nothing does more says nothing.
NOISE_SHARE = 0.9
#: At this level a black box beats a white box by more than chance.
LEVEL = 0.05
#: A defence that keeps less than this share of the undefended model's clean mIoU, or of the classes that it finds, has
#: given up the task that the attack is measured on.
KEPT_SHARE = 0.5
#: A class that takes more than this share of the pixels has swallowed the others, if the labels give it less than
#: ``OWN_SHARE`` of that.
ONE_CLASS = 0.95
OWN_SHARE = 0.8
#: A class is found if it takes this share of the pixels: one pixel here and there is no class found.
FOUND = 0.001


class Finding(NamedTuple):
    """Whether what must hold does, None where that cannot be said, and the figures, or the reason."""

    passed: bool | None
    detail: str


def untried(why: str) -> Finding:
    """A check that does not apply, or could not be tried."""
    return Finding(None, why)


def declared_randomness(declared: bool, found: bool) -> Finding:
    """Two predictions of one image are the same, or the segmenter says that they may not be."""
    if declared:
        return Finding(True, "it says that it is random")
    if found:
        return Finding(False, "two predictions of one image differ, and it does not say that it is random")
    return Finding(True, "two predictions of one image are the same")


def zero_gradients(gradients: NDArray[np.floating[Any]]) -> Finding:
    """The gradient is finite, and exactly zero in at most ``ZERO_SHARE`` of the entries that an attack may move."""
    if not gradients.size:
        return untried("there is no pixel to differentiate at")
    broken = int((~np.isfinite(gradients)).sum())
    if broken:
        return Finding(False, f"{broken} of {gradients.size} gradient entries are not finite")
    share = float((gradients == 0).mean())
    return Finding(share <= ZERO_SHARE, f"{percent(share)} % of the gradient entries are exactly zero")


def more_helps(less: float, more: float, of_less: str, of_more: str) -> Finding:
    """Success with more of something does not fall below (``falls``) success with less of it."""
    if math.isnan(less) or math.isnan(more):
        return untried("there is no pixel to count")
    told = f"success {percent(more)} % with {of_more}, {percent(less)} % with {of_less}"
    return Finding(not falls(less, more), told)


def falls(high: float, low: float) -> bool:
    """Whether the second success rate is below the first by more than what may be noise (``TOLERANCE``)."""
    return high - low > max(SMALL, min(TOLERANCE, HALF * high))


def white_box(white: Iterable[Record], others: Mapping[str, Iterable[Record]]) -> Finding:
    """Nothing that knows less of the model beats the white-box attack (``falls``), and not by chance.

    Chance: a paired permutation test over images (``resampling.permutation_test``), p at most ``LEVEL`` or, with so few
    images that no p is that small, the smallest there is, 2^(1−n): it must then win on every image.

    Args:
        white: the white-box attack's records; of several variants the best counts on each image and seed.
        others: name → records of what it is held against, in the same way.
    """
    mine = {(record.image, record.seed): record for record in worst(white)}
    told, beaten = [], False
    for name, records in others.items():
        other = {(record.image, record.seed): record for record in worst(records)}
        units = sorted(mine.keys() & other.keys())
        if not units:
            continue
        one, two = (tallies(side[unit] for unit in units) for side in (mine, other))
        before, after = (float(rates(side.sum(axis=0)[None])[0, 0]) for side in (one, two))
        if math.isnan(before) or math.isnan(after):
            continue
        p = float(permutation_test(one, two, rates)[0])
        beaten |= falls(after, before) and p <= max(LEVEL, 2.0 ** (1 - len(one)))
        told.append(f"{name} {percent(after)} %, p = {p:.2g}")
        white_success = percent(before)
    if not told:
        return untried("nothing to compare with: no transferred patch, no black-box attack with the same aim")
    return Finding(not beaten, f"white box {white_success} %; {'; '.join(told)}")


def unbounded(success: float) -> Finding:
    """An attack that may change everything reaches (nearly) everything."""
    if math.isnan(success):
        return untried("there is no pixel to count")
    told = f"{percent(success)} % of the pixels are wrong where all may be changed"
    return Finding(success >= UNBOUNDED_SUCCESS, told)


def random_patch(without: float, noise: float, optimised: float) -> Finding:
    """Noise in place of the patch does less than the attack, both without what no attack at all gives.

    Args:
        without: success of no attack.
        noise: success of noise at the same place.
        optimised: success of the attack.
    """
    if math.isnan(without + noise + optimised):
        return untried("there is no pixel to count")
    by_noise, by_attack = noise - without, optimised - without
    told = f"gain of noise {percent(by_noise)} points, of the attack {percent(by_attack)} points"
    if by_noise <= SMALL:
        return Finding(True, told) if by_attack > SMALL else untried(f"neither does anything: {told}")
    return Finding(by_noise < NOISE_SHARE * by_attack, told)


def collapsed_prediction(whole: Counts, undefended: Counts | None) -> Finding:
    """The clean prediction under the defence is still one.

    Args:
        whole: label against prediction without attack, summed over images, (C, C).
        undefended: the same without the defence, on the same images; None for no defence.
    """
    if not whole.sum():
        return untried("there is no pixel to count")
    predicted, labels = whole.sum(axis=0) / whole.sum(), whole.sum(axis=1) / whole.sum()
    top = int(predicted.argmax())
    if predicted[top] > ONE_CLASS and labels[top] < OWN_SHARE * predicted[top]:
        told = f"class {top} takes {percent(predicted[top])} % of the pixels, in the labels {percent(labels[top])} %"
        return Finding(False, told)
    if undefended is None or not undefended.sum():
        return Finding(True, f"the most frequent class takes {percent(predicted[top])} % of the pixels")
    before = undefended.sum(axis=0) / undefended.sum()
    found, had = int((predicted >= FOUND).sum()), int((before >= FOUND).sum())
    miou, miou_before = metrics.mean_iou(whole), metrics.mean_iou(undefended)
    told = f"clean mIoU {percent(miou)} %, undefended {percent(miou_before)} %; {found} classes found, undefended {had}"
    return Finding(miou >= KEPT_SHARE * miou_before and found >= KEPT_SHARE * had, told)


# ------------------------------------------------------------------------------------------------------------ details


def _tally(record: Record) -> tuple[int, int]:
    """Pixels won, and pixels that count."""
    if record.aim is not None:
        return int(np.diagonal(record.aim).sum()), int(record.aim.sum())
    counts = record.adversarial
    return int(counts.sum() - np.diagonal(counts).sum()), int(counts.sum())


def tallies(records: Iterable[Record]) -> NDArray[np.int64]:
    """Won and counted pixels of each image, (n, 2), all its seeds together."""
    images: dict[int, NDArray[np.int64]] = {}
    for record in records:
        images[record.image] = images.get(record.image, 0) + np.array(_tally(record))
    return np.stack([images[image] for image in sorted(images)])


def rates(sums: NDArray[Any]) -> NDArray[np.float64]:
    """(R, 2) → (R, 1)."""
    won, total = np.asarray(sums, dtype=np.float64).T
    return np.divide(won, total, out=np.full_like(won, np.nan), where=total > 0)[:, None]
