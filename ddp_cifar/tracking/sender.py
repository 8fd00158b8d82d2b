"""Sends what a run has logged to a service such as MLflow, on a thread of its own, so that no step waits for it.

metrics.jsonl is the truth. A sender reads it from its first row at each start, and sends the steps that the service lacks.
"""

import contextlib
import itertools
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ddp_cifar.errors import first_line
from ddp_cifar.log import log
from ddp_cifar.run.run_dir import RunDir
from ddp_cifar.text_files import parse_json, read_text
from ddp_cifar.tracking.base import TIME, NullTracker, Picture, Scalars
from ddp_cifar.tracking.records import Record, Records, write_picture

BATCH = 200
"""The most steps that a service receives at once."""

RETRY_S, MAX_RETRY_S = 5.0, 300.0
"""The wait after a failure, which doubles with each further one up to the maximum."""

STOP_TIMEOUT_S, END_TIMEOUT_S, ARTIFACT_TIMEOUT_S = 10.0, 60.0, 600.0
"""The longest wait for a service when a run stops or fails; when it has finished; and when the service receives a checkpoint."""


class Service(Protocol):
    """One run at a service. All methods are called by one thread. If one raises, another object is made later."""

    last_step: int
    """The last step that the service has, -1 for none. Only later ones are sent."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Note the recipe, the commit, the hosts and so on of this start."""

    def log_steps(self, records: Sequence[Record]) -> None:
        """Receive one or more steps. They increase."""

    def end(self, outcome: str, best: Mapping[str, Record], checkpoint: Path | None) -> None:
        """Receive the run's status, the records with the best accuracies, by tag, and the file to upload, if any; then close."""


class LogAndClose:
    """The service of a user-defined class that has only `log(scalars, step)` and `close()`. Remembers what it has sent."""

    def __init__(self, tracker: Any, name: str, run_dir: str) -> None:
        self.tracker = tracker
        self.memory = Path(run_dir) / "tracking" / (re.sub(r"[^\w.-]", "-", name) + ".json")
        self.last_step = -1
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.last_step = int(parse_json(read_text(self.memory))["last_step"])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_steps(self, records: Sequence[Record]) -> None:
        try:
            for record in records:
                if record.scalars:
                    self.tracker.log({**record.scalars, TIME: record.time}, record.step)
                self.last_step = record.step
        finally:
            self.memory.parent.mkdir(exist_ok=True)
            self.memory.write_text(json.dumps({"last_step": self.last_step}))

    def end(self, outcome: str, best: Mapping[str, Record], checkpoint: Path | None) -> None:
        self.tracker.close()


class Sender(NullTracker):
    """Sends the steps of a run to a service. If that fails, it logs a warning, and tries again later.

    A step is sent once there is a row of a later one, since more rows of it may follow; the last step, when the run ends.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Service],
        run_dir: RunDir,
        tags: Mapping[str, str],
        *,
        artifacts: bool = False,
        is_step_whole: Callable[[], bool] = lambda: True,
    ) -> None:
        """`tags` describe this start. With `artifacts`, send the best checkpoint when the run has finished.

        `is_step_whole` returns false if the run will log more rows of its last step after a resume.
        """
        self.name = name
        self.connect = connect
        self.run_dir = run_dir
        self.tags = tags
        self.artifacts = artifacts
        self.is_step_whole = is_step_whole
        self.outcome = ""
        self._service: Service | None = None
        self._records = Records(run_dir)
        self._new, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"send to {name}", daemon=True)

    def start(self) -> None:
        """Start to send. Call it after the rows that a resume takes back are gone."""
        self._thread.start()

    def log(self, scalars: Scalars, step: int) -> None:
        self._new.set()

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        if (pixels := draw()) is not None:
            write_picture(self.run_dir.pictures, tag, pixels, step)

    def end(self, outcome: str) -> None:
        self.outcome = outcome
        self._finish_soon()  # several senders finish at the same time

    def close(self) -> None:
        self._finish_soon()
        end_timeout_s = ARTIFACT_TIMEOUT_S if self.artifacts else END_TIMEOUT_S
        self._thread.join(end_timeout_s if self.outcome == "finished" else STOP_TIMEOUT_S)
        if self._thread.is_alive() or self._failing:
            log.warning(
                f"{self.name} lacks a part of this run; the next start sends it, and so does "
                f"python -m ddp_cifar.sync {self.run_dir.path}"
            )

    def send(self, *, with_last: bool) -> Service:
        """Connect, and send the steps that the service lacks, and the last one if `with_last`. Raises what the service raises."""
        if not self._service:
            self._service, self._records = self.connect(), Records(self.run_dir)
            self._service.set_tags(self.tags)
            self._last_step = self._service.last_step
        records = (record for record in self._records.read(with_last=with_last) if record.step > self._last_step)
        while batch := list(itertools.islice(records, BATCH)):
            self._service.log_steps(batch)
            self._last_step = batch[-1].step
        return self._service

    def finish(self) -> None:
        """Send the rest, and the outcome. Raises what the service raises."""
        service = self.send(with_last=self.outcome == "finished" or self.is_step_whole())
        status = self.outcome or self.run_dir.read_status()
        service.end("crashed" if status == "running" else status, self._records.best, self._checkpoint(status))

    def describe(self, error: Exception) -> str:
        """Describe an error of the service in one line, without secrets."""
        return f"cannot send metrics to {self.name} ({type(error).__name__}: {without_secrets(first_line(error))})"

    def _finish_soon(self) -> None:
        self._closing.set()
        self._new.set()

    def _run(self) -> None:
        retry_s = RETRY_S
        while True:
            self._new.clear()
            is_last = self._closing.is_set()
            try:
                self.finish() if is_last else self.send(with_last=False)
                if self._failing:
                    log.info(f"{self.name} works again, and has received all that it missed")
                self._failing, retry_s = False, RETRY_S
            except Exception as error:  # a service may raise anything
                self._fail(error)
            if is_last:
                return
            if self._failing:
                self._closing.wait(retry_s)
                retry_s = min(2 * retry_s, MAX_RETRY_S)
            else:
                self._new.wait()

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            log.warning(f"{self.describe(error)}; training continues, and what is missed is sent later")
        self._failing, self._service = True, None

    def _checkpoint(self, status: str) -> Path | None:
        """The file to upload: the best checkpoint or, without validation images, the newest."""
        if not self.artifacts or status != "finished":
            return None
        links = (self.run_dir.checkpoints / name for name in ("best.pt", "latest.pt"))
        return next((link.resolve() for link in links if link.exists()), None)


def run_id(run_dir: str) -> str:
    """Return the id of the run in this folder. It is made once, so that all starts are one run for a service."""
    path = Path(run_dir) / "tracking" / "id"
    with contextlib.suppress(OSError, ValueError):
        if found := read_text(path).strip():
            return found
    path.parent.mkdir(exist_ok=True)
    made = uuid.uuid4().hex[:12]
    path.write_text(f"{made}\n")
    return made


def best_name(tag: str) -> str:
    """Return the name of the best value of a tag: best_val_accuracy."""
    return f"best_{tag.replace('/', '_')}"


def without_secrets(text: str) -> str:
    """Return the text without passwords in addresses, and without values of variables such as WANDB_API_KEY."""
    for name, value in os.environ.items():
        if re.search(r"KEY|TOKEN|PASSWORD|SECRET", name) and len(value) >= 4:
            text = text.replace(value, "***")
    return re.sub(r"//\S*@", "//***@", text)
