"""A run's checkpoints: find the newest good one, remove old ones. User errors are in test_mistakes.py."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
from helpers import state_of

from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_store import Checkpoints
from ddp_cifar.run.resume import find_checkpoint


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(state_of(float(step)), step)
        checkpoints.finish()
    newest = tmp_path / "step_00000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "one bit flipped":
        content[content.index(b"\x00\x00\x00\x40" * 8) + 11] ^= 1  # a bit of the weights, which are all 2.0
    newest.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(damage)])
    found = checkpoints.load_latest()
    assert found is not None
    assert found.path.name == "step_00000001.pt"
    assert "step_00000002.pt" in caplog.text


def test_the_newest_and_the_best_are_kept_and_linked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(state_of(float(step)), step, best_step=2 if step >= 2 else None)
        checkpoints.finish()
    assert [path.name for path in checkpoints.paths()] == [f"step_{step:08d}.pt" for step in (5, 4, 2)]
    assert os.readlink(tmp_path / "latest.pt") == "step_00000005.pt"
    assert os.readlink(tmp_path / "best.pt") == "step_00000002.pt"


def test_first_is_called_before_the_checkpoint_is_written(tmp_path: Path) -> None:
    seen: list[bool] = []
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1, first=lambda: seen.append((tmp_path / "step_00000001.pt").exists()))
    checkpoints.finish()
    assert seen == [False]
    assert (tmp_path / "step_00000001.pt").exists()


def test_links_missing_after_a_kill_are_set_by_the_next_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        state = state_of()
        state["progress"]["best_step"] = step
        checkpoints.save(state, step, best_step=step)
        checkpoints.finish()
        if step == 1:  # restored below: the state after a kill between the second rename and its links
            kept = (tmp_path / "step_00000001.pt").read_bytes()
    (tmp_path / "step_00000001.pt").write_bytes(kept)
    for link in ("latest.pt", "best.pt"):
        (tmp_path / link).unlink()
        (tmp_path / link).symlink_to("step_00000001.pt")
    find_checkpoint("auto", Checkpoints(tmp_path, keep=1))
    assert os.readlink(tmp_path / "latest.pt") == os.readlink(tmp_path / "best.pt") == "step_00000002.pt"


def test_a_damaged_checkpoint_does_not_count_toward_keep(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 60)
    checkpoints.finish()
    (tmp_path / "step_00000100.pt").write_bytes(b"half of it")
    found = checkpoints.load_latest()
    assert found is not None
    assert found.path.name == "step_00000060.pt"
    checkpoints.save(state_of(), 80)
    checkpoints.finish()
    assert [path.name for path in checkpoints.paths()] == ["step_00000100.pt", "step_00000080.pt"]


def test_without_a_best_step_there_is_no_best_link(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state_of(), 1)
    checkpoints.finish()
    assert not (tmp_path / "best.pt").exists()


def test_a_full_disk_is_logged_as_a_warning_and_keeps_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1)
    checkpoints.finish()
    before = (tmp_path / "step_00000001.pt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    checkpoints.save(state_of(2.0), 2)
    checkpoints.finish()
    assert checkpoints.failed_saves == 1
    assert [path.name for path in checkpoints.paths()] == ["step_00000001.pt"]
    assert (tmp_path / "step_00000001.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_two_threads_can_save_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 may save the last completed step as a survivor while its earlier save of this step is not on the disk yet."""
    both, original = threading.Barrier(2), os.fsync

    def slow(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            both.wait(20)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1)
    checkpoints.save_as_survivor(state_of(), 1, 0)
    checkpoints.finish()
    assert checkpoints.failed_saves == 0
    assert checkpoints.load_latest() is not None


def test_a_file_system_without_links_and_without_fsync_of_folders_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def fsync_of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(os, "fsync", fsync_of_files)
    monkeypatch.setattr(os, "symlink", no_links)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(state_of(), step, best_step=1)
        checkpoints.finish()
    assert checkpoints.failed_saves == 0
    assert [path.name for path in checkpoints.paths()] == ["step_00000003.pt", "step_00000001.pt"]
    (message,) = {record.getMessage() for record in caplog.records}
    assert "cannot link" in message


def test_a_kill_during_a_write_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    """A kill leaves a temporary file, which is not read as a checkpoint."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1)
    checkpoints.finish()
    (tmp_path / "step_00000002.pt.tmp").write_bytes(b"half of it")
    found = checkpoints.load_latest()
    assert found is not None
    assert found.path.name == "step_00000001.pt"
