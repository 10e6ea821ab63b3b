"""What a step of a patch attack costs, beside four packages that make the same patch, and where its time goes.

    python benchmarks/pgd.py [--models zoo:camvid-cnn,zoo:camvid-vit] [--size 120x160] [--steps 10] [--compile]

The first table: plain PGD on the cross entropy, from grey, with one step size, on one model and the same drawn street
scenes. ART attacks the image under a mask, through `PyTorchSegmenter`; torchattacks, foolbox and adv_lib attack a patch
as input, the module `p ↦ model(paste(images, p))`. Each round runs every contender once, one after the other, so that a
slow moment of the machine meets all of them; shown are medians over the rounds. "ratio" is to the fastest of the four:
above 1 is faster than it. "what can change" computes only that (`partial=None`). Ours counts, in each call, the pass
that tells what the last patch has won, and two of one image that tell whether the model is random, which weigh less the
more steps there are. "won" is the share of the counted pixels that lost their label, outside the patch.

The second: the shares of one step of ours, in percent. The model, and the backward pass through it, begin at the images
that it is given and end at its logits, of the images' size; everything else is the attack's own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import foolbox
import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from art.attacks.evasion import ProjectedGradientDescentNumpy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from attacks import PatchAttack
from attacks.criteria import off_label
from attacks.optimize import make_patch
from attacks.options import PatchOptions
from attacks.patch import paste, rectangle, resolve_shape
from evaluation.models import load_model
from evaluation.precision import prepared
from evaluation.scenes import StreetScenes
from ramdefense.segmenter import PyTorchSegmenter

MODELS = "zoo:scenes-nonlocal,zoo:camvid-cnn,zoo:camvid-vit"
STEP = 0.02
PATCH = (40, 40)


@dataclass(frozen=True)
class Case:
    """A model, images with their labels, and a patch in their middle."""

    segmenter: PyTorchSegmenter
    images: Tensor
    labels: Tensor
    steps: int

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def place(self) -> tuple[int, int]:
        return (self.size[0] - PATCH[0]) // 2, (self.size[1] - PATCH[1]) // 2

    @property
    def covered(self) -> Tensor:
        return rectangle(PATCH, self.place, self.size, self.images.device)

    @property
    def counted(self) -> Tensor:
        return (self.labels != self.segmenter.ignore_index) & ~self.covered

    @property
    def grey(self) -> Tensor:
        return self.images.new_full((len(self.images), 3, *PATCH), 0.5)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "patch_shape": PATCH, "patch_location": self.place, "max_iter": self.steps, "eps_step": STEP,
            "momentum": 0.0, "verbose": False,
        }  # fmt: skip

    def won(self, patch: Tensor) -> float:
        with torch.no_grad():
            logits = self.segmenter.logits(paste(self.images, patch.to(self.images), self.place))
        return off_label(logits, self.labels, self.counted).mean().item()


def case_of(name: str, size: tuple[int, int], count: int, steps: int) -> Case:
    """A model by name, and drawn street scenes."""
    segmenter = load_model(name, input_shape=(3, *size))
    scenes = StreetScenes(count, size)
    frames = [scenes[number] for number in range(count)]
    images, labels = (torch.stack(part) for part in zip(*((f.image, f.label) for f in frames), strict=True))
    resolve_shape(PATCH, size)
    return Case(segmenter, images.to(segmenter.device), labels.to(segmenter.device), steps)


# ---------------------------------------------------------------- contenders: a case -> patches (N, 3, h, w)


class PatchAsInput(nn.Module):
    """Patches (N, 3, h, w) -> logits of the counted pixels, (pixels, classes): to a classifiers' package, its batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.model = case, case.segmenter.model

    def forward(self, patch: Tensor) -> Tensor:
        logits = self.case.segmenter.logits(paste(self.case.images, patch, self.case.place))
        return logits.movedim(1, -1)[self.case.counted]


