"""The learning rate as a function of the step, and the clamp."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from ddp_cifar.config import OptimConfig, StepClampConfig
from ddp_cifar.training.optim import build_optimizer
from ddp_cifar.training.schedule import AdamStepClamp, Schedule, lr_factor


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    factors = [lr_factor(step, total_steps=12, warmup_steps=4, schedule="cosine") for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_a_constant_learning_rate_does_not_change() -> None:
    assert {lr_factor(step, total_steps=5, warmup_steps=0, schedule="constant") for step in range(9)} == {1.0}


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
