"""Signs of life: a file a rank in RUN_DIR/heartbeats, and the end of a run in which no rank moves any more."""

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
from ddp_cifar.distributed import World

INTERVALS = 50  # of a heartbeat in `train.hang_timeout_s`
LONGEST_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Sign:
    """What a rank's file says."""

    rank: int
    host: str
    pid: int
    ticks: int
    """Times that the file was written: a process that is stopped, or whose machine is gone, writes no more."""
    beats: int
    """Steps, and batches of evaluations, that its main thread has completed in this process."""
    step: int
    """Of the run."""
    time: float
    """Unix time of the writing."""


class Heartbeat:
    """Writes this rank's file from a thread of its own, and watches for a hang where it is told to.

    No rank can know that another hangs: in a collective all of them wait. So each, once it has not moved for half of
    `timeout_s`, reads all files, and once more near the end. Whose count of writings stands still is silent. Any whose count
    of steps has grown shows that the run is alive.
    """

    def __init__(self, folder: Path, logs: Path, world: World, timeout_s: float) -> None:
        self.folder = folder
        self.stacks = logs / f"rank_{world.rank}.stacks"
        self.world = world
        self.timeout_s = timeout_s
        # rank 0's also tells the next start how far this one came
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
        """The main thread has completed something, `step` being the run's."""
        self.beats += 1
        self.step = step

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """In the body, a run in which nothing moves for `timeout_s` is ended."""
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
                    since, before = now, None  # some rank moves: a long step, or a rank 0 that waits for its disk
                    continue
                dumped = True
                self._dump_stacks()  # before any rank leaves, since that ends the others
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
            reason = f"{names} {'is' if len(silent) == 1 else 'are'} silent: stopped, or the machine is gone"
        else:
            fewest = min(sign.beats for sign in after.values())
            behind = [sign for sign in after.values() if sign.beats == fewest]
            if len(behind) == len(after):
                reason = f"all ranks are alive and wait, after step {self.step}"
            else:
                names = ", ".join(_name(sign.rank, sign) for sign in behind)
                reason = f"all ranks are alive, and {names} {'is' if len(behind) == 1 else 'are'} behind the others"
        return (
            f"no rank has moved for {0.9 * self.timeout_s:.0f} s (train.hang_timeout_s={self.timeout_s:g}): {reason}. "
            f"Each live rank's Python stacks are in {self.stacks.parent}/rank_*.stacks"
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
        place = (self.world.rank, socket.gethostname(), os.getpid())
        sign = Sign(*place, self.ticks, self.beats, self.step, time.time())
        with contextlib.suppress(OSError):
            path = self.folder / f"rank_{self.world.rank}"
            temporary = self.folder / f".rank_{self.world.rank}"
            temporary.write_text(json.dumps(asdict(sign)))
            temporary.replace(path)

    def _read(self) -> dict[int, Sign]:
        signs = {rank: read_sign(self.folder, rank) for rank in range(self.world.world_size)}
        return {rank: sign for rank, sign in signs.items() if sign}


class NullHeartbeat:
    """No files and no watching, for a trainer without a RUN_DIR."""

    def beat(self, step: int) -> None:
        pass

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        yield


def read_sign(folder: Path, rank: int) -> Sign | None:
    """What a rank last wrote, or None if it did not."""
    try:
        return Sign(**json.loads((folder / f"rank_{rank}").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _name(rank: int, sign: Sign | None) -> str:
    return f"rank {rank} ({sign.host}, pid {sign.pid}, at step {sign.step})" if sign else f"rank {rank} (never seen)"
