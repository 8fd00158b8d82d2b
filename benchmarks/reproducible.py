"""Cost of bitwise identical results: images/s with `train.reproducible` and without.

The two take turns in the same processes:

    torchrun --nproc_per_node=2 benchmarks/reproducible.py
    torchrun --nproc_per_node=2 benchmarks/reproducible.py --micro 32       # four micro-batches per rank
    torchrun --nproc_per_node=3 benchmarks/reproducible.py --micro 64       # 6 micro-batches over 3 ranks
    torchrun --nproc_per_node=3 benchmarks/reproducible.py --micro 48       # 8 micro-batches over 3 ranks
"""

import functools

import torch
from common import Comparison, arguments, batch_sizes, make_trainer, report, title_of

from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.training.build import set_up_kernels
from ddp_cifar.training.throughput import random_dataset, take_turns, timed, train_on
from ddp_cifar.training.trainer import Trainer

TARGET = 0.95


def main() -> None:
    parser = arguments("images/s with train.reproducible and without", rounds=11)
    parser.add_argument("--steps", type=int, default=3, help="steps per slice (3)")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--micro", type=int, help="images per micro-batch (default: --batch, one micro-batch per rank)")
    options = parser.parse_args()

    with open_world(options.device) as world:
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = [
            *batch_sizes(world, options.batch, options.micro),
            f"train.log_every={min(options.steps, 20)}",
            f"train.threads={torch.get_num_threads()}",
        ]
        # "on" first: with its kernels, cuBLAS is deterministic
        trainers = {
            name: make_trainer(world, data, f"train.reproducible={name == 'on'}", *sizes) for name in ("on", "off")
        }

        def slice_of(trainer: Trainer) -> None:
            set_up_kernels(trainer.config.train, world)  # kernel settings belong to the process, not the trainer
            train_on(trainer, options.steps)

        contenders = {
            name: timed(functools.partial(slice_of, trainer), images, world) for name, trainer in trainers.items()
        }
        rates = take_turns(contenders, options.rounds)
        if world.is_main:
            slices = f"micro-batches of {options.micro or options.batch}, {options.steps} steps per slice"
            title = title_of(trainers["on"], options.batch, slices)
            report(title, rates, [Comparison("on", "off", TARGET)], options.json)


if __name__ == "__main__":
    main()
