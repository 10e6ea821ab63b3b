"""A summary as a person reads it: on the screen, as Markdown, in sentences. Every figure comes from the summary.

A few attacks make one table each, with the models down its side. More of them than there are models turn this round:
one table for each model with the attacks down its side, and their mean, since that many tables cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import pandas as pd

from ramdefense.names import split_name

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Row = Mapping[str, Any]

#: What a cell with a failed check is called, wherever it is shown.
UNRELIABLE = "unreliable"

#: From so many attacks on a mean says something.
_MANY = 3
#: Columns, of the summary, and what stands over them, with the width that they need.
_BY_ATTACK = (
    ("clean_miou", "mIoU\nclean", 5), ("adversarial_miou", "\nadv", 4), ("clean_success", "fooled\nnone", 6),
    ("plain_success", "\nplain", 5), ("adaptive_success", "\nadapt", 5), ("transfer_success", "\ntrans", 5),
    ("success", "\nworst", 5), ("success_drop", "\ngain", 6),
)  # fmt: skip
_BY_MODEL = (
    ("clean_success", "fooled\nnone", 6), ("plain_success", "\nplain", 5), ("adaptive_success", "\nadapt", 5),
    ("transfer_success", "\ntrans", 5), ("success", "\nworst", 5), ("success_drop", "\ngain", 6),
    ("forwards", "cost\nforw.", 5), ("seconds", "\ns", 4),
)  # fmt: skip
_MARKDOWN = (
    "clean_miou", "clean_success", "plain_success", "adaptive_success", "transfer_success", "success", "target_miou",
    "adversarial_miou",
)  # fmt: skip
_MARKDOWN_BY_MODEL = (
    "clean_success", "plain_success", "adaptive_success", "transfer_success", "success", "success_drop",
    "steps", "forwards", "backwards", "seconds",
)  # fmt: skip
_COSTS = ("steps", "forwards", "backwards", "seconds")


def on_screen(frame: pd.DataFrame, notes: Sequence[str] = (), *, counted: str = "") -> Group:
    """The table for the screen (``rich``), 80 columns wide: percentages, and what each defence gains.

    Args:
        frame: ``Results.summary()``.
        notes: lines that go under it.
        counted: which pixels count, one sentence.
    """
    from rich.console import Group
    from rich.text import Text

    turned = _turned(frame)
    frame = _judged(frame)
    tables = _tables_by_model(frame) if turned else _tables_by_attack(frame)
    return Group(*tables, Text("\n".join([*_caption(frame, turned), counted, *notes]), style="dim"))


def as_markdown(frame: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """The summary as a Markdown table, in percent; where attacks are many, one for each model, with what they took.

    Args:
        frame: ``Results.summary()``.
        notes: a list that goes under it.
    """
    frame = _judged(frame)
    listed = "".join(f"\n- {note}" for note in notes)
    return _as_markdown(frame) + (f"\n{listed}" if listed else "")


def _as_markdown(frame: pd.DataFrame) -> str:
    if not _turned(frame):
        headings = ["attack", "model", "defence", *(name.replace("_", " ") for name in _MARKDOWN)]
        cells = [
            [row["attack"], row["model"], _defence(row), *(percent(row[name]) for name in _MARKDOWN)]
            for row in _rows(frame)
        ]
        return _markdown(headings, cells, left=3)
    parts = []
    for model, of_model in frame.groupby("model", sort=False):
        headings = ["attack", "defence", *(name.replace("_", " ") for name in _MARKDOWN_BY_MODEL)]
        cells = [
            [row["attack"], _defence(row), *(_number(name, _shown(row)[name]) for name in _MARKDOWN_BY_MODEL)]
            for group in _groups(of_model, _aiming(frame))
            for row in (*group, *means(group))
        ]
        parts.append(f"**{model}**{_clean(_rows(of_model))}\n\n{_markdown(headings, cells, left=2)}")
    return "\n\n".join(parts)


def as_sentences(frame: pd.DataFrame) -> Iterator[str]:
    """What the table shows, one plain sentence for each model, attack and defence.

    Args:
        frame: ``Results.summary()``.
    """
    rows = _rows(_judged(frame))
    plain = {(row["model"], row["attack"]): row for row in rows if row["defence"] == "none"}
    for row in rows:
        before = plain.get((row["model"], row["attack"]))
        if row["defence"] == "none" or before is None or row["note"] or math.isnan(row["success"]):
            continue
        points = round(100 * (before["success"] - row["success"]), 1)
        failed = dict.fromkeys(name for one in (before, row) for name in one["failed_checks"].split("; ") if name)
        unreliable = f" Unreliable, since a check failed: {', '.join(failed)}." if failed else ""
        verb = "lowers" if points > 0 else "raises" if points < 0 else "does not change"
        yield (
            f"On {row['model']}, {row['defence']} {verb} the share of pixels that the {row['attack']} patch fools: "
            f"{percent(before['success'])} % without it, {percent(row['success'])} % with it (the strongest variant "
            f"of the attack on each image); clean mIoU {percent(before['clean_miou'])} % and "
            f"{percent(row['clean_miou'])} %.{unreliable}"
        )


def means(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each defence the mean over the attacks: one row each, every figure the plain mean of theirs.

    Only attacks that were measured under every defence count, so that the means are over the same ones; a defence under
    which there is none at all, since it does not apply to the model, is left out. With fewer attacks than three there
    is nothing to average: no rows.
    """
    measured = pd.DataFrame([dict(row) for row in rows if not row["note"] and not math.isnan(row["success"])])
    found: list[dict[str, Any]] = []
    if measured.empty:
        return found
    met = measured.groupby("attack")["defence"].nunique()
    measured = measured[measured["attack"].isin(met[met == measured["defence"].nunique()].index)]
    if measured["attack"].nunique() < _MANY:
        return found
    for defence, of_defence in measured.groupby("defence", sort=False):
        figures = {str(name): float(value) for name, value in of_defence.mean(numeric_only=True).items()}
        named = {"attack": f"mean of {len(of_defence)}", "defence": str(defence), "note": ""}
        if "failed_checks" in of_defence:  # one of them that is unreliable makes their mean so
            named["failed_checks"] = "; ".join(dict.fromkeys(filter(None, of_defence["failed_checks"])))
        found.append({**dict.fromkeys(map(str, measured.columns), math.nan), **figures, **named})
    return found


