"""Download or decode a run's data ahead of it: `[torchrun ...] python -m ddp_cifar.prepare [CONFIG.yaml] [key=value ...]`.

For compute nodes that have no way out, or to decode before the time of a job counts. Takes what train takes, so that the same
command line prepares a run; under torchrun one process a node does the work. Training itself does the same where it is missing.
"""

from collections.abc import Sequence

from ddp_cifar.command import run_command
from ddp_cifar.config import load_config
from ddp_cifar.data import build_dataset
from ddp_cifar.distributed import open_world
from ddp_cifar.log import log
from ddp_cifar.train import TABLES


def main(argv: Sequence[str]) -> int:
    """Prepare the data that `argv` names, read it once, and return the exit status."""
    config = load_config(argv, TABLES)
    with open_world("cpu", "gloo") as world:
        dataset = build_dataset(config.data, world)
        log.info(f"{config.data.name} is ready: {dataset.describe()}")
    return 0


if __name__ == "__main__":
    run_command(main)
