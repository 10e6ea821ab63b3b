"""Checked from outside: packages that share no code with this one make the same patch, and none makes a stronger one.

Every peer but ART attacks a *patch as input*, the module `p ↦ model(paste(images, p))`, within a ball of radius 1 about
mid-grey, which is the whole range of the pixels. ART attacks the image, with a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from art.attacks.evasion import ProjectedGradientDescentNumpy
from torch import Tensor, nn

from attacks import PatchAttack, torch_style
from attacks.criteria import off_label
from attacks.patch import paste, rectangle
from ramdefense.segmenter import PyTorchSegmenter

NB_CLASSES = 4
SIZE = (32, 32)
SHAPE = (9, 12)
LOCATION = (12, 8)
VOID = 255


def far_sighted(seed: int) -> nn.Sequential:
    """Three dilated convolutions with seeded weights: each pixel sees 29×29, so that a patch is felt far away."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(12, 12, 5, padding=4, dilation=2),
        nn.Tanh(),
        nn.Conv2d(12, NB_CLASSES, 5, padding=8, dilation=4),
    ).eval()


@dataclass(frozen=True)
class Scene:
    """A model, images, and label maps of which some pixels are void; everything that an attack is given."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, seed: int, count: int = 2) -> Scene:
        """Blurred noise, labelled as the model itself has it, each class about as likely as the others."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(count, 3, *SIZE, generator=generator)
        blurred = F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
        images = (0.5 + 2.5 * (blurred - 0.5)).clamp(0, 1)
        model = far_sighted(seed)
        with torch.no_grad():
            model[-1].bias -= model(images).mean((0, 2, 3))  # type: ignore[operator]
            labels = model(images).argmax(1)
        void = torch.rand(labels.shape, generator=generator) < 0.1
        return cls(model, images, labels.masked_fill(void, VOID))

    @property
    def aimed(self) -> Scene:
        """The same with a target map for labels: the class after each label."""
        return replace(self, labels=self.labels.where(self.labels == VOID, (self.labels + 1) % NB_CLASSES))

    @property
    def grey(self) -> Tensor:
        """The start: mid-grey patches, (N, 3, h, w)."""
        return self.images.new_full((len(self.images), 3, *SHAPE), 0.5)

    @property
    def covered(self) -> Tensor:
        """The pixels under the patch, (H, W) bool."""
        return rectangle(SHAPE, LOCATION, SIZE)

    @property
    def counted(self) -> Tensor:
        """The pixels that are neither void nor under the patch, (N, H, W) bool."""
        return (self.labels != VOID) & ~self.covered

    def fooled(self, patch: Tensor) -> float:
        """The attacks' own criterion, the mean over the images; the patch is in range."""
        assert patch.min() >= 0
        assert patch.max() <= 1
        with torch.no_grad():
            logits = self.model(paste(self.images, patch, LOCATION))
        return off_label(logits, self.labels, self.counted).mean().item()


