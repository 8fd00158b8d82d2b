"""metrics.jsonl and TensorBoard's event files."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddp_cifar.log import log
from ddp_cifar.tracking import JsonLinesTracker, build_tracker, last_value


def wait_for_the_next_second() -> None:
    """TensorBoard reads event files in the order of their names: by the second, and then by a number that sorts as text."""
    time.sleep(1.01 - time.time() % 1)


def test_rows_and_events_hold_the_same(tmp_path: Path) -> None:
    tracker = build_tracker(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    tracker.log({"train/loss": 1.5, "train/lr": 0.25}, step=10)
    tracker.show(lambda board: board.add_text("config", "seed: 0", 0))
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "train/loss": 1.5, "train/lr": 0.25}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5)]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_going_on_drops_what_was_logged_past_the_checkpoint(tmp_path: Path) -> None:
    places = (tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    first = build_tracker(*places, step=0)
    for step in (1, 2, 3, 4):
        first.log({"train/loss": float(step)}, step)
    first.close()
    with open(places[0], "a") as file:
        file.write('{"step": 5, "train/lo')  # what a crash leaves
    wait_for_the_next_second()
    second = build_tracker(*places, step=2)
    for step in (3, 4):
        second.log({"train/loss": -float(step)}, step)
    second.close()
    rows = [json.loads(line) for line in places[0].read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, -3.0), (4, -4.0)]
    events = EventAccumulator(str(places[1])).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, -3.0),
        (4, -4.0),
    ]


@pytest.mark.parametrize("unfinished", ["", '{"step": 2, "train/ep', '{"step": 2, "train/epoch": 1}\n'])
def test_what_was_drawn_at_the_checkpoints_step_stays_unless_the_step_is_evaluated_again(
    unfinished: str, tmp_path: Path
) -> None:
    places = (tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    first = build_tracker(*places, step=0)
    first.log({"train/loss": 2.0}, 2)
    first.show(lambda board: board.add_image("test/wrong", np.zeros((4, 4, 3), np.uint8), 2, dataformats="HWC"))
    first.close()
    with open(places[0], "a") as file:
        file.write(unfinished)
    wait_for_the_next_second()
    second = build_tracker(*places, step=2)
    second.log({"train/loss": 1.0}, 4)
    second.close()
    events = EventAccumulator(str(places[1])).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    pictures = events.Images("test/wrong") if "test/wrong" in events.Tags()["images"] else []
    assert [event.step for event in pictures] == ([] if unfinished else [2])


def test_a_value_of_the_last_row_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = build_tracker(path, tmp_path / "tensorboard", step=0)
    assert last_value(path, "run/productive_s") == 0
    tracker.log({"run/productive_s": 2.5}, 1)
    tracker.log({"fingerprint": "00ff"}, 2)
    tracker.close()
    assert last_value(path, "run/productive_s") == 2.5


def test_what_is_synced_outlives_a_kill(tmp_path: Path) -> None:
    """Rows before a checkpoint are not computed again, so both files must have them once it is there."""
    script = f"""if True:
        import os, pathlib
        from ddp_cifar.tracking import build_tracker
        folder = pathlib.Path({str(tmp_path)!r})
        tracker = build_tracker(folder / "metrics.jsonl", folder / "tensorboard", step=0)
        for step in range(1, 4):
            tracker.log({{"train/loss": float(step)}}, step)
        tracker.sync()
        os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_rows_that_cannot_be_written_are_written_once_they_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may not grow here for a while, as on a full disk: the system writes a part of a row, then refuses."""
    monkeypatch.setattr(log, "propagate", True)
    tracker = build_tracker(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    rows = tmp_path / "metrics.jsonl"
    tracker.log({"train/loss": 1.0}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rows.stat().st_size + 5, limits[1]))
    try:
        for step in (2, 3):
            tracker.log({"train/loss": float(step)}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rows.stat().st_size > 5
    # a record may be there twice: pytest also captures at a logger that an earlier test has left without propagation
    warnings = {id(record): record.getMessage() for record in caplog.records}
    assert [text.split(";")[0] for text in warnings.values() if text.startswith("JsonLinesTracker")] == [
        "JsonLinesTracker could not write (File too large)"
    ] * 2
    tracker.log({"train/loss": 4.0}, 4)
    tracker.close()
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_number_that_json_lacks_is_null(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    tracker.log({"train/loss": float("nan")}, 1)
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": None}
