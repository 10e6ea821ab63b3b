"""Several models as one, and several attacks of which each image keeps the strongest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks import EvasionAttack
from tiny import NB_CLASSES, SHAPE, linear_cnn, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn

import attacks
from attacks import FixedClass, Patch, PatchAttack, PermuteAttack, StripAttack
from attacks.ensemble import DRAWS, UNSEEN, WorstCaseAttack, ensemble
from attacks.optimize import Result
from evaluation import evaluate
from evaluation.frames import Frame
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import Conditions, Traits

HEIGHT, WIDTH = SHAPE[1:]
VOID = 255


def segmenter(model: nn.Module, **options: Any) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, **{"nb_classes": NB_CLASSES, "input_shape": SHAPE, **options})


# ------------------------------------------------------------------------------------------------ several models


def test_logits_are_the_mean_of_what_each_segmenter_says(images: Tensor) -> None:
    members = [
        segmenter(tiny_cnn(), preprocessing=((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))),
        segmenter(tiny_attention()),  # logits at a quarter of the size
        segmenter(linear_cnn(seed=3), output_fn=lambda logits: 2 * logits),
    ]
    parts = torch.stack([member.logits(images) for member in members]).double()
    np.testing.assert_allclose(ensemble(members).logits(images).detach(), parts.mean(0).detach(), atol=1e-6)
    weights = torch.tensor([1.0, 0.0, 3.0]).double()[:, None, None, None, None]
    weighted = ensemble(members, weights=(1, 0, 3)).logits(images).detach()
    np.testing.assert_allclose(weighted, (weights * parts).sum(0).detach() / 4, atol=1e-6)
    assert torch.equal(ensemble(members[:1]).logits(images), members[0].logits(images))
    labels = ensemble(members).predict_labels(images, batch_size=2)
    assert torch.equal(labels, parts.mean(0).argmax(1))


def test_what_is_set_on_a_member_later_does_not_reach_the_ensemble(images: Tensor) -> None:
    members = [segmenter(linear_cnn(seed=seed)) for seed in (0, 1)]
    both = ensemble(members)
    before = both.logits(images)
    members[0].set_params(preprocessing=(0.5, 0.1))
    assert torch.equal(both.logits(images), before)
    assert all(one is other.model for one, other in zip(both.model.members, members, strict=True))


def test_a_patch_made_on_linear_models_is_the_one_of_their_mean() -> None:
    """The mean of linear models is the linear model of their mean weights, whose optimal patch is a vertex."""
    images, labels = random_images(3), random_labels(3, void=False) % 2
    models = [linear_cnn(2, seed) for seed in (0, 1, 2)]
    mean = linear_cnn(2)
    with torch.no_grad():
        for name, value in mean.named_parameters():
            value.copy_(torch.stack([model.get_parameter(name) for model in models]).mean(0))
    options: dict[str, Any] = {
        "target": FixedClass(1), "objective": "margin", "patch_shape": (4, 5), "patch_location": (3, 2), "max_iter": 7,
        "eps_step": 0.1, "keep_best": False, "verbose": False,
    }  # fmt: skip
    made = {}
    for name, model in {"mean": mean, "one": models[0]}.items():
        attack = PatchAttack(segmenter(model, nb_classes=2), **options)
        attack.generate(images, labels)
        made[name] = attack.patch.pixels
    attack = PatchAttack(ensemble([segmenter(model, nb_classes=2) for model in models]), **options)
    attack.generate(images, labels)
    assert torch.equal(attack.patch.pixels, made["mean"])
    assert not torch.equal(attack.patch.pixels, made["one"])


class Noisy(nn.Module):
    """Declares what it is told to; notes the conditions of each pass."""

    def __init__(self, traits: Traits) -> None:
        super().__init__()
        self.traits, self.conditions = traits, Conditions()
        self.inner = linear_cnn()
        self.seen: list[Conditions] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.conditions)
        return self.inner(images)


def test_defended_members_keep_their_traits_and_run_under_the_conditions_of_all(images: Tensor) -> None:
    one, other = Noisy(Traits(random=True)), Noisy(Traits(straight_through=True))
    both = ensemble([segmenter(one), segmenter(other), segmenter(tiny_cnn())])
    assert both.traits == Traits(random=True, straight_through=True)
    with both.conditions(images=[4, 2], draw=7, straight_through=True):
        both.logits(images[:2])
    assert one.seen == other.seen == [Conditions((4, 2), 7, True)]
    both.logits(images)
    assert one.seen[-1] == Conditions()


def test_gradients_leave_nothing_in_the_models_and_inner_layers_can_be_looked_at(images: Tensor) -> None:
    members = [segmenter(tiny_cnn()), segmenter(linear_cnn())]
    both = ensemble(members)
    both.loss_gradient(images, torch.zeros(len(images), HEIGHT, WIDTH, dtype=torch.int64))
    assert all(parameter.grad is None for parameter in both.model.parameters())
    assert "members.1" in both.layer_names
    inner = both.get_activations(images, "members.1")
    np.testing.assert_allclose(inner, members[1].logits(images).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"nb_classes": 3}, "nb_classes: 4 and 3"),
        ({"clip_values": (0.0, 255.0)}, "clip_values"),
        ({"ignore_index": 0}, "ignore_index: 255 and 0"),
        ({"input_shape": (1, 16, 20)}, "channels: 3 and 1"),
    ],
)
def test_segmenters_that_do_not_go_together_are_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble([segmenter(linear_cnn()), segmenter(linear_cnn(), **other)])


@pytest.mark.parametrize("weights", [(1,), (1, -1), (0, 0), (1, float("nan"))])
def test_weights_that_are_none_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="`weights`"):
        ensemble([segmenter(linear_cnn()), segmenter(linear_cnn())], weights)
    with pytest.raises(ValueError, match="at least one"):
        ensemble([])


# ----------------------------------------------------------------------------------------------- several attacks


class Columns(nn.Module):
    """Believes the lower right pixel: as many columns from the left are class 1 as its red is bright, the rest 0."""

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images, images[:, 0, -1, -1])

    def logits(self, images: Tensor, share: Tensor) -> Tensor:
        won = torch.arange(WIDTH) < (share * WIDTH)[:, None]
        logits = torch.zeros(len(images), NB_CLASSES, HEIGHT, WIDTH)
        logits[:, 1] = torch.where(won, 1.0, -1.0)[:, None]
        return logits


class LuckyColumns(Columns):
    """A random one. Green is believed under the draws from 0 on, which attacks see; blue in every fourth unseen one."""

    def __init__(self) -> None:
        super().__init__()
        self.traits, self.conditions = Traits(random=True), Conditions()
        self.seen: list[Conditions] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.conditions)
        red, green, blue = images[:, :, -1, -1].unbind(1)
        draw = self.conditions.draw
        assert draw is not None
        lucky = green if draw >= 0 else blue if draw % 4 == 0 else torch.zeros_like(red)
        return self.logits(images, torch.maximum(red, lucky))


class Painted:
    """Paints the 2×2 pixels of the lower right corner of image i with the i-th colour; aims at class 1 everywhere."""

    result = None

    def __init__(self, *colours: Sequence[float], target: int = 1, side: int = 2) -> None:
        self.colours, self.target, self.side = colours, target, side

    def generate(self, x: np.ndarray, y: Any = None, *, images: Sequence[int] | None = None) -> np.ndarray:
        assert images is not None
        for row, image in enumerate(images):  # in place, as an attack may
            x[row, :, -2:, -2:] = np.array(self.colours[image], dtype=x.dtype)[:, None, None]
        return x

    def target_map(self, y: np.ndarray, images: Sequence[int] | None = None) -> np.ndarray:
        return np.where(y == VOID, y, self.target)

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), HEIGHT, WIDTH), dtype=bool)
        mask[:, -self.side :, -self.side :] = True
        return mask


def red(*shares: float) -> Painted:
    return Painted(*((share, 0, 0) for share in shares))


def blank(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((count, *SHAPE), dtype=np.float32), np.zeros((count, HEIGHT, WIDTH), dtype=np.int64)


def test_each_image_keeps_the_stronger_of_two_attacks() -> None:
    x, y = blank()
    y[2] = VOID  # nothing to win: all attacks are equal
    victim = segmenter(Columns())
    attack = WorstCaseAttack(victim, {"left": red(0.5, 0.1, 0.2), "right": red(0.25, 0.3, 0.2)}, batch_size=2)
    adversarial = attack.generate(x, y)
    assert attack.chosen == ("left", "right", "left"), "of equals the first"
    assert adversarial[:, 0, -1, -1].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert not adversarial[:, :, :-2].any()
    assert not x.any()
    assert not adversarial[:, 1:].any()
    outside = HEIGHT * WIDTH - 4
    expected = {"left": [10 * HEIGHT, 2 * HEIGHT], "right": [5 * HEIGHT, 6 * HEIGHT]}
    assert attack.judged is not None
    for name, won in expected.items():
        assert attack.judged[name] == pytest.approx([*(pixels / outside for pixels in won), 1.0])
    assert attack.result is not None
    assert attack.result.criterion == pytest.approx([10 * HEIGHT / outside, 6 * HEIGHT / outside, 1.0])
    assert attack.patch is None
    streams = attack.generate(x[:2], y[:2], images=[2, 0])
    assert streams[:, 0, -1, -1].tolist() == pytest.approx([0.2, 0.5])
    listed = WorstCaseAttack(victim, [red(0.5, 0.1, 0.2), red(0.25, 0.3, 0.2)])
    assert np.array_equal(listed.generate(x, y), adversarial)
    assert listed.chosen == ("0", "1", "0")


def test_a_random_defence_is_judged_by_draws_that_no_attack_has_seen() -> None:
    model = LuckyColumns()
    steady, seen, gamble = (0.3, 0, 0), (0, 1, 0), (0, 0, 1)
    mixed = (0.2, 0, 1)  # 1/4 of all + 3/4 of 0.2 = 0.4
    members = {
        "seen": Painted(seen, seen, seen), "gamble": Painted(gamble, gamble, mixed),
        "steady": Painted(steady, (0.2, 0, 0), steady),
    }  # fmt: skip
    attack = WorstCaseAttack(segmenter(model), members, batch_size=2)
    x, y = blank()
    attack.generate(x, y, images=(0, 1, 2))
    assert attack.chosen == ("steady", "gamble", "gamble")
    assert attack.judged is not None
    outside = HEIGHT * WIDTH - 4
    assert attack.judged["seen"] == (0, 0, 0)
    assert attack.judged["gamble"] == pytest.approx([0.25, 0.25, 0.25 + 0.75 * 4 * HEIGHT / outside])
    assert {c.draw for c in model.seen} == {UNSEEN - draw for draw in range(DRAWS)}
    assert {c.images for c in model.seen} == {(0, 1), (2,)}
    assert not any(c.straight_through or c.undefended for c in model.seen), "the defence as it stands"
    model.seen.clear()
    WorstCaseAttack(segmenter(model), members, draws=2).generate(x, y)
    assert len(model.seen) == 2 * len(members)


def test_attacks_that_differ_in_target_or_mask_cannot_be_compared() -> None:
    x, y = blank(1)
    victim = segmenter(Columns())
    other_target = WorstCaseAttack(victim, {"a": red(0.5), "b": Painted((0, 0, 0), target=2)})
    with pytest.raises(ValueError, match="'a' and 'b' differ in their target"):
        other_target.generate(x, y)
    with pytest.raises(ValueError, match="differ in their target"):
        other_target.target_map(y)
    with pytest.raises(ValueError, match="'0' and '1' differ in their mask"):
        WorstCaseAttack(victim, [red(0.5), Painted((0, 0, 0), side=3)]).generate(x, y)
    cnn = segmenter(tiny_cnn())
    with pytest.raises(ValueError, match="differ in their target"):
        WorstCaseAttack(cnn, [PatchAttack(cnn), PermuteAttack(cnn)]).generate(x, y)
    for seeds in ((0, 1), (0, 0)):
        pair = [PermuteAttack(cnn, seed=seed, max_iter=1, verbose=False) for seed in seeds]
        attack = WorstCaseAttack(cnn, pair)
        if seeds == (0, 1):
            with pytest.raises(ValueError, match="the same seed"):
                attack.generate(x, y)
        else:
            attack.generate(x, y)


QUICK: dict[str, Any] = {"max_iter": 3, "eps_step": 0.2, "patch_shape": (6, 7), "batch_size": 2, "verbose": False}
MEMBERS: dict[str, Callable[..., PatchAttack]] = {
    "pgd": PermuteAttack,
    "adam": lambda victim, **options: PermuteAttack(victim, optimizer="adam", **options),
    "margin": lambda victim, **options: PermuteAttack(victim, objective="margin", **options),
}


def test_it_is_an_attack_of_the_catalogue(x: np.ndarray, y: np.ndarray) -> None:
    victim = segmenter(tiny_cnn(), preprocessing=(0.5, 0.2))
    attack = WorstCaseAttack.of(victim, MEMBERS, **QUICK)
    assert isinstance(attack, EvasionAttack)
    assert attack.targeted
    adversarial = attack.generate(x, y)
    assert (type(adversarial), adversarial.shape, adversarial.dtype) == (np.ndarray, x.shape, x.dtype)
    assert attack.chosen is not None
    assert isinstance(attack.patch, Patch)
    assert np.array_equal(attack.patch.paste(x), adversarial)
    single = {name: make(victim, **QUICK) for name, make in MEMBERS.items()}
    made = {name: member.generate(x, y) for name, member in single.items()}
    rates = np.array([member.result.criterion for member in single.values()])
    assert attack.result is not None
    assert attack.result.criterion == pytest.approx(rates.max(0), abs=1e-6), (
        "a model without randomness: as they saw it"
    )
    for row, name in enumerate(attack.chosen):
        assert np.array_equal(adversarial[row], made[name][row])
        assert attack.result.loss[row] == single[name].result.loss[row]
    results = [member.result for member in single.values()]
    assert attack.result.steps == tuple(sum(steps) for steps in zip(*(r.steps for r in results), strict=True))
    assert attack.result.backwards == sum(r.backwards for r in results)
    assert attack.result.forwards == sum(r.forwards for r in results) + 3 * len(x)
    assert attack.result.seconds > 0
    assert np.array_equal(attack.target_map(y), single["pgd"].target_map(y))
    assert np.array_equal(attack.mask(x), single["pgd"].mask(x))
    tensors = attack.generate(torch.tensor(x), torch.tensor(y))
    assert isinstance(tensors, Tensor)
    assert np.array_equal(tensors.numpy(), adversarial)
    names = {"estimator": victim, **vars(attacks), "WorstCaseAttack": WorstCaseAttack}
    names |= {name: getattr(attacks, name) for name in attacks.__all__}
    again = eval(repr(attack), names)
    assert repr(again) == repr(attack)
    assert np.array_equal(again.generate(x, y), adversarial)


def test_untargeted_attacks_without_labels_leave_the_own_prediction(x: np.ndarray) -> None:
    victim = segmenter(tiny_cnn())
    members = [PatchAttack(victim, objective=name, **QUICK) for name in ("cross_entropy", "margin")]
    attack = WorstCaseAttack(victim, members)
    own = victim.predict_labels(x)
    assert np.array_equal(attack.generate(x), attack.generate(x, own))
    assert not attack.targeted
    assert attack.target_map(own) is None
    targeted = WorstCaseAttack(victim, [PermuteAttack(victim, **QUICK)])
    with pytest.raises(ValueError, match="needs `y`"):
        targeted.generate(x)


def test_an_attack_that_tells_nothing_counts_for_nothing() -> None:
    x, y = blank(2)
    attack = WorstCaseAttack(segmenter(Columns()), [red(0.5, 0.5)])
    attack.generate(x, y)
    result = attack.result
    assert isinstance(result, Result)
    assert (result.steps, result.forwards, result.backwards) == ((0, 0), 2, 0)
    assert np.isnan(result.loss).all()


def test_arguments() -> None:
    victim = segmenter(Columns())
    for options, message in (
        ({"attacks": []}, "`attacks` is empty"),
        ({"draws": 0}, "`draws` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            WorstCaseAttack(victim, **{"attacks": [red(1)], **options})
        attack = WorstCaseAttack(victim, [red(1)], draws=3)
        with pytest.raises(ValueError, match=message):
            attack.set_params(**options)
        assert (len(attack.attacks), attack.draws, attack.batch_size) == (1, 3, 8)


class Frames:
    """Three random frames."""

    classes: Sequence[str] = tuple("abcd")
    colors: Sequence[tuple[int, int, int]] = ((0, 0, 0),) * 4

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Frame:
        return Frame(random_images()[index], random_labels()[index], str(index))


def test_evaluate_takes_it_and_finds_it_as_strong_as_the_strongest_member() -> None:
    def worst(victim: PyTorchSegmenter, **options: Any) -> WorstCaseAttack:
        return WorstCaseAttack.of(victim, MEMBERS, **options)

    results = evaluate(
        {"attention": segmenter(tiny_attention())}, {"worst": worst, **MEMBERS}, "ram", Frames(), max_iter=2,
        patch_shape=(6, 7), eps_step=0.2, defence_samples=2, batch_size=2, verbose=False,
    )  # fmt: skip
    success = {(r.attack, r.variant, r.defence, r.image): r.success for r in results.records}
    for image in range(3):
        best = max(success[name, "plain", "none", image] for name in MEMBERS)
        assert success["worst", "plain", "none", image] == pytest.approx(best)
    assert {r.variant for r in results.records if (r.attack, r.defence) == ("worst", "ram")} == {
        "plain", "adaptive", "transfer",
    }  # fmt: skip


def test_strip_and_permute_do_not_mix(x: np.ndarray, y: np.ndarray) -> None:
    victim = segmenter(tiny_cnn())
    with pytest.raises(ValueError, match="target"):
        WorstCaseAttack.of(victim, {"permute": PermuteAttack, "strip": StripAttack}, **QUICK).generate(x, y)
