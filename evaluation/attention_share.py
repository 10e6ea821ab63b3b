"""Where attention goes: how much of it lands on a patch, and which places of the image the output comes from.

`attention_share` counts, site by site, the attention that the rest of the image gives to what lies under a patch: as
the model computes it, and as a defence lets it through. `rollout` follows attention through all layers (Abnar and
Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attacks.attention import Attention, Located, locate, watching
from evaluation.contact import check_promises, generate, mask_of
from ramdefense.checks import check_images
from ramdefense.interception import Call, probe
from ramdefense.ram import HardenedModel
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import nn

COLUMNS = ("site", "occurrence", "heads", "queries", "keys", "uniform", "share", "unrefined", "total")

UNSEEN = -1
"""The draw of a random defence that is looked at, unless another is asked for: the one on which `evaluate` scores."""


def attention_share(
    segmenter: PyTorchSegmenter,
    images: Tensor,
    covered: Tensor,
    *,
    streams: Sequence[int] | None = None,
    draw: int = UNSEEN,
) -> pd.DataFrame:
    """How much of the attention of the rest of the image lands on what lies under a patch, at each site.

    A mean over the images, and for each image over its windows, the heads, and the queries that do not lie under the
    patch. A query without a place (a class token) counts; a key without one is under nothing. Where no key's middle is
    covered, the nearest key stands for the patch (`attacks.attention.Located.under`).

    Args:
        segmenter: plain or defended.
        images: (N, C, H, W) in the clip range.
        covered: the pixels under the patch, bool, (H, W) or (N, H, W); in each image some, and not all.
        streams: number of the random stream of each image; None means 0..N-1.
        draw: of a random defence.

    Returns:
        One row for each site whose keys have places, in the order of the calls:
            site, occurrence: as `ramdefense.interception.attention_sites` names it; of a hardened model, by the name in
                the model that was hardened.
            heads, queries, keys: sizes, of one window.
            uniform: what attention would give to the patch if it were even over the keys of each window.
            share: the mass of the attention that is really applied, after any refinement, on the keys under the patch.
            unrefined: the same before the refinement, as the softmax gives it; for a plain model ``share``.
            total: the mass that is really applied, on all keys: 1, but under a defence whose rows do not sum to 1.

    Raises:
        NotApplicableError: no attention between places of the image.
        ValueError: images, covered pixels or streams that do not fit.
    """
    import pandas as pd

    check_images(images, segmenter.clip_values)
    covered = _covered(covered, images).to(segmenter.device)
    located = _located(segmenter, images)
    found: dict[Call, list[Tensor]] = {call: [] for call in located}
    for i, attentions in _watched(segmenter, images, streams, draw):
        for attention in attentions:
            if attention.call in located:
                shares = _shares(attention, located[attention.call], covered[i : i + 1])
                found[attention.call].append(shares)
    rows = []
    for call, places in located.items():
        uniform, share, unrefined, total = torch.stack(found[call]).mean(0).tolist()
        sizes = places.heads, places.queries.shape[1], places.keys.shape[1]
        rows.append((_site(segmenter.model, call), call.occurrence, *sizes, uniform, share, unrefined, total))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _shares(attention: Attention, places: Located, covered: Tensor) -> Tensor:
    """uniform, share, unrefined and total of one image, (4,) float64."""
    under = places.under(covered).double()  # (1, windows, keys)
    outside = places.outside(covered).double()

    def of_queries(values: Tensor) -> Tensor:
        return (values * outside).sum() / outside.sum()

    applied, unrefined = (
        places.arrange(matrix.double(), 1).mean(2) for matrix in (_applied(attention), attention.weights())
    )
    given = [(matrix @ under[..., None]).squeeze(-1) for matrix in (applied, unrefined)]
    figures = [under.mean(-1, keepdim=True), *given, applied.sum(-1)]
    return torch.stack([of_queries(values) for values in figures]).cpu()


# --------------------------------------------------------------------------------------------------------- rollout


def rollout(
    segmenter: PyTorchSegmenter, images: Tensor, *, streams: Sequence[int] | None = None, draw: int = UNSEEN
) -> Tensor:
    """Attention rollout: how much each place of the image counts for the output, through all layers.

    With A the attention of a layer, averaged over its heads, and W = 0.5 A + 0.5 I, rows divided by their sums, for the
    residual connection, the rollout is the product W_L … W_1, the last layer's leftmost. Where Abnar and Zuidema read
    the row of a class token, a segmenter has an output everywhere: the map is the mean of the rows of all tokens that
    have a place. Refined attention counts as it is applied. What passes from token to token otherwise (convolutions, a
    decoder) is not in it.

    Args:
        segmenter: plain or defended; all its attention is over one sequence of tokens, as in a plain ViT.
        images: (N, C, H, W) in the clip range.
        streams: number of the random stream of each image; None means 0..N-1.
        draw: of a random defence.

    Returns:
        (N, H, W) float64 on the CPU, each map of sum 1: each pixel has the value of the token that is nearest to it;
        what a token without a place has is left out.

    Raises:
        NotApplicableError: no attention between places, or attention that is not over one sequence of tokens; the
            message says at which site.
        ValueError: images or streams that do not fit.
    """
    check_images(images, segmenter.clip_values)
    located = _located(segmenter, images)
    _check_one_sequence(segmenter, images, located)
    places = next(iter(located.values())).keys[0].cpu()  # of the first site: the sharpest
    height, width = images.shape[-2:]
    placed = ~places.isnan().any(-1)
    nearest = _nearest(places, (height, width))
    maps = []
    for _, attentions in _watched(segmenter, images, streams, draw):
        flow = torch.eye(len(places), dtype=torch.float64)
        for attention in attentions:
            if attention.call in located:
                matrix = located[attention.call].arrange(_applied(attention).double(), 1)[0, 0].mean(0).cpu()
                layer = (matrix + torch.eye(len(places), dtype=torch.float64)) / 2
                flow = layer / layer.sum(-1, keepdim=True) @ flow
        seen = flow[placed].mean(0)[nearest]
        maps.append(seen / seen.sum())
    return torch.stack(maps)


def _check_one_sequence(segmenter: PyTorchSegmenter, images: Tensor, located: Mapping[Call, Located]) -> None:
    def run(batch: Tensor) -> Tensor:
        with segmenter.conditions(undefended=True):
            return segmenter.logits(batch)

    for call in probe(segmenter.model, (images[:1].to(segmenter.device),), {}, run=run).sites:
        if call not in located:
            raise _no_sequence(_site(segmenter.model, call), "its keys have no place on the image")
    first = next(iter(located.values())).keys
    pitch = math.sqrt(images.shape[-2] * images.shape[-1] / first.shape[1])
    for call, places in located.items():
        site = _site(segmenter.model, call)
        if places.keys.shape[0] > 1:
            raise _no_sequence(site, f"it attends within {places.keys.shape[0]} windows")
        sizes = places.queries.shape[1], places.keys.shape[1]
        if sizes[0] != sizes[1]:
            raise _no_sequence(site, f"its {sizes[0]} queries are not its {sizes[1]} keys")
        if sizes[1] != first.shape[1]:
            raise _no_sequence(site, f"it has {sizes[1]} tokens and the first site {first.shape[1]}")
        for tokens in (places.queries, places.keys):
            apart = (tokens - first).norm(dim=-1)
            if float(apart[~apart.isnan()].median()) > pitch:
                raise _no_sequence(site, "its tokens lie elsewhere on the image than the first site's keys")


def _no_sequence(site: str, reason: str) -> NotApplicableError:
    return NotApplicableError(
        f"attention rollout does not apply to this model: {site} is no self-attention over one sequence of tokens that "
        f"all layers share ({reason}). Rollout multiplies the layers' matrices; take attention_share, or the receptive "
        "field, for this model"
    )


def _nearest(places: Tensor, size: tuple[int, int]) -> Tensor:
    """For each pixel the number of the token that is nearest to it, (H, W); places (tokens, 2), NaN for none."""
    reachable = places.double().nan_to_num(torch.inf)
    columns = torch.arange(size[1], dtype=torch.float64)
    rows = [
        torch.hypot(reachable[:, :1] - row, reachable[:, 1:] - columns).argmin(0)  # row by row: all at once is large
        for row in range(size[0])
    ]
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------- under attack


class Patched(NamedTuple):
    """What an attack made of a batch: images (N, C, H, W), and the pixels under its patches, (N, H, W) bool."""

    images: Tensor
    covered: Tensor


@dataclass(frozen=True, eq=False)
class Attacked:
    """Attention with and without a patch.

    Attributes:
        shares: the columns of `attention_share`, after ``defence`` and ``attacked`` (bool).
        patched: what was made on each defended model, by the defence's name.
    """

    shares: pd.DataFrame
    patched: dict[str, Patched]


def attacked_shares(
    segmenters: Mapping[str, PyTorchSegmenter],
    make: Callable[[PyTorchSegmenter], Any],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    streams: Sequence[int],
    batch_size: int = 8,
) -> Attacked:
    """Attack each segmenter with a patch made on it, and see where its attention goes before and after.

    Args:
        segmenters: by the name of their defence; one model under several.
        make: factory of a patch attack.
        x, y: images (N, C, H, W) and ground truth (N, H, W).
        streams: number of the random stream of each image, for the attack and for the defence.
        batch_size: images attacked at once.

    Raises:
        NotApplicableError: no attention between places of the image.
        ValueError: an attack that changes every pixel, so that there is no patch, or that breaks its promises.
    """
    import pandas as pd

    images = torch.tensor(x)
    for segmenter in segmenters.values():
        _located(segmenter, images)  # before the attack, which takes long
    patched, parts = {}, []
    for name, segmenter in segmenters.items():
        patched[name] = _patched(make(segmenter), segmenter, x, y, streams, batch_size)
        for attacked, shown in ((False, images), (True, patched[name].images)):
            shares = attention_share(segmenter, shown, patched[name].covered, streams=streams)
            shares.insert(0, "attacked", attacked)
            shares.insert(0, "defence", name)
            parts.append(shares)
    return Attacked(pd.concat(parts, ignore_index=True), patched)


def _patched(
    attack: Any,
    segmenter: PyTorchSegmenter,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    streams: Sequence[int],
    batch_size: int,
) -> Patched:
    made, masks = [], []
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        adversarial = generate(attack, x[part], y[part], streams[part])
        mask = mask_of(attack, x[part])
        if mask is None:
            raise ValueError(
                f"{type(attack).__name__} may change every pixel, so there is no patch for attention to land on; take "
                "a patch attack (`ramdefense attacks`)"
            )
        check_promises(type(attack).__name__, x[part], adversarial, mask, segmenter)
        made.append(torch.tensor(adversarial))
        masks.append(torch.tensor(mask))
    return Patched(torch.cat(made), torch.cat(masks))


# ---------------------------------------------------------------------------------------------------------- figure


def rollout_figure(maps: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], *, title: str) -> Figure:
    """Rollouts of one image, side by side on one scale, each over the picture that it belongs to.

    Args:
        maps: title → image (3, H, W) in [0, 1], rollout (H, W) of sum 1, and the pixels under the patch (H, W) bool, or
            None.
        title: over them all.
    """
    from matplotlib.figure import Figure

    height, width = next(iter(maps.values()))[1].shape
    wide = 3.2
    figure = Figure(figsize=(len(maps) * wide + 1.2, 2 * wide * height / width + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    pictures, flows = figure.subplots(2, len(maps), squeeze=False)
    top = max(float(flow.max()) * flow.numel() for _, flow, _ in maps.values())
    for picture, axis, (name, (image, flow, covered)) in zip(pictures, flows, maps.items(), strict=True):
        picture.set_title(name, fontsize=9)
        picture.imshow(image.movedim(0, -1).clamp(0, 1).numpy(), interpolation="nearest")
        drawn = axis.imshow((flow * flow.numel()).numpy(), cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        for each in (picture, axis):
            if covered is not None:
                each.contour(covered.numpy(), levels=[0.5], colors="white", linewidths=1.2)
            each.set_xticks([])
            each.set_yticks([])
    bar = figure.colorbar(drawn, ax=list(flows), shrink=0.85)
    bar.set_label("rollout, × even", fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------------------------- shared


def _located(segmenter: PyTorchSegmenter, images: Tensor) -> dict[Call, Located]:
    channels, height, width = images.shape[1:]
    try:
        return locate(segmenter, (channels, height, width))
    except NotApplicableError as error:
        raise NotApplicableError(f"{str(error).partition(':')[0]}: take a model that attends") from error


@torch.no_grad()
def _watched(
    segmenter: PyTorchSegmenter, images: Tensor, streams: Sequence[int] | None, draw: int
) -> Iterator[tuple[int, list[Attention]]]:
    """What attends on each image, one by one: all matrices of a batch at once are large."""
    numbers = list(range(len(images))) if streams is None else list(streams)
    if len(numbers) != len(images):
        raise ValueError(f"{len(numbers)} streams for {len(images)} images: one for each")
    for i, number in enumerate(numbers):
        with segmenter.conditions(images=(number,), draw=draw), watching(segmenter.model, applied=True) as seen:
            segmenter.logits(images[i : i + 1].to(segmenter.device))
        yield i, seen


def _applied(attention: Attention) -> Tensor:
    assert attention.applied is not None  # it was asked for
    return attention.applied


def _covered(covered: Tensor, images: Tensor) -> Tensor:
    size, shape = tuple(images.shape[-2:]), tuple(covered.shape)
    if covered.dtype != torch.bool or shape not in (size, (len(images), *size)):
        raise ValueError(
            f"covered is {covered.dtype} of shape {shape}; bool of shape {size}, or {(len(images), *size)} for one map "
            "for each image"
        )
    inside = covered.expand(len(images), *size).flatten(1).sum(1)
    if not bool(((inside > 0) & (inside < math.prod(size))).all()):
        raise ValueError(f"covered pixels {inside.tolist()} of {math.prod(size)}: in each image some, and not all")
    return covered.expand(len(images), *size)


def _site(model: nn.Module, call: Call) -> str:
    """The name of a site in the model without the wrappers that harden it."""
    kept, module = [], model
    for part in call.module.split(".") if call.module else []:
        if not (isinstance(module, HardenedModel) and part == "model"):
            kept.append(part)
        module = module.get_submodule(part)
    return ".".join(kept) or "(root)"
