"""Residual networks for small images, without early pooling, which would lose too much of 32 x 32 pixels.

Mean and maximum over all pixels are plain reductions, which have deterministic gradients on a GPU; adaptive pooling does not.
"""

from torch import Tensor, nn


class ResNet18(nn.Module):
    """(B, C, H, W) float images -> (B, num_classes) logits; 11,173,962 parameters for ten classes.

    ResNet-18 of He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition (CVPR 2016), except for the stem: one
    3 x 3 convolution without stride or pooling, as usual for CIFAR.
    """

    def __init__(self, num_classes: int = 10, image_size: int | tuple[int, int] = 32, *, num_channels: int = 3) -> None:
        super().__init__()
        self.stem = _convolution(num_channels, 64)
        blocks: list[nn.Module] = []
        for before, after, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
            blocks += [BasicBlock(before, after, stride), BasicBlock(after, after, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.stem(images))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; a 1 x 1 convolution adapts the shortcut if the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, stride)
        self.second = nn.Sequential(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = self.second(self.first(features)) + self.shortcut(features)
        return added.relu()


class ResNet9(nn.Module):
    """(B, C, H, W) float images -> (B, num_classes) logits; 6,573,120 parameters for ten classes. H and W must be at least 8.

    A network for fast training on CIFAR-10: Page, How to Train Your ResNet (2018), after Coleman et al., DAWNBench (2017).
    Its last layer has no bias, and its logits are scaled by 1/8.
    """

    def __init__(self, num_classes: int = 10, image_size: int | tuple[int, int] = 32, *, num_channels: int = 3) -> None:
        super().__init__()
        self.stem = _convolution(num_channels, 64)
        self.blocks = nn.Sequential(
            *(_convolution(64, 128), nn.MaxPool2d(2), Residual(128)),
            *(_convolution(128, 256), nn.MaxPool2d(2)),
            *(_convolution(256, 512), nn.MaxPool2d(2), Residual(512)),
        )
        self.head = nn.Linear(512, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.stem(images))
        logits: Tensor = self.head(features.amax((2, 3))) * 0.125
        return logits


class Residual(nn.Module):
    """Two 3 x 3 convolutions with an identity shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = features + self.convolutions(features)
        return added


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )
