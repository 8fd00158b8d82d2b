"""Start without torch.compile's front end, torch._dynamo.

torch's optimizers and DistributedDataParallel import torch._dynamo, only to exclude themselves from compilation: 1.3 to 1.8
seconds of CPU time in each process, as much as importing torch (docs/performance.md). A process that compiles nothing needs
none of it.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


def load_dynamo_on_demand() -> None:
    """Let training without torch.compile run without torch._dynamo. It is loaded when something else of it is used."""
    if NAME not in sys.modules:
        sys.modules[NAME] = torch._dynamo = _Placeholder(NAME)


def _load() -> ModuleType:
    """Return torch._dynamo, loaded in place of the placeholder."""
    if isinstance(sys.modules.get(NAME), _Placeholder):
        del sys.modules[NAME], torch._dynamo
    return importlib.import_module(NAME)  # sets torch._dynamo as well


class _Placeholder(ModuleType):
    """torch._dynamo for code that does not compile. Any other attribute loads torch._dynamo and comes from there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.utils = _Utils(f"{name}.utils")

    def graph_break(self) -> None:
        """End the graph of a compiled function: there is none."""

    def disable(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """Return `function`, which is excluded from compilation as soon as torch._dynamo is loaded."""
        disabled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            nonlocal disabled
            if disabled is None and sys.modules.get(NAME) is not self:
                disabled = _load().disable(function, *args, **options)
            return (disabled or function)(*values, **named)

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # inspect and pickle ask all modules for __file__ and the like
            raise AttributeError(name)
        return getattr(_load(), name)


class _Utils(ModuleType):
    """torch._dynamo.utils."""

    def get_optimize_ddp_mode(self) -> str:
        """Return torch._dynamo's default for DistributedDataParallel, which only a loaded torch._dynamo can change."""
        return "ddp_optimizer"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load().utils, name)
