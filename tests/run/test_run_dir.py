"""The starts of a run."""

from pathlib import Path

from ddp_cifar.run.run_dir import RunDir


def test_starts_and_lost_steps_are_counted(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    first = run_dir.note_start(1000.0, step=0, world_size=4, last_seen=None)
    assert (first.restarts, first.steps_lost, first.occupied_s) == (0, 0, 0.0)
    second = run_dir.note_start(1500.0, step=20, world_size=2, last_seen=(1100.0, 25))
    assert (second.restarts, second.steps_lost, second.occupied_s) == (1, 5, 100.0)
    with open(run_dir.starts, "a") as file:
        file.write('{"time": 16')  # an incomplete line, as left by a crash
    third = run_dir.note_start(2000.0, step=30, world_size=2, last_seen=(1700.0, 33))
    assert (third.restarts, third.steps_lost, third.occupied_s) == (2, 8, 300.0)
