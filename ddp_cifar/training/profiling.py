"""Profiles of a few steps, for Perfetto (https://ui.perfetto.dev) and TensorBoard's profiler."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from ddp_cifar.distributed.world import World
from ddp_cifar.log import log

TOP_KERNELS = 10


class NullProfiler:
    """Records nothing. Used if `train.profile_steps` is not set."""

    def __enter__(self) -> "NullProfiler":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self) -> None:
        """Count a completed training step."""


class Profiler(NullProfiler):
    """Records this rank's steps, from the first to the last of `steps`, into `folder`/rank_N.pt.trace.json.gz.

    `completed` is the number of steps that the run has completed at the start. After the last step, or when the run ends, the
    profiler writes the file, and rank 0 prints the slowest kernels.
    """

    def __init__(self, folder: Path, steps: Sequence[int], world: World, completed: int = 0) -> None:
        self.path = folder / f"rank_{world.rank}.pt.trace.json.gz"
        self.device = world.device.type
        self.completed = completed
        first, last = steps
        self.first = first
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is no warm-up step, as for a profile from step 1 on
            of_run = schedule(wait=max(0, first - 2), warmup=min(1, first - 1), active=last - first + 1, repeat=1)
        self.recorder = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda"),
            schedule=lambda step: of_run(completed + step),
            on_trace_ready=self._write,
        )
        self.recorder.record_steps = False  # a step is not a kernel, and would be first in the table

    def __enter__(self) -> "Profiler":
        self.recorder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.recorder.__exit__(*error)

    def step(self) -> None:
        self.completed += 1
        self.recorder.step()

    def _write(self, recorder: profile) -> None:
        if self.completed < self.first:  # the run ended just before the first step to record
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            log.warning(f"cannot write the profile to {self.path} ({error}); training continues")
        kind = "cuda" if self.device == "cuda" else "cpu"
        table = recorder.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=TOP_KERNELS, max_name_column_width=60
        )
        log.info(f"slowest kernels of the profile {self.path}:\n{table}")
