"""Which setting of a defence to take: clean mIoU against mIoU under attack over a sweep, the best within a budget."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from evaluation.cleanly import Margins, clean_miou, kept_counts, lost_miou
from evaluation.contact import takes
from evaluation.datasets import load_data
from evaluation.files import remove_leftovers, write_figure, write_whole
from evaluation.fingerprints import identity
from evaluation.frames import SegmentationData
from evaluation.given import (
    AttackFactory,
    DefenceFunction,
    chosen_images,
    chosen_seeds,
    named_attacks,
    named_segmenters,
)
from evaluation.metrics import Region
from evaluation.points import POINTS, Points, Setting, check_place
from evaluation.progress import progress_bar
from evaluation.store import NONE, file_name
from evaluation.survey import survey
from evaluation.tables import percent
from evaluation.variations import as_multiple, multiple, number, options_of, plain, probability, spelled, varied
from ramdefense.defences import defence as defence_by_name
from ramdefense.names import split_name
from ramdefense.segmenter import PyTorchSegmenter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ATTENTION = ("1/N", "3/N", "5/N", "16/N", "64/N")
DROP_PROBABILITY = (0.0, 0.1, 0.3)
VARIANTS = ("cap",)
COLUMNS = (
    "model", "attack", "variant", "max_attention", "drop_probability", "clean_miou", "robust_miou", "success", "images",
    "pareto", "chosen",
)  # fmt: skip
#: Of the table of costs: what each setting takes off clean mIoU, with its interval, and on how many images.
COST_COLUMNS = ("variant", "max_attention", "drop_probability", "cost", "cost_low", "cost_high", "images")

_SAME = 1e-9  # points; a cost that is this little over the budget is the budget
_EFFORT = 5.0  # of attacking a defence in three ways, in units of attacking none


@dataclass(frozen=True)
class Option:
    """One setting of a defence.

    Args:
        variant: how attention is suppressed; ``"none"`` is the undefended model.
        multiple: k, where T = k/N.
        dropout: p.
    """

    variant: str = NONE
    multiple: float = math.nan
    dropout: float = math.nan

    @property
    def options(self) -> dict[str, Any]:
        """Of the defence."""
        if self.variant == NONE:
            return {}
        return {
            "suppression": self.variant, "max_attention": as_multiple(self.multiple), "dropout": plain(self.dropout),
        }  # fmt: skip

    @property
    def row(self) -> dict[str, Any]:
        """Its columns in a table."""
        bound = "" if self.variant == NONE else as_multiple(self.multiple)
        return {"variant": self.variant, "max_attention": bound, "drop_probability": self.dropout}

    def __str__(self) -> str:
        if self.variant == NONE:
            return "no defence"
        return f"{self.variant}, T = {as_multiple(self.multiple)}, p = {number(self.dropout)}"


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a sweep found.

    Attributes:
        model, attack: their names.
        base: name of the defence whose options were swept.
        budget: points of clean mIoU that the choice may cost.
        best: options of the defence that were chosen, for ``RAMDefense(segmenter, **best)``; None: no setting within
            the budget beats the undefended model.
        table: one row for each setting, the undefended model first, with the columns of ``COLUMNS``; shares from 0 to
            1. ``images``: that were attacked; 0, and NaN figures, for a setting that was not attacked. ``pareto``:
            no other attacked setting has as much of both and more of one.
        costs: for the same settings what they take off clean mIoU, with the columns of ``COST_COLUMNS``; NaN ends
            where one image is all there is.
    """

    model: str
    attack: str
    base: str
    budget: float
    best: dict[str, Any] | None
    table: pd.DataFrame
    costs: pd.DataFrame

    @property
    def name(self) -> str:
        """The chosen defence, as ``--defence`` and ``ramdefense.defences.defence`` take it."""
        if self.best is None:
            return NONE
        base, given = split_name(self.base)
        return spelled(base, {**given, **self.best})

    @property
    def defence(self) -> DefenceFunction:
        """The chosen defence: segmenter → segmenter."""
        if self.best is None:
            return defence_by_name(NONE)
        base, given = split_name(self.base)
        return functools.partial(defence_by_name(base), **{**given, **self.best})

    def rows(self) -> list[tuple[str, ...]]:
        """For the screen: setting (→ the chosen one), clean mIoU, cost, its interval, robust mIoU, fooled, front."""
        shown: list[tuple[str, ...]] = []
        for row, cost in zip(self.table.to_dict("records"), self.costs.to_dict("records"), strict=True):
            undefended = row["variant"] == NONE
            p = "" if undefended else number(row["drop_probability"])
            ends = "" if undefended else f"{_points(cost['cost_low'])}…{_points(cost['cost_high'])}"
            variant = f"→ {row['variant']}" if row["chosen"] else row["variant"]
            figures = (percent(row["robust_miou"]), percent(row["success"]))
            lost = "" if undefended else _points(cost["cost"])
            front = "front" if row["pareto"] else ""
            shown.append((variant, row["max_attention"], p, percent(row["clean_miou"]), lost, ends, *figures, front))
        return shown

    def sentences(self) -> Iterator[str]:
        """What was chosen, how sure that is, and how to use it."""
        rows, costs = self.table.to_dict("records"), self.costs.to_dict("records")
        (at,) = np.flatnonzero(self.table["chosen"])
        none, row, cost = rows[0], rows[at], costs[at]
        judged = f"{cost['images']} image{'s' if cost['images'] != 1 else ''}"
        within = sum(_affordable(c["cost"], self.budget) for c in costs[1:])
        yield (
            f"Within a budget of {self.budget:g} point{'s' if self.budget != 1 else ''} of clean mIoU, measured on "
            f"{judged}: {within} of {len(rows) - 1} settings."
        )
        if self.best is None:
            why = "none is within the budget" if not within else "none of those has a higher mIoU under attack"
            yield f"No setting beats the undefended model: {why}. Chosen: no defence."
        else:
            chosen = f"{row['variant']}, T = {row['max_attention']}, p = {number(row['drop_probability'])}"
            yield (
                f"Chosen: {chosen}. mIoU under {self.attack} {percent(none['robust_miou'])} % without it, "
                f"{percent(row['robust_miou'])} % with it; clean mIoU {percent(none['clean_miou'])} % and "
                f"{percent(row['clean_miou'])} %."
            )
            unsure = _unsure(cost, self.budget)
            if unsure:
                yield unsure
        yield (
            f"The choice was made on these images ({row['images']} of them attacked), so the figure under attack of "
            "what was chosen is optimistic: measure it on others."
        )
        if self.best is not None:
            yield f"Use it: --defence {self.name}"
            base, given = split_name(self.base)
            made = ", ".join(f"{option}={value!r}" for option, value in {**given, **self.best}.items())
            maker = "RAMDefense(segmenter, " if base == "ram" else f'defence("{base}")(segmenter, '
            yield f"Python: {maker}{made})"

    def figure(self) -> Figure:
        """Clean mIoU against mIoU under attack, the Pareto front, and the budget."""
        from evaluation.tuning_figure import tuning_figure

        return tuning_figure(self.table, self.budget, title=f"{self.model}, {self.attack}")


