"""One patch for a whole data set (Brown et al. 2017; universal perturbations: Moosavi-Dezfooli et al. 2017).

The loop is that of `attacks.optimize` with another gradient: a step looks at a mini-batch of frames that all wear the
same pixels, and moves these by the mean of the frames' gradients. A fit can be stopped at any time and goes on from a
file, with the same numbers as if it had not been.

In a process group of `torch.distributed` every process takes its share of each mini-batch, and all of them move the
same pixels by the mean over all frames.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from attacks.art_style import Array, PatchAttack
from attacks.criteria import off_label, on_target
from attacks.frozen import frozen
from attacks.interfaces import Victim
from attacks.optimize import Result, observed_traits, reference_map
from attacks.options import PatchOptions
from attacks.patch import Patch
from attacks.problem import Look, Problem, Spent
from attacks.steps import SCHEDULES, Seen, State
from attacks.streams import stream
from ramdefense.checks import check_images
from ramdefense.processes import from_first, rank, share, total, world
from ramdefense.traits import Traits

COMPARING = ("apgd", "square")
"""Optimizers that hold the loss of one step against that of another, which says nothing where the frames differ."""


class UniversalPatchAttack(PatchAttack):
    """One patch for every image: `fit` makes it from a data set, `generate` and `apply_patch` put it on any images.

    A frame's number in the data set is the number of its random streams. So a seeded target (`Permute`) is another one
    for each frame, and what one patch can do for all of them is little; it does most where all ask for the same
    (`FixedClass`, `Strip` less, `Untargeted`).

    Args:
        estimator: As `PatchAttack`.
        options: The keywords of `PatchOptions`. `batch_size` is the number of frames in a step, and the patch depends
            on it; `max_iter` counts these steps. `keep_best` keeps the patch that did best on held-out frames, where it
            is looked at after every epoch and at the end; without it, the last one.

    Attributes:
        patch: What `fit` made, (C, h, w); None before. A patch that was saved may be put here.
        result: Of the last `fit`: mean share of the pixels won and mean loss over the held-out frames (the best of many
            looks, hence optimistic; unseen frames tell), the steps, passes in images, seconds. None before.

    Raises:
        As `PatchAttack`.

    Example:
        >>> attack = UniversalPatchAttack(segmenter, target=FixedClass(3), max_iter=2000)  # doctest: +SKIP
        >>> x_adversarial = attack.fit(train, resume="fit.safetensors").apply_patch(x)  # doctest: +SKIP
    """

    @classmethod
    def like(cls, attack: PatchAttack) -> Self:
        """The universal attack with the options of a patch attack, on its estimator.

        Raises:
            TypeError: If it is no `PatchAttack`.
        """
        if not isinstance(attack, PatchAttack):
            raise TypeError(f"A {type(attack).__name__} cannot be made universal; give a PatchAttack.")
        options = attack._check_params()
        return cls(attack.estimator, **{name: getattr(options, name) for name in PatchOptions.names()})

    def fit(
        self,
        data: Any,
        *,
        epochs: int | None = None,
        held_out: float = 0.1,
        resume: str | os.PathLike[str] | None = None,
        save_every: int = 20,
    ) -> Self:
        """Make the patch.

        In a process group (`ramdefense.processes.group`) all processes call this with the same arguments, and end with
        the same patch, bit for bit. It is that of one process up to the rounding of the sums over a mini-batch. The
        first process reads and writes the file of `resume`.

        Args:
            data: A data set, i.e. a sequence of objects with `.image` (C, H, W) and `.label` (H, W), of which a step
                loads the frames it needs; or a pair of arrays or tensors, images (N, C, H, W) and labels (N, H, W); or
                an iterable of such pairs, batches or single frames, which is gathered first. Labels are the ground
                truth, or target maps, as in `generate` of `PatchAttack`.
            epochs: Passes over the frames that are not held out, in place of `max_iter` steps.
            held_out: Share of the frames, at least one of several, that no step sees and that choose the patch; 0: it
                is chosen by the frames that it is made on.
            resume: File in which the fit is kept; the same call again goes on from there, to the same patch. (The same
                options, weights and number of frames, that is; the frames themselves are not compared.)
            save_every: Steps between two writings of it.

        Returns:
            This attack.

        Raises:
            ValueError: On data that are empty or do not fit, numbers out of range, a file of another fit, or an
                optimizer that compares losses (`COMPARING`) on mini-batches.
            TypeError: On data of another kind.
        """
        self.patch, self.result = fit_patch(
            self.estimator,
            data,
            self._check_params(),
            epochs=epochs,
            held_out=held_out,
            resume=resume,
            save_every=save_every,
        )
        return self

    def generate(self, x: Array, y: Any = None, *, images: Sequence[int] | None = None) -> Array:
        """Put the patch on images, as `apply_patch` does; `y` and `images` are not used.

        Raises:
            ValueError: If there is no patch yet, or if it does not fit on the images.
        """
        return self.apply_patch(x)

    def apply_patch(self, x: Array, patch: Patch | None = None) -> Array:
        """Put the patch, or a given one, on images (N, C, H, W), array or tensor; what comes back is of their kind.

        Raises:
            ValueError: If there is no patch yet, or if it does not fit on the images.
        """
        if patch is None and self.patch is None:
            raise ValueError("There is no patch yet; call `fit` first, or set `patch`.")
        return super().apply_patch(x, patch)

    def mask(self, x: Array) -> Array:
        """The pixels under the patch, or where it will be, on these images: (N, H, W) bool, of the kind of `x`."""
        if self.patch is None:
            return super().mask(x)
        mask = self.patch.mask((int(x.shape[-2]), int(x.shape[-1]))).repeat(len(x), 1, 1)
        return mask.numpy() if isinstance(x, np.ndarray) else mask.to(x.device)


def fit_patch(
    victim: Victim,
    data: Any,
    options: PatchOptions,
    *,
    epochs: int | None = None,
    held_out: float = 0.1,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 20,
) -> tuple[Patch, Result]:
    """Make one patch for a data set.

    Args:
        victim: The segmenter to attack.
        data, epochs, held_out, resume, save_every: As `UniversalPatchAttack.fit`.
        options: How.

    Returns:
        The patch, (C, h, w), and what it took.

    Raises:
        As `UniversalPatchAttack.fit`.
    """
    frames = frames_of(data)
    _check(epochs, held_out, save_every)
    if options.placement is not None:
        raise ValueError(
            f"patch_location={options.patch_location!r} finds a place on each image, and a universal patch goes to one "
            "place on all of them; give (top, left), a corner's name or a Surface."
        )
    train, judges = _split(len(frames), held_out, options.seed)
    batches = -(-len(train) // options.batch_size)
    if epochs is not None:
        options = replace(options, max_iter=epochs * batches)
    if options.optimizer in COMPARING and batches > 1:
        raise ValueError(
            f"optimizer={options.optimizer!r} compares the losses of its steps, and with batch_size="
            f"{options.batch_size} each step sees other frames; take batch_size={len(train)} or another optimizer."
        )
    loop = _Loop.of(victim, frames, options, train, judges)
    identity = "" if resume is None else loop.identity()
    held = None if resume is None else from_first(lambda: _Fit.held(resume, identity))
    kept = loop.begin() if held is None else held
    steps = loop.runs * options.max_iter
    bar = tqdm(total=steps, initial=kept.done, disable=not options.verbose or rank() > 0)
    with bar as progress, frozen(victim.model):
        while kept.done < steps:
            began = time.perf_counter()
            kept = loop.step(kept)
            kept = replace(kept, seconds=kept.seconds + time.perf_counter() - began)
            progress.update()
            if resume is not None and rank() == 0 and (kept.done % save_every == 0 or kept.done == steps):
                kept.save(resume, identity)
    result = Result((kept.criterion,), (kept.loss,), (kept.done,), kept.forwards, kept.backwards, kept.seconds)
    return Patch(kept.best[0], options.patch_location, options.alpha), result


# ------------------------------------------------------------------------------------------------------- the frames


class Frames(Protocol):
    """Frames by their number."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n, H, W)."""


