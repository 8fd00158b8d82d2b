"""A network for real runs in the tests: its steps take time, so that signals arrive in the middle, but almost no computation."""

import os
import time

from torch import Tensor, nn

SECONDS = float(os.environ.get("PACE_S", "0.04"))  # per micro-batch

HANG_FILE = os.environ.get("HANG_FILE", "")
"""While this file exists, rank 1 hangs at its next micro-batch."""


class Network(nn.Sequential):
    """A network with the same kinds of layers as the CNN (BatchNorm, both dropouts), a thousandth of its size."""

    def __init__(self, num_classes: int, image_size: int) -> None:
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
            if HANG_FILE and os.environ.get("RANK") == "1" and os.path.exists(HANG_FILE):
                time.sleep(10_000)
        logits: Tensor = super().forward(images)
        return logits
