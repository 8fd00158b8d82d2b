"""What happened to a run, from the files in its RUN_DIR: the cause, the ranks and hosts, what was lost, and what to do."""

import contextlib
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ddp_cifar.distributed.collectives import ranks_text
from ddp_cifar.run.events import ERROR, WAITING, WARNING, Event, find_waits, read_crash, read_events
from ddp_cifar.run.memory import oom_kills
from ddp_cifar.run.run_dir import CRASH_LOOP, RunDir, Start, read_rows
from ddp_cifar.run.signs import read_signs

VERIFIED = "run/verified_micro_batches"
"""The tag of a row of a check of the devices."""

SILENT_S = 20.0
"""A live rank has written a heartbeat in the last so many seconds."""

ADVICE = (
    (r"lack of memory|out of memory", "request more memory, or use a smaller train.micro_batch_size"),
    (r"is not finite", "see docs/faq.md, The loss is NaN"),
    (r"one of .* computes wrong", "run the preflight on these nodes; then run the same command to resume"),
    (r"computed wrong", "leave that node out, and run the preflight on it; then run the same command to resume"),
    (r"the (weights|optimizer state) of .* differ", "leave that node out, and run the preflight on it"),
    (r"no heartbeat from", "check that host, then run the same command to resume"),
    (
        r"skipped a collective",
        "all ranks must call the same collectives in the same order: check user-defined code",
    ),
    (r"do not change, check that disk", "check the file system of RUN_DIR, then run the same command to resume"),
    (r"no rank has made progress", "look at the place where that rank is; then run the same command to resume"),
    (r"not starting again", "fix the cause of the starts before, then run the same command"),
    (r"could not be saved|No space left", "free space on the disk of RUN_DIR, then run the same command"),
    (
        r"was killed|were killed",
        "find out who has killed it (dmesg; sacct -j JOB), then run the same command to resume",
    ),
)
"""What to do, by a part of the cause."""

RESUME = "run the same command to resume"


