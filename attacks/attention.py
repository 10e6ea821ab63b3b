"""Attacks that look at attention: what each place of a model that attends sees, and where on the image that lies.

Three parts, each of which stands alone:

- `watching` shows the queries and the keys of every attention in a forward pass, with their gradients, through the same
  watching that RAM uses (`ramdefense.interception`). It works on any model and knows no class names. A defence that
  watches too goes on as if nobody else did.
- `locate` finds where on the image each query and each key lies, by probing: the image is noise, one stripe of it after
  the other is replaced by other noise, and a token lies in the stripes that move it most. So nobody has to know how a
  model cuts an image into tokens: windows and their shifts, reduced keys and several scales are found like a plain
  grid, and what has no place (a class token, learned queries, the channels of channel attention) is left out.
- `AttentionFool` is the loss of Lovisotto et al., which pulls the attention of the whole image to the patch.

Not seen, beside what `ramdefense.interception` does not see: attention whose scores are no product of queries and keys
(additive attention) or are mixed between the product and the softmax (talking heads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.weak import WeakIdKeyDictionary

from attacks.interfaces import Victim
from attacks.streams import stream
from attacks.terms import Forward
from ramdefense.interception import Call, Watch, Watcher, matrix_shape, probe
from ramdefense.traits import NotApplicableError

STRIPES = 32
"""The most stripes into which each side of an image is cut to find the places of tokens."""

_AT_ONCE = 8  # probing images in one forward pass

# Standard deviation of the stripes that move a token, in sides of the image: 0.14 where they fill a half of it, 0.29
# where they fill it or are scattered over it.
_EVERYWHERE = 0.2

Shape = tuple[int, int, int]


# ------------------------------------------------------------------------------------------------ what attention sees


class Attention(NamedTuple):
    """One attention of a forward pass, before any refinement.

    Attributes:
        call: Which one.
        queries: (…, queries, d), with gradients; the scale of the scores may be in them or not.
        keys: (…, keys, d), with the same leading dimensions, images outermost.
        weights: Gives the attention matrix (…, queries, keys), each row summing to 1.
        applied: The matrix that the values were really multiplied with, refined where a defence refines; None unless
            it was asked for.
    """

    call: Call
    queries: Tensor
    keys: Tensor
    weights: Callable[[], Tensor]
    applied: Tensor | None = None


@contextmanager
def watching(model: nn.Module, *, applied: bool = False) -> Iterator[list[Attention]]:
    """Watch a forward pass of `model`: the list holds what attended in it, in the order of the calls.

    A softmax is in the list where its scores are a product of two tensors, whether its result is then used as attention
    or not; `locate` knows those that are.

    Args:
        model: Any module; it computes what it would have computed unwatched.
        applied: Keep each matrix that is applied, too. That costs memory, and the model computes what it would have
            but for rounding: a fused kernel, which never writes its matrix, is made to.
    """
    watch, watcher = _Observing(applied), Watcher()
    watcher.watch(model, {name for name, _ in model.named_modules()})
    try:
        with watcher.running(watch):
            yield watch.seen
    finally:
        watcher.unwatch()


class _Observing(Watch):
    """Takes down the queries and keys of each call, then lets it through to whoever watches below.

    It has to be asked before a defence is, which puts its own mode on top at the entrance of the modules that attend.
    So it goes on top again at each entrance where it is not; a call that it has taken down passes its lower places.
    """

    def __init__(self, applied: bool) -> None:
        super().__init__()
        self.applied = applied
        self.seen: list[Attention] = []
        self._pushed: list[bool] = []
        self._busy = False
        self._products: Any = WeakIdKeyDictionary()  # scores → their queries and keys

    def switch_on(self) -> None:
        self._pushed.append(_get_current_function_mode() is not self)
        if self._pushed[-1]:
            self.__enter__()

    def switch_off(self, *, entirely: bool = False) -> None:
        while self._pushed:
            if self._pushed.pop():
                self.__exit__(None, None, None)
            if not entirely:
                break

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._busy:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # comes back with the calls inside
            return super().__torch_function__(func, types, args, kwargs)
        self._busy = True
        try:
            output = super().__torch_function__(func, types, args, kwargs)
            name = getattr(func, "__name__", "").split(".")[0]
            self._follow(name if name.startswith("__") else name.rstrip("_"), args, kwargs, output)
            return output
        finally:
            self._busy = False

    def attend(self, call: Call, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        def weights() -> Tensor:
            return F.scaled_dot_product_attention(q, k, _one_hot(k), **{**options, "dropout_p": 0.0})

        grouped = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if options.get("enable_gqa") else k
        seen = Attention(call, *_alike(q, grouped), weights)
        if not self.applied:
            self.seen.append(seen)
            return function(q, k, v, **options)
        # beside the values, so that a defence below is asked once, as it would have been
        mixed, matrix = function(q, k, torch.cat([v, _one_hot(v)], -1), **options).split([v.shape[-1], v.shape[-2]], -1)
        self.seen.append(seen._replace(applied=matrix))
        return mixed.contiguous()  # as the function itself gives it, for whoever takes a view

    def soften(self, call: Call, function: Callable[[], Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        product = self._products.get(scores)
        if product is not None and dim >= scores.dim() - 2:
            along = scores.movedim(dim, -1)
            queries, keys = product if dim == scores.dim() - 1 else reversed(product)
            seen = Attention(call, queries, keys, lambda: along.softmax(-1))
            matrix = function()
            self.seen.append(seen._replace(applied=matrix.movedim(dim, -1)) if self.applied else seen)
            return matrix
        return function()

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note a product of two tensors, and carry the note over to what still are those scores, scaled or masked."""
        if not isinstance(output, Tensor) or output.dim() < 2:
            return
        product = _factors(name, args, kwargs)
        if product is not None:
            if (product[0].shape[-2], product[1].shape[-2]) == output.shape[-2:]:
                self._products[output] = product
        elif name not in _MIXING:
            for value in (*args, *kwargs.values()):
                scores = isinstance(value, Tensor) and value is not output and value in self._products
                if scores and value.numel() == output.numel() and value.shape[-2:] == output.shape[-2:]:
                    self._products[output] = self._products[value]


