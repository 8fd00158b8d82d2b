"""The loss per image: cross-entropy or a user-defined function, weighted by class in training."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_cifar.config import TrainConfig
from ddp_cifar.errors import UserError
from ddp_cifar.registry import resolve

LossFunction = Callable[..., Tensor]
"""(B, classes) float32 logits and targets -> (B,) losses. Targets are (B,) labels or (B, classes) soft labels."""


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def loss_function(config: TrainConfig) -> LossFunction:
    """Return the function that `train.loss` names, for evaluations. Raises `UserError` if there is none."""
    return resolve("train.loss", config.loss)


class TrainingLoss:
    """The loss of training: `train.loss` with label smoothing, times the weight of each image's class."""

    def __init__(self, config: TrainConfig, weights: Tensor | None) -> None:
        """`weights`: (classes,) float32 on the device, or None for 1."""
        self.function = loss_function(config)
        self.arguments: dict[str, Any] = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
        self.weights = weights

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, classes) logits and targets -> (B,) losses."""
        losses = self.function(logits, targets, **self.arguments)
        if self.weights is None:
            return losses
        return losses * (targets @ self.weights if targets.is_floating_point() else self.weights[targets])


def class_weights(given: str | list[float] | None, labels: Tensor, num_classes: int) -> Tensor | None:
    """Return the (num_classes,) float32 weights that `train.class_weights` selects for training images with `labels` (N,).

    balanced: N / (num_classes x images of the class), as scikit-learn's compute_class_weight. Raises `UserError` if the number
    of weights is not the number of classes.
    """
    if given is None:
        return None
    if isinstance(given, list):
        if len(given) != num_classes:
            raise UserError(
                f"train.class_weights has {len(given)} numbers, but the data set has {num_classes} classes: expected one "
                f"number per class"
            )
        return torch.tensor(given, dtype=torch.float32)
    counts = torch.bincount(labels, minlength=num_classes).double()
    return (len(labels) / (num_classes * counts.clamp(min=1))).float()
