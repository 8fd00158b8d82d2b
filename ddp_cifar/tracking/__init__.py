"""Trackers: rank 0 writes the scalars of a run to TensorBoard and metrics.jsonl, and sends them to services such as MLflow."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_cifar.config import Config, to_dict
from ddp_cifar.errors import UserError, first_line
from ddp_cifar.log import log
from ddp_cifar.registry import check_arguments, names_in, resolve
from ddp_cifar.run.run_dir import RunDir, is_row
from ddp_cifar.tracking.base import Picture, Scalars, Tracker
from ddp_cifar.tracking.jsonl import JsonLinesTracker, drop_later_rows, is_before
from ddp_cifar.tracking.sender import LogAndClose, Sender, Service
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

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        try:
            pixels = draw()
        except Exception as error:  # such as a missing font
            log.warning(f"cannot draw {tag} ({type(error).__name__}: {first_line(error)}); training continues")
            return
        self._each(lambda tracker: tracker.show_image(tag, lambda: pixels, step))

    def sync(self) -> None:
        self._each(lambda tracker: tracker.sync())

    def end(self, outcome: str) -> None:
        self._each(lambda tracker: tracker.end(outcome))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                call(tracker)
            except OSError as error:
                log.warning(f"{type(tracker).__name__} cannot write ({error.strerror}); training continues")


def connections(config: Config) -> dict[str, Callable[[], Service]]:
    """Return, for each name in `tracking.name`, the function that connects to its service.

    Raises `UserError` if a name is unknown, does not accept its `tracking.args`, or lacks a method.
    """
    custom = config.tracking
    names = names_in(custom.name)
    args: Mapping[str, Any] = custom.args if isinstance(custom.name, list) else dict.fromkeys(names, custom.args)
    for key, value in args.items():
        if key not in names or not isinstance(value, Mapping):
            raise UserError(
                f"tracking.args.{key} is not for one of tracking.name={names}: expected tracking.args.NAME.KEY=VALUE, as "
                f"tracking.name is a list"
            )
    found: dict[str, Callable[[], Service]] = {}
    for name in names:
        function, own = resolve("tracking.name", name), args.get(name, {})
        check_arguments("tracking.name", name, function, {}, config.run_dir, **own)
        if isinstance(function, type):
            _check_methods(name, function)
        found[name] = functools.partial(_connect, config, name, function, own)
    return found


def _connect(config: Config, name: str, function: Callable[..., Any], args: Mapping[str, Any]) -> Service:
    tracker = function(to_dict(config), config.run_dir, **args)
    if hasattr(tracker, "log_steps"):
        return tracker  # type: ignore[no-any-return]
    _check_methods(name, tracker)
    return LogAndClose(tracker, name, config.run_dir)


def _check_methods(name: str, tracker: object) -> None:
    """Raise `UserError` if a tracker, or its class, lacks a method."""
    expected = ("set_tags", "log_steps", "end") if hasattr(tracker, "log_steps") else ("log", "close")
    missing = [method for method in expected if not callable(getattr(tracker, method, None))]
    if missing:
        methods = "log(scalars, step) and close()" if "log" in expected else "last_step, set_tags, log_steps and end"
        raise UserError(f"tracking.name={name} has no {' and no '.join(missing)}; expected {methods}")


def build_senders(
    config: Config, tags: Mapping[str, str] | None = None, is_step_whole: Callable[[], bool] = lambda: True
) -> list[Sender]:
    """Return a sender for each name in `tracking.name`, which has not started. Raises `UserError` as `connections` does.

    `tags` describe the start; default: the last one of the run.
    """
    run_dir, artifacts = RunDir(config.run_dir), config.tracking.artifacts
    if tags is None:
        tags = next((start.about for start in reversed(run_dir.read_starts())), {})
    return [
        Sender(name, connect, run_dir, tags, artifacts=artifacts, is_step_whole=is_step_whole)
        for name, connect in connections(config).items()
    ]


def send_rest(config: Config) -> None:
    """Send what the services lack of a run that has finished. If that fails, a warning is logged."""
    for sender in build_senders(config):
        sender.end("finished")
        sender.start()
        sender.close()


def build_tracker(
    metrics: Path,
    tensorboard: Path,
    step: int,
    epoch: int = 0,
    senders: Sequence[Sender] = (),
    last_rows: Sequence[dict[str, Any]] = (),
) -> Tracker:
    """Return trackers for the file `metrics` and the folder `tensorboard` of a run that resumes after `step` steps.

    `senders` start to send. Rows logged after `step`, or after `epoch` completed epochs, are dropped, as the run will
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
    for sender in senders:
        sender.start()
    return _All(events, written, *senders)  # in this order: a sender reads what the others have written


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    return {tag: value for tag, value in row.items() if tag != "step" and value is not None}


def _identity(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """Return what tells a row from others, on any rank: `run/*` are only on rank 0."""
    return row["step"], frozenset(tag for tag in row if not tag.startswith("run/"))
