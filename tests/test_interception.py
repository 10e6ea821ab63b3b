"""What is seen, and that what is seen is what is refined: real libraries against attention written out by hand."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import SHAPE, tiny_attention
from torch import Tensor, nn

from ramdefense.interception import attention_sites
from ramdefense.ram import HardenedModel, harden

X = 3.0  # the refinement of these tests is min(softmax, X / keys)


def hand_softmax(scores: Tensor, dim: int | None = None, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    assert dim is not None
    scores = scores if dtype is None else scores.to(dtype)
    powers = (scores - scores.amax(dim, keepdim=True)).exp()
    keys = (scores > -math.inf).sum(dim, keepdim=True)
    return torch.minimum(powers / powers.sum(dim, keepdim=True), X / keys)


def hand_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert dropout_p == 0
    if enable_gqa:
        group = q.shape[-3] // k.shape[-3]
        k, v = (t.unsqueeze(-3).expand(*t.shape[:-2], group, *t.shape[-2:]).flatten(-4, -3) for t in (k, v))
    scores = torch.einsum("...qe,...ke->...qk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        scores = torch.where(rows >= columns, scores, -math.inf)
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.einsum("...qk,...kv->...qv", hand_softmax(scores, -1), v)


@contextlib.contextmanager
def by_hand() -> Iterator[list[str]]:
    """Every softmax and every scaled_dot_product_attention in Python written out by hand; the list counts the calls.

    It knows nothing of modes, hooks or sites, so it can judge them; a model under it may have no other softmax.
    """
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner in (torch, F, Tensor):
            patch.setattr(owner, "softmax", counted("softmax", hand_softmax))
        patch.setattr(F, "scaled_dot_product_attention", counted("sdpa", hand_sdpa))
        yield calls


def spread(model: nn.Module, factor: float = 3.0) -> nn.Module:
    """Larger weights, so that attention is far from uniform and the bound acts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, factor / math.sqrt(parameter[0].numel()))
    return model.eval()


def suppressing(model: nn.Module, **options: Any) -> HardenedModel:
    return harden(model, max_attention=f"{X}/N", suppression="clamp", dropout=0.0, **options)


def plain(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


# ------------------------------------------------------------------------------------------------ real libraries


def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=5)


def timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=64, embed_dim=24, depth=3, num_heads=3, num_classes=5)


def timm_beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(img_size=64, embed_dim=24, depth=2, num_heads=2, num_classes=5, use_rel_pos_bias=True)


def timm_pvt() -> nn.Module:
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    return PyramidVisionTransformerV2(
        depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 4), num_classes=5
    )


def smp_segformer() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Segformer("mit_b0", encoder_weights=None, decoder_segmentation_channels=8, classes=5)


def smp_upernet_swin() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.UPerNet(
        "tu-swin_tiny_patch4_window7_224", encoder_weights=None, decoder_channels=8, classes=5, img_size=64,
        embed_dim=12, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4),
    )  # fmt: skip


def smp_dpt() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, decoder_fusion_channels=8, classes=5)


def transformers_segformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=8,
        num_labels=5,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def transformers_beit(attention: str = "eager") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        image_size=64, patch_size=16, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=5, use_relative_position_bias=True, attn_implementation=attention,
    )  # fmt: skip
    return transformers.BeitForImageClassification(config)


LIBRARIES: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "torchvision-swin": (torchvision_swin, 4, {"windowed"}),
    "timm-vit": (timm_vit, 3, {"global"}),
    "timm-beit": (timm_beit, 2, {"global"}),
    "timm-pvt": (timm_pvt, 4, {"reduced", "global"}),
    "smp-segformer": (smp_segformer, 8, {"reduced", "global"}),
    "smp-upernet-swin": (smp_upernet_swin, 5, {"windowed", "global"}),
    "transformers-segformer": (transformers_segformer, 4, {"reduced", "global"}),
    "transformers-beit-eager": (transformers_beit, 2, {"global"}),
    "transformers-beit-sdpa": (lambda: transformers_beit("sdpa"), 2, {"global"}),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_refined_as_written_by_hand(name: str) -> None:
    build, count, kinds = LIBRARIES[name]
    model = spread(build())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sites = attention_sites(model, (3, 64, 64))
    assert len(sites) == count
    assert {site.kind for site in sites} == kinds
    with torch.no_grad():
        hardened = suppressing(model, example=(3, 64, 64))
        got, untouched = plain(hardened(images)), plain(model(images))
        with by_hand() as calls:
            expected = plain(model(images))
        neutral = harden(model, max_attention=1.0, dropout=0.0)
        same = plain(neutral(images))
    assert hardened.refined_calls == len(calls) == count
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (got - untouched).abs().max() > 1e-3 * scale, "the bound has to act for the comparison to say anything"
    assert torch.equal(same, untouched)
    assert neutral.refined_calls == count


