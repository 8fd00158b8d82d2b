"""Slow ranks and slow exchanges, found from the times that ranks exchange. test_survival.py has real ranks."""

import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from helpers import config_of, random_dataset

from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.tracking import rank_times
from ddp_cifar.tracking.base import NullTracker, Picture
from ddp_cifar.tracking.dashboard import Dashboard
from ddp_cifar.tracking.figures import rank_times_figure
from ddp_cifar.tracking.rank_times import RankTimes
from ddp_cifar.training.rank_exchange import RankExchange
from ddp_cifar.training.rank_status import RankStatus
from ddp_cifar.training.stragglers import MIN_PAST_ROWS, Stragglers

EVERY = 10
"""Steps per row."""

RANKS = 4
Row = list[RankStatus]


def usual(number: int) -> Row:
    """Row `number`, from 1, of healthy ranks."""
    times = {"data_us": 3000, "forward_us": 10_000, "optimizer_us": 2000}
    return [
        RankStatus(row_step=EVERY * number, backward_us=21_000, least_backward_us=20_000, **times) for _ in range(RANKS)
    ]


def slower(row: Row, rank: int, phase: str, extra_us: int) -> Row:
    """The row, with a rank for which the others wait."""
    late = row[rank]._replace(**{phase: getattr(row[rank], phase) + extra_us})
    waiting = [status._replace(backward_us=status.backward_us + extra_us) for status in row]
    return [*waiting[:rank], late, *waiting[rank + 1 :]]


def congested(row: Row, extra_us: int = 60_000) -> Row:
    """The row, with a slow link."""
    return [
        s._replace(backward_us=s.backward_us + extra_us, least_backward_us=s.least_backward_us + extra_us) for s in row
    ]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lines.append)
    monkeypatch.setattr("socket.gethostname", lambda: "node3")
    return lines


def watch(rows: Iterable[Row], rank: int = 0, factor: float | None = 2.0) -> None:
    """Feed the rows of a run to one rank."""
    stragglers = Stragglers(rank, RANKS, factor)
    for row in rows:
        stragglers.add(row)
    stragglers.finish()


def run_of(count: int, slow: Iterable[int], change: Callable[[Row], Row]) -> list[Row]:
    """`count` rows, of which those with the numbers `slow` (from 1) are changed."""
    return [change(usual(number)) if number in slow else usual(number) for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        (
            "data_us",
            "its data loading takes 45.0 ms per step (median of the other ranks 3.0 ms; this rank before 3.0 ms)",
        ),
        ("forward_us", "its forward pass takes 52.0 ms per step (median of the other ranks 10.0 ms; this rank before"),
        (
            "optimizer_us",
            "its update takes 44.0 ms per step (median of the other ranks 2.0 ms; this rank before 2.0 ms)",
        ),
    ],
)
def test_the_slow_rank_says_what_is_slow_and_what_it_cost(warnings: list[str], phase: str, text: str) -> None:
    rows = run_of(12, range(6, 10), lambda row: slower(row, 2, phase, 42_000))
    watch(rows, rank=2)
    begin, end = warnings
    assert begin.startswith(f"this rank, on node3, is slow since step 50 and delays all ranks: {text}")
    assert end == "this rank is no longer slow: from step 50 to 90 it delayed all ranks by about 1.7 s"
    for rank in (0, 1, 3):
        watch(rows, rank)
    assert len(warnings) == 2, "only the slow rank says so"


def test_a_rank_that_is_slow_from_the_start_has_no_past(warnings: list[str]) -> None:
    watch(run_of(5, range(1, 9), lambda row: slower(row, 1, "data_us", 42_000)), rank=1)
    begin, end = warnings
    assert begin.endswith(
        "since step 10 and delays all ranks: its data loading takes 45.0 ms per step (median of the other ranks 3.0 ms)"
    )
    assert end == "the run ends while this rank is slow: from step 10 to 50 it delayed all ranks by about 1.7 s"


