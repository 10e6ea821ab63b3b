"""Only what a patch can change is computed: forward and backward passes on the growing box around it.

Outside the receptive field of a box of the image, activations are those of the clean image. So the clean image is run
once, with a `TorchFunctionMode` that notes every function of something that depends on the box: those that are local
(`ramdefense.locality`) with the box of their output and the clean values around it, the others as they are. Later
images are run with their box alone: a `Partial` stands for a whole map and carries the crop; a local function makes
another `Partial`, and the first one that is not local (attention, a global pool, a reshape to tokens) gets the whole
map, the crop spliced into the clean one. From there on everything runs in full, on plain tensors.

Nothing of the model is changed or copied, and hooks on it run as ever. Values and gradients are those of the full pass,
up to the rounding of the library, whose kernels may add in another order on another size. A model whose calls are not
those of the clean pass (random control flow) is noticed and run in full.

Memory: the clean values around each box, and the whole clean map wherever one is spliced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ramdefense.locality import Arguments, Box, Function, Local, local, spliced, tensors_in, worthwhile
from ramdefense.operations import multiply_adds

Forward = Callable[[Tensor], Tensor]


class NotPartialError(ValueError):
    """A model, or a box, for which a partial pass cannot be used; the message says why."""


class _Diverged(Exception):
    """A pass that makes other calls than the clean one did."""


class PartialForward:
    """A function of images that are `clean` outside a box, computed where it may differ from `function(clean)`.

    Args:
        function: images (N, C, H, W) -> tensor, such as a model in eval mode or a segmenter's `logits`. It treats equal
            images equally, or as the context in which it is called says.
        clean: (N, C, H, W); run once, without gradients.
        box: the only place where later images differ.

    Attributes:
        used: False once a pass made other calls than the clean one, and everything is computed in full.

    Raises:
        NotPartialError: the box is most of the image, or the function writes into maps that others look at.
    """

    def __init__(self, function: Forward, clean: Tensor, box: Box) -> None:
        if not worthwhile(box, clean.shape):
            raise NotPartialError(f"the box {box} is most of the images of {tuple(clean.shape)}; run them in full")
        self.function, self.clean, self.box = function, clean, box
        self.used = True
        self._tape = _recorded(function, clean, box)

    def __call__(self, images: Tensor) -> Tensor:
        """`function(images)`, differentiable.

        Args:
            images: (N, C, H, W), equal to `clean` outside the box, which is not checked.
        """
        if self.used:
            try:
                return self.attempt(images)
            except _Diverged:
                self.used = False
        return self.function(images)

    def attempt(self, images: Tensor) -> Tensor:
        """As a call, without the way back to the full pass."""
        run = _Run(self._tape)
        output = self.function(_partial(run, 0, self.box.of(images), images))
        output = output.whole() if isinstance(output, Partial) else output
        if run.position != len(self._tape.steps):
            raise _Diverged("the pass made fewer calls than the clean one")
        return output

    def rows(self, chosen: Tensor) -> PartialForward:
        """The same for some of the images; they are run once more."""
        if not self.used:
            return self
        return PartialForward(self.function, self.clean[chosen], self.box)

    @property
    def local_calls(self) -> int:
        """Calls that are computed inside a box."""
        return sum(step.local is not None for step in self._tape.steps)

    @property
    def calls(self) -> int:
        """Calls that depend on the box, up to those that look at a whole map."""
        return len(self._tape.steps)

    @property
    def share(self) -> float:
        """Multiply-adds of a partial forward pass, of those of a full one: 1 where nothing is saved."""
        return self._tape.left / max(self._tape.operations, 1)

    def check(self, images: Tensor, under: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Compare a partial pass with a full one, values and gradients.

        Args:
            images: as in a call, with noise inside the box.
            under: makes the context of each of the two passes.

        Raises:
            NotPartialError: they differ by more than rounding, or the partial pass fails.
        """
        (value, slope), (own_value, own_slope) = (
            self._slope(function, images, under) for function in (self.function, self.attempt)
        )
        # a single value that is wrong counts; a single gradient may jump where an activation is on its edge
        for what, order, one, other in (("values", math.inf, value, own_value), ("gradients", 2.0, slope, own_slope)):
            far = _length(one - other, order) if one.shape == other.shape else math.inf
            if not far <= math.sqrt(torch.finfo(one.dtype).eps) * _length(one, order):
                raise NotPartialError(f"{what} of a partial pass are not those of a full one; run this model in full")

    def _slope(
        self, function: Forward, images: Tensor, under: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Tensor, Tensor]:
        leaf = self.box.of(images).detach().clone().requires_grad_()
        with torch.enable_grad(), under():
            try:
                whole = spliced(images.detach(), leaf, slice(*self.box.rows), slice(*self.box.columns))
                output = function(whole)
                weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
                slope = torch.autograd.grad((output.flatten() * weights).sum(), leaf)[0]
            except Exception as error:
                raise NotPartialError(f"a partial pass fails ({error}); run this model in full") from error
        return output.detach(), slope


