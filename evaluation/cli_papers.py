"""``ramdefense papers``: what the papers claim, and what came out here."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from evaluation.cli_shared import show

_STYLES = {"holds": "green", "holds in part": "yellow", "does not hold": "red"}


def papers(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/papers.md.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The claims of the four papers that this project starts from, each with its measurement here and a verdict."""
    from evaluation.papers.catalogue import as_markdown
    from evaluation.papers.catalogue import papers as every_paper

    found = every_paper()
    if markdown:
        typer.echo(as_markdown(found), nl=False)
        return
    if as_json:
        told = [
            {**paper._asdict(), "claims": [{**claim._asdict(), "run": run} for claim, run in paper.claims]}
            for paper in found
        ]
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    for paper in found:
        show(Text(f"\n{paper.authors}\n{paper.title}, {paper.where}", style="bold"))
        for claim, run in paper.claims:
            verdict = Text.assemble((claim.verdict, _STYLES.get(claim.verdict, "dim")), f": {claim.claim}")
            lines = (f"here:  {claim.ours}", f"paper: {claim.paper}", f"why:   {claim.reason}", f"from:  {run}")
            show(Padding(Group(verdict, *(Padding(Text(line), (0, 0, 0, 4)) for line in lines)), (1, 0, 0, 2)))
