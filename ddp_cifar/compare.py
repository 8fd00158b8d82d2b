"""Runs beside each other: `python -m ddp_cifar.compare RUN_DIR ...`.

A row a run, from its metrics.jsonl: what in its config the others do not have, how far it came, its last and its best accuracy,
its speed. Runs that differ in nothing but the seed also get a row together: mean and standard deviation. Of runs with the same
config, or the same but for the number of ranks and where they are kept, it says the first step at which their weights part, by
their fingerprints.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddp_cifar.command import Arguments, percent, run_command, show, writing
from ddp_cifar.config import as_typed, essential, short_names
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.run_dir import RunDir

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run_dir says."""

    path: Path
    status: str
    config: dict[str, Any]
    """What is `essential` of it, by dotted keys."""
    rows: list[Row]

    @staticmethod
    def read(path: Path) -> "Run":
        """Raises `UserError` if it is not the run_dir of a run."""
        run_dir = RunDir(str(path))
        try:
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
            lines = run_dir.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [
                json.loads(line) for line in lines if line.endswith("\n")
            ]  # of a run under way the last may be half
        except OSError as error:
            raise UserError(f"{path} is not the run_dir of a run ({error.strerror}: {error.filename})") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
        return Run(path, run_dir.read_status(), essential(config), rows)

    @property
    def evaluations(self) -> list[Row]:
        """The rows that have an accuracy on test images, or else on held-out ones."""
        return [row for row in self.rows if self.tag in row]

    @property
    def tag(self) -> str:
        return "test/accuracy" if any("test/accuracy" in row for row in self.rows) else "val/accuracy"

    @property
    def accuracy(self) -> float | None:
        """The last one: choosing the best by test images would flatter it."""
        return self.evaluations[-1][self.tag] if self.evaluations else None

    @property
    def images_per_s(self) -> float | None:
        """The median over rows; of a run too short to have some, over epochs."""
        for tag in ("train/images_per_s", "train/epoch_images_per_s"):
            if speeds := [row[tag] for row in self.rows if row.get(tag)]:
                return float(statistics.median(speeds))
        return None

    def seconds(self) -> list[float]:
        """Of each evaluation: training and evaluating since the run's start, as far as rows tell."""
        return [row.get("run/productive_s", 0.0) for row in self.evaluations]

    def fingerprints(self) -> dict[int, str]:
        """By step."""
        return {row["step"]: row["fingerprint"] for row in self.rows if "fingerprint" in row}


def main(argv: Sequence[str]) -> int:
    """Print the tables, draw the plot where it is asked for, and return the exit status."""
    parser = Arguments("ddp_cifar.compare", __doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--png", type=Path, help="draw accuracy against steps, time and images into this file")
    options = parser.parse_intermixed_args(argv)
    begun = [path for path in options.run_dirs if not (path / "lock").exists() or RunDir(str(path)).metrics.exists()]
    for path in sorted(set(options.run_dirs) - set(begun)):
        log.warning(f"{path} is left out: its run has not begun")
    if not begun:
        raise UserError("none of these runs has begun")
    runs = [Run.read(path) for path in begun]
    show("\n".join([_table(runs), *_over_seeds(runs), *_partings(runs)]))
    if options.json:
        with writing(options.json):
            options.json.write_text(json.dumps([_summary(run) for run in runs], indent=1) + "\n", encoding="utf-8")
    if options.png:
        with writing(options.png):
            draw_curves(runs, options.png)
    return 0


def _summary(run: Run) -> Row:
    last: Row = run.rows[-1] if run.rows else {}
    return {
        "run_dir": str(run.path),
        "status": run.status,
        "seed": run.config.get("seed"),
        "step": last.get("step", 0),
        "epoch": max((row.get("train/epoch", 0) for row in run.rows), default=0),
        "accuracy": run.accuracy,
        "best_accuracy": max((row[run.tag] for row in run.evaluations), default=None),
        "images_per_s": run.images_per_s,
        "restarts": last.get("run/restarts", 0),
    }


def _different(runs: Sequence[Run]) -> dict[str, str]:
    """Keys of the config, but for the seed, in which runs differ, and a short name of each."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "seed")
    different = [key for key in keys if len({as_typed(run.config.get(key)) for run in runs}) > 1]
    names = short_names(["seed", *different])
    return {key: names[key] for key in different}


def _table(runs: Sequence[Run]) -> str:
    different = _different(runs)
    head = ["run_dir", "status", "seed", *different.values(), "epoch", "step", "accuracy", "best", "images/s"]
    rows = [head]
    for run in runs:
        row = _summary(run)
        rows.append(
            [
                row["run_dir"],
                row["status"].split(":")[0],
                str(row["seed"]),
                *(as_typed(run.config.get(key)) for key in different),
                str(row["epoch"]),
                str(row["step"]),
                percent(row["accuracy"]),
                percent(row["best_accuracy"]),
                "-" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    words = 2  # columns, which begin at one place; numbers end at one
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < words else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )


def _over_seeds(runs: Sequence[Run]) -> list[str]:
    """A line for each group of runs that are alike but for the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = {key: value for key, value in run.config.items() if key != "seed"}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    lines, different = [], _different(runs)
    for group in groups.values():
        by_seed = {
            run.config.get("seed"): run for run in group if run.accuracy is not None and run.status == "finished"
        }
        if len(by_seed) < 2:
            continue
        accuracies = [run.accuracy for run in by_seed.values() if run.accuracy is not None]
        mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
        own = "".join(f"{short}={as_typed(group[0].config.get(key))}, " for key, short in different.items())
        lines.append(
            f"{own}over {len(by_seed)} seeds ({', '.join(str(seed) for seed in by_seed)}): accuracy {percent(mean)}, "
            f"standard deviation {percent(std)}"
        )
    return lines


def _partings(runs: Sequence[Run]) -> list[str]:
    """A line for each two runs of one config: where their weights part."""
    lines = []
    for one, other in itertools.combinations(runs, 2):
        if one.config != other.config:
            continue
        mine, theirs = one.fingerprints(), other.fingerprints()
        common = sorted(mine.keys() & theirs.keys())
        if not common:
            continue
        parted = next((step for step in common if mine[step] != theirs[step]), None)
        if parted is None:
            lines.append(
                f"{one.path} and {other.path}: the same weights at all {len(common)} fingerprints to step {common[-1]}"
            )
        else:
            before = max((step for step in common if step < parted), default=0)
            lines.append(f"{one.path} and {other.path}: weights part after step {before}, by step {parted}")
    return lines


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw each run's accuracy against steps, time and images."""
    from matplotlib.figure import Figure  # here, as it takes a while; and without pyplot, which wants a display

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    by_steps, by_time, by_images = figure.subplots(1, 3, sharey=True)
    for run in runs:
        accuracies = [100 * row[run.tag] for row in run.evaluations]
        steps = [row["step"] for row in run.evaluations]
        images = run.config.get("train.global_batch_size", 0)
        by_steps.plot(steps, accuracies, marker=".", label=str(run.path))
        by_time.plot([seconds / 60 for seconds in run.seconds()], accuracies, marker=".")
        by_images.plot([step * images / 1e6 for step in steps], accuracies, marker=".")
    by_steps.set_ylabel("accuracy, %")
    by_steps.set_xlabel("steps")
    by_time.set_xlabel("time, minutes")
    by_images.set_xlabel("images trained on, millions")
    by_steps.legend(fontsize=8)
    for axes in (by_steps, by_time, by_images):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    run_command(main)