def _length(values: Tensor, order: float) -> float:
    return float(torch.linalg.vector_norm(values, order))


# ------------------------------------------------------------------------------------------------------ the clean pass


class _Step(NamedTuple):
    """One call that depends on the box.

    Attributes:
        func: the function.
        inputs: (leaf of the arguments, number of the value) of each map.
        local: how it is computed in part; None: in full.
        outputs: numbers of the values that it makes.
        itself: the leaf that it returns as it is; None for a call that makes something.
        written: the leaf that it writes into and returns, where it does.
    """

    func: Function
    inputs: tuple[tuple[int, int], ...]
    local: Local | None = None
    outputs: tuple[int, ...] = ()
    itself: int | None = None
    written: int | None = None


@dataclass
class _Tape:
    """What the clean pass did.

    Attributes:
        steps: its calls, in their order.
        boxes: of each value, by its number; 0 is the images.
        looks: shape, strides, dtype and device of each value.
        kept: whole clean maps of the values of which one was needed.
        operations: multiply-adds of the whole pass.
        left: those of a partial one.
    """

    steps: list[_Step] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    looks: list[Tensor] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    operations: int = 0
    left: float = 0.0

    def add(self, maps: Tensor, box: Box) -> int:
        self.boxes.append(box)
        self.looks.append(maps.to("meta"))
        return len(self.boxes) - 1


class _Call(NamedTuple):
    """One call of the clean pass: which of its leaves depend on the box alone, and which it has written into."""

    func: Function
    leaves: list[Any]
    boxed: dict[int, int]
    plan: Local | None
    written: list[int]
    output: Any


_WHOLE = -1  # in place of the number of a value: depends on the box, and has none


