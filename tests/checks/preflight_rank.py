"""A single rank in a preflight, for tests."""

import itertools
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from helpers import config_of

from ddp_cifar.checks.rank_context import RankContext


def here(host_of: list[str], rank: int = 0, lost: Sequence[int] = (), **options: Any) -> RankContext:
    """Return the context of rank `rank`. `host_of` has the host of each rank; all ranks except `lost` have arrived.

    Consecutive ranks on the same host form a node.
    """
    settings = Namespace(**{"nodes": None, "hosts": [], "patience": 1.0} | options)
    sizes = [len(list(ranks)) for _, ranks in itertools.groupby(host_of)]
    places = [(local_rank, size) for size in sizes for local_rank in range(size)]
    found = RankContext(config_of(), settings, rank, len(host_of), *places[rank], len(sizes), host=host_of[rank])
    found.arrived = [
        {"rank": i, "local_rank": local_rank, "local_world_size": size, "host": host_of[i], "versions": {}}
        for i, (local_rank, size) in enumerate(places)
        if i not in lost
    ]
    found.everyone = list(found.arrived)
    (found.facts,) = (facts for facts in found.arrived if facts["rank"] == rank)
    return found
