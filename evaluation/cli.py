"""The command line: ``ramdefense``.

Whatever needs torch is imported inside the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evaluation.cli_curves import curves, tune
from evaluation.cli_papers import papers
from evaluation.cli_report import report
from evaluation.cli_shared import (
    Device,
    MaxIter,
    Options,
    Out,
    PatchLocation,
    PatchSize,
    Plugins,
    Region,
    Size,
    Target,
    attack_options,
    check_device,
    first_process,
    load_plugins,
    parsed_option,
    show,
    show_table,
    user_errors,
)
from evaluation.cli_understand import attention, field
from evaluation.sizes import pair, place
from evaluation.threads import leave_room

if TYPE_CHECKING:
    from evaluation.runfile import RunFile

app = typer.Typer(
    name="ramdefense",
    help="Adversarial patches for semantic segmentation, and the Robust Attention Mechanism (RAM) against them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the console command."""
    leave_room(os.environ)  # before a command imports torch, which reads it once
    app()


@app.command()
def evaluate(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A whole run as a file; options beside it overrule it.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model by name, see `ramdefense models`; may be repeated.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="scenes[:N], camvid:PATH[:SPLIT], folder:PATH, voc:PATH, cityscapes:PATH.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="See `ramdefense attacks`; or all, patch, pixel; repeatable. If none, permute and strip."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="permute, strip, untargeted or a class's number, for attacks that have none.")
    ] = None,
    defence: Annotated[
        list[str] | None, typer.Option(help="See `ramdefense defences`; repeatable. If not given, none and ram.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="How many, spread evenly over the data; all if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same command again resumes it.")] = None,
    max_iter: Annotated[int | None, typer.Option(help="Steps of each attack.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for a square.")] = None,
    patch_location: Annotated[str | None, typer.Option(help="TOPxLEFT in pixels, or a corner, as lower_right.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a further option of the attacks; may be repeated.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH that the data are resized to.")] = None,
    region: Annotated[
        str | None, typer.Option(help="Which pixels count: outside the patch (if not given), or everywhere.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images worked on at once; 8 if not given.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the attacks; may be repeated. 0 if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or gpu; a GPU where there is one, if not given.")] = None,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Leave out what cannot be read or attacked, finish the rest, end with 1."),
    ] = False,
    no_checks: Annotated[
        bool, typer.Option("--no-checks", help="Do not check whether the numbers are to be believed.")
    ] = False,
    amp: Annotated[str | None, typer.Option(help="bf16: models under autocast; other numbers, near the usual.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Models by torch.compile; the numbers change by rounding.")
    ] = False,
    plugin: Plugins = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Attack models under defences and show the table."""
    with user_errors():
        if device not in (None, "cpu", "gpu"):
            raise ValueError(f"--device {device}: cpu or gpu")
        given = {
            "models": model,
            "data": data,
            "attacks": attack,
            "target": target,
            "defences": defence,
            "images": images,
            "size": None if size is None else pair(size, "--size"),
            "batch_size": batch_size,
            "seed": seed,
            "region": region,
            "out": None if out is None else str(out),
            "patch_shape": None if patch_size is None else pair(patch_size, "--patch-size"),
            "patch_location": None if patch_location is None else place(patch_location, "--patch-location"),
            "max_iter": max_iter,
            "device": device,
            "options": dict(parsed_option(text) for text in option or []),
            "keep_going": keep_going or None,
            "checks": False if no_checks else None,
            "amp": amp,
            "compile": compiled or None,
            "plugins": plugin,
        }
        run = _run_file(run_file, {name: value for name, value in given.items() if value not in (None, [])})
        load_plugins(run.plugins)
        from evaluation.experiment import evaluate as measure

        results = measure(**run.arguments(), verbose=not quiet, run_file=run.to_yaml())
    if first_process():
        show(results.table())
        if run.out is not None:
            show(f"Rows, tables, patches and figures: {run.out}")
            _name_page(Path(run.out))
    if results.interrupted:
        raise typer.Exit(130)
    if results.left_out:
        raise typer.Exit(1)


def _name_page(folder: Path) -> None:
    """Name the page of a run, if it has one: a run that was stopped before its first row has none."""
    page = folder / "report.html"
    if page.exists():
        show(f"Page: {page}", markup=False)


def _run_file(path: Path | None, given: dict[str, Any]) -> RunFile:
    """The run of a file, or of no file, with what was given beside it."""
    from evaluation.runfile import RunFile

    held = {} if path is None else RunFile.read(path).model_dump()
    missing = [option for option in ("models", "data") if option not in given | held]
    if missing:
        option = {"models": "--model", "data": "--data"}[missing[0]]
        raise ValueError(f"no {missing[0]} given: {option}, or a RUN.yaml that has them")
    return RunFile.checked({**held, **given, "options": {**held.get("options", {}), **given["options"]}})


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    checks: Annotated[bool, typer.Option("--checks", help="What each check found, in place of the figures.")] = False,
) -> None:
    """The table of a run, or of several that differ in their models, attacks or defences, from their rows alone."""
    with user_errors():
        from evaluation.results import Results
        from evaluation.tables import verdict_rows

        results = Results.joined([Results.load(run) for run in runs])
    if checks:
        headings = ("model", "defence", "attack", "check", "passed", "detail")
        show_table(headings, verdict_rows(results.verdict_table()))
    elif markdown:
        typer.echo(results.markdown())
    else:
        show(results.table())


@app.command()
def intervals(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(help="Of the images.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="Folder for intervals.csv and differences.csv.")] = None,
) -> None:
    """How sure a run is: intervals over images, and what each defence gains on the same images, with p-values."""
    with user_errors():
        from evaluation import statistics
        from evaluation.files import write_whole
        from evaluation.results import Results
        from evaluation.tables import uncertain_rows

        results = Results.joined([Results.load(run) for run in runs])
        figures = statistics.intervals(results, level=level, resamples=resamples)
        differences = statistics.paired_differences(results, level=level, resamples=resamples)
        if out is not None:
            write_whole(out / "intervals.csv", figures.to_csv(index=False))
            write_whole(out / "differences.csv", differences.to_csv(index=False))
    headings = ("model", "attack", "defence", "fooled", "interval", "gain", "interval", "p")
    show_table(headings, uncertain_rows(figures, differences, results.unreliable()), right=(3, 4, 5, 6, 7))
    show(
        f"All in % but p. interval: {level:.0%}, over images. gain: what the defence takes off, on the same images.\n"
        "p: of a paired permutation test, corrected for the number of comparisons (Holm)."
    )
    if out is not None:
        show(f"All figures: {out}")


@app.command()
def transfer(
    model: Annotated[list[str], typer.Option(help="Model by name, see `ramdefense models`; give several.")],
    data: Annotated[str, typer.Option(help="As of `ramdefense evaluate`.")],
    attack: Annotated[str, typer.Option(help="See `ramdefense attacks`.")] = "permute",
    target: Target = None,
    ensembles: Annotated[
        bool, typer.Option("--ensembles", help="Make them on all models but one at once, too, for each one.")
    ] = False,
    images: Annotated[int | None, typer.Option(help="How many, spread evenly over the data; all if not given.")] = None,
    out: Out = None,
    max_iter: MaxIter = None,
    patch_size: PatchSize = None,
    patch_location: PatchLocation = None,
    option: Options = None,
    size: Size = None,
    region: Region = "outside",
    batch_size: Annotated[int, typer.Option(help="Images worked on at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    device: Device = None,
    plugin: Plugins = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make patches on each model, test them on every model, and show the matrix."""
    with user_errors():
        load_plugins(plugin)
        options = attack_options(option, target, patch_size, patch_location, device)
        from evaluation.transfer import transfer as run

        result = run(
            model,
            attack,
            data,
            ensembles=ensembles,
            images=images,
            size=None if size is None else pair(size, "--size"),
            batch_size=batch_size,
            seed=seed,
            region=region,  # type: ignore[arg-type]  # checked there
            out=out,
            verbose=not quiet,
            max_iter=max_iter,
            device_type=device,
            **options,
        )
    if not result.interrupted and first_process():
        show(result.table())
    if out is not None and first_process():
        show(f"Matrix, rows and patches: {out}")
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def universal(
    model: Annotated[str, typer.Option(help="Model by name, see `ramdefense models`.")],
    data: Annotated[str, typer.Option(help="Frames that the patch is made on; as of `ramdefense evaluate`.")],
    test: Annotated[str, typer.Option(help="Other frames, that it is tested on.")],
    attack: Annotated[str, typer.Option(help="A patch attack, see `ramdefense attacks`.")] = "untargeted",
    target: Target = None,
    images: Annotated[int | None, typer.Option(help="How many frames to make it on; all if not given.")] = None,
    test_images: Annotated[int | None, typer.Option(help="How many frames to test it on; all if not given.")] = None,
    out: Out = None,
    max_iter: MaxIter = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the frames, in place of --max-iter.")] = None,
    patch_size: PatchSize = None,
    patch_location: PatchLocation = None,
    option: Options = None,
    size: Size = None,
    region: Region = "outside",
    batch_size: Annotated[int, typer.Option(help="Frames in a step, and images tested at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    device: Device = None,
    plugin: Plugins = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make one patch for all frames, and test it on unseen ones beside a random and a grey patch."""
    with user_errors():
        load_plugins(plugin)
        options = attack_options(option, target, patch_size, patch_location, device)
        from evaluation.transfer import universal as run

        try:
            result = run(
                model,
                data,
                test,
                attack,
                images=images,
                test_images=test_images,
                epochs=epochs,
                size=None if size is None else pair(size, "--size"),
                batch_size=batch_size,
                seed=seed,
                region=region,  # type: ignore[arg-type]  # checked there
                out=out,
                verbose=not quiet,
                max_iter=max_iter,
                device_type=device,
                **options,
            )
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    if result.results.interrupted:
        raise typer.Exit(130)
    if first_process():
        show(result.table())
        if out is not None:
            show(f"Patch: {out / 'patch.safetensors'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table and the figures.")] = Path("runs/demo"),
    images: Annotated[int, typer.Option(help="How many scenes are attacked.")] = 4,
    max_iter: Annotated[int, typer.Option(help="Steps of each attack.")] = 50,
    defence: Annotated[
        list[str] | None, typer.Option(help="See `ramdefense defences`; repeatable. RAM at two T if not given.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """A patch attack on two small models and RAM against it, on drawn street scenes: no data needed."""
    with user_errors():
        from evaluation.experiment import evaluate as run
        from ramdefense.defences import defence as by_name

        # under a short name, so that the table fits on a narrow screen
        usual = {"ram": by_name("ram"), "ram 3/N": by_name("ram:max_attention=3/N")}
        results = run(
            ["zoo:scenes-nonlocal", "zoo:scenes-cnn"],
            ["permute", "strip"],
            defence or usual,
            "scenes",
            images=images,
            max_iter=max_iter,
            out=out,
            verbose=not quiet,
            patch_shape=(40, 40),
            eps_step=0.05,  # few steps, so large ones
            defence_samples=2,
        )
    show(results.table())
    if results.interrupted:
        raise typer.Exit(130)
    show("")
    for sentence in results.sentences():
        show(sentence)
    show(f"\nFigures: {out / 'figures'}")
    _name_page(out)


@app.command()
def sites(
    model: Annotated[str, typer.Option(help="Model by name, see `ramdefense models`.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the image to look with.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes, where the model does not say.")] = None,
    plugin: Plugins = None,
) -> None:
    """Where a model attends: the places that RAM refines."""
    with user_errors():
        load_plugins(plugin)
        from evaluation.models import load_model
        from ramdefense.interception import attention_sites

        shape = None if size is None else (3, *pair(size, "--size"))
        segmenter = load_model(model, nb_classes=classes, input_shape=shape)
        found = attention_sites(segmenter.model, segmenter.input_shape)
    if not found:
        show(f"{model} has no attention: RAM does not apply to it.")
        return
    rows = [(s.name, s.kind, str(s.heads), str(s.queries), str(s.keys), s.function) for s in found]
    show_table(("site", "kind", "heads", "queries", "keys", "function"), rows, right=(2, 3, 4))


app.command()(report)
app.command()(field)
app.command()(attention)
app.command()(curves)
app.command()(tune)
app.command()(papers)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Recipe; the zoo's are in evaluation/zoo.")],
    data: Annotated[str, typer.Option(help="Folder that {data} in the recipe stands for.")] = "",
    out: Annotated[Path | None, typer.Option(help="OUT.safetensors and OUT.json; the recipe's name otherwise.")] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model from a recipe and write its weights and its card."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with user_errors():
        if not recipe.is_file():
            raise FileNotFoundError(f"no file {recipe}")
        from evaluation.training import Recipe, save
        from evaluation.training import train as fit

        check_device(device)
        hidden = quiet or not first_process()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
            task = bar.add_task("reading the data", total=None)
            latest: dict[str, float] = {}

            def progress(step: int, steps: int, figures: dict[str, float]) -> None:
                latest.update(figures)
                text = ", ".join(f"{name} {value:.3f}" for name, value in latest.items())
                bar.update(task, completed=step, total=steps, description=text)

            model, card = fit(Recipe.load(recipe), data=data, progress=progress, device_type=device)
        if not first_process():
            return
        target = Path(recipe.stem) if out is None else out
        save(model, card, target)
    for split in ("val", "test"):
        figures = card[split]
        show(f"{split}: mIoU {100 * figures['miou']:.1f} %, pixel accuracy {100 * figures['pixel_accuracy']:.1f} %")
    show(f"Written: {target.with_suffix('.safetensors')}")


@app.command("attacks")
def list_attacks(
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of objects.")] = False,
) -> None:
    """The attacks by name."""
    with user_errors():
        load_plugins(plugin)
        from attacks.catalogue import attacks

    if as_json:
        listed = [{f.name: getattr(e, f.name) for f in fields(e) if f.name != "factory"} for e in attacks().values()]
        typer.echo(json.dumps(listed, indent=2))
        return
    show_table(("attack", "what it does", "source"), [(e.name, e.summary, _cited(e.paper)) for e in attacks().values()])


def _cited(paper: str) -> str:
    """Authors and venue of "authors, title, venue"."""
    authors, *_, venue = paper.split(", ") if ", " in paper else (paper, "")
    return f"{authors}, {venue}" if venue else authors


@app.command("defences")
def list_defences(plugin: Plugins = None) -> None:
    """The defences by name."""
    with user_errors():
        load_plugins(plugin)
        from ramdefense.defences import summaries

    show_table(("defence", "what it does"), list(summaries().items()))


@app.command("models")
def list_models() -> None:
    """The models that ship, and how to name others."""
    with user_errors():
        from evaluation.cards import KINDS, zoo

    rows = [
        (
            f"zoo:{name}",
            "×".join(map(str, card["size"])),
            f"{card['parameters'] / 1e6:.2f} M",
            f"{100 * card['val']['miou']:.1f}",
            f"{100 * card['test']['miou']:.1f}",
        )
        for name, card in zoo().items()
    ]
    show_table(("model", "size", "weights", "val mIoU %", "test mIoU %"), rows, right=(2, 3, 4))
    show(f"A model is {KINDS}.", markup=False)


if __name__ == "__main__":
    main()
