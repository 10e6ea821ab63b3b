"""Patches tested where they were not made: on other models, and on frames that they have not seen.

What an attack made is an attack itself, one that lays down what it is given (`Replay`). So everything here is counted
by `evaluate`: the same pixels, the same target, the same draws.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attacks.ensemble import ensemble
from attacks.patch import Patch
from attacks.streams import stream
from attacks.universal import UniversalPatchAttack
from evaluation.changes import Changes
from evaluation.contact import target_map, with_options
from evaluation.datasets import load_data
from evaluation.experiment import CHUNK, evaluate
from evaluation.files import write_whole
from evaluation.fingerprints import data_fingerprint, identity
from evaluation.frames import Frame, SegmentationData
from evaluation.given import AttackFactory, chosen_images, named_attacks, named_segmenters
from evaluation.launched import launched
from evaluation.metrics import Region
from evaluation.results import Results, Skipped
from evaluation.store import NONE, Cell, Store
from evaluation.tables import percent
from evaluation.threads import keep_threads
from ramdefense.processes import from_first, group
from ramdefense.segmenter import PyTorchSegmenter

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from rich.console import Group

Pasted = tuple["NDArray[np.float32]", "NDArray[np.bool_] | None"]
Paste = Callable[["NDArray[np.float32]", Sequence[int]], Pasted]

#: The row of a table in which nothing is attacked.
NO_PATCH = "no patch"


@dataclass(frozen=True)
class Replay:
    """Factory of an attack that is made already: it lays down what it is given, and aims where the original did.

    Args:
        paste: images (N, C, H, W) and their numbers in the data set → adversarial images, and the pixels that the
            attack might have changed, (N, H, W), or None for all.
        original: the attack, for its target map alone.
        identity: what decides it, for the configuration of a run.
    """

    paste: Paste
    original: Any
    identity: str

    def __call__(self, segmenter: PyTorchSegmenter) -> _Replayed:
        return _Replayed(self.paste, self.original)


class _Replayed:
    def __init__(self, paste: Paste, original: Any) -> None:
        self._paste, self._original = paste, original
        self._mask: NDArray[np.bool_] | None = None
        self.targeted = bool(getattr(original, "targeted", False))

    def generate(self, x: NDArray[np.float32], y: Any = None, *, images: Sequence[int]) -> NDArray[np.float32]:
        adversarial, self._mask = self._paste(x, images)
        return adversarial

    def mask(self, x: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The mask of the images of the last `generate`."""
        return np.ones((len(x), *x.shape[-2:]), dtype=bool) if self._mask is None else self._mask

    def target_map(self, y: NDArray[np.int64], images: Sequence[int]) -> NDArray[np.int64] | None:
        return target_map(self._original, y, images)


# ------------------------------------------------------------------------------------------------- to other models


