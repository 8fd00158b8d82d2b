"""Profiles: the recorded steps for any start and end of a run."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from ranks import RankPool
from test_mistakes import TINY
from torch.profiler import record_function

from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.run.stopping import ProfileRequest
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


def record(
    profiler: NullProfiler, steps: Iterable[int], requests: Mapping[int, ProfileRequest] = MappingProxyType({})
) -> None:
    """Run `steps`. `requests` are the requests after a step."""
    with profiler:
        for step in steps:
            profiler.request(requests.get(step - 1, ProfileRequest()))
            with record_function(f"my step {step}"):
                torch.ones(2, 2) @ torch.ones(2, 2)
            profiler.step()
        with record_function("the last evaluation"):
            torch.ones(2, 2) @ torch.ones(2, 2)


def fail_after(steps: int) -> Iterator[int]:
    yield from range(1, steps + 1)
    raise ValueError("out of luck")


def profiles_in(folder: Path) -> dict[str, list[int]]:
    """Return the numbers of the recorded steps in each file."""
    return {path.name.removesuffix(".pt.trace.json.gz"): recorded(path) for path in folder.iterdir()}


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
    record(Profiler(tmp_path, alone, run.start - 1, steps), run)
    assert profiles_in(tmp_path) == {"rank_0": expected}


@pytest.mark.parametrize("run", [range(7, 9), range(1, 4), range(1, 3)], ids=["after", "just before", "before"])
def test_a_run_without_these_steps_writes_nothing(run: range, alone: World, tmp_path: Path) -> None:
    record(Profiler(tmp_path, alone, run.start - 1, [4, 6]), run)
    assert not list(tmp_path.iterdir())


def test_the_profile_is_written_right_after_its_last_step_and_also_if_the_run_fails(
    alone: World, tmp_path: Path
) -> None:
    with Profiler(tmp_path, alone, 0, [1, 1]) as profiler:
        profiler.step()
        assert list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="out of luck"):
        record(Profiler(tmp_path / "failed", alone, 0, [1, 9]), fail_after(3))
    assert profiles_in(tmp_path / "failed") == {"rank_0": [1, 2, 3]}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The messages that are logged, by level."""
    found: dict[str, list[str]] = {"info": [], "warning": []}
    for level, messages in found.items():
        monkeypatch.setattr(log, level, messages.append)
    return found


@pytest.mark.parametrize("problem", ["no folder", "a full disk"])
def test_a_profile_that_cannot_be_written_is_logged_as_a_warning(
    problem: str, alone: World, tmp_path: Path, lines: dict[str, list[str]]
) -> None:
    folder = tmp_path / "profile"
    if problem == "no folder":
        folder.write_text("not a folder")
    else:
        folder.mkdir()
        (folder / "rank_0.pt.trace.json.gz").symlink_to("/dev/full")
    record(Profiler(folder, alone, 0, [1, 1]), range(1, 3))
    (warning,) = lines["warning"]
    assert f"cannot write the profile to {folder}/rank_0.pt.trace.json.gz" in warning
    assert folder.is_file() or not list(folder.iterdir()), "no incomplete file is left"


def test_the_next_steps_are_recorded_on_request_one_profile_at_a_time(
    alone: World, tmp_path: Path, lines: dict[str, list[str]]
) -> None:
    profiler = Profiler(tmp_path, alone, 0, [9, 10])
    requests = {
        1: ProfileRequest(2),
        3: ProfileRequest(3),  # while steps 3 and 4 are recorded
        4: ProfileRequest(4),  # steps 6 to 9 would overlap
        5: ProfileRequest(1),
        8: ProfileRequest(1),  # while step 8 warms up for train.profile_steps
        10: ProfileRequest(3),  # the run ends before the last step
        11: ProfileRequest(1, rank=1),
    }
    record(profiler, range(1, 14), requests)
    assert profiles_in(tmp_path) == {
        "rank_0": [9, 10],
        "rank_0_step_3": [3, 4],
        "rank_0_step_7": [7],
        "rank_0_step_12": [12, 13],
    }
    ignored = "no profile is recorded for the file PROFILE: "
    assert lines["warning"] == [
        f"{ignored}steps 3 to 4 on all ranks are being recorded; request it again afterwards",
        f"{ignored}steps 9 to 10 on all ranks will be recorded; request it again afterwards",
        f"{ignored}steps 9 to 10 on all ranks are being recorded; request it again afterwards",
        f"{ignored}there is no rank 1",
    ]
    begun = [line for line in lines["info"] if line.startswith("recording")]
    assert begun[0] == f"recording a profile of steps 3 to 4 on all ranks in {tmp_path}"
    assert len(begun) == 4

    record(Profiler(tmp_path, alone, 1), range(2, 6), {1: ProfileRequest(1)})  # resumed from step 1
    assert profiles_in(tmp_path)["rank_0_step_3"] == [3, 4], "an earlier file is kept"
    assert profiles_in(tmp_path)["rank_0_step_3_2"] == [3]


def test_only_the_requested_rank_records(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(_record_on_rank_1, 2, tmp_path) == [1, 0], "all ranks know of it, and rank 0 warns"
    assert profiles_in(tmp_path) == {"rank_1_step_2": [2, 3]}


def _record_on_rank_1(world: World, folder: Path) -> int:
    """Return the number of warnings."""
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "warning", warnings.append)
        record(Profiler(folder, world), range(1, 5), {0: ProfileRequest(2, rank=1), 1: ProfileRequest(1, rank=0)})
    return len(warnings)


def test_the_null_profiler_records_nothing() -> None:
    record(NullProfiler(), range(1, 3), {0: ProfileRequest(1)})
