"""Images/s that one core makes ready for training: ddp_cifar's loader, and a torchvision DataLoader.

    python benchmarks/data_path.py

Each reads whole epochs of 50,000 images in batches of 128, cropped, mirrored and normalised; they take turns. ddp_cifar does
so in the process that trains, on one thread. The DataLoader does so in one worker, while this process only receives (the
worker is the one core), and, for completeness, without a worker.
"""

import time
from collections.abc import Callable, Iterable

import torch
from common import Comparison, arguments, random_cifar10, report, split_of
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from ddp_cifar.benchmark import take_turns
from ddp_cifar.config import TrainConfig
from ddp_cifar.data.loader import TrainLoader
from ddp_cifar.data.sampler import StepSampler, plan_batches

TARGET = 15
OURS, WORKER, NO_WORKER = "ddp_cifar", "DataLoader, workers=1", "DataLoader, workers=0"


def main() -> None:
    parser = arguments("images/s of ddp_cifar's data path and of one DataLoader worker", rounds=7)
    parser.add_argument(
        "--images", type=int, default=50_000, help="images an epoch, which is a slice (50000, as CIFAR-10)"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)
    dataset = random_cifar10(options.images)
    contenders = {
        OURS: timed(ours(dataset, options.batch), options.images),
        WORKER: timed(loader(dataset, options.batch, workers=1), options.images),
        NO_WORKER: timed(loader(dataset, options.batch, workers=0), options.images),
    }
    rates = take_turns(contenders, options.rounds)
    title = f"one core, batches of {options.batch}, epochs of {options.images:,} images"
    report(title, rates, [Comparison(OURS, WORKER, TARGET), Comparison(OURS, NO_WORKER, TARGET)], options.json)


def timed(epoch: Callable[[], Iterable[object]], images: int) -> Callable[[], float]:
    """A function that reads an epoch of `images` and returns its images/s."""

    def measure() -> float:
        started = time.perf_counter()
        for _ in epoch():
            pass
        return images / (time.perf_counter() - started)

    return measure


def ours(dataset: CIFAR10, batch: int) -> Callable[[], Iterable[object]]:
    """What a world of one rank trains on. The epoch's order and its table of crops and mirrors are part of it."""
    train = TrainConfig(global_batch_size=batch, micro_batch_size=batch)
    sampler = StepSampler(plan_batches(train, world_size=1, num_images=len(dataset)), rank=0, seed=0)
    loader = TrainLoader(
        split_of(dataset), sampler, seed=0, channels_last=train.channels_last, device=torch.device("cpu")
    )
    return lambda: (micro_batch for step in loader.steps(epoch=0) for micro_batch in step)


def loader(dataset: CIFAR10, batch: int, workers: int) -> Callable[[], Iterable[object]]:
    """The usual way: one image after another."""
    batches = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: batches


if __name__ == "__main__":
    main()
