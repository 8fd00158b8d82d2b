"""Train CIFAR-10 models and other image classifiers on multiple GPUs and nodes.

The commands (`python -m ddp_cifar.train`, ...) manage a whole run: run_dir, resume, signals, TensorBoard. This package is the
Python API for a notebook or another program. It trains in one process, or on all ranks if started by torchrun:

    from pathlib import Path

    from ddp_cifar import Checkpoints, build_dataset, build_trainer, load_config, load_trained, open_world

    config = load_config(["configs/demo.yaml", "train.epochs=1"])
    folder = Path("runs/notebook")
    folder.mkdir(parents=True, exist_ok=True)
    with open_world(config.device) as world:
        dataset = build_dataset(config.data, world)
        trainer = build_trainer(config, world, dataset, Checkpoints(folder, keep=2))
        trainer.fit()
    print(trainer.progress.results)

    if world.is_main:
        network = load_trained(folder)
        logits = network(dataset.test.images[:8])
        print([network.classes[i] for i in logits.argmax(1)])

`load_checkpoint(folder / "latest.pt")` returns the content of a checkpoint. User errors raise `UserError`, and failures inside
a run raise `RunError`. Both have a one-line message.

Importing the package does not import torch. Each name is imported on first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

LAUNCHER = os.getppid()
"""The process that started this one. Recorded before the import of torch, which takes seconds in which it may exit."""

if TYPE_CHECKING:
    from ddp_cifar.config import Config, load_config
    from ddp_cifar.data import DataSet, Split, build_dataset
    from ddp_cifar.distributed.rendezvous import open_world
    from ddp_cifar.distributed.world import World
    from ddp_cifar.errors import RunError, UserError
    from ddp_cifar.inference import TrainedNetwork, load_trained
    from ddp_cifar.run.checkpoint_file import load_checkpoint
    from ddp_cifar.run.checkpoint_store import Checkpoints
    from ddp_cifar.training.build import build_trainer
    from ddp_cifar.training.trainer import Trainer

__all__ = [
    "Checkpoints",
    "Config",
    "DataSet",
    "RunError",
    "Split",
    "TrainedNetwork",
    "Trainer",
    "UserError",
    "World",
    "build_dataset",
    "build_trainer",
    "load_checkpoint",
    "load_config",
    "load_trained",
    "open_world",
]

_MODULES = {
    "config": ("Config", "load_config"),
    "data": ("DataSet", "Split", "build_dataset"),
    "distributed.rendezvous": ("open_world",),
    "distributed.world": ("World",),
    "errors": ("RunError", "UserError"),
    "inference": ("TrainedNetwork", "load_trained"),
    "run.checkpoint_file": ("load_checkpoint",),
    "run.checkpoint_store": ("Checkpoints",),
    "training.build": ("build_trainer",),
    "training.trainer": ("Trainer",),
}
"""The module of each name in `__all__`, as in the imports above."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