#: Functions whose result no longer has each score at its place, though it may have the shape.
_MIXING = frozenset(
    {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "__get__", "t", "adjoint", "linear",
     "flip", "roll", "softmax", "_softmax", "log_softmax", "normalize", "layer_norm", "cumsum"}
)  # fmt: skip
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "mm"})


def _factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Queries (…, queries, d) and keys (…, keys, d) of a matrix product; None where the function is none."""
    if name == "einsum":
        return _einsum_factors(args)
    operands = [*args, *kwargs.values()]
    if name == "baddbmm":
        operands = operands[1:]
    elif name not in _PRODUCTS:
        return None
    left, right = operands[:2]
    return _alike(left, right.transpose(-2, -1)) if left.dim() > 1 and right.dim() > 1 else None


def _einsum_factors(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """The same for an einsum of two operands whose letters are all written out."""
    equation = args[0]
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(equation, str) or "." in equation or "->" not in equation or len(operands) != 2:
        return None
    terms, result = equation.replace(" ", "").split("->")
    left, right = terms.split(",")
    lead, tokens = result[:-2], result[-2:]
    width = "".join(letter for letter in left if letter in right and letter not in result)
    factors = []
    for token in tokens:
        owner = [(term, operand) for term, operand in zip((left, right), operands, strict=True) if token in term]
        if len(owner) != 1 or not width or sorted(owner[0][0]) != sorted(lead + token + width):
            return None
        factors.append(torch.einsum(f"{owner[0][0]}->{lead}{token}{width}", owner[0][1]).flatten(len(lead) + 1))
    return factors[0], factors[1]


def _one_hot(tokens: Tensor) -> Tensor:
    """Values (…, n, n), one-hot: attention to them is the attention matrix itself. Of tokens (…, n, d)."""
    return torch.eye(tokens.shape[-2], dtype=tokens.dtype, device=tokens.device).expand(*tokens.shape[:-1], -1)


def _alike(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the leading dimensions of their product."""
    lead = matrix_shape(queries, keys)[:-2]
    return queries.expand(*lead, -1, -1), keys.expand(*lead, -1, -1)


