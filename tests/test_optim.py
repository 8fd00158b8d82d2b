"""The rate as a function of the step, and the clamp."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.optim import Adam

from ddp_cifar.config import OptimConfig, StepClampConfig
from ddp_cifar.optim import AdamStepClamp, Schedule, build_optimizer, effective_lr, load_optimizer_state, lr_factor


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    factors = [lr_factor(step, total_steps=12, warmup_steps=4, schedule="cosine") for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_a_constant_rate_stays() -> None:
    assert {lr_factor(step, total_steps=5, warmup_steps=0, schedule="constant") for step in range(9)} == {1.0}


@pytest.mark.parametrize(
    "implementation", ["default", "foreach", "fused", pytest.param("capturable", marks=pytest.mark.gpu)]
)
def test_the_clamp_holds_adams_step_count(implementation: str) -> None:
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


def test_the_effective_rate_is_what_an_update_of_equal_gradients_moves() -> None:
    """Adam's first moments are then the gradient, the second its square: an update is the corrected rate."""
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


def test_an_optimizer_without_adams_count_has_no_effective_rate() -> None:
    frozen, free = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(1))
    free.grad = torch.ones(1)
    adam = Adam([{"params": [frozen]}, {"params": [free]}])
    adam.step()
    assert effective_lr(adam) == pytest.approx(1e-3 * math.sqrt(1 - 0.999) / (1 - 0.9), rel=1e-3)
    adam.state[free]["step"].fill_(0)  # as after a first update that fp16 left out
    assert effective_lr(adam) is None
    sgd = torch.optim.SGD([{"params": []}, {"params": [free]}], lr=1.0)
    sgd.step()
    assert effective_lr(sgd) is None


def test_the_clamp_is_right_after_a_resume() -> None:
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


def test_a_resume_keeps_this_runs_implementation() -> None:
    model = nn.Linear(2, 2)
    saved = build_optimizer(model, OptimConfig(implementation="fused")).state_dict()
    optimizer = build_optimizer(model, OptimConfig(implementation="foreach"))
    load_optimizer_state(optimizer, saved)
    assert (optimizer.param_groups[0]["foreach"], optimizer.param_groups[0]["fused"]) == (True, False)


def test_the_schedule_turns_epochs_into_steps() -> None:
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
