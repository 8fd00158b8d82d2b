"""What the benchmarks share: the data of the usual way, rounds in which contenders take turns, and a table of the results."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchvision import transforms
from torchvision.datasets import CIFAR10

from ddp_cifar.checkpoint import NullCheckpoints
from ddp_cifar.config import load_config
from ddp_cifar.data.augment import MEAN, STD
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed import World
from ddp_cifar.train import TABLES, build_trainer
from ddp_cifar.trainer import Trainer

Rates = dict[str, list[float]]
"""Contender -> its images/s in each round."""

SETTLE_S = 0.3  # idle DataLoader workers fill their queues in this time, and not at the next contender's cost


@dataclass(frozen=True)
class Comparison:
    """How many times as fast `contender` should be as `reference`."""

    contender: str
    reference: str
    target: float


def arguments(shows: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=shows)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"slices of each contender that are timed ({rounds})"
    )
    parser.add_argument("--batch", type=int, default=128, help="images a batch, on each rank (128)")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    return parser


def random_cifar10(num_images: int) -> CIFAR10:
    """torchvision's CIFAR-10 with the tutorials' transforms, over random images: no download, the same work an image."""
    random = np.random.default_rng(0)
    dataset = CIFAR10.__new__(CIFAR10)
    dataset.data = random.integers(256, size=(num_images, 32, 32, 3), dtype=np.uint8)
    dataset.targets = random.integers(10, size=num_images).tolist()
    dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    dataset.target_transform = None
    return dataset


def split_of(dataset: CIFAR10) -> Split:
    """The same images as ddp_cifar holds them."""
    return Split.of(torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets))


def random_dataset(num_images: int) -> DataSet:
    """Random images to train on, and none to evaluate on."""
    return DataSet(split_of(random_cifar10(num_images)), None, tuple("abcdefghij"))


def make_trainer(world: World, data: DataSet, *arguments: str) -> Trainer:
    """As the command builds it from these arguments, but that it saves nothing."""
    return build_trainer(load_config(arguments, TABLES), world, data, NullCheckpoints(Path("nowhere"), keep=1))


def train_on(trainer: Trainer, steps: int) -> None:
    """Let the trainer go on as if `train.max_steps` had said so.

    So each slice also draws the epoch's order and crops, which in a run happens once an epoch.
    """
    trainer.last_step = trainer.progress.step + steps
    trainer.train_epoch()


def timed(run: Callable[[], None], images: int) -> Callable[[], float]:
    """A function that runs a slice of `images` over all ranks and returns its images/s, by the slowest rank's time."""

    def measure() -> float:
        dist.barrier()
        started = time.perf_counter()
        run()
        seconds = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return images / seconds.item()

    return measure


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Each contender's images/s in each round. A contender runs its slice of work and returns the rate of it.

    They take turns, since a shared machine is faster in one minute than in the next; every other round goes backwards.
    """
    for run in contenders.values():
        run()  # warm-up: kernels are chosen, DDP settles its buckets, workers start
    rates: Rates = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in reversed(names) if number % 2 else names:
            time.sleep(SETTLE_S)
            rates[name].append(contenders[name]())
    return rates


def fastest(rates: Rates, names: Sequence[str]) -> str:
    """The one of `names` with the highest median."""
    return max(names, key=lambda name: statistics.median(rates[name]))


def report(title: str, rates: Rates, comparisons: Sequence[Comparison], json_file: Path | None) -> None:
    """Print tables in Markdown of the rates, and of the comparisons by each round's ratio; write all to `json_file`."""
    rounds = len(next(iter(rates.values())))
    print(f"\n{title}, {rounds} rounds\n")
    print("| | images/s, median | min - max |")
    print("|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} - {max(values):,.0f} |")
    print("\n| | times as fast, median | min - max | target | |")
    print("|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    for comparison in comparisons:
        pairs = zip(rates[comparison.contender], rates[comparison.reference], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        median = statistics.median(ratios)
        verdict = "reached" if median >= comparison.target else "missed"
        print(
            f"| {comparison.contender} / {comparison.reference} | {median:.2f} | {min(ratios):.2f} - {max(ratios):.2f} "
            f"| {comparison.target:g} | {verdict} |"
        )
        results.append(asdict(comparison) | {"median": median, "ratios": ratios})
    if json_file:
        versions = {"torch": torch.__version__, "machine": platform.machine(), "host": platform.node()}
        content = {"title": title, **versions, "images_per_s": rates, "comparisons": results}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
