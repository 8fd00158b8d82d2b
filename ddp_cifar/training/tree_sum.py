"""Sums over a step's micro-batches in a fixed binary tree: bitwise identical for any assignment of micro-batches to ranks.

The tree adds micro-batches 0 and 1, 2 and 3, and so on, then neighboring sums, until one sum is left. If their number is not a
power of two, the tree is cut off at its right edge. The micro-batches of a rank are consecutive. A rank adds up those that form
complete subtrees, and sends one row per subtree. Each rank owns a part of the gradients, and adds up the rows of all ranks for
this part in the tree's order.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp_cifar.data.batch_plan import subtrees
from ddp_cifar.distributed.world import World

# torch 2.14 renamed the function, and warns about the old name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


Rows = list[list[range]]
"""For each rank, the subtrees of its micro-batches from left to right. A subtree is the range of its micro-batches."""


def _are_halves(left: range, right: range, num_leaves: int) -> bool:
    """True if two neighboring subtrees are the halves of one subtree. The right half may be cut off at the tree's edge."""
    return left.start % (2 * len(left)) == 0 and len(right) == min(len(left), num_leaves - right.start)


class TreeSum:
    """Adds up lists of tensors, one list per leaf or subtree, from left to right, like a binary counter."""

    def __init__(self, num_leaves: int) -> None:
        self.num_leaves = num_leaves
        self.sums: list[tuple[range, list[Tensor]]] = []
        """The leaves of each sum, and the sum."""

    def add(self, leaves: range, tensors: list[Tensor]) -> None:
        """Add the tensors of the next subtree. The sum takes ownership of the tensors."""
        for left, sums in self.pop_left_halves(leaves):
            torch._foreach_add_(sums, tensors)
            leaves, tensors = range(left.start, leaves.stop), sums
        self.sums.append((leaves, tensors))

    def pop_left_halves(self, leaves: range) -> list[tuple[range, list[Tensor]]]:
        """Remove and return the sums that the subtree `leaves` completes, nearest first."""
        popped = []
        while self.sums and _are_halves(self.sums[-1][0], leaves, self.num_leaves):
            popped.append(self.sums.pop())
            leaves = range(popped[-1][0].start, leaves.stop)
        return popped


