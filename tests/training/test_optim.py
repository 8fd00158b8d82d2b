"""The optimizers, their parameter groups, and their state in a checkpoint."""

import copy
import math
import re
import sys
import types
from typing import Any

import pytest
import torch
from helpers import config_of
from launched import CHECKOUT
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ddp_cifar.config import OptimConfig
from ddp_cifar.errors import UserError
from ddp_cifar.run.checkpoint_file import digest
from ddp_cifar.training.optim import build_optimizer, effective_lr, load_optimizer_state
from ddp_cifar.training.schedule import Schedule


def test_the_effective_learning_rate_is_the_size_of_an_update_with_equal_gradients() -> None:
    """With equal gradients, Adam's corrected moments are the gradient and its square, and cancel out."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([parameter], lr=0.25, eps=0.0)
    assert effective_lr(optimizer) is None
    for step in (1, 2, 3):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[parameter]
        moved = (
            0.25 * float(state["exp_avg"] / (1 - 0.9**step)) / float((state["exp_avg_sq"] / (1 - 0.999**step)).sqrt())
        )
        assert moved == pytest.approx(0.25)
        raw = float(state["exp_avg"] / state["exp_avg_sq"].sqrt())
        assert effective_lr(optimizer) * raw == pytest.approx(moved)
    state["step"].fill_(1000)
    assert effective_lr(optimizer) == pytest.approx(0.25 * 0.795, rel=1e-3)


def test_an_optimizer_without_adams_step_count_has_no_effective_learning_rate() -> None:
    frozen, free = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(1))
    free.grad = torch.ones(1)
    adam = Adam([{"params": [frozen]}, {"params": [free]}])
    adam.step()
    assert effective_lr(adam) == pytest.approx(1e-3 * math.sqrt(1 - 0.999) / (1 - 0.9), rel=1e-3)
    adam.state[free]["step"].fill_(0)  # as after a first update that the fp16 scaler skipped
    assert effective_lr(adam) is None
    sgd = torch.optim.SGD([{"params": []}, {"params": [free]}], lr=1.0)
    sgd.step()
    assert effective_lr(sgd) is None


def test_a_resume_keeps_this_runs_implementation() -> None:
    model = nn.Linear(2, 2)
    saved = build_optimizer(model, OptimConfig(implementation="fused")).state_dict()
    optimizer = build_optimizer(model, OptimConfig(implementation="foreach"))
    load_optimizer_state(optimizer, saved)
    assert (optimizer.param_groups[0]["foreach"], optimizer.param_groups[0]["fused"]) == (True, False)


def decay_matrices_only(named_parameters: Any, lr: float, weight_decay: float, bias_lr: float = 1.0) -> Optimizer:
    """A user-defined optimizer that finds the biases by name, and gives them a different learning rate."""
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {False: [], True: []}
    for name, parameter in named_parameters:
        groups[name.endswith("bias")].append((name, parameter))
    return AdamW(
        [
            {"params": groups[False], "weight_decay": weight_decay},
            {"params": groups[True], "weight_decay": 0.0, "lr": bias_lr},
        ],
        lr=lr,
    )


class TensorsOnly(SGD):
    """An optimizer that fails on (name, parameter) pairs, as those of many packages do."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__([parameter for parameter in params if parameter.requires_grad], lr, weight_decay=weight_decay)


GROUPED = OptimConfig(
    name="test_optim:decay_matrices_only", lr=0.5, weight_decay=0.1, warmup_epochs=1.0, args={"bias_lr": 0.125}
)


def train(model: nn.Module, optimizer: Optimizer, schedule: Schedule, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        schedule.before_step(step)
        optimizer.step()


def built(config: OptimConfig) -> tuple[nn.Module, Optimizer, Schedule]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = build_optimizer(model, config)
    return model, optimizer, Schedule(optimizer, config, steps_per_epoch=4, epochs=2)


def test_a_user_defined_optimizer_can_group_parameters_by_name_and_each_group_keeps_its_learning_rate() -> None:
    _, optimizer, schedule = built(GROUPED)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "1.weight"],
        ["0.bias", "1.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for step, factor in ((0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0)):
        assert schedule.before_step(step) == 0.5 * factor
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.125 * factor]


