"""Where a model attends, found by watching it and not by the names of its classes.

PyTorch attends through `scaled_dot_product_attention`, through a softmax that somebody multiplies with values, and
through `multi_head_attention_forward`, which does one of the two inside. A `torch.overrides.TorchFunctionMode` sees
each such call, whatever its spelling; hooks on the modules keep a trail that tells which module made it. The same mode
switches off the fused kernels of `nn.MultiheadAttention` and `nn.TransformerEncoder` that would attend unseen: they
are taken only where no tensor function is overridden.

A mode costs some microseconds for every function that it sees. So a probe has it on from end to end, and later passes
only inside the modules that were seen to call.

A call is known by (module, function, how many times that module has called it before in this forward pass), so a
module that runs twice has two sites.

Not seen: a softmax written out of `exp` and `sum`, attention inside a TorchScript or compiled graph or a custom kernel
(FlashAttention's own package, flex_attention), and weights that are multiplied and summed without a matrix product
(deformable attention).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ramdefense.traits import conditions

Kind = Literal["global", "reduced", "windowed", "cross", "channel"]

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"
MULTI_HEAD = "multi_head_attention_forward"


@dataclass(frozen=True)
class AttentionSite:
    """One place that attends, as a probe image showed it.

    Attributes:
        name: qualified name of the module that makes the call, "(root)" for the model itself.
        function: "scaled_dot_product_attention", "softmax" or "multi_head_attention_forward".
        shape: of the attention matrix (..., queries, keys), for the probe.
        heads, queries, keys: sizes, for the probe; `heads` of a three-dimensional matrix is read from the module's
            `num_heads` or counted.
        kind: "global" (every position sees every position), "reduced" (fewer keys than queries, such as SegFormer's
            reduced keys), "windowed" (several matrices for each image and head), "cross" (more keys than queries),
            "channel" (the matrix is over channels and not over positions). A heuristic on the sizes, for display and
            for what is refined by default (all but "channel").
        occurrence: how many times the module has called the function before, in the same forward pass.
    """

    name: str
    function: str
    shape: tuple[int, ...]
    heads: int
    queries: int
    keys: int
    kind: Kind
    occurrence: int = 0


class Call(NamedTuple):
    """What a call is known by; see the module."""

    module: str
    function: str
    occurrence: int


def attention_sites(model: nn.Module, example: Tensor | Sequence[int]) -> list[AttentionSite]:
    """Every place in `model` that attends, in the order of the calls.

    A softmax is a site where its result, possibly through dropout, casts, masks, reshapes and transposes, becomes an
    operand of a matrix product that sums over the softmax's own dimension. A softmax over classes is none, and neither
    is one whose other operand is a parameter (a look-up in a learned table).

    Args:
        model: any module; it runs once, in eval mode and without gradients, and stays as it was, its training flags
            and torch's random state included.
        example: an input (N, C, H, W), or its shape, with or without N.

    Raises:
        TypeError, ValueError: `model` is no module, or `example` neither a tensor nor a shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, which does not run on tensors; give a torch.nn.Module")
    return list(probe(model, (example_input(model, example),), {}).sites.values())


def example_input(model: nn.Module, example: Tensor | Sequence[int]) -> Tensor:
    """`example` as a tensor on the device and of the dtype of the model's weights."""
    weights = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(example, Tensor):
        return example.to(weights.device)
    shape = tuple(example) if isinstance(example, Sequence) else ()
    if len(shape) not in (3, 4) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"example is {example!r}; give a tensor (N, C, H, W), or its shape such as (3, 480, 640)")
    shape = shape if len(shape) == 4 else (1, *shape)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))  # noise: no two positions are alike
    return noise.to(weights.device, weights.dtype)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


# ------------------------------------------------------------------------------------------------ the watching mode


