"""What the loop does not do: gradients of weights, waits for a device, work done before, looks nobody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NB_CLASSES, SHAPE, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attacks import PatchAttack, PixelAttack, UniversalPatchAttack, optimize, threats
from attacks.frozen import frozen
from attacks.late import Late, _Copy
from attacks.minimal_norm import MinimalNormOptions, smallest_perturbation
from attacks.options import PatchOptions
from ramdefense.outputs import predictions_of
from ramdefense.segmenter import PyTorchSegmenter

OPTIONS: dict[str, Any] = {"patch_shape": (5, 6), "max_iter": 4, "eps_step": 0.1, "verbose": False}


class Spy(PyTorchSegmenter):
    """Keeps the graph of each pass that has one, and counts those that have none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, NB_CLASSES, SHAPE)
        self.asked: list[set[int]] = []  # the leaves that each graph would bring a gradient to
        self.without = 0
        self.backwards = 0

    def logits(self, images: Tensor) -> Tensor:
        logits = super().logits(images)
        if logits.requires_grad:
            self.asked.append({id(leaf) for leaf in leaves(logits)})
            logits.register_hook(lambda _: setattr(self, "backwards", self.backwards + 1))
        else:
            self.without += 1
        return logits


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward pass would end at."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


# ---------------------------------------------------------------- the prediction


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan]), min_size=18, max_size=18),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_predictions_are_argmax_for_ties_nan_and_every_layout(
    values: list[float], dtype: torch.dtype, last: bool
) -> None:
    logits = torch.tensor(values).view(1, 3, 2, 3).to(dtype)
    logits = logits.contiguous(memory_format=torch.channels_last) if last else logits
    assert torch.equal(predictions_of(logits), logits.argmax(1))


# ---------------------------------------------------------------- weights


def universal(segmenter: Spy) -> None:
    UniversalPatchAttack(segmenter, **OPTIONS).fit((random_images(), random_labels()))


def minimal(segmenter: Spy) -> None:
    smallest_perturbation(segmenter, random_images(2), random_labels(2), MinimalNormOptions(max_iter=3, verbose=False))


