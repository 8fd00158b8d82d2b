"""images/s by what gradients are rounded to on their way between ranks: comm.hook none, fp16 and bf16.

The three take turns in one run. benchmarks/slow_link.sh runs it between two network namespaces with a slow link:

    benchmarks/slow_link.sh [RATE]                               # 1gbit; as root
    torchrun --nproc_per_node=2 benchmarks/hooks.py              # over loopback
"""

import functools

import peers
import torch
from common import Comparison, arguments, make_trainer, report

from ddp_cifar.benchmark import random_dataset, take_turns, timed, train_on
from ddp_cifar.distributed import open_world

HOOKS = ("none", "fp16", "bf16")
TARGET = 1.3


def main() -> None:
    parser = arguments("images/s by comm.hook", rounds=7)
    parser.add_argument("--steps", type=int, default=5, help="steps a slice (5)")
    options = parser.parse_args()
    with open_world("cpu") as world, peers.left_at_once():
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = [
            f"train.global_batch_size={options.batch * world.world_size}",
            f"train.micro_batch_size={options.batch}",
        ]
        trainers = {hook: make_trainer(world, data, *sizes, f"comm.hook={hook}") for hook in HOOKS}
        contenders = {
            f"hook {hook}": timed(functools.partial(train_on, trainer, options.steps), images)
            for hook, trainer in trainers.items()
        }
        rates = take_turns(contenders, options.rounds)
        if world.is_main:
            title = f"{world.world_size} ranks x {options.batch} images, {torch.get_num_threads()} threads a rank"
            comparisons = [Comparison(f"hook {hook}", "hook none", TARGET) for hook in HOOKS[1:]]
            report(f"{title}, {trainers['none'].precision}", rates, comparisons, options.json)


if __name__ == "__main__":
    main()