def uncertain_rows(
    intervals: pd.DataFrame, differences: pd.DataFrame, unreliable: Set[tuple[str, str, str]] = frozenset()
) -> list[tuple[str, ...]]:
    """Success rates, and what each defence takes off, with their intervals, as text: one row for each cell.

    Args:
        intervals: of ``statistics.intervals``.
        differences: of ``statistics.paired_differences``, the success rate among its figures.
        unreliable: (model, attack, defence) of the cells with a failed check, ``Results.unreliable``; they are marked.

    Returns:
        (model, attack, defence, success in percent, its interval, gain in points, its interval, corrected p-value).
    """
    gains = {
        (row["model"], row["attack"], row["defence"]): row
        for row in _rows(differences)
        if row["figure"] == "success"
    }  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for row in _rows(intervals):
        cell = (row["model"], row["attack"], row["defence"])
        success = percent(row["success"]), f"{percent(row['success_low'])}–{percent(row['success_high'])}"
        gained: tuple[str, ...] = ("", "", "")
        if cell in gains:
            found = gains[cell]
            # a difference is the defence's figure less the other one, a gain the other way round
            between = f"{percent(-found['high'])}–{percent(-found['low'])}"
            gained = percent(-found["difference"]), between, f"{found['p_holm']:.2g}"
        mark = f" ({UNRELIABLE})" if cell in unreliable else ""
        rows.append((*cell[:2], cell[2] + mark, *success, *gained))
    return rows


