"""What the benchmarks share: the data of the usual way, rounds in which contenders take turns, and a table of the results."""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import transforms
from torchvision.datasets import CIFAR10

from ddp_cifar import benchmark
from ddp_cifar.benchmark import Rates
from ddp_cifar.config import load_config
from ddp_cifar.data.augment import MEAN, STD
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed import World
from ddp_cifar.tracking import NullTracker, Tracker, build_tracker
from ddp_cifar.train import TABLES
from ddp_cifar.trainer import Trainer


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


def make_trainer(world: World, data: DataSet, *arguments: str) -> Trainer:
    """As the command builds it from these arguments, but that it saves nothing."""
    return benchmark.make_trainer(world, data, load_config(arguments, TABLES))


def batch_sizes(world: World, batch: int, micro: int | None = None) -> list[str]:
    """The settings for `batch` images a step on each rank, in micro-batches of as many, or of `micro`."""
    return [f"train.global_batch_size={batch * world.world_size}", f"train.micro_batch_size={micro or batch}"]


def title_of(trainer: Trainer, batch: int, slices: str) -> str:
    """What is measured: ranks, images, threads, precision, and what a slice is."""
    world = trainer.world
    return (
        f"{world.world_size} ranks x {batch} images on {world.device.type}, {torch.get_num_threads()} threads a rank, "
        f"{trainer.precision}, {slices}"
    )


def tracker_in(folder: Path, world: World) -> Tracker:
    """As a run has it: rank 0 writes."""
    if not world.is_main:
        return NullTracker()
    return build_tracker(folder / "metrics.jsonl", folder / "tensorboard", 0)


def fastest(rates: Rates, names: Sequence[str]) -> str:
    """The one of `names` with the highest median."""
    return max(names, key=lambda name: statistics.median(rates[name]))


def report(
    title: str, rates: Rates, comparisons: Sequence[Comparison], json_file: Path | None, unit: str = "images/s"
) -> None:
    """Print tables in Markdown of the rates, and of the comparisons by each round's ratio; write all to `json_file`."""
    rounds = len(next(iter(rates.values())))
    print(f"\n{title}, {rounds} rounds\n")
    print(f"| | {unit}, median | min - max |")
    print("|---|---|---|")
    for name, values in rates.items():
        digits = 0 if min(values) > 10 else 3
        low, middle, high = (f"{rate:,.{digits}f}" for rate in (min(values), statistics.median(values), max(values)))
        print(f"| {name} | {middle} | {low} - {high} |")
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
        content = {"title": title, **versions, "unit": unit, "rates": rates, "comparisons": results}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
