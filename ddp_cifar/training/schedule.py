"""The learning rate as a function of the step, and the clamp on Adam's step count."""

import math
from typing import Any, Literal

from torch.optim import Adam, Optimizer

from ddp_cifar.config import OptimConfig


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Literal["constant", "cosine"]) -> float:
    """Return the factor on the peak learning rate for the update after `step` completed ones.

    The factor rises linearly over the first `warmup_steps` updates, from 1 / `warmup_steps`. Then it stays at 1, or falls
    along half a cosine, (1 + cos(pi t)) / 2, to 0 at `total_steps` (Loshchilov and Hutter, SGDR, 2017).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))) / 2


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
        self.clamp_after_step = config.step_clamp.after_epoch * steps_per_epoch
        self.clamp: AdamStepClamp | None = None
        if config.step_clamp.enabled and isinstance(optimizer, Adam):  # AdamW inherits from Adam
            self.clamp = AdamStepClamp(optimizer, config.step_clamp.limit, config.step_clamp.reset_to)

    def before_step(self, step: int) -> float:
        """Prepare the optimizer for the update after `step` completed ones; return the first group's learning rate."""
        factor = lr_factor(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, schedule=self.config.schedule
        )
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * factor
        if self.clamp:
            self.clamp.active = step >= self.clamp_after_step
        return self.initial_lrs[0] * factor
