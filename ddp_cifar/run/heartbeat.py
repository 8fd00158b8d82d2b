"""Heartbeats: a file per rank in RUN_DIR/heartbeats, and the detection of hangs."""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ddp_cifar.command import leave
from ddp_cifar.distributed.world import World
from ddp_cifar.text_files import parse_json, read_text

INTERVALS = 50
"""The least number of heartbeats within `train.hang_timeout_s`."""

LONGEST_INTERVAL_S = 5.0


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


class Heartbeat:
    """Writes this rank's file from a thread, and detects a hang while `watching`.

    If one rank hangs, all others wait for it in a collective. So each rank that makes no progress for half of `timeout_s`
    reads all files, and reads them again near the end of `timeout_s`. A rank whose `ticks` have not changed is unresponsive.
    If the `beats` of any rank have grown, the run is alive.
    """

    def __init__(self, folder: Path, logs: Path, world: World, timeout_s: float) -> None:
        self.folder = folder
        self.stacks = logs / f"rank_{world.rank}.stacks"
        self.world = world
        self.timeout_s = timeout_s
        # the next start reads rank 0's file to find the last step of this one
        self.interval_s = min(1.0 if world.is_main else LONGEST_INTERVAL_S, timeout_s / INTERVALS)
        self.beats = 0
        self.step = 0
        self.ticks = 0
        self._watching = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._write()

    def beat(self, step: int) -> None:
        """Count a step or evaluation batch of the main thread; `step` is the number of steps that the run has completed."""
        self.beats += 1
        self.step = step

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Exit the process if no rank makes progress for `timeout_s` within the body."""
        self.beats += 1
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    # -- the thread

    def _run(self) -> None:
        last_beats, since, before, dumped = -1, 0.0, None, False
        while not self._closed.wait(min(1.0, self.interval_s)):
            now = time.monotonic()
            if now - self._written >= self.interval_s:
                self._write()
            if not self._watching or self.beats != last_beats:
                last_beats, since, before, dumped = self.beats, now, None, False
                continue
            quiet = (now - since) / self.timeout_s
            if quiet > 0.45 and before is None:
                before = self._read()
            elif quiet > 0.75 and before is not None and not dumped:
                after = self._read()
                if any(after[rank].beats != sign.beats for rank, sign in before.items() if rank in after):
                    since, before = now, None  # a rank makes progress: a long step, or rank 0 waits for its disk
                    continue
                dumped = True
                self._dump_stacks()  # before any rank exits: the first exit shuts down the others
            elif quiet > 0.9 and before is not None:
                leave(self._describe(before, self._read()))

    def _describe(self, before: dict[int, Sign], after: dict[int, Sign]) -> str:
        silent = [
            rank
            for rank in range(self.world.world_size)
            if rank not in after or (rank in before and after[rank].ticks == before[rank].ticks)
        ]
        if silent:
            names = ", ".join(_name(rank, after.get(rank)) for rank in silent)
            reason = f"no heartbeat from {names}: the process is stopped, or its machine is lost"
        else:
            fewest = min(sign.beats for sign in after.values())
            behind = [sign for sign in after.values() if sign.beats == fewest]
            if len(behind) == len(after):
                reason = f"all ranks are alive and waiting after step {self.step}"
            else:
                names = ", ".join(_name(sign.rank, sign) for sign in behind)
                reason = f"all ranks are alive, but {names} {'is' if len(behind) == 1 else 'are'} behind the others"
        return (
            f"no rank has made progress for {0.9 * self.timeout_s:.0f} s (train.hang_timeout_s={self.timeout_s:g}): {reason}; "
            f"see the Python stacks of each live rank in {self.stacks.parent}/rank_*.stacks"
        )

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError), open(self.stacks, "w") as file:
            file.write(f"rank {self.world.rank} at {time.ctime()}, after step {self.step}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    # -- the files

    def _write(self) -> None:
        self.ticks += 1
        self._written = time.monotonic()
        process = (self.world.rank, socket.gethostname(), os.getpid())
        sign = Sign(*process, self.ticks, self.beats, self.step, time.time())
        with contextlib.suppress(OSError):
            path = self.folder / f"rank_{self.world.rank}"
            temporary = self.folder / f".rank_{self.world.rank}"
            temporary.write_text(json.dumps(asdict(sign)))
            temporary.replace(path)

    def _read(self) -> dict[int, Sign]:
        signs = {rank: read_sign(self.folder, rank) for rank in range(self.world.world_size)}
        return {rank: sign for rank, sign in signs.items() if sign}


class NullHeartbeat:
    """Does nothing. For a trainer without a RUN_DIR."""

    def beat(self, step: int) -> None:
        pass

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        yield


def read_sign(folder: Path, rank: int) -> Sign | None:
    """Return a rank's last heartbeat, or None if there is none."""
    try:
        sign = Sign(**parse_json(read_text(folder / f"rank_{rank}")))
        return sign if isinstance(sign.time, float | int) and isinstance(sign.step, int) else None
    except (OSError, ValueError, TypeError):
        return None


def _name(rank: int, sign: Sign | None) -> str:
    return (
        f"rank {rank} ({sign.host}, pid {sign.pid}, at step {sign.step})" if sign else f"rank {rank} (no heartbeat yet)"
    )