def test_a_rank_that_is_slow_again_is_reported_again(warnings: list[str]) -> None:
    slow = [5, 6, 8, 9, *range(14, 17)]  # one fast row is no end
    watch(run_of(20, slow, lambda row: slower(row, 0, "forward_us", 100_000)))
    assert [line.split(":")[0][:30] for line in warnings] == [
        "this rank, on node3, is slow s",
        "this rank is no longer slow",
        "this rank, on node3, is slow s",
        "this rank is no longer slow",
    ]
    assert warnings[1].endswith("from step 40 to 90 it delayed all ranks by about 4.0 s")
    assert warnings[3].endswith("from step 130 to 160 it delayed all ranks by about 3.0 s")


def test_a_slow_link_is_reported_by_rank_0(warnings: list[str]) -> None:
    rows = run_of(12, range(6, 9), congested)
    watch(rows, rank=1)
    assert warnings == []
    watch(rows)
    assert warnings == [
        "the exchange between ranks (or the backward pass) is slow on all ranks since step 50: the backward pass takes at "
        "least 80.0 ms per step on every rank (before 20.0 ms), while the other work of each rank takes as long as before",
        "the exchange between ranks is no longer slow: from step 50 to 80 it delayed all ranks by about 1.8 s",
    ]
    warnings.clear()
    watch(rows[:8])
    assert warnings[1:] == [
        "the run ends while the exchange between ranks is slow: from step 50 to 80 it delayed all ranks by about 1.8 s"
    ]


def test_a_rank_that_becomes_slow_does_not_end_a_slow_link(warnings: list[str]) -> None:
    rows = run_of(16, range(6, 13), congested)
    rows[7:10] = [slower(row, 3, "data_us", 42_000) for row in rows[7:10]]
    watch(rows)
    assert len(warnings) == 2
    assert "from step 50 to 120" in warnings[1]


def one_row(row: Row) -> Row:
    return congested(slower(row, 0, "data_us", 90_000))


def waits(row: Row) -> Row:
    """Another rank is late in each step, or rank 0 is late between steps: each waits in most steps, none in all."""
    return [status._replace(backward_us=status.backward_us + 60_000) for status in row]


def slow_device(row: Row) -> Row:
    """A device with a third of its speed: its backward pass, too. The others wait."""
    late = row[1]._replace(forward_us=30_000)
    return congested([row[0], late, *row[2:]], 40_000)


def all_slower(row: Row) -> Row:
    """All passes take three times as long, for example with larger images."""
    return congested([status._replace(forward_us=3 * status.forward_us) for status in row], 40_000)