@dataclass(frozen=True)
class _InMemory:
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(numbers)
        return self.images[chosen.to(self.images.device)], self.labels[chosen.to(self.labels.device)]


@dataclass(frozen=True)
class _OneByOne:
    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = [self.data[number] for number in numbers]
        images = [torch.as_tensor(frame.image) for frame in chosen]
        labels = [torch.as_tensor(frame.label) for frame in chosen]
        sizes = sorted({tuple(image.shape) for image in images})
        if len(sizes) > 1:
            raise ValueError(f"Frames of {sizes} make no batch; resize them to one size, or take batch_size=1.")
        return torch.stack(images), torch.stack(labels)


def frames_of(data: Any) -> Frames:
    """What `UniversalPatchAttack.fit` takes, as frames by their number.

    Raises:
        ValueError: If there is no frame, or not one label map for each image.
        TypeError: On anything else.
    """
    if _is_pair(data):
        frames: Frames = _InMemory(*(torch.as_tensor(part) for part in data))
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__") and len(data) and hasattr(data[0], "image"):
        frames = _OneByOne(data)
    else:
        pairs = _gathered(data)
        parts = [[torch.as_tensor(pair[part]) for pair in pairs] for part in (0, 1)]
        join = torch.stack if pairs and pairs[0][0].ndim == 3 else torch.cat
        frames = _InMemory(*(join(part) if part else torch.empty(0) for part in parts))
    if isinstance(frames, _InMemory) and len(frames.images) != len(frames.labels):
        raise ValueError(f"`data` holds {len(frames.images)} images and {len(frames.labels)} label maps.")
    if not len(frames):
        raise ValueError("`data` holds no frame.")
    return frames


