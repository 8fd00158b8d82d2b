"""The message that ranks exchange during training."""

from typing import NamedTuple

from ddp_cifar.run.stopping import ALL_RANKS


class RankStatus(NamedTuple):
    """The integers that a rank sends to the others every `train.agree_every` steps.

    Times are microseconds per step in the last row of scalars. `Work` explains them.
    """

    reason: int = 0
    """The reason to stop: an index into `REASONS`."""
    save: int = 0
    """1 if a checkpoint was requested."""
    fingerprint: int = 0
    """The fingerprint of the weights at the last step at which it was due."""
    row_step: int = 0
    """The step of the last row of scalars; 0 before the first one."""
    data_us: int = 0
    forward_us: int = 0
    optimizer_us: int = 0
    backward_us: int = 0
    least_backward_us: int = 0
    peak_memory_mb: int = 0
    """Peak memory of the rank in MB: device memory on CUDA, otherwise host memory."""
    profile_steps: int = 0
    """The number of steps to profile (`ProfileRequest`), which rank 0 sends once."""
    profile_rank: int = ALL_RANKS
    """The rank that records them."""

    @property
    def local_work_us(self) -> int:
        """The time without waits for other ranks."""
        return self.data_us + self.forward_us + self.optimizer_us