class LossAsLogits(nn.Module):
    """Patches (N, 3, h, w) -> (N, 2), of which the cross entropy to class 0 rises and falls with each image's loss.

    adv_lib asks for one verdict for each image, and takes the last patch if all are for it, as these are.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.model = case, case.segmenter.model

    def forward(self, patch: Tensor) -> Tensor:
        case = self.case
        logits = case.segmenter.logits(paste(case.images, patch, case.place))
        pixels = F.cross_entropy(logits, case.labels.where(case.counted, -100), reduction="none").flatten(1)
        loss = pixels.sum(1) / case.counted.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(loss), loss], 1)


def of_art(case: Case) -> Tensor:
    start = paste(case.images, case.grey, case.place).cpu().numpy()
    attack = ProjectedGradientDescentNumpy(
        case.segmenter, eps=1.0, eps_step=STEP, max_iter=case.steps, batch_size=len(start), verbose=False
    )
    labels = case.labels.masked_fill(case.covered, case.segmenter.ignore_index).cpu().numpy()
    adversarial = attack.generate(start, labels, mask=case.covered.cpu().numpy().astype(np.float32))
    (top, left), (height, width) = case.place, PATCH
    return torch.from_numpy(adversarial[:, :, top : top + height, left : left + width])


def of_torchattacks(case: Case) -> Tensor:
    attack = torchattacks.PGD(PatchAsInput(case).eval(), eps=1, alpha=STEP, steps=case.steps, random_start=False)
    made: Tensor = attack(case.grey, case.labels[case.counted])
    return made


def of_foolbox(case: Case) -> Tensor:
    goal = foolbox.criteria.Misclassification(case.labels[case.counted])
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=case.steps, random_start=False)
    model = foolbox.PyTorchModel(PatchAsInput(case).eval(), (0, 1), device=case.segmenter.device)
    made: Tensor = attack.run(model, case.grey, goal, epsilon=1.0)
    case.segmenter.model.zero_grad(set_to_none=True)  # it asks for the gradients of the weights, too
    return made


def of_adv_lib(case: Case) -> Tensor:
    sys.modules.setdefault("visdom", ModuleType("visdom"))  # imported always, used for a live plot alone
    from adv_lib.attacks import pgd_linf

    labels = torch.zeros(len(case.images), dtype=torch.int64, device=case.images.device)
    made: Tensor = pgd_linf(
        LossAsLogits(case).eval(), case.grey, labels, 1.0, steps=case.steps, random_init=False, absolute_step_size=STEP
    )
    return made


def ours(**options: Any) -> Callable[[Case], Tensor]:
    def attack(case: Case) -> Tensor:
        made = PatchAttack(case.segmenter, **{**case.options, **options})
        made.generate(case.images, case.labels)
        assert made.patch is not None
        return made.patch.pixels

    return attack


PEERS: dict[str, Callable[[Case], Tensor]] = {
    "ART, ProjectedGradientDescentNumpy": of_art,
    "torchattacks, PGD": of_torchattacks,
    "foolbox, LinfPGD": of_foolbox,
    "adv_lib, pgd_linf": of_adv_lib,
}
LAST, BEST = ours(keep_best=False), ours()


def contenders(case: Case, compiled: bool) -> dict[str, tuple[Callable[[Case], Tensor], Case]]:
    """Each with the case that it is given."""
    segmenter = case.segmenter
    last_channels = copy.deepcopy(segmenter.model).to(memory_format=torch.channels_last)
    variants = {
        "ours, the last patch": (LAST, case),
        "ours, the best patch": (BEST, case),
        "ours, what can change": (ours(keep_best=False, partial=None), case),
        "ours, channels last": (LAST, Case(segmenter.with_model(last_channels), case.images, case.labels, case.steps)),
    }
    if compiled:
        faster = prepared(segmenter, amp=None, compiled=True)
        variants["ours, compiled"] = (LAST, Case(faster, case.images, case.labels, case.steps))
    return {**variants, **{name: (peer, case) for name, peer in PEERS.items()}}


def compared(case: Case, rounds: int, compiled: bool) -> dict[str, tuple[float, float, float]]:
    """(seconds for each image and step, ratio of the fastest peer's to them, share won), medians over rounds."""
    each = contenders(case, compiled)
    reached = {name: given.won(attack(given)) for name, (attack, given) in each.items()}  # and everything is warm
    clock = time.perf_counter if case.images.is_cuda else time.process_time
    times: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(rounds):
        for name, (attack, given) in each.items():
            began = clock()
            attack(given)
            if case.images.is_cuda:
                torch.cuda.synchronize()
            times[name].append((clock() - began) / case.steps / len(case.images))
    fastest = min(PEERS, key=lambda name: statistics.median(times[name]))
    return {
        name: (
            statistics.median(own),
            statistics.median(b / a for a, b in zip(own, times[fastest], strict=True)),
            reached[name],
        )
        for name, own in times.items()
    }


# ---------------------------------------------------------------- where a step goes


@dataclass
class Timed:
    """A segmenter that writes down when its logits are asked for and made, and when the gradients come to them and
    to the images; the four are the corners of a step."""

    segmenter: PyTorchSegmenter
    corners: list[float] = field(default_factory=list)
    logits_made: list[Tensor] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.segmenter, name)

    def logits(self, images: Tensor) -> Tensor:
        if not images.requires_grad:
            return self.segmenter.logits(images)
        self.mark()
        logits = self.segmenter.logits(images)
        self.mark()
        logits.register_hook(lambda _: self.mark())
        images.register_hook(lambda _: self.mark())
        self.logits_made = [logits.detach()]
        return logits

    def mark(self) -> None:
        if self.segmenter.device.type == "cuda":
            torch.cuda.synchronize()
        self.corners.append(time.perf_counter())


