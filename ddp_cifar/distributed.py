"""This process's place among the ranks, and the few things that ranks do together, named by meaning.

A world of one is a world: without torchrun a one-process group is opened, and nothing else differs.
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
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ddp_cifar.errors import UserError

T = TypeVar("T")

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # gloo's default
PATIENCE = timedelta(days=1)  # of a node's other ranks while its first one downloads or decodes


@dataclass(frozen=True)
class World:
    """This process's rank, its device, and the collectives. Every rank must call a collective, and in the same order."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str
    side: dist.ProcessGroup
    """A gloo group of its own, for what ranks tell each other beside the training."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which keeps the log and the checkpoints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The element-wise sum of every rank's tensor (any shape, equal on all ranks), in place, on every rank."""
        self.start_sum(tensor)()
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin `sum` in place and return a function that waits for it."""
        if self.device.type == "mps":
            return lambda: None  # one rank, and no backend takes its tensors
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None

        def wait() -> None:
            work.wait()

        return wait

    def all(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on all of them."""
        return int(self.sum(torch.tensor(int(flag), device=self.device))) == self.world_size

    def start_gather(self, numbers: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Begin to learn every rank's `numbers`, as many on each, and return a function that waits for them: a list a rank.

        It goes over the CPU in a group of its own, and so neither waits for the device nor for the training's collectives.
        """
        own = torch.tensor(numbers, dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        work = dist.all_gather(everyone, own, group=self.side, async_op=True)
        assert work is not None

        def wait() -> list[list[int]]:
            work.wait()
            return [theirs.tolist() for theirs in everyone]

        return wait

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's `numbers`, as many on each: a list a rank."""
        return self.start_gather(numbers)()

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, anything that can be pickled, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.side)
        return values

    def new_group(self, timeout: timedelta = COLLECTIVE_TIMEOUT, backend: str | None = None) -> dist.ProcessGroup:
        """All ranks once more, for collectives that come in an order of their own. Every rank must call it."""
        return cast(dist.ProcessGroup, dist.new_group(backend=backend or self.backend, timeout=timeout))

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and return its result on every rank; what it raises is raised on every rank.

        The other ranks learn of a failure here instead of waiting for a rank that is gone.
        """
        outcome: list[Any] = _attempt(function) if self.is_main else [None, None]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def on_each_node(self, function: Callable[[], T]) -> T:
        """Run `function` on the first rank of each node and return its result on the node's every rank.

        For what a node needs once, such as a download; the others wait as long as it takes. What it raises on any node
        is raised on every rank.
        """
        if self.world_size == 1:
            return function()
        outcome = _attempt(function) if self.local_rank == 0 else [None, None]
        outcomes: list[Any] = [None] * self.world_size
        patient = self.new_group(PATIENCE, "gloo")
        dist.all_gather_object(outcomes, outcome, group=patient)
        dist.destroy_process_group(patient)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return outcomes[self.rank - self.local_rank][0]  # type: ignore[no-any-return]

    def wrap(
        self, model: nn.Module, bucket_mb: float = 25.0, hook: str = "none"
    ) -> "DistributedDataParallel | Undistributed":
        """The model, already on the device and equal on all ranks, with its gradients averaged over ranks in backward.

        They are sent `bucket_mb` MB at a time, rounded to what `hook` says: none, fp16 or bf16. DDP is told to leave the
        buffers alone: the trainer averages them like gradients.
        """
        if self.device.type == "mps":
            return Undistributed(model)
        parameters = inspect.signature(DistributedDataParallel).parameters
        # broadcast_buffers is deprecated where forward_sync_buffers (torch 2.13) exists
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        options: dict[str, Any] = {buffers: False, "bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": True}
        ddp = DistributedDataParallel(model, device_ids=device_ids, **options)
        if hook != "none":
            hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
            ddp.register_comm_hook(dist.group.WORLD, hooks[hook])
        return ddp


class Undistributed(nn.Module):
    """Stands in for DistributedDataParallel on mps, which serves one rank and which no backend communicates for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def place_from_environment() -> tuple[int, int]:
    """(RANK, WORLD_SIZE) as torchrun sets them, or (0, 1): known before any process group opens.

    Raises `UserError` where the environment has only some of what torchrun sets.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"the environment has some of {', '.join(LAUNCHER_VARIABLES)}, but not {', '.join(missing)}: "
                f"start with torchrun, which sets all, or unset them to train on one process"
            )
    rank, world_size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank} does not fit WORLD_SIZE={world_size}: start with torchrun, or unset RANK and WORLD_SIZE"
        )
    return rank, world_size


def open_store(timeout: timedelta = COLLECTIVE_TIMEOUT) -> Store:
    """The store that torchrun's environment describes, where ranks meet before a group opens; or one of this process alone.

    It does not wait for the others. Raises torch's `DistError` if it cannot be reached within `timeout`.
    """
    if "RANK" not in os.environ:
        return HashStore()
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = os.environ["RANK"] == "0" and not is_torchruns
    place = os.environ["MASTER_ADDR"], _from_environment("MASTER_PORT", 0)
    return TCPStore(*place, is_master=is_server, timeout=timeout, wait_for_workers=False)


@contextlib.contextmanager
def open_world(
    device: str = "auto", backend: str = "auto", store: Store | None = None, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> Iterator[World]:
    """Open the process group that torchrun's environment describes, or one of this process alone.

    `device` is auto, cpu, cuda or mps; `backend` auto, gloo or nccl. Ranks meet in `store`, else in one of the group's own;
    collectives fail after `timeout`. Raises `UserError` if the machine cannot serve them.
    """
    rank, world_size = place_from_environment()
    local_rank, local_world_size = local_place()
    own = pick_device(device, local_rank, local_world_size, world_size)
    backend = ("nccl" if own.type == "cuda" else "gloo") if backend == "auto" else backend
    if backend == "nccl" and own.type != "cuda":
        raise UserError(f"backend=nccl needs a GPU, found device {own.type}: use backend=gloo, or leave it out")
    options: dict[str, Any] = {"backend": backend, "timeout": timeout}
    if own.type == "cuda":
        torch.cuda.set_device(own)
        if backend == "nccl":
            options["device_id"] = own
    if "RANK" not in os.environ:
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}  # needs no port
    try:
        if store is not None:
            options |= {"store": PrefixStore("world", store), "rank": rank, "world_size": world_size}
        elif _is_restarted_on_a_used_store():
            options |= {"store": _unused_part_of_the_store(), "rank": rank, "world_size": world_size}
        dist.init_process_group(**options)
    except (RuntimeError, ValueError, dist.DistError) as error:
        host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} on {socket.gethostname()} could not join the {world_size} ranks at {host}:{port} over {backend} "
            f"({reason}): start all ranks with torchrun, and check that this host reaches that address"
        ) from error
    side = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    yield World(rank, local_rank, world_size, local_world_size, own, backend, side)
    # not in a `finally`: after an error the peers may be gone, and leaving in good order would wait for them
    dist.destroy_process_group()


@contextlib.contextmanager
def open_world_alone() -> Iterator[World]:
    """A world of this process alone, on the CPU, whatever its environment says."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.distributed_c10d._get_default_group()
    try:
        yield World(0, 0, 1, 1, torch.device("cpu"), "gloo", group)
    finally:
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """True for the error of a collective whose other ranks are gone: they know the reason, this rank does not."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def bf16_is_native(device: torch.device) -> bool:
    """True where the hardware multiplies bf16 matrices, rather than emulating it more slowly than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere: the first with bf16 tensor cores
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def _attempt(function: Callable[[], object]) -> list[Any]:
    """[result, None], or [None, the exception], which can be sent to other ranks.

    An exception that cannot be sent goes as its text: a rank that failed at sending it would leave the others waiting.
    """
    try:
        return [function(), None]
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return [None, RuntimeError(repr(error))]
        return [None, error]