def transfer(
    models: str | PyTorchSegmenter | Sequence[str | PyTorchSegmenter] | Mapping[str, PyTorchSegmenter],
    attack: str | Mapping[str, AttackFactory] = "permute",
    data: str | SegmentationData = "scenes",
    *,
    ensembles: bool = False,
    images: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    region: Region = "outside",
    out: str | Path | None = None,
    verbose: bool = True,
    device_type: str | None = None,
    **attack_options: Any,
) -> Transfer:
    """Make adversarial images on every model, and test them on every model.

    Args:
        models: as ``evaluate`` takes them, all of the data's classes.
        attack: one name, or name → factory.
        data, images, size, batch_size, seed, region, verbose, device_type, attack_options: as ``evaluate``.
        ensembles: for each model, make them on all the *others* at once, too (`attacks.ensemble.ensemble`).
        out: folder; the patches (``made``), the rows (``tested``) and ``transfer.csv`` are written there, and the same
            call again goes on from there.

    Returns:
        The matrix; what was finished, if the run was interrupted from the keyboard.

    Raises:
        ValueError: as ``evaluate``, several attacks, or ensembles of fewer than three models.
        FileNotFoundError: files that are not there.
    """
    launched(out, device_type)
    name, factory = _one(attack)
    frames = load_data(data, size=size) if isinstance(data, str) else data
    indices = chosen_images(images, len(frames))
    segmenters = named_segmenters(models, frames, indices[0], device_type)
    sources = dict(segmenters)
    if ensembles:
        if len(segmenters) < 3:
            raise ValueError(f"ensembles of the other models: there are {len(segmenters)}; at least 3")
        for left_out in segmenters:
            sources[f"all but {left_out}"] = ensemble([s for n, s in segmenters.items() if n != left_out])
    options = {key: value for key, value in attack_options.items() if value is not None}
    common: dict[str, Any] = {
        "images": images, "size": size, "batch_size": batch_size, "seed": seed, "region": region, "verbose": verbose,
        "checks": False,  # of a defence there is none here
        "report": False,
    }  # fmt: skip
    with nullcontext(out) if out is not None else tempfile.TemporaryDirectory() as folder:
        made = evaluate(sources, {name: factory}, NONE, data, out=Path(folder) / "made", **common, **options)
        variants = {record.model: record.variant for record in made.records}  # the last one: adaptive, if there is one
        if made.interrupted or not variants:
            return Transfer(name, Results([], frames.classes, interrupted=made.interrupted), made.skipped)
        store = Store(Path(folder) / "made", frames.classes)
        original = with_options(name, factory, {**options, "seed": seed, "batch_size": batch_size, "verbose": False})
        replays = {
            source: Replay(
                _from_store(store, Cell(source, NONE, name, variant, 0), indices),
                original(sources[source]),
                f"{identity(factory)} on {source}",
            )
            for source, variant in variants.items()
        }
        tested = evaluate(segmenters, replays, NONE, data, out=None if out is None else Path(out) / "tested", **common)
    result = Transfer(name, tested, made.skipped)
    if out is not None and tested.records:
        write_whole(Path(out) / "transfer.csv", result.frame().to_csv(index=False))
    return result


def _from_store(store: Store, cell: Cell, indices: Sequence[int]) -> Paste:
    """What a run has stored, laid on the images again."""
    place = {image: position for position, image in enumerate(indices)}

    @functools.lru_cache(maxsize=1)
    def changes(chunk: int) -> Changes:
        return store.changes(Cell(cell.model, cell.defence, cell.attack, cell.variant, chunk))

    def paste(x: NDArray[np.float32], images: Sequence[int]) -> Pasted:
        pasted: list[Pasted] = []
        for row, image in enumerate(images):
            position = place[image]
            at = position % CHUNK
            pasted.append(changes(position - at).paste(x[row : row + 1], slice(at, at + 1)))
        masks = [mask for _, mask in pasted if mask is not None]
        return np.concatenate([one for one, _ in pasted]), np.concatenate(masks) if masks else None

    return paste


