"""A network for real runs in the tests: its steps take time, so that signals arrive in the middle, but almost no computation."""

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

SECONDS = float(os.environ.get("PACE_S", "0.04"))  # per micro-batch

FAULT_FILE = os.environ.get("FAULT_FILE", "")
"""While this file exists, the next micro-batch has a fault. Its content is `hang`, `kill` or `diverge`, and a rank or a node."""

FIRST = 4
"""The first micro-batch of a process that may have a fault. Those before it warm up."""


class Network(nn.Sequential):
    """A network with the same kinds of layers as the CNN (BatchNorm, both dropouts), a thousandth of its size."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        self.passes = 0
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
        if where not in (os.environ.get("RANK"), os.environ.get("NODE_NAME")):
            return
        if fault == "hang":
            time.sleep(10_000)
        elif fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "diverge":
            self[0].weight.data += 1e-6
