"""Two commands that look into models: how far they look, and where their attention goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evaluation.cli_shared import (
    Device,
    Options,
    PatchLocation,
    PatchSize,
    Plugins,
    Size,
    Target,
    attack_options,
    check_device,
    load_plugins,
    show,
    show_table,
    user_errors,
)
from evaluation.sizes import pair

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.attention_share import Attacked
    from evaluation.understanding import Given
    from ramdefense.segmenter import PyTorchSegmenter

_Images = Annotated[int | None, typer.Option(help="How many, spread evenly over the data; all if not given.")]
_Data = Annotated[str, typer.Option(help="As of `ramdefense evaluate`.")]


def field(
    model: Annotated[list[str], typer.Option(help="Model by name, see `ramdefense models`; may be repeated.")],
    data: _Data,
    defence: Annotated[
        list[str] | None, typer.Option(help="See `ramdefense defences`; repeatable. If not given, none and ram.")
    ] = None,
    images: _Images = None,
    out: Annotated[Path | None, typer.Option(help="Folder for radii.csv and the maps.")] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run: draw its success rates over the radii; repeatable.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Of a random defence, averaged over.")] = 4,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Images worked on at once.")] = 8,
    device: Device = None,
    plugin: Plugins = None,
) -> None:
    """How far models look: their effective receptive fields, with and without defence."""
    with user_errors():
        load_plugins(plugin)
        check_device(device)
        if run and out is None:
            raise ValueError("--run draws a figure: give --out FOLDER")
        from evaluation.files import write_figure, write_whole
        from evaluation.given import named_defences
        from evaluation.receptive_field import (
            field_figure,
            radii,
            receptive_fields,
            vulnerability_figure,
        )
        from evaluation.results import Results
        from evaluation.store import file_name
        from evaluation.understanding import given

        functions = named_defences(defence or ["none", "ram"])
        summary = Results.joined([Results.load(folder) for folder in run]).summary() if run else None
        if summary is not None and not set(model) & set(summary["model"]):
            raise ValueError(f"--run has no rows of {', '.join(model)}; its models: {', '.join(set(summary['model']))}")
        loaded = given(
            model, data, images=images, size=None if size is None else pair(size, "--size"), device_type=device
        )
        fields, without = receptive_fields(
            loaded.segmenters, functions, loaded.images, draws=draws, streams=loaded.streams, batch_size=batch_size
        )
        table = radii(fields)
        if out is not None:
            write_whole(out / "radii.csv", table.to_csv(index=False))
            for name in loaded.segmenters:
                maps = {under: field for (of, under), field in fields.items() if of == name}
                write_figure(out / f"field-{file_name(name)}.png", field_figure(maps, title=name))
            if summary is not None:
                joined = table.merge(summary, on=["model", "defence"])
                write_figure(out / "vulnerability.png", vulnerability_figure(joined))
    _show_radii(table, loaded)
    for (name, under), reason in without.items():
        show(f"n/a: {under} does not apply to {name}: {reason}", markup=False)
    if out is not None:
        show(f"Radii and maps: {out}")


def _show_radii(table: pd.DataFrame, loaded: Given) -> None:
    import torch

    from evaluation.receptive_field import SHARES, radius

    rows, shown = [], ""
    for row in table.to_dict("records"):
        name, shown = ("" if row["model"] == shown else row["model"]), row["model"]
        rows.append(
            (
                name,
                row["defence"],
                f"{row['radius_50']:.1f}",
                f"{row['radius_95']:.1f}",
                f"{100 * row['relative_50']:.1f}",
                f"{100 * row['relative_95']:.1f}",
            )
        )
    headings = ("model", "defence", "50 %\npixels", "95 %\npixels", "50 %\n% diag.", "95 %\n% diag.")
    show_table(headings, rows, right=(2, 3, 4, 5))
    height, width = loaded.images.shape[-2:]
    even = [f"{radius(torch.ones(height, width), share):.1f}" for share in SHARES]
    show(
        f"Radius of the disc around the central pixel that holds 50 % and 95 % of its receptive field,\nmean over "
        f"{len(loaded.images)} images of {height}×{width}. A field that is even over the image: {' and '.join(even)} "
        "pixels."
    )


def attention(
    model: Annotated[str, typer.Option(help="Model by name, see `ramdefense models`.")],
    data: _Data,
    attack: Annotated[str, typer.Option(help="A patch attack, see `ramdefense attacks`.")] = "strip",
    target: Target = None,
    defence: Annotated[str, typer.Option(help="See `ramdefense defences`.")] = "ram",
    images: _Images = None,
    out: Annotated[Path | None, typer.Option(help="Folder for attention.csv and the rollout maps.")] = None,
    max_iter: Annotated[int | None, typer.Option(help="Steps of the attack.")] = None,
    patch_size: PatchSize = None,
    patch_location: PatchLocation = None,
    option: Options = None,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Images attacked at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    device: Device = None,
    plugin: Plugins = None,
) -> None:
    """Where attention goes: the share that lands on a patch, at each site, with and without defence."""
    with user_errors():
        load_plugins(plugin)
        options = attack_options(option, target, patch_size, patch_location, device)
        options |= {"seed": seed, "batch_size": batch_size, "verbose": False}
        if max_iter is not None:
            options["max_iter"] = max_iter
        from attacks.catalogue import entry
        from evaluation.attention_share import attacked_shares
        from evaluation.contact import with_options
        from evaluation.files import write_whole
        from evaluation.given import named_defences
        from evaluation.understanding import given

        make = with_options(attack, entry(attack).factory, options)
        functions = named_defences(["none", defence] if defence != "none" else ["none"])
        loaded = given(
            [model], data, images=images, size=None if size is None else pair(size, "--size"), device_type=device
        )
        (plain,) = loaded.segmenters.values()
        segmenters = {name: function(plain) for name, function in functions.items()}
        found = attacked_shares(
            segmenters,
            make,
            loaded.images.numpy(),
            loaded.labels.numpy(),
            streams=loaded.streams,
            batch_size=batch_size,
        )
        reason = ""
        if out is not None:
            write_whole(out / "attention.csv", found.shares.to_csv(index=False))
            reason = _write_rollouts(out, segmenters, found, loaded)
    _show_shares(found.shares, len(loaded.images))
    if reason:
        show(f"No rollout maps: {reason}", markup=False)
    if out is not None:
        show(f"Shares{'' if reason else ' and rollout maps'}: {out}")


def _show_shares(shares: pd.DataFrame, images: int) -> None:
    """One row for each site, and their mean."""
    clean = _column(shares, "none", False, "share")
    columns = {"area": _column(shares, "none", False, "uniform"), "clean": clean}
    columns["attacked"] = _column(shares, "none", True, "share")
    for name in dict.fromkeys(shares["defence"]):
        if name != "none":
            columns[f"attacked,\n{name}"] = _column(shares, name, True, "share")
            columns[f"before\n{name} acts"] = _column(shares, name, True, "unrefined")
    rows = [
        (f"{site[0]} (call {site[1] + 1})" if site[1] else site[0], *(_percent(c.get(site)) for c in columns.values()))
        for site in clean
    ]
    means = (sum(column.values()) / len(column) for column in columns.values())
    rows.append(("mean of the sites", *map(_percent, means)))
    show_table(("site", *columns), rows, right=tuple(range(1, len(columns) + 1)))
    show(
        f"% of the attention of the queries outside the patch that lands on it; mean over {images} images, heads and\n"
        "those queries. area: what attention would give to it if it were even. The patch is made anew on the\n"
        "defended model."
    )


def _column(shares: pd.DataFrame, defence: str, attacked: bool, column: str) -> dict[tuple[str, int], float]:
    """Of every site, by its name and the number of its call, in their order."""
    chosen = shares[(shares["defence"] == defence) & (shares["attacked"] == attacked)]
    return {(row["site"], row["occurrence"]): row[column] for row in chosen.to_dict("records")}


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.1f}"


def _write_rollouts(out: Path, segmenters: dict[str, PyTorchSegmenter], found: Attacked, loaded: Given) -> str:
    """One figure for each image; why there is none, where rollout does not apply."""
    from evaluation.attention_share import rollout, rollout_figure
    from evaluation.files import write_figure
    from evaluation.store import file_name
    from ramdefense.traits import NotApplicableError

    columns: list[tuple[str, Any, Any, Any]] = []
    try:
        for name, segmenter in segmenters.items():
            patched = found.patched[name]
            under = "" if name == "none" else f", {name}"
            for state, shown in ((f"clean{under}", loaded.images), (f"attacked{under}", patched.images)):
                columns.append((state, shown, rollout(segmenter, shown, streams=loaded.streams), patched.covered))
    except NotApplicableError as error:
        return str(error)
    for i, name in enumerate(loaded.names):
        maps = {state: (shown[i], flows[i], covered[i]) for state, shown, flows, covered in columns}
        write_figure(out / f"rollout-{file_name(name)}.png", rollout_figure(maps, title=name))
    return ""
