"""The events of each rank: its warnings and errors, with what it was doing, in RUN_DIR/logs/rank_N.events for `diagnose`."""

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from bisect import bisect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ddp_cifar.distributed.collectives import Collective, Wait, find_wait, recent_collectives
from ddp_cifar.errors import first_line, is_library, short_name
from ddp_cifar.run.memory import new_oom_kills
from ddp_cifar.run.processes import state_and_parent
from ddp_cifar.text_files import parse_json, read_lines, read_text

WARNING, WAITING, ERROR = "warning", "waiting", "error"

MAX_BYTES = 1 << 20
"""A file that is larger starts anew."""


@dataclass(frozen=True)
class Event:
    """A warning, an error, or `waiting`: what a rank did when the run did not move."""

    time: float
    """Unix time."""
    rank: int
    host: str
    pid: int
    step: int
    """Steps that the run had completed."""
    kind: str
    message: str
    began: float = 0.0
    """The Unix time at which its process began to write events."""
    is_cause: bool = True
    """False if the rank ended because another one did."""
    ranks: list[int] = field(default_factory=list)
    """The ranks that are the cause."""
    place: str = ""
    """Where the main thread was, unless it has reported the event itself."""
    oom_kills: int = 0
    """Processes that the kernel has killed for lack of memory on this node since the rank started."""
    collectives: list[Collective] = field(default_factory=list)
    """The rank's last collectives. Empty for a warning."""


class EventLog(logging.Handler):
    """Writes the warnings and errors of this rank, and what it was doing, to its file."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(logging.WARNING)
        self.path = folder / f"rank_{rank}.events"
        self.rank = rank
        self.step = 0
        self.began = time.time()
        self._times: deque[tuple[float, int]] = deque(maxlen=256)
        """The Unix times at which the last steps were completed."""

    def note_step(self, step: int) -> None:
        """Note that the run has completed `step` steps."""
        self.step = step
        self._times.append((time.time(), step))

    def emit(self, record: logging.LogRecord) -> None:
        is_error = record.levelno >= logging.ERROR
        message = getattr(record, "summary", "") or first_line(Exception(record.getMessage()))
        ranks = getattr(record, "ranks", None)
        ranks = [self.rank] if ranks is None else ranks
        self.add(ERROR if is_error else WARNING, message, is_cause=getattr(record, "is_cause", True), ranks=ranks)

    def add(self, kind: str, message: str = "", *, is_cause: bool = True, ranks: Sequence[int] = ()) -> Event:
        """Write an event of this moment. Does not raise."""
        event = Event(
            time.time(),
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self.step,
            kind,
            message,
            self.began,
            is_cause,
            list(ranks),
            "" if threading.current_thread() is threading.main_thread() else place_of_main_thread(),
            new_oom_kills(),
            [] if kind == WARNING else recent_collectives(self._step_at, purposes=kind == WAITING),
        )
        with contextlib.suppress(OSError):
            is_full = self.path.exists() and self.path.stat().st_size > MAX_BYTES
            with open(self.path, "w" if is_full else "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(event)) + "\n")
        return event

    def _step_at(self, when: float) -> int:
        times = list(self._times)
        number = bisect(times, (when,))
        return times[number - 1][1] + 1 if number else 0


def place_of_main_thread() -> str:
    """Say where the main thread is: `data/loader.py:120 (gather), waiting for a disk or a file server`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame) if frame else []
    own = [call for call in stack if not is_library(call.filename)]
    if not own:
        return ""
    text = f"{short_name(own[-1].filename)}:{own[-1].lineno} ({own[-1].name})"
    is_blocked = state_and_parent(os.getpid())[0] == "D"  # "uninterruptible sleep" of the main thread
    return text + ", waiting for a disk or a file server" * is_blocked


@contextlib.contextmanager
def recording_crashes(path: Path) -> Iterator[None]:
    """If this process crashes in C++ code in the body, write the signal and the Python stacks to the file."""
    with open(path, "w") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.enable()  # to stderr
            with contextlib.suppress(OSError):
                path.unlink()


def read_crash(path: Path) -> str:
    """Return `Segmentation fault, in torch/x.py:12 (f)` from a file of `recording_crashes`; "" if the process has not crashed."""
    with contextlib.suppress(OSError, ValueError):
        lines = read_text(path).splitlines()
        if lines and lines[0].startswith("Fatal Python error: "):
            frames = re.findall(
                r'^  File "(.*)", line (\d+) in (.*)$', "\n".join(lines).rpartition("hread 0x")[2], re.MULTILINE
            )
            places = [
                f", in {short_name(name)}:{line} ({function})"
                for name, line, function in frames
                if not is_library(name)
            ]
            return lines[0].removeprefix("Fatal Python error: ") + "".join(places[:1])
    return ""


def find_waits(last: Mapping[int, Event]) -> tuple[Wait, list[str]]:
    """Return what ranks wait for, from the last event of each, and where the main threads of the ranks to blame are."""
    wait = find_wait({rank: event.collectives for rank, event in last.items()})
    return wait, [f"rank {rank} is in {last[rank].place}" for rank in wait.ranks if last[rank].place]


def read_events(logs: Path) -> list[Event]:
    """Return the events of all ranks, oldest first. Lines that cannot be read are skipped."""
    return sorted((event for path in logs.glob("rank_*.events") for event in _read(path)), key=lambda event: event.time)


def _read(path: Path) -> Iterator[Event]:
    with contextlib.suppress(OSError, ValueError):
        for line in read_lines(path):
            with contextlib.suppress(ValueError, TypeError):
                row = parse_json(line)
                calls = [Collective(**call) for call in row.pop("collectives", [])]
                event = Event(**row, collectives=calls)
                if all(
                    isinstance(getattr(event, part.name), part.type)
                    for part in fields(Event)
                    if part.type in (int, str)
                ):
                    yield event
