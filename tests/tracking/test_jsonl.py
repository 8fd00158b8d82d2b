"""metrics.jsonl."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddp_cifar.log import log
from ddp_cifar.tracking import build_tracker
from ddp_cifar.tracking.jsonl import JsonLinesTracker, last_value


def test_last_value_is_from_the_last_row_that_has_the_tag(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = build_tracker(path, tmp_path / "tensorboard", step=0)
    assert last_value(path, "run/productive_s") == 0
    tracker.log({"run/productive_s": 2.5}, 1)
    tracker.log({"fingerprint": "00ff"}, 2)
    tracker.close()
    assert last_value(path, "run/productive_s") == 2.5


def test_synced_rows_survive_a_kill(tmp_path: Path) -> None:
    """Rows before a checkpoint are not computed again, so both files must have them before the checkpoint exists."""
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


def test_rows_that_cannot_be_written_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file size limit acts as a full disk: the system writes a part of a row, then fails."""
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
    # a record may appear twice: pytest also captures at a logger that an earlier test has left without propagation
    warnings = {id(record): record.getMessage() for record in caplog.records}
    assert [text.split(";")[0] for text in warnings.values() if text.startswith("JsonLinesTracker")] == [
        "JsonLinesTracker cannot write (File too large)"
    ] * 2
    tracker.log({"train/loss": 4.0}, 4)
    tracker.close()
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_number_that_json_does_not_support_is_null(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    tracker.log({"train/loss": float("nan")}, 1)
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": None}
