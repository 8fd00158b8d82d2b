"""Checks of the network between ranks: a process group, collectives, clocks, and the link between each pair of nodes."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_cifar.checks.rank_context import FAIL, SKIPPED, Outcome, Problem, RankContext, Skipped, first_of_node
from ddp_cifar.command import megabytes
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.distributed.world import World

CLOCK_SKEW_S = 2.0
UNREACHED = (
    "the ranks cannot reach each other's addresses; check for a firewall, a wrong interface (GLOO_SOCKET_IFNAME, "
    "NCCL_SOCKET_IFNAME), or a link that drops packets"
)
AT_FAULT = "the network or a GPU is faulty; on GPUs, set NCCL_DEBUG=INFO for details"
TELL = "the network between these nodes is faulty; report the nodes to your site"
SIZES = (1024, 64 * 1024, 2**20, 16 * 2**20)
"""Bytes of the timed all-reduces."""
CUDA_SIZES = (*SIZES, 256 * 2**20)
"""Bytes of the timed all-reduces on GPUs. Fast links need large messages for full speed."""
USUAL_NCCL_MB_PER_S = 1000.0
"""The lowest expected speed of an NCCL link between nodes. 10 Gbit/s Ethernet reaches it."""
SECONDS = 1.0
"""The approximate time for the all-reduces of each size. There are at least two, and the first one is not counted."""


class Link(NamedTuple):
    """The link between two ranks: the first ranks of two nodes, or two ranks of a single node."""

    one: int
    other: int
    latency_s: float
    """Half of the shortest round trip of 8 bytes."""
    bytes_per_s: float
    """The speed of the fastest of several messages of 1 MiB."""


def share(here: RankContext) -> None:
    """Check the network. All checks are skipped if a rank has not arrived."""
    checks = {"collectives": check_collectives, "clock": check_clock, "links": check_links}
    if len(here.everyone) < here.world_size:
        here.outcomes += [Outcome(name, SKIPPED) for name in ("group", *checks)]
        return
    with contextlib.ExitStack() as stack:
        here.check("group", lambda here: open_group(here, stack), UNREACHED)
        for name, check in checks.items():
            if any(outcome.verdict == FAIL and outcome.check in ("group", *checks) for outcome in here.outcomes):
                here.outcomes.append(Outcome(name, SKIPPED))  # the network is broken: further checks would time out
            else:
                here.check(name, check, AT_FAULT)
        stack.pop_all()  # a clean shutdown would wait for ranks that have exited


def open_group(here: RankContext, stack: contextlib.ExitStack) -> str:
    """Check that all ranks connect."""
    timeout = timedelta(seconds=here.options.patience)
    # `survives`: this process reports a blocked collective itself
    world = open_world(here.config.device, here.config.backend, here.store, timeout, survives=True)
    here.world = stack.enter_context(world)
    return f"{here.world.backend} on {here.world.device.type}"


def check_collectives(here: RankContext) -> str:
    """Check that all-reduce, broadcast and all-gather give correct results, and time the all-reduce."""
    world = here.world
    assert world is not None
    n, device = world.world_size, world.device
    numbers = torch.arange(10_000, device=device, dtype=torch.float32)
    summed = world.sum(numbers + world.rank)
    if not torch.equal(summed, n * numbers + n * (n - 1) / 2):
        raise Problem("an all-reduce gives a wrong sum", AT_FAULT)
    if n == 1:
        return "one rank"
    last = (numbers * 3 if world.rank == n - 1 else torch.zeros_like(numbers)).contiguous()
    dist.broadcast(last, src=n - 1)
    if not torch.equal(last, numbers * 3):
        raise Problem("a broadcast gives wrong values", AT_FAULT)
    gathered = [torch.empty_like(numbers) for _ in range(n)]
    dist.all_gather(gathered, numbers * world.rank)
    if not all(torch.equal(found, numbers * rank) for rank, found in enumerate(gathered)):
        raise Problem("an all-gather gives wrong values", AT_FAULT)
    sizes = CUDA_SIZES if device.type == "cuda" else SIZES
    here.measured["all_reduce"] = rows = [time_all_reduce(world, size) for size in sizes]
    speed, size = megabytes(rows[-1]["bus_bytes_per_s"]), sizes[-1] // 2**20
    return f"all-reduce: {rows[0]['median_s'] * 1e3:.2f} ms for 1 KiB, {speed}/s for {size} MiB"


def time_all_reduce(world: World, num_bytes: int) -> dict[str, float]:
    """Time an all-reduce of fp32 numbers. Return seconds, and the bus bandwidth at the median time.

    As in nccl-tests, the bus carries 2 (n - 1) / n bytes per byte of the message.
    """
    numbers = torch.ones(num_bytes // 4, device=world.device)
    times: list[float] = []
    while world.all(len(times) < 8 and (len(times) < 2 or sum(times) < SECONDS)):  # also makes all ranks start together
        began = time.perf_counter()
        world.sum(numbers)
        world.wait_for_device()
        times.append(time.perf_counter() - began)
    times = sorted(times[1:])
    median, n = statistics.median(times), world.world_size
    return {
        "bytes": num_bytes,
        "min_s": times[0],
        "median_s": median,
        "max_s": times[-1],
        "bus_bytes_per_s": 2 * (n - 1) / n * num_bytes / median,
    }


def check_clock(here: RankContext) -> str:
    """Check that clocks agree. Time limits and file times depend on them."""
    assert here.world is not None
    here.world.all(True)
    times = [micros / 1e6 for (micros,) in here.world.gather([int(time.time() * 1e6)])]
    # each clock counts once, for any number of ranks on its node
    skew = times[here.rank] - statistics.median_low(times[rank] for rank in set(map(first_of_node, here.everyone)))
    # with two nodes, either clock may be wrong; with more, the clocks far from the median are wrong
    if max(times) - min(times) > CLOCK_SKEW_S and (here.num_nodes == 2 or abs(skew) > CLOCK_SKEW_S / 2):
        raise Problem(
            f"the clock of {here.host} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}; clocks differ by up to "
            f"{max(times) - min(times):.1f} s",
            "ask your site to synchronize it (NTP)",
        )
    return f"{skew * 1e3:+.0f} ms"


def check_links(here: RankContext) -> str:
    """Measure latency and speed between each pair of nodes, or between each pair of ranks on a single node."""
    world = here.world
    assert world is not None
    heads = [facts["rank"] for facts in here.everyone if facts["local_rank"] == 0]
    members = heads if len(heads) > 1 else list(range(world.world_size))
    if len(members) < 2 or world.device.type == "mps":
        raise Skipped
    own = [time_link(world, one, other) for one, other in rounds(members) if world.rank in (one, other)]
    both_ways: dict[tuple[int, int], list[Link]] = {}
    for found in world.gather_objects(own):
        for link in (Link(*each) for each in found):
            both_ways.setdefault((link.one, link.other), []).append(link)
    links = [
        Link(one, other, min(link.latency_s for link in found), min(link.bytes_per_s for link in found))
        for (one, other), found in sorted(both_ways.items())
    ]
    here.measured["links"] = [link._asdict() for link in links]
    if here.rank not in members:
        raise Skipped
    hosts = {facts["rank"]: facts["host"] for facts in here.everyone}

    def name(link: Link) -> str:
        return f"{hosts[link.one]} - {hosts[link.other]}" if len(heads) > 1 else f"rank {link.one} - rank {link.other}"

    def links_of(rank: int) -> list[Link]:
        return [link for link in links if rank in (link.one, link.other)]

    def is_slow(link: Link) -> bool:
        limits = here.options
        return bool(link.latency_s * 1e3 > limits.max_latency_ms or link.bytes_per_s / 1e6 < limits.min_mb_per_s)

    mine = links_of(here.rank)
    if slow := [link for link in mine if is_slow(link)]:
        # with three or more members, a member whose links are all slow explains the slow links of the others
        culprits = {rank for rank in members if len(members) > 2 and all(map(is_slow, links_of(rank)))}
        shown = "; ".join(
            f"{name(link)}: {link.latency_s * 1e3:.2f} ms, {megabytes(link.bytes_per_s)}/s" for link in slow
        )
        raise Problem(
            f"slow links: {shown}" + (f" (all of {hosts[here.rank]}'s)" if here.rank in culprits else ""),
            f"expected at most {here.options.max_latency_ms:g} ms and at least {here.options.min_mb_per_s:g} MB/s; {TELL}, or "
            f"choose another interface",
            is_warning=here.rank not in culprits and all({link.one, link.other} & culprits for link in slow),
        )
    if (
        world.backend == "nccl"
        and len(heads) > 1
        and min(link.bytes_per_s for link in mine) < USUAL_NCCL_MB_PER_S * 1e6
    ):
        slowest = min(mine, key=lambda link: link.bytes_per_s)
        raise Problem(
            f"{name(slowest)}: {megabytes(slowest.bytes_per_s)}/s over NCCL",
            "check which network NCCL uses with NCCL_DEBUG=INFO; choose one with NCCL_SOCKET_IFNAME and NCCL_IB_HCA",
            is_warning=True,
        )
    median = statistics.median(link.bytes_per_s for link in links)
    slowest = min(mine, key=lambda link: link.bytes_per_s)
    if len(links) > 2 and slowest.bytes_per_s < median / 8:
        raise Problem(
            f"{name(slowest)}: {megabytes(slowest.bytes_per_s)}/s, the median of all links is {megabytes(median)}/s",
            TELL,
            is_warning=True,
        )
    return f"{max(link.latency_s for link in mine) * 1e3:.2f} ms, {megabytes(slowest.bytes_per_s)}/s at worst"


def rounds(members: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each pair of members once, in an order that lets many pairs run at the same time (circle method)."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        for one, other in zip(circle[:half], reversed(circle[half:]), strict=True):
            if one is not None and other is not None:
                yield min(one, other), max(one, other)
        circle = [circle[0], circle[-1], *circle[1:-1]]


def time_link(world: World, one: int, other: int) -> Link:
    """Measure the latency between two ranks, and how fast this rank sends to the other. Both ranks must call it."""
    small = torch.zeros(2, device=world.device)
    large = torch.zeros(2**18, device=world.device)

    def round_trip(first: int, tensor: Tensor, times: int) -> float:
        """Return the shortest time to send a tensor from `first` and a few bytes back, as measured by `first`."""
        answer, best = small.clone(), float("inf")
        for _ in range(times):
            began = time.perf_counter()
            if world.rank == first:
                dist.send(tensor, one + other - first)
                dist.recv(answer, one + other - first)
            else:
                dist.recv(tensor, first)
                dist.send(answer, first)
            world.wait_for_device()
            best = min(best, time.perf_counter() - began)
        return best

    round_trip(one, small, 2)  # connects
    latencies = {first: round_trip(first, small, 10) / 2 for first in (one, other)}
    transfers = {first: round_trip(first, large, 4) for first in (one, other)}
    latency = latencies[world.rank]
    return Link(one, other, latency, large.numel() * 4 / max(transfers[world.rank] - latency, 1e-9))
