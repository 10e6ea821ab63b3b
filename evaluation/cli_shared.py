"""What the commands of the command line share: options, errors that a user can mend, and tables on the screen.

Light, like `evaluation.cli`: what a command needs of torch it imports itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evaluation.sizes import pair, place
from ramdefense.names import ratio

if TYPE_CHECKING:
    from rich.console import RenderableType

Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A module or a file.py that registers attacks or defences; may be repeated."),
]
Target = Annotated[str | None, typer.Option(help="permute, strip, untargeted or a class's number.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; the same command again resumes it.")]
MaxIter = Annotated[int | None, typer.Option(help="Steps of the attack.")]
PatchSize = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for a square.")]
PatchLocation = Annotated[str | None, typer.Option(help="TOPxLEFT in pixels, or a corner, as lower_right.")]
Options = Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a further option; may be repeated.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH that the data are resized to.")]
Region = Annotated[str, typer.Option(help="Which pixels count: outside the patch, or everywhere.")]
Device = Annotated[str | None, typer.Option(help="cpu or gpu; a GPU where there is one, if not given.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user can mend is one line and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        from rich.console import Console

        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("[bold red]error:[/bold red] ", end="")
        console.print(" ".join(str(error).split()), markup=False)
        raise typer.Exit(2) from error


def load_plugins(plugins: list[str] | None) -> None:
    """Import each module or file once; its decorators do the rest."""
    for name in plugins or []:
        if not name.endswith(".py"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name.partition(".")[0] and error.name != name:
                    raise  # the plug-in is there; what it imports is not
                raise ValueError(f"--plugin {name}: no such module; a file ends with .py") from error
            continue
        path = Path(name).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"--plugin {name}: no such file")
        module_name = f"ramdefense_plugin_{path.stem}"
        held = sys.modules.get(module_name)
        if held is not None and getattr(held, "__file__", None) == str(path):
            continue
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"--plugin {name}: no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)


def check_device(device: str | None) -> None:
    if device not in (None, "cpu", "gpu"):
        raise ValueError(f"--device {device}: cpu or gpu")


def first_process() -> bool:
    """Whether this is the process that shows what all of them found."""
    from ramdefense.processes import Launch

    return Launch.of().rank == 0


def attack_options(
    option: list[str] | None,
    target: str | None,
    patch_size: str | None,
    patch_location: str | None,
    device: str | None,
) -> dict[str, Any]:
    """The options of an attack that have switches of their own, and the others."""
    check_device(device)
    options: dict[str, Any] = dict(parsed_option(text) for text in option or [])
    if target is not None:
        options["target"] = target
    if patch_size is not None:
        options["patch_shape"] = pair(patch_size, "--patch-size")
    if patch_location is not None:
        options["patch_location"] = place(patch_location, "--patch-location")
    return options


def parsed_option(text: str) -> tuple[str, Any]:
    """``"eps_step=0.05"`` → ``("eps_step", 0.05)``; values are read as YAML, ``8/255`` as the number that it is."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ValueError(f"--option {text}: NAME=VALUE, as in eps_step=0.05")
    try:
        return name.strip(), ratio(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ValueError(f"--option {text}: the value is no YAML") from error


def show(what: RenderableType, *, markup: bool = True) -> None:
    from rich.console import Console

    Console(highlight=False).print(what, markup=markup)


def show_table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    show(table)
