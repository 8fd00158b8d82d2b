"""Where a run's scalars go: TensorBoard and metrics.jsonl, on rank 0; nowhere, on the others."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from ddp_cifar.log import log


class Tracker(Protocol):
    """Takes scalars by tag, such as `train/loss`, and the step they belong to."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def log_text(self, tag: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


class NullTracker:
    """Keeps nothing: every rank but 0 has one, so that the loop need not ask which rank it is on."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        pass

    def log_text(self, tag: str, text: str, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class JsonLinesTracker:
    """A JSON object a row: `step`, then the scalars. A number that JSON cannot hold (nan, inf) is null."""

    def __init__(self, path: Path, start_step: int) -> None:
        _cut_after(path, start_step)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        row = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self.file.write(json.dumps({"step": step} | row) + "\n")
        self.file.flush()

    def log_text(self, tag: str, text: str, step: int) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class TensorBoardTracker:
    """Event files for TensorBoard. After a resume, `purge_step` hides what an earlier start logged past its checkpoint."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as it takes a second to import

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        self.writer.add_text(tag, text, step)

    def close(self) -> None:
        self.writer.close()


class _All:
    """Passes everything on to several trackers. One that can no longer write is named once and left: training goes on."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = list(trackers)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(scalars, step))

    def log_text(self, tag: str, text: str, step: int) -> None:
        self._each(lambda tracker: tracker.log_text(tag, text, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except OSError as error:
                self.trackers.remove(tracker)
                log.warning(
                    f"{type(tracker).__name__} stops at an error of writing ({error.strerror}); training goes on"
                )


def build_tracker(metrics: Path, tensorboard: Path, start_step: int) -> Tracker:
    """JSON lines in the file `metrics` and event files in the folder `tensorboard`, going on after `start_step`."""
    return _All(JsonLinesTracker(metrics, start_step), TensorBoardTracker(tensorboard, start_step))


def _cut_after(path: Path, step: int) -> None:
    """Drop the rows past `step`, which the run will log again, and a last row that a crash left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
