"""A trial of the model and the optimizer before training: one update, and a checkpoint written and read back.

User-defined code that would fail in the first epoch fails here, with one line. The model and the random generators are left as
they were.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ddp_cifar.config import Config
from ddp_cifar.data.augment import build_function, soft_labels
from ddp_cifar.errors import SHOWN, UserError, few_of, first_line, user_code
from ddp_cifar.models import unchanged_buffers
from ddp_cifar.seeding import unchanged_generators
from ddp_cifar.training.fingerprint import fingerprint
from ddp_cifar.training.loss import TrainingLoss
from ddp_cifar.training.optim import build_optimizer, start_training
from ddp_cifar.training.parameters import restore
from ddp_cifar.training.precision import autocast

NUM_IMAGES = 2


def try_training(
    model: nn.Module, config: Config, num_classes: int, image_shape: Sequence[int], precision: str
) -> None:
    """Train on random images for a step, on the model's device, then undo it. Raises `UserError` if anything fails.

    Every rank must call it, as a model may exchange values between ranks in its forward pass.
    """
    device = next(model.parameters()).device
    with unchanged_generators(device), _restored(model):
        torch.manual_seed(0)
        images = torch.randn(NUM_IMAGES, *image_shape).to(device)
        labels = torch.arange(NUM_IMAGES, device=device) % num_classes
        if (function := build_function(config.augment)) is not None:
            function(torch.randint(256, images.shape, dtype=torch.uint8).to(device))
        optimizer = build_optimizer(model, config.optim, precision)
        start_training(optimizer)
        buffers = {name: (buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()}
        with user_code(f"model.name={config.model.name} cannot train"), autocast(precision, device):
            logits = model.train()(images)
        soft = " on soft labels (mixup or cutmix)" * config.augment.mixes
        with user_code(f"train.loss={config.train.loss} fails{soft}"):
            losses = _losses(config, logits.float(), labels)
        with user_code(f"model.name={config.model.name} cannot train"):
            losses.mean().backward()
        _check_gradients(model, config.model.name)
        _check_buffers(model, config.model.name, buffers)
        with user_code(f"optim.name={config.optim.name} cannot make an update"):
            optimizer.step()
        _check_checkpoint(model, optimizer, config)
        with user_code(f"model.name={config.model.name}: its weights have no fingerprint"):
            fingerprint(model)


def _losses(config: Config, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the (B,) losses of the training loss, with soft labels if the run has them."""
    targets = labels
    if config.augment.mixes:
        targets = soft_labels(labels, 0.5, logits.shape[1])
    losses = TrainingLoss(config.train, weights=None)(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != labels.shape or not losses.is_floating_point():
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise UserError(
            f"train.loss={config.train.loss} returned {found} for {len(labels)} images: expected a loss per image, "
            f"({len(labels)},); use reduction='none'"
        )
    return losses


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put weights, buffers and gradients back to what they were."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with unchanged_buffers(model):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            restore(model.parameters(), kept)


def _check_gradients(model: nn.Module, name: str) -> None:
    """DistributedDataParallel would wait for the gradients of parameters that a forward pass does not use."""
    unused = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if unused:
        raise UserError(
            f"model.name={name} has parameters that its forward pass does not use: {few_of(unused)}; remove them, or set "
            f"requires_grad=False"
        )


def _check_buffers(model: nn.Module, name: str, before: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    after = {key: (buffer.shape, buffer.dtype) for key, buffer in model.named_buffers()}
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if changed:
        raise UserError(
            f"model.name={name}: a forward pass changes the shape or type of the buffers {few_of(sorted(changed))}; expected "
            f"buffers that keep them"
        )


def _check_checkpoint(model: nn.Module, optimizer: Optimizer, config: Config) -> None:
    """Raise `UserError` if a checkpoint of this state could not be read back. Tensors are saved empty: only types matter."""
    for key, name, state in (
        ("model.name", config.model.name, model.state_dict()),
        ("optim.name", config.optim.name, optimizer.state_dict()),
    ):
        with user_code(f"{key}={name}: its state cannot be saved"):
            empty = tree_map_only(Tensor, lambda tensor: tensor.new_empty(0), state)
            torch.save(empty, buffer := io.BytesIO())
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except Exception as error:  # torch raises many types
            found = "; ".join(_foreign(state)) or first_line(error)
            raise UserError(
                f"{key}={name}: a checkpoint of its state could not be read back, because of {found}; expected tensors, "
                f"numbers, strings, lists and dicts"
            ) from error


def _foreign(value: Any, path: str = "state") -> list[str]:
    """Paths and types of values that are not plain: `state['param_groups'][0]['trust'], a numpy.float32`."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes) or isinstance(value, Tensor):
        return []
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _foreign(item, f"{path}[{key!r}]")][:SHOWN]
    if isinstance(value, list | tuple | set):
        return [line for place, item in enumerate(value) for line in _foreign(item, f"{path}[{place}]")][:SHOWN]
    return [f"{path}, a {type(value).__module__}.{type(value).__name__}"]
