"""Where a run's scalars go: TensorBoard and metrics.jsonl, on rank 0; nowhere, on the others."""

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ddp_cifar.config import Config, to_dict
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.named import call, find

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Scalars = Mapping[str, float | str]
"""Numbers by tag, such as `train/loss`; and words, such as a checksum, which metrics.jsonl has and TensorBoard has not."""


class Tracker(Protocol):
    """Takes scalars and the step they belong to."""

    def log(self, scalars: Scalars, step: int) -> None: ...

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        """Have `add(writer)` put into TensorBoard what is no scalar. Where nothing is kept, it is not called."""

    def sync(self) -> None:
        """Have all of it on the disk; may be called from any thread."""

    def close(self) -> None: ...


class NullTracker:
    """Keeps nothing: every rank but 0 has one, so that the loop need not ask which rank it is on.

    Others are made of it: what they do not take goes nowhere.
    """

    def log(self, scalars: Scalars, step: int) -> None:
        pass

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class JsonLinesTracker(NullTracker):
    """A JSON object a row: `step`, then the scalars. A number that JSON cannot hold (nan, inf) is null.

    What cannot be written, as on a full disk, is kept and written as soon as it can be.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self.unwritten = b""
        self.lock = threading.Lock()

    def log(self, scalars: Scalars, step: int) -> None:
        row = {tag: None if _is_no_json(value) else value for tag, value in scalars.items()}
        self._write((json.dumps({"step": step} | row) + "\n").encode())

    def sync(self) -> None:
        self._write()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        try:
            self._write()
        finally:
            self.file.close()

    def _write(self, more: bytes = b"") -> None:
        with self.lock:
            self.unwritten += more
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


class TensorBoardTracker:
    """Event files for TensorBoard, which hides what earlier files have at `purge_step` and later.

    Where a file cannot be written, as on a full disk, a new one is begun; points in between are in metrics.jsonl alone.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as it takes a second to import

        self.open = functools.partial(SummaryWriter, str(folder))
        self.writer = self.open(purge_step=purge_step)
        threading.excepthook = _let_writers_fail

    def log(self, scalars: Scalars, step: int) -> None:
        with self._anew_if_broken():
            for tag, value in scalars.items():
                if not isinstance(value, str):
                    self.writer.add_scalar(tag, value, step)

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        try:
            with self._anew_if_broken():
                add(self.writer)
        except OSError:
            raise
        except Exception as error:  # a font, a model that cannot be traced: no reason to end a run
            log.warning(f"TensorBoard lacks a part ({type(error).__name__}: {_first_line(error)}); training goes on")

    def sync(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    @contextlib.contextmanager
    def _anew_if_broken(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.writer = self.open()
            raise


def _let_writers_fail(failure: threading.ExceptHookArgs) -> None:
    """Python's own `threading.excepthook`, but for an event file that could not be written: the next `log` raises that."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)


class _All:
    """Passes everything on to several trackers. Where one cannot write, a warning says so each time: training goes on."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def log(self, scalars: Scalars, step: int) -> None:
        self._each(lambda tracker: tracker.log(scalars, step))

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        self._each(lambda tracker: tracker.show(add))

    def sync(self) -> None:
        self._each(lambda tracker: tracker.sync())

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                call(tracker)
            except OSError as error:
                log.warning(f"{type(tracker).__name__} could not write ({error.strerror}); training goes on")


class OwnTracker(NullTracker):
    """A tracker of the user's own, which has `log(scalars, step)` and `close()`. Where it fails, a warning says so."""

    def __init__(self, name: str, tracker: Any) -> None:
        missing = [method for method in ("log", "close") if not callable(getattr(tracker, method, None))]
        if missing:
            raise UserError(
                f"tracking.name={name} has no {' and no '.join(missing)}: expected log(scalars, step) and close()"
            )
        self.name = name
        self.tracker = tracker

    def log(self, scalars: Scalars, step: int) -> None:
        self._try(
            lambda: self.tracker.log({tag: value for tag, value in scalars.items() if not isinstance(value, str)}, step)
        )

    def close(self) -> None:
        self._try(self.tracker.close)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            log.warning(f"tracking.name={self.name} failed ({type(error).__name__}: {error}); training goes on")


def build_own_tracker(config: Config) -> Tracker:
    """What `tracking.name` names, called with the run's config as plain dicts, its run_dir, and `tracking.args`.

    One that fails at it, as where there is no way out of the cluster, costs a warning. Raises `UserError` if it does not
    take `tracking.args`, or has not what a tracker has.
    """
    own = config.tracking
    if own.name is None:
        return NullTracker()
    function: Callable[..., Any] = find("tracking.name", own.name, {})
    try:
        tracker = call("tracking.name", own.name, function, to_dict(config), config.run_dir, **own.args)
    except UserError:
        raise
    except Exception as error:
        log.warning(f"tracking.name={own.name} failed ({type(error).__name__}: {error}); training goes on without it")
        return NullTracker()
    return OwnTracker(own.name, tracker)


def build_tracker(metrics: Path, tensorboard: Path, step: int, epoch: int = 0, own: Tracker | None = None) -> Tracker:
    """JSON lines in the file `metrics` and event files in the folder `tensorboard`, going on after `step` steps; and `own`.

    Of what was logged before stays what belongs to these steps, and to the `epoch` epochs that are completed: the run will
    log the rest again.
    """
    kept, is_parted = _cut(metrics, step, epoch)
    # what is at `step` itself stays, as an evaluation's pictures; but where a part of it has to go (an epoch's row), which
    # purging cannot tell from the rest, and at 0, where a start begins
    is_parted |= step == 0
    events = TensorBoardTracker(tensorboard, purge_step=step if is_parted else step + 1)
    for row in kept:
        if is_parted and row["step"] == step:
            events.log({tag: value for tag, value in row.items() if tag != "step" and value is not None}, step)
    return _All(JsonLinesTracker(metrics), events, own or NullTracker())


def last_value(metrics: Path, tag: str) -> float:
    """Of the last row that has `tag`, in a file that `build_tracker` has just cut; 0 if there is none."""
    for line in reversed(metrics.read_text(encoding="utf-8").splitlines()):
        if tag in (row := json.loads(line)):
            return float(row[tag])
    return 0.0


def _cut(path: Path, step: int, epoch: int) -> tuple[list[dict[str, Any]], bool]:
    """Drop the rows past `step` or `epoch`, and a last one that a crash left unfinished; returns the others, and whether one of
    `step` itself is, or may be, among those that are gone."""
    lines: list[str] = []
    kept: list[dict[str, Any]] = []
    is_parted = False
    if not path.exists():
        return kept, is_parted
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
            whole = line.endswith("\n") and row["step"] <= step and row.get("train/epoch", 0) <= epoch
            is_parted |= not whole and row["step"] <= step
        except (ValueError, KeyError, TypeError):
            whole, is_parted = False, True
        if whole:
            lines.append(line)
            kept.append(row)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return kept, is_parted


def _is_no_json(value: float | str) -> bool:
    return not isinstance(value, str) and not math.isfinite(value)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
