"""A whole experiment as one small YAML file, checked before any work."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from evaluation.sizes import pair, place
from ramdefense.names import ratio


def _several(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value


def _size(value: Any) -> Any:
    """``40``, ``"40x60"`` or ``[40, 60]`` → ``(40, 60)``."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return pair(str(value), "size")
    return tuple(value) if isinstance(value, list) else value


def _place(value: Any) -> Any:
    """As a size; or a name, or a place for each image."""
    if isinstance(value, str):
        return place(value, "place")
    return value if isinstance(value, list) and value and isinstance(value[0], (list, tuple)) else _size(value)


def _target(value: Any) -> Any:
    """A class's number as the name that it is on the command line."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _some(value: list[Any]) -> list[Any]:
    if not value:
        raise ValueError("at least one")
    return value


Pair = tuple[StrictInt, StrictInt]
Names = Annotated[list[StrictStr], BeforeValidator(_several), AfterValidator(_some)]
Seeds = Annotated[list[StrictInt], BeforeValidator(_several), AfterValidator(_some)]
Target = Annotated[StrictStr, BeforeValidator(_target)]
Size = Annotated[Pair, BeforeValidator(_size)]
Place = Annotated[StrictStr | Pair | list[Pair], BeforeValidator(_place)]


class RunFile(BaseModel):
    """What ``ramdefense evaluate`` is told, as a file.

    Paths in it are taken as on the command line, relative to the working directory.

    Args:
        models: names, as ``evaluation.models.load_model`` takes them; one or a list, as all names here.
        data: a name, as ``evaluation.datasets.load_data`` takes it.
        attacks, defences: names.
        target: ``permute``, ``strip``, ``untargeted`` or a class's number, for attacks that have none.
        images: how many, spread evenly, or a list of indices; none: all.
        size: ``[height, width]``, ``HEIGHTxWIDTH`` or one number, that the data are resized to.
        batch_size, region, max_iter, keep_going, checks, check_images: as ``evaluation.evaluate``.
        seed: of the attacks, one or a list.
        out: folder of the run.
        patch_shape: as ``size``.
        patch_location: ``[top, left]``, ``TOPxLEFT``, a name, or a list of places, one for each image.
        device: ``cpu`` or ``gpu``; none: a GPU where there is one.
        amp, compile: as ``evaluation.evaluate``.
        options: further options of the attacks, by name; ``8/255`` is a number.
        plugins: modules or files that register attacks or defences.
    """

    model_config = ConfigDict(extra="forbid")

    models: Names
    data: StrictStr
    attacks: Names = ["permute", "strip"]
    target: Target | None = None
    defences: Names = ["none", "ram"]
    images: StrictInt | list[StrictInt] | None = None
    size: Size | None = None
    batch_size: StrictInt = 8
    seed: Seeds = [0]
    region: Literal["outside", "everywhere"] = "outside"
    out: StrictStr | None = None
    patch_shape: Size | None = None
    patch_location: Place | None = None
    max_iter: StrictInt | None = None
    device: Literal["cpu", "gpu"] | None = None
    amp: Literal["bf16"] | None = None
    compile: StrictBool = False
    options: dict[StrictStr, Annotated[Any, BeforeValidator(ratio)]] = {}
    keep_going: StrictBool = False
    checks: StrictBool = True
    check_images: StrictInt = 2
    plugins: Annotated[list[StrictStr], BeforeValidator(_several)] = []

    @classmethod
    def read(cls, path: str | Path) -> RunFile:
        """Read a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no YAML mapping, or a key is unknown, missing or of another kind; the message names the
                file, each such key, what was given, and the nearest key there is.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(given, dict):
            keys = ", ".join(cls.model_fields)
            raise ValueError(f"{path} holds {given!r}; a run file is a mapping with the keys {keys}")
        try:
            return cls.checked(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def checked(cls, given: dict[Any, Any]) -> RunFile:
        """A run from its keys.

        Raises:
            ValueError: as ``read``.
        """
        wrong = [_unknown(str(key), list(cls.model_fields)) for key in given if key not in cls.model_fields]
        if wrong:
            raise ValueError("; ".join(wrong))
        try:
            run = cls.model_validate(given)
        except ValidationError as error:
            # a union complains once for each of its kinds: one is enough
            complaints: dict[str, str] = {}
            for problem in error.errors():
                complaints.setdefault(str(problem["loc"][0]), problem["msg"].removeprefix("Value error, "))
            told = [
                f"{key}={given[key]!r}: {message}" if key in given else f"{key} is missing"
                for key, message in complaints.items()
            ]
            raise ValueError("; ".join(told)) from error
        own = [name for name in run.options if name in cls.model_fields]
        if own:
            raise ValueError(f"options: {own[0]!r} is a key of its own; give it beside options, not in them")
        return run

    def to_yaml(self) -> str:
        """The file that repeats this run."""
        held = {name: value for name, value in self.model_dump().items() if value is not None}
        return yaml.safe_dump(held, sort_keys=False)

    def arguments(self) -> dict[str, Any]:
        """Keywords of ``evaluation.evaluate``."""
        options = {"target": self.target, "patch_location": self.patch_location, **self.options}
        return {
            **{name: getattr(self, name) for name in _SAME},
            "device_type": self.device,
            **{name: value for name, value in options.items() if value is not None},
        }


_SAME = (
    "models", "attacks", "defences", "data", "images", "size", "batch_size", "seed", "region", "out", "keep_going",
    "checks", "check_images", "patch_shape", "max_iter", "amp", "compile",
)  # fmt: skip


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}")
