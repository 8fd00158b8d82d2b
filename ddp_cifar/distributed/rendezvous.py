"""The rendezvous of ranks: the store, the device, and the process group."""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ddp_cifar.distributed.environment import local_rank_and_world_size, number_from_environment, rank_and_world_size
from ddp_cifar.distributed.world import COLLECTIVE_TIMEOUT, World, open_group, stdout_without_gloo
from ddp_cifar.errors import UserError, first_line


def open_store(timeout: timedelta = COLLECTIVE_TIMEOUT) -> Store:
    """Open the store described by torchrun's environment, or a local store if there is no such environment.

    Does not wait for the other ranks. Raises torch's `DistError` if the store cannot be reached within `timeout`.
    """
    if "RANK" not in os.environ:
        return HashStore()
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = os.environ["RANK"] == "0" and not is_torchruns
    address = os.environ["MASTER_ADDR"], number_from_environment("MASTER_PORT", 0)
    return TCPStore(*address, is_master=is_server, timeout=timeout, wait_for_workers=False)


@contextlib.contextmanager
def open_world(
    device: str = "auto",
    backend: str = "auto",
    store: Store | None = None,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    *,
    survives: bool = False,
) -> Iterator[World]:
    """Open the process group described by torchrun's environment, or a group of one process.

    `device` is auto, cpu, cuda or mps; `backend` is auto, gloo or nccl. Ranks use `store` for the rendezvous, or else a new
    store. Collectives fail after `timeout`. With `survives`, NCCL does not end the process after an error or a timeout: the
    caller must detect it. Raises `UserError` if this machine does not support device or backend.
    """
    rank, world_size = rank_and_world_size()
    local_rank, local_world_size = local_rank_and_world_size()
    rank_device = pick_device(device, backend, local_rank, local_world_size, world_size)
    backend = ("nccl" if rank_device.type == "cuda" else "gloo") if backend == "auto" else backend
    if backend == "nccl" and rank_device.type != "cuda":
        raise UserError(
            f"backend=nccl needs a GPU, found device {rank_device.type}: use backend=gloo, or remove backend=nccl"
        )
    options: dict[str, Any] = {"backend": backend, "timeout": timeout}
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
        if backend == "nccl":
            options["device_id"] = rank_device
            if survives:
                # torchrun sets it to 1: torch's watchdog would end this process before it can save its state or report
                os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    if "RANK" not in os.environ:
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}  # needs no port
    try:
        if store is not None:
            options |= {"store": PrefixStore("world", store), "rank": rank, "world_size": world_size}
        elif _is_restarted_on_a_used_store():
            options |= {"store": _unused_part_of_the_store(), "rank": rank, "world_size": world_size}
        with stdout_without_gloo():
            dist.init_process_group(**options)
    except (RuntimeError, ValueError, dist.DistError) as error:
        host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
        raise UserError(
            f"rank {rank} on {socket.gethostname()} could not join the {world_size} ranks at {host}:{port} over {backend} "
            f"({_cause(error)}): start all ranks with torchrun, and check that this host can reach that address"
        ) from error
    control_group = open_group("gloo", timeout, "control")
    succeeded = False
    try:
        yield World(rank, local_rank, world_size, local_world_size, rank_device, backend, control_group)
        succeeded = True
    finally:
        if (
            succeeded or world_size == 1
        ):  # after an error the peers may have exited, and a clean shutdown would wait for them
            dist.destroy_process_group()


def _cause(error: BaseException) -> str:
    """The first line of an error's message; after it the last one of NCCL's, which has the cause."""
    if not isinstance(error, dist.DistBackendError):
        return first_line(error)
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line not in ("", "Last error:")]
    return ": ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))


@contextlib.contextmanager
def open_world_alone() -> Iterator[World]:
    """Open a world of one process on the CPU, whatever its environment."""
    with stdout_without_gloo():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.distributed_c10d._get_default_group()
    try:
        yield World(0, 0, 1, 1, torch.device("cpu"), "gloo", group)
    finally:
        dist.destroy_process_group()


def _is_restarted_on_a_used_store() -> bool:
    """True if torchrun restarted this rank and its store still has the addresses of the previous ranks.

    Several agents count their restarts separately; launch/node.sh therefore lets torchrun create a new store for them.
    """
    restarts = number_from_environment("TORCHELASTIC_RESTART_COUNT", 0)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return restarts > 0 and shared and number_from_environment("GROUP_WORLD_SIZE", 1) == 1


def _unused_part_of_the_store() -> PrefixStore:
    """torchrun's store with a prefix for this restart, so that ranks do not wait at the addresses of the previous ranks."""
    return PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", open_store())


def pick_device(device: str, backend: str, local_rank: int, local_world_size: int, world_size: int) -> torch.device:
    """Return this rank's device for auto, cpu, cuda or mps. Raises `UserError` if the machine has none for this rank.

    With backend gloo, ranks share GPUs if a node has more ranks than GPUs. NCCL does not support that.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda, but PyTorch finds no usable GPU on this machine: use device=auto or device=cpu"
            )
        gpus = torch.cuda.device_count()
        if local_rank >= gpus and backend != "gloo":
            raise UserError(
                f"{local_world_size} ranks on {socket.gethostname()}, which has {gpus} GPUs: "
                f"use --nproc_per_node={gpus}, or backend=gloo, with which ranks share a GPU"
            )
        return torch.device("cuda", local_rank % gpus)
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps, but PyTorch finds no Apple GPU on this machine: use device=auto or device=cpu")
        if world_size > 1:
            raise UserError(f"device=mps supports one rank, found {world_size}: use device=cpu for several")
    return torch.device(device)
