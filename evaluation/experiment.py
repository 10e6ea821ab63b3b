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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.changes import Changes
from evaluation.checks import Checker, probed_batches
from evaluation.claims import Claims
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
from evaluation.launched import launched
from evaluation.memory import BatchSize
from evaluation.metrics import REGIONS, Region, confusion, counted_pixels
from evaluation.pictures import Picture, View, as_photo, chosen, rows_hash
from evaluation.precision import prepared
from evaluation.progress import Tick, progress_bar
from evaluation.report import write_report
from evaluation.results import LeftOut, Record, Results, Skipped, worst
from evaluation.store import NONE, Cell, Store, file_name
from evaluation.survey import Survey, first_readable, read_batch, reason, survey
from evaluation.threads import keep_threads
from evaluation.verdicts import Verdict
from evaluation.walk import Piece, once, settled, walk
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
    report: bool = True,
    verbose: bool = True,
    patch_shape: tuple[int, int] | None = None,
    max_iter: int | None = None,
    device_type: str | None = None,
    amp: str | None = None,
    compile: bool = False,
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
        batch_size: images worked on at once; halved, with a warning, whenever they do not fit into a GPU's memory.
        seed: of the attacks; several: every attack is made with each.
        region: where pixels count: ``"outside"`` the patch, or ``"everywhere"``.
        out: folder of the run. Rows are written there as they are finished; the same call again goes on from there,
            also after a kill, and computes anew what is damaged, with a warning. Several processes (torchrun, ``srun``,
            or started one by one) may share it: each takes cells that no other one has in work, and all return the same
            results. A run keeps the number of torch's threads that it was begun with (``threads.json``), since sums are
            rounded by it.
        keep_going: leave out frames that cannot be read and cells whose attack raises, and finish the rest; both are
            in ``Results.left_out``, and the same call again tries them again. Otherwise the first of them is raised.
        checks: make the checks of ``evaluation.checks`` on what is finished, each once; without, only those that the
            folder holds are there.
        check_images: how many images they probe, spread evenly.
        report: write figures and the page into the folder, beside rows and tables.
        verbose: a progress bar with the time left, on standard error.
        patch_shape: ``(height, width)`` in pixels; ``None``: the attack's default.
        max_iter: steps of each attack; ``None``: the attack's default.
        device_type: ``"cpu"`` or ``"gpu"``, for models given by name; ``None``: a GPU where there is one.
        amp: ``"bf16"`` runs every model under autocast in bfloat16: other numbers than in float32, near them
            (`PyTorchSegmenter`).
        compile: compile every model by ``torch.compile``: the same up to the rounding of sums, which an iterated
            attack may amplify. A defence works on a copy that is not compiled.
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
    launch = launched(out, device_type)
    folder = None if out is None else Path(out)
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
    segmenters = {name: prepared(segmenter, amp=amp, compiled=compile) for name, segmenter in segmenters.items()}
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
        **({"amp": amp} if amp else {}),
        **({"compile": True} if compile else {}),
    }
    store = Store(folder, frames.classes)
    store.check_free()
    results = Results([], frames.classes, [], configuration)
    cells = len(segmenters) * len(factories) * (1 + (len(functions) - 1) * sum(_EFFORT.values()))
    shown = verbose and launch.rank == 0
    run: _Run | None = None
    try:
        with Claims(folder) as claims, progress_bar(shown, cells * len(indices) * len(seeds)) as tick:
            with claims.alone("configuration"):
                store.open(configuration, {"batch_size": batch_size, "device_type": device_type}, surveyed, run_file)
                if folder is not None:
                    keep_threads(folder)

            def smaller(size: int) -> None:
                with claims.alone("configuration"):
                    store.note({"batch_size_that_fits": size})

            run = _Run(
                frames, indices, surveyed, segmenters, functions, factories, {**given, "verbose": False}, seeds,
                region, BatchSize(batch_size, smaller), keep_going, store, claims, tick,
                check_images if checks else None, report,
            )  # fmt: skip
            walk(run.pieces(), claims)
            run.collect(results)
            if folder is not None and results.records:
                once(settled("tables", lambda: write_report(folder, results, with_page=report), claims), claims)
    except KeyboardInterrupt:
        results.interrupted = True
        if run is not None:
            run.collect(results)
        if folder is not None and results.records:
            write_report(folder, results, with_page=report)
    return results