# ------------------------------------------------------------------------------------------- where on the image it lies


@dataclass(frozen=True)
class Located:
    """Where the tokens of one attention lie.

    Args:
        heads: Heads that look at the same tokens.
        queries: Row and column in pixels, (windows, queries, 2); NaN where a query has no place on the image. What is
            not cut into windows is one.
        keys: (windows, keys, 2).
    """

    heads: int
    queries: Tensor
    keys: Tensor

    def arrange(self, tokens: Tensor, images: int) -> Tensor:
        """(…, tokens, d) of a batch of images -> (images, windows, heads, tokens, d)."""
        return tokens.reshape(images, -1, self.heads, *tokens.shape[-2:])

    def under(self, covered: Tensor) -> Tensor:
        """The keys that lie under the covered pixels, (N, H, W) bool: (N, windows, keys) bool.

        Where the patch is so small that it lies between them, the key that is next to its middle.
        """
        under = _lie_under(self.keys, covered)
        rows, columns = (torch.arange(side, device=covered.device).float() for side in covered.shape[1:])
        pixels = covered.flatten(1).sum(1)
        middle = torch.stack([(covered.sum(2) * rows).sum(1) / pixels, (covered.sum(1) * columns).sum(1) / pixels], 1)
        distance = (self.keys.nan_to_num(torch.inf) - middle[:, None, None]).norm(dim=-1).flatten(1)
        nearest = F.one_hot(distance.argmin(1), distance.shape[1]).bool().view_as(under)
        return under.where(under.flatten(1).any(1)[:, None, None], nearest)

    def outside(self, covered: Tensor) -> Tensor:
        """The queries that do not lie under the covered pixels, (N, H, W) bool, or nowhere: (N, windows, queries)."""
        return ~_lie_under(self.queries, covered)


def _lie_under(places: Tensor, covered: Tensor) -> Tensor:
    """Which places (windows, tokens, 2) are covered, by (N, H, W) bool: (N, windows, tokens) bool."""
    row, column = places.nan_to_num().round().long().unbind(-1)
    return covered[:, row, column] & ~places.isnan().any(-1)


