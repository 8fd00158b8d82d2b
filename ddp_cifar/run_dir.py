"""RUN_DIR: all that a run writes, its layout, and the lock that keeps two runs out of one folder.

config.yaml                   the resolved config
status                        running, stopped: BY WHAT, finished, or failed: REASON; `running` left by dead processes: a crash
metrics.jsonl                 a row of scalars every few steps and at every epoch's end
tensorboard/                  the same for TensorBoard
checkpoints/step_NNNNNNNN.pt  checkpoints, with links `latest.pt` and `best.pt`
logs/rank_N.log               each rank's text; rank_N.stacks: where each Python thread was when the run hung
heartbeats/rank_N             each rank's last sign of life
starts.jsonl                  a row for each start of the run
lock                          host and pid of the run that holds it
STOP, SAVE                    files that its user makes: stop, and save; save and go on
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from ddp_cifar.errors import UserError
from ddp_cifar.log import log

CLAIM_PATIENCE_S = 5.0
"""Processes of a start that was ended may take a moment to be gone ..."""
LOST_NODE_PATIENCE_S = 120.0
"""... and a file server may take a while to learn that a node is (NFS 4: its lease, of 90 s)."""


@dataclass(frozen=True)
class Start:
    """One start of a run, and what the ones before it came to."""

    time: float
    """Unix time of the command's start."""
    step: int
    """Of the checkpoint that it goes on from; 0 without one."""
    world_size: int
    restarts: int = 0
    """Starts before this one."""
    steps_lost: int = 0
    """Steps that earlier starts computed and no checkpoint kept."""
    occupied_s: float = 0.0
    """Seconds for which the processes of earlier starts lived, as far as rank 0's last sign of life ..."""
    productive_s: float = 0.0
    """... and of these the ones that advanced the run: of steps and evaluations that are kept, not of waiting for saves."""
    found: str = ""
    """The status that the start before it has left: `running` where that has crashed."""


class RunDir:
    """Paths under RUN_DIR, and what rank 0 keeps there."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.heartbeats = self.path / "heartbeats"
        self.logs = self.path / "logs"
        self.starts = self.path / "starts.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self._lock: IO[str] | None = None

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def claim(self) -> None:
        """Make the folder and lock it for this process, until that ends, however it ends.

        Raises `UserError` if it cannot be written, or if another run holds it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            self.heartbeats.mkdir(exist_ok=True)
            lock = open(self.path / "lock", "a+")  # noqa: SIM115 - held open for as long as the process lives
        except OSError as error:
            raise UserError(
                f"cannot write to run_dir={self.path} ({error.strerror}: {error.filename}): choose another run_dir"
            ) from error
        lock.seek(0)
        holder = lock.read().strip()
        try:
            locked = lock_file(lock, CLAIM_PATIENCE_S)
            if not locked and not holder.endswith(f" on {socket.gethostname()}"):
                log.info(
                    f"{self.path} is in use by {holder}: waiting {LOST_NODE_PATIENCE_S:.0f} s, in case its node is gone"
                )
                locked = lock_file(lock, LOST_NODE_PATIENCE_S)
        except OSError as error:
            log.warning(f"{self.path} cannot be locked ({error.strerror}): see to it that only one run uses it")
            return
        if not locked:
            raise UserError(
                f"run_dir={self.path} is in use by {holder or 'another process'}: wait for that run, or choose another run_dir"
            )
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock
        for path in self.checkpoints.glob("*.tmp"):  # what a kill in the middle of a write left
            path.unlink(missing_ok=True)

    def note_start(
        self,
        began: float,
        step: int,
        world_size: int,
        last_seen: tuple[float, int] | None,
        productive_s: float = 0.0,
    ) -> Start:
        """Add a row to starts.jsonl for a start at unix time `began`, which goes on from `step`.

        `last_seen`: when the start before it last gave a sign of life, and at which step, if it did.
        """
        start = Start(began, step, world_size)
        if before := next(reversed(self.read_starts()), None):
            end, reached = last_seen or (before.time, before.step)
            lost = before.steps_lost + max(0, reached - step)
            occupied_s = before.occupied_s + max(0.0, end - before.time)
            restarts, found = before.restarts + 1, self.read_status()
            start = Start(began, step, world_size, restarts, lost, occupied_s, productive_s, found)
        with open(self.starts, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start)) + "\n")
        return start

    def read_starts(self) -> list[Start]:
        """All starts of the run, the first one first."""
        starts = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.starts.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a crash may have left half a line
                    starts.append(Start(**json.loads(line)))
        return starts

    def write_config(self, text: str) -> None:
        """Keep the resolved config."""
        (self.path / "config.yaml").write_text(text)

    @contextlib.contextmanager
    def recording_failure(self, is_lost_peer: Callable[[BaseException], bool]) -> Iterator[None]:
        """On every rank: the status becomes `failed: REASON` if the body raises, with the reason of the first that does.

        But not for the error of a rank whose peers are gone. Theirs is the reason; or they were killed, and `running` stays.
        """
        try:
            yield
        except Exception as error:
            if not is_lost_peer(error) and not self.read_status().startswith("failed"):
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self.write_status(f"failed: {reason}")
            raise

    def read_status(self) -> str:
        try:
            return (self.path / "status").read_text().strip()
        except OSError:
            return ""

    def write_status(self, status: str) -> None:
        try:
            (self.path / "status").write_text(status + "\n")
        except OSError as error:
            log.warning(f"cannot write {self.path / 'status'} ({error.strerror}); the status is: {status}")


def lock_file(file: IO[str], patience_s: float) -> bool:
    """Lock `file`; False if another process holds it for longer than `patience_s`. Raises `OSError` if it cannot be locked."""
    deadline = time.monotonic() + patience_s
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