def shares(case: Case) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step for each image, and the percent of it that each part takes, from medians over steps."""
    options = PatchOptions(**case.options)
    timed = Timed(case.segmenter)
    make_patch(timed, case.images, case.labels, options)  # type: ignore[arg-type]
    timed.corners.clear()
    make_patch(timed, case.images, case.labels, options)  # type: ignore[arg-type]
    parts = [b - a for a, b in zip(timed.corners, timed.corners[1:], strict=False)]
    forward, objective, backward, rest = (statistics.median(parts[start::4]) for start in range(4))

    def judged() -> float:
        began = time.perf_counter()
        off_label(timed.logits_made[0], case.labels, case.counted)
        if case.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    criterion = statistics.median(judged() for _ in range(2 * case.steps))
    total = forward + objective + backward + rest
    taken = {
        "model forward": forward,
        "model backward": backward,
        "objective, both ways": objective,
        "criterion": min(criterion, rest),
        "paste, step, rest": max(rest - criterion, 0.0),
    }
    percent = {name: 100 * seconds / total for name, seconds in taken.items()}
    percent["outside the model"] = 100 * (objective + rest) / total
    return 1e3 * total / len(case.images), percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="names, with commas between them")
    parser.add_argument("--size", default="120x160", help="HEIGHTxWIDTH of the images")
    parser.add_argument("--images", type=int, default=2, help="in one batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours on a compiled model, too (minutes to compile)")
    arguments = parser.parse_args()
    height, width = (int(side) for side in arguments.size.split("x"))
    named = {
        name: case_of(name, (height, width), arguments.images, arguments.steps) for name in arguments.models.split(",")
    }
    device = next(iter(named.values())).segmenter.device
    where = f"{arguments.images} images of {height} x {width}, {torch.get_num_threads()} thread(s), {device}"

    table = Table(title=f"{arguments.steps} steps, {where}")
    for column in ("model", "attack"):
        table.add_column(column)
    for column in ("ms/image/step", "ratio", "won"):
        table.add_column(column, justify="right")
    for model, case in named.items():
        for name, (seconds, ratio, won) in compared(case, arguments.rounds, arguments.compile).items():
            table.add_row(model, name, f"{seconds * 1e3:.1f}", f"{ratio:.2f}", f"{won:.3f}")
        table.add_section()

    parts = {model: shares(case) for model, case in named.items()}
    split = Table(title=f"ms for an image and step of ours, and percent of a step, {where}")
    split.add_column("model", no_wrap=True)
    for column in ("ms", *next(iter(parts.values()))[1]):
        split.add_column(column, justify="right")
    for model, (milliseconds, percent) in parts.items():
        split.add_row(model, f"{milliseconds:.1f}", *(f"{value:.1f}" for value in percent.values()))
    console = Console(width=120)
    console.print(table)
    console.print(split)


if __name__ == "__main__":
    main()