class TreeReduction:
    """A DDP communication hook that sums gradients over micro-batches and ranks in the tree.

    Each rank owns a part of a bucket: all ranks send it their rows of this part, and it sends the sum to all. On W ranks, a rank
    with k rows of B bytes sends (k + 1) (W - 1) / W B bytes. With one row, that is the traffic of a ring all-reduce (Patarasuk
    and Yuan, J. Parallel Distrib. Comput. 69, 2009).
    """

    def __init__(self, world: World, ddp: DistributedDataParallel) -> None:
        self.world = world
        self.parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        self.positions = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        # two groups, for the parts and for their sums: on a CPU, a bucket's sums are sent while the next bucket's parts arrive,
        # and their order differs between ranks
        self.groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        if world.world_size > 1:
            group = world.new_group("parts of gradients")
            self.groups = group, group if world.backend == "nccl" else world.new_group("sums of gradients")
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="tree sum")
        self.error: Exception | None = None
        if world.backend == "nccl":
            self.stream = torch.cuda.Stream(world.device)
        ddp.register_comm_hook(None, self._reduce_bucket)

    def begin_step(self, shares: Sequence[range]) -> None:
        """Prepare the next step. `shares` has the micro-batches of each rank."""
        self.num_leaves = shares[-1].stop
        self.rows = rows_of(tuple(shares))
        self.own = shares[self.world.rank]
        self.sums = TreeSum(self.num_leaves)
        """The sums of this rank's micro-batches before its last one."""

    def end_micro_batch(self, index: int) -> None:
        """Call after each backward pass. Collects the gradients, except after the last one: DDP has then set the step's sum."""
        if index != self.own.stop - 1:
            self.sums.add(range(index, index + 1), [_gradient(parameter) for parameter in self.parameters])
            for parameter in self.parameters:
                parameter.grad = None

    def end_step(self) -> None:
        """Call after the last backward pass, also on a rank without micro-batches. Raises the exchange's error, if any."""
        self.sums.sums.clear()
        if self.error:
            raise self.error

    def sum_async(self, rows: Sequence[Tensor], total: Tensor) -> Callable[[], None]:
        """Start summing the rows (N,) of all ranks into `total` (N,), and return a function that waits for the sum.

        A rank passes one row for each subtree of its micro-batches; the last row may be `total`.
        """
        done = self._start(rows, total)

        def wait() -> None:
            done.wait()

        return wait

    def _reduce_bucket(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        if not self.own:
            return self._start([], buffer)
        parameters, gradients = bucket.parameters(), bucket.gradients()
        positions = [self.positions[id(parameter)] for parameter in parameters]

        def parts_of(flat: Tensor) -> list[Tensor]:
            # `bucket.gradients()` have the right offsets, but not the strides of a channels-last parameter
            return [
                flat.as_strided(parameter.size(), parameter.stride(), gradient.storage_offset())
                for gradient, parameter in zip(gradients, parameters, strict=True)
            ]

        sums = TreeSum(self.num_leaves)
        sums.sums = list(self.sums.sums)
        for _, tensors in sums.pop_left_halves(self.own[-1:]):
            torch._foreach_add_(parts_of(buffer), [tensors[i] for i in positions])
        rows = [torch.empty_like(buffer) for _ in sums.sums]
        for row, (_, tensors) in zip(rows, sums.sums, strict=True):
            torch._foreach_copy_(parts_of(row), [tensors[i] for i in positions])
        return self._start([*rows, buffer], buffer)

    def _start(self, rows: Sequence[Tensor], total: Tensor) -> Future[Tensor]:
        if self.groups is None:
            return _finished(total)
        if self.world.backend == "nccl":
            return self._start_on_stream(rows, total)
        if total.device.type != "cpu":  # gloo's collectives run on the CPU
            host = torch.empty_like(total, device="cpu")
            self._start([row.cpu() for row in rows], host).wait()
            total.copy_(host)
            return _finished(total)

        future: Future[Tensor] = Future()
        exchange = self._exchange_rows(rows, total)

        def finish() -> None:
            try:
                exchange()
            except Exception as error:  # set in the future, DDP would treat it as the sum
                self.error = error
            future.set_result(total)

        # on a thread: DDP would run it during the backward pass, and a collective that waits for another one hangs
        self.worker.submit(finish)
        return future

    def _start_on_stream(self, rows: Sequence[Tensor], total: Tensor) -> Future[Tensor]:
        """Do the same on CUDA, on a separate stream. Nothing else waits."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for row in rows:
                row.record_stream(self.stream)  # keeps the memory from being reused too early
            self._exchange_rows(rows, total)()
            future: Future[Tensor] = Future(devices=[self.world.device])
            future.set_result(total)
        return future

    def _exchange_rows(self, rows: Sequence[Tensor], total: Tensor) -> Callable[[], None]:
        """Start sending each rank its part of `rows`.

        The returned function adds up this rank's part of all rows, and gathers the sums of all parts in `total`.
        """
        assert self.groups
        group, sums_group = self.groups
        rank, world_size = self.world.rank, self.world.world_size
        size = -(-len(total) // world_size)
        sizes = [max(0, min(size, len(total) - other * size)) for other in range(world_size)]
        counts = [len(theirs) for theirs in self.rows]
        # one exchange per row, with each rank's last row in the last exchange, so that rows need not be concatenated
        exchanges = []
        is_even = len(total) == size * world_size
        for later in reversed(range(max(counts))):
            senders = [other for other in range(world_size) if counts[other] > later]
            sends = rank in senders
            parts = total.new_empty(len(senders) * sizes[rank])
            splits: dict[str, list[int]] = {}  # the backend needs none if all parts are equal
            if not is_even or len(senders) < world_size:
                splits["output_split_sizes"] = [sizes[rank] if other in senders else 0 for other in range(world_size)]
                splits["input_split_sizes"] = sizes if sends else [0] * world_size
            row = rows[len(rows) - 1 - later] if sends else total[:0]
            work = dist.all_to_all_single(parts, row, group=group, async_op=True, **splits)
            assert work is not None
            exchanges.append((senders, parts.view(len(senders), -1), work))

        def finish() -> None:
            by_rank: list[list[Tensor]] = [[] for _ in range(world_size)]
            for senders, received, work in exchanges:
                work.wait()
                for sender, part in zip(senders, received, strict=True):
                    by_rank[sender].append(part)
            own = add_up(self.rows, by_rank, self.num_leaves)
            gathered = total if is_even else total.new_empty(size * world_size)
            _all_gather(gathered, own if is_even else F.pad(own, (0, size - len(own))), group=sums_group)
            if not is_even:
                total.copy_(gathered[: len(total)])

        return finish


def add_up(rows: Rows, parts: list[list[Tensor]], num_leaves: int) -> Tensor:
    """Return the sum of all ranks' parts (N,), one per row, in the tree's order. The parts are overwritten."""
    sums = TreeSum(num_leaves)
    for theirs, tensors in zip(rows, parts, strict=True):
        for leaves, part in zip(theirs, tensors, strict=True):
            sums.add(leaves, [part])
    ((_, (total,)),) = sums.sums
    return total


@functools.cache
def rows_of(shares: tuple[range, ...]) -> Rows:
    """Return the rows that each rank sends, if `shares` has the micro-batches of each rank."""
    return [subtrees(share, shares[-1].stop) for share in shares]


def _finished(tensor: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[tensor.device] if tensor.device.type == "cuda" else None)
    future.set_result(tensor)
    return future


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