# ------------------------------------------------------------------------------------------------------- one run


@dataclass
class _Defended:
    """A segmenter under a defence, and its predictions without attack, each made once."""

    name: str
    segmenter: PyTorchSegmenter
    clean: dict[int, NDArray[Any]] = field(default_factory=dict)  # image → labels (H, W)

    def predict(self, x: NDArray[np.float32], images: Sequence[int]) -> NDArray[np.int64]:
        """Labels on a draw of the defence's randomness that no attack sees."""
        with self.segmenter.conditions(images=tuple(images), draw=-1):
            return self.segmenter.predict_labels(x, batch_size=len(x))

    def predict_clean(self, x: NDArray[np.float32], images: Sequence[int]) -> NDArray[np.int64]:
        if not all(image in self.clean for image in images):
            small = np.uint8 if self.segmenter.nb_classes <= 256 else np.int64
            self.clean.update(zip(images, self.predict(x, images).astype(small), strict=True))
        return np.stack([self.clean[image] for image in images]).astype(np.int64)


@dataclass
class _Run:
    """What is to be done, as pieces that any process may do, and what came out, of all of them."""

    data: SegmentationData
    indices: list[int]
    survey: Survey
    segmenters: Mapping[str, PyTorchSegmenter]
    defences: Mapping[str, DefenceFunction]
    attacks: Mapping[str, AttackFactory]
    options: dict[str, Any]
    seeds: list[int]
    region: Region
    batch: BatchSize
    keep_going: bool
    store: Store
    claims: Claims
    tick: Tick
    check_images: int | None  # None: no checks are made
    report: bool
    cells: dict[Cell, list[int]] = field(default_factory=dict)  # in the order of the table, with their images
    outcomes: dict[Cell, list[Record] | LeftOut] = field(default_factory=dict)
    skipped: dict[tuple[str, str, str | None], Skipped] = field(default_factory=dict)  # model, defence, attack
    defended: dict[tuple[str, str], _Defended] = field(default_factory=dict)  # of the model in work
    verdicts: dict[tuple[str, str], list[Verdict]] = field(default_factory=dict)  # model, defence
    attack: tuple[Any, Any] = (None, None)  # the last one made, and what it was made from

    def pieces(self) -> Iterator[Piece]:
        """Everything that is to be done, in its order: for each model its cells, then its figures and checks."""
        for model in self.segmenters:
            applied = []
            for defence in self.defences:
                variants = self._variants_under(model, defence)
                if variants is not None:
                    applied.append(defence)
                for attack in self.attacks:
                    of_attack = [] if variants is None else variants[attack]
                    for variant in of_attack:
                        for cell, images in self._cells(model, attack, defence, variant):
                            self.cells[cell] = images
                            yield self._piece(cell)
                    if defence != NONE:
                        left_out = sum(effort for variant, effort in _EFFORT.items() if variant not in of_attack)
                        self.tick(f"{model} · {attack} · {defence}", left_out * len(self.indices) * len(self.seeds))
            if self.store.folder is not None and self.report:
                for attack in self.attacks:
                    name = f"{file_name(model)}/{file_name(attack)}.figures"
                    draw = functools.partial(self._figures, model, attack, tuple(applied))
                    done = functools.partial(self._is_done, model, attack)
                    yield replace(settled(name, draw, self.claims), ready=done)
            for defence in applied:
                yield self._check_piece(model, defence)

    def collect(self, results: Results) -> None:
        """Put what came out, so far, into the results, in an order that does not depend on who did what."""
        results.records, results.left_out = [], []
        for cell, images in self.cells.items():
            outcome = self.outcomes.get(cell, [])
            if isinstance(outcome, LeftOut):
                results.left_out.append(outcome)
            else:
                results.records += outcome
            if outcome and not isinstance(outcome, LeftOut):
                # a frame is left out where a finished cell lacks it; one that was read earlier may be in all of them
                for image in sorted({*images} - {record.image for record in outcome}, key=images.index):
                    unreadable = LeftOut(self.survey.unreadable[image], (image,))
                    results.left_out += [] if unreadable in results.left_out else [unreadable]
        defences, attacks = list(self.defences), [*self.attacks, None]
        results.skipped = sorted(
            self.skipped.values(),
            key=lambda s: (list(self.segmenters).index(s.model), defences.index(s.defence), attacks.index(s.attack)),
        )
        checked = ((model, defence) for model in self.segmenters for defence in self.defences)
        results.verdicts = [verdict for pair in checked for verdict in self.verdicts.get(pair, ())]

    def _is_done(self, model: str, attack: str | None = None) -> bool:
        """Whether all cells of an attack on a model are settled; of every attack, if none is given."""
        return all(cell in self.outcomes for cell in self._cells_of(model, attack))

    def _cells_of(self, model: str, attack: str | None) -> list[Cell]:
        return [cell for cell in self.cells if cell.model == model and attack in (None, cell.attack)]

    def _records_of(self, model: str, attack: str | None = None) -> list[Record]:
        """What is settled of an attack on a model, or of every attack on it."""
        outcomes = [self.outcomes[cell] for cell in self._cells_of(model, attack)]
        return [record for outcome in outcomes if not isinstance(outcome, LeftOut) for record in outcome]

    def _under(self, model: str, defence: str) -> _Defended:
        """A model under a defence; those of one model are kept until another one is asked for.

        Raises:
            NotApplicableError: The defence does not apply to the model.
        """
        if (model, defence) not in self.defended:
            self.defended = {key: held for key, held in self.defended.items() if key[0] == model}
            self.defended[model, defence] = self._defend(defence, self.defences[defence], self.segmenters[model])
        return self.defended[model, defence]

    def _defend(self, name: str, function: DefenceFunction, segmenter: PyTorchSegmenter) -> _Defended:
        if name == NONE:
            return _Defended(NONE, segmenter)
        defended = _Defended(name, function(segmenter))
        if not isinstance(defended.segmenter, PyTorchSegmenter):
            kind = type(defended.segmenter).__name__
            raise ValueError(f"defence {name!r} returned a {kind}; it must return a PyTorchSegmenter")
        first = self._readable(self.indices)[:1]
        # a defence may look at the model only when it runs
        defended.predict_clean(read_batch(self.data, first)[0], first)
        return defended

    def _variants_under(self, model: str, defence: str) -> dict[str, list[str]] | None:
        """The variants of each attack; None if the defence does not apply, which is noted."""
        try:
            defended = self._under(model, defence)
        except NotApplicableError as error:
            self._skip(Skipped(model, defence, _reason(error)))
            return None
        return {attack: self._variants(attack, defended) for attack in self.attacks}

    def _skip(self, skipped: Skipped) -> None:
        self.skipped[skipped.model, skipped.defence, skipped.attack] = skipped
        self.store.skip(skipped)

    def _variants(self, attack: str, defended: _Defended) -> list[str]:
        traits = defended.segmenter.traits
        factory = self.attacks[attack]
        adapts = any(takes(factory, name) for name in _PLAIN) and (traits.random or traits.straight_through)
        return ["plain", *(["adaptive"] if adapts else []), *(["transfer"] if defended.name != NONE else [])]

    def _make(self, attack: str, variant: str, seed: int, segmenter: PyTorchSegmenter, batch_size: int) -> Any:
        """The attack; the one made last, where it is asked for again."""
        key = (attack, variant, seed, segmenter, batch_size)
        if self.attack[0] != key:
            self.attack = key, self._make_anew(attack, variant, seed, segmenter, batch_size)
        return self.attack[1]

    def _make_anew(
        self, attack: str, variant: str, seed: int, segmenter: PyTorchSegmenter, batch_size: int, **change: Any
    ) -> Any:
        factory = self.attacks[attack]
        options = self.options | {"batch_size": batch_size, "seed": seed} | (_PLAIN if variant == "plain" else {})
        options |= change
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

    def _cells(self, model: str, attack: str, defence: str, variant: str) -> Iterator[tuple[Cell, list[int]]]:
        """Every seed and chunk of images of one model, attack, defence and variant."""
        for seed in self.seeds:
            for chunk, images in self._chunks():
                yield Cell(model, defence, attack, variant, chunk, None if seed == self.seeds[0] else seed), images

    def _piece(self, cell: Cell) -> Piece:
        # pasted is what another cell made, and only where the attack was found to apply to this model
        needed = () if cell.variant != "transfer" else (self._origin(cell), replace(cell, variant="plain"))
        return Piece(
            cell.path,
            functools.partial(self._look, cell),
            functools.partial(self._compute, cell),
            lambda: all(one in self.outcomes for one in needed),
        )

    def _look(self, cell: Cell) -> bool:
        """Whether the cell is settled: finished, left out by a process that is still there, or not applicable."""
        if self._not_applicable(cell):
            self._settle(cell, [])
            return True
        records = self.store.read(cell, self.cells[cell])
        if records is not None:
            self._settle(cell, records)
        elif self.claims.marked(cell.path):
            self._settle(cell, self.store.left_out(cell))
        return cell in self.outcomes

    def _not_applicable(self, cell: Cell) -> bool:
        key = (cell.model, cell.defence, cell.attack)
        if key not in self.skipped and self.claims.marked(_of_attack(cell)):
            self.skipped[key] = self.store.skipped(*key)
        return key in self.skipped

    def _settle(self, cell: Cell, outcome: list[Record] | LeftOut) -> None:
        self.outcomes[cell] = outcome
        label = f"{cell.model} · {cell.attack} · {cell.defence} · {cell.variant}"
        self.tick(label, _EFFORT[cell.variant] * len(self.cells[cell]))

    def _compute(self, cell: Cell) -> None:
        """Attack, measure, and keep the rows, or what went wrong."""
        images = self.cells[cell]
        try:
            records, changes = self._chunk(cell, self._readable(images))
        except NotApplicableError as error:
            self._skip(Skipped(cell.model, cell.defence, _reason(error), cell.attack))
            self.claims.mark(_of_attack(cell))
            self._settle(cell, [])
        except Exception as error:  # an attack may raise anything
            if not self.keep_going:
                raise
            seed = self.seeds[0] if cell.seed is None else cell.seed
            left_out = LeftOut(reason(error), tuple(images), cell.model, cell.attack, cell.defence, cell.variant, seed)
            self.store.leave_out(cell, left_out)
            self.claims.mark(cell.path)
            self._settle(cell, left_out)
        else:
            self.store.write(cell, images, records, changes)
            self._settle(cell, records)

    def _origin(self, cell: Cell) -> Cell:
        """The cell that made the patch: for ``transfer`` the undefended model's, the adaptive one if it has one."""
        if cell.variant != "transfer":
            return cell
        return replace(cell, defence=NONE, variant=self._variants(cell.attack, self._under(cell.model, NONE))[-1])

    def _chunk(self, cell: Cell, images: list[int]) -> tuple[list[Record], Changes | None]:
        """The rows of a cell, and its patches if it made them itself."""
        defended, undefended = self._under(cell.model, cell.defence), self._under(cell.model, NONE)
        origin = self._origin(cell)
        pasted = None if origin is cell else self.store.changes(origin, images)
        source = defended if pasted is None else undefended
        seed = self.seeds[0] if cell.seed is None else cell.seed

        def work(batch: Sequence[int], size: int) -> _Batch:
            attack = self._make(cell.attack, origin.variant, seed, source.segmenter, size)
            x, y, names = read_batch(self.data, batch)
            aim = target_map(attack, y, batch)
            costs: list[dict[str, Any]] = [{"steps": 0, "forwards": 0.0, "backwards": 0.0, "seconds": 0.0}] * len(batch)
            if pasted is None:
                began = time.perf_counter()
                adversarial = generate(attack, x, y, batch)
                costs = costs_of(attack, time.perf_counter() - began, len(batch))
                mask = mask_of(attack, x)  # after the attack, which may choose where its patch goes
                check_promises(cell.attack, x, adversarial, mask, defended.segmenter)
            else:
                start = images.index(batch[0])
                adversarial, mask = pasted.paste(x, slice(start, start + len(batch)))
            rows = self._records(cell, batch, names, x, y, adversarial, mask, aim, defended)
            return _Batch([replace(row, **cost) for row, cost in zip(rows, costs, strict=True)], adversarial, mask)

        batches = list(self.batch.over(images, work))
        records = [record for batch in batches for record in batch.records]
        if not records:
            return [], None
        seconds = round(sum(record.seconds or 0.0 for record in records) / len(records), 3)
        records = [replace(record, seconds=seconds) for record in records]
        made, masks = [batch.adversarial for batch in batches], [batch.mask for batch in batches]
        return records, None if pasted else Changes.of(made, masks)

    def _records(
        self,
        cell: Cell,
        images: Sequence[int],
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

    def _check_piece(self, model: str, defence: str) -> Piece:
        """What the finished cells of a model under a defence are worth (``evaluation.checks``)."""
        name = f"{file_name(model)}/{file_name(defence)}.checks"

        def take_in(images: int | None) -> None:
            batches = None
            if images is not None:
                batches = probed_batches(self.data, self._readable(self.indices), images, self.batch.size)
            make = functools.partial(self._make_anew, seed=self.seeds[0], batch_size=self.batch.size)
            checker = Checker(self.store, self.attacks, make, batches, self.region, self.seeds[0])
            found = checker.model(model, [self._under(model, defence)], self._records_of(model))
            self.verdicts[model, defence] = found

        def look() -> bool:
            # another process has made them; what they rest on may not have been looked at here yet
            if not (self.claims.marked(name) and self._is_done(model)):
                return False
            take_in(None)
            return True

        def check() -> None:
            self.tick(f"{model} · {defence} · checks", 0)
            take_in(self.check_images)
            self.claims.mark(name)

        return Piece(name, look, check, functools.partial(self._is_done, model))

    def _figures(self, model: str, attack: str, defences: Sequence[str]) -> None:
        """The image on which the undefended model is fooled most, and the median one, under every defence."""
        assert self.store.folder is not None
        if any((model, defence, attack) in self.skipped for defence in defences):
            return
        mine = [r for r in self._records_of(model, attack) if r.image not in self.survey.unreadable]
        rows = rows_hash(mine)
        for which, record in chosen(r for r in mine if r.defence == NONE).items():
            kept = self.store.folder / "pictures" / file_name(model) / file_name(attack) / f"{which}.jsonl"
            path = self.store.folder / "figures" / f"{file_name(model)}--{file_name(attack)}--{which}.png"
            picture = _kept(kept, rows)
            if picture is None:
                path.unlink(missing_ok=True)  # it shows other rows, and a kill may come before it is drawn again
                picture = self._picture(record, which, [r for r in mine if r.image == record.image], defences)
                picture.save(kept, rows)
            if not path.exists():
                _draw(path, picture)

    def _picture(self, chosen: Record, which: str, of_image: list[Record], defences: Sequence[str]) -> Picture:
        """What every defence makes of one image."""
        undefended = self._under(chosen.model, NONE)
        made = self._make(chosen.attack, "plain", chosen.seed, undefended.segmenter, self.batch.size)
        image = chosen.image
        x, y, _ = read_batch(self.data, [image])
        aim = target_map(made, y, [image])
        views = []
        for defended in (self._under(chosen.model, defence) for defence in defences):
            mine = (r for r in of_image if (r.defence, r.seed) == (defended.name, chosen.seed))
            for record in worst(mine):  # none, where it was left out
                adversarial, mask = self._patched(record, x)
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
        self, record: Record, x: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        place = self.indices.index(record.image)
        seed = None if record.seed == self.seeds[0] else record.seed
        cell = Cell(record.model, record.defence, record.attack, record.variant, place - place % CHUNK, seed)
        return self.store.changes(self._origin(cell), [record.image]).paste(x)

    def _chunks(self) -> Iterator[tuple[int, list[int]]]:
        for start in range(0, len(self.indices), CHUNK):
            yield start, self.indices[start : start + CHUNK]

    def _readable(self, images: Sequence[int]) -> list[int]:
        return [image for image in images if image not in self.survey.unreadable]


@dataclass(frozen=True)
class _Batch:
    records: list[Record]
    adversarial: NDArray[np.float32]
    mask: NDArray[np.bool_] | None


def _of_attack(cell: Cell) -> str:
    """Of an attack that does not apply to a defended model."""
    return f"{file_name(cell.model)}/{file_name(cell.attack)}/{file_name(cell.defence)}.skipped"


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
