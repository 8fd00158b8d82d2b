"""Images/s of training with ddp_cifar, with other frameworks, and of the bare computation.

    torchrun --nproc_per_node=2 benchmarks/speed.py                 # CPU, one rank per core: torchrun sets OMP_NUM_THREADS=1
    torchrun --nproc_per_node=1 benchmarks/speed.py --device cuda --workers 4,8 --steps 100 --batch 512

The network is the original script's. The contenders take turns in one run:

- plain DDP: DistributedSampler, a DataLoader over torchvision's CIFAR10 and transforms, fp32, Adam, `loss.item()` in each step;
- Accelerate and Lightning (`--peers`): the same data in bf16, as their documentation shows (pip install -e .[peers]);
- ddp_cifar: the real Trainer with all parts of a step, from data to metrics on disk;
- ceiling: the bare computation, which is forward, backward and update on one fixed batch, on all ranks at the same time without
  communication. The distance to it is the cost of data, communication and bookkeeping.

The others run with several numbers of DataLoader workers each, and the best counts.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import peers
from common import (
    Comparison,
    arguments,
    batch_sizes,
    fastest,
    make_trainer,
    random_cifar10,
    report,
    split_of,
    title_of,
    tracker_in,
)

from ddp_cifar.command import run_command
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.training.throughput import computation, take_turns, timed, train_on

TARGETS = {
    "cpu": {"plain DDP": 2.3, "ceiling": 0.93, "Accelerate": 1.2, "Lightning": 1.2},
    "cuda": {"plain DDP": 3.0, "ceiling": 0.93, "Accelerate": 3.0, "Lightning": 3.0},
}


def main(argv: Sequence[str]) -> int:
    parser = arguments("images/s of ddp_cifar, of other frameworks, and of the bare computation", rounds=11)
    parser.add_argument("--steps", type=int, default=3, help="steps per slice (3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument(
        "--workers", default="0,1,2", help="DataLoader workers of the others; the best number counts (0,1,2)"
    )
    parser.add_argument("--peers", action="store_true", help="also run Lightning and Accelerate")
    parser.add_argument(
        "--set", nargs="*", default=[], help="more settings for ddp_cifar, such as train.compile=default"
    )
    options = parser.parse_args(argv)

    with open_world(options.device) as world, tempfile.TemporaryDirectory() as folder:
        # the whole benchmark is one epoch, so that no DataLoader restarts within a slice
        dataset = random_cifar10((options.rounds + 2) * options.steps * options.batch * world.world_size)
        data = DataSet(split_of(dataset), None, tuple("abcdefghij"))
        sizes = batch_sizes(world, options.batch)
        # on the CPU, one row of metrics per slice, which is more than by default
        trainer = make_trainer(world, data, *sizes, f"train.log_every={min(options.steps, 20)}", *options.set)
        recipe = peers.Recipe(dataset, options.batch, options.steps, world)
        others: dict[str, Callable[[peers.Recipe, int], peers.Steps]] = {"plain DDP": peers.plain_ddp}
        if options.peers:
            others |= {"Accelerate": peers.accelerate, "Lightning": peers.lightning}
        workers = [int(number) for number in options.workers.split(",")]
        runs = {f"{name}, workers={n}": build(recipe, n) for name, build in others.items() for n in workers}
        runs["ddp_cifar"] = functools.partial(train_on, trainer, options.steps)
        runs["ceiling"] = computation(trainer.train_step, len(trainer.dataset.classes), options.steps)

        images = options.steps * options.batch * world.world_size
        with contextlib.closing(tracker_in(Path(folder), world)) as trainer.tracker:
            contenders = {name: timed(run, images, world) for name, run in runs.items()}
            rates = take_turns(contenders, options.rounds)
        if world.is_main:
            title = title_of(trainer, options.batch, f"{options.steps} steps per slice")
            targets = TARGETS[options.device]
            best = {name: fastest(rates, [f"{name}, workers={n}" for n in workers]) for name in others}
            comparisons = [
                Comparison("ddp_cifar", best.get(name, name), target)
                for name, target in targets.items()
                if name in best or name == "ceiling"
            ]
            report(title, rates, comparisons, options.json)
    return 0


if __name__ == "__main__":
    run_command(main)  # exits the process, and with it the others' loops and workers