@pytest.mark.slow
def test_smp_dpt() -> None:
    model = spread(smp_dpt(), 1.5)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hardened = suppressing(model, example=images)
        got, untouched = hardened(images), model(images)
        with by_hand() as calls:
            expected = model(images)
    assert hardened.refined_calls == len(calls) == 12
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (got - untouched).abs().max() > 1e-3 * expected.abs().max()


def test_timm_fused_and_explicit_attention_are_refined_alike() -> None:
    from timm.layers import set_fused_attn, use_fused_attn

    images = torch.rand(2, 3, 64, 64)
    before = use_fused_attn()
    weights = spread(timm_vit()).state_dict()
    results = {}
    try:
        for fused in (True, False):
            set_fused_attn(fused)
            model = timm_vit().eval()
            model.load_state_dict(weights)
            hardened = harden(model, max_attention="3/N", suppression="clamp", dropout=0.2, seed=4)
            results[fused] = hardened(images).detach()
            assert hardened.refined_calls == 3
            function = "scaled_dot_product_attention" if fused else "softmax"
            assert {site.function for site in hardened.sites} == {function}
    finally:
        set_fused_attn(bool(before))
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)  # the same masks, too


# ------------------------------------------------------------------------------------- nn.MultiheadAttention


def hand_multi_head(layer: nn.MultiheadAttention, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Self-attention (batch, tokens, width) from the layer's weights: output, and weights for each head."""
    projected = x @ layer.in_proj_weight.T + layer.in_proj_bias
    q, k, v = projected.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
    weights = hand_softmax(scores, -1)
    return (weights @ v).transpose(1, 2).flatten(2) @ layer.out_proj.weight.T + layer.out_proj.bias, weights


GRAD_MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Any:
        return self.attn(x, x, x, need_weights=self.need_weights, average_attn_weights=False)


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_and_its_fast_path(need_weights: bool, mode: str) -> None:
    model = spread(SelfAttention(need_weights))
    x = torch.randn(3, 10, 8)
    with GRAD_MODES[mode]():
        hardened = suppressing(model)
        output, weights = hardened(x)
        expected, hand_weights = hand_multi_head(model.attn, x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert hardened.refined_calls == 1
    (site,) = hardened.sites
    assert (site.name, site.function, site.heads, site.keys) == ("attn", "multi_head_attention_forward", 2, 10)
    if need_weights:
        torch.testing.assert_close(weights, hand_weights, rtol=1e-5, atol=1e-6)


def test_one_multi_head_module_with_and_without_weights_is_one_kind_of_call() -> None:
    """The two ways through `multi_head_attention_forward` differ in the function inside, not for us."""
    model = spread(SelfAttention(False))
    x = torch.randn(3, 10, 8)
    hardened = harden(model, max_attention="3/N", suppression="clamp", dropout=0.3, compensate="none")
    with_conditions = []
    for need_weights in (False, True):
        hardened.model.need_weights = need_weights
        hardened._draws = 0
        with_conditions.append(hardened(x)[0])
        assert hardened.refined_calls == 1
    torch.testing.assert_close(*with_conditions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention_in_training_with_its_own_dropout(batch_first: bool) -> None:
    model = spread(SelfAttention(True, batch_first)).train()
    model.attn.dropout = 0.5
    hardened = suppressing(model)
    torch.manual_seed(3)
    _, weights = hardened(torch.randn(12, 10, 8))
    assert 0.4 < (weights == 0).float().mean() < 0.6
    assert hardened.refined_calls == 1


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_transformer_encoder_in_eval_mode(mode: str, padded: bool, nested: bool) -> None:
    """Neither the fused layer nor the conversion to nested tensors may slip by."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = spread(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))
    x = torch.randn(3, 10, 8)
    padding = (torch.arange(10) >= torch.tensor([[10], [7], [6]])) if padded else None
    hardened = suppressing(model)
    with GRAD_MODES[mode]():
        got = hardened(x, src_key_padding_mask=padding)
        expected = x
        for block in model.layers:
            expected = block.norm1(expected + hand_multi_head(block.self_attn, expected, padding)[0])
            expected = block.norm2(expected + block.linear2(block.linear1(expected).relu()))
    seen = torch.ones(3, 10, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert hardened.refined_calls == 2


# -------------------------------------------------------------------------------------- scaled_dot_product_attention


class Sdpa(nn.Module):
    """Scaled dot product attention with any options; queries and keys come from the input."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(6, heads * 8), nn.Linear(6, kv_heads * 16)
        self.options, self.function = options, "scaled_dot_product_attention"

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, 16)).transpose(1, 2).chunk(2, -1)
        return getattr(F, self.function)(q, k, v, **self.options)


MASK = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) > 0.3
SDPA_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": MASK | torch.eye(9, dtype=torch.bool)},
    "float mask": {"attn_mask": torch.linspace(-3, 3, 81).view(9, 9)},
    "mask for each head": {"attn_mask": torch.linspace(-3, 3, 324).view(1, 4, 9, 9)},
    "scale": {"scale": 0.7},
    "grouped queries": {"kv_heads": 2, "enable_gqa": True},
    "grouped, causal, scale": {"kv_heads": 1, "enable_gqa": True, "is_causal": True, "scale": 2.0},
}


