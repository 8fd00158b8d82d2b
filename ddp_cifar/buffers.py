"""A model's buffers over a step: the mean over its micro-batches, as gradients are."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddp_cifar.tree_sum import TreeSum

StartSum = Callable[[Tensor], Callable[[], None]]
"""Begins to sum a tensor over ranks, in place, and returns a function that waits for it."""


class BufferMean:
    """Float buffers (BatchNorm's running statistics) become the mean over a step's micro-batches, weighted by images.

    Each micro-batch starts from the buffers of the step's start, wherever it is computed, so that ranks end a step with
    equal buffers and any number of ranks ends it with the same. Integer buffers (`num_batches_tracked`) grow as by one
    forward pass. Buffers that a forward pass leaves alone keep their bits.

    The model's buffers become views of one flat tensor a dtype, so that they are copied and summed all at once.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int, start_sum: StartSum) -> None:
        self.start_sum = start_sum
        self.changes = TreeSum()
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in model.buffers():
            by_dtype[buffer.dtype].append(buffer)
        self.flats = [_flatten(buffers) for buffers in by_dtype.values()]
        self.floats = [flat for flat in self.flats if flat.is_floating_point()]
        # the mean over one micro-batch is what its forward pass left
        self.needed = num_micro_batches > 1 and bool(self.floats)

    def begin_step(self) -> None:
        """Remember the buffers that every micro-batch of the step starts from."""
        if self.needed:
            self.starts = [flat.clone() for flat in self.flats]
            self.float_starts = [start for start in self.starts if start.is_floating_point()]

    def begin_micro_batch(self) -> None:
        """Put the buffers back to the step's start."""
        if self.needed:
            for flat, start in zip(self.flats, self.starts, strict=True):
                flat.copy_(start)

    def end_micro_batch(self, weight: float) -> None:
        """Count the change that a forward pass made, by the micro-batch's share of the step's images."""
        if self.needed:
            pairs = zip(self.floats, self.float_starts, strict=True)
            self.changes.add([(flat - start) * weight for flat, start in pairs])

    def start_reducing(self) -> Callable[[], None]:
        """Begin to sum the changes over ranks; the function returned waits and sets the buffers."""
        if not self.needed:
            return lambda: None
        changes = self.changes.take()
        waits = [self.start_sum(change) for change in changes]

        def finish() -> None:
            for wait, change, flat, start in zip(waits, changes, self.floats, self.float_starts, strict=True):
                wait()
                torch.add(start, change, out=flat)

        return finish


def _flatten(buffers: list[Tensor]) -> Tensor:
    """One tensor of all elements, of which the buffers become views."""
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.data = part.view_as(buffer)
    return flat
