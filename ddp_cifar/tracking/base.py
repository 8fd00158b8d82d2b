"""The tracker interface, and a tracker that does nothing."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Scalars = Mapping[str, float | str]
"""Numbers by tag, such as `train/loss`. Text, such as a checksum, is written to metrics.jsonl and not to other trackers."""

Picture: TypeAlias = np.ndarray[Any, Any]
"""(H, W, 3) uint8 pixels."""

TIME = "time/unix_s"
"""The tag of the Unix time at which a row was logged. It stays the same if the row is written again, or sent later."""


class Tracker(Protocol):
    """Receives scalars and their step."""

    def log(self, scalars: Scalars, step: int) -> None: ...

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        """Call `add(writer)`, which adds text, curves and so on to TensorBoard. Other trackers do not call it."""

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        """Show the picture that `draw()` returns, if it returns one."""

    def sync(self) -> None:
        """Write everything to the disk; may be called from any thread."""

    def end(self, outcome: str) -> None:
        """Note that the run has finished, or stopped, with this status. Not called if it fails."""

    def close(self) -> None: ...


class NullTracker:
    """Does nothing. Used on every rank except 0, so that the training loop is the same on all ranks.

    Other trackers inherit from it and override the methods that they need.
    """

    def log(self, scalars: Scalars, step: int) -> None:
        pass

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        pass

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass

    def close(self) -> None:
        pass