def _is_restarted_on_a_used_store() -> bool:
    """True where torchrun has started this rank again, and its store still has the addresses of the ranks that are gone.

    With several agents, each of which counts its own restarts, launch/node.sh has torchrun make a new store instead.
    """
    restarts = _from_environment("TORCHELASTIC_RESTART_COUNT", 0)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return restarts > 0 and shared and _from_environment("GROUP_WORLD_SIZE", 1) == 1


def _unused_part_of_the_store() -> PrefixStore:
    """torchrun's store, under names that belong to this restart: ranks would wait for the dead ones' addresses."""
    return PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", open_store())


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name}={text!r} in the environment is not a number: start with torchrun, or unset it"
        ) from None


def local_place() -> tuple[int, int]:
    """(LOCAL_RANK, LOCAL_WORLD_SIZE) as torchrun sets them, or (0, 1)."""
    return _from_environment("LOCAL_RANK", 0), _from_environment("LOCAL_WORLD_SIZE", 1)


def pick_device(device: str, local_rank: int, local_world_size: int, world_size: int) -> torch.device:
    """This rank's own device of the kind auto, cpu, cuda or mps. Raises `UserError` if the machine has none for it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but torch finds no usable GPU on this machine: use device=auto or device=cpu")
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"{local_world_size} ranks on {socket.gethostname()}, but it has {gpus} GPUs: "
                f"use --nproc_per_node={gpus}, or device=cpu"
            )
        return torch.device("cuda", local_rank)
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps, but torch finds no Apple GPU on this machine: use device=auto or device=cpu")
        if world_size > 1:
            raise UserError(f"device=mps serves one rank, found {world_size}: use device=cpu for several")
    return torch.device(device)
