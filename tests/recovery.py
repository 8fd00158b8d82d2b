"""Measure how long a run takes to recover from a fault, and how many steps it loses.

    python tests/recovery.py --runs 5
    python tests/recovery.py --runs 5 --checkout FOLDER        # the code of another checkout

Prints for each fault the seconds from the fault to the first new step, how many of them are more than the ranks that start again
take to import torch, and the steps lost: median (lowest - highest).
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launched import ARGUMENTS, CHECKOUT, environment_of, free_port, parent_of, processes, send, wait_until

LAST_CHECKPOINT = 40
"""The step of the last checkpoint before the fault."""
SETTINGS = (
    "train.epochs=400",
    "train.fingerprint_every=1",  # a row per step
    "checkpoint.every_epochs=1000",
    f"checkpoint.every_steps={LAST_CHECKPOINT}",
)


class Measured:
    """A run, its processes, and the steps that it has completed."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.run_dir = folder / "run"
        self.checkout = checkout
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.fault = folder / "fault"

    def launch(self, *arguments: str, script: str = "local.sh", **environment: str) -> None:
        variables = {"OMP_NUM_THREADS": "1", "MAX_RESTARTS": "9", "FAULT_FILE": str(self.fault), **environment}
        variables = environment_of(**variables)
        variables["PYTHONPATH"] = f"{self.checkout}:{variables['PYTHONPATH']}"
        self.run_dir.mkdir(exist_ok=True)
        command = [str(self.checkout / "launch" / script), *ARGUMENTS, *SETTINGS, *arguments, f"run_dir={self.run_dir}"]
        with open(self.run_dir / "terminal.txt", "ab") as terminal:
            self.launchers.append(
                subprocess.Popen(command, cwd=self.checkout, env=variables, stdout=terminal, stderr=terminal)
            )

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def starts(self) -> list[int]:
        path = self.run_dir / "starts.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def rank(self, rank: int) -> int:
        return int(json.loads((self.run_dir / "heartbeats" / f"rank_{rank}").read_text())["pid"])

    def recover(self, fault: Callable[["Measured"], None], limit_s: float) -> tuple[float, int]:
        """Inflict the fault 20 steps after the last checkpoint; return the seconds to the first new step, and the steps lost."""
        assert wait_until(lambda: self.step() >= LAST_CHECKPOINT + 20, 120), (self.run_dir / "terminal.txt").read_text()
        time.sleep(random.uniform(0, 0.2))
        begun, count, reached = time.monotonic(), len(self.starts()), 0
        fault(self)

        def started() -> bool:
            nonlocal reached
            reached = max(reached, self.step())  # rows after the checkpoint are dropped at the next start
            return len(self.starts()) > count

        assert wait_until(started, limit_s), (self.run_dir / "terminal.txt").read_text()
        assert wait_until(lambda: self.step() > reached, 60), (self.run_dir / "terminal.txt").read_text()
        return time.monotonic() - begun, reached - self.starts()[count]

    def end(self) -> None:
        send([pid for pids in processes(self.run_dir).values() for pid in pids], signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()


def kill_rank(run: Measured) -> None:
    send([run.rank(1)], signal.SIGKILL)


def stop_rank(run: Measured) -> None:
    send([run.rank(1)], signal.SIGSTOP)


def hang_rank(run: Measured) -> None:
    run.fault.write_text("hang 1")
    time.sleep(1)
    run.fault.unlink()


def kill_node(run: Measured) -> None:
    agent = parent_of(run.rank(1))
    send([run.launchers[1].pid, agent, run.rank(1)], signal.SIGKILL)


def import_torch(processes: int) -> float:
    """Return the seconds that this number of processes takes to import torch at the same time."""
    begun = time.monotonic()
    importing = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(processes)]
    assert not any(process.wait() for process in importing)
    return time.monotonic() - begun


def ranks(count: int, *arguments: str) -> Callable[[Measured], None]:
    return lambda run: run.launch(*arguments, NPROC_PER_NODE=str(count))


def two_nodes(run: Measured) -> None:
    port = free_port()
    nodes = {"NNODES": "2", "MIN_NODES": "1", "HEAD": f"127.0.0.1:{port}", "RUN_ID": "two", "LOCAL_ADDR": "127.0.0.1"}
    for _ in range(2):
        run.launch(script="node.sh", NPROC_PER_NODE="1", GLOO_SOCKET_IFNAME="lo", **nodes)
        time.sleep(1)


FAULTS: dict[str, tuple[Callable[[Measured], None], Callable[[Measured], None], float, int]] = {
    "rank killed, 2 ranks": (ranks(2), kill_rank, 60, 2),
    "rank killed, 4 ranks": (ranks(4), kill_rank, 60, 4),
    "node killed, 2 nodes, MIN_NODES=1": (two_nodes, kill_node, 200, 1),
    "rank stopped (SIGSTOP), 2 ranks": (ranks(2, "train.hang_timeout_s=60"), stop_rank, 200, 2),
    "rank hangs, 2 ranks, train.hang_timeout_s=20": (ranks(2, "train.hang_timeout_s=20"), hang_rank, 100, 2),
}
"""By name: how to start the run, the fault, the most seconds to a new start, and the number of ranks that start again."""


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds and steps that faults cost")
    parser.add_argument("--runs", type=int, default=5, help="runs per fault (default 5)")
    parser.add_argument("--checkout", type=Path, default=CHECKOUT, help="the checkout to measure (default: this one)")
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {options.runs} runs per fault")
    for name, (launch, fault, limit_s, restarted) in FAULTS.items():
        if options.only not in name:
            continue
        results, imports = [], []
        for _ in range(options.runs):
            folder = Path(tempfile.mkdtemp(prefix="recovery-"))
            run = Measured(folder, options.checkout)
            launch(run)
            try:
                results.append(run.recover(fault, limit_s))
            finally:
                run.end()
            shutil.rmtree(folder)
            imports.append(import_torch(restarted))
        seconds, lost = zip(*results, strict=True)
        beyond = [total - own for total, own in zip(seconds, imports, strict=True)]
        print(
            f"{name}: {spread(seconds, '.1f')} s, {spread(beyond, '.1f')} s beyond the import of torch, "
            f"{spread(lost, 'g')} steps lost",
            flush=True,
        )


def spread(values: Sequence[float], form: str) -> str:
    """Return the median and the range, as `4.0 (3.6 - 4.5)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


if __name__ == "__main__":
    main()
