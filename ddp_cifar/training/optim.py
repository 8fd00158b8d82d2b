"""The optimizers, and their state in a checkpoint."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ddp_cifar.config import OptimConfig
from ddp_cifar.dynamo import without_dynamo
from ddp_cifar.errors import UserError
from ddp_cifar.registry import call, is_user_defined, resolve
from ddp_cifar.training.parameters import parameter_groups


class Kernels(NamedTuple):
    """How an optimizer computes."""

    options: Mapping[str, Any]
    """torch's options foreach, fused and capturable, each True or False."""
    precision: str
    """The run's: fp32, tf32, bf16 or fp16."""


def adam(model: nn.Module, config: OptimConfig, kernels: Kernels) -> Optimizer:
    return Adam(
        parameter_groups(model, config),
        lr=config.lr,
        weight_decay=config.weight_decay,
        **kernels.options,
        **config.args,
    )


def adamw(model: nn.Module, config: OptimConfig, kernels: Kernels) -> Optimizer:
    return AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        weight_decay=config.weight_decay,
        **kernels.options,
        **config.args,
    )


def sgd(model: nn.Module, config: OptimConfig, kernels: Kernels) -> Optimizer:
    optimizer = SGD(
        parameter_groups(model, config),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        **{name: on for name, on in kernels.options.items() if name != "capturable"},
        **config.args,
    )
    if config.momentum > 0:
        # zeros mean no momentum yet; the fused kernel would leave the buffers uninitialized if fp16 skips the first update
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_optimizer(model: nn.Module, config: OptimConfig, precision: str = "fp32") -> Optimizer:
    """Return the optimizer that `config` names, over all of the model's parameters, in the groups of `config`.

    `precision` is the run's: Muon's matrix products use it.

    A user-defined optimizer is called with the parameters, `lr`, `weight_decay` and `config.args`. It chooses its own kernels.
    Raises `UserError` if the device cannot run `config.implementation`, if the optimizer does not accept its arguments, or if
    a group has no parameters.
    """
    function = resolve("optim.name", config.name)
    if is_user_defined(config.name):
        return _build_user_defined(function, model, config)
    device = next(model.parameters()).device.type
    if config.implementation == "capturable" and device != "cuda":
        raise UserError(
            f"optim.implementation=capturable needs a GPU, found device {device}; use optim.implementation=auto"
        )
    name = "fused" if config.implementation == "auto" else config.implementation
    options = {"foreach": name == "foreach", "fused": name == "fused", "capturable": name == "capturable"}
    try:
        with without_dynamo():
            optimizer: Optimizer = function(model, config, Kernels(options, precision))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name={config.name} does not accept optim.args={config.args} ({error})") from error
    optimizer.step = without_dynamo()(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def _build_user_defined(function: Callable[..., Optimizer], model: nn.Module, config: OptimConfig) -> Optimizer:
    is_grouped = bool(config.groups) or not config.decay_norm_bias
    parameters: list[Any] = parameter_groups(model, config) if is_grouped else list(model.parameters())
    # decided by the argument's name: most optimizers accept only tensors, and a trial call would hide their errors
    if _first_argument(function) == "named_parameters":
        if is_grouped:
            raise UserError(
                f"optim.name={config.name} makes its own groups from named_parameters; remove optim.groups and "
                f"optim.decay_norm_bias, or use an optimizer whose first argument has another name"
            )
        parameters = list(model.named_parameters())
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    for name in settings.keys() & config.args.keys():
        raise UserError(f"optim.args.{name} would replace optim.{name}: set optim.{name}={config.args[name]} instead")
    arguments = settings | config.args
    try:
        optimizer = call("optim.name", config.name, function, parameters, **arguments)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        found = f"{'parameter groups with ' if is_grouped else ''}{arguments}"
        raise UserError(f"optim.name={config.name} does not accept {found} ({error})") from error
    if not isinstance(optimizer, Optimizer):
        found = type(optimizer).__name__
        raise UserError(f"optim.name={config.name} returned a {found}, expected a torch.optim.Optimizer")
    return optimizer


def _first_argument(function: Callable[..., Any]) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except ValueError:  # written in C, without a signature
        return ""


def start_training(optimizer: Optimizer) -> None:
    """Call `optimizer.train()` if there is such a method: schedule-free optimizers must be told."""
    if averages_weights(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def averages_weights(optimizer: Optimizer) -> bool:
    """True for an optimizer with `train` and `eval` methods, which evaluates other weights than those that it trains.

    The protocol of schedule-free optimizers (Defazio et al., The Road Less Scheduled, 2024).
    """
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, and store every tensor in the memory order of its parameter.

    The fused and foreach kernels assume that both have the same order. Otherwise a contiguous run would read the state of a
    channels-last run in the wrong order. Raises `UserError` if the parameter groups do not match.
    """
    own = optimizer.param_groups
    _check_groups(state["param_groups"], own)
    # this run chooses the kernels of the update; torch would use the checkpoint's choice
    switches = [{name: group[name] for name in ("foreach", "fused", "capturable") if name in group} for group in own]
    groups = [{**saved, **ours} for saved, ours in zip(state["param_groups"], switches, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_groups(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Compare sizes, and names if both sides have them. torch matches parameters only by position."""
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, own))
    unlike = [
        f"{before} instead of {name}"
        for old, new in zip(saved, own, strict=False)
        for before, name in zip(old.get("param_names", ()), new.get("param_names", ()), strict=False)
        if before != name
    ]
    if sizes != own_sizes or unlike:
        found = f"with {unlike[0]}" if sizes == own_sizes else f"of {sizes} parameters, expected {own_sizes}"
        raise UserError(
            f"the checkpoint's optimizer has parameter groups {found}; use the optimizer that wrote it, or start a new run "
            f"from its weights with model.init"
        )


def effective_lr(optimizer: Optimizer) -> float | None:
    """Return Adam's learning rate with bias correction for the first parameter group.

    It is `lr * sqrt(1 - beta2^t) / (1 - beta1^t)` (Kingma and Ba, Adam, 2015, section 2), where t is Adam's own step count,
    which the clamp limits. None before the first step and for other optimizers. Waits for the device.
    """
    counts = (state["step"] for state in optimizer.state.values() if "step" in state)  # a frozen parameter has none
    if not isinstance(optimizer, Adam) or (count := next(counts, None)) is None or (step := float(count)) < 1:
        return None
    group = optimizer.param_groups[0]
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr = float(group["lr"])
    correction: float = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return lr * correction