class Process(NamedTuple):
    """A rank, and where it ran."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Diagnosis:
    """What happened to a run. Texts are whole sentences or parts of them, without a line break."""

    run_dir: str
    state: str
    """never started, starting, running, finished, stopped, failed, or crashed."""
    cause: str = ""
    """Why the run is in this state."""
    time: float | None = None
    """The Unix time of the cause, or of the last sign of life."""
    step: int = 0
    """Steps that the run had completed."""
    ranks: Sequence[Process] = ()
    """The ranks that are the cause, as far as they are known."""
    world_size: int = 0
    hosts: Sequence[str] = ()
    starts: int = 0
    steps_lost: int = 0
    """Steps that the next start has to compute again."""
    checkpoint: str = ""
    """The newest checkpoint."""
    advice: str = ""
    checks: int = 0
    """Checks of the devices that have found nothing wrong."""
    peak_memory: int = 0
    """The largest peak memory of a rank on its host, in bytes."""
    details: Sequence[str] = field(default_factory=list)
    """What else is known."""


def diagnose(path: str, now: float | None = None) -> Diagnosis:
    """Return what happened to the run in the folder `path`. Files that are missing or damaged are skipped."""
    return _Reader(RunDir(path), time.time() if now is None else now).diagnose()


class _Reader:
    """The files of a run, as far as they can be read."""

    def __init__(self, run_dir: RunDir, now: float) -> None:
        self.run_dir = run_dir
        self.now = now
        self.status = run_dir.read_status()
        self.starts: list[Start] = []
        with contextlib.suppress(OSError, ValueError):
            self.starts = run_dir.read_starts()
        self.signs = read_signs(run_dir.heartbeats)
        self.last_sign = max((sign.time for sign in self.signs.values()), default=0.0)
        began = self.starts[-1].time if self.starts else 0.0
        world_size = self.starts[-1].world_size if self.starts else 0
        if self.signs and self.status != "running":  # a start that has not begun to train may have had other ranks
            world_size = max(world_size, 1 + max(self.signs))
        self.world_size = world_size
        events = read_events(run_dir.logs)
        self.earlier = [event for event in events if event.time < began]
        self.events = [event for event in events if event.time >= began]
        self.checkpoints = sorted(run_dir.checkpoints.glob("step_*.pt"))
        self.step = max([sign.step for sign in self.signs.values()] + [event.step for event in self.events], default=0)

    def diagnose(self) -> Diagnosis:
        errors = [event for event in self.events if event.kind == ERROR]
        causes = [event for event in errors if event.is_cause]
        word, _, reason = self.status.partition(": ")
        if self._is_alive():
            return self._alive()
        if not self.status and not self.signs and not causes:
            exists = "has no files of a run" if self.run_dir.path.is_dir() else "does not exist"
            cause = f"{self.run_dir.path} {exists}: the run failed before it opened this folder, or has another run_dir"
            return self._build("never started", cause, advice="read the last line of the launcher's output")
        if self.status.startswith(CRASH_LOOP):
            cause = self.status.removeprefix(f"{CRASH_LOOP}: ")
            return self._build("failed", cause, details=self._earlier_causes())
        if word == "failed":
            return self._build("failed", reason, self._blamed(causes))
        if later := [event for event in causes if event.began > self._time_of_status()]:
            details = (
                [f"that start had not begun to train; the status before it is {self.status}"] if self.status else []
            )
            state = "failed" if self.status else "never started"
            return self._build(state, later[0].message, self._blamed(later), details=details)
        if causes:
            state = word if word in ("finished", "stopped") else "crashed"
            return self._build(state, causes[0].message, self._blamed(causes), details=self._waits())
        if word == "finished":
            return self._build("finished", self._last_result(), advice="nothing")
        if word == "stopped":
            return self._build("stopped", reason, advice=RESUME)
        return self._crashed(errors)

    def _crashed(self, errors: Sequence[Event]) -> Diagnosis:
        """A run whose ranks have ended without saying why, or only because others did."""
        wait, _ = find_waits(self._last_events())
        if wait.differs:
            details = [f"rank {rank} crashed: {text}" for rank in range(self.world_size) if (text := self._crash(rank))]
            return self._build("crashed", wait.text, self._processes(wait.ranks), details=details[:3])
        speaking = {event.rank for event in errors}
        dead = self._processes(rank for rank in range(self.world_size) if rank not in speaking)
        if not dead:
            return self._build("crashed", errors[0].message if errors else "its processes have ended")
        names = ", ".join(map(str, dead[:3])) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        if not speaking:
            names = f"all ranks ({ranks_text([process.rank for process in dead])})"
        was = "was" if len(dead) == 1 else "were"
        hosts = {process.host for process in dead}
        lack_of_memory = any(event.oom_kills for event in self.events if event.host in hosts)
        if socket.gethostname() in hosts:
            lack_of_memory |= all(oom_kills() > self.signs[process.rank].oom_kills for process in dead)
        if crashed := [process for process in dead if self._crash(process.rank)]:
            dead = crashed
            cause = "; ".join(f"{process} crashed: {self._crash(process.rank)}" for process in dead[:3])
        elif lack_of_memory:
            cause = f"{names} {was} killed by the kernel for lack of memory"
        else:
            they = "it" if len(dead) == 1 else "they"
            cause = f"{names} {was} killed, or the machine was lost: {they} ended without an error"
        return self._build("crashed", cause, dead, details=self._waits())

    def _alive(self) -> Diagnosis:
        silent = [sign.rank for sign in self.signs.values() if self.last_sign - sign.time > SILENT_S]
        ranks = self._processes(rank for rank in silent if rank < self.world_size)
        state = "running" if self.status == "running" else "starting"
        if ranks:
            names = ", ".join(map(str, ranks[:3]))
            advice = "check that host; the run ends by itself after train.silent_timeout_s"
            return self._build(state, f"no heartbeat from {names}", ranks, advice)
        return self._build(state, "it trains" if state == "running" else "it has not begun to train", advice="nothing")

    def _is_alive(self) -> bool:
        try:
            return self.run_dir.is_locked()
        except FileNotFoundError:
            return False
        except OSError:  # a file system without locks
            return self.now - self.last_sign < SILENT_S

    def _build(
        self,
        state: str,
        cause: str,
        ranks: Sequence[Process] = (),
        advice: str = "",
        details: Sequence[str] = (),
    ) -> Diagnosis:
        newest = self.checkpoints[-1] if self.checkpoints else None
        saved = int(newest.stem.removeprefix("step_")) if newest and newest.stem[5:].isdigit() else 0
        failed = state not in ("finished", "running", "starting", "never started")
        return Diagnosis(
            run_dir=str(self.run_dir.path),
            state=state,
            cause=cause,
            time=next((event.time for event in self.events if event.message == cause), self.last_sign) or None,
            step=self.step,
            ranks=ranks,
            world_size=self.world_size,
            hosts=sorted({sign.host for sign in self.signs.values()}),
            starts=len(self.starts),
            steps_lost=max(0, self.step - saved) if failed else 0,
            checkpoint=str(newest) if newest else "",
            advice=advice or next((text for part, text in ADVICE if re.search(part, cause)), RESUME),
            checks=sum(VERIFIED in row for row in self._rows()),
            peak_memory=max((sign.peak_memory for sign in self.signs.values()), default=0),
            details=[*(detail for detail in details if detail not in cause), *self._warnings()],
        )

    def _crash(self, rank: int) -> str:
        return read_crash(self.run_dir.rank_log(rank).with_suffix(".crash"))

    def _processes(self, ranks: Iterable[int]) -> list[Process]:
        """The ranks' processes, of those that have written a heartbeat."""
        signs = [self.signs[rank] for rank in sorted(set(ranks)) if rank in self.signs]
        return [Process(sign.rank, sign.host, sign.pid) for sign in signs]

    def _blamed(self, causes: Sequence[Event]) -> list[Process]:
        """The ranks that are the cause according to the first event, and to those with its message; none if these are all.

        If that event names none, they are the ranks that have ended without an error.
        """
        ranks = {rank for event in causes if event.message == causes[0].message for rank in event.ranks}
        if causes and not ranks:
            ranks = set(range(self.world_size)) - {event.rank for event in self.events if event.kind != WARNING}
        return self._processes(ranks) if len(ranks) < self.world_size else []

    def _time_of_status(self) -> float:
        with contextlib.suppress(OSError):
            return (self.run_dir.path / "status").stat().st_mtime
        return 0.0

    def _last_events(self) -> dict[int, Event]:
        """The event of each rank that has its last collectives: when it waited or, if it did not, when it failed."""
        last = {event.rank: event for event in self.events if event.kind == ERROR and event.collectives}
        return last | {event.rank: event for event in self.events if event.kind == WAITING and event.collectives}

    def _waits(self) -> list[str]:
        """What the ranks waited for, and where the ranks were that they waited for."""
        wait, places = find_waits(self._last_events())
        return [text for text in (wait.text, *places[:2]) if text]

    def _earlier_causes(self) -> list[str]:
        """The errors of the starts before a crash loop, each once."""
        found = dict.fromkeys(event.message for event in self.earlier if event.kind == ERROR and event.is_cause)
        return [f"before: {message}" for message in list(found)[-3:]]

    def _warnings(self) -> list[str]:
        warnings = [event for event in self.events if event.kind == WARNING]
        if not warnings:
            return []
        last = warnings[-1]
        return [
            f"{len(warnings)} warning{'s' * (len(warnings) > 1)}, the last one from rank {last.rank}: {last.message}"
        ]

    def _rows(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            yield from read_rows(self.run_dir.metrics)

    def _last_result(self) -> str:
        """The last accuracies in metrics.jsonl."""
        last: dict[str, float] = {}
        for row in self._rows():
            last |= {tag: value for tag, value in row.items() if tag in ("val/accuracy", "test/accuracy")}
        return (
            ", ".join(f"{tag.partition('/')[0]} accuracy {100 * value:.2f}%" for tag, value in last.items())
            or "all steps are done"
        )
