"""What a name in the config stands for: an entry of a table, or `package.module:function` of the user's own."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ddp_cifar.errors import UserError

T = TypeVar("T")


def is_own(name: str) -> bool:
    """True for a name of the form `package.module:function`."""
    return ":" in name


def find(key: str, name: str, table: Mapping[str, Callable[..., T]]) -> Callable[..., T]:
    """The entry `name` of `table`, or the function that it names elsewhere. `key` is the config's, for the error.

    Raises `UserError` if there is none, with the names that there are.
    """
    if not is_own(name):
        if name in table:
            return table[name]
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = f"{', '.join(table)}, or " if table else ""
        raise UserError(f"{key}={name} is not known: expected {known}package.module:function of your own{hint}")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key}={name}: cannot import {module_name} ({error}); it must be installed, in the current folder, or on PYTHONPATH"
        ) from error
    except ValueError as error:
        raise UserError(f"{key}={name} is not of the form package.module:function ({error})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:10]) or 'no functions'}"
        problem = "has no" if found is None else "has no function"
        raise UserError(f"{key}={name}: {module.__file__ or module_name} {problem} {attribute}; {hint}")
    return found  # type: ignore[no-any-return]


def call(key: str, name: str, function: Callable[..., T], /, *arguments: Any, **named: Any) -> T:
    """`function(*arguments, **named)`. Raises `UserError` if it does not take them, with what it takes."""
    try:
        signature = inspect.signature(function)
        signature.bind(*arguments, **named)
    except ValueError:
        pass  # written in C: it has no signature to see
    except TypeError as error:
        given = [type(argument).__name__ for argument in arguments] + [f"{k}={v!r}" for k, v in named.items()]
        called = getattr(function, "__name__", name)
        raise UserError(
            f"{key}={name}: {called}{signature} is called with ({', '.join(given)}), which it does not take "
            f"({error}); check {key.rpartition('.')[0]}.args"
        ) from error
    return function(*arguments, **named)