@pytest.mark.parametrize("name", SDPA_OPTIONS)
def test_every_option_of_scaled_dot_product_attention(name: str) -> None:
    model = spread(Sdpa(**SDPA_OPTIONS[name]))
    x = torch.randn(2, 9, 6)
    hardened = suppressing(model)
    got = hardened(x)
    with by_hand():
        expected = model(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - model(x)).abs().max() > 1e-2
    assert hardened.refined_calls == 1
    assert hardened.sites[0].shape == (2, 4, 9, 9)
    assert hardened.sites[0].heads == 4


def test_the_callers_own_dropout_is_kept() -> None:
    """dropout_p acts as the caller asked, whatever RAD does: the mean over many passes is the output without it."""
    model = spread(Sdpa(dropout_p=0.4), 1.0)
    x = torch.randn(2, 9, 6)
    hardened = suppressing(model)
    mean = torch.stack([hardened(x) for _ in range(800)]).mean(0)
    model.options = {}
    with by_hand():
        expected = model(x)
    assert (hardened(x) - hardened(x)).abs().max() > 0.1
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.15)


# ------------------------------------------------------------------------------------------------- explicit softmax

SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda s: s.softmax(-1),
    "method, by name": lambda s: s.softmax(dim=2),
    "torch": lambda s: torch.softmax(s, -1),
    "torch, by name": lambda s: torch.softmax(input=s, dim=-1),
    "functional": lambda s: F.softmax(s, dim=-1),
    "functional, dtype": lambda s: F.softmax(s, dim=-1, dtype=torch.float64).float(),
    "module": lambda s: nn.Softmax(dim=-1)(s),
    "special": lambda s: torch.special.softmax(s, -1),
    "internal": lambda s: torch._softmax(s, -1, False),
    "operator": lambda s: torch.ops.aten.softmax(s, -1),
    "operator, overload": lambda s: torch.ops.aten.softmax.int(s, -1),
    "operator, internal": lambda s: torch.ops.aten._softmax.default(s, -1, False),
    "other dimension": lambda s: s.transpose(1, 2).softmax(1).transpose(1, 2),
}

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (N, queries, keys), (N, keys, width)
    "matmul": torch.matmul,
    "@": lambda a, v: a @ v,
    "method": lambda a, v: a.matmul(v),
    "bmm": torch.bmm,
    "baddbmm": lambda a, v: torch.baddbmm(torch.zeros(1, 1, 1), a, v),
    "values first": lambda a, v: (v.transpose(1, 2) @ a.transpose(1, 2)).transpose(1, 2),
    "property mT": lambda a, v: (v.mT @ a.mT).mT,
    "einsum": lambda a, v: torch.einsum("nqk,nkc->nqc", a, v),
    "einsum, values first": lambda a, v: torch.einsum("nkc,nqk->nqc", [v, a]),
    "einsum, no arrow": lambda a, v: torch.stack([torch.einsum("qk,kz", x, y) for x, y in zip(a, v, strict=True)]),
    "einsum, ellipsis": lambda a, v: torch.einsum("...qk,...kc->...qc", a, v),
    "einsum, sublists": lambda a, v: torch.einsum(a, [0, 1, 2], v, [0, 2, 3], [0, 1, 3]),
    "after a cast and a dropout": lambda a, v: F.dropout(a.double().float(), 0.0, training=True) @ v,
    "after a mask": lambda a, v: a.masked_fill(torch.zeros_like(a, dtype=torch.bool), 0) * torch.ones_like(a) @ v,
    "after normalisation": lambda a, v: a / (1e-20 + a.sum(1, keepdim=True).detach() * 0 + 1) @ v,
    "through four dimensions": lambda a, v: a.unflatten(1, (2, -1)).permute(0, 1, 3, 2).clone().mT.flatten(1, 2) @ v,
    "through an expansion": lambda a, v: (
        a.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, *a.shape[1:]) @ v.repeat_interleave(2, 0)
    )[::2],
    "in pieces": lambda a, v: torch.cat([part @ v for part in a.chunk(2, 1)], 1),
}  # fmt: skip


