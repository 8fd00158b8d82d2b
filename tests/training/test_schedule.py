"""The learning rate as a function of the step, and the clamp."""

import copy
import io

import pytest
import torch
from helpers import config_of
from torch import nn
from torch.optim import SGD, Adam

from ddp_cifar.config import OptimConfig, StepClampConfig
from ddp_cifar.errors import UserError
from ddp_cifar.training.optim import build_optimizer
from ddp_cifar.training.schedule import AdamStepClamp, Schedule


def factors(*arguments: str, epochs: int = 12) -> list[float]:
    """The factors of a run with one step per epoch; the last one is that of the run's end."""
    config = config_of(*arguments).optim
    schedule = Schedule(build_optimizer(nn.Linear(2, 2), config), config, steps_per_epoch=1, epochs=epochs)
    return [schedule.factor(step) for step in range(epochs + 1)]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    found = factors("optim.warmup_epochs=4")
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5)
    assert found[12] == pytest.approx(0.0)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_a_constant_learning_rate_does_not_change() -> None:
    assert set(factors("optim.schedule=constant", "optim.warmup_epochs=0")) == {1.0}


def test_multistep_multiplies_the_learning_rate_after_each_milestone() -> None:
    """An epoch of ten steps, in a run with half an epoch of warm-up."""
    config = config_of(
        "optim.schedule=multistep", "optim.milestones=[2, 3]", "optim.gamma=0.5", "optim.warmup_epochs=0.5"
    ).optim
    schedule = Schedule(build_optimizer(nn.Linear(2, 2), config), config, steps_per_epoch=10, epochs=4)
    assert [schedule.factor(step) for step in (4, 5, 19, 20, 29, 30, 39)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_polynomial_decays_to_zero() -> None:
    linear = ("optim.schedule=polynomial", "optim.warmup_epochs=2")
    assert factors(*linear, epochs=6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(*linear, "optim.power=2", epochs=6) == [0.5, 1.0, 1.0, 0.5625, 0.25, 0.0625, 0.0]


def triangle(step: int, total_steps: int) -> float:
    return 1 - abs(2 * step / total_steps - 1)


def negative(step: int, total_steps: int) -> float:
    return -1.0


def without_steps() -> float:
    return 1.0


def test_a_user_defined_schedule_is_a_function_of_the_steps_after_the_warm_up() -> None:
    arguments = ("optim.schedule=test_schedule:triangle", "optim.warmup_epochs=2")
    assert factors(*arguments, epochs=6) == [0.5, 1.0, 0.0, 0.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["optim.schedule=linear"],
            "optim.schedule=linear is unknown: expected constant, cosine, multistep, polynomial, or",
        ),
        (
            ["optim.schedule=multistep"],
            "optim.milestones=[] does not fit optim.schedule=multistep: expected [EPOCH, ...]",
        ),
        (
            ["optim.milestones=[3]"],
            "optim.milestones=[3] does not fit optim.schedule=cosine: expected [EPOCH, ...] with",
        ),
        (
            ["optim.schedule=multistep", "optim.milestones=[4, 2]"],
            "optim.milestones=[4, 2] is out of range: expected numbers of epochs from 1 in increasing order",
        ),
        (["optim.schedule=multistep", "optim.milestones=[0, 2]"], "optim.milestones=[0, 2] is out of range"),
        (["optim.milestones=[1.5]"], "optim.milestones=[1.5] has the wrong type: expected [int, ...]"),
        (["optim.gamma=1"], "optim.gamma=1.0 is out of range: expected a number above 0 and below 1"),
        (["optim.power=0"], "optim.power=0.0 is out of range: expected a number above 0"),
        (["optim.schedule=test_schedule:trangle"], "has no trangle; did you mean triangle?"),
        (
            ["optim.schedule=test_schedule:without_steps"],
            "optim.schedule=test_schedule:without_steps, called with (0, 11), failed: without_steps() takes 0 positional",
        ),
        (
            ["optim.schedule=test_schedule:negative"],
            "called with (0, 11), returned -1.0; expected a finite number, 0 or",
        ),
    ],
)
def test_a_mistake_in_the_schedule_gives_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        factors(*arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "implementation", ["default", "foreach", "fused", pytest.param("capturable", marks=pytest.mark.gpu)]
)
def test_the_clamp_limits_adams_step_count(implementation: str) -> None:
    device = "cuda" if implementation == "capturable" else "cpu"
    model = nn.Linear(2, 2, device=device)
    optimizer = build_optimizer(model, OptimConfig(implementation=implementation))  # type: ignore[arg-type]
    clamp = AdamStepClamp(optimizer, limit=5, reset_to=3)

    def step() -> float:
        model(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
        counts = {float(state["step"]) for state in optimizer.state.values()}
        assert len(counts) == 1
        return counts.pop()

    assert [step() for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7], "not active"
    clamp.active = True
    assert [step() for _ in range(6)] == [4, 5, 4, 5, 4, 5]


def test_the_clamp_is_correct_after_a_resume() -> None:
    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = build_optimizer(model, OptimConfig())
        AdamStepClamp(optimizer, limit=5, reset_to=3).active = True
        return model, optimizer

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    for _ in range(4):
        step(model, optimizer)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    again, resumed = build()
    weights, state = torch.load(saved)
    again.load_state_dict(weights)
    resumed.load_state_dict(copy.deepcopy(state))
    for _ in range(5):
        step(model, optimizer)
        step(again, resumed)
    assert torch.equal(model.weight, again.weight)


def test_the_schedule_converts_epochs_to_steps() -> None:
    config = OptimConfig(
        lr=2.0, schedule="constant", warmup_epochs=0.5, step_clamp=StepClampConfig(after_epoch=3, limit=5, reset_to=3)
    )
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = Schedule(optimizer, config, steps_per_epoch=10, epochs=4)
    assert [schedule.before_step(step) for step in (0, 4, 5, 39)] == [0.4, 2.0, 2.0, 2.0]
    assert optimizer.param_groups[0]["lr"] == 2.0
    assert isinstance(optimizer, Adam)
    assert schedule.clamp is not None
    active = []
    for step in (29, 30):
        schedule.before_step(step)
        active.append(schedule.clamp.active)
    assert active == [False, True]


def test_sgd_has_no_clamp() -> None:
    config = OptimConfig(name="sgd")
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert Schedule(optimizer, config, steps_per_epoch=1, epochs=1).clamp is None


def test_the_initial_learning_rate_is_read_through_an_attached_torch_scheduler() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.05
    config = OptimConfig(schedule="constant")
    assert Schedule(optimizer, config, steps_per_epoch=1, epochs=1).before_step(0) == 0.5
