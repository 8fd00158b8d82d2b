"""Images/s of a training run on CPU ranks: ddp_cifar, plain DDP as the tutorials write it, and the computation alone.

    torchrun --nproc_per_node=2 benchmarks/speed.py

One rank a core: torchrun sets OMP_NUM_THREADS=1. The network is the article's, a rank takes 128 images a step, and the
contenders take turns in one run:

- plain DDP: DistributedSampler, a DataLoader over torchvision's CIFAR10 and transforms, fp32, Adam, `loss.item()` in each
  step; with 0, 1 and 2 workers, the best of which counts;
- ddp_cifar: the real Trainer, all of a user's step: data, micro-batch, gradients and BatchNorm statistics over ranks,
  totals, metrics to disk;
- ceiling: forward, backward and update on one fixed batch, all ranks at the same time but each for itself. What is missing
  to it is what data, communication and bookkeeping cost.
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    Comparison,
    arguments,
    fastest,
    make_trainer,
    random_cifar10,
    report,
    split_of,
    take_turns,
    timed,
    train_on,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import CIFAR10

from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed import open_world
from ddp_cifar.models.cnn import CNN
from ddp_cifar.optim import build_optimizer
from ddp_cifar.tracking import NullTracker, build_tracker
from ddp_cifar.trainer import Trainer

TARGET_PLAIN = 2.1
TARGET_CEILING = 0.9
WORKERS = (0, 1, 2)

Steps = Callable[[], None]
"""Runs a slice of some training steps."""


def main() -> None:
    parser = arguments("images/s of ddp_cifar, plain DDP, and the computation alone", rounds=11)
    parser.add_argument("--steps", type=int, default=3, help="steps a slice (3)")
    options = parser.parse_args()

    with open_world("cpu") as world, tempfile.TemporaryDirectory() as folder:
        # the whole benchmark is one epoch, so that no DataLoader starts anew within a slice
        slices = options.rounds + 1
        dataset = random_cifar10(slices * options.steps * options.batch * world.world_size)
        data = DataSet(split_of(dataset), None, tuple("abcdefghij"))
        sizes = [
            f"train.global_batch_size={options.batch * world.world_size}",
            f"train.micro_batch_size={options.batch}",
        ]
        # a row of metrics in each slice, which is more often than by default
        trainer = make_trainer(world, data, *sizes, f"train.log_every={min(options.steps, 20)}")
        plain = {f"plain DDP, workers={workers}": workers for workers in WORKERS}
        runs = {name: plain_ddp(dataset, options.batch, options.steps, workers) for name, workers in plain.items()}
        runs["ddp_cifar"] = lambda: train_on(trainer, options.steps)
        runs["ceiling"] = ceiling(trainer, options.batch, options.steps)

        images = options.steps * options.batch * world.world_size
        with contextlib.closing(
            build_tracker(Path(folder, "metrics.jsonl"), Path(folder, "tensorboard"), 0)
            if world.is_main
            else NullTracker()
        ) as trainer.tracker:
            rates = take_turns({name: timed(run, images) for name, run in runs.items()}, options.rounds)
        if world.is_main:
            best = fastest(rates, list(plain))
            title = (
                f"{world.world_size} ranks x {options.batch} images, {torch.get_num_threads()} threads a rank, "
                f"{trainer.precision}, {options.steps} steps a slice"
            )
            comparisons = [
                Comparison("ddp_cifar", best, TARGET_PLAIN),
                Comparison("ddp_cifar", "ceiling", TARGET_CEILING),
            ]
            report(title, rates, comparisons, options.json)


def plain_ddp(dataset: CIFAR10, batch: int, steps: int, workers: int) -> Steps:
    """The loop of PyTorch's tutorials on DDP and on training a classifier."""
    model = DistributedDataParallel(CNN())
    optimizer = Adam(model.parameters(), lr=1e-3)
    loss_function = nn.CrossEntropyLoss()
    sampler: DistributedSampler[int] = DistributedSampler(dataset, shuffle=True)
    loader = DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    batches = iter(loader)

    def run() -> None:
        running_loss = 0.0
        for _ in range(steps):
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()

    return run


def ceiling(trainer: Trainer, batch: int, steps: int) -> Steps:
    """The computation of the trainer's step, in its precision and memory format, and nothing else."""
    model = CNN().to(memory_format=trainer.train.memory_format)
    optimizer = build_optimizer(model, trainer.config.optim)
    images = torch.randn(batch, *trainer.train.image_shape).to(memory_format=trainer.train.memory_format)
    labels = torch.randint(10, (batch,))

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with trainer.autocast():
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    return run


if __name__ == "__main__":
    main()
