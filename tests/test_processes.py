"""Data-parallel work: what a launcher says, sums over processes, a fit and a training that several processes share."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NB_CLASSES, SHAPE, coloured_shapes, linear_cnn, random_images, random_labels
from torch import Tensor, nn

from attacks import EOT, FixedClass
from attacks.universal import UniversalPatchAttack
from evaluation import claims, experiment, training
from evaluation.frames import Frame
from evaluation.training import Recipe, train
from evaluation.transfer import universal
from ramdefense.processes import Launch, from_first, group, rank, share, total, world
from ramdefense.segmenter import PyTorchSegmenter


def together(processes: int, work: Callable[[], Any]) -> list[Any]:
    """What each of so many processes makes of the work, in a gloo group; tensors as they are in memory."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [fork.Pipe(duplex=False) for _ in range(processes)]

    def run(number: int) -> None:
        torch.set_num_threads(1)
        # what torchrun sets
        os.environ |= {"RANK": f"{number}", "WORLD_SIZE": f"{processes}", "LOCAL_RANK": f"{number}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        try:
            made = work()
        except Exception as error:
            made = error
        pipes[number][1].send(made)

    started = [fork.Process(target=run, args=(number,), daemon=True) for number in range(processes)]
    for process in started:
        process.start()
    made = [ends[0].recv() if ends[0].poll(120) else pytest.fail("no answer") for ends in pipes]
    for process in started:
        process.join(60)
    for one in made:
        if isinstance(one, Exception):
            raise one
    return made


def plain(value: Any) -> Any:
    """Tensors as bytes: they cross a pipe by value, and equal ones have equal bits."""
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------------------ launches


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, Launch(5, 16, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Launch(3, 4, 1)),
        # a batch script outside srun: one process, whatever was asked for
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Launch(0, 1, 0)),
        # torchrun that srun started on each node
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"},
            Launch(9, 16, 1),
        ),
    ],
)
def test_what_torchrun_and_srun_say(environment: dict[str, str], launch: Launch) -> None:
    assert Launch.of(environment) == launch


def test_processes_share_the_gpus_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for local in range(6):
        Launch(local + 8, 16, local).choose_gpu()
    assert chosen == [0, 1, 2, 3, 0, 1]
    Launch().choose_gpu()
    assert len(chosen) == 6, "a single process leaves the choice as it is"


def test_processes_that_cannot_meet_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=r"export MASTER_ADDR \("), group(Launch(0, 2, 0)):
        pass


def sums() -> tuple[Any, ...]:
    with group(Launch.of()):
        items = share([10, 11, 12, 13, 14])
        # adding up in another order gives other bits
        part = torch.tensor([1e8, 1.0, -1e8])[rank()] + torch.zeros(2, 3).t()
        summed = total(part)
        first = from_first(lambda: f"made by {rank()}")
        return list(items), plain(summed.contiguous()), summed.shape, first, world()


def test_sums_are_the_same_bits_in_every_process() -> None:
    one, two, three = together(3, sums)
    assert one[0] + two[0] + three[0] == [10, 13, 11, 14, 12]
    assert one[1:] == two[1:] == three[1:]
    in_order = (torch.tensor(1e8) + 1.0) + torch.tensor(-1e8)
    assert one[1] == plain(in_order.expand(3, 2).contiguous())
    assert one[3:] == ("made by 0", 3)


def refused() -> str:
    def fail() -> None:
        raise ValueError(f"refused by {rank()}")

    with group(Launch.of()):
        try:
            from_first(fail)
        except ValueError as error:
            return str(error)
    return ""


def test_what_the_first_process_raises_all_raise() -> None:
    assert together(2, refused) == ["refused by 0"] * 2


# ------------------------------------------------------------------------------------------------------------- patches


def fitted(resume: Path | None = None, max_iter: int = 12, eot: EOT | None = None) -> tuple[Any, ...]:
    attack = UniversalPatchAttack(
        PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE), target=FixedClass(2), patch_shape=(5, 6),
        patch_location=(4, 7), max_iter=max_iter, batch_size=3, eps_step=0.01, optimizer="adam", eot=eot,
        verbose=False,
    )  # fmt: skip
    with group(Launch.of()):
        # 12 frames to make it on: batches of 3, of which two processes have 2 and 1
        attack.fit((random_images(14), random_labels(14)), held_out=0.15, resume=resume, save_every=1)
    assert attack.patch is not None
    assert attack.result is not None
    result = attack.result
    return plain(attack.patch.pixels), result.criterion, result.loss, result.steps, result.forwards, result.backwards


def as_pixels(made: tuple[Any, ...]) -> Tensor:
    return torch.frombuffer(bytearray(made[0]), dtype=torch.float32)


@pytest.mark.parametrize("eot", [None, EOT(samples=2)])
def test_a_patch_that_two_processes_fit_is_that_of_one(eot: EOT | None) -> None:
    alone = fitted(eot=eot)
    one, two = together(2, lambda: fitted(eot=eot))
    assert one == two, "the same in both, bit for bit"
    assert torch.allclose(as_pixels(alone), as_pixels(one), atol=1e-6)
    assert [*one[1], *one[2]] == pytest.approx([*alone[1], *alone[2]])
    assert one[4:] == alone[4:], "together they take no more passes"


