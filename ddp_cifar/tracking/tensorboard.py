"""Event files for TensorBoard."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_cifar.errors import first_line
from ddp_cifar.log import log
from ddp_cifar.tracking.base import TIME, NullTracker, Picture, Scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker(NullTracker):
    """Writes event files. TensorBoard hides the events of earlier files at `purge_step` and later.

    If a file cannot be written, for example on a full disk, the next call starts a new one. Points in between are only in
    metrics.jsonl.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here, as the import takes a second

        self.open = functools.partial(SummaryWriter, str(folder))
        self.writer = self.open(purge_step=purge_step)
        threading.excepthook = _let_writers_fail

    def log(self, scalars: Scalars, step: int) -> None:
        with self._reopen_on_error():
            for tag, value in scalars.items():
                if not isinstance(value, str) and tag != TIME:
                    self.writer.add_scalar(tag, value, step, walltime=scalars.get(TIME))
            self.writer.flush()  # so that a row of metrics.jsonl, which is written next, is here too after a kill

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        try:
            with self._reopen_on_error():
                add(self.writer)
        except OSError:
            raise
        except Exception as error:  # such as a missing font, or a model that cannot be traced
            log.warning(
                f"cannot write a part of the TensorBoard page ({type(error).__name__}: {first_line(error)}); "
                f"training continues"
            )

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        if (pixels := draw()) is not None:
            with self._reopen_on_error():
                self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def sync(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    @contextlib.contextmanager
    def _reopen_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.writer = self.open()
            raise


def _let_writers_fail(failure: threading.ExceptHookArgs) -> None:
    """Act as Python's `threading.excepthook`, but ignore an event file that cannot be written: the next `log` raises that."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)