@torch.no_grad()
def locate(victim: Victim, shape: Shape) -> dict[Call, Located]:
    """The attentions of the victim whose keys have places on the image, and these places.

    Each token is said to lie at the centre of the stripes that move it by more than half of what the one that moves it
    most does, in rows and in columns. A token that stripes all over the image move so follows the image as a whole and
    has no place. Deep in a model every token feels every pixel a little, its own ones most.

    It takes one forward pass, and one of a noise image for each stripe (at most 2 × `STRIPES`), without the defence
    where that can be left out. The noise is always the same: places belong to the model and not to an image.

    Args:
        victim: The segmenter.
        shape: (C, H, W) of an image.

    Raises:
        NotApplicableError: If no attention between places of the image is found.
    """
    low, high = (float(value) for value in victim.clip_values)
    noise = torch.rand(2, *shape, generator=stream("attention", *shape)).to(victim.device)
    noise = low + (high - low) * noise

    def run(images: Tensor) -> Any:
        with victim.conditions(undefended=True):
            return victim.logits(images)

    sites = probe(victim.model, (noise[:1],), {}, run=run).sites
    rows, columns = (_bands(side).to(victim.device) for side in shape[1:])
    stripes = [*(row[:, None] for row in rows), *columns]  # each broadcasts to (height, width)
    moved: dict[Call, tuple[list[Tensor], list[Tensor]]] = {}
    devices = [victim.device] if victim.device.type == "cuda" else []
    for first in range(0, len(stripes), _AT_ONCE):
        part = torch.stack([stripe.expand(shape[1:]) for stripe in stripes[first : first + _AT_ONCE]])[:, None]
        images = torch.cat([noise[:1], torch.where(part, noise[1:], noise[:1])])
        with torch.random.fork_rng(devices=devices), watching(victim.model) as seen:
            run(images)
        for attention in seen:
            site = sites.get(attention.call)
            # a matrix that all images share belongs to none of them
            if site and math.prod(attention.keys.shape[:-2]) == len(images) * math.prod(site.shape[:-2]):
                found = moved.setdefault(attention.call, ([], []))
                for tokens, changes in zip((attention.queries, attention.keys), found, strict=True):
                    changes.append(_changes(tokens, len(images), site.heads))
    located = {
        call: Located(sites[call].heads, *(_places(torch.cat(changes), rows, columns) for changes in found))
        for call, found in moved.items()
    }
    located = {call: places for call, places in located.items() if not bool(places.keys.isnan().any(-1).all())}
    if not located:
        raise NotApplicableError(
            f"no attention between places of the image in this {type(victim.model).__name__}: looked for products "
            "of queries and keys that go through scaled_dot_product_attention or a softmax. Attacks on attention need "
            "a model with attention; take another attack for this one."
        )
    return located


