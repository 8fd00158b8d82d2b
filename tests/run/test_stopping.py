"""Requests to stop and to save."""

import time
from pathlib import Path

import pytest
from helpers import config_of
from launched import wait_until

from ddp_cifar.run.stopping import Requests


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
