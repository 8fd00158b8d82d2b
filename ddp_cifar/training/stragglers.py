"""Finds a slow rank, and a slow exchange between ranks, from the times that ranks exchange.

Ranks do not wait for each other in their local work (data, forward, update). So a slow rank is found by comparing ranks. The
backward pass contains computation, the exchange of gradients, and the wait for slower ranks. The rank that comes last in a step
does not wait. So the least backward time of all ranks and steps of a row is computation and exchange only.
"""

import socket
import statistics
from collections import deque
from collections.abc import Sequence

from ddp_cifar.log import log
from ddp_cifar.training.rank_status import RankStatus

RANK_FLOOR_US, LINK_FLOOR_US = 1000, 5000
"""The least delay that counts as slow, in microseconds per step."""

PAST_ROWS, MIN_PAST_ROWS = 20, 3
"""The number of earlier rows that are kept, and the least number with which a row is compared."""

PHASE_FIELDS = {"data loading": "data_us", "forward pass": "forward_us", "update": "optimizer_us"}


class Stragglers:
    """Warns when this rank or, on rank 0, the exchange between ranks becomes slow, and says when it is over."""

    def __init__(self, rank: int, world_size: int, factor: float | None) -> None:
        """`factor`: `train.straggler_factor`."""
        self.step = 0
        """The step of the last row."""
        self.watches: list[RankWatch | LinkWatch] = []
        if factor is not None and world_size > 1:
            self.watches = [RankWatch(rank, factor)] + ([LinkWatch(factor)] if rank == 0 else [])

    def add(self, statuses: Sequence[RankStatus]) -> None:
        """Add a row, with the status of each rank. The first row after a start is ignored: it has one-time costs."""
        before, self.step = self.step, statuses[0].row_step
        if before:
            for watch in self.watches:
                watch.add(statuses, before)

    def finish(self) -> None:
        """Report what is still slow at the end of the run."""
        for watch in self.watches:
            if watch.spell.is_on:
                log.warning(f"the run ends while {watch.name} is slow: {watch.spell}")


class Spell:
    """A slow period. It begins, and ends, with two consecutive rows: one row may be slow or fast by accident."""

    def __init__(self) -> None:
        self.is_on = False
        self.first = self.last = 0
        """The step after which it began, and its last step."""
        self.cost_us = 0.0
        self._contrary_rows = 0

    def add(self, first: int, last: int, delay_us: float | None) -> bool:
        """Add the row of the steps after `first` up to `last`; `delay_us` is the delay per step, None if it is not slow.

        Returns True if a spell begins or ends with it.
        """
        is_slow = delay_us is not None
        if delay_us is not None:
            if not self.is_on and not self._contrary_rows:
                self.first, self.cost_us = first, 0.0
            self.last = last
            self.cost_us += delay_us * (last - first)
        self._contrary_rows = self._contrary_rows + 1 if is_slow != self.is_on else 0
        changes = self._contrary_rows == 2
        if changes:
            self.is_on, self._contrary_rows = is_slow, 0
        return changes

    def __str__(self) -> str:
        return f"from step {self.first} to {self.last} it delayed all ranks by about {self.cost_us / 1e6:.1f} s"


class Watch:
    """Watches for one kind of slowness."""

    name = ""
    """What it watches."""

    def __init__(self, factor: float) -> None:
        """`factor`: `train.straggler_factor`."""
        self.factor = factor
        self.spell = Spell()

    def begins(self, before: int, last: int, delay_us: float | None) -> bool:
        """Add the row of the steps after `before` up to `last`, as `Spell.add`. True if a slow period begins; logs its end."""
        changes = self.spell.add(before, last, delay_us)
        if changes and not self.spell.is_on:
            log.warning(f"{self.name} is no longer slow: {self.spell}")
        return changes and self.spell.is_on


class RankWatch(Watch):
    """Compares this rank's local work with that of the others in the same steps."""

    name = "this rank"

    def __init__(self, rank: int, factor: float) -> None:
        super().__init__(factor)
        self.rank = rank
        self.past: deque[RankStatus] = deque(maxlen=PAST_ROWS)
        """This rank's last rows that were not slow."""

    def add(self, statuses: Sequence[RankStatus], before: int) -> None:
        """Add the row of the steps after `before`."""
        own, others = statuses[self.rank], [*statuses[: self.rank], *statuses[self.rank + 1 :]]
        usual = statistics.median(status.local_work_us for status in others)
        delay = own.local_work_us - usual if is_slow(own.local_work_us, usual, self.factor, RANK_FLOOR_US) else None
        if delay is None:
            self.past.append(own)
        if self.begins(before, own.row_step, delay):
            log.warning(
                f"this rank, on {socket.gethostname()}, is slow since step {self.spell.first} and delays all ranks: "
                f"{self._describe(own, others)}"
            )

    def _describe(self, own: RankStatus, others: Sequence[RankStatus]) -> str:
        """Describe the phase that causes most of the delay."""
        usual = {
            name: statistics.median(getattr(status, key) for status in others) for name, key in PHASE_FIELDS.items()
        }
        name = max(PHASE_FIELDS, key=lambda name: getattr(own, PHASE_FIELDS[name]) - usual[name])
        text = f"its {name} takes {ms(getattr(own, PHASE_FIELDS[name]))} per step (median of the other ranks {ms(usual[name])}"
        if len(self.past) >= MIN_PAST_ROWS:
            text += f"; this rank before {ms(statistics.median(getattr(status, PHASE_FIELDS[name]) for status in self.past))}"
        return text + ")"


class LinkWatch(Watch):
    """Compares the least backward time of all ranks with its own past."""

    name = "the exchange between ranks"

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.past: deque[int] = deque(maxlen=PAST_ROWS)
        """The least backward time in the last rows that were not slow, in microseconds."""
        self.past_work: deque[list[int]] = deque(maxlen=PAST_ROWS)
        """The local work of each rank in these rows, in microseconds."""

    def add(self, statuses: Sequence[RankStatus], before: int) -> None:
        """Add the row of the steps after `before`."""
        backward, work = min(status.least_backward_us for status in statuses), [s.local_work_us for s in statuses]
        usual = statistics.median(self.past) if len(self.past) >= MIN_PAST_ROWS else backward
        delay = backward - usual if is_slow(backward, usual, self.factor, LINK_FLOOR_US) else None
        if delay is None:
            self.past.append(backward)
            self.past_work.append(work)
        elif self._has_slow_rank(work):
            return  # on a slow device, the backward pass is slow too
        if self.begins(before, statuses[0].row_step, delay):
            log.warning(
                f"the exchange between ranks (or the backward pass) is slow on all ranks since step {self.spell.first}: the "
                f"backward pass takes at least {ms(backward)} per step on every rank (before {ms(usual)}), while the other "
                f"work of each rank takes as long as before"
            )

    def _has_slow_rank(self, work: Sequence[int]) -> bool:
        """True if the local work of a rank takes much longer than before."""
        pasts = zip(*self.past_work, strict=True)
        return any(
            is_slow(own, statistics.median(past), self.factor, RANK_FLOOR_US)
            for own, past in zip(work, pasts, strict=True)
        )


def is_slow(time_us: float, usual_us: float, factor: float, floor_us: float) -> bool:
    """True if a time is more than `factor` times the usual one, and at least `floor_us` longer."""
    return time_us > max(factor * usual_us, usual_us + floor_us)


def ms(time_us: float) -> str:
    return f"{time_us / 1000:.1f} ms"
