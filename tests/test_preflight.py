"""What the preflight concludes, without a cluster: tests/slurm/test_planted_faults.py plants real faults."""

import itertools
import json
import os
import shlex
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import config_of
from test_mistakes import TINY

from ddp_cifar.checks import machine
from ddp_cifar.checks.common import check_arrival, check_own_device, check_versions, missing_ranks, odd_one_out
from ddp_cifar.checks.here import FAIL, OK, WARNING, Here, Outcome, Problem
from ddp_cifar.checks.machine import (
    addresses_by_interface,
    available_cores,
    available_memory,
    check_batch,
    check_data,
    control_groups,
    digest_of,
)
from ddp_cifar.checks.network import check_clock, rounds
from ddp_cifar.preflight import Row, findings


def here(arrived: list[str], rank: int = 0, world_size: int | None = None, **options: Any) -> Here:
    """Rank `rank` of those that arrived, two a host."""
    settings = Namespace(**{"nodes": None, "hosts": [], "patience": 1.0} | options)
    found = Here(config_of(), settings, rank, world_size or len(arrived), rank % 2, 2, host=arrived[rank])
    found.everyone = [{"rank": i, "local_rank": i % 2, "host": host, "versions": {}} for i, host in enumerate(arrived)]
    found.arrived = list(found.everyone)
    found.facts = found.everyone[rank]
    return found


@pytest.mark.parametrize("count", range(2, 9))
def test_each_two_meet_once_and_nobody_waits_for_two_at_a_time(count: int) -> None:
    pairs = list(rounds(range(count)))
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))
    at_a_time = count // 2
    for start in range(0, len(pairs), at_a_time):
        busy = [rank for pair in pairs[start : start + at_a_time] for rank in pair]
        assert len(set(busy)) == len(busy)


def test_who_is_missing_is_named_by_elimination() -> None:
    all_there = here(["a", "a", "b", "b"])
    assert missing_ranks(all_there) == []
    assert check_arrival(all_there) == "4 ranks on 2 nodes"
    late = here(["a", "a", "b", "b"])
    del late.arrived[3]
    assert missing_ranks(late) == ["rank 3 on b"]
    assert missing_ranks(here(["a", "a"], world_size=4)) == ["rank 2 on node 1", "rank 3 on node 1"]
    assert missing_ranks(here(["a", "a"], nodes=3)) == ["2 of 3 nodes (found: a)"]
    assert missing_ranks(here(["a.site", "a.site"], nodes=2, hosts=["a", "b"])) == ["the node b"]
    other_names = here(["ip-10-0-0-1", "ip-10-0-0-1"], nodes=2, hosts=["gpu-1", "gpu-2"])
    assert missing_ranks(other_names) == ["1 of 2 nodes (found: ip-10-0-0-1)"], "names tell nothing here"
    assert missing_ranks(here(["10.0.0.1", "10.0.0.1"], nodes=2, hosts=["10.0.0.1", "10.0.0.2"])) == [
        "the node 10.0.0.2"
    ]
    assert check_arrival(here(["a.site", "a.site", "b.site", "b.site"], hosts=["a", "b"])) == "4 ranks on 2 nodes"
    with pytest.raises(Problem, match="not there: rank 3 on b"):
        check_arrival(late)
    with pytest.raises(Problem, match="ranks on c, which are not among a,b") as unexpected:
        check_arrival(here(["a", "a", "b", "b", "c", "c"], hosts=["a", "b"]))
    assert unexpected.value.is_warning
    with pytest.raises(Problem, match=r"different numbers of ranks: \{'a': 3, 'b': 1\}"):
        check_arrival(here(["a", "a", "a", "b"]))


