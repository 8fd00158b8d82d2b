"""Heartbeats: a file per rank in RUN_DIR/heartbeats, and the detection of hangs."""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ddp_cifar.command import leave
from ddp_cifar.distributed.collectives import Wait
from ddp_cifar.distributed.world import World
from ddp_cifar.run.events import WAITING, EventLog, find_waits, read_events
from ddp_cifar.run.memory import oom_kills, peak_host_memory
from ddp_cifar.run.processes import dump_native_stacks, kill_sibling
from ddp_cifar.run.signs import Sign, read_sign

INTERVALS = 12
"""The least number of heartbeats within `train.silent_timeout_s` and `train.hang_timeout_s`."""

LONGEST_INTERVAL_S = 5.0

READERS = 32
"""About this many ranks read the files of all. If 1,000 ranks did so in a hang, they would open a million files at once."""


class Heartbeat:
    """Writes this rank's file from a thread, and detects lost ranks until all ranks have ended, and hangs in training.

    If one rank hangs, all others wait for it in a collective. So a rank that makes no progress reads the files of the ranks
    that it watches (`watched_by`), four times in `silent_timeout_s`. A rank whose `ticks` are the same in four readings is lost.
    Otherwise, if the `beats` of no rank grow for `timeout_s`, the run hangs.
    """

    def __init__(self, folder: Path, logs: Path, world: World, timeout_s: float, silent_timeout_s: float) -> None:
        self.folder = folder
        self.logs: Path | None = logs
        self.stacks = logs / f"rank_{world.rank}.stacks"
        self.events = EventLog(logs, world.rank)
        self.world = world
        self.watched = watched_by(world)
        # the ranks that watch all others know who is behind, and say it first
        self.patience = 0.9 if len(self.watched) == world.world_size else 0.95
        self.timeout_s = timeout_s
        self.silent_timeout_s = min(silent_timeout_s, 0.8 * timeout_s)
        # the next start reads rank 0's file to find the last step of this one
        self.interval_s = min(1.0 if world.is_main else LONGEST_INTERVAL_S, self.silent_timeout_s / INTERVALS)
        self.beats = 0
        self.ticks = 0
        self._hangs = False
        """True while a rank that makes no progress means that the run hangs."""
        self._recorded = 0.0
        """The Unix time at which this rank has recorded what it waits for."""
        self._before_leaving: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not kind:
            self.world.max(0)  # wait for the others: nobody would watch a rank that is stopped after they have left
        self._closed.set()
        self._thread.join()
        self._write()

    def beat(self, step: int) -> None:
        """Count a step or evaluation batch of the main thread; `step` is the number of steps that the run has completed."""
        self.beats += 1
        self.events.note_step(step)

    @contextlib.contextmanager
    def watching(self, before_leaving: Callable[[], None]) -> Iterator[None]:
        """Train in the body. Exit the process if no rank makes progress for `timeout_s`.

        Before it exits for this reason, or because a rank is lost, it calls `before_leaving`.
        """
        self.beats += 1
        self._hangs, self._before_leaving = True, before_leaving
        try:
            yield
        finally:
            self._hangs, self._before_leaving = False, lambda: None

    # -- the thread

    def _run(self) -> None:
        last_beats, since, last = -1, 0.0, time.monotonic()
        readings: list[dict[int, Sign]] = []
        next_reading = 0.2
        """In multiples of `silent_timeout_s`."""
        before: dict[int, Sign] = {}
        dumped = False
        while not self._closed.wait(min(1.0, self.interval_s)):
            now = time.monotonic()
            was_stopped, last = now - last > 0.3 * self.silent_timeout_s, now
            if now - self._written >= self.interval_s:
                self._write()
            if self.beats != last_beats or was_stopped:
                last_beats, since, readings, next_reading, before, dumped = self.beats, now, [], 0.2, {}, False
                continue
            silent, quiet = (now - since) / self.silent_timeout_s, (now - since) / self.timeout_s
            if silent > next_reading:  # again and again, as a rank may be lost at any time
                next_reading += 0.25
                readings = [*readings[-3:], self._read()]
                if len(readings) == 4:
                    self._check_lost(readings[0], readings[-1])
            if not self._hangs:
                before = {}
            elif quiet > 0.45 and not before:
                before = self._read()
            elif quiet > 0.75 and not dumped:
                after = self._read()
                if any(after[rank].beats != sign.beats for rank, sign in before.items() if rank in after):
                    # a rank makes progress: a long step, or rank 0 waits for its disk
                    since, readings, next_reading, before = now, [], 0.2, {}
                    continue
                dumped = True
                self._record_wait()  # before any rank exits: the first exit shuts down the others
                last = time.monotonic()  # py-spy stops this process while it reads the stacks
            elif quiet > self.patience:
                self._before_leaving()
                message, ranks = self._describe(before, self._read())
                leave(message, ranks=ranks)

    def _check_lost(self, before: dict[int, Sign], after: dict[int, Sign]) -> None:
        """Exit if a rank has written no heartbeat between the two times. Its process is killed if it is on this machine."""
        silent = [rank for rank in self.watched if _ticks(after, rank) == _ticks(before, rank)]
        if not silent or self.world.rank in silent:  # this rank's own file does not change: the disk does not work
            return
        self._record_wait()
        self._before_leaving()
        for rank in silent:
            if rank in after and after[rank].host == socket.gethostname():
                kill_sibling(after[rank].pid)  # torchrun would wait 30 s for a process that is stopped
        names = ", ".join(_name(rank, after.get(rank)) for rank in silent)
        leave(
            f"no heartbeat from {names} for {self.silent_timeout_s:g} s (train.silent_timeout_s): the process is stopped, or its "
            f"machine is lost",
            ranks=silent,
        )

    def _describe(self, before: dict[int, Sign], after: dict[int, Sign]) -> tuple[str, Sequence[int]]:
        """Return the message about a hang, and the ranks that are its cause, as far as they are known."""
        quiet_s = self.patience * self.timeout_s
        message = f"no rank has made progress for {quiet_s:.0f} s (train.hang_timeout_s={self.timeout_s:g})"
        if len(self.watched) < self.world.world_size:
            return f"{message}; see the errors of the ranks that read all heartbeats", []
        fewest = min((sign.beats for sign in after.values()), default=0)
        behind = [sign for sign in after.values() if sign.beats == fewest]
        if _ticks(after, self.world.rank) == _ticks(before, self.world.rank):
            reason = f"the files in {self.folder} do not change, check that disk"
        elif len(behind) == len(after):
            reason = f"all ranks are alive and waiting after step {self.events.step}"
        else:
            names = ", ".join(map(str, behind))
            reason = f"all ranks are alive, but {names} {'is' if len(behind) == 1 else 'are'} behind the others"
        wait, places = self._read_waits()
        reason += "".join(f"; {text}" for text in (wait.text, *places[:3]) if text)
        message += f": {reason}; see the Python stacks of each live rank in {self.stacks.parent}/rank_*.stacks"
        return message, wait.ranks or [sign.rank for sign in behind if len(behind) < len(after)]

    def _record_wait(self) -> None:
        """Record what this rank does: an event, and the stacks of all threads."""
        self._recorded = self.events.add(WAITING).time
        with contextlib.suppress(OSError), open(self.stacks, "w") as file:
            file.write(f"rank {self.world.rank} at {time.ctime()}, after step {self.events.step}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            dump_native_stacks(file, timeout_s=0.1 * self.timeout_s)

    def _read_waits(self) -> tuple[Wait, list[str]]:
        """Return what ranks wait for, from what they have recorded, and where the main threads of the ranks to blame are."""
        events = read_events(self.stacks.parent)
        last = {
            event.rank: event
            for event in events
            if event.kind == WAITING and event.time > self._recorded - self.timeout_s
        }
        return find_waits(last)

    # -- the files

    def _write(self) -> None:
        self.ticks += 1
        self._written = time.monotonic()
        process = (self.world.rank, socket.gethostname(), os.getpid())
        memory = peak_host_memory(), oom_kills()
        sign = Sign(*process, self.ticks, self.beats, self.events.step, time.time(), *memory)
        with contextlib.suppress(OSError):
            path = self.folder / f"rank_{self.world.rank}"
            temporary = self.folder / f".rank_{self.world.rank}"
            temporary.write_text(json.dumps(asdict(sign)))
            temporary.replace(path)

    def _read(self) -> dict[int, Sign]:
        signs = {rank: read_sign(self.folder, rank) for rank in self.watched}
        return {rank: sign for rank, sign in signs.items() if sign}


def watched_by(world: World) -> Sequence[int]:
    """Return the ranks whose files this rank reads: all of them if it is a reader, else the readers and those of its node."""
    everyone, stride = range(world.world_size), -(-world.world_size // READERS)
    if world.rank % stride == 0:
        return everyone
    first = world.rank - world.local_rank
    return sorted({*everyone[::stride], *everyone[first : first + world.local_world_size]})


class NullHeartbeat:
    """Does nothing. For a trainer without a RUN_DIR."""

    logs: Path | None = None

    def beat(self, step: int) -> None:
        pass

    @contextlib.contextmanager
    def watching(self, before_leaving: Callable[[], None]) -> Iterator[None]:
        yield


def _ticks(signs: Mapping[int, Sign], rank: int) -> int:
    """Return a rank's number of heartbeats, 0 if it has none."""
    return signs[rank].ticks if rank in signs else 0


def _name(rank: int, sign: Sign | None) -> str:
    return str(sign) if sign else f"rank {rank} (no heartbeat yet)"
