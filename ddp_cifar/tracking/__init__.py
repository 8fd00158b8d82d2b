"""Trackers: rank 0 writes the scalars of a run to TensorBoard, metrics.jsonl and a user-defined tracker."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_cifar.config import Config, to_dict
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.registry import call, resolve
from ddp_cifar.run.run_dir import is_row
from ddp_cifar.tracking.base import NullTracker, Scalars, Tracker
from ddp_cifar.tracking.jsonl import JsonLinesTracker, drop_later_rows, is_before
from ddp_cifar.tracking.tensorboard import TensorBoardTracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class _All:
    """Forwards every call to several trackers. If one cannot write, it logs a warning and training continues."""

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
                log.warning(f"{type(tracker).__name__} cannot write ({error.strerror}); training continues")


class CustomTracker(NullTracker):
    """A user-defined tracker, with `log(scalars, step)` and `close()`. If it fails, a warning is logged."""

    def __init__(self, name: str, tracker: Any) -> None:
        missing = [method for method in ("log", "close") if not callable(getattr(tracker, method, None))]
        if missing:
            raise UserError(
                f"tracking.name={name} has no {' and no '.join(missing)}; expected log(scalars, step) and close()"
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
            log.warning(f"tracking.name={self.name} failed ({type(error).__name__}: {error}); training continues")


def build_custom_tracker(config: Config) -> Tracker:
    """Return the tracker that `tracking.name` names, called with the config as plain dicts, its run_dir, and `tracking.args`.

    If the call fails, for example without internet access, a warning is logged. Raises `UserError` if the tracker does not
    accept `tracking.args` or lacks a required method.
    """
    custom = config.tracking
    if custom.name is None:
        return NullTracker()
    function = resolve("tracking.name", custom.name)
    try:
        tracker = call("tracking.name", custom.name, function, to_dict(config), config.run_dir, **custom.args)
    except UserError:
        raise
    except Exception as error:
        log.warning(
            f"tracking.name={custom.name} failed ({type(error).__name__}: {error}); training continues without it"
        )
        return NullTracker()
    return CustomTracker(custom.name, tracker)


def build_tracker(
    metrics: Path,
    tensorboard: Path,
    step: int,
    epoch: int = 0,
    custom: Tracker | None = None,
    last_rows: Sequence[dict[str, Any]] = (),
) -> Tracker:
    """Return trackers for the file `metrics` and the folder `tensorboard` of a run that resumes after `step` steps.

    `custom` is an additional tracker. Rows logged after `step`, or after `epoch` completed epochs, are dropped, as the run will
    log them again. `last_rows` are the last rows before `step`, as another rank kept them: those that are missing are added.
    """
    kept, drops_at_step = drop_later_rows(metrics, step, epoch)
    known = set(map(_identity, kept))
    missing = [row for row in last_rows if is_row(row) and is_before(row, step, epoch) and _identity(row) not in known]
    # Events at `step` itself, such as the pictures of an evaluation, are kept. There are two exceptions: some of them must be
    # dropped (the row of an epoch), as a purge cannot tell them apart; or `step` is 0, at which every start writes.
    purged = min([step if drops_at_step or step == 0 else step + 1, *(row["step"] for row in missing)])
    events = TensorBoardTracker(tensorboard, purge_step=purged)
    for row in (*kept, *missing):
        if row["step"] >= purged:
            events.log(_scalars(row), row["step"])
    written = JsonLinesTracker(metrics)
    for row in missing:
        written.log(_scalars(row), row["step"])
    return _All(events, written, custom or NullTracker())


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    return {tag: value for tag, value in row.items() if tag != "step" and value is not None}


def _identity(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """Return what tells a row from others, on any rank: `run/*` are only on rank 0."""
    return row["step"], frozenset(tag for tag in row if not tag.startswith("run/"))