def test_the_odd_one_out_is_the_one_that_differs_from_most() -> None:
    values = {0: "new", 1: "old", 2: "old"}
    assert odd_one_out(here(["a", "b", "c"]), values) == ("new", "old")
    assert odd_one_out(here(["a", "b", "c"], rank=1), values) is None
    assert odd_one_out(here(["a", "b"], rank=1), {0: "x", 1: "y"}) == ("y", "x"), "of two, rank 0 counts"
    found = here(["a", "b", "c"], rank=2)
    for facts, torch_version in zip(found.everyone, ("2.14", "2.14", "2.11"), strict=True):
        facts["versions"] = {"python": "3.12", "torch": torch_version}
    with pytest.raises(Problem, match=r"^c has torch 2\.11, others 2\.14$"):
        check_versions(found)
    found.facts["versions"] = {"python": "3.12", "torch": "2.14"}
    found.everyone[0]["versions"]["commit"] = "abc"
    assert check_versions(found) == "python 3.12, torch 2.14", "a copy has no commit"


def test_two_ranks_on_one_gpu_are_found() -> None:
    found = here(["a", "a", "b"], rank=1)
    for facts, device in zip(found.everyone, ("a gpu0", "a gpu0", "b gpu0"), strict=True):
        facts["device"] = device
    with pytest.raises(Problem, match="its GPU is also that of rank 0"):
        check_own_device(found)


def test_equal_files_have_equal_digests_wherever_they_are(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "inside").mkdir(parents=True)
        for name in ("a", "b", "inside/c"):
            (tmp_path / folder / name).write_bytes(name.encode() * 50)

    def digest(folder: str) -> tuple[str, int, int]:
        return digest_of([path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file()])

    assert digest("one") == digest("two")
    (tmp_path / "two" / "inside" / "c").write_bytes(b"x" * 400)
    assert digest("one")[0] != digest("two")[0]
    assert digest("one")[1:] == (3, 500)


@pytest.mark.parametrize(
    ("seconds", "wrong"),
    [
        ([0.0, 1.9], []),
        ([0.0, 3.9], [0, 1]),
        ([0.0, 0.5, -0.5, 30.0], [3]),
        ([0.0, 0.5, 1.9, 0.2], []),
    ],
)
def test_clocks_that_differ(seconds: list[float], wrong: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    found = []
    for rank in range(len(seconds)):
        one = here(list("abcd")[: len(seconds)], rank)
        one.local_world_size = 1
        one.world = Namespace(all=lambda _: True, gather=lambda _: [[int((now + s) * 1e6)] for s in seconds])  # type: ignore[assignment]
        try:
            check_clock(one)
        except Problem:
            found.append(rank)
    assert found == wrong


def test_a_batch_that_does_not_divide_leaves_the_other_checks_alone() -> None:
    """The nodes that are to come count, not those that have."""
    config = config_of("data.name=shapes", "train.global_batch_size=512", "train.micro_batch_size=64")
    for nodes, fits in ((4, True), (8, False)):
        one = Here(config, Namespace(nodes=nodes, hosts=[], patience=1.0), 0, 2, 0, 2)
        one.check("data", check_data)
        one.check("batch", check_batch)
        data, batch = one.outcomes
        assert data.verdict == OK
        assert batch.verdict == (OK if fits else FAIL), batch
        assert one.facts["memory"] > one.facts["checkpoint"] > 0
    assert "8 micro-batches of 64 images, which do not split over 16 ranks" in batch.found


def test_memory_and_cores_are_no_more_than_the_machine_has() -> None:
    free, total = available_memory()
    assert 0 < free <= total
    assert 0 < available_cores() <= len(os.sched_getaffinity(0))
    assert all(group.is_relative_to("/sys/fs/cgroup") for group in control_groups("memory"))


def test_a_control_groups_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "memory.max").write_text("1000000\n")
    (job / "memory.current").write_text("900000\n")
    (job / "memory.stat").write_text("anon 200000\ninactive_file 600000\n")
    (job / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(machine, "control_groups", lambda _: [job, tmp_path])
    assert available_memory() == (700000, 1000000), "what is cached can be had"
    assert available_cores() == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--patience", "0"], "--patience 0 is out of range"),
        (["--nodes", "0"], "--nodes 0 is out of range"),
        (["--json", "/nonexistent/a.json"], "/nonexistent is no folder that can be written"),
    ],
)
def test_a_mistake_in_the_options(arguments: list[str], expected: str, shell: Callable[..., Any]) -> None:
    done = shell("python", "-m", "ddp_cifar.preflight", *arguments)
    assert done.status == 2
    assert expected in done.err
    assert len(done.err.splitlines()) == 1


