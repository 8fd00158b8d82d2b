"""Profiles: the recorded steps for any start and end of a run."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mistakes import TINY
from torch.profiler import record_function

from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.training.profiling import NullProfiler, Profiler


def test_a_profile_of_some_steps(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("train.global_batch_size=4", "train.micro_batch_size=2", "train.max_steps=4", "device=cpu")
    outcome = train(*TINY, *arguments, "train.profile_steps=[2,3]", f"run_dir={tmp_path}/run")
    assert outcome.status == 0, outcome.err
    assert "slowest kernels of the profile" in outcome.err + outcome.out
    (path,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "ProfilerStep#0" for event in events) == 0
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 2


def record(profiler: NullProfiler, steps: Iterable[int]) -> None:
    with profiler:
        for step in steps:
            with record_function(f"my step {step}"):
                torch.ones(2, 2) @ torch.ones(2, 2)
            profiler.step()
        with record_function("the last evaluation"):
            torch.ones(2, 2) @ torch.ones(2, 2)


def fail_after(steps: int) -> Iterator[int]:
    yield from range(1, steps + 1)
    raise ValueError("out of luck")


def recorded(path: Path) -> list[int]:
    """Return the numbers of the recorded steps."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {str(event.get("name")) for event in events}
    assert not any(name.startswith("ProfilerStep") for name in names)
    return sorted(int(name.removeprefix("my step ")) for name in names if name.startswith("my step "))


@pytest.mark.parametrize(
    ("steps", "run", "expected"),
    [
        ([2, 3], range(1, 6), [2, 3]),
        ([1, 2], range(1, 6), [1, 2]),
        ([5, 5], range(1, 6), [5]),
        ([4, 6], range(3, 9), [4, 5, 6]),  # resumed
        ([4, 6], range(6, 9), [6]),  # resumed in the middle
        ([4, 6], range(1, 6), [4, 5]),  # ended in the middle
    ],
)
@pytest.mark.filterwarnings("error")
def test_exactly_the_given_steps_of_the_run_are_recorded(
    steps: list[int], run: range, expected: list[int], alone: World, tmp_path: Path
) -> None:
    profiler = Profiler(tmp_path, steps, alone, completed=run.start - 1)
    record(profiler, run)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0.pt.trace.json.gz"]
    assert recorded(profiler.path) == expected


@pytest.mark.parametrize("run", [range(7, 9), range(1, 4), range(1, 3)], ids=["after", "just before", "before"])
def test_a_run_without_these_steps_writes_nothing(run: range, alone: World, tmp_path: Path) -> None:
    record(Profiler(tmp_path, [4, 6], alone, completed=run.start - 1), run)
    assert not list(tmp_path.iterdir())


def test_the_profile_is_written_right_after_its_last_step_and_also_if_the_run_fails(
    alone: World, tmp_path: Path
) -> None:
    with Profiler(tmp_path, [1, 1], alone) as profiler:
        profiler.step()
        assert profiler.path.exists()
    failing = Profiler(tmp_path / "failed", [1, 9], alone)
    with pytest.raises(ValueError, match="out of luck"):
        record(failing, fail_after(3))
    assert recorded(failing.path) == [1, 2, 3]


def test_a_profile_that_cannot_be_written_is_logged_as_a_warning(
    alone: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    (tmp_path / "profile").write_text("not a folder")
    record(Profiler(tmp_path / "profile", [1, 1], alone), range(1, 3))
    assert any("cannot write the profile" in record.getMessage() for record in caplog.records)


def test_the_null_profiler_records_nothing() -> None:
    record(NullProfiler(), range(1, 3))
