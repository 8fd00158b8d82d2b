"""Rank, world size and lost peers, without importing torch."""

import os
import sys

from ddp_cifar.errors import UserError

TASK_VARIABLES = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
"""What srun, Open MPI, and MPICH or Intel MPI set: a task's number, and the number of tasks."""

LOST_PEER = ("ncclRemoteError", "Watchdog caught collective operation timeout")
"""Parts of NCCL's errors if a peer rank exited, or did not join a collective in time."""

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_and_world_size() -> tuple[int, int]:
    """Return (RANK, WORLD_SIZE) as set by torchrun, or (0, 1). Needs no process group.

    Raises `UserError` if only some of torchrun's variables are set.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"the environment has some of {', '.join(LAUNCHER_VARIABLES)}, but not {', '.join(missing)}: "
                f"start with torchrun, which sets all of them, or unset them to run one process"
            )
    rank, world_size = number_from_environment("RANK", 0), number_from_environment("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank} does not fit WORLD_SIZE={world_size}: start with torchrun, or unset RANK and WORLD_SIZE"
        )
    return rank, world_size


def check_started_by_torchrun() -> None:
    """Raise `UserError` in one of several tasks that a scheduler or MPI started without torchrun: each would train alone."""
    if "RANK" in os.environ:
        return
    for rank, size in TASK_VARIABLES:
        if rank in os.environ and number_from_environment(size, 1) > 1:
            raise UserError(
                f"this is one of {os.environ[size]} tasks ({size}), each of which would train alone: start with slurm/train.sh, "
                f"or with one torchrun per node"
            )


def number_from_environment(name: str, default: int) -> int:
    """Return the number in an environment variable. Raises `UserError` if it is not a number."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name}={text!r} in the environment is not a number: start with torchrun, or unset it"
        ) from None


def local_rank_and_world_size() -> tuple[int, int]:
    """Return (LOCAL_RANK, LOCAL_WORLD_SIZE) as set by torchrun, or (0, 1)."""
    return number_from_environment("LOCAL_RANK", 0), number_from_environment("LOCAL_WORLD_SIZE", 1)


def is_lost_peer(error: BaseException) -> bool:
    """True for the error of an exchange whose peer ranks exited or do not answer: they know the cause, this rank does not.

    NCCL also raises errors that have their cause on this rank.
    """
    distributed = sys.modules.get("torch.distributed")  # without this import there is no such error
    if distributed and isinstance(error, distributed.DistBackendError):
        return any(part in str(error) for part in LOST_PEER)
    if distributed and isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)
