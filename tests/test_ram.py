"""Hardened models and segmenters: what they promise beside the mathematics."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import ramdefense
from ramdefense import PyTorchSegmenter, RAMDefense, Traits, defence, harden, register_defence
from ramdefense.defences import defences
from ramdefense.ram import HardenedModel
from ramdefense.refinement import Refinement
from ramdefense.streams import keep_mask
from ramdefense.traits import conditions

CLASSES, SHAPE = 5, (3, 16, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def attend(self, x: Tensor, keep: Tensor | float = 1.0) -> Tensor:
        q, k, v = self.attn(self.norm(x)).chunk(3, -1)
        return ((q @ k.mT).softmax(-1) * keep) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """Two blocks of global attention over 4 x 4 patches; `how` runs a block."""

    how = staticmethod(lambda block, x: block(x))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, CLASSES, 1)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = x.flatten(2).mT
        for block in self.blocks:
            tokens = self.how(block, tokens)
        return self.head(tokens.mT.unflatten(2, x.shape[2:]))


class PlainCheckpoint(Net):
    how = staticmethod(lambda block, x: checkpoint(block, x, use_reentrant=False))


class ReentrantCheckpoint(Net):
    how = staticmethod(lambda block, x: checkpoint(block, x, use_reentrant=True))


class OpaqueCheckpoint(Net):
    how = staticmethod(lambda block, x: checkpoint(lambda y: block(y * 1), x, use_reentrant=False))


def images(count: int = 5) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


CLAMP: dict[str, Any] = {"max_attention": "3/N", "suppression": "clamp", "dropout": 0.3, "compensate": "none"}


def hardened(model: nn.Module | None = None, **options: Any) -> HardenedModel:
    return harden(Net().eval() if model is None else model, **{**CLAMP, "example": SHAPE, **options})


def segmenter(model: nn.Module | None = None, kind: type[PyTorchSegmenter] = PyTorchSegmenter) -> PyTorchSegmenter:
    return kind(Net() if model is None else model, CLASSES, SHAPE, preprocessing=((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))


# --------------------------------------------------------------------------------------------------- the masks


def by_hand(model: Net, x: Tensor, p: float, *, seed: int, draw: int, streams: tuple[int, ...]) -> Tensor:
    x = model.stem(x)
    tokens = x.flatten(2).mT
    for i, block in enumerate(model.blocks):
        keep = keep_mask((len(x), 16, 16), p, seed=seed, draw=draw, images=streams, site=f"blocks.{i}", call=0)
        tokens = tokens + block.attend(tokens, keep)
        tokens = tokens + block.mlp(tokens)
    return model.head(tokens.mT.unflatten(2, x.shape[2:]))


def test_the_masks_are_those_of_the_streams() -> None:
    model = Net().eval()
    robust = hardened(model, max_attention=1.0, seed=9)
    x = images()
    for draw in range(2):  # a bare pass takes the next draw, and images 0..N-1
        expected = by_hand(model, x, 0.3, seed=9, draw=draw, streams=(0, 1, 2, 3, 4))
        torch.testing.assert_close(robust(x), expected, rtol=1e-5, atol=1e-6)
        assert robust.refined_calls == 2
    with conditions(robust, images=(7, 2), draw=-1):
        got = robust(x[:2])
    expected = by_hand(model, x[:2], 0.3, seed=9, draw=-1, streams=(7, 2))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    expected = by_hand(model, x, 0.3, seed=9, draw=2, streams=(0, 1, 2, 3, 4))
    torch.testing.assert_close(robust(x), expected, rtol=1e-5, atol=1e-6)


def test_random_in_eval_and_in_training_and_under_every_grad_mode() -> None:
    robust = hardened()
    x = images()
    results = []
    for training in (False, True):
        robust.train(training)
        assert robust.model.training is training
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), conditions(robust, draw=3):
                results.append(robust(x).detach().clone())
    assert all(torch.equal(result, results[0]) for result in results)
    assert (robust(x) - robust(x)).abs().max() > 1e-4


def test_torchs_random_state_is_neither_read_nor_changed() -> None:
    robust = hardened()
    x = images()
    before = torch.get_rng_state()
    with conditions(robust, draw=0):
        first = robust(x)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(99)
        assert torch.equal(first, robust(x))


@pytest.mark.parametrize("unit", ["element", "key"])
def test_a_prediction_does_not_depend_on_the_batch_size(unit: str) -> None:
    predictions = []
    for batch_size in (1, 2, 5):
        robust = RAMDefense(segmenter(), dropout=0.4, unit=unit, seed=3)
        predictions.append(robust.predict(images().numpy(), batch_size=batch_size))
        second = robust.predict(images().numpy(), batch_size=batch_size)
        assert np.abs(second - predictions[-1]).max() > 1e-3  # the next call is the next draw
    for prediction in predictions[1:]:
        np.testing.assert_allclose(prediction, predictions[0], rtol=1e-5, atol=1e-5)
    other = RAMDefense(segmenter(), dropout=0.4, unit=unit, seed=4).predict(images().numpy())
    assert np.abs(other - predictions[0]).max() > 1e-3


def test_streams_that_do_not_fit_the_batch_are_refused() -> None:
    robust = hardened()
    with conditions(robust, images=(1, 2)), pytest.raises(ValueError, match="2 image streams and the batch has 5"):
        robust(images())


# ------------------------------------------------------------------------------------------------- gradients


def test_the_straight_through_gradient_is_asked_for_by_the_conditions() -> None:
    robust = hardened(max_attention=1e-4, dropout=0.0)  # the clamp acts on all elements

    def gradient(straight_through: bool) -> Tensor:
        weight = robust.model.blocks[0].attn.weight
        with conditions(robust, straight_through=straight_through):
            (grad,) = torch.autograd.grad(robust(images()).square().sum(), weight)
        return grad[:8]  # of the queries

    assert gradient(False).abs().max() < 1e-3 * gradient(True).abs().max()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the probe
@pytest.mark.parametrize("kind", [PlainCheckpoint, ReentrantCheckpoint])
def test_a_checkpoint_recomputes_with_the_masks_of_its_own_forward_pass(kind: type[Net]) -> None:
    """Two passes with different draws before the backward passes: each recomputes under its own."""
    reference, robust = hardened(Net()), hardened(kind())
    gradients = []
    for model in (reference, robust):
        x = images().requires_grad_()
        outputs = []
        for draw, streams in ((5, (0, 1, 2, 3, 4)), (6, (9, 8, 7, 6, 5))):
            with conditions(model, draw=draw, images=streams):
                outputs.append(model(x))
        sum((i + 1) * output.square().sum() for i, output in enumerate(outputs)).backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
        assert model.refined_calls == 2
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert robust._watcher.current is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_hardened_model(reentrant: bool) -> None:
    gradients = []
    for wrapped in (False, True):
        robust = hardened(seed=2)
        x = images().requires_grad_()
        output = checkpoint(robust, x, use_reentrant=reentrant) if wrapped else robust(x)
        robust(images())  # another pass in between takes a draw of its own
        output.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_whose_draw_cannot_be_known_is_an_error() -> None:
    output = hardened(OpaqueCheckpoint())(images())
    with pytest.raises(RuntimeError, match=r"blocks\.1 runs during a backward pass.*random draw is not known"):
        output.sum().backward()


def test_a_backward_pass_leaves_no_notes_behind() -> None:
    robust = hardened()
    for _ in range(3):
        robust(images().requires_grad_()).sum().backward()
    with torch.no_grad():
        robust(images())
    assert len(robust._watcher._notes) == 0


# --------------------------------------------------------------------------------------- a module like any other


def test_the_original_stays_as_it_was() -> None:
    model = Net().train()
    before = pickle.dumps(model.state_dict())
    robust = hardened(model)
    robust(images()).sum().backward()
    assert pickle.dumps(model.state_dict()) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
    assert robust.training
    assert not {id(p) for p in model.parameters()} & {id(p) for p in robust.parameters()}


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("example", [None, SHAPE])
def test_copies_do_the_same_and_are_on_their_own(copied: Any, used: bool, example: Any) -> None:
    robust = hardened(example=example)
    if used:
        robust(images())
    other = copied(robust)
    with torch.no_grad():
        assert torch.equal(other(images()), robust(images()))  # the same next draw
        assert other.refined_calls == 2
        next(other.parameters()).zero_()
        assert (other(images()) - robust(images())).abs().max() > 1e-3
    assert other.sites == robust.sites
    assert repr(other) == repr(robust)


def test_hooks_registered_after_a_pickle_was_loaded_do_not_replace_those_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are numbered by a counter of the process, which starts again in the process that loads."""
    robust = hardened()
    expected = copy.deepcopy(robust)(images())
    data = pickle.dumps(robust)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    other = pickle.loads(data)
    for module in other.modules():
        for _ in range(20):
            module.register_forward_pre_hook(lambda *_: None)
            module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(other(images()), expected)
    assert other.refined_calls == 2


