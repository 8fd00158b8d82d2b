"""Small data sets, configs and trainers for the tests."""

from pathlib import Path
from typing import Any

import torch
from launched import TIME_KEYS
from torch import nn

from ddp_cifar.checkpoint import Checkpoints, NullCheckpoints
from ddp_cifar.config import Config, load_config
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed import World
from ddp_cifar.models import MODELS
from ddp_cifar.tracking import NullTracker, Scalars
from ddp_cifar.train import TABLES, build_trainer
from ddp_cifar.trainer import Trainer

CLASSES = tuple("abcdefghij")


class Tiny(nn.Sequential):
    """A network with all that the CNN has (BatchNorm, dropout of both kinds), a thousandth of its size."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.05),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(8 * (image_size // 2) ** 2, num_classes),
        )


MODELS["tiny"] = Tiny


def config_of(*arguments: str) -> Config:
    """The config that a command line gives."""
    return load_config(arguments, TABLES)


def random_split(num_images: int, seed: int = 0, classes: int = 10, image_size: int = 32) -> Split:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_images, 3, image_size, image_size), dtype=torch.uint8, generator=random)
    return Split.of(images, torch.randint(classes, (num_images,), generator=random))


def random_dataset(train: int, test: int = 8, val: int = 0, image_size: int = 32) -> DataSet:
    splits = random_split(train, image_size=image_size), random_split(test, seed=1, image_size=image_size)
    return DataSet(*splits, CLASSES).hold_out(val)


def make_trainer(
    world: World,
    config: Config,
    dataset: DataSet,
    *,
    checkpoints: Checkpoints | None = None,
) -> Trainer:
    return build_trainer(config, world, dataset, checkpoints or NullCheckpoints(Path("nowhere"), keep=1))


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Over two dicts of tensors with the same keys."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


class Rows(NullTracker):
    """A tracker that keeps its rows, without what depends on time."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.synced: list[int] = []
        """The step of the last row at each call of `sync`."""

    def log(self, scalars: Scalars, step: int) -> None:
        self.rows.append({"step": step} | {tag: value for tag, value in scalars.items() if not TIME_KEYS.match(tag)})

    def sync(self) -> None:
        self.synced.append(self.rows[-1]["step"])
