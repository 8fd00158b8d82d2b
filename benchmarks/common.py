"""Parts shared by the benchmarks: options, random CIFAR-10 data, trainers, and the table of results."""

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

from ddp_cifar.config import load_config
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.normalization import VALUES
from ddp_cifar.distributed.world import World
from ddp_cifar.tracking import build_tracker
from ddp_cifar.tracking.base import NullTracker, Tracker
from ddp_cifar.training.build import build_trainer, set_up_kernels
from ddp_cifar.training.throughput import Rates
from ddp_cifar.training.trainer import Trainer


@dataclass(frozen=True)
class Comparison:
    """A target: `contender` should be `target` times as fast as `reference`."""

    contender: str
    reference: str
    target: float


def arguments(shows: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=shows)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed slices per contender ({rounds})")
    parser.add_argument("--batch", type=int, default=128, help="images per batch and rank (128)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def random_cifar10(num_images: int) -> CIFAR10:
    """Return torchvision's CIFAR-10 with the tutorials' transforms and random images: the same work per image, no download."""
    random = np.random.default_rng(0)
    dataset = CIFAR10.__new__(CIFAR10)
    dataset.data = random.integers(256, size=(num_images, 32, 32, 3), dtype=np.uint8)
    dataset.targets = random.integers(10, size=num_images).tolist()
    dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(**VALUES["cifar10"]),
        ]
    )
    dataset.target_transform = None
    return dataset


def split_of(dataset: CIFAR10) -> Split:
    """Return the same images in ddp_cifar's form."""
    return Split.of(torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets))


def make_trainer(world: World, data: DataSet, *arguments: str) -> Trainer:
    """Set up the kernels and build a trainer from command-line arguments, as the command does, but without checkpoints."""
    config = load_config(arguments)
    set_up_kernels(config.train, world)  # before the first product on a GPU: cuBLAS reads its variable only once
    return build_trainer(config, world, data)


def batch_sizes(world: World, batch: int, micro: int | None = None) -> list[str]:
    """Return the settings for `batch` images per step and rank, in one micro-batch, or in micro-batches of `micro`."""
    return [f"train.global_batch_size={batch * world.world_size}", f"train.micro_batch_size={micro or batch}"]


def title_of(trainer: Trainer, batch: int, slices: str) -> str:
    """Return a title that says what is measured: ranks, images, threads, precision, and the slice."""
    world = trainer.world
    return (
        f"{world.world_size} ranks x {batch} images on {world.device.type}, {torch.get_num_threads()} CPU threads per rank, "
        f"{trainer.train_step.precision}, {slices}"
    )


def tracker_in(folder: Path, world: World) -> Tracker:
    """Return the tracker of a run: rank 0 writes into `folder`, other ranks write nothing."""
    if not world.is_main:
        return NullTracker()
    return build_tracker(folder / "metrics.jsonl", folder / "tensorboard", 0)


def fastest(rates: Rates, names: Sequence[str]) -> str:
    """Return the name with the highest median rate."""
    return max(names, key=lambda name: statistics.median(rates[name]))


def report(
    title: str, rates: Rates, comparisons: Sequence[Comparison], json_file: Path | None, unit: str = "images/s"
) -> None:
    """Print Markdown tables of the rates and of each round's ratios, and write all of it to `json_file`."""
    rounds = len(next(iter(rates.values())))
    print(f"\n{title}, {rounds} rounds\n")
    print(f"| Contender | {unit}, median | min - max |")
    print("|---|---|---|")
    for name, values in rates.items():
        digits = 0 if min(values) > 10 else 3
        low, middle, high = (f"{rate:,.{digits}f}" for rate in (min(values), statistics.median(values), max(values)))
        print(f"| {name} | {middle} | {low} - {high} |")
    print("\n| Comparison | Speedup, median | min - max | Target | Verdict |")
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
