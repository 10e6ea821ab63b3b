"""Patches: placement, exact pasting without a model, files, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attacks.patch import Patch, paste, resolve_location, resolve_shape

CORNERS = {
    "upper_left": (0, 0),
    "upper_right": (0, 7),
    "lower_left": (5, 0),
    "lower_right": (5, 7),
    "center": (2, 3),
}


@pytest.mark.parametrize(("name", "expected"), CORNERS.items())
def test_corners(name: str, expected: tuple[int, int]) -> None:
    assert resolve_location(name, (3, 4), (8, 11)) == expected


def test_the_default_patch_covers_150_of_512() -> None:
    assert resolve_shape(None, (512, 512)) == (150, 150)
    assert resolve_shape(None, (1024, 512)) == (150, 150)
    assert resolve_shape(None, (120, 160)) == (35, 35)
    assert resolve_shape(None, (1, 1)) == (1, 1)


@given(st.data())
def test_paste_is_exact_everywhere(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    shape = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    location = data.draw(st.integers(0, height - shape[0])), data.draw(st.integers(0, width - shape[1]))
    each = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    images = torch.rand(2, 3, height, width, generator=generator)
    pixels = torch.rand(*((2,) if each else ()), 3, *shape, generator=generator)
    patch, before = Patch(pixels, location), images.clone()
    pasted = patch.paste(images)
    assert torch.equal(images, before)
    mask = patch.mask((height, width))
    assert mask.sum() == shape[0] * shape[1]
    assert torch.equal(pasted[:, :, ~mask], images[:, :, ~mask])
    (top, left), (rows, columns) = location, shape
    assert torch.equal(pasted[:, :, top : top + rows, left : left + columns], pixels.expand(2, 3, *shape))
    as_array = patch.paste(images.numpy())
    assert isinstance(as_array, np.ndarray)
    assert np.array_equal(as_array, pasted.numpy())


def test_paste_works_on_single_images_other_sizes_and_types() -> None:
    patch = Patch(torch.rand(3, 2, 2), "lower_right")
    for size in ((2, 2), (5, 9)):
        pasted = patch.paste(np.zeros((3, *size)))
        assert pasted.dtype == np.float64
        assert np.array_equal(pasted[:, -2:, -2:], patch.pixels.numpy().astype(np.float64))
    half = patch.paste(torch.zeros(4, 3, 5, 5, dtype=torch.float16))
    assert half.dtype == torch.float16


def test_paste_is_differentiable() -> None:
    pixels = torch.rand(2, 3, 2, 2, requires_grad=True)
    weights = torch.rand(2, 3, 4, 5)
    (paste(torch.rand(2, 3, 4, 5), pixels, (1, 2)) * weights).sum().backward()
    assert torch.equal(pixels.grad, weights[:, :, 1:3, 2:4])  # type: ignore[arg-type]


@pytest.mark.parametrize("location", [(1, 2), "center"])
def test_a_patch_survives_its_file_bit_for_bit(tmp_path: Path, location: Any) -> None:
    patch = Patch(torch.rand(2, 3, 4, 5), location)
    patch.save(tmp_path / "patch.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["patch.safetensors"]
    again = Patch.load(tmp_path / "patch.safetensors")
    assert torch.equal(again.pixels, patch.pixels)
    assert again.location == location


def test_a_file_that_is_no_patch_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no patch"):
        Patch.load(tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="no safetensors file"):
        Patch.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Patch.load(tmp_path / "absent")


def test_a_patch_keeps_its_pixels_to_itself() -> None:
    given = torch.rand(3, 2, 2)
    patch = Patch(given, (0, 0))
    before = patch.pixels.clone()
    given.zero_()
    assert torch.equal(patch.pixels, before)
    with pytest.raises(AttributeError):
        patch.location = (1, 1)  # type: ignore[misc]
    assert repr(patch) == "Patch(pixels=<3×2×2>, location=(0, 0))"
    assert len(patch) == 1
    assert len(Patch(np.zeros((5, 3, 1, 1)), (0, 0))) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pixels", "location", "message"),
    [
        (torch.zeros(2, 2), (0, 0), "not empty; got"),
        (torch.zeros(3, 0, 2), (0, 0), "not empty"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), (0, 0), "floating point"),
        (torch.full((3, 2, 2), torch.nan), (0, 0), "NaN"),
        (torch.full((3, 2, 2), torch.inf), (0, 0), "infinity"),
        (torch.zeros(3, 2, 2), "top", "no patch location 'top'; the names are upper_left"),
        (torch.zeros(3, 2, 2), (-1, 0), "at least 0"),
        (torch.zeros(3, 2, 2), (0.5, 0), "two whole numbers"),
        (torch.zeros(3, 2, 2), (1, 2, 3), "two whole numbers"),
    ],
)
def test_a_bad_patch_is_refused(pixels: Any, location: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patch(pixels, location)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 3, 9), ValueError, "4×2 does not fit on an image of 3×9"),
        (torch.zeros(1, 3, 4, 9), ValueError, "reaches outside an image of 4×9; `top` may be at most 0"),
        (torch.zeros(1, 1, 9, 9), ValueError, r"Images are \(N, 3, H, W\)"),
        (torch.zeros(9, 9), ValueError, r"Images are \(N, 3, H, W\)"),
        (torch.zeros(1, 3, 9, 9, dtype=torch.uint8), ValueError, "floating point"),
        (np.zeros((1, 3, 9, 9), dtype=np.int64), ValueError, "floating point"),
        ([[0.0]], TypeError, "list"),
    ],
)
def test_images_that_a_patch_does_not_fit_on_are_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Patch(torch.zeros(3, 4, 2), (1, 1)).paste(images)


def test_patches_for_each_image_need_as_many_images() -> None:
    patch = Patch(torch.zeros(2, 3, 1, 1), (0, 0))
    for images in (torch.zeros(3, 3, 4, 4), torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="2 patches, one for each image"):
            patch.paste(images)


@pytest.mark.parametrize("shape", [(0, 1), (1.0, 1), (True, 1), 5, (1, 2, 3)])
def test_a_bad_shape_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="patch_shape"):
        resolve_shape(shape, (9, 9))