def test_the_documented_example_makes_two_groups() -> None:
    page = (CHECKOUT / "docs" / "extending.md").read_text()
    example = re.search(r"```python\n(def decay_matrices.*?)```", page, re.DOTALL)
    assert example
    module = types.ModuleType("mine")
    exec("import torch\n" + example[1], vars(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mine", module)
        _, optimizer, _ = built(OptimConfig(name="mine:decay_matrices", lr=0.5, weight_decay=0.1))
    groups = [(group["param_names"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(["0.weight", "1.weight"], 0.5, 0.1), (["0.bias", "1.bias"], 1e-4, 0.0)]


@pytest.mark.parametrize("drop_names", [False, True], ids=["with names", "written before parameters had names"])
def test_a_resume_keeps_the_learning_rate_of_each_group(drop_names: bool) -> None:
    model, optimizer, schedule = built(GROUPED)
    train(model, optimizer, schedule, range(2))  # stops during the warm-up
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    if drop_names:
        for group in saved[1]["param_groups"]:
            del group["param_names"]
    again, resumed, resumed_schedule = built(GROUPED)
    again.load_state_dict(saved[0])
    load_optimizer_state(resumed, saved[1])
    assert [group["lr"] for group in resumed.param_groups] == [0.25, 0.0625], "the checkpoint's"
    train(model, optimizer, schedule, range(2, 8))
    train(again, resumed, resumed_schedule, range(2, 8))
    assert digest(optimizer.state_dict()["state"]) == digest(resumed.state_dict()["state"])
    assert optimizer.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]
    assert digest(dict(model.state_dict())) == digest(dict(again.state_dict()))


def test_a_checkpoint_with_different_parameter_groups_is_rejected() -> None:
    model, optimizer, _ = built(GROUPED)
    saved = build_optimizer(model, OptimConfig(name="adamw")).state_dict()
    with pytest.raises(
        UserError, match=r"groups of \[4\] parameters, expected \[2, 2\]; use the optimizer that wrote it"
    ):
        load_optimizer_state(optimizer, saved)
    swapped = optimizer.state_dict()
    swapped["param_groups"].reverse()
    with pytest.raises(UserError, match=r"groups with 0\.bias instead of 0\.weight"):
        load_optimizer_state(optimizer, swapped)


@pytest.mark.parametrize("name", ["test_optim:TensorsOnly", "torch.optim:SGD", "torch.optim:Muon"])
def test_an_optimizer_without_an_argument_named_parameters_gets_tensors(name: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    (group,) = build_optimizer(model, OptimConfig(name=name, lr=0.5, weight_decay=0.1)).param_groups
    assert (group["params"], group["lr"], group["weight_decay"]) == ([model.weight], 0.5, 0.1)
    assert "param_names" not in group


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_checkpoint_format_of_built_in_optimizers_does_not_change(name: str) -> None:
    model, optimizer, schedule = built(OptimConfig(name=name, lr=0.5))
    expected = build_optimizer(model, OptimConfig(name=name, lr=0.5)).state_dict()["param_groups"][0].keys()
    train(model, optimizer, schedule, range(1))
    (group,) = optimizer.state_dict()["param_groups"]
    assert group.keys() == expected
    assert not {"param_names", "initial_lr"} & group.keys()


def grouped(*arguments: str) -> list[tuple[list[str], float, float]]:
    """The names, learning rate and weight decay of each group of a small network's optimizer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config_of("optim.lr=0.5", "optim.weight_decay=0.25", *arguments).optim)
    return [
        ([names[id(parameter)] for parameter in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


BIASES = 'optim.groups=[{match: "0.*", lr_factor: 0.5}, {match: "*.bias", weight_decay: 0}]'


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "torch.optim:RMSprop"])
def test_parameters_are_grouped_by_the_first_pattern_that_matches(name: str) -> None:
    assert grouped(f"optim.name={name}", BIASES) == [
        (["1.weight", "3.weight"], 0.5, 0.25),
        (["0.weight", "0.bias"], 0.25, 0.25),
        (["1.bias", "3.bias"], 0.5, 0.0),
    ]


def test_norm_layers_and_biases_can_be_exempt_from_weight_decay() -> None:
    exempt = "optim.decay_norm_bias=false"
    assert grouped(exempt) == [
        (["0.weight", "3.weight"], 0.5, 0.25),
        (["0.bias", "1.weight", "1.bias", "3.bias"], 0.5, 0.0),
    ]
    sections = 'optim.groups=[{match: "0.*", lr_factor: 0.5}, {match: "1.*", weight_decay: 0.125}]'
    assert grouped(exempt, sections) == [
        (["3.weight"], 0.5, 0.25),
        (["3.bias"], 0.5, 0.0),
        (["0.weight"], 0.25, 0.25),
        (["0.bias"], 0.25, 0.0),
        (["1.weight", "1.bias"], 0.5, 0.125),
    ]


def test_each_group_keeps_its_factor_under_the_schedule_also_after_a_resume() -> None:
    config = config_of("optim.name=sgd", "optim.lr=0.5", BIASES).optim
    model, optimizer, schedule = built(config)
    assert schedule.before_step(1) == 0.25, "the learning rate of the parameters without a section, at half the warm-up"
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125, 0.25]
    train(model, optimizer, schedule, range(2))
    again, resumed, resumed_schedule = built(config)
    again.load_state_dict(model.state_dict())
    load_optimizer_state(resumed, copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, schedule, range(2, 8))
    train(again, resumed, resumed_schedule, range(2, 8))
    assert digest(optimizer.state_dict()["state"]) == digest(resumed.state_dict()["state"])
    assert digest(dict(model.state_dict())) == digest(dict(again.state_dict()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ['optim.groups=[{match: "conv.*"}]'],
            "optim.groups: the pattern conv.* matches no parameter; the model has 0.",
        ),
        (
            ['optim.groups=[{match: "*"}, {match: "0.*"}]'],
            "earlier patterns match all parameters that 0.* matches; move",
        ),
        (
            ["optim.groups=[{match: a, lr: 1}]"],
            "expected [{match: str, lr_factor: float, weight_decay: float or null}, ..",
        ),
        (["optim.groups=[{match: a, lr_factor: fast}]"], "has the wrong type: expected [{match: str, "),
        (["optim.groups=[a]"], "optim.groups=['a'] has the wrong type: expected [{match: str, "),
        (["optim.groups=a"], "optim.groups=a has the wrong type: expected [{match: str, "),
        (
            ["optim.groups=[{lr_factor: 1}]"],
            "optim.groups.match='' is out of range: expected a pattern of parameter names",
        ),
        (
            ["optim.groups=[{match: a, lr_factor: 0}]"],
            "optim.groups.lr_factor=0.0 is out of range: expected a number above",
        ),
        (
            ["optim.groups=[{match: a, weight_decay: -1}]"],
            "optim.groups.weight_decay=-1.0 is out of range: expected 0 or",
        ),
        (
            ["optim.name=test_optim:decay_matrices_only", "optim.decay_norm_bias=false"],
            "makes its own groups from named_parameters; remove optim.groups and optim.decay_norm_bias",
        ),
        (
            ["optim.name=test_optim:TensorsOnly", BIASES],
            "TensorsOnly does not accept parameter groups with {'lr': 0.5, 'weight_decay': 0.25} ('dict' object has no",
        ),
        (
            ["optim.name=torch.optim:SGD", "optim.args.lr=0.1"],
            "optim.args.lr would replace optim.lr: set optim.lr=0.1 instead",
        ),
    ],
)
def test_a_mistake_in_the_settings_gives_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        grouped(*arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
