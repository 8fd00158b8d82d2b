"""A run that hangs exits, and names the ranks without a heartbeat."""

import threading
import time
from pathlib import Path

import pytest

from ddp_cifar.distributed.world import World
from ddp_cifar.run import heartbeat as heartbeat_module
from ddp_cifar.run.heartbeat import Heartbeat, Sign


def test_a_hang_names_the_ranks_without_a_heartbeat_or_those_behind(alone: World, tmp_path: Path) -> None:
    signs = {rank: Sign(rank, f"host{rank}", 100 + rank, ticks=5, beats=7, step=7, time=0.0) for rank in range(3)}
    world = World(0, 0, 3, 3, alone.device, "gloo", alone.control_group)
    describe = Heartbeat(tmp_path, tmp_path, world, timeout_s=30)._describe
    alive = {rank: Sign(**{**vars(sign), "ticks": 9}) for rank, sign in signs.items()}
    silent = {**alive, 1: signs[1]}
    assert "no heartbeat from rank 1 (host1, pid 101, at step 7)" in describe(signs, silent)
    assert "no heartbeat from rank 2 (no heartbeat yet)" in describe(signs, {rank: alive[rank] for rank in (0, 1)})
    behind = {**alive, 2: Sign(**{**vars(alive[2]), "beats": 6, "step": 6})}
    assert "rank 2 (host2, pid 102, at step 6) is behind the others" in describe(signs, behind)
    assert "all ranks are alive and waiting" in describe(signs, alive)


def test_the_process_exits_within_the_timeout_of_a_hang_and_not_because_of_a_slow_peer(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    gone = threading.Event()

    def leave(message: str) -> None:
        left.append(message)
        gone.set()

    monkeypatch.setattr(heartbeat_module, "leave", leave)
    started = time.monotonic()
    with Heartbeat(tmp_path, tmp_path, alone, timeout_s=2) as beating, beating.watching():
        while time.monotonic() - started < 2.5:  # longer than the timeout, but with progress
            beating.beat(1)
            time.sleep(0.05)
        assert left == []
        started = time.monotonic()
        assert gone.wait(4)
        assert time.monotonic() - started > 1
    assert "no rank has made progress for 2 s (train.hang_timeout_s=2)" in left[0]
    stacks = (tmp_path / "rank_0.stacks").read_text()
    assert "test_heartbeat.py" in stacks, "the stack of the main thread, which waits in this test"