def test_state_dict_and_types_and_devices() -> None:
    robust, other = hardened(), hardened(seed=1)
    state = robust.state_dict()
    assert set(state) == {f"model.{name}" for name in Net().state_dict()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(state)
    other.seed = robust.seed
    assert torch.equal(other(images()), robust(images()))
    assert robust.double()(images().double()).dtype == torch.float64
    assert robust.refined_calls == 2
    assert robust.bfloat16()(images().bfloat16()).dtype == torch.bfloat16
    assert robust.half()(images().half()).dtype == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    robust = hardened().cuda()
    x = images().cuda()
    with conditions(robust, draw=1):
        whole, parts = robust(x), []
        for i in range(5):
            with conditions(robust, draw=1, images=(i,)):
                parts.append(robust(x[i : i + 1]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-3)
    plain, checked = hardened(Net()).cuda(), hardened(PlainCheckpoint()).cuda()
    gradients = []
    for model in (plain, checked):
        x = images().cuda().requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_arguments_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
            return self.net(pixel_values) * scale

    robust = harden(Named(), dropout=0.2)
    assert robust.sites == ()
    assert robust(pixel_values=images(), scale=2.0).shape == (5, CLASSES, 4, 4)
    assert [site.name for site in robust.sites] == ["net.blocks.0", "net.blocks.1"]


def test_traits() -> None:
    assert hardened().traits == Traits(random=True, straight_through=True)
    assert hardened(dropout=0.0).traits == Traits(random=False, straight_through=True)
    assert hardened(max_attention=1.0).traits == Traits(random=True, straight_through=False)
    assert hardened(max_attention=1.0, dropout=0.0).traits == Traits()
    # through the other suppressions the true gradient passes
    assert hardened(suppression="cap").traits == Traits(random=True, straight_through=False)


def test_repr_shows_every_parameter() -> None:
    text = repr(hardened(seed=8, unit="key"))
    for part in ("max_attention='3/N'", "suppression='clamp'", "dropout=0.3", "unit='key'", "compensate=", "seed=8"):
        assert part in text
        assert part in repr(RAMDefense(segmenter(), **{**CLAMP, "seed": 8, "unit": "key"}))


def test_the_defaults_are_the_same_behind_every_door() -> None:
    refinement = Refinement()
    assert harden(Net()).refinement == refinement
    assert RAMDefense(segmenter()).model.refinement == refinement


# ------------------------------------------------------------------------------------------------- which sites


def test_include_and_exclude() -> None:
    def names(**options: Any) -> list[str]:
        robust = hardened(**options)
        robust(images())
        assert robust.refined_calls == len(robust.sites)
        return [site.name for site in robust.sites]

    assert names() == names(include="*") == names(include=["blocks.0", "*.1"]) == ["blocks.0", "blocks.1"]
    assert names(include="*.1") == names(exclude="blocks.0") == ["blocks.1"]
    assert names(include="blocks.*", exclude=["*.1"]) == ["blocks.0"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_lists_the_sites(option: str) -> None:
    with pytest.raises(ValueError, match=option + r"='blocks\.7' matches no site; the sites are blocks\.0 \(glob"):
        hardened(**{option: ["blocks.0", "blocks.7"]})
    with pytest.raises(ValueError, match="leave no site"):
        hardened(exclude="*")
    with pytest.raises(TypeError, match="include is 3"):
        hardened(include=3)


def test_a_model_without_attention() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"no attention was found.*scaled_dot_product_attention.*softmax"):
        harden(model, example=SHAPE)
    late = harden(model)
    with pytest.raises(ValueError, match="no attention was found"):
        late(images())
    with pytest.raises(ValueError, match="no attention was found"):
        RAMDefense(segmenter(model))


def test_a_pass_that_refined_nothing_is_an_error() -> None:
    robust = hardened()
    robust.model.blocks = nn.ModuleList([nn.Identity()])
    with pytest.raises(RuntimeError, match=r"nothing was refined.*blocks\.0, blocks\.1"):
        robust(images())


def test_a_softmax_that_the_probe_did_not_see_is_told() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            return output.softmax(1) if self.training else output

    robust = hardened(Auxiliary()).train()
    with pytest.warns(RuntimeWarning, match=r"\(root\) calls softmax.*not refined"):
        output = robust(images())
    torch.testing.assert_close(output.sum(1), torch.ones(5, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        robust(images())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_attention": 0.0}, ValueError, r"max_attention=0\.0"),
        ({"max_attention": 1.5}, ValueError, r"max_attention=1\.5"),
        ({"max_attention": "3/M"}, ValueError, "3/M"),
        ({"dropout": 1.0}, ValueError, r"dropout=1\.0"),
        ({"suppression": "clip"}, ValueError, "clip"),
        ({"unit": "row"}, ValueError, "row"),
        ({"seed": 1.5}, TypeError, r"seed is 1\.5"),
        ({"example": (3,)}, ValueError, "example is"),
    ],
)
def test_bad_options_are_named_before_any_work(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hardened(**options)
    with pytest.raises(error, match=message):
        RAMDefense(segmenter(), **options)


def test_the_wrong_kind_of_thing_is_named() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        harden(segmenter())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Net; wrap a model in ramdefense\.PyTorchSegmenter first"):
        RAMDefense(Net())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- the segmenter


class Doubled(PyTorchSegmenter):
    """A user's own segmenter."""

    def logits(self, images: Tensor) -> Tensor:
        return 2 * super().logits(images)


def test_everything_but_the_model_is_the_segmenters() -> None:
    plain = segmenter()
    robust = RAMDefense(plain, max_attention=1.0, dropout=0.0)
    assert isinstance(robust, PyTorchSegmenter)
    assert PyTorchSegmenter in type(robust).__mro__
    for name in ("nb_classes", "input_shape", "clip_values", "ignore_index", "device", "channels_first"):
        assert getattr(robust, name) == getattr(plain, name)
    assert isinstance(robust.model, HardenedModel)
    assert type(plain.model) is Net
    np.testing.assert_array_equal(robust.predict(images().numpy()), plain.predict(images().numpy()))
    assert robust.traits == Traits()
    assert RAMDefense(plain, **CLAMP).traits == Traits(random=True, straight_through=True)


def test_what_a_users_segmenter_overrides_stays() -> None:
    plain = segmenter(kind=Doubled)
    robust = RAMDefense(plain, max_attention=1.0, dropout=0.0)
    assert isinstance(robust, RAMDefense)
    assert isinstance(robust, Doubled)
    np.testing.assert_array_equal(robust.predict(images().numpy()), plain.predict(images().numpy()))
    again = RAMDefense(robust, dropout=0.2)
    assert type(again) is type(robust)
    assert again.model.sites[0].name == "model.blocks.0"


@pytest.mark.parametrize("kind", [PyTorchSegmenter, Doubled])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle])
def test_copies_of_a_defended_segmenter(copied: Any, kind: type[PyTorchSegmenter]) -> None:
    robust = RAMDefense(segmenter(kind=kind), seed=5)
    other = copied(robust)
    assert type(other) is type(robust)
    for each in (other, robust):
        each.model._draws = 0
    with robust.conditions(draw=4):
        expected = robust.predict(images().numpy())
    with other.conditions(draw=4):
        np.testing.assert_array_equal(other.predict(images().numpy()), expected)


def test_art_attacks_a_defended_segmenter() -> None:
    robust = RAMDefense(segmenter(), dropout=0.1)
    x = images().numpy()
    attack = ProjectedGradientDescent(robust, eps=0.1, eps_step=0.05, max_iter=3, verbose=False)
    adversarial = attack.generate(x)
    assert np.abs(adversarial - x).max() == pytest.approx(0.1, abs=1e-6)
    assert robust.compute_loss(adversarial, robust.predict_labels(x)).mean() > robust.compute_loss(
        x, robust.predict_labels(x)
    ).mean()


# -------------------------------------------------------------------------------------------------- the registry


def test_defences_by_name() -> None:
    plain = segmenter()
    assert defences()[:2] == ["none", "ram"]
    assert defence("none")(plain) is plain
    assert isinstance(defence("ram")(plain, dropout=0.2), RAMDefense)
    with pytest.raises(ValueError, match="'ram' is registered already"):
        register_defence("ram")(lambda given: given)
    with pytest.raises(ValueError, match=r"'rma'.*did you mean 'ram'.*'none', 'ram'"):
        defence("rma")


def test_a_defence_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramdefense.defences._DEFENCES", {"none": defence("none")})

    @register_defence("mine")
    def mine(given: PyTorchSegmenter) -> PyTorchSegmenter:
        return given.with_model(copy.deepcopy(given.model))

    assert defences() == ["none", "mine"]
    assert defence("mine") is mine


def test_import_is_light_and_complete() -> None:
    code = "import sys, ramdefense as r; assert 'torch' not in sys.modules; assert set(r.__all__) <= set(dir(r))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(ramdefense, name) is not None for name in ramdefense.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ramdefense.nothing
