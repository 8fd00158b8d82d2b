"""Folders that are created once."""

from pathlib import Path

import pytest

from ddp_cifar.data.cache import make_once


def test_the_temporary_folder_of_another_host_is_not_deleted(tmp_path: Path) -> None:
    """On some cluster file systems, a lock is local to a host."""
    (tmp_path / ".made.tmp-another-host-17").mkdir()
    make_once(tmp_path / "made", lambda temporary: None)
    assert (tmp_path / ".made.tmp-another-host-17").is_dir()


def test_without_locks_two_processes_that_create_a_folder_end_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without flock, the second process uses the folder of the first."""
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = tmp_path / "made"

    def make(temporary: Path) -> None:
        (temporary / "content").write_text("ours")
        folder.mkdir()
        (folder / "content").write_text("theirs")

    make_once(folder, make)
    assert (folder / "content").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
