"""The same training in plain DDP, Accelerate and Lightning, each as its documentation shows, in slices of steps.

Lightning and Accelerate are optional: `pip install -e .[peers]`.
"""

import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import CIFAR10

from ddp_cifar.distributed.world import World
from ddp_cifar.models.cnn import CNN

Steps = Callable[[], None]
"""A function that runs a slice of training steps."""

LR = 1e-3


@dataclass(frozen=True)
class Recipe:
    """The settings that all contenders share."""

    dataset: CIFAR10
    batch: int
    """Images per rank and step."""
    steps: int
    """Steps per slice."""
    world: World

    @property
    def on_cuda(self) -> bool:
        return self.world.device.type == "cuda"

    def loader(self, workers: int, sampler: "DistributedSampler[int] | None" = None) -> "DataLoader[Any]":
        return DataLoader(
            self.dataset,
            batch_size=self.batch,
            sampler=sampler,
            shuffle=sampler is None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.on_cuda,
            drop_last=True,
        )


def plain_ddp(recipe: Recipe, workers: int) -> Steps:
    """Return the loop of PyTorch's tutorials on DDP and on training a classifier, in fp32."""
    device = recipe.world.device
    model = DistributedDataParallel(CNN().to(device), device_ids=[device.index] if recipe.on_cuda else None)
    optimizer = Adam(model.parameters(), lr=LR)
    loss_function = nn.CrossEntropyLoss()
    batches = iter(recipe.loader(workers, DistributedSampler(recipe.dataset, shuffle=True)))

    def run() -> None:
        running_loss = 0.0
        for _ in range(recipe.steps):
            images, labels = (tensor.to(device) for tensor in next(batches))
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()

    return run


def accelerate(recipe: Recipe, workers: int) -> Steps:
    """Return a loop of Hugging Face Accelerate in bf16, migrated as in its quick tour."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=not recipe.on_cuda)
    model = CNN()
    model, optimizer, loader = accelerator.prepare(model, Adam(model.parameters(), lr=LR), recipe.loader(workers))
    batches = iter(loader)

    def run() -> None:
        for _ in range(recipe.steps):
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()

    return run


def lightning(recipe: Recipe, workers: int) -> Steps:
    """Return a run of Lightning's Trainer in bf16, without logger, progress bar and checkpoints."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = CNN()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> Adam:
            return Adam(self.parameters(), lr=LR)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    def fit(slice_ended: Callable[[], None]) -> None:
        class Slices(L.Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                if self.batches % recipe.steps == 0:
                    slice_ended()
                self.batches += 1

            batches = 0

        trainer = L.Trainer(
            accelerator="gpu" if recipe.on_cuda else "cpu",
            devices=recipe.world.local_world_size,
            strategy="ddp",
            precision="bf16-mixed",
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Slices()],
        )
        trainer.fit(Module(), recipe.loader(workers))

    return in_slices(fit)


def in_slices(loop: Callable[[Callable[[], None]], None]) -> Steps:
    """Return a function that runs the next slice of a loop that controls the training.

    The loop runs on a thread, which waits whenever it calls its argument. Only one of the two threads runs at a time.
    """
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    errors: list[BaseException] = []

    def slice_ended() -> None:
        done.release()
        go.acquire()

    def run_loop() -> None:
        try:
            loop(slice_ended)
            raise RuntimeError("the loop ended before the benchmark")
        except BaseException as error:
            errors.append(error)
            done.release()

    thread = threading.Thread(target=run_loop, daemon=True)

    def run() -> None:
        if thread.ident is None:
            thread.start()
            done.acquire()  # the loop is before its first step
        go.release()
        done.acquire()
        if errors:
            raise errors[0]

    return run
