"""Requests to stop, to save, and to record a profile."""

import errno
import time
from pathlib import Path

import pytest
from helpers import config_of
from launched import wait_until

from ddp_cifar.log import log
from ddp_cifar.run.stopping import ALL_RANKS, ProfileRequest, Requests, parse_profile


def test_stop_and_save_files_and_the_deadline_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp_cifar.run.stopping.LOOK_EVERY_S", 0.02)
    with Requests(tmp_path) as requests:
        time.sleep(0.1)
        assert (requests.reason, requests.take_save()) == ("", False)
        (tmp_path / "SAVE").touch()
        assert wait_until(lambda: not (tmp_path / "SAVE").exists(), 10)
        assert wait_until(requests.take_save, 10)
        assert not requests.take_save()
        (tmp_path / "STOP").touch()
        assert wait_until(lambda: requests.reason == "the file STOP", 10)
        assert (tmp_path / "STOP").exists(), "it remains until the run has stopped, in case the run is killed first"
        requests.stopped()
        assert not (tmp_path / "STOP").exists()
    with Requests(None, deadline=(time.time() + 0.2, "train.deadline")) as requests:
        assert requests.reason == ""
        assert wait_until(lambda: requests.reason == "train.deadline", 10)


def test_a_file_stop_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(Path, "unlink", read_only)
    Requests(tmp_path).stopped()
    assert not caplog.text
    (tmp_path / "STOP").touch()
    Requests(tmp_path).stopped()
    assert f"cannot remove {tmp_path / 'STOP'} (Read-only file system)" in caplog.text


def test_a_profile_is_requested_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("ddp_cifar.run.stopping.LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(log, "warning", warnings.append)
    file = tmp_path / "PROFILE"
    with Requests(tmp_path) as requests:
        assert requests.take_profile() == ProfileRequest(0)
        file.write_text("steps=10 rank=0\n")
        assert wait_until(lambda: not file.exists(), 10)
        file.touch()
        time.sleep(0.1)
        assert file.exists(), "a request waits until the one before it is taken"
        assert requests.take_profile() == ProfileRequest(10, 0)
        assert wait_until(lambda: not file.exists(), 10)
        assert wait_until(lambda: requests.take_profile() == ProfileRequest(5, ALL_RANKS), 10)
        for content in (b"ten steps", b"\xff"):
            file.write_bytes(content)
            assert wait_until(lambda: not file.exists(), 10)
        time.sleep(0.1)
        assert requests.take_profile() == ProfileRequest(0)
    expected, not_text = warnings
    assert expected == (
        "no profile is recorded: the file PROFILE is invalid: "
        """expected "steps=10 rank=0" with 1 to 100 steps, found 'ten steps'"""
    )
    assert "PROFILE is invalid: it is not UTF-8 text" in not_text


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("", (5, ALL_RANKS)),
        ("\n", (5, ALL_RANKS)),
        ("rank=1", (5, 1)),
        ("rank=2\nsteps=100", (100, 2)),
        ("steps=1", (1, -1)),
    ],
)
def test_the_content_of_the_file_profile(text: str, request_: tuple[int, int]) -> None:
    assert parse_profile(text) == request_


@pytest.mark.parametrize(
    "text",
    ["10", "steps", "steps=", "steps=0", "steps=101", "rank=-1", "rank=x", "step=3", "steps = 3", "rank=" + "9" * 20],
)
def test_other_content_of_the_file_profile_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_profile(text)


def test_a_signal_received_before_this_process_started_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_CIFAR_SIGNALS", str(tmp_path / "signals"))
    with Requests() as requests:
        assert requests.reason == ""
    (tmp_path / "signals").write_text("USR1\nTERM\n")
    with Requests() as requests:
        assert requests.reason == "SIGUSR1"


def test_the_earlier_of_deadline_and_max_hours_counts() -> None:
    from ddp_cifar.train import find_deadline

    assert find_deadline(config_of().train, 1000.0) is None
    assert find_deadline(config_of("train.max_hours=0.5").train, 1000.0) == (2800.0, "train.max_hours")
    assert find_deadline(config_of("train.max_hours=0.5", "train.deadline=2000").train, 1000.0) == (
        2000.0,
        "train.deadline",
    )
