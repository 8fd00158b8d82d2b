"""Start real runs of a small recipe with launch/local.sh, inspect them, and compare their results."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_cifar.run.checkpoint_file import digest, load_checkpoint
from ddp_cifar.run.processes import is_dead
from ddp_cifar.run.signs import read_sign

CHECKOUT = Path(__file__).parent.parent
ARGUMENTS = (
    "data.name=shapes",
    "data.shapes.train_images=440",
    "data.shapes.test_images=60",
    "data.val_images=40",
    "train.global_batch_size=32",
    "train.micro_batch_size=8",
    "train.epochs=10",
    "train.log_every=4",
    "train.ema_decay=0.9",
    "train.agree_every=2",
    "eval.batch_size=10",
    "optim.step_clamp.after_epoch=1",
    "optim.step_clamp.limit=20",
    "optim.step_clamp.reset_to=15",
    "checkpoint.every_steps=5",
    "checkpoint.keep=2",
    "device=cpu",
    "model.name=paced_network:Network",
)
TIME_KEYS = re.compile(r".*_s$|.*_per_s$|^run/")
SHORT = ("train.epochs=3",)
LONG = ("train.epochs=400",)


@dataclass(frozen=True)
class Result:
    """The results of a run that must not depend on interruptions."""

    state: str
    rows: list[dict[str, Any]]

    @staticmethod
    def of(run_dir: Path) -> "Result":
        state = load_checkpoint(run_dir / "checkpoints" / "latest.pt")
        parts = {name: state[name] for name in ("model", "optimizer", "progress", "ema", "scaler") if name in state}
        return Result(digest(parts), rows_of(run_dir))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without the keys that depend on time."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not TIME_KEYS.match(key)} for row in rows]


def environment_of(**settings: str) -> dict[str, str]:
    """A copy of this environment with `settings`, the programs of this Python, and the modules of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    modules = f"{CHECKOUT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONPATH": modules, **settings}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _set_signals() -> None:
    """SIGINT has an effect, which a script's background jobs ignore. SIGQUIT, which they ignore too, has none."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)


def start(
    run_dir: Path, ranks: int, *arguments: str, script: str = "local.sh", **environment: str
) -> "subprocess.Popen[bytes]":
    """Start launch/local.sh, or another script of its folder, with `ranks` ranks; the output goes to terminal.txt."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # do not wait for a rank that is stopped or blocked
    settings = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10", "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": str(ranks or 1)}
    with open(run_dir / "terminal.txt", "ab") as terminal:
        return subprocess.Popen(
            [str(CHECKOUT / "launch" / script), *ARGUMENTS, *arguments, f"run_dir={run_dir}"],
            cwd=CHECKOUT,
            env=environment_of(**settings | environment),
            stdin=subprocess.DEVNULL,
            preexec_fn=_set_signals,
            stdout=terminal,
            stderr=terminal,
        )


def processes(run_dir: Path) -> dict[str, list[int]]:
    """The pids of a run's processes: `agents` (torchrun), `shells` (the launch scripts), and `ranks`."""
    commands: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        if command.rstrip("\0").endswith(f"run_dir={run_dir}"):
            commands[int(folder.name)] = command
    programs = {pid: [Path(part).name for part in command.split("\0")[:2]] for pid, command in commands.items()}
    agents = [pid for pid, program in programs.items() if "torchrun" in program]
    shells = [pid for pid, program in programs.items() if {"local.sh", "node.sh"} & set(program)]
    ranks = [pid for pid, program in programs.items() if program[0].startswith("python") and pid not in agents]
    return {"agents": agents, "shells": shells, "ranks": ranks}


def parent_of(pid: int) -> int:
    """The pid of the parent process, 0 if the process has exited."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def send(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def wait_until(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Run:
    """A run_dir, and the processes that a test starts in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.launcher: subprocess.Popen[bytes] | None = None

    def launch(self, *arguments: str, ranks: int = 2, **environment: str) -> None:
        """Start launch/local.sh for the short run."""
        self.launcher = start(self.path, ranks, *SHORT, *arguments, **environment)

    def start(self, *arguments: str, ranks: int = 2, **environment: str) -> None:
        """Start launch/local.sh, and wait until the run has saved a new checkpoint."""
        newest = lambda: max(self.path.glob("checkpoints/step_*.pt"), default=None)  # noqa: E731
        before = newest()
        self.launch(*arguments, ranks=ranks, **environment)
        assert wait_until(lambda: newest() != before or self.launcher.poll() is not None, 90), self.terminal
        assert self.launcher.poll() is None, self.terminal

    def ranks(self) -> list[int]:
        """The pids of the ranks, in the order of ranks."""
        signs = [json.loads((self.path / "heartbeats" / f"rank_{rank}").read_text()) for rank in range(self.size)]
        return [sign["pid"] for sign in signs]

    @property
    def size(self) -> int:
        return len(processes(self.path)["ranks"])

    def end(self, timeout: float = 90) -> int:
        """Wait until the launcher and all processes have exited; return the launcher's exit status."""
        assert self.launcher is not None
        status = self.launcher.wait(timeout)
        assert wait_until(lambda: not any(processes(self.path).values()), 30), processes(self.path)
        return status

    def finish(self, *arguments: str, ranks: int = 2) -> "Result":
        """Start the run again, wait until it has finished, and return its result."""
        self.launch(*arguments, ranks=ranks)
        assert self.end(300) == 0, self.terminal
        assert self.status == "finished"
        return Result.of(self.path)

    @property
    def status(self) -> str:
        return (self.path / "status").read_text().strip()

    @property
    def terminal(self) -> str:
        return (self.path / "terminal.txt").read_text()

    def starts(self) -> list[dict[str, Any]]:
        """The rows of starts.jsonl."""
        path = self.path / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def step(self) -> int:
        """The step of the newest checkpoint."""
        return int(load_checkpoint(max(self.path.glob("checkpoints/step_*.pt")))["progress"]["step"])


class WaitsForOthers:
    """A tracker whose `close` returns once the other rank has exited. It notes how long that took."""

    def __init__(self, config: dict[str, Any], run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def log(self, scalars: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        sign = read_sign(self.run_dir / "heartbeats", rank=1)
        assert sign is not None
        (self.run_dir / "alone").write_text(str(wait_until(lambda: is_dead(sign.pid), 30)))
