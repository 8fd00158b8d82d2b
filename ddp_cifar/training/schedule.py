"""The learning rate as a function of the step, and the clamp on Adam's step count.

A schedule is a function of (step, total_steps) that returns a factor on the peak learning rate, for the update after `step`
completed ones. Both are counted from the end of the warm-up.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.optim import Adam, Optimizer

from ddp_cifar.config import OptimConfig
from ddp_cifar.errors import UserError, user_code
from ddp_cifar.registry import resolve


def constant(step: int, total_steps: int) -> float:
    return 1.0


def cosine(step: int, total_steps: int) -> float:
    """Half a cosine, (1 + cos(pi t)) / 2, from 1 to 0 (Loshchilov and Hutter, SGDR, 2017)."""
    return (1 + math.cos(math.pi * step / max(1, total_steps))) / 2


def multistep(step: int, total_steps: int, *, milestones: Sequence[int], gamma: float) -> float:
    """`gamma` to the power of the number of `milestones` (steps, in order) that are completed."""
    return gamma ** bisect_right(milestones, step)


def polynomial(step: int, total_steps: int, *, power: float) -> float:
    """(1 - t)^power, from 1 to 0."""
    factor: float = max(0.0, 1 - step / max(1, total_steps)) ** power
    return factor


class AdamStepClamp:
    """Keeps Adam's own step count below `limit` while `active`: a count that reaches the limit is reset to `reset_to`.

    The original script does this between `backward` and `step`. This hook runs before every `step`, and works with all of
    torch's Adam implementations. Each count changes on its device, so nothing waits. The count is part of the optimizer's
    state, so it is correct after a resume.
    """

    def __init__(self, optimizer: Optimizer, limit: int, reset_to: int) -> None:
        self.limit = limit
        self.reset_to = reset_to
        self.active = False
        optimizer.register_step_pre_hook(self._clamp)

    def _clamp(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.active:
            return
        for state in optimizer.state.values():
            # the original script assigns an int, `state["step"] = 1000`; torch now requires a tensor
            state["step"].masked_fill_(state["step"] >= self.limit, self.reset_to)


class Schedule:
    """Sets the learning rates, and activates the clamp, before each update.

    The schedule multiplies the initial learning rate of each parameter group. It reads the initial rates when it is built, so
    build it before the optimizer loads a checkpoint: a checkpoint has the `lr` of the step at which it was saved.
    """

    def __init__(self, optimizer: Optimizer, config: OptimConfig, *, steps_per_epoch: int, epochs: int) -> None:
        self.optimizer = optimizer
        self.config = config
        # torch's schedulers store it in `initial_lr`; stored here, as checkpoints of built-in optimizers lack that key
        self.initial_lrs = [
            float(group.get("initial_lr", group.get("lr", config.lr))) for group in optimizer.param_groups
        ]
        self.total_steps = epochs * steps_per_epoch
        self.warmup_steps = round(config.warmup_epochs * steps_per_epoch)
        milestones = [epoch * steps_per_epoch - self.warmup_steps for epoch in config.milestones]
        options: dict[str, dict[str, Any]] = {
            "multistep": {"milestones": milestones, "gamma": config.gamma},
            "polynomial": {"power": config.power},
        }
        function = resolve("optim.schedule", config.schedule)
        self.function = functools.partial(function, **options.get(config.schedule, {}))
        last = self.total_steps - 1
        for step in (min(self.warmup_steps, last), last):  # a user-defined function that fails should fail here
            self.factor(step)
        self.clamp_after_step = config.step_clamp.after_epoch * steps_per_epoch
        self.clamp: AdamStepClamp | None = None
        if config.step_clamp.enabled and isinstance(optimizer, Adam):  # AdamW inherits from Adam
            self.clamp = AdamStepClamp(optimizer, config.step_clamp.limit, config.step_clamp.reset_to)

    def before_step(self, step: int) -> float:
        """Prepare the optimizer for the update after `step` completed ones; return the first group's learning rate."""
        factor = self.factor(step)
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * factor
        if self.clamp:
            self.clamp.active = step >= self.clamp_after_step
        return self.initial_lrs[0] * factor

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate for the update after `step` completed ones.

        It rises linearly over the first `warmup_steps` updates, from 1 / `warmup_steps`; then it follows the schedule. Raises
        `UserError` if a user-defined schedule fails.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        step, total_steps = step - self.warmup_steps, self.total_steps - self.warmup_steps
        called = f"optim.schedule={self.config.schedule}, called with ({step}, {total_steps}),"
        with user_code(f"{called} failed", "expected a function of (step, total_steps) that returns a number"):
            factor = float(self.function(step, total_steps))
        if not 0 <= factor < math.inf:
            raise UserError(f"{called} returned {factor}; expected a finite number, 0 or more")
        return factor
