"""The preflight's checks of a rank's machine."""

import os
from pathlib import Path

import pytest
import torch
from helpers import config_of
from preflight_rank import here

from ddp_cifar.checks import control_groups
from ddp_cifar.checks.common import check_own_device
from ddp_cifar.checks.machine import (
    check_batch,
    check_data,
    check_memory,
)
from ddp_cifar.checks.rank_context import FAIL, OK, Outcome, Problem, RankContext


def test_two_ranks_on_one_gpu_and_a_node_with_fewer_gpus_are_found() -> None:
    def check(rank: int, *devices: str) -> str:
        found = here(["a", "a", "b"], rank=rank)
        for facts, device in zip(found.everyone, devices, strict=True):
            facts["device"] = device
        return check_own_device(found)

    with pytest.raises(Problem, match="its GPU is also used by rank 0"):
        check(1, "a gpu0", "a gpu0", "b gpu0")
    assert check(1, "a gpu0", "a gpu1", "b gpu0") == "not shared"
    with pytest.raises(Problem, match=r"b has fewer ranks \(1\) than other nodes \(2\)") as fewer:
        check(2, "a gpu0", "a gpu1", "b gpu0")
    assert fewer.value.is_warning


@pytest.mark.parametrize(
    ("hosts", "nodes", "batch", "expected"),
    [
        ("aab", 2, 512, "512 images per step = 3 ranks x 2 to 3 micro-batches of 64 images"),
        ("aab", 4, 512, "512 images per step = 7 ranks x 1 to 2 micro-batches of 64 images"),
        ("aab", 4, 6, "train.global_batch_size=6 is less than the number of ranks (7)"),
    ],
)
def test_the_batch_is_checked_for_all_expected_ranks(hosts: str, nodes: int, batch: int, expected: str) -> None:
    """A missing node is assumed to have as many ranks as the largest. The checkpoint size is known for any batch."""
    one = here(list(hosts), nodes=nodes)
    one.config = config_of("data.name=shapes", f"train.global_batch_size={batch}", "train.micro_batch_size=64")
    one.check("data", check_data)
    one.check("batch", check_batch)
    data, outcome = one.outcomes
    assert data.verdict == OK
    assert outcome.found.startswith(expected)
    assert ("with 2 ranks assumed per missing node" in outcome.found) == (nodes == 4 and batch == 512)
    assert one.facts["checkpoint"] > 0
    assert (outcome.verdict == OK) == ("memory" in one.facts) == (batch == 512)


@pytest.mark.parametrize(
    ("residency", "free", "fits"),
    [("device", 999, False), ("device", 1000, True), ("host", 400, True), ("auto", 1199, True), ("auto", 399, False)],
)
def test_images_need_gpu_memory_only_if_they_are_stored_there(
    monkeypatch: pytest.MonkeyPatch, residency: str, free: int, fits: bool
) -> None:
    """Simulated: this machine may have no GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2000))
    found = here(["a"])
    found.device, found.config = torch.device("cuda", 0), config_of(f"data.residency={residency}")
    found.facts |= {"memory": 400, "images": 600}
    found.check("memory", check_memory)
    assert (found.outcomes[0].verdict == OK) == fits


def test_available_memory_and_cores_do_not_exceed_the_machine() -> None:
    free, total = control_groups.available_memory()
    assert 0 < free <= total
    assert 0 < control_groups.available_cores() <= len(os.sched_getaffinity(0))
    assert all(group.is_relative_to("/sys/fs/cgroup") for group in control_groups.control_groups("memory"))


def test_the_limits_of_a_control_group_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "memory.max").write_text("1000000\n")
    (job / "memory.current").write_text("900000\n")
    (job / "memory.stat").write_text("anon 200000\ninactive_file 600000\n")
    (job / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(control_groups, "control_groups", lambda _: [job, tmp_path])
    assert control_groups.available_memory() == (700000, 1000000), "cached memory is available"
    assert control_groups.available_cores() == 0.5


def test_a_check_that_raises_any_exception_fails() -> None:
    def broken(here: RankContext) -> str:
        raise OSError("unexpected")

    found = here(["a"])
    found.check("good", lambda here: "fine")
    found.check("bad", broken, "do this")
    assert found.outcomes == [Outcome("good", OK, "fine"), Outcome("bad", FAIL, "OSError: unexpected", "do this")]
