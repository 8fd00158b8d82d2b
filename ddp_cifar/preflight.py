"""Check a cluster before a run: `[torchrun ...] python -m ddp_cifar.preflight [CONFIG.yaml] [key=value ...]`.

Start it in the same way and with the same arguments as the run: with launch/preflight.sh, slurm/preflight.sh or launch/ssh.sh.
Each rank checks its machine, then everything that it shares with the others: run_dir, data, the network. Rank 0 prints a row
per rank with a verdict per check, then each problem with a hint. Exits with status 1 if a check failed. docs/diagnosing.md
explains each finding.
"""

import argparse
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from ddp_cifar.command import Arguments, run_command
from ddp_cifar.config import load_config
from ddp_cifar.distributed.environment import local_rank_and_world_size, rank_and_world_size
from ddp_cifar.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises `UserError`."""
    parser = Arguments("ddp_cifar.preflight", __doc__)
    parser.add_argument("arguments", metavar="CONFIG.yaml key=value", nargs="*", help="the arguments of train")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--nodes", type=int, help="expected number of nodes (default: the nodes of torchrun)")
    parser.add_argument(
        "--hosts",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        help="comma-separated names of the nodes; used to name missing ones",
    )
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds that ranks wait for each other (default 30)"
    )
    parser.add_argument(
        "--max-latency-ms", type=float, default=5.0, help="highest latency of a link between nodes, in ms (default 5)"
    )
    parser.add_argument(
        "--min-mb-per-s", type=float, default=20.0, help="lowest speed of a link between nodes, in MB/s (default 20)"
    )
    options = parser.parse_intermixed_args(argv)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise `UserError` for an invalid value."""
    for name in ("patience", "max_latency_ms", "min_mb_per_s", "nodes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is out of range: expected a number above 0")
    if options.json and not os.access(options.json.absolute().parent, os.W_OK):
        raise UserError(f"--json {options.json}: {options.json.absolute().parent} is not a writable folder")


def main(argv: Sequence[str]) -> int:
    """Run all checks, print the report on rank 0, and return the exit status."""
    options = parse(argv)
    config = load_config(options.arguments)

    from ddp_cifar.checks.common import check_arrival  # imports torch, which takes seconds
    from ddp_cifar.checks.rank_context import CHECK_PATIENCE, RankContext, meet
    from ddp_cifar.checks.report import REPORTS_S, report, watch

    rank, world_size = rank_and_world_size()
    local_rank, local_world_size = local_rank_and_world_size()
    # torchrun sets it; without it, nodes with the same number of ranks are assumed
    num_agents = int(os.environ.get("GROUP_WORLD_SIZE", world_size // local_world_size))
    here = RankContext(config, options, rank, world_size, local_rank, local_world_size, num_agents)
    began = time.monotonic()
    here.facts |= {
        "rank": rank,
        "local_rank": local_rank,
        "local_world_size": local_world_size,
        "host": here.host,
    }
    # set before this rank meets the others: from then on, one of them may exit at any moment
    signal.signal(signal.SIGTERM, lambda *_: here.ended.set())
    meet(here)
    here.check("arrival", check_arrival)
    watch(here)
    return report(here, began, REPORTS_S if here.ended.is_set() else CHECK_PATIENCE * options.patience + REPORTS_S)


if __name__ == "__main__":
    run_command(main)
