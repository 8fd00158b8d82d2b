"""Profiles of a few steps, for Perfetto (https://ui.perfetto.dev) and TensorBoard's profiler."""

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile, schedule

from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.run.stopping import ALL_RANKS, ProfileRequest

TOP_KERNELS = 10


class NullProfiler:
    """Records nothing. For a trainer without a RUN_DIR."""

    def __enter__(self) -> "NullProfiler":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self) -> None:
        """Count a completed training step."""

    def request(self, request: ProfileRequest) -> None:
        """Record the next steps, if the request has any. All ranks must call it after the same step, with the same request."""


class Plan(NamedTuple):
    """A profile that is being recorded, or will be."""

    first: int
    """The first step to record. The step before it warms up the profiler."""
    last: int
    rank: int = ALL_RANKS
    """The rank that records, or `ALL_RANKS`."""
    suffix: str = ""
    """The end of the file's name."""

    def __str__(self) -> str:
        who = "all ranks" if self.rank == ALL_RANKS else f"rank {self.rank}"
        return f"steps {self.first} to {self.last} on {who}"


class Profiler(NullProfiler):
    """Records steps of this rank, one profile at a time, into `folder`/rank_N.pt.trace.json.gz.

    `completed` is the number of steps that the run has completed at the start. `steps` are the first and the last step of a
    profile of all ranks (`train.profile_steps`). Others are requested later; their files are named
    rank_N_step_FIRST.pt.trace.json.gz. After the last step of a profile, or when the run ends, the profiler writes the file
    and logs the slowest kernels. A file that cannot be written is a warning.

    Every rank knows the profiles of all ranks, so that they agree on which requests are accepted.
    """

    def __init__(self, folder: Path, world: World, completed: int = 0, steps: Sequence[int] | None = None) -> None:
        self.folder = folder
        self.world = world
        self.device = world.device.type
        self.completed = completed
        self.plans = [Plan(max(steps[0], completed + 1), steps[1])] if steps and completed < steps[1] else []
        """In the order of their steps."""
        self.current: Plan | None = None
        """The first of `plans`, from its warm-up step on."""
        self.recorder: profile | None = None
        """Records `current`, if this rank does."""

    def __enter__(self) -> "Profiler":
        self._begin_if_due()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def step(self) -> None:
        self.completed += 1
        if self.recorder:
            self.recorder.step()
        if self.current and self.completed >= self.current.last:
            self._end()
        self._begin_if_due()

    def request(self, request: ProfileRequest) -> None:
        if not request.steps:
            return
        first = self.completed + 2
        plan = Plan(first, first + request.steps - 1, request.rank, f"_step_{first}")
        problem = ""
        if request.rank >= self.world.world_size:
            problem = f"there is no rank {request.rank}"
        elif self.plans and self.plans[0].first - 1 <= plan.last:
            problem = (
                f"{self.plans[0]} {'are being' if self.current else 'will be'} recorded; request it again afterwards"
            )
        if not problem:
            self.plans.insert(0, plan)
            self._begin_if_due()
        elif self.world.is_main:
            log.warning(f"no profile is recorded for the file PROFILE: {problem}")

    def _begin_if_due(self) -> None:
        """Begin the next profile if the next step is the one that warms up, or the first one."""
        if self.current or not self.plans or self.completed < self.plans[0].first - 2:
            return
        self.current = plan = self.plans[0]
        log.info(f"recording a profile of {plan} in {self.folder}")
        if plan.rank not in (ALL_RANKS, self.world.rank):
            return
        warmup, active = plan.first - 1 - self.completed, plan.last - plan.first + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is no warm-up step, as for a profile from step 1 on
            steps = schedule(wait=0, warmup=warmup, active=active, repeat=1)
        self.recorder = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda"),
            schedule=steps,
            on_trace_ready=lambda recorder: self._write(recorder, plan),
        )
        self.recorder.record_steps = False  # a step is not a kernel, and would be first in the table
        self.recorder.start()

    def _end(self) -> None:
        if self.current:
            self.plans.remove(self.current)
        if self.recorder:
            self.recorder.stop()
        self.current = self.recorder = None

    def _write(self, recorder: profile, plan: Plan) -> None:
        if self.completed < plan.first:  # the run ended just before the first step to record
            return
        path = self._path(plan.suffix)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = 1
            while plan.suffix and path.exists():  # an earlier start of the run has recorded the same step
                number += 1
                path = self._path(f"{plan.suffix}_{number}")
            recorder.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.warning(f"cannot write the profile to {path} ({error}); training continues")
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # an incomplete file
        kind = "cuda" if self.device == "cuda" else "cpu"
        table = recorder.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=TOP_KERNELS, max_name_column_width=60
        )
        log.info(f"slowest kernels of the profile {path}:\n{table}")

    def _path(self, suffix: str) -> Path:
        return self.folder / f"rank_{self.world.rank}{suffix}.pt.trace.json.gz"
