"""Seconds from torchrun to the end of the first step: ddp_cifar against a bare script.

    python benchmarks/startup.py

The bare script (bare_ddp.py) imports torch, opens a process group and runs one step of the same network with
DistributedDataParallel, on random images. ddp_cifar starts as usual and draws its data set (configs/demo.yaml). Both run on two
ranks with one CPU thread each, and take turns.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import Comparison, arguments, report

CHECKOUT = Path(__file__).parent.parent
RANKS = 2
TARGET = 1 / 1.1
TIMEOUT_S = 120


def main() -> None:
    parser = arguments("starts per second, each until the first step is done", rounds=7)
    options = parser.parse_args()
    ours = one_step(RANKS, options.batch)
    bare = [*torchrun(RANKS), "benchmarks/bare_ddp.py", str(options.batch)]
    contenders: dict[str, Callable[[Path], float]] = {
        "ddp_cifar": functools.partial(first_step_of_ours, ours),
        "a bare script": functools.partial(first_step_of, bare),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                seconds = contenders[name](Path(folder, f"{number}"))
                if number:  # the first round loads the files into memory
                    rates[name].append(1 / seconds)
    title = f"from torchrun to the end of the first step, {RANKS} ranks x {options.batch} images"
    report(title, rates, [Comparison("ddp_cifar", "a bare script", TARGET)], options.json, unit="1/s")
    for name, values in rates.items():
        print(f"{name}: {1 / sorted(values)[len(values) // 2]:.2f} s")


def torchrun(ranks: int) -> list[str]:
    """Return the start of a command: torchrun of this environment on one node."""
    return [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]


def one_step(ranks: int, batch: int) -> list[str]:
    """Return the command of a run of one step."""
    sizes = [f"train.global_batch_size={ranks * batch}", f"train.micro_batch_size={batch}"]
    settings = ["train.max_steps=1", "train.log_every=1", "device=cpu"]
    return [*torchrun(ranks), "-m", "ddp_cifar.train", "configs/demo.yaml", *settings, *sizes]


def first_step_of_ours(command: Sequence[str], run_dir: Path, checkout: Path = CHECKOUT) -> float:
    """Return the seconds until the row of the first step is on disk."""
    metrics = run_dir / "metrics.jsonl"
    command = [*command, f"run_dir={run_dir}"]
    return seconds_until(lambda: metrics.exists() and metrics.stat().st_size > 0, command, checkout=checkout)


def first_step_of(command: Sequence[str], folder: Path) -> float:
    """Return the seconds until the bare script prints that its first step is done."""
    said = folder.with_suffix(".txt")
    return seconds_until(lambda: "first step done" in said.read_text(), command, said)


def seconds_until(
    done: Callable[[], bool], command: Sequence[str], output: Path | None = None, checkout: Path = CHECKOUT
) -> float:
    """Start a command and return the seconds until `done`. Waits for the command to exit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    with open(output or os.devnull, "w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=checkout)
        while not done():
            if process.poll() not in (None, 0) or time.perf_counter() - started > TIMEOUT_S:
                process.kill()
                raise SystemExit(f"{' '.join(command)} did not reach its first step")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds


if __name__ == "__main__":
    main()
