"""`build_model` checks a network before training."""

import torch
from helpers import config_of
from torch import nn

from ddp_cifar.models import build_model, fails_on_one_image


class Squeezes(nn.Module):
    """A common bug: squeeze() also removes the batch dimension of a batch of one image."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.mean(dim=(2, 3), keepdim=True).squeeze())
        return logits


def test_a_model_that_fails_on_one_image_is_detected_before_training() -> None:
    bare = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 10))
    assert "Expected more than 1 value per channel" in fails_on_one_image(bare, 10, (3, 32, 32))
    problem = fails_on_one_image(Squeezes(10, 32), 10, (3, 32, 32))
    assert problem == "it returns (10,) in training, expected logits of shape (images, classes) = (1, 10)"
    assert fails_on_one_image(build_model(config_of().model, 10, (3, 32, 32)), 10, (3, 32, 32)) == ""
