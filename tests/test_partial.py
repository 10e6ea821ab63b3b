"""Partial passes: equal to full ones, local where they are, and left alone where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optimize import Segmenter, frames, make
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ramdefense.locality as locality
import ramdefense.partial as partial
from attacks.diversity import InputDiversity
from attacks.options import PatchOptions
from evaluation.networks import ARCHITECTURES, Fusion, Residual, build_network, conv
from ramdefense.locality import Arguments, Box, Span
from ramdefense.partial import NotPartialError, PartialForward
from ramdefense.ram import harden
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import conditions

Forward = Callable[[Tensor], Tensor]


def at(top: int, left: int, height: int, width: int) -> Box:
    return Box(Span(top, top + height), Span(left, left + width))


def drawn(size: tuple[int, int], box: Box, seed: int = 0, count: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """Clean images, and the same with noise in the box."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, 3, *size, generator=generator, dtype=dtype)
    other = clean.clone()
    box.of(other).copy_(torch.rand(box.of(other).shape, generator=generator, dtype=dtype))
    return clean, other


def slope(function: Forward, images: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of a weighted sum of it to the pixels in the box."""
    leaf = box.of(images).clone().requires_grad_()
    whole = images.clone()
    box.of(whole).copy_(leaf)
    output = function(whole)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaf, allow_unused=True)[0]


def equal_passes(function: Forward, size: tuple[int, int], box: Box, seed: int = 0) -> PartialForward:
    """A partial pass over `function`, after its values and gradients were found to be those of the full one."""
    clean, images = drawn(size, box, seed)
    part = PartialForward(function, clean, box)
    for now in (images, clean, images.flip(0).where(box_mask(size, box), clean)):
        value, gradient = slope(function, now, box)
        own_value, own_gradient = slope(part.attempt, now, box)
        torch.testing.assert_close(own_value, value, rtol=1e-9, atol=1e-9)
        assert (own_gradient is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(own_gradient, gradient, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(part.attempt(now), value, rtol=1e-9, atol=1e-9)
    return part


def box_mask(size: tuple[int, int], box: Box) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    box.of(mask).fill_(True)
    return mask


# ----------------------------------------------------------------------------------------------- random local networks


@st.composite
def layers(draw: st.DrawFn, channels: int) -> tuple[nn.Module, int]:
    """A layer on so many channels, and how many come out."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding = draw(st.tuples(*(st.integers(0, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True))))
    half = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    pad = draw(st.tuples(*[st.integers(-1, 2)] * 4))
    factor = draw(st.integers(1, 3))
    choices: list[Callable[[], tuple[nn.Module, int]]] = [
        lambda: (nn.Conv2d(channels, 4, kernel, stride, padding, dilation, padding_mode=mode), 4),
        lambda: (nn.Conv2d(channels, 6, kernel, padding="same", dilation=dilation), 6),
        lambda: (nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False), channels),
        lambda: (nn.MaxPool2d(kernel, stride, half, dilation, ceil_mode=factor == 1), channels),
        lambda: (nn.AvgPool2d(kernel, stride, half, ceil_mode=factor == 1, count_include_pad=factor == 2), channels),
        lambda: (nn.ReLU(inplace=factor == 1), channels),
        lambda: (nn.GELU(), channels),
        lambda: (nn.Softmax(dim=1), channels),
        lambda: (nn.BatchNorm2d(channels), channels),
        lambda: (nn.ZeroPad2d(pad), channels),
        lambda: (nn.ConstantPad2d(pad, 0.5), channels),
        lambda: (nn.ReflectionPad2d([abs(p) for p in pad]), channels),
        lambda: (nn.ReplicationPad2d(pad), channels),
        lambda: (nn.CircularPad2d([abs(p) for p in pad]), channels),
        lambda: (nn.Upsample(scale_factor=factor, mode=draw(st.sampled_from(["nearest", "nearest-exact"]))), channels),
        lambda: (nn.Upsample(scale_factor=factor, mode="bilinear"), channels),
        lambda: (nn.Upsample(scale_factor=1.5, mode=draw(st.sampled_from(["nearest", "bilinear"]))), channels),
        lambda: (nn.Sequential(nn.Conv2d(channels, 8, 1), nn.PixelShuffle(2)), 2),
        lambda: (nn.PixelUnshuffle(1), channels),
        lambda: (nn.Dropout2d(0.5), channels),
    ]
    return draw(st.sampled_from(choices))()


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int], Box]:
    torch.manual_seed(draw(st.integers(0, 99)))
    size = draw(st.integers(13, 27)), draw(st.integers(13, 27))
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    box = at(draw(st.integers(0, size[0] - height)), draw(st.integers(0, size[1] - width)), height, width)
    channels, made = 3, []
    for _ in range(draw(st.integers(1, 4))):
        layer, channels = draw(layers(channels))
        made.append(layer)
    network = nn.Sequential(*made).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return network, size, box


