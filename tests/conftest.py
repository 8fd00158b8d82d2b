"""Fixtures for all tests."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launched import Run, environment_of, processes, send
from ranks import RankPool

import ddp_cifar.command
import ddp_cifar.train
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.distributed.world import World

CHECKOUT = Path(__file__).parent.parent


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """With NO_SKIPS set, as in CI, a skipped test fails, unless it is marked gpu."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("NO_SKIPS") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but NO_SKIPS is set: {report.longrepr}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _leaves_no_trace() -> Iterator[None]:
    """A test must not leave changes in the environment, a process group, or non-daemon threads."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
    assert not changed, f"the test changed environment variables: {changed}"
    left = [thread for thread in set(threading.enumerate()) - threads if not thread.daemon and thread.is_alive()]
    assert not left, f"the test left threads running: {left}"


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture
def alone() -> Iterator[World]:
    """A world of one rank, in this process."""
    with open_world("cpu") as world:
        yield world


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `python -m ddp_cifar.train ARGUMENTS` in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        monkeypatch.setattr(os, "_exit", sys.exit)
        capfd.readouterr()
        status = 0
        try:
            ddp_cifar.command.run_command(ddp_cifar.train.main)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        with contextlib.suppress(ValueError, AssertionError):
            dist.destroy_process_group()
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """Runs a command in the checkout as a user would, with the programs of the environment on PATH."""

    def run(*command: str, timeout: float = 120, cwd: Path = CHECKOUT, **environment: str) -> Outcome:
        inherited = {name: value for name, value in environment_of().items() if name != "OMP_NUM_THREADS"}
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    yield run
    left = [pid for pids in processes(run.path).values() for pid in pids]
    send(left, signal.SIGCONT)
    send(left, signal.SIGKILL)
