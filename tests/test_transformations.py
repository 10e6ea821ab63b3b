"""EOT: sampling, replay, the warp against a reference written out, light, gradients."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.patch import paste, rectangle
from attacks.transformations import EOT, Transformation

KEYS = [(0, image, 3) for image in range(4)]
STILL = EOT(rotation=0, scale=(1, 1), translation=0, perspective=0, brightness=0, contrast=0, noise=0)


def scene(count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 24, 30, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.rand(count, 3, 7, 9, generator=generator, dtype=torch.float64).to(dtype)


def test_the_identity_is_the_exact_paste() -> None:
    images, pixels = scene()
    for transformation in (Transformation.identity(4), STILL.sample(KEYS)):
        placed, covered = transformation.apply(images, pixels, (5, 6))
        assert torch.equal(placed, paste(images, pixels, (5, 6)))
        assert torch.equal(covered, rectangle((7, 9), (5, 6), (24, 30)).expand(4, -1, -1))


def test_a_patch_that_stays_among_others_that_move_is_pasted_exactly() -> None:
    images, pixels = scene()
    moved = EOT(brightness=0, contrast=0, noise=0).sample(KEYS)
    mixed = replace(
        moved,
        angle=moved.angle * torch.tensor([1.0, 0, 1, 1]),
        scale=torch.tensor([1.1, 1, 0.9, 1]),
        shift=moved.shift * torch.tensor([1.0, 0, 1, 1])[:, None],
        corners=moved.corners * torch.tensor([1.0, 0, 1, 1])[:, None, None],
    )
    placed, covered = mixed.apply(images, pixels, (5, 6))
    assert torch.equal(placed[1], paste(images, pixels, (5, 6))[1])
    assert torch.equal(covered[1], rectangle((7, 9), (5, 6), (24, 30)))
    assert not torch.equal(placed[0], paste(images, pixels, (5, 6))[0])


def test_the_warp_at_no_move_agrees_with_the_paste() -> None:
    """The exact paste is no special case: it is where the warp goes when the parameters go to nothing."""
    images, pixels = scene(1, torch.float64)
    almost = replace(Transformation.identity(1), angle=torch.tensor([1e-4]))
    placed, _ = almost.apply(images, pixels, (5, 6))
    torch.testing.assert_close(placed, paste(images, pixels, (5, 6)), atol=2e-4, rtol=0)


def test_whole_pixel_moves_and_quarter_turns_are_where_they_should_be() -> None:
    images, pixels = scene(1, torch.float64)
    moved = replace(Transformation.identity(1), shift=torch.tensor([[2 / 7, -3 / 9]]))
    placed, _ = moved.apply(images, pixels, (5, 6))
    torch.testing.assert_close(placed, paste(images, pixels, (7, 3)), atol=1e-5, rtol=0)
    square = pixels[..., :7]
    turned = replace(Transformation.identity(1), angle=torch.tensor([90.0]))
    placed, _ = turned.apply(images, square, (5, 6))
    torch.testing.assert_close(placed, paste(images, torch.rot90(square, dims=(2, 3)), (5, 6)), atol=1e-5, rtol=0)


def reference_warp(image: np.ndarray, pixels: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Bilinear sampling of the patch, zero outside, laid over the image: one pixel at a time."""
    placed = image.copy()
    _, height, width = pixels.shape
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            x, y, scale = backward @ (column, row, 1.0)
            x, y = x / scale, y / scale
            colour, alpha = np.zeros(3), 0.0
            for r in (math.floor(y), math.floor(y) + 1):
                for c in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - r)) * (1 - abs(x - c))
                    if 0 <= r < height and 0 <= c < width:
                        colour += weight * pixels[:, r, c]
                        alpha += weight
            placed[:, row, column] = (1 - alpha) * image[:, row, column] + colour
    return placed


def test_the_warp_against_a_reference_written_out() -> None:
    images, pixels = scene(2, torch.float64)
    transformation = EOT(brightness=0, contrast=0, noise=0, translation=0.3).sample(KEYS[:2])
    placed, covered = transformation.apply(images, pixels, (5, 6))
    forward = transformation.homography((7, 9), (5, 6)).numpy()
    for row in range(2):
        expected = reference_warp(images[row].numpy(), pixels[row].numpy(), np.linalg.inv(forward[row]))
        np.testing.assert_allclose(placed[row].numpy(), expected, atol=1e-6)
    outside = ~covered[:, None].expand_as(images)
    assert torch.equal(placed[outside], images[outside]), "what is not covered is untouched, bit for bit"
    assert covered.any(dim=(1, 2)).all()


def test_the_homography_sends_the_corners_where_the_parameters_say() -> None:
    transformation = EOT(translation=0.3).sample(KEYS)
    homography = transformation.homography((7, 9), (5, 6)).numpy()
    for row in range(4):
        angle, scale = math.radians(transformation.angle[row]), float(transformation.scale[row])
        for corner, (down, right) in enumerate([(0, 0), (0, 8), (6, 8), (6, 0)]):
            tilt = transformation.corners[row, corner].double().numpy() * (7, 9)
            r, c = down + tilt[0] - 3, right + tilt[1] - 4
            turned = np.array([r * math.cos(angle) - c * math.sin(angle), r * math.sin(angle) + c * math.cos(angle)])
            expected = scale * turned + (3 + 5, 4 + 6) + transformation.shift[row].double().numpy() * (7, 9)
            x, y, w = homography[row] @ (right, down, 1)
            np.testing.assert_allclose((y / w, x / w), expected, atol=1e-5)


