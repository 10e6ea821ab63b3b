"""What attention sees, where it lies, and that Attention-Fool pulls it to the patch."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import NB_CLASSES, SHAPE, TinyAttention, random_images, random_labels, tiny_attention, tiny_cnn
from torch import Tensor, nn

from attacks.attention import Attention, AttentionFool, Located, locate, watching
from attacks.optimize import make_patch
from attacks.options import PatchOptions, PixelOptions
from attacks.patch import paste, rectangle
from attacks.terms import Forward
from ramdefense import PyTorchSegmenter, RAMDefense, harden, refine
from ramdefense.streams import keep_mask
from ramdefense.traits import conditions

ROWS, COLUMNS = 4, 5  # of tokens of 4×4 pixels on SHAPE
WIDTH, HEADS = 16, 2

# ------------------------------------------------------------------------------------ one model, in many spellings


class Spelled(TinyAttention):
    """The attention of `TinyAttention`, written in another way; the weights are the same."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(NB_CLASSES, WIDTH, HEADS)
        self.attend = attend

    def forward(self, images: Tensor) -> Tensor:
        features = self.embed(images)
        tokens = features.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head((tokens + mixed).transpose(1, 2).reshape(features.shape))


SCALE = (WIDTH // HEADS) ** -0.5


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).mul_(SCALE).softmax(-1), v).unflatten(0, (-1, HEADS))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * SCALE) @ k.mT
    scores = scores.view(len(q), HEADS, *scores.shape[-2:]) + torch.zeros(scores.shape[-2:])
    scores = scores.masked_fill(torch.zeros(scores.shape[-2:], dtype=torch.bool), -math.inf)
    return F.softmax(scores.float(), dim=-1) @ v


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v,
    "bmm": bmm,
    "masked": masked,
    "einsum": lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q, k).mul(SCALE).softmax(-1) @ v,
    "keys first": lambda q, k, v: ((k @ q.mT) * SCALE).softmax(-2).mT @ v,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "sdpa, mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.zeros(q.shape[-2], k.shape[-2])),
    "sdpa, grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
}


def spelled(name: str) -> Spelled:
    torch.manual_seed(0)
    return Spelled(SPELLINGS[name]).eval()


