"""Small data sets, configs and trainers for the tests."""

import contextlib
import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import TIME_KEYS
from torch import nn

from ddp_cifar.config import Config, load_config
from ddp_cifar.data import build_dataset
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.loader import StepBatch
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.registry import BUILT_IN
from ddp_cifar.run.checkpoint_file import save_checkpoint
from ddp_cifar.run.checkpoint_store import Checkpoints
from ddp_cifar.tracking.base import NullTracker, Scalars
from ddp_cifar.training.build import build_trainer, set_up_kernels
from ddp_cifar.training.totals import Totals
from ddp_cifar.training.trainer import Trainer

CLASSES = tuple("abcdefghij")


class Tiny(nn.Sequential):
    """A network with the same kinds of layers as the CNN (BatchNorm, both dropouts), a thousandth of its size."""

    def __init__(self, num_classes: int, image_size: int, num_channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(num_channels, 8, 3, padding=1),
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


BUILT_IN["model.name"]["tiny"] = "helpers:Tiny"


def noise(images: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Draws from all generators that a library may use."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    shift = float(np.random.rand()) + random.random()
    return (values + strength * (torch.rand_like(values) + shift) / 10).clamp(0, 1)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B, C) logits and labels (B,), or soft labels (B, C) -> (B,): focal loss with gamma 2 (Lin et al., 2017)."""
    log_shares = logits.log_softmax(1)
    soft = targets if targets.is_floating_point() else nn.functional.one_hot(targets, logits.shape[1])
    return -(soft * (1 - log_shares.exp()) ** 2 * log_shares).sum(1)


def config_of(*arguments: str) -> Config:
    """The config of a command line."""
    return load_config(arguments)


def random_split(num_images: int, seed: int = 0, classes: int = 10, image_size: int = 32) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_images, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    return Split.of(images, torch.randint(classes, (num_images,), generator=generator))


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
    return build_trainer(config, world, dataset, checkpoints)


@contextlib.contextmanager
def kernels_of(config: Config, world: World) -> Iterator[None]:
    """In the body, the process uses the kernels of a run, and afterwards the default ones again."""
    set_up_kernels(config.train, world)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def evaluate(trainer: Trainer) -> Totals:
    """Loss and accuracy on the test images."""
    return trainer.evaluator.evaluate(trainer.evaluator.held_out["test"])


def take_step(trainer: Trainer, batch: StepBatch) -> None:
    """One step, as in `Trainer.train_epoch`."""
    norm = trainer.train_step.gradients(batch, trainer.progress.step, trainer.metrics)
    updated = trainer.train_step.update(norm, trainer.metrics)
    trainer.progress.advance(trainer.plan.steps_per_epoch, updated=updated)
    trainer.metrics.add_step(norm, batch)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest absolute difference between two dicts of tensors with the same keys."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


class Rows(NullTracker):
    """A tracker that keeps its rows, without the values that depend on time."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.synced: list[int] = []
        """The step of the last row at each call of `sync`."""

    def log(self, scalars: Scalars, step: int) -> None:
        self.rows.append({"step": step} | {tag: value for tag, value in scalars.items() if not TIME_KEYS.match(tag)})

    def sync(self) -> None:
        self.synced.append(self.rows[-1]["step"])


def state_of(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((1000,), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "progress": {"step": 3, "epoch": 1, "step_in_epoch": 0, "results": {"test/accuracy": 0.5}},
        "config": {"seed": 0, "clip": None},
    }


SMALL = ("train.global_batch_size=16", "train.micro_batch_size=4", "train.epochs=1", "train.log_every=1")


def trained(world: World, *arguments: str, images: int = 44) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The weights after one epoch, and the rows."""
    trainer = make_trainer(world, config_of(*SMALL, *arguments), random_dataset(images, test=10))
    rows = Rows()
    trainer.fit(rows)
    return {name: value.cpu() for name, value in trainer.model.state_dict().items()}, rows.rows


TEN_STEPS = (
    "precision=fp32",
    "optim.name=sgd",
    "optim.momentum=0",
    "optim.lr=0.01",
    "optim.schedule=constant",
    "optim.warmup_epochs=0",
    "train.global_batch_size=32",
    "train.epochs=4",
    "train.max_steps=10",
)


def save_untrained(path: Path, world: World, *arguments: str) -> DataSet:
    """Save a checkpoint of a network with random weights, and return its data set."""
    config = config_of("model.name=tiny", "device=cpu", *arguments)
    dataset = build_dataset(config.data, world)
    save_checkpoint(path, make_trainer(world, config, dataset).state_dict())
    return dataset


def run_on(world: World, module: str, *arguments: str) -> str:
    """Run a command in `world`. Returns its error message, "" if it succeeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddp_cifar.inference.open_world", lambda *_: contextlib.nullcontext(world))
        try:
            importlib.import_module(f"ddp_cifar.{module}").main(arguments)
        except UserError as error:
            return str(error)
    return ""