RUNS: dict[str, Callable[[Spy], Any]] = {
    "patch": lambda segmenter: PatchAttack(segmenter, **OPTIONS).generate(random_images(), random_labels()),
    "pixel": lambda segmenter: PixelAttack(segmenter, max_iter=3, verbose=False).generate(
        random_images(), random_labels()
    ),
    "universal": universal,
    "minimal norm": minimal,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("make", [tiny_cnn, tiny_attention])
def test_no_weight_is_in_the_graph_of_any_attack(run: Callable[[Spy], Any], make: Callable[[], nn.Module]) -> None:
    spy = Spy(make())
    fixed = next(spy.model.parameters()).requires_grad_(False)
    run(spy)
    weights = {id(parameter) for parameter in spy.model.parameters()}
    assert spy.asked
    assert all(len(found) == 1 and not found & weights for found in spy.asked), "the variable, and nothing else"
    assert all(parameter.requires_grad == (parameter is not fixed) for parameter in spy.model.parameters())
    assert all(parameter.grad is None for parameter in spy.model.parameters())


def test_weights_ask_again_after_an_error() -> None:
    class Interrupting(Spy):
        def logits(self, images: Tensor) -> Tensor:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().logits(images)

    model = tiny_cnn()
    attack = PatchAttack(Interrupting(model), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        attack.generate(random_images(), random_labels())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_weights_change_no_bit_and_leave_less_in_memory() -> None:
    model, images = tiny_attention().eval(), random_images()

    def pass_of() -> tuple[Tensor, int]:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaf = images.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(leaf).square().sum()
        return torch.autograd.grad(loss, leaf)[0], sum(kept.values())

    plain, more = pass_of()
    with frozen(model):
        again, less = pass_of()
    assert torch.equal(plain, again)
    tokens = len(images) * (SHAPE[1] // 4) * (SHAPE[2] // 4) * 16 * 4  # what the linear layer took in, in bytes
    assert more - less >= tokens


# ---------------------------------------------------------------- passes and other work


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_step_is_one_forward_and_one_backward_pass(keep_best: bool) -> None:
    spy = Spy(tiny_cnn())
    options = {**OPTIONS, "keep_best": keep_best, "target": "permute"}
    result = PatchAttack(spy, **options)
    result.generate(random_images(), random_labels())
    assert (len(spy.asked), spy.backwards) == (4, 4)
    assert spy.without == 3, "the last patch's, and two that tell whether the model is random"


@pytest.mark.parametrize(("keep_best", "looks"), [(True, 5), (False, 1)])
def test_success_is_counted_where_it_is_asked_for(
    keep_best: bool, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []

    def counting(logits: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
        made.append(torch.zeros(len(logits)))
        return made[-1]

    monkeypatch.setattr(optimize, "off_label", counting)
    PatchAttack(Spy(tiny_cnn()), keep_best=keep_best, **OPTIONS).generate(random_images(), random_labels())
    assert len(made) == looks


def test_the_pixels_under_the_patch_are_found_once_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    original = threats.covered_by

    def counting(*args: Any) -> Tensor:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(threats, "covered_by", counting)
    PatchAttack(Spy(tiny_cnn()), batch_size=3, **OPTIONS).generate(random_images(5), random_labels(5))
    assert len(found) == 2


# ---------------------------------------------------------------- no wait for a device

TO_THE_HOST = {"numpy", "tolist", "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}
COUNTING = {"nonzero", "masked_select", "unique", "equal", "bincount", "allclose", "repeat_interleave"}
INSIDE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}


class NoHost(TorchFunctionMode):
    """Refuses what brings numbers to the host, or makes as many as the device has first to count."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in TO_THE_HOST | COUNTING, f"{name} waits for the device."
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [part for part in index if isinstance(part, Tensor) and part.dtype == torch.bool]
            assert not masks, "An index by a mask waits for the device."
        return func(*args, **(kwargs or {}))


def indices(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an index of PyTorch's own is given, `index(values, indices)`."""
    return tuple(args[1]) if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()


class NoWait(TorchDispatchMode):
    """Refuses the same inside of PyTorch's functions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(getattr(part, "dtype", None) == torch.bool for part in indices(args))
        waits = name in INSIDE or masks
        assert not waits, f"{name} waits for the device."
        return func(*args, **(kwargs or {}))


# the second imports the compiler, which takes seconds
watched = pytest.mark.parametrize("watch", [NoHost, pytest.param(NoWait, marks=pytest.mark.slow)])

WAITING: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda t: bool(t.any()),
    "float": lambda t: float(t.sum()),
    "item": lambda t: t.sum().item(),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "equal": lambda t: t.equal(t + 1),
}


@watched
@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_what_watches_for_waits_sees_them(wait: Callable[[Tensor], Any], watch: type[Any]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), watch():
        wait(torch.ones(3))


@pytest.mark.parametrize("bring", [Tensor.numpy, Tensor.tolist, Tensor.cpu])
def test_arrays_and_lists_are_seen(bring: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHost():
        bring(torch.ones(3))


STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"momentum": 0.0},
    "nesterov": {"optimizer": "nesterov"},
    "adam": {"optimizer": "adam"},
    "apgd": {"optimizer": "apgd"},
    "smoothed": {"len_kernel": 3},
    "last": {"keep_best": False},
    "several objectives": {"objective": ("margin", "segpgd", "cospgd", "jensen_shannon", "ssap")},
    "on target": {"target": "permute"},
}


def late(_: bool) -> Late:
    """As on an accelerator."""
    return Late(True)


@watched
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_no_step_waits_for_the_device(
    options: dict[str, Any], watch: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fixed before a run may wait, and what is read a step late is at the host by then."""
    run, read = optimize._run, _Copy.read
    runs: list[int] = []

    def watched(*args: Any) -> Any:
        with watch():
            runs.append(1)
            return run(*args)

    def allowed(copy: _Copy) -> list[bool]:
        with torch._C.DisableTorchFunction():
            return read(copy)

    monkeypatch.setattr(optimize, "_run", watched)
    monkeypatch.setattr(optimize, "Late", late)
    monkeypatch.setattr(_Copy, "read", allowed)
    # the state of a rule is made once for each run, and its seeds are numbers of the host
    monkeypatch.setattr(optimize, "_keys", lambda problem, run: torch.zeros(len(problem), dtype=torch.int64))
    PatchAttack(PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE), **{**OPTIONS, **options}).generate(
        random_images(3), random_labels(3)
    )
    assert runs


def easy(count: int) -> tuple[PyTorchSegmenter, Tensor, Tensor]:
    """A linear model in double precision, and images on each of which there is one pixel to win, nearer or farther."""
    torch.manual_seed(0)
    model = PyTorchSegmenter(nn.Conv2d(3, 2, 9, padding=4).double(), 2, (3, 10, 12))
    images = torch.rand(count, 3, 10, 12, dtype=torch.float64)
    labels = torch.full((count, 10, 12), 255)
    with torch.no_grad():
        own = model.logits(images).argmax(1)
    for row in range(count):
        labels[row, row % 3 + 2, 5] = own[row, row % 3 + 2, 5]
    return model, images, labels


@pytest.mark.parametrize(
    "options",
    [{}, {"num_restarts": 3}, {"optimizer": "apgd"}, {"optimizer": "square"}, {"batch_size": 4}, {"keep_best": False},
     {"objective": ("margin", "cross_entropy"), "num_restarts": 2}],
    ids=str,
)  # fmt: skip
def test_reading_late_changes_no_result(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is done leaves a step later, and what it has is not touched in between."""
    model, images, labels = easy(9)
    given = {"patch_shape": (4, 4), "patch_location": (0, 0), "max_iter": 12, "eps_step": 0.04, "verbose": False}
    attack = PatchAttack(model, **given, **options)
    expected = attack.generate(images, labels)
    at_once = attack.result
    monkeypatch.setattr(optimize, "Late", late)
    made = attack.generate(images, labels)
    assert at_once is not None
    assert attack.result is not None
    assert (made - expected).abs().max() < 1e-12
    assert attack.result.criterion == at_once.criterion
    assert attack.result.loss == pytest.approx(at_once.loss, abs=1e-12)
    assert attack.result.steps == at_once.steps
    if options != {"keep_best": False}:
        assert 1.0 in at_once.criterion
        assert len(set(at_once.steps)) > 2, "they leave one after the other"
        assert at_once.forwards < attack.result.forwards


def test_late_values_follow_the_images_that_stay() -> None:
    flags = Late(True)
    assert flags.read(torch.tensor([True, False, False, False])) == [False] * 4
    assert flags.read(torch.tensor([True, False, True, True])) == [True, False, False, False]
    flags.rows(torch.tensor([1, 2, 3]))
    assert flags.read(torch.tensor([False, False, False])) == [False, True, True]
    assert Late(False).read(torch.tensor([True, False])) == [True, False]


def test_a_copy_is_of_the_moment() -> None:
    flags, values = Late(True), torch.tensor([True])
    flags.read(values)
    values.fill_(False)
    assert flags.read(values) == [True]


def test_options_are_checked_before_weights_are_frozen() -> None:
    model = tiny_cnn()
    segmenter = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    with pytest.raises(ValueError, match="does not fit"):
        optimize.make_patch(segmenter, random_images(1), random_labels(1), PatchOptions(patch_shape=(99, 99)))
    assert all(parameter.requires_grad for parameter in model.parameters())
