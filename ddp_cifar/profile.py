"""A recording of the kernels of a few steps, for Perfetto (https://ui.perfetto.dev) and TensorBoard's profiler."""

from collections.abc import Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from ddp_cifar.distributed import World
from ddp_cifar.log import log

TOP_KERNELS = 10


class Profile:
    """Records the steps from the first to the last of `steps` on this rank, into `folder`/rank_N.pt.trace.json.gz."""

    def __init__(self, folder: Path, steps: Sequence[int], world: World) -> None:
        self.path = folder / f"rank_{world.rank}.pt.trace.json.gz"
        self.first, self.last = steps
        self.device = world.device.type
        self._recorder: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin, if `step` is one to record."""
        if self._recorder is None and self.first <= step <= self.last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
            self._recorder = profile(activities=activities)
            self._recorder.start()

    def after_step(self, step: int) -> None:
        """End after the last step: write the recording, and print the longest kernels on rank 0."""
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """End where the run does, if that is before the last step to record."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        recorder.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            log.warning(f"the profile could not be written to {self.path} ({error})")
        kind = "cuda" if self.device == "cuda" else "cpu"
        table = recorder.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=TOP_KERNELS, max_name_column_width=60
        )
        log.info(f"the longest kernels of the profile in {self.path}:\n{table}")
