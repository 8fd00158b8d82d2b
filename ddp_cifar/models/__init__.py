"""Networks: plain `nn.Module`s that do not depend on configs or ranks.

To add a network, add a file here and a line in registry.py. Its function takes the number of classes, the image size (in pixels;
(height, width) if they differ), `num_channels` if the images do not have three, and `model.args`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter

from ddp_cifar.config import ImageShape, ModelConfig
from ddp_cifar.errors import UserError, first_line, user_code
from ddp_cifar.registry import call, resolve
from ddp_cifar.seeding import unchanged_generators


def build_model(
    config: ModelConfig, num_classes: int, image_shape: ImageShape, device: torch.device | str = "cpu"
) -> nn.Module:
    """Build the network of `config`, for images (B, *image_shape) and logits (B, num_classes).

    It is built on the CPU, so that its initial weights are the same on any device, then moved to `device` and tried.
    Raises `UserError` if its name is unknown, if it does not accept `config.args`, or if it fails on such images.
    """
    function = resolve("model.name", config.name)
    channels, height, width = image_shape
    size = height if height == width else (height, width)
    arguments = config.args if channels == 3 else {"num_channels": channels} | config.args
    model = call("model.name", config.name, function, num_classes, size, **arguments)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={config.name} returned a {type(model).__name__}: expected a torch.nn.Module")
    _materialize(model, config.name, image_shape)
    model = model.to(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.name={config.name} has no parameters to train")
    _try(model, config.name, num_classes, image_shape)
    return model


@contextlib.contextmanager
def at_most_parameters(limit: int, source: str) -> Iterator[None]:
    """Raise `UserError`, which names `source`, if modules that the body builds have more than `limit` parameters in total.

    Layers allocate a parameter, register it, and then write it: until then its memory is only reserved.
    """
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += parameter.numel() if parameter is not None and not isinstance(parameter, UninitializedParameter) else 0
        if total > limit:
            raise UserError(f"{source} does not fit the model of its config, which has more parameters: it is damaged")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _materialize(model: nn.Module, name: str, image_shape: ImageShape) -> None:
    """Give lazy layers their shapes, and initial weights, by a forward pass. Raises `UserError` if it fails."""
    if not any(isinstance(module, LazyModuleMixin) for module in model.modules()):
        return
    with user_code(f"model.name={name} fails on its first forward pass"), torch.no_grad():
        model.eval()(torch.zeros(2, *image_shape))


def fails_on_one_image(model: nn.Module, num_classes: int, image_shape: ImageShape) -> str:
    """Return why the model cannot train on one image, such as BatchNorm over 1 x 1 pixels, or "" if it can."""
    return _problem(model, 1, num_classes, image_shape, training=True)


def _try(model: nn.Module, name: str, num_classes: int, image_shape: ImageShape) -> None:
    """Raise `UserError` unless the model returns (2, num_classes) logits for two images, in train and eval mode."""
    for training in (True, False):
        if problem := _problem(model, 2, num_classes, image_shape, training=training):
            raise UserError(f"model.name={name} fails on images of shape {(2, *image_shape)}: {problem}")


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what the body does to buffers, whether it changes them in place or assigns new tensors."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(before)


@torch.no_grad()
def _problem(model: nn.Module, num_images: int, num_classes: int, image_shape: ImageShape, *, training: bool) -> str:
    """Run the model on black images on its device and return what is wrong with its logits, "" if nothing.

    Neither the model nor the state of the random generators changes.
    """
    device = next(model.parameters()).device
    try:
        with unchanged_buffers(model), unchanged_generators(device):  # dropout uses the generator
            logits = model.train(training)(torch.zeros(num_images, *image_shape, device=device))
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        return first_line(error)
    finally:
        model.train()
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found == (num_images, num_classes):
        return ""
    return (
        f"it returns {found}{' in training' * training}, expected logits of shape (images, classes) = "
        f"{(num_images, num_classes)}"
    )
