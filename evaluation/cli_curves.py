"""Two commands over the strength of attacks and defences: security curves, and the choice of a defence's setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from evaluation.cli_shared import (
    Device,
    Options,
    PatchLocation,
    Plugins,
    Region,
    Size,
    Target,
    attack_options,
    load_plugins,
    show,
    show_table,
    user_errors,
)
from evaluation.sizes import pair

T = TypeVar("T")

_Data = Annotated[str, typer.Option(help="As of `ramdefense evaluate`.")]
_Seeds = Annotated[list[int] | None, typer.Option(help="Of the attack; may be repeated. 0 if not given.")]
_Batch = Annotated[int, typer.Option(help="Images worked on at once.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
_Folder = Annotated[Path, typer.Option(help="Folder, maybe that of a run; the same command again goes on from there.")]


def curves(
    model: Annotated[list[str], typer.Option(help="Model by name, see `ramdefense models`; may be repeated.")],
    data: _Data,
    out: _Folder,
    attack: Annotated[
        list[str] | None, typer.Option(help="See `ramdefense attacks`; repeatable. If not given, strip.")
    ] = None,
    target: Target = None,
    defence: Annotated[
        list[str] | None, typer.Option(help="See `ramdefense defences`; repeatable. If not given, none and ram.")
    ] = None,
    patch_size: Annotated[
        str | None, typer.Option(help="A curve over 10,20,40 or 20x30,40x60 pixels; one size: of every patch.")
    ] = None,
    max_iter: Annotated[
        str | None, typer.Option(help="A curve over 10,50,200 steps; one number: of every attack.")
    ] = None,
    max_attention: Annotated[str | None, typer.Option(help="A curve over RAM's bound T: 3/N,16/N,64/N.")] = None,
    drop_probability: Annotated[str | None, typer.Option(help="A curve over RAM's p: 0,0.1,0.3.")] = None,
    base_patch_size: Annotated[
        str | None, typer.Option(help="Patch of the other curves; the middle one of --patch-size if not given.")
    ] = None,
    base_max_iter: Annotated[
        int | None, typer.Option(help="Steps of the other curves; the most of --max-iter if not given.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="How many, spread evenly over the data; all if not given.")] = None,
    patch_location: PatchLocation = None,
    option: Options = None,
    size: Size = None,
    region: Region = "outside",
    batch_size: _Batch = 8,
    seed: _Seeds = None,
    device: Device = None,
    plugin: Plugins = None,
    quiet: _Quiet = False,
) -> None:
    """Security curves: success against patch size, steps, and the bound and the drop probability of RAM."""
    with user_errors():
        load_plugins(plugin)
        options = attack_options(option, target, None, patch_location, device)
        axes: dict[str, list[Any]] = {}
        sizes = _several(patch_size, "--patch-size", lambda text: pair(text, "--patch-size"))
        steps = _several(max_iter, "--max-iter", lambda text: _whole(text, "--max-iter"))
        bases: dict[str, Any] = {
            "patch_shape": _base(
                sizes, None if base_patch_size is None else pair(base_patch_size, "--base-patch-size"), "patch-size"
            ),
            "max_iter": _base(steps, base_max_iter, "max-iter"),
        }
        axes |= {axis: given for axis, given in (("patch_size", sizes), ("max_iter", steps)) if len(given) > 1}
        for axis, text in (("max_attention", max_attention), ("drop_probability", drop_probability)):
            if text is not None:
                axes[axis] = _several(text, f"--{axis.replace('_', '-')}", str)
        if not axes:
            raise ValueError(
                "no curve asked for: several values for --patch-size, --max-iter, --max-attention or --drop-probability"
            )
        from evaluation.curves import curves as measure

        try:
            result = measure(
                model, axes, attack or ["strip"], defence or ["none", "ram"], data, images=images,
                size=None if size is None else pair(size, "--size"), batch_size=batch_size, seed=seed or 0,
                region=region,  # type: ignore[arg-type]  # checked there
                out=out, verbose=not quiet, device_type=device, **bases, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            _interrupted(out)
    for heading, rows in result.screen():
        show(heading, markup=False)
        show_table(("defence", "at", "fooled", "interval", "mIoU\nadv", "\nclean"), rows, right=(1, 2, 3, 4, 5))
    for line in result.captions():
        show(line, markup=False)
    show("")
    for sentence in result.sentences():
        show(sentence, markup=False)
    show(f"\nTable, figure and points: {out}", markup=False)


def tune(
    model: Annotated[str, typer.Option(help="Model by name, see `ramdefense models`.")],
    data: _Data,
    out: _Folder,
    budget: Annotated[float, typer.Option(help="Points of clean mIoU that the choice may cost.")] = 1.0,
    attack: Annotated[str, typer.Option(help="See `ramdefense attacks`.")] = "strip",
    target: Target = None,
    defence: Annotated[str, typer.Option(help="Whose options are swept.")] = "ram",
    variant: Annotated[
        list[str] | None, typer.Option(help="clamp, cap, temperature or scale; repeatable. If not given, cap.")
    ] = None,
    max_attention: Annotated[str | None, typer.Option(help="Bounds T; if not given, 1/N,3/N,5/N,16/N,64/N.")] = None,
    drop_probability: Annotated[str | None, typer.Option(help="Values of p; if not given, 0,0.1,0.3.")] = None,
    images: Annotated[int | None, typer.Option(help="How many are attacked, spread evenly; all if not given.")] = None,
    clean_images: Annotated[
        int | None, typer.Option(help="How many clean mIoU is measured on, likewise; all if not given.")
    ] = None,
    attack_all: Annotated[
        bool, typer.Option("--all", help="Attack what is over the budget, too, for the whole Pareto front.")
    ] = False,
    max_iter: Annotated[int | None, typer.Option(help="Steps of the attack.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for a square.")] = None,
    patch_location: PatchLocation = None,
    option: Options = None,
    size: Size = None,
    region: Region = "outside",
    batch_size: _Batch = 8,
    seed: _Seeds = None,
    device: Device = None,
    plugin: Plugins = None,
    quiet: _Quiet = False,
) -> None:
    """Pick the setting of RAM that withstands most, at a cost of at most so many points of clean mIoU."""
    with user_errors():
        load_plugins(plugin)
        options = attack_options(option, target, patch_size, patch_location, device)
        swept: dict[str, Any] = {}
        if variant:
            swept["variants"] = variant
        if max_attention is not None:
            swept["max_attention"] = _several(max_attention, "--max-attention", str)
        if drop_probability is not None:
            swept["drop_probability"] = _several(drop_probability, "--drop-probability", str)
        from evaluation.tuning import tune as choose

        try:
            tuned = choose(
                model, data, budget, attack=attack, defence=defence, images=images, clean_images=clean_images,
                attack_all=attack_all, size=None if size is None else pair(size, "--size"), batch_size=batch_size,
                seed=seed or 0,
                region=region,  # type: ignore[arg-type]  # checked there
                out=out, verbose=not quiet, max_iter=max_iter, device_type=device, **swept, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            _interrupted(out)
    headings = ("variant", "T", "p", "mIoU\nclean", "cost\npoints", "\ninterval", "mIoU\nadv", "\nfooled", "")
    show_table(headings, tuned.rows(), right=(1, 2, 3, 4, 5, 6, 7))
    for sentence in tuned.sentences():
        show(sentence, markup=False)
    show(f"\nTable, figure and points: {out}", markup=False)


def _several(text: str | None, name: str, read: Callable[[str], T]) -> list[T]:
    """The values of a list with commas."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{name} {text!r}: an empty place; values with commas between them, none at the ends")
    return [read(part) for part in parts]


def _base(values: list[T], given: T | None, name: str) -> T | None:
    """What the other curves are measured at; a single value is no curve but this."""
    if len(values) == 1 and given is not None:
        raise ValueError(f"--{name} with one value and --base-{name} say the same thing twice; give one of them")
    return values[0] if len(values) == 1 else given


def _whole(text: str, name: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} {text}: a whole number, at least 1")
    return int(text)


def _interrupted(out: Path) -> NoReturn:
    show(f"INTERRUPTED: the same command goes on from what is finished in {out}", markup=False)
    raise typer.Exit(130)
