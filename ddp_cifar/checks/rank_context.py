"""The context of a rank in a preflight, the outcomes of its checks, and the exchange of facts through a store."""

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
from ddp_cifar.distributed.environment import is_lost_peer
from ddp_cifar.distributed.rendezvous import open_store
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError, first_line

OK, WARNING, FAIL, SKIPPED = "ok", "warning", "FAIL", "-"
CHECK_PATIENCE = 3
"""The longest time of a check, as a multiple of the time for which ranks wait for each other (`--patience`)."""
SILENT_S = 10.0
"""A rank without a heartbeat for this long has exited or is stopped."""
MAX_PAUSE_S = 0.2
LOOKING_S = 300.0
"""The longest time of a node's local checks. Most of it is for reading data."""


class Problem(Exception):
    """A problem that a check has found, and a hint on how to fix it. A warning does not fail the preflight."""

    def __init__(self, found: str, hint: str, *, is_warning: bool = False) -> None:
        super().__init__(found)
        self.found, self.hint, self.is_warning = found, hint, is_warning


class Skipped(Exception):
    """Raised if a check does not apply to this rank."""


@dataclass(frozen=True)
class Outcome:
    check: str
    verdict: str
    found: str = ""
    hint: str = ""


@dataclass
class RankContext:
    """A rank and its findings."""

    config: Config
    options: Any
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_agents: int
    """The number of nodes on which torchrun has started ranks."""
    host: str = field(default_factory=lambda: os.environ.get("NODE_NAME") or socket.gethostname())
    """The node's name from the scheduler or the hosts file, otherwise its host name."""
    facts: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    device: torch.device | None = None
    dataset: DataSet | None = None
    """The shape of the data, on the first rank of a node."""
    store: Any = None
    line: Any = None
    """A clone of the store for the thread that waits for the checks, since a store serves one call at a time."""
    at: str = ""
    """The current check."""
    deadline: float = 0.0
    """The time, by time.monotonic(), at which the current check times out."""
    arrived: list[dict[str, Any]] = field(default_factory=list)
    """The rank, local rank, local world size and host of each rank that has arrived."""
    everyone: list[dict[str, Any]] = field(default_factory=list)
    """The facts of each arrived rank that has completed its local checks."""
    world: World | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when this process is asked to stop. torchrun does this when another of its ranks exits."""
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    @property
    def num_nodes(self) -> int:
        """The expected number of nodes, whether they have arrived or not."""
        return max(self.options.nodes or 1, self.num_agents)

    def begin(self, name: str, patience_s: float | None = None) -> None:
        """Note that a check has started, and set its time limit."""
        self.at = name
        self.deadline = time.monotonic() + (
            CHECK_PATIENCE * self.options.patience if patience_s is None else patience_s
        )
        if self.store is not None:
            self.store.set(f"at/{self.rank}", name)

    def check(
        self, name: str, function: Callable[["RankContext"], str], hint: str = "", patience_s: float | None = None
    ) -> None:
        """Run a check and store its outcome. `hint` is used for an unexpected error."""
        self.begin(name, patience_s)
        try:
            outcome = Outcome(name, OK, function(self))
        except Skipped:
            outcome = Outcome(name, SKIPPED)
        except Problem as problem:
            outcome = Outcome(name, WARNING if problem.is_warning else FAIL, problem.found, problem.hint)
        except UserError as error:
            outcome = Outcome(name, FAIL, str(error))
        except Exception as error:
            if is_lost_peer(error):
                error = RuntimeError("a peer rank exited or does not respond")
            outcome = Outcome(name, FAIL, f"{type(error).__name__}: {first_line(error)}", hint)
        self.outcomes.append(outcome)


def first_of_node(facts: dict[str, Any]) -> int:
    """Return the first rank of a rank's node, which identifies the node. torchrun numbers a node's ranks consecutively."""
    return int(facts["rank"] - facts["local_rank"])


def meet(here: RankContext) -> None:
    """Wait until all ranks have arrived in the store, or this one is asked to stop.

    Raises `UserError` if the store cannot be reached.
    """
    patience = timedelta(seconds=here.options.patience)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        here.store = open_store(patience)
    except dist.DistError as error:
        raise UserError(
            f"rank {here.rank} on {here.host} cannot reach rank 0 at {address} ({first_line(error)[:200]}); check that rank 0 "
            f"has started, that no firewall is between them, and that the name resolves to the same address on both nodes"
        ) from error
    here.line = here.store.clone()
    here.arrived = tell(here, "arrived", range(here.world_size), here.options.patience)


def tell(
    here: RankContext, name: str, ranks: Iterable[int], patience_s: float, *, alive: bool = False
) -> list[dict[str, Any]]:
    """Store this rank's facts, and return those of all `ranks` that have stored theirs."""
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
    """Return those of `ranks` that have set `name` in the store.

    Waits until all have, for up to `patience_s`, or until this process has `ended`. With `alive`, it stops earlier if all
    missing ranks have stopped sending heartbeats.
    """
    ranks = list(ranks)
    now = began = time.monotonic()
    pause, signs = 0.01, dict.fromkeys(ranks, (b"", began))

    def present() -> list[int]:
        return [rank for rank in ranks if store.check([f"{name}/{rank}"])]

    while not store.check([f"{name}/{rank}" for rank in ranks]):
        now = time.monotonic()
        if now - began > patience_s or (ended and ended.is_set()):
            return present()
        if alive and pause >= MAX_PAUSE_S:
            absent = set(ranks) - set(present())
            for rank in absent:
                sign = store.get(f"alive/{rank}") if store.check([f"alive/{rank}"]) else b""
                if sign != signs[rank][0]:
                    signs[rank] = sign, now
            if all(now - signs[rank][1] > SILENT_S for rank in absent):
                return present()
        time.sleep(pause)
        pause = min(MAX_PAUSE_S, 1.5 * pause)  # a single thread of the store serves all ranks
    return ranks
