"""The exchange between ranks during training: requests to stop, save or profile, fingerprints, times and memory."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ddp_cifar.config import Config
from ddp_cifar.distributed.world import World
from ddp_cifar.run.stopping import REASONS, ProfileRequest, Requests
from ddp_cifar.tracking.rank_times import RankTimes
from ddp_cifar.training.metrics import Work, peak_memory
from ddp_cifar.training.rank_status import RankStatus
from ddp_cifar.training.stragglers import Stragglers


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
        self.requests = Requests()
        self.agreement = Agreement(world, config.train.agree_every)
        self.status = RankStatus()
        self.saved_at = time.perf_counter()
        """The time at which a checkpoint was last saved, or last became due by `checkpoint.every_minutes`."""
        self.row_step = 0
        self.last_row: Sequence[RankStatus] = ()
        """The status of each rank after the last row of scalars that has arrived, and the row's step."""
        self.stragglers = Stragglers(world.rank, world.world_size, config.train.straggler_factor)
        self.times = RankTimes()
        """The times of all ranks in the last rows, on rank 0."""

    def poll(self) -> Decision:
        """Return the next decision. Every rank must call it after each step and each evaluation batch."""
        arrived = self.agreement.poll(self.local_status)
        if not arrived:
            return Decision()
        statuses = [RankStatus(*numbers) for numbers in arrived]
        self._observe(statuses)
        reasons = [(rank, REASONS[status.reason]) for rank, status in enumerate(statuses) if status.reason]
        stop = ""
        if reasons:
            rank, stop = reasons[0]
            stop += f" (rank {rank})" if self.world.world_size > 1 else ""
        profile = ProfileRequest(statuses[0].profile_steps, statuses[0].profile_rank)
        return Decision(any(status.save for status in statuses), stop, differing_ranks(statuses), profile)

    def compare_now(self) -> list[int]:
        """Return the ranks whose last fingerprint differs, at the end of the run. Every rank must call it."""
        statuses = [RankStatus(*numbers) for numbers in self.world.gather(self.status)]
        self._observe(statuses)
        return differing_ranks(statuses)

    def finish(self) -> None:
        """Wait for the pending exchange, and report what is still slow. Call it at the end of a run."""
        if arrived := self.agreement.finish():
            self._observe([RankStatus(*numbers) for numbers in arrived])
        self.stragglers.finish()

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
        """Set the times of the row of scalars at `step`, and the memory."""
        self.status = self.status._replace(
            row_step=step,
            data_us=round(work.data_s * 1e6),
            forward_us=round(work.forward_s * 1e6),
            optimizer_us=round(work.optimizer_s * 1e6),
            backward_us=round(work.backward_s * 1e6),
            least_backward_us=round(work.least_backward_s * 1e6),
            peak_memory_mb=round(peak_memory(self.world.device) / 1e6),
        )

    def scalars(self) -> dict[str, float]:
        """Return the local work per step of the slowest and the fastest rank, in seconds, and the largest memory in MB."""
        if not self.last_row:
            return {}
        work_us = [status.local_work_us for status in self.last_row]
        return {
            "time/slowest_rank_s": max(work_us) / 1e6,
            "time/fastest_rank_s": min(work_us) / 1e6,
            "run/max_peak_memory_mb": max(status.peak_memory_mb for status in self.last_row),
        }

    def _observe(self, statuses: Sequence[RankStatus]) -> None:
        """Use the times of the ranks' last row, once for each row."""
        step = statuses[0].row_step
        if step <= self.row_step or any(status.row_step != step for status in statuses):
            return
        self.row_step, self.last_row = step, statuses
        self.stragglers.add(statuses)
        if self.world.is_main:
            self.times.add(step, [(s.data_us, s.forward_us, s.optimizer_us, s.backward_us) for s in statuses])


def differing_ranks(statuses: Sequence[RankStatus]) -> list[int]:
    """Return the ranks whose fingerprint is not the most common one."""
    prints = [status.fingerprint for status in statuses]
    ((common, _),) = Counter(prints).most_common(1)
    return [rank for rank, value in enumerate(prints) if value != common]
