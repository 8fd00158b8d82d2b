"""Sums over a step's micro-batches in a fixed binary tree, which have the same bits whatever rank computed which.

Micro-batches 0 and 1 are added, 2 and 3, and so on, then neighbouring sums, up to one. A rank's micro-batches are neighbours,
and a whole subtree where the number of ranks is a power of two; over ranks the rest of the tree is added.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp_cifar.distributed import World

# the name since torch 2.14, where the other one warns
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class TreeSum:
    """One rank's part: lists of tensors of one micro-batch after another, kept as few sums, as the digits of a binary counter."""

    def __init__(self) -> None:
        self.sums: list[tuple[int, list[Tensor]]] = []
        """The micro-batches in each sum, fewer from one to the next, and the sum."""

    def add(self, tensors: list[Tensor]) -> None:
        """Count the next micro-batch's tensors, which belong to the sum from now on."""
        count = 1
        while self.sums and self.sums[-1][0] == count:
            left = self.sums.pop()[1]
            torch._foreach_add_(left, tensors)
            tensors = left
            count *= 2
        self.sums.append((count, tensors))

    def add_to(self, tensors: list[Tensor], which: Sequence[int]) -> None:
        """Add to the last micro-batch's tensors, in place, those before it; `which` are their places in the lists."""
        for _, sums in reversed(self.sums):
            torch._foreach_add_(tensors, [sums[i] for i in which])

    def take(self) -> list[Tensor]:
        """The sum of all; none are left."""
        total = self.sums.pop()[1]
        self.add_to(total, range(len(total)))
        self.sums.clear()
        return total


class TreeReduction:
    """A communication hook by which DDP sums gradients over micro-batches and ranks in the tree.

    Each rank adds up a part of a bucket of its own, which all ranks send it, and sends the sum to all: together the traffic
    of a ring's all-reduce, 2 (W - 1) / W of the bucket a rank (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
    """

    def __init__(self, world: World, ddp: DistributedDataParallel) -> None:
        self.world = world
        self.parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        self.places = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self.before = TreeSum()
        """Of the step's micro-batches before the last one."""
        # for the parts and for their sums: on a CPU a bucket's sums go out while the next one's parts come in, and which of
        # them is first is not the same on all ranks
        self.groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        if world.world_size > 1:
            group = world.new_group()
            self.groups = group, group if world.backend == "nccl" else world.new_group()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="tree sum")
        self.error: Exception | None = None
        if world.backend == "nccl":
            self.stream = torch.cuda.Stream(world.device)
        ddp.register_comm_hook(None, self._reduce_bucket)

    def end_micro_batch(self, *, is_last: bool) -> None:
        """After its backward pass. The last one's gradients, the step's, DDP has set; others are taken out and kept."""
        if not is_last:
            self.before.add([_gradient(parameter) for parameter in self.parameters])
            for parameter in self.parameters:
                parameter.grad = None
            return
        self.before.sums.clear()
        if self.error:
            raise self.error

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a tensor (N,) over ranks, in place, and return a function that waits for it."""
        done = self._start(tensor)

        def wait() -> None:
            done.wait()

        return wait

    def _reduce_bucket(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        if self.before.sums:
            parameters = bucket.parameters()
            # `bucket.gradients()` have the right places, but not a channels-last parameter's order
            gradients = [
                gradient.as_strided(parameter.size(), parameter.stride(), gradient.storage_offset())
                for gradient, parameter in zip(bucket.gradients(), parameters, strict=True)
            ]
            self.before.add_to(gradients, [self.places[id(parameter)] for parameter in parameters])
        return self._start(bucket.buffer())

    def _start(self, tensor: Tensor) -> Future[Tensor]:
        if self.groups is None:
            return _finished(tensor)
        if self.world.backend == "nccl":
            return self._start_on_stream(tensor)
        if tensor.device.type != "cpu":  # gloo's collectives are the CPU's
            host = tensor.cpu()
            self._start(host).wait()
            tensor.copy_(host)
            return _finished(tensor)

        future: Future[Tensor] = Future()
        padded = self._padded(tensor)
        parts = torch.empty_like(padded)
        arrival = dist.all_to_all_single(parts, padded, group=self.groups[0], async_op=True)
        assert arrival is not None

        def finish() -> None:
            try:
                arrival.wait()
                self._send_sum(tensor, padded, parts)
            except Exception as error:  # a future would hand it to DDP as if it were the sum
                self.error = error
            future.set_result(tensor)

        # on a thread: DDP would run it in the middle of the backward pass, and a collective that waits for another hangs
        self.worker.submit(finish)
        return future

    def _start_on_stream(self, tensor: Tensor) -> Future[Tensor]:
        """The same on CUDA, where nothing waits but a stream of its own."""
        assert self.groups
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            padded = self._padded(tensor)
            parts = torch.empty_like(padded)
            dist.all_to_all_single(parts, padded, group=self.groups[0])
            self._send_sum(tensor, padded, parts)
            future: Future[Tensor] = Future(devices=[self.world.device])
            future.set_result(tensor)
        return future

    def _padded(self, tensor: Tensor) -> Tensor:
        """With zeros behind it, so that it splits over ranks; itself, where it does."""
        missing = -len(tensor) % self.world.world_size
        return F.pad(tensor, (0, missing)) if missing else tensor

    def _send_sum(self, tensor: Tensor, padded: Tensor, parts: Tensor) -> None:
        """Add up every rank's part and gather the sums of all parts in `tensor`."""
        assert self.groups
        sums = parts.view(self.world.world_size, -1)
        while len(sums) > 1:
            sums = sums[0::2].add_(sums[1::2])
        _all_gather(padded, sums[0], group=self.groups[1])
        if padded is not tensor:
            tensor.copy_(padded[: len(tensor)])


def _finished(tensor: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[tensor.device] if tensor.device.type == "cuda" else None)
    future.set_result(tensor)
    return future


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
