"""A model's buffers over a step: the mean over its micro-batches, as gradients are."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddp_cifar.distributed import World


class BufferMean:
    """Float buffers (BatchNorm's running statistics) become the mean over a step's micro-batches, weighted by images.

    Each micro-batch starts from the buffers of the step's start, wherever it is computed, so that ranks end a step with
    equal buffers and any number of ranks ends it with the same. Integer buffers (`num_batches_tracked`) grow as by one
    forward pass. Buffers that a forward pass leaves alone keep their bits.
    """

    def __init__(self, model: nn.Module, world: World, num_micro_batches: int) -> None:
        self.world = world
        self.buffers = [buffer for buffer in model.buffers() if buffer is not None]
        self.floats = [buffer for buffer in self.buffers if buffer.is_floating_point()]
        # the mean over one micro-batch is what its forward pass left
        self.needed = num_micro_batches > 1 and bool(self.floats)

    def begin_step(self) -> None:
        """Remember the buffers that every micro-batch of the step starts from."""
        if self.needed:
            self.start = [buffer.clone() for buffer in self.buffers]
            self.change = torch.zeros_like(_flat(self.floats))

    def begin_micro_batch(self) -> None:
        """Put the buffers back to the step's start."""
        if self.needed:
            _copy(self.start, self.buffers)

    def end_micro_batch(self, weight: float) -> None:
        """Count the change that a forward pass made, by the micro-batch's share of the step's images."""
        if self.needed:
            self.change += weight * (_flat(self.floats) - self._flat_start())

    def start_reducing(self) -> Callable[[], None]:
        """Begin to sum the changes over ranks; the function returned waits and sets the buffers."""
        if not self.needed:
            return lambda: None
        wait = self.world.start_sum(self.change)

        def finish() -> None:
            wait()
            means = (self._flat_start() + self.change).split([buffer.numel() for buffer in self.floats])
            _copy([mean.view_as(b) for mean, b in zip(means, self.floats, strict=True)], self.floats)

        return finish

    def _flat_start(self) -> Tensor:
        return _flat([buffer for buffer in self.start if buffer.is_floating_point()])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