class MultiHead(nn.Module):
    """`nn.MultiheadAttention` over 4×4 patches; with weights it goes another way through torch than without."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Conv2d(WIDTH, NB_CLASSES, 1)
        self.attention, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights

    def forward(self, images: Tensor) -> Tensor:
        features = self.embed(images)
        tokens = features.flatten(2).mT
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=self.need_weights)
        return self.head((tokens + mixed).mT.reshape(features.shape))


class VisionTransformer(nn.Module):
    """torchvision's, with a class token, two layers and positions, as a segmenter of 16×16 images."""

    def __init__(self) -> None:
        from torchvision.models import VisionTransformer

        super().__init__()
        torch.manual_seed(0)
        self.vit = VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=WIDTH, mlp_dim=24)
        self.head = nn.Conv2d(WIDTH, NB_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit._process_input(images)
        tokens = self.vit.encoder(torch.cat([self.vit.class_token.expand(len(tokens), -1, -1), tokens], 1))
        return self.head(tokens[:, 1:].mT.unflatten(2, (4, 4)))


class NonLocal(nn.Module):
    """A convolution and one non-local block, single-headed, with keys of half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, NB_CLASSES, 1)
        self.theta, self.phi, self.g = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        small = F.avg_pool2d(x, 2)
        scores = self.theta(x).flatten(2).mT @ self.phi(small).flatten(2)
        mixed = scores.softmax(-1) @ self.g(small).flatten(2).mT
        return self.head(x + mixed.mT.unflatten(2, x.shape[2:]))


def segmenter(model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> PyTorchSegmenter:
    return PyTorchSegmenter(model, NB_CLASSES, shape, preprocessing=((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "tiny": (tiny_attention, SHAPE),
    "sdpa": (lambda: spelled("sdpa"), SHAPE),
    "multi-head": (lambda: MultiHead(False), SHAPE),
    "multi-head, weights": (lambda: MultiHead(True), SHAPE),
    "vision transformer": (VisionTransformer, (3, 16, 16)),
    "non-local": (NonLocal, SHAPE),
}


# ------------------------------------------------------------------------------------------------------- watching


def seen_by(model: nn.Module, images: Tensor) -> list[Attention]:
    with watching(model) as seen:
        model(images)
    return seen


def of_tiny(model: TinyAttention, images: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (N, heads, tokens, d), by the model's own layers."""
    tokens = model.embed(images).flatten(2).mT
    q, k, _ = model.qkv(tokens).unflatten(2, (3, model.heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k


@pytest.mark.parametrize("name", SPELLINGS)
def test_queries_and_keys_are_seen_in_every_spelling(name: str) -> None:
    model, images = spelled(name), random_images(3)
    (attention,) = seen_by(model, images)
    q, k = of_tiny(model, images)
    queries, keys = (t.unflatten(0, (3, HEADS)) if t.dim() == 3 else t for t in (attention.queries, attention.keys))
    torch.testing.assert_close(queries / queries.norm(), q / q.norm())
    torch.testing.assert_close(keys, k)
    expected = (q @ k.mT * SCALE).softmax(-1)
    torch.testing.assert_close(attention.weights().reshape(expected.shape), expected)
    slope = torch.autograd.grad(attention.keys.sum(), model.qkv.weight, retain_graph=True)[0]
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_queries_and_keys_inside_multi_head_attention(need_weights: bool) -> None:
    model, images = MultiHead(need_weights).eval(), random_images(3)
    (attention,) = seen_by(model, images)
    tokens = model.embed(images).flatten(2).mT
    q, k, _ = F.linear(tokens, model.attention.in_proj_weight, model.attention.in_proj_bias).chunk(3, -1)
    q, k = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k))
    assert attention.call.function == "multi_head_attention_forward"
    assert attention.call.module == "attention"
    torch.testing.assert_close(attention.keys.reshape(k.shape), k)
    torch.testing.assert_close(attention.weights().reshape(3, HEADS, 20, 20), (q @ k.mT * SCALE).softmax(-1))


def test_a_softmax_that_is_no_product_is_not_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1))
    assert seen_by(model, random_images(1)) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_watched_model_computes_what_it_would_have(name: str) -> None:
    build, shape = MODELS[name]
    model = build().eval()
    images = torch.rand(2, *shape, requires_grad=True)
    plain = model(images)
    with watching(model) as seen:
        watched = model(images)
    assert len(seen) == (2 if name == "vision transformer" else 1)
    assert torch.equal(plain, watched)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_hardened_model_goes_on_refining_under_the_watch(name: str) -> None:
    """Bit for bit: the same sites, the same masks, the same suppression, on the first pass and on a later one."""
    build, shape = MODELS[name]
    model = build().eval()
    images = torch.rand(2, *shape)
    robust = harden(model, max_attention="2/N", suppression="clamp", dropout=0.3, example=shape)
    with conditions(robust, images=(4, 7), draw=5):
        expected = copy.deepcopy(robust)(images)
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with watching(robust) as seen:
                    got = robust(images)
            assert torch.equal(got, expected)
            assert robust.refined_calls == len(robust.sites) == len(seen)
    assert (expected - model(images)).abs().max() > 1e-4
    first = seen[0].keys
    torch.testing.assert_close(first, seen_by(model, images)[0].keys)  # before any refinement


