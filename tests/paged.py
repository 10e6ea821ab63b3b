"""A small finished run for tests of the page, whose every name tries to be markup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import NB_CLASSES, SHAPE, linear_cnn, random_images, random_labels

from evaluation.experiment import evaluate
from evaluation.frames import Frame
from evaluation.verdicts import Verdict
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

SCRIPT, IMAGE = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'
MODELS = ("m", f"m {IMAGE}")
ATTACKS = ("plain", f"aimed {SCRIPT}")
DEFENCES = ("none", "shifted", "</script></style></title>")
IMAGES = 5


class Markup:
    """Five images with names and classes that are markup."""

    classes = (SCRIPT, IMAGE, "</dialog>&amp;", "d")
    colors = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (20, 20, 20))

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Frame:
        return Frame(random_images()[index], random_labels()[index], f"frame {index} {IMAGE}")


class Noise:
    """A square of noise, aimed at the next class or at nothing."""

    def __init__(self, target: PyTorchSegmenter, seed: int = 0) -> None:
        self.seed = seed

    def generate(self, x: np.ndarray, y: np.ndarray, images: Sequence[int]) -> np.ndarray:
        for i, image in enumerate(images):
            noise = np.random.default_rng([self.seed, image]).random((3, 6, 7), dtype=np.float32)
            x[i, :, -6:, 3:10] = noise
        return x

    def mask(self, x: np.ndarray) -> np.ndarray:
        mask = np.zeros((len(x), *x.shape[2:]), dtype=bool)
        mask[:, -6:, 3:10] = True
        return mask


class Aimed(Noise):
    targeted = True

    def target_map(self, y: np.ndarray) -> np.ndarray:
        return np.where(y == 255, 255, (y + 1) % NB_CLASSES)


def noise(target: PyTorchSegmenter, seed: int = 0) -> Noise:
    return Noise(target, seed)


def aimed(target: PyTorchSegmenter, seed: int = 0) -> Aimed:
    return Aimed(target, seed)


def shifted(plain: PyTorchSegmenter) -> PyTorchSegmenter:
    model = linear_cnn()
    torch.nn.init.zeros_(model.bias)
    return plain.with_model(model)


def never(plain: PyTorchSegmenter) -> PyTorchSegmenter:
    raise NotApplicableError(f"no {IMAGE} in it: remedy")


def make_run(out: Path, **change: Any) -> Path:
    """Two models × two attacks × three defences, one of which does not apply."""
    models = {name: PyTorchSegmenter(linear_cnn(seed=seed), NB_CLASSES, SHAPE) for seed, name in enumerate(MODELS)}
    given: dict[str, Any] = {
        "attacks": dict(zip(ATTACKS, (noise, aimed), strict=True)),
        "defences": dict(zip(DEFENCES[1:], (shifted, never), strict=True)),
        "run_file": f"data: {SCRIPT}\n",
        "checks": False,  # verdicts are given by hand
    }
    evaluate(models, data=Markup(), out=out, verbose=False, **{**given, **change})
    return out


#: Of a run as above: a check that fails in one cell, one that fails for every attack, and such as do not.
VERDICTS = [
    Verdict("more steps", MODELS[0], "none", ATTACKS[0], True, "As it must be."),
    Verdict("more steps", MODELS[0], "shifted", ATTACKS[1], False, f"30 % with 10 steps, 20 % with 20. {SCRIPT}"),
    Verdict(f"collapse {IMAGE}", MODELS[1], "shifted", None, False, "One class everywhere."),
    Verdict("zero gradients", MODELS[1], "none", ATTACKS[0], None, "No gradient was asked for."),
]

CURVES = "model,attack,defence,axis,x,success,success_low,success_high,adversarial_miou,clean_miou,images\n" + "".join(
    f"{model},{attack},{defence},{axis},{x},{y:.4f},{y - 0.02:.4f},{y + 0.03:.4f},0.3,0.5,5\n"
    for model in ("m", "n")
    for attack in ("permute", "<b>strip</b>")
    for defence, scale in (("none", 0.1), ("ram", 0.05))
    for axis, xs in (("patch_size", (10, 20, 40)), ("max_iter", (1, 10, 100, 1000)))
    for x, y in ((x, scale * (k + 1)) for k, x in enumerate(xs))
)

TUNE = """\
model,attack,variant,max_attention,drop_probability,clean_miou,robust_miou,success,images,pareto,chosen
m,permute,none,,,0.58,0.30,0.30,5,True,False
m,permute,clamp,3/N,0.1,0.575,0.45,0.10,5,True,True
m,permute,clamp,1/N,0.2,0.550,0.48,0.05,5,True,False
m,permute,scale,1/N,0.0,0.540,0.40,0.12,5,False,False
"""
