"""A network for real runs in the tests: its steps take time, so that signals arrive in the middle, but almost no computation."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_cifar.data import DataSet, Split
from ddp_cifar.errors import UserError

SECONDS = float(os.environ.get("PACE_S", "0.04"))  # per micro-batch

FAULT_FILE = os.environ.get("FAULT_FILE", "")
"""While this file exists, the next micro-batch has a fault. It contains the name of the fault, and a rank or a node."""

FIRST = 4
"""The first micro-batch of a process that may have a fault. Those before it warm up."""

COLLECTIVE = 20
"""The micro-batch in which the model calls a collective of its own, if the fault is `skip` or `other`."""


class Network(nn.Sequential):
    """A network with the same kinds of layers as the CNN (BatchNorm, both dropouts), a thousandth of its size."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        self.passes, self.is_wrong = 0, False
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Dropout2d(0.05),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(8 * (image_size // 4) ** 2, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(SECONDS)
            self.inflict_fault()
        logits: Tensor = super().forward(images)
        return logits

    def inflict_fault(self) -> None:
        self.passes += 1
        if self.passes < FIRST or not FAULT_FILE or not os.path.exists(FAULT_FILE):
            return
        fault, where = Path(FAULT_FILE).read_text().split()
        is_here = where in (os.environ.get("RANK"), os.environ.get("NODE_NAME"))
        if fault in ("skip", "other"):
            if self.passes == COLLECTIVE and not is_here:
                dist.all_reduce(torch.zeros(7))
            elif self.passes == COLLECTIVE and fault == "other":
                dist.broadcast(torch.zeros(7), 0)
        elif is_here and fault in FAULTS:
            FAULTS[fault](self)


def diverge(network: Network) -> None:
    network[0].weight.data += 1e-6


def corrupt(network: Network) -> None:
    """From now on, this rank computes wrong gradients."""
    if not network.is_wrong:
        network[0].weight.register_hook(lambda gradient: gradient * 1.001)
    network.is_wrong = True


def sleep_until_killed(_: object) -> None:
    time.sleep(10_000)


def allocate(_: object) -> None:
    kept = []
    while True:
        kept.append(torch.ones(2**25))


FAULTS: dict[str, Callable[[Network], object]] = {
    "hang": sleep_until_killed,
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda _: os._exit(0),
    "diverge": diverge,
    "corrupt": corrupt,
    "allocate": allocate,
}


def augment(images: Tensor) -> Tensor:
    """An augmentation that changes nothing. With the fault `sleep` it does not return; with `slow all` it takes its time."""
    if FAULT_FILE and os.path.exists(FAULT_FILE):
        fault = Path(FAULT_FILE).read_text().split()
        if fault == ["sleep", os.environ.get("RANK")]:
            time.sleep(10_000)
        if fault == ["slow", "all"]:
            time.sleep(0.1)
    return images


def missing(root: str) -> DataSet:
    """A data set whose files are missing on the second node."""
    if os.environ["GROUP_RANK"] == "1":
        raise UserError(f"{root}/labels.txt does not exist")
    images = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    return DataSet(Split.of(images, torch.arange(32) % 2), None, ("a", "b"))
