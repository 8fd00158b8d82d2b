"""Requests to a training process: to stop, to save, or to record a profile. Their source is a signal, a file, or a time limit.

Each rank knows only its own requests. Ranks exchange them every few steps (training/rank_exchange.py), so that all ranks act
at the same step.
"""

import contextlib
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ddp_cifar import LAUNCHER
from ddp_cifar.command import leave
from ddp_cifar.log import log
from ddp_cifar.run.memory import lack_of_memory
from ddp_cifar.run.processes import is_dead
from ddp_cifar.text_files import read_text

REASONS = ("", "SIGTERM", "SIGINT", "SIGUSR1", "the file STOP", "train.deadline", "train.max_hours", "SIGHUP")
"""The reasons to stop. The first one means no reason."""

EARLIER_SIGNALS = "DDP_CIFAR_SIGNALS"
"""The environment variable with a path. The file lists the signals that launch/node.sh has received, one per line (`TERM`)."""

LOOK_EVERY_S = 1.0
"""Seconds between two checks of the time limit, of the files STOP, SAVE and PROFILE, and of the other ranks."""

LOOK_AFTER_SIGTERM_S = 0.1
"""The same after a SIGTERM, which torchrun sends to the other ranks when one has failed."""

END_OF_RUN_S = 0.5
"""Seconds for which another rank may exit earlier than this one at the end of a run."""

ALL_RANKS = -1

MAX_PROFILE_STEPS = 100
"""The longest profile on request. A step takes thousands of events, which are kept in memory."""


class ProfileRequest(NamedTuple):
    """A request to record a profile of the next steps."""

    steps: int = 0
    """The number of steps; 0 if there is no request."""
    rank: int = ALL_RANKS
    """The rank that records them, or `ALL_RANKS`."""


