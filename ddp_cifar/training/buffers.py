"""The mean of a model's buffers over the micro-batches of a step, in the same way as gradients."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ddp_cifar.distributed.world import World
from ddp_cifar.training.tree_sum import TreeSum

ALIGNMENT = 16
"""Each buffer starts at a multiple of this number of bytes. torch's compiler copies one that does not, and a model that
changes a copied buffer gets no CUDA graph."""

SumAsync = Callable[[Sequence[Tensor], Tensor], Callable[[], None]]
"""Start summing the rows (N,) of all ranks into a tensor (N,), and return a function that waits for the sum.

A rank may have no rows. Its last row may be the output tensor."""


class BufferMean:
    """Sets float and complex buffers, such as BatchNorm's running statistics, to the mean over a step's micro-batches by images.

    Every micro-batch starts from the buffers at the start of the step, on any rank. So all ranks end a step with equal
    buffers, and the number of ranks does not change them. Integer buffers (`num_batches_tracked`) grow as after one forward
    pass. A buffer that the forward pass does not change stays bitwise identical.

    The model's buffers become views of one flat tensor per dtype, so that one operation copies or sums all of them. If
    a forward pass assigns a new tensor to a buffer, its values are copied into the view, which is put back.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int, sum_async: SumAsync) -> None:
        """`num_micro_batches` is the number in a full step."""
        self.sum_async = sum_async
        self.owners = {
            (module, name): buffer
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        """(module, name) -> the buffer, a view of a flat tensor."""
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in model.buffers():
            by_dtype[buffer.dtype].append(buffer)
        self.flats = [_flatten(buffers) for buffers in by_dtype.values()]
        self.starts = self._clones()
        """The values of `flats` after the last complete step, from which every micro-batch of the next one starts."""
        self.names = dict(model.named_buffers(remove_duplicate=False))
        self.floats = [_as_floats(flat) for flat in self.flats if _has_mean(flat)]
        # with one micro-batch, the buffers after its forward pass are the mean already
        self.needed = num_micro_batches > 1 and bool(self.flats)

    def begin_step(self, num_micro_batches: int) -> None:
        """Prepare the sums of a step with so many micro-batches."""
        if self.needed:
            self.float_starts = [_as_floats(start) for start in self.starts if _has_mean(start)]
            self.changes = TreeSum(num_micro_batches)

    def begin_micro_batch(self) -> None:
        """Restore the buffers to the start of the step."""
        if self.needed:
            self.undo_step()

    def end_micro_batch(self, index: int, weight: float) -> None:
        """Add the change that a forward pass made. `weight` is the micro-batch's share of the step's images."""
        if self.needed:
            self._copy_assigned()
            pairs = zip(self.floats, self.float_starts, strict=True)
            self.changes.add(range(index, index + 1), [(flat - start) * weight for flat, start in pairs])

    def end_step(self) -> None:
        """Make the current values those that the next step starts from. Call it after a step, and after loading buffers."""
        self._copy_assigned()
        self._put_views_back()
        self.starts = self._clones()

    def values(self) -> list[Tensor]:
        """Return all current values, one flat tensor per dtype."""
        self._copy_assigned()
        return self.flats

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """In the body, the buffers start from the end of the last complete step. Afterwards they are as before."""
        self._copy_assigned()
        before = self._clones()
        self.undo_step()
        try:
            yield
        finally:
            self._restore(before)

    def undo_step(self, unless: Tensor | None = None) -> None:
        """Restore the buffers to the end of the last complete step, unless `unless`, a () bool on the device, is true."""
        if unless is not None:
            pairs = zip(self.flats, self.starts, strict=True)
            self._restore([torch.where(unless, flat, start) for flat, start in pairs])
        else:
            self._restore(self.starts)

    def _restore(self, values: Sequence[Tensor]) -> None:
        for flat, value in zip(self.flats, values, strict=True):
            flat.copy_(value)
        self._put_views_back()

    def at_last_step(self) -> dict[str, Tensor]:
        """Return each buffer by name as it was after the last complete step. Can be called from any thread."""
        starts = {flat.dtype: start for flat, start in zip(self.flats, self.starts, strict=True)}
        return {
            name: starts[view.dtype].as_strided(view.size(), view.stride(), view.storage_offset())
            for name, view in self.names.items()
        }

    def _clones(self) -> list[Tensor]:
        return [flat.clone() for flat in self.flats]

    def _copy_assigned(self) -> None:
        """Copy the tensors that a forward pass has assigned to buffers into the views."""
        for (module, name), view in self.owners.items():
            if (found := module._buffers[name]) is not view and found is not None:
                view.copy_(found.detach())

    def _put_views_back(self) -> None:
        """Undo assignments: before each forward pass, and at the end of a step."""
        for (module, name), view in self.owners.items():
            module._buffers[name] = view

    def start_reducing(self) -> Callable[[], None]:
        """Start summing the changes over ranks; return a function that waits and sets the buffers."""
        if not self.needed:
            return lambda: None
        rows = [changes for _, changes in self.changes.sums] or [[torch.zeros_like(flat) for flat in self.floats]]
        has_any = bool(self.changes.sums)
        waits = [
            self.sum_async([row[i] for row in rows] if has_any else [], rows[-1][i]) for i in range(len(self.floats))
        ]

        def finish() -> None:
            for wait, change, flat, start in zip(waits, rows[-1], self.floats, self.float_starts, strict=True):
                wait()
                torch.add(start, change, out=flat)
            self._put_views_back()

        return finish


def sum_rows(world: World) -> SumAsync:
    """Return a `SumAsync` that sums over ranks in the backend's order."""

    def start(rows: Sequence[Tensor], total: Tensor) -> Callable[[], None]:
        for row in reversed(rows[:-1]):
            total.add_(row)
        return world.sum_async(total)

    return start


def _has_mean(flat: Tensor) -> bool:
    return flat.is_floating_point() or flat.is_complex()


def _as_floats(flat: Tensor) -> Tensor:
    """Return a view with the real and the imaginary part of complex numbers, since not every backend can sum these."""
    return torch.view_as_real(flat).flatten() if flat.is_complex() else flat


def _flatten(buffers: list[Tensor]) -> Tensor:
    """Return one tensor with all elements, and zeros for the alignment; the buffers become views of it."""
    unit = ALIGNMENT // buffers[0].element_size()
    sizes = [math.ceil(buffer.numel() / unit) * unit for buffer in buffers]
    flat = buffers[0].new_zeros(sum(sizes))
    for buffer, part in zip(buffers, flat.split(sizes), strict=True):
        buffer.data = part[: buffer.numel()].view_as(buffer).copy_(buffer)
    return flat