def verdict_rows(verdicts: pd.DataFrame) -> list[tuple[str, ...]]:
    """What the checks of a run found, as text.

    Args:
        verdicts: ``Results.verdict_table()``.

    Returns:
        (model, defence, attack, check, "yes", "NO" or "—", detail).
    """
    told = {True: "yes", False: "NO"}
    named = ("model", "defence", "attack", "check")
    return [
        (*(str(row[name]) for name in named), told.get(row["passed"], "—"), str(row["detail"]))
        for row in _rows(verdicts)
    ]


def percent(value: float | None) -> str:
    """A share in percent with one decimal; a dash where there is none."""
    return "—" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def gain(drop: float, defence: str) -> str:
    """How many points a defence takes off, as ``rich`` markup."""
    if defence == "none" or math.isnan(drop):
        return ""
    points = round(100 * drop, 1)
    if points == 0:
        return "= 0.0"
    return f"[green]▼ {points:.1f}[/green]" if points > 0 else f"[red]▲ {-points:.1f}[/red]"


# ------------------------------------------------------------------------------------------------------------ details


def _judged(frame: pd.DataFrame) -> pd.DataFrame:
    """The summary with its column of failed checks, also where nothing was checked."""
    return frame if "failed_checks" in frame else frame.assign(failed_checks="")


def _marked(row: Row) -> str:
    """The defence, and under it whether its numbers are unreliable, as ``rich`` markup."""
    from rich.markup import escape

    name = escape(str(row["defence"]))
    return f"{name}\n[bold red]{UNRELIABLE}[/bold red]" if row["failed_checks"] else name


def _mark_width(frame: pd.DataFrame) -> int:
    return len(UNRELIABLE) if frame["failed_checks"].any() else 0


def _turned(frame: pd.DataFrame) -> bool:
    attacks = frame["attack"].nunique()
    return bool(attacks >= _MANY and attacks > frame["model"].nunique())


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _aiming(frame: pd.DataFrame) -> set[str]:
    """The attacks that have a target."""
    return {row["attack"] for row in _rows(frame) if not math.isnan(row["target_miou"])}


def _groups(frame: pd.DataFrame, aiming: Set[str]) -> list[list[dict[str, Any]]]:
    """Rows whose success rates may be averaged: of attacks that may change the same and that all aim, or all do not.

    A defence that does not apply to the model has none.
    """
    from attacks.catalogue import attacks

    known = attacks()
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    rows = _rows(frame)
    applicable = {row["defence"] for row in rows if not row["note"]}
    for row in rows:
        if row["defence"] not in applicable:
            continue
        name = split_name(row["attack"])[0]
        threat = known[name].threat if name in known else ""
        groups.setdefault((threat, row["attack"] in aiming), []).append(row)
    return list(groups.values())


def _tables_by_attack(frame: pd.DataFrame) -> Iterator[Table]:
    from rich.markup import escape

    widths = {name: max((len(str(value)) for value in frame[name]), default=0) for name in ("model", "defence")}
    several = frame["images"][frame["images"] > 0].nunique() > 1
    for attack, of_attack in frame.groupby("attack", sort=False):
        rows = _rows(of_attack)
        table = _empty(f"attack: {attack}{_took(rows)}")
        table.add_column("model", min_width=min(widths["model"], 14), overflow="fold")
        defence = max(min(widths["defence"], 8), _mark_width(frame))
        table.add_column("defence", min_width=defence, overflow="fold")
        for _, heading, width in _BY_ATTACK:
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        if several:
            table.add_column("images", justify="right", no_wrap=True)
        shown = ""
        for row in rows:
            name, shown = ("" if row["model"] == shown else row["model"]), row["model"]
            cells = [_cell(column, row) for column, _, _ in _BY_ATTACK]
            images = [str(row["images"]) if row["images"] else "—"] if several else []
            table.add_row(escape(name), _marked(row), *cells, *images)
        yield table