def test_a_model_of_which_a_part_is_hardened() -> None:
    """Where plain modules attend around a hardened one, each call is seen once, and unrefined."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny_attention(0).eval(), harden(tiny_attention(1).eval(), example=SHAPE)

        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(2).mT
            mixed = (tokens @ tokens.mT).softmax(-1) @ tokens  # in the root
            return self.first(images) + self.second(mixed.mT.reshape(images.shape))

    model, images = Around().eval(), random_images(2)
    with conditions(model, draw=0):
        expected = model(images)
        with watching(model) as seen:
            assert torch.equal(model(images), expected)
    assert [attention.call.module for attention in seen] == ["", "first", "second.model"]
    for attention in seen:
        torch.testing.assert_close(attention.weights().sum(-1), torch.ones(attention.queries.shape[:-1]))


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_applied_matrix_is_what_a_defence_makes_of_it(name: str) -> None:
    """In every spelling MAS and RAD of the scores, with the mask of that draw and those images; without a defence the
    plain matrix. What the model computes stays."""
    plain, images, streams = spelled(name), random_images(3), (5, 2, 9)
    hard = harden(plain, max_attention="2/N", dropout=0.3, example=SHAPE).eval()
    q, k = of_tiny(plain, images)
    scores = q @ k.mT * SCALE * 4  # far from uniform, so that the bound acts
    with torch.no_grad():
        plain.qkv.weight[: 2 * WIDTH].mul_(2)
        plain.qkv.bias[: 2 * WIDTH].mul_(2)
        hard.model.load_state_dict(plain.state_dict())
    keep = keep_mask(scores.shape, 0.3, seed=0, draw=3, images=streams, site="")
    refined = refine(scores, max_attention="2/N", suppression="cap", dropout=0.3, keep=keep)
    assert (refined - scores.softmax(-1)).abs().max() > 0.05
    for model, expected in ((plain, scores.softmax(-1)), (hard, refined)):
        with conditions(model, images=streams, draw=3):
            unwatched = model(images)
            with watching(model, applied=True) as seen:
                torch.testing.assert_close(model(images), unwatched)
        (attention,) = seen
        assert attention.applied is not None
        torch.testing.assert_close(attention.applied.reshape(scores.shape), expected)
        torch.testing.assert_close(attention.weights().reshape(scores.shape), scores.softmax(-1))


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_applied_matrix_inside_multi_head_attention(need_weights: bool) -> None:
    sharp = sharpened(MultiHead(need_weights), 4.0)
    model = harden(sharp, max_attention="1.2/N", dropout=0, example=SHAPE).eval()
    unwatched = model(random_images(2))
    with watching(model, applied=True) as seen:
        torch.testing.assert_close(model(random_images(2)), unwatched)
    (attention,) = seen
    assert attention.applied is not None
    assert attention.weights().amax() > 1.3 / 20
    torch.testing.assert_close(attention.applied.amax(), torch.tensor(1.2 / 20))
    assert all(a.applied is None for a in seen_by(model, random_images(2))), "only where it is asked for"


# --------------------------------------------------------------------------------------------------------- places


def grid(rows: int, columns: int, size: int) -> Tensor:
    """Centres of tokens of size×size pixels, row by row: (rows · columns, 2)."""
    centres = [torch.arange(number) * size + (size - 1) / 2 for number in (rows, columns)]
    return torch.cartesian_prod(*centres)


def only(located: dict[Any, Located]) -> Located:
    (places,) = located.values()
    return places


@pytest.mark.parametrize("name", ["tiny", "sdpa", "multi-head, weights"])
def test_tokens_are_found_on_their_grid(name: str) -> None:
    build, shape = MODELS[name]
    for model in (segmenter(build()), RAMDefense(segmenter(build()))):
        places = only(locate(model, shape))
        assert places.heads == HEADS
        for found in (places.queries, places.keys):
            assert found.shape == (1, 20, 2)
            torch.testing.assert_close(found[0], grid(ROWS, COLUMNS, 4), rtol=0, atol=1.2)


def test_queries_and_reduced_keys_have_places_of_their_own() -> None:
    places = only(locate(segmenter(NonLocal()), SHAPE))
    # the stem's 3×3 is centred on every other pixel; at the border a part of it is padding
    torch.testing.assert_close(places.queries[0], grid(8, 10, 2) - 0.5, rtol=0, atol=1.1)
    torch.testing.assert_close(places.keys[0], grid(4, 5, 4) - 0.5, rtol=0, atol=2.0)  # inside the token


def test_a_class_token_has_no_place_and_the_second_layer_has_the_places_of_the_first() -> None:
    located = locate(segmenter(VisionTransformer(), (3, 16, 16)), (3, 16, 16))
    assert len(located) == 2
    for places in located.values():
        assert places.keys[0, 0].isnan().all()
        torch.testing.assert_close(places.keys[0, 1:], grid(4, 4, 4), rtol=0, atol=1.9)  # inside the token


def test_windows_and_their_shifts_are_found() -> None:
    """torchvision's Swin: 8×8 tokens in windows of 4×4, in the second block rolled by 2."""
    from torchvision.models import SwinTransformer

    class Swin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.swin, self.head = SwinTransformer([4, 4], 12, [2], [2], [4, 4]), nn.Conv2d(12, NB_CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.swin.features(images).permute(0, 3, 1, 2))

    located = locate(segmenter(Swin(), (3, 32, 32)), (3, 32, 32))
    whole = grid(8, 8, 4).view(8, 8, 2)
    for places, shift in zip(located.values(), (0, 2), strict=True):
        windows = whole.roll((-shift, -shift), (0, 1)).view(2, 4, 2, 4, 2).permute(0, 2, 1, 3, 4).reshape(4, 16, 2)
        torch.testing.assert_close(places.keys, windows, rtol=0, atol=1.6)
        assert places.heads == 2


