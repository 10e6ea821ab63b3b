"""Places, surfaces and alpha: what a patch covers, what it leaves, and what an attack makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHAPE, random_images, random_labels
from torch import Tensor

from attacks.art_style import PatchAttack
from attacks.diversity import InputDiversity
from attacks.geometry import Surface, disc, lay, several, view
from attacks.optimize import make_patch
from attacks.options import PatchOptions
from attacks.patch import Patch, covered_by, paste, resolve_location
from attacks.threats import PatchThreat
from attacks.torch_style import PatchAttack as TorchPatchAttack
from attacks.transformations import EOT, Transformation
from ramdefense import PyTorchSegmenter

SIZE = (16, 20)
QUAD = Surface(((2.3, 3.1), (1.2, 15.4), (13.6, 17.9), (11.1, 5.7)))
FAST: dict[str, Any] = {"max_iter": 2, "verbose": False}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def axis_parallel(top: float, left: float, height: float, width: float) -> Surface:
    return Surface(((top, left), (top, left + width), (top + height, left + width), (top + height, left)))


@st.composite
def locations(draw: st.DrawFn, shape: tuple[int, int], count: int) -> Any:
    """A place, a place for each image, or a convex surface, all on an image of SIZE."""
    place = st.tuples(st.integers(0, SIZE[0] - shape[0]), st.integers(0, SIZE[1] - shape[1]))
    kind = draw(st.sampled_from(["place", "places", "surface"]))
    if kind == "place":
        return draw(place)
    if kind == "places":
        return tuple(draw(place) for _ in range(count))
    inwards = np.array(draw(st.lists(st.floats(0, 0.3), min_size=8, max_size=8))).reshape(4, 2)
    square = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    corners = np.abs(square - inwards) * SIZE
    return Surface(tuple(map(tuple, corners.tolist())))


# ------------------------------------------------------------------------------------------------------ what is left


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_not_covered_stays_and_no_value_leaves_the_range(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    location = data.draw(locations(shape, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16]))
    seed = data.draw(st.integers(0, 1000))
    images = noise(3, 3, *SIZE, seed=seed, dtype=dtype).round(decimals=1)
    pixels = noise(3, 3, *shape, seed=seed + 1, dtype=dtype).mul(1.4).sub(0.2).clamp(0, 1)  # some on the bounds
    alpha = None
    if data.draw(st.booleans()):
        alpha = noise(*shape, seed=seed + 2).mul(2).sub(0.5).clamp(0, 1)  # some 0, some 1
        alpha[0, 0] = 1
    patch, before = Patch(pixels, location, alpha), images.clone()
    pasted = patch.paste(images)
    assert torch.equal(images, before)
    assert pasted.dtype == dtype
    covered = patch.mask(SIZE)
    assert covered.shape == ((3, *SIZE) if isinstance(location, tuple) and isinstance(location[0], tuple) else SIZE)
    outside = ~covered.expand(3, -1, -1)[:, None].expand_as(images)
    assert torch.equal(pasted[outside].view(torch.uint8), images[outside].view(torch.uint8)), "bit for bit"
    assert pasted.min() >= 0
    assert pasted.max() <= 1
    assert np.array_equal(patch.paste(images.numpy()), pasted.numpy())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_alpha_blends_and_is_exact_at_its_ends(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    top, left = data.draw(st.integers(0, SIZE[0] - shape[0])), data.draw(st.integers(0, SIZE[1] - shape[1]))
    images, pixels = noise(2, 3, *SIZE), noise(2, 3, *shape, seed=1)
    alpha = noise(*shape, seed=data.draw(st.integers(0, 100))).mul(2).sub(0.5).clamp(0, 1)
    alpha[-1, -1] = 0.5
    patch = Patch(pixels, (top, left), alpha)
    placed = patch.paste(images)[..., top : top + shape[0], left : left + shape[1]]
    under = images[..., top : top + shape[0], left : left + shape[1]]
    assert torch.equal(placed[..., alpha == 0], under[..., alpha == 0])
    assert torch.equal(placed[..., alpha == 1], pixels[..., alpha == 1])
    expected = under.double() * (1 - alpha.double()) + pixels.double() * alpha.double()
    torch.testing.assert_close(placed.double(), expected, atol=1e-6, rtol=0)
    covered = torch.zeros(SIZE, dtype=torch.bool)
    covered[top : top + shape[0], left : left + shape[1]] = alpha > 0
    assert torch.equal(patch.mask(SIZE), covered)


def test_an_opaque_alpha_is_none() -> None:
    images, pixels = noise(2, 3, *SIZE), noise(2, 3, 4, 5, seed=1)
    for location in ((3, 2), ((3, 2), (9, 11)), QUAD):
        opaque = Patch(pixels, location, torch.ones(4, 5))
        assert torch.equal(opaque.paste(images), Patch(pixels, location).paste(images))
        assert torch.equal(opaque.mask(SIZE), Patch(pixels, location).mask(SIZE))


def test_a_blend_between_equal_values_is_that_value() -> None:
    """α·p + (1 - α)·p rounds away from p, out of the clip range if p is its bound; the blend must not."""
    alpha = torch.linspace(0, 1, 1001)
    for value in (0.0, 0.1, 1.0):
        same = torch.full((1001,), value)
        assert torch.equal(lay(same, same, alpha), same)


# --------------------------------------------------------------------------------------------- a place for each image


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 15)), min_size=1, max_size=4), st.booleans())
def test_places_are_the_single_pastes(places: list[tuple[int, int]], each: bool) -> None:
    images = noise(len(places), 3, *SIZE)
    pixels = noise(*((len(places),) if each else ()), 3, 4, 5, seed=1)
    alpha = disc(5)[:4] if each else None
    patch = Patch(pixels, places, alpha)  # type: ignore[arg-type]
    pasted, masks = patch.paste(images), patch.mask(SIZE)
    for row, place in enumerate(places):
        alone = Patch(pixels[row] if each else pixels, place, alpha)
        assert torch.equal(pasted[row], alone.paste(images[row]))
        assert torch.equal(masks[row], alone.mask(SIZE))


def test_places_come_as_lists_arrays_and_tensors() -> None:
    expected = Patch(noise(3, 2, 2), ((1, 2), (3, 4)))
    for given_places in ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])):
        assert Patch(noise(3, 2, 2), given_places).location == expected.location  # type: ignore[arg-type]
    assert Patch(noise(3, 2, 2), torch.tensor([1, 2])).location == (1, 2)  # type: ignore[arg-type]


def test_paste_at_places_is_differentiable() -> None:
    pixels = noise(2, 3, 2, 2).requires_grad_()
    weights = noise(2, 3, *SIZE, seed=3)
    (paste(noise(2, 3, *SIZE), pixels, ((1, 2), (9, 4))) * weights).sum().backward()
    assert pixels.grad is not None
    assert torch.equal(pixels.grad[0], weights[0, :, 1:3, 2:4])
    assert torch.equal(pixels.grad[1], weights[1, :, 9:11, 4:6])


# ----------------------------------------------------------------------------------------------------------- surfaces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_axis_parallel_surface_is_the_paste(dtype: torch.dtype, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    top, left = data.draw(st.integers(0, SIZE[0] - height)), data.draw(st.integers(0, SIZE[1] - width))
    surface = axis_parallel(top, left, height, width)
    assert surface.shape == (height, width)
    images, pixels = noise(2, 3, *SIZE, dtype=dtype), noise(2, 3, height, width, seed=1, dtype=dtype)
    alpha = (noise(height, width, seed=2) > 0.4).float() if data.draw(st.booleans()) else None
    if alpha is not None:
        alpha[0, 0] = 1
    flat, mapped = Patch(pixels, (top, left), alpha), Patch(pixels, surface, alpha)
    torch.testing.assert_close(mapped.paste(images), flat.paste(images), atol=1e-5, rtol=0)
    assert torch.equal(mapped.mask(SIZE), flat.mask(SIZE))
    alone = Patch(pixels[0], surface, alpha).paste(images[0])
    assert torch.equal(alone, mapped.paste(images)[0])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_homography_sends_the_corners_to_the_corners(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    surface = data.draw(locations((1, 1), 1).filter(lambda location: isinstance(location, Surface)))
    homography = surface.homography((height, width)).numpy()
    for (column, row), corner in zip([(0, 0), (width, 0), (width, height), (0, height)], surface.corners, strict=True):
        x, y, depth = homography @ (column - 0.5, row - 0.5, 1)
        assert depth > 0
        np.testing.assert_allclose((y / depth + 0.5, x / depth + 0.5), corner, atol=1e-9)


def reference_surface(image: np.ndarray, pixels: np.ndarray, alpha: np.ndarray, corners: Any) -> tuple[Any, Any]:
    """The patch on the surface, one pixel at a time, with a homography from the eight linear equations."""
    _, height, width = pixels.shape
    rows, values = [], []
    for (u, v), (y, x) in zip([(0, 0), (width, 0), (width, height), (0, height)], corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    backward = np.append(np.linalg.solve(np.array(rows), np.array(values)), 1).reshape(3, 3)
    placed, covered = image.copy(), np.zeros(image.shape[1:], dtype=bool)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            y, x = row + 0.5, column + 0.5
            sides = [
                (b[1] - a[1]) * (y - a[0]) - (b[0] - a[0]) * (x - a[1])
                for a, b in zip(corners, [*corners[1:], corners[0]], strict=True)
            ]
            if min(sides) < 0:
                continue
            u, v, scale = backward @ (x, y, 1)
            u, v = u / scale - 0.5, v / scale - 0.5
            colour, opacity = np.zeros(3), 0.0
            for r in (math.floor(v), math.floor(v) + 1):
                for c in (math.floor(u), math.floor(u) + 1):
                    at = min(max(r, 0), height - 1), min(max(c, 0), width - 1)
                    weight = (1 - abs(v - r)) * (1 - abs(u - c)) * alpha[at]
                    colour += weight * pixels[:, *at]
                    opacity += weight
            if opacity >= 1e-3:
                covered[row, column] = True
                placed[:, row, column] = (1 - opacity) * image[:, row, column] + colour
    return placed, covered


@pytest.mark.parametrize("shape", [(7, 9), (3, 2), (1, 1), (20, 31)])
@pytest.mark.parametrize("cut", [False, True])
def test_a_surface_against_a_reference_written_out(shape: tuple[int, int], cut: bool) -> None:
    images, pixels = noise(2, 3, *SIZE, dtype=torch.float64), noise(2, 3, *shape, seed=1, dtype=torch.float64)
    alpha = noise(*shape, seed=2).mul(2).sub(0.5).clamp(0, 1) if cut and shape != (1, 1) else None
    weights = np.ones(shape) if alpha is None else alpha.double().numpy()
    for corners in (QUAD.corners, QUAD.corners[1:] + QUAD.corners[:1]):  # upright, and turned by a quarter
        patch = Patch(pixels, Surface(corners), alpha)
        pasted = patch.paste(images)
        for row in range(2):
            expected, covered = reference_surface(images[row].numpy(), pixels[row].numpy(), weights, corners)
            # opacities within 0.001 of 1 are 1
            np.testing.assert_allclose(pasted[row].numpy(), expected, atol=1e-9 if alpha is None else 1e-3)
            assert np.array_equal(patch.mask(SIZE).numpy(), covered)
        assert covered.sum() > 50


def test_what_alpha_cuts_out_does_not_shine_through() -> None:
    images, pixels, alpha = noise(1, 3, *SIZE), noise(1, 3, 8, 8, seed=1), disc(8)
    other = torch.where(alpha > 0, pixels, 1 - pixels)
    for location in ((3, 4), QUAD):
        assert torch.equal(Patch(pixels, location, alpha).paste(images), Patch(other, location, alpha).paste(images))
    turned = EOT().sample([(0, 0)])
    for location in ((3, 4), QUAD):
        one, two = (turned.apply(images, each, location, alpha=alpha)[0] for each in (pixels, other))
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("location", [(3, 4), ((3, 4), (0, 1)), QUAD], ids=["place", "places", "surface"])
def test_gradients_against_finite_differences(location: Any) -> None:
    images = noise(2, 3, *SIZE, dtype=torch.float64)
    weights = noise(2, 3, *SIZE, seed=3, dtype=torch.float64)
    leaf = noise(2, 3, 3, 4, seed=1, dtype=torch.float64).mul(0.5).add(0.25).requires_grad_()
    alpha = noise(3, 4, seed=2, dtype=torch.float64).mul(1.5).sub(0.25).clamp(0, 1)
    assert torch.autograd.gradcheck(lambda pixels: (paste(images, pixels, location, alpha) * weights).sum(), leaf)
    moved = EOT(brightness=0.05, contrast=0.1, noise=0.01).sample([(0, 1), (0, 2)])

    def transformed(pixels: Tensor) -> Tensor:
        return (moved.apply(images, pixels, location, alpha=alpha)[0] * weights).sum()

    assert torch.autograd.gradcheck(transformed, leaf)


def test_a_saturated_patch_on_a_surface_keeps_its_gradient() -> None:
    """Sampling rounds beyond the bound; what takes that off again must not take the gradient off."""
    pixels = torch.ones(1, 3, 5, 6, requires_grad=True)
    pasted = paste(torch.ones(1, 3, *SIZE), pixels, QUAD)
    assert torch.equal(pasted, torch.ones(1, 3, *SIZE))
    pasted.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.sum() == pytest.approx(3 * int(covered_by((5, 6), QUAD, SIZE).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        (((0, 0), (5, 0), (5, 5), (0, 5)), "counter-clockwise"),
        (((0, 0), (5, 5), (0, 5), (5, 0)), "no convex"),
        (((0, 0), (0, 5), (1, 1), (5, 0)), "no convex"),
        (((0, 0), (0, 2), (0, 5), (5, 0)), "no convex"),
        (((0, 0), (0, 0), (5, 5), (5, 0)), "no convex"),
        (((0, 0), (0, 5), (5, 5)), "four"),
        (((0, 0), (0, 5), (5, math.nan), (5, 0)), "finite"),
        ("corners", "four"),
    ],
)
def test_bad_corners_are_refused(corners: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Surface(corners)


def test_a_surface_must_lie_on_the_image() -> None:
    patch = Patch(noise(3, 4, 4), axis_parallel(2, 3, 10, 18))
    with pytest.raises(ValueError, match=r"corner \(2.0, 21.0\) of the surface lies outside an image of 16×20"):
        patch.paste(noise(1, 3, *SIZE))
    assert patch.mask((12, 21)).sum() == 180


# ----------------------------------------------------------------------------------------------------- EOT on all that


def test_eot_moves_alpha_with_the_pixels() -> None:
    images, pixels = noise(1, 3, *SIZE, dtype=torch.float64), noise(1, 3, 4, 5, seed=1, dtype=torch.float64)
    alpha = noise(4, 5, seed=2)
    still = Transformation.identity(1)
    placed, covered = still.apply(images, pixels, (5, 6), alpha=alpha)
    assert torch.equal(placed, paste(images, pixels, (5, 6), alpha))
    assert torch.equal(covered[0], covered_by((4, 5), (5, 6), SIZE, alpha=alpha))
    moved = Transformation(**{**vars(still), "shift": torch.tensor([[2 / 4, -3 / 5]])})
    placed, _ = moved.apply(images, pixels, (5, 6), alpha=alpha)
    torch.testing.assert_close(placed, paste(images, pixels, (7, 3), alpha), atol=1e-5, rtol=0)


def test_eot_at_places_is_eot_at_each() -> None:
    images, pixels, places = noise(2, 3, *SIZE), noise(2, 3, 4, 5, seed=1), ((5, 6), (0, 13))
    keys = [(0, 7), (0, 8)]
    placed, covered = EOT().sample(keys).apply(images, pixels, places)
    for row in range(2):
        alone, under = EOT().sample(keys[row : row + 1]).apply(images[row, None], pixels[row, None], places[row])
        torch.testing.assert_close(placed[row], alone[0])
        assert torch.equal(covered[row], under[0])


def test_eot_on_a_surface_is_drawn_on_the_patch_and_seen_in_perspective() -> None:
    images, pixels = noise(2, 3, *SIZE, dtype=torch.float64), noise(2, 3, 7, 9, seed=1, dtype=torch.float64)
    assert torch.equal(Transformation.identity(2).apply(images, pixels, QUAD)[0], paste(images, pixels, QUAD))
    turned = EOT(brightness=0, contrast=0, noise=0).sample([(0, 1), (0, 2)])
    placed, covered = turned.apply(images, pixels, QUAD)
    assert torch.equal(placed[~covered[:, None].expand_as(images)], images[~covered[:, None].expand_as(images)])
    together = QUAD.homography((7, 9)) @ turned.homography((7, 9), (0, 0))
    torch.testing.assert_close(turned.homography((7, 9), QUAD), together)
    colour, opacity = view(pixels, None, together, SIZE)
    torch.testing.assert_close(placed, torch.where(opacity > 0, colour, images))
    # on a surface parallel to the image it is EOT at that place, but for the edge, which is sharp
    flat, _ = turned.apply(images, pixels, (4, 5))
    mapped, under = turned.apply(images, pixels, axis_parallel(4, 5, 7, 9))
    inner = (view(pixels, None, turned.homography((7, 9), (4, 5)), SIZE)[1] > 0)[:, 0]
    assert torch.equal(under, inner)
    away = torch.nn.functional.max_pool2d((~inner).double()[:, None], 5, 1, 2) == 0
    assert away.any()
    torch.testing.assert_close(mapped[away.expand_as(images)], flat[away.expand_as(images)], atol=1e-6, rtol=0)


def test_a_patch_beyond_the_horizon_is_not_seen_from_behind() -> None:
    steep = Surface(((6, 9), (6, 11), (14, 19), (14, 1)))
    moved = {**vars(Transformation.identity(1)), "shift": torch.tensor([[-3.0, 0.0]])}
    images = noise(1, 3, *SIZE)
    placed, covered = Transformation(**moved).apply(images, noise(1, 3, 8, 8, seed=1), steep)
    assert not covered[:, 6:].any()
    assert torch.equal(placed[..., 6:, :], images[..., 6:, :])


# ------------------------------------------------------------------------------------------------------------ helpers


def test_a_disc_is_round() -> None:
    assert disc(1).tolist() == [[1]]
    assert disc(3).tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert disc(4).sum() == 12
    big = disc(201)
    assert big.sum() / 201**2 == pytest.approx(math.pi / 4, abs=2e-3)
    assert torch.equal(big, big.T)
    assert torch.equal(big, big.flip(0))
    assert set(big.unique().tolist()) == {0.0, 1.0}
    for side in (0, 1.5, True):
        with pytest.raises(ValueError, match="`side`"):
            disc(side)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 10), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4
    )
)
def test_several_patches_are_one_cut_out(rectangles: list[tuple[int, int, int, int]]) -> None:
    location, shape, alpha = several(rectangles)
    expected = torch.zeros(SIZE, dtype=torch.bool)
    for top, left, height, width in rectangles:
        expected[top : top + height, left : left + width] = True
    patch = Patch(noise(3, *shape), location, alpha)
    assert torch.equal(patch.mask(SIZE), expected)
    for side in (expected.any(1).nonzero(), expected.any(0).nonzero()):
        assert int(side[-1] - side[0]) + 1 in shape, "the smallest rectangle around them"


@pytest.mark.parametrize("rectangles", [[], [(0, 0, 0, 1)], [(-1, 0, 1, 1)], [(0, 0, 1)], [(0, 0, 1.5, 1)]])
def test_bad_rectangles_are_refused(rectangles: Any) -> None:
    with pytest.raises(ValueError, match="rectangle"):
        several(rectangles)


# ---------------------------------------------------------------------------------------------------- files, refusals


@pytest.mark.parametrize("location", [((1, 2), (3, 4)), QUAD, (0, 1)], ids=["places", "surface", "place"])
def test_files_keep_places_surfaces_and_alpha(tmp_path: Path, location: Any) -> None:
    for alpha in (None, noise(4, 5, seed=2)):
        patch = Patch(noise(2, 3, 4, 5), location, alpha)
        patch.save(tmp_path / "patch.safetensors")
        again = Patch.load(tmp_path / "patch.safetensors")
        assert again.location == location
        assert (again.alpha is None) == (alpha is None)
        assert torch.equal(again.paste(noise(2, 3, *SIZE)), patch.paste(noise(2, 3, *SIZE)))


def test_representations() -> None:
    assert eval(repr(QUAD)) == QUAD
    assert repr(Patch(noise(3, 2, 2), ((0, 1), (2, 3)))) == "Patch(pixels=<3×2×2>, location=((0, 1), (2, 3)))"
    assert repr(Patch(noise(3, 1, 2), (0, 1), [[1.0, 0.5]])).endswith("location=(0, 1), alpha=<1×2>)")  # type: ignore[arg-type]
    options = PatchOptions(patch_location=QUAD, patch_alpha=disc(4), verbose=False)
    assert eval(repr(options)) == options
    assert options == PatchOptions(patch_location=QUAD, patch_alpha=disc(4).tolist(), verbose=False)


@pytest.mark.parametrize(
    ("pixels", "location", "alpha", "message"),
    [
        (noise(2, 3, 4, 5), ((1, 2), (3, 4), (5, 6)), None, "2 patches do not go to 3 places"),
        (noise(3, 4, 5), ((1, 2), (-3, 4)), None, "at least 0"),
        (noise(3, 4, 5), ((1, 2), (3,)), None, "two whole numbers"),
        (noise(3, 4, 5), torch.tensor([[1.0, 2.0]]), None, "two whole numbers"),
        (noise(3, 4, 5), (1, 2), torch.ones(5, 4), r"of the patch's size, \(4, 5\); got \(5, 4\)"),
        (noise(3, 4, 5), (1, 2), torch.full((4, 5), 1.1), r"in \[0, 1\]"),
        (noise(3, 4, 5), (1, 2), torch.full((4, 5), math.nan), r"in \[0, 1\]"),
        (noise(3, 4, 5), (1, 2), torch.zeros(4, 5), "somewhere above 0"),
        (noise(3, 4, 5), (1, 2), torch.ones(1, 4, 5), r"\(h, w\)"),
        (noise(3, 4, 5), (1, 2), "round", "numbers"),
    ],
)
def test_bad_places_and_alphas_are_refused(pixels: Tensor, location: Any, alpha: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patch(pixels, location, alpha)


def test_places_need_as_many_images_and_room() -> None:
    patch = Patch(noise(3, 4, 5), ((1, 2), (3, 4)))
    for images in (noise(3, 3, *SIZE), noise(3, *SIZE)):
        with pytest.raises(ValueError, match="2 places, one for each image"):
            patch.paste(images)
    with pytest.raises(ValueError, match=r"\(top, left\) = \(3, 4\) reaches outside"):
        patch.paste(noise(2, 3, 6, 9))
    assert resolve_location(((1, 2), (3, 4)), (4, 5), SIZE) == ((1, 2), (3, 4))


# ------------------------------------------------------------------------------------------------------------- attacks


def threat(images: Tensor, location: Any, **more: Any) -> PatchThreat:
    return PatchThreat(images, tuple(range(len(images))), (4, 5), location, (0.0, 1.0), **more)


def test_a_threat_places_what_its_patch_pastes_and_rows_take_their_places() -> None:
    images, pixels, chosen = noise(3, 3, *SIZE), noise(3, 3, 4, 5, seed=1), torch.tensor([2, 0])
    alpha = noise(4, 5, seed=2)
    for location in ((3, 2), ((3, 2), (0, 0), (9, 11)), QUAD):
        for eot in (None, EOT(), InputDiversity()):
            whole = threat(images, location, alpha=alpha, eot=eot)
            placed, covered = whole.place(pixels, (0, 0, 0))
            if eot is None:
                patch = Patch(pixels, location, alpha)
                assert torch.equal(placed, patch.paste(images))
                assert torch.equal(covered, patch.mask(SIZE))
            some, under = whole.rows(chosen).place(pixels[chosen], (0, 0, 0))
            torch.testing.assert_close(some, placed[chosen])
            assert torch.equal(under.expand(2, -1, -1), covered.expand(3, -1, -1)[chosen])


@pytest.mark.parametrize(
    "options",
    [
        {"patch_location": (2, 3), "patch_alpha": disc(6)},
        {"patch_location": QUAD},
        {"patch_location": QUAD, "patch_shape": (4, 4), "eot": EOT(samples=2)},
        dict(zip(("patch_location", "patch_shape", "patch_alpha"), several([(1, 1, 4, 4), (9, 8, 5, 6)]), strict=True)),
    ],
    ids=["disc", "surface", "surface with eot", "several"],
)
def test_attacks_change_what_they_cover_and_nothing_else(linear_segmenter: PyTorchSegmenter, options: Any) -> None:
    images, labels = random_images(3), random_labels(3)
    attack = PatchAttack(linear_segmenter, batch_size=2, **{**FAST, **options})
    adversarial = attack.generate(images, labels)
    mask = attack.mask(images)
    assert torch.equal(mask[0], attack.patch.mask(SHAPE[1:]))
    assert torch.equal(adversarial[~mask[:, None].expand_as(images)], images[~mask[:, None].expand_as(images)])
    changed = (adversarial != images).any(1)
    assert (changed == mask).float().mean() > 0.99
    patch, result = make_patch(linear_segmenter, images, labels, attack._check_params())
    assert torch.equal(patch.paste(images), adversarial), "the same again"
    grey = Patch(torch.full_like(patch.pixels, 0.5), patch.location, patch.alpha).paste(images)
    hits = [
        float((linear_segmenter.logits(each).argmax(1) != labels)[(labels != 255) & ~mask].float().mean())
        for each in (grey, adversarial)
    ]
    assert hits[1] > hits[0]
    assert min(result.criterion) > 0
    other = TorchPatchAttack(linear_segmenter.model, batch_size=3, **{**FAST, **options})
    assert torch.equal(other(images, labels), adversarial)


def test_a_surface_gives_the_patch_its_shape() -> None:
    assert PatchOptions(patch_location=axis_parallel(1, 2, 6, 7)).shape(SIZE) == (6, 7)
    assert PatchOptions(patch_location=QUAD, patch_shape=(30, 40)).shape(SIZE) == (30, 40)
    assert PatchOptions(patch_location=QUAD, patch_alpha=disc(5)).shape(SIZE) == (5, 5)
    assert PatchOptions(patch_alpha=torch.ones(3, 5)).shape(SIZE) == (3, 5)
    assert PatchOptions().shape(SIZE) == (5, 5)
    with pytest.raises(ValueError, match="does not fit"):
        PatchOptions(patch_alpha=disc(17)).check_size(SIZE)
    with pytest.raises(ValueError, match="outside an image"):
        PatchOptions(patch_location=axis_parallel(1, 2, 6, 19)).check_size(SIZE)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="6×6, `patch_shape` \\(5, 6\\)"):
        PatchOptions(patch_alpha=disc(6), patch_shape=(5, 6))
    with pytest.raises(ValueError, match="a place for each image"):
        PatchOptions(patch_location=((1, 2), (3, 4)))
    with pytest.raises(ValueError, match=r"lower_right.*attention"):
        PatchOptions(patch_location="middle")


def test_a_placement_finds_a_place_on_each_image(
    linear_segmenter: PyTorchSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attacks.placement import PLACEMENTS

    asked = []

    def by_stream(
        victim: Any, images: Tensor, reference: Tensor, shape: Any, *, objective: Any, streams: Any, undefended: bool
    ) -> Tensor:
        assert not undefended
        assert images.shape[-2:] == reference.shape[-2:] == SHAPE[1:]
        assert callable(objective)
        asked.append(streams)
        return torch.tensor([[image, 2 * image] for image in streams])

    monkeypatch.setitem(PLACEMENTS, "by stream", by_stream)  # type: ignore[arg-type]
    images, labels = random_images(5), random_labels(5)
    options = {"patch_location": "by stream", "patch_shape": (4, 5), "batch_size": 2, **FAST}
    attack = PatchAttack(linear_segmenter, **options)
    with pytest.raises(ValueError, match=r"'by stream'.*call `generate`"):
        attack.mask(images)
    adversarial = attack.generate(images, labels)
    assert asked == [(0, 1), (2, 3), (4,)]
    assert attack.patch is not None
    assert attack.patch.location == ((0, 0), (1, 2), (2, 4), (3, 6), (4, 8))
    mask = attack.mask(images)
    assert torch.equal((adversarial != images).any(1), mask)
    with pytest.raises(ValueError, match="these 4 images"):
        attack.mask(images[:4])
    for row in range(5):
        alone = PatchAttack(linear_segmenter, **{**options, "patch_location": (row, 2 * row)})
        made = alone.generate(images[row, None], labels[row, None], images=[row])
        torch.testing.assert_close(made[0], adversarial[row], atol=1e-6, rtol=0)
    for name in ("gradient", "scan"):
        found = PatchAttack(linear_segmenter, **{**options, "patch_location": name})
        assert torch.equal((found.generate(images, labels) != images).any(1), found.mask(images))
    torch_attack = TorchPatchAttack(linear_segmenter.model, **options)
    assert torch.equal(torch_attack(images, labels), adversarial)
