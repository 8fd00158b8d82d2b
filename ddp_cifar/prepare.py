"""Download or decode data before a run: `[torchrun ...] python -m ddp_cifar.prepare [CONFIG.yaml] [key=value ...]`.

It also downloads torchvision's pre-trained weights, if the config uses them. Use it if compute nodes have no internet access, or
to decode images outside the time of a job. It accepts the arguments of ddp_cifar.train, so that the same command line prepares a
run. Under torchrun, one process per node does the work. Without it, training downloads and decodes at its start.
"""

from collections.abc import Sequence

from ddp_cifar.command import run_command
from ddp_cifar.config import load_config
from ddp_cifar.log import log


def main(argv: Sequence[str]) -> int:
    """Prepare the data set of the config, read it once, and return the exit status."""
    config = load_config(argv)

    from ddp_cifar.data import build_dataset  # imports torch, which takes seconds
    from ddp_cifar.distributed.rendezvous import open_world
    from ddp_cifar.training.build import initial_weights

    with open_world("cpu", "gloo") as world:
        dataset = build_dataset(config.data, world)
        log.info(f"{config.data.name} is ready: {dataset.describe()}")
        world.on_each_node(lambda: initial_weights(config))  # downloads pre-trained weights
    return 0


if __name__ == "__main__":
    run_command(main)