def test_places_are_those_of_the_model_and_leave_no_trace() -> None:
    victim = segmenter(tiny_attention())
    state, model = torch.get_rng_state(), copy.deepcopy(victim.model.state_dict())
    one, two = only(locate(victim, SHAPE)), only(locate(victim, SHAPE))
    assert torch.equal(one.keys, two.keys)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, model[name]) for name, value in victim.model.state_dict().items())


@pytest.mark.parametrize("what", ["channels", "classes", "none"])
def test_attention_that_is_not_between_places_is_refused(what: str) -> None:
    class Other(nn.Module):
        """Attention between channels, between learned queries, or none at all."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, NB_CLASSES, 1)
            self.learned, self.wide = nn.Parameter(torch.randn(1, 5, 24)), nn.Linear(6, 24)

        def forward(self, images: Tensor) -> Tensor:
            x = self.stem(images)
            flat = x.flatten(2)
            if what == "channels":
                return self.head(((flat @ flat.mT / 99).softmax(-1) @ flat).view(x.shape))
            if what == "classes":
                queries = self.learned + self.wide(flat.mT.relu()).tanh().mean(1, keepdim=True)
                return self.head(x + ((queries @ queries.mT).softmax(-1) @ queries).mean((1, 2))[:, None, None, None])
            return self.head(x)

    with pytest.raises(ValueError, match=r"(?s)no attention.*take another attack"):
        locate(segmenter(Other()), SHAPE)


def test_keys_under_a_patch() -> None:
    places = Located(HEADS, grid(ROWS, COLUMNS, 4)[None], grid(ROWS, COLUMNS, 4)[None])
    covered = torch.stack([rectangle((8, 4), (4, 8), SHAPE[1:]), rectangle((1, 2), (8, 0), SHAPE[1:])])
    under = places.under(covered)
    assert under.shape == (2, 1, 20)
    assert under[0, 0].nonzero()[:, 0].tolist() == [7, 12]
    assert under[1, 0].nonzero()[:, 0].tolist() == [10]  # no centre is covered: the nearest
    assert (~places.outside(covered))[0, 0].nonzero()[:, 0].tolist() == [7, 12]
    assert places.outside(covered)[1].all(), "no query is covered, and none is taken in its place"
    placeless = Located(HEADS, places.queries, places.keys.clone())
    placeless.keys[0, [7, 10]] = torch.nan
    assert placeless.under(covered)[0, 0].nonzero()[:, 0].tolist() == [12]
    assert placeless.under(covered)[1, 0].nonzero()[:, 0].tolist() != [10]


# -------------------------------------------------------------------------------------------------- Attention-Fool

PATCH = (8, 8)
PLACE = (4, 8)  # tokens 7, 8, 12, 13
UNDER = [7, 8, 12, 13]


def value(victim: PyTorchSegmenter, images: Tensor, term: AttentionFool, shape: tuple[int, int] = PATCH) -> Tensor:
    covered = rectangle(shape, PLACE, (images.shape[-2], images.shape[-1]))
    with term.observe(victim) as observed:
        logits = victim.logits(images)
    return term(Forward(images, images, covered, logits, observed))


def by_hand(q: Tensor, k: Tensor, under: list[int]) -> Tensor:
    """The paper's loss, written out: (N, heads, tokens, d) -> (N,)."""
    losses = []
    for queries, keys in zip(q.detach(), k.detach(), strict=True):
        terms = []
        for head in range(len(queries)):
            q_mean = sum(float(row.pow(2).sum().sqrt()) for row in queries[head]) / len(queries[head])
            k_mean = sum(float(row.pow(2).sum().sqrt()) for row in keys[head]) / len(keys[head])
            b = (queries[head] / q_mean) @ (keys[head] / k_mean).T / math.sqrt(queries.shape[-1])
            terms += [float(b[:, key].mean()) for key in under]
        losses.append(math.log(sum(math.exp(term) for term in terms)))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("shape", "under"), [((4, 4), [7]), (PATCH, UNDER)])