def _gathered(data: Any) -> list[tuple[Any, Any]]:
    """The pairs that an iterable yields; what it yields beside images and labels, as names, is left out."""
    try:
        pairs = [(one[0], one[1]) for one in data]
        if all(_is_pair(pair) and pair[0].ndim == pair[1].ndim + 1 in (3, 4) for pair in pairs):
            return pairs
    except (TypeError, IndexError, KeyError):
        pass
    raise TypeError(
        f"`data` is a {type(data).__name__}; give a sequence of objects with .image and .label, a pair of arrays "
        "(images, labels), or an iterable of such pairs."
    )


def _is_pair(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(p, (np.ndarray, Tensor)) for p in data)


def _split(count: int, held_out: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the frames that the patch is made on, and of those that judge it."""
    aside = min(max(1, round(held_out * count)), count - 1) if held_out else 0
    order = torch.randperm(count, generator=stream(seed, "held out")).tolist()
    train, judges = sorted(order[aside:]), sorted(order[:aside])
    return tuple(train), tuple(judges or train)


def _check(epochs: int | None, held_out: float, save_every: int) -> None:
    for name, value in (("epochs", epochs), ("save_every", save_every)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
    if not 0 <= held_out < 1:
        raise ValueError(f"`held_out` is {held_out!r}; it is a share from 0 up to, not including, 1.")


# --------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class _Fit:
    """Everything that the rest of a fit depends on: what is written to the file."""

    pixels: Tensor  # (1, C, h, w)
    state: State
    best: Tensor  # (1, C, h, w)
    criterion: float = -1.0  # of the best: less than any share
    loss: float = float("inf")
    done: int = 0  # steps, over all runs
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    def save(self, path: str | os.PathLike[str], identity: str) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"pixels": self.pixels, "best": self.best} | {f"state.{k}": v for k, v in self.state.items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        half_written = path.with_name(f"{path.name}.{os.getpid()}.part")
        # cloned: the file format takes no two names for one memory
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            half_written,
            metadata={"fit": json.dumps(numbers), "identity": identity},
        )
        half_written.replace(path)

    @classmethod
    def held(cls, path: str | os.PathLike[str], identity: str) -> _Fit | None:
        """What a file holds; None where there is none."""
        return cls.load(path, identity) if Path(path).exists() else None

    @classmethod
    def load(cls, path: str | os.PathLike[str], identity: str) -> _Fit:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file holds no fit, or another one.
        """
        from safetensors import SafetensorError, safe_open

        where = os.fspath(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"{where} is no safetensors file ({error}); give `resume` another path.") from error
        if "fit" not in metadata:
            raise ValueError(f"{where} holds no fit; give `resume` another path.")
        held, given = json.loads(metadata["identity"]), json.loads(identity)
        differing = [name for name in given if held.get(name) != given[name]]
        if differing:
            raise ValueError(
                f"{where} holds another fit: it differs in {', '.join(differing)}. Give `resume` another path, or "
                "repeat the call that began it."
            )
        state = {name.removeprefix("state."): tensors[name] for name in tensors if name.startswith("state.")}
        return cls(tensors["pixels"], state, tensors["best"], **json.loads(metadata["fit"]))


_NUMBERS = [entry.name for entry in fields(_Fit) if entry.name not in ("pixels", "state", "best")]


@dataclass(frozen=True)
class _Loop:
    """What is fixed while a patch is fitted."""

    victim: Victim
    frames: Frames
    options: PatchOptions
    train: tuple[int, ...]
    judges: tuple[int, ...]
    traits: Traits

    @classmethod
    def of(
        cls, victim: Victim, frames: Frames, options: PatchOptions, train: tuple[int, ...], judges: tuple[int, ...]
    ) -> _Loop:
        images, _ = frames.batch([0])
        check_images(images, victim.clip_values)
        size = images.shape[-2], images.shape[-1]
        options.check_size(size)
        # one size of patch, whatever the sizes of the frames
        options = replace(options, patch_shape=options.shape(size))
        return cls(victim, frames, options, train, judges, observed_traits(victim, images, options))

    @property
    def runs(self) -> int:
        return len(self.options.objectives) * self.options.num_restarts

    @property
    def epoch(self) -> int:
        """Steps in which every frame is seen once."""
        return -(-len(self.train) // self.options.batch_size)

    def begin(self) -> _Fit:
        pixels, state = self.start(0)
        return _Fit(pixels, state, pixels)

    def start(self, run: int) -> tuple[Tensor, State]:
        """The pixels of a run's first step, and the state of the step rule."""
        restart = run % self.options.num_restarts
        # frame 0 lends its channels and the stream of its number, whatever the first mini-batch holds
        pixels = self.problem([0], run, Spent()).threat.start(run if restart else 0)
        key = stream(self.options.seed, "step", run).initial_seed()
        return pixels, self.options.make_step_rule().start(pixels, torch.tensor([key], device=pixels.device))

    def problem(self, numbers: Sequence[int], run: int, spent: Spent) -> Problem:
        """These frames as a problem of `attacks.problem`."""
        images, labels = self.frames.batch(numbers)
        check_images(images, self.victim.clip_values)
        reference = reference_map(self.victim, images, labels, self.options, numbers).to(self.victim.device)
        images = images.to(self.victim.device)
        return Problem(
            victim=self.victim,
            threat=self.options.threat(self.victim, images, reference, numbers),
            reference=reference,
            streams=tuple(numbers),
            options=self.options,
            traits=self.traits,
            objective=self.options.make_objectives()[run // self.options.num_restarts],
            criterion=on_target if self.options.aims else off_label,
            spent=spent,
        )

    def batch(self, run: int, step: int) -> list[int]:
        """The frames of a step: an epoch goes through all of them, in an order of its own."""
        epoch, place = divmod(step, self.epoch)
        order = torch.randperm(len(self.train), generator=stream(self.options.seed, "order", run, epoch)).tolist()
        size = self.options.batch_size
        return [self.train[row] for row in order[place * size : (place + 1) * size]]

    def step(self, fit: _Fit) -> _Fit:
        """One step, and at the end of an epoch a look at the judges."""
        options, device = self.options, self.victim.device
        run, step = divmod(fit.done, options.max_iter)
        if step == 0:
            pixels, state = self.start(run)
        else:
            pixels, state = fit.pixels.to(device), {name: value.to(device) for name, value in fit.state.items()}
        spent = Spent(fit.forwards, fit.backwards)
        rule = options.make_step_rule()
        numbers = self.batch(run, step)
        mine = share(numbers)
        problem = self.problem(mine or numbers[:1], run, spent)
        size = SCHEDULES[options.step_schedule](step / options.max_iter) * options.eps_step
        point = problem.threat.project(rule.point(pixels, size, state))
        look = None
        if mine:
            look = problem.look(point.expand(len(problem), -1, -1, -1), run, step, gradient=rule.gradient)
        seen = Seen(point, *_means(look, point, len(numbers)))
        pixels, state = rule.update(pixels, seen, size, state, problem.threat.project)

        fit = replace(fit, pixels=pixels, state=state, done=fit.done + 1)
        if step + 1 == options.max_iter or (options.keep_best and (step + 1) % self.epoch == 0):
            fit = self.judged(fit, run, spent)
        if world() == 1:
            return replace(fit, forwards=spent.forwards, backwards=spent.backwards)
        passes = torch.tensor([spent.forwards - fit.forwards, spent.backwards - fit.backwards], device=device)
        forwards, backwards = total(passes).tolist()
        return replace(fit, forwards=fit.forwards + forwards, backwards=fit.backwards + backwards)

    def judged(self, fit: _Fit, run: int, spent: Spent) -> _Fit:
        """The fit with its pixels kept if they are the best so far: more won or, as much won, less loss."""
        criterion = loss = 0.0
        size = self.options.batch_size
        for first in range(0, len(self.judges), size):
            mine = share(self.judges[first : first + size])
            if not mine:
                continue
            problem = self.problem(mine, run, spent)
            # run 0, step `max_iter`: the same draws in every look, and none that a step takes
            pixels = fit.pixels.expand(len(problem), -1, -1, -1)
            look = problem.look(pixels, 0, self.options.max_iter, gradient=False)
            criterion += float(look.criterion.double().sum()) / len(self.judges)
            loss += float(look.loss.double().sum()) / len(self.judges)
        found = torch.tensor([criterion, loss], dtype=torch.float64, device=self.victim.device)
        criterion, loss = total(found).tolist()
        if (criterion, -loss) > (fit.criterion, -fit.loss):
            return replace(fit, best=fit.pixels, criterion=criterion, loss=loss)
        return fit

    def identity(self) -> str:
        """What a fit that goes on must have in common with the one that began, as JSON."""
        given = {name: value for name, value in vars(self.options).items() if name != "verbose"}
        # a function prints its address, which is another one in every process
        plain = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in given.items()}
        return json.dumps(plain | {"frames": [len(self.train), len(self.judges)], "weights": _hash(self.victim.model)})


def _means(look: Look | None, point: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Gradient and loss, each (1, ...), averaged over the frames of all processes.

    Args:
        look: At this process's frames; None where it has none of them.
        point: What was looked at, (1, C, h, w).
        frames: How many the processes have together.
    """
    if look is not None and world() == 1:
        return look.gradient.mean(0, keepdim=True), look.loss.mean(0, keepdim=True)
    own = torch.zeros_like(point, dtype=torch.float32), torch.zeros(1, device=point.device)
    if look is not None:
        own = look.gradient.float().sum(0, keepdim=True), look.loss.float().sum(0, keepdim=True)
    gradient, loss = (total(part) / frames for part in own)
    return gradient.to(point.dtype), loss.to(point.dtype)


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