def test_more_processes_than_frames_in_a_batch() -> None:
    alone = fitted()
    made = together(4, fitted)
    assert len(set(made)) == 1
    assert torch.allclose(as_pixels(alone), as_pixels(made[0]), atol=1e-6)


def broken_off(resume: Path) -> None:
    steps = 0
    step = UniversalPatchAttack.fit.__globals__["_Loop"].step

    def counted(self: Any, fit: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return step(self, fit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UniversalPatchAttack.fit.__globals__["_Loop"], "step", counted)
        with pytest.raises(KeyboardInterrupt):
            fitted(resume)


def test_a_fit_goes_on_in_several_processes(tmp_path: Path) -> None:
    whole = together(2, fitted)
    together(2, lambda: broken_off(tmp_path / "fit.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.safetensors"], "one of them writes it"
    assert together(2, lambda: fitted(tmp_path / "fit.safetensors")) == whole
    # and what two began, one may finish
    with pytest.raises(ValueError, match="differs in max_iter"):
        together(2, lambda: fitted(tmp_path / "fit.safetensors", max_iter=13))


class Scenes:
    """Frames of their own, by seed."""

    classes = tuple("abcd")
    colors = ((0, 0, 0),) * 4

    def __init__(self, seed: int) -> None:
        self.images, self.labels = random_images(seed=seed), random_labels(seed=seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Frame:
        return Frame(self.images[index], self.labels[index], f"{index}")


def made_and_tested(out: Path) -> tuple[Any, ...]:
    model = PyTorchSegmenter(linear_cnn(), NB_CLASSES, SHAPE)
    found = universal(
        model, Scenes(0), Scenes(1), batch_size=4, out=out, max_iter=8, patch_shape=(5, 6), optimizer="adam",
        eps_step=0.05, verbose=False,
    )  # fmt: skip
    assert found.attack.patch is not None
    return plain(found.attack.patch.pixels), [record.to_json() for record in found.results.records]


def test_two_processes_make_a_patch_and_test_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **options: None)
    monkeypatch.setattr(claims, "PATIENCE", 0.02)
    alone = made_and_tested(tmp_path / "alone")
    one, two = together(2, lambda: made_and_tested(tmp_path / "both"))
    assert one == two
    assert torch.allclose(as_pixels(alone), as_pixels(one), atol=1e-6)
    assert len(one[1]) == 3 * 5, "universal, random, grey"
    assert one[1] == alone[1]
    left = sorted(p.name for p in (tmp_path / "both").iterdir())
    assert left == ["fit.safetensors", "patch.safetensors", "tested", "threads.json"]


# ------------------------------------------------------------------------------------------------------------ training


class Shapes:
    """Frames that can be learnt, of which some are void for the most part."""

    classes = ("grey", "red", "green", "blue")
    colors = ((0, 0, 0),) * 4

    def __init__(self) -> None:
        self.images, self.labels = coloured_shapes(12)
        self.labels[::3, :, 3:] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return Frame(self.images[index], self.labels[index], f"{index}")


def without_statistics(architecture: str, nb_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, nb_classes, 1))


def with_statistics(architecture: str, nb_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, nb_classes, 1)
    )


def trained(network: Callable[[str, int], nn.Module], batch_size: int = 5) -> tuple[Any, ...]:
    recipe = Recipe("own", "shapes", "shapes", "shapes", SHAPE[1:], 12, batch_size, every=6, lr=1e-2)
    losses: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_network", network)
        patch.setattr(training, "load_data", lambda name, size: Shapes())
        model, card = train(recipe, progress=lambda step, steps, figures: losses.append(figures["loss"]))
    return {k: plain(v) for k, v in model.state_dict().items()}, card["val"], card["test"], losses


def weights(made: tuple[Any, ...]) -> Tensor:
    return torch.cat([torch.frombuffer(bytearray(v), dtype=torch.float32) for v in made[0].values() if len(v) > 8])


@pytest.mark.slow
def test_two_processes_train_what_one_trains() -> None:
    alone = trained(without_statistics)
    one, two = together(2, lambda: trained(without_statistics))
    assert one == two, "the same in both, bit for bit"
    # half precision is what ships: its step at 1 is 0.001
    assert torch.allclose(weights(alone), weights(one), atol=2e-3)
    assert alone[3] == pytest.approx(one[3], rel=1e-4)
    assert alone[1]["miou"] == pytest.approx(one[1]["miou"], abs=0.02)


@pytest.mark.slow
def test_batch_norm_on_cpus_is_the_same_in_both_processes_and_near_that_of_one() -> None:
    alone = trained(with_statistics)
    one, two = together(2, lambda: trained(with_statistics))
    assert one == two
    assert alone[3][0] == pytest.approx(one[3][0], rel=0.1)
    assert alone[3] != pytest.approx(one[3], rel=1e-4), "then it would not have to be told in the documentation"


def test_more_processes_than_frames_in_a_batch_of_training_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="batch_size=5 for 8 processes"):
        trained(without_statistics)
