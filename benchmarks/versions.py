"""images/s of this checkout against another checkout of the repository, such as the parent commit.

    git worktree add ../before HEAD~1
    python benchmarks/versions.py ../before --ranks 2
    python benchmarks/versions.py ../before --starts --rounds 15        # startup time

Both train at the same time, started as a user would, and take turns of a few steps. The ranks of the waiting one are suspended
(SIGSTOP). Turns are short, so that a busy machine slows both. `key=value` arguments are settings for both.
"""

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import Comparison, arguments, report
from startup import first_step_of_ours, one_step, torchrun

from ddp_cifar.training.throughput import Rates, take_turns

CHECKOUT = Path(__file__).resolve().parent.parent
TARGET = 0.99
TIMEOUT_S = 120
SETTINGS = ("data.name=shapes", "train.epochs=1000000", "train.log_every=1", "eval.every=1000000")


class Training:
    """A run under torchrun that trains only during its turns."""

    def __init__(self, checkout: Path, folder: Path, ranks: int, settings: Sequence[str]) -> None:
        self.rows = folder / "metrics.jsonl"
        self.output = folder.with_suffix(".txt")
        command = [*torchrun(ranks), "-m", "ddp_cifar.train", *SETTINGS, *settings, f"run_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=output)
        self.wait_for_steps(3)
        self.signal_ranks(signal.SIGSTOP)

    def step_rates(self) -> list[float]:
        """Return the images/s of each step so far."""
        lines = self.rows.read_text().split("\n")[:-1] if self.rows.exists() else []
        return [row["train/images_per_s"] for row in map(json.loads, lines) if "train/images_per_s" in row]

    def wait_for_steps(self, count: int) -> list[float]:
        deadline = time.monotonic() + TIMEOUT_S
        while len(rates := self.step_rates()) < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.process.args!r} makes no progress:\n{self.output.read_text()}")
            time.sleep(0.05)
        return rates

    def signal_ranks(self, number: signal.Signals) -> None:
        pid = self.process.pid
        for rank in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(rank), number)

    def turn(self, steps: int) -> float:
        """Train for one turn and return the images/s of `steps` steps, without the step in which it started."""
        before = len(self.step_rates()) + 1
        self.signal_ranks(signal.SIGCONT)
        rates = self.wait_for_steps(before + steps)
        self.signal_ranks(signal.SIGSTOP)
        return statistics.harmonic_mean(rates[before : before + steps])

    def stop(self) -> None:
        self.signal_ranks(signal.SIGCONT)
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = arguments("images/s of this checkout against another", rounds=40)
    parser.add_argument("other", type=Path, metavar="CHECKOUT", help="the other checkout")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for both")
    parser.add_argument("--ranks", type=int, default=2, help="ranks per checkout, with one thread each (2)")
    parser.add_argument("--steps", type=int, default=2, help="steps per turn (2)")
    parser.add_argument("--starts", action="store_true", help="time from torchrun to the end of the first step instead")
    options = parser.parse_intermixed_args()
    checkouts = {"this checkout": CHECKOUT, "the other": options.other.resolve()}
    rates = starts(checkouts, options) if options.starts else turns(checkouts, options)
    what = "starts" if options.starts else f"turns of {options.steps} steps"
    title = f"{options.ranks} ranks x {options.batch} images, {what}"
    unit = "1/s" if options.starts else "images/s"
    report(title, rates, [Comparison("this checkout", "the other", TARGET)], options.json, unit)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios)
        print(f"median of the ratios: {statistics.median(ratios):.3f}; quartiles: {low:.3f} - {high:.3f}")


def starts(checkouts: Mapping[str, Path], options: argparse.Namespace) -> Rates:
    """Return the starts per second in each round."""
    command = one_step(options.ranks, options.batch)

    def start(checkout: Path) -> float:
        return 1 / first_step_of_ours(command, Path(tempfile.mkdtemp(dir=folder)), checkout)

    with tempfile.TemporaryDirectory() as folder:
        contenders = {name: functools.partial(start, checkout) for name, checkout in checkouts.items()}
        return take_turns(contenders, options.rounds)


def turns(checkouts: Mapping[str, Path], options: argparse.Namespace) -> Rates:
    """Return the images/s of each turn."""
    sizes = [f"train.global_batch_size={options.batch * options.ranks}", f"train.micro_batch_size={options.batch}"]
    with tempfile.TemporaryDirectory() as folder:
        trainings: dict[str, Training] = {}
        try:
            for name, checkout in checkouts.items():
                run_dir = Path(folder, name.replace(" ", "_"))
                trainings[name] = Training(checkout, run_dir, options.ranks, [*sizes, *options.settings])
            contenders = {name: functools.partial(each.turn, options.steps) for name, each in trainings.items()}
            return take_turns(contenders, options.rounds)
        finally:
            for training in trainings.values():
                training.stop()


if __name__ == "__main__":
    main()
