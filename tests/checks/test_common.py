"""The preflight's checks of everything that ranks share."""

from pathlib import Path
from typing import Any

import pytest
from preflight_rank import here

from ddp_cifar.checks.common import check_arrival, check_versions, missing_ranks, odd_one_out
from ddp_cifar.checks.machine import (
    digest_of,
)
from ddp_cifar.checks.rank_context import Problem


@pytest.mark.parametrize(
    ("hosts", "lost", "options", "expected"),
    [
        ("aabb", [], {}, []),
        ("aabb", [3], {}, ["rank 3 on b"]),
        ("aab", [1], {}, ["rank 1 on a"]),
        ("abb", [2], {}, ["rank 2 on b"]),
        # no rank of a node has arrived
        ("aabb", [2, 3], {}, ["ranks 2, 3 on 1 node from which no rank arrived"]),
        ("aabbbc", [2, 3, 4], {}, ["ranks 2, 3, 4 on 1 node from which no rank arrived"]),
        ("aabbbc", [2, 3, 4], {"hosts": ["a", "b", "c"]}, ["ranks 2, 3, 4 on b"]),
        ("aabbbc", [2, 3, 4, 5], {}, ["ranks 2, 3, 4, 5 on 2 nodes from which no rank arrived"]),
        ("aabbbc", [2, 3, 4, 5], {"hosts": ["a", "b", "c"]}, ["ranks 2, 3, 4, 5 on b and c"]),
        ("aabc", [1, 2], {"hosts": ["a", "b", "c"]}, ["rank 1 on a", "rank 2 on b"]),
        # a node has started no ranks
        ("aa", [], {"nodes": 3}, ["2 of 3 nodes (found: a)"]),
        ("aab", [], {"nodes": 3, "hosts": ["a", "b", "c"]}, ["node c"]),
        ("aab", [2], {"nodes": 3, "hosts": ["a", "b", "c"]}, ["rank 2 on b or c", "1 of 3 nodes (found: a)"]),
    ],
)
def test_missing_ranks_are_named_by_elimination(
    hosts: str, lost: list[int], options: dict[str, Any], expected: list[str]
) -> None:
    assert missing_ranks(here(list(hosts), lost=lost, **options)) == expected


def test_host_names_may_have_a_domain_or_differ_from_those_of_the_scheduler() -> None:
    assert missing_ranks(here(["a.site", "a.site"], nodes=2, hosts=["a", "b"])) == ["node b"]
    other_names = here(["ip-10-0-0-1", "ip-10-0-0-1"], nodes=2, hosts=["gpu-1", "gpu-2"])
    assert missing_ranks(other_names) == ["1 of 2 nodes (found: ip-10-0-0-1)"], "the names do not match"
    assert missing_ranks(here(["10.0.0.1", "10.0.0.1"], nodes=2, hosts=["10.0.0.1", "10.0.0.2"])) == ["node 10.0.0.2"]


def test_nodes_may_have_different_numbers_of_ranks() -> None:
    assert check_arrival(here(["a.site", "a.site", "b.site", "b.site"], hosts=["a", "b"])) == "4 ranks on 2 nodes"
    assert check_arrival(here(["a", "a", "b"])) == "3 ranks on 2 nodes (2 on a, 1 on b)"
    with pytest.raises(Problem, match="missing: rank 3 on b"):
        check_arrival(here(["a", "a", "b", "b"], lost=[3]))
    with pytest.raises(Problem, match="ranks on c, expected only a,b") as unexpected:
        check_arrival(here(["a", "a", "b", "c"], hosts=["a", "b"]))
    assert unexpected.value.is_warning


def test_the_odd_one_out_is_the_one_that_differs_from_most() -> None:
    values = {0: "new", 1: "old", 2: "old"}
    assert odd_one_out(here(["a", "b", "c"]), values) == ("new", "old")
    assert odd_one_out(here(["a", "b", "c"], rank=1), values) is None
    assert odd_one_out(here(["a", "b"], rank=1), {0: "x", 1: "y"}) == ("y", "x"), (
        "with two nodes, rank 0's value counts"
    )
    found = here(["a", "b", "c"], rank=2)
    for facts, torch_version in zip(found.everyone, ("2.14", "2.14", "2.11"), strict=True):
        facts["versions"] = {"python": "3.12", "torch": torch_version}
    with pytest.raises(Problem, match=r"^c has torch 2\.11, others 2\.14$"):
        check_versions(found)
    found.facts["versions"] = {"python": "3.12", "torch": "2.14"}
    found.everyone[0]["versions"]["commit"] = "abc"
    assert check_versions(found) == "python 3.12, torch 2.14", "a copy has no commit"
    hosts = ["a", "a", "a", "b", "c"]
    values = {rank: "old" if host == "a" else "new" for rank, host in enumerate(hosts)}
    assert odd_one_out(here(hosts), values) == ("old", "new"), "the majority of nodes counts, not of ranks"
    assert odd_one_out(here(hosts, rank=3), values) is None


def test_equal_files_have_equal_digests_in_any_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "inside").mkdir(parents=True)
        for name in ("a", "b", "inside/c"):
            (tmp_path / folder / name).write_bytes(name.encode() * 50)

    def digest(folder: str) -> tuple[str, int, int]:
        return digest_of([path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file()])

    assert digest("one") == digest("two")
    (tmp_path / "two" / "inside" / "c").write_bytes(b"x" * 400)
    assert digest("one")[0] != digest("two")[0]
    assert digest("one")[1:] == (3, 500)