class Watch(TorchFunctionMode):
    """Sees each attention of a forward pass and names the call; what happens there is for the subclasses.

    Attributes:
        trail: names of the modules that are running, the innermost last; kept by a `Watcher`.
        counts: calls so far, by (module, function).
        recomputable: whether a checkpoint may run parts of this pass again, by `again`.
    """

    recomputable = False

    def __init__(self) -> None:
        super().__init__()
        self.trail: list[str] = [""]
        self.counts: dict[tuple[str, str], int] = {}
        self._inside = ""
        self._depth = 0

    def switch_on(self) -> None:
        """Switch the mode on; it stays on until `switch_off` was called as often."""
        if self._depth == 0:
            self.__enter__()
        self._depth += 1

    def switch_off(self, *, entirely: bool = False) -> None:
        if self._depth and (entirely or self._depth == 1):
            self.__exit__(None, None, None)
        self._depth = 0 if entirely else self._depth - 1

    def again(self, counts: dict[tuple[str, str], int]) -> Watch:
        """The same watch for a part of the pass that runs again, when so many calls had been made."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = _WATCHED.get(func)
        if read is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return read(self, func, args, kwargs or {})

    def attend(self, call: Call, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        """A call of scaled_dot_product_attention; `options` are its other arguments, by name."""
        raise NotImplementedError

    def soften(self, call: Call, function: Callable[[], Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        """A call of softmax; `function()` is the plain result."""
        raise NotImplementedError

    def _call(self, function: str) -> Call:
        key = (self.trail[-1], self._inside or function)
        occurrence = self.counts.get(key, 0)
        self.counts[key] = occurrence + 1
        return Call(*key, occurrence)


def _read_sdpa(mode: Watch, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = (options.pop(name) for name in names[:3])
    return mode.attend(mode._call(SDPA), func, q, k, v, options)


def _read_softmax(mode: Watch, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ["input", "dim", "dtype"]
    if func is F.softmax:
        names.insert(2, "_stacklevel")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    scores = given["input"] if "input" in given else given["self"]
    dim, dtype = given.get("dim"), given.get("dtype")
    if "half_to_float" in given or isinstance(dtype, bool):  # torch._softmax
        dtype = torch.float32 if given.get("half_to_float", dtype) else None
    if dim is None:
        dim = 0 if scores.dim() in (0, 1, 3) else 1  # what F.softmax still does, with a warning of its own
    return mode.soften(mode._call(SOFTMAX), lambda: func(*args, **kwargs), scores, dim % max(scores.dim(), 1), dtype)


# The composite asks whether a function is overridden and would come back here for ever. A copy that never asks runs
# its body, whose softmax or scaled_dot_product_attention the mode then sees.
_UNFOLDED = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    MULTI_HEAD,
    F.multi_head_attention_forward.__defaults__,
)
_UNFOLDED.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def _in_memory_order(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Query, key and value with their elements in order; what was one tensor stays one.

    `nn.MultiheadAttention(batch_first=True)` hands over transposed views, of which a linear layer makes a product with
    one copy of its weights for each image, several times slower.
    """
    ordered: dict[int, Tensor] = {}
    return tuple(ordered.setdefault(id(arg), arg.contiguous()) if i < 3 else arg for i, arg in enumerate(args))


