"""TensorBoard's event files and metrics.jsonl."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddp_cifar.tracking import build_tracker


def wait_for_the_next_second() -> None:
    """Wait, since TensorBoard sorts event files by name: by second, and then by a number that is sorted as text."""
    time.sleep(1.01 - time.time() % 1)


def test_rows_and_events_have_the_same_values(tmp_path: Path) -> None:
    tracker = build_tracker(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0)
    tracker.log({"train/loss": 1.5, "train/lr": 0.25}, step=10)
    tracker.show(lambda board: board.add_text("config", "seed: 0", 0))
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "train/loss": 1.5, "train/lr": 0.25}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5)]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_resume_drops_rows_and_events_logged_after_the_checkpoint(tmp_path: Path) -> None:
    places = (tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    first = build_tracker(*places, step=0)
    for step in (1, 2, 3, 4):
        first.log({"train/loss": float(step)}, step)
    first.close()
    with open(places[0], "a") as file:
        file.write('{"step": 5, "train/lo')  # an incomplete row, as left by a crash
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
def test_pictures_at_the_step_of_the_checkpoint_are_kept_unless_the_step_is_evaluated_again(
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
