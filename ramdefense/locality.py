"""Which outputs of a tensor function a box of the input can reach, and how to compute those alone.

A rule looks at one call on whole feature maps, of which some are known to change inside a box only, and answers with a
`Local`: the box of the output that may change, and the same call on crops. Convolutions, pools, padding, resizing and
pixel shuffles are known by their geometry. Every other function is tried: one that gives the same on four quarters of
random maps as on the whole treats each place by itself (activations, batch norm in eval mode, sums and products of
maps, concatenation of channels, softmax over channels), whatever its name is. What is neither is not local.

Where a window reaches over the edge of its crop, real values of the clean map are put there, and padding only at the
edge of the image; they are taken once, when the rule is made, so that a call on crops copies little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]

LARGEST_SHARE = 0.8
"""Of a map; a larger box is no longer worth cutting out."""


class Span(NamedTuple):
    """Rows or columns, from `start` to before `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def within(self, other: Span) -> slice:
        """This span, counted from the start of another one that holds it."""
        return slice(self.start - other.start, self.stop - other.start)

    def joined(self, other: Span) -> Span:
        return Span(min(self.start, other.start), max(self.stop, other.stop))

    def common(self, other: Span) -> Span:
        """What both hold; an empty span inside `other` where that is nothing."""
        start = min(max(self.start, other.start), other.stop)
        return Span(start, max(start, min(self.stop, other.stop)))


class Box(NamedTuple):
    """A rectangle of a map."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        return self.rows.size * self.columns.size

    def of(self, maps: Tensor) -> Tensor:
        """The part of maps (…, H, W) inside the box, a view."""
        return maps[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def joined(self, other: Box) -> Box:
        return Box(self.rows.joined(other.rows), self.columns.joined(other.columns))

    @classmethod
    def around(cls, mask: Tensor) -> Box | None:
        """The smallest box around the true places of (…, H, W) bool; None if there is none."""
        flat = mask.reshape(-1, *mask.shape[-2:]).any(0)
        rows, columns = (flat.any(dim).nonzero()[:, 0].tolist() for dim in (1, 0))
        return cls(Span(rows[0], rows[-1] + 1), Span(columns[0], columns[-1] + 1)) if rows else None


class Arguments:
    """The arguments of a call as one list of leaves: each by itself, lists and tuples of tensors taken apart.

    Attributes:
        leaves: what the call was given; put others in their places and ask for `args` and `kwargs`.
    """

    __slots__ = ("_names", "_shape", "leaves")

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.leaves: list[Any] = []
        self._names = tuple(kwargs)
        self._shape: list[tuple[type, int] | None] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
                self._shape.append((list if isinstance(value, list) else tuple, len(value)))
                self.leaves.extend(value)
            else:
                self._shape.append(None)
                self.leaves.append(value)

    def given(self, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keyword arguments with these leaves."""
        rest = iter(leaves)
        values = [next(rest) if of is None else of[0](next(rest) for _ in range(of[1])) for of in self._shape]
        count = len(values) - len(self._names)
        return values[:count], dict(zip(self._names, values[count:], strict=True))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors that a function returned, one or in a list or tuple."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from tensors_in(item)


@dataclass(frozen=True)
class Local:
    """A call of which a part is enough.

    Attributes:
        box: of the output that may differ from the clean one.
        run: `(func, arguments)` -> the output inside the box; among the leaves of the arguments there are crops in the
            places of the maps.
    """

    box: Box
    run: Callable[[Function, Arguments], Any]


def local(
    func: Function, arguments: Arguments, boxes: Mapping[int, Box], generator: torch.Generator
) -> Local | None:
    """How to compute a call inside a box; None where it is not local, or the box is most of the map.

    Args:
        func: The function, as `__torch_function__` is told it.
        arguments: Its arguments, whole and clean.
        boxes: Where leaves of them change, by their number; the others are constant.
        generator: For the maps on which a function is tried.
    """
    leaves = arguments.leaves
    maps = [leaves[i] for i in boxes]
    if any(m.dim() != 4 or not m.is_floating_point() for m in maps):
        return None
    rule = _RULES.get(func)
    if rule is None:
        return _pointwise(func, arguments, boxes, generator)
    if len(boxes) > 1 or leaves[0] is not maps[0]:  # weights that depend on the image, say
        return None
    args, kwargs = arguments.given(leaves)
    return rule(args, kwargs, boxes[0])


def worthwhile(box: Box, size: Sequence[int]) -> bool:
    """Whether a box of maps of (…, H, W) is small enough to be cut out."""
    return box.area <= LARGEST_SHARE * size[-2] * size[-1]


class Halo:
    """A region of clean maps, padded at the edges of the image, into which a crop is put.

    Args:
        clean: (N, C, H, W).
        box: where the crops come from.
        rows, columns: what the region covers; over the edges of the maps there is padding.
        value: of the padding.
    """

    def __init__(self, clean: Tensor, box: Box, rows: Span, columns: Span, value: float = 0.0) -> None:
        height, width = clean.shape[-2:]
        inner = Box(rows.common(Span(0, height)), columns.common(Span(0, width)))
        edges = (
            inner.columns.start - columns.start, columns.stop - inner.columns.stop,
            inner.rows.start - rows.start, rows.stop - inner.rows.stop,
        )  # fmt: skip
        seen = Box(box.rows.common(inner.rows), box.columns.common(inner.columns))
        self._taken = Box(*(Span(s.start - b.start, s.stop - b.start) for s, b in zip(seen, box, strict=True)))
        self._rows, self._columns = seen.rows.within(rows), seen.columns.within(columns)
        self._base = F.pad(inner.of(clean), edges, value=value).clone()

    def filled(self, crop: Tensor) -> Tensor:
        """The region with the crop in its place; differentiable in the crop, of which it may have no part."""
        return spliced(self._base, self._taken.of(crop), self._rows, self._columns)


def spliced(maps: Tensor, crop: Tensor, rows: slice, columns: slice) -> Tensor:
    """Maps (N, C, H, W) with a crop in those rows and columns; differentiable in the crop."""
    if crop.shape == maps.shape:
        return crop
    across = crop
    if crop.shape[-1] != maps.shape[-1]:
        across = maps[..., rows, :].slice_scatter(crop, 3, columns.start, columns.stop)
    return across if across.shape == maps.shape else maps.slice_scatter(across, 2, rows.start, rows.stop)


# ---------------------------------------------------------------------------------------------- functions by geometry


class Window(NamedTuple):
    """What one output sees along an axis: `extent` places from `output * stride - padding` on."""

    extent: int
    stride: int
    padding: int

    def reached(self, span: Span, outputs: int) -> Span:
        """The outputs that see the span, one where none does."""
        first = -(-(span.start - self.extent + 1 + self.padding) // self.stride)
        last = (span.stop - 1 + self.padding) // self.stride
        first = min(max(first, 0), outputs - 1)
        return Span(first, max(first, min(last, outputs - 1)) + 1)

    def needed(self, outputs: Span) -> Span:
        """The inputs that these outputs see, padding included."""
        start = outputs.start * self.stride - self.padding
        return Span(start, (outputs.stop - 1) * self.stride - self.padding + self.extent)


def _windowed(
    maps: Tensor,
    box: Box,
    size: Sequence[int],
    windows: Sequence[Window],
    call: Callable[[Tensor, Arguments], Tensor],
    value: float = 0.0,
) -> Local | None:
    """A function of windows whose whole output is (…, *size); `call` computes it without padding."""
    rows, columns = (w.reached(s, n) for w, s, n in zip(windows, box, size, strict=True))
    out = Box(rows, columns)
    if not worthwhile(out, size):
        return None
    halo = Halo(maps, box, windows[0].needed(rows), windows[1].needed(columns), value)

    def run(func: Function, arguments: Arguments) -> Tensor:
        return call(halo.filled(arguments.leaves[0]), arguments)

    return Local(out, run)


def _conv2d(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = _named(names, args, kwargs)
    maps, kernel = given["input"], given["weight"].shape[-2:]
    strides, dilations = _pair(given.get("stride", 1)), _pair(given.get("dilation", 1))
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        before = [(e - 1) // 2 if padding == "same" else 0 for e in extents]
        both = [e - 1 if padding == "same" else 0 for e in extents]
    else:
        before = list(_pair(padding))
        both = [2 * p for p in before]
    windows = [Window(*axis) for axis in zip(extents, strides, before, strict=True)]
    size = [
        (n + p - w.extent) // w.stride + 1 for n, p, w in zip(maps.shape[-2:], both, windows, strict=True)
    ]

    def call(region: Tensor, arguments: Arguments) -> Tensor:
        now = _named(names, *arguments.given(arguments.leaves))  # weights may be made anew in each pass
        return torch.conv2d(region, now["weight"], now.get("bias"), strides, 0, dilations, now.get("groups", 1))

    return _windowed(maps, box, size, windows, call)


def _max_pool2d(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = _named(names, args, kwargs)
    if given.get("return_indices"):  # they count in the whole map
        return None
    kernel = _pair(given["kernel_size"])
    strides, dilations = _pair(given.get("stride") or kernel), _pair(given.get("dilation", 1))
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    windows = [Window(*axis) for axis in zip(extents, strides, _pair(given.get("padding", 0)), strict=True)]
    maps, ceil = given["input"], bool(given.get("ceil_mode"))
    size = [_pooled(n, w, ceil) for n, w in zip(maps.shape[-2:], windows, strict=True)]

    def call(region: Tensor, arguments: Arguments) -> Tensor:
        return F.max_pool2d(region, kernel, strides, 0, dilations)

    return _windowed(maps, box, size, windows, call, -math.inf)


def _avg_pool2d(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = _named(names, args, kwargs)
    kernel, padding = _pair(given["kernel_size"]), _pair(given.get("padding", 0))
    if given.get("ceil_mode") or (any(padding) and not given.get("count_include_pad", True)):
        return None  # at the edges the mean is over fewer places
    strides = _pair(given.get("stride") or kernel)
    windows = [Window(*axis) for axis in zip(kernel, strides, padding, strict=True)]
    maps = given["input"]
    size = [_pooled(n, w, False) for n, w in zip(maps.shape[-2:], windows, strict=True)]

    def call(region: Tensor, arguments: Arguments) -> Tensor:
        return F.avg_pool2d(region, kernel, strides, divisor_override=given.get("divisor_override"))

    return _windowed(maps, box, size, windows, call)


def _pooled(size: int, window: Window, ceil: bool) -> int:
    """Outputs of a pool; with `ceil` a window may end beyond the padding, but not start there."""
    free = size + 2 * window.padding - window.extent
    if not ceil:
        return free // window.stride + 1
    count = -(-free // window.stride) + 1
    return count - ((count - 1) * window.stride >= size + window.padding)


def _pad(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    given = _named(("input", "pad", "mode", "value"), args, kwargs)
    maps, amounts, mode = given["input"], list(given["pad"]), given.get("mode") or "constant"
    if len(amounts) not in (2, 4):
        return None
    amounts = [*amounts, 0, 0][:4]

    def sources(count: int, before: int, after: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64)[None, None]
        value = {"value": -1.0} if mode == "constant" else {}
        return F.pad(places, (before, after), mode=mode, **value)

    return _gathered(maps, box, sources(maps.shape[-2], *amounts[2:]), sources(maps.shape[-1], *amounts[:2]))


def _interpolate(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given = _named(names, args, kwargs)
    maps, size, scale, mode = (given.get(name) for name in ("input", "size", "scale_factor", "mode"))
    mode = mode or "nearest"
    assert isinstance(maps, Tensor)
    if mode in ("nearest", "nearest-exact"):
        sizes, scales = (_pair(v) if v is not None else (None, None) for v in (size, scale))
        sources = [
            F.interpolate(
                torch.arange(count, dtype=torch.float64)[None, None], s, f, mode,
                recompute_scale_factor=given.get("recompute_scale_factor"),
            )
            for count, s, f in zip(maps.shape[-2:], sizes, scales, strict=True)
        ]  # fmt: skip
        return _gathered(maps, box, sources[0], sources[1])
    if mode != "bilinear" or given.get("align_corners") or given.get("antialias"):
        return None
    factors = _pair(scale) if scale is not None else [o / n for o, n in zip(_pair(size), maps.shape[-2:], strict=True)]
    if any(f < 1 or f != int(f) for f in factors):
        return None
    return _enlarged(maps, box, [int(f) for f in factors])


def _enlarged(maps: Tensor, box: Box, factors: Sequence[int]) -> Local | None:
    """Bilinear by whole factors: an output lies between the two inputs next to it, so one place around is enough."""
    limits = [Span(0, n) for n in maps.shape[-2:]]
    seen = [Span(s.start - 1, s.stop + 1).common(limit) for s, limit in zip(box, limits, strict=True)]
    around = [Span(s.start - 1, s.stop + 1).common(limit) for s, limit in zip(seen, limits, strict=True)]
    out = Box(*(Span(s.start * f, s.stop * f) for s, f in zip(seen, factors, strict=True)))
    size = [n * f for n, f in zip(maps.shape[-2:], factors, strict=True)]
    if not worthwhile(out, size):
        return None
    halo = Halo(maps, box, around[0], around[1])
    whole = [s.size * f for s, f in zip(around, factors, strict=True)]
    inner = (s.within(a) for s, a in zip(seen, around, strict=True))
    cut = Box(*(Span(s.start * f, s.stop * f) for s, f in zip(inner, factors, strict=True)))

    def run(func: Function, arguments: Arguments) -> Tensor:
        return cut.of(F.interpolate(halo.filled(arguments.leaves[0]), whole, mode="bilinear", align_corners=False))

    return Local(out, run)


def _gathered(maps: Tensor, box: Box, *sources: Tensor) -> Local | None:
    """A function whose output (r, c) is the input at (sources[0][r], sources[1][c]), or a constant where one is -1."""
    picks, outs, needs = [], [], []
    for source, span in zip(sources, box, strict=True):
        source = source.flatten().long()
        hit = ((source >= span.start) & (source < span.stop)).nonzero()[:, 0]
        if not len(hit):
            return None
        outs.append(Span(int(hit[0]), int(hit[-1]) + 1))
        pick = source[outs[-1].start : outs[-1].stop]
        if int(pick.min()) < 0:
            return None
        needs.append(Span(int(pick.min()), int(pick.max()) + 1))
        pick = pick - needs[-1].start
        as_it_is = torch.equal(pick, torch.arange(needs[-1].size))
        picks.append(None if as_it_is else pick.to(maps.device))
    out = Box(*outs)
    if not worthwhile(out, [s.numel() for s in sources]):
        return None
    halo = Halo(maps, box, needs[0], needs[1])

    def run(func: Function, arguments: Arguments) -> Tensor:
        region = halo.filled(arguments.leaves[0])
        for dim, pick in zip((2, 3), picks, strict=True):
            region = region if pick is None else region.index_select(dim, pick)
        return region

    return Local(out, run)


def _pixel_shuffle(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    given = _named(("input", "upscale_factor"), args, kwargs)
    factor = given["upscale_factor"]
    out = Box(*(Span(s.start * factor, s.stop * factor) for s in box))
    if not worthwhile(out, [n * factor for n in given["input"].shape[-2:]]):
        return None
    return Local(out, lambda func, arguments: F.pixel_shuffle(arguments.leaves[0], factor))


def _pixel_unshuffle(args: Sequence[Any], kwargs: dict[str, Any], box: Box) -> Local | None:
    given = _named(("input", "downscale_factor"), args, kwargs)
    maps, factor = given["input"], given["downscale_factor"]
    windows = [Window(factor, factor, 0)] * 2
    size = [n // factor for n in maps.shape[-2:]]
    return _windowed(maps, box, size, windows, lambda region, arguments: F.pixel_unshuffle(region, factor))


_RULES: dict[Function, Callable[[Sequence[Any], dict[str, Any], Box], Local | None]] = {
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.pixel_shuffle: _pixel_shuffle,
    F.pixel_unshuffle: _pixel_unshuffle,
}


# ----------------------------------------------------------------------------------------------- functions by trial

_TRIAL = (5, 6)  # places of the maps on which a function is tried, cut at (2, 3)
_CUTS = (Span(0, 2), Span(2, 5)), (Span(0, 3), Span(3, 6))


def _pointwise(
    func: Function, arguments: Arguments, boxes: Mapping[int, Box], generator: torch.Generator
) -> Local | None:
    """A function that treats each place by itself, of one map or of several of one size."""
    leaves = arguments.leaves
    sizes = {tuple(leaves[i].shape[-2:]) for i in boxes}
    if len(sizes) > 1:
        return None
    size = sizes.pop()
    box = _joined(boxes.values())
    constants = {i: cut for i, leaf in enumerate(leaves) if i not in boxes and (cut := _spatial(leaf, size))}
    if not worthwhile(box, size) or min(size) < 2 or not _separable(func, arguments, boxes, constants, generator):
        return None
    halos = {i: Halo(leaves[i], own, *box) for i, own in boxes.items() if own != box}

    def run(func: Function, arguments: Arguments) -> Any:
        here = list(arguments.leaves)
        for i, halo in halos.items():
            here[i] = halo.filled(here[i])
        for i, cut in constants.items():
            here[i] = cut(here[i], box)
        args, kwargs = arguments.given(here)
        return func(*args, **kwargs)

    return Local(box, run)


def _joined(boxes: Iterable[Box]) -> Box:
    first, *others = boxes
    for other in others:
        first = first.joined(other)
    return first


def _spatial(leaf: Any, size: Sequence[int]) -> Callable[[Tensor, Box], Tensor] | None:
    """How to cut a constant that has a value for each place, (…, H, W), (…, H, 1) or (…, 1, W); None for another."""
    if not isinstance(leaf, Tensor) or leaf.dim() not in (3, 4):
        return None
    full = [n == whole and whole > 1 for n, whole in zip(leaf.shape[-2:], size, strict=True)]
    if not any(full) or any(n not in (1, whole) for n, whole in zip(leaf.shape[-2:], size, strict=True)):
        return None

    def cut(values: Tensor, box: Box) -> Tensor:
        spans = [slice(*span) if has else slice(None) for span, has in zip(box, full, strict=True)]
        return values[..., spans[0], spans[1]]

    return cut


def _separable(
    func: Function,
    arguments: Arguments,
    boxes: Mapping[int, Box],
    constants: Mapping[int, Callable[[Tensor, Box], Tensor]],
    generator: torch.Generator,
) -> bool:
    """Whether a function of random maps is, in each of four quarters, the function of that quarter.

    Everything is copied before, so that what a function writes, in place or into running statistics, is lost.
    """
    leaves = arguments.leaves
    size = [min(n, t) for n, t in zip(leaves[next(iter(boxes))].shape[-2:], _TRIAL, strict=True)]
    whole = Box(Span(0, size[0]), Span(0, size[1]))
    drawn = {}
    for i in boxes:
        drawn[i] = torch.randn(*leaves[i].shape[:2], *size, generator=generator).to(leaves[i])

    def results(box: Box) -> list[Tensor] | None:
        here = [leaf.clone() if isinstance(leaf, Tensor) and i not in boxes else leaf for i, leaf in enumerate(leaves)]
        for i, maps in drawn.items():
            here[i] = box.of(maps).clone()
        for i, cut in constants.items():
            here[i] = cut(here[i], box)
        args, kwargs = arguments.given(here)
        outputs = list(tensors_in(func(*args, **kwargs)))
        expected = (box.rows.size, box.columns.size)
        if any(o.dim() != 4 or tuple(o.shape[-2:]) != expected for o in outputs):
            return None
        return outputs

    try:
        at_once = results(whole)
        if not at_once:
            return False
        for rows in _CUTS[0]:
            for columns in _CUTS[1]:
                quarter = Box(rows.common(whole.rows), columns.common(whole.columns))
                if not quarter.area:
                    continue
                apart = results(quarter)
                if apart is None or len(apart) != len(at_once):
                    return False
                if not all(_alike(quarter.of(a), b) for a, b in zip(at_once, apart, strict=True)):
                    return False
    except Exception:  # a function that does not take maps of this size may say so in any way
        return False
    return True


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding: vectorised and single elements of an exponential may differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = math.sqrt(torch.finfo(one.dtype).eps)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _named(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _pair(value: Any) -> tuple[Any, Any]:
    """One number for both axes, or two."""
    if isinstance(value, (tuple, list)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return value, value