@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_any_chain_of_layers_is_that_of_the_full_pass(case: tuple[nn.Module, tuple[int, int], Box]) -> None:
    network, size, box = case
    try:
        network(torch.rand(2, 3, *size, dtype=torch.float64))
    except (RuntimeError, ValueError):  # the maps grew too small for a kernel
        return
    equal_passes(network, size, box)


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 3), top=st.integers(0, 20),
    side=st.integers(1, 5), dilation=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_box_is_what_a_mark_reaches(
    kernel: int, stride: int, padding: int, top: int, side: int, dilation: int
) -> None:
    """NaN put into the box comes out of a convolution everywhere in the output's box and nowhere else."""
    size, box = (26, 33), at(top, 28 - top, side, side)
    padding = min(padding, dilation * (kernel - 1))
    maps = torch.rand(1, 2, *size)
    weight = torch.rand(3, 2, kernel, kernel)
    rule = locality.local(
        torch.conv2d, Arguments((maps, weight, None, stride, padding, dilation), {}), {0: box}, torch.Generator()
    )
    assert rule is not None
    box.of(maps).fill_(torch.nan)
    marked = Box.around(torch.conv2d(maps, weight, None, stride, padding, dilation).isnan())
    if marked is None:  # the windows step over it
        assert stride > kernel or dilation > 1
    elif dilation == 1 and stride <= kernel:
        assert rule.box == marked
    else:  # a window may reach over the box without touching it
        assert rule.box.joined(marked) == rule.box


# --------------------------------------------------------------------------------------------------- structures


class Skips(nn.Module):
    """Strides, skips, sums, products, concatenation, constants of all shapes, a map read twice, writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 4), conv(4, 4, stride=2), conv(4, 4, dilation=2)
        self.mixed = nn.Conv2d(12, 5, 1)
        self.grid = nn.Parameter(torch.rand(1, 4, 24, 30))
        self.column = nn.Parameter(torch.rand(24, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = (images - torch.tensor([0.5, 0.4, 0.3], dtype=images.dtype)[:, None, None]) / 0.2
        one = F.dropout(self.one(x), 0.5, self.training)
        deep = 1.5 * self.three(self.two(one))
        deep += self.two(one)
        up = F.interpolate(deep, one.shape[-2:], mode="bilinear", align_corners=False)
        gated = torch.sigmoid(up) * one + self.grid * self.column[None]
        first, last = torch.cat([one, up, gated.relu_()], dim=1).chunk(2, 1)
        return self.mixed(torch.cat((last, first), 1))


def test_a_patch_that_a_stride_steps_over_has_a_gradient_of_zero() -> None:
    """An attack asks for the gradient whatever it is."""
    equal_passes(nn.Conv2d(3, 2, 1, stride=2).double(), (13, 13), at(1, 3, 1, 1))


@pytest.mark.parametrize("box", [at(0, 0, 4, 4), at(20, 24, 4, 6), at(9, 13, 5, 1)], ids=str)
def test_skips_sums_and_writing_in_place(box: Box) -> None:
    torch.manual_seed(0)
    part = equal_passes(Skips().double().eval(), (24, 30), box)
    assert part.local_calls >= part.calls - 1  # all but the dropout, which hands on what it got


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] * (name == "segformer")) for name in ARCHITECTURES]
)
def test_the_networks_of_the_zoo(architecture: str) -> None:
    torch.manual_seed(0)
    network = build_network(architecture, 5).double().eval()
    part = equal_passes(network, (45, 70), at(33, 50, 12, 20))
    assert part.local_calls >= 1


def test_float32_differs_by_rounding_alone() -> None:
    torch.manual_seed(0)
    network, box = build_network("cnn", 5).eval(), at(80, 120, 40, 40)
    clean, images = drawn((120, 160), box, dtype=torch.float32)
    with torch.no_grad():
        one, other = network(images), PartialForward(network, clean, box).attempt(images)
    assert float((one - other).abs().max()) <= 16 * torch.finfo(torch.float32).eps * float(one.abs().max())


def test_a_box_that_is_the_image_is_refused() -> None:
    clean, _ = drawn((20, 20), at(0, 0, 20, 20))
    with pytest.raises(NotPartialError, match="run them in full"):
        PartialForward(nn.Identity(), clean, at(0, 0, 19, 19))


# ------------------------------------------------------------------------------------------- what is not local


class Squeeze(nn.Module):
    """Squeeze and excitation: a product with numbers that every place has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.gate, self.after = conv(3, 4), nn.Conv2d(4, 4, 1), conv(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.before(images)
        return self.after(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())


def backwards(x: Tensor) -> Tensor:
    return x.flip(2) + x


NOT_LOCAL: dict[str, Forward] = {
    "squeeze": Squeeze().double().eval(),
    "instance norm": nn.Sequential(conv(3, 4), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3)).double().eval(),
    "group norm": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)).double(),
    "batch norm in train mode": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.0), nn.ReLU()).double(),
    "global pool": nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Upsample((9, 9))).double().eval(),
    "cumulative": lambda x: x.cumsum(3) * 2,
    "turned over": backwards,
    "softmax over rows": lambda x: F.relu(x).softmax(2),
    "resized to another ratio": lambda x: F.interpolate(x.relu(), (17, 23), mode="bicubic"),
    "maximum of all": lambda x: F.relu(x) - F.relu(x).max(),
    "windows as channels": lambda x: F.unfold(F.relu(x), 3, padding=1),
    "linear over columns": lambda x: F.linear(x.relu(), torch.linspace(-1, 1, 24 * 24, dtype=x.dtype).view(24, 24)),
}


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_is_not_local_is_computed_in_full(name: str) -> None:
    part = equal_passes(NOT_LOCAL[name], (24, 24), at(0, 2, 6, 5))
    assert part.local_calls < part.calls


