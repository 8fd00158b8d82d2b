"""What a rank does when another one is lost: it saves the last completed step, so that the run loses none."""

import contextlib
import dataclasses
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import RunError, first_line
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import State
from ddp_cifar.run.checkpoint_store import Checkpoints
from ddp_cifar.run.heartbeat import Heartbeat, NullHeartbeat
from ddp_cifar.run.stopping import Requests
from ddp_cifar.tracking.base import NullTracker, Scalars
from ddp_cifar.training.metrics import TrainMetrics
from ddp_cifar.training.step import TrainStep
from ddp_cifar.training.totals import Totals

STEP_TIMEOUT_S = 5.0
"""The longest wait of another thread for the main thread to complete an update, in seconds."""

RECENT_ROWS = 256
"""Rows of metrics that every rank keeps. Rank 0 may be lost with its last rows before they are on the disk."""


class RecentRows(NullTracker):
    """Keeps the last rows of metrics on every rank."""

    def __init__(self) -> None:
        self.rows: deque[dict[str, Any]] = deque(maxlen=RECENT_ROWS)

    def log(self, scalars: Scalars, step: int) -> None:
        self.rows.append({"step": step} | dict(scalars))


class Survivor:
    """Saves the state after the last completed step if the run fails. The state is the same on all ranks: one is enough.

    The main thread changes the state only in `changing`. The rest of a step, with its sums over ranks, changes only gradients
    and buffers. So if a rank is lost, each of the others has a complete state, and `save` writes it from any thread, whatever
    the main thread waits for. (Only if a number is not finite, ranks also exchange what they found in `changing`; a rank that
    is lost then leaves no state to save.) Afterwards the process must exit: its main thread can complete no step.
    """

    def __init__(
        self,
        world: World,
        train_step: TrainStep,
        metrics: TrainMetrics,
        checkpoints: Checkpoints,
        state_dict: Callable[[], State],
        *,
        enabled: bool,
    ) -> None:
        """`state_dict` returns the trainer's state. Unless `enabled`, nothing is saved."""
        self.world = world
        self.train_step = train_step
        self.metrics = metrics
        self.checkpoints = checkpoints
        self.state_dict = state_dict
        self.enabled = enabled
        self.rows = RecentRows()
        self._is_whole = True
        self._forbidden = ""
        self._changes = threading.Lock()
        self._saves = threading.Lock()
        self._called = False
        self.start()

    def start(self) -> None:
        """The current state needs no save: it is a checkpoint, or that of a new run."""
        self._note()
        self._first = self._position()

    @contextlib.contextmanager
    def on_guard(self, heartbeat: Heartbeat | NullHeartbeat, requests: Requests) -> Iterator[None]:
        """Train in the body. If it raises, or if `heartbeat` or `requests` find that a rank is lost, save.

        Every rank must call it. A `RunError` saves nothing: the state would lead to it again.
        """
        self.start()
        me = socket.gethostname(), os.getppid(), os.getpid()
        siblings = [pid for host, parent, pid in self.world.gather_objects(me) if (host, parent) == me[:2]]
        siblings.remove(me[2])
        with heartbeat.watching(self.save), requests.watching(siblings, self.save):
            try:
                yield
            except RunError:
                raise
            except Exception:
                self.save()  # while the other threads are watching: they wait for it before they exit
                raise

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The body changes the state from one that a run can resume from to the next one."""
        with self._changes:
            self._is_whole = False
            yield
            self._note()
            self._is_whole = True

    def forbid(self, reason: str) -> None:
        """Save nothing from now on: the state is wrong."""
        self._forbidden = reason

    def save(self) -> None:
        """Save the state as a checkpoint, unless it is one already. Does not raise. A second caller waits for the first one."""
        with self._saves:
            if self._called or not self.enabled:
                return
            self._called = True
            # never released: the main thread must not change the state that is written
            if not self._changes.acquire(timeout=STEP_TIMEOUT_S):
                log.warning("the last completed step was not saved: this rank is in the middle of an update")
                return
            try:
                with self._on_another_stream():
                    self._save(Totals(*self._counts.tolist()))
            except Exception as error:  # such as a lost GPU: the checkpoints before it count
                log.warning(f"the last completed step was not saved ({type(error).__name__}: {first_line(error)})")

    def _save(self, counts: Totals) -> None:
        wrong = self._forbidden or ("" if self._is_whole else "an update failed")
        if not wrong and not self.metrics.are_finite(counts):
            wrong = "a number is not finite"
        if wrong:
            log.warning(f"the last completed step was not saved: {wrong}")
        elif self._position() != self._first:
            self.checkpoints.save_as_survivor(self._state(counts), *self._position())

    def _note(self) -> None:
        self._progress = self.metrics.progress.state_dict()
        self._counts = self.metrics.counter.total.clone()
        if self.world.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    def _position(self) -> tuple[int, int]:
        return self._progress["step"], self._progress["epoch"]

    def _state(self, counts: Totals) -> State:
        self.train_step.stop_evaluating()
        state = self.state_dict()
        window = Totals(**self._progress["window"]) + counts
        buffers = self.train_step.buffers.at_last_step()
        return state | {
            "model": {name: buffers.get(name, value) for name, value in state["model"].items()},
            "progress": self._progress | {"window": dataclasses.asdict(window)},
            "rows": list(self.rows.rows),
        }

    def _on_another_stream(self) -> contextlib.AbstractContextManager[object]:
        """On CUDA, copy on another stream: the current one may wait for a collective that does not end.

        The copy waits for the last step only. `TrainStep.gradients` has waited for its collectives, so it will be completed.
        """
        device = self.world.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(device)
        stream.wait_event(self._done)
        return torch.cuda.stream(stream)
