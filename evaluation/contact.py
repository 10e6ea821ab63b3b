"""What passes between a table and an attack, whoever wrote it: options, images, the map aimed at, and what it took."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ramdefense.checks import check_images
from ramdefense.segmenter import PyTorchSegmenter

if TYPE_CHECKING:
    from numpy.typing import NDArray


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a keyword of that name can be given; a preset says which it leaves open."""
    if isinstance(function, functools.partial):
        return name not in function.keywords and takes(function.func, name)
    left_open = getattr(function, "open", None)
    if left_open is not None:
        return name in left_open
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def with_options(
    name: str, factory: Callable[..., Any], options: Mapping[str, Any]
) -> Callable[[PyTorchSegmenter], Any]:
    """The factory with the options that it takes, as ``evaluate`` gives them.

    Raises:
        ValueError: an option that the attack does not have, other than those that every attack is offered.
    """
    always = ("seed", "batch_size", "verbose")
    unknown = [option for option in options if not takes(factory, option) and option not in always]
    if unknown:
        raise ValueError(f"option {unknown[0]!r}: attack {name!r} does not have it, or sets it itself")
    return functools.partial(factory, **{option: value for option, value in options.items() if takes(factory, option)})


def generate(attack: Any, x: NDArray[np.float32], y: NDArray[np.int64], images: Sequence[int]) -> NDArray[np.float32]:
    """Adversarial images (N, C, H, W) for images and ground truth, of which the attack gets copies."""
    # by name only: the **kwargs of ART's attacks are meant for other things
    streams = {"images": images} if "images" in inspect.signature(attack.generate).parameters else {}
    return np.asarray(attack.generate(x.copy(), y.copy(), **streams), dtype=np.float32)


def target_map(attack: Any, y: NDArray[np.int64], images: Sequence[int]) -> NDArray[np.int64] | None:
    """The map that an attack aims at, (N, H, W); None for one that aims at none, or that does not say."""
    if not hasattr(attack, "target_map"):
        return None
    streams = {"images": images} if takes(attack.target_map, "images") else {}
    aim = attack.target_map(y.copy(), **streams)
    return None if aim is None else np.asarray(aim, dtype=np.int64)


def check_promises(
    name: str,
    x: NDArray[np.float32],
    adversarial: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    segmenter: PyTorchSegmenter,
) -> None:
    """Raise a ValueError if an attack made no image or changed pixels outside its mask: it measures nothing."""
    if adversarial.shape != x.shape:
        raise ValueError(f"attack {name!r} made images of shape {adversarial.shape} out of {x.shape}")
    try:
        check_images(adversarial, segmenter.clip_values)
    except ValueError as error:
        raise ValueError(f"attack {name!r} made no valid images: {error}") from error
    if mask is not None and (adversarial != x)[np.broadcast_to(~mask[:, None], x.shape)].any():
        raise ValueError(f"attack {name!r} changed pixels outside its mask")


def mask_of(attack: Any, x: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """The pixels that an attack might change, (N, H, W); None where that is all of them, which then all count."""
    mask = np.asarray(attack.mask(x), dtype=bool) if hasattr(attack, "mask") else None
    return None if mask is None or mask.all() else mask


def costs_of(attack: Any, seconds: float, images: int) -> list[dict[str, Any]]:
    """What each image of an attack's last batch took, by what the attack says of it."""
    result = getattr(attack, "result", None)
    steps = getattr(result, "steps", None)
    shared: dict[str, Any] = {"seconds": seconds / images}
    for name in ("forwards", "backwards"):
        total = getattr(result, name, None)
        shared[name] = None if total is None else total / images
    return [{**shared, "steps": None if steps is None else int(steps[row])} for row in range(images)]
