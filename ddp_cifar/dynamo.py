"""Train without torch's compiler, torch._dynamo.

torch's optimizers and DistributedDataParallel import torch._dynamo only to exclude themselves from compilation. That takes 1.3 to
1.8 seconds of CPU time in each process, nearly as long as `import torch` (docs/performance.md).
"""

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

NAME = "torch._dynamo"
MARK = "__dynamo_disable"
"""The attribute in which torch keeps the version of a function that is excluded from compilation."""

_installing = threading.Lock()


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """Run torch's own code for optimizers and DistributedDataParallel in the body without importing torch._dynamo.

    After the body, torch._dynamo can be imported as usual. If it has been imported before, nothing changes.
    """
    if NAME in sys.modules:
        yield
        return
    _mark_excluded_functions()
    stand_in = _StandIn(NAME)
    sys.modules[NAME] = torch._dynamo = stand_in
    try:
        yield
    finally:
        _remove(stand_in)


def _remove(stand_in: ModuleType) -> None:
    with _installing:
        if sys.modules.get(NAME) is stand_in:
            del sys.modules[NAME]
            vars(torch).pop("_dynamo", None)


class _StandIn(ModuleType):
    """What torch._dynamo does for code that is not compiled: nothing. Any other attribute imports it."""

    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")  # the default

    def graph_break(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # inspect and pickle ask all modules for __file__ and the like
            raise AttributeError(name)
        _remove(self)
        return getattr(importlib.import_module(NAME), name)


@functools.cache
def _mark_excluded_functions() -> None:
    """Let the methods that are excluded from compilation run as they are until torch._dynamo is imported."""
    code = _disable_dynamo(lambda: None).__code__
    for kind in (Optimizer, DistributedDataParallel):
        for method in vars(kind).values():
            while (function := getattr(method, "__wrapped__", None)) is not None:
                if getattr(method, "__code__", None) is code and not hasattr(function, MARK):
                    setattr(function, MARK, _until_imported(method, function))
                method = function


def _until_imported(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, called by `method`, which excludes it from compilation once torch._dynamo is imported."""

    def call(*args: Any, **options: Any) -> Any:
        if isinstance(sys.modules.get(NAME), _StandIn | None):
            return function(*args, **options)
        delattr(function, MARK)
        return method(*args, **options)

    return call