def _points(share: float) -> str:
    """A difference of shares in points."""
    return "—" if math.isnan(share) else f"{round(100 * share, 1) + 0.0:.1f}"  # + 0: no -0.0


def _affordable(cost: float, budget: float) -> bool:
    return 100 * cost <= budget + _SAME


def _unsure(cost: Mapping[Hashable, Any], budget: float) -> str:
    """A warning where the images cannot tell that the budget is kept."""
    images = f"{cost['images']} image{'s' if cost['images'] != 1 else ''}"
    if math.isnan(cost["cost_high"]):
        return f"Its cost rests on {images}: whether it keeps to the budget on others is not known."
    if _affordable(cost["cost_high"], budget):
        return ""
    return (
        f"Its cost, {_points(cost['cost'])} points, is only known to lie between {_points(cost['cost_low'])} and "
        f"{_points(cost['cost_high'])} (95 % interval, {images}): too few to tell that it keeps to the budget."
    )


def tune(
    model: str | PyTorchSegmenter | Mapping[str, PyTorchSegmenter],
    data: str | SegmentationData,
    budget: float = 1.0,
    *,
    attack: str | Mapping[str, AttackFactory] = "strip",
    defence: str = "ram",
    variants: Sequence[str] = VARIANTS,
    max_attention: Sequence[str] = MAX_ATTENTION,
    drop_probability: Sequence[float] = DROP_PROBABILITY,
    images: int | Sequence[int] | None = None,
    clean_images: int | Sequence[int] | None = None,
    attack_all: bool = False,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    region: Region = "outside",
    out: str | Path | None = None,
    verbose: bool = True,
    patch_shape: tuple[int, int] | None = None,
    max_iter: int | None = None,
    device_type: str | None = None,
    **attack_options: Any,
) -> Tuned:
    """Sweep the options of a defence, and take the best that costs at most so much clean mIoU.

    Clean mIoU of all settings comes first, a forward pass each. Those within the budget are then attacked, plainly,
    adaptively and with the patch made on the undefended model, the most successful for each image, as ``evaluate``
    does; the best has the highest mIoU under that attack. Of equals the one with the higher clean mIoU, then the weaker
    change: no defence, or else the larger T, then the smaller p, then the variant named first.

    Args:
        model: a name, a segmenter, or name → segmenter; one.
        data: a name for ``load_data`` or a data set.
        budget: points of clean mIoU, on the same images without defence, that the choice may cost.
        attack: a name, or name → factory; one.
        defence: a name; its options ``suppression``, ``max_attention`` and ``dropout`` are swept.
        variants, max_attention, drop_probability: their values. T in multiples of 1/N, as ``"3/N"``.
        images: which are attacked, as ``evaluate`` takes them.
        clean_images: which clean mIoU is measured on, likewise; None: all.
        attack_all: attack what is over the budget, too, so that the Pareto front is whole.
        out: folder, maybe that of a run; ``tune.csv``, ``tune-costs.csv``, ``tune.png`` and the points are written
            there, and the same call again, or one with other values, goes on from there.
        size, batch_size, seed, region, verbose, patch_shape, max_iter, device_type, attack_options: as ``evaluate``.

    Raises:
        ValueError: before any work: a budget below 0, several models or attacks, no value or one that is none, an
            option that the attack or the defence lacks, or (NotApplicableError) a model that the defence has no meaning
            on; and as ``evaluate``.
        FileNotFoundError: files that are not there.
        KeyboardInterrupt: interrupted; what was finished is in the folder.
    """
    if isinstance(budget, bool) or not 0 <= budget < math.inf:
        raise ValueError(f"budget={budget}: points of clean mIoU, 0 or more")
    settings = _settings(variants, max_attention, drop_probability)
    functions = {setting: _function(defence, setting) for setting in settings}
    factories = named_attacks(attack)
    if len(factories) != 1:
        raise ValueError(f"{len(factories)} attacks ({', '.join(factories)}): a choice is made against one")
    ((attack_name, factory),) = factories.items()
    options = {name: value for name, value in attack_options.items() if value is not None}
    given = {**options, "patch_shape": patch_shape, "max_iter": max_iter}
    lacking = [name for name, value in given.items() if value is not None and not takes(factory, name)]
    if lacking:
        raise ValueError(f"option {lacking[0]!r}: attack {attack_name!r} does not have it, or leaves it not open")
    chosen_seeds(seed)
    frames = load_data(data, size=size) if isinstance(data, str) else data
    attacked, clean_on = chosen_images(images, len(frames)), chosen_images(clean_images, len(frames))
    segmenters = named_segmenters(model, frames, attacked[0], device_type)
    if len(segmenters) != 1:
        raise ValueError(f"{len(segmenters)} models ({', '.join(segmenters)}): a choice is made for one")
    ((model_name, segmenter),) = segmenters.items()
    attacking = Setting(patch_shape, max_iter)
    check_place([attacking], options, frames, attacked[0])
    functions[settings[-1]][1](segmenter)  # raises where the defence has no meaning on the model
    common: dict[str, Any] = {
        "images": images, "size": size, "batch_size": batch_size, "seed": seed, "region": region,
        "device_type": device_type,
    }  # fmt: skip
    place_of_points = nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory()
    steps = max_iter or 100  # for the progress bar alone
    with (
        place_of_points as folder,
        progress_bar(verbose, len(settings) + steps * (1 + _EFFORT * len(settings))) as tick,
    ):
        remove_leftovers(Path(folder))
        fingerprint = survey(frames, clean_on, keep_going=False).fingerprint
        counts: dict[Option, Margins] = {}
        for setting in settings:
            name, function = functions[setting]
            counts[setting] = kept_counts(
                Path(folder) / POINTS / file_name(model_name) / "clean", name,
                {"defence": identity(function), "frames": fingerprint}, function(segmenter), frames, clean_on,
                batch_size,
            )  # fmt: skip
            tick(f"{model_name} · clean · {setting}", 1)
        costs = _costs(settings, counts, len(clean_on))
        wanted = {
            functions[setting][0]: functions[setting][1]
            for setting, cost in zip(settings, costs["cost"], strict=True)
            if setting.variant != NONE and (attack_all or _affordable(cost, budget))
        }
        left = _EFFORT * steps * (len(settings) - 1) / max(len(wanted), 1)
        results = Points(Path(folder), data, common, options).measure(
            (model_name, segmenter), (attack_name, factory), attacking, wanted,
            lambda run: tick(f"{model_name} · {attack_name} · {run}", steps if run == NONE else left),
        )  # fmt: skip
    if results.skipped:
        raise ValueError(f"nothing to tune: {results.skipped[0].reason}")
    measured = {row["defence"]: row for row in results.summary().to_dict("records")}
    rows = []
    for setting in settings:
        found = measured.get(functions[setting][0], {})
        rows.append(
            {"model": model_name, "attack": attack_name, **setting.row, "clean_miou": clean_miou(counts[setting]),
             "robust_miou": found.get("adversarial_miou", math.nan), "success": found.get("success", math.nan),
             "images": found.get("images", 0)}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    table["pareto"] = pareto(table["clean_miou"], table["robust_miou"])
    best = best_within(settings, table["clean_miou"], table["robust_miou"], costs["cost"], budget)
    table["chosen"] = [setting == best for setting in settings]
    result = Tuned(
        model_name, attack_name, defence, float(budget), best.options or None, table[list(COLUMNS)], costs
    )  # fmt: skip
    if out is not None:
        write_whole(Path(out) / "tune.csv", result.table.to_csv(index=False))
        write_whole(Path(out) / "tune-costs.csv", costs.to_csv(index=False))
        write_figure(Path(out) / "tune.png", result.figure())
    return result


def pareto(clean: ArrayLike, robust: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other one dominates, having at least as much of both and more of one; NaN points are none.

    Shape:
        twice ``(n,)``; returns the same.
    """
    one, two = np.asarray(clean, dtype=np.float64), np.asarray(robust, dtype=np.float64)
    at_least = (one[None] >= one[:, None]) & (two[None] >= two[:, None])
    more = (one[None] > one[:, None]) | (two[None] > two[:, None])
    known = ~(np.isnan(one) | np.isnan(two))
    return known & ~(at_least & more & known[None]).any(axis=1)


def best_within(
    settings: Sequence[Option], clean: ArrayLike, robust: ArrayLike, costs: ArrayLike, budget: float
) -> Option:
    """The setting to take, by the rule of ``tune``.

    Args:
        settings: no defence the first, which is always allowed.
        clean, robust: mIoU of each; NaN robust where it was not measured.
        costs: what each takes off clean mIoU, as a share.
        budget: in points.
    """
    columns = (np.asarray(values, dtype=np.float64) for values in (clean, robust, costs))
    ranked = []
    for place, (setting, before, after, cost) in enumerate(zip(settings, *columns, strict=True)):
        undefended = setting.variant == NONE
        if not undefended and (math.isnan(after) or not _affordable(float(cost), budget)):
            continue
        weak = (math.inf, 0.0) if undefended else (setting.multiple, -setting.dropout)
        ranked.append(((-math.inf if math.isnan(after) else after, before, *weak, -place), setting))
    return max(ranked, key=lambda one: one[0])[1]


def _settings(
    variants: Sequence[str], max_attention: Sequence[str], drop_probability: Sequence[float]
) -> list[Option]:
    """No defence, and every combination."""
    swept: dict[str, list[Any]] = {}
    chosen: dict[str, Any] = {
        "variants": variants, "max_attention": max_attention, "drop_probability": drop_probability,
    }  # fmt: skip
    for option, given in chosen.items():
        listed: list[Any] = [given] if isinstance(given, (str, float, int)) else list(given)
        if not listed:
            raise ValueError(f"{option}: no value given; at least one")
        if option == "max_attention":
            listed = [multiple(value, option) for value in listed]
        elif option == "drop_probability":
            listed = [probability(value, option) for value in listed]
        twice = [value for value in dict.fromkeys(listed) if listed.count(value) > 1]
        if twice:
            raise ValueError(f"{option}: {', '.join(map(str, twice))} given twice; once is enough")
        swept[option] = listed
    return [Option(), *(Option(*values) for values in itertools.product(*swept.values()))]


def _function(base: str, setting: Option) -> tuple[str, DefenceFunction]:
    """The defence of a setting, and its name."""
    if setting.variant == NONE:
        return NONE, defence_by_name(NONE)
    lacking = [option for option in setting.options if option not in options_of(base)]
    if lacking:
        raise ValueError(f"defence {base!r} has no option {lacking[0]!r}, so there is nothing to tune; take ram")
    return varied(base, **setting.options)


def _costs(settings: Sequence[Option], counts: Mapping[Option, Margins], images: int) -> pd.DataFrame:
    rows = []
    for setting in settings:
        lost = lost_miou(counts[settings[0]], counts[setting])
        ends = {"cost_low": float(lost.low[0]), "cost_high": float(lost.high[0])}
        rows.append({**setting.row, "cost": float(lost.estimate[0]), **ends, "images": images})
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))
