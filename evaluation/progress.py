"""A progress bar on standard error, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with what was worked on, and by how much the work has gone on.
Tick = Callable[[str, float], None]


@contextmanager
def progress_bar(verbose: bool, total: float) -> Iterator[Tick]:
    """A bar for so much work, shown if ``verbose``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, disable=not verbose, transient=True, speed_estimate_period=600
    ) as progress:
        task = progress.add_task("starting", total=total)

        def tick(description: str, effort: float) -> None:
            progress.update(task, description=description, advance=effort)

        yield tick
