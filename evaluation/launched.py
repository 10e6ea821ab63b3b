"""The beginning of a run that several processes may share."""

from __future__ import annotations

from pathlib import Path

from ramdefense.processes import Launch


def launched(out: str | Path | None, device_type: str | None) -> Launch:
    """This process among those that were started with it, its GPU chosen.

    Args:
        out: Folder of the run.
        device_type: As ``evaluate``.

    Raises:
        ValueError: Several processes, and no folder.
    """
    launch = Launch.of()
    if launch.world > 1 and out is None:
        raise ValueError(
            f"{launch.world} processes and no folder through which they share the work: give the run one (out=, --out)"
        )
    if device_type != "cpu":
        launch.choose_gpu()
    return launch
