"""What an accelerator has found, read by the host without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Copy:
    """Truth values on their way to the host, and those of them that are still asked for."""

    flags: Tensor
    arrived: torch.cuda.Event | None
    rows: Tensor | None = None

    @classmethod
    def of(cls, flags: Tensor) -> _Copy:
        if not flags.is_cuda:
            return cls(flags.clone(), None)
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(flags.device))
        return cls(host, arrived)

    def read(self) -> list[bool]:
        if self.arrived is not None:
            self.arrived.synchronize()
        flags: list[bool] = (self.flags if self.rows is None else self.flags[self.rows]).tolist()
        return flags


class Late:
    """One truth value for each image and step, read at once, or a step late.

    To read a tensor of an accelerator is to wait until its queue is empty, and then it waits for the host to fill it
    again. What the step before has found is there, or about to be, while the work of this step is queued behind it.

    Args:
        late: Read a step late; else at once, as on a CPU, where that costs nothing.
    """

    def __init__(self, late: bool) -> None:
        self._late = late
        self._before: _Copy | None = None

    def read(self, flags: Tensor) -> list[bool]:
        """The values (N,) of this step or of the one before; false at first, when there is none before."""
        if not self._late:
            return _Copy(flags, None).read()
        before, self._before = self._before, _Copy.of(flags)
        return [False] * len(flags) if before is None else before.read()

    def rows(self, chosen: Tensor) -> None:
        """Only these images, by their indices on the host, are still asked for."""
        if self._before is not None:
            self._before = replace(self._before, rows=chosen)
