"""images/s by the type that gradients are rounded to for communication: comm.hook none, fp16 and bf16.

The three take turns in one run. benchmarks/slow_link.sh runs this script over a slow link between two network namespaces:

    benchmarks/slow_link.sh [RATE]                               # 1gbit; as root
    torchrun --nproc_per_node=2 benchmarks/hooks.py              # over loopback
"""

import functools
from collections.abc import Sequence

from common import Comparison, arguments, batch_sizes, make_trainer, report, title_of

from ddp_cifar.command import run_command
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.training.throughput import random_dataset, take_turns, timed, train_on

HOOKS = ("none", "fp16", "bf16")
TARGET = 1.3


def main(argv: Sequence[str]) -> int:
    parser = arguments("images/s by comm.hook", rounds=7)
    parser.add_argument("--steps", type=int, default=5, help="steps per slice (5)")
    options = parser.parse_args(argv)
    with open_world("cpu") as world:
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = batch_sizes(world, options.batch)
        trainers = {hook: make_trainer(world, data, *sizes, f"comm.hook={hook}") for hook in HOOKS}
        contenders = {
            f"hook {hook}": timed(functools.partial(train_on, trainer, options.steps), images, world)
            for hook, trainer in trainers.items()
        }
        rates = take_turns(contenders, options.rounds)
        if world.is_main:
            comparisons = [Comparison(f"hook {hook}", "hook none", TARGET) for hook in HOOKS[1:]]
            report(
                title_of(trainers["none"], options.batch, f"{options.steps} steps per slice"),
                rates,
                comparisons,
                options.json,
            )
    return 0


if __name__ == "__main__":
    run_command(main)  # during the interpreter's shutdown, gloo's threads may still hold a hook