class Requests:
    """Collects the requests to this process on a thread.

    SIGUSR1 is caught from the beginning. SIGTERM, SIGINT and SIGHUP terminate the process until `catch_signals`, SIGTERM with
    a line: torchrun sends it if another rank has failed.
    After a SIGINT, any signal terminates the process immediately, even if the main thread is blocked. The process also exits
    if the torchrun that started it exits. Signals that launch/node.sh received earlier count too: they are in the file
    $DDP_CIFAR_SIGNALS. If `folder` is given, the thread checks it for the files STOP, SAVE and PROFILE. `deadline` is a
    Unix time and the reason to stop then.
    """

    def __init__(self, folder: Path | None = None, deadline: tuple[float, str] | None = None) -> None:
        self.folder = folder
        self.deadline = deadline
        self.reason = ""
        self._save = False
        self._profile = ProfileRequest()
        self._profile_text: str | None = None
        self._siblings: Sequence[int] = ()
        self._before_leaving: Callable[[], None] = lambda: None
        self._handlers: dict[int, Any] = {}
        self._closed = False
        self._stops = False
        """True if signals are requests to stop."""

    def __enter__(self) -> "Requests":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python's handlers wait for the main thread, which may be blocked; the C handler writes to this socket immediately
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._catch(signal.SIGUSR1)
        self._catch(signal.SIGTERM)
        self._request_earlier()
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
        if not error:  # otherwise the process is about to report the error, and exits then
            for signum, handler in self._handlers.items():  # last: from here on a signal terminates the process
                signal.signal(signum, handler)

    def catch_signals(self) -> None:
        """From now on, SIGTERM, SIGINT, and SIGHUP (the terminal closes) request a stop."""
        self._stops = True
        self._catch(signal.SIGINT)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            self._catch(signal.SIGHUP)

    @contextlib.contextmanager
    def watching(self, siblings: Sequence[int], before_leaving: Callable[[], None]) -> Iterator[None]:
        """In the body, exit if one of `siblings` exits: pids of the other ranks that the same torchrun has started.

        A rank that waits for them in a collective may get no error. Before the process exits because of them, or because of
        torchrun's exit, it calls `before_leaving`.
        """
        self._siblings, self._before_leaving = siblings, before_leaving
        try:
            yield
        finally:
            self._siblings, self._before_leaving = (), lambda: None

    def take_save(self) -> bool:
        """True if a checkpoint was requested since the last call."""
        if not self._save:
            return False
        self._save = False  # a request that arrives now is served by the same checkpoint
        return True

    def take_profile(self) -> ProfileRequest:
        """Return the profile requested since the last call, of no steps if there is none."""
        request = self._profile
        if request.steps:
            self._profile = ProfileRequest()  # from now on the thread looks for the next one
        return request

    def stopped(self) -> None:
        """Remove the file STOP. Call it after the run has stopped."""
        if self.folder and (path := self.folder / "STOP").exists():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning(f"cannot remove {path} ({error.strerror}): remove it before the next start")

    def _catch(self, signum: signal.Signals) -> None:
        self._handlers[signum] = signal.signal(signum, lambda *_: None)

    def _request_earlier(self) -> None:
        with contextlib.suppress(OSError):  # the file does not exist before the first signal
            for name in Path(os.environ.get(EARLIER_SIGNALS, os.devnull)).read_text().split():
                self._request(f"SIG{name}")

    def _watch(self) -> None:
        while not self._closed:
            look_s = LOOK_AFTER_SIGTERM_S if self._siblings and self.reason == "SIGTERM" else LOOK_EVERY_S
            ready, _, _ = select.select([self._reader], [], [], look_s)
            for signum in self._reader.recv(64) if ready else b"":
                self._on_signal(signum)
            if any(map(is_dead, self._siblings)):
                self._before_leaving()
                time.sleep(END_OF_RUN_S)
                if self._siblings:
                    reason = lack_of_memory()
                    leave(reason or "a peer rank exited; shutting down", is_cause=bool(reason), ranks=())
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER:
                self._before_leaving()
                leave(
                    "the torchrun process that started this rank exited; shutting down; run the same command to resume"
                )
            if self.deadline is not None and time.time() >= self.deadline[0]:
                self._request(self.deadline[1])
            if self.folder:
                self._check_files(self.folder)

    def _on_signal(self, signum: int) -> None:
        if signum not in self._handlers:
            return
        if signum == signal.SIGTERM and not self._stops:
            leave("ended by SIGTERM before training", is_cause=False)
        if self.reason == "SIGINT":
            leave(f"{signal.Signals(signum).name} after SIGINT: exiting immediately, without saving")
        self._request(signal.Signals(signum).name)

    def _check_files(self, folder: Path) -> None:
        try:
            if (folder / "STOP").exists():
                self._request("the file STOP")
            if (folder / "SAVE").exists():
                (folder / "SAVE").unlink()
                self._save = True
            if not self._profile.steps:
                self._check_profile(folder / "PROFILE")
        except OSError:
            pass  # the folder is temporarily unavailable: no request

    def _check_profile(self, path: Path) -> None:
        before, self._profile_text = self._profile_text, None
        if not path.is_file():
            return
        try:
            text = read_text(path)
            if text != before:  # perhaps not written completely: look again
                self._profile_text = text
                return
            request = parse_profile(text)
        except ValueError as error:
            request = ProfileRequest()
            log.warning(f"no profile is recorded: the file PROFILE is invalid: {error}")
        path.unlink()  # only once: the next request may follow at any time
        self._profile = request

    def _request(self, reason: str) -> None:
        # a SIGINT replaces an earlier reason, since any signal after it terminates the process immediately
        if not self.reason or reason == "SIGINT":
            is_first, self.reason = not self.reason, reason
            if is_first:
                log.info(f"stop requested by {reason}")


def parse_profile(text: str) -> ProfileRequest:
    """Return the request in the file PROFILE, such as `steps=10 rank=0`. By default, all ranks record 5 steps.

    Raises `ValueError` if the text is anything else.
    """
    words = [re.fullmatch(r"(steps|rank)=([0-9]{1,9})", word) for word in text.split()]
    values = {"steps": 5} | {word[1]: int(word[2]) for word in words if word}
    if not all(words) or not 1 <= values["steps"] <= MAX_PROFILE_STEPS:
        raise ValueError(f'expected "steps=10 rank=0" with 1 to {MAX_PROFILE_STEPS} steps, found {text.strip()[:60]!r}')
    return ProfileRequest(**values)
