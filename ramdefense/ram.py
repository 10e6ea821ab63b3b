"""RAM, the Robust Attention Mechanism: a hardened copy of a model, or of a segmenter.

The mathematics is in `refinement`, the places where it acts are found by `interception`, the random masks are made by
`streams`. RAM is an empirical defence: it gives no certificate.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ramdefense.attention import Kernel, refined_attention
from ramdefense.interception import (
    SOFTMAX,
    AttentionSite,
    Call,
    Probed,
    Watch,
    Watcher,
    example_input,
    first_tensor,
    matrix_shape,
    probe,
)
from ramdefense.refinement import Refinement, refine
from ramdefense.streams import Keep, keep_of
from ramdefense.traits import Conditions, NotApplicableError, Traits

if TYPE_CHECKING:
    from ramdefense.ram_segmenter import RAMDefense as RAMDefense

Patterns = str | Sequence[str] | None

_ROOT = ""  # the name of the model itself, among the names of its modules


def harden(
    model: nn.Module,
    *,
    max_attention: float | str = "16/N",
    suppression: str = "cap",
    dropout: float = 0.1,
    unit: str = "element",
    compensate: str = "rescale",
    include: Patterns = None,
    exclude: Patterns = None,
    seed: int = 0,
    example: Tensor | Sequence[int] | None = None,
) -> HardenedModel:
    """A deep copy of `model` whose attention is refined, in training and in evaluation; `model` stays as it was.

    Args:
        model: any module that attends.
        max_attention: T, a number in (0, 1] or a multiple of 1/N such as "3/N"; 1 switches the suppression off.
        suppression: how the bound is kept; one of `refinement.SUPPRESSIONS`.
        dropout: probability in [0, 1) that an element (or a key) of the attention matrix is dropped.
        unit: "element" or "key".
        compensate: "none", "rescale" or "renormalise", for what was dropped.
        include: names of the sites to refine, as patterns of `fnmatch` ("encoder.*"); None means all sites but those
            whose kind is "channel".
        exclude: names of the sites to leave alone.
        seed: of the random masks.
        example: an input (N, C, H, W) or its shape, with or without N, on which the sites are looked for at once.
            Without it they are looked for in the first forward pass, with its input.

    Raises:
        TypeError: `model` is no module, or an option has the wrong type.
        ValueError: an option out of range, a model without attention, or a pattern that matches no site.
    """
    refinement = Refinement(
        max_attention=max_attention, suppression=suppression, dropout=dropout, unit=unit, compensate=compensate
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module (RAMDefense takes a segmenter)")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; give an integer")
    return HardenedModel(
        copy.deepcopy(model), refinement, include=include, exclude=exclude, seed=seed, example=example
    )


class HardenedModel(nn.Module):
    """A model whose attention is refined; made by `harden`.

    Called as the model itself is. The masks of a forward pass follow from `seed`, from the number of the draw and from
    the number of each image's stream (`streams.keep_mask`): a pass outside `traits.conditions` takes the next draw of
    a counter of its own, and streams 0..N-1, where N is the first dimension of the first tensor argument. The counter
    is no weight and is not in `state_dict`. `model`, the wrapped copy, is not refined when it is called by itself.

    Attributes:
        model: the copy.
        refinement: the options.
        seed: of the masks.
        kernel: how scaled_dot_product_attention is refined, "auto", "plain" or "fused"; see `refined_attention`. What a
            model writes out as a softmax has its matrix already.
        sites: the sites that are refined; empty before the first forward pass where no example was given.
        refined_calls: how many calls the last forward pass refined.
        traits, conditions: see `ramdefense.traits`.
    """

    def __init__(
        self,
        model: nn.Module,
        refinement: Refinement,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        seed: int = 0,
        example: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.refinement = refinement
        self.seed = seed
        self.kernel: Kernel = "auto"
        self.include, self.exclude = _patterns("include", include), _patterns("exclude", exclude)
        self.conditions = Conditions()
        self.refined_calls = 0
        self._draws = 0
        self._plan: dict[Call, bool] = {}
        self._sites: tuple[AttentionSite, ...] = ()
        self._callers: set[str] = set()
        self._met: set[tuple[bool, tuple[int, ...] | None]] = set()  # kinds of passes that were watched from end to end
        self._watcher = Watcher()
        self.training = model.training
        if example is not None:
            self._look((example_input(model, example),), {})

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        return self._sites

    @property
    def traits(self) -> Traits:
        # of the suppressions the clamp alone stops a gradient; through the others the true one is the stronger attack
        stops = self.refinement.suppression == "clamp" and self.refinement.max_attention != 1
        return Traits(random=self.refinement.dropout > 0, straight_through=stops)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass, refined.

        Raises:
            ValueError: at the first pass, as `harden`; or `conditions.images` does not fit the batch.
            RuntimeError: nothing was refined.
        """
        if self.conditions.undefended:
            self.refined_calls = 0
            return self.model(*args, **kwargs)
        if not self._plan:
            self._look(args, kwargs)
        tensor = first_tensor(args, kwargs)
        noted = self._watcher.noted(_ROOT, tensor)
        if noted is None:
            watch = self._next(tensor)
            self._watcher.forget()
            if watch.recomputable and tensor is not None:
                self._watcher.note(_ROOT, tensor, watch)
        else:  # a checkpoint around this module recomputes it
            watch = cast(_Refining, noted[0].again({}))
        output = self._run(watch, tensor, args, kwargs)
        self.refined_calls = watch.refined
        if not watch.refined:
            names = ", ".join(dict.fromkeys(site.name for site in self._sites))
            raise RuntimeError(
                f"nothing was refined in this forward pass, so it ran without its defence; the sites found before are "
                f"{names}. Was the model changed, scripted or compiled after it was hardened? Harden it as it now is"
            )
        return output

    def _next(self, tensor: Tensor | None) -> _Refining:
        """How the next forward pass is refined."""
        batch = len(tensor) if tensor is not None and tensor.dim() else 1
        given = self.conditions
        images = tuple(range(batch)) if given.images is None else given.images
        if len(images) != batch:
            raise ValueError(
                f"conditions name {len(images)} image streams and the batch has {batch} images; give one for each"
            )
        draw = given.draw
        if draw is None:
            draw, self._draws = self._draws, self._draws + 1
        needs_graph = torch.is_grad_enabled() or (tensor is not None and tensor.requires_grad)
        return _Refining(
            self.refinement,
            self._decide,
            self.seed,
            draw,
            images,
            given.straight_through,
            kernel=self.kernel,
            recomputable=needs_graph,
        )

    def _run(self, watch: _Refining, tensor: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pass; the first of its kind is watched from end to end, for modules that never called before."""
        kind = (self.training, None if tensor is None else tuple(tensor.shape[1:]))
        first = kind not in self._met
        if first:
            self._watcher.watch(self.model)
        try:
            with self._watcher.running(watch, everywhere=first or _ROOT in self._callers):
                output = self.model(*args, **kwargs)
            self._callers |= {module for module, _ in watch.counts}
            self._met.add(kind)
        finally:
            if first:
                self._watcher.watch(self.model, self._callers)
        return output

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        probed = probe(self.model, args, kwargs)
        self._plan = _plan(probed, self.include, self.exclude)
        self._sites = tuple(site for call, site in probed.sites.items() if self._plan[call])
        self._callers = set(probed.callers)
        self._watcher.watch(self.model, self._callers)

    def _decide(self, call: Call) -> bool:
        """Whether to refine a call; one that the probe did not see goes the way of the one before it."""
        planned = self._plan.get(call)
        if planned is not None:
            return planned
        earlier = [self._plan.get(Call(call.module, call.function, i)) for i in range(call.occurrence)]
        known = [decision for decision in earlier if decision is not None]
        if known:
            decision = known[-1]
        elif call.function == SOFTMAX:
            decision = False
            warnings.warn(
                f"{call.module or '(root)'} calls softmax, which it did not when the model was probed in eval mode; "
                "that call is not refined. Give harden() an example on which the model runs as it does now",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            decision = _wanted(call.module or "(root)", self.include, self.exclude)
        self._plan[call] = decision
        return decision

    def extra_repr(self) -> str:
        options = [f"{field.name}={getattr(self.refinement, field.name)!r}" for field in fields(self.refinement)]
        return ", ".join([*options, f"seed={self.seed}", f"sites={len(self._sites)}"])


class _Refining(Watch):
    """Refines the calls of one forward pass."""

    def __init__(
        self,
        refinement: Refinement,
        decide: Callable[[Call], bool],
        seed: int,
        draw: int,
        images: tuple[int, ...],
        straight_through: bool,
        *,
        kernel: Kernel,
        recomputable: bool,
    ) -> None:
        super().__init__()
        self.refinement, self.decide = refinement, decide
        self.kernel = kernel
        self.seed, self.draw, self.images = seed, draw, images
        self.straight_through = straight_through
        self.recomputable = recomputable
        self.refined = 0

    def again(self, counts: dict[tuple[str, str], int]) -> _Refining:
        """The same conditions, from the point where so many calls had been made."""
        other = _Refining(
            self.refinement,
            self.decide,
            self.seed,
            self.draw,
            self.images,
            self.straight_through,
            kernel=self.kernel,
            recomputable=self.recomputable,
        )
        other.counts = dict(counts)
        return other

    def attend(self, call: Call, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        if not self._refines(call):
            return function(q, k, v, **options)
        keep, own = self._keep(call, matrix_shape(q, k)), self.refinement.options
        return refined_attention(
            q, k, v, **options, **own, keep=keep, straight_through=self.straight_through, kernel=self.kernel
        )

    def soften(self, call: Call, function: Callable[[], Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        if not self._refines(call):
            return function()
        scores = (scores if dtype is None else scores.to(dtype)).movedim(dim, -1)
        keep = self._keep(call, scores.shape)
        mask = None if keep is None else keep.mask(scores.device)
        weights = refine(scores, **self.refinement.options, keep=mask, straight_through=self.straight_through)
        return weights.movedim(-1, dim)

    def _refines(self, call: Call) -> bool:
        wanted = self.decide(call)
        self.refined += wanted
        return wanted and not self.refinement.neutral  # neutral: the fused kernel is as good

    def _keep(self, call: Call, shape: Sequence[int]) -> Keep | None:
        if self.refinement.dropout == 0:
            return None
        return keep_of(
            shape,
            self.refinement.dropout,
            seed=self.seed,
            draw=self.draw,
            images=self.images,
            site=call.module,
            call=call.occurrence,
            unit=self.refinement.unit,
        )


def _patterns(option: str, patterns: Patterns) -> tuple[str, ...] | None:
    given = (patterns,) if isinstance(patterns, str) else patterns
    if given is None:
        return None
    if not isinstance(given, Iterable) or not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(f"{option} is {patterns!r}; give a pattern such as 'encoder.*', or a list of patterns")
    return tuple(given)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _wanted(name: str, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None) -> bool:
    return (include is None or _matches(name, include)) and not _matches(name, exclude or ())


def _plan(probed: Probed, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None) -> dict[Call, bool]:
    """For each call that the probe saw, whether it is refined."""
    if not probed.sites:
        raise NotApplicableError(
            "no attention was found in this model: looked for scaled_dot_product_attention, "
            "multi_head_attention_forward and a softmax that a matrix product sums over, in one forward pass. RAM "
            "refines attention, so a model without any (or one that hides it in a TorchScript or compiled graph, or a "
            "custom kernel) cannot be hardened; give the plain eager model, with attention"
        )
    found = "the sites are " + ", ".join(dict.fromkeys(f"{s.name} ({s.kind})" for s in probed.sites.values()))
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(site.name, pattern) for site in probed.sites.values()):
                raise ValueError(f"{option}={pattern!r} matches no site; {found}")
    plan = {
        call: _wanted(site.name, include, exclude) and (include is not None or site.kind != "channel")
        for call, site in probed.sites.items()
    }
    if not any(plan.values()):
        raise ValueError(f"include={include} and exclude={exclude} leave no site to refine; {found}")
    return plan | dict.fromkeys(probed.others, False)


# ----------------------------------------------------------------------------------------------------- the segmenter


def __getattr__(name: str) -> Any:
    """`RAMDefense`, which brings ART with it; who hardens a plain model waits for no ART."""
    if name != "RAMDefense":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ramdefense.ram_segmenter import RAMDefense

    return RAMDefense


def __dir__() -> list[str]:
    return sorted([*globals(), "RAMDefense"])
