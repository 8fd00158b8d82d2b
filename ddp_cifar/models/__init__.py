"""Networks: plain `nn.Module`s that know nothing of configs or ranks. A new one is a file here and a line in `MODELS`."""

from collections.abc import Callable

from torch import nn

from ddp_cifar.models.cnn import CNN

MODELS: dict[str, Callable[[int, int], nn.Module]] = {"cnn": CNN}
"""Name -> function of the number of classes and the images' height and width in pixels."""
