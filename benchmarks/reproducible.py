"""images/s with `train.reproducible`, the same bits on any number of ranks, and without it.

The two take turns in one process:

    torchrun --nproc_per_node=2 benchmarks/reproducible.py
    torchrun --nproc_per_node=2 benchmarks/reproducible.py --micro 32       # a rank accumulates four micro-batches
"""

import torch
from common import Comparison, arguments, batch_sizes, make_trainer, report, title_of

from ddp_cifar.benchmark import random_dataset, take_turns, timed, train_on
from ddp_cifar.distributed import open_world
from ddp_cifar.train import set_up_kernels
from ddp_cifar.trainer import Trainer

TARGET = 0.9


def main() -> None:
    parser = arguments("images/s with train.reproducible and without", rounds=11)
    parser.add_argument("--steps", type=int, default=3, help="steps a slice (3)")
    parser.add_argument("--micro", type=int, help="images of a micro-batch (as --batch: a rank accumulates none)")
    options = parser.parse_args()

    with open_world("cpu") as world:
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = [
            *batch_sizes(world, options.batch, options.micro),
            f"train.log_every={min(options.steps, 20)}",
            f"train.threads={torch.get_num_threads()}",
        ]
        trainers = {
            name: make_trainer(world, data, f"train.reproducible={name == 'on'}", *sizes) for name in ("on", "off")
        }

        def slice_of(trainer: Trainer) -> None:
            set_up_kernels(trainer.config.train, world)  # which are the process's, not the trainer's
            train_on(trainer, options.steps)

        contenders = {
            name: timed(lambda trainer=trainer: slice_of(trainer), images, world) for name, trainer in trainers.items()
        }
        rates = take_turns(contenders, options.rounds)
        if world.is_main:
            slices = f"micro-batches of {options.micro or options.batch}, {options.steps} steps a slice"
            title = title_of(trainers["on"], options.batch, slices)
            report(title, rates, [Comparison("on", "off", TARGET)], options.json)


if __name__ == "__main__":
    main()
