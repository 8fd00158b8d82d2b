"""`World`: this process's rank and device, and the collectives, named by meaning.

Without torchrun the process group has one process; nothing else differs.
"""

import contextlib
import inspect
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ddp_cifar.dynamo import without_dynamo
from ddp_cifar.errors import UserError, few_of

T = TypeVar("T")


COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # gloo's default


NODE_TIMEOUT = timedelta(days=1)  # for the other ranks of a node while its first one downloads or decodes


LAZY = "TORCH_GLOO_LAZY_INIT"
"""The variable with which torch lets gloo connect ranks only when they exchange data."""


@contextlib.contextmanager
def stdout_without_gloo() -> Iterator[None]:
    """Open groups in this context: what gloo prints goes to stderr, as stdout may be the CSV of predict.

    gloo prints a line per group before torch 2.11.
    """
    if torch.__version__ >= "2.11":  # compared as versions
        yield
        return
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def open_group(backend: str, timeout: timedelta, name: str) -> dist.ProcessGroup:
    """Open another group of all ranks. Every rank must call it. Messages about hangs contain the name.

    gloo connects two ranks when they first exchange data: in a ring, each has two connections, however many ranks there are.
    """
    before = os.environ.get(LAZY)
    os.environ[LAZY] = "1"
    try:
        with stdout_without_gloo():
            return cast(dist.ProcessGroup, dist.new_group(backend=backend, timeout=timeout, group_desc=name))
    finally:
        del os.environ[LAZY]
        if before is not None:
            os.environ[LAZY] = before


@dataclass(frozen=True)
class World:
    """This process's rank, its device, and the collectives. All ranks must call the same collectives in the same order."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str
    control_group: dist.ProcessGroup
    """A separate gloo group for control messages, which do not wait for the collectives of training."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the log and the checkpoints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the ranks' tensors element-wise, in place, on every rank. Any shape, the same on all ranks."""
        self.sum_async(tensor)()
        return tensor

    def sum_async(self, tensor: Tensor) -> Callable[[], None]:
        """Start `sum` in place and return a function that waits for it."""
        if self.device.type == "mps":
            return lambda: None  # one rank, and no backend accepts mps tensors
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None

        def wait() -> None:
            work.wait()

        return wait

    def sum_on_cpu(self, tensor: Tensor) -> Tensor:
        """Sum the ranks' CPU tensors element-wise, in place, on every rank. Any shape, the same on all ranks."""
        dist.all_reduce(tensor, group=self.control_group)
        return tensor

    def max(self, value: float) -> float:
        """Return the maximum of the ranks' `value`, exchanged over the CPU."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control_group)
        return largest.item()

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        dist.barrier()

    def wait_for_device(self) -> None:
        """Wait until this rank's GPU has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def all(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is true on all of them."""
        return int(self.sum(torch.tensor(int(flag), device=self.device))) == self.world_size

    def gather_async(self, numbers: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Start to gather the ranks' `numbers` and return a function that waits for them: one list per rank.

        Every rank must pass the same count. The exchange uses the CPU and a separate group, so that it waits neither for the
        device nor for the collectives of training.
        """
        mine = torch.tensor(numbers, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        work = dist.all_gather(everyone, mine, group=self.control_group, async_op=True)
        assert work is not None

        def wait() -> list[list[int]]:
            work.wait()
            return [theirs.tolist() for theirs in everyone]

        return wait

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the ranks' `numbers`, one list per rank. Every rank must pass the same count."""
        return self.gather_async(numbers)()

    def gather_objects(self, value: T) -> list[T]:
        """Return the ranks' `value`, any object that can be pickled, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def new_group(
        self, name: str, timeout: timedelta = COLLECTIVE_TIMEOUT, backend: str | None = None
    ) -> dist.ProcessGroup:
        """Open another group of all ranks, for collectives in an independent order. Every rank must call it."""
        return open_group(backend or self.backend, timeout, name)

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and return its result on every rank. An exception is raised on every rank.

        So the other ranks get the failure instead of waiting for a rank that exited.
        """
        outcome: list[Any] = _attempt(function) if self.is_main else [None, None]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def on_each_node(self, function: Callable[[], T]) -> T:
        """Run `function` on the first rank of each node and return its result on every rank of that node.

        Use it for work that is needed once per node, such as a download; the other ranks wait for up to a day. An exception
        on any node is raised on every rank.
        """
        if self.world_size == 1:
            return function()
        outcome = [*(_attempt(function) if self.local_rank == 0 else [None, None]), socket.gethostname()]
        outcomes: list[Any] = [None] * self.world_size
        group = self.new_group("nodes", NODE_TIMEOUT, "gloo")
        dist.all_gather_object(outcomes, outcome, group=group)
        dist.destroy_process_group(group)
        failures = {host: failure for _, failure, host in outcomes if failure is not None}
        for failure in failures.values():
            if isinstance(failure, UserError) and len(failures) < len({host for *_, host in outcomes}):
                raise UserError(f"on {few_of(list(failures))}: {failure}")
            raise failure
        return outcomes[self.rank - self.local_rank][0]  # type: ignore[no-any-return]

    def wrap(
        self, model: nn.Module, bucket_mb: float = 25.0, hook: str = "none"
    ) -> "DistributedDataParallel | SingleProcessModel":
        """Wrap the model, already on the device and equal on all ranks, in DDP.

        `bucket_mb` is the size of gradient buckets, in units of 2^20 bytes. `hook` is the compression of gradients: none,
        fp16 or bf16. DDP does not synchronize buffers; training/buffers.py averages them like gradients.
        """
        if self.device.type == "mps":
            return SingleProcessModel(model)
        parameters = inspect.signature(DistributedDataParallel).parameters
        # broadcast_buffers is deprecated where forward_sync_buffers (torch 2.13) exists
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        options: dict[str, Any] = {buffers: False, "bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": True}
        with without_dynamo():
            ddp = DistributedDataParallel(model, device_ids=device_ids, **options)
        if hook != "none":
            hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
            ddp.register_comm_hook(dist.group.WORLD, hooks[hook])
        return ddp


class SingleProcessModel(nn.Module):
    """Replaces DistributedDataParallel on mps, which supports one rank and has no communication backend."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _attempt(function: Callable[[], object]) -> list[Any]:
    """Call `function` and return [result, None] or [None, exception], to be sent to other ranks.

    An exception that cannot be pickled is replaced by its text: if sending it failed, the other ranks would wait.
    """
    try:
        return [function(), None]
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return [None, RuntimeError(repr(error))]
        return [None, error]


def check_reduced(ddp: "DistributedDataParallel | SingleProcessModel", step: int) -> None:
    """Raise `UserError` if the backward pass of step `step` has not summed all gradients over ranks.

    DDP itself only finds that in the next forward pass, after an update with this rank's own gradients.
    """
    if isinstance(ddp, SingleProcessModel):
        return
    try:
        ddp._check_reducer_finalized()
    except RuntimeError as error:
        raise UserError(
            f"in step {step}, the model did not use all parameters that need a gradient: DistributedDataParallel needs each "
            f"in every pass; set requires_grad=False for unused ones, and multiply by 0 to skip a layer"
        ) from error
