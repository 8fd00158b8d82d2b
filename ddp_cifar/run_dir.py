"""RUN_DIR: all that a run writes, its layout, and the lock that keeps two runs out of one folder.

config.yaml                   the resolved config
status                        running, finished, or failed: REASON; `running` left by a dead process means it crashed
metrics.jsonl                 a row of scalars every few steps and at every epoch's end
tensorboard/                  the same for TensorBoard
checkpoints/step_NNNNNNNN.pt  checkpoints, with links `latest.pt` and `best.pt`
logs/rank_N.log               each rank's text
lock                          host and pid of the run that holds it
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ddp_cifar.errors import UserError
from ddp_cifar.log import log


class RunDir:
    """Paths under RUN_DIR, and what rank 0 keeps there."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self._lock: IO[str] | None = None

    def rank_log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank_{rank}.log"

    def claim(self) -> None:
        """Make the folder and lock it for this process, until that ends, however it ends.

        Raises `UserError` if it cannot be written, or if another run holds it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.rank_log(0).parent.mkdir(exist_ok=True)
            lock = open(self.path / "lock", "a+")  # noqa: SIM115 - held open for as long as the process lives
        except OSError as error:
            raise UserError(
                f"cannot write to run_dir={self.path} ({error.strerror}: {error.filename}): choose another run_dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning(f"{self.path} cannot be locked ({error.strerror}): see to it that only one run uses it")
                return
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"run_dir={self.path} is in use by {holder}: wait for that run, or choose another run_dir"
            ) from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def write_config(self, text: str) -> None:
        """Keep the resolved config."""
        (self.path / "config.yaml").write_text(text)

    @contextlib.contextmanager
    def keeping_status(self) -> Iterator[None]:
        """`running` during the body; then `finished`, or `failed` with the reason."""
        self.write_status("running")
        try:
            yield
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            self.write_status(f"failed: {reason.splitlines()[0]}")
            raise
        self.write_status("finished")

    def write_status(self, status: str) -> None:
        try:
            (self.path / "status").write_text(status + "\n")
        except OSError as error:
            log.warning(f"cannot write {self.path / 'status'} ({error.strerror}); the status is: {status}")
