"""The starts of a run."""

from pathlib import Path

import pytest

from ddp_cifar.errors import FaultyReplica, NoRestart, RunError
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


def test_a_faulty_replica_names_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_NAME", "node7")
    for error in (RunError("the weights of rank 1 differ"), FaultyReplica("the weights of rank 1 differ")):
        with pytest.raises(RunError), RunDir(str(tmp_path)).recording_failure():
            raise error
    assert (tmp_path / "bad_nodes").read_text() == "node7 has a faulty rank: the weights of rank 1 differ\n"
    assert RunDir(str(tmp_path)).read_status() == "failed: the weights of rank 1 differ"


def test_a_gpu_that_fails_names_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_NAME", "node7")
    for text in (
        "CUDA error: device-side assert triggered",
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel",
    ):
        with pytest.raises(RuntimeError), RunDir(str(tmp_path)).recording_failure():
            raise RuntimeError(text)
    found = "node7 has a GPU that failed: CUDA error: uncorrectable ECC error encountered\n"
    assert (tmp_path / "bad_nodes").read_text() == found


def start_and_end(run_dir: RunDir, step: int, reached: int, status: str) -> None:
    """A start from the checkpoint at `step` that ends with `status` after `reached` steps."""
    run_dir.check_crash_loop(step, run_dir.reached)
    run_dir.note_start(0.0, step, 2, last_seen=(0.0, run_dir.reached))
    run_dir.write_status(status)
    run_dir.reached = reached


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(str(tmp_path))
    run_dir.reached = 0
    return run_dir


def test_three_crashes_without_a_new_step_end_the_job(run_dir: RunDir) -> None:
    start_and_end(run_dir, 0, 9, "running")
    for _ in range(3):
        start_and_end(run_dir, 9, 9, "running")
    with pytest.raises(
        NoRestart, match=r"not starting again: 3 starts crashed at step 9, without a new step; see .*logs, fix"
    ):
        run_dir.check_crash_loop(9, 9)
    assert run_dir.read_status().startswith("failed: crash loop: not starting again")
    start_and_end(run_dir, 9, 9, "running")  # the user tries once more
    run_dir.check_crash_loop(9, 9)


def test_crashes_with_new_steps_are_no_loop(run_dir: RunDir) -> None:
    """Also if the steps were lost, because all ranks died at once, and after stops by request."""
    for step in (0, 5, 6, 7, 8):
        start_and_end(run_dir, step, step, "running")
    for _ in range(5):
        start_and_end(run_dir, 10, 14, "running")
    for _ in range(5):
        start_and_end(run_dir, 10, 10, "stopped: SIGTERM")
    run_dir.check_crash_loop(10, 10)


def test_the_same_error_twice_at_the_same_step_ends_the_job(run_dir: RunDir) -> None:
    start_and_end(run_dir, 0, 9, "failed: no such file a.png")
    start_and_end(run_dir, 9, 9, "failed: another error")
    start_and_end(run_dir, 9, 9, "failed: no such file a.png")
    start_and_end(run_dir, 9, 9, "failed: no such file a.png")
    with pytest.raises(NoRestart, match=r"not starting again: failed: no such file a.png \(twice\) at step 9"):
        run_dir.check_crash_loop(9, 9)


def test_an_error_that_repeats_at_another_step_is_no_loop(run_dir: RunDir) -> None:
    start_and_end(run_dir, 0, 9, "failed: no such file a.png")
    start_and_end(run_dir, 9, 12, "failed: no such file a.png")
    run_dir.check_crash_loop(12, 12)


def test_the_time_between_a_crash_and_the_next_start_is_downtime(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1500.0)
    run_dir.note_start(1000.0, 0, 2, last_seen=None)
    run_dir.write_status("running")
    assert run_dir.note_start(1490.0, 5, 2, last_seen=(1470.0, 5)).downtime_s == 30
    run_dir.write_status("stopped: SIGTERM")
    assert run_dir.note_start(1490.0, 5, 2, last_seen=(1400.0, 5)).downtime_s == 30
