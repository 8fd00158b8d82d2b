"""What each rank costs as their number grows, against a bare script with DistributedDataParallel and the same network.

    python benchmarks/ranks.py --ranks 2 4 8 16 24 [--rounds 3]

Both train the network of the original script as real runs on this machine, one after the other: ddp_cifar with all its
defaults, as a user would start it, and bare_ddp.py on one fixed batch. A rank has one CPU thread and
`--batch` images per step. Each figure is the mean over ranks, the largest rank's for connections, threads and memory, and the
median of the rounds.

- collectives per step, of all process groups (torch's flight recorder);
- CPU seconds per step (getrusage), and steps per second: ranks share the cores;
- TCP connections, threads and resident memory of a rank;
- bytes that a rank sends per step over TCP (tcp_info);
- files in the run_dir that all ranks together open, rename, list or remove per second;
- seconds from the start of torchrun to the end of the slowest rank's first step.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from common import arguments
from rank_meter import read
from startup import CHECKOUT, torchrun

Figures = dict[str, float]

ROWS: Mapping[str, tuple[str, Callable[[Sequence[float]], float], str]] = {
    "collectives_per_step": ("collectives per step", statistics.fmean, ".2f"),
    "cpu_s_per_step": ("CPU seconds per rank and step", statistics.fmean, ".3f"),
    "steps_per_s": ("steps per second", statistics.fmean, ".2f"),
    "connections": ("TCP connections per rank", max, ".0f"),
    "threads": ("threads per rank", max, ".0f"),
    "memory_mb": ("memory per rank, MB", max, ",.0f"),
    "bytes_per_step": ("kB sent per rank and step", lambda values: statistics.fmean(values) / 1000, ",.1f"),
    "files_per_s": ("files touched per second, all ranks", sum, ".2f"),
    "first_step": ("seconds to the first step", max, ".1f"),
}
"""By the key that a rank writes: the name of the figure, how ranks are put together, and its format."""


def main() -> None:
    parser = arguments("what each rank costs as their number grows", rounds=3)
    parser.set_defaults(batch=4)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 24], help="numbers of ranks (2 4 8 16 24)"
    )
    parser.add_argument("--steps", nargs=2, type=int, default=[20, 60], help="first and last step to measure (20 60)")
    parser.add_argument("--set", nargs="*", default=[], help="more settings for ddp_cifar")
    options = parser.parse_args()
    found: dict[str, dict[str, Figures]] = {}
    images = max(options.ranks) * options.batch * options.steps[1]  # the same data for all, as it takes memory too
    print(
        f"{options.batch} images and one thread per rank, torch {torch.__version__}, {os.cpu_count()} cores, "
        f"{options.rounds} rounds, steps {options.steps[0]} to {options.steps[1]}\n"
    )
    for ranks in options.ranks:
        rounds: dict[str, list[Figures]] = {"ddp_cifar": [], "bare": []}
        for number in range(options.rounds):
            for name in list(rounds)[:: -1 if number % 2 else 1]:
                with tempfile.TemporaryDirectory() as folder:
                    settings = [f"data.shapes.train_images={images}", *options.set]
                    command = command_of(name, Path(folder), ranks, options.batch, options.steps, settings)
                    rounds[name].append(run(command, Path(folder), ranks))
        medians = {
            name: {key: statistics.median(each[key] for each in some) for key in ROWS} for name, some in rounds.items()
        }
        medians["speed / bare"] = {
            "steps_per_s": statistics.median(
                ours["steps_per_s"] / bare["steps_per_s"]
                for ours, bare in zip(rounds["ddp_cifar"], rounds["bare"], strict=True)
            )
        }
        found[str(ranks)] = medians
        print(table(found), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def command_of(
    name: str, folder: Path, ranks: int, batch: int, steps: Sequence[int], settings: Sequence[str]
) -> Sequence[str]:
    """Return the command of a contender, which writes the meters of its ranks to `folder`."""
    meter = [str(folder), *map(str, steps)]
    if name == "bare":
        return [*torchrun(ranks), "benchmarks/bare_ddp.py", str(batch), *meter]
    sizes = [
        f"train.global_batch_size={ranks * batch}",
        f"train.micro_batch_size={batch}",
        f"train.max_steps={steps[1]}",
    ]
    data = ["data.name=shapes", "data.shapes.test_images=100"]
    own = [*data, *sizes, "device=cpu", "train.epochs=1", "precision=bf16", *settings, f"run_dir={folder}/run"]
    return [*torchrun(ranks), "benchmarks/metered_train.py", *meter, *own]


def run(command: Sequence[str], folder: Path, ranks: int) -> Figures:
    """Run a contender to its end, and return its figures. Raises `SystemExit` if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "TORCH_FR_BUFFER_SIZE": "2000"}
    started = time.time()
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = read(folder, ranks)
    figures = {key: combine([rank[key] for rank in found]) for key, (_, combine, _) in ROWS.items()}
    return figures | {"first_step": figures["first_step"] - started}


def table(found: Mapping[str, Mapping[str, Figures]]) -> str:
    """Return a Markdown table: a column per number of ranks, with ddp_cifar's figure and, behind a slash, the bare script's."""
    lines = [
        f"| ddp_cifar / bare | {' | '.join(f'{ranks} ranks' for ranks in found)} |",
        "|---" * (len(found) + 1) + "|",
    ]
    for key, (name, _, form) in ROWS.items():
        cells = [f"{medians['ddp_cifar'][key]:{form}} / {medians['bare'][key]:{form}}" for medians in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [f"{medians['speed / bare']['steps_per_s']:.2f}" for medians in found.values()]
    return "\n".join([*lines, f"| speed relative to bare, by round | {' | '.join(ratios)} |", ""])


if __name__ == "__main__":
    main()
