"""What the preflight concludes, without a cluster: tests/slurm/test_planted_faults.py plants real faults."""

import itertools
import json
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import config_of
from test_mistakes import TINY

from ddp_cifar.checks.common import check_arrival, check_own_device, check_versions, missing_ranks, odd_one_out
from ddp_cifar.checks.here import FAIL, OK, WARNING, Here, Outcome, Problem
from ddp_cifar.checks.machine import addresses_by_interface, digest_of
from ddp_cifar.checks.network import rounds
from ddp_cifar.preflight import Row, findings


def here(arrived: list[str], rank: int = 0, world_size: int | None = None, **options: Any) -> Here:
    """Rank `rank` of those that arrived, two a host."""
    settings = Namespace(**{"nodes": None, "hosts": None, "patience": 1.0} | options)
    found = Here(config_of(), settings, rank, world_size or len(arrived), rank % 2, 2, host=arrived[rank])
    found.everyone = [{"rank": i, "local_rank": i % 2, "host": host, "versions": {}} for i, host in enumerate(arrived)]
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
    del late.everyone[3]
    assert missing_ranks(late) == ["rank 3 on b"]
    assert missing_ranks(here(["a", "a"], world_size=4)) == ["rank 2 on node 1", "rank 3 on node 1"]
    assert missing_ranks(here(["a", "a"], nodes=3)) == ["2 of 3 nodes (found: a)"]
    assert missing_ranks(here(["a.site", "a.site"], nodes=2, hosts="a,b")) == ["the node b"]
    with pytest.raises(Problem, match="not there: rank 3 on b"):
        check_arrival(late)
    with pytest.raises(Problem, match="ranks on c, which are not among a,b") as unexpected:
        check_arrival(here(["a", "a", "b", "b", "c", "c"], hosts="a,b"))
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


def test_ranks_that_found_the_same_share_a_line_and_failures_come_first() -> None:
    slow, full = Outcome("links", WARNING, "slow", "call"), Outcome("disk", FAIL, "full", "make room")
    found = ((0, "a", [slow, full]), (1, "a", [full]), (2, "b", [full]))
    lines = findings([Row({"rank": rank, "host": host}, outcomes) for rank, host, outcomes in found])
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
