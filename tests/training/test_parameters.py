"""Frozen parameters. The groups of an optimizer are in test_optim.py."""

import copy

import pytest
import torch
from helpers import config_of, make_trainer, random_dataset
from torch import nn

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.training.parameters import freeze


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_parameters_are_frozen_by_patterns_and_norm_layers_with_all_of_them_stay_in_eval_mode() -> None:
    model = network()
    assert freeze(model, ["[01].*", "2.bias"]) == (
        "frozen: 124 of 138 parameters, and the statistics of 1 BatchNorm layer"
    )
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["2.weight", "4.weight", "4.bias"]
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.eval()
        each.train()
        assert [module.training for module in each] == [True, False, True, True, True]
    twin(torch.randn(2, 3, 3, 3))
    assert twin[1].running_mean.abs().sum() == 0
    assert twin[2].running_mean.abs().sum() > 0
    assert model[2].running_mean.abs().sum() == 0


def test_without_patterns_nothing_is_frozen() -> None:
    model = network()
    assert freeze(model, []) == ""
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (
            ["1.*", "conv.*"],
            "model.freeze: the pattern conv.* matches no parameter; the model has 0.weight, 0.bias, 1.",
        ),
        (["*.weight", "*.bias"], "model.freeze=['*.weight', '*.bias'] freezes all parameters; expected some to train"),
    ],
)
def test_a_mistake_in_the_patterns_gives_one_line(patterns: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        freeze(network(), patterns)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_does_not_change_frozen_layers_and_their_averages(alone: World, optimizer: str) -> None:
    """The layers are a convolution and a BatchNorm; weight decay does not change them either."""
    sizes = ("model.name=tiny", "train.global_batch_size=16", "train.micro_batch_size=8", "train.epochs=1")
    rest = (f"optim.name={optimizer}", "optim.weight_decay=0.1", "train.ema_decay=0.9", "train.clip_norm=1")
    trainer = make_trainer(alone, config_of(*sizes, *rest, "model.freeze=[0.*, 1.*]"), random_dataset(32))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.fit()
    for state in (trainer.model.state_dict(), trainer.train_step.eval_model.state_dict()):
        same = [name for name in state if torch.equal(state[name], before[name])]
        assert same == [name for name in state if name.startswith(("0.", "1."))]
