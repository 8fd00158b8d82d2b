"""Goodput: the share of a run's time that advanced it, over all its starts."""

import time

from ddp_cifar.run.run_dir import Start


class Goodput:
    """Counts the productive seconds of this start, and adds those of earlier starts."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.resumed_at = time.perf_counter()
        self.waiting_s = 0.0
        """Seconds spent waiting for saves."""

    def scalars(self) -> dict[str, float]:
        """Return restarts, steps lost, downtime, productive seconds, and goodput.

        Goodput is the share of the productive seconds in the lifetime of the run's processes and its downtime.
        """
        occupied_s = self.start.occupied_s + time.time() - self.start.time
        productive_s = self.start.productive_s + time.perf_counter() - self.resumed_at - self.waiting_s
        return {
            "run/restarts": self.start.restarts,
            "run/steps_lost": self.start.steps_lost,
            "run/downtime_s": self.start.downtime_s,
            "run/productive_s": productive_s,
            "run/goodput": productive_s / (occupied_s + self.start.downtime_s),
        }
