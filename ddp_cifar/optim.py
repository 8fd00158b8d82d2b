"""The optimizers, the learning rate as a function of the step, and the article's clamp on Adam's step count."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ddp_cifar.config import OptimConfig
from ddp_cifar.errors import UserError
from ddp_cifar.named import call, find, is_own

Parameters = Iterable[nn.Parameter]
Implementation = dict[str, Any]
"""torch's switches foreach, fused and capturable, each True or False."""


def _adam(parameters: Parameters, config: OptimConfig, implementation: Implementation) -> Optimizer:
    return Adam(parameters, lr=config.lr, weight_decay=config.weight_decay, **implementation, **config.args)


def _adamw(parameters: Parameters, config: OptimConfig, implementation: Implementation) -> Optimizer:
    return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, **implementation, **config.args)


def _sgd(parameters: Parameters, config: OptimConfig, implementation: Implementation) -> Optimizer:
    optimizer = SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        **{name: on for name, on in implementation.items() if name != "capturable"},
        **config.args,
    )
    if config.momentum > 0:
        # the same as none yet; the fused kernel would leave them uninitialised if fp16 skips the first update
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
}
"""Name -> function of the parameters, the config and the implementation."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer that `config` names, over all of the model's parameters.

    One of the user's own is called with the parameters, `lr`, `weight_decay` and `config.args`; it sees to its kernels itself.
    Raises `UserError` if the device cannot run `config.implementation`, or if the optimizer does not take its arguments.
    """
    function = find("optim.name", config.name, OPTIMIZERS)
    if is_own(config.name):
        named = {"lr": config.lr, "weight_decay": config.weight_decay} | config.args
        try:
            optimizer = call("optim.name", config.name, function, list(model.parameters()), **named)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"optim.name={config.name} does not take {named} ({error})") from error
        if not isinstance(optimizer, Optimizer):
            found = type(optimizer).__name__
            raise UserError(f"optim.name={config.name} returned a {found}: expected a torch.optim.Optimizer")
        return optimizer
    device = next(model.parameters()).device.type
    if config.implementation == "capturable" and device != "cuda":
        raise UserError(f"optim.implementation=capturable needs a GPU, found device {device}: use auto")
    name = "fused" if config.implementation == "auto" else config.implementation
    implementation = {"foreach": name == "foreach", "fused": name == "fused", "capturable": name == "capturable"}
    try:
        return function(model.parameters(), config, implementation)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name={config.name} does not take optim.args={config.args} ({error})") from error


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, with every tensor in its parameter's own memory order.

    The fused and foreach kernels take it for granted that the two agree; a checkpoint from a channels-last run would
    be read in the wrong order by a contiguous one.
    """
    # which kernels compute the update is this run's choice; torch would take the checkpoint's
    own = optimizer.param_groups
    switches = [{name: group[name] for name in ("foreach", "fused", "capturable") if name in group} for group in own]
    groups = [{**saved, **ours} for saved, ours in zip(state["param_groups"], switches, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Literal["constant", "cosine"]) -> float:
    """The peak rate's multiplier for the update after `step` completed ones.

    Rises linearly over the first `warmup_steps` updates, the first of which already moves; then stays at 1, or falls
    along half a cosine, (1 + cos(pi t)) / 2 (Loshchilov and Hutter, SGDR, 2017), which would reach 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))) / 2


def effective_lr(optimizer: Optimizer) -> float | None:
    """Adam's rate with the correction of its averages' bias, `lr * sqrt(1 - beta2^t) / (1 - beta1^t)` (Kingma and Ba, Adam,
    2015, section 2), after t of its own steps, which the clamp holds; None before the first, and for other optimizers. Of the
    first group, where there are several.

    Waits for the device.
    """
    counts = (state["step"] for state in optimizer.state.values() if "step" in state)  # none of a frozen parameter
    if not isinstance(optimizer, Adam) or (count := next(counts, None)) is None or (step := float(count)) < 1:
        return None
    group = optimizer.param_groups[0]
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr = float(group["lr"])
    correction: float = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return lr * correction


class AdamStepClamp:
    """Holds Adam's own step count below `limit`: once it is there, it goes back to `reset_to`, while `active`.

    The article's loop does this between `backward` and `step`; here it is a hook that runs before every `step`, for any
    of torch's Adam implementations. Each count changes on the device it lives on, so that nothing waits for it, and
    since it is the optimizer's own count it stays right after a resume.
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
            # `state["step"] = 1000`, as the article has it, puts an int where torch now wants a tensor
            state["step"].masked_fill_(state["step"] >= self.limit, self.reset_to)


class Schedule:
    """Sets, before each update, what depends on the step: the learning rate, and whether the clamp acts."""

    def __init__(self, optimizer: Optimizer, config: OptimConfig, *, steps_per_epoch: int, epochs: int) -> None:
        self.optimizer = optimizer
        self.config = config
        self.total_steps = epochs * steps_per_epoch
        self.warmup_steps = round(config.warmup_epochs * steps_per_epoch)
        self.clamp_after_step = config.step_clamp.after_epoch * steps_per_epoch
        self.clamp: AdamStepClamp | None = None
        if config.step_clamp.enabled and isinstance(optimizer, Adam):  # AdamW is one
            self.clamp = AdamStepClamp(optimizer, config.step_clamp.limit, config.step_clamp.reset_to)

    def before_step(self, step: int) -> float:
        """Prepare the optimizer for the update after `step` completed ones; returns its learning rate."""
        factor = lr_factor(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, schedule=self.config.schedule
        )
        lr = self.config.lr * factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clamp:
            self.clamp.active = step >= self.clamp_after_step
        return lr
