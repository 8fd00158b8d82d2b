"""RUN_DIR: the layout of all files of a run, and the lock that keeps two runs out of one folder.

config.yaml                   the resolved config
status                        running, stopped: REASON, finished, or failed: REASON; after a crash it is still `running`
metrics.jsonl                 a row of scalars every few steps and at the end of each epoch
tensorboard/                  the same for TensorBoard
checkpoints/step_NNNNNNNN.pt  checkpoints, with links `latest.pt` and `best.pt`
logs/rank_N.log               each rank's log
logs/rank_N.events            its warnings and errors with its last collectives, for `python -m ddp_cifar.diagnose`
logs/rank_N.stacks, .crash    the stacks of its threads after a hang, or after a crash in C++ code
logs/rank_N.memory.pickle     what was allocated when the memory of its GPU ran out
profile/                      profiles of some steps of each rank, on request
pictures/, tracking/          pictures for W&B or MLflow, and what identifies the run there
heartbeats/rank_N             each rank's last heartbeat
bad_nodes                     nodes that slurm/train.sh does not use again, with the reasons
starts.jsonl                  a row for each start of the run
lock                          host and pid of the process that holds it
checkpoints/survivors         a row for each rank that saved its last completed step when another one was lost
STOP, SAVE, PROFILE           created by the user to request: save and stop; save and continue; profile the next steps
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeGuard

from ddp_cifar.config import by_looks, parse_yaml
from ddp_cifar.distributed.environment import is_lost_peer
from ddp_cifar.errors import FaultyReplica, LostRank, NoRestart, UserError, first_line, is_device_failure
from ddp_cifar.log import log
from ddp_cifar.run.memory import lack_of_memory
from ddp_cifar.text_files import parse_json, read_lines, read_text

CLAIM_TIMEOUT_S = 5.0
"""The longest wait for the processes of an earlier start to exit."""

SURVIVORS = "survivors"

MAX_STARTS_IN_VAIN = 3
"""Starts that crash in a row, without a new step, before the run is not started again."""

CRASH_LOOP = "failed: crash loop"

LOST_NODE_TIMEOUT_S = 120.0
"""The longest wait for a file server to release the lock of a lost node (the lease of NFS 4 is 90 s)."""


@dataclass(frozen=True)
class Start:
    """One start of a run, with totals over all earlier starts."""

    time: float
    """Unix time of the command's start."""
    step: int
    """The step of the checkpoint that this start resumes from; 0 without one."""
    world_size: int
    restarts: int = 0
    """The number of earlier starts."""
    steps_lost: int = 0
    """Steps of earlier starts that are in no checkpoint."""
    occupied_s: float = 0.0
    """Seconds for which the processes of earlier starts ran, until rank 0's last heartbeat."""
    productive_s: float = 0.0
    """The part of `occupied_s` that advanced the run: steps and evaluations that were kept, without waits for saves."""
    downtime_s: float = 0.0
    """Seconds between the last heartbeat of each start that crashed and the first step of the next one."""
    found: str = ""
    """The status left by the previous start: `running` if it crashed."""
    about: dict[str, str] = field(default_factory=dict)
    """The recipe, the commit, the hosts and so on."""


