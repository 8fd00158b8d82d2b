"""The events of a rank."""

import logging
import shutil
from pathlib import Path

import pytest

from ddp_cifar.run.events import EventLog, read_events, recording_crashes


def test_an_error_blames_its_rank_unless_it_names_others_or_says_that_none_is_known(tmp_path: Path) -> None:
    log = logging.Logger("test")
    log.addHandler(EventLog(tmp_path, rank=3))
    log.error("a")
    log.error("b", extra={"ranks": [1, 2], "is_cause": True})
    log.error("c", extra={"ranks": []})
    log.error("d", extra={"ranks": None, "is_cause": False})
    events = read_events(tmp_path)
    assert [(event.message, event.ranks, event.is_cause) for event in events] == [
        ("a", [3], True),
        ("b", [1, 2], True),
        ("c", [], True),
        ("d", [3], False),
    ]


def test_a_folder_that_disappears_does_not_hide_the_error(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()

    def fail() -> None:
        shutil.rmtree(folder)
        folder.touch()  # so that the file's path is no longer valid
        raise RuntimeError("the reason")

    with pytest.raises(RuntimeError, match="the reason"), recording_crashes(folder / "rank_0.crash"):
        fail()