@dataclass(eq=False)
class Transfer:
    """What adversarial images made on one model do to another.

    Attributes:
        attack: its name.
        results: of the test; in them ``model`` is the model tested on, and ``attack`` the one made on.
        skipped: models that the attack does not apply to, and why.
    """

    attack: str
    results: Results
    skipped: Sequence[Skipped] = ()

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped; what was finished is here."""
        return self.results.interrupted

    def frame(self) -> pd.DataFrame:
        """One row for each pair; shares from 0 to 1, as in ``Results.summary``.

        Columns:
            made_on, tested_on, images, success, clean_success (of the model tested on, without a patch, by the same
            target and on the same pixels), adversarial_miou, clean_miou.
        """
        table = self.results.summary().rename(columns={"model": "tested_on", "attack": "made_on"})
        columns = [
            "made_on", "tested_on", "images", "success", "clean_success", "adversarial_miou", "clean_miou",
        ]  # fmt: skip
        return table[columns].reset_index(drop=True)

    def matrix(self) -> pd.DataFrame:
        """Success rates: a row for each model made on, after one without a patch; a column for each tested on."""
        import pandas as pd

        frame = self.frame()
        made_on, tested_on = (list(dict.fromkeys(frame[axis])) for axis in ("made_on", "tested_on"))
        cells = frame.pivot(index="made_on", columns="tested_on", values="success").reindex(made_on, columns=tested_on)
        own = frame.groupby("tested_on")["clean_success"].first().reindex(tested_on)
        return pd.concat([own.to_frame(NO_PATCH).T, cells])

    def table(self) -> Group:
        """The matrix for the screen (``rich``), in percent."""
        matrix = self.matrix()
        shared = _shared_start(list(matrix.columns))
        caption = (
            "% of the pixels fooled; low is robust. Row: the model that the patch was made\n"
            "on. Column: the one that it is tested on. Bold: the same.\n"
            f"{NO_PATCH}: on target, or wrong where there is no target, without any attack."
        )
        rows = [
            (
                str(made_on).replace(shared, ""),
                [_percent(value, bold=made_on == tested_on) for tested_on, value in cells.items()],
            )
            for made_on, cells in matrix.iterrows()
        ]
        notes = [f"{s.attack or s.defence} does not apply to {s.model}: {s.reason}" for s in self.skipped]
        title = f"attack: {self.attack}" + (f", models: {shared}…" if shared else "")
        columns = [name.removeprefix(shared) for name in matrix.columns]
        return _table(title, "made on", columns, rows, "\n".join([caption, *notes]))

    def to_csv(self, path: str | Path) -> None:
        """Write ``frame`` as CSV."""
        write_whole(Path(path), self.frame().to_csv(index=False))


# ------------------------------------------------------------------------------------------------ to unseen frames


def universal(
    model: str | PyTorchSegmenter,
    train: str | SegmentationData,
    test: str | SegmentationData,
    attack: str | Mapping[str, AttackFactory] = "untargeted",
    *,
    images: int | Sequence[int] | None = None,
    test_images: int | Sequence[int] | None = None,
    epochs: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    region: Region = "outside",
    out: str | Path | None = None,
    verbose: bool = True,
    device_type: str | None = None,
    **attack_options: Any,
) -> Universal:
    """Make one patch for all frames of a data set, and test it on others, beside a random and a mid-grey patch.

    Several processes (torchrun, `srun`) share each mini-batch of the fit, and the cells of the test.

    Args:
        model: a name, or a segmenter.
        train: data that the patch is made on.
        test: data that it is tested on; not one of its frames may be among those of ``train``.
        attack: name of a patch attack, or name → factory, whose options the patch is made with
            (`attacks.universal.UniversalPatchAttack`).
        images, test_images: how many frames of each, spread evenly, or which; ``None``: all.
        epochs: passes over ``train``, in place of ``max_iter`` steps.
        size, seed, region, verbose, device_type, attack_options: as ``evaluate``.
        batch_size: frames in a step, and images tested at once.
        out: folder; ``patch.safetensors``, the fit as far as it is (``fit.safetensors``) and the rows of the test
            (``tested``) are written there, and the same call again goes on from there.

    Raises:
        ValueError: as ``evaluate``, an attack that makes no patch, or frames that are in both sets.
        FileNotFoundError: files that are not there.
    """
    launch = launched(out, device_type)
    name, factory = _one(attack)
    seen, unseen = (load_data(data, size=size) if isinstance(data, str) else data for data in (train, test))
    numbers, test_numbers = chosen_images(images, len(seen)), chosen_images(test_images, len(unseen))
    ((label, segmenter),) = named_segmenters([model], unseen, test_numbers[0], device_type).items()
    if list(seen.classes) != list(unseen.classes):
        raise ValueError(f"train has the classes {list(seen.classes)[:3]}, …, test {list(unseen.classes)[:3]}, …")
    options = {key: value for key, value in attack_options.items() if value is not None}
    given = {**options, "seed": seed, "batch_size": batch_size, "verbose": verbose}
    original = with_options(name, factory, given)(segmenter)
    try:
        fitted = UniversalPatchAttack.like(original)
    except TypeError as error:
        raise ValueError(f"attack {name!r}: {error}") from error
    _check_apart(seen, numbers, unseen, test_numbers)
    folder = None if out is None else Path(out)
    with group(launch, "cpu" if segmenter.device.type == "cpu" else "gpu"):
        if folder is not None:
            from_first(lambda: keep_threads(folder))
            keep_threads(folder)
        fitted.fit(_Subset(seen, numbers), epochs=epochs, resume=None if folder is None else folder / "fit.safetensors")
    assert fitted.patch is not None
    if folder is not None and launch.rank == 0:
        fitted.patch.save(folder / "patch.safetensors")
    replays = {
        kind: Replay(_everywhere(patch), original, f"{kind} patch, {identity(factory)}, {_digest(patch)}")
        for kind, patch in _patches(fitted.patch, segmenter.clip_values, seed).items()
    }
    results = evaluate(
        {label: segmenter}, replays, NONE, test, images=test_images, size=size, batch_size=batch_size, seed=seed,
        region=region, verbose=verbose, checks=False, report=False, out=None if folder is None else folder / "tested",
    )  # fmt: skip
    return Universal(fitted, results)


@dataclass(eq=False)
class Universal:
    """A patch for all frames, and what it does to others than those it was made on.

    Attributes:
        attack: fitted: its ``patch``, and the ``result`` of the fit.
        results: of the test, with the attacks ``universal``, ``random`` and ``grey``.
    """

    attack: UniversalPatchAttack
    results: Results

    def successes(self) -> dict[str, float]:
        """Success rate on the test frames by patch, first without one."""
        rows = self.results.summary().to_dict("records")
        return {NO_PATCH: rows[0]["clean_success"]} | {row["attack"]: row["success"] for row in rows}

    def table(self) -> Group:
        """The success rates for the screen (``rich``), in percent."""
        images = len({record.image for record in self.results.records})
        rows = [(kind, [_percent(value)]) for kind, value in self.successes().items()]
        caption = (
            f"{images} frames that the patch has not seen. fooled: % of the pixels; low is robust.\n"
            f"{NO_PATCH}: on target, or wrong where there is no target, without any attack.\n"
            "grey: mid-grey."
        )
        return _table("one patch for all frames", "patch", ["fooled"], rows, caption)


@dataclass(frozen=True)
class _Subset:
    data: SegmentationData
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Frame:
        return self.data[self.numbers[index]]


def _check_apart(
    seen: SegmentationData, numbers: Sequence[int], unseen: SegmentationData, test_numbers: Sequence[int]
) -> None:
    """A patch that is tested on what it was made on shows nothing; frames are compared by what is in them."""
    train = {data_fingerprint(seen, [number]) for number in numbers}
    both = [number for number in test_numbers if data_fingerprint(unseen, [number]) in train]
    if both:
        raise ValueError(f"{len(both)} of {len(test_numbers)} test frames are among the train frames, e.g. {both[0]}")


def _patches(made: Patch, clip_values: tuple[float, float], seed: int) -> dict[str, Patch]:
    """The patch, one of random pixels, and a mid-grey one, of the same shape in the same place."""
    low, high = clip_values
    noise = torch.rand(made.pixels.shape, generator=stream(seed, "random patch"))
    pixels = {
        "grey": torch.full_like(made.pixels, (low + high) / 2),
        "random": (low + (high - low) * noise).to(made.pixels),
        "universal": made.pixels,
    }
    return {kind: Patch(values, made.location, made.alpha) for kind, values in pixels.items()}


def _everywhere(patch: Patch) -> Paste:
    """One patch on every image."""

    def paste(x: NDArray[np.float32], images: Sequence[int]) -> Pasted:
        return patch.paste(x), patch.mask((x.shape[-2], x.shape[-1])).numpy()[None].repeat(len(x), 0)

    return paste


def _digest(patch: Patch) -> str:
    import hashlib

    return hashlib.sha256(patch.pixels.numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- shared


def _one(attack: str | Mapping[str, AttackFactory]) -> tuple[str, AttackFactory]:
    factories = named_attacks(attack)
    if len(factories) != 1:
        raise ValueError(f"{len(factories)} attacks ({', '.join(factories)}); exactly one")
    return next(iter(factories.items()))


def _shared_start(names: Sequence[str]) -> str:
    """What all names begin with, up to a separator: said once, it leaves room for what tells them apart."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in alike) if len(names) > 1 else ""
    return shared[: max(shared.rfind(separator) for separator in ":-/") + 1]


def _percent(value: float, *, bold: bool = False) -> str:
    return f"[bold]{percent(value)}[/bold]" if bold else percent(value)


def _table(title: str, first: str, columns: list[str], rows: list[tuple[str, list[str]]], caption: str) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    for name, cells in rows:
        table.add_row(Text(name), *cells)
    # around the table, not in it: a narrow one would break the lines
    return Group(Text(title, style="bold"), table, Text(caption, style="dim"))
