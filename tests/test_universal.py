"""One patch for a data set: the known optimum, mini-batches, resuming, the held-out frames, what a fit takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from art.exceptions import EstimatorError
from safetensors import safe_open
from tiny import NB_CLASSES, SHAPE, coloured_shapes, linear_cnn, random_images, random_labels, tiny_cnn
from torch import Tensor, nn

from attacks import EOT, FixedClass, Patch, PatchAttack, Permute, PermuteAttack, Strip, Untargeted
from attacks.objectives import OBJECTIVES
from attacks.universal import UniversalPatchAttack, frames_of
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, Traits

VOID = 255
PLACE: dict[str, Any] = {"patch_shape": (5, 6), "patch_location": (4, 7), "verbose": False}


def segmenter(model: nn.Module, nb_classes: int = NB_CLASSES) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, nb_classes, SHAPE)


class Frame(NamedTuple):
    image: Tensor
    label: Tensor


class Data:
    """Frames that note who asks for them, and that can break off."""

    def __init__(self, images: Tensor, labels: Tensor, stop_after: int | None = None) -> None:
        self.images, self.labels = images, labels
        self.asked: list[int] = []
        self.stop_after = stop_after

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Frame:
        if self.stop_after is not None and len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(index)
        return Frame(self.images[index], self.labels[index])


class Random(nn.Module):
    """A linear model whose bias depends on the draw and on the image; notes which it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_cnn()
        self.traits, self.conditions = Traits(random=True), Conditions()
        self.seen: list[tuple[int | None, tuple[int, ...] | None, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        given = self.conditions
        self.seen.append((given.draw, given.images, images.requires_grad))
        draw = 0 if given.draw is None else given.draw
        logits: Tensor = self.inner(images)
        streams = range(len(images)) if given.images is None else given.images
        noise = [torch.randn(NB_CLASSES, generator=torch.Generator().manual_seed(97 * draw + s)) for s in streams]
        return logits + torch.stack(noise)[:, :, None, None]


# ---------------------------------------------------------------------------------------------------- the optimum


def summed_loss(model: nn.Module, images: Tensor, target: Tensor, pixels: Tensor) -> float:
    patch = Patch(pixels, PLACE["patch_location"])
    counted = (target != VOID) & ~patch.mask(SHAPE[1:])
    with torch.no_grad():
        logits = model(patch.paste(images.double()))
    return float(OBJECTIVES["margin"](True)(logits, target, counted, 0.0).sum())


@pytest.mark.parametrize("keep_best", [True, False])
def test_on_a_linear_model_it_is_the_vertex_that_is_best_for_the_summed_objective(keep_best: bool) -> None:
    """With two classes the margin is linear in the pixels: each pixel's slope is a difference of two losses."""
    images, target = random_images(4), random_labels(4) % 2
    target[random_labels(4) == VOID] = VOID
    model = linear_cnn(2)
    options = {**PLACE, "targeted": True, "objective": "margin", "max_iter": 8, "eps_step": 0.1}
    attack = UniversalPatchAttack(segmenter(model, 2), **options, batch_size=4, keep_best=keep_best)
    pixels = attack.fit((images, target), held_out=0).patch.pixels
    assert pixels.shape == (3, 5, 6)
    model = model.double()
    grey = torch.full((3, 5, 6), 0.5).double()
    base = summed_loss(model, images, target, grey)
    for index in np.ndindex(3, 5, 6):
        moved = grey.clone()
        moved[index] += 0.5
        slope = summed_loss(model, images, target, moved) - base
        if not keep_best:  # which keeps the first patch that wins the most pixels
            assert pixels[index] == (0.5 if abs(slope) < 1e-6 else float(slope < 0))
    best = summed_loss(model, images, target, pixels.double())
    assert attack.result.loss[0] == pytest.approx(best / 4, rel=1e-4)
    single = PatchAttack(segmenter(linear_cnn(2), 2), **options, keep_best=False)
    single.generate(images, target)
    if not keep_best:
        for own in single.patch.pixels:
            assert not torch.equal(own, pixels), "no image's own patch is it"
            assert summed_loss(model, images, target, own.double()) >= best


def test_a_step_goes_along_the_mean_of_the_frames_gradients() -> None:
    images, labels = random_images(3), random_labels(3)
    victim = segmenter(tiny_cnn())
    options = {**PLACE, "max_iter": 1, "eps_step": 1e-3, "optimizer": "adam", "keep_best": False}
    patch = (
        UniversalPatchAttack(victim, **options, batch_size=3, objective=squared).fit((images, labels), held_out=0).patch
    )
    leaf = torch.full((1, 3, 5, 6), 0.5, requires_grad=True)
    pasted = images.clone()
    pasted[..., 4:9, 7:13] = leaf.expand(3, -1, -1, -1)
    counted = (labels != VOID) & ~patch.mask(SHAPE[1:])
    loss = squared(victim.logits(pasted), labels, counted, 0.0).sum() / 3
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = leaf.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8)
    np.testing.assert_allclose(patch.pixels[None], expected, atol=1e-7)


def squared(logits: Tensor, reference: Tensor, counted: Tensor, progress: float) -> Tensor:
    return (logits[:, 0].square() * counted).flatten(1).sum(1)


class Context(nn.Module):
    """Class k is colour k, class 0 has none; the mean colour of the whole image adds to its class everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        context = 10 * (images.mean((2, 3), keepdim=True) - 0.4)
        return torch.cat([torch.full_like(images[:, :1], 0.7), images + context], 1)


def test_it_beats_random_and_grey_patches_on_frames_that_it_has_not_seen() -> None:
    victim = segmenter(Context())
    (images, labels), (unseen, _) = coloured_shapes(8, 0), coloured_shapes(8, 1)
    options: dict[str, Any] = {"max_iter": 15, "eps_step": 0.1, "patch_shape": (8, 8), "batch_size": 4}
    attack = UniversalPatchAttack(victim, target=FixedClass(2), **options, verbose=False).fit((images, labels))
    outside = ~attack.mask(unseen)

    def success(patch: Patch) -> float:
        return float((victim.predict_labels(patch.paste(unseen)) == 2)[outside].float().mean())

    others = [Patch(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(s)), "lower_right") for s in range(5)]
    others.append(Patch(torch.full((3, 8, 8), 0.5), "lower_right"))
    assert success(attack.patch) > max(map(success, others)) + 0.3


# -------------------------------------------------------------------------------------------------- frames and draws


def test_an_epoch_sees_every_frame_once_and_no_step_sees_a_held_out_frame() -> None:
    images, labels = random_images(10), random_labels(10)
    model = Random()
    attack = UniversalPatchAttack(segmenter(model), **PLACE, batch_size=4, defence_samples=2, seed=3)
    attack.fit((images, labels), epochs=3, held_out=0.3)
    steps = [(draw, streams) for draw, streams, gradient in model.seen if gradient]
    looks = [(draw, streams) for draw, streams, gradient in model.seen if not gradient]
    assert len(steps) == 3 * 2 * 2, "epochs, mini-batches, draws"
    assert len({draw for draw, _ in steps}) == len(steps), "every look has a draw of its own"
    judges = {stream for _, streams in looks for stream in streams or ()}
    assert len(judges) == 3
    orders = []
    for epoch in range(3):
        order = [stream for _, streams in steps[4 * epoch : 4 * epoch + 4 : 2] for stream in streams or ()]
        assert sorted([*order, *judges]) == list(range(10))
        orders.append(tuple(order))
    assert len(set(orders)) == 3, "in another order each time"
    assert len(looks) == 3 * 2, "after each epoch, with as many draws"
    assert {draw for draw, _ in looks}.isdisjoint(draw for draw, _ in steps)
    assert len({draw for draw, _ in looks}) == 2, "the same in every look, so that patches are compared alike"
    assert attack.result.steps == (6,)
    assert (attack.result.forwards, attack.result.backwards) == (3 * (7 + 3) * 2, 3 * 7 * 2)


def test_the_patch_that_is_kept_is_the_best_on_the_held_out_frames() -> None:
    images, labels = random_images(10), random_labels(10)
    victim = segmenter(tiny_cnn(seed=1))
    options: dict[str, Any] = {**PLACE, "batch_size": 2, "eps_step": 0.3}

    def rate(patch: Patch, rows: Sequence[int]) -> float:
        use = (labels != VOID) & ~patch.mask(SHAPE[1:])
        wrong = (victim.predict_labels(patch.paste(images)) != labels) & use
        return float((wrong.flatten(1).sum(1) / use.flatten(1).sum(1))[list(rows)].mean())

    data = Data(images, labels)
    last = {}
    for epochs in range(1, 7):
        attack = UniversalPatchAttack(victim, **options, keep_best=False).fit(data, epochs=epochs, held_out=0.3)
        last[epochs] = attack.patch, attack.result.criterion[0]
    data.asked.clear()
    kept = UniversalPatchAttack(victim, **options).fit(data, epochs=1, held_out=0.3)
    judges = data.asked[-3:]
    kept = UniversalPatchAttack(victim, **options).fit(data, epochs=6, held_out=0.3)
    rates = {epochs: rate(patch, judges) for epochs, (patch, _) in last.items()}
    assert [said for _, said in last.values()] == pytest.approx(list(rates.values()), abs=1e-6)
    assert kept.result.criterion[0] == pytest.approx(max(rates.values()), abs=1e-6)
    assert kept.result.criterion[0] > rates[6] + 1e-3, "the last one is not the best here"
    assert any(torch.equal(kept.patch.pixels, patch.pixels) for patch, _ in last.values())


def test_every_kind_of_data_gives_the_same_patch() -> None:
    images, labels = random_images(5), random_labels(5)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield images[:2], labels[:2]
        yield images[2:], labels[2:]

    attack = UniversalPatchAttack(segmenter(tiny_cnn()), **PLACE, max_iter=3, batch_size=2)
    patch = attack.fit((images, labels)).patch
    kinds: list[Any] = [
        Data(images, labels),
        [images.numpy(), labels.numpy().astype(np.uint8)],
        batches(),
        [(images, labels)],
        list(zip(images, labels, strict=True)),
        torch.utils.data.TensorDataset(images, labels),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3),
        [Frame(image, label) for image, label in zip(images, labels, strict=True)],
    ]
    for data in kinds:
        assert torch.equal(attack.fit(data).patch.pixels, patch.pixels)
    assert not torch.equal(UniversalPatchAttack(segmenter(tiny_cnn()), **PLACE, max_iter=3, batch_size=2, seed=1).fit(
        (images, labels)).patch.pixels, patch.pixels)  # fmt: skip


def test_frames_of_several_sizes_one_at_a_time() -> None:
    frames = [Frame(torch.rand(3, 16 + i, 20), torch.zeros(16 + i, 20, dtype=torch.int64)) for i in range(3)]
    options: dict[str, Any] = {"max_iter": 2, "verbose": False}
    attack = UniversalPatchAttack(segmenter(tiny_cnn()), **options, batch_size=1).fit(frames)
    assert attack.patch.shape == (5, 5), "as on the first frame"
    with pytest.raises(ValueError, match=r"make no batch; resize them to one size, or take batch_size=1"):
        UniversalPatchAttack(segmenter(tiny_cnn()), **options, batch_size=3).fit(frames)


# --------------------------------------------------------------------------------------------------------- resuming


RULES: list[dict[str, Any]] = [
    {},
    {"optimizer": "nesterov", "step_schedule": "cosine", "random_start": True},
    {"optimizer": "adam", "objective": ("margin", "cross_entropy"), "num_restarts": 2},
    {"optimizer": "apgd", "batch_size": 9},
    {"optimizer": "square", "batch_size": 9, "seed": 4},
    {"eot": EOT(samples=2, rotation=20, translation=0), "target": Permute(1), "len_kernel": 3},
    {"target": Strip(), "keep_best": False},
]


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_fit_that_is_broken_off_ends_with_the_same_patch_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    images, labels = random_images(9), random_labels(9)

    def attack() -> UniversalPatchAttack:
        given = {**PLACE, "max_iter": 7, "batch_size": 3, "defence_samples": 2, **options}
        return UniversalPatchAttack(segmenter(Random()), **given)

    whole = attack().fit((images, labels))
    path = tmp_path / "here" / "fit.safetensors"
    loads = 0
    for stop_after in (12, 15, 40, 31, None):
        data = Data(images, labels, stop_after)
        resumed = attack()
        try:
            resumed.fit(data, resume=path, save_every=2)
        except KeyboardInterrupt:
            assert resumed.patch is None
        loads += len(data.asked)
        assert not list(tmp_path.rglob("*.part"))
    assert torch.equal(resumed.patch.pixels, whole.patch.pixels)
    one, other = resumed.result, whole.result
    for name in ("criterion", "loss", "steps", "forwards", "backwards"):
        assert getattr(one, name) == getattr(other, name)
    done = Data(images, labels)
    finished = attack().fit(done, resume=path)
    assert torch.equal(finished.patch.pixels, whole.patch.pixels)
    assert finished.result == resumed.result
    assert len(done.asked) <= 2, "what is finished is not made again"


def test_a_file_of_another_fit_is_refused(tmp_path: Path) -> None:
    data = random_images(4), random_labels(4)
    path = tmp_path / "fit.safetensors"
    given: dict[str, Any] = {**PLACE, "max_iter": 2, "batch_size": 2, "objective": squared}
    UniversalPatchAttack(segmenter(tiny_cnn()), **given).fit(data, resume=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"differs in eps_step, seed\."):
        UniversalPatchAttack(segmenter(tiny_cnn()), **given, eps_step=0.3, seed=1).fit(data, resume=path)
    with pytest.raises(ValueError, match=r"differs in weights\."):
        UniversalPatchAttack(segmenter(tiny_cnn(seed=1)), **given).fit(data, resume=path)
    with pytest.raises(ValueError, match=r"differs in frames\."):
        UniversalPatchAttack(segmenter(tiny_cnn()), **given).fit((data[0][:3], data[1][:3]), resume=path)
    UniversalPatchAttack(segmenter(tiny_cnn()), **{**given, "verbose": True}).fit(data, resume=path)
    assert path.read_bytes() == before
    with safe_open(path, framework="pt") as file:
        identity = json.loads(file.metadata()["identity"])
    assert not re.search("0x[0-9a-f]{6}", json.dumps(identity)), "an address would be another one the next day"
    Patch(torch.rand(3, 2, 2), "center").save(path)
    with pytest.raises(ValueError, match="holds no fit"):
        UniversalPatchAttack(segmenter(tiny_cnn()), **given).fit(data, resume=path)
    path.write_text("no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        UniversalPatchAttack(segmenter(tiny_cnn()), **given).fit(data, resume=path)


# ------------------------------------------------------------------------------------------------------ the attack


def test_after_the_fit_it_goes_on_any_images(x: np.ndarray, y: np.ndarray, tmp_path: Path) -> None:
    attack = UniversalPatchAttack(segmenter(tiny_cnn()), **PLACE, target=Untargeted(), max_iter=2)
    for call in (attack.generate, attack.apply_patch):
        with pytest.raises(ValueError, match="call `fit` first"):
            call(x)
    assert attack.fit((x, y)) is attack
    adversarial = attack.generate(x, y, images=[4, 3, 2, 1, 0])
    assert isinstance(adversarial, np.ndarray)
    outside = np.broadcast_to(~attack.mask(x)[:, None], x.shape)
    assert np.array_equal(adversarial[outside], x[outside])
    assert np.array_equal(adversarial[:, :, 4:9, 7:13], attack.patch.pixels.numpy()[None].repeat(5, 0))
    tensor = attack.generate(torch.tensor(x))
    assert isinstance(tensor, Tensor)
    assert np.array_equal(tensor.numpy(), adversarial)
    attack.patch.save(tmp_path / "patch.safetensors")
    other = UniversalPatchAttack(segmenter(tiny_cnn()), **PLACE)
    other.patch = Patch.load(tmp_path / "patch.safetensors")
    assert np.array_equal(other.generate(x), adversarial)
    again = eval(repr(attack), {"estimator": attack.estimator, **globals()})
    assert repr(again) == repr(attack)


def test_like_takes_over_the_options_of_a_patch_attack(x: np.ndarray, y: np.ndarray) -> None:
    victim = segmenter(tiny_cnn())
    attack = UniversalPatchAttack.like(PermuteAttack(victim, **PLACE, seed=5, optimizer="adam", max_iter=3))
    assert (attack.target, attack.targeted, attack.seed, attack.optimizer) == (Permute(5), True, 5, "adam")
    assert attack.estimator is victim
    by_hand = UniversalPatchAttack(victim, **PLACE, target=Permute(5), seed=5, optimizer="adam", max_iter=3)
    assert torch.equal(attack.fit((x, y)).patch.pixels, by_hand.fit((x, y)).patch.pixels)
    with pytest.raises(TypeError, match="cannot be made universal"):
        UniversalPatchAttack.like(victim)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"optimizer": "apgd"}, {}, "take batch_size=9 or another optimizer"),
        ({"optimizer": "square"}, {}, "compares the losses"),
        ({}, {"epochs": 0}, "`epochs` is 0"),
        ({}, {"save_every": 1.5}, "`save_every` is 1.5"),
        ({}, {"held_out": 1.0}, "`held_out` is 1.0"),
        ({"patch_shape": (17, 3)}, {}, "does not fit"),
        ({"targeted": True, "target": None}, {"data": (random_images(2), random_labels(2)[:, 1:])}, "does not fit"),
        ({}, {"data": []}, "holds no frame"),
        ({}, {"data": (random_images(3), random_labels(2))}, "3 images and 2 label maps"),
        ({}, {"data": (random_images(3) + 1, random_labels(3))}, "outside the clip range"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"max_iter": 2, "batch_size": 4, "verbose": False, **options}
    with pytest.raises(ValueError, match=message):
        UniversalPatchAttack(segmenter(tiny_cnn()), **given).fit(
            **{"data": (random_images(10), random_labels(10)), **arguments}
        )


def test_data_of_another_kind_are_refused() -> None:
    for data in (3, [1, 2, 3], ["ab", "cd"], random_images(2)):
        with pytest.raises(TypeError, match=r"give a sequence of objects with \.image and \.label"):
            frames_of(data)
    with pytest.raises(EstimatorError):
        UniversalPatchAttack(tiny_cnn())


def test_one_frame_is_enough() -> None:
    attack = UniversalPatchAttack(segmenter(tiny_cnn()), **PLACE, max_iter=2).fit((random_images(1), random_labels(1)))
    assert attack.result.steps == (2,)
