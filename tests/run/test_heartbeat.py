"""A run that hangs exits, and names the ranks without a heartbeat."""

import dataclasses
import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import RankPool

from ddp_cifar.distributed.world import World
from ddp_cifar.run import heartbeat as heartbeat_module
from ddp_cifar.run.heartbeat import Heartbeat, watched_by
from ddp_cifar.run.signs import Sign

SIGNS = {rank: Sign(rank, f"host{rank}", 100 + rank, ticks=5, beats=7, step=7, time=0.0) for rank in range(3)}


def heartbeat_of(alone: World, folder: Path) -> Heartbeat:
    world = World(0, 0, 3, 3, alone.device, "gloo", alone.control_group)
    return Heartbeat(folder, folder, world, timeout_s=60, silent_timeout_s=30)


def changed(signs: dict[int, Sign], rank: int, **values: int) -> dict[int, Sign]:
    return {**signs, rank: dataclasses.replace(signs[rank], **values)}


class Left(Exception):
    pass


def test_a_hang_names_the_ranks_that_are_behind(alone: World, tmp_path: Path) -> None:
    beating = heartbeat_of(alone, tmp_path)

    def describe(before: dict[int, Sign], after: dict[int, Sign]) -> str:
        return beating._describe(before, after)[0]

    alive = {rank: dataclasses.replace(sign, ticks=9) for rank, sign in SIGNS.items()}
    behind = changed(alive, 2, beats=6, step=6)
    assert "rank 2 (host2, pid 102, at step 6) is behind the others" in describe(SIGNS, behind)
    assert "all ranks are alive and waiting" in describe(SIGNS, alive)
    assert "do not change, check that disk" in describe(SIGNS, SIGNS)


