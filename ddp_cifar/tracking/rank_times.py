"""The times of each rank in the last rows of scalars, for the picture `time/ranks`."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_COLUMNS, MAX_BANDS = 300, 128
"""The most rows of scalars (columns of the picture) that are kept, and the most bands of ranks in each."""


class RankTimes:
    """Keeps milliseconds per step of each rank and phase. Memory does not grow with the number of rows or ranks.

    With many ranks, a band of the picture is several consecutive ranks. It has the longest time of them.
    """

    def __init__(self) -> None:
        self.num_ranks = 0
        self.steps: deque[int] = deque(maxlen=MAX_COLUMNS)
        self.columns: deque[np.ndarray[Any, Any]] = deque(maxlen=MAX_COLUMNS)
        """(bands, phases) float32 for each of `steps`."""

    @property
    def ranks_per_band(self) -> int:
        return -(-self.num_ranks // MAX_BANDS)

    def add(self, step: int, times_us: Sequence[Sequence[int]]) -> None:
        """Add the row of `step`: the microseconds of each rank in data, forward, update and backward."""
        self.num_ranks = len(times_us)
        milliseconds = np.asarray(times_us, dtype=np.float32) / 1000
        self.steps.append(step)
        self.columns.append(np.maximum.reduceat(milliseconds, range(0, self.num_ranks, self.ranks_per_band)))

    def panels(self) -> np.ndarray[Any, Any]:
        """Return (phases, bands, columns) float32 milliseconds per step."""
        panels: np.ndarray[Any, Any] = np.stack(list(self.columns)).transpose(2, 1, 0)
        return panels