class RunDir:
    """The paths in RUN_DIR, and the files that rank 0 writes there."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.heartbeats = self.path / "heartbeats"
        self.logs = self.path / "logs"
        self.starts = self.path / "starts.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.pictures = self.path / "pictures"
        self._lock: IO[str] | None = None

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def claim(self) -> None:
        """Create the folder and lock it until this process exits.

        Raises `UserError` if it cannot be written, or if another run holds the lock.
        """
        try:
            for folder in (self.checkpoints, self.logs, self.heartbeats):
                folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "lock", "a+")  # noqa: SIM115 - held open until the process exits
        except OSError as error:
            raise UserError(
                f"cannot write to run_dir={self.path} ({error.strerror}: {error.filename}); choose another run_dir"
            ) from error
        lock.seek(0)
        holder = lock.read().strip()
        try:
            locked = lock_file(lock, CLAIM_TIMEOUT_S)
            if not locked and not holder.endswith(f" on {socket.gethostname()}"):
                log.info(
                    f"{self.path} is in use by {holder}: waiting {LOST_NODE_TIMEOUT_S:.0f} s, in case its node is lost"
                )
                locked = lock_file(lock, LOST_NODE_TIMEOUT_S)
        except OSError as error:
            log.warning(f"cannot lock {self.path} ({error.strerror}); make sure that only one run uses it")
            return
        if not locked:
            raise UserError(
                f"run_dir={self.path} is in use by {holder or 'another process'}; wait for that run, or choose another run_dir"
            )
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock
        (self.checkpoints / SURVIVORS).unlink(missing_ok=True)  # of the previous start
        for path in self.checkpoints.glob("*.tmp"):  # left by a kill during a write
            path.unlink(missing_ok=True)

    def is_locked(self) -> bool:
        """True if a process holds the lock, so that the run is running. Raises `OSError` if that cannot be known."""
        with open(self.path / "lock", "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def close(self) -> None:
        """Release the lock, if this process holds it."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def note_start(
        self,
        began: float,
        step: int,
        world_size: int,
        last_seen: tuple[float, int] | None,
        productive_s: float = 0.0,
        about: dict[str, str] | None = None,
    ) -> Start:
        """Add a row to starts.jsonl for a start at Unix time `began` that resumes from `step`.

        `last_seen` is the Unix time and the step of the last heartbeat of the previous start, if any.
        """
        start = Start(began, step, world_size, about=about or {})
        if before := next(reversed(self.read_starts()), None):
            end, reached = last_seen or (before.time, before.step)
            lost = before.steps_lost + max(0, reached - step)
            occupied_s = before.occupied_s + max(0.0, end - before.time)
            restarts, found = before.restarts + 1, self.read_status()
            downtime_s = before.downtime_s + (max(0.0, time.time() - end) if _is_crash(found) else 0.0)
            totals = restarts, lost, occupied_s, productive_s, downtime_s, found
            start = Start(began, step, world_size, *totals, about or {})
        with open(self.starts, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start)) + "\n")
        return start

    def read_starts(self) -> list[Start]:
        """Return all starts of the run, oldest first."""
        starts = []
        with contextlib.suppress(FileNotFoundError):
            for line in read_lines(self.starts):
                with contextlib.suppress(ValueError, TypeError):  # a crash may leave an incomplete line
                    start = Start(**parse_json(line))
                    if all(isinstance(value, float | int) for value in astuple(start)[:-2]):
                        starts.append(start)
        return starts

    def check_crash_loop(self, step: int, reached: int) -> None:
        """Raise `NoRestart` if the last starts have crashed without a new step, as the next one would.

        The next start resumes from `step`; the last one reached step `reached`. The same error twice is enough; crashes
        without a known error have to be three in a row.
        """
        starts, status = self.read_starts(), self.read_status()
        ends = [*(start.found for start in starts[1:]), status]
        lost = [start.steps_lost for start in starts] + [starts[-1].steps_lost if starts else 0]
        resumed = [start.step for start in starts] + [max(step, reached)]
        in_vain = 0  # the number of last starts that crashed without a new step
        for number in reversed(range(len(starts))):
            new_steps = resumed[number + 1] - resumed[number] + lost[number + 1] - lost[number]
            if new_steps > 0 or not _is_crash(ends[number]):
                break
            in_vain += 1
        same_error = in_vain and status.startswith("failed") and ends[-2:] == [status, status]
        if same_error or in_vain >= MAX_STARTS_IN_VAIN:
            what = f"{status} (twice)" if same_error else f"{in_vain} starts crashed"
            message = (
                f"not starting again: {what} at step {step}, without a new step; see {self.logs}, fix the cause, then run the "
                f"same command"
            )
            self.write_status(f"{CRASH_LOOP}: {message}")
            raise NoRestart(message)

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml as nested dicts. Raises `OSError`, or `ValueError` if it has no keys."""
        config = by_looks(parse_yaml(read_text(self.path / "config.yaml"), "config.yaml is not YAML"))
        if not isinstance(config, dict):
            raise ValueError("config.yaml has no keys")
        return config

    def write_config(self, text: str) -> None:
        """Write the resolved config to config.yaml."""
        (self.path / "config.yaml").write_text(text)

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Set the status to `failed: REASON` if the body raises. Used on every rank; the first reason is kept.

        An error for which `is_lost_peer` is true sets no status: the lost rank sets its own, or was killed (still `running`).
        Raises `LostRank` instead if the kernel has killed a rank of this node for lack of memory.
        """
        try:
            yield
        except Exception as error:
            if is_lost_peer(error) and (reason := lack_of_memory()):
                raise LostRank(reason) from error
            if isinstance(error, FaultyReplica):
                self.note_bad_node(f"has a faulty rank: {first_line(error)}")
            elif is_device_failure(error):
                self.note_bad_node(f"has a GPU that failed: {first_line(error)}")
            if not is_lost_peer(error) and not self.read_status().startswith("failed"):
                self.write_status(f"failed: {first_line(error)}")
            raise

    def note_bad_node(self, reason: str) -> None:
        """Add this node to bad_nodes, so that slurm/train.sh does not use it again."""
        node = os.environ.get("NODE_NAME", socket.gethostname())
        with contextlib.suppress(OSError), open(self.path / "bad_nodes", "a", encoding="utf-8") as file:
            file.write(f"{node} {reason}\n")

    def read_status(self) -> str:
        try:
            return next(read_lines(self.path / "status"), "").strip()
        except (OSError, ValueError):
            return ""

    def write_status(self, status: str) -> None:
        try:
            (self.path / "status").write_text(status + "\n")
        except OSError as error:
            log.warning(f"cannot write {self.path / 'status'} ({error.strerror}); the status is {status}")


def _is_crash(status: str) -> bool:
    """True for the status that a crash or a failure leaves, but not after the end of a crash loop: the cause may be fixed."""
    return status == "running" or (status.startswith("failed") and not status.startswith(CRASH_LOOP))


def read_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl. While a run is running, its last line may be incomplete; it is skipped.

    Raises `OSError`, or `ValueError` if a line is not a row.
    """
    for number, line in enumerate(read_lines(metrics), 1):
        if line.endswith("\n"):
            row = parse_json(line)
            if not is_row(row):
                raise ValueError(f"line {number} of {metrics.name} is not a row of metrics")
            yield row


def is_row(value: object) -> TypeGuard[dict[str, Any]]:
    """True for a row of metrics.jsonl: an integer `step`, and scalars by tag."""
    if not isinstance(value, dict) or not all(isinstance(item, str | float | int | None) for item in value.values()):
        return False
    return type(value.get("step")) is int and isinstance(value.get("train/epoch", 0), int)


def lock_file(file: IO[str], timeout_s: float) -> bool:
    """Lock `file`; return False if another process holds the lock for `timeout_s`. Raises `OSError` without lock support."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                return False
        time.sleep(0.1)