def _bands(side: int) -> Tensor:
    """The pixels of each stripe of a side: (stripes, side) bool."""
    width = -(-side // STRIPES)
    of_pixel = torch.arange(side) // width
    return of_pixel == torch.arange(int(of_pixel[-1]) + 1)[:, None]


def _changes(tokens: Tensor, images: int, heads: int) -> Tensor:
    """How far each token of each image is from that of the first one, over all heads: (images - 1, windows, tokens)."""
    tokens = tokens.float().reshape(images, -1, heads, *tokens.shape[-2:])
    return (tokens[1:] - tokens[:1]).pow(2).sum((2, 4)).sqrt()


def _places(changes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Row and column of tokens that each stripe moves so far: (stripes, windows, tokens) -> (windows, tokens, 2)."""
    places, spreads = [], []
    for stripes, change in zip((rows, columns), changes.split([len(rows), len(columns)]), strict=True):
        side = stripes.shape[1]
        middle = ((stripes * torch.arange(side, device=stripes.device)).sum(1) / stripes.sum(1))[:, None, None]
        above = (change - change.amax(0) / 2).clamp_min(0)
        above = above / above.sum(0)  # NaN where nothing moves the token
        places.append((above * middle).sum(0))
        spreads.append((above * (middle - places[-1]).pow(2)).sum(0).sqrt() / side)
    everywhere = (spreads[0] + spreads[1]) / 2 > _EVERYWHERE
    return torch.stack(places, -1).masked_fill(everywhere[..., None], torch.nan)


# --------------------------------------------------------------------------------------------------- Attention-Fool


class _Atlas:
    """Where the tokens of the models lie that were met before; it is not copied and not saved."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[Shape, dict[Call, Located]]] = WeakKeyDictionary()

    def of(self, victim: Victim, shape: Shape) -> dict[Call, Located]:
        known = self._known.setdefault(victim.model, {})
        if shape not in known:
            known[shape] = locate(victim, shape)
        return known[shape]

    def __reduce__(self) -> tuple[type[_Atlas], tuple[()]]:
        return _Atlas, ()


class _Observed(NamedTuple):
    victim: Victim
    seen: list[Attention]


@dataclass(frozen=True)
class AttentionFool:
    """Pulls the queries of every attention to the keys of the patch (Lovisotto et al., CVPR 2022, "Give Me Your
    Attention: Dot-Product Attention Considered Harmful for Adversarial Patch Robustness").

    The paper's, as its reproductions state it. In layer l and head h the projected queries Q (n × d) and keys K are
    divided by the mean length of their rows, P / (‖P‖₁,₂ / n) with ‖P‖₁,₂ = Σᵢ √(Σⱼ Pᵢⱼ²), which makes heads and layers
    comparable, and B = Q Kᵀ / √d. The loss of the patch's key i is the mean over all queries, L = 1/n Σⱼ Bⱼᵢ, and a
    log-sum-exp over the heads and then the layers, a smooth maximum, makes one number. It is maximised, alone or added
    to the cross entropy. Before the softmax, because the softmax's gradient vanishes where attention is far from the
    patch.

    Ours. The paper's patch is one token; here it may cover several keys (`Located.under`), and the log-sum-exp goes
    over them, too, and over the windows of windowed attention. Every attention with places is a layer. The mean of Bⱼᵢ
    over the queries is computed as the product of key i with the mean query, so no attention matrix is written. The
    paper's cross entropy is one number for an image; objectives here are sums over pixels, so the term is multiplied
    with the number of pixels outside the patch (void ones included), and `weight` counts it against their mean.

    Args:
        weight: Above 0. Without a say where the term stands alone (objective "none") and steps are sign steps.

    Raises:
        ValueError: If `weight` is not above 0; in an attack, on a model with no attention or without a patch.
    """

    weight: float = 1.0
    _atlas: _Atlas = field(default_factory=_Atlas, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise ValueError(f"`weight` is {self.weight!r}; it must be a number.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"`weight` is {self.weight!r}; it must be above 0 and finite.")

    def observe(self, victim: Victim) -> AbstractContextManager[_Observed]:
        return _observed(victim)

    def __call__(self, forward: Forward) -> Tensor:
        victim, seen = forward.observed
        images = len(forward.images)
        covered = forward.covered.expand(images, *forward.images.shape[-2:])
        if not bool(covered.flatten(1).any(1).all()):
            raise ValueError(
                "AttentionFool pulls attention to a patch, and an image has no pixel under one; leave the term out."
            )
        channels, height, width = forward.images.shape[1:]
        located = self._atlas.of(victim, (channels, height, width))
        pulls = [pull(attention, located[attention.call], covered) for attention in seen if attention.call in located]
        if not pulls:
            raise ValueError(
                "There was no attention in this forward pass, though the model was seen to attend before. Was it "
                "changed, scripted or compiled in between?"
            )
        outside = (~covered).flatten(1).sum(1)
        return -self.weight * outside * torch.cat(pulls, 1).logsumexp(1)


@contextmanager
def _observed(victim: Victim) -> Iterator[_Observed]:
    with watching(victim.model) as seen:
        yield _Observed(victim, seen)


def pull(attention: Attention, located: Located, covered: Tensor) -> Tensor:
    """How strongly the queries of one attention are drawn to each key under the patch, by the paper's measure.

    Args:
        attention: (…, queries, d) and (…, keys, d) of N images.
        located: Its places.
        covered: The pixels under the patch, (N, H, W) bool; at least one in each image.

    Returns:
        (N, windows × heads × keys); minus infinity at all keys but the patch's.
    """
    queries = located.arrange(_normalised(attention.queries), len(covered))
    keys = located.arrange(_normalised(attention.keys), len(covered))
    drawn = (keys @ queries.mean(-2)[..., None]).squeeze(-1) / math.sqrt(keys.shape[-1])
    return drawn.masked_fill(~located.under(covered)[:, :, None], -torch.inf).flatten(1)


def _normalised(tokens: Tensor) -> Tensor:
    """Rows (…, n, d) whose mean length is 1."""
    tokens = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    mean = tokens.norm(dim=-1).mean(-1)[..., None, None]
    return tokens / mean.clamp_min(torch.finfo(tokens.dtype).tiny)
