"""The trials of masks and fusion: what their claims read off tables made by hand, and each one on very little."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
import torch
from torch import nn

from evaluation.papers import fusion, masks
from evaluation.papers.claims import HOLDS, IN_PART, NOT, UNTRIED, difference
from evaluation.papers.learning import small_classifier, small_segmenter, train


def test_difference_and_its_interval() -> None:
    gain = difference(0.8, 0.5, 400)
    assert gain.points == pytest.approx(30)
    assert gain.margin == pytest.approx(196 * ((0.16 + 0.25) / 400) ** 0.5)
    assert gain.sign == 1
    assert difference(0.5, 0.8, 400).sign == -1
    assert difference(0.51, 0.5, 400).sign == 0
    assert str(gain) == "+30.0 ± 6.3 points"


def mask_table(under_attack: dict[str, float]) -> pd.DataFrame:
    rows = []
    for training, (mask, accuracy) in itertools.product((masks.PLAIN, masks.ADVERSARIAL), under_attack.items()):
        attacks = (masks.PGD,) if mask != masks.SEGMENTER else (masks.FIXED, masks.THROUGH, masks.JOINT, masks.WORST)
        rows += [(training, mask, attack, eps, accuracy) for attack in attacks for eps in (0.01, 0.02)]
    rows.append((masks.PLAIN, masks.SILHOUETTE, masks.CLEAN, 0.0, 0.7))
    table = pd.DataFrame(rows, columns=["training", "mask", "attack", "eps", "accuracy"])
    return table.assign(images=400, seed=0)


@pytest.mark.parametrize(
    ("accuracy", "verdicts"),
    [
        ((0.3, 0.6, 0.4, 0.3, 0.55), [HOLDS, HOLDS, HOLDS, HOLDS, HOLDS, UNTRIED]),
        ((0.3, 0.4, 0.4, 0.3, 0.3), [IN_PART, HOLDS, HOLDS, NOT, NOT, UNTRIED]),
        ((0.6, 0.4, 0.4, 0.4, 0.3), [NOT, NOT, NOT, NOT, NOT, UNTRIED]),
    ],
)
def test_claims_about_masks(accuracy: tuple[float, ...], verdicts: list[str]) -> None:
    names = (masks.NONE, masks.OBJECT, masks.SHIFT, masks.BLOB, masks.SEGMENTER)
    made = masks.claims(mask_table(dict(zip(names, accuracy, strict=True))))
    assert [claim.verdict for claim in made] == verdicts
    assert "70.0 %" in made[0].reason


def fusion_table(gain: dict[str, float], penalty: float) -> pd.DataFrame:
    """Accuracies whose gain over the foreground grows with κ as given, and by `penalty` with the penalty."""
    rows = []
    for kappa, attack in itertools.product((0.0, 0.5, 1.0), gain):
        rows += [
            (kappa, fusion.FOREGROUND, 0.0, attack, 0.5),
            (kappa, fusion.FUSION, 0.0, attack, 0.5 + kappa * gain[attack]),
            (kappa, fusion.FUSION, 0.1, attack, 0.5 + kappa * gain[attack] + penalty),
        ]
    table = pd.DataFrame(rows, columns=["informativeness", "model", "penalty", "attack", "accuracy"])
    return table.assign(images=400, seed=0, strength=0.01)


def test_claims_about_fusion() -> None:
    attacks = (fusion.CLEAN, fusion.FGSM, fusion.TRANSFERRED, fusion.PGD, fusion.BLUR)
    made = fusion.claims(fusion_table(dict.fromkeys(attacks, 0.3), 0.1))
    assert [claim.verdict for claim in made] == [HOLDS] * 7 + [UNTRIED]
    assert made[0].ours.startswith("+0.0, +15.0, +30.0 points")
    worse = dict.fromkeys(attacks, -0.3)
    made = fusion.claims(fusion_table(worse, -0.1))
    assert [claim.verdict for claim in made] == [NOT] * 7 + [UNTRIED]
    mixed = {**dict.fromkeys(attacks, 0.0), fusion.BLUR: 0.12}
    made = fusion.claims(fusion_table(mixed, 0.0))
    assert [claim.verdict for claim in made] == [NOT, NOT, IN_PART, HOLDS, IN_PART, NOT, NOT, UNTRIED]


def test_training_learns_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    images, labels = torch.full((48, 3, 16, 16), 0.3), torch.arange(48) % 3
    images[torch.arange(48), labels] = 0.6
    models = [train(small_classifier(3), images, labels, epochs=4, batch_size=16, eps=eps) for eps in (0.0, 0.02)]
    assert torch.equal(torch.rand(3), expected)
    for model in models:
        assert not model.training
        assert (model(images).argmax(1) == labels).float().mean() == 1
    again = train(small_classifier(3), images, labels, epochs=4, batch_size=16)
    assert torch.equal(again(images), models[0](images))


def test_maps_are_moved_with_their_images() -> None:
    """A loss that compares each image with its map: 0 whatever the mirror and the move, if both get the same."""
    maps = (torch.rand(32, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    images = maps[:, None].expand(-1, 3, -1, -1).float()
    wrong = []

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x[:, 0]

    def compare(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wrong.append(float(((output > 0.5) != target).float().mean()))
        return output.mean()

    train(Same(), images, maps, epochs=3, batch_size=8, lr=1e-6, loss=compare)
    assert wrong
    assert max(wrong) == 0
    assert small_segmenter()(images).shape == (32, 2, 8, 8)


@pytest.mark.slow
def test_the_trial_of_masks_from_end_to_end() -> None:
    seen: list[float] = []
    table = masks.run(
        train_images=48, test_images=12, epochs=1, adversarial_epochs=1, steps=2, eps=(1 / 255, 4 / 255),
        progress=lambda what, share: seen.append(share),
    )  # fmt: skip
    assert sum(seen) == pytest.approx(1)
    assert ((table["accuracy"] >= 0) & (table["accuracy"] <= 1)).all()
    assert len(table) == 1 + 2 * (4 * 3 + 1 + 2 * 4)
    worst = table[table["attack"] == masks.WORST]["accuracy"].to_numpy()
    for attack in (masks.FIXED, masks.THROUGH, masks.JOINT):
        assert (worst <= table[table["attack"] == attack]["accuracy"].to_numpy()).all()
    assert {claim.verdict for claim in masks.claims(table)} <= {HOLDS, IN_PART, NOT, UNTRIED}


@pytest.mark.slow
def test_the_trial_of_fusion_from_end_to_end() -> None:
    seen: list[float] = []
    table = fusion.run(
        informativeness=(0.0, 1.0), train_images=48, test_images=12, epochs=1, steps=2,
        progress=lambda what, share: seen.append(share),
    )  # fmt: skip
    assert sum(seen) == pytest.approx(1)
    # clean, three FGSM, three transferred, two blurs for five models; PGD for three of them; two κ
    assert len(table) == 2 * (5 * 9 + 3)
    assert len(fusion.claims(table)) == 8


def test_curves_are_drawn(tmp_path) -> None:
    from evaluation.papers.curves import save_curves

    attacks = (fusion.CLEAN, fusion.FGSM, fusion.TRANSFERRED, fusion.PGD, fusion.BLUR)
    save_curves(fusion_table(dict.fromkeys(attacks, 0.3), 0.1), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
