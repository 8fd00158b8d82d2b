"""The model's parameters by name: the groups in which an optimizer updates them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ddp_cifar.config import GroupConfig, OptimConfig
from ddp_cifar.errors import UserError

SHOWN = 5  # names in an error message

Groups = list[dict[str, Any]]
"""torch's parameter groups: `params`, and the options in which a group differs from the optimizer's."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> Groups:
    """Return the parameter groups of `config`. The first one has the parameters that match no pattern, if there are any.

    Raises `UserError` if a pattern matches nothing.
    """
    left = dict(model.named_parameters())
    names = list(left)
    sections = []
    for section in config.groups:
        found = [name for name in match_names(section.match, names, "optim.groups") if name in left]
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


def match_names(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """Return the names that match `pattern`. Raises `UserError`, which shows some names, if none does."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(
            f"{key}: the pattern {pattern} matches no parameter; the model has {', '.join(names[:SHOWN])}{more}"
        )
    return found


def describe_groups(groups: Groups) -> str:
    """Describe an optimizer's groups: `4,700,000 parameters with lr 0.001, weight decay 0; ...`"""
    return "; ".join(
        f"{sum(parameter.numel() for parameter in group['params']):,} parameters with "
        + ", ".join(f"{name.replace('_', ' ')} {group[name]:g}" for name in ("lr", "weight_decay") if name in group)
        for group in groups
    )
