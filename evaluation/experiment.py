"""models × attacks × defences over a data set.

For each model the undefended segmenter comes first, then each defence. Against a defence an attack has up to three
variants, and a summary takes for each image the strongest: a defence beaten only by attacks that do not know it is
none.

- ``plain``: the attack as it is on any model (one draw of a random defence, no straight-through gradient).
- ``adaptive``: the attack by its own defaults, which average over draws and pass through what has no gradient. Left
  out where the defended model is deterministic and differentiable, since it would be the plain one again.
- ``transfer``: the patch that was made on the undefended model, pasted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.changes import Changes
from evaluation.checks import Checker, probed_batches
from evaluation.contact import check_promises, costs_of, generate, mask_of, takes, target_map
from evaluation.datasets import load_data
from evaluation.distance import count_rings
from evaluation.figures import Panel, save_figure
from evaluation.files import DamagedError
from evaluation.fingerprints import identity, model_fingerprint, plain_value, versions_of
from evaluation.frames import SegmentationData
from evaluation.given import (
    AttackFactory,
    DefenceFunction,
    chosen_images,
    chosen_seeds,
    named_attacks,
    named_defences,
    named_segmenters,
)
from evaluation.metrics import REGIONS, Region, confusion, counted_pixels
from evaluation.pictures import Picture, View, as_photo, chosen, rows_hash
from evaluation.progress import Tick, progress_bar
from evaluation.report import write_report
from evaluation.results import LeftOut, Record, Results, Skipped, worst
from evaluation.store import NONE, Cell, Store, file_name
from evaluation.survey import Survey, first_readable, read_batch, reason, survey
from ramdefense.segmenter import PyTorchSegmenter
from ramdefense.traits import NotApplicableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Images whose rows share a file: what an interrupted run loses at most. The rows do not depend on it.
CHUNK = 16
_PLAIN = {"defence_samples": 1, "straight_through": False}
#: About how long a variant takes, in units of the plain one: what the remaining time is estimated from.
_EFFORT = {"plain": 1.0, "adaptive": 4.0, "transfer": 0.05}


def evaluate(
    models: str | PyTorchSegmenter | Sequence[str | PyTorchSegmenter] | Mapping[str, PyTorchSegmenter],
    attacks: str | Sequence[str] | Mapping[str, AttackFactory] = ("permute", "strip"),
    defences: str | Sequence[str] | Mapping[str, DefenceFunction] = (NONE, "ram"),
    data: str | SegmentationData = "scenes",
    *,
    images: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    region: Region = "outside",
    out: str | Path | None = None,
    keep_going: bool = False,
    checks: bool = True,
    check_images: int = 2,
    verbose: bool = True,
    patch_shape: tuple[int, int] | None = None,
    max_iter: int | None = None,
    device_type: str | None = None,
    run_file: str | None = None,
    **attack_options: Any,
) -> Results:
    """Attack every model under every defence, and measure.

    Args:
        models: names (``evaluation.models.load_model``), segmenters, or name → segmenter.
        attacks: names (``attacks.attacks()``), which may carry options (``"apgd:target=strip"``), ``"all"`` for every
            one, ``"patch"`` or ``"pixel"`` for those of one threat, or name → ``factory(segmenter, **options)``. An
            attack is an object with ``generate(x, y)`` on NumPy arrays, ``y`` the ground truth; it may offer
            ``target_map(y)`` (without it, it is scored as untargeted) and ``mask(x)`` (without it, every pixel counts),
            and take ``images=``.
        defences: names (``ramdefense.defences``), or name → function from segmenter to segmenter. ``"none"`` is always
            among them, since every gain is measured against it.
        data: a name for ``load_data`` or a data set.
        images: how many images, spread evenly over the data set, or which indices; ``None``: all. The index of an image
            is the number of its random streams, so a row depends on neither the other images nor ``batch_size``.
        size: ``(height, width)`` that named data are resized to.
        batch_size: images worked on at once.
        seed: of the attacks; several: every attack is made with each.
        region: where pixels count: ``"outside"`` the patch, or ``"everywhere"``.
        out: folder of the run. Rows are written there as they are finished; the same call again goes on from there,
            also after a kill, and computes anew what is damaged, with a warning.
        keep_going: leave out frames that cannot be read and cells whose attack raises, and finish the rest; both are
            in ``Results.left_out``, and the same call again tries them again. Otherwise the first of them is raised.
        checks: make the checks of ``evaluation.checks`` on what is finished, each once; without, only those that the
            folder holds are there.
        check_images: how many images they probe, spread evenly.
        verbose: a progress bar with the time left, on standard error.
        patch_shape: ``(height, width)`` in pixels; ``None``: the attack's default.
        max_iter: steps of each attack; ``None``: the attack's default.
        device_type: ``"cpu"`` or ``"gpu"``, for models given by name; ``None``: a GPU where there is one.
        run_file: text that would repeat the run (``evaluation.runfile``), kept in its folder as ``run.yaml``.
        attack_options: further options of the attacks; each goes to the attacks that have it.

    Returns:
        The results; what was finished, if the run was interrupted from the keyboard.

    Raises:
        ValueError: an unknown name, an option that no attack has, models and data of different classes, a folder that
            holds another run, or a file of one, a frame that cannot be read, or an attack that breaks its promises
            (pixels outside its mask or the clip range).
        FileNotFoundError: files that are not there.
        OSError: a full disk, or a folder that cannot be written to; the message says what to do.
    """
    if region not in REGIONS:
        raise ValueError(f"region={region!r}: one of {', '.join(map(repr, REGIONS))}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    if check_images < 1:
        raise ValueError(f"check_images={check_images}: at least 1; checks=False makes no checks")
    seeds = chosen_seeds(seed)
    factories = named_attacks(attacks)
    functions = named_defences(defences)
    given = {"patch_shape": patch_shape, "max_iter": max_iter, **attack_options}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if not any(takes(factory, name) for factory in factories.values()):
            raise ValueError(f"option {name!r}: none of the attacks ({', '.join(factories)}) has it, or leaves it open")
    frames = load_data(data, size=size) if isinstance(data, str) else data
    indices = chosen_images(images, len(frames))
    first = first_readable(frames, indices) if keep_going else indices[0]
    segmenters = named_segmenters(models, frames, first, device_type)
    surveyed = survey(frames, indices, keep_going=keep_going) if out or keep_going else Survey()
    configuration: dict[str, Any] = {
        "models": {name: model_fingerprint(segmenter) if out else "" for name, segmenter in segmenters.items()},
        "attacks": {name: identity(factory) for name, factory in factories.items()},
        "defences": {name: identity(function) for name, function in functions.items()},
        "data": {
            "name": data if isinstance(data, str) else type(data).__name__,
            "classes": list(frames.classes),
            "images": indices,
            "fingerprint": surveyed.fingerprint,
        },
        "options": {name: plain_value(value) for name, value in sorted(given.items())},
        "seed": seeds if len(seeds) > 1 else seeds[0],
        "region": region,
        "versions": versions_of("ramdefense", "torch"),
    }
    store = Store(Path(out) if out is not None else None, frames.classes)
    store.open(configuration, {"batch_size": batch_size, "device_type": device_type}, surveyed, run_file)
    results = Results([], frames.classes, [], configuration)
    options = {**given, "batch_size": batch_size, "verbose": False}
    cells = len(segmenters) * len(factories) * (1 + (len(functions) - 1) * sum(_EFFORT.values()))
    with progress_bar(verbose, cells * len(indices) * len(seeds)) as tick:
        run = _Run(
            frames, indices, surveyed, factories, options, seeds, region, batch_size, keep_going, store, tick, results,
            check_images if checks else None,
        )  # fmt: skip
        try:
            for name, segmenter in segmenters.items():
                run.model(name, segmenter, functions)
        except KeyboardInterrupt:
            results.interrupted = True
    if out is not None and results.records:
        write_report(Path(out), results)
    return results


# ------------------------------------------------------------------------------------------------------- one run


@dataclass
class _Defended:
    """A segmenter under a defence, and its predictions without attack, each made once."""

    name: str
    segmenter: PyTorchSegmenter
    batch_size: int
    clean: dict[int, NDArray[Any]] = field(default_factory=dict)  # image → labels (H, W)

    def predict(self, x: NDArray[np.float32], images: Sequence[int]) -> NDArray[np.int64]:
        """Labels on a draw of the defence's randomness that no attack sees."""
        with self.segmenter.conditions(images=tuple(images), draw=-1):
            return self.segmenter.predict_labels(x, batch_size=self.batch_size)

    def predict_clean(self, x: NDArray[np.float32], images: Sequence[int]) -> NDArray[np.int64]:
        if not all(image in self.clean for image in images):
            small = np.uint8 if self.segmenter.nb_classes <= 256 else np.int64
            self.clean.update(zip(images, self.predict(x, images).astype(small), strict=True))
        return np.stack([self.clean[image] for image in images]).astype(np.int64)