def _tables_by_model(frame: pd.DataFrame) -> Iterator[Table]:
    from rich.markup import escape

    for model, of_model in frame.groupby("model", sort=False):
        rows = _rows(of_model)
        table = _empty(f"model: {model}{_clean(rows)}")
        table.add_column("attack", overflow="fold", max_width=20)
        table.add_column("defence", overflow="fold", min_width=max(4, _mark_width(frame)))
        for _, heading, width in _BY_MODEL:
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        for group in _groups(of_model, _aiming(frame)):
            shown = ""
            for row in (*group, *means(group)):
                name, shown = ("" if row["attack"] == shown else row["attack"]), row["attack"]
                style = "italic" if name.startswith("mean of") else None
                cells = [_cell(column, row) for column, _, _ in _BY_MODEL]
                table.add_row(escape(name), _marked(row), *cells, style=style)
            table.add_section()
        yield table


def _empty(title: str) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", title_style="bold", padding=0)


def _cell(column: str, row: Row) -> str:
    if column == "success_drop":
        return "n/a" if row["note"] else gain(row[column], row["defence"])
    text = _number(column, row[column])
    return f"[bold]{text}[/bold]" if column == "success" else text


def _shown(row: Row) -> Row:
    """The row as it is shown: no defence takes nothing off, rather than 0."""
    return {**row, "success_drop": math.nan} if row["defence"] == "none" else row


def _number(column: str, value: float) -> str:
    if column not in _COSTS:
        return percent(value)
    if value is None or math.isnan(value):
        return "—"
    return f"{value:.1f}" if column == "seconds" and value < 100 else f"{value:.0f}"


def _took(rows: Sequence[Row]) -> str:
    """What the attack takes on an undefended model: of the first model, since the next one takes the same passes."""
    row = next((row for row in rows if row["defence"] == "none" and not row["note"]), None)
    if row is None or any(math.isnan(row[name]) for name in _COSTS):
        return ""
    steps, forwards, backwards, seconds = (_number(name, row[name]) for name in _COSTS)
    return f" ({steps} steps, {forwards} forwards, {backwards} backwards, {seconds} s an image)"


def _clean(rows: Sequence[Row]) -> str:
    """Clean mIoU under each defence, which no attack changes."""
    found = dict.fromkeys((row["defence"] for row in rows), "n/a")
    found |= {row["defence"]: percent(row["clean_miou"]) for row in rows if not row["note"]}
    return f" (clean mIoU: {', '.join(f'{name} {value}' for name, value in found.items())})"


def _defence(row: Row) -> str:
    return row["defence"] + (" (n/a)" if row["note"] else "") + (f" **{UNRELIABLE}**" if row["failed_checks"] else "")


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * left + " ---: |" * (len(headings) - left)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _caption(frame: pd.DataFrame, turned: bool) -> list[str]:
    """What a newcomer needs to read the table, and nothing that is not in this one."""
    counts = {int(n) for n in frame["images"] if n}
    rows = [row for row in _rows(frame) if not row["note"]]
    defended = any(not math.isnan(row[f"{variant}_success"]) for row in rows for variant in ("adaptive", "transfer"))
    lines = [
        f"{counts.pop()} images. All numbers are %." if len(counts) == 1 else "All numbers are %.",
        "" if turned else "mIoU clean: without attack; adv: under the worst attack.",
        "fooled: pixels that the model takes for the attacker's target class / pixels with a target; low is robust.",
        "  (For an attack without a target: pixels predicted wrong / pixels.)"
        if any(math.isnan(row["target_miou"]) for row in rows)
        else "",
        "  none: no attack. plain: the attack does not know the defence." if defended else "",
        "  adapt: adaptive, it does. trans: transfer, its patch was made on the undefended model." if defended else "",
        "  worst: the strongest of these on each image. gain: ▼ fewer pixels fooled than without defence."
        if defended
        else "",
        "cost: forward passes and seconds for each image, over all of these." if turned else "",
    ]
    return [line for line in lines if line]
