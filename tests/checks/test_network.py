"""The preflight's checks of the network."""

import itertools
import time
from argparse import Namespace

import pytest
from preflight_rank import here

from ddp_cifar.checks.machine import (
    addresses_by_interface,
)
from ddp_cifar.checks.network import check_clock, rounds
from ddp_cifar.checks.rank_context import Problem


@pytest.mark.parametrize("count", range(2, 9))
def test_each_pair_meets_once_and_no_rank_is_in_two_pairs_at_a_time(count: int) -> None:
    pairs = list(rounds(range(count)))
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))
    at_a_time = count // 2
    for start in range(0, len(pairs), at_a_time):
        busy = [rank for pair in pairs[start : start + at_a_time] for rank in pair]
        assert len(set(busy)) == len(busy)


@pytest.mark.parametrize(
    ("hosts", "seconds", "wrong"),
    [
        ("ab", [0.0, 1.9], []),
        ("ab", [0.0, 3.9], [0, 1]),
        ("abcd", [0.0, 0.5, -0.5, 30.0], [3]),
        ("abcd", [0.0, 0.5, 1.9, 0.2], []),
        ("abccc", [0.0, 0.5, 30.0, 30.0, 30.0], [2, 3, 4]),
    ],
)
def test_ranks_whose_clock_is_wrong_are_found(hosts: str, seconds: list[float], wrong: list[int]) -> None:
    now = time.time()
    found = []
    for rank in range(len(seconds)):
        one = here(list(hosts), rank)
        one.world = Namespace(all=lambda _: True, gather=lambda _: [[int((now + s) * 1e6)] for s in seconds])  # type: ignore[assignment]
        try:
            check_clock(one)
        except Problem:
            found.append(rank)
    assert found == wrong


def test_loopback_is_an_interface() -> None:
    assert addresses_by_interface()["lo"].startswith("127.")
