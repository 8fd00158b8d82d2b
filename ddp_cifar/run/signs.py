"""The heartbeat files in RUN_DIR/heartbeats: the last sign of life of each rank."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ddp_cifar.text_files import parse_json, read_text


@dataclass(frozen=True)
class Sign:
    """The last heartbeat of a rank: the content of its file."""

    rank: int
    host: str
    pid: int
    ticks: int
    """The number of writes. It stops growing if the process is stopped or its machine is lost."""
    beats: int
    """The number of steps and evaluation batches that the main thread has completed in this process."""
    step: int
    """Steps completed in the run."""
    time: float
    """Unix time of the last write."""
    peak_memory: int = 0
    """Peak memory of the process on the host, in bytes."""
    oom_kills: int = 0
    """Processes of the control group that the kernel has killed for lack of memory, at the time of the last write."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}, at step {self.step})"


def read_sign(folder: Path, rank: int) -> Sign | None:
    """Return a rank's last heartbeat, or None if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        sign = Sign(**parse_json(read_text(folder / f"rank_{rank}")))
        numbers = (sign.time, sign.step, sign.rank, sign.pid, sign.peak_memory, sign.oom_kills)
        if all(isinstance(number, float | int) for number in numbers) and isinstance(sign.host, str):
            return sign
    return None


def read_signs(folder: Path) -> dict[int, Sign]:
    """Return the last heartbeats of all ranks in a folder."""
    ranks = (path.name.removeprefix("rank_") for path in folder.glob("rank_*"))
    signs = (read_sign(folder, int(rank)) for rank in ranks if rank.isdigit())
    return {sign.rank: sign for sign in sorted(filter(None, signs), key=lambda sign: sign.rank)}
