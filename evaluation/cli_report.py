"""The command that makes a run's page again, from its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evaluation.cli_shared import show, user_errors


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; report.html in the run's folder, if not given.")
    ] = None,
) -> None:
    """Make the page and the tables of a run again, or one page of several runs that differ in models or attacks."""
    with user_errors():
        if len(runs) > 1 and out is None:
            raise ValueError(f"{len(runs)} runs: say where their page goes with --out FILE.html")
        from evaluation.report import write_joined_report, write_report

        page = write_report(runs[0], out=out) if len(runs) == 1 or out is None else write_joined_report(runs, out)
    show(f"Page: {page}", markup=False)