def test_the_value_is_the_papers(heads: int, shape: tuple[int, int], under: list[int]) -> None:
    """In float64. With one head and a patch of one token it is the mean of one column of the normalised product."""
    torch.manual_seed(0)
    model = TinyAttention(NB_CLASSES, WIDTH, heads).double().eval()
    victim = PyTorchSegmenter(model, NB_CLASSES, SHAPE)
    images = random_images(3).double()
    got = value(victim, images, AttentionFool(weight=2.5), shape)
    outside = SHAPE[1] * SHAPE[2] - shape[0] * shape[1]
    expected = -2.5 * outside * by_hand(*of_tiny(model, images), under)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_layers_are_joined_by_a_log_sum_exp() -> None:
    victim = segmenter(VisionTransformer(), (3, 16, 16))
    images = torch.rand(2, 3, 16, 16)
    seen = seen_by(victim.model, (images - 0.4) / 0.3)
    assert len(seen) == 2
    with AttentionFool().observe(victim) as observed:
        victim.logits(images)
    parts = [by_hand(a.queries, a.keys, [8, 12]) for a in observed.seen]  # a class token first
    expected = -(256 - 32) * torch.stack(parts).logsumexp(0)
    covered = rectangle((8, 4), (4, 12), (16, 16))
    got = AttentionFool()(Forward(images, images, covered, images, observed))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_value_does_not_depend_on_the_spelling(name: str) -> None:
    images = random_images(2)
    expected = value(segmenter(spelled("@")), images, AttentionFool())
    torch.testing.assert_close(value(segmenter(spelled(name)), images, AttentionFool()), expected)


