"""The exchange between ranks during training: requests to stop, save or profile, fingerprints, and local work times."""

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ddp_cifar.config import Config
from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.run.stopping import ALL_RANKS, REASONS, ProfileRequest, Requests
from ddp_cifar.training.metrics import Work

STRAGGLER_FLOOR_US = 1000
"""The least delay of a straggler, in microseconds per step."""


class RankStatus(NamedTuple):
    """The integers that a rank sends to the others every `train.agree_every` steps."""

    reason: int = 0
    """The reason to stop: an index into `REASONS`."""
    save: int = 0
    """1 if a checkpoint was requested."""
    fingerprint: int = 0
    """The fingerprint of the weights at the last step at which it was due."""
    row_step: int = 0
    """The step of the last row of scalars."""
    local_work_us: int = 0
    """Microseconds of local work per step (`Work.seconds`) in that row."""
    data_us: int = 0
    """The part of `local_work_us` spent on preparing the batch (`Work.data_s`)."""
    profile_steps: int = 0
    """The number of steps to profile (`ProfileRequest`), which rank 0 sends once."""
    profile_rank: int = ALL_RANKS
    """The rank that records them."""


class Decision(NamedTuple):
    """The decision that all ranks carry out at the same call."""

    save: bool = False
    stop: str = ""
    """The reason to stop, or "" to continue."""
    diverged: Sequence[int] = ()
    """The ranks whose weights differ from the others'."""
    profile: ProfileRequest = ProfileRequest()


class Agreement:
    """Exchanges a few numbers between ranks every `every` calls, in the background of training.

    Numbers that a rank sends at one exchange reach all ranks at the next one, at the same call. So no rank waits for a
    message, and all ranks act on it together. Every rank must call `poll` equally often.
    """

    def __init__(self, world: World, every: int) -> None:
        self.world = world
        self.every = every
        self.calls = 0
        self._pending: Callable[[], list[list[int]]] | None = None

    def poll(self, status: Callable[[], Sequence[int]]) -> list[list[int]] | None:
        """Return the numbers sent at the last exchange, a list per rank; None between exchanges and at the first one.

        `status` returns this rank's numbers, always the same count.
        """
        self.calls += 1
        if self.calls % self.every:
            return None
        arrived = self.finish()
        self._pending = self.world.gather_async(status())
        return arrived

    def finish(self) -> list[list[int]] | None:
        """Wait for the pending exchange."""
        arrived = self._pending() if self._pending else None
        self._pending = None
        return arrived


class RankExchange:
    """Owns this rank's status and its last copy of the other ranks' statuses."""

    def __init__(self, world: World, config: Config) -> None:
        self.world = world
        self.every_minutes = config.checkpoint.every_minutes
        self.straggler_factor = config.train.straggler_factor
        self.requests = Requests()
        self.agreement = Agreement(world, config.train.agree_every)
        self.status = RankStatus()
        self.saved_at = time.perf_counter()
        """The time at which a checkpoint was last saved, or last became due by `checkpoint.every_minutes`."""
        self.work_us: list[int] = []
        """`RankStatus.local_work_us` of each rank at the last exchange."""
        self.slow_since: dict[int, int] = {}
        self.reported: set[int] = set()

    def poll(self) -> Decision:
        """Return the next decision. Every rank must call it after each step and each evaluation batch."""
        arrived = self.agreement.poll(self.local_status)
        if not arrived:
            return Decision()
        statuses = [RankStatus(*numbers) for numbers in arrived]
        self.work_us = [status.local_work_us for status in statuses if status.row_step]
        self._warn_of_stragglers(statuses)
        reasons = [(rank, REASONS[status.reason]) for rank, status in enumerate(statuses) if status.reason]
        stop = ""
        if reasons:
            rank, stop = reasons[0]
            stop += f" (rank {rank})" if self.world.world_size > 1 else ""
        profile = ProfileRequest(statuses[0].profile_steps, statuses[0].profile_rank)
        return Decision(any(status.save for status in statuses), stop, differing_ranks(statuses), profile)

    def compare_now(self) -> list[int]:
        """Return the ranks whose last fingerprint differs, at the end of the run. Every rank must call it."""
        return differing_ranks([RankStatus(*numbers) for numbers in self.world.gather(self.status)])

    def finish(self) -> None:
        """Wait for the pending exchange."""
        self.agreement.finish()

    def saved(self) -> None:
        """Note that a checkpoint is saved now. The next one is due after `checkpoint.every_minutes`."""
        self.saved_at = time.perf_counter()

    def local_status(self) -> RankStatus:
        """Return this rank's status, and consume its pending requests."""
        minutes = self.every_minutes
        due = minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        if due:
            self.saved_at = time.perf_counter()  # request it only once: the save follows at the next exchange
        save = self.requests.take_save() or (due and self.world.is_main)
        steps, rank = self.requests.take_profile()
        return self.status._replace(
            reason=REASONS.index(self.requests.reason), save=int(save), profile_steps=steps, profile_rank=rank
        )

    def set_fingerprint(self, value: int) -> None:
        """Set the fingerprint that the next exchange compares."""
        self.status = self.status._replace(fingerprint=value)

    def set_work(self, step: int, work: Work) -> None:
        """Set the local work time of the row of scalars at `step`."""
        local_work_us, data_us = round(work.seconds * 1e6), round(work.data_s * 1e6)
        self.status = self.status._replace(row_step=step, local_work_us=local_work_us, data_us=data_us)

    def scalars(self) -> dict[str, float]:
        """Return the local work per step of the slowest and the fastest rank, in seconds."""
        if not self.work_us:
            return {}
        return {"time/slowest_rank_s": max(self.work_us) / 1e6, "time/fastest_rank_s": min(self.work_us) / 1e6}

    def _warn_of_stragglers(self, statuses: Sequence[RankStatus]) -> None:
        """Warn, once per rank, about a rank whose local work took much longer than the others' in the same steps."""
        factor = self.straggler_factor
        if factor is None or self.world.world_size == 1 or len({status.row_step for status in statuses}) > 1:
            return
        row_step = statuses[0].row_step
        for rank, status in enumerate(statuses):
            others = statistics.median(other.local_work_us for i, other in enumerate(statuses) if i != rank)
            if status.local_work_us <= max(factor * others, others + STRAGGLER_FLOOR_US):
                self.slow_since.pop(rank, None)
            elif self.slow_since.setdefault(rank, row_step) < row_step and rank not in self.reported:
                # only after two consecutive rows: a single row may be slow by accident
                self.reported.add(rank)
                if rank == self.world.rank:
                    log.warning(
                        f"this rank, on {socket.gethostname()}, is slow and delays all ranks: up to step {status.row_step} its "
                        f"local work took {status.local_work_us / 1000:.1f} ms per step ({status.data_us / 1000:.1f} ms for "
                        f"data); the other ranks took {others / 1000:.1f} ms, for an average number of micro-batches"
                    )


def differing_ranks(statuses: Sequence[RankStatus]) -> list[int]:
    """Return the ranks whose fingerprint is not the most common one."""
    prints = [status.fingerprint for status in statuses]
    common = max(prints, key=prints.count)
    return [rank for rank, value in enumerate(prints) if value != common]