@dataclass
class _Run:
    data: SegmentationData
    indices: list[int]
    survey: Survey
    attacks: Mapping[str, AttackFactory]
    options: dict[str, Any]
    seeds: list[int]
    region: Region
    batch_size: int
    keep_going: bool
    store: Store
    tick: Tick
    results: Results
    check_images: int | None = None

    def model(self, model: str, segmenter: PyTorchSegmenter, defences: Mapping[str, DefenceFunction]) -> None:
        undefended = _Defended(NONE, segmenter, self.batch_size)
        applied = []
        for name, function in defences.items():
            defended = undefended if name == NONE else self._defend(model, name, function, segmenter)
            if defended is not None:
                applied.append(defended)
            for attack in self.attacks:
                variants: list[str] = []
                if defended is not None:
                    variants = self._variants(attack, defended)
                    for variant in variants:
                        try:
                            self._cells(model, attack, variant, defended, undefended)
                        except NotApplicableError as error:
                            self._skip(Skipped(model, name, _reason(error), attack))
                            break
                if name != NONE:
                    left_out = sum(effort for variant, effort in _EFFORT.items() if variant not in variants)
                    self.tick(f"{model} · {attack} · {name}", left_out * len(self.indices) * len(self.seeds))
        inapplicable = {skipped.attack for skipped in self.results.skipped if skipped.model == model}
        for attack in self.attacks:
            if attack not in inapplicable:
                self._figures(model, attack, applied, undefended)
        self._checks(model, applied)

    def _checks(self, model: str, applied: Sequence[_Defended]) -> None:
        """What the finished cells of a model are worth (``evaluation.checks``)."""
        self.tick(f"{model} · checks", 0)
        readable = self._readable(self.indices)
        batches = None
        if self.check_images is not None:
            batches = probed_batches(self.data, readable, self.check_images, self.batch_size)
        make = functools.partial(self._make, seed=self.seeds[0])
        checker = Checker(self.store, self.attacks, make, batches, self.region, self.seeds[0])
        self.results.verdicts += checker.model(model, applied, self.results.records)

    def _defend(
        self, model: str, name: str, function: DefenceFunction, segmenter: PyTorchSegmenter
    ) -> _Defended | None:
        try:
            defended = _Defended(name, function(segmenter), self.batch_size)
            if not isinstance(defended.segmenter, PyTorchSegmenter):
                kind = type(defended.segmenter).__name__
                raise ValueError(f"defence {name!r} returned a {kind}; it must return a PyTorchSegmenter")
            first = self._readable(self.indices)[:1]
            # a defence may look at the model only when it runs
            defended.predict_clean(read_batch(self.data, first)[0], first)
        except NotApplicableError as error:
            self._skip(Skipped(model, name, _reason(error)))
            return None
        return defended

    def _skip(self, skipped: Skipped) -> None:
        self.results.skipped.append(skipped)
        self.store.skip(skipped)

    def _variants(self, attack: str, defended: _Defended) -> list[str]:
        traits = defended.segmenter.traits
        factory = self.attacks[attack]
        adapts = any(takes(factory, name) for name in _PLAIN) and (traits.random or traits.straight_through)
        return ["plain", *(["adaptive"] if adapts else []), *(["transfer"] if defended.name != NONE else [])]

    def _make(self, attack: str, variant: str, seed: int, segmenter: PyTorchSegmenter, **change: Any) -> Any:
        factory = self.attacks[attack]
        options = self.options | {"seed": seed} | (_PLAIN if variant == "plain" else {}) | change
        try:
            made = factory(segmenter, **{name: value for name, value in options.items() if takes(factory, name)})
        except TypeError as error:
            raise ValueError(f"attack {attack!r}: {error}") from error
        if getattr(made, "targeted", False) and not hasattr(made, "target_map"):
            raise ValueError(
                f"attack {attack!r} is targeted and does not say at what: give it target_map(y) -> (N, H, W), "
                "and let its generate(x, y) take the ground truth"
            )
        return made

    def _cells(self, model: str, attack: str, variant: str, defended: _Defended, undefended: _Defended) -> None:
        """Every seed and chunk of images of one model, attack, defence and variant."""
        label = f"{model} · {attack} · {defended.name} · {variant}"
        source = undefended if variant == "transfer" else defended
        for seed in self.seeds:
            begin = Cell(model, defended.name, attack, variant, 0, None if seed == self.seeds[0] else seed)
            as_variant = self._origin(begin, undefended).variant
            make = functools.cache(functools.partial(self._make, attack, as_variant, seed, source.segmenter))
            for chunk, images in self._chunks():
                cell = replace(begin, chunk=chunk)
                records = self.store.read(cell, images)
                if records is None:
                    records = self._compute(cell, images, make, defended, undefended)
                if records is not None:
                    self._note_unreadable(images, records)
                    self.results.records += records
                self.tick(label, _EFFORT[variant] * len(images))

    def _compute(
        self,
        cell: Cell,
        images: list[int],
        make: Callable[[], Any],
        defended: _Defended,
        undefended: _Defended,
    ) -> list[Record] | None:
        """Attack, measure, and keep the rows; None where they are left out."""
        try:
            records, changes = self._chunk(cell, make(), self._readable(images), defended, undefended)
        except NotApplicableError:
            raise
        except Exception as error:  # an attack may raise anything
            if not self.keep_going:
                raise
            self._leave_out(cell, images, error)
            return None
        self.store.write(cell, images, records, changes)
        return records

    def _origin(self, cell: Cell, undefended: _Defended) -> Cell:
        """The cell that made the patch: for ``transfer`` the undefended model's, the adaptive one if it has one."""
        if cell.variant != "transfer":
            return cell
        return replace(cell, defence=NONE, variant=self._variants(cell.attack, undefended)[-1])

    def _chunk(
        self, cell: Cell, attack: Any, images: list[int], defended: _Defended, undefended: _Defended
    ) -> tuple[list[Record], Changes | None]:
        """The rows of a cell, and its patches if it made them itself."""
        records: list[Record] = []
        made: list[NDArray[np.float32]] = []
        masks: list[NDArray[np.bool_] | None] = []
        origin = self._origin(cell, undefended)
        pasted = None if origin is cell else self.store.changes(origin, images)
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            x, y, names = read_batch(self.data, batch)
            aim = target_map(attack, y, batch)
            costs: list[dict[str, Any]] = [{"steps": 0, "forwards": 0.0, "backwards": 0.0, "seconds": 0.0}] * len(batch)
            if pasted is None:
                began = time.perf_counter()
                adversarial = generate(attack, x, y, batch)
                costs = costs_of(attack, time.perf_counter() - began, len(batch))
                mask = mask_of(attack, x)  # after the attack, which may choose where its patch goes
                check_promises(cell.attack, x, adversarial, mask, defended.segmenter)
                made.append(adversarial)
                masks.append(mask)
            else:
                adversarial, mask = pasted.paste(x, slice(start, start + len(batch)))
            rows = self._records(cell, batch, names, x, y, adversarial, mask, aim, defended)
            records += [replace(record, **cost) for record, cost in zip(rows, costs, strict=True)]
        if not records:
            return [], None
        seconds = round(sum(record.seconds or 0.0 for record in records) / len(records), 3)
        records = [replace(record, seconds=seconds) for record in records]
        return records, None if pasted else Changes.of(made, masks)

    def _leave_out(self, cell: Cell, images: Sequence[int], error: Exception) -> None:
        seed = self.seeds[0] if cell.seed is None else cell.seed
        left_out = LeftOut(reason(error), tuple(images), cell.model, cell.attack, cell.defence, cell.variant, seed)
        self.results.left_out.append(left_out)
        self.store.leave_out(cell, left_out)

    def _note_unreadable(self, images: Sequence[int], records: Sequence[Record]) -> None:
        """A frame is left out where a finished cell lacks it; one that was read earlier may be in all of them."""
        held = {record.image for record in records}
        for image in images:
            if image not in held:
                left_out = LeftOut(self.survey.unreadable[image], (image,))
                if left_out not in self.results.left_out:
                    self.results.left_out.append(left_out)

    def _records(
        self,
        cell: Cell,
        images: list[int],
        names: list[str],
        x: NDArray[np.float32],
        y: NDArray[np.int64],
        adversarial: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        aim: NDArray[np.int64] | None,
        defended: _Defended,
    ) -> list[Record]:
        clean, attacked = defended.predict_clean(x, images), defended.predict(adversarial, images)
        classes = len(self.data.classes)
        counted = counted_pixels(y, mask, region=self.region)
        whole = confusion(y, clean, counted_pixels(y), nb_classes=classes)
        before = confusion(y, clean, counted, nb_classes=classes)
        after = confusion(y, attacked, counted, nb_classes=classes)
        changed = confusion(clean, attacked, counted, nb_classes=classes)
        reached = None if aim is None else confusion(aim, attacked, counted, nb_classes=classes)
        by_chance = None if aim is None else confusion(aim, clean, counted, nb_classes=classes)
        return [
            Record(
                model=cell.model,
                attack=cell.attack,
                defence=cell.defence,
                variant=cell.variant,
                image=image,
                name=name,
                clean=before[i],
                whole=whole[i],
                adversarial=after[i],
                changed=changed[i],
                aim=None if reached is None else reached[i],
                aim_clean=None if by_chance is None else by_chance[i],
                seed=self.seeds[0] if cell.seed is None else cell.seed,
                rings=None
                if mask is None
                else count_rings(attacked[i], y[i], None if aim is None else aim[i], mask[i], counted[i]),
            )
            for i, (image, name) in enumerate(zip(images, names, strict=True))
        ]

    def _figures(self, model: str, attack: str, applied: list[_Defended], undefended: _Defended) -> None:
        """The image on which the undefended model is fooled most, and the median one, under every defence."""
        if self.store.folder is None:
            return
        mine = [
            r
            for r in self.results.records
            if (r.model, r.attack) == (model, attack) and r.image not in self.survey.unreadable
        ]
        rows = rows_hash(mine)
        for which, record in chosen(r for r in mine if r.defence == NONE).items():
            kept = self.store.folder / "pictures" / file_name(model) / file_name(attack) / f"{which}.jsonl"
            path = self.store.folder / "figures" / f"{file_name(model)}--{file_name(attack)}--{which}.png"
            picture = _kept(kept, rows)
            if picture is None:
                path.unlink(missing_ok=True)  # it shows other rows, and a kill may come before it is drawn again
                of_image = [r for r in mine if r.image == record.image]
                picture = self._picture(record, which, of_image, applied, undefended)
                picture.save(kept, rows)
            if not path.exists():
                _draw(path, picture)

    def _picture(
        self, chosen: Record, which: str, of_image: list[Record], applied: list[_Defended], undefended: _Defended
    ) -> Picture:
        """What every defence makes of one image."""
        made = self._make(chosen.attack, "plain", chosen.seed, undefended.segmenter)
        image = chosen.image
        x, y, _ = read_batch(self.data, [image])
        aim = target_map(made, y, [image])
        views = []
        for defended in applied:
            mine = (r for r in of_image if (r.defence, r.seed) == (defended.name, chosen.seed))
            for record in worst(mine):  # none, where it was left out
                adversarial, mask = self._patched(record, undefended, x)
                views.append(
                    View(
                        defence=defended.name,
                        variant=record.variant,
                        success=record.success,
                        patched=as_photo(adversarial[0]),
                        mask=None if mask is None else mask[0],
                        clean=defended.predict_clean(x, [image])[0],
                        attacked=defended.predict(adversarial, [image])[0],
                    )
                )
        return Picture.of(
            chosen,
            which,
            photo=as_photo(x[0]),
            label=y[0],
            target=None if aim is None else aim[0],
            views=views,
            classes=self.data.classes,
            colors=self.data.colors,
        )

    def _patched(
        self, record: Record, undefended: _Defended, x: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        place = self.indices.index(record.image)
        seed = None if record.seed == self.seeds[0] else record.seed
        cell = Cell(record.model, record.defence, record.attack, record.variant, place - place % CHUNK, seed)
        return self.store.changes(self._origin(cell, undefended), [record.image]).paste(x)

    def _chunks(self) -> Iterator[tuple[int, list[int]]]:
        for start in range(0, len(self.indices), CHUNK):
            yield start, self.indices[start : start + CHUNK]

    def _readable(self, images: Sequence[int]) -> list[int]:
        return [image for image in images if image not in self.survey.unreadable]


def _kept(path: Path, rows: str) -> Picture | None:
    """The picture of these rows, if there is one and nothing happened to it."""
    try:
        return Picture.load(path, rows)
    except (FileNotFoundError, DamagedError):
        return None


def _draw(path: Path, picture: Picture) -> None:
    views, facts = picture.views(), picture.facts
    told = f"{facts['model']}, attack {facts['attack']}, image {facts['name']}"
    save_figure(
        path,
        [
            Panel(
                title=view.defence,
                subtitle=f"{view.variant} attack\n{100 * view.success:.0f} % fooled",
                image=picture.photo,
                patched=view.patched,
                clean=view.clean,
                attacked=view.attacked,
            )
            for view in views
        ],
        label=picture.label,
        target=picture.target,
        mask=views[-1].mask,
        classes=facts["classes"],
        colors=picture.colors,
        title=f"{told}: the {facts['which']} one without defence",
    )


def _reason(error: Exception) -> str:
    return str(error).partition(":")[0]
