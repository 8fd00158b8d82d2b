"""A rank in a preflight, what its checks find, and where ranks leave that for each other."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ddp_cifar.config import Config
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed import World, is_lost_peer, open_store
from ddp_cifar.errors import UserError

OK, WARNING, FAIL, LEFT_OUT = "ok", "warning", "FAIL", "-"
CHECK_PATIENCE = 3
"""A check takes at most so many times the patience with which ranks wait for each other."""
SILENT_S = 10.0
"""A rank that gave no sign of life for so long is gone, or stopped."""
MOST_PAUSE_S = 0.2
LOOKING_S = 300.0
"""What a node may take to look at itself: most of it reads data."""


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
    host: str = field(default_factory=lambda: os.environ.get("NODE_NAME") or socket.gethostname())
    """The node's name: as the scheduler or the hosts file has it, else its host name."""
    facts: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    device: torch.device | None = None
    dataset: DataSet | None = None
    """The shape of the data, on the first rank of a node."""
    store: Any = None
    line: Any = None
    """The same store once more, for the thread that waits for the checks: a store serves one call at a time."""
    at: str = ""
    """The check that is under way ..."""
    deadline: float = 0.0
    """... and when it is to have ended, by time.monotonic()."""
    arrived: list[dict[str, Any]] = field(default_factory=list)
    """Rank, local rank and host of each rank that came."""
    everyone: list[dict[str, Any]] = field(default_factory=list)
    """The facts of each of them that has looked at its machine."""
    world: World | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    """Set once this process was asked to end, as torchrun does when another rank of its own is gone."""
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    @property
    def num_nodes(self) -> int:
        """As many as the run is to have, whether they have come or not."""
        return max(self.options.nodes or 1, self.world_size // self.local_world_size)

    def begin(self, name: str, patience_s: float | None = None) -> None:
        """From here on a check is under way, which takes no longer than `patience_s`."""
        self.at = name
        self.deadline = time.monotonic() + (
            CHECK_PATIENCE * self.options.patience if patience_s is None else patience_s
        )
        if self.store is not None:
            self.store.set(f"at/{self.rank}", name)

    def check(
        self, name: str, function: Callable[["Here"], str], hint: str = "", patience_s: float | None = None
    ) -> None:
        """Do a check, and keep what came of it; `hint` is for an error that is not the check's own."""
        self.begin(name, patience_s)
        try:
            outcome = Outcome(name, OK, function(self))
        except LeftOut:
            outcome = Outcome(name, LEFT_OUT)
        except Problem as problem:
            outcome = Outcome(name, WARNING if problem.is_warning else FAIL, problem.found, problem.hint)
        except UserError as error:
            outcome = Outcome(name, FAIL, str(error))
        except Exception as error:
            if is_lost_peer(error):
                error = RuntimeError("another rank is gone, or does not answer")
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            outcome = Outcome(name, FAIL, f"{type(error).__name__}: {reason}", hint)
        self.outcomes.append(outcome)


def meet(here: Here) -> None:
    """Wait until all ranks have arrived in the store, or this one was asked to end. Raises `UserError` if it is not reached."""
    patience = timedelta(seconds=here.options.patience)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        here.store = open_store(patience)
    except dist.DistError as error:
        raise UserError(
            f"rank {here.rank} on {here.host} does not reach rank 0 at {address} ({str(error).splitlines()[0][:200]}): rank 0 "
            f"has not started, a firewall is between them, or that name leads elsewhere from here"
        ) from error
    here.line = here.store.clone()
    here.arrived = tell(here, "arrived", range(here.world_size), here.options.patience)


def tell(
    here: Here, name: str, ranks: Iterable[int], patience_s: float, *, alive: bool = False
) -> list[dict[str, Any]]:
    """Leave this rank's facts in the store, and return those of all `ranks` that have."""
    here.store.set(f"{name}/{here.rank}", json.dumps(here.facts))
    found = wait_for(here.store, name, ranks, patience_s, alive=alive, ended=here.ended)
    return [json.loads(here.store.get(f"{name}/{rank}")) for rank in found]


def wait_for(
    store: Any,
    name: str,
    ranks: Iterable[int],
    patience_s: float,
    *,
    alive: bool = False,
    ended: threading.Event | None = None,
) -> list[int]:
    """Which of `ranks` have left `name` in the store, once all have, when patience ends, or when this process has `ended`.

    With `alive` it ends sooner, where all that have not give no sign of life any more.
    """
    ranks = list(ranks)
    now = began = time.monotonic()
    pause, signs = 0.01, dict.fromkeys(ranks, (b"", began))

    def there() -> list[int]:
        return [rank for rank in ranks if store.check([f"{name}/{rank}"])]

    while not store.check([f"{name}/{rank}" for rank in ranks]):
        now = time.monotonic()
        if now - began > patience_s or (ended and ended.is_set()):
            return there()
        if alive and pause >= MOST_PAUSE_S:
            absent = set(ranks) - set(there())
            for rank in absent:
                sign = store.get(f"alive/{rank}") if store.check([f"alive/{rank}"]) else b""
                if sign != signs[rank][0]:
                    signs[rank] = sign, now
            if all(now - signs[rank][1] > SILENT_S for rank in absent):
                return there()
        time.sleep(pause)
        pause = min(MOST_PAUSE_S, 1.5 * pause)  # one thread serves all ranks
    return ranks
