"""Models and optimizers that people really have: each works, or is rejected with one line before training."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import config_of, make_trainer, random_dataset
from torch import Tensor, nn

from ddp_cifar.distributed.rendezvous import open_world_alone
from ddp_cifar.errors import UserError
from ddp_cifar.run.checkpoint_file import digest
from ddp_cifar.training.trainer import Trainer

SMALL = ("device=cpu", "precision=fp32", "train.global_batch_size=16", "train.micro_batch_size=8", "train.epochs=1")


class Body(nn.Module):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images)
        return logits


class Unused(Body):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, image_size)
        self.auxiliary = nn.Linear(4, num_classes)


class Lazy(nn.Sequential):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(nn.LazyConv2d(4, 3, stride=2), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes))


class Centered(Body):
    """Assigns a new tensor to its buffer, instead of changing it in place."""

    def __init__(self, num_classes: int, image_size: int, grows: bool = False) -> None:
        super().__init__(num_classes, image_size)
        self.grows = grows
        self.register_buffer("center", torch.zeros(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        center = logits - self.center[:10]
        if self.training:
            self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)
            if self.grows:
                self.center = torch.cat([self.center, self.center])
        return center


class Fails(Body):
    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise KeyError("no such layer")
        return super().forward(images)


class NumpySGD(torch.optim.SGD):
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.param_groups[0]["trust"] = np.float32(0.001)


class NeedsClosure(torch.optim.SGD):
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("needs a closure")


class Averaging(torch.optim.SGD):
    """Evaluates the mean of all weights so far, as schedule-free optimizers do, by the same protocol."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.trains = False

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if "mean" in self.state[parameter]:
                mean = self.state[parameter]["mean"]
                kept = parameter.clone()
                parameter.copy_(mean)
                mean.copy_(kept)

    def train(self) -> None:
        if not self.trains:
            self._swap()
        self.trains = True

    def eval(self) -> None:
        if self.trains:
            self._swap()
        self.trains = False

    def step(self, closure: Any = None) -> None:
        assert self.trains, "call train() before step()"
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            mean = self.state[parameter].setdefault("mean", parameter.detach().clone())
            mean.lerp_(parameter.detach(), 0.5)


def trained(*arguments: str) -> Trainer:
    with open_world_alone() as world:
        trainer = make_trainer(world, config_of(*SMALL, *arguments), random_dataset(40))
        trainer.fit()
        return trainer


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "model.name=test_trial:Unused",
            "that its forward pass does not use: auxiliary.weight, auxiliary.bias; remove them",
        ),
        ("model.name=test_trial:Fails", "cannot train: 'no such layer' (test_trial.py:"),
        ("optim.name=test_trial:NumpySGD", "because of state['param_groups'][0]['trust'], a numpy.float32; expected"),
        ("optim.name=test_trial:NeedsClosure", "cannot make an update: needs a closure (test_trial.py:"),
    ],
)
def test_what_would_fail_in_the_first_epoch_is_rejected_before_it(argument: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        trained(argument)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_buffer_that_changes_its_shape_is_named() -> None:
    with pytest.raises(UserError, match="changes the shape or type of the buffers center"):
        trained("model.name=test_trial:Centered", "model.args.grows=true")


def test_the_trial_leaves_weights_and_random_numbers_as_they_were() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        with open_world_alone() as world:
            trainer = make_trainer(world, config_of(*SMALL, "model.name=tiny"), random_dataset(40))
            states.append((digest(dict(trainer.model.state_dict())), torch.rand(1).item()))
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert states[0] == states[1]


def test_lazy_layers_get_their_shapes() -> None:
    assert trained("model.name=test_trial:Lazy").progress.step == 3


def test_an_assigned_buffer_is_the_mean_over_micro_batches() -> None:
    """Each starts from the step's first value, so that any split of the batch gives the same."""
    one, two = (
        trained("model.name=test_trial:Centered", f"train.micro_batch_size={size}", "train.max_steps=1").model
        for size in (16, 8)
    )
    assert one.center.abs().sum() > 0
    assert two.center is two.get_buffer("center")
    assert torch.isfinite(two.center).all()
    assert two.center.abs().sum() > 0


@pytest.mark.parametrize("micro_batch_size", [16, 8])
def test_a_survivor_has_the_last_value_of_an_assigned_buffer(micro_batch_size: int) -> None:
    """Also with one micro-batch per step, whose buffers need no mean."""
    trainer = trained(
        "model.name=test_trial:Centered", f"train.micro_batch_size={micro_batch_size}", "train.max_steps=2"
    )
    center = trainer.train_step.buffers.at_last_step()["center"]
    assert center.abs().sum() > 0
    assert torch.equal(center, trainer.model.center)


def test_an_optimizer_that_averages_weights_is_told_when_it_trains_and_evaluates() -> None:
    trainer = trained("optim.name=test_trial:Averaging")
    state = trainer.state_dict()
    assert digest(state["ema"]) != digest(state["model"]), (
        "the checkpoint has both: those to evaluate, and those to train"
    )
    assert digest(dict(trainer.model.state_dict())) == digest(state["model"])
    assert trainer.train_step.optimizer.trains  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="averages the weights itself: use one of them"):
        trained("optim.name=test_trial:Averaging", "train.ema_decay=0.9")
