"""The model's parameters by name: which are frozen, and the groups in which an optimizer updates the others."""

import types
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddp_cifar.command import counted
from ddp_cifar.config import GroupConfig, OptimConfig
from ddp_cifar.errors import UserError, few_of

Groups = list[dict[str, Any]]
"""torch's parameter groups: `params`, and the options in which a group differs from the optimizer's."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> str:
    """Freeze the parameters whose names match one of the patterns, and return a description, "" without patterns.

    A BatchNorm layer whose weight and bias are frozen stays in eval mode. Call it before the optimizer and DDP are built.
    Raises `UserError` if a pattern matches nothing, or if nothing is left to train.
    """
    if not patterns:
        return ""
    named = dict(model.named_parameters())
    frozen = {named[name] for pattern in patterns for name in names_matching(pattern, list(named), "model.freeze")}
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(f"model.freeze={list(patterns)} freezes all parameters; expected some to train")
    norms = 0
    for module in model.modules():
        own = set(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and own <= frozen:
            # a method of the module, which a copy of the model binds to its own
            module.train = types.MethodType(_stay_in_eval_mode, module)  # type: ignore[method-assign]
            module.eval()
            norms += 1
    count, total = (sum(parameter.numel() for parameter in some) for some in (frozen, named.values()))
    statistics = f", and the statistics of {counted(norms, 'BatchNorm layer')}" if norms else ""
    return f"frozen: {count:,} of {total:,} parameters{statistics}"


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a frozen layer."""
    return nn.Module.train(module, False)


def parameter_groups(model: nn.Module, config: OptimConfig) -> Groups:
    """Return the parameter groups of `config`. The first one has the parameters that match no pattern, if there are any.

    Raises `UserError` if a pattern matches nothing.
    """
    left = dict(model.named_parameters())
    names = list(left)
    sections = []
    for section in config.groups:
        found = [name for name in names_matching(section.match, names, "optim.groups") if name in left]
        if not found:
            raise UserError(
                f"optim.groups: earlier patterns match all parameters that {section.match} matches; move it before them"
            )
        sections.append((section, [left.pop(name) for name in found]))
    groups = []
    for section, parameters in [(GroupConfig("*"), list(left.values())), *sections]:
        options: dict[str, Any] = {}
        if section.lr_factor != 1:
            options["lr"] = config.lr * section.lr_factor
        if section.weight_decay is not None:
            options["weight_decay"] = section.weight_decay
        decays = config.decay_norm_bias or section.weight_decay is not None
        groups += [
            {"params": [each for each in parameters if decays or each.ndim > 1], **options},
            {"params": [each for each in parameters if not decays and each.ndim <= 1], **options, "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def names_matching(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """Return the names that match `pattern`. Raises `UserError`, which shows some names, if none does."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"{key}: the pattern {pattern} matches no parameter; the model has {few_of(names)}")
    return found


def describe_groups(groups: Groups) -> str:
    """Describe an optimizer's groups, without frozen parameters: `4,700,000 parameters with lr 0.001, weight decay 0; ...`"""
    return "; ".join(
        f"{sum(parameter.numel() for parameter in group['params'] if parameter.requires_grad):,} parameters with "
        + ", ".join(f"{name.replace('_', ' ')} {group[name]:g}" for name in ("lr", "weight_decay") if name in group)
        for group in groups
    )


@torch.no_grad()
def restore(tensors: Iterable[Tensor], kept: Sequence[Tensor]) -> None:
    """Copy the saved values back into the tensors."""
    for tensor, before in zip(tensors, kept, strict=True):
        tensor.copy_(before)
