"""Networks: plain `nn.Module`s that know nothing of configs or ranks. A new one is a file here and a line in `MODELS`."""

from collections.abc import Callable

import torch
from torch import nn

from ddp_cifar.config import ModelConfig
from ddp_cifar.errors import UserError
from ddp_cifar.models.cnn import CNN
from ddp_cifar.models.resnet import ResNet9, ResNet18
from ddp_cifar.models.torchvision import build_torchvision
from ddp_cifar.named import call, find

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "resnet18": ResNet18,
    "resnet9": ResNet9,
    "torchvision": build_torchvision,
}
"""Name -> function of the number of classes, the images' height and width in pixels, and `model.args`."""


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network that `config` names, for images (B, 3, image_size, image_size) and logits (B, num_classes).

    Raises `UserError` if there is none of that name, if it does not take `config.args`, or if it is not for such images.
    """
    function = find("model.name", config.name, MODELS)
    model = call("model.name", config.name, function, num_classes, image_size, **config.args)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={config.name} returned a {type(model).__name__}: expected a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.name={config.name} has no parameters to train")
    _try(model, config.name, num_classes, image_size)
    return model


@torch.no_grad()
def _try(model: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Raise `UserError` unless the model makes (2, num_classes) logits of two images, in training as well."""
    images = torch.zeros(2, 3, image_size, image_size)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for training in (True, False):
        try:
            with torch.random.fork_rng(devices=[]):  # dropout draws
                logits = model.train(training)(images)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"model.name={name} fails on images of shape {tuple(images.shape)} ({reason})") from error
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if found != (2, num_classes):
            raise UserError(
                f"model.name={name} makes {found} of images of shape {tuple(images.shape)}{' in training' * training}: "
                f"expected logits of shape (2, {num_classes}), the number of classes"
            )
    model.train()
    for buffer, before in buffers:
        buffer.copy_(before)
