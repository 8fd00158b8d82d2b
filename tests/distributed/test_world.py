"""Exchanges between ranks."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch.torch_version import TorchVersion

from ddp_cifar.distributed.environment import is_lost_peer
from ddp_cifar.distributed.rendezvous import open_world, pick_device
from ddp_cifar.distributed.world import World, open_group
from ddp_cifar.errors import UserError


class Unsendable(Exception):
    def __init__(self) -> None:
        self.function = lambda: None


def test_an_error_that_cannot_be_pickled_is_still_raised_on_every_rank(ranks: RankPool) -> None:
    assert ranks.run(fail_on_the_first, 2) == [["Unsendable()"] * 2] * 2


def fail_on_the_first(world: World) -> list[str]:
    def fail() -> None:
        raise Unsendable

    messages = []
    for together in (world.on_main, world.on_each_node):
        try:
            together(fail)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize(("version", "is_redirected"), [("2.9.1", True), ("2.11.0a0+nv", True), ("2.11.0+cpu", False)])
def test_what_gloo_prints_when_a_group_opens_is_not_on_stdout(
    version: str, is_redirected: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before torch 2.11, gloo prints. An alpha of 2.11 may be older than the change."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(dist, "new_group", lambda **_: os.write(1, b"[Gloo] connected"))
    open_group("gloo", timedelta(seconds=1), "test")
    os.write(1, b"a row")
    out, err = capfd.readouterr()
    assert out == ("a row" if is_redirected else "[Gloo] connecteda row")
    assert err == ("[Gloo] connected" if is_redirected else "")


def test_ranks_share_gpus_only_with_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device("auto", "gloo", rank, 3, 3).index for rank in range(3)] == [0, 1, 0]
    assert pick_device("cuda", "auto", 1, 2, 2).index == 1
    with pytest.raises(UserError, match=r"3 ranks on .*, which has 2 GPUs: use --nproc_per_node=2, or backend=gloo"):
        pick_device("cuda", "auto", 2, 3, 3)


VARIABLE = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
NCCL_ERROR = """NCCL error in: NCCL.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.3
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
{}"""


@pytest.mark.parametrize(
    ("survives", "last", "handling", "cause"),
    [
        (True, "Error while creating shared memory segment", "0", "Error while creating shared memory segment"),
        (False, "", "1", "ncclSystemError: System call"),
    ],
)
def test_an_error_of_nccl_is_shown_with_its_cause_and_ends_the_process_unless_it_survives(
    survives: bool, last: str, handling: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: this machine may have no GPU. The variable is set before NCCL reads it."""
    found = []

    def join(**_: object) -> None:
        found.append(os.environ[VARIABLE])
        raise dist.DistBackendError(NCCL_ERROR.format(last))

    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr("ddp_cifar.distributed.rendezvous.pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(UserError) as error, open_world(survives=survives):
        pass
    assert found == [handling]
    assert f"NCCL version 2.29.3: {cause}" in str(error.value)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistBackendError(NCCL_ERROR.format("Error while creating shared memory segment")), False),
        (dist.DistBackendError("NCCL error in: a.cpp:94, remote process exited\nncclRemoteError: A call failed"), True),
        (dist.DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"), True),
        (dist.DistStoreError("wait timeout after 1000ms"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("CUDA error"), False),
    ],
)
def test_only_some_errors_of_nccl_mean_that_a_peer_is_lost(error: BaseException, is_lost: bool) -> None:
    assert is_lost_peer(error) == is_lost