class _Recorder(TorchFunctionMode):
    """Writes the tape. `known` holds everything that depends on the box: numbers of values, or `_WHOLE`."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape
        self.known: Any = WeakIdKeyDictionary()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS or func in _OWN:
            return func(*args, **kwargs)
        arguments = Arguments(args, kwargs)
        leaves = arguments.leaves
        met = {i: self.known[x] for i, x in enumerate(leaves) if isinstance(x, Tensor) and x in self.known}
        if not met:
            output = func(*args, **kwargs)
            self._count(func, leaves, output)
            return output
        boxed = {i: number for i, number in met.items() if number != _WHOLE}
        # before the call, which may write into its arguments
        plan = None
        if boxed and len(boxed) == len(met):
            boxes = {i: self.tape.boxes[number] for i, number in boxed.items()}
            plan = local(func, arguments, boxes, self.generator)
        before = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
        output = func(*args, **kwargs)
        written = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x._version != before[i]]
        self._count(func, leaves, output, plan)
        self._note(_Call(func, leaves, boxed, plan, written, output))
        return output

    def _count(self, func: Function, leaves: list[Any], output: Any, plan: Local | None = None) -> None:
        count = multiply_adds(func, [x for x in leaves if isinstance(x, Tensor)], output)
        self.tape.operations += count
        self.tape.left += count * plan.box.area / math.prod(output.shape[-2:]) if plan and count else count

    def _note(self, call: _Call) -> None:
        inputs = tuple(call.boxed.items())
        if not call.written and (same := [i for i in call.boxed if call.leaves[i] is call.output]):
            self.tape.steps.append(_Step(call.func, inputs, itself=same[0]))
            return
        made = list(tensors_in(call.output))
        if any(i in call.boxed for i in call.written):
            self._check_written(call, made)
        if call.plan is None:
            for x in (*made, *(call.leaves[i] for i in call.written)):
                self.known[x] = _WHOLE
            if call.boxed:
                self.tape.kept |= {number: call.leaves[i].detach() for i, number in inputs}
                self.tape.steps.append(_Step(call.func, inputs))
            return
        numbers = tuple(self.tape.add(x, call.plan.box) for x in made)
        for x, number in zip(made, numbers, strict=True):
            self.known[x] = number
        written = call.written[0] if call.written else None
        self.tape.steps.append(_Step(call.func, inputs, call.plan, numbers, written=written))

    def _check_written(self, call: _Call, made: list[Tensor]) -> None:
        """Writing into a map is followed where it is that of nobody else and is what the call returns."""
        first = call.written[0]
        maps = call.leaves[first]
        alone = not maps._is_view() and not any(other._base is maps for other in list(self.known))
        returned = len(made) == 1 and made[0] is maps and len(call.written) == 1
        if call.plan is None or not returned or not alone or call.boxed[first] in self.tape.kept:
            name = getattr(call.func, "__name__", call.func)
            raise NotPartialError(f"{name} writes into a map that is looked at elsewhere; run this model in full")


def _recorded(function: Forward, clean: Tensor, box: Box) -> _Tape:
    tape = _Tape()
    images = clean.detach().clone()
    recorder = _Recorder(tape)
    recorder.known[images] = tape.add(images, box)
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), recorder:
            output = function(images)
    except NotPartialError:
        raise
    except Exception as error:  # compiled parts and the like fail in ways of their own
        raise NotPartialError(f"the clean pass fails when it is watched ({error}); run this model in full") from error
    number = recorder.known.get(output, _WHOLE) if isinstance(output, Tensor) else _WHOLE
    if number != _WHOLE:
        tape.kept[number] = output.detach()
    return tape


# ------------------------------------------------------------------------------------------------------- later passes


class _Run:
    """One pass along a tape."""

    def __init__(self, tape: _Tape) -> None:
        self.tape = tape
        self.position = 0

    def next(self, func: Function, inputs: tuple[tuple[int, int], ...]) -> _Step:
        if self.position < len(self.tape.steps):
            step = self.tape.steps[self.position]
            if step.func == func and step.inputs == inputs:
                self.position += 1
                return step
        raise _Diverged(f"the clean pass did not call {getattr(func, '__name__', func)} here")


class Partial(Tensor):
    """A whole map of which only a crop was computed; the rest is that of the clean image.

    It looks like the whole map (shape, dtype, device) and holds no values of its own.
    """

    _run: _Run
    _number: int
    _crop: Tensor
    _whole: Tensor | None

    def whole(self) -> Tensor:
        """The map itself, spliced once."""
        if self._whole is None:
            clean = self._run.tape.kept.get(self._number)
            if clean is None:
                raise _Diverged("the clean pass needed no whole map here")
            box = self._run.tape.boxes[self._number]
            self._whole = spliced(clean, self._crop, slice(*box.rows), slice(*box.columns))
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OWN:
            return func(args[0]._crop, *args[1:], **kwargs)
        arguments = Arguments(args, kwargs)
        leaves = arguments.leaves
        maps = {i: x for i, x in enumerate(leaves) if isinstance(x, Partial)}
        run = next(iter(maps.values()))._run
        step = run.next(func, tuple((i, x._number) for i, x in maps.items()))
        if step.itself is not None:
            return leaves[step.itself]
        if step.local is None:
            whole, named = arguments.given([x.whole() if i in maps else x for i, x in enumerate(leaves)])
            return func(*whole, **named)
        return _continued(run, step, step.local, arguments, maps)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _Diverged(f"{func} came without a tensor function, from a compiled or scripted part of the model")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Partial(shape={tuple(self.shape)}, box={self._run.tape.boxes[self._number]})"


def _continued(run: _Run, step: _Step, plan: Local, arguments: Arguments, maps: dict[int, Partial]) -> Any:
    """The result of a local call."""
    for i, x in maps.items():
        arguments.leaves[i] = x._crop
    crops = plan.run(step.func, arguments)
    if step.written is not None:
        target = maps[step.written]
        target._number, target._crop, target._whole = step.outputs[0], crops, None
        return target
    if isinstance(crops, Tensor):
        return _partial(run, step.outputs[0], crops)
    return type(crops)(_partial(run, number, crop) for number, crop in zip(step.outputs, crops, strict=True))


def _partial(run: _Run, number: int, crop: Tensor, whole: Tensor | None = None) -> Partial:
    look = run.tape.looks[number]
    made = Tensor._make_wrapper_subclass(
        Partial, look.shape, strides=look.stride(), dtype=look.dtype, layout=look.layout, device=crop.device
    )
    made._run, made._number, made._crop, made._whole = run, number, crop, whole
    return made


#: What a map is in memory and for autograd; the answer is that of its crop.
_OWN = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf")),
        Tensor.untyped_storage,
        Tensor.storage_offset,
        Tensor.register_hook,
    }
)

#: What a map looks like; the answer is that of the whole one.
_LOOKS = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_mkldnn",
                         "is_quantized", "is_meta", "is_nested", "itemsize")
        ),
        Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride,
        Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.element_size,
        torch.numel, torch.is_floating_point, torch.is_complex,
    }
)  # fmt: skip
