"""Seconds from `torchrun` to the end of the first optimizer step: ddp_cifar, and a bare script under the same torchrun.

    python benchmarks/startup.py

The bare script (bare_ddp.py) imports torch, opens a group and does one step of the same network with DistributedDataParallel, on
random images. ddp_cifar draws its data set (configs/demo.yaml) and does all that it does at a start. Both run on two ranks of one
thread, and take turns.
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
TARGET = 1 / 1.3
PATIENCE_S = 120


def main() -> None:
    parser = arguments("starts a second, until the first step is done", rounds=7)
    options = parser.parse_args()
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={RANKS}"]
    steps = ["train.max_steps=1", f"train.global_batch_size={RANKS * options.batch}", "train.log_every=1", "device=cpu"]
    ours = [*torchrun, "-m", "ddp_cifar.train", "configs/demo.yaml", *steps, f"train.micro_batch_size={options.batch}"]
    bare = [*torchrun, "benchmarks/bare_ddp.py", str(options.batch)]
    contenders: dict[str, Callable[[Path], float]] = {
        "ddp_cifar": functools.partial(first_step_of_ours, ours),
        "a bare script": functools.partial(first_step_of, bare),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                seconds = contenders[name](Path(folder, f"{number}"))
                if number:  # the first has the files in memory
                    rates[name].append(1 / seconds)
    title = f"from torchrun to the end of the first step, {RANKS} ranks x {options.batch} images"
    report(title, rates, [Comparison("ddp_cifar", "a bare script", TARGET)], options.json, unit="1/s")
    for name, values in rates.items():
        print(f"{name}: {1 / sorted(values)[len(values) // 2]:.2f} s")


def first_step_of_ours(command: Sequence[str], run_dir: Path) -> float:
    """Seconds until the row of the first step is on the disk."""
    metrics = run_dir / "metrics.jsonl"
    return seconds_until(lambda: metrics.exists() and metrics.stat().st_size > 0, [*command, f"run_dir={run_dir}"])


def first_step_of(command: Sequence[str], folder: Path) -> float:
    """Seconds until the bare script has said so."""
    said = folder.with_suffix(".txt")
    return seconds_until(lambda: "first step done" in said.read_text(), command, said)


def seconds_until(done: Callable[[], bool], command: Sequence[str], output: Path | None = None) -> float:
    """Start a command, wait until `done`, and then for its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    with open(output or os.devnull, "w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=CHECKOUT)
        while not done():
            if process.poll() not in (None, 0) or time.perf_counter() - started > PATIENCE_S:
                process.kill()
                raise SystemExit(f"{' '.join(command)} did not get to its first step")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"{' '.join(command)} has failed")
    return seconds


if __name__ == "__main__":
    main()
