"""Several processes at one piece of work: which of them this one is, and sums over all of them.

Sums are gathered and added up in the order of the ranks, so that every process has the same bits, whatever the backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Made = TypeVar("Made")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process.

    Args:
        rank: Its number among all.
        world: How many there are.
        local: Its number on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """As torchrun or `srun` say; one process where neither started it.

        `SLURM_NTASKS` is not asked: it is set in a batch script, too, where one process runs.

        Args:
            environment: Variables by name; None: this process's.
        """
        given = os.environ if environment is None else environment
        for rank, world, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ):
            if rank in given and world in given:
                return cls(int(given[rank]), int(given[world]), int(given.get(local, "0")))
        return cls()

    def choose_gpu(self) -> None:
        """Make this process's GPU the one that "cuda" means, where several processes share a machine's."""
        if self.world > 1 and torch.cuda.is_available():
            torch.cuda.set_device(self.local % torch.cuda.device_count())


@contextmanager
def group(launch: Launch, device_type: str = "cpu") -> Iterator[None]:
    """The processes of a launch as a group of `torch.distributed`: nccl for GPUs, gloo for CPUs.

    Nothing for a single process, or where there is a group already.

    Args:
        launch: This process and how many there are.
        device_type: "cpu" or "gpu", where the tensors are that are summed; "gpu" means the CPU without CUDA.

    Raises:
        ValueError: Nothing says where the processes meet.
    """
    if launch.world == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{launch.world} processes, and nothing says where they meet: export {' and '.join(missing)} (the first "
            "machine's name, any free port), or start them with torchrun, which does"
        )
    launch.choose_gpu()
    gpu = device_type == "gpu" and torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo", rank=launch.rank, world_size=launch.world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes are in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of some items, as many as the others' or one more or less; all of them without a group."""
    return items[rank() :: world()]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each; `tensor` itself without a group.

    Args:
        tensor: Of one shape, number type and kind of device in all of them.
    """
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, tensor.detach().contiguous())
    # one after the other: the order in which a backend adds up is its own
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def from_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, in every process; what it raises, too.

    Args:
        make: Called in the first process alone. What it returns is pickled, on its way to processes of the same user.
    """
    if world() == 1:
        return make()
    held: list[Made | Exception | None] = [None]
    if rank() == 0:
        try:
            held = [make()]
        except Exception as error:  # else the others would wait for what does not come
            held = [error]
    dist.broadcast_object_list(held, src=0)
    if isinstance(held[0], Exception):
        raise held[0]
    return held[0]  # type: ignore[return-value]  # it is what `make` returned
