"""Training: it learns, it repeats itself, and what it writes is what it scored."""

from __future__ import annotations

import pytest
import torch

from evaluation.datasets import load_data
from evaluation.frames import IGNORE_INDEX
from evaluation.models import load_model
from evaluation.training import Recipe, _Augment, save, score, train

TINY = Recipe(
    architecture="cnn", train="scenes:24", val="scenes:8", test="scenes:8", size=(48, 64), steps=40, batch_size=4,
    lr=3e-3, average=0.9, every=20,
)  # fmt: skip


@pytest.mark.slow
def test_training_learns_repeats_and_ships_what_it_scored(tmp_path) -> None:
    seen: list[int] = []
    model, card = train(TINY, progress=lambda step, steps, figures: seen.append(step))
    again, _ = train(TINY)
    assert seen == list(range(1, 41))
    assert card["val"]["pixel_accuracy"] > 0.5  # the most frequent class alone is under 0.4
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    save(model, card, tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine.safetensors"), device_type="cpu")
    assert score(loaded.model, load_data("scenes:8", size=(48, 64))) == card["test"]


def test_augmentation_moves_image_and_labels_together() -> None:
    labels = torch.arange(30, dtype=torch.uint8).repeat_interleave(8).expand(4, 160, 240).contiguous()
    images = (labels * 8)[:, None].expand(4, 3, 160, 240).contiguous()
    augment = _Augment((80, 120), (0.8, 1.6), torch.Generator().manual_seed(0))
    augment._uniform = lambda count, low, high: torch.full((count,), {0.7: 1.0, -0.15: 0.0, -0.05: 0.0}.get(low, 1.3))
    image, label = augment(images, labels)
    inside = label != IGNORE_INDEX
    difference = (image[:, 0] * 255 / 8 - label)[inside].abs()
    assert difference.median() < 0.1  # away from the edges of the stripes the two agree exactly
    assert difference.max() <= 1.0


def test_a_zoom_under_one_is_void_beyond_the_frame() -> None:
    augment = _Augment((40, 40), (0.5, 0.5), torch.Generator().manual_seed(0))
    _, label = augment(torch.zeros(1, 3, 60, 60, dtype=torch.uint8), torch.ones(1, 60, 60, dtype=torch.uint8))
    assert (label == 1).float().mean() == pytest.approx(0.25, abs=0.05)
    assert (label == IGNORE_INDEX).float().mean() == pytest.approx(0.75, abs=0.05)


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("architecture: cnn\ntrain: scenes\nval: scenes\ntest: scenes\nepochs: 3\n")
    with pytest.raises(ValueError, match="epochs"):
        Recipe.load(path)
