"""The tracker interface, and a tracker that does nothing."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


Scalars = Mapping[str, float | str]
"""Numbers by tag, such as `train/loss`. Text, such as a checksum, is written to metrics.jsonl and not to TensorBoard."""


class Tracker(Protocol):
    """Receives scalars and their step."""

    def log(self, scalars: Scalars, step: int) -> None: ...

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        """Call `add(writer)`, which adds pictures, text and so on to TensorBoard. Other trackers do not call it."""

    def sync(self) -> None:
        """Write everything to the disk; may be called from any thread."""

    def close(self) -> None: ...


class NullTracker:
    """Does nothing. Used on every rank except 0, so that the training loop is the same on all ranks.

    Other trackers inherit from it and override the methods that they need.
    """

    def log(self, scalars: Scalars, step: int) -> None:
        pass

    def show(self, add: "Callable[[SummaryWriter], None]") -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