def test_ranks_that_found_the_same_share_a_line_and_failures_come_first() -> None:
    slow, full = Outcome("links", WARNING, "slow", "call"), Outcome("disk", FAIL, "full", "make room")
    found = ((0, "a", [slow, full]), (1, "a", [full]), (2, "b", [full]))
    lines = findings([Row({"rank": rank, "host": host}, outcomes) for rank, host, outcomes in found])
    gone = Row({"rank": 3, "host": "c"}, [Outcome("links", FAIL, "it fell silent")], is_silent=True)
    others = [Row({"rank": 0, "host": "a"}, [Outcome("links", FAIL, "another rank is gone")]), gone]
    assert findings(others)[0] == "FAIL links, rank 3 (c): it fell silent", "the cause comes first"
    assert lines == [
        "FAIL disk, ranks 0, 1, 2 (a, b): full. To do: make room",
        "warning links, rank 0 (a): slow. To do: call",
    ]


def test_loopback_is_an_interface() -> None:
    assert addresses_by_interface()["lo"].startswith("127.")


def test_a_check_that_raises_anything_is_a_failure() -> None:
    def broken(here: Here) -> str:
        raise OSError("no such thing")

    found = here(["a"])
    found.check("good", lambda here: "fine")
    found.check("bad", broken, "do this")
    assert found.outcomes == [Outcome("good", OK, "fine"), Outcome("bad", FAIL, "OSError: no such thing", "do this")]


@pytest.mark.slow
def test_a_machine_passes_and_leaves_nothing(shell: Callable[..., Any], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    arguments = shlex.join([*TINY, f"run_dir={tmp_path / 'runs' / 'run'}", "--json", str(found)])
    done = shell("bash", "-c", f"launch/preflight.sh {arguments}", NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert done.status == 0, done.out + done.err
    result = json.loads(found.read_text())
    assert result["ok"]
    assert len(result["ranks"]) == 2
    assert "the preflight passed, in " in done.out
    assert not (tmp_path / "runs").exists()
    refused = shell("bash", "-c", f"launch/preflight.sh {arguments} optim.lrr=1")
    assert refused.status == 2
    assert "did you mean optim.lr?" in refused.err.splitlines()[-1]


FAULT = """
import os, signal, sys, threading, time
def plant():
    machine = sys.modules.get('ddp_cifar.checks.machine')
    if machine and hasattr(machine, 'check_disk'):
        sys.modules['ddp_cifar.checks.{module}'].{function} = lambda _: {fault}
    else:
        threading.Timer(0.05, plant).start()
if os.environ.get('RANK') == '1':
    plant()
"""


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "fault", "expected"),
    [
        (
            "machine.check_limits",
            "time.sleep(100)",
            "FAIL limits, rank 1 ({host}): this check did not end: it blocks, on {host}",
        ),
        ("machine.check_limits", KILLED, "FAIL limits, rank 1 ({host}): it fell silent in the check 'limits'"),
        ("here.open_store", f"time.sleep(3) or {KILLED}", "FAIL arrival, rank 0 ({host}): not there: rank 1 on {host}"),
    ],
)
def test_a_check_that_blocks_and_a_rank_that_is_killed_are_in_the_report(
    place: str, fault: str, expected: str, shell: Callable[..., Any], tmp_path: Path
) -> None:
    """The killed one is on rank 0's own node, where torchrun ends rank 0 as well, whatever it is at."""
    module, function = place.split(".")
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(module=module, function=function, fault=fault))
    arguments = shlex.join([*TINY, f"run_dir={tmp_path / 'run'}", "--patience=5"])
    done = shell(
        *("bash", "-c", f"launch/preflight.sh {arguments}"),
        **{"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
    )
    assert done.status != 0
    assert expected.format(host=socket.gethostname()) in done.out, done.out + done.err
    assert "rank host" in done.out
