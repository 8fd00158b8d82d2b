"""Images/s that one core prepares for training: ddp_cifar's loader against a torchvision DataLoader.

    python benchmarks/data_path.py

The contenders take turns. Each reads whole epochs of 50,000 images in batches of 128, cropped, flipped and normalized. ddp_cifar
does so on one thread of the training process. The DataLoader does so in one worker, while this process only receives batches,
and, for completeness, without workers.
"""

import time
from collections.abc import Callable, Iterable

import torch
from common import Comparison, arguments, random_cifar10, report, split_of
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from ddp_cifar.config import AugmentConfig, TrainConfig
from ddp_cifar.data.batch_plan import plan_batches
from ddp_cifar.data.loader import TrainLoader
from ddp_cifar.data.normalization import VALUES, Normalization
from ddp_cifar.data.sampler import StepSampler
from ddp_cifar.training.throughput import take_turns

TARGET = 15
OURS, WORKER, NO_WORKER = "ddp_cifar", "DataLoader, workers=1", "DataLoader, workers=0"


def main() -> None:
    parser = arguments("images/s of ddp_cifar's loader and of one DataLoader worker", rounds=7)
    parser.add_argument(
        "--images", type=int, default=50_000, help="images per epoch; one epoch is one slice (50000, as in CIFAR-10)"
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
    """Return a function that reads an epoch of `images` images and returns its images/s."""

    def measure() -> float:
        started = time.perf_counter()
        for _ in epoch():
            pass
        return images / (time.perf_counter() - started)

    return measure


def ours(dataset: CIFAR10, batch: int) -> Callable[[], Iterable[object]]:
    """Return the micro-batches of one rank, including the cost of the epoch's order and its crops and flips."""
    train = TrainConfig(global_batch_size=batch, micro_batch_size=batch)
    sampler = StepSampler(plan_batches(train, world_size=1, num_images=len(dataset)), rank=0, seed=0)
    loader = TrainLoader(
        split_of(dataset),
        Normalization(**VALUES["cifar10"]),
        train.channels_last,
        torch.device("cpu"),
        sampler=sampler,
        config=AugmentConfig(),
        num_classes=10,
        seed=0,
    )
    return lambda: (micro_batch for step in loader.steps(epoch=0) for micro_batch in step)


def loader(dataset: CIFAR10, batch: int, workers: int) -> Callable[[], Iterable[object]]:
    """Return batches of a torchvision DataLoader, which processes one image after another."""
    batches = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: batches


if __name__ == "__main__":
    main()