class NonLocal(nn.Module):
    """A non-local block (Wang et al., 2018) of the embedded Gaussian kind, in a small CNN."""

    def __init__(self, softmax: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.theta, self.phi, self.g = (nn.Conv2d(8, 6, 1) for _ in range(3))
        self.head = nn.Conv2d(6, 5, 1)
        self.softmax, self.product = softmax, product

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        theta, phi, g = (layer(x).flatten(2).mT for layer in (self.theta, self.phi, self.g))
        mixed = self.product(self.softmax(theta @ phi.mT), g)
        return self.head(mixed.mT.unflatten(2, x.shape[2:]))

    def hand(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        weights = hand_softmax(torch.einsum("ncq,nck->nqk", theta, phi), -1)
        return self.head(torch.einsum("nqk,nck->ncq", weights, g).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize(
    ("softmax", "product"), [(s, "matmul") for s in SPELLINGS] + [("method", p) for p in PRODUCTS]
)
def test_non_local_block_in_every_spelling(softmax: str, product: str) -> None:
    model = spread(NonLocal(SPELLINGS[softmax], PRODUCTS[product]))
    images = torch.rand(2, 3, 24, 32)
    hardened = suppressing(model, example=images)
    torch.testing.assert_close(hardened(images), model.hand(images), rtol=1e-4, atol=1e-5)
    assert (hardened(images) - model(images)).abs().max() > 1e-3
    assert hardened.refined_calls == 1
    (site,) = hardened.sites
    assert (site.name, site.function, site.kind) == ("(root)", "softmax", "global")
    assert site.shape == (2, 48, 48)
    assert torch.equal(harden(model, max_attention=1.0, dropout=0.0)(images), model(images))


def test_a_gate_that_is_written_over_the_softmax_is_no_attention() -> None:
    """With out= the softmax's result stands among the arguments twice."""

    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).mT
            weights = (tokens @ tokens.mT).softmax(-1)
            return torch.mul(weights, tokens @ tokens.mT, out=weights) @ tokens

    with pytest.raises(ValueError, match="no attention was found"):
        harden(Gated(), example=(3, 4, 4))
    assert attention_sites(Gated(), (3, 4, 4)) == []


class Classes(nn.Module):
    """A softmax over classes and one over channels, in several ways that are not attention, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 1)
        self.embedding = nn.Parameter(torch.randn(8, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.head(x).softmax(1)  # a gate
        classes = self.head(x).softmax(1)  # class probabilities
        x = x + self.linear(classes.movedim(1, -1)).movedim(-1, 1)  # looked up in a table, by a layer
        x = x + (classes.movedim(1, -1) @ self.embedding).movedim(-1, 1)  # and by a parameter
        pooled = (x.flatten(2) * x.flatten(2).mean(1, keepdim=True).softmax(-1)).sum(-1)  # pooling without a product
        x = x + pooled[..., None, None]
        masks = x.flatten(2).sigmoid()
        queries = masks[..., :8].softmax(-1)  # class scores of queries: summed over the queries, not over the classes
        x = x + torch.einsum("bqc,bqn->bcn", queries, masks).view(x.shape)
        tokens = x.flatten(2).mT
        return (tokens @ tokens.mT).softmax(-1) @ tokens


def test_a_softmax_over_classes_is_no_site() -> None:
    sites = attention_sites(spread(Classes()), (3, 16, 16))
    assert [(site.shape, site.function, site.occurrence) for site in sites] == [((1, 16, 16), "softmax", 4)]


def test_talking_heads_are_followed() -> None:
    """Heads are mixed between the softmax and the values (CaiT); the keys are not."""
    cait = pytest.importorskip("timm.models.cait")
    model = cait.Cait(img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    sites = attention_sites(model, (3, 32, 32))
    assert [site.function for site in sites[:2]] == ["softmax", "softmax"]
    assert {site.kind for site in sites[:2]} == {"global"}


def test_channel_attention_is_seen_and_left_alone() -> None:
    xcit = pytest.importorskip("timm.models.xcit")
    model = xcit.Xcit(img_size=64, embed_dim=32, depth=2, num_heads=4, cls_attn_layers=1, num_classes=5, eta=1.0)
    sites = attention_sites(model, (3, 64, 64))
    assert [site.kind for site in sites if "blocks" in site.name][:2] == ["channel", "channel"]
    hardened = suppressing(model, example=(3, 64, 64))
    assert not [site for site in hardened.sites if site.kind == "channel"]
    asked = suppressing(model, example=(3, 64, 64), include="blocks.*")
    assert [site.kind for site in asked.sites] == ["channel", "channel"]


# ---------------------------------------------------------------------------------- modules that run more than once


class Twice(nn.Module):
    """One attention module that runs twice in a forward pass, under two names, and a softmax over classes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Sdpa(heads=1, kv_heads=1)
        self.back = nn.Linear(8, 6)
        self.nested = nn.ModuleDict({"again": self.attn})

    def forward(self, x: Tensor) -> Tensor:
        first = self.back(self.attn(x).squeeze(1))
        second = self.back(self.nested["again"](first).squeeze(1))
        return second.softmax(-1)


def test_a_module_that_runs_twice_has_two_sites_with_masks_of_their_own() -> None:
    model = spread(Twice())
    x = torch.randn(2, 9, 6)
    hardened = harden(model, max_attention=1.0, dropout=0.5, compensate="none", seed=5)
    assert [(s.name, s.occurrence) for s in attention_sites(model, x)] == [("attn", 0), ("attn", 1)]
    got = hardened(x)
    assert hardened.refined_calls == 2

    from ramdefense.streams import keep_mask

    expected = x
    for call in (0, 1):
        keep = keep_mask((2, 1, 9, 9), 0.5, seed=5, draw=0, images=(0, 1), site="attn", call=call)
        q = model.attn.q(expected)
        k, v = model.attn.kv(expected).chunk(2, -1)
        weights = (q @ k.mT / math.sqrt(8)).softmax(-1) * keep.squeeze(1)
        expected = model.back(weights @ v)
    torch.testing.assert_close(got, expected.softmax(-1), rtol=1e-5, atol=1e-6)


def test_a_module_that_runs_more_often_than_in_the_probe() -> None:
    model = spread(Twice())
    hardened = suppressing(model, example=torch.randn(1, 9, 6))
    hardened.model.forward = lambda x: Twice.forward(hardened.model, Twice.forward(hardened.model, x))  # type: ignore[method-assign]
    hardened(torch.randn(2, 9, 6))
    assert hardened.refined_calls == 4


# ------------------------------------------------------------------------------------------------ the probe's manners


class Moody(nn.Module):
    """Has everything that a careless probe would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.noise = nn.BatchNorm2d(3), NonLocal(SPELLINGS["method"], torch.bmm), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.attn(self.norm(x))) + torch.rand(1)


def test_a_probe_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = Moody().train()
    model.attn.g.eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert len(attention_sites(model, (3, 16, 16))) == 1
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_probe_that_fails_leaves_no_trace() -> None:
    model = Moody().train()
    with pytest.raises(RuntimeError):
        attention_sites(model, (7, 16, 16))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("example", [(3,), (0, 3, 3), "3,64,64", 64, (3, 6.5, 6)])
def test_a_bad_example_is_named(example: Any) -> None:
    with pytest.raises(ValueError, match=r"example is .*give a tensor"):
        attention_sites(Moody(), example)


def test_only_modules_have_sites() -> None:
    with pytest.raises(TypeError, match=r"function.*torch\.nn\.Module"):
        attention_sites(lambda x: x, (3, 8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("suppression", ["clamp", "cap", "temperature", "scale"])
def test_a_hardened_model_has_the_sites_of_the_plain_one(suppression: str) -> None:
    """The probe sees RAM's own mathematics, which works in place, and takes none of it for attention."""
    plain = tiny_attention()
    robust = harden(plain, example=SHAPE, max_attention="1.001/N", suppression=suppression, dropout=0.3)
    seen = [attention_sites(model, SHAPE) for model in (plain, robust)]
    assert [(site.queries, site.keys, site.heads) for site in seen[0]] == [
        (site.queries, site.keys, site.heads) for site in seen[1]
    ]