def test_a_lost_rank_is_named_and_a_disk_that_does_not_work_is_no_lost_rank(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(message: str, ranks: Sequence[int] = ()) -> None:
        raise Left(message)

    monkeypatch.setattr(heartbeat_module, "leave", leave)
    check_lost = heartbeat_of(alone, tmp_path)._check_lost
    alive = {rank: dataclasses.replace(sign, ticks=9) for rank, sign in SIGNS.items()}
    with pytest.raises(Left, match=re.escape("no heartbeat from rank 1 (host1, pid 101, at step 7) for 30 s")):
        check_lost(SIGNS, {**alive, 1: SIGNS[1]})
    with pytest.raises(Left, match=re.escape("no heartbeat from rank 2 (no heartbeat yet)")):
        check_lost({0: SIGNS[0], 1: SIGNS[1]}, {0: alive[0], 1: alive[1]})
    check_lost(SIGNS, alive)
    check_lost(SIGNS, SIGNS)


def test_of_many_ranks_a_few_read_the_files_of_all(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def world_of(rank: int, size: int) -> World:
        return World(rank, rank % 8, size, min(8, size - rank // 8 * 8), alone.device, "gloo", alone.control_group)

    assert all(len(watched_by(world_of(rank, 32))) == 32 for rank in range(32))
    for size in (33, 1000):
        watched = [watched_by(world_of(rank, size)) for rank in range(size)]
        readers = [rank for rank in range(size) if len(watched[rank]) == size]
        assert 16 <= len(readers) <= 32
        for rank in range(size):
            node = range(rank // 8 * 8, min(size, rank // 8 * 8 + 8))
            assert {*readers, *node} <= {*watched[rank]}
        assert sum(map(len, watched)) <= size * 72
    monkeypatch.setattr(heartbeat_module, "READERS", 2)
    monkeypatch.setattr(heartbeat_module, "leave", lambda message, ranks: left.append(ranks))
    left: list[Sequence[int]] = []
    signs = SIGNS | {3: dataclasses.replace(SIGNS[0], rank=3)}
    alive = {rank: dataclasses.replace(sign, ticks=9) for rank, sign in signs.items()}
    for rank, lost, found in ((0, 1, True), (3, 1, False), (3, 2, True), (3, 3, False)):
        left.clear()
        world = World(rank, 0, 4, 1, alone.device, "gloo", alone.control_group)
        beating = Heartbeat(tmp_path, tmp_path, world, timeout_s=60, silent_timeout_s=30)
        beating._check_lost(signs, {**alive, lost: dataclasses.replace(signs[lost], host="elsewhere")})
        assert left == ([[lost]] if found else [])
    message, ranks = beating._describe(signs, alive)
    assert ranks == []
    assert message == (
        "no rank has made progress for 57 s (train.hang_timeout_s=60); see the errors of the ranks that read all heartbeats"
    )


def test_a_rank_that_is_lost_some_time_after_the_last_progress_is_found(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before and after training, when ranks wait for rank 0. Its files still change when the first reading is made."""
    left: list[str] = []
    monkeypatch.setattr(heartbeat_module, "leave", lambda message, ranks: left.append(message))
    world = World(0, 0, 2, 2, alone.device, "gloo", alone.control_group)
    started = time.monotonic()
    with Heartbeat(tmp_path, tmp_path, world, timeout_s=60, silent_timeout_s=2) as beating:
        with beating.watching(lambda: None):
            pass
        while time.monotonic() - started < 2.5:
            sign = Sign(1, "another host", 101, ticks=round(100 * time.monotonic()), beats=0, step=0, time=0.0)
            (tmp_path / "rank_1").write_text(json.dumps(dataclasses.asdict(sign)))
            time.sleep(0.02)
        assert not left
        while not left and time.monotonic() - started < 20:
            time.sleep(0.1)
    assert left[0].startswith("no heartbeat from rank 1 (another host, pid 101, at step 0) for 2 s")


def leave_after(world: World, folder: str, seconds: float) -> float:
    with Heartbeat(Path(folder), Path(folder), world, timeout_s=60, silent_timeout_s=30):
        time.sleep(seconds * world.rank)
    return time.time()


def test_no_rank_leaves_before_all_have_ended(ranks: RankPool, tmp_path: Path) -> None:
    """Nobody would watch the others."""
    first, second = ranks.run(leave_after, 2, str(tmp_path), 1.0)
    assert abs(first - second) < 0.5


def test_stacks_that_take_long_to_write_do_not_let_a_hang_continue(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for so long starts to wait anew, unless it has stopped itself."""
    gone = threading.Event()
    monkeypatch.setattr(heartbeat_module, "leave", lambda message, ranks: gone.set())
    monkeypatch.setattr(heartbeat_module, "dump_native_stacks", lambda file, timeout_s: time.sleep(1.5))
    beating = Heartbeat(tmp_path, tmp_path, alone, timeout_s=2, silent_timeout_s=4)
    with beating, beating.watching(lambda: None):
        beating.beat(1)
        assert gone.wait(10)


def test_the_process_exits_within_the_timeout_of_a_hang_and_not_because_of_a_slow_peer(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    gone = threading.Event()

    def leave(message: str, ranks: Sequence[int] = ()) -> None:
        left.append(message)
        gone.set()

    monkeypatch.setattr(heartbeat_module, "leave", leave)
    started = time.monotonic()
    saved: list[str] = []
    beating = Heartbeat(tmp_path, tmp_path, alone, timeout_s=2, silent_timeout_s=30)
    with beating, beating.watching(lambda: saved.append("the last step")):
        while time.monotonic() - started < 2.5:  # longer than the timeout, but with progress
            beating.beat(1)
            time.sleep(0.05)
        assert left == []
        started = time.monotonic()
        assert gone.wait(4)
        assert time.monotonic() - started > 1
    assert "no rank has made progress for 2 s (train.hang_timeout_s=2)" in left[0]
    assert saved == ["the last step"]
    stacks = (tmp_path / "rank_0.stacks").read_text()
    assert "test_heartbeat.py" in stacks, "the stack of the main thread, which waits in this test"