def test_the_same_parameters_give_the_same_image_bit_for_bit() -> None:
    images, pixels = scene()
    eot = EOT(noise=0.1)
    drawn = eot.sample(KEYS)
    first, covered = drawn.apply(images, pixels, (5, 6))
    for again in (drawn, eot.sample(KEYS), Transformation.from_record(json.loads(json.dumps(drawn.record())))):
        placed, under = again.apply(images, pixels, (5, 6))
        assert torch.equal(placed, first)
        assert torch.equal(under, covered)
    reordered = eot.sample(KEYS[::-1])
    assert torch.equal(reordered.apply(images.flip(0), pixels.flip(0), (5, 6))[0], first.flip(0))
    assert not torch.equal(eot.sample([(1, *key[1:]) for key in KEYS]).apply(images, pixels, (5, 6))[0], first)


def test_samples_fill_the_ranges_and_stay_in_them() -> None:
    eot = EOT(
        rotation=30, scale=(0.5, 2), translation=0.2, perspective=0.4, brightness=0.3, contrast=0.5, noise=0.1
    )
    drawn = eot.sample([(0, image) for image in range(2000)])
    expected = {
        "angle": (-30, 30), "scale": (0.5, 2), "shift": (-0.2, 0.2), "corners": (-0.2, 0.2),
        "brightness": (-0.3, 0.3), "contrast": (0.5, 1.5),
    }  # fmt: skip
    for name, (low, high) in expected.items():
        values = getattr(drawn, name)
        assert values.min() >= low - 1e-6
        assert values.max() <= high + 1e-6
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.04 * (high - low))
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    assert (drawn.noise == 0.1).all()
    assert len(set(drawn.noise_seed.tolist())) == 2000


def test_light_is_on_the_patch_alone() -> None:
    images, pixels = scene(2)
    lit = replace(Transformation.identity(2), brightness=torch.tensor([0.2, -0.2]), contrast=torch.tensor([1.5, 0.5]))
    placed, _ = lit.apply(images, pixels, (5, 6))
    mask = rectangle((7, 9), (5, 6), (24, 30))
    assert torch.equal(placed[..., ~mask], images[..., ~mask])
    expected = torch.stack([(pixels[0] - 0.5) * 1.5 + 0.7, (pixels[1] - 0.5) * 0.5 + 0.3]).clamp(0, 1)
    torch.testing.assert_close(placed[..., 5:12, 6:15], expected)
    wide = lit.light(pixels * 255, (0.0, 255.0))
    torch.testing.assert_close(wide, expected * 255)
    noisy = replace(Transformation.identity(2), noise=torch.full((2,), 0.05), noise_seed=torch.tensor([1, 2]))
    difference = noisy.light(torch.full((2, 3, 50, 50), 0.5)) - 0.5
    assert difference.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.05, 0.05], rel=0.05)
    assert not torch.equal(difference[0], difference[1])


def test_gradient_against_finite_differences() -> None:
    images, pixels = scene(2, torch.float64)
    images, pixels = images[..., :12, :14], pixels[..., :4, :5] * 0.5 + 0.25
    transformation = EOT(brightness=0.05, contrast=0.1, noise=0.01).sample(KEYS[:2])
    leaf = pixels.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: transformation.apply(images, p, (3, 4))[0], leaf)


def test_a_patch_may_leave_the_image() -> None:
    images, pixels = scene(1)
    away = replace(Transformation.identity(1), shift=torch.tensor([[9.0, 9.0]]))
    placed, covered = away.apply(images, pixels, (5, 6))
    assert torch.equal(placed, images)
    assert not covered.any()
    half = replace(Transformation.identity(1), shift=torch.tensor([[0.5, 0.5]]))
    assert half.apply(images, pixels, (17, 21))[1].any()


def test_a_patch_of_one_pixel_can_be_transformed() -> None:
    images, _ = scene(2)
    placed, covered = EOT().sample(KEYS[:2]).apply(images, torch.rand(2, 3, 1, 1), (5, 6))
    assert torch.isfinite(placed).all()
    assert covered.any()


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0}, {"samples": 1.5}, {"rotation": -1}, {"rotation": 181}, {"rotation": math.nan},
        {"scale": (0, 1)}, {"scale": (1.2, 0.8)}, {"scale": 1.0}, {"scale": (1, 1, 1)}, {"translation": math.inf},
        {"perspective": 0.5}, {"brightness": 2}, {"contrast": -0.1}, {"noise": "much"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}`"):
        EOT(**options)


def test_repr_rebuilds() -> None:
    eot = EOT(samples=3, scale=(0.5, 1.5))
    assert eval(repr(eot)) == eot