@pytest.mark.parametrize("hard", [False, True])
def test_the_gradient_is_that_of_finite_differences(hard: bool) -> None:
    victim = PyTorchSegmenter(tiny_attention().double(), NB_CLASSES, SHAPE)
    victim = RAMDefense(victim, max_attention="2/N", dropout=0.2) if hard else victim
    images, direction = random_images(2).double(), torch.randn(2, *SHAPE, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    with victim.conditions(draw=0):
        slope = torch.autograd.grad(value(victim, leaf, AttentionFool()).sum(), leaf)[0]
        ahead, behind = (value(victim, images + s * 1e-5 * direction, AttentionFool()).sum() for s in (1, -1))
    assert (slope.flatten(1).abs().sum(1) > 0).all()
    torch.testing.assert_close((slope * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)


def mass(victim: PyTorchSegmenter, images: Tensor, under: list[int]) -> Tensor:
    """The share of the attention of all queries, over all layers, that goes to these keys: (N,)."""
    with torch.no_grad(), victim.conditions(draw=0), watching(victim.model) as seen:
        victim.logits(images)
    shares = [a.weights().reshape(len(images), -1, a.keys.shape[-2])[..., under].sum(-1).mean(1) for a in seen]
    return torch.stack(shares).mean(0)


def sharpened(model: nn.Module, factor: float) -> nn.Module:
    """Scaled queries and keys, as training makes them: attention that is not uniform from the start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv", "in_proj", "theta", "phi")):
                parameter.mul_(factor)
    return model


@pytest.mark.parametrize("name", ["tiny", "multi-head", "vision transformer", "non-local"])
@pytest.mark.parametrize("hard", [False, True])
def test_it_draws_the_attention_to_the_patch(name: str, hard: bool) -> None:
    """Far above a grey patch and above the best of many random ones; alone, in eight steps."""
    build, shape = MODELS[name]
    victim = segmenter(sharpened(build(), 2.0), shape)
    victim = RAMDefense(victim, max_attention="4/N", dropout=0.1) if hard else victim
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(2))
    options = PatchOptions(
        objective="none", terms=(AttentionFool(),), patch_shape=PATCH, patch_location=PLACE, keep_best=False,
        max_iter=8, eps_step=0.15, verbose=False,
    )  # fmt: skip
    patch, _ = make_patch(victim, images, torch.zeros(2, *shape[1:], dtype=torch.int64), options)
    under = {"vision transformer": [7, 8, 11, 12]}.get(name, UNDER)
    grey = mass(victim, paste(images, torch.full((2, 3, *PATCH), 0.5), PLACE), under)
    noise = torch.rand(24, 3, *PATCH, generator=torch.Generator().manual_seed(0))
    best = mass(victim, paste(images.repeat(12, 1, 1, 1), noise, PLACE), under).view(12, 2).amax(0)
    fooled = mass(victim, patch.paste(images), under)
    assert (fooled > 1.1 * best).all(), (fooled, best, grey)
    assert (fooled > 1.2 * grey).all(), (fooled, best, grey)


def test_it_is_added_to_an_objective_and_the_weight_counts() -> None:
    victim, images, labels = segmenter(sharpened(tiny_attention(), 2.0)), random_images(2), random_labels(2)

    def fooled(*terms: AttentionFool) -> tuple[Tensor, float]:
        options = PatchOptions(
            terms=terms, patch_shape=PATCH, patch_location=PLACE, keep_best=False, max_iter=6, verbose=False
        )
        patch, _ = make_patch(victim, images, labels, options)
        return patch.pixels, float(mass(victim, patch.paste(images), UNDER).mean())

    (alone, least), (light, _), (heavy, most) = fooled(), fooled(AttentionFool(1e-6)), fooled(AttentionFool(100.0))
    assert torch.equal(alone, light)
    assert most > least
    assert not torch.equal(alone, heavy)


def test_images_know_nothing_of_each_other() -> None:
    victim, images, labels = segmenter(tiny_attention()), random_images(3), random_labels(3)
    options = PatchOptions(terms=(AttentionFool(),), patch_shape=PATCH, max_iter=3, verbose=False)
    together, _ = make_patch(victim, images, labels, options)
    alone, _ = make_patch(victim, images[1:2], labels[1:2], options, [1])
    torch.testing.assert_close(together.pixels[1:2], alone.pixels, rtol=0, atol=1e-6)


def test_places_are_looked_for_once() -> None:
    victim, images = segmenter(tiny_attention()), random_images(2)
    passes: list[int] = []
    victim.model.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    term = AttentionFool()
    first = value(victim, images, term)
    assert len(passes) > 2
    passes.clear()
    assert torch.equal(value(victim, images, term), first)
    assert passes == [2]


def test_it_says_what_it_is() -> None:
    term = AttentionFool(weight=0.5)
    assert repr(term) == "AttentionFool(weight=0.5)"
    assert eval(repr(term)) == term == pickle.loads(pickle.dumps(term)) == copy.deepcopy(term)
    value(segmenter(tiny_attention()), random_images(1), term)
    assert pickle.loads(pickle.dumps(term)) == term


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_a_weight_is_above_zero(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"`weight` is .*; it must be"):
        AttentionFool(weight)


def test_a_model_without_attention_is_named() -> None:
    victim = PyTorchSegmenter(tiny_cnn(), NB_CLASSES, SHAPE)
    options = PatchOptions(terms=(AttentionFool(),), patch_shape=PATCH, verbose=False)
    with pytest.raises(ValueError, match="no attention"):
        make_patch(victim, random_images(1), random_labels(1), options)


def test_an_attack_without_a_patch_is_refused() -> None:
    from attacks.optimize import optimize

    with pytest.raises(ValueError, match="no pixel under one; leave the term out"):
        optimize(
            segmenter(tiny_attention()), random_images(1), random_labels(1),
            PixelOptions(terms=(AttentionFool(),), verbose=False),
        )  # fmt: skip
