"""The first layer that is not finite is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import config_of, make_trainer
from test_survival import SMALL, small_data
from torch import Tensor, nn

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import RunError
from ddp_cifar.log import log
from ddp_cifar.training.trainer import Trainer


class Spoiled(torch.autograd.Function):
    """Changes nothing in the forward pass. In the backward pass, the gradient is infinite."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("inf")


class Net(nn.Module):
    """A network with BatchNorm and dropout, and a place for faults between its layers."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )
        self.last = nn.Linear(4 * image_size**2, num_classes)
        self.between: Callable[[Tensor], Tensor] = lambda values: values

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.between(self.first(images)).flatten(1))
        return logits


def trainer_of(world: World, *arguments: str) -> Trainer:
    trainer = make_trainer(world, config_of(*SMALL, "model.name=test_nonfinite:Net", *arguments), small_data())
    assert isinstance(trainer.model, Net)
    return trainer


def spoil_input(trainer: Trainer) -> None:
    trainer.model.between = lambda values: values / 0


def spoil_gradient(trainer: Trainer) -> None:
    trainer.model.between = Spoiled.apply


def spoil_weight(trainer: Trainer) -> None:
    trainer.model.last.weight.data[0, 0] = float("inf")


def spoil_layer(trainer: Trainer) -> None:
    trainer.model.first[1].register_forward_hook(
        lambda *arguments: arguments[-1].log() if trainer.model.training else None
    )


class SpoiledLayer(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        spoiled: Tensor = Spoiled.apply(values)
        return spoiled


def spoil_gradient_of_a_layer(trainer: Trainer) -> None:
    trainer.model.first[3] = SpoiledLayer()


def enlarge_gradient(trainer: Trainer) -> None:
    trainer.model.between = lambda values: values * 1e30


def fail_in_the_second_pass(trainer: Trainer) -> None:
    passes = iter([float("nan")] * trainer.plan.num_micro_batches)

    def between(values: Tensor) -> Tensor:
        return values * next(passes)

    trainer.model.between = between


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_gradient_of_a_layer, "of a gradient from layer first.3 (SpoiledLayer) are not finite"),
        (enlarge_gradient, "its values are finite, but too large for their norm"),
        (fail_in_the_second_pass, "the second pass over the same images failed (RuntimeError"),
        (
            spoil_layer,
            "of the output of layer first.1 (BatchNorm2d) are not finite, although its input is, in micro-batch 1",
        ),
        (spoil_input, "the input of layer last (Linear) is not finite, but the outputs of all layers before it are"),
        (spoil_weight, "the weights of layer last (Linear) are not finite"),
        (
            spoil_gradient,
            "the gradient that reaches layer first.3 (Dropout) is not finite, but no layer after it is named",
        ),
    ],
)
def test_the_layer_is_named(alone: World, spoil: Callable[[Trainer], None], named: str) -> None:
    trainer = trainer_of(alone)
    spoil(trainer)
    with pytest.raises(RunError) as error:
        trainer.fit()
    assert str(error.value).startswith("the gradient of step 1 is not finite")
    assert named in str(error.value)


def test_the_second_pass_is_bitwise_the_same_and_a_fault_that_does_not_repeat_is_named(alone: World) -> None:
    """With dropout and BatchNorm. The fault is in the logits of the first pass of step 3 only."""
    trainer = trainer_of(alone, "train.on_nonfinite=skip")
    seen: list[Tensor] = []

    def between(values: Tensor) -> Tensor:
        if trainer.progress.step != 2 or not trainer.model.training:
            return values
        seen.append(values.detach().clone())
        return values / 0 if len(seen) == 1 else values

    trainer.model.between = between
    warnings: list[str] = []
    watch = lambda record: warnings.append(record.getMessage())  # noqa: E731
    log.addFilter(watch)  # type: ignore[arg-type]
    try:
        trainer.fit()
    finally:
        log.removeFilter(watch)  # type: ignore[arg-type]
    passes = trainer.plan.num_micro_batches
    assert len(seen) == 2 * passes
    for first, second in zip(seen[:passes], seen[passes:], strict=True):
        assert first.equal(second)
    assert any(
        "a second pass over the same images is finite; comm.hook, train.compile or a faulty device may be the cause; skipping"
        in text
        for text in warnings
    )