class PatchAsInput(nn.Module):
    """Patches (N, 3, h, w) -> logits of the counted pixels alone, (pixels, classes): there is no label 255 among them.

    To a package for classifiers this is a batch of so many images.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.model = scene.model  # its parameters say on which device this is

    def forward(self, patch: Tensor) -> Tensor:
        logits: Tensor = self.model(paste(self.scene.images, patch, LOCATION))
        return logits.movedim(1, -1)[self.scene.counted]

    @property
    def labels(self) -> Tensor:
        return self.scene.labels[self.scene.counted]


# ---------------------------------------------------------------- PGD, from four packages and from this one

Attack = Callable[[Scene, float, int, bool], Tensor]
"""(scene, step size, number of steps, targeted) -> patches (N, 3, h, w)."""


def of_art(scene: Scene, size: float, steps: int, targeted: bool) -> Tensor:
    segmenter = PyTorchSegmenter(scene.model, NB_CLASSES, (3, *SIZE))
    start = paste(scene.images, scene.grey, LOCATION).numpy()
    attack = ProjectedGradientDescentNumpy(
        segmenter, eps=1.0, eps_step=size, max_iter=steps, targeted=targeted, batch_size=len(start), verbose=False
    )
    # under a mask of ART's the loss still counts the pixels; void is what leaves them out of it
    labels = scene.labels.masked_fill(scene.covered, VOID).numpy()
    adversarial = attack.generate(start, labels, mask=scene.covered.numpy().astype(np.float32))
    (top, left), (height, width) = LOCATION, SHAPE
    return torch.from_numpy(adversarial[:, :, top : top + height, left : left + width])


def of_torchattacks(scene: Scene, size: float, steps: int, targeted: bool) -> Tensor:
    model = PatchAsInput(scene)
    attack = torchattacks.PGD(model, eps=1, alpha=size, steps=steps, random_start=False)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    adversarial: Tensor = attack(scene.grey, model.labels)
    return adversarial


def of_foolbox(scene: Scene, size: float, steps: int, targeted: bool) -> Tensor:
    foolbox = pytest.importorskip("foolbox", exc_type=ImportError)
    model = PatchAsInput(scene)
    goal = (foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification)(
        model.labels
    )
    attack = foolbox.attacks.LinfPGD(abs_stepsize=size, steps=steps, random_start=False)
    # not attack(...), which asks for one verdict for each patch
    adversarial: Tensor = attack.run(foolbox.PyTorchModel(model.eval(), (0, 1)), scene.grey, goal, epsilon=1.0)
    return adversarial


def of_captum(scene: Scene, size: float, steps: int, targeted: bool) -> Tensor:
    robust = pytest.importorskip("captum.robust", exc_type=ImportError)
    model = PatchAsInput(scene)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")[None]

    attack = robust.PGD(model, loss, lower_bound=0.0, upper_bound=1.0)
    attack.fgsm.zero_thresh = 0.0  # it takes a slope under 1e-6 for none, unless told otherwise
    adversarial: Tensor = attack.perturb(
        scene.grey, radius=1.0, step_size=size, step_num=steps, target=model.labels, targeted=targeted
    )
    return adversarial


quiet = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")  # captum's, at each step

PEERS: dict[str, Attack] = {
    "art": of_art,
    "torchattacks": of_torchattacks,
    "foolbox": of_foolbox,
    "captum": of_captum,
}


def ours(scene: Scene, style: str, **options: Any) -> Tensor:
    options = {"patch_shape": SHAPE, "patch_location": LOCATION, "verbose": False, **options}
    if style == "art":
        attack = PatchAttack(PyTorchSegmenter(scene.model, NB_CLASSES, (3, *SIZE)), **options)
        attack.generate(scene.images, scene.labels)
    else:
        attack = torch_style.PatchAttack(scene.model, **options)
        attack(scene.images, scene.labels)
    assert attack.patch is not None
    return attack.patch.pixels


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("style", ["art", "torch"])
@pytest.mark.parametrize("peer", PEERS)
@quiet
def test_plain_pgd_makes_the_patch_of(peer: str, style: str, targeted: bool) -> None:
    # with this seed no slope on the way is within 1e-5 of zero, a hundred times the rounding: no sign is left to chance
    scene, size, steps = Scene.of(seed=5), 0.07, 10
    scene = scene.aimed if targeted else scene
    theirs = PEERS[peer](scene, size, steps, targeted)
    made = ours(scene, style, targeted=targeted, eps_step=size, max_iter=steps, momentum=0.0, keep_best=False)
    torch.testing.assert_close(made, theirs, atol=1e-6, rtol=0)
    at_the_bound = (made == 0) | (made == 1)
    assert 0.1 < at_the_bound.float().mean() < 1, "both a free step and the projection are to be seen"


# ---------------------------------------------------------------- strength

SEEDS = [0, 1, 2]
STEPS = 60


@cache
def strength(seed: int) -> tuple[Scene, float]:
    """A scene, and what the default attack reaches there."""
    scene = Scene.of(seed, count=3)
    return scene, scene.fooled(ours(scene, "torch", max_iter=STEPS))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_attack_beats_grey_and_random_patches(seed: int) -> None:
    scene, reached = strength(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(scene.grey.shape, generator=generator) for _ in range(STEPS)]
    assert reached > max(scene.fooled(patch) for patch in [scene.grey, *drawn, *map(torch.round, drawn)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("peer", PEERS)
@quiet
def test_the_default_attack_is_as_strong_as_pgd_of(peer: str, seed: int) -> None:
    """With its own step and with larger ones, up to twice what takes a pixel from one end to the other."""
    scene, reached = strength(seed)
    for size in (0.02, 0.05, 0.1):
        assert reached >= scene.fooled(PEERS[peer](scene, size, STEPS, False))


@pytest.fixture(scope="module")
def adv_lib() -> Iterator[ModuleType]:
    """Its attacks on segmentation models, imported without what it uses to draw and to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "visdom", ModuleType("visdom"))  # imported always, used for a live plot alone
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute
        yield pytest.importorskip("adv_lib.attacks.segmentation", exc_type=ImportError)


class DensePatchAsInput(nn.Module):
    """One patch (1, 3, h, w) -> logits (1, classes, H, W) of one image with it."""

    def __init__(self, scene: Scene, row: int) -> None:
        super().__init__()
        self.model, self.image = scene.model, scene.images[row : row + 1]

    def forward(self, patch: Tensor) -> Tensor:
        logits: Tensor = self.model(paste(self.image, patch, LOCATION))
        return logits


LOW = 0.3
"""Share of the pixels at which those attacks are content: they look for the smallest change, not for the worst one."""

ADV_LIB: dict[str, tuple[str, dict[str, Any]]] = {
    "dag": ("dag", {"max_iter": STEPS}),
    "alma_prox": ("alma_prox", {"num_steps": STEPS, "lr_init": 0.1}),
    "pdgd": ("pdgd", {"num_steps": STEPS}),
    "pdpgd": ("pdpgd", {"num_steps": STEPS, "norm": float("inf")}),
    "asma": ("asma", {"num_steps": STEPS}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ADV_LIB)
def test_the_default_attack_is_as_strong_as_those_of_adv_lib(adv_lib: ModuleType, name: str, seed: int) -> None:
    scene, reached = strength(seed)
    function, options = ADV_LIB[name]
    patches = []
    for row in range(len(scene.images)):
        counted = scene.counted[row : row + 1]
        labels = scene.labels[row : row + 1].masked_fill(~counted, 0)  # label 255 crashes it, mask or not
        patches.append(
            getattr(adv_lib, function)(
                DensePatchAsInput(scene, row),
                scene.grey[row : row + 1],
                labels,
                masks=counted,
                adv_threshold=LOW,
                **options,
            )
        )
    theirs = scene.fooled(torch.cat(patches).detach().clamp(0, 1))
    if name in ("dag", "alma_prox"):
        assert theirs > scene.fooled(scene.grey) + 0.15, "it did its work, so that there is something to beat"
    assert reached >= theirs
