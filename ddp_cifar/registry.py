"""Resolve a name in the config: a built-in, or a user-defined `package.module:function`.

Built-ins are imported on use, so that neither this table nor the check of a name imports torch.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ddp_cifar.errors import UserError, did_you_mean

T = TypeVar("T")

BUILT_IN: dict[str, dict[str, str]] = {
    "model.name": {
        "cnn": "ddp_cifar.models.cnn:CNN",
        "resnet18": "ddp_cifar.models.resnet:ResNet18",
        "resnet9": "ddp_cifar.models.resnet:ResNet9",
        "torchvision": "ddp_cifar.models.torchvision:build_torchvision",
    },
    "data.name": {
        "cifar10": "ddp_cifar.data.cifar10:Cifar10",
        "imagefolder": "ddp_cifar.data.imagefolder:ImageFolder",
        "shapes": "ddp_cifar.data.shapes:Shapes",
    },
    "optim.name": {
        "adam": "ddp_cifar.training.optim:adam",
        "adamw": "ddp_cifar.training.optim:adamw",
        "sgd": "ddp_cifar.training.optim:sgd",
        "muon": "ddp_cifar.training.muon:muon",
    },
    "optim.schedule": {
        "constant": "ddp_cifar.training.schedule:constant",
        "cosine": "ddp_cifar.training.schedule:cosine",
        "multistep": "ddp_cifar.training.schedule:multistep",
        "polynomial": "ddp_cifar.training.schedule:polynomial",
    },
    "augment.name": {},
    "train.loss": {"cross_entropy": "ddp_cifar.training.loss:cross_entropy"},
    "tracking.name": {
        "mlflow": "ddp_cifar.tracking.mlflow:MLflow",
        "wandb": "ddp_cifar.tracking.wandb:WandB",
    },
}
"""Config key -> built-in name -> `package.module:function`. To add a built-in, add its file and one line here."""

EXTRAS = {"wandb", "mlflow"}
"""Built-in names that need the package of the same name, which an extra of the same name installs."""


def is_user_defined(name: str) -> bool:
    """True for a name of the form `package.module:function`."""
    return ":" in name


def names_in(value: object) -> list[str]:
    """Return the names in the value of a config key: null has none, and `tracking.name` may have several."""
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]  # type: ignore[attr-defined]


def user_defined_names(values: Mapping[str, Any]) -> list[str]:
    """Return `key=name` for each user-defined name in a config by dotted keys."""
    names = [(key, name) for key in BUILT_IN for name in names_in(values.get(key))]
    return [f"{key}={name}" for key, name in names if is_user_defined(name)]


def check_name(key: str, name: str) -> None:
    """Raise `UserError` if `name` is not valid for the config's `key`. Imports a user-defined function, but not a built-in."""
    if is_user_defined(name):
        _load(key, name, name)
        return
    _place(key, name)
    if name in EXTRAS and importlib.util.find_spec(name) is None:
        raise UserError(
            f"{key}={name} needs the package {name}, which is not installed: pip install 'ddp_cifar[{name}]'"
        )


def resolve(key: str, name: str) -> Callable[..., Any]:
    """Return the function or class that `name` refers to as the value of the config's `key`.

    Raises `UserError`, which lists the valid names, if there is none.
    """
    return _load(key, name, name if is_user_defined(name) else _place(key, name))


def call(key: str, name: str, function: Callable[..., T], /, *arguments: Any, **named: Any) -> T:
    """Return `function(*arguments, **named)`. Raises `UserError`, which shows its signature, if it does not accept them."""
    check_arguments(key, name, function, *arguments, **named)
    return function(*arguments, **named)


def check_arguments(key: str, name: str, function: Callable[..., object], /, *arguments: Any, **named: Any) -> None:
    """Raise `UserError`, which shows the function's signature, if it does not accept these arguments."""
    try:
        signature = inspect.signature(function)
        signature.bind(*arguments, **named)
    except ValueError:
        pass  # a function written in C may have no signature
    except TypeError as error:
        given = [type(argument).__name__ for argument in arguments] + [f"{k}={v!r}" for k, v in named.items()]
        called = getattr(function, "__name__", name)
        raise UserError(
            f"{key}={name}: {called}{signature} does not accept the arguments ({', '.join(given)}) ({error}); "
            f"check {key.rpartition('.')[0]}.args"
        ) from error


def _place(key: str, name: str) -> str:
    """Return `package.module:function` of the built-in `name`. Raises `UserError` if there is none."""
    table = BUILT_IN[key]
    if name in table:
        return table[name]
    expected = ", or ".join(filter(None, [", ".join(table), "a user-defined package.module:function"]))
    hint = did_you_mean(name, table)
    raise UserError(f"{key}={name} is unknown: expected {expected}" + (f"; {hint}" if hint else ""))


def _load(key: str, name: str, place: str) -> Callable[..., Any]:
    """Import `place`, a `package.module:function`. Raises `UserError` if it cannot be imported."""
    module_name, _, attribute = place.partition(":")
    if module_name.startswith("."):
        raise UserError(f"{key}={name} is a relative name: expected package.module:function, without a path")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key}={name}: cannot import {module_name} ({error}); install it, or add its folder to PYTHONPATH"
        ) from error
    except ValueError as error:
        raise UserError(f"{key}={name} is not of the form package.module:function ({error})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        hint = did_you_mean(attribute, names) or f"it has {', '.join(names[:10]) or 'no functions'}"
        problem = "has no" if found is None else "has no function"
        raise UserError(f"{key}={name}: {module.__file__ or module_name} {problem} {attribute}; {hint}")
    return found  # type: ignore[no-any-return]