@pytest.mark.parametrize("radius", [0, 1])
def test_a_wrong_rule_is_caught(radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that takes kernels for smaller than they are computes too small a box; the true one passes."""
    own = locality.Window.reached
    monkeypatch.setattr(
        locality.Window, "reached", lambda self, *given: own(self._replace(extent=self.extent - radius), *given)
    )
    torch.manual_seed(0)
    box = at(6, 6, 6, 6)
    clean, images = drawn((24, 24), box)
    part = PartialForward(nn.Sequential(conv(3, 4), conv(4, 2)).double().eval(), clean, box)
    if radius == 0:
        part.check(images)
    else:
        with pytest.raises(NotPartialError, match="values"):
            part.check(images)


class _Hidden(torch.autograd.Function):
    """Twice its input, in a way that no tensor function sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def test_a_gradient_that_goes_by_another_way_is_caught() -> None:
    box = at(6, 6, 6, 6)
    clean, images = drawn((24, 24), box)
    with pytest.raises(NotPartialError):
        PartialForward(lambda x: _Hidden.apply(F.relu(x)) + x, clean, box).check(images)


def test_noise_that_is_not_of_the_image_is_caught() -> None:
    """Constants are taken as they are in each pass, so what was added to the clean image must be added again."""
    box = at(6, 6, 6, 6)
    clean, images = drawn((24, 24), box)
    part = PartialForward(lambda x: F.relu(x + torch.rand(x.shape, dtype=x.dtype)), clean, box)
    with pytest.raises(NotPartialError, match="values"):
        part.check(images)


def test_writing_into_a_map_that_others_see_is_refused() -> None:
    def written(x: Tensor) -> Tensor:
        y = x * 2
        tokens = y.flatten(2)
        y.relu_()
        return tokens.sum(2)

    clean, _ = drawn((24, 24), at(6, 6, 6, 6))
    with pytest.raises(NotPartialError, match="relu_ writes"):
        PartialForward(written, clean, at(6, 6, 6, 6))


def test_a_pass_that_goes_another_way_is_run_in_full() -> None:
    ways = iter([F.relu, F.relu, torch.sigmoid, torch.sigmoid, F.relu])
    box = at(6, 6, 6, 6)
    clean, images = drawn((24, 24), box)
    part = PartialForward(lambda x: next(ways)(x * 2), clean, box)
    assert torch.equal(part(images), F.relu(images * 2))
    assert part.used
    assert torch.equal(part(images), torch.sigmoid(images * 2))  # the partial pass took one way, the full one another
    assert not part.used
    assert torch.equal(part(images), F.relu(images * 2))


def test_the_model_is_left_as_it_was() -> None:
    network = Skips().double()  # in train mode, where a look changes running statistics, as a full one does
    state = {name: value.clone() for name, value in network.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    network.eval()
    random = torch.get_rng_state()
    equal_passes(network, (24, 30), at(0, 0, 4, 4))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    assert torch.equal(random, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------- what is saved


def operations(function: Forward, images: Tensor, box: Box) -> int:
    """Of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        slope(function, images, box)
    return counter.get_total_flops()


def test_only_the_box_is_computed_forwards_and_backwards() -> None:
    """Three 3×3 convolutions on 60×60 and a patch of 4×4: 6², 8², 10² places of 60² each."""
    torch.manual_seed(0)
    weights = [torch.rand(3, 3, 3, 3) for _ in range(3)]

    def network(x: Tensor) -> Tensor:
        for weight in weights:
            x = F.conv2d(x, weight, padding=1)
        return x

    box = at(20, 30, 4, 4)
    clean, images = drawn((60, 60), box, dtype=torch.float32)
    part = PartialForward(network, clean, box)
    assert part.share == (36 + 64 + 100) / (3 * 3600)
    full, left = operations(network, images, box), operations(part.attempt, images, box)
    assert left < 1.5 * part.share * full  # backwards the halo is crossed, too


def test_the_share_of_a_decoder_on_two_scales() -> None:
    torch.manual_seed(0)
    stem, deep = nn.Sequential(conv(3, 8, stride=2), Residual(8)), nn.Sequential(conv(8, 8, stride=2), Residual(8))
    decoder = Fusion([8, 8], 8, 4)
    network = nn.ModuleList([stem, deep, decoder]).double().eval()

    def forward(x: Tensor) -> Tensor:
        fine = stem(x)
        return F.interpolate(decoder([fine, deep(fine)]), x.shape[-2:], mode="bilinear", align_corners=False)

    part = equal_passes(forward, (96, 128), at(88, 120, 8, 8))
    assert part.share < 0.1
    assert not network.training


# --------------------------------------------------------------------------------------------------------- the attack


def striding(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(6, classes, 1), nn.Upsample(scale_factor=2))
    return nn.Sequential(conv(3, 6, stride=2), Residual(6), head).eval()


OPTIONS: dict[str, Any] = {"max_iter": 12, "patch_shape": (8, 8), "patch_location": (3, 5)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_location": "gradient"},  # a place for each image
        {"patch_alpha": torch.eye(8)},
        {"optimizer": "square"},
        {"batch_size": 1, "num_restarts": 2},
        {"optimizer": "adam", "keep_best": False},
    ],
    ids=str,
)
def test_an_attack_in_part_is_the_attack(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where no sign hangs on the rounding; the passes are partial, and as many are counted."""
    network = striding().double()
    images, labels = frames(3, (48, 64), 4)
    images = images.double()
    full, cost = make(Segmenter(network, 4), images, labels, **(OPTIONS | options))
    passes = []
    attempt = PartialForward.attempt
    monkeypatch.setattr(PartialForward, "attempt", lambda self, x: passes.append(len(x)) or attempt(self, x))
    part, own = make(Segmenter(network, 4), images, labels, partial=True, **(OPTIONS | options))
    torch.testing.assert_close(part.pixels, full.pixels, rtol=1e-9, atol=1e-9)
    assert part.location == full.location
    assert (own.steps, own.forwards, own.backwards) == (cost.steps, cost.forwards, cost.backwards)
    assert sum(passes) >= cost.forwards


def test_images_that_are_done_leave() -> None:
    """The first image is won at once; the others' clean maps are not mixed up."""
    network = striding().double()
    images, _ = frames(3, (48, 64), 4)
    images = images.double()
    labels = network(images).argmax(1)
    labels[1:] = (labels[1:] + 1) % 4
    given: dict[str, Any] = OPTIONS | {"targeted": True, "patch_location": (39, 55)}
    full, _ = make(Segmenter(network, 4), images, labels, **given)
    part, result = make(Segmenter(network, 4), images, labels, partial=True, **given)
    torch.testing.assert_close(part.pixels, full.pixels, rtol=1e-9, atol=1e-9)
    assert len(set(result.steps)) > 1


def test_automatic_is_used_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []
    call = PartialForward.__call__
    monkeypatch.setattr(PartialForward, "__call__", lambda self, x: used.append(x.shape) or call(self, x))
    images, labels = frames(2, (48, 64), 4)

    def looks(network: nn.Module, **options: Any) -> int:
        used.clear()
        make(Segmenter(network, 4), images, labels, **(OPTIONS | options))
        return len(used)

    torch.manual_seed(0)
    everywhere = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4))
    assert looks(striding()) == 0  # off by default
    assert looks(striding(), partial=None, max_iter=20) > 0
    assert looks(striding(), partial=None, max_iter=4) == 0  # over before it has paid
    assert looks(striding(), partial=None, max_iter=20, patch_shape=(36, 48)) == 0
    assert looks(striding(), partial=None, max_iter=20, eot=InputDiversity()) == 0
    assert looks(everywhere.train(), partial=None, max_iter=20) > 0  # the convolution alone
    assert looks(nn.Sequential(nn.InstanceNorm2d(3), everywhere), partial=None, max_iter=20) == 0


def test_what_cannot_be_done_is_said() -> None:
    images, labels = frames(2, (48, 64), 4)
    with pytest.raises(ValueError, match="`eot` moves the patch"):
        PatchOptions(partial=True, eot=InputDiversity())
    with pytest.raises(ValueError, match="`partial` is 'yes'"):
        PatchOptions(partial="yes")  # type: ignore[arg-type]
    with pytest.raises(NotPartialError, match="run them in full"):
        make(Segmenter(striding(), 4), images, labels, partial=True, patch_shape=(46, 60), patch_location=(0, 0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ram_attends_to_spliced_tokens(dropout: float) -> None:
    """The stem is partial, attention is refined in full, with the masks of the same draw."""
    torch.manual_seed(0)
    network = build_network("vit", 4).double().eval()
    hardened = harden(network, max_attention="3/N", dropout=dropout, example=torch.rand(1, 3, 48, 64).double())
    segmenter = PyTorchSegmenter(hardened, 4, (3, 48, 64), preprocessing=((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    box = at(36, 48, 12, 16)
    clean, images = drawn((48, 64), box)
    with conditions(hardened, images=(3, 1), draw=0):
        part = PartialForward(segmenter.logits, clean, box)
    assert part.local_calls > 8  # the preprocessing, too
    for draw in (0, 5):
        with conditions(hardened, images=(3, 1), draw=draw):
            value, gradient = slope(segmenter.logits, images, box)
            own_value, own_gradient = slope(part.attempt, images, box)
        torch.testing.assert_close(own_value, value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own_gradient, gradient, rtol=1e-9, atol=1e-9)


def test_maps_look_like_the_whole_ones() -> None:
    seen: list[str] = []

    def watched(x: Tensor) -> Tensor:
        y = F.relu(x) * 2
        if isinstance(y, partial.Partial):
            seen.append(repr(y))
            assert (y.shape, y.dtype, y.ndim, len(y)) == ((2, 3, 24, 24), torch.float64, 4, 2)
            assert y.size(-1) == 24
            assert y.is_contiguous()
            assert y.requires_grad == torch.is_grad_enabled()
        return y

    equal_passes(watched, (24, 24), at(6, 6, 6, 6))
    assert seen[0] == f"Partial(shape=(2, 3, 24, 24), box={at(6, 6, 6, 6)})"


@pytest.mark.parametrize("architecture", ["nonlocal", "vit", "swin"])
def test_operations_are_those_that_pytorch_counts(architecture: str) -> None:
    network, box = build_network(architecture, 5).eval(), at(0, 0, 4, 4)
    clean, images = drawn((40, 56), box, dtype=torch.float32)
    part = PartialForward(network, clean, box)
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        network(images)
    with torch.no_grad(), FlopCounterMode(display=False) as left:
        part.attempt(images)
    assert part.share == pytest.approx(left.get_total_flops() / full.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("architecture", ["cnn", "vit"])
def test_one_image_through_a_segmenter(architecture: str) -> None:
    """Whose batch normalisations have hooks then, see `ramdefense.batch_norm`."""
    torch.manual_seed(0)
    segmenter = PyTorchSegmenter(build_network(architecture, 4).double().eval(), 4, (3, 48, 64))
    box = at(36, 48, 12, 16)
    clean, images = (maps[:1] for maps in drawn((48, 64), box))
    part = PartialForward(segmenter.logits, clean, box)
    part.check(images)
    for own, full in zip(slope(part.attempt, images, box), slope(segmenter.logits, images, box), strict=True):
        torch.testing.assert_close(own, full, rtol=1e-9, atol=1e-9)
