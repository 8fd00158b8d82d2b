"""What a process was asked to do while it trains: to stop, or to save and go on. By whom: a signal, a file, the clock.

Each rank knows only what it was asked itself. Ranks tell each other every few steps (`Agreement`), so that all of them act
at the same step, whichever was asked.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ddp_cifar import LAUNCHER
from ddp_cifar.command import leave
from ddp_cifar.distributed import World
from ddp_cifar.log import log

REASONS = ("", "SIGTERM", "SIGINT", "SIGUSR1", "the file STOP", "train.deadline", "train.max_hours")
"""Why a rank would stop; a rank that was not asked has the first."""

LOOK_EVERY_S = 1.0


class Requests:
    """Collects what this process is asked, on a thread of its own.

    SIGUSR1 counts from the beginning; SIGTERM and SIGINT end the process as usual until `catch_signals`. After a SIGINT,
    any signal ends the process at once, even where the main thread is blocked; so does the death of the torchrun that
    started it. The files STOP and SAVE are looked for in `folder`, if this rank is given one. A `deadline` is a unix time, and
    the reason to stop then.
    """

    def __init__(self, folder: Path | None = None, deadline: tuple[float, str] | None = None) -> None:
        self.folder = folder
        self.deadline = deadline
        self.reason = ""
        self._save = False
        self._handlers: dict[int, Any] = {}
        self._closed = False

    def __enter__(self) -> "Requests":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python's own handlers wait for the main thread, which may be blocked; this the system's handler writes to
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._catch(signal.SIGUSR1)
        self._thread = threading.Thread(target=self._watch, name="requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        self._closed = True
        self._writer.close()
        self._thread.join()
        self._reader.close()
        for signum, handler in self._handlers.items():  # last, as one that comes meanwhile would kill
            signal.signal(signum, handler)

    def catch_signals(self) -> None:
        """From here on SIGTERM and SIGINT ask the run to stop."""
        self._catch(signal.SIGTERM)
        self._catch(signal.SIGINT)

    def take_save(self) -> bool:
        """True if a checkpoint was asked for since the last call."""
        if not self._save:
            return False
        self._save = False  # one that comes just now is served by the same checkpoint
        return True

    def stopped(self) -> None:
        """The run has stopped: the file STOP has done its work."""
        if self.folder:
            (self.folder / "STOP").unlink(missing_ok=True)

    def _catch(self, signum: signal.Signals) -> None:
        self._handlers[signum] = signal.signal(signum, lambda *_: None)

    def _watch(self) -> None:
        while not self._closed:
            ready, _, _ = select.select([self._reader], [], [], LOOK_EVERY_S)
            for signum in self._reader.recv(64) if ready else b"":
                self._on_signal(signum)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER:
                leave("torchrun is gone, which started this rank: it ends too; start the run again to go on")
            if self.deadline is not None and time.time() >= self.deadline[0]:
                self._ask(self.deadline[1])
            if self.folder:
                self._look(self.folder)

    def _on_signal(self, signum: int) -> None:
        if signum not in self._handlers:
            return
        if self.reason == "SIGINT":
            leave(f"{signal.Signals(signum).name} after SIGINT: left at once, without saving")
        self._ask(signal.Signals(signum).name)

    def _look(self, folder: Path) -> None:
        try:
            if (folder / "STOP").exists():
                self._ask("the file STOP")
            if (folder / "SAVE").exists():
                (folder / "SAVE").unlink()
                self._save = True
        except OSError:
            pass  # a folder that is gone for a while asks for nothing

    def _ask(self, reason: str) -> None:
        # a SIGINT is remembered as such, whatever was there before: the next signal then leaves at once
        if not self.reason or reason == "SIGINT":
            is_news, self.reason = not self.reason, reason
            if is_news:
                log.info(f"asked to stop by {reason}")


class Agreement:
    """Ranks tell each other a few numbers every `every` calls, beside the training.

    What a rank says at one exchange all ranks get at the next, each at the same call, so that none waits for a message
    and all can act on it alike. Every rank must call `poll` equally often.
    """

    def __init__(self, world: World, every: int) -> None:
        self.world = world
        self.every = every
        self.calls = 0
        self._pending: Callable[[], list[list[int]]] | None = None

    def poll(self, say: Callable[[], Sequence[int]]) -> list[list[int]] | None:
        """Every rank's numbers of `every` calls ago, a list a rank; None between, and the first time.

        `say` gives this rank's, as many each time.
        """
        self.calls += 1
        if self.calls % self.every:
            return None
        arrived = self.finish()
        self._pending = self.world.start_gather(say())
        return arrived

    def finish(self) -> list[list[int]] | None:
        """Wait for what is on its way."""
        arrived = self._pending() if self._pending else None
        self._pending = None
        return arrived