def a_little_slower(row: Row) -> Row:
    return [status._replace(data_us=status.data_us + 900, forward_us=status.forward_us * 3 // 2) for status in row]


@pytest.mark.parametrize(
    ("change", "slow"),
    [
        (one_row, [1]),
        (one_row, [5]),
        (one_row, [5, 7, 9]),
        (congested, [1, 2, 3, 4]),
        (congested, range(2, 20)),  # always
        (lambda row: congested(row, 4000), range(5, 20)),
        (waits, range(5, 20)),
        (slow_device, range(5, 20)),
        (all_slower, range(5, 20)),
        (a_little_slower, range(5, 20)),
        (lambda row: slower(row, 0, "data_us", 14_000), range(5, 20)),  # less than twice the others' work
    ],
)
def test_healthy_ranks_are_not_named(warnings: list[str], change: Callable[[Row], Row], slow: Iterable[int]) -> None:
    watch(run_of(20, slow, change))
    assert warnings == []


def test_noise_is_not_named(warnings: list[str]) -> None:
    draw = random.Random(0)

    def noisy(status: RankStatus) -> RankStatus:
        keys = ("data_us", "forward_us", "optimizer_us", "backward_us", "least_backward_us")
        return status._replace(**{key: round(getattr(status, key) * draw.uniform(0.7, 1.4)) for key in keys})

    watch([[noisy(status) for status in usual(number)] for number in range(1, 300)])
    assert warnings == []


def test_small_times_are_not_named(warnings: list[str]) -> None:
    rows = [
        [RankStatus(row_step=number, data_us=900 if rank == 0 else 100) for rank in range(RANKS)]
        for number in range(1, 20)
    ]
    watch(rows)
    assert warnings == []


def test_null_turns_warnings_off(warnings: list[str]) -> None:
    watch(run_of(12, range(6, 10), lambda row: slower(congested(row), 0, "data_us", 42_000)), factor=None)
    assert warnings == []


def test_the_past_is_learned_before_the_link_is_judged(warnings: list[str]) -> None:
    """The first row is ignored, and the next ones are the past, in which one slow row does not matter."""
    first = 1 + MIN_PAST_ROWS + 1
    for slow in (range(first, 99), range(first - 1, 99)):
        warnings.clear()
        watch(run_of(first + 2, slow, congested))
        assert f"since step {EVERY * (first - 1)}" in warnings[0]


def test_a_row_counts_once_and_only_if_all_ranks_have_it(alone: World) -> None:
    ranks = RankExchange(alone, config_of())
    for steps in ((0, 0), (10, 20), (20, 20), (20, 20), (20, 30), (30, 30), (20, 20)):
        ranks._observe([RankStatus(row_step=step, data_us=step, peak_memory_mb=7 * step) for step in steps])
    assert list(ranks.times.steps) == [20, 30]
    assert ranks.times.panels()[0].tolist() == [[pytest.approx(0.02), pytest.approx(0.03)]] * 2
    assert ranks.scalars()["run/max_peak_memory_mb"] == 210


# -- the picture


def times_of(num_ranks: int, num_rows: int) -> RankTimes:
    times = RankTimes()
    for number in range(1, num_rows + 1):
        times.add(number, [(3000 + rank, 10_000, 2000, 20_000) for rank in range(num_ranks)])
    return times


@pytest.mark.parametrize(
    ("num_ranks", "num_rows", "shape"), [(2, 1, (2, 1)), (5, 7, (5, 7)), (128, 400, (128, 300)), (1001, 9, (126, 9))]
)
def test_the_picture_has_a_line_per_rank_and_a_column_per_row(
    num_ranks: int, num_rows: int, shape: tuple[int, int]
) -> None:
    times = times_of(num_ranks, num_rows)
    figure = rank_times_figure(times, [f"node{rank // 2}" for rank in range(num_ranks)])
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array().shape for axes in panels] == [shape] * 4  # type: ignore[union-attr]
    assert panels[0].get_title() == "data"
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert ("rank 1 (node0)" in labels) == (num_ranks <= 32)
    assert panels[-1].get_xticklabels()[0].get_text() == str(max(1, num_rows - rank_times.MAX_COLUMNS + 1))


def test_a_slow_rank_among_thousands_is_in_the_picture() -> None:
    times = RankTimes()
    row = np.full((4000, 4), 3000)
    row[1234, 0] = 99_000
    times.add(1, row.tolist())
    data = times.panels()[0]
    assert np.argwhere(data > 50).tolist() == [[1234 // times.ranks_per_band, 0]]


class Shown(NullTracker):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def show_image(self, tag: str, draw: Callable[[], Picture | None], step: int) -> None:
        assert (tag, draw() is not None) == ("time/ranks", True)
        self.steps.append(step)


def test_the_picture_is_shown_when_pictures_are_due() -> None:
    def shown(times: RankTimes, *arguments: str) -> list[int]:
        tracker = Shown()
        dashboard = Dashboard(tracker, config_of(*arguments), random_dataset(24))
        for epoch in range(1, 8):
            dashboard.show_ranks(times, epoch, epoch, is_last=epoch == 7)
        return tracker.steps

    assert shown(times_of(2, 3), "tracking.pictures_every=3") == [3, 6, 7]
    assert shown(times_of(2, 3), "tracking.pictures_every=null") == []
    assert shown(times_of(1, 3), "tracking.pictures_every=3") == []
    assert shown(RankTimes(), "tracking.pictures_every=3") == [], "ranks other than 0 keep no times"