def _read_multi_head(mode: Watch, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # unfolded here, it is no longer seen as a whole by the watches below, which have to call it by the same name
    watches = [mode, *(below for below in _get_current_function_mode_stack() if isinstance(below, Watch))]
    outer = [watch._inside for watch in watches]
    try:
        for watch in watches:
            watch._inside = MULTI_HEAD
        with mode:
            return _UNFOLDED(*_in_memory_order(args), **kwargs)
    finally:
        for watch, inside in zip(watches, outer, strict=True):
            watch._inside = inside


_aten = torch.ops.aten
_WATCHED: dict[Any, Callable[[Watch, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]] = {
    F.scaled_dot_product_attention: _read_sdpa,
    _aten.scaled_dot_product_attention: _read_sdpa,
    _aten.scaled_dot_product_attention.default: _read_sdpa,
    Tensor.softmax: _read_softmax,
    torch.softmax: _read_softmax,
    F.softmax: _read_softmax,
    torch.special.softmax: _read_softmax,
    torch._softmax: _read_softmax,
    _aten.softmax: _read_softmax,
    _aten.softmax.int: _read_softmax,
    _aten.special_softmax: _read_softmax,
    _aten._softmax: _read_softmax,
    _aten._softmax.default: _read_softmax,
    F.multi_head_attention_forward: _read_multi_head,
}


# ------------------------------------------------------------------------------------------- which module is running


class Watcher:
    """Hooks on modules that keep the trail of a `Watch`, and that bring it back when a checkpoint recomputes.

    `torch.utils.checkpoint` runs modules again during the backward pass, when the forward pass, its mode and its
    random draw are gone. So each watched module notes for which input, held by a weak reference, it ran under which
    `Watch`; a module that is called during a backward pass with that input resumes it, with the same masks.
    """

    def __init__(self) -> None:
        self.current: Watch | None = None
        self._resumed = False
        self._handles: list[RemovableHandle] = []
        self._notes: dict[tuple[str, Any, Any], tuple[StorageWeakRef, Watch, dict[tuple[str, str], int]]] = {}

    def watch(self, model: nn.Module, callers: Collection[str] | None = None) -> None:
        """Hook the modules that call, and those around them; every module where None. Hooks from before are removed.

        `nn.Softmax` is a spelling of the function, and not a module that attends: the call is its parent's.
        """
        self.unwatch()
        parts = [name.split(".") for name in callers or ()]
        around = {".".join(part[: i + 1]) for part in parts for i in range(len(part))}
        for name, module in model.named_modules():
            if name and (callers is None or name in around) and not isinstance(module, nn.Softmax):
                calls = callers is not None and name in callers
                enter = module.register_forward_pre_hook(_Enter(self, name, calls), with_kwargs=True)
                # left in the reverse order of entering, so that one watcher may be put around another
                leave = module.register_forward_hook(_Leave(self, name, calls), always_call=True, prepend=True)
                self._handles += [enter, leave]

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def running(self, watch: Watch, *, everywhere: bool = True) -> Iterator[None]:
        """Run a forward pass under `watch`, its mode on from end to end or only inside the modules that call."""
        before = self.current, self._resumed
        self.current, self._resumed = watch, False
        try:
            if everywhere:
                watch.switch_on()
            yield
        finally:
            watch.switch_off(entirely=True)
            self.current, self._resumed = before

    def note(self, name: str, tensor: Tensor, watch: Watch) -> None:
        """Remember that `name` is now called with `tensor`."""
        storage = StorageWeakRef(tensor.untyped_storage())
        self._notes[name, storage.cdata, tensor.storage_offset()] = (storage, watch, dict(watch.counts))

    def noted(self, name: str, tensor: Tensor | None) -> tuple[Watch, dict[tuple[str, str], int]] | None:
        """The watch, and its counts, under which `name` was last called with `tensor`; None outside a backward pass."""
        if tensor is None or not in_backward():
            return None
        storage = StorageWeakRef(tensor.untyped_storage())
        found = self._notes.get((name, storage.cdata, tensor.storage_offset()))
        return None if found is None else found[1:]

    def forget(self) -> None:
        """Drop the notes about inputs that nothing can recompute from any more."""
        self._notes = {key: note for key, note in self._notes.items() if not note[0].expired()}

    def enter(self, name: str, calls: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self.current
        if watch is None:
            if not in_backward():
                return  # a part of the model, called by itself
            watch = self._resume(name, first_tensor(args, kwargs))
        elif watch.recomputable:
            tensor = first_tensor(args, kwargs)
            if tensor is not None:
                self.note(name, tensor, watch)
        watch.trail.append(name)
        if calls:
            watch.switch_on()

    def _resume(self, name: str, tensor: Tensor | None) -> Watch:
        found = self.noted(name, tensor)
        if found is None:
            raise RuntimeError(
                f"{name} runs during a backward pass, on an input that it has not seen in the forward pass, so its "
                "random draw is not known; let torch.utils.checkpoint wrap modules, called with the tensors that the "
                "checkpoint was given"
            )
        self.current, self._resumed = found[0].again(found[1]), True
        return self.current

    def leave(self, name: str, calls: bool) -> None:
        watch = self.current
        if watch is None or watch.trail[-1] != name:  # it failed before it was entered
            return
        watch.trail.pop()
        if calls:
            watch.switch_off()
        if self._resumed and len(watch.trail) == 1:
            self.current, self._resumed = None, False

    def __getstate__(self) -> dict[str, Any]:
        # The handles travel with the hooks: they keep the numbers of the hooks from being given away a second time.
        return {**self.__dict__, "current": None, "_resumed": False, "_notes": {}}


class _Enter:
    def __init__(self, watcher: Watcher, name: str, calls: bool) -> None:
        self.watcher, self.name, self.calls = watcher, name, calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.watcher.enter(self.name, self.calls, args, kwargs)


class _Leave:
    def __init__(self, watcher: Watcher, name: str, calls: bool) -> None:
        self.watcher, self.name, self.calls = watcher, name, calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.watcher.leave(self.name, self.calls)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


# ----------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Probed:
    """What a probe saw: the calls that attend, and those of softmax that do not."""

    sites: dict[Call, AttentionSite]
    others: frozenset[Call]
    callers: frozenset[str]  # the modules inside which the mode has to be on


def probe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, run: Callable[..., Any] | None = None
) -> Probed:
    """Run `model` once in eval mode, without gradients, and leave its flags and the random state as they were.

    Where the model is run by something else, a segmenter with its preprocessing, `run` is called in its place.
    """
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    watcher, watch = Watcher(), _Probe()
    watcher.watch(model)
    try:
        model.eval()
        # A draw of its own: a hardened module inside keeps its place in its own sequence of draws.
        with torch.random.fork_rng(devices=devices), torch.no_grad(), conditions(model, draw=0), watcher.running(watch):
            (model if run is None else run)(*args, **kwargs)
    finally:
        watcher.unwatch()
        for module, flag in flags:
            module.training = flag
    tensor = first_tensor(args, kwargs)
    images = len(tensor) if tensor is not None and tensor.dim() else 1
    modules = dict(model.named_modules())
    sites = {call: _describe(call, *seen, images, modules) for call, seen in watch.found.items()}
    order = sorted(sites, key=list(watch.seen).index)
    # An encoder makes no call itself, but takes nested tensors, and with them another way, where it sees no mode.
    encoders = {name for name, module in modules.items() if isinstance(module, nn.TransformerEncoder)}
    callers = frozenset({module for module, _ in watch.counts} | encoders)
    return Probed({call: sites[call] for call in order}, frozenset(watch.seen.keys() - sites.keys()), callers)


class _Trace(NamedTuple):
    """A softmax's result on its way: `position` has its shape and holds each element's place among the keys."""

    call: Call
    position: Tensor


class _Probe(Watch):
    """Follows the result of each softmax until a matrix product sums over the softmax's dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Call, tuple[int, ...]] = {}  # shape of the matrix, keys last
        self.found: dict[Call, tuple[tuple[int, ...], int]] = {}  # shape, and the width of the values
        self._traces: Any = WeakIdKeyDictionary()

    def attend(self, call: Call, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        self.seen[call] = matrix_shape(q, k)
        self.found[call] = self.seen[call], v.shape[-1]
        return function(q, k, v, **options)

    def soften(self, call: Call, function: Callable[[], Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        weights = function()
        if weights.dim() < 2:
            return weights
        self.seen[call] = tuple(weights.movedim(dim, -1).shape)
        position = torch.arange(weights.shape[dim], device=weights.device)
        position = position.view(-1, *[1] * (weights.dim() - dim - 1)).expand(weights.shape)
        self._traces[weights] = _Trace(call, position)
        return weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WATCHED:
            return super().__torch_function__(func, types, args, kwargs)
        given = {id(value): value for value in _tensors((*args, *kwargs.values()))}  # once, though given twice: out=
        traced = [(value, self._traces[value]) for value in given.values() if value in self._traces]
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "").split(".")[0]
        name = name if name.startswith("__") else name.rstrip("_")  # masked_fill_ is masked_fill
        for weights, trace in traced:
            summed = _contraction(name, args, kwargs, weights)
            if summed is not None and _covers(trace.position, summed.dims):
                if not isinstance(summed.other, nn.Parameter):
                    self.found.setdefault(trace.call, (self.seen[trace.call], summed.width))
                continue
            self._follow(name, func, args, kwargs, weights, trace, output)
        return output

    def _follow(
        self, name: str, func: Any, args: Any, kwargs: Any, weights: Tensor, trace: _Trace, output: Any
    ) -> None:
        """Carry the trace over to the results that still are those weights."""
        results = [result for result in _tensors((output,)) if result is not weights]
        if not results:
            if _mixes(name, trace.position) or _gates(name, args, weights):  # in place
                self._traces.pop(weights, None)  # with out= it stands among the arguments twice
            return
        if name in _MOVES:
            moved = func(*_replaced(args, weights, trace.position), **_replaced(kwargs, weights, trace.position))
            for result, position in zip(results, _tensors((moved,)), strict=False):
                self._traces[result] = _Trace(trace.call, position)
        elif not _mixes(name, trace.position) and not _gates(name, args, weights):
            for result in results:  # element by element: dropout, casts, masks, scaling; comparisons, ranks: no weights
                if result.shape == weights.shape and result.is_floating_point():
                    self._traces[result] = trace


#: Functions that move elements without changing them; they are applied to the positions, too.
_MOVES = frozenset(
    {
        "reshape", "view", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
        "contiguous", "clone", "__getitem__", "chunk", "split", "split_with_sizes", "tensor_split",
        "unsafe_chunk", "unsafe_split", "unbind", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "__get__",
        "repeat", "repeat_interleave", "narrow", "select", "index_select", "roll", "flip", "tile", "adjoint",
        "ravel", "detach", "broadcast_to", "hsplit", "vsplit", "expand_as", "view_as", "reshape_as",
    }
)
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv"})
_SUMS_OF_PRODUCTS = frozenset({"baddbmm", "addbmm", "addmm", "addmv"})
_OPERANDS = ("input", "batch1", "batch2", "mat1", "mat2", "other")  # when they are given by name


class _Contraction(NamedTuple):
    dims: tuple[int, ...]  # of the weights, that the product sums over
    width: int  # of the other operand: how many values each key has
    other: Tensor


def _contraction(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Tensor) -> _Contraction | None:
    """Which dimensions of `weights` a matrix product sums over; None where `name` is no matrix product."""
    if name == "einsum":
        return _einsum_contraction(args, weights)
    operands = [*args, *(kwargs[key] for key in _OPERANDS if key in kwargs)]
    if name in _SUMS_OF_PRODUCTS:
        operands = operands[1:]
    elif name not in _PRODUCTS:
        return None
    left, right = operands[:2] if name != "__rmatmul__" else operands[1::-1]
    if weights is left:
        return _Contraction((weights.dim() - 1,), 1 if right.dim() == 1 else right.shape[-1], right)
    return _Contraction((max(weights.dim() - 2, 0),), 1 if left.dim() == 1 else left.shape[-2], left)


def _einsum_contraction(args: tuple[Any, ...], weights: Tensor) -> _Contraction | None:
    if not isinstance(args[0], str):  # einsum(operand, [0, 1], operand, [1, 2], [0, 2])
        pairs = list(zip(args[::2], args[1::2], strict=False))
        terms = [[str(i) for i in sublist] for _, sublist in pairs]
        operands = [operand for operand, _ in pairs]
        letters = [letter for term in terms for letter in term]
        result = [str(i) for i in args[-1]] if len(args) % 2 else [x for x in letters if letters.count(x) == 1]
    else:
        operands = list(args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])
        left, arrow, right = args[0].replace(" ", "").partition("->")
        ranks = [operand.dim() for operand in operands]
        terms = [_spread(term, rank) for term, rank in zip(left.split(","), ranks, strict=True)]
        letters = [letter for term in terms for letter in term]
        result = list(right) if arrow else [x for x in letters if letters.count(x) == 1]
    mine = next(i for i, operand in enumerate(operands) if operand is weights)
    for term, operand in zip(terms, operands, strict=True):
        dims = tuple(d for d, letter in enumerate(terms[mine]) if letter in term and letter not in result)
        if operand is not weights and dims and "." not in (terms[mine][d] for d in dims):
            width = math.prod(operand.shape[d] for d, letter in enumerate(term) if letter not in terms[mine])
            return _Contraction(dims, width, operand)
    return None


def _spread(term: str, rank: int) -> list[str]:
    """The letters of an einsum term, one for each dimension; "." stands for a dimension of the ellipsis."""
    before, dots, after = term.partition("...")
    return [*before, *["."] * (rank - len(before) - len(after) if dots else 0), *after]


def _covers(position: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether these dimensions of the weights run over all keys."""
    along = position.permute(*dims, *(d for d in range(position.dim()) if d not in dims))
    first = along.flatten(len(dims)) if along.dim() > len(dims) else along.unsqueeze(-1)
    places = first[..., 0].unique()
    return len(places) == int(position.max()) + 1


def _mixes(name: str, position: Tensor) -> bool:
    """Whether a layer mixes keys with one another (mixing heads, as talking heads do, leaves each at its key)."""
    if name == "linear":
        return _covers(position, (position.dim() - 1,))
    if name.startswith("conv"):
        return _covers(position, (1,)) or name != "conv2d"
    return "norm" in name and name != "normalize" and name != "norm"


def _gates(name: str, args: tuple[Any, ...], weights: Tensor) -> bool:
    """Whether the weights are multiplied with something of their own size that is no mask: a gate, not attention."""
    if name not in ("mul", "__mul__", "__rmul__", "__imul__", "multiply"):
        return False
    others = [value for value in args if isinstance(value, Tensor) and value is not weights]
    return any(
        other.numel() == weights.numel() > 1 and other.dtype != torch.bool and len(other.detach().unique()) > 2
        for other in others
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _replaced(values: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(values, dict):
        return {key: new if value is old else value for key, value in values.items()}
    return tuple(new if value is old else value for value in values)


def matrix_shape(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Shape (..., queries, keys) of the attention matrix of queries (..., queries, E) and keys (..., keys, E)."""
    if q.dim() == k.dim() and q.dim() > 3 and q.shape[-3] != k.shape[-3]:  # grouped queries: the heads are q's
        return (*np.broadcast_shapes(q.shape[:-3], k.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-2])
    return (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])


def _describe(
    call: Call, shape: tuple[int, ...], width: int, images: int, modules: dict[str, nn.Module]
) -> AttentionSite:
    queries, keys = shape[-2:]
    matrices = math.prod(shape[:-2])
    module = modules[call.module]
    if len(shape) > 3:
        heads = shape[-3]
    else:
        heads = next((int(n) for n in map(module.__dict__.get, _HEADS) if isinstance(n, int) and n > 0), 0)
        heads = heads if heads and matrices % (heads * images) == 0 else max(matrices // images, 1)
    kind: Kind = "global"
    if call.function != MULTI_HEAD and _over_channels(call.module, modules, heads, keys, width):
        kind = "channel"
    elif matrices > images * heads:
        kind = "windowed"
    elif queries != keys:
        kind = "reduced" if keys < queries else "cross"
    return AttentionSite(call.module or "(root)", call.function, shape, heads, queries, keys, kind, call.occurrence)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "nhead", "heads", "n_head")


def _over_channels(name: str, modules: dict[str, nn.Module], heads: int, keys: int, width: int) -> bool:
    """Whether heads x keys is a width of the weights nearby, and heads x width of the values is none.

    In channel attention (XCiT, Restormer, DANet) keys are channels and the values of a key are the positions.
    """
    while name and next(modules[name].parameters(), None) is None:
        name = name.rpartition(".")[0]
    widths = {size for parameter in modules[name].parameters() for size in parameter.shape[:2]}
    return heads * keys in widths and heads * width not in widths
