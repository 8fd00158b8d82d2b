"""A rank in a preflight, what its checks find, and where ranks leave that for each other."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ddp_cifar.config import Config
from ddp_cifar.distributed import World, open_store
from ddp_cifar.dry_run import Footprint
from ddp_cifar.errors import UserError

OK, WARNING, FAIL, LEFT_OUT = "ok", "warning", "FAIL", "-"


class Problem(Exception):
    """What a check has found, and what to do about it. A mere warning does not fail the preflight."""

    def __init__(self, found: str, hint: str, *, is_warning: bool = False) -> None:
        super().__init__(found)
        self.found, self.hint, self.is_warning = found, hint, is_warning


class LeftOut(Exception):
    """A check has nothing to look at here."""


@dataclass(frozen=True)
class Outcome:
    check: str
    verdict: str
    found: str = ""
    hint: str = ""


@dataclass
class Here:
    """A rank, and what it has found out."""

    config: Config
    options: Any
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str = field(default_factory=socket.gethostname)
    facts: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    footprint: Footprint | None = None
    store: Any = None
    everyone: list[dict[str, Any]] = field(default_factory=list)
    """Each rank's facts, once all have arrived."""
    world: World | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    @property
    def num_nodes(self) -> int:
        return max(self.options.nodes or 1, self.world_size // self.local_world_size)

    def check(self, name: str, function: Callable[["Here"], str], hint: str = "") -> None:
        """Do a check, and keep what came of it; `hint` is for an error that is not the check's own."""
        if self.store is not None:
            self.store.set(f"at/{self.rank}", name)
        try:
            outcome = Outcome(name, OK, function(self))
        except LeftOut:
            outcome = Outcome(name, LEFT_OUT)
        except Problem as problem:
            outcome = Outcome(name, WARNING if problem.is_warning else FAIL, problem.found, problem.hint)
        except UserError as error:
            outcome = Outcome(name, FAIL, str(error))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            outcome = Outcome(name, FAIL, f"{type(error).__name__}: {reason}", hint)
        self.outcomes.append(outcome)


def meet(here: Here) -> None:
    """Wait until all ranks have arrived in the store, where each leaves its facts. Raises `UserError` if it is not reached."""
    patience = timedelta(seconds=here.options.patience)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        here.store = open_store(patience)
    except dist.DistError as error:
        raise UserError(
            f"rank {here.rank} on {here.host} does not reach rank 0 at {address} ({str(error).splitlines()[0][:200]}): rank 0 "
            f"has not started, a firewall is between them, or that name leads elsewhere from here"
        ) from error
    here.store.set(f"facts/{here.rank}", json.dumps(here.facts))
    ranks = wait_for(here, "facts", range(here.world_size))
    here.everyone = [json.loads(here.store.get(f"facts/{rank}")) for rank in ranks]


def wait_for(here: Here, name: str, ranks: Iterable[int], patience_s: float | None = None) -> list[int]:
    """Which of `ranks` have left `name` in the store, once all have, or when patience ends."""
    deadline = time.monotonic() + (here.options.patience if patience_s is None else patience_s)
    absent, there = list(ranks), list[int]()
    while absent and time.monotonic() < deadline:
        there += [rank for rank in absent if here.store.check([f"{name}/{rank}"])]
        absent = [rank for rank in absent if rank not in there]
        time.sleep(0.02)
    return sorted(there)
