"""Quality measures from the logits of a split, in addition to loss and accuracy."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CALIBRATION_BINS = 15  # as in Guo et al., On Calibration of Modern Neural Networks (ICML 2017)


@dataclass(frozen=True)
class Quality:
    """Quality measures of a split. Shares are 0 to 1."""

    top5_accuracy: float
    """The share of images whose true class is among the top five predictions; nan for five classes or fewer."""
    calibration_error: float
    """Expected calibration error over 15 equal bins of confidence (Guo et al., ICML 2017)."""
    confusion: Tensor
    """(classes, classes) int64: the number of images by true class (row) and predicted class (column)."""

    @staticmethod
    def of(logits: Tensor, labels: Tensor) -> "Quality":
        """Compute the measures of (N, classes) logits and (N,) labels."""
        num_classes = logits.shape[1]
        predicted = logits.argmax(1)
        confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        top5 = float("nan")
        if num_classes > 5:
            top5 = (logits.topk(5, 1).indices == labels[:, None]).any(1).double().mean().item()
        return Quality(top5, _calibration_error(logits, labels), confusion.view(num_classes, num_classes))

    @property
    def recall(self) -> Tensor:
        """(classes,): the share of each class's images that are predicted as this class; nan for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1)

    @property
    def precision(self) -> Tensor:
        """(classes,): the share of each class's predictions that are correct; nan for a class that is never predicted."""
        return self.confusion.diagonal() / self.confusion.sum(0)

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes with images, as scikit-learn's `balanced_accuracy_score`."""
        return self.recall.nanmean().item()

    @property
    def macro_f1(self) -> float:
        """The mean F1 score, 2 TP / (2 TP + FP + FN), of the classes with images or predictions.

        As scikit-learn's `f1_score(average="macro")`: a class without images that is predicted counts as 0.
        """
        images_and_predictions = self.confusion.sum(1) + self.confusion.sum(0)  # 2 TP + FP + FN
        return (2 * self.confusion.diagonal() / images_and_predictions).nanmean().item()

    def as_dict(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """Return the measures for JSON, with null for nan."""

        def number(value: float) -> float | None:
            return None if value != value else value

        rows = zip(classes, self.confusion.sum(1).tolist(), self.precision.tolist(), self.recall.tolist(), strict=True)
        return {
            "top5_accuracy": number(self.top5_accuracy),
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
            "classes": [
                {"name": name, "images": images, "precision": number(precision), "recall": number(recall)}
                for name, images, precision, recall in rows
            ],
            "confusion": self.confusion.tolist(),
        }


def _calibration_error(logits: Tensor, labels: Tensor) -> float:
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1  # (0, 1/15], (1/15, 2/15] ...
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return gaps.abs().sum().item() / len(labels)
